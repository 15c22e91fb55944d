"""One pass of a model over its samples: batches in, pooled rows or statistics out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from .capture import NonFiniteError, Pools, capture
from .data import SampleError, Samples, Skipped
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
    room: torch.Tensor | None = None
    """Float32 [prompts, m] on disk, for rows too large for memory."""


def extract(
    model: Model,
    inputs: Mapping[str, Samples],
    storage: Storage,
    *,
    sites: str | Sequence[str] | None,
    pool: Pools,
    batch_size: int,
    workers: int,
    strict: bool,
    progress: bool,
) -> Extracted:
    """Run the model once over every sample and prompt; `inputs` is what `worded` returns.

    Raises
    ------
    ValueError
        When no sample survives, or (with `strict`) at the first that does not.
    FloatingPointError
        For NaN or infinite activations, naming site, sample and dtype.
    """
    bar = tqdm(
        total=sum(map(len, inputs.values())), unit="sample", disable=not progress, desc=model.name,
        mininterval=0.2 if sys.stderr.isatty() else 15,  # a log file needs no animation
    )  # fmt: skip
    found: Extracted | None = None
    with bar:
        for i, (label, samples) in enumerate(inputs.items()):
            room = None if storage.room is None else storage.room[i]
            one = _Pass(model, samples, storage, room, batch_size, workers, strict, label)
            part = one.run(sites, pool, bar)
            found = part if found is None else _join(found, part)
    assert found is not None
    return found


def _join(a: Extracted, b: Extracted) -> Extracted:
    # Several prompts mean text, and `usable` has seen to it that every text goes through.
    rows = None if a.rows is None else {**a.rows, **(b.rows or {})}
    grams = None if a.grams is None else {**a.grams, **(b.grams or {})}
    return Extracted(a.kept, rows, grams, a.skipped)


@dataclass
class _Pass:
    model: Model
    samples: Samples
    storage: Storage
    room: torch.Tensor | None
    batch_size: int
    workers: int
    strict: bool
    label: str

    def run(self, sites: str | Sequence[str] | None, pool: Pools, bar: Any) -> Extracted:
        text = self.samples.kind == "text"
        order = self._longest_first() if text else np.arange(len(self.samples))
        capacity = _FLUSH + self.batch_size if self.storage.kind == "gram" else len(self.samples)
        rows = Rows(capacity, self.room)
        rows.label = self.label
        grams: dict[str, Gram] = {}
        pending: list[int] = []
        kept: list[int] = []
        skipped: list[Skipped] = []
        stream = batches(
            self.samples, order, self.batch_size,
            transform=self.model.transform, workers=self.workers, strict=self.strict,
        )  # fmt: skip
        with capture(self.model, sites, pool, rows=rows):
            for batch in stream:
                skipped += batch.skipped
                if len(batch.index):
                    forward(self.model, self.samples, batch.index, batch.inputs, rows)
                    pending += batch.index.tolist()
                if self.storage.kind == "gram" and rows.n >= _FLUSH:
                    self._flush(rows, grams, pending, kept)
                bar.update(len(batch.index) + len(batch.skipped))
        if self.storage.kind == "gram":
            self._flush(rows, grams, pending, kept)
            return Extracted(np.sort(kept), None, grams, skipped)
        short = [key for key in rows if len(rows[key]) != len(pending)]
        if short:
            got = len(rows[short[0]])
            raise RuntimeError(f"{short[0]} has {got} rows for {len(pending)} samples")
        if text:
            rows.reorder(torch.from_numpy(np.argsort(pending, kind="stable")))
        return Extracted(np.sort(pending), dict(rows), None, skipped)

    def _flush(
        self, rows: Rows, grams: dict[str, Gram], pending: list[int], kept: list[int]
    ) -> None:
        if not pending:
            return
        index = torch.tensor(pending)
        y, cell = self.storage.targets[index], self.storage.cell[index]
        for key in rows:
            x = rows[key]
            if key not in grams:
                grams[key] = Gram(x.shape[1], y.shape[1], int(self.storage.cell.max()) + 1)
            grams[key].update(x, y, cell)
        rows.clear()
        kept += pending
        pending.clear()

    def _longest_first(self) -> np.ndarray:
        # Batches of like length waste little on padding, and the largest comes first: if it fits,
        # all do.
        lengths = [len(str(text)) for text in self.samples.inputs]
        return np.argsort(lengths, kind="stable")[::-1].copy()


# ------ one batch


def forward(
    model: Model, samples: Samples, index: NDArray[np.int64], inputs: Sequence[Any], rows: Rows
) -> None:
    """Run the model over the transformed inputs of the samples at `index`, captured in `rows`.

    Where images have several prompts, `rows` is told which one it is that the model reads.

    Raises
    ------
    FloatingPointError, ValueError, RuntimeError
        As `capture`, the model and its `collate` do, with the sample named.
    """
    label, prompts = rows.label, model.prompts

    def say_which(i: int) -> None:
        rows.label = prompts[i] if len(prompts) > 1 else label

    try:
        model.forward(model.to_device(model.collate(list(inputs))), say_which)
    except NonFiniteError as error:
        add_sentence(error, f"That is {samples.where(index[error.sample])}.")
        raise
    except (ValueError, RuntimeError) as error:
        add_sentence(error, _blame(samples, index, inputs))
        raise
    finally:
        rows.label = label


def first(model: Model, samples: Samples) -> tuple[NDArray[np.int64], list[Any]]:
    """Return the index [1] and the transformed input [1] of the first sample that can be read.

    Raises
    ------
    ValueError
        When there is none.
    """
    stream = batches(samples, range(len(samples)), 1, transform=model.transform)
    batch = next(batch for batch in stream if batch.inputs)
    stream.close()
    return batch.index, batch.inputs


def _blame(samples: Samples, index: NDArray[np.int64], inputs: Sequence[Any]) -> str:
    """Say which samples of a batch that was refused are unlike the others, or which it held."""
    # An array has a shape, a PIL image a size.
    sizes = [getattr(x, "shape", getattr(x, "size", None)) for x in inputs]
    usual = Counter(sizes).most_common(1)[0][0]
    odd = [i for i, size in enumerate(sizes) if size != usual]
    if odd:
        names = [f"{samples.where(index[i])} ({_size(sizes[i])})" for i in odd]
        return f"Most of the batch is {_size(usual)}, but not {_some(names)}."
    return f"The batch held {_some([samples.where(i) for i in index])}."


def _size(size: Any) -> str:
    return " x ".join(map(str, size))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def add_sentence(error: Exception, sentence: str) -> None:
    """Lengthen an error's message. `add_note` needs Python 3.11, and `str` does not show it."""
    error.args = (f"{str(error).rstrip('.')}. {sentence}", *error.args[1:])


