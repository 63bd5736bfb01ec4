"""The tabletop benchmark as stages see it: demonstrations, probe, pretraining frames, questions, retention frames.

Everything is a function of its seed. Training, probe and evaluation use disjoint seed ranges.
"""

import multiprocessing
import os
from typing import Dict, List, NamedTuple, Optional, Tuple

import numpy as np
from tqdm import tqdm

from vlakeep.data.sample import Episode, Sample
from vlakeep.tabletop.expert import expert_actions
from vlakeep.tabletop.questions import ANSWERS, QUESTION_KINDS, ask, corpus, words  # noqa: F401
from vlakeep.tabletop.render import render
from vlakeep.tabletop.rollout import random_policy, run_skill_episodes  # noqa: F401 (part of the room's interface)
from vlakeep.tabletop.world import ALL_SKILLS, CONTROLS, MAX_STEPS, NEW_SKILL, NEW_SKILLS, SKILLS, TabletopWorld  # noqa: F401

# Start of the seed range of each use; every use has RANGE table seeds, and seeds below SEEDS stay within it.
RANGE, SEEDS = 2 * 10**13, 10**5
PRETRAINING, DEMONSTRATIONS, PROBE, EVALUATION, RETENTION = (RANGE * k for k in range(1, 6))
PRETRAINED_KEY = "tabletop"  # of the base's action statistics
AT_ONCE = 5_000  # frames for pretraining that a process makes at a time
ENDS = ("prompted", "other", "neither")  # the target that the prompt names, the one that it does not name, none of the two
# Weights of the skills in pretraining: long skills need more frames, short ones are learnt from few.
WEIGHTS = {"reach": 1.0, "side": 0.7, "pick": 1.5, "tap": 1.5, "drop": 0.5, "place": 3.0}


def _check(seed: int) -> int:
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed {seed} must be in [0, {SEEDS}), so that training, probe and evaluation never share a table (--seed)")
    return seed


def noisy(actions_N7: np.ndarray, noise: float, rng) -> np.ndarray:
    """With probability `noise` per table the executed motion is a random coarse one; the label stays the expert's."""
    n = len(actions_N7)
    executed = actions_N7.copy()
    disturbed = rng.random(n) < noise
    executed[disturbed, :2] = rng.choice([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0], (int(disturbed.sum()), 2))
    return executed


def planned(world: TabletopWorld, steps: int) -> np.ndarray:
    """[N, steps, 7]: what the expert does next if nothing disturbs it. The tables stay as they are."""
    ahead, chunk = world.subset(np.arange(world.n)), []
    for _ in range(steps):
        chunk.append(expert_actions(ahead))
        ahead.step(chunk[-1])
    return np.stack(chunk, axis=1)


def collect_demos(skill: str, episodes: int, seed: int, noise: float = 0.2) -> List[Episode]:
    """Successful expert episodes; the expert's own action is recorded, a sometimes disturbed one executed, so that recovery is seen."""
    found: List[Episode] = []
    attempt = 0
    while len(found) < episodes:
        count = min(64, episodes - len(found))
        seeds = DEMONSTRATIONS + _check(seed) * 10**7 + attempt + np.arange(count)
        rng = np.random.default_rng([DEMONSTRATIONS, seed, attempt])
        attempt += count
        world = TabletopWorld([skill] * count, seeds)
        frames, labels, done = [[] for _ in range(count)], [[] for _ in range(count)], np.zeros(count, dtype=bool)
        for _ in range(2 * MAX_STEPS[skill]):
            images, actions = render(world), expert_actions(world)
            for i in np.flatnonzero(~done):
                frames[i].append(images[i])
                labels[i].append(actions[i])
            done |= world.step(noisy(actions, noise, rng))
            if done.all():
                break
        for i in np.flatnonzero(done):
            found.append(Episode(np.stack(frames[i]), np.stack(labels[i]).astype(np.float32), world.instructions[i]))
    return found


