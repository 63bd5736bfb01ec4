"""Questions whose answers cannot be guessed from their text, and how well guessing does.

Chosen are, of all questions that could be asked about a set of scenes, some of every kind, so that under each text no answer stands
for more than half of the questions. Yes and no then come equally often under every text, and knowing the text is worth nothing.
"""

from collections import Counter, defaultdict
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np


class Question(NamedTuple):
    scene: int
    kind: str
    text: str
    answer: str


def choose(pool: Sequence[Question], count: int, per_scene: int, seed: int) -> List[Question]:
    """At most `count` of the pool, balanced as said above, kinds equally often where there are enough of each.

    Each scene gives `per_scene` questions, some up to twice as many where others have none that fit. Fewer than `count` come back
    when the pool has no more that leave the balance as it is.
    """
    return _Chooser(pool, seed).run(count, per_scene)


class _Chooser:
    def __init__(self, pool: Sequence[Question], seed: int):
        order = np.random.default_rng(seed).permutation(len(pool))
        self._texts: Dict[str, Dict[str, Dict[str, List[Question]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
        for question in (pool[i] for i in order):
            self._texts[question.kind][question.text][question.answer].append(question)
        self._chosen: List[Question] = []
        self._per_text, self._per_kind, self._per_scene = defaultdict(Counter), defaultdict(Counter), Counter()
        self._per_scene_kind: Counter = Counter()

    def run(self, count: int, per_scene: int) -> List[Question]:
        for cap in range(per_scene, 2 * per_scene + 1):
            self._fill(count, cap)
        return self._chosen

    def _fill(self, count: int, cap: int) -> None:
        """Add questions of the rarest kind, one or two at a time, until there are enough or no scene below `cap` has any."""
        todo = {kind: list(texts) for kind, texts in self._texts.items()}
        while len(self._chosen) < count and any(todo.values()):
            kind = min((kind for kind in sorted(todo) if todo[kind]), key=lambda kind: self._per_kind[kind].total())
            text = min(todo[kind], key=lambda text: self._per_text[text].total())
            added = self._next(kind, text, cap, count - len(self._chosen))
            if not added:
                todo[kind].remove(text)
            for question in added:
                self._add(question)

    def _next(self, kind: str, text: str, cap: int, room: int) -> List[Question]:
        """One more question of this text, or two with different answers, that leave no answer with more than half; else none."""
        used = self._per_text[text]
        answers = sorted(self._texts[kind][text], key=lambda answer: (used[answer], self._per_kind[kind][answer]))
        first: Optional[Question] = None
        for answer in answers:
            best = self._best(kind, text, answer, cap, first)
            if best is None:
                continue
            if 2 * max(used[answer] + 1, *used.values(), 0) <= used.total() + 1:
                return [best]
            if first is None:
                first = best
            elif 2 * max(used[answer] + 1, used[first.answer] + 1, *used.values()) <= used.total() + 2 and room > 1:
                return [first, best]
        return []

    def _best(self, kind: str, text: str, answer: str, cap: int, besides: Optional[Question]) -> Optional[Question]:
        """The question whose scene has been asked least about."""
        free = [q for q in self._texts[kind][text][answer]
                if self._per_scene[q.scene] < cap and (besides is None or q.scene != besides.scene)]
        return min(free, key=lambda q: (self._per_scene_kind[q.scene, kind], self._per_scene[q.scene]), default=None)

    def _add(self, question: Question) -> None:
        self._texts[question.kind][question.text][question.answer].remove(question)
        self._chosen.append(question)
        self._per_text[question.text][question.answer] += 1
        self._per_kind[question.kind][question.answer] += 1
        self._per_scene[question.scene] += 1
        self._per_scene_kind[question.scene, question.kind] += 1


def measure(chosen: Sequence[Question]) -> Dict[str, dict]:
    """Per kind, and for "all": how many questions and texts, the answers, and how often three guessers are right.

    majority always says the kind's most frequent answer; text_only says the text's most frequent answer among one half of the
    scenes (the kind's, where the text does not occur there) and is tested on the other half, both ways round. After a balanced
    choice it falls below chance: what is frequent in one half is rare in the other. text_told has seen the answers that it is
    tested on, a bound for what can be learnt from the text.
    """
    groups = {kind: [q for q in chosen if q.kind == kind] for kind in sorted({q.kind for q in chosen})}
    found = {kind: _measure_kind(group) for kind, group in groups.items()}
    total = max(len(chosen), 1)
    sums = {key: round(sum(value[key] * value["n"] for value in found.values()) / total, 3)
            for key in ("majority", "text_only", "text_told")}
    return {**found, "all": {"n": len(chosen), "texts": sum(value["texts"] for value in found.values()), **sums}}


def _measure_kind(group: List[Question]) -> dict:
    answers, texts = Counter(q.answer for q in group), defaultdict(Counter)
    for q in group:
        texts[q.text][q.answer] += 1
    told = sum(max(counter.values()) for counter in texts.values())
    return {"n": len(group), "texts": len(texts), "answers": dict(answers.most_common()),
            "majority": round(max(answers.values()) / len(group), 3), "text_only": round(_text_only(group), 3),
            "text_told": round(told / len(group), 3)}


def _text_only(group: List[Question]) -> float:
    scenes = np.random.default_rng(0).permutation(sorted({q.scene for q in group})).tolist()
    half = set(scenes[::2])
    right = 0
    for train, test in (([q for q in group if (q.scene in half) == side], [q for q in group if (q.scene in half) != side])
                        for side in (True, False)):
        known, usual = _usual(train)
        right += sum(q.answer == known.get(q.text, usual) for q in test)
    return right / len(group)


def _usual(group: Iterable[Question]) -> Tuple[Dict[str, str], Optional[str]]:
    """(text -> its most frequent answer, the most frequent answer of all)."""
    texts, answers = defaultdict(Counter), Counter()
    for q in group:
        texts[q.text][q.answer] += 1
        answers[q.answer] += 1
    return {text: counter.most_common(1)[0][0] for text, counter in texts.items()}, answers.most_common(1)[0][0] if answers else None
