"""Preflight and the storage self-check: every red line at once, each with its remedy, and green when all is there."""

import json
import os
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import save_config
from safetensors.torch import save_file

from vlakeep import preflight
from vlakeep.checks import RED, SPARE_BYTES, adapter_parameters, checkpoint_bytes, safetensors_problem
from vlakeep.core import compat
from vlakeep.core import storage as storage_module
from vlakeep.core.config import Config, to_dict
from vlakeep.data.sample import Episode, Sample
from vlakeep.data.writer import write_rlds
from vlakeep.models import lean
from vlakeep.preflight import version_tuple
from vlakeep.probe.probe_set import write_probe
from vlakeep.teacher import icsm_artifact as artifact

DEPTH, WIDTH = 6, 32
VARIABLES = ["HF_HOME", "TRANSFORMERS_CACHE", "HF_DATASETS_CACHE", "TORCH_HOME", "WANDB_DIR", "TMPDIR"]


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A configuration of the method whose every input exists, small; returns (config, root)."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CONDA_DEFAULT_ENV", "openvla")
    root = tmp_path / "root"
    model = root / "hf_cache" / "tiny"
    model.mkdir(parents=True)
    text = {"num_hidden_layers": DEPTH, "hidden_size": WIDTH, "intermediate_size": 64}
    (model / "config.json").write_text(json.dumps({"model_type": "openvla", "text_config": text}))
    for part in (1, 2):
        save_file({f"w{part}": torch.zeros(10, 10)}, model / f"model-{part}.safetensors")
    index = {"weight_map": {"w1": "model-1.safetensors", "w2": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (model / name).write_text("{}")
    (model / "dataset_statistics.json").write_text(json.dumps({"pushes": {}}))
    random = np.random.default_rng(0)
    pictures = random.integers(0, 255, (9, 8, 8, 3), dtype=np.uint8)
    write_rlds(root / "datasets", "pushes", [Episode(pictures, random.random((9, 7)).round(), "push")])
    samples = [Sample(np.full((4, 4, 3), i, np.uint8), f"do {i}") for i in range(100)]
    probe = write_probe(root / "probe" / "p", samples, ["skill"] * 100)

    config = Config(name="r", method="icsm_hsw_thermostat", root=str(root), device="cpu")
    config.backbone.checkpoint, config.data.datasets, config.probe.name = "tiny", ["pushes"], "p"
    config.data.gripper = "standard"
    config.probe.size, config.icsm.rank = 100, 8
    layers = artifact.default_layers(DEPTH)
    tensors = {
        layer: {
            "U_f": torch.zeros(WIDTH, 4),
            "U_p": torch.zeros(WIDTH, 4),
            "mu": torch.zeros(WIDTH),
            "C_T": torch.zeros(WIDTH, WIDTH),
        }
        for layer in layers
    }
    meta = {"weights_sha256": "w", "dtype": "float32", "quantisation": "none", "probe_sha256": probe, "depth": DEPTH, "layers": layers,
            "config": to_dict(config.icsm),
            "layer_map": {str(member): layer for layer in layers for member in (layer - 1, layer)}, "probe_items": config.probe.size}
    artifact.write(root / "artifacts" / "icms_tiny", tensors, None, {}, meta)
    return config, root


def reds(config, **options):
    return [line for line in preflight.run_checks(config, **options) if line.status == RED]


def test_all_green(world, capsys):
    config, root = world
    lines = preflight.run_checks(config)
    assert reds(config) == []
    for what in (
        "configuration",
        "storage root",
        "cache variables",
        "source tree",
        "conda environment",
        "packages",
        "base model",
        "layers and sizes",
        "probe",
        "data set pushes",
        "ICSM artefact",
        "run folder",
    ):
        assert any(line.what == what and line.status == "ok" for line in lines), what
    save_config(config, root / "c.yaml")
    assert preflight.main(["--config", str(root / "c.yaml")]) == 0
    out = capsys.readouterr().out
    assert "passed" in out and "FAIL" not in out and "data set pushes" in out


def test_every_red_line_is_shown_before_it_exits(world, capsys):
    config, root = world
    save_config(config, root / "c.yaml")
    for path in ("hf_cache/tiny/tokenizer.json", "datasets/pushes/1.0.0/dataset_info.json", "probe/p/items.jsonl"):
        (root / path).unlink()
    (root / "artifacts" / "icms_tiny" / "meta.json").unlink()
    argv = [
        "--config",
        str(root / "c.yaml"),
        "--train.lr",
        "-1",
        "--icsm.rank=33",
        "--lora.layers",
        "4-6",
        "--hsw.layers",
        "[9]",
        "--backbone.attn_implementation",
        "flash_attention_2",
    ]
    assert preflight.main(argv) == 1
    out = re.sub(r"[│\s]+", "", capsys.readouterr().out)  # the table folds long paths anywhere
    for words in (
        "--train.lr -1.0: must be greater than 0",
        "no tokenizer.json or tokenizer.model",
        "has no dataset_info.json",
        "items.jsonl is missing",
        "no ICSM artefact",
        "r = 33 is more than min(probe.size - 1, D) = 32",
        "lora.layers '4-6': the model has layers 0 to 5",
        "[9] out of range",
        "the CPU cannot run it",
    ):
        assert words.replace(" ", "") in out, words
    assert f"FAILICSMartefact:vlakeepoffline--config{root / 'c.yaml'}" in out
    assert "9of" in out


def test_every_red_line_has_a_remedy(world):
    config, root = world
    config.backbone.checkpoint, config.data.datasets, config.probe.name = (
        "someone/model",
        ["tabletop_corner", "other"],
        "tabletop",
    )
    config.icsm.name, config.device = "nothing", "cuda"
    found = reds(config)
    assert len(found) >= 6 and all(line.remedy for line in found)
    remedies = " ".join(line.remedy for line in found)
    assert "vlakeep fetch someone/model" in remedies and "vlakeep tabletop-data" in remedies and "--device cpu" in remedies


def test_typing_mistakes_leave_the_other_checks_running(world, capsys):
    config, root = world
    assert preflight.main(["--root", str(root), "--trian.lr", "1"]) == 1
    captured = capsys.readouterr()
    assert "did you mean `train.lr`" in captured.out and "storage hf_cache" in captured.out and "packages" in captured.out
    assert "usage:" not in captured.err
    assert preflight.main(["--root", str(root / "new"), "--trian.lr", "1"]) == 1
    assert not (root / "new").exists()


def test_each_stage_has_its_own_inputs(world):
    config, root = world
    (root / "artifacts" / "icms_tiny" / "meta.json").unlink()
    assert [line.what for line in reds(config)] == ["ICSM artefact"]
    assert reds(config, stage="offline") == [] and reds(config, stage="evaluate") == []
    config.method = "baseline"
    assert reds(config) == []
    config.method, config.hsw.enabled, config.thermostat.enabled = "icsm_hsw_thermostat", False, False
    assert reds(config) == []
    with pytest.raises(ValueError, match="--stage 'x': must be one of offline, train, evaluate"):
        preflight.run_checks(config, stage="x")


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-1]), "it is truncated"),
        (lambda f: f.write_bytes(f.read_bytes()[:20]), "its header would be"),
        (lambda f: f.write_bytes(f.read_bytes() + b"x"), "it is corrupt"),
        (lambda f: f.write_bytes(b""), "(0 B) is not a readable safetensors file: it is truncated"),
        (lambda f: f.write_bytes(f.read_bytes()[:9] + b"\xff" + f.read_bytes()[10:]), "is not a readable safetensors file"),
        (lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "lfs pull"),
        (lambda f: f.unlink(), "missing"),
    ],
)
def test_damaged_weights(world, damage, words):
    config, root = world
    path = root / "hf_cache" / "tiny" / "model-2.safetensors"
    assert safetensors_problem(path) is None
    damage(path)
    found = reds(config)
    assert [line.what for line in found] == ["base model"] and f"{path}: " in found[0].where and words in found[0].where


