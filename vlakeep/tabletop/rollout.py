"""Closed-loop episodes of a policy, many tables in one policy batch."""

import zlib
from typing import Callable, List, Tuple

import numpy as np
from tqdm import tqdm

from vlakeep.benchmarks.records import Records
from vlakeep.tabletop.render import render
from vlakeep.tabletop.world import MAX_STEPS, TabletopWorld

Policy = Callable[..., np.ndarray]


def run_skill_episodes(policy: Policy, skills: List[str], episodes: int, seed: int, parallel: int, records: Records,
                       desc: str = "") -> None:
    """Trials 0..episodes-1 of each skill, start states fixed by (skill, seed + trial); finished tables leave the batch.

    `policy(images [N, 64, 64, 3], instructions)` gives actions [N, 7]; one that plays chunks (`policy.chunk` above 1) is also told which
    episodes these are. If it raises on a batch, the tables are asked one by one, and
    those that still raise are recorded as crashed. Trials that `records` has already are not run again. Where a prompt names one of two
    targets, an episode is over once the object is put on either, and its record says on which (`ended`).
    """
    todo = records.share([(skill, trial) for trial in range(episodes) for skill in skills if not records.has("skill", skill, trial)])
    with tqdm(total=len(todo), desc=f"{desc}: episodes", leave=False, mininterval=1.0) as bar:
        for start in range(0, len(todo), parallel):
            part = todo[start:start + parallel]
            world = TabletopWorld([skill for skill, _ in part], [seed + trial for _, trial in part])
            alive = np.arange(world.n)  # number within `part` of each table still running
            limit = np.array([MAX_STEPS[skill] for skill, _ in part])
            while len(alive):
                actions, crash = _ask(policy, render(world), world.instructions, [part[number] for number in alive])
                for row in np.flatnonzero(~np.isfinite(actions).all(axis=1)):
                    actions[row], crash[row] = 0.0, crash[row] or "ValueError: the policy gave an action that is not finite"
                success = world.step(actions)
                elsewhere = world.misplaced()
                over = success | elsewhere | (world.steps_N >= limit[alive]) | np.array([c is not None for c in crash])
                for row in np.flatnonzero(over):
                    skill, trial = part[alive[row]]
                    failed = crash[row]
                    ended = "prompted" if success[row] else "other" if elsewhere[row] else "neither"
                    records.add(kind="skill", ability=skill, trial=trial, seed=seed + trial, success=None if failed else bool(success[row]),
                                value=None, crash=failed, steps=int(world.steps_N[row]),
                                **({"ended": ended} if world.rival_N[row] >= 0 else {}))
                    bar.update()
                if over.any():
                    world, alive = world.subset(np.flatnonzero(~over)), alive[~over]
            records.flush()


def _ask(policy: Policy, images: np.ndarray, instructions: List[str], episodes: List[Tuple[str, int]]):
    """(actions [N, 7], error text or None per table)."""
    def act(rows: slice):
        told = {"episodes": episodes[rows]} if getattr(policy, "chunk", 1) > 1 else {}
        return policy(images[rows], instructions[rows], **told)

    try:
        return np.array(act(slice(None)), dtype=np.float64), [None] * len(images)
    except Exception:  # whatever one table's input provokes must not take the others' results along
        actions, errors = np.zeros((len(images), 7)), []
        for i in range(len(images)):
            try:
                actions[i] = act(slice(i, i + 1))[0]
                errors.append(None)
            except Exception as error:  # noqa: BLE001
                errors.append(f"{type(error).__name__}: {error}")
        return actions, errors


def random_policy(seed: int) -> Policy:
    """Uniform actions, drawn from what is seen and said, so that the batch makes no difference: the floor of every skill."""
    def act(images, instructions):
        actions = np.zeros((len(images), 7))
        for i, (image, text) in enumerate(zip(images, instructions)):
            rng = np.random.default_rng([seed, zlib.crc32(image.tobytes()), zlib.crc32(text.encode())])
            actions[i] = rng.uniform(-1, 1, 7)
            actions[i, 6] = rng.random() < 0.5
        return actions
    return act
