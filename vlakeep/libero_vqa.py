"""Stage `vlakeep libero-vqa`: a probe of LIBERO scenes, half instructions and half visual questions with known answers.

    vlakeep libero-vqa --suite libero_90 --items 500 --workers 8 --probe.name libero_90 [--tasks 0,1,4] [--first 100000]

Scenes come from resets with seeds from --first on, in the middle of the expert's episodes; neither demonstrations nor the
initial states of the evaluation share them. Questions of each kind are chosen so that its answers come about equally often.
The same options give the same bytes, whatever the number of workers.

writes: probe_root_dir/<probe.name>/ (a probe for `vlakeep offline`) and in it answers.jsonl: item, kind, question, answer
"""

import json
import sys
from collections import Counter
from typing import List

import numpy as np
from tqdm import tqdm

from vlakeep.benchmarks.libero import stage_options
from vlakeep.benchmarks.libero_env import LiberoEnv
from vlakeep.benchmarks.libero_questions import KINDS, look
from vlakeep.benchmarks.libero_workers import Job, Workers
from vlakeep.config import config_from_argv
from vlakeep.data.sample import Sample
from vlakeep.probe.probe_set import write_probe
from vlakeep.storage import Storage, atomic_write

OPTIONS = {"suite": "libero_90", "items": "500", "tasks": "", "workers": "1", "first": "100000"}
LONGEST = 100  # steps of an episode among which the moment of a picture is drawn


def main(argv: List[str]) -> int:
    own, rest = stage_options(argv, OPTIONS)
    config = config_from_argv(rest)
    storage = Storage.from_config(config)
    count, tasks = own["items"], own["tasks"]
    folder = storage.guard_write(storage.probe_folder(config.probe.name), what="probe")
    scenes = [(tasks[i % len(tasks)], own["first"] + i) for i in range((count + 1) // 2)]
    jobs = [Job(own["suite"], task, seed, 0, limit=LONGEST) for task, seed in sorted(scenes)]
    seen = {}
    with Workers(LiberoEnv, look, own["workers"]) as pool:
        for job, result, error in tqdm(pool.run(jobs, None), total=len(jobs), desc=f"{own['suite']}: scenes", mininterval=1.0):
            if error:
                raise ValueError(f"task {job.task}, seed {job.number}: {error}")
            seen[job.task, job.number] = result
    samples, kinds = choose([seen[scene] for scene in scenes], count, config.seed)
    write_probe(folder, samples, kinds)
    with atomic_write(folder / "answers.jsonl", "w") as file:
        for item, (sample, kind) in enumerate(zip(samples, kinds)):
            if sample.question:
                line = {"item": item, "kind": kind, "question": sample.instruction, "answer": sample.answer}
                file.write(json.dumps(line) + "\n")
    told = Counter(zip(kinds, (sample.answer for sample in samples)))
    for kind in sorted(set(kinds)):
        print(f"  {kind:12s} " + ", ".join(f"{answer or 'items'} {n}" for (k, answer), n in told.most_common() if k == kind))
    print(f"wrote {folder}: {len(samples)} items")
    return 0


def choose(scenes: List[tuple], count: int, seed: int):
    """(samples, kinds): each scene gives its instruction and a question, of the rarest kind so far and with its rarest answer."""
    rng, used, samples, kinds = np.random.default_rng(seed), Counter(), [], []
    for image, instruction, asked in scenes:
        samples.append(Sample(image, instruction))
        kinds.append("instruction")
        kind = min([name for name in rng.permutation(KINDS).tolist() if asked[name]], key=kinds.count)
        options = [asked[kind][i] for i in rng.permutation(len(asked[kind]))]
        question, answer = min(options, key=lambda option: used[kind, option[1]])
        used[kind, answer] += 1
        samples.append(Sample(image, question, question=True, answer=answer))
        kinds.append(kind)
    return samples[:count], kinds[:count]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
