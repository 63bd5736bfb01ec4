"""speed/official_step.py at small shapes: our sides, and the official one with a script that stands for the checkout's.

The checkout's own runs where VLAKEEP_OPENVLA_DIR names one and the libraries are the official ones.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

from vlakeep.core.compat import import_timm
from vlakeep.models import files
from vlakeep.openvla import format as checkpoint_format
from vlakeep.openvla.tiny import build_tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "speed"))
import official_side  # noqa: E402
import official_step  # noqa: E402

CHECKOUT = os.environ.get("VLAKEEP_OPENVLA_DIR")
SCRIPT = """
import draccus
import torch
import wandb
from peft import LoraConfig, get_peft_model
from prismatic.vla.datasets import RLDSBatchTransform, RLDSDataset
from prismatic.vla.datasets.rlds.utils.data_utils import save_dataset_statistics
from torch.nn.parallel import DistributedDataParallel as DDP


class FinetuneConfig:
    def __init__(self, **given):
        self.given = given


@draccus.wrap()
def finetune(config):
    assert torch.cuda.is_available()
    torch.cuda.set_device(device := PartialState().local_process_index)
    model = AutoModelForVision2Seq.from_pretrained("somewhere", torch_dtype=torch.bfloat16).to(device)
    model = DDP(get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=["inner"])), device_ids=[device])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with tqdm.tqdm(total=9, leave=False) as progress:
        for batch in DataLoader(RLDSDataset(RLDSBatchTransform())):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                output = model(x=batch["x"].to(torch.bfloat16).to(device))
            output.loss.backward()
            wandb.log({"loss": output.loss.item()})
            optimizer.step()
            optimizer.zero_grad()
            progress.update()
