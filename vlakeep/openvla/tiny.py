"""The small parts of the built-in model: two tiny ViTs under timm ids, and a Llama-type tokenizer built from a list of texts.

They are tiny configurations of what OpenVLA uses, in the same file formats; everything else of the model is the same code.
"""

import functools
import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from vlakeep.core.compat import import_timm

TINY_IMAGE_SIZE = 64
_SIZES: Dict[str, Dict[str, Any]] = {
    "tiny": dict(img_size=TINY_IMAGE_SIZE, embed_dim=96, depth=4, num_heads=4, mlp_ratio=8 / 3),
    "small": dict(img_size=128, embed_dim=192, depth=5, num_heads=6, mlp_ratio=8 / 3),
}
# As timm's vit_*_reg4_dinov2 and vit_*_siglip. LayerScale starts at 1, not 1e-5, because these are trained from nothing.
_KINDS: Dict[str, Dict[str, Any]] = {
    "dinov2": dict(class_token=True, reg_tokens=4, no_embed_class=True, init_values=1.0),
    "siglip": dict(class_token=False, global_pool="map"),
    # As vit_small_patch14_dinov2: no registers, and the class token has a position.
    "dinov2_plain": dict(class_token=True, init_values=1.0, mlp_ratio=4),
}
ACTION_TOKENS = 256
FIRST_ACTION_CHARACTER = 0x4E00  # CJK ideographs: single characters, no normalisation, in none of the texts
_SPECIALS = ("<unk>", "<s>", "</s>")
_TEMPLATE = "In: What action should the robot take to?\nOut:"  # the words of the official prompt, always in the vocabulary


@functools.lru_cache(maxsize=None)
def register_tiny_vits() -> None:
    """Make `vlakeep_vit_{tiny,small}_patch{8,16}_{dinov2,siglip,dinov2_plain}` known to timm."""
    import_timm()
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer

    def entry_point(name, sizes):
        def entry(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **options):
            if pretrained:
                raise ValueError("the tiny ViTs have no published weights; they come with the checkpoint")
            return VisionTransformer(**dict(sizes, **options))

        entry.__name__ = name
        return entry

    for size, patch, kind in itertools.product(_SIZES, (8, 16), _KINDS):
        sizes = dict(_SIZES[size], patch_size=patch, **_KINDS[kind])
        register_model(entry_point(f"vlakeep_vit_{size}_patch{patch}_{kind}", sizes))


def _split(text: str) -> List[str]:
    """Words of a text as the tokenizer sees it: a word takes the space before it, everything else stands alone."""
    return re.findall(r"▁?\w+", ("▁" + text).replace(" ", "▁"))


def _merges(words: Counter) -> Tuple[List[Tuple[str, str]], set]:
    """Byte-pair merges after which every word is one piece; the pieces they make, and the characters they start from."""
    pieces = {word: list(word) for word in words}
    merges = []
    while True:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(pieces[word], pieces[word][1:]):
                pairs[pair] += count
        if not pairs:
            return merges, {character for word in words for character in word}
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for parts in pieces.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i:i + 2] = [parts[i] + parts[i + 1]]
                i += 1


