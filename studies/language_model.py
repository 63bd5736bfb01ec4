"""Graded gains with a set-point on a language model: SmolLM2-135M learns a narrow text, and what it knew before is measured.

    python studies/language_model.py --make main > JOBS.json
    python studies/language_model.py JOBS.json [MORE.json ...] OUT.jsonl --data FOLDER [--part 0 --parts 12] [--seconds 540]
        [--device cuda] [--tf32] [--threads 1] [--items 500] [--also "--train.steps 60"]
    python studies/language_model.py --table OUT.jsonl [MORE.jsonl ...]            # or studies/records/language_model.jsonl.xz

FOLDER is made by studies/language_data.py. The method is the one of the robot policies, with the values of configs/method_graded.yaml:
methods/graded.py, train_step, the sensor, the spectra. What is here is the language model's side of it. An arm learns to answer requests to
a made-up robot with seven integers; measured are loss and accuracy on held-out requests, the divergence from the teacher on passages and
on its own answers to questions, LAMBADA (last word, greedy) and SciQ (likelihood of four answers). No evaluated data set is in a probe.

JOBS.json is a list of {"arm", "seed", "probe": "text" or "text+questions", "distil": weight, "args": [overrides]}. All arms of a seed
have the same initial adapters and the same order of the data. Runs that a *.jsonl beside OUT.jsonl holds already are left out.

Axes: N items, B batch, S or L tokens, T answer positions, D hidden, V vocabulary.
"""

import argparse
import itertools
import json
import lzma
import math
import shlex
import statistics
import sys
import time
import traceback
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, NamedTuple

import torch
from graded_study import spread
from language_data import load_model
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from vlakeep.core.config import config_from_argv
from vlakeep.core.loss_scale import LossScaler
from vlakeep.data.sample import IGNORE_INDEX, Batch
from vlakeep.methods.graded import Graded
from vlakeep.methods.graded_offline import split_items
from vlakeep.models.adapters import adapters_disabled, attach_lora
from vlakeep.models.base import Prefix
from vlakeep.models.outputs import LossOutput
from vlakeep.openvla.backbone import OpenVLABackbone
from vlakeep.openvla.model import layer_interface
from vlakeep.teacher.answers import TOP, Answered, Part, divergence, logits_at, run_below, split_log_probabilities, teacher_answers
from vlakeep.teacher.coverage import input_moments
from vlakeep.teacher.spectrum import Spectrum, spectrum
from vlakeep.thermostat.kl_sensor import KLSensor
from vlakeep.train import learning_rate, make_optimizer, train_step

SEEDS = [11, 12, 13]
# The task's side alone; adapters as PEFT draws them, the rate and the steps of the first trials (docs/log.md).
TASK = ["--train.lr", "1e-3", "--train.batch_size", "16", "--train.steps", "300", "--train.warmup", "10", "--train.log_every", "10",
        "--lora.init", "kaiming", "--probe.size", "300"]
OFF = ["--gains.enabled", "false", "--thermostat.enabled", "false"]
BOTH = "text+questions"
OPEN = ["--thermostat.enabled", "false", "--gains.opening", "1e-2"]  # gains that the loop does not move, as beside distillation
ARMS: Dict[str, dict] = {
    "plain 1e-3": {"args": OFF},
    "set-point .01, text+questions": {"args": ["--thermostat.target", "0.01"]},
    "set-point .01, text": {"args": ["--thermostat.target", "0.01"], "probe": "text"},
    "distillation 1, text+questions": {"args": OFF, "distil": 1.0},
    "plain 3e-4": {"args": [*OFF, "--train.lr", "3e-4"]},
    "set-point .05, text+questions": {"args": ["--thermostat.target", "0.05"]},
    "fixed r 1e-3, text+questions": {"args": ["--thermostat.enabled", "false", "--gains.opening", "1e-3"]},
    "distillation 1, text": {"args": OFF, "distil": 1.0, "probe": "text"},
    "plain 1e-4": {"args": [*OFF, "--train.lr", "1e-4"]},
    "plain 1e-3, decay 10": {"args": [*OFF, "--train.weight_decay", "10"]},
    "set-point .002, text+questions": {"args": ["--thermostat.target", "0.002"]},
    "set-point .05, text": {"args": ["--thermostat.target", "0.05"], "probe": "text"},
    "distillation 4, text+questions": {"args": OFF, "distil": 4.0},
    "set-point .002, text": {"args": ["--thermostat.target", "0.002"], "probe": "text"},
    "fixed r 1e-2, text+questions": {"args": OPEN},
    "r 1e-2 and distillation 1, text+questions": {"args": OPEN, "distil": 1.0},
    "set-point .01 and distillation 1, text+questions": {"args": ["--thermostat.target", "0.01"], "distil": 1.0},
    "plain 1e-3, decay 1": {"args": [*OFF, "--train.weight_decay", "1"]},
    "r 1e-2 and distillation 1, text": {"args": OPEN, "distil": 1.0, "probe": "text"},
}


