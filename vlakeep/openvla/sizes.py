"""Options of the stages that train a small model from nothing: its sizes, and the optimisation."""

from pathlib import Path
from typing import Tuple

from vlakeep.core.options import Option, number, whole


def model_options(**defaults) -> Tuple[Option, ...]:
    """What both stages ask for. `defaults` replaces values of the small model's sizes and of the optimisation."""
    options = (
        Option("--out", None, "The folder that is written.", Path, required=True),
        Option("--minutes", 8.0, "Time for optimisation; reading or making the data comes on top.", number()),
        Option("--batch", 1024, "Samples per step.", whole()),
        Option("--lr", 1.5e-3, "Highest rate of the schedule.", number()),
        Option("--patch", 16, "Side of a patch of the vision models in pixels: 8 or 16.", patch),
        Option("--hidden", 192, "Width of the language model.", whole()),
        Option("--layers", 6, "Decoder layers.", whole()),
        Option("--heads", 6, "Attention heads.", whole()),
        Option("--mlp", 512, "Width of the MLPs.", whole()),
        Option("--vocab", 768, "Tokens of the tokenizer.", whole()),
        Option("--processes", None, "Processes that make the data; null takes one per core.", whole()),
        Option("--seed", 0, "Seed of weights, data and order.", whole(0)),
        Option("--device", "cuda", "cuda or cpu."),
        Option("--compile", False, "Fuse the kernels of each layer: half the time, after a minute.", bool),
    )
    return tuple(option._replace(default=defaults.get(option.dest, option.default)) for option in options)


def patch(text: str) -> int:
    if text not in ("8", "16"):
        raise ValueError("must be 8 or 16")
    return int(text)
