"""Stage audit-probe: every token with its reason, the summary line, and the exit status when nothing was kept."""

import json
import re

import numpy as np
import pytest

from vlakeep.core.config import ConfigError
from vlakeep.core.storage import PACKAGE
from vlakeep.data.sample import Sample
from vlakeep.openvla import audit
from vlakeep.openvla.tiny import build_tiny_tokenizer
from vlakeep.probe.probe_set import ProbeError, write_probe

TEXTS = ["pick up the [bold] ring", "where is the ring?", "reach the cube"]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A storage root with a tokenizer folder as base model (no weights) and a probe of 10 items of two kinds."""
    for name in ("HF_HOME", "VLAKEEP_ROOT"):
        monkeypatch.delenv(name, raising=False)
    model = tmp_path / "hf_cache" / "tiny"
    build_tiny_tokenizer(TEXTS, [], model, 640)
    (model / "config.json").write_text(json.dumps({"model_type": "openvla"}))
    image = np.zeros((4, 4, 3), np.uint8)
    samples = [Sample(image, TEXTS[0]) for _ in range(5)] + [Sample(image, TEXTS[1], question=True) for _ in range(4)]
    write_probe(tmp_path / "probe" / "p", [*samples, Sample(image, "")], ["pick"] * 5 + ["where"] * 5)
    return tmp_path


def run(root, name="p", size=10):
    return audit.main(["--root", str(root), "--backbone.checkpoint", "tiny", "--probe.name", name, "--probe.size", str(size)])


def test_three_items_of_each_kind_are_explained_and_all_are_counted(root, capsys):
    assert run(root) == 0
    out = capsys.readouterr().out
    assert re.findall(r"item (\d+, \w+)", out) == ["0, pick", "1, pick", "2, pick", "5, where", "6, where", "7, where"]
    assert "[bold]" in out, "text in brackets is printed, not taken for a style"
    for reason in ("special token", "template", "newline", "empty token", "instruction"):
        assert f" {reason} " in out
    assert re.search(r"\bring\b.*kept.*instruction", out) and not re.search(r"robot.*kept.*template", out)
    last = out.strip().splitlines()[-1]
    assert last.startswith("10 items of 2 kinds; kept tokens per item: min 0, mean") and last.endswith("empty masks: 1")


def test_nothing_is_written(root):
    before = sorted(path for path in (root / "probe").rglob("*")) + sorted((root / "hf_cache").rglob("*"))
    run(root)
    assert sorted(path for path in (root / "probe").rglob("*")) + sorted((root / "hf_cache").rglob("*")) == before
    assert not any((root / "artifacts").iterdir())


def test_only_empty_masks_fail(root, capsys):
    write_probe(root / "probe" / "mute", [Sample(np.zeros((4, 4, 3), np.uint8), "")] * 2, ["none"] * 2)
    assert run(root, "mute", 2) == 1
    assert capsys.readouterr().out.strip().endswith("max 0; empty masks: 2")


def test_missing_inputs_name_the_remedy(root):
    with pytest.raises(ProbeError, match="--probe.size asks for 11"):
        run(root, size=11)
    with pytest.raises(ProbeError, match="no probe set at"):
        run(root, "other")
    with pytest.raises(FileNotFoundError, match="--backbone.checkpoint"):
        audit.main(["--root", str(root), "--backbone.checkpoint", "absent", "--probe.name", "p"])
    with pytest.raises(ConfigError, match="--items in the command line: `vlakeep audit-probe` does not read it"):
        audit.main(["--root", str(root), "--items", "3"])


BASE = PACKAGE / "assets" / "tabletop-base"


@pytest.mark.skipif(not (BASE / "config.json").is_file(), reason="the base model is not in this checkout")
def test_the_base_model_that_ships(root, capsys):
    write_probe(root / "probe" / "p", [Sample(np.zeros((64, 64, 3), np.uint8), "pick up the red circle")] * 2, ["pick"] * 2)
    assert audit.main(["--root", str(root), "--probe.name", "p", "--probe.size", "2"]) == 0
    assert capsys.readouterr().out.strip().endswith("min 5, mean 5.0, max 5; empty masks: 0")
