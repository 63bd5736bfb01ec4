"""--data.source official: the RLDS pipeline and the collator of the user's OpenVLA checkout, as a training stream.

TensorFlow reads, shuffles and augments without a seed, so the order differs from run to run and a run cannot be resumed exactly; the
native reader gives the same samples in an order that can be repeated.
"""

import json
from pathlib import Path
from typing import Dict, List

from vlakeep.core.official_code import load_official
from vlakeep.data.sample import Batch


class OfficialStream:
    """Endless batches from RLDSDataset and PaddedCollatorForActionPrediction; the interface of loader.BatchStream."""

    def __init__(self, data, data_root_dir, processor, batch_size: int, openvla_dir):
        """Raises ImportError where the official data code cannot be imported, ValueError for a name it does not know."""
        from torch.utils.data import DataLoader

        code = load_official(openvla_dir)
        if code.RLDSDataset is None:
            raise ImportError("--data.source official needs the official data pipeline, which cannot be imported here "
                              f"({code.why_no_data}): run this in the official environment (conda activate openvla), or take "
                              "--data.source native")
        if len(data.datasets) != 1:
            raise ValueError(f"--data.datasets {data.datasets}: --data.source official takes one name, a data set's or a mixture's")
        image_processor = processor.image_processor
        sizes = [tuple(size) for size in image_processor.input_sizes]
        official = code.PrismaticImageProcessor(
            use_fused_vision_backbone=len(sizes) == 2, image_resize_strategy=image_processor.strategy, input_sizes=sizes,
            interpolations=list(image_processor.interpolations), means=[tuple(m) for m in image_processor.means],
            stds=[tuple(s) for s in image_processor.stds])
        transform = code.RLDSBatchTransform(code.ActionTokenizer(processor.tokenizer), processor.tokenizer, official.apply_transform,
                                            code.PurePromptBuilder)
        name = data.datasets[0]
        try:
            self.dataset = code.RLDSDataset(Path(data_root_dir), name, transform, resize_resolution=sizes[0][1:],
                                            shuffle_buffer_size=data.shuffle_buffer, image_aug=data.image_aug)
        except KeyError as error:
            raise ValueError(f"the official code does not know the data set {error}: register it in prismatic/vla/datasets/rlds/oxe, or "
                             "take --data.source native, which needs no registration") from error
        collator = code.PaddedCollatorForActionPrediction(processor.tokenizer.model_max_length, processor.pad_token_id,
                                                          padding_side="right")
        self._batches = iter(DataLoader(self.dataset, batch_size=batch_size, sampler=None, collate_fn=collator, num_workers=0))
        self.statistics: Dict[str, dict] = json.loads(json.dumps(self.dataset.dataset_statistics, default=_plain))
        self.fingerprints: Dict[str, str] = {}  # its order follows from no seed, so there is nothing to compare
        self._taken = 0

    def describe(self) -> List[str]:
        return [f"data {', '.join(self.statistics)}: through the official pipeline, {len(self.dataset)} frames, shuffled without a seed"]

    def __iter__(self) -> "OfficialStream":
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._taken += 1
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in batch.get("dataset_names", [])]
        return Batch(batch["input_ids"], batch["attention_mask"], batch["labels"], batch["pixel_values"], names)

    def state_dict(self) -> dict:
        return {"official_batches": self._taken}

    def load_state_dict(self, state: dict) -> None:
        raise ValueError("a run with --data.source official cannot be resumed: its pipeline shuffles without a seed; train it again, or "
                         "use --data.source native")

    def close(self) -> None:
        """Nothing is held open."""


def _plain(value):
    return value.tolist() if hasattr(value, "tolist") else str(value)