def test_wrong_model_kind_and_unnorm_key(world):
    config, root = world
    path = root / "hf_cache" / "tiny" / "config.json"
    path.write_text(path.read_text().replace("openvla", "llava"))
    config.backbone.unnorm_key = "libero"
    found = " ".join(line.where for line in reds(config))
    assert "'llava', not 'openvla'" in found and "'libero' is not among" in found and "pushes" in found
    config.backbone.unnorm_key, config.data.statistics = None, "bridge"
    assert any(line.what == "--data.statistics" and "'bridge' is not among" in line.where for line in reds(config))


def test_artefact_of_another_configuration_or_depth(world):
    config, root = world
    config.icsm.epsilon = 0.5
    assert any("icsm.epsilon 0.1" in line.where for line in reds(config))
    config.icsm.epsilon = 0.1
    samples = [Sample(np.full((4, 4, 3), i, np.uint8), f"do not {i}") for i in range(100)]
    write_probe(root / "probe" / "p", samples, ["skill"] * 100)
    assert any("another probe" in line.where for line in reds(config))
    config.probe.size = 101
    assert any("has 100 items, --probe.size asks for 101" in line.where for line in reds(config))
    (root / "artifacts" / "icms_tiny" / "U3_f.pt").unlink()
    assert any("U3_f.pt is missing" in line.where for line in reds(config))


