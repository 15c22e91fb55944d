"""Sufficient statistics of ridge regression: accumulate, merge, save, load.

For one site and pool, and for every cell (a group, a fold, or a pair of them), the Gram matrix of
[x - c, 1, y - e]: counts, sums, X'X, X'Y and Y'Y in one symmetric matrix. The shift (c, e) is
fixed by the first batch and keeps large means from cancelling; it drops out of every result.
Sums are unnormalised, so that merging is addition.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from numpy.typing import ArrayLike

from . import _ops

PRODUCTS = ("float64", "float32")


class Gram:
    """Statistics of rows of width `dim` against `targets` targets, in `cells` cells.

    Parameters
    ----------
    dim
        Width d of the rows.
    targets
        Number k of targets.
    cells
        Number of cells; statistics are kept for each and add up.
    products
        `float64` multiplies in float64. `float32` is twice as quick and good to about 1e-6 of
        sqrt(G_ii G_jj); sums are float64 in both.
    out
        Memory for `matrix`, if it is to lie in a tensor that is there.
    device
        Where `matrix` lies and rows come from.

    Attributes
    ----------
    matrix : Tensor
        float64 [cells, p, p] with p = d + 1 + k; the upper triangle stays zero.
    shift : Tensor or None
        float64 [d + k]: what is subtracted from the rows and the targets.
    """

    def __init__(
        self,
        dim: int,
        targets: int,
        cells: int = 1,
        *,
        products: str = "float64",
        out: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if products not in PRODUCTS:
            raise ValueError(f"products must be one of {PRODUCTS}; got {products!r}")
        self.dim, self.targets, self.cells, self.products = dim, targets, cells, products
        p = dim + 1 + targets
        if out is None:
            out = _ops.empty(cells, p, p, dtype=torch.float64, device=torch.device(device))
        if out.shape != (cells, p, p) or out.dtype != torch.float64:
            raise ValueError(
                f"out must be float64 {[cells, p, p]}; got {out.dtype} {list(out.shape)}"
            )
        self.matrix = out.zero_()
        self.shift: torch.Tensor | None = None
        self._target_shift: tuple[float, ...] | None = None  # its end, where no device holds it

    def update(self, x: ArrayLike, y: ArrayLike, cell: ArrayLike | None = None) -> Gram:
        """Add a batch of rows, of torch or NumPy.

        Parameters
        ----------
        x
            [n, d] rows: float32, float16, bfloat16 or float64.
        y
            [n, k] targets, taken as float64.
        cell
            int64 [n] cell of each row, which a Gram of one cell does without. Rows with a negative
            cell are left out.

        Raises
        ------
        ValueError
            When shapes disagree, `x` is on another device, or `cell` is missing, not int64 [n] or
            out of range.
        """
        update([self], [x], y, cell)
        return self

    def begin(self, features: torch.Tensor, targets: tuple[float, ...]) -> None:
        """Fix the shift, float64 [d] on the device of `matrix` and k numbers."""
        self._target_shift = targets
        end = torch.tensor(targets, dtype=torch.float64)
        self.shift = torch.cat([features, _ops.send(end, features.device)])

    @property
    def target_shift(self) -> tuple[float, ...]:
        """The end of the shift, which is fixed."""
        if self._target_shift is None:
            assert self.shift is not None
            self._target_shift = tuple(self.shift[self.dim :].tolist())
        return self._target_shift

    def _require_fit(self, x: torch.Tensor, y: torch.Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.dim or y.shape != (len(x), self.targets):
            msg = (
                f"expected rows [n, {self.dim}] and targets [n, {self.targets}]; got "
                f"{list(x.shape)} and {list(y.shape)}"
            )
            raise ValueError(msg)
        if x.device != self.matrix.device:
            msg = f"rows are on {x.device} and this Gram is on {self.matrix.device}"
            raise ValueError(f"{msg}: make it with device={str(x.device)!r}, or move the rows")

    def cpu(self) -> Gram:
        """Return the statistics on the CPU; themselves if they are there."""
        if self.matrix.is_cpu:
            return self
        moved = Gram(self.dim, self.targets, self.cells, products=self.products)
        moved.matrix.copy_(self.matrix)
        moved.shift = None if self.shift is None else self.shift.cpu()
        return moved

    @property
    def count(self) -> torch.Tensor:
        """Number of rows in each cell: float64 [cells]."""
        return self.matrix[:, self.dim, self.dim]

    def __add__(self, other: Gram) -> Gram:
        """Merge two accumulators of the same shape, on the CPU; their shifts may differ."""
        mine, theirs = (self.dim, self.targets, self.cells), (other.dim, other.targets, other.cells)
        if mine != theirs:
            raise ValueError(f"cannot add Grams of (dim, targets, cells) {mine} and {theirs}")
        both = Gram(*mine, products=min(self.products, other.products))  # the coarser of the two
        a, b = self.cpu(), other.cpu()
        if a.shift is None or b.shift is None:
            both.shift = b.shift if a.shift is None else a.shift
            both.matrix = a.matrix + b.matrix
        else:
            both.shift = a.shift
            both.matrix = a.matrix + b._about(a.shift)
        return both

    def save(self, path: str | Path) -> None:
        """Write the statistics to a safetensors file."""
        save({"": self}, path)

    @staticmethod
    def load(path: str | Path) -> Gram:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            When the file holds several, as a run's does, or cannot be read.
        """
        grams = load(path)
        if "" not in grams:
            names = ", ".join([*grams][:5]) + (", ..." if len(grams) > 5 else "")
            msg = f"{path} holds the statistics of {len(grams)} sites ({names}): open its run"
            raise ValueError(
                f"{msg} with gf.open(folder).grams, or take one of geofast.gram.load(path)"
            )
        return grams[""]

    def _about(self, shift: torch.Tensor) -> torch.Tensor:
        # [x - c', 1, y - e'] = [x - c, 1, y - e] + delta * 1, so the Gram changes by rank two.
        assert self.shift is not None
        ones = self.dim
        delta = torch.zeros(self.matrix.shape[1], dtype=torch.float64)
        delta[:ones], delta[ones + 1 :] = (self.shift - shift).split([self.dim, self.targets])
        # The row and the column of the ones, whole: only the lower triangle is stored.
        sums = torch.cat([self.matrix[:, ones, : ones + 1], self.matrix[:, ones + 1 :, ones]], 1)
        cross = sums[:, :, None] * delta
        n = self.count[:, None, None]
        return (self.matrix + cross + cross.mT + n * delta[:, None] * delta).tril()


