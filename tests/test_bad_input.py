"""Mistakes and accidents through the command line: one message with thing, place and remedy, exit status 2, nothing lost."""

import fcntl
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import BASELINE, METHOD, SMALL
from safetensors.torch import load_file, save_file
from test_storage import file_size_limit, names

from vlakeep import cli
from vlakeep.benchmarks.records import Records
from vlakeep.core.checkpoint import list_checkpoints
from vlakeep.core.errors import DiskFull, explain
from vlakeep.core.rundir import RunLock, read_metrics
from vlakeep.core.strict_yaml import read_mapping
from vlakeep.data import writer
from vlakeep.data.rlds import RldsDataset
from vlakeep.data.sample import Episode, Sample
from vlakeep.offline import run_offline
from vlakeep.probe.probe_set import write_probe
from vlakeep.tabletop import benchmark as tabletop
from vlakeep.teacher import icsm_artifact as artifact
from vlakeep.train import run_training

ASSET = Path(cli.__file__).parent / "assets" / "tabletop-base"
EVALUATE = ["--evaluate.episodes", 1, "--evaluate.questions_per_kind", 1, "--evaluate.retention_frames", 2]


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*argv): (exit status, what it printed, its error message without "error: "), in this process."""
    monkeypatch.setattr("vlakeep.core.storage.prepare_environment", lambda *args, **kwargs: None)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["vlakeep", *map(str, argv)])
        capsys.readouterr()
        status = cli.main()
        done = capsys.readouterr()
        assert "Traceback" not in done.err
        return status, done.out, done.err.partition("error: ")[2]

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(command):
    """refused(*argv): the message of a command that must end with exit status 2."""
    def run(*argv):
        status, _, message = command(*argv)
        assert status == 2, f"exit status {status}, not 2"
        return message

    return run


@pytest.fixture
def small(world):
    """small(stage, file, *overrides): the arguments of a small run in the shared root, of name, SMALL and EVALUATE what it reads."""
    storage, _ = world

    def arguments(stage, file, *overrides):
        options, taken = [*SMALL, *EVALUATE], cli.STAGES[stage].names()
        own = [word for pair in zip(options[::2], options[1::2]) if pair[0][2:] in taken for word in pair]
        given = list(overrides)
        if "--name" in given and "name" not in taken:
            del given[given.index("--name"):given.index("--name") + 2]
        return [stage, "--config", file, *own, "--root", storage.root, *given]

    return arguments


@pytest.fixture(scope="module")
def trained(world):
    """A finished baseline run of six steps, to be copied and damaged."""
    storage, make_config = world
    return run_training(make_config(BASELINE, "--name", "bad-trained"), storage)


@pytest.fixture
def copied(trained):
    """A copy of the finished run under another name."""
    folder = trained.with_name("bad-copy")
    shutil.rmtree(folder, ignore_errors=True)
    yield Path(shutil.copytree(trained, folder))
    shutil.rmtree(folder)


@pytest.fixture
def base(tmp_path):
    """A copy of the base model that may be damaged."""
    return Path(shutil.copytree(ASSET, tmp_path / "base"))


def has(message, *words):
    for word in words:
        assert str(word) in message, f"{word!r} is not in {message!r}"


# ---- the command line and configuration files ----


@pytest.mark.parametrize("argv, words", [
    (["--train.lr"], ["--train.lr on the command line has no value", "a number", "--train.lr 0.0005"]),
    (["--train.resume", "--name", "x"], ["--train.resume on the command line has no value", "--train.resume true"]),
    (["--root"], ["--root on the command line has no value"]),
    (["stray"], ["`stray` on the command line belongs to no key", "--section.key VALUE"]),
    (["-train.lr", "3"], ["`-train.lr` on the command line belongs to no key", "--section.key VALUE"]),
    (["--train", "5"], ["`train` in the command line is a section", "--train.steps"]),
    (["--x", "1"], ["unknown key `x` in the command line", "--help"]),
    (["--train.lr", "fast"], ["--train.lr must be a number, not 'fast' (on the command line)"]),
    (["--train.steps", "1.5"], ["--train.steps must be a whole number, not '1.5'"]),
    (["--train.resume", "maybe"], ["--train.resume must be true or false, not 'maybe'"]),
    (["--hsw.layers", "x"], ["--hsw.layers must be a list of whole numbers such as '[1, 2]', or null"]),
    (["--data.datasets", "one"], ["--data.datasets must be a list of words such as '[one, two]', not 'one'"]),
    (["--train.lr", "inf"], ["--train.lr inf: must be a finite number"]),
    (["--name", "0000-00-00"], ["--name '0000-00-00' on the command line cannot be read", "put quotes around a text"]),
    (["--probe.name", "!!int a"], ["--probe.name '!!int a' on the command line cannot be read"]),
    (["--threads", "0"], ["--threads 0: must be at least 1"]),
    (["--seed", "-5"], ["--seed -5: must be in [0, 2^32)"]),
    (["--evaluate.seed", "-5"], ["--evaluate.seed -5: must be null, or in [0, 100000)"]),
    (["--evaluate.retention_frames", "0"], ["--evaluate.retention_frames 0: must be at least 1"]),
    (["--evaluate.target", ".."], ["--evaluate.target '..': must be base, the name of a run"]),
    (["--icsm.layers", "[]"], ["--icsm.layers []: must be null, or different layer numbers"]),
    (["--icsm.layers", "[3, 3]"], ["--icsm.layers [3, 3]: must be null, or different layer numbers"]),
    (["--hsw.layers", "[-1]"], ["--hsw.layers [-1]: must be null, or different layer numbers"]),
    (["--hsw.layers", "[]"], ["--hsw.layers []: must be", "--hsw.enabled false"]),
    (["--thermostat.every", "0", "--hsw.beta", "0", "--hsw.gamma", "2"],
     ["--thermostat.every 0: must be at least 1", "--hsw.beta 0.0: must be in (0, 1]", "--hsw.gamma 2.0: must be in [0, 1]"]),
])
def test_mistakes_on_the_command_line(refused, tmp_path, argv, words):
    has(refused("evaluate" if argv[0].startswith("--evaluate.") else "train", *argv), *words)


@pytest.mark.parametrize("content, words", [
    (b"", ["must hold `key: value` pairs as the files in vlakeep/configs/ do, not nothing"]),
    (b"train: 3\n", ["`train` in ", "is a section", "train: {steps: ...}"]),
    (b"train:\nname: x\n", ["`train` in ", "is a section"]),
    (b"train: {lr: 1}\nname: x\ntrain: {steps: 3}\n", ["not valid YAML: `train` comes twice", "line 3"]),
    (b"train: {resume: 3}\n", ["--train.resume must be true or false, not 3 (in "]),
    (b"hsw: {layers: [1, x]}\n", ["--hsw.layers must be a list of whole numbers"]),
    (b"\xff\xfe\x00", ["cannot be read as text", "configs/"]),
    (None, ["no configuration file at", "those that ship are baseline_lora, method_distillation, method_graded, "]),
])
def test_files_that_are_no_configuration(refused, tmp_path, content, words):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_bytes(content)
    has(refused("train", "--config", path), path, *words)


@pytest.mark.parametrize("content", [b"train: [", b"a: 1\na: 2\n", b"\xff", b"[]", b"a: 2001-99-99\n", b"a: " + b"[" * 3000, b"{[a]: 1}"])
def test_a_damaged_configuration_is_a_damaged_file(refused, tmp_path, content):
    """Of a run, and one that is given: PyYAML says of some in Python's own words, or keeps the last of two equal keys."""
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    has(refused("train", "--config", path), path)
    with pytest.raises(ValueError, match="is damaged") as error:
        read_mapping(path, "train again")
    has(str(error.value), path, "train again")


