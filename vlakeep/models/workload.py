"""What a model costs, reckoned from its shapes: memory that a pass keeps and needs, operations, bytes moved. Nothing is loaded.

A vision-language-action model is towers that see pictures, a projector and a decoder of alike layers. A kind of model says its shapes
(Backbone.workload); what they cost is the same arithmetic for all. Bytes per token and layer are counted off the code that runs:
transformers' Llama layer, PEFT's LoRA layer, timm's ViT block, each operation with what autograd saves and what it reads and writes.

D width, M width of the MLP, T tokens (rows times columns), h bytes of an activation.
"""

from dataclasses import dataclass, field
from typing import Dict, List, NamedTuple, Sequence, Tuple

from vlakeep.core.hardware import Work

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
# Elementwise kernels of a decoder layer, forward, in units of D bytes a token (in half precision): two RMSNorms in float32 (32 each),
# rotary embeddings of queries and keys (19 each), two residual sums (6 each), queries, keys, values and output of attention (8); of M
# bytes: SiLU and product.
LAYER_D, LAYER_M = 122, 10
BLOCK_D, BLOCK_M = 52, 4  # of a ViT's block: two LayerNorms, the split of qkv, two layer scales and sums; GELU
# A LoRA linear (models/lean.py): input read (2), where autocast does not give the type converted before (12); per output: product and sum.
LORA_IN, LORA_CONVERT, LORA_OUT = 2, 12, 8
BACKWARD = 2.0  # elementwise traffic of a backward pass, in that of the forward pass; LoRA's has one product less
LORA_BACKWARD = 1.5
UNPACK = 14  # bytes a weight of 4 bits each time that it is made a half one: .09 s for 16.2e9 weights on an H100
LAYER_KERNELS, BLOCK_KERNELS, LORA_KERNELS = 45, 25, 9


class Tower(NamedTuple):
    """A ViT: blocks that run, width, width of its MLP, tokens of a picture with prefix."""

    name: str
    blocks: int
    width: int
    mlp: int
    tokens: int

    def linears(self) -> List[Tuple[int, int]]:
        return [(self.width, 3 * self.width), (self.width, self.width), (self.width, self.mlp), (self.mlp, self.width)]


@dataclass(frozen=True)
class Adapters:
    """What LoRA is put on: linears of a decoder layer by their leaf, in these layers; `everywhere`: on towers, projector and head too."""

    leaves: Sequence[str]
    layers: Sequence[int]
    rank: int
    everywhere: bool = False

    @property
    def first(self) -> int:
        return min(self.layers)


@dataclass(frozen=True)
class Numbers:
    """Types in a pass: bytes of weights and activations, whether adapters see a converted copy of their input, attention without a fused
    kernel, recomputation of layers, and decoder linears in 4 bits."""

    weight: int = 2
    activation: int = 2
    converts: bool = False
    eager: bool = False
    recompute: bool = False
    packed: bool = False

    @classmethod
    def of(cls, config) -> "Numbers":
        weight = WIDTHS[config.backbone.dtype]
        activation = weight if config.train.autocast == "none" else min(weight, WIDTHS[config.train.autocast])
        adapter = 4 if config.lora.dtype == "float32" else weight
        converts = adapter != activation and (config.train.autocast == "none" or config.lora.dropout > 0)
        return cls(weight, activation, converts, config.backbone.attn_implementation == "eager",
                   config.backbone.gradient_checkpointing, config.backbone.quantisation == "nf4")