def test_sizes_against_the_probe_and_the_schedule(world):
    config, root = world
    config.probe.size, config.thermostat.batch_size, config.icsm.rank, config.train.steps = 10, 11, 10, 200
    config.thermostat.every = 250
    lines = preflight.run_checks(config)
    found = {line.what: line for line in lines}
    assert found["--thermostat.batch_size"].status == RED
    assert "= 9" in found["--icsm.rank"].where and found["--icsm.rank"].remedy.startswith("--icsm.rank 9")
    assert found["--thermostat.every"].status == "note"
    assert "one measurement in 250 steps, but training takes 200" in found["--thermostat.every"].where


def test_run_folder_and_free_space(world, monkeypatch):
    config, root = world
    run = root / "runs" / "r"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("{}")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    assert any("already holds a run" in line.where for line in reds(config))
    monkeypatch.setattr("vlakeep.checks.free_bytes", lambda path: 1000)
    assert any(line.what == "free space for checkpoints" and "1.0 kB free" in line.where for line in reds(config))


def gpu(monkeypatch, capability, count=1, built=()):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)


def test_what_the_gpu_can_do(monkeypatch):
    config = Config(device="cuda")
    config.backbone.dtype, config.train.autocast, config.backbone.attn_implementation = (
        "bfloat16",
        "bfloat16",
        "flash_attention_2",
    )
    gpu(monkeypatch, (7, 0))  # V100
    assert [line.what for line in preflight.check_gpus(config) if line.status == RED] == [
        "--backbone.dtype bfloat16",
        "--train.autocast bfloat16",
        "flash attention 2",
    ]
    gpu(monkeypatch, (8, 9))  # RTX 4090
    found = [line for line in preflight.check_gpus(config) if line.status == RED]
    assert [line.where for line in found] == ["the package flash_attn is not installed"]
    assert any("1 GPU" in line.where for line in preflight.check_gpus(config, gpus=8) if line.status == RED)
    gpu(monkeypatch, (8, 9), count=8)
    assert not any("GPU(s)" in line.where for line in preflight.check_gpus(config, gpus=8))


CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize("built, capability, runs", [
    ("sm_70", (7, 0), True), ("sm_70", (7, 5), True), ("sm_75", (7, 0), False), ("sm_86", (8, 9), True), ("sm_80", (9, 0), False),
    ("sm_120", (12, 0), True), ("sm_100", (12, 0), False), ("compute_90", (12, 0), True), ("compute_90", (8, 9), False),
    ("sm_90a", (9, 0), True), ("sm_100a", (10, 3), False), ("sm_100f", (10, 3), True), ("compute_90a", (10, 0), False),
    ("compute_100f", (12, 0), False), ("gfx90a", (9, 0), False)])