def update(
    grams: Sequence[Gram], rows: Sequence[ArrayLike], y: ArrayLike, cell: ArrayLike | None = None
) -> None:
    """Add a batch to many Grams: `rows[i]` [n, d_i] to `grams[i]`.

    As `Gram.update` for each. On a GPU one launch serves all of one width, and the host waits for
    nothing when `y` and `cell` are on the CPU.
    """
    x, y = [torch.as_tensor(r) for r in rows], torch.as_tensor(y)
    for gram, r in zip(grams, x, strict=True):
        gram._require_fit(r, y)
    cell = _cells(cell, len(y), min(gram.cells for gram in grams))
    if not len(y):
        return
    y = y.double()
    new = any(gram.shift is None for gram in grams)
    mean = tuple(y[:_SHIFT_ROWS].mean(0).tolist()) if new else ()
    together = defaultdict(list)
    for gram, r in zip(grams, x, strict=True):
        if gram.shift is None:
            gram.begin(r[:_SHIFT_ROWS].double().mean(0), mean)
        e = gram.target_shift
        together[r.device, r.dtype, gram.dim, gram.cells, gram.products, e].append((gram, r))
    for (device, _, _, cells, _, e), members in together.items():
        batch = Batch.of(y, cell, cells, e, device)
        batch.add([gram for gram, _ in members], [r for _, r in members])


@dataclass(frozen=True)
class Batch:
    """What statistics take of a batch beside its rows, on the device of the rows."""

    z: torch.Tensor
    """float64 [n, 1 + k]: ones, and targets minus their shift."""
    order: torch.Tensor
    """int64 [n]: the rows in the order of their cells."""
    offsets: torch.Tensor
    """int64 [cells + 1]: where in `order` each cell begins, and the end."""

    @classmethod
    def of(
        cls,
        y: torch.Tensor,
        cell: torch.Tensor,
        cells: int,
        target_shift: Sequence[float],
        device: torch.device,
    ) -> Batch:
        """Make one from targets float64 [n, k] and cells int64 [n] of any device, without waiting.

        Cells that are negative or not below `cells` are left out.
        """
        order = torch.argsort(cell, stable=True)
        ends = torch.arange(cells + 1, device=cell.device)
        offsets = torch.searchsorted(cell[order], ends)
        about = y - _ops.send(torch.tensor(target_shift, dtype=torch.float64), y.device)
        z = torch.cat([y.new_ones(len(y), 1), about], 1)
        if device.type == "cpu":
            offsets = offsets.cpu()  # as z and order; a GPU's kernels fetch them
        return cls(_ops.send(z, device), _ops.send(order, device), offsets)

    def add(self, grams: Sequence[Gram], rows: Sequence[torch.Tensor]) -> None:
        """Add `rows[i]` [n, d] to `grams[i]`, all of one kind and with the shifts of this batch."""
        shifts = [gram.shift[: gram.dim] for gram in grams if gram.shift is not None]
        _ops.grams(
            rows, shifts, self.z, self.order, self.offsets, [gram.matrix for gram in grams],
            products=grams[0].products,
        )  # fmt: skip