# ------ text


def worded(samples: Samples, prompts: str | Sequence[str] | None) -> dict[str, Samples]:
    """Put text into the words of every prompt; by the prompt, or by "" where there is one.

    Images stay as they are: their prompts go into the model (`ready`).

    Raises
    ------
    ValueError
        For no prompt, one twice, or one that cannot be filled in.
    """
    many = _several(prompts, "{text}")
    if samples.kind == "image":
        return {"": samples}
    return {prompt if len(many) > 1 else "": _word(samples, prompt) for prompt in many}


def _several(prompts: str | Sequence[str] | None, default: str) -> Sequence[str]:
    many = [default] if prompts is None else [prompts] if isinstance(prompts, str) else prompts
    twice = [p for p, times in Counter(many).items() if times > 1]
    if twice:
        raise ValueError(f"the prompt {twice[0]!r} is given twice; leave one out")
    if not many:
        raise ValueError("prompts= is empty; give one, such as '{text}', or leave it out")
    return many


def ready(
    model: Model,
    samples: Samples,
    prompts: str | Sequence[str] | None,
    sites: str | Sequence[str] | None,
) -> Model:
    """Return the model as it reads `samples`, up to the deepest of `sites`.

    Raises
    ------
    ValueError
        When it does not read them, takes no prompt beside an image, or has no such site.
    """
    model = model.reading(samples.kind)
    if samples.kind == "image" and prompts is not None:
        model = model.asking(_several(prompts, ""))
    return model.until(model.sites(sites))


def _word(samples: Samples, prompt: str) -> Samples:
    """Put every sample into the words of `prompt`, which names columns: "The city of {name}"."""
    table = samples.table.assign(text=list(samples.inputs))
    columns = ", ".join(map(str, table.columns))
    try:
        if not any(name is not None for _, name, _, _ in Formatter().parse(prompt)):
            raise ValueError("it names no column, so every sample would read the same")
        texts = [prompt.format(**row) for row in table.to_dict("records")]
    except (KeyError, IndexError) as error:
        msg = f"the prompt {prompt!r} names {error}; the samples have {columns}"
        raise ValueError(msg) from error
    except (AttributeError, TypeError, ValueError) as error:
        msg = (
            f"the prompt {prompt!r} cannot be filled in: {error}; write {{column}} with one of "
            f"{columns}, and {{{{ or }}}} for a brace"
        )
        raise ValueError(msg) from error
    return replace(samples, inputs=texts)


def usable(
    model: Model, inputs: Mapping[str, Samples], batch_size: int, strict: bool
) -> tuple[NDArray[np.int64], tuple[Skipped, ...]]:
    """Positions of the texts that the model takes with every prompt, and why not the others.

    A text without a token, or longer than the model's context, would stop a whole batch.

    Raises
    ------
    SampleError
        With `strict`, at the first that it does not take.
    ValueError
        When it takes none.
    """
    reasons: dict[int, str] = {}
    for samples in inputs.values():
        for i, reason in _refused(model, samples.inputs, batch_size):
            if strict:
                raise SampleError(samples.where(i), reason)
            reasons.setdefault(i, reason)
    samples = next(iter(inputs.values()))
    skipped = tuple(Skipped(samples.where(i), reasons[i]) for i in sorted(reasons))
    if len(reasons) == len(samples):
        raise ValueError(f"none of the {len(samples)} samples could be used; {skipped[0]}")
    return np.setdiff1d(np.arange(len(samples)), list(reasons)), skipped


def _refused(model: Model, texts: Sequence[str], batch_size: int) -> Iterator[tuple[int, str]]:
    for start in range(0, len(texts), batch_size):
        part = list(texts[start : start + batch_size])
        part = [model.transform(text) for text in part] if model.transform else part
        try:
            model.collate(part)
        except ValueError:
            for i, text in enumerate(part, start):
                try:
                    model.collate([text])
                except ValueError as error:
                    yield i, str(error)