def make_jobs(what: str) -> list:
    """main: all arms and seeds, seed by seed; check: the gains switched off in three ways, which must give the same run."""
    base = {"arm": "base", "seed": SEEDS[0], "probe": BOTH, "distil": 0.0, "args": OFF}
    if what == "check":
        changes = {"plain": OFF, "open": ["--thermostat.enabled", "false", "--gains.opening", "1e30", "--gains.scale", "1"],
                   "measured": ["--gains.enabled", "false"]}
        return [dict(base, arm=arm, args=args) for arm, args in changes.items()]
    return [base] + [{"arm": arm, "seed": seed, "probe": BOTH, "distil": 0.0, **entry} for seed in SEEDS for arm, entry in ARMS.items()]


class LanguageModel(nn.Module):
    """A causal language model as the method sees a backbone: decoder layers on a prefix, no pictures."""

    input_key = staticmethod(OpenVLABackbone.input_key)  # the linears of Llama, which are those of this model

    def __init__(self, causal: nn.Module):
        super().__init__()
        self.model, self.lora = causal, None

    @property
    def network(self) -> nn.Module:
        """The causal language model inside, with or without adapters."""
        return self.model.get_base_model() if self.lora else self.model

    @property
    def device(self) -> torch.device:
        return self.network.lm_head.weight.device

    @property
    def num_layers(self) -> int:
        return len(self.network.model.layers)

    def linears(self) -> Dict[str, nn.Module]:
        """All linears of the decoder layers, named like layers.3.self_attn.q_proj."""
        return {f"layers.{number}.{name}": linear for number, layer in enumerate(self.network.model.layers)
                for name, linear in layer.named_modules() if isinstance(linear, nn.Linear)}

    def adapted_linears(self) -> Dict[str, nn.Module]:
        return {name[len("model."):]: self.network.get_submodule(name) for name in (self.lora.targets if self.lora else [])}

    def first_adapted_layer(self) -> int:
        return 0

    def text_columns(self, prefix: Prefix, length: int) -> torch.Tensor:
        return torch.arange(length, device=self.device)

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.network.model.norm(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.network.lm_head(hidden)

    def embed(self, batch: Batch) -> Prefix:
        return Prefix(self.network.model.embed_tokens(batch.input_ids.to(self.device)), batch.attention_mask.bool().to(self.device))

    def run_layers(self, prefix: Prefix, start: int = 0, stop: int = 0) -> torch.Tensor:
        """The padding stands behind the text, where no token of it looks under the causal mask; so none is needed for it."""
        hidden_BSD, body = prefix.hidden_BSD, self.network.model
        positions_1S = torch.arange(hidden_BSD.shape[1], device=hidden_BSD.device)[None]
        rotation = {}
        if layer_interface(self.network)[1]:  # older versions of transformers make it inside the layers
            rotation["position_embeddings"] = body.rotary_emb(hidden_BSD, positions_1S)
        for layer in body.layers[start:stop]:
            out = layer(hidden_BSD, attention_mask=None, position_ids=positions_1S, **rotation)
            hidden_BSD = out[0] if isinstance(out, tuple) else out
        return hidden_BSD

    def forward(self, batch: Batch) -> LossOutput:
        hidden_BLD = self.run_layers(self.embed(batch), stop=self.num_layers)
        keep_BL = batch.labels[:, 1:] != IGNORE_INDEX
        logits_NV = self.logits(self.norm(hidden_BLD[:, :-1][keep_BL])).float()
        labels_N = batch.labels[:, 1:][keep_BL]
        return LossOutput(F.cross_entropy(logits_NV, labels_N), keep_BL.sum(), (logits_NV.argmax(-1) == labels_N).sum(),
                          hidden_BLD.detach().float().norm(dim=-1)[batch.attention_mask].mean())

    def add_lora(self, config, seed: int) -> None:
        attach_lora(self, ["model." + name for name in self.linears()], config.rank, config.alpha, config.dropout, config.init, seed)

    def drop_lora(self) -> None:
        self.model, self.lora = self.model.unload(), None


def batch_of(rows: List[List[int]], starts: List[int]) -> Batch:
    """Right-padded token ids; labels from `starts` on. The teacher's own end of sequence pads too: no token looks there."""
    ids_BL = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=2)
    column_1L, length_B1 = torch.arange(ids_BL.shape[1])[None], torch.tensor([len(row) for row in rows])[:, None]
    asked_BL = (column_1L >= torch.tensor(starts)[:, None]) & (column_1L < length_B1)
    return Batch(ids_BL, column_1L < length_B1, ids_BL.masked_fill(~asked_BL, IGNORE_INDEX), None, [""] * len(rows), first_label=1)


