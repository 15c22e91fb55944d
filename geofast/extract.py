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

from .accumulate import Statistics, TokenStatistics
from .batching import Budget, Lengths, longest_first, numbers, out_of_memory, token_counts
from .capture import NonFiniteError, NoTokenError, Pools, capture
from .data import SampleError, Samples, Skipped
from .data.stream import Batch, batches
from .gram import Gram
from .models import Model
from .rows import Rows
from .survey import shapes_of, token_count, up_to

_FLUSH = (
    2048  # rows of a site that are added to its Grams at once: fewer would read the Grams too often
)
_TOKENIZED = 256  # texts that are tried together


def rows_at_once(budget: Budget, lengths: Mapping[str, Lengths]) -> int:
    """Return how many rows of a site there may be before they are added to its statistics."""
    batch = max(max(budget.sizes(-np.sort(-one.expected))) for one in lengths.values())
    return _FLUSH + batch


@dataclass
class Extracted:
    """What a pass left: `rows` [n, d] or `grams`, by "site/pool" or "site/pool/prompt".

    They lie on the CPU, or if they stay, on the device of their layer.
    """

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
    stay: bool = False
    """Keep rows and statistics where their layer lives."""
    cells: int | None = None
    """How many cells there are; None where the last has a sample."""

    @property
    def count(self) -> int:
        """Number of cells."""
        return int(self.cell.max()) + 1 if self.cells is None else self.cells


def extract(
    model: Model,
    inputs: Mapping[str, Samples],
    storage: Storage,
    *,
    sites: str | Sequence[str] | None,
    pool: Pools,
    lengths: Mapping[str, Lengths],
    budget: Budget,
    workers: int,
    strict: bool,
    progress: bool,
) -> Extracted:
    """Run the model once over every sample and prompt; `inputs` is what `worded` returns.

    Batches are formed by `budget`, from `lengths` by prompt; where memory runs out, in the model or
    in what is added to statistics, the budget shrinks, and stays so.

    Raises
    ------
    ValueError
        When no sample survives, or (with `strict`) at the first that does not.
    FloatingPointError
        For NaN or infinite activations, naming site, sample and dtype.
    RuntimeError
        When memory does not take a single sample.
    """
    bar = tqdm(
        total=sum(map(len, inputs.values())), unit="sample", disable=not progress, desc=model.name,
        mininterval=0.2 if sys.stderr.isatty() else 15,  # a log file needs no animation
    )  # fmt: skip
    found: Extracted | None = None
    with bar:
        for i, (label, samples) in enumerate(inputs.items()):
            room = None if storage.room is None else storage.room[i]
            one = _Pass(
                model, samples, storage, room, lengths[label], budget, workers, strict, label
            )
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
    lengths: Lengths
    budget: Budget
    workers: int
    strict: bool
    label: str

    def run(self, sites: str | Sequence[str] | None, pool: Pools, bar: Any) -> Extracted:
        order = longest_first(self.lengths.expected)
        sizes = self.budget.sizes(self.lengths.expected[order])
        of_rows = self.storage.kind == "rows"
        capacity = len(self.samples) if of_rows else rows_at_once(self.budget, {"": self.lengths})
        rows = Rows(capacity, self.room, stay=self.storage.stay)
        rows.label = self.label
        statistics = Statistics(self.storage.count, self.budget, rows.aside)
        if not of_rows:
            rows.take_tokens = statistics.tokens.take
        pending: list[int] = []
        kept: list[int] = []
        skipped: list[Skipped] = []
        stream = batches(
            self.samples, order, sizes,
            transform=self.model.transform, workers=self.workers, strict=self.strict,
        )  # fmt: skip
        with capture(self.model, sites, pool, rows=rows):
            for batch in stream:
                skipped += batch.skipped
                pending += self._feed(batch, rows, statistics.tokens)
                if rows.unverified >= _FLUSH:
                    verify(rows, self.samples, pending)
                if not of_rows and rows.n >= _FLUSH:
                    kept += pending
                    self._flush(rows, statistics, pending)
                bar.update(len(batch.index) + len(batch.skipped))
            verify(rows, self.samples, pending)
        crowded = dict.fromkeys(filter(None, (self.budget.crowded, rows.crowded)))
        self.budget.crowded = " and ".join(crowded)
        kept += pending
        if not of_rows:
            if pending:
                self._flush(rows, statistics, pending)
            rows.aside.join()  # the end of what runs beside the model
            return Extracted(np.sort(kept), None, statistics.grams, skipped)
        short = [key for key in rows if len(rows[key]) != len(kept)]
        if short:
            got = len(rows[short[0]])
            raise RuntimeError(f"{short[0]} has {got} rows for {len(kept)} samples")
        if kept != sorted(kept):
            rows.reorder(torch.from_numpy(np.argsort(kept, kind="stable")))
        return Extracted(np.sort(kept), dict(rows), None, skipped)

    def _feed(self, batch: Batch, rows: Rows, tokens: TokenStatistics) -> list[int]:
        """Run a loaded batch in parts that fit the budget; return its samples in that order."""
        lengths = self.lengths.of(batch.index, batch.inputs)
        order, done = longest_first(lengths), 0
        while done < len(order):
            longest = int(lengths[order[done]])
            part = order[done : done + self.budget.fit(longest)]
            index = torch.from_numpy(batch.index[part])
            tokens.begin(index.tolist(), self.storage.targets[index], self.storage.cell[index])
            if self._runs(batch.index[part], [batch.inputs[i] for i in part], rows):
                self.budget.note(len(part))
                done += len(part)
            else:
                tokens.fail()
                self.budget.shrink(len(part), longest)
        return list(batch.index[order].tolist())

    def _runs(self, index: NDArray[np.int64], inputs: list[Any], rows: Rows) -> bool:
        """Run a part; when memory runs out, leave no row of it and return False."""
        mark = rows.mark()
        try:
            forward(self.model, self.samples, index, inputs, rows)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        else:
            return True
        # Not inside of `except`: the error holds the tensors of the pass until it is gone.
        rows.rewind(mark)
        rows.aside.settle()
        torch.cuda.empty_cache()
        return False

    def _flush(self, rows: Rows, statistics: Statistics, pending: list[int]) -> None:
        """Add the rows of samples `pending` to the statistics, and forget both."""
        index = torch.tensor(pending)
        statistics.add(rows, self.storage.targets[index], self.storage.cell[index])
        rows.clear()
        pending.clear()