class Frames(NamedTuple):
    """Frames with what is said about them; row i of each."""

    images: np.ndarray  # uint8 [n, 64, 64, 3]
    instructions: List[str]
    actions: np.ndarray  # float32 [n, 7], or chunks [n, C, 7]; meaningless where a question is asked
    answers: List[Optional[str]]  # None where an action is wanted
    kinds: List[str]  # skill or question kind

    def samples(self) -> List[Sample]:
        return [Sample(image, text, question=True, answer=answer) if answer is not None else Sample(image, text, action)
                for image, text, action, answer in zip(self.images, self.instructions, self.actions, self.answers)]


def mixed_frames(n: int, seed: int, questions: float, skills: Optional[List[str]] = None, noise: float = 0.25, keep: float = 1.0,
                 chunk: int = 0) -> Frames:
    """Frames along disturbed expert episodes of the known skills, a share of them with a question in place of the instruction.

    chunk: actions of each label, as `planned`; 0 gives the next one alone, without an axis for it. The pictures are the same.
    """
    rng = np.random.default_rng(seed)
    names = skills or SKILLS
    weights = np.array([WEIGHTS[s] for s in names])
    parts, total, batch = [], 0, 256
    while total < n:
        world = TabletopWorld(rng.choice(names, batch, p=weights / weights.sum()), seed + rng.integers(0, 10**6, batch))
        done = np.zeros(batch, dtype=bool)
        for _ in range(max(MAX_STEPS[known] for known in SKILLS)):
            actions = expert_actions(world)
            live = np.flatnonzero(~done & (rng.random(batch) < keep))
            if len(live):
                view = world.subset(live)
                texts, kinds = list(view.instructions), view.skills.tolist()
                answers: List[Optional[str]] = [None] * len(live)
                for i in np.flatnonzero(rng.random(len(live)) < questions).tolist():
                    kind = QUESTION_KINDS[rng.integers(len(QUESTION_KINDS))]
                    found = ask(view, i, kind, rng)
                    if found is not None:
                        texts[i], answers[i], kinds[i] = *found, kind
                labels = planned(view, chunk) if chunk else actions[live]
                parts.append(Frames(render(view), texts, labels.astype(np.float32), answers, kinds))
                total += len(live)
            done |= world.step(noisy(actions, noise, rng))
            if done.all():
                break
    # Whole episodes are played and n frames drawn from them: the first n would be beginnings of episodes only.
    drawn = rng.permutation(total)[:n]

    def draw(name):
        values = [value for part in parts for value in getattr(part, name)]
        return [values[i] for i in drawn]

    return Frames(np.stack(draw("images")), draw("instructions"), np.stack(draw("actions")), draw("answers"), draw("kinds"))


def _made(arguments):
    n, seed, questions, chunk = arguments
    return mixed_frames(n, seed, questions, chunk=chunk)


def training_frames(n: int, seed: int, processes: Optional[int] = None, questions: float = 0.3,
                    chunk: int = 0) -> Tuple[np.ndarray, List[Sample]]:
    """(images [n, 64, 64, 3], samples) for pretraining, made by several processes; the result does not depend on how many.

    chunk: see mixed_frames.
    """
    jobs = [(min(AT_ONCE, n - start), PRETRAINING + _check(seed) * 10**8 + start * 10, questions, chunk)
            for start in range(0, n, AT_ONCE)]
    with multiprocessing.get_context("spawn").Pool(processes or os.cpu_count()) as pool:
        parts = list(tqdm(pool.imap(_made, jobs), total=len(jobs), desc="frames", mininterval=2.0))
    images = np.concatenate([p.images for p in parts])
    return images, [sample for part in parts for sample in part.samples()]


def make_probe(n: int, seed: int) -> Tuple[List[Sample], List[str]]:
    """(samples, kinds): frames of known skills and questions, about half each; no new skill ever occurs, no action is in it."""
    frames = mixed_frames(n, PROBE + _check(seed), questions=0.6, keep=0.3)
    return [Sample(s.image, s.instruction, question=s.question) for s in frames.samples()], frames.kinds


def retention_frames(n: int, seed: int) -> List[Sample]:
    """Frames of known skills with their instructions: off-task prompts at which the student is compared with the teacher."""
    return mixed_frames(n, RETENTION + _check(seed), questions=0.0, keep=0.3).samples()


