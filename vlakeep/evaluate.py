"""Stage `vlakeep evaluate`: new skill, old skills, visual questions, teacher-relative retention and drift of one model.

    vlakeep evaluate --config configs/baseline_lora.yaml --evaluate.target baseline
    vlakeep evaluate --config configs/baseline_lora.yaml --evaluate.benchmark libero_object --evaluate.workers 8
    vlakeep evaluate --config configs/baseline_lora.yaml --evaluate.benchmark dataset --data.train_fraction 0.9

reads:  base checkpoint; for a run, the adapter of its newest intact checkpoint; probe_root_dir/<probe.name> for the drift
writes: ROOT/eval/<target>/records.jsonl (one line per trial, resumable) and summary.json; for a LIBERO suite the same below
        ROOT/eval/<suite>/<target>/, and videos/ with --evaluate.videos; for data sets below ROOT/eval/dataset/<target>/
"""

import hashlib
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import numpy as np
import torch
from tqdm import tqdm

from vlakeep.benchmarks import open_loop
from vlakeep.benchmarks.records import Records
from vlakeep.benchmarks.summary import make_summary, write_summary
from vlakeep.benchmarks.trained import crop_alarm, renderer_alarm, trained_data, training_picture
from vlakeep.core.compat import require_numpy
from vlakeep.core.config import Config, EvaluateConfig, config_from_argv, to_dict
from vlakeep.core.parallel import pick_device, set_threads
from vlakeep.core.storage import Storage
from vlakeep.core.target import load_manifest, read_action_statistics, target_checkpoint
from vlakeep.data.dataset import Conventions
from vlakeep.data.formats import closing_all, open_datasets
from vlakeep.data.images import center_crop, resize_uint8
from vlakeep.data.sample import Sample
from vlakeep.data.statistics import normalise, unnormalise
from vlakeep.libero import benchmark as libero
from vlakeep.libero import setup as libero_setup
from vlakeep.models.adapters import adapters_disabled, load_adapter
from vlakeep.models.alarms import ActionWatch, orientation_alarm
from vlakeep.models.load import make_backbone
from vlakeep.probe.batches import prompt_batches
from vlakeep.probe.heldout import open_heldout
from vlakeep.probe.probe_set import ProbeSet
from vlakeep.tabletop import benchmark as tabletop
from vlakeep.teacher.collect import pooled_states
from vlakeep.teacher.icsm_artifact import default_layers, layer_map
from vlakeep.thermostat.drift import covariance, covariance_drift

ANSWER_TOKENS = 6
TABLETOP_SEED = 1000
REPLAY = "replay"  # the target that is no model
GREY = 128
QUESTION_BATCH, KL_BATCH = 250, 100
ROUNDING = 1e-5  # nats, of a mean over float32 sums
FIRST_PICTURES = 20  # of a LIBERO evaluation, compared with the training data's
# Fields of the evaluate section that change no trial, and those that one kind of benchmark does not read.
# A probe is named by its hash; blank evaluations have a folder of their own; other suites and new skills have records of their own.
NO_MATTER = ("target", "parallel", "workers", "videos", "probe", "blank", "other_suites", "new_skill")
LIBERO_ONLY = ("batch", "center_crop")


def load_target(config: Config, storage: Storage, device):
    """(backbone with the target's adapter, its name, what identifies its weights). `base` has no adapter."""
    backbone = make_backbone(config.backbone, device, storage.cache)
    target = config.evaluate.target
    if target == "base":
        return backbone.eval(), "base", backbone.weights_sha256
    folder = target_checkpoint(target, storage)
    manifest = load_manifest(folder, backbone.weights_sha256)
    load_adapter(backbone, folder / "adapter")
    statistics = read_action_statistics(folder)
    backbone.norm_stats = {**backbone.norm_stats, **statistics}
    if backbone.unnorm_key is None and len(statistics) == 1:
        backbone.unnorm_key = next(iter(statistics))
    # A step of a run that was named by its folder gets its own records.
    name = f"{folder.absolute().parents[1].name}-{folder.name}" if Path(target).name == folder.name else Path(target).name
    return backbone.eval(), name, manifest