# ------ one batch


def forward(
    model: Model, samples: Samples, index: NDArray[np.int64], inputs: Sequence[Any], rows: Rows
) -> None:
    """Run the model over the transformed inputs of the samples at `index`, captured in `rows`.

    Where images have several prompts, `rows` is told which one it is that the model reads.

    Raises
    ------
    FloatingPointError, ValueError, RuntimeError
        As `capture`, the model and its `collate` do, with the sample named; for a single sample
        that memory does not take, RuntimeError.
    """
    label, prompts = rows.label, model.prompts

    def say_which(i: int) -> None:
        rows.label = prompts[i] if len(prompts) > 1 else label

    try:
        model.forward(model.to_device(model.collate(list(inputs))), say_which)
    except NonFiniteError as error:
        add_sentence(error, f"That is {samples.where(index[error.sample])}.")
        raise
    except (ValueError, RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            add_sentence(error, _blame(samples, index, inputs))
            raise
        if len(index) > 1:
            raise
        msg = (
            f"{samples.where(index[0])} does not fit into the memory of {model.device} beside "
            f"{model.name}, though it went alone: make it smaller or leave it out, load the model "
            "in a narrower dtype, or run on a device with more memory"
        )
        raise RuntimeError(msg) from error
    finally:
        rows.label = label


def verify(rows: Rows, samples: Samples, index: Sequence[int] | NDArray[np.int64]) -> None:
    """Have the rows of the samples at `index` looked into, if they have not been yet.

    Raises
    ------
    FloatingPointError, ValueError
        As `capture` does, with the sample named.
    """
    try:
        rows.verify()
    except (NonFiniteError, NoTokenError) as error:
        add_sentence(error, f"That is {samples.where(index[error.sample])}.")
        raise


@dataclass(frozen=True)
class Example:
    """What one sample showed of those to come."""

    widths: tuple[int, ...]
    """Of the rows of every site and pool."""
    tokens: int
    """How long the sample is to the model."""
    numbers: int
    """How many numbers the prepared sample holds."""


def try_one(
    model: Model,
    inputs: Mapping[str, Samples],
    lengths: Mapping[str, Lengths],
    sites: str | Sequence[str] | None,
    pool: Pools,
) -> Example:
    """Run the model over one sample, of texts the longest, before it runs over all.

    Raises
    ------
    FloatingPointError, ValueError, RuntimeError
        As `first` and `forward`.
    """
    samples, index, example = first(model, inputs, lengths)
    ran = up_to(model, model.sites(sites))
    with capture(model, sites, pool) as rows, shapes_of(model, ran) as shapes:
        forward(model, samples, index, example, rows)
        verify(rows, samples, index)
    widths = tuple(rows[key].shape[1] for key in rows)
    return Example(widths, token_count(shapes), numbers(example[0]))


def lengths_like(example: Example, samples: int) -> dict[str, Lengths]:
    """Return the lengths of images that are like the one that was tried."""
    expected = np.full(samples, example.tokens, dtype=np.int64)
    per_number = example.tokens / example.numbers if example.numbers else 0.0
    return {"": Lengths(expected, per_number)}


def first(
    model: Model, inputs: Mapping[str, Samples], lengths: Mapping[str, Lengths]
) -> tuple[Samples, NDArray[np.int64], list[Any]]:
    """Return the first sample that can be read, of texts the longest of all prompts.

    Its samples, its index [1] in them, and the transformed input [1].

    Raises
    ------
    ValueError
        When there is none.
    """
    label = max(inputs, key=lambda k: lengths[k].expected.max() if lengths else 0)
    samples = inputs[label]
    order = longest_first(lengths[label].expected) if lengths else range(len(samples))
    stream = batches(samples, order, 1, transform=model.transform)
    batch = next(batch for batch in stream if batch.inputs)
    stream.close()
    return samples, batch.index, batch.inputs


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

    Images and places stay as they are: an image's prompts go into the model (`ready`).

    Raises
    ------
    ValueError
        For no prompt, one twice, or one that cannot be filled in.
    """
    many = _several(prompts, "{text}")
    if samples.kind != "text":
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
    if samples.kind != "text" and prompts is not None:
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
    model: Model, inputs: Mapping[str, Samples], strict: bool
) -> tuple[NDArray[np.int64], tuple[Skipped, ...], dict[str, Lengths]]:
    """Positions of the texts that the model takes with every prompt, and why not the others.

    Also the lengths of those that it takes, by prompt. A text without a token, or longer than the
    model's context, would stop a whole batch.

    Raises
    ------
    SampleError
        With `strict`, at the first that it does not take.
    ValueError
        When it takes none.
    """
    reasons: dict[int, str] = {}
    counts: dict[str, NDArray[np.int64]] = {}
    for label, samples in inputs.items():
        counts[label] = np.ones(len(samples), dtype=np.int64)
        for i, tokens in _tokenized(model, samples.inputs):
            if isinstance(tokens, int):
                counts[label][i] = tokens
                continue
            if strict:
                raise SampleError(samples.where(i), tokens)
            reasons.setdefault(i, tokens)
    samples = next(iter(inputs.values()))
    skipped = tuple(Skipped(samples.where(i), reasons[i]) for i in sorted(reasons))
    if len(reasons) == len(samples):
        raise ValueError(f"none of the {len(samples)} samples could be used; {skipped[0]}")
    good = np.setdiff1d(np.arange(len(samples)), list(reasons))
    return good, skipped, {label: Lengths(count[good]) for label, count in counts.items()}


def _tokenized(model: Model, texts: Sequence[str]) -> Iterator[tuple[int, int | str]]:
    """Yield the tokens of every text, or why the model does not take it."""
    for start in range(0, len(texts), _TOKENIZED):
        part = list(texts[start : start + _TOKENIZED])
        part = [model.transform(text) for text in part] if model.transform else part
        try:
            yield from enumerate(token_counts(model.collate(part), len(part)), start)
        except ValueError:
            for i, text in enumerate(part, start):
                try:
                    yield i, token_counts(model.collate([text]), 1)[0]
                except ValueError as error:
                    yield i, str(error)