def test_which_code_runs_on_which_card(built, capability, runs):
    assert compat.runs_on(built, capability) is runs


def test_a_torch_without_kernels_for_the_card_is_red(monkeypatch):
    """The first step would die of it: `no kernel image is available for execution on the device`."""
    def line(capability, built, count=1, device="cuda", gpus=1):
        gpu(monkeypatch, capability, count, built)
        found = [line for line in preflight.check_gpus(Config(device=device), gpus) if line.what == "kernels for the GPU"]
        assert len(found) <= 1
        return found[0] if found else None

    volta = line((7, 0), CUDA_13, count=8, gpus=8)
    assert volta.status == RED and "has no kernels for Card, compute capability 7.0 (it was built for sm_75, sm_80" in volta.where
    assert volta.remedy == ("pip uninstall -y torch torchvision && pip install torch torchvision "
                            "--index-url https://download.pytorch.org/whl/cu126, or --device cpu")
    newer = line((12, 0), CUDA_12)
    assert newer.status == RED and newer.remedy == "pip uninstall -y torch torchvision && pip install torch torchvision, or --device cpu"
    assert line((12, 1), CUDA_13).status == line((7, 0), CUDA_12).status == line((8, 9), CUDA_13).status == "ok"
    assert line((7, 0), CUDA_13, device="cpu") is None
    assert line((9, 0), ["gfx90a", "gfx942"]) is None
    # A second card that no process takes, such as the one of the screen.
    gpu(monkeypatch, (9, 0), 2, CUDA_13)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: ((9, 0), (6, 1))[index])
    for gpus, status in ((1, "ok"), (2, RED)):
        assert [line.status for line in preflight.check_gpus(Config(device="cuda"), gpus) if line.what == "kernels for the GPU"] == [status]


def test_what_bitsandbytes_is_asked_for_must_be_there_and_find_the_gpu(world, monkeypatch):
    config, _ = world

    def lines(stage="train", quantisation="none", optimizer="adamw", device="cpu"):
        config.backbone.quantisation, config.train.optimizer, config.device = quantisation, optimizer, device
        found = [line for line in preflight.run_checks(config, stage=stage)
                 if line.what in ("--backbone.quantisation nf4", f"--train.optimizer {optimizer}")]
        return [(line.what, line.status, line.where, line.remedy) for line in found]

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert lines() == [] == lines(stage="evaluate", optimizer="adamw8bit", device="cuda")
    for stage in ("offline", "train", "evaluate"):
        ((what, status, where, remedy),) = lines(stage, quantisation="nf4")
        assert (what, status) == ("--backbone.quantisation nf4", RED) and "bitsandbytes cannot be loaded (" in where
        assert re.fullmatch(r"pip install -e .*\[bitsandbytes\]'?( \(in a clone of vlakeep\))?, or --backbone.quantisation none", remedy)
    ((_, status, where, remedy),) = lines(optimizer="paged_adamw8bit")
    assert (status, where, remedy) == (RED, "it does not work on a CPU", "--train.optimizer adamw, or --device cuda")
    gpu(monkeypatch, (7, 0))
    ((_, status, where, remedy),) = lines(optimizer="adamw8bit", device="cuda")
    assert status == RED and "cannot be loaded" in where and remedy.endswith(", or --train.optimizer adamw")
    library = SimpleNamespace(__version__="0.50.2", cextension=SimpleNamespace(lib=SimpleNamespace(compiled_with_cuda=False)))
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    found = lines(quantisation="nf4", optimizer="adamw8bit", device="cuda")
    assert [one[:2] for one in found] == [("--backbone.quantisation nf4", RED), ("--train.optimizer adamw8bit", RED)]
    assert all("bitsandbytes 0.50.2 finds no GPU" in where and remedy.startswith("pip install --upgrade bitsandbytes, or --")
               for _, _, where, remedy in found)
    assert [one[1] for one in lines(quantisation="nf4")] == ["ok"], "on a CPU it needs no kernels for a GPU"
    library.cextension.lib = None  # of a library that did not load, in older versions
    assert [one[1] for one in lines(quantisation="nf4", device="cuda")] == [RED]
    library.cextension.lib = SimpleNamespace(compiled_with_cuda=True)
    assert [one[1] for one in lines(quantisation="nf4", optimizer="adamw8bit", device="cuda")] == ["ok", "ok"]


