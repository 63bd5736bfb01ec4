"""Shared set-up: a storage root with a few real tabletop episodes, a small probe and its artefact, on the shipped base model."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from vlakeep.config import load_config

torch.set_num_threads(1)

SMALL = ["--threads", "1", "--device", "cpu", "--probe.size", "48", "--icsm.rank", "24", "--icsm.sensitivity_items", "8",
         "--train.steps", "6", "--train.batch_size", "4", "--train.warmup", "2", "--train.save_every", "3", "--lora.rank", "4",
         "--lora.alpha", "4", "--thermostat.every", "1", "--thermostat.batch_size", "16", "--thermostat.calibration", "2",
         "--data.shuffle_buffer", "64"]
METHOD, BASELINE = "configs/method_icsm_hsw_thermostat.yaml", "configs/baseline_lora.yaml"
GRADED = "configs/method_graded.yaml"


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """(storage root, make_config): data, probe and artefact are there; `make_config(file, *overrides)` gives small runs in it."""
    from vlakeep import tabletop_data
    from vlakeep.offline import run_offline
    from vlakeep.storage import Storage

    root = tmp_path_factory.mktemp("root")

    def make_config(file, *overrides):
        return load_config(file, SMALL + ["--root", str(root)] + [str(o) for o in overrides])

    config = make_config(METHOD)
    storage = Storage.from_config(config)
    episodes, tabletop_data.EPISODES = tabletop_data.EPISODES, 12
    try:
        tabletop_data.write_tabletop_data(config, storage)
    finally:
        tabletop_data.EPISODES = episodes
    run_offline(config, storage)
    return storage, make_config


def final_adapter(folder):
    """Bytes of the newest checkpoint's adapter weights."""
    from vlakeep.checkpoint import latest_intact
    return (latest_intact(folder) / "adapter" / "adapter_model.safetensors").read_bytes()
