"""A study on a kind of card: what `--hardware` sets in its cells, what of the file stays, and what a study needs before it begins."""

from pathlib import Path

import pytest
import yaml
from test_layout import REPO

from vlakeep import cli, study
from vlakeep.core.config import Config, ConfigError, load_config
from vlakeep.core.options import split
from vlakeep.core.study import OPEN, READY, read_study, read_tree
from vlakeep.studies.cards import card_words, on_card

SEVEN_B = "studies/libero_7b.yaml"
NOWHERE = Path("/nonexistent")


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(REPO)


def configurations(commands):
    """(stage, its configuration) as it comes to each command."""
    for words in commands:
        _, file, pairs = split(cli.STAGES[words[0]], words[1:])
        yield words[0], load_config(file, pairs)


def study_file(path, **changed):
    tree = {"name": "small", "settings": {"backbone.checkpoint": "openvla/openvla-7b", "lora.layers": "last:8"}, "seeds": [1, 2],
            "rates": [1e-3],
            "tasks": {"spatial": {"data.datasets": ["libero_spatial_no_noops"]}},
            "arms": {"base": {"config": "configs/baseline_lora.yaml"}, "plain": {"config": "configs/baseline_lora.yaml"}}, **changed}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(path)


def test_all_cells_of_the_7b_study_are_float16_and_4_bits_on_a_v100(tmp_path):
    before, words = read_study(SEVEN_B), ["--hardware", "v100x8"]
    cells, lines = on_card(before, words, NOWHERE)
    assert [cell.name for cell in cells] == [cell.name for cell in before]
    commands = {cell.name: [*cell.commands(OPEN), *cell.commands(READY)] for cell in cells}
    opened = study.open_study(SEVEN_B, [f"--root={tmp_path}"], card=words)
    commands["artefacts"] = [needed.words for needed in study.artefacts(opened).values()]
    stages = set()
    for name, own in commands.items():
        for stage, config in configurations(own):
            stages.add(stage)
            if "backbone.dtype" not in cli.STAGES[stage].reads():  # interpolate, which loads no model
                continue
            assert (config.backbone.dtype, config.backbone.quantisation) == ("float16", "nf4"), (name, stage)
            assert stage != "train" or config.train.autocast == "float16", name
    assert {"offline", "train", "evaluate"} <= stages and len(commands["artefacts"]) == 3
    assert all(cell.source is None or cell.source in cells for cell in cells)
    assert len(lines) == len(set(lines)) == 5
    assert any("--backbone.quantisation nf4 (weights of float16 take 14.0 of 15" in line for line in lines)
    assert {(cell.config().train.batch_size, cell.config().train.accumulation) for cell in cells} == {(8, 2)}, "as the file says: it fits"


def test_what_a_study_names_stays_where_the_card_can_do_it(tmp_path):
    def of(words, **changed):
        cells, lines = on_card(read_study(study_file(tmp_path / "one.yaml", **changed)), ["--hardware", *words], NOWHERE)
        for cell in cells:
            assert cell.config().backbone == cells[0].config().backbone, "cells of one base agree"
        return cells[-1].config(), "\n".join(lines)

    config, _ = of(["h100"])
    assert (config.backbone.dtype, config.train.autocast, config.device) == ("bfloat16", "bfloat16", "cuda"), "nobody names them"
    named = {"backbone.checkpoint": "openvla/openvla-7b", "lora.layers": "last:8", "backbone.dtype": "float32", "train.batch_size": 2}
    config, said = of(["h100"], settings=named)
    assert (config.backbone.dtype, config.train.batch_size) == ("float32", 2) and "backbone.dtype" not in said
    config, said = of(["v100x8"], settings={**named, "train.batch_size": 512, "backbone.dtype": "bfloat16"})
    assert config.backbone.dtype == "float16" and "in place of bfloat16" in said
    assert config.train.batch_size < 512 == config.train.batch_size * config.train.accumulation and "[plain, spatial]" in said
    # The command line beats both.
    config, said = of(["v100x8", "--backbone.quantisation=none", "--train.batch_size=3"], settings=named)
    assert (config.backbone.quantisation, config.train.batch_size) == ("none", 3) and "train does not fit" in said
    # All cells, or none of them.
    plain = {"config": "configs/baseline_lora.yaml"}
    wide = {**plain, "lora.modules": ["all-linear"], "lora.layers": "all"}
    config, said = of(["v100x8"], arms={"wide": wide, "plain": plain})
    assert config.backbone.quantisation == "none" and "some refuse 4 bits" in said and "[wide, spatial]" in said
    config, said = of(["v100x8"], settings={"backbone.checkpoint": "of/nobody"})
    assert config.backbone.dtype == "float16" and "what of of/nobody fits is decided when it is there" in said


