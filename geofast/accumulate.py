"""The statistics of a pass: those of all sites at once, on their devices, each row once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from .batching import Budget, out_of_memory
from .gram import Gram, update
from .streams import Aside


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
        On the devices of their rows.
    """

    def __init__(self, cells: int, budget: Budget, aside: Aside) -> None:
        self._cells, self._budget, self._aside = cells, budget, aside
        self.grams: dict[str, Gram] = {}

    def add(self, rows: Mapping[str, torch.Tensor], y: torch.Tensor, cell: torch.Tensor) -> None:
        """Add `rows` [n, d] with targets `y` [n, k] and cells [n], negative for none.

        Raises
        ------
        RuntimeError
            When memory does not take a single row; the site and the device are named.
        """
        keys = defaultdict(list)
        for key, x in rows.items():
            keys[x.device].append(key)
        for here in keys.values():
            part = {key: rows[key] for key in here}
            try:
                with self._aside.beside(*part.values()):
                    self._add(part, y, cell)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                more = f" and {len(here) - 1} more" if len(here) > 1 else ""
                msg = (
                    f"the statistics of {here[0]}{more} do not fit into the memory of "
                    f"{part[here[0]].device}: keep rows instead, storage='rows' (--storage), or "
                    "take fewer sites, pools or groups"
                )
                raise RuntimeError(msg) from error

    def _add(self, rows: Mapping[str, torch.Tensor], y: torch.Tensor, cell: torch.Tensor) -> None:
        """Add rows of one device, fewer at a time where memory runs out."""
        for key, x in rows.items():
            if key not in self.grams:
                self.grams[key] = Gram(x.shape[1], y.shape[1], self._cells, device=x.device)
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
            update(grams, xs, y, cell)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or len(y) == 1:
                raise
        else:
            return True
        # Not inside of `except`: the error holds tensors until it is gone.
        self._budget.rows = len(y) // 2
        torch.cuda.empty_cache()
        return False
