"""What the target of an evaluation was trained on, and what of it does not fit the evaluation."""

from dataclasses import replace
from typing import Dict, List, Optional

import numpy as np

from vlakeep.core.config import Config
from vlakeep.core.errors import quoted
from vlakeep.core.storage import Storage
from vlakeep.core.target import run_config
from vlakeep.data.dataset import DemoDataset
from vlakeep.data.formats import closing_all, open_configured
from vlakeep.data.sample import SampleSpec


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


def seen_alarm(config: Config, storage: Storage, datasets: List[DemoDataset]) -> List[str]:
    """A line per data set of which some episodes are held out here that the run was trained on; reads the run's own configuration."""
    trained = trained_data(config, storage)
    share, found = trained.get("train_fraction", 1.0), []
    for name, dataset in zip(config.data.datasets, datasets):
        seen = int(dataset.seen(share).sum()) if name in (trained.get("datasets") or []) else 0
        if seen:
            fits = "train it on less" if share == 1 else f"--data.train_fraction {share:g} fits it"
            found.append(f"{seen} of {len(dataset)} episodes of {name} are not held out: the run was trained on {100 * share:g} % of it "
                         f"(data.train_fraction {share:g}); {fits}")
    return found


def check_conventions(config: Config, storage: Storage) -> None:
    """ValueError when a data set is read in another way here (camera, gripper, rotate, its card) than in the training of the run."""
    trained = trained_data(config, storage)
    shared = [name for name in config.data.datasets if name in (trained.get("datasets") or [])]
    for key in ("camera", "gripper", "rotate", "cameras", "state", "degenerate") if shared else ():
        there, here = trained.get(key), getattr(config.data, key)
        if there not in (None, []) and here not in (None, []) and there != here:
            fits = str(there).lower() if isinstance(there, bool) else quoted(f"[{','.join(there)}]" if isinstance(there, list) else there)
            raise ValueError(f"--data.{key} {here}: the run was trained on {shared[0]} with {there}; --data.{key} {fits} fits it")
    for name in shared:
        there, here = (trained.get("cards") or {}).get(name), config.data.cards.get(name)
        if there is not None and there != here:
            raise ValueError(f"data.cards.{name} is {here}: the run was trained with {there}; take `cards` below `data` of the run's "
                             "config.yaml into the configuration of the evaluation")


def open_as_configured(config: Config, storage: Storage, fraction: float = 1.0, spec: Optional[SampleSpec] = None) -> List[DemoDataset]:
    """data.datasets, read as the `data` section says, for a model of this spec. Whoever opens them closes them."""
    return open_configured(replace(config.data, train_fraction=fraction), storage.data, storage.cache, spec)


def training_picture(config: Config, storage: Storage) -> Optional[np.ndarray]:
    """Mean first picture [H, W, 3] of up to 20 training episodes; None without the data."""
    try:
        datasets = open_as_configured(config, storage, config.data.train_fraction)
    except (FileNotFoundError, ValueError):
        return None
    with closing_all(datasets):
        pictures = [np.asarray(d.image(e, 0), dtype=float) for d in datasets for e in range(0, len(d), max(1, len(d) // 20))]
    sizes = [picture.shape for picture in pictures]
    return np.mean([p for p in pictures if p.shape == sizes[0]], axis=0)