def _added(index: int, content: str) -> dict:
    return {
        "id": index,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def tiny_tokenizer_json(corpus: List[str], words: List[str], vocab_size: int) -> dict:
    """tokenizer.json of a Llama-type BPE tokenizer in which every word of `corpus` and `words` is one piece.

    Ids: <unk> <s> </s>, 256 bytes, pieces, 256 action characters up to vocab_size - 1, then <PAD> = vocab_size.
    Raises ValueError when vocab_size is too small, with the smallest one that fits.
    """
    # Distinct words count once: what matters is that each is a whole piece, with as few pieces in between as possible.
    corpus = [*corpus, _TEMPLATE]
    counted = Counter(sorted({word for text in corpus for word in _split(text)} | {"▁" + word for word in words}))
    merges, characters = _merges(counted)
    characters |= {c for text in corpus for c in text.replace(" ", "▁") if c != "\n"} | {"▁"}
    vocab: Dict[str, int] = {token: i for i, token in enumerate(_SPECIALS)}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in ["▁"] + [left + right for left, right in merges] + sorted(characters):
        vocab.setdefault(piece, len(vocab))
    needed = len(vocab) + ACTION_TOKENS
    if needed > vocab_size:
        raise ValueError(
            f"{len(counted)} words need {len(vocab)} pieces and {ACTION_TOKENS} action tokens: vocab_size must be at least "
            f"{needed}, not {vocab_size}"
        )
    while len(vocab) < vocab_size - ACTION_TOKENS:  # unused rows, never produced by any text
        vocab[f"<unused_{len(vocab)}>"] = len(vocab)
    actions = [chr(FIRST_ACTION_CHARACTER + i) for i in range(ACTION_TOKENS)]
    if set(actions) & set(vocab):
        raise ValueError("the texts use characters that are reserved for action tokens (U+4E00 to U+4EFF)")
    for character in actions:
        vocab[character] = len(vocab)
    return llama_tokenizer_json(vocab, merges, vocab_size)


def llama_tokenizer_json(vocab: Dict[str, int], merges: List[Tuple[str, str]], pad_id: int) -> dict:
    """tokenizer.json of a byte-pair vocabulary with the normalizer, decoder and post-processor of Llama, and <PAD> = pad_id."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, token) for i, token in enumerate(_SPECIALS)] + [_added(pad_id, "<PAD>")],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [f"{a} {b}" for a, b in merges],
        },
    }


def preprocessor_config(image_size: int, fused: bool = True) -> dict:
    """preprocessor_config.json of DINOv2 and SigLIP, or of DINOv2 alone, keys and values as the official processor writes them."""
    views = 2 if fused else 1
    means, stds = [[0.485, 0.456, 0.406], [0.5] * 3][:views], [[0.229, 0.224, 0.225], [0.5] * 3][:views]
    size = [image_size, image_size]
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3] + size] * views,
        "interpolations": ["bicubic"] * views,
        "means": means,
        "processor_class": "PrismaticProcessor",
        "stds": stds,
        "tvf_crop_params": [{"output_size": size}] * views,
        "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None,
        "tvf_normalize_params": [{"inplace": False, "mean": m, "std": s} for m, s in zip(means, stds)],
        "tvf_resize_params": [{"antialias": True, "interpolation": 3, "max_size": None, "size": size}] * views,
        "use_fused_vision_backbone": fused,
    }


def build_tiny_tokenizer(corpus: List[str], words: List[str], folder, vocab_size: int, image_size: int = TINY_IMAGE_SIZE) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and preprocessor_config.json to `folder`.

    corpus: every text the model will see; words: further words that must be one piece. Raises ValueError as tiny_tokenizer_json.
    """
    write_processor_files(folder, tiny_tokenizer_json(corpus, words, vocab_size), image_size)


def write_processor_files(folder, tokenizer: dict, image_size: int, marks: Optional[Dict[str, str]] = None, fused: bool = True) -> None:
    """The four processor files for a tokenizer.json, in the layout of the official save_pretrained. marks: its special tokens, if they are
    not Llama's; fused as in preprocessor_config."""
    def plain(content):
        return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}

    marks = marks or {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<PAD>", "unk_token": "<unk>"}
    config = {
        "add_bos_token": True, "add_eos_token": False,
        "added_tokens_decoder": {str(t["id"]): dict(plain(t["content"]), special=True) for t in tokenizer["added_tokens"]},
        **marks, "clean_up_tokenization_spaces": False, "legacy": True, "model_max_length": 2048, "padding_side": "right",
        "processor_class": "PrismaticProcessor", "tokenizer_class": "LlamaTokenizer", "use_default_system_prompt": False,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config),
                        ("special_tokens_map.json", {key: plain(value) for key, value in marks.items()}),
                        ("preprocessor_config.json", preprocessor_config(image_size, fused))):
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=name != "tokenizer.json") + "\n", encoding="utf-8")


if __name__ == "__main__":  # sanity check: python -m vlakeep.openvla.tiny "pick up the red cup"
    print(len(_merges(Counter(_split(" ".join(sys.argv[1:]))))[0]), "merges")