class ActionPolicy:
    """(images [N], instructions [N]) -> un-normalised actions [N, A], one batched forward."""

    def __init__(self, backbone, unnorm_key):
        self._backbone, self._key = backbone, unnorm_key
        self.watch = ActionWatch(backbone.action_statistics(unnorm_key))

    def __call__(self, images, instructions):
        actions_NA, early_N = attempt_actions(self._backbone, images, instructions, self._key)
        self.watch.add(actions_NA, early_N)
        return actions_NA


def attempt_actions(backbone, images, instructions, unnorm_key, width: int = 0) -> Tuple[np.ndarray, np.ndarray]:
    """(actions [N, A], bool [N]: whether the answer ended early), no row of which is an error: a policy that no longer speaks actions
    fails as it would on a robot. width: tokens that prompts are padded to at least."""
    samples = [Sample(image, text) for image, text in zip(images, instructions)]
    return backbone.attempt_batch(backbone.processor.encode_prompts(samples, width), unnorm_key)


@torch.inference_mode()
def answer_questions(backbone, samples, batch_size: int = QUESTION_BATCH) -> List[str]:
    """Greedy answers, lower case and stripped."""
    answers = []
    for start in range(0, len(samples), batch_size):
        batch = backbone.processor.encode_prompts(samples[start:start + batch_size])
        ids, _ = backbone.generate(batch.to(backbone.device), max_new_tokens=ANSWER_TOKENS, stop_at_eos=True)
        answers += [t.strip().lower() for t in backbone.processor.tokenizer.batch_decode(ids.cpu(), skip_special_tokens=True)]
    return answers


@torch.inference_mode()
def action_token_kl(backbone, samples, batch_size: int = KL_BATCH) -> np.ndarray:
    """KL(teacher || student) per frame [N], averaged over the teacher's own action tokens, both models fed those tokens."""
    values = []
    for start in range(0, len(samples), batch_size):
        batch = backbone.processor.encode_prompts(samples[start:start + batch_size]).to(backbone.device)
        with adapters_disabled(backbone):
            tokens_BT, _ = backbone.generate(batch, max_new_tokens=backbone.action_tokens(), stop_at_eos=False)
            teacher = backbone.log_probabilities_of_continuation(batch, tokens_BT)
        student = backbone.log_probabilities_of_continuation(batch, tokens_BT)
        kl_B = (teacher.exp() * (teacher - student)).sum(-1).mean(1)
        assert not (kl_B < -ROUNDING).any(), f"a KL of {float(kl_B.min()):.3g} nats: teacher and student are not both distributions"
        values.append(kl_B.clamp(min=0).cpu().numpy())
    return np.concatenate(values) if values else np.zeros(0)


@torch.inference_mode()
def measure_drift(backbone, config: Config, storage: Storage) -> float:
    """||C_S - C_T||_F over the whole probe, averaged over the representative layers; 0 for the base itself."""
    probe = ProbeSet(storage.probe_folder(config.probe.name))
    layers = config.icsm.layers or default_layers(backbone.num_layers)
    layer_map(backbone.num_layers, layers)  # raises for a layer that the model does not have
    items = probe.spread(config.probe.size)

    def states():
        batches = prompt_batches(probe, items, backbone.processor, config.icsm.batch_size)
        return pooled_states(backbone, batches, layers, quiet=True, where=str(probe.folder)).states

    with adapters_disabled(backbone):
        teacher = {layer: covariance(x) for layer, x in states().items()}
    return float(covariance_drift(states(), teacher))


