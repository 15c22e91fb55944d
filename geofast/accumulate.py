"""The statistics of a pass: those of all sites at once, on their devices, each row once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from ._ops import send
from .batching import Budget, out_of_memory
from .gram import Batch, Gram, update
from .models.layout import Layout
from .streams import Aside

_SHIFT_TOKENS = 1024  # enough for a shift that is close to the mean; read once


class Statistics:
    """A Gram for every "site/pool" that rows come of.

    Parameters
    ----------
    cells
        Cells of each.
    budget
        Says how many rows are added at once, and is told when memory takes fewer.
    aside
        Where rows are made on a GPU, and statistics added to beside the model.

    Attributes
    ----------
    grams : dict[str, Gram]
        On the devices of their rows, or on the CPU where these have no room.
    """

    def __init__(self, cells: int, budget: Budget, aside: Aside) -> None:
        self._cells, self._budget, self._aside = cells, budget, aside
        self.grams: dict[str, Gram] = {}
        self.tokens = TokenStatistics(cells, self.grams)

    def add(self, rows: Mapping[str, torch.Tensor], y: torch.Tensor, cell: torch.Tensor) -> None:
        """Add `rows` [n, d] with targets `y` [n, k] and cells [n], negative for none.

        Raises
        ------
        RuntimeError
            When memory does not take a single row; the site and the device are named.
        """
        keys = defaultdict(list)
        for key, x in rows.items():
            if key not in self.grams:
                self.grams[key] = self._new(key, x, y.shape[1])
            keys[self.grams[key].matrix.device].append(key)
        for device, here in keys.items():
            try:
                with self._aside.beside(device):  # and rows are kept until it is joined
                    self._add({key: rows[key] for key in here}, y, cell)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                raise _too_large(here, device) from error

    def _new(self, key: str, x: torch.Tensor, targets: int) -> Gram:
        """Make statistics where their rows are, or where that has no room for them, on the CPU."""
        try:
            return Gram(x.shape[1], targets, self._cells, device=x.device)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if x.is_cpu:
                raise _too_large([key], x.device) from error
        self._budget.crowded = str(x.device)
        return self._new(key, x[:0].cpu(), targets)

    def _add(self, rows: Mapping[str, torch.Tensor], y: torch.Tensor, cell: torch.Tensor) -> None:
        """Add rows to statistics of one device, fewer at a time where memory runs out."""
        grams, done = [self.grams[key] for key in rows], 0
        while done < len(y):
            part = slice(done, done + (self._budget.rows or len(y)))
            before = [gram.count.clone() for gram in grams]
            if not self._adds(grams, [x[part] for x in rows.values()], y[part], cell[part]):
                # Cells are added one after the other: those that were, by their counts, have all
                # their rows of this part, and are not added again.
                for (key, x), gram, count in zip(rows.items(), grams, before, strict=True):
                    added = (gram.count > count).nonzero()[:, 0].cpu()
                    rest = torch.where(torch.isin(cell[part], added), -1, cell[part])
                    self._add({key: x[part]}, y[part], rest)
            done = part.stop

    def _adds(
        self, grams: list[Gram], xs: list[torch.Tensor], y: torch.Tensor, cell: torch.Tensor
    ) -> bool:
        """Try to add; where memory runs out, halve the budget and return False."""
        try:
            # Rows or statistics are on the CPU where their device had no room for them.
            where = grams[0].matrix.device
            update(grams, [x.to(where) for x in xs], y, cell)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or len(y) == 1:
                raise
        else:
            return True
        # Not inside of `except`: the error holds tensors until it is gone.
        self._budget.rows = len(y) // 2
        torch.cuda.empty_cache()
        return False


def _too_large(keys: Sequence[str], device: torch.device) -> RuntimeError:
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return RuntimeError(
        f"the statistics of {keys[0]}{more} do not fit into the memory of {device}: keep rows "
        "instead, storage='rows' (--storage), or take fewer sites, pools or groups"
    )


class TokenStatistics:
    """Statistics whose rows are the tokens of a batch, added to while the model runs.

    Nothing with a token axis can wait for the batch to be over. When memory runs out under way,
    some sites have its tokens already: they leave those samples out when they come again.

    Parameters
    ----------
    cells
        Cells of each Gram.
    grams
        Where they are.
    """

    def __init__(self, cells: int, grams: dict[str, Gram]) -> None:
        self._cells, self._grams = cells, grams
        self._had: dict[str, set[int]] = {}
        self._done: list[str] = []
        self._batches: dict[tuple[object, ...], tuple[Layout, Batch]] = {}

    def begin(self, samples: Sequence[int], y: torch.Tensor, cell: torch.Tensor) -> None:
        """Say whose tokens come next: the numbers of samples, targets [n, k] and cells [n]."""
        self._samples, self._y, self._cell = samples, y.double(), cell
        self._done.clear()
        self._batches.clear()

    def fail(self) -> None:
        """Say that the batch was not finished and will come again, whole or in parts."""
        for key in self._done:
            self._had.setdefault(key, set()).update(self._samples)

    def take(self, key: str, hidden: torch.Tensor, layout: Layout, role: str) -> None:
        """Add the tokens of `role`; hidden states are [tokens, d], of every sample of the batch."""
        chosen = layout.has(role).flatten()
        if key not in self._grams:
            gram = Gram(hidden.shape[1], self._y.shape[1], self._cells, device=hidden.device)
            gram.begin(_mean(hidden, chosen), tuple(self._y.mean(0).tolist()))
            self._grams[key] = gram  # and not sooner: memory may have run out
        gram = self._grams[key]
        batch = self._batch(key, gram, layout, role, chosen)
        before = gram.count.clone()
        try:
            batch.add([gram], [hidden])
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                # Cells are added one after the other, whole.
                added = {*(gram.count > before).nonzero()[:, 0].tolist()}
                who = zip(self._samples, self._cell.tolist(), strict=True)
                self._had.setdefault(key, set()).update(i for i, c in who if c in added)
            raise
        self._done.append(key)

    def _batch(
        self, key: str, gram: Gram, layout: Layout, role: str, chosen: torch.Tensor
    ) -> Batch:
        had = self._had.get(key, set()).intersection(self._samples)
        # Every site of a tower has the same tokens.
        kind = (id(layout), role, gram.target_shift, *sorted(had))
        if kind not in self._batches:
            cell = self._cell
            if had:
                again = torch.tensor([i in had for i in self._samples])
                cell = cell.masked_fill(again, -1)
            sample, device = layout.sample, chosen.device
            of_token = torch.where(chosen, send(cell, device)[sample], -1)
            y = send(self._y, device)[sample]
            made = Batch.of(y, of_token, self._cells, gram.target_shift, device)
            # With the layout: one that is gone would leave its id to another.
            self._batches[kind] = layout, made
        return self._batches[kind][1]


def _mean(hidden: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Mean of the first tokens that are chosen, in float64; it need not be that of all."""
    x, some = hidden[:_SHIFT_TOKENS].double(), chosen[:_SHIFT_TOKENS, None]
    return torch.where(some, x, 0.0).sum(0) / some.sum().clamp_min(1)
