"""The official OpenVLA checkout as a backbone: its folder is checked everywhere, its classes where VLAKEEP_OPENVLA_DIR names one."""

import os
import sys

import pytest

from vlakeep.core.config import ConfigError, load_config
from vlakeep.core.official_code import check_openvla_dir
from vlakeep.data.sample import Row
from vlakeep.parity import verify_openvla

CHECKOUT = os.environ.get("VLAKEEP_OPENVLA_DIR")


def test_the_checkout_must_be_named_and_be_one(tmp_path):
    with pytest.raises(ConfigError, match="backbone.openvla_dir"):
        load_config(None, ["--backbone.source", "official"])
    with pytest.raises(ValueError, match="--backbone.openvla_dir DIR"):
        check_openvla_dir(None)
    with pytest.raises(FileNotFoundError, match="must be a checkout of the official repository"):
        check_openvla_dir(str(tmp_path))


def test_verify_says_what_is_missing(tmp_path, capsys):
    assert verify_openvla.main(["--openvla_dir", str(tmp_path)]) == 2
    assert "modeling_prismatic.py" in capsys.readouterr().err


def test_the_table_fails_past_a_tolerance(capsys):
    assert verify_openvla.print_table("x", [Row("a", 0.5, 1.0), Row("b", 2.0, 1.0), verify_openvla.unchecked("c", "no data")]) == 1
    out = capsys.readouterr().out
    assert "FAIL  b" in out and "1 of 2 quantities" in out and "not checked: no data" in out
    assert verify_openvla.print_table("x", [Row("a", 0.5, 1.0)]) == 0


@pytest.mark.skipif(CHECKOUT is None, reason="VLAKEEP_OPENVLA_DIR names no checkout of the official repository")
def test_both_implementations_agree_and_train_alike(world, capsys):
    from conftest import METHOD

    from vlakeep.core.rundir import read_metrics
    from vlakeep.train import run_training
    assert verify_openvla.main(["--openvla_dir", CHECKOUT, "--device", "cpu"]) == 0, capsys.readouterr().out
    storage, make_config = world
    losses = []
    for source in ("native", "official"):
        config = make_config(METHOD, "--name", f"source-{source}", "--hsw.site", "both", "--backbone.source", source,
                             "--backbone.openvla_dir", CHECKOUT)
        losses.append([row["loss"] for row in read_metrics(run_training(config, storage)) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert sys.modules["prismatic"].__path__