def run_evaluation(config: Config, storage: Storage, folder: Optional[Path] = None, drift: bool = True) -> Path:
    """Evaluate one target and return its folder (`folder`, or its own). Interrupted evaluations go on where they stopped.

    drift: whether the drift over the probe is measured, which takes a pass of both models over all of it.
    """
    set_threads(config.threads)
    require_numpy()
    started = time.perf_counter()
    settings = resolved(config)
    if settings.benchmark == open_loop.NAME:
        return run_open_loop(config, settings, storage, folder, started)
    in_libero = settings.benchmark in libero.SUITES
    (libero.check if in_libero else check_tabletop)(settings)
    if in_libero and settings.target == REPLAY:
        return run_replay(config, settings, storage, started)
    backbone, name, weights = load_target(config, storage, pick_device(config.device))
    key = config.backbone.unnorm_key
    if in_libero:
        libero.say_idle_rows(settings)
        key = libero.pick_key(settings.benchmark, key, backbone.norm_stats, own_key(backbone, settings.benchmark))
        backbone.unnorm_key = key
        name += "-blank" if settings.blank else ""
    else:
        key = tabletop.pick_key(settings.new_skill, key or backbone.unnorm_key, backbone.norm_stats)
    backbone.action_statistics(key)  # raises for a key that would make every trial crash
    folder = folder or (storage.eval / settings.benchmark / name if in_libero else storage.eval / name)
    probe = open_questions(config, storage) if in_libero and settings.probe and not settings.blank else None
    old_key = None if in_libero else tabletop.old_key(backbone.norm_stats)
    header = make_header(settings, weights, backbone.weights_sha256, probe, model_settings(backbone, config, key, old_key))
    with Records(folder / "records.jsonl", header) as records:
        # First, while a bad probe costs nothing yet.
        distance = drift_of(backbone, config, storage, required=not in_libero) if drift else None
        if in_libero:
            alarms = crop_alarm(config, storage, settings) + renderer_alarm(config, storage, key)
            for suite in [settings.benchmark, *settings.other_suites]:
                run_libero(backbone, config, of_suite(settings, suite), storage, records, folder, name)
            if probe:
                run_probe(backbone, probe, settings, records, name)
        else:
            alarms = tabletop.skill_alarm(trained_data(config, storage).get("datasets") or [], settings.new_skill)
            run_tabletop(backbone, key, old_key, settings, records, name)
        rows = records.rows() if in_libero else tabletop.asked_rows(records.rows(), settings)
        summary = make_summary(name, rows, distance, weights, settings.benchmark, settings.new_skill)
        return write_summary(folder, summary, alarms + records.alarms(), started)


def run_open_loop(config: Config, settings, storage: Storage, folder: Optional[Path], started: float) -> Path:
    """Frames of episodes that the training on data.train_fraction has not seen, one action each, compared with the demonstrated one."""
    data = config.data
    with closing_all(open_datasets(storage.data, data.datasets, 1.0, storage.cache,
                                   Conventions(data.camera, data.gripper, data.rotate))) as datasets:
        for dataset in datasets:
            dataset.leave_out(data.train_fraction)
        backbone, name, weights = load_target(config, storage, pick_device(config.device))
        key = backbone.action_key(config.backbone.unnorm_key)
        size = tuple(backbone.processor.picture_size)
        of_data = ",".join(f"{dataset.fingerprint()}-{data.train_fraction}" for dataset in datasets)
        header = {**make_header(settings, weights, backbone.weights_sha256, None, model_settings(backbone, config, key)), "data": of_data,
                  "center_crop": settings.center_crop}
        folder = folder or storage.eval / open_loop.NAME / name

        def picture(image):
            return resize_uint8(center_crop(image) if settings.center_crop else image, size)

        def act(images, texts):
            return attempt_actions(backbone, images, texts, key)

        def tokens(actions_NA):
            return backbone.processor.encode_actions(normalise(actions_NA, backbone.norm_stats[key])[0])

        def distance(images, texts):
            return action_token_kl(backbone, [Sample(image, text) for image, text in zip(images, texts)])

        with Records(folder / "records.jsonl", header) as records:
            open_loop.run_episodes(datasets, act, tokens, None if name == "base" else distance, picture, settings, records, name)
            return write_summary(folder, open_loop.summary(name, weights, records.rows()), [], started)