def test_a_value_may_start_with_a_minus():
    from vlakeep.core.config import load_config

    assert load_config(None, ["--name", "-x"]).name == "-x"


def test_messages_of_the_system_get_a_remedy():
    has(explain(PermissionError(13, "Permission denied", "/x")), "Permission denied: '/x'. Change the permissions", "--root DIR")
    has(explain(OSError(28, "No space left on device")), "No space left", "Free some space", "--root DIR")
    assert explain(ValueError("as it is")) == "as it is" and explain(DiskFull("as it is")) == "as it is"


# ---- inputs that are missing or of another experiment ----


@pytest.mark.parametrize("stage, overrides, words", [
    ("train", ["--backbone.checkpoint", "no/model"], ["no base model 'no/model'", "vlakeep fetch no/model"]),
    ("offline", ["--backbone.checkpoint", "/no/model"], ["no base model '/no/model'", "--backbone.checkpoint"]),
    ("train", ["--data.datasets", "[tabletop_none]"], ["datasets/tabletop_none", "vlakeep tabletop-data"]),
    ("train", ["--root", Path(__file__).parent / "x"], ["tests/x lies inside the source tree", "--root DIR"]),
    ("train", ["--run_root_dir", "/tmp"], ["--run_root_dir /tmp leads to /tmp, outside the storage root", "--root"]),
    ("train", ["--icsm.name", "none"], ["no ICSM artefact at", "artifacts/none", "vlakeep offline"]),
    ("train", ["--probe.name", "none"], ["no probe set at", "probe/none", "vlakeep tabletop-data"]),
    ("offline", ["--probe.name", "none"], ["no probe set at", "probe/none", "vlakeep tabletop-data"]),
    ("offline", ["--probe.size", 500], ["has 48 items, --probe.size asks for 500", "vlakeep tabletop-data"]),
    ("train", ["--probe.size", 40], ["was made from 48 probe items, this run asks for 40", "vlakeep offline"]),
    ("train", ["--icsm.layers", "[2, 4]"], ["was made with icsm.layers [3, 5], this run asks for [2, 4]", "vlakeep offline"]),
    ("train", ["--thermostat.batch_size", 64], ["larger than the 48 usable probe items", "--thermostat.batch_size 48"]),
    ("train", ["--hsw.layers", "[9]"], ["hsw.layers [9]: the model has layers 0 to 5", "[2, 3, 4, 5]", "--hsw.layers"]),
    ("train", ["--hsw.layers", "[1]"], ["protection groups", "[2, 3, 4, 5]", "vlakeep offline"]),
    ("train", ["--lora.layers", "4-6"], ["--lora.layers '4-6': the model has layers 0 to 5", "last:N"]),
    ("train", ["--lora.modules", "[atention]"], ["--lora.modules ['atention']: must be among attention, mlp"]),
    ("offline", ["--icsm.layers", "[3, 6]"], ["icsm.layers [6] out of range", "layers 0 to 5", "--icsm.layers"]),
    ("evaluate", ["--evaluate.skills", "[rech]"], ["--evaluate.skills ['rech']: must be among reach"]),
    ("evaluate", ["--evaluate.questions", "[colour]"], ["--evaluate.questions ['colour']: must be among color"]),
    ("evaluate", ["--backbone.unnorm_key", "none"], ["no action statistics of 'none'", "--backbone.unnorm_key"]),
])
def test_inputs_that_are_missing_or_do_not_fit(refused, small, world, stage, overrides, words):
    storage, _ = world
    has(refused(*small(stage, METHOD, "--name", "bad-input", *overrides)), *words)
    assert not (storage.runs / "bad-input").exists()


