"""Stage `vlakeep own-texts`: what a model says of itself as a language model, drawn word by word, to train beside so that it still does.

    vlakeep own-texts --base midsize-parts --out $VLAKEEP_ROOT/midsize-texts.safetensors
    vlakeep own-texts --base midsize-parts --out $VLAKEEP_ROOT/tmp/texts.safetensors --texts 32 --length 64 --device cpu

No text of others is read: each begins as OPENINGS says and goes on as the model does, at temperature 1, over what it ends too. So nothing
of a language benchmark can be among them, but its forms can: what a probe does not cover in form is lost, however small the divergence on
what it covers (docs/log.md). Of action tokens none is drawn. The same options on the same device give the same file.

writes: OUT, int32 `ids` [N, L] in safetensors, with the hash of the model's weights

Axes: N texts, R of them at once, L tokens, K rows of the vocabulary, D hidden.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from vlakeep.core.config import BackboneConfig, ConfigError
from vlakeep.core.options import read
from vlakeep.core.storage import Storage, atomic_path
from vlakeep.models.entrance import Request
from vlakeep.models.load import make_backbone
from vlakeep.openvla.change import words_of
from vlakeep.openvla.stages import OWN_TEXTS

# How a text begins -> its share: a document, a question with its answer, a user's turn of a chat.
OPENINGS = {"": 0.5, "Question:": 0.25, "<|im_start|>user\n": 0.25}


def main(argv: List[str]) -> int:
    args, config = read(OWN_TEXTS, argv)
    storage = Storage.from_config(config)
    storage.guard_write(args.out, what="texts")
    if args.out.is_file():
        print(f"{args.out} is there")
        return 0
    backbone: Any = make_backbone(BackboneConfig(checkpoint=args.base), torch.device(args.device), storage.cache)
    ids_NL = drawn(backbone, args.texts, args.length, args.batch, args.seed)
    shown = [arg.replace(str(args.out), "OUT").replace(str(storage.root), "ROOT") for arg in argv]
    facts = {"command": shlex.join(["vlakeep", "own-texts", *shown]), "weights": backbone.weights_sha256, "openings": OPENINGS}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(args.out) as partial:
        save_file({"ids": ids_NL.to(torch.int32)}, str(partial), metadata={"facts": json.dumps(facts)})
    print(f"wrote {args.out}: {len(ids_NL):,} texts of {args.length} tokens")
    for row in ids_NL[:: max(1, len(ids_NL) // 4)][:4]:
        print(f"  {backbone.processor.tokenizer.decode(row[:40])!r}")
    return 0


def drawn(backbone, count: int, length: int, rows: int, seed: int) -> torch.Tensor:
    """ids [N, L] on the CPU, `rows` at a time, in the openings' order. ConfigError for an opening that is as long as a text."""
    generator = torch.Generator(device=backbone.device).manual_seed(seed)
    parts, left = [], count
    bar = tqdm(total=count, desc="texts", mininterval=2.0)
    for number, (opening, share) in enumerate(OPENINGS.items(), 1):
        begun, wanted = backbone.processor.text_ids(opening), left if number == len(OPENINGS) else min(left, round(count * share))
        if len(begun) >= length:
            raise ConfigError(f"--length {length}: {opening!r} alone has {len(begun)} tokens")
        left -= wanted
        while wanted > 0:
            size = min(rows, wanted)
            ids_RL = torch.tensor([begun] * size, device=backbone.device)
            with torch.autocast("cuda", torch.bfloat16, enabled=ids_RL.is_cuda):
                parts.append(backbone(Request(_say, (ids_RL, length, words_of(backbone.processor), generator), {})).cpu())
            wanted -= size
            bar.update(size)
    bar.close()
    return torch.cat(parts)


@torch.no_grad()
def _say(backbone, ids_RL: torch.Tensor, length: int, words: int, generator: torch.Generator) -> torch.Tensor:
    """Rows that go on up to `length` tokens, each drawn from what the model expects among its words. Inside the model's call."""
    from transformers import DynamicCache

    openvla, cache = backbone.openvla, DynamicCache()
    new_RL = ids_RL
    while True:
        hidden_RLD = openvla.embed(new_RL, None)
        places_1L = torch.arange(ids_RL.shape[1] - new_RL.shape[1], ids_RL.shape[1], device=ids_RL.device)[None]
        mask = openvla.attention_bias(torch.ones_like(ids_RL, dtype=torch.bool), new_RL.shape[1], hidden_RLD.dtype)
        last_RD = openvla.norm(openvla.run_layers(hidden_RLD, mask, places_1L, cache=cache)[:, -1])
        new_RL = torch.multinomial(openvla.logits(last_RD)[:, :words].softmax(-1), 1, generator=generator)
        ids_RL = torch.cat([ids_RL, new_RL], dim=1)
        if ids_RL.shape[1] >= length:
            return ids_RL


def read_texts(file: Path, length: int, weights: str) -> Tuple[torch.Tensor, Dict]:
    """(ids int64 [N, length], facts) of a file. ValueError when it is none, of another model, or of shorter texts."""
    try:
        with safe_open(str(file), framework="pt") as opened:
            ids_NL, facts = opened.get_tensor("ids").long(), json.loads((opened.metadata() or {})["facts"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"--texts {file} cannot be read ({error!r}): make it with `vlakeep own-texts`") from error
    if facts["weights"] != weights:
        raise ValueError(f"--texts {file} was said by another model ({facts['weights'][:12]}, not {weights[:12]}): make it with `vlakeep "
                         "own-texts` from --base")
    if ids_NL.shape[1] < length:
        raise ValueError(f"--texts {file}: texts of {ids_NL.shape[1]} tokens, a sample has {length}: make them with --length {length}")
    return ids_NL[:, :length], facts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