def test_a_torch_that_cannot_share_a_base_is_red(world, monkeypatch):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    config, _ = world

    def lines(gpus, stage="train"):
        return [line for line in preflight.run_checks(config, stage=stage, gpus=gpus) if line.what == "--train.sharding fsdp"]

    assert lines(8) == []
    config.train.sharding = "fsdp"
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, *, mesh=None, ignored_params=None: module, raising=False)
    assert [line.status for line in lines(8)] == ["ok"] and lines(8, "offline") == []
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, *, mesh=None: module, raising=False)  # of torch 2.6
    (line,) = lines(8)
    assert line.status == RED and "it needs 2.7 or newer" in line.where and "use --train" not in line.where
    assert line.remedy == "pip install --upgrade 'torch>=2.7' torchvision, or --train.sharding none"
    assert [line.status for line in lines(1)] == ["note"], "one process has nothing to share, and trains"


def test_conda_environment_is_a_note_only(world, monkeypatch):
    config, _ = world
    monkeypatch.setenv("CONDA_DEFAULT_ENV", "base")
    found = [line for line in preflight.check_environment(config) if line.what == "conda environment"]
    assert (
        found[0].status == "note"
        and "base is active, not openvla" in found[0].where
        and "conda activate openvla" in found[0].remedy
    )


def test_old_or_missing_packages_are_red(monkeypatch):
    monkeypatch.setitem(preflight.LOWER_BOUNDS, "torch", "99.0")
    monkeypatch.setitem(preflight.LOWER_BOUNDS, "no-such-package", "1.0")
    found = {line.what: line for line in preflight.check_environment(Config()) if line.status == RED}
    assert (
        "needs 99.0" in found["package torch"].where
        and found["package no-such-package"].remedy == "pip install 'no-such-package>=1.0'"
    )
    assert version_tuple("2.13.0+cpu") == (2, 13, 0) > version_tuple("2.2")


def test_a_model_that_cannot_be_compiled_is_red(world, monkeypatch):
    config, _ = world
    config.train.compile = True
    for version, red in (("4.40.1", True), ("5.2.0", False)):
        monkeypatch.setattr(lean, "library_versions", lambda version=version: {"torch": "2.13.0", "transformers": version})
        lines = [line for line in preflight.run_checks(config) if line.what == "--train.compile"]
        assert [line.status for line in lines] == [RED] * red
        assert all("transformers 4.40.1" in line.where and line.remedy == "--train.compile false" for line in lines)


def test_a_torch_that_cannot_read_numpy_is_red(monkeypatch):
    def unavailable(array):
        raise RuntimeError("Numpy is not available")

    assert compat.numpy_trouble() == ""
    monkeypatch.setattr(torch, "from_numpy", unavailable)
    line = next(line for line in preflight.check_environment(Config()) if line.what == "torch and NumPy")
    assert line.status == RED and "Numpy is not available" in line.where and "'numpy<2' 'opencv-python<4.12'" in line.remedy
    with pytest.raises(ValueError, match="cannot use NumPy .*: pip install 'numpy<2'"):
        compat.require_numpy()