def test_artefact_of_another_probe_or_other_weights(refused, small, world, base):
    storage, _ = world
    write_probe(storage.probe / "bad-other", *tabletop.make_probe(48, seed=99))
    message = refused(*small("train", METHOD, "--probe.name", "bad-other"))
    has(message, "icms_tabletop-base was made from another probe", "vlakeep offline")
    tensors = load_file(base / "model.safetensors")
    tensors["projector.fc1.bias"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    has(refused(*small("train", METHOD, "--backbone.checkpoint", base, "--icsm.name", "icms_tabletop-base")),
        "icms_tabletop-base was made for other base weights", "vlakeep offline")


@pytest.fixture
def artefact(world):
    """A copy of the artefact that may be damaged; --icsm.name bad-artefact."""
    storage, _ = world
    folder = storage.artifacts / "bad-artefact"
    yield Path(shutil.copytree(storage.artifacts / "icms_tabletop-base", folder))
    shutil.rmtree(folder)


@pytest.mark.parametrize("meta, words", [
    ("{", ["is damaged", "vlakeep offline"]),
    ("[]", ["has format None", "vlakeep offline"]),
    ('{"format": 3}', ["lacks weights_sha256", "vlakeep offline"]),
])
def test_damaged_meta_of_an_artefact(refused, small, artefact, meta, words):
    (artefact / "meta.json").write_text(meta)
    has(refused(*small("train", METHOD, "--icsm.name", "bad-artefact")), artefact / "meta.json", *words)


def remake(folder, tokens, lora, section):
    """The artefact in `folder` as `vlakeep offline` would have made it with these tokens and this lora section."""
    meta = json.loads((folder / "meta.json").read_text())
    meta["config"]["tokens"], meta["lora"] = section, lora
    meta.pop("meta_sha256")
    if tokens is None:
        (folder / "tokens.safetensors").unlink()
        meta["files"].pop("tokens.safetensors")
    else:
        save_file(tokens, folder / "tokens.safetensors")
        from vlakeep.core.checkpoint import file_sha256

        meta["files"]["tokens.safetensors"] = file_sha256(folder / "tokens.safetensors")
    (folder / "meta.json").write_text(json.dumps(meta))


def test_lora_input_with_an_artefact_made_without_tokens(refused, small, artefact):
    remake(artefact, None, {"layers": "all", "modules": ["attention"]}, False)
    argv = ["--icsm.name", "bad-artefact", "--hsw.site", "lora_input"]
    has(refused(*small("train", METHOD, *argv)), artefact, "icsm.tokens False, this run asks for True", "vlakeep offline")
    has(refused(*small("train", METHOD, *argv, "--icsm.tokens", False)), artefact, "vlakeep offline --icsm.tokens true")


def test_lora_input_with_an_artefact_made_for_fewer_layers(refused, small, artefact):
    tokens = {k: v for k, v in load_file(artefact / "tokens.safetensors").items() if k.startswith(("layers.4.", "layers.5."))}
    remake(artefact, tokens, {"layers": "4,5", "modules": ["attention", "mlp"]}, True)
    has(refused(*small("train", METHOD, "--icsm.name", "bad-artefact", "--hsw.site", "lora_input")), artefact,
        "28 of the 42 adapted linears", "layers.0.self_attn.q_proj", "'layers': '4,5'", "vlakeep offline", "--lora.layers")


# ---- damaged files ----


def poison(path, content):
    path.write_bytes(content(path.read_bytes()) if callable(content) else content)


@pytest.mark.parametrize("name, content, words", [
    ("model.safetensors", lambda b: b[:-100], ["8513900 bytes long, its header says 8514000", "truncated", "fetch"]),
    ("model.safetensors", lambda b: b[:3], ["truncated", "fetch"]),
    ("model.safetensors", lambda b: b[:12] + b"xxxx" + b[16:], ["not a readable safetensors file", "fetch"]),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", ["git-lfs pointer", "`git -C ", " lfs pull`"]),
    ("config.json", b"[]", ["no OpenVLA configuration", "--backbone.checkpoint"]),
    ("config.json", b'{"model_type": "llava"}', ["'llava'", "--backbone.checkpoint"]),
    ("tokenizer.json", b"{", ["damaged", "copy it from the base model"]),
    ("tokenizer_config.json", b"{", ["damaged", "copy it from the base model"]),
    ("preprocessor_config.json", b"[]", ["not an OpenVLA image processor configuration", "copy it from the base model"]),
    ("dataset_statistics.json", b"[]", ["holds no action statistics", "fetch it again or remove it"]),
    ("dataset_statistics.json", b'{"a": {}}', ["holds no action statistics", "fetch it again or remove it"]),
])
def test_damaged_base_model(refused, small, base, name, content, words):
    poison(base / name, content)
    has(refused(*small("train", BASELINE, "--backbone.checkpoint", base)), base / name, *words)


def test_weights_that_are_not_numbers(refused, small, world, base):
    storage, _ = world
    tensors = load_file(base / "model.safetensors")
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    argv = ["--backbone.checkpoint", base, "--name", "bad-nan"]
    has(refused(*small("train", BASELINE, *argv)), "loss is nan at step 1", "base weights are damaged", "float32")
    assert json.loads((storage.runs / "bad-nan" / "provenance.json").read_text())["status"] == "failed"
    has(refused(*small("offline", METHOD, *argv)), "hidden states of layer 3 are not finite", storage.probe / "tabletop",
        "fetch the base model again")


@pytest.fixture
def dataset(world):
    """A copy of the demonstrations that may be damaged: (its name for --data.datasets, its version folder)."""
    storage, _ = world
    folder = storage.data / "tabletop_bad"
    shutil.copytree(storage.data / "tabletop_corner", folder)
    yield "[tabletop_bad]", folder / "1.0.0"
    shutil.rmtree(folder)


@pytest.mark.parametrize("damage, words", [
    (lambda shard: poison(shard, lambda b: b[:-50]), ["record 11 at byte", "truncated", "copy or make the file again"]),
    (lambda shard: poison(shard, lambda b: b[:5000] + b"xxxx" + b[5004:]), ["record 0 at byte 0: checksum", "make it again"]),
    (lambda shard: shard.unlink(), ["lacks 1 of its shards", "make a tabletop set again with `vlakeep tabletop-data"]),
])
def test_damaged_records(refused, small, dataset, damage, words):
    name, folder = dataset
    shard = next(folder.glob("*.tfrecord*"))
    damage(shard)
    has(refused(*small("train", BASELINE, "--data.datasets", name)), folder, shard.name, *words)


def demonstrations(change=lambda episode: episode):
    episodes = tabletop.collect_demos("corner", 3, seed=1)
    return [change(Episode(e.images, e.actions.copy(), e.language)) for e in episodes]


def test_an_action_that_is_not_a_number(refused, small, world, monkeypatch):
    storage, _ = world
    monkeypatch.setattr(writer, "_check", lambda *args: None)
    episodes = demonstrations()
    episodes[2].actions[3, 1] = np.nan
    writer.write_rlds(storage.data, "tabletop_bad_nan", episodes)
    has(refused(*small("train", BASELINE, "--data.datasets", "[tabletop_bad_nan]")), "tabletop_bad_nan-train.tfrecord",
        "episode 2 of tabletop_bad_nan), frame 3", "nan", "leave out this episode and make the data set again")


def test_what_is_done_to_the_data_is_said(command, small, world):
    """Clipped actions, episodes without language and pictures of another size are no errors, but nothing happens silently."""
    storage, _ = world
    wide = demonstrations(lambda e: Episode(np.repeat(np.repeat(e.images, 2, axis=1), 3, axis=2), e.actions, e.language))
    wide[1].actions[2, 0] = 50
    wide[2] = Episode(wide[2].images, wide[2].actions, "")
    writer.write_rlds(storage.data, "tabletop_bad_wide", wide)
    status, out, _ = command(*small("train", BASELINE, "--data.datasets", "[tabletop_bad_wide]", "--name", "bad-wide"))
    assert status == 0
    has(out, "data tabletop_bad_wide (rlds): 2 of 3 episodes", "1 episodes without a text are left out",
        "50]  q01        -1  q99     22.56  clipped 1.8 %",
        "data tabletop_bad_wide: pictures of 128 x 192 are resized to the model's 64 x 64, which changes their shape")
    assert out.count("2 of 3 episodes") == 1 and out.count("data tabletop_bad_wide") == 2


def probe_with(world, name, blank):
    """A probe of 48 items, of which those that `blank(number)` picks have no instruction."""
    storage, _ = world
    samples, kinds = tabletop.make_probe(48, seed=7)
    samples = [Sample(s.image, "" if blank(i) else s.instruction, question=s.question) for i, s in enumerate(samples)]
    write_probe(storage.probe / name, samples, kinds)
    return storage.probe / name


def test_probe_whose_masks_are_all_empty(refused, small, world, trained):
    storage, _ = world
    folder = probe_with(world, "bad-empty", lambda i: True)
    has(refused(*small("offline", METHOD, "--probe.name", "bad-empty")), folder, "empty instruction mask", "vlakeep audit-probe")
    argv = small("evaluate", BASELINE, "--probe.name", "bad-empty", "--evaluate.target", "bad-trained")
    has(refused(*argv), folder, "empty instruction mask", "vlakeep audit-probe")
    records, = storage.eval.glob("*/tabletop/bad-trained/records.jsonl")
    assert len(records.read_text().splitlines()) == 1  # before any trial was spent


def test_probe_with_some_empty_masks(world, small, refused):
    """They are left out everywhere: the sensitivity is not measured on items that have nothing to disturb."""
    storage, make_config = world
    probe_with(world, "bad-half", lambda i: i % 2 == 0)
    argv = ["--probe.name", "bad-half", "--icsm.name", "bad-half"]
    has(refused(*small("offline", METHOD, *argv)), "icsm.rank 24", "= 23 (24 usable probe items", "--icsm.rank 23")
    config = make_config(METHOD, *argv, "--icsm.rank", 8, "--icsm.tokens", False)
    notes = artifact.load(run_offline(config, storage)).meta["per_layer"]
    assert all(max(note["kl"]) > 0 for note in notes.values())
    probe_with(world, "bad-one", lambda i: i > 0)
    has(refused(*small("offline", METHOD, "--probe.name", "bad-one")), "1 usable probe item", "vlakeep audit-probe")


def test_rank_and_space_are_looked_at_before_the_work(refused, small, monkeypatch):
    monkeypatch.setattr("vlakeep.methods.icsm_hsw_thermostat_offline.pooled_batches",
                        lambda *args, **kwargs: pytest.fail("the work has begun"))
    has(refused(*small("offline", METHOD, "--icsm.rank", 48)), "icsm.rank 48", "= 47 (48 usable", "--icsm.rank 47")
    has(refused(*small("offline", METHOD, "--icsm.name", "../../bad")), "refused to write artefact", "outside the storage root",
        "--root DIR")
    monkeypatch.setattr("vlakeep.core.storage.free_bytes", lambda path: 1000)
    has(refused(*small("offline", METHOD)), "no space for the ICSM artefact", "icms_tabletop-base", "1000 bytes", "--root")


def test_the_probe_folder_is_looked_at_before_the_data_are_made(refused, small, monkeypatch, tmp_path):
    monkeypatch.setattr(tabletop, "collect_demos", lambda *args, **kwargs: pytest.fail("the work has begun"))
    has(refused(*small("tabletop-data", METHOD, "--probe.name", tmp_path / "p")), "refused to write probe", tmp_path / "p",
        "outside the storage root", "--root DIR")


# ---- devices ----


@pytest.mark.parametrize("overrides, words", [
    (["--backbone.dtype", "float16"], ["--backbone.dtype float16: not on a CPU", "--backbone.dtype float32"]),
    (["--train.autocast", "float16"], ["--train.autocast float16: not on a CPU", "--train.autocast none"]),
    (["--backbone.attn_implementation", "flash_attention_2"], ["flash_attention_2: it needs a GPU", "sdpa"]),
    (["--device", "cuda"], ["--device cuda: no GPU in sight", "--device cpu"]),
])
def test_what_the_device_cannot_do(refused, small, monkeypatch, overrides, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    has(refused(*small("train", BASELINE, *overrides)), *words)


# ---- run folders ----


def resume(small, *overrides):
    return small("train", BASELINE, "--name", "bad-copy", "--train.resume", True, "--train.steps", 8, *overrides)


def test_a_second_run_in_the_folder(refused, small, copied, monkeypatch):
    monkeypatch.setattr("vlakeep.train.make_backbone", lambda *args: pytest.fail("the model was loaded first"))
    again = small("train", BASELINE, "--name", "bad-copy")
    has(refused(*again), copied, "already holds a run (status: finished)", "--train.resume true", "--name", "rm -r")
    has(refused(*resume(small, "--train.lr", 1, "--lora.rank", 2)), copied, "train.lr: 0.002 -> 1.0", "lora.rank: 4 -> 2",
        copied / "config.yaml")
    lock = RunLock(copied)
    try:
        has(refused(*again), copied, f"in use by another process (pid {os.getpid()}", "--name")
    finally:
        lock.release()


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "config.yaml").unlink(), ["config.yaml is missing or damaged", "restore the file", "--name"]),
    (lambda f: (f / "config.yaml").write_text(""), ["config.yaml is missing or damaged", "restore the file", "--name"]),
    (lambda f: poison(f / "metrics.jsonl", lambda b: b.replace(b'{"step": 2', b'{"stop": 2')),
     ["metrics.jsonl line 2 is damaged", "delete that line"]),
])
def test_damaged_run_folders(refused, small, copied, damage, words):
    before = (copied / "provenance.json").read_bytes()
    damage(copied)
    has(refused(*resume(small)), copied, *words)
    assert (copied / "provenance.json").read_bytes() == before and len(list_checkpoints(copied)) == 2