def last_layer(model: LanguageModel, batch: Batch) -> Prefix:
    """What the last layer gives, before the final norm."""
    prefix = model.embed(batch)
    return prefix.with_hidden(model.run_layers(prefix, stop=model.num_layers))


def to_device(batch: Batch, device) -> Batch:
    return Batch(batch.input_ids.to(device), batch.attention_mask.to(device), batch.labels.to(device), None, batch.dataset_names, 1)


# The teacher: probe, spectra, answers

class Items(NamedTuple):
    """Token ids, and for each the first position that counts as the teacher's answer."""

    rows: List[List[int]]
    starts: List[int]

    def pick(self, numbers) -> "Items":
        return Items([self.rows[i] for i in numbers], [self.starts[i] for i in numbers])

    def parts(self, model: LanguageModel, size: int = 16) -> List[Part]:
        pairs = []
        for first in range(0, len(self.rows), size):
            rows, starts = self.rows[first:first + size], self.starts[first:first + size]
            pairs.append((batch_of([row[:start] for row, start in zip(rows, starts)], starts), batch_of(rows, starts)))
        return run_below(model, pairs, 0)

    def answered(self, model: LanguageModel) -> Answered:
        return teacher_answers(model, self.parts(model), 0)

    def sensor(self, model: LanguageModel, answered: Answered) -> KLSensor:
        return KLSensor(model, answered, itertools.repeat(batch_of([[0]], [1])), 16)  # nothing is seen beside the text


def passages_of(rows) -> Items:
    """Every token of a passage but the first is an answer."""
    return Items(list(rows), [1] * len(rows))


def questions_of(pairs) -> Items:
    """The teacher's own answers behind the questions."""
    return Items([prompt + own for prompt, own in pairs], [len(prompt) for prompt, _ in pairs])