def test_storage_check_passes_and_fails(tmp_path, monkeypatch, capsys):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    root = ["--root", str(tmp_path / "root")]
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    monkeypatch.setattr(storage_module, "WORKSPACE", workspace)
    monkeypatch.setenv("COLUMNS", "1000")  # else the table folds lines, where depends on the length of the temporary folder's name
    assert preflight.storage_check(root) == 0
    out = capsys.readouterr().out
    assert out.count(" free") >= 9 and "passed" in out and str(workspace) in out
    assert not (tmp_path / "root").exists(), "a check made folders"

    with open(workspace / "weights.pt", "wb") as file:
        file.truncate(1_100_000_000)  # sparse
    assert preflight.storage_check(root) == 1
    out = capsys.readouterr().out
    flat = "".join(out.split())
    assert f"mv{workspace / 'weights.pt'}{tmp_path / 'root'}/" in flat and "1.1GB" in flat
    assert preflight.storage_check([*root, "--large_file_gb", "2"]) == 0
    assert preflight.storage_check([*root, "--large_file_gb=0.5"]) == 1
    with pytest.raises(ValueError, match="--large_file_gb 'x'"):
        preflight.storage_check([*root, "--large_file_gb", "x"])

    (workspace / "weights.pt").unlink()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere"))
    assert preflight.storage_check(root) == 1
    assert "unset HF_HOME" in capsys.readouterr().out
    monkeypatch.delenv("HF_HOME")
    assert preflight.storage_check([*root, "--run_root_dir", str(tmp_path / "elsewhere")]) == 1
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()  # the current checkout is scanned as well
    assert preflight.storage_check(["--root", os.path.join(os.sep, "nonexistent-root", "x"), "--large_file_gb", "2"]) in (0, 1)
    assert str(tmp_path) in re.sub(r"[│\s]+", "", capsys.readouterr().out)


def test_an_artefact_of_another_type_is_red(world):
    config, _ = world
    config.backbone.dtype = "bfloat16"
    line, = [line for line in reds(config) if line.what == "ICSM artefact"]
    assert "float32" in line.where and "bfloat16" in line.where and line.remedy == "vlakeep offline"


# ---- space for checkpoints ----

LLAMA_7B = {"text_config": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}}


def test_space_for_checkpoints_is_that_of_what_is_adapted():
    """By hand for 7B: a linear [D_in, D_out] has rank * (D_in + D_out) trainable parameters."""
    config = Config()
    config.lora.rank, config.lora.layers = 32, "last:8"
    attention, mlp = 4 * (4096 + 4096), 3 * (4096 + 11008)
    assert adapter_parameters(config, LLAMA_7B) == 8 * 32 * (attention + mlp)
    assert checkpoint_bytes(config, LLAMA_7B) == 16 * 8 * 32 * (attention + mlp)  # weights, their copy in the adapter, two moments
    config.lora.layers = "all"
    assert adapter_parameters(config, LLAMA_7B) == 32 * 32 * (attention + mlp)
    config.lora.modules = ["attention"]
    assert adapter_parameters(config, LLAMA_7B) == 32 * 32 * attention
    config.lora.modules = ["q_proj", "v_proj"]
    grouped = {"text_config": dict(LLAMA_7B["text_config"], num_key_value_heads=8)}
    assert adapter_parameters(config, grouped) == 32 * 32 * ((4096 + 4096) + (4096 + 1024))
    narrow = {"text_config": dict(grouped["text_config"], head_dim=64)}
    assert adapter_parameters(config, narrow) == 32 * 32 * ((4096 + 2048) + (4096 + 512))
    config.lora.dtype, config.backbone.dtype, config.train.optimizer = "model", "bfloat16", "sgd"
    assert checkpoint_bytes(config, narrow) == 4 * adapter_parameters(config, narrow)


def test_free_space_is_red_only_below_what_is_needed(world, monkeypatch):
    config, root = world
    need = 3 * checkpoint_bytes(config, json.loads((root / "hf_cache" / "tiny" / "config.json").read_text())) + SPARE_BYTES
    for free, red in ((need - 1, True), (need + 1, False)):
        monkeypatch.setattr("vlakeep.checks.free_bytes", lambda path, free=free: free)
        assert any(line.what == "free space for checkpoints" for line in reds(config)) == red
