"""Runs pairs under all arms of an experiment and measures what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..capture import capture
from ..models import Model
from ..run import Probe, key
from ..steering import Edit, edited, score
from ..steering.asking import Prompt, ask
from ..steering.generation import texts_of
from ..steering.scoring import divergence, forced
from .arms import Arms, Index
from .names import Names, token_ids
from .request import Request

_BYTES = 512 << 20  # of the values of edits that are in memory at once


@dataclass(eq=False)
class Measured:
    """What was measured of pairs, by the number of the edits; chunk after chunk."""

    count: int
    answers: list[list[str]] = field(default_factory=list)
    numbers: dict[str, list[NDArray[np.float64]]] = field(default_factory=dict)

    def add(self, more: Measured) -> None:
        """Append other pairs."""
        self.answers = self.answers or [[] for _ in range(self.count)]
        for mine, theirs in zip(self.answers, more.answers, strict=True):
            mine += theirs
        for name, parts in more.numbers.items():
            self.numbers.setdefault(name, []).extend(parts)

    def of(self, name: str) -> NDArray[np.float64]:
        """A measure of all pairs, float64 [edits, pairs, ...]."""
        return np.concatenate(self.numbers[name], 1)

    def perplexity(
        self,
        model: Model,
        inputs: Sequence[Any],
        arms: Arms,
        kept: Index,
        asked: Request,
        batch_size: int,
    ) -> None:
        """Score every answer under the unedited model, each once; an empty one has none."""
        sources = arms.place.sources[kept].tolist()
        asked_for = [
            (s, text) for said in self.answers for s, text in zip(sources, said, strict=True)
        ]
        distinct_ = list(dict.fromkeys(asked_for))
        ids = [one[: asked.max_new_tokens] for one in token_ids(model, [t for _, t in distinct_])]
        full = [i for i, one in enumerate(ids) if one]
        found = np.full(len(distinct_), np.nan)
        if full:
            (scores,) = score(
                model, [inputs[distinct_[i][0]] for i in full], [ids[i] for i in full],
                batch_size=batch_size,
            )  # fmt: skip
            found[full] = scores.perplexity.numpy()
        of = dict(zip(distinct_, found.tolist(), strict=True))
        values = np.array([of[one] for one in asked_for])
        self.numbers["perplexity"] = [values.reshape(self.count, len(kept))]


def measure(
    model: Model,
    inputs: Sequence[Any],
    arms: Arms,
    some: Index,
    known: Names,
    later: Sequence[Probe],
    asked: Request,
    batch_size: int,
    tell: Callable[[int], object],
) -> Measured:
    """Run some pairs under all edits: what they answer, and what the later probes read.

    `tell` hears of how many pairs more there is an answer, of any arm.
    """
    sources = arms.place.sources[some]
    shown = [inputs[s] for s in sources.tolist()]
    edits = [make(some) for make in arms.makes]
    said = _Said.nothing(model, asked, known, sources, arms.place.targets[some], len(edits))

    def answer(arm: int, rows: list[int], prompt: Prompt) -> None:
        said(arm, rows, prompt)
        tell(len(rows))

    ask(model, shown, edits, answer, batch_size=batch_size, again=True)
    reading = np.full((len(edits), len(some), len(later), 2), np.nan)
    if later:
        for number, found in enumerate(pooled(model, shown, edits, later, batch_size)):
            for i, (probe, rows) in enumerate(zip(later, found, strict=True)):
                columns = [probe.targets.index(name) for name in ("latitude", "longitude")]
                reading[number, :, i] = probe(rows)[:, columns].numpy()
    numbers = {"log_odds": [said.odds], "kl": [said.kl], "reading": [reading]}
    return Measured(len(edits), said.answers, numbers)


@dataclass(eq=False)
class _Said:
    """What a prompt is asked under every arm of edits, of which the first has none."""

    model: Model
    most: int
    """Tokens of an answer."""
    names: list[tuple[str, str]]
    """Of the source and of the target, by pair; of those that cannot be told apart, none."""
    answers: list[list[str]]
    odds: NDArray[np.float64]
    kl: NDArray[np.float64]
    _unedited: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def nothing(
        cls, model: Model, asked: Request, known: Names, sources: Index, targets: Index, count: int
    ) -> _Said:
        """Make room for the answers of some pairs under `count` arms."""
        names = [(known.usual[s], known.usual[t]) for s, t in zip(sources, targets, strict=True)]
        names = [two if _can_tell(*two) else ("", "") for two in names]
        room = np.full((2, count, len(names)), np.nan)
        said = [[""] * len(names) for _ in range(count)]
        return cls(model, asked.max_new_tokens, names, said, *room)

    def __call__(self, arm: int, rows: list[int], prompt: Prompt) -> None:
        said = texts_of(self.model, prompt(), max_new_tokens=self.most)
        for row, text in zip(rows, said, strict=True):
            self.answers[arm][row] = text
        told = np.array([bool(self.names[row][0]) for row in rows])
        if told.any():
            of_source, of_target = (self._total(rows, side, prompt) for side in range(2))
            self.odds[arm, rows] = np.where(told, of_target - of_source, np.nan)
        if len(self.answers) > 1:
            self.kl[arm, rows] = self._apart(arm, rows, prompt)

    def _total(self, rows: list[int], side: int, prompt: Prompt) -> NDArray[np.float64]:
        """Log-probabilities of names, any where there is none."""
        names = [self.names[row][side] or [0] for row in rows]
        total = torch.zeros(len(rows), dtype=torch.float64)
        for ids, logs in forced(self.model, prompt(), names):
            found = logs.gather(1, ids.clamp(min=0)[:, None])[:, 0].double()
            total += found.where(ids >= 0, 0.0).cpu()
        return total.numpy()

    def _apart(self, arm: int, rows: list[int], prompt: Prompt) -> NDArray[np.float64]:
        """Mean divergence from the unedited model over the tokens of its answer."""
        texts = [self.answers[0][row] for row in rows]
        # Before the first token they are compared whatever it is, also where an answer is empty.
        answer = [one[: self.most] or [0] for one in token_ids(self.model, texts)]
        steps = forced(self.model, prompt(), answer)
        if not arm:
            self._unedited = [logs for _, logs in steps]
            return np.zeros(len(rows))
        total = torch.zeros(len(rows), dtype=torch.float64)
        for before, (ids, logs) in zip(self._unedited, steps, strict=True):
            total += divergence(before, logs).where(ids >= 0, 0.0).cpu()
        return (total / torch.tensor([*map(len, answer)])).numpy()


def _can_tell(source: str, target: str) -> bool:
    return bool(source and target) and source.casefold() != target.casefold()


def pooled(
    model: Model,
    inputs: Sequence[Any],
    arms: Sequence[Sequence[Edit]],
    probes: Sequence[Probe],
    size: int,
) -> list[list[torch.Tensor]]:
    """Pooled rows where probes of one pool read, float32 [inputs, d], by arm and probe."""
    sites, pool = [probe.site for probe in probes], probes[0].pool
    short = model.until(model.sites(sites))
    found: list[list[list[torch.Tensor]]] = [[[] for _ in probes] for _ in arms]
    for start in range(0, len(inputs), size):
        numbers = range(start, min(start + size, len(inputs)))
        batch = short.prepare([inputs[i] for i in numbers])
        for parts, arm in zip(found, arms, strict=True):
            here = [edit.take(numbers) if edit.samples > 1 else edit for edit in arm]
            with edited(short, here), capture(short, sites, pool) as rows:
                short.forward(batch)
            for part, site in zip(parts, sites, strict=True):
                part.append(rows[key(site, pool)])
    return [[torch.cat(part) for part in parts] for parts in found]


def chunks(arms: Arms, kept: Index) -> Iterable[Index]:
    """Split pairs so that the values of all arms' edits fit."""
    each = 4 * max(1, sum(arms.sizes))
    step = max(1, _BYTES // each)
    return [kept[i : i + step] for i in range(0, len(kept), step)]