def model_settings(backbone, config: Config, key: Optional[str], old_key: Optional[str] = None) -> Dict:
    """What beside the weights decides about the actions: how the model computes, and how they are un-normalised."""
    key, said = backbone.action_key(key), config.backbone
    old_key = old_key or key

    def identity(own: str) -> str:
        return hashlib.sha256(json.dumps(backbone.action_statistics(own), sort_keys=True).encode()).hexdigest()

    return {"unnorm_key": key, "statistics": identity(key), "dtype": said.dtype, "attn_implementation": said.attn_implementation,
            "source": said.source, **({"old_unnorm_key": old_key, "old_statistics": identity(old_key)} if old_key != key else {})}


def make_header(settings, weights: str, base: str, probe: Optional[ProbeSet] = None, model: Optional[Dict] = None) -> Dict:
    """What records must have in common to be of one evaluation. `model`: model_settings, None for what is no model."""
    in_libero = settings.benchmark in libero.SUITES
    unread = NO_MATTER + (() if probe else ("questions", "questions_per_kind", "retention_frames") if in_libero else LIBERO_ONLY)
    unread += ("episodes",) if in_libero else ()  # an episode does not depend on their number, so more of them can be added
    return {"weights": weights, "base": base, "evaluate": {k: v for k, v in to_dict(settings).items() if k not in unread},
            **({"model": model} if model else {}), **({"probe": probe.sha256} if probe else {}),
            **rules_of(settings)}


def rules_of(settings) -> Dict:
    """What of the benchmark itself decides about an episode and is no setting."""
    if settings.benchmark == open_loop.NAME:
        return {}
    if settings.benchmark in libero.SUITES:
        return {"mujoco": libero_setup.versions().get("mujoco")}
    return {"tabletop": tabletop_rules(settings)}


def tabletop_rules(settings) -> Dict:
    """How long an episode of each skill may take."""
    return {"max_steps": {skill: tabletop.MAX_STEPS[skill] for skill in settings.skills or tabletop.ALL_SKILLS}}


def of_suite(settings: EvaluateConfig, suite: str) -> EvaluateConfig:
    """The settings for one of the suites: the chosen tasks are those of the benchmark."""
    return settings if suite == settings.benchmark else replace(settings, benchmark=suite, skills=[])


def own_key(backbone, suite: str) -> Optional[str]:
    """The key of the model's only action statistics, if nothing else is said."""
    if backbone.unnorm_key is None and len(backbone.norm_stats) == 1:
        only = next(iter(backbone.norm_stats))
        if not only.startswith(suite):
            print(f"the model knows no action statistics but those of {only}: they are used for {suite}", file=sys.stderr)
        return only
    return backbone.unnorm_key


def run_replay(config: Config, settings, storage: Storage, started: float) -> Path:
    """The control without a model: demonstrations replayed open loop from the evaluation's initial states."""
    data, tasks = config.data, libero.pick_tasks(settings.benchmark, settings.skills)
    conventions = Conventions(data.camera, data.gripper, data.rotate)
    with closing_all(open_datasets(storage.data, data.datasets, 1.0, storage.cache, conventions)) as datasets:
        act = libero.Replay(demonstrations(datasets, settings.benchmark, tasks, settings.episodes))
        identity = ",".join(dataset.fingerprint() for dataset in datasets)
    folder = storage.eval / settings.benchmark / REPLAY
    with Records(folder / "records.jsonl", make_header(settings, identity, "")) as records:
        libero.run_suite(act, settings, settings.center_crop, records, folder / "videos", desc=REPLAY)
        rows = records.rows()
    return write_summary(folder, make_summary(REPLAY, rows, None, identity, settings.benchmark), [], started)