def test_a_damaged_record_of_sessions_stops_nobody(command, small, copied):
    (copied / "provenance.json").write_text("[1]")
    status, out, _ = command(*resume(small))
    assert status == 0 and "steps 7 to 8" in out


def test_damaged_optimizer_states(command, refused, small, copied):
    """One damaged checkpoint costs the steps since the one before; with none intact the old results are not written over."""
    checkpoints = [folder for _, folder in list_checkpoints(copied)]
    poison(checkpoints[1] / "optimizer.safetensors", lambda b: b[:-10])
    status, out, _ = command(*resume(small))
    assert status == 0 and "steps 4 to 8" in out
    rows = (copied / "metrics.jsonl").read_bytes()
    for _, folder in list_checkpoints(copied):
        poison(folder / "optimizer.safetensors", lambda b: b[:-10])
    has(refused(*resume(small)), copied, "none of its checkpoints", "is intact", "--name", f"rm -r {copied}")
    assert (copied / "metrics.jsonl").read_bytes() == rows


def test_resume_of_a_run_that_is_done(command, small, copied):
    rows = read_metrics(copied)
    for steps in (6, 2):
        status, out, _ = command(*resume(small, "--train.steps", steps))
        assert status == 0 and f"already at step 6 of {steps}; to go on, raise --train.steps" in out
    assert read_metrics(copied) == rows and len(list_checkpoints(copied)) == 2