"""


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 1, bias=False)

    def forward(self, x):
        return SimpleNamespace(loss=self.inner(x).pow(2).mean())


@pytest.fixture
def run_main(tmp_path, monkeypatch, capsys):
    """(exit status, lines, what it says on stderr) of the command at --tiny; the functions that it replaces come back."""
    build_tiny_tokenizer(["put the red block in the corner"], [], tmp_path / "tokenizer", 32000)
    monkeypatch.setattr(checkpoint_format, "load_checkpoint", checkpoint_format.load_checkpoint)
    monkeypatch.setattr(files, "weights_hash", files.weights_hash)
    monkeypatch.setattr(official_step, "LOSSES", 2)
    monkeypatch.setattr(official_step, "SIZE", 2)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["official_step.py", "--tiny", "--tokenizer", str(tmp_path / "tokenizer"), "--root",
                                          str(tmp_path / "root"), "--out", str(tmp_path / "out"), *map(str, options)])
        status = official_step.main()
        lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()] if (tmp_path / "out").exists() else []
        return status, lines, capsys.readouterr().err

    return run


def test_our_sides_see_the_same_and_the_official_one_is_left_out_without_a_checkout(run_main):
    status, lines, _ = run_main()
    assert status == 0 and [line["stage"] for line in lines] == ["floor", "recipe", "own", "official"]
    _, recipe, own, official = lines
    assert "no --openvla-dir names a checkout" in official["left_out"]
    assert recipe["fingerprint"] == own["fingerprint"]
    # B is zero at the start, so adapters do not count yet; another batch would be 1e-2 away.
    assert recipe["losses"][0] == pytest.approx(own["losses"][0], abs=1e-5)
    assert len(recipe["losses"]) == 2 and recipe["losses"][1] < recipe["losses"][0] - 0.1
    assert recipe["samples_per_second"] == pytest.approx(2 / recipe["seconds"], rel=1e-3) and recipe["floor"] == own["floor"] > 0


@pytest.mark.skipif(CHECKOUT is None or bool(official_side.missing()),
                    reason="VLAKEEP_OPENVLA_DIR names no checkout, or the libraries are not those of the official environment")
def test_the_official_script_has_the_losses_of_our_recipe(run_main):
    status, lines, said = run_main("--openvla-dir", CHECKOUT)
    assert status == 0, said
    of_recipe, of_own = lines[-2:]
    assert (of_recipe["of"], of_own["of"]) == ("recipe", "own") and of_recipe["same_weights"] and of_own["same_weights"]
    assert float(of_recipe["losses_apart"]) < 1e-5 and float(of_own["first_loss_apart"]) < 1e-5


def test_what_is_missing_is_said_before_anything_is_made(run_main, tmp_path):
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\necho "$PYTHONPATH" > {tmp_path}/path\necho "$@" > {tmp_path}/words\nexit {official_side.MISSING}\n')
    other.chmod(0o755)
    status, lines, _ = run_main("--openvla-dir", tmp_path, "--official-path", "OLD", "--official-python", other)
    assert status == 2 and not lines and not (tmp_path / "root").exists()
    assert (tmp_path / "path").read_text().startswith(f"OLD:{Path(__file__).parents[1]}")
    assert (tmp_path / "words").read_text().strip().endswith(f"official_side.py --openvla-dir {tmp_path}")


def test_the_official_side_names_folder_and_libraries(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["official_side.py", "--openvla-dir", str(tmp_path)])
    assert official_side.main() == official_side.MISSING
    said = capsys.readouterr().err
    assert "finetune.py" in said and "--openvla-dir must be a checkout" in said and "--official-path" in said
    (tmp_path / "vla-scripts").mkdir()
    (tmp_path / "vla-scripts" / "finetune.py").write_text("")
    versions = {"transformers": "5.0.0", "timm": "0.9.16", "tokenizers": "0.19.1", "accelerate": "1.0"}

    def version(name):
        if name not in versions:
            raise official_side.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(official_side.importlib.metadata, "version", version)
    assert official_side.main() == official_side.MISSING
    assert "transformers is 5.0.0 and must be 4.40.1, peft is missing; " in capsys.readouterr().err


def test_the_clock_leaves_the_first_steps_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(official_side.time, "perf_counter", lambda: now[0])
    with official_side.Clock(2, 3, 2, False)(total=8, leave=False) as clock:
        for seconds in (50, 50, 1, 1, 1, 2, 2, 2):
            now[0] += seconds
            clock.update()
    assert clock.found == [1.0, 2.0]


def test_a_script_runs_as_it_is_from_the_given_adapters(tmp_path, monkeypatch):
    import_timm()
    import peft  # noqa: F401

    (tmp_path / "finetune.py").write_text(SCRIPT)
    model, x = Toy(), torch.tensor([[1.0, 2.0, 3.0]])
    start = {f"base_model.model.inner.lora_{side}.default.weight": torch.ones(shape) for side, shape in (("A", (2, 3)), ("B", (1, 2)))}
    expected = (model.inner(x).item() + 12) ** 2
    with mock.patch.dict(sys.modules):
        script = official_side.import_script(tmp_path / "finetune.py")
    clock = official_side.Clock(2, 1, 3, False)
    found = official_side.run_script(script, model, {"x": x}, start, clock, 32000)
    assert found["losses"][0] == pytest.approx(expected, rel=1e-5) and len(found["losses"]) == 2
    assert len(clock.found) == 3 and clock.steps == 5 and found["seconds"] > 0
    with mock.patch.dict(sys.modules):
        script = official_side.import_script(tmp_path / "finetune.py")
    with pytest.raises(ValueError, match="not ours"):
        official_side.run_script(script, Toy(), {"x": x}, dict(list(start.items())[:1]), clock, 32000)


def test_weights_under_other_names_have_another_fingerprint():
    a, b = torch.randn(20), torch.randn(20)
    mark = official_side.fingerprint({"a": a, "b": b})
    assert mark == official_side.fingerprint({"b": b, "a": a}) != official_side.fingerprint({"a": b, "b": a})


def test_ratios_are_of_samples_and_of_memory_above_the_weights():
    noted = []
    session = SimpleNamespace(gpu=True, rows={}, note=lambda stage, **figures: noted.append({"stage": stage, **figures}))
    for name, seconds, allocated, losses in (("recipe", 1.0, 45.0, [10.0, 9.5]), ("official", 2.0, 65.0, [10.0, 9.0])):
        official_step.Comparison.keep(session, name, {"seconds": seconds, "allocated_gib": allocated, "reserved_gib": allocated + 1,
                                                      "weights_gib": 15.0, "losses": losses, "fingerprint": 1.0})
    official_step.ratios(session)
    assert [row["samples_per_second"] for row in noted[:2]] == [16.0, 8.0]
    assert noted[2] == {"stage": "ratios", "of": "recipe", "samples": 2.0, "memory_above_weights": 0.6, "aims": official_step.AIMS,
                        "same_weights": True, "first_loss_apart": "0.0e+00", "losses_apart": "5.0e-01"}