def pick_key(new_skill: str, given: Optional[str], known: Dict) -> Optional[str]:
    """The key of the action statistics with which the new skill is played: the given one, else that of the skill's own data set where
    the model (`known`: its statistics by key) has learnt several, else None: the only one there is."""
    own = f"tabletop_{new_skill}"
    return given if given is not None or own not in known else own


def old_key(known: Dict) -> Optional[str]:
    """The key with which the skills of the base are played, that of its pretraining; None for a model that has no such statistics."""
    return PRETRAINED_KEY if PRETRAINED_KEY in known else None


def asked_skills(skills: List[str], new_skill: str) -> List[str]:
    """The skills of an evaluation: those named, or the known ones, the new one, and its control if it has one."""
    control = CONTROLS.get(new_skill)
    return list(skills) or [*SKILLS, new_skill, *([control] if control else [])]


def asked_rows(rows: List[dict], settings) -> List[dict]:
    """Trial records without those of skills that this evaluation did not ask for: one model's records may hold several new skills."""
    asked = asked_skills(settings.skills, settings.new_skill)
    return [row for row in rows if row["kind"] != "skill" or row["ability"] in asked]


def skill_alarm(datasets: List[str], new_skill: str) -> List[str]:
    """One line when a run has learnt new skills from the data sets of these names, and not the one that is evaluated as new."""
    learnt = [name.removeprefix("tabletop_") for name in datasets if name.removeprefix("tabletop_") in NEW_SKILLS]
    return [] if new_skill in learnt or not learnt else [
        f"the run was trained on {', '.join(learnt)}, and this evaluation takes {new_skill} for the new skill: "
        f"--evaluate.new_skill {learnt[-1]} fits it"]


def followed(rows: List[dict]) -> Dict[str, Dict[str, Dict[str, float]]]:
    """{"followed": skill -> {"prompted", "other", "neither", "n"}}: on which of two targets the episodes ended, as shares.

    rows: trial records; crashes do not count. {} where no trial had two targets. A model that does not listen puts the object on one
    and the same target whichever is named.
    """
    ends: Dict[str, List[str]] = {}
    for row in rows:
        if "ended" in row and row["crash"] is None:
            ends.setdefault(row["ability"], []).append(row["ended"])
    shares = {skill: {**{end: found.count(end) / len(found) for end in ENDS}, "n": len(found)} for skill, found in ends.items()}
    return {"followed": shares} if shares else {}


class QuestionTrial(NamedTuple):
    trial: int
    seed: int
    sample: Sample


def question_trials(kind: str, count: int, seed: int) -> List[QuestionTrial]:
    """`count` questions of one kind on evaluation scenes, part of them in the middle of an episode; every answer equally often."""
    trials, attempt = [], 0
    possible = ANSWERS[kind]
    while len(trials) < count:
        own = EVALUATION + _check(seed) + attempt
        attempt += 1
        rng = np.random.default_rng([own, 100 + QUESTION_KINDS.index(kind)])  # apart from the scenes' own streams
        world = TabletopWorld([SKILLS[rng.integers(len(SKILLS))]], [own])
        for _ in range(int(rng.integers(0, 10)) if rng.random() < 0.5 else 0):
            world.step(expert_actions(world))
        found = ask(world, 0, kind, rng)
        if found is not None and found[1] == possible[len(trials) % len(possible)]:
            trials.append(QuestionTrial(len(trials), own, Sample(render(world)[0], found[0], question=True, answer=found[1])))
    return trials


if __name__ == "__main__":  # sanity check: python -m vlakeep.tabletop.benchmark
    from collections import Counter

    sample_frames = mixed_frames(2_000, PROBE, questions=0.5)
    print("frames by kind:", dict(Counter(sample_frames.kinds).most_common()))
    for kind in QUESTION_KINDS:
        given = Counter(answer for name, answer in zip(sample_frames.kinds, sample_frames.answers) if name == kind)
        asked = Counter(trial.sample.answer for trial in question_trials(kind, 20, 0))
        print(f"{kind}: answers in these frames {dict(given)}, in 20 evaluation questions {dict(asked)}")
        assert set(given) == set(asked) == set(ANSWERS[kind]) and max(asked.values()) - min(asked.values()) <= 1