def _cells(cell: ArrayLike | None, n: int, count: int) -> torch.Tensor:
    if cell is None and count > 1:
        raise ValueError(f"this Gram has {count} cells: say the cell of every row, cell=")
    found = torch.zeros(n, dtype=torch.int64) if cell is None else torch.as_tensor(cell)
    _check_int64("cell", found, n, "row")
    if n and int(found.max()) >= count:
        raise ValueError(f"cell {int(found.max())} is out of range: this Gram has {count} cells")
    return found


def _check_int64(name: str, value: torch.Tensor, n: int, each: str) -> None:
    if value.shape != (n,) or value.dtype != torch.int64:
        raise ValueError(
            f"{name} must be int64 [{n}], one number for each {each}; got {value.dtype} "
            f"{list(value.shape)}"
        )


_SHIFT_ROWS = 256  # enough for a shift that is close to the mean; read once


@dataclass(frozen=True)
class Totals:
    """Statistics of a cross-validation: all rows, and what each training part leaves out."""

    total: torch.Tensor
    """float64 [p, p]: the sum over all cells, lower triangle."""
    held: torch.Tensor
    """float64 [folds, p, p]: the held-out part of every fold, lower triangle."""
    shift: torch.Tensor
    """float64 [d + k]."""


def totals(gram: Gram, folds: torch.Tensor | None = None) -> Totals:
    """Sum cells into folds, where the statistics lie.

    Parameters
    ----------
    gram
        Statistics by cell.
    folds
        int64 [cells]: the fold that holds each cell out; a negative one leaves the cell out of
        everything. None: each cell is a fold of its own.

    Raises
    ------
    ValueError
        For an empty Gram, or when `folds` is not int64 [cells].
    """
    if gram.shift is None:
        raise ValueError("this Gram is empty: call update() with rows before solving")
    if folds is None:
        return Totals(gram.matrix.sum(0), gram.matrix, gram.shift)
    _check_int64("folds", folds, gram.cells, "cell of the Gram")
    folds, device = folds.cpu(), gram.matrix.device
    held = gram.matrix.new_zeros(int(folds.max()) + 1, *gram.matrix.shape[1:])
    cells = _ops.send((folds >= 0).nonzero()[:, 0], device)
    held.index_add_(0, _ops.send(folds[folds >= 0], device), gram.matrix[cells])
    return Totals(held.sum(0), held, gram.shift)


def save(grams: Mapping[str, Gram], path: str | Path) -> None:
    """Write several accumulators into one safetensors file, under their names."""
    from safetensors.torch import save_file

    tensors, kinds = {}, {}
    for name, gram in grams.items():
        if gram.shift is None:
            raise ValueError(f"the Gram {name!r} is empty: there is nothing to save")
        gram = gram.cpu()
        assert gram.shift is not None
        tensors[f"{name}/matrix"], tensors[f"{name}/shift"] = gram.matrix, gram.shift
        kinds[name] = {"dim": gram.dim, "targets": gram.targets, "products": gram.products}
    path = Path(path)
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"geofast.gram": json.dumps(kinds)})
    path.chmod(mode)  # which safetensors narrows to the owner


def load(path: str | Path) -> dict[str, Gram]:
    """Read what `save` wrote.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    ValueError
        When the file is not one of ours, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    grams = {}
    try:
        with safe_open(path, "pt") as file:
            kinds = (file.metadata() or {})["geofast.gram"]
            for name, kind in dict(json.loads(kinds)).items():
                matrix = file.get_tensor(f"{name}/matrix")
                gram = Gram(kind["dim"], kind["targets"], 0, products=kind["products"])
                gram.cells, gram.matrix = len(matrix), matrix
                gram.shift = file.get_tensor(f"{name}/shift")
                grams[name] = gram
    except (SafetensorError, KeyError, TypeError, ValueError) as err:
        msg = (
            f"{path} holds no geofast statistics that can be read ({type(err).__name__}: {err}); "
            "write it anew with Gram.save"
        )
        raise ValueError(msg) from err
    return grams