class Probe:
    """`fit`: the spectra come from these items, and distillation learns on them; `held`: the sensor measures on these."""

    def __init__(self, model: LanguageModel, data: dict, kind: str, config):
        size = config.probe.size
        texts, asked = passages_of(data["text"]), questions_of(data["questions"])
        items = Items(texts.rows[::max(1, len(texts.rows) // size)][:size], [1] * min(size, len(texts.rows)))
        if kind == BOTH:  # in turn, so that both parts get both kinds
            texts = Items(*[values[::max(1, len(values) // (size // 2))][:size // 2] for values in texts])
            items = Items(*[[one for pair in zip(*lists) for one in pair] for lists in zip(texts, asked)])
        count = len(items.rows)
        kinds = ["text", "question"] * (count // 2) if kind == BOTH else ["text"] * count
        self.fit, self.held = (items.pick(numbers) for numbers in split_items(list(range(count)), kinds, config.gains.holdout))
        self._model, self._columns = model, config.gains.columns
        self.held_answered = self.held.answered(model)

    @cached_property
    def spectra(self) -> Dict[str, Spectrum]:
        """Called before there are adapters: the linears are those of the teacher."""
        moments = input_moments(self._model, self.fit.parts(self._model), None, 0, self._model.linears(), self._model.input_key)
        return {key: spectrum(moments.pop(key), self._columns) for key in sorted(moments)}

    @cached_property
    def fit_answered(self) -> Answered:
        """At all positions, those of the questions' own words too."""
        return passages_of(self.fit.rows).answered(self._model)


class Distilled(Graded):
    """The loss also holds the divergence from the teacher on items of the probe, with or without gains."""

    def __init__(self, config, artifact, make_sensors, weight: float, probe: Probe, size: int = 8):
        super().__init__(config, artifact, make_sensors)
        self._weight, self._probe, self._size = weight, probe, size
        self._answered, self._draw = probe.fit_answered, torch.Generator().manual_seed(config.seed)
        self._model: Any = None

    def attach(self, backbone) -> None:
        super().attach(backbone)  # gains and sensor
        self._model = backbone

    def penalty(self) -> torch.Tensor:
        rows = torch.randint(len(self._probe.fit.rows), (self._size,), generator=self._draw)
        answered = Answered(*[value[rows].to(self._model.device) for value in self._answered])
        batch = batch_of([self._probe.fit.rows[i] for i in rows], [1] * len(rows))
        last = last_layer(self._model, batch)
        steps = int(answered.count_N.max())
        short = answered._replace(**{name: getattr(answered, name)[:, :steps] for name in ("top_NTK", "log_p_NTK", "log_rest_NT")})
        return self._weight * divergence(short, logits_at(self._model, last, batch.input_ids.shape[1], short.start_N, steps)).mean()


# Training and evaluation of one arm

def configuration(job, also):
    return config_from_argv(["--config", "configs/method_graded.yaml", "--seed", str(job["seed"]), *TASK, *job["args"], *also])


def make_method(job, config, probe: Probe):
    """Made before the adapters are: what it needs of the teacher is measured now."""
    spectra = probe.spectra if config.gains.enabled else {}

    def make_sensors(model):
        return {"kl": probe.held.sensor(model, probe.held_answered), "kl_new": None}
    artifact = SimpleNamespace(spectra=lambda: spectra, folder="the probe")
    return Distilled(config, artifact, make_sensors, job["distil"], probe) if job["distil"] else Graded(config, artifact, make_sensors)


def train(model: LanguageModel, method, config, pairs, seed: int) -> List[dict]:
    """The rows that the loop of vlakeep train would log."""
    settings = config.train
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], settings)
    scaler = LossScaler(enabled=False)
    order, rows, pending = torch.Generator().manual_seed(seed), [dict(row, step=0) for row in method.before_training()], []
    model.train()
    for step in range(1, settings.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        while len(pending) < settings.batch_size:
            pending += torch.randperm(len(pairs), generator=order).tolist()
        chosen, pending = [pairs[i] for i in pending[:settings.batch_size]], pending[settings.batch_size:]
        batch = to_device(batch_of([a + b for a, b in chosen], [len(a) for a, _ in chosen]), model.device)
        observe = step % settings.log_every == 0 or step == settings.steps
        metrics = train_step(model, method, optimizer, scaler, [batch], settings, step, observe)
        if observe or "d" in metrics:
            rows.append(dict({name: float(value) for name, value in metrics.items()}, step=step))
            if not math.isfinite(rows[-1]["loss"]):
                raise ValueError(f"the loss is {rows[-1]['loss']} at step {step}")
    model.eval()
    return rows


@torch.no_grad()
def score(model: LanguageModel, pairs, size: int = 64) -> Dict[str, torch.Tensor]:
    """Of continuations: sum of log-probabilities, tokens, tokens that would have been chosen, all [N]."""
    found: Dict[str, list] = {"log_p": [], "tokens": [], "right": []}
    for first in range(0, len(pairs), size):
        part = pairs[first:first + size]
        batch = batch_of([a + b for a, b in part], [len(a) for a, _ in part])
        starts_N, counts_N = torch.tensor([len(a) for a, _ in part]), torch.tensor([len(b) for _, b in part])
        last = last_layer(model, batch)
        log_p_NTV = logits_at(model, last, batch.input_ids.shape[1], starts_N, int(counts_N.max())).float().log_softmax(-1)
        answer_NT = pad_sequence([torch.tensor(b) for _, b in part], batch_first=True).to(model.device)
        mask_NT = torch.arange(answer_NT.shape[1], device=model.device) < counts_N[:, None].to(model.device)
        found["log_p"].append((log_p_NTV.gather(-1, answer_NT[..., None])[..., 0] * mask_NT).sum(1).cpu())
        found["right"].append(((log_p_NTV.argmax(-1) == answer_NT) & mask_NT).sum(1).cpu())
        found["tokens"].append(counts_N)
    return {name: torch.cat(values) for name, values in found.items()}


def log_p(model: LanguageModel, batch: Batch, keep_BL: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [N, V] of the tokens behind the kept positions."""
    hidden_BLD = model.run_layers(model.embed(batch), stop=model.num_layers)[:, :-1]
    return model.logits(model.norm(hidden_BLD[keep_BL])).float().log_softmax(-1)


@torch.no_grad()
def drift_on(model: LanguageModel, passages, size: int = 8) -> Dict[str, float]:
    """KL(teacher || student) over the whole vocabulary, mean over tokens; `kept`, the same as the sensor counts it, over the most probable
    tokens and the rest as one; the student's perplexity."""
    kl = kept = nats = tokens = 0.0
    for first in range(0, len(passages), size):
        batch = to_device(batch_of(passages[first:first + size], [1] * len(passages[first:first + size])), model.device)
        keep_BL = batch.labels[:, 1:] != IGNORE_INDEX

        student_NV = log_p(model, batch, keep_BL)
        with adapters_disabled(model):
            teacher_NV = log_p(model, batch, keep_BL)
        kl += float((teacher_NV.exp() * (teacher_NV - student_NV)).sum())
        top_NK = teacher_NV.topk(min(TOP, teacher_NV.shape[1] - 1)).indices
        answered = Answered(None, None, None, torch.ones(len(top_NK), dtype=torch.long, device=model.device), top_NK[:, None],
                            *[one[:, None] for one in split_log_probabilities(teacher_NV, top_NK)])
        kept += float(divergence(answered, student_NV[:, None]).sum())
        nats -= float(student_NV.gather(-1, batch.labels[:, 1:][keep_BL][:, None]).sum())
        tokens += len(student_NV)
    return {"kl": kl / tokens, "kept": kept / tokens, "perplexity": math.exp(nats / tokens)}


def evaluate(model: LanguageModel, data: dict, probe: Probe, sciq_own: tuple, items: int) -> dict:
    task = score(model, data["held"][:items])
    tokens = float(task["tokens"].sum())
    row = {"held_loss": -float(task["log_p"].sum()) / tokens, "tokens_right": float(task["right"].sum()) / tokens,
           "exact": float((task["right"] == task["tokens"]).double().mean())}
    for name in ("sciq_text", "lambada_text"):
        found = drift_on(model, data[name][:items])
        row.update({f"kl_{name}": found["kl"], f"kl_kept_{name}": found["kept"], f"perplexity_{name}": found["perplexity"]})
    row["kl_text"] = (row["kl_sciq_text"] + row["kl_lambada_text"]) / 2
    words = score(model, data["lambada"][:items])
    row["lambada"] = float((words["right"] == words["tokens"]).double().mean())
    asked = data["sciq"][:items]
    log_p = score(model, [(context, one) for context, answers, _ in asked for one in answers])["log_p"].tolist()
    taken, good = 0, 0
    for _, answers, right in asked:
        own = log_p[taken:taken + len(answers)]
        good, taken = good + (own.index(max(own)) == right), taken + len(answers)
    row["sciq"] = good / len(asked)
    row["kl_questions"] = float(sciq_own[0].sensor(model, sciq_own[1]).per_item().double().mean())
    row["kl_probe"] = float(probe.held.sensor(model, probe.held_answered).per_item().double().mean())
    return row


class Bench:
    """Model, texts, and the probes made so far."""

    def __init__(self, folder: Path, device: str, also: List[str], items: int):
        self.model = LanguageModel(load_model(folder, device))
        self.data = json.loads((folder / "data.json").read_text())
        self.also, self.items = also, items
        asked = questions_of(self.data["sciq_own"][:items])
        self._sciq_own = asked, asked.answered(self.model)
        self._probes: Dict[tuple, Probe] = {}

    def run_job(self, job) -> dict:
        config = configuration(job, self.also)
        key = (job["probe"], config.probe.size)
        if key not in self._probes:
            self._probes[key] = Probe(self.model, self.data, job["probe"], config)
        probe, model = self._probes[key], self.model
        method = make_method(job, config, probe)
        model.add_lora(config.lora, job["seed"])
        try:
            method.attach(model)
            started = time.perf_counter()
            rows = train(model, method, config, self.data["train"], job["seed"]) if job["arm"] != "base" else []
            trained = time.perf_counter()
            row = dict(job, also=self.also, train_seconds=trained - started,
                       trace=[[r["step"], r["kl"], r.get("opening")] for r in rows if "kl" in r])
            if rows:
                row.update(loss=rows[-1]["loss"], losses=[round(r["loss"], 5) for r in rows if "loss" in r])
                row.update({name: rows[-1][name] for name in ("settled_kl", "settled_opening") if name in rows[-1]})
            method.detach()
            row.update(evaluate(model, self.data, probe, self._sciq_own, self.items))
        finally:
            method.detach()
            model.drop_lora()
        return dict(row, evaluate_seconds=time.perf_counter() - trained, device=model.device.type)


def lines_of(file: Path) -> List[str]:
    """Of a .jsonl, or of one that is packed, .jsonl.xz."""
    return (lzma.decompress(file.read_bytes()).decode() if file.suffix == ".xz" else file.read_text()).splitlines()


def key(job) -> tuple:
    return job["arm"], job["seed"]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*")
    parser.add_argument("--data", default=".", help="folder that language_data.py has made")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--part", default=0, type=int)
    parser.add_argument("--parts", default=1, type=int)
    parser.add_argument("--seconds", default=1e9, type=float, help="no run is begun that would not end by then")
    parser.add_argument("--items", default=500, type=int, help="most items of an evaluated set")
    parser.add_argument("--also", default="", help="overrides for all runs")
    parser.add_argument("--tf32", action="store_true", help="products of matrices in TensorFloat-32, of a GPU that has it")
    parser.add_argument("--make", choices=["main", "check"])
    parser.add_argument("--table", action="store_true")
    own = parser.parse_args()
    if own.make:
        print(json.dumps(make_jobs(own.make)))
        return 0
    if own.table:
        print(table([json.loads(line) for file in own.files for line in lines_of(Path(file))]))
        return 0
    torch.set_num_threads(own.threads)
    torch.backends.cuda.matmul.allow_tf32 = own.tf32
    jobs, out = [job for file in own.files[:-1] for job in json.loads(Path(file).read_text())], Path(own.files[-1])
    done = [json.loads(line) for file in out.parent.glob("*.jsonl") for line in file.read_text().splitlines()]
    done = {key(row) for row in done if "error" not in row}
    # Every n-th, not n-th parts: when the time runs out it is the last seeds that are missing. Shares do not depend on what is done.
    jobs = [job for job in jobs[own.part::own.parts] if key(job) not in done]
    began, longest = time.perf_counter(), 0.0
    bench = Bench(Path(own.data), own.device, shlex.split(own.also), own.items) if jobs else None
    with open(out, "a") as file:
        for job in jobs:
            started = time.perf_counter()
            if started - began + longest > own.seconds:
                break
            try:
                row = bench.run_job(job)
            except Exception as error:  # one arm that fails must not take the others along
                traceback.print_exc()
                row = dict(job, error=f"{type(error).__name__}: {error}")
            longest = max(longest, time.perf_counter() - started)
            file.write(json.dumps(row) + "\n")
            file.flush()
    return 0


COLUMNS = {"held-out loss": "held_loss", "exact": "exact", "KL text": "kl_text", "KL questions": "kl_questions", "LAMBADA": "lambada",
           "SciQ": "sciq", "KL probe": "kl_probe"}


def table(rows) -> str:
    """Markdown: one line an arm, means over seeds with 95 % intervals; then how the set-point was met."""
    lines = ["| arm | runs | " + " | ".join(COLUMNS) + " | train s |", "|---|---|" + "---|" * (len(COLUMNS) + 1)]
    loops = ["", "| arm, seed | settled KL | r at the end | largest KL / target on the way | KL every fifth measurement |",
             "|---|---|---|---|---|"]
    good = [row for row in rows if "error" not in row]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in good if row["arm"] == arm]
        cells = [spread([row[name] for row in own]) for name in COLUMNS.values()] if own else [""] * len(COLUMNS)
        timed = [row["train_seconds"] for row in own if "train_seconds" in row]  # not of runs that were stopped and continued
        seconds = f"{statistics.mean(timed):.0f}" if timed else ""
        lines.append(f"| {arm} | {len(own)} | {' | '.join(cells)} | {seconds} |")
        for row in own:
            if "settled_kl" in row:
                target = float(row["args"][row["args"].index("--thermostat.target") + 1])
                worst = max(kl for _, kl, _ in row["trace"]) / target
                loops.append(f"| {arm}, {row['seed']} | {row['settled_kl']:.5f} | {row['settled_opening']:.2e} | {worst:.2f} | "
                             + " ".join(f"{kl:.4f}" for _, kl, _ in row["trace"][::5]) + " |")
    return "\n".join(lines + (loops if len(loops) > 3 else []))


if __name__ == "__main__":
    sys.exit(main())
