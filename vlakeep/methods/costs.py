"""What the arms add to a plan (models/workload.py): memory that they hold in training, measurements, and the phases of the offline step.

`Method.costs` gives a Costs; an arm that says nothing adds nothing. Sizes and work follow the code in teacher/, hsw/ and thermostat/.
"""

from dataclasses import dataclass, field
from typing import Dict, List, NamedTuple

from vlakeep.core.config import Config
from vlakeep.core.hardware import GIB, Work
from vlakeep.models.workload import Adapters, Numbers, Workload

NEW_FRAMES = 64  # of graded_offline.py: frames of the new data whose coverage is reported
START_FRAMES = 256  # of graded.py: frames of the run's data at whose inputs A starts
DENSE = 1024  # of hsw/graded.py: widths up to which all eigenvectors are taken
SQUARES = 4  # float64 matrices alive while A's rows are found: the moment, with gains on one side and on both, and the symmetric one
EIGH_COPIES = 6  # float64 matrices alive in an eigendecomposition on a GPU: moment, vectors, their turned copy, cuSOLVER's workspace
THIN_COPIES = 4  # float32 bases alive in a subspace iteration: old, new, product, QR's own
PASSES = 12  # thin products and QRs of a subspace iteration (teacher/spectrum.py), in products


class Phase(NamedTuple):
    """A part of a stage: bytes that it needs beside the weights, and what it does. `option` would make it smaller."""

    name: str
    memory: float
    work: Work
    option: str = ""


@dataclass
class Costs:
    """resident: bytes held on the device through training, by name. measurement: one reading of the sensors, every `every` steps (0: none).
    step: work beside the pass of a micro-batch. begin: phases of a training before its first step. offline: its phases, none when there is
    no such step; given_back: whether each gives its memory back before the next."""

    resident: Dict[str, float] = field(default_factory=dict)
    measurement: float = 0.0
    measuring: Work = Work()
    every: int = 0
    step: Work = Work()
    begin: List[Phase] = field(default_factory=list)
    offline: List[Phase] = field(default_factory=list)
    given_back: bool = False


def _moments(work: Workload, adapters: Adapters, limit: float) -> tuple:
    """(bytes of the second moments of one pass, passes, operations a token)."""
    inputs = work.inputs(adapters.leaves)
    sizes, passes, used = [], 1, 0.0
    for dim in inputs * len(adapters.layers):
        size = 4.0 * dim * dim
        if used + size > limit and used:
            passes, used = passes + 1, 0.0
        used += size
        sizes.append(used)
    return max(sizes), passes, 2.0 * sum(dim * dim for dim in inputs) * len(adapters.layers)


def _answers(config: Config, work: Workload, numbers: Numbers, items: int, together: int = 0) -> Phase:
    """together: prompts that are answered at once, if they are more than icsm.batch_size."""
    size = min(max(config.icsm.batch_size, together), items)
    needs = work.cache(numbers, size) + (work.passing(numbers, size, adapted=False) if together else 0.0)
    return Phase("teacher's answers", needs, work.generate(items, size) + Work(pictures=items), "icsm.batch_size")


