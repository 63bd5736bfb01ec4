"""A small pi0-FAST: a tokenizer of PaliGemma's type from a list of texts, a codec of its own, a few layers; all in lerobot's format.

They are tiny configurations of what the published model uses; everything else of the model is the same code. For tests, and for a base
model that is trained on the tabletop.
"""

import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from vlakeep.models.files import write_json
from vlakeep.pi0_fast.codec import FastCodec
from vlakeep.pi0_fast.format import PICTURE, STATE, init_state, write_checkpoint
from vlakeep.pi0_fast.model import Sizes, VisionSizes
from vlakeep.pi0_fast.processor import CODEC, TEXT

SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>")
SKIP = 8  # rows at the end of the vocabulary that are no codes; 128 in the published model
TEMPLATES = ["Task: , State: -1 0123456789;\n", "Action: |", "answer en \n"]  # words of the prompts, always in the vocabulary
SMALL = Sizes(vocab_size=0, width=32, depth=4, mlp_dim=64, num_heads=2, num_kv_heads=1, head_dim=24,
              vision=VisionSizes(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=16,
                                 patch_size=8))


def build_tokenizer(texts: Sequence[str], codes: int, skip: int = SKIP, pieces: int = 512) -> Tokenizer:
    """Byte-pair pieces within words, digits one by one, bytes for what is unknown; then `codes` rows <loc> and `skip` rows <seg>."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Punctuation(),
                                                     pre_tokenizers.Digits(individual_digits=True)])
    trained.train_from_iterator([*texts, *TEMPLATES], trainers.BpeTrainer(vocab_size=pieces, min_frequency=1, show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    vocab: Dict[str, int] = {token: i for i, token in enumerate(SPECIALS)}
    for piece in [*(f"<0x{byte:02X}>" for byte in range(256)), *sorted(learnt["vocab"], key=learnt["vocab"].get), "|", "\n", "▁"]:
        vocab.setdefault(piece, len(vocab))
    for i in range(codes + skip):
        vocab[f"<loc{i:04d}>" if i < codes else f"<seg{i - codes:03d}>"] = len(vocab)
    merges: Any = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in learnt["merges"]]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])])
    made.add_special_tokens([*SPECIALS])
    return made


def tokenizer_json(made: Tokenizer) -> str:
    """With merges as strings "a b": tokenizers 0.19 reads no pairs."""
    found = json.loads(made.to_str())
    found["model"]["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in found["model"]["merges"]]
    return json.dumps(found, ensure_ascii=False, indent=1)


def lerobot_config(cameras: Sequence[str], state: int, actions: int, chunk: int, image: int, tokens: int, skip: int = SKIP) -> dict:
    """config.json as lerobot's PI0FastConfig saves it, but for the optimiser's fields, which have defaults there."""
    features = {PICTURE + name: {"type": "VISUAL", "shape": [3, image, image]} for name in cameras}
    if state:
        features[STATE] = {"type": "STATE", "shape": [state]}
    return {
        "type": "pi0_fast", "n_obs_steps": 1, "input_features": features,
        "output_features": {"action": {"type": "ACTION", "shape": [actions]}},
        "paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m", "dtype": "float32", "chunk_size": chunk,
        "n_action_steps": chunk, "max_action_tokens": tokens, "max_decoding_steps": tokens, "image_resolution": [image, image],
        "empty_cameras": 0, "tokenizer_max_length": 200, "text_tokenizer_name": TEXT, "action_tokenizer_name": CODEC, "temperature": 0.0,
        "fast_skip_tokens": skip, "validate_action_token_prefix": False, "use_kv_cache": True,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"},
    }


def sizes_json(sizes: Sizes) -> dict:
    return {**sizes._asdict(), "vision": sizes.vision._asdict()}


def make_folder(folder, texts: Sequence[str], chunks: Sequence[np.ndarray], norm_stats: dict, cameras: Sequence[str] = ("base_0_rgb",),
                state: int = 0, sizes: Optional[Sizes] = None, seed: int = 0, codes: int = 192, scale: float = 10.0,
                pieces: int = 512) -> List[Path]:
    """A checkpoint folder with random weights; the files that it holds.

    texts: whatever the model will read; chunks: normalised ones [T, A], on which the codec is fitted; state: numbers of it, 0 for none;
    sizes: its vocab_size follows from the texts; pieces: of the tokenizer, at most. ValueError as FastCodec.fit.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    codec = FastCodec.fit(chunks, codes, scale)
    codec.save(folder / CODEC)
    tokenizer = build_tokenizer(texts, codec.vocab_size, pieces=pieces)
    (folder / TEXT).mkdir(exist_ok=True)
    (folder / TEXT / "tokenizer.json").write_text(tokenizer_json(tokenizer), encoding="utf-8")
    write_json(folder / TEXT / "tokenizer_config.json", {
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False, "tokenizer_class": "GemmaTokenizer", "processor_class": "PaliGemmaProcessor"})
    sizes = (sizes or SMALL)._replace(vocab_size=tokenizer.get_vocab_size())
    longest = max(len(codec.encode(chunk)) for chunk in chunks)
    config = lerobot_config(cameras, state, chunks[0].shape[1], len(chunks[0]), sizes.vision.image_size, 2 * longest + 8)
    write_checkpoint(folder, init_state(sizes, seed), dict(config, sizes=sizes_json(sizes)), norm_stats)
    return sorted(path for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":  # sanity check: python -m vlakeep.pi0_fast.tiny
    made = build_tokenizer(["pick up the red block", "open the drawer"], 16)
    print(made.encode("Task: pick up the red block, State: -1 255;\n").tokens)
    bar, digits = (made.encode(text, add_special_tokens=False).tokens for text in ("|", "255"))
    assert bar == ["|"] and digits == ["2", "5", "5"]
