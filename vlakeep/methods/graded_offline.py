"""What method `graded` needs of the frozen teacher: the spectra of its inputs, its answers, and what the probe covers.

Several processes (core/parallel.py) divide batches of items among them, and the inputs whose second moments are summed: each sums those
of its inputs over all items, in the order of a single process, so that the artefact is the same to the bit. Sums divided by items would be
others, and D x D numbers to be sent; and in float32 a moment costs ten times the layers in front of it, which every process runs.

The probe is split: the spectra come from one part, the sensor and the coverage report from the other, since a loop that is closed on the
items whose directions it has shut sees less drift than there is.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
from tqdm import tqdm

import vlakeep
from vlakeep.core.config import Config
from vlakeep.core.log import log
from vlakeep.core.parallel import Distributed, One
from vlakeep.core.provenance import library_versions, source_commit
from vlakeep.core.storage import Storage, need_free
from vlakeep.data.formats import closing_all, open_configured
from vlakeep.data.images import resize_uint8
from vlakeep.data.loader import make_stream
from vlakeep.data.sample import Batch, Sample, SampleSpec
from vlakeep.models.adapters import select_linears
from vlakeep.probe.probe_set import ProbeSet, open_probe
from vlakeep.teacher import artifact, coverage
from vlakeep.teacher.answers import Part, answer_log_probability, answer_rows, joined, run_below
from vlakeep.teacher.collect import dealt, passes, with_own_answers
from vlakeep.teacher.folder import numerics, of_weights
from vlakeep.teacher.spectrum import Spectrum, spectrum, to_tensors

FEW = 4  # items whose activations are kept for a backward pass
LARGEST = 10.0  # weight of a probe item of a rare kind, relative to the mean
HELD_LEAST = 4  # items of a kind that the sensor gets where there are enough: a single one that is about to flip moves the whole loop
SHARE_LARGEST = 0.03  # of what the sensor reads, from one item; of few items all weigh alike
AT_ONCE = 4  # batches whose Parts a process sends together: 60 MB each at 7B
NEW_FRAMES = 64  # of the new task's data, for the coverage report and the divergence on its prompts


def artifact_folder(config: Config, storage: Storage, backbone_name: str, weights_sha256: Optional[str] = None) -> Path:
    folder = storage.artifact_folder(config.gains.name or artifact.artifact_name(backbone_name))
    return of_weights(folder, weights_sha256, chosen=config.gains.name is not None)


def deciding(config: Config) -> dict:
    """The fields that decide the artefact's numbers."""
    return {"columns": config.gains.columns, "holdout": config.gains.holdout, "balance": config.gains.balance,
            "tokens_generated": config.icsm.tokens_generated}