def frozen_form(config: Config, work: Workload, adapters: Adapters, numbers: Numbers) -> Costs:
    """Method icsm_hsw_thermostat."""
    icsm, items, size = config.icsm, config.probe.size, config.icsm.batch_size
    found = Costs()
    prompt = work.columns - work.answer
    inputs = work.inputs(adapters.leaves)
    representative = icsm.layers or [work.layers - 3, work.layers - 1]
    if config.hsw.enabled and config.hsw.site in ("residual", "both"):
        found.resident["residual bases"] = 4.0 * 4 * work.width * icsm.rank
        found.step = Work(stream=4 * 30 * work.width * config.train.batch_size * work.columns, kernels=4 * 12)
    if config.hsw.enabled and config.hsw.site in ("lora_input", "both"):
        fragile, plastic = icsm.tokens_fragile_fraction, icsm.tokens_plastic_fraction
        share = plastic + min(fragile, 1 - fragile - plastic)
        bases = 4.0 * share * sum(dim * dim for dim in inputs) * len(adapters.layers)
        found.resident["input bases"] = bases
        found.step = found.step + Work(stream=4 * bases, kernels=len(adapters.leaves) * len(adapters.layers) * 10)
    if config.thermostat.enabled:
        drawn, above = config.thermostat.batch_size, work.layers - adapters.first
        found.resident["teacher's statistics"] = 4.0 * len(representative) * work.width * (work.width + items)
        found.measurement = work.passing(numbers, drawn, prompt)
        tokens = drawn * prompt
        found.measuring = work.layer_work(tokens, prompt, above) + work.lora_work(adapters.leaves, adapters.rank, tokens, above)
        found.every = config.thermostat.every
    if not (config.hsw.enabled or config.thermostat.enabled):
        return found
    forward = work.passing(numbers, size, adapted=False)
    some = min(icsm.sensitivity_items, items)
    pushed = icsm.rank * some if icsm.sensitivity else 0
    pushes = Work()
    for count in [work.layers - 1 - layer for layer in representative]:
        pushes = pushes + work.layer_work(pushed * prompt, prompt, count)._replace(
            kernels=icsm.rank * -(-some // size) * (45 * count + 20) if pushed else 0)
        pushes = pushes + Work(pictures=some) + work.head_work(pushed * (work.text - work.answer - 6))
    passes = -(-items // size)
    found.offline = [
        Phase("pooled states", forward, _batches(work.forward(items, columns=prompt), passes) + Work(pictures=items), "icsm.batch_size"),
        Phase("sensitivity of directions", work.width * size * 14.0 * prompt, pushes, "icsm.sensitivity_items")]
    if icsm.tokens:
        held, times, flops = _moments(work, adapters, icsm.moments_gib * GIB)
        widest = max(inputs)
        if icsm.tokens_generated:
            found.offline.append(_answers(config, work, numbers, items))
        measuring = _batches(work.forward(items), passes).times(times) + Work(single=flops * items * work.columns)
        # The mean is a second set of the moments; a decomposition works on one of them while the others wait.
        found.offline += [
            Phase("second moments and their bases", max(2 * held, held + EIGH_COPIES * 8.0 * widest ** 2), measuring, "icsm.moments_gib"),
            Phase("eigendecompositions", 0.0, _eigh(inputs, len(adapters.layers)))]
    return found


def graded(config: Config, work: Workload, adapters: Adapters, numbers: Numbers) -> Costs:
    """Method graded."""
    gains, items, size = config.gains, config.probe.size, config.icsm.batch_size
    held_out = max(1, round(items * gains.holdout))
    inputs, above = work.inputs(adapters.leaves), work.layers - adapters.first
    spectra = 4.0 * sum(dim * min(dim, gains.columns) for dim in inputs) * len(adapters.layers)
    found = Costs()
    if gains.enabled:
        found.resident["spectra"] = spectra
        found.step = Work(stream=4 * spectra, kernels=24 * len(adapters.layers))
        if gains.start_of_a == "new_inputs":
            found.begin = [_start_of_a(config, work, adapters, numbers)]
    if config.thermostat.enabled:
        drawn = min(config.thermostat.batch_size, held_out)
        found.measurement = work.passing(numbers, min(drawn, 32))
        one = work.layer_work(work.columns, count=above) + work.lora_work(adapters.leaves, adapters.rank, work.columns, above)
        found.measuring = one.times(drawn + max(1, drawn // 4))._replace(kernels=2 * one.kernels * max(1, drawn // 32))
        found.every = config.thermostat.every
    if not (gains.enabled or config.thermostat.enabled):
        return found
    fit, new = items - held_out, NEW_FRAMES * len(config.data.datasets)
    held, times, flops = _moments(work, adapters, config.icsm.moments_gib * GIB)
    wide = [dim for dim in inputs if dim > gains.columns]
    bases = max([THIN_COPIES * 4.0 * dim * (gains.columns + 64) for dim in wide] + [EIGH_COPIES * 8.0 * dim ** 2 for dim in inputs
                                                                                  if dim <= gains.columns])
    thin = sum(PASSES * 2.0 * dim * (dim + gains.columns) * (gains.columns + 64) for dim in wide) * len(adapters.layers)
    few = Adapters(adapters.leaves, adapters.layers, 0)
    backward = sum(work.layer_keeps([], 0, numbers) for _ in range(above)) * 4 * work.columns
    passes = -(-(items + new) // size)
    found.given_back = True
    found.offline = [
        _answers(config, work, numbers, items + new, config.icsm.answered if config.device != "cpu" else 0),
        Phase("layers below the adapted ones", work.passing(numbers, size, adapted=False), _batches(
            work.tower_work(items + new) + work.layer_work((items + new) * work.columns, count=adapters.first), passes), "icsm.batch_size"),
        Phase("second moments and their spectra", held + bases, work.forward(fit, adapters.first or 1).times(times) + Work(
            single=flops * fit * work.columns + thin, kernels=times * passes * above * 45), "icsm.moments_gib"),
        Phase("eigendecompositions", 0.0, _eigh([min(dim, gains.columns + 64) for dim in inputs], len(adapters.layers))),
        Phase("sensitivity of the answers", backward, work.training_step(few, numbers, held_out)),
        Phase("coverage", spectra, work.forward(held_out + new, adapters.first or 1) + Work(
            single=2.0 * (held_out + new) * work.columns * spectra / 4), "gains.columns")]
    return found


def _start_of_a(config: Config, work: Workload, adapters: Adapters, numbers: Numbers) -> Phase:
    """Second moments of the inputs on the run's first batches, as many passes over them as icsm.moments_gib makes, and A's rows of each."""
    rows, inputs = config.train.batch_size, work.inputs(adapters.leaves)
    batches = -(-START_FRAMES // rows)
    frames, columns, widest = batches * rows, config.gains.columns, max(inputs)
    held, times, flops = _moments(work, adapters, config.icsm.moments_gib * GIB)
    looked = work.forward(frames) + work.lora_work(adapters.leaves, adapters.rank, frames * work.columns, len(adapters.layers),
                                                   numbers.converts)
    thin = sum(8.0 * dim ** 2 * min(dim, columns) + (9.0 * dim ** 3 if dim <= DENSE else PASSES * 2.0 * dim ** 2 * (adapters.rank + 64))
               for dim in inputs) * len(adapters.layers)
    found = SQUARES * 8.0 * widest ** 2 + 8.0 * widest * min(widest, columns)
    return Phase("A's start at new inputs", held + max(work.passing(numbers, rows), found),
                 _batches(looked, batches).times(times) + Work(single=flops * frames * work.columns, double=thin), "icsm.moments_gib")


def practice(config: Config, work: Workload, adapters: Adapters, numbers: Numbers, items: int) -> Costs:
    """What distillation adds to method graded: some probe items beside each micro-batch, forward and backward."""
    found = graded(config, work, adapters, numbers)
    found.resident["practice on the probe"] = sum(work.kept(adapters, numbers, items).values()) + work.logits(numbers, items)
    pass_ = work.training_step(adapters, numbers, items)
    below = work.forward(items)  # which is cached
    above = work.layer_work(items * work.columns, count=work.layers - adapters.first)
    found.step = found.step + Work(half=pass_.half - below.half + above.half, stream=pass_.stream - below.stream + above.stream,
                                   kernels=pass_.kernels / 2)
    return found


def _eigh(sizes: List[int], layers: int) -> Work:
    """Eigendecompositions in float64 of matrices of these sizes in each layer: two kernels for each column that is reduced."""
    return Work(double=9.0 * sum(dim ** 3 for dim in sizes), kernels=2.0 * sum(sizes)).times(layers)


def _batches(one: Work, count: int) -> Work:
    """The same work, launched once a batch."""
    return one._replace(kernels=one.kernels * count)
