"""Stage `vlakeep libero-vqa`: a probe of LIBERO scenes with their instructions and visual questions with known answers.

    vlakeep libero-vqa --suite libero_90 --items 500 --workers 8 --probe.name libero_90
    vlakeep libero-vqa --suite libero_90 --items 1250 --questions_per_scene 4 --split heldout --probe.name libero_90_heldout

Every scene gives its instruction and --questions_per_scene questions (1), on average: which ones is chosen over all scenes, so that
no answer to a text stands for more than half of its questions. With few tasks, or many that look alike, there are fewer questions
than asked for. --tasks 0,1,4 takes some tasks only.

Scenes are resets with seeds of their own in the middle and at the end of the expert's episodes: --split probe (what the method
protects) those from 100000 on, --split heldout (what --evaluate.probe asks) those from 200000 on, --first N the later ones of
them. Demonstrations have seeds from 1000 on, and the initial states of the evaluation come from no seed.
The same options give the same bytes, whatever the number of workers.

writes: probe_root_dir/<probe.name>/ (a probe for `vlakeep offline`) and in it
        answers.jsonl: item, kind, question, answer, suite, task, seed, split
        balance.json: how well the answers can be guessed without the picture
"""

import json
import sys
from typing import Dict, List, Tuple

import numpy as np
from tqdm import tqdm

from vlakeep.core.config import ConfigError
from vlakeep.core.options import read
from vlakeep.core.storage import Storage, atomic_write
from vlakeep.data.sample import Sample
from vlakeep.libero.balance import Question, choose, measure
from vlakeep.libero.benchmark import SPLIT_SIZE, SPLITS, pick_tasks, require_libero
from vlakeep.libero.env import LiberoEnv
from vlakeep.libero.questions import Pictured, look, questions
from vlakeep.libero.stages import VQA
from vlakeep.libero.workers import Job, Workers
from vlakeep.probe.probe_set import write_probe

LONGEST = 300  # steps of an episode
Scene = Tuple[int, int]  # task, seed


def main(argv: List[str]) -> int:
    args, config = read(VQA, argv)
    own = vars(args)
    require_libero()
    own["tasks"] = pick_tasks(own["suite"], own["tasks"], "--tasks")
    storage = Storage.from_config(config)
    scenes = pick_scenes(own)
    folder = storage.guard_write(storage.probe_folder(config.probe.name), what="probe")
    seen = render(own["suite"], scenes, own["workers"])
    pool = [Question(i, kind, *pair) for i, scene in enumerate(scenes) for kind, pairs in questions(seen[scene].view).items()
            for pair in pairs]
    wanted = own["items"] - len(scenes)
    chosen = choose(pool, wanted, own["questions_per_scene"], config.seed)
    items = [Question(i, "instruction", seen[scene].instruction, "") for i, scene in enumerate(scenes)] + chosen
    # Mixed, because a part of a probe is every second or every fifth of its items.
    items = [items[i] for i in np.random.default_rng(config.seed).permutation(len(items))]
    write_probe(folder, [sample(item, seen[scenes[item.scene]]) for item in items], [item.kind for item in items])
    with atomic_write(folder / "answers.jsonl", "w") as file:
        for number, item in enumerate(items):
            if item.kind != "instruction":
                task, seed = scenes[item.scene]
                line = {"item": number, "kind": item.kind, "question": item.text, "answer": item.answer, "suite": own["suite"],
                        "task": task, "seed": seed, "split": own["split"]}
                file.write(json.dumps(line) + "\n")
    balance = measure(chosen)
    with atomic_write(folder / "balance.json", "w") as file:
        made = {"suite": own["suite"], "split": own["split"], "seeds": [scenes[0][1], scenes[-1][1]], "scenes": len(scenes)}
        file.write(json.dumps({**made, "kinds": balance}, indent=2) + "\n")
    tell(balance)
    if len(chosen) < wanted:
        print(f"{wanted - len(chosen)} questions fewer than asked for: these scenes have no more whose answer their text does not tell; "
              "take more tasks, or more scenes with a smaller --questions_per_scene", file=sys.stderr)
    print(f"wrote {folder}: {len(scenes)} instructions and {len(chosen)} questions")
    return 0


def pick_scenes(own: dict) -> List[Scene]:
    """The split's scenes, tasks in turn. ConfigError for more scenes than it has."""
    count = -(-own["items"] // (1 + own["questions_per_scene"]))
    if own["first"] + count > SPLIT_SIZE:
        raise ConfigError(f"--first {own['first']}: a split has {SPLIT_SIZE} scenes, and --first counts from its first one; other scenes "
                          "than those of a probe have --split heldout")
    tasks, first = own["tasks"], SPLITS[own["split"]] + own["first"]
    return [(tasks[i % len(tasks)], first + i) for i in range(count)]


def render(suite: str, scenes: List[Scene], workers: int) -> Dict[Scene, Pictured]:
    """The scenes, made task by task: to open a task takes longer than a scene of it."""
    jobs, seen = [Job(suite, task, seed, 0, limit=LONGEST) for task, seed in sorted(scenes)], {}
    with Workers(LiberoEnv, look, workers) as pool:
        for job, result, error in tqdm(pool.run(jobs, None), total=len(jobs), desc=f"{suite}: scenes", mininterval=1.0):
            if error:
                raise ValueError(f"task {job.task}, seed {job.number}: {error}")
            seen[job.task, job.number] = result
    return seen


def sample(item: Question, pictured: Pictured) -> Sample:
    if item.kind == "instruction":
        return Sample(pictured.image, item.text)
    return Sample(pictured.image, item.text, question=True, answer=item.answer)


def tell(balance: Dict[str, dict]) -> None:
    """The table of guesses, and the answers of each kind."""
    print(f"  {'kind':10s} {'n':>5s} {'texts':>6s} {'majority':>9s} {'text only':>10s} {'text told':>10s}   right without the picture")
    for kind, row in balance.items():
        answers = list(row.get("answers", {}).items())
        told = ", ".join(f"{answer} {n}" for answer, n in answers[:5]) + (f", {len(answers) - 5} others" if len(answers) > 5 else "")
        print(f"  {kind:10s} {row['n']:5d} {row['texts']:6d} {row['majority']:9.2f} {row['text_only']:10.2f} {row['text_told']:10.2f}   "
              + told)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