def demonstrations(datasets, suite: str, tasks: List[int], count: int) -> Dict[str, List[np.ndarray]]:
    """Instruction -> actions [T, 7] of up to `count` demonstrations. FileNotFoundError names the instructions without one."""
    wanted = libero.instructions(suite, tasks)
    found: Dict[str, List[np.ndarray]] = {language: [] for language in wanted}
    for dataset in datasets:
        for episode, language in enumerate(dataset.languages):
            if len(found.get(language, range(count))) < count:
                found[language].append(unnormalise(dataset.actions(episode), dataset.statistics))
    missing = [language for language in wanted if not found[language]]
    if missing:
        raise FileNotFoundError(f"--data.datasets [{', '.join(d.name for d in datasets)}] has no demonstration of {missing}: make "
                                f"them with `vlakeep libero-demos --suite {suite} --demos 1`")
    return found


def resolved(config: Config) -> EvaluateConfig:
    """The evaluate section with the values that follow from others."""
    settings = config.evaluate
    in_libero = settings.benchmark in libero.SUITES
    return replace(settings, seed=(libero.SEED if in_libero else TABLETOP_SEED) if settings.seed is None else settings.seed,
                   center_crop=config.data.image_aug if settings.center_crop is None else settings.center_crop)


def drift_of(backbone, config: Config, storage: Storage, required: bool):
    """The drift, 0 for the base itself; None without a probe where that is no error."""
    if config.evaluate.target == "base":
        return 0.0
    if not required and not storage.probe_folder(config.probe.name).is_dir():
        print(f"no probe `{config.probe.name}`: the drift is not measured", file=sys.stderr)
        return None
    return measure_drift(backbone, config, storage)


def check_tabletop(settings) -> None:
    asked = (("skills", settings.skills, tabletop.ALL_SKILLS), ("questions", settings.questions, tabletop.QUESTION_KINDS),
             ("new_skill", [settings.new_skill], tabletop.NEW_SKILLS))
    for key, names, known in asked:
        wrong = [name for name in names if name not in known or names.count(name) > 1]
        if wrong:
            raise ValueError(f"--evaluate.{key} {wrong}: must be among {', '.join(known)}, each once")


def ask_questions(backbone, kind: str, samples, seeds: List[int], answers: List[str], records: Records) -> None:
    """The trials of one question kind that `records` lacks; `samples(trials)` makes their questions."""
    for trials, lacking in records.missing("question", kind, len(answers), QUESTION_BATCH):
        for trial, said in zip(trials, answer_questions(backbone, samples(trials))):
            if trial in lacking:
                records.add(kind="question", ability=kind, trial=trial, seed=seeds[trial], success=said == answers[trial], value=None,
                            crash=None, steps=0, answer=said, expected=answers[trial])


def measure_retention(backbone, samples, seeds: List[int], records: Records) -> None:
    """The KL of the frames that `records` lacks; `samples(trials)` makes them."""
    for trials, lacking in records.missing("retention", "action_kl", len(seeds), KL_BATCH):
        for trial, kl in zip(trials, action_token_kl(backbone, samples(trials))):
            if trial in lacking:
                records.add(kind="retention", ability="action_kl", trial=trial, seed=seeds[trial], success=None, value=float(kl),
                            crash=None, steps=0)