def test_a_base_model_that_was_changed(refused, small, copied, base):
    """Same path, other weights: the adapter would mean something else."""
    tensors = load_file(base / "model.safetensors")
    tensors["projector.fc1.bias"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    poison(copied / "config.yaml", lambda b: b.replace(b"tabletop-base", str(base).encode()))
    argv = ["--backbone.checkpoint", base]
    words = ["step_000006 was trained on other base weights", "--backbone.checkpoint"]
    has(refused(*resume(small, *argv)), copied, *words)
    has(refused(*small("evaluate", BASELINE, *argv, "--evaluate.target", "bad-copy")), copied, *words)


def test_full_disk_during_training(refused, small, world):
    storage, _ = world
    with file_size_limit(400_000):
        message = refused(*small("train", BASELINE, "--name", "bad-full"))
    folder = storage.runs / "bad-full"
    has(message, folder / "checkpoints" / "step_000003", "the disk (or a quota) was full", "--root")
    assert names(folder / "checkpoints") == [] and len(read_metrics(folder)) == 3
    assert json.loads((folder / "provenance.json").read_text())["status"] == "failed"


def test_space_for_checkpoints_is_looked_at_before_the_first_step(refused, small, world, monkeypatch):
    storage, _ = world
    monkeypatch.setattr("vlakeep.core.storage.free_bytes", lambda path: 1_000_000)
    message = refused(*small("train", BASELINE, "--name", "bad-space"))
    has(message, "no space for the checkpoints of this run", storage.runs / "bad-space", "1000000 bytes", "--train.keep_last")
    assert not (storage.runs / "bad-space" / "metrics.jsonl").exists()


def test_a_board_that_fails_does_not_stop_the_run(small, command, world, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    storage, _ = world
    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    status, _, _ = command(*small("train", BASELINE, "--name", "bad-board"))
    assert status == 0 and len(read_metrics(storage.runs / "bad-board")) == 6


def test_full_disk_leaves_no_half_data(tmp_path):
    episodes = demonstrations()
    with file_size_limit(20_000):
        with pytest.raises(DiskFull, match="tabletop_corner/1.0.0.*--root"):
            writer.write_rlds(tmp_path, "tabletop_corner", episodes)
        with pytest.raises(DiskFull, match="probe.*--root"):
            write_probe(tmp_path / "probe", *tabletop.make_probe(8, seed=1))
    assert names(tmp_path / "tabletop_corner") == [] and names(tmp_path) == ["tabletop_corner"]
    writer.write_rlds(tmp_path, "tabletop_corner", episodes)
    with file_size_limit(500), pytest.raises(DiskFull, match="rlds_index_tabletop_corner.*--root"):
        RldsDataset(tmp_path / "tabletop_corner", cache_dir=tmp_path / "cache")
    assert names(tmp_path / "cache") == []


# ---- evaluation ----


def test_evaluate_what_is_not_there(refused, small, world, trained, tmp_path):
    storage, _ = world
    (storage.runs / "bad-bare").mkdir(exist_ok=True)
    runs = storage.runs
    for target, folder in (("none", runs / "none"), ("bad-bare", runs / "bad-bare"), (tmp_path / "x", tmp_path / "x")):
        message = refused(*small("evaluate", BASELINE, "--evaluate.target", target))
        has(message, f"no intact checkpoint of the run `{target}` under {folder}", "bad-trained", "vlakeep train", "--evaluate")
    assert not list(storage.eval.rglob("none"))


@pytest.mark.parametrize("name, content, words", [
    ("adapter_model.safetensors", lambda b: b[:-10], ["is truncated: ", "No other checkpoint of this run is intact"]),
    ("dataset_statistics.json", None, ["is missing", "No other checkpoint of this run is intact"]),
])
def test_evaluate_a_damaged_adapter(refused, small, copied, name, content, words):
    checkpoints = [folder for _, folder in list_checkpoints(copied)]
    shutil.rmtree(checkpoints[0])
    file = checkpoints[1] / "adapter" / name
    if content is None:
        file.unlink()
    else:
        poison(file, content)
    has(refused(*small("evaluate", BASELINE, "--evaluate.target", checkpoints[1])), file, *words)


def trial(number):
    return dict(kind="skill", ability="reach", trial=number, seed=0, success=True, value=None, crash=None, steps=1)


def test_records_of_something_else_or_damaged(tmp_path):
    path, header = tmp_path / "records.jsonl", {"weights": "a", "base": "b", "evaluate": {"episodes": 1}}
    with Records(path, header):
        pass
    with Records(path, dict(header, weights="c")) as records:  # no trial was in it, so it belonged to nobody
        records.add(**trial(0))
    for change, words in (({}, "another model"), ({"base": "x"}, "another model and another base model"),
                          ({"weights": "c", "evaluate": {}}, "other settings .evaluate.episodes 1 -> .not set..")):
        with pytest.raises(ValueError, match=f"{path} holds the trials of {words}; .*rm -r {tmp_path}"):
            Records(path, {**header, **change})
    whole = path.read_bytes()
    for line, words in ((b"x\n", "line 3 is damaged .Expecting value"), (b'{"a": 1}\n', "line 3 is damaged .no kind"),
                        (b"3\n", "line 3 is damaged")):
        path.write_bytes(whole + line)
        with pytest.raises(ValueError, match=f"{path} {words}.*delete that line"):
            Records(path, dict(header, weights="c"))
    path.write_bytes(whole + b'{"kind": "ski')  # what a killed process leaves
    with Records(path, dict(header, weights="c")) as records:
        assert records.rows() == [trial(0)]


def test_two_evaluations_of_one_model_at_once_and_a_full_disk(tmp_path):
    path = tmp_path / "records.jsonl"
    with Records(path, {}) as records:
        with pytest.raises(ValueError, match=f"{path} is in use by another evaluation.*wait"):
            Records(path, {})
        records.add(**trial(0))
        with file_size_limit(path.stat().st_size + 5), pytest.raises(DiskFull, match=f"{path}.*--root"):
            records.add(**trial(1))
    with Records(path, {}) as records:
        assert records.rows() == [trial(0)]
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released
