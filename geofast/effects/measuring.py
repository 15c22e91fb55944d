"""Runs pairs under all arms of an experiment and measures what comes of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..capture import capture
from ..models import Model
from ..run import Probe, key
from ..steering import Edit, edited, generate_arms, score
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
    later: Probe | None,
    asked: Request,
    batch_size: int,
) -> Measured:
    """Run some pairs under all edits."""
    made = Measured(len(arms.makes))
    sources, targets = arms.place.sources[some].tolist(), arms.place.targets[some].tolist()
    shown = [inputs[s] for s in sources]
    edits = [make(some) for make in arms.makes]
    made.answers = generate_arms(
        model, shown, edits, batch_size=batch_size, max_new_tokens=asked.max_new_tokens
    )
    n = len(some)
    odds = np.full((made.count, n), np.nan)
    apart = [i for i in range(n) if _can_tell(known.usual[sources[i]], known.usual[targets[i]])]
    if apart:
        both = np.concatenate([some[apart], some[apart]])
        texts = [known.usual[targets[i]] for i in apart] + [known.usual[sources[i]] for i in apart]
        twice = [make(both) for make in arms.makes]
        scores = score(model, [shown[i] for i in apart] * 2, texts, twice, batch_size=batch_size)
        totals = torch.stack([s.total for s in scores]).numpy()
        odds[:, apart] = totals[:, : len(apart)] - totals[:, len(apart) :]
    divergence = np.zeros((made.count, n))
    if made.count > 1:
        # Before the first token they are compared whatever it is, also where an answer is empty.
        ids = [one[: asked.max_new_tokens] or [0] for one in token_ids(model, made.answers[0])]
        scores = score(model, shown, ids, edits[1:], kl=True, batch_size=batch_size)
        for number, found in enumerate(scores, 1):
            assert found.kl is not None
            divergence[number] = (found.kl.sum(1) / found.counts).numpy()
    reading = np.full((made.count, n, 2), np.nan)
    if later is not None:
        columns = [later.targets.index(name) for name in ("latitude", "longitude")]
        for number, rows in enumerate(pooled(model, shown, edits, later, batch_size)):
            reading[number] = later(rows)[:, columns].numpy()
    made.numbers = {"log_odds": [odds], "kl": [divergence], "reading": [reading]}
    return made


def _can_tell(source: str, target: str) -> bool:
    return bool(source and target) and source.casefold() != target.casefold()


def pooled(
    model: Model, inputs: Sequence[Any], arms: Sequence[Sequence[Edit]], probe: Probe, size: int
) -> list[torch.Tensor]:
    """Pooled rows where a probe reads, float32 [inputs, d], under every arm."""
    short = model.until(model.sites(probe.site))
    found: list[list[torch.Tensor]] = [[] for _ in arms]
    for start in range(0, len(inputs), size):
        numbers = range(start, min(start + size, len(inputs)))
        batch = short.prepare([inputs[i] for i in numbers])
        for number, arm in enumerate(arms):
            here = [edit.take(numbers) if edit.samples > 1 else edit for edit in arm]
            with edited(short, here), capture(short, probe.site, probe.pool) as rows:
                short.forward(batch)
            found[number].append(rows[key(probe.site, probe.pool)])
    return [torch.cat(parts) for parts in found]


def chunks(arms: Arms, kept: Index) -> Iterable[Index]:
    """Split pairs so that the values of all arms' edits fit."""
    each = 4 * 2 * max(1, sum(arms.sizes))  # twice: for the names of both places
    step = max(1, _BYTES // each)
    return [kept[i : i + step] for i in range(0, len(kept), step)]