def run_tabletop(backbone, key, old_key, settings, records: Records, name: str) -> None:
    """Episodes of every skill, questions of every kind, and the KL on frames of the old skills."""
    asked = tabletop.asked_skills(settings.skills, settings.new_skill)
    key = backbone.action_key(key)
    old_key = old_key or key
    # An old skill keeps the statistics that it was learnt with: those of new data may not even hold its motions.
    for own in dict.fromkeys((old_key, key)):
        skills = [skill for skill in asked if own == (key if skill in tabletop.NEW_SKILLS else old_key)]
        policy = ActionPolicy(backbone, own)
        tabletop.run_skill_episodes(policy, skills, settings.episodes, tabletop.EVALUATION + settings.seed, settings.parallel, records,
                                    name)
        records.add_alarms(policy.watch.alarms())
    for kind in tqdm(settings.questions or tabletop.QUESTION_KINDS, desc=f"{name}: questions", leave=False):
        trials = tabletop.question_trials(kind, settings.questions_per_kind, settings.seed)
        ask_questions(backbone, kind, lambda numbers, trials=trials: [trials[number].sample for number in numbers],
                      [trial.seed for trial in trials], [trial.sample.answer for trial in trials], records)
    if name != "base":
        frames = tabletop.retention_frames(settings.retention_frames, settings.seed)
        measure_retention(backbone, lambda numbers: [frames[number] for number in numbers], [settings.seed] * len(frames), records)


def run_libero(backbone, config: Config, settings, storage: Storage, records: Records, folder: Path, name: str) -> None:
    """Episodes of the suite's tasks in the simulator."""
    key, first = backbone.unnorm_key, []
    if settings.benchmark != config.evaluate.benchmark:  # an old suite keeps the statistics that it was learnt with
        key = libero.pick_key(settings.benchmark, None, backbone.norm_stats, key)
    watch = ActionWatch(backbone.action_statistics(key))

    def policy(images, instructions, count):
        images = np.full_like(images, GREY) if settings.blank else images
        actions_NA, early_N = attempt_actions(backbone, images, instructions, key, width)
        watch.add(actions_NA[:count], early_N[:count])
        return actions_NA

    spoken = libero.instructions(settings.benchmark, libero.pick_tasks(settings.benchmark, settings.skills))
    width = max(len(backbone.processor.whole_prompt(Sample(None, text))) for text in spoken)
    ask = libero.FixedBatch(policy, settings.batch)

    def act(jobs, seen):
        answers = ask(jobs, seen)
        if len(first) < FIRST_PICTURES:
            first.extend(np.asarray(one.image, dtype=float) for one in seen)
        return answers

    videos = folder / "videos" if settings.benchmark == config.evaluate.benchmark else folder / "videos" / settings.benchmark
    restarts = libero.run_suite(act, settings, settings.center_crop, records, videos, desc=name)
    if restarts:
        print(f"{name}: {restarts} simulator processes died and were replaced", file=sys.stderr)
    comparable = first and config.evaluate.target != "base" and settings.benchmark == config.evaluate.benchmark
    trained = training_picture(config, storage) if comparable else None
    records.add_alarms(watch.alarms() + ([] if trained is None else orientation_alarm(trained, np.mean(first, axis=0))))


def open_questions(config: Config, storage: Storage) -> ProbeSet:
    """The probe of evaluate.probe, whose `answers` map item numbers to answers. ValueError when it is the protected one."""
    return open_heldout(storage.probe_folder(config.evaluate.probe), storage.probe_folder(config.probe.name))


def run_probe(backbone, probe: ProbeSet, settings, records: Records, name: str) -> None:
    """Questions of every kind and the KL on instructions, on the pictures of a probe, cut as those of the episodes are.

    A trial's `seed` is its item number.
    """
    kinds = probe.kinds(range(len(probe)))

    def samples_of(items):
        def samples(batch):
            found = probe.samples([items[trial] for trial in batch])
            return [replace(sample, image=center_crop(sample.image)) for sample in found] if settings.center_crop else found
        return samples

    for kind in settings.questions or sorted(set(kinds) - {"instruction"}):
        items = [i for i, own in enumerate(kinds) if own == kind][:settings.questions_per_kind]
        ask_questions(backbone, kind, samples_of(items), items, [probe.answers[item] for item in items], records)
    items = [i for i, kind in enumerate(kinds) if kind == "instruction"][:settings.retention_frames]
    if name != "base":
        measure_retention(backbone, samples_of(items), items, records)


def main(argv: List[str]) -> int:
    config = config_from_argv(argv)
    run_evaluation(config, Storage.from_config(config))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
