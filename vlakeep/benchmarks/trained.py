"""What the target of an evaluation was trained on, and what of it does not fit the evaluation. Belongs to evaluate."""

import json
from typing import Dict, List, Optional

import numpy as np

from vlakeep.core.config import Config
from vlakeep.core.storage import Storage, find_checkpoint
from vlakeep.core.target import run_config
from vlakeep.data.dataset import Conventions
from vlakeep.data.formats import closing_all, open_datasets
from vlakeep.libero import setup as libero_setup


def trained_data(config: Config, storage: Storage) -> Dict:
    """The data section of the run's own configuration; {} for what is no run."""
    return (run_config(config.evaluate.target, storage) or {}).get("data") or {}


def crop_alarm(config: Config, storage: Storage, settings) -> List[str]:
    """One line when the evaluation crops and the training did not, or the other way round; reads the run's own configuration."""
    if run_config(config.evaluate.target, storage) is None:
        return []
    trained = bool(trained_data(config, storage).get("image_aug"))
    if trained == settings.center_crop:
        return []
    cuts = "cuts" if settings.center_crop else "does not cut"
    return [f"the run was trained {'with' if trained else 'without'} random crops, and this evaluation {cuts} the centre: "
            f"--evaluate.center_crop {'true' if trained else 'false'} fits it"]


def renderer_alarm(config: Config, storage: Storage, key: str) -> List[str]:
    """One line per LIBERO data set that the target has learned from and that another version of mujoco has rendered.

    Of a base model pretrain-libero has noted it; one whose action statistics (`key`) are named as the official data was made from them.
    """
    if run_config(config.evaluate.target, storage) is not None:
        names = trained_data(config, storage).get("datasets") or []
        made = {name: libero_setup.rendered_with(storage.data / name) for name in names if name.startswith("libero")}
    else:
        notes = find_checkpoint(config.backbone.checkpoint, storage.cache) / "PROVENANCE.json"
        noted = json.loads(notes.read_text()).get("renderers") if notes.is_file() else None
        made = noted or ({key: None} if key.startswith("libero") and key.endswith("_no_noops") else {})
    return libero_setup.mixed_renderers(made, libero_setup.versions())


def training_picture(config: Config, storage: Storage) -> Optional[np.ndarray]:
    """Mean first picture [H, W, 3] of up to 20 training episodes; None without the data."""
    data = config.data
    try:
        datasets = open_datasets(storage.data, data.datasets, data.train_fraction, storage.cache,
                                 Conventions(data.camera, data.gripper, data.rotate))
    except (FileNotFoundError, ValueError):
        return None
    with closing_all(datasets):
        pictures = [np.asarray(d.image(e, 0), dtype=float) for d in datasets for e in range(0, len(d), max(1, len(d) // 20))]
    sizes = [picture.shape for picture in pictures]
    return np.mean([p for p in pictures if p.shape == sizes[0]], axis=0)
