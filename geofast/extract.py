"""One pass of a model over its samples: batches in, pooled rows or statistics out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from .capture import NonFiniteError, Pools, capture
from .data import Samples
from .data.samples import Skipped
from .data.stream import batches
from .gram import Gram
from .models import Model
from .rows import Rows

_FLUSH = (
    2048  # rows of a site that are added to its Grams at once: fewer would read the Grams too often
)


@dataclass
class Extracted:
    """What a pass left: `rows` [n, d] or `grams`, by "site/pool" or "site/pool/prompt"."""

    kept: np.ndarray
    """int [n]: which samples went through, in order."""
    rows: dict[str, torch.Tensor] | None
    grams: dict[str, Gram] | None
    skipped: list[Skipped] = field(default_factory=list)


@dataclass(frozen=True)
class Storage:
    """Where the pass puts what it read."""

    kind: Literal["rows", "gram"]
    targets: torch.Tensor
    """float64 [n, k] of all samples; statistics need them during the pass."""
    cell: torch.Tensor
    """int64 [n]: the cell of every sample, negative for none."""
    folder: Path | None = None
    """Rows too large for memory are mapped to files here."""


def extract(
    model: Model,
    samples: Samples,
    storage: Storage,
    *,
    sites: str | Sequence[str] | None,
    pool: Pools,
    prompts: Sequence[str],
    batch_size: int,
    workers: int,
    strict: bool,
    progress: bool,
) -> Extracted:
    """Run the model once over every sample and prompt.

    Raises
    ------
    ValueError
        When no sample survives, or (with `strict`) at the first that does not.
    FloatingPointError
        For NaN or infinite activations, naming site, sample and dtype.
    """
    labels = prompts if len(prompts) > 1 else [""]
    bar = tqdm(
        total=len(samples) * len(prompts), unit="sample", disable=not progress, desc=model.name,
        mininterval=0.2 if sys.stderr.isatty() else 15,  # a log file needs no animation
    )  # fmt: skip
    found: Extracted | None = None
    with bar:
        for prompt, label in zip(prompts, labels, strict=True):
            one = _Pass(model, samples, storage, batch_size, workers, strict, prompt, label)
            part = one.run(sites, pool, bar)
            found = part if found is None else _join(found, part)
    assert found is not None
    return found


def _join(a: Extracted, b: Extracted) -> Extracted:
    # Every prompt goes over the same inputs, so the same samples are kept and skipped.
    rows = None if a.rows is None else {**a.rows, **(b.rows or {})}
    grams = None if a.grams is None else {**a.grams, **(b.grams or {})}
    return Extracted(a.kept, rows, grams, a.skipped)


@dataclass
class _Pass:
    model: Model
    samples: Samples
    storage: Storage
    batch_size: int
    workers: int
    strict: bool
    prompt: str
    label: str

    def run(self, sites: str | Sequence[str] | None, pool: Pools, bar: Any) -> Extracted:
        text = self.samples.kind == "text"
        inputs = self._worded() if text else self.samples
        order = self._longest_first(inputs) if text else np.arange(len(inputs))
        capacity = _FLUSH + self.batch_size if self.storage.kind == "gram" else len(inputs)
        rows = Rows(capacity, self.storage.folder)
        grams: dict[str, Gram] = {}
        pending: list[int] = []
        kept: list[int] = []
        skipped: list[Skipped] = []
        stream = batches(
            inputs, order, self.batch_size,
            transform=self.model.transform, workers=self.workers, strict=self.strict,
        )  # fmt: skip
        with capture(self.model, sites, pool, rows=rows):
            for batch in stream:
                skipped += batch.skipped
                if len(batch.index):
                    self._forward(batch.inputs, batch.index)
                    pending += batch.index.tolist()
                if self.storage.kind == "gram" and rows.n >= _FLUSH:
                    self._flush(rows, grams, pending, kept)
                bar.update(len(batch.index) + len(batch.skipped))
        if not pending and not kept:
            first = f"; the first: {skipped[0].where}: {skipped[0].reason}" if skipped else ""
            raise ValueError(f"none of the {len(inputs)} samples could be read{first}")
        if self.storage.kind == "gram":
            self._flush(rows, grams, pending, kept)
            return Extracted(np.sort(kept), None, grams, skipped)
        if text:
            rows.reorder(torch.from_numpy(np.argsort(pending, kind="stable")))
        return Extracted(np.sort(pending), {self._key(k): rows[k] for k in rows}, None, skipped)

    def _forward(self, inputs: list[object], index: np.ndarray) -> None:
        try:
            self.model.forward(self.model.to_device(self.model.collate(inputs)))
        except NonFiniteError as error:
            error.add_note(f"That is sample {self.samples.table['id'].iloc[index[error.sample]]}.")
            raise
        except ValueError as error:
            ids = self.samples.table["id"].iloc[index[[0, -1]]]
            error.add_note(f"The batch went from sample {ids.iloc[0]} to {ids.iloc[1]}.")
            raise

    def _flush(
        self, rows: Rows, grams: dict[str, Gram], pending: list[int], kept: list[int]
    ) -> None:
        if not pending:
            return
        index = torch.tensor(pending)
        y, cell = self.storage.targets[index], self.storage.cell[index]
        for key in rows:
            x = rows[key]
            if (name := self._key(key)) not in grams:
                grams[name] = Gram(x.shape[1], y.shape[1], int(self.storage.cell.max()) + 1)
            grams[name].update(x, y, cell)
        rows.clear()
        kept += pending
        pending.clear()

    def _key(self, key: str) -> str:
        return f"{key}/{self.label}" if self.label else key

    def _worded(self) -> Samples:
        return word(self.samples, self.prompt)

    def _longest_first(self, inputs: Samples) -> np.ndarray:
        # Batches of like length waste little on padding, and the largest comes first: if it fits,
        # all do.
        lengths = [len(str(text)) for text in inputs.inputs]
        return np.argsort(lengths, kind="stable")[::-1].copy()


def word(samples: Samples, prompt: str) -> Samples:
    """Put every sample into the words of `prompt`, which names columns: "The city of {name}".

    Raises
    ------
    ValueError
        When the prompt names a column that the samples lack.
    """
    from dataclasses import replace

    table = samples.table.assign(text=list(samples.inputs))
    try:
        texts = [prompt.format(**row) for row in table.to_dict("records")]
    except (KeyError, IndexError) as error:
        msg = f"the prompt {prompt!r} names {error}; the samples have {', '.join(table.columns)}"
        raise ValueError(msg) from error
    return replace(samples, inputs=texts)
