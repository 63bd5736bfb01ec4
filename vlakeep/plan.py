"""Stage `vlakeep plan`: peak memory and time of every stage on a card, before anything is loaded, and what to change when it does not fit.

    vlakeep plan --config configs/openvla_libero_graded.yaml --hardware rtx4090
    vlakeep plan --config configs/openvla_libero.yaml --hardware v100x8 --gpus 8 --gib 30

reads:  config.json and the headers of the weight files of backbone.checkpoint; of openvla/openvla-7b not even these
writes: nothing
Exit status: 0 when every stage fits, 1 otherwise.
"""

import sys
from typing import Dict, List

from vlakeep.core.config import Config
from vlakeep.core.hardware import GIB, Hardware, hardware
from vlakeep.core.options import read
from vlakeep.core.stages import PLAN
from vlakeep.core.storage import Storage
from vlakeep.planning.evaluation import duration
from vlakeep.planning.fit import remedies
from vlakeep.planning.predict import Model, StagePlan, find_model, plan_all


def parts(memory: Dict[str, float]) -> List[str]:
    """Lines of what a stage takes; layers that take alike stand together."""
    rows: Dict[str, float] = {}
    layers: Dict[float, List[int]] = {}
    for name, size in memory.items():
        if name.startswith("layer "):
            layers.setdefault(size, []).append(int(name.split()[1]))
        else:
            rows[name] = size
    small = sum(memory.values()) < GIB
    unit, word = (GIB / 1024, "MiB") if small else (GIB, "GiB")
    for size, numbers in layers.items():
        rows[f"activations of layers {min(numbers)} to {max(numbers)}, {size / unit:.2f} each"] = size * len(numbers)
    shown = sorted(((size, name) for name, size in rows.items() if size >= 0.005 * unit), reverse=True)
    return [f"    {size / unit:8.2f} {word}  {name}" for size, name in shown]


def show(plans: List[StagePlan], card: Hardware) -> None:
    print(f"{'stage':10s} {'reserved':>10s} {'allocated':>10s} {'of':>8s} {'time':>9s}")
    for plan in plans:
        fits = "" if plan.reserved <= card.memory * GIB else "   does not fit"
        print(f"{plan.stage:10s} {plan.reserved / GIB:6.1f} GiB {plan.allocated / GIB:6.1f} GiB {card.memory:4.1f} GiB "
              f"{duration(plan.seconds):>8s}{fits}")
    for plan in plans:
        print(f"\n{plan.stage}: what it takes")
        print("\n".join(parts(plan.memory)))
        for note in plan.notes:
            print(f"    {note}")


def advice(plan: StagePlan, config: Config, model: Model, card: Hardware, gpus: int) -> List[str]:
    """Lines for a stage that does not fit."""
    over = plan.reserved / GIB - card.memory
    lines = [f"{plan.stage} does not fit: {over:.1f} GiB too much. Any of these makes it fit:"]
    found, least = remedies(config, model, card, gpus, plan.stage)
    if found:
        return lines + [f"    {one.line()}" for one in found]
    return [f"{plan.stage} does not fit: {over:.1f} GiB too much. The weights take {plan.memory['weights'] / GIB:.1f} GiB, and with every "
            f"option at its least it takes {least.reserved / GIB:.1f}: it needs {least.reserved / GIB:.1f} GiB that may be reserved (each "
            "process holds the whole frozen model), or a smaller base model"]


def main(argv: List[str]) -> int:
    args, config = read(PLAN, argv)
    storage = Storage.from_config(config, create=False)
    card = hardware(args.hardware or "auto")
    if args.gib:
        card = card._replace(memory=args.gib)
    model = find_model(config, storage.cache)
    print(f"{config.backbone.checkpoint}: {sum(model.work.parameters.values()):,} weights in {config.backbone.dtype}; {model.source}")
    print(f"{card.name}: {card.memory:.1f} GiB that may be reserved, {args.gpus} of them at work; method {config.method}\n")
    plans = plan_all(config, model, card, args.gpus)
    show(plans, card)
    lines = [line for plan in plans if plan.reserved > card.memory * GIB for line in advice(plan, config, model, card, args.gpus)]
    print("\n" + ("\n".join(lines) if lines else "every stage fits"))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
