"""What a card can do, and the types that follow: the profiles of `--hardware`, with the constants by which `vlakeep plan` reckons.

Peaks are the makers' data sheets (dense, without sparsity). What of them is reached, and what lies outside the card, was measured at the 7B
shapes on an H100 (docs/plan.md compares); no constant belongs to a recipe.
"""

import os
from typing import Dict, List, NamedTuple

GIB = 2**30

MATMUL = 0.55  # share of the peak that matrix products of a few thousand rows reach
STREAM = 0.75  # share of the bandwidth that elementwise kernels reach
DECOMPOSE = 0.25  # share of the float64 peak that an eigendecomposition reaches, at 9 n^3 operations
HOST = 26e-6  # seconds of Python and launch per kernel: .41 s for two samples through 32 adapted layers, computed again
GRAPHED = 2.2e-6  # seconds of a kernel in a CUDA graph beside its arithmetic: an answer of 7 tokens in .065 s, each further token in .0078
READ, WRITE = 3.0e9, 1.2e9  # bytes a second of weights: reading (and hashing) from a warm disk, writing
PICTURE = 5e-3  # seconds to decode, resize and normalise a picture for two towers on one core (crops and colours: 18 ms)
TENSORS = 1.5e-3  # of that for a picture of the right size and its words: tokens and tensors
SLACK = 0.10  # of what is not weights: blocks that the allocator holds and cannot use (18.6 reserved for 18.2 GiB allocated)


class Hardware(NamedTuple):
    """One kind of card. memory: GiB that may be reserved; rates: operations and bytes a second."""

    name: str
    memory: float
    half: float
    single: float
    double: float
    stream: float
    dtype: str  # narrowest type of weights that it computes in
    cards: int = 1
    device: str = "cuda"
    link: float = 20e9  # bytes a second between cards: PCIe, and V100s that are linked are planned as if they were not

    def seconds(self, work: "Work", graphed: bool = False) -> float:
        """Time of some work: products and streams do not overlap, the host's launches overlap with both. graphed: the host starts it as one
        CUDA graph, and the device goes from kernel to kernel."""
        device = (work.half / self.half + work.single / self.single) / MATMUL + work.double / self.double / DECOMPOSE
        device += work.stream / self.stream / STREAM
        host = work.kernels * HOST if self.device == "cuda" and not graphed else 0.0
        device += work.kernels * GRAPHED * graphed
        return max(device, host) + work.read / READ + work.write / WRITE + work.pictures * PICTURE


class Work(NamedTuple):
    """Operations of matrix products by type, bytes moved by elementwise kernels, kernels, bytes from and to the disk, pictures prepared."""

    half: float = 0.0
    single: float = 0.0
    double: float = 0.0
    stream: float = 0.0
    kernels: float = 0.0
    read: float = 0.0
    write: float = 0.0
    pictures: float = 0.0

    def __add__(self, other):
        return Work(*[a + b for a, b in zip(self, other)])

    def times(self, count: float) -> "Work":
        return Work(*[value * count for value in self])


def total(works) -> Work:
    """The sum of an iterable of Work."""
    found = Work()
    for one in works:
        found = found + one
    return found


def _cpu() -> Hardware:
    """This machine: half of its memory, and what a core of today does (16 float32 operations a cycle at 2.5 GHz, 10 GB/s)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (ValueError, OSError, AttributeError):
        memory = 8.0
    rate = cores * 40e9
    return Hardware("cpu", 0.5 * memory, rate, rate, rate / 2, min(cores, 4) * 10e9, "float32", device="cpu")


# A 4090 shows 23.99 GiB, of which half a gigabyte is the context and a gigabyte goes to what else shows a screen; of a V100 the smaller
# kind is meant, of 16 GiB.
CARDS = {
    "rtx4090": Hardware("rtx4090", 22.5, 165e12, 82.6e12, 1.3e12, 1.008e12, "bfloat16"),
    "v100x8": Hardware("v100x8", 15.0, 125e12, 15.7e12, 7.8e12, 0.9e12, "float16", cards=8),
    "h100": Hardware("h100", 78.0, 989e12, 67e12, 67e12, 3.35e12, "bfloat16", link=300e9),
    "h200": Hardware("h200", 139.0, 989e12, 67e12, 67e12, 4.8e12, "bfloat16", link=300e9),
}
NAMES = ("auto", "rtx4090", "v100x8", "h100", "h200", "cpu")
_SEEN = {"4090": "rtx4090", "V100": "v100x8", "H100": "h100", "H200": "h200"}  # part of the name that a driver gives


def hardware(name: str) -> Hardware:
    """A profile; auto looks at this machine. ValueError for another name, or a card that auto does not know."""
    if name == "cpu":
        return _cpu()
    if name in CARDS:
        return CARDS[name]
    if name != "auto":
        raise ValueError(f"--hardware {name!r}: must be one of {', '.join(NAMES)}")
    import torch  # not for --help

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return _cpu()
    seen, free = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / GIB - 1.5
    known = next((CARDS[card] for part, card in _SEEN.items() if part in seen), None)
    if known is None:
        # The rates of the nearest kind: what has bfloat16 is like a 4090, what has not like a V100.
        known = CARDS["rtx4090" if torch.cuda.get_device_capability(0) >= (8, 0) else "v100x8"]
    return known._replace(name=seen, memory=free, cards=count)


# What a profile decides, from the card or from what fits it.
DECIDED = ("backbone.dtype", "backbone.quantisation", "backbone.attn_implementation", "backbone.gradient_checkpointing", "train.autocast",
           "train.batch_size", "train.accumulation", "device")


class Choice(NamedTuple):
    """One key that a profile sets, and why."""

    key: str
    value: str
    reason: str

    @property
    def typed(self):
        """The value as a configuration holds it."""
        return self.value == "true" if self.value in ("true", "false") else int(self.value) if self.value.isdigit() else self.value


def types(card: Hardware) -> List[Choice]:
    """What follows from the card alone, whatever is trained on it."""
    why: Dict[str, str] = {
        "bfloat16": "it has bfloat16, which has the range of float32 and needs no loss scaling",
        "float16": "it has no bfloat16; float16 with loss scaling is its fast type",
        "float32": "a CPU is not faster in half precision",
    }
    autocast = "none" if card.dtype == "float32" else card.dtype
    attention = ("float16 runs in sdpa's memory-efficient kernel; flash attention needs a newer card" if card.dtype == "float16"
                 else "same result as flash attention 2, and needs no package")
    return [Choice("backbone.dtype", card.dtype, why[card.dtype]),
            Choice("train.autocast", autocast, "products in the type of the weights"),
            Choice("backbone.attn_implementation", "sdpa", attention),
            Choice("device", card.device, "the profile is of a " + ("GPU" if card.device == "cuda" else "CPU"))]


def able(card: Hardware, key: str, value: str) -> bool:
    """Whether the card can do what a configuration says of a key of `types`, though another value may be its best."""
    if key == "device":
        return value in ("auto", card.device)
    if value in ("bfloat16", "flash_attention_2"):  # a CPU has the one and not the other
        return card.dtype == "bfloat16" or (value == "bfloat16" and card.device == "cpu")
    return value != "float16" or card.device == "cuda"