@dataclass(frozen=True)
class Workload:
    """The shapes. linears: (inputs, outputs) in a decoder layer by leaf; shared: leaf -> the one whose input it reads; text: tokens of a
    usual prompt with its answer; labelled: columns that get logits; action: tokens that are generated where an action is asked (0: as many
    as an answer has); chunk: actions in them; parameters: numbers of weights by part; precise: how many of them stay float32."""

    layers: int
    width: int
    mlp: int
    heads: int
    linears: Dict[str, Tuple[int, int]]
    shared: Dict[str, str]
    vocabulary: int
    towers: List[Tower]
    projector: List[Tuple[int, int]]
    patches: int
    text: int = 36
    labelled: int = 18
    answer: int = 8
    action: int = 0
    chunk: int = 1
    parameters: Dict[str, int] = field(default_factory=dict)
    precise: int = 0

    # Sizes

    @property
    def columns(self) -> int:
        return self.patches + self.text

    @property
    def layer_parameters(self) -> int:
        return sum(a * b for a, b in self.linears.values())

    def keys(self) -> int:
        return self.linears["k_proj"][1] if "k_proj" in self.linears else self.width

    def inputs(self, leaves: Sequence[str]) -> List[int]:
        """Widths of the distinct inputs of these linears of a layer."""
        return [self.linears[leaf][0] for leaf in dict.fromkeys(self.shared.get(leaf, leaf) for leaf in leaves)]

    def adapter_parameters(self, adapters: Adapters) -> int:
        pairs = [self.linears[leaf] for leaf in adapters.leaves] * len(adapters.layers)
        if adapters.everywhere:
            pairs += [pair for tower in self.towers for pair in tower.linears() * (tower.blocks + 1)]
            pairs += [*self.projector, (self.width, self.vocabulary)]
        return adapters.rank * sum(a + b for a, b in pairs)

    # Kept for the backward pass

    def layer_keeps(self, adapted: Sequence[str], rank: int, numbers: Numbers, rows: int = 1) -> float:
        """Bytes a token that one decoder layer keeps."""
        h, queries = numbers.activation, self.linears["q_proj"][1] if "q_proj" in self.linears else self.width
        norms = 2 * 4 * self.width  # inputs in float32
        attention = h * (2 * queries + 2 * self.keys())  # queries, keys, values, output
        if numbers.eager:
            attention += self.heads * self.columns * (h + 4)  # probabilities, and in float32
        mlp = 3 * h * self.mlp  # gate, its SiLU, up
        # A's gradient needs the input: a converted copy of each linear's own, or the one that linears share.
        seen = sum(self.linears[leaf][0] for leaf in adapted) if numbers.converts else sum(self.inputs(adapted))
        return norms + attention + mlp + h * (seen + len(adapted) * rank)

    def block_keeps(self, tower: Tower, rank: int, numbers: Numbers) -> float:
        """Bytes a token that a ViT block with adapters on its linears keeps."""
        h, d, m = numbers.activation, tower.width, tower.mlp
        return 2 * 4 * d + 4 * h * d + h * m + h * (3 * d + m + 4 * rank)

    def kept(self, adapters: Adapters, numbers: Numbers, rows: int) -> Dict[str, float]:
        """Bytes that a forward pass keeps, by part: a layer each from the first adapted one on (all that the gradient passes)."""
        tokens, found = rows * self.columns, {}
        first = 0 if adapters.everywhere else adapters.first
        for number in range(first, self.layers):
            leaves = adapters.leaves if number in adapters.layers else []
            size = self.layer_keeps(leaves, adapters.rank, numbers) * tokens
            if numbers.activation < numbers.weight:  # autocast: converted weights are kept for the gradient of the input
                size += numbers.activation * self.layer_parameters
            found[f"layer {number}"] = numbers.activation * self.width * tokens if numbers.recompute else size
        if adapters.everywhere:
            for tower in self.towers:
                found[tower.name] = self.block_keeps(tower, adapters.rank, numbers) * tower.blocks * tower.tokens * rows
            ins = sum(a for a, _ in self.projector)
            found["projector"] = numbers.activation * (2 * ins + len(self.projector) * adapters.rank) * self.patches * rows
        return found

    def logits(self, numbers: Numbers, rows: int) -> float:
        """Bytes of the logits at labelled columns while their gradient is made: themselves and it, and both in float32."""
        return (2 * numbers.activation + 8.0) * self.vocabulary * self.labelled * rows

    # Needed at the moment

    def passing(self, numbers: Numbers, rows: int, columns: int = 0, adapted: bool = True) -> float:
        """Bytes that a layer needs while it runs without a gradient: in the MLP's last linear its input, with adapters also in float32 and
        converted back, beside the residual stream, the normed states and the result."""
        tokens, h = rows * (columns or self.columns), numbers.activation
        mlp = (h + 4 + h if adapted and numbers.converts else 2 * h) * self.mlp
        return max(tokens * (mlp + 3 * h * self.width), tokens * 14 * self.width)

    def backward_needs(self, numbers: Numbers, rows: int) -> float:
        """Bytes beside what is kept, in a backward pass: gradients of the MLP in both types; with recomputation the layer's own."""
        return rows * self.columns * self.mlp * ((2 * numbers.activation + 8) if numbers.converts else 3 * numbers.activation)

    def cache(self, numbers: Numbers, rows: int) -> float:
        """Bytes of keys and values while `rows` answers are generated."""
        return 2.0 * self.layers * self.keys() * numbers.activation * rows * (self.columns + self.answer)

    # Work

    def layer_work(self, tokens: float, columns: int = 0, count: float = 1.0) -> Work:
        """`count` decoder layers, forward."""
        columns = columns or self.columns
        queries = self.linears["q_proj"][1] if "q_proj" in self.linears else self.width
        flops = 2 * self.layer_parameters * tokens + 2 * columns * queries * tokens  # causal: half of the scores
        return Work(half=flops, stream=(LAYER_D * self.width + LAYER_M * self.mlp) * tokens, kernels=LAYER_KERNELS).times(count)

    def lora_work(self, leaves: Sequence[str], rank: int, tokens: float, count: float = 1.0, converts: bool = False) -> Work:
        """Adapters on these linears of `count` layers, forward."""
        pairs = [self.linears[leaf] for leaf in leaves]
        return _lora(pairs, rank, tokens, converts).times(count)

    def tower_work(self, rows: float) -> Work:
        """Pictures through towers and projector, forward."""
        found = Work(half=2 * rows * self.patches * sum(a * b for a, b in self.projector), kernels=10)
        for tower in self.towers:
            tokens = rows * tower.tokens
            flops = 2 * sum(a * b for a, b in tower.linears()) * tokens + 4 * tower.tokens * tower.width * tokens
            found = found + Work(half=flops, stream=(BLOCK_D * tower.width + BLOCK_M * tower.mlp) * tokens,
                                 kernels=BLOCK_KERNELS).times(tower.blocks)
        return found

    def head_work(self, positions: float) -> Work:
        return Work(half=2 * self.width * self.vocabulary * positions, stream=30 * self.vocabulary * positions, kernels=10)

    def forward(self, rows: float, first: int = 0, columns: int = 0) -> Work:
        """Prompts through the layers from `first` on, with their pictures when that is 0; without the head."""
        tokens = rows * (columns or self.columns)
        below = self.tower_work(rows) if first == 0 else Work()
        return below + self.layer_work(tokens, columns, self.layers - first)

    def generate(self, rows: float, batch: float, tokens: int = 0) -> Work:
        """`rows` prompts answered, `batch` at a time, with so many tokens (0: of an answer): a pass over the prompt, then one a token,
        bound by the host or the weights."""
        tokens = tokens or self.answer
        steps = rows / batch * (tokens - 1)
        weights = 2 * self.layers * self.layer_parameters
        # Each batch launches its own kernels.
        first = self.forward(rows)
        first = first._replace(kernels=first.kernels * max(1.0, rows / batch))
        return first + Work(stream=weights, kernels=LAYER_KERNELS * self.layers).times(steps) + self.head_work(rows * tokens)

    def training_step(self, adapters: Adapters, numbers: Numbers, rows: int) -> Work:
        """Forward and backward pass of one micro-batch."""
        tokens = rows * self.columns
        first = 0 if adapters.everywhere else adapters.first
        above = self.layers - first
        found = self.forward(rows) + self.head_work(rows * self.labelled).times(3)
        back = self.layer_work(tokens, count=above)
        found = found + back._replace(stream=back.stream * BACKWARD, kernels=back.kernels * 2)
        lora = self.lora_work(adapters.leaves, adapters.rank, tokens, len(adapters.layers), numbers.converts)
        if adapters.everywhere:
            towers = self.tower_work(rows)
            found = found + towers._replace(stream=towers.stream * BACKWARD, kernels=towers.kernels * 2)
            for tower in self.towers:
                lora = lora + _lora(tower.linears(), adapters.rank, rows * tower.tokens, numbers.converts).times(tower.blocks)
            lora = lora + _lora(self.projector, adapters.rank, rows * self.patches, numbers.converts)
        found = found + Work(half=lora.half * 3, stream=lora.stream * (1 + LORA_BACKWARD), kernels=lora.kernels * 3)
        passes = self.layers + above * (2 if numbers.recompute else 1)  # of weights that are unpacked for a product
        if numbers.recompute:
            found = found + self.layer_work(tokens, count=above) + self.lora_work(adapters.leaves, adapters.rank, tokens,
                                                                                  len(adapters.layers), numbers.converts)
        return found + self.unpacked(numbers, passes)

    def unpacked(self, numbers: Numbers, layers: float) -> Work:
        """Weights of 4 bits that are made half ones, in so many passes of a layer."""
        return Work(stream=UNPACK * self.layer_parameters, kernels=8 * len(self.linears)).times(layers) if numbers.packed else Work()

    def optimizer_step(self, parameters: int, clip: bool = True) -> Work:
        """AdamW: weight, gradient and two moments read, three written; the norm reads the gradient, the clip writes it."""
        return Work(stream=(28 + (12 if clip else 4)) * parameters, kernels=60)


def _lora(pairs: Sequence[Tuple[int, int]], rank: int, tokens: float, converts: bool) -> Work:
    seen = LORA_IN + LORA_CONVERT * converts
    return Work(half=2 * rank * tokens * sum(a + b for a, b in pairs), stream=tokens * sum(seen * a + LORA_OUT * b for a, b in pairs),
                kernels=LORA_KERNELS * len(pairs))