def split_items(items: List[int], kinds: List[str], holdout: float) -> Tuple[List[int], List[int]]:
    """(items of the spectrum, items of the sensor), both ascending. Of every kind of prompt its share goes to the sensor, evenly spaced,
    and at least HELD_LEAST, but for that never more than half of the kind. kinds: of the items."""
    held = set()
    for kind in sorted(set(kinds)):
        own = [item for item, its in zip(items, kinds) if its == kind]
        # Never most of a kind: the spectra would know little of it.
        count = min(max(HELD_LEAST, round(len(own) * holdout)), max(len(own) // 2, round(len(own) * holdout)), len(own) - 1)
        # The middles of `count` equal stretches.
        held |= {own[(2 * i + 1) * len(own) // (2 * count)] for i in range(count)}
    return [item for item in items if item not in held], [item for item in items if item in held]


def item_weights(config: Config, kinds: List[str], largest: float = LARGEST) -> torch.Tensor:
    """Weights float64 [N] of probe items, 1 in the mean: a kind of prompt that has n of the N items counts like n^(1 - gains.balance).
    No item weighs more than `largest` before they are scaled to that mean."""
    numbers = {kind: kinds.count(kind) for kind in kinds}
    weights_N = torch.tensor([numbers[kind] for kind in kinds], dtype=torch.float64) ** -config.gains.balance
    weights_N = (weights_N / weights_N.mean()).clamp(max=largest)
    return weights_N / weights_N.mean()


def sensor_weights(config: Config, kinds: List[str]) -> torch.Tensor:
    """item_weights of the items that the sensor measures: none is more than SHARE_LARGEST of them all, before scaling."""
    return item_weights(config, kinds, min(LARGEST, max(1.0, SHARE_LARGEST * len(kinds))))


def new_samples(config: Config, storage: Storage, size, count: int = NEW_FRAMES, spec: Optional[SampleSpec] = None
                ) -> Dict[str, List[Sample]]:
    """Data set -> frames spread evenly over it, with their instructions, as a model of this spec takes them; {} when there are no data
    yet."""
    try:
        datasets = open_configured(config.data, storage.data, storage.cache, spec)
    except FileNotFoundError:
        return {}
    found = {}
    with closing_all(datasets):
        for dataset in datasets:
            keys = [(e, t) for e, length in enumerate(dataset.lengths) for t in range(int(length))]
            chosen = [keys[i * len(keys) // count] for i in range(min(count, len(keys)))]
            raw = [dataset.frame(*key) for key in chosen]
            found[dataset.name] = [one.with_pictures(lambda picture: resize_uint8(picture, size)) for one in raw]
    return found


def training_batches(config: Config, storage: Storage, backbone, frames: int) -> List[Batch]:
    """The first batches that a run of one process trains on, of `frames` frames in all or just above."""
    size = config.train.batch_size
    with closing(make_stream(config.data, storage.data, backbone.processor, size, config.seed, cache_dir=storage.cache,
                             openvla_dir=config.backbone.openvla_dir, known=backbone.norm_stats)) as stream:
        return [next(stream) for _ in range(-(-frames // size))]


def picture_size(backbone) -> tuple:
    return tuple(backbone.processor.picture_size)


def answered_samples(backbone, samples: List[Sample], batch_size: int) -> Iterator[Tuple[Batch, Batch]]:
    """(prompts, the same with the teacher's own answers), batch by batch."""
    return answered_groups(backbone, in_groups(samples, batch_size))


def in_groups(items: Sequence[One], size: int) -> List[Sequence[One]]:
    return [items[start:start + size] for start in range(0, len(items), size)]


def answered_groups(backbone, groups: List[Sequence[Sample]]) -> Iterator[Tuple[Batch, Batch]]:
    """answered_samples of samples that are in batches already."""
    with ThreadPoolExecutor(1) as pool:  # the pictures of the next batch are prepared while the teacher answers this one
        ahead = [pool.submit(backbone.processor.encode_prompts, group) for group in groups[:1]]
        for number in range(len(groups)):
            prompts = ahead.pop().result()
            ahead += [pool.submit(backbone.processor.encode_prompts, group) for group in groups[number + 1:number + 2]]
            yield prompts, with_own_answers(backbone, prompts, backbone.answer_tokens)


class Watch:
    """Says what each phase of the offline step took, and gives its cached memory back: blocks of one phase do not fit the next."""

    def __init__(self, device: torch.device):
        self._device, self._begun = device, time.perf_counter()

    def phase(self, name: str) -> None:
        """The phase `name` has ended."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
        now = time.perf_counter()
        log.info(f"  {name}: {now - self._begun:.1f} s")
        self._begun = now


class Shares:
    """What this process has of the items: whole batches, those that a single process would make, so that all numbers are its own."""

    def __init__(self, config: Config, backbone, first: int):
        self._backbone, self._first, self._job = backbone, first, Distributed.here()
        self._size = config.icsm.batch_size
        self._wide = max(self._size, config.icsm.answered) if backbone.device.type == "cuda" else self._size

    def share(self, items: Sequence[One]) -> List[Sequence[One]]:
        """This process's batches of a list."""
        return self._job.share(in_groups(items, self._wide))

    def parts(self, samples: Sequence[Sample], desc: str) -> List[List[Part]]:
        """The Parts of each batch of this process."""
        own = self.share(samples)
        shown = tqdm(answered_groups(self._backbone, own), desc=f"teacher's answers: {desc}", total=len(own), leave=False)
        return [whole.split(self._size) if self._wide > self._size else [whole] for whole in run_below(self._backbone, shown, self._first)]

    def all(self, mine: List[List[Part]]) -> List[Part]:
        """The Parts of all processes, in order."""
        if self._job.world == 1:
            return [part for whole in mine for part in whole]
        # Of a process that has none there is no Part to make others like.
        model = next((part for whole in mine for part in whole), None) or self._any_part()
        sent = self._job.merged([[part.tensors() for part in whole] for whole in mine], AT_ONCE)
        return [model.like(tensors) for whole in sent for tensors in whole]

    def _any_part(self) -> Part:
        spec, size = self._backbone.processor.spec, self._backbone.processor.picture_size
        return run_below(self._backbone, answered_groups(self._backbone, [[spec.blank(0, size, "look")]]), self._first)[0]

    def merged(self, mine: List[List[Part]], made: Iterable[One]) -> List[One]:
        """What was made of each Part, of all processes, in order; made: of this one's, in order."""
        rows = iter(made)
        return [one for whole in self._job.merged([[next(rows) for _ in whole] for whole in mine]) for one in whole]


def build(config: Config, storage: Storage, backbone) -> Path:
    """Make the artefact folder and return it."""
    started = time.perf_counter()
    backbone.eval()
    probe = open_probe(config, storage)
    items = probe.spread(config.probe.size)
    fit, held = split_items(items, probe.kinds(items), config.gains.holdout)
    if not held:
        raise ValueError(f"{probe.folder}: none of {len(items)} items can be held out for the sensor, no kind has two; raise --probe.size")
    linears = select_linears(backbone, config.lora.layers, config.lora.modules)
    folder = artifact_folder(config, storage, backbone.name, backbone.weights_sha256)
    need_free(folder, _bytes_needed(config, backbone, linears), "the artefact")
    log.info(f"teacher {backbone.name} ({backbone.num_layers} layers, D = {backbone.hidden_size}), probe {len(fit)} items for the spectra "
             f"of {len(linears)} linears' inputs and {len(held)} for the sensor")
    first = min((int(name.split(".")[1]) for name in linears), default=0)
    job, work = Distributed.here(), Shares(config, backbone, first)
    watch = Watch(backbone.device)
    answered = work.all(work.parts(probe.samples(fit), "probe"))
    watch.phase(f"the teacher's answers to {len(fit)} items, and the layers below the adapted ones")
    spectra = _spectra(config, backbone, answered, item_weights(config, probe.kinds(fit)), first, linears, watch)
    kept = work.parts(probe.samples(held), "held out")
    answers = joined(work.merged(kept, (answer_rows(backbone, part, first) for part in chain(*kept))))
    watch.phase(f"the same of {len(held)} items for the sensor")
    sensitivity = mean_sensitivity(
        work.merged(kept, (piece_sensitivities(backbone, [part], first, linears) for part in chain(*kept))), linears)
    watch.phase("sensitivity of the answers")
    groups = {"probe": {key: coverage.own_energy(one) for key, one in spectra.items()}}
    for made, labels in _groups(config, storage, backbone, probe, held, kept, work.parts):
        own = coverage.part_energies(backbone, list(chain(*made)), first, list(chain(*work.share(labels))), linears, spectra,
                                     backbone.input_key)
        groups.update(coverage.mean_energies(work.merged(made, own), labels))
    watch.phase("coverage")
    if not job.is_main:
        return folder
    found = coverage.report(groups, spectra, config.gains.steepness)
    lines = coverage.warnings(found)
    tensors = {
        "spectrum": to_tensors(spectra),
        "answers": {**answers._asdict(), "items": torch.tensor(held)},
        "sensitivity": {name: torch.tensor([value]) for name, value in sensitivity.items()},
        "energy": {f"{group}/{key}": value for group, energies in groups.items() for key, value in energies.items()},
    }
    artifact.write(folder, tensors, {"groups": found, "warnings": lines}, _meta(config, backbone, probe, linears))
    show(found, lines)
    log.info(f"wrote {folder} in {time.perf_counter() - started:.1f} s")
    return folder


def _meta(config: Config, backbone, probe, linears) -> dict:
    return {
        "backbone": backbone.name, "weights_sha256": backbone.weights_sha256, "depth": backbone.num_layers,
        "hidden_size": backbone.hidden_size, **numerics(config.backbone), **backbone.recorded(),
        "probe": config.probe.name, "probe_sha256": probe.sha256,
        "probe_items": config.probe.size, "config": deciding(config), "linears": len(linears),
        "lora": {"layers": config.lora.layers, "modules": list(config.lora.modules)},
        "vlakeep": vlakeep.__version__, "versions": library_versions(), "commit": source_commit(),
    }


def _bytes_needed(config: Config, backbone, linears) -> int:
    inputs = {backbone.input_key(name): linear.in_features for name, linear in linears.items()}
    return 4 * sum(dim * (min(dim, config.gains.columns) + 1) for dim in inputs.values()) + 50_000_000


def _spectra(config: Config, backbone, parts: List[Part], weights_N: torch.Tensor, first: int, linears,
             watch: Watch) -> Dict[str, Spectrum]:
    """Spectrum of every distinct input; where the moments exceed the memory budget the adapted layers are passed several times."""
    spectra: Dict[str, Spectrum] = {}
    job = Distributed.here()
    own = dealt(linears, backbone.input_key, job.world)[job.rank]
    for group in passes(own, config.icsm.moments_gib * 2**30, backbone.input_key):
        shown = tqdm(parts, desc="second moments", leave=False)
        moments = coverage.input_moments(backbone, shown, weights_N, first, group, backbone.input_key,
                                         answers=config.icsm.tokens_generated)
        watch.phase(f"second moments of {len(moments)} inputs")
        for key in tqdm(sorted(moments), desc="spectra", leave=False):
            spectra[key] = spectrum(moments.pop(key), config.gains.columns)
        watch.phase("their spectra")
    for found in job.gather({key: tuple(one) for key, one in spectra.items()}):
        spectra.update({key: Spectrum(*one) for key, one in found.items()})
    return {key: spectra[key] for key in sorted(spectra)}


def _groups(config: Config, storage: Storage, backbone, probe, held, kept: List[List[Part]], parts
            ) -> Iterator[Tuple[List[List[Part]], List[str]]]:
    """(this process's parts, group of each row of all): kinds of the held-out items, further probes, the new data."""
    yield kept, [f"held out:{kind}" for kind in probe.kinds(held)]
    for name in config.gains.keep:
        other = ProbeSet(storage.probe_folder(name))
        kinds = other.kinds(range(len(other)))
        chosen = [i for kind in sorted(set(kinds)) for i in [i for i, k in enumerate(kinds) if k == kind][:NEW_FRAMES]]
        yield parts(other.samples(chosen), name), [f"keep:{name}/{kinds[i]}" for i in chosen]
    for name, samples in new_samples(config, storage, picture_size(backbone), spec=backbone.processor.spec).items():
        yield parts(samples, name), [f"new:{name}"] * len(samples)


def output_sensitivity(backbone, parts: List[Part], first: int, linears) -> Dict[str, float]:
    """Linear -> mean over tokens and outputs of the squared gradient of log p(answer) at its output: how strongly one unit of its output
    moves what the teacher says, at its own greedy answers."""
    return mean_sensitivity([piece_sensitivities(backbone, parts, first, linears)], linears)


def mean_sensitivity(parts: Iterable[List[Tuple[int, List[float]]]], linears) -> Dict[str, float]:
    """output_sensitivity of what its pieces add, in their order."""
    sums, tokens = [0.0] * len(linears), 0
    for number, values in [piece for part in parts for piece in part]:
        sums, tokens = [one + value for one, value in zip(sums, values)], tokens + number
    return {name: value / max(tokens, 1) for name, value in zip(linears, sums)}


def piece_sensitivities(backbone, parts: List[Part], first: int, linears) -> List[Tuple[int, List[float]]]:
    """(tokens, sum of the squared gradient of each linear) of every few items."""
    found: List[Tuple[int, List[float]]] = []
    sums: Dict[str, torch.Tensor] = {}
    handles, mask_BS = [], None

    def watch(name):
        def forward(module, args, output):
            def backward(grad):
                sums[name] = (grad.float().square().mean(-1) * mask_BS).sum().double()
            output.register_hook(backward)
        return forward

    try:
        for name, linear in linears.items():
            handles.append(linear.register_forward_hook(watch(name)))
        pieces = [few for part in parts for few in part.split(FEW)]
        for piece in tqdm(pieces, desc="sensitivity of the answers", leave=False):
            part = piece.to(backbone.device)
            mask_BS = part.prefix.attention_mask_BS
            lifted = part.prefix.with_hidden(part.prefix.hidden_BSD.detach().requires_grad_(True))
            last_BSD = backbone.run_layers(lifted, start=first, stop=backbone.num_layers)
            # Of the input alone: backward() would also make the gradients of all weights, 3.5 GiB at 7B.
            torch.autograd.grad(answer_log_probability(backbone, last_BSD, part), lifted.hidden_BSD)
            found.append((int(mask_BS.sum()), torch.stack([sums[name] for name in linears]).tolist()))
    finally:
        for handle in handles:
            handle.remove()
    return found


def show(found: Dict[str, dict], lines: List[str]) -> None:
    """The coverage report, one line a group."""
    log.info(f"where gains let {coverage.REFERENCE:.0%} of the probe's energy pass, others' passes, as a multiple (largest of any linear)")
    for name, one in found.items():
        if name != "probe":
            log.info(f"  {name:32s} {one['ratio']:6.2f}   ({one['largest']:.1f})")
    for line in lines:
        log.warning(f"  WARNING: {line}")