def test_every_call_of_a_study_gets_its_card_and_without_one_nothing_changes(tmp_path, capsys):
    file, root = study_file(tmp_path / "one.yaml"), f"--root={tmp_path / 'root'}"
    plain = study.open_study(file, [root])
    assert plain.cells == read_study(file) and "--hardware" not in study.cell_words(plain, plain.cells[1])
    card = ["--hardware", "v100x8", "--train.batch_size=1"]
    opened = study.open_study(file, [root], card=card)
    _, config = next((cell, config) for cell, config in opened.configs.items() if not cell.is_base)
    assert (config.backbone.dtype, config.train.batch_size) == ("float16", 1)
    assert study.cell_words(opened, opened.cells[1]) == ["study", file, "--cell", opened.cells[1].cell, *card, root]
    study.main([file, "--dry-run", *card, root])
    said = capsys.readouterr().out
    assert "--backbone.dtype float16" in said and "--train.batch_size 1" in said
    assert card_words(["--root=x", "--device=cpu"], "h100", "local") == (["--root=x"], ["--hardware", "h100", "--device=cpu"])
    assert card_words(["--root=x"], None, "slurm") == (["--root=x"], [])
    with pytest.raises(ConfigError, match="here it goes with --hardware NAME"):
        card_words(["--device=cpu"], None, "local")
    with pytest.raises(ConfigError, match="name their card"):
        card_words([], "auto", "slurm")


@pytest.mark.parametrize("file", sorted((REPO / "studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_no_study_lowers_the_authors_sensor_unless_its_arm_says_so(file):
    """The covariance of fewer items is another sensor: its sampling noise is larger."""
    arms, looked = read_tree(file)["arms"], set()
    for cell in read_study(file):
        like = (cell.declared or cell.arm, cell.task)
        if like in looked or cell.is_base:
            continue
        looked.add(like)
        config, own = cell.config(), arms[like[0]] or {}
        theirs = config.method == "icsm_hsw_thermostat" and config.thermostat.enabled
        if theirs and "thermostat.batch_size" not in own:
            assert config.thermostat.batch_size >= Config().thermostat.batch_size, like


def test_the_authors_arms_measure_on_64_items_in_the_7b_study():
    sizes = {cell.arm: cell.config().thermostat.batch_size for cell in read_study(SEVEN_B)}
    assert sizes["frozen"] == sizes["lora_input"] == 64 and sizes["graded"] == 16
    made = {cell.arm: cell.config().icsm for cell in read_study(SEVEN_B)}
    assert (made["frozen"].tokens, made["lora_input"].tokens) == (False, True) and made["frozen"].name != made["lora_input"].name


def test_a_study_without_its_base_lists_cells_and_all_that_is_missing(tmp_path, capsys):
    assert study.main([SEVEN_B, "--dry-run", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "graded-spatial-lr0.0005-s1" in said and said.count("MISSING base model: no base model") == 1
    assert f"vlakeep fetch openvla/openvla-7b-finetuned-libero-object --root {tmp_path}" in said
    for suite in ("spatial", "goal", "object"):  # object: of the replay
        assert said.count(f"MISSING data set libero_{suite}_no_noops") == 1, suite
    assert said.count("MISSING --evaluate.probe") == said.count("MISSING probe:") == 1
    assert f"vlakeep libero-vqa --suite libero_object --split heldout --probe.name keep_heldout --root {tmp_path}" in said


def test_a_probe_is_asked_for_once_and_as_large_as_any_arm_takes_it(tmp_path, capsys):
    arms = {f"graded_{size}": {"config": "configs/method_graded.yaml", "probe.name": "tabletop_own", "probe.size": size}
            for size in (60, 300, 90)}
    file = study_file(tmp_path / "one.yaml", arms=arms, settings={})
    study.main([file, "--dry-run", "--root", str(tmp_path / "root")])
    said = capsys.readouterr().out
    assert said.count("MISSING probe") == 1 and "--probe.name tabletop_own --probe.size 300" in said
