"""What a probe found: its tables and probes, and the folder that keeps them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from . import _folder

if TYPE_CHECKING:
    from .gram import Gram
    from .subspace.measure import Protocol
    from .subspace.result import Subspace

_PAGES = 1_500_000  # bytes of the two pictures and of the page that embeds them
_PARTS = ("layers", "samples", "predictions")
_ID = ("site", "pool", "prompt")
_T = TypeVar("_T")


def key(site: str, pool: str, prompt: str = "") -> str:
    """Name of a probe or of rows: `site/pool`, or `site/pool/prompt` with a prompt label."""
    return "/".join([site, pool, prompt] if prompt else [site, pool])


@dataclass(frozen=True, eq=False, repr=False)
class Probe:
    """A linear map from pooled hidden states to targets: x @ coef + intercept.

    Attributes
    ----------
    site, pool, prompt : str
        Where the rows are read; `prompt` is empty when there was one prompt or none.
    targets : tuple of str
        Names of the k targets, degrees for latitude and longitude.
    alpha : float
        The ridge penalty.
    coef : Tensor, float64 [d, k]
    intercept : Tensor, float64 [k]
    """

    site: str
    pool: str
    prompt: str
    targets: tuple[str, ...]
    alpha: float
    coef: torch.Tensor
    intercept: torch.Tensor

    def __post_init__(self) -> None:
        k = len(self.targets)
        if self.coef.ndim != 2 or self.coef.shape[1] != k or self.intercept.shape != (k,):
            msg = (
                f"a probe of {k} targets needs coef [d, {k}] and intercept [{k}]; "
                f"got {list(self.coef.shape)} and {list(self.intercept.shape)}"
            )
            raise ValueError(msg)
        if {self.coef.dtype, self.intercept.dtype} != {torch.float64}:
            msg = f"coef and intercept must be float64; got {self.coef.dtype}"
            raise TypeError(msg)

    @property
    def name(self) -> str:
        """`site/pool`, or `site/pool/prompt`: the probe's name in a run."""
        return key(self.site, self.pool, self.prompt)

    def __repr__(self) -> str:
        return f"Probe({self.name}, d={len(self.coef)}, alpha={self.alpha:.4g})"

    @overload
    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...
    @overload
    def __call__(self, x: NDArray[Any]) -> NDArray[np.float64]: ...
    def __call__(self, x: Any) -> Any:
        """Predict the targets of pooled rows, in float64.

        Parameters
        ----------
        x : Tensor or ndarray [n, d]
            Rows of any dtype, on any device.

        Returns
        -------
        Tensor or ndarray, float64 [n, k]
            The same kind as `x`, on its device.

        Raises
        ------
        TypeError, ValueError
            When `x` is neither kind, or is not [n, d].
        """
        if not isinstance(x, (torch.Tensor, np.ndarray)):
            msg = f"rows must be a torch tensor or a NumPy array; got {type(x).__name__}"
            raise TypeError(msg)
        if x.ndim != 2 or x.shape[1] != len(self.coef):
            msg = f"probe {self.name} takes rows [n, {len(self.coef)}]; got {list(x.shape)}"
            raise ValueError(msg)
        if isinstance(x, np.ndarray):
            return x.astype(np.float64) @ self.coef.cpu().numpy() + self.intercept.cpu().numpy()
        # Half-precision sums of thousands of products would cost the probe its third digit.
        return x.double() @ self.coef.to(x.device) + self.intercept.to(x.device)

    def to(self, device: torch.device | str) -> Probe:
        """Return the same probe with its tensors on `device`."""
        return replace(self, coef=self.coef.to(device), intercept=self.intercept.to(device))


@dataclass(frozen=True)
class Choice:
    """A site and pool, and the held-out R2 of its probe."""

    site: str
    pool: str
    prompt: str
    r2: float
    """Mean over targets and folds."""
    r2_se: float
    """Standard error over folds; NaN when it was not computed."""


@dataclass(frozen=True)
class BestLayer:
    """The best site of one split, told twice."""

    split: str
    optimistic: Choice
    """Highest R2 of the table: the same folds choose it and report it."""
    honest: Choice | None
    """Chosen on inner folds, scored on outer ones; None when the probe did not compute it."""


class _Stored(Mapping[str, _T]):
    """Named things that stay on disk until they are asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], _T]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> _T:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"<{len(self)} read from disk when asked for: {_few(list(self))}>"


def _few(names: list[str]) -> str:
    return ", ".join(names if len(names) < 4 else [names[0], "...", names[-1]])


@dataclass(eq=False, repr=False)
class Run:
    """What a probe found.

    Attributes
    ----------
    info : dict
        What run.json keeps: `model`, `data`, `arguments`, `versions`, `device`, `backend`,
        `dtype`, `seeds` (by split), `final_alpha` (how the penalty of `probes` was chosen),
        `fold_of_cell` (by split, where statistics are kept: the fold that holds out each cell),
        `counts` (samples `read`, samples `skipped`, and `why`: a sentence for each of those),
        `seconds` per stage, `warnings` (a list of sentences),
        `honest` (split -> site, pool, prompt, r2, r2_se, r2_<target>, r2_se_<target> of the best
        layer, chosen on inner folds and scored on outer ones, and `chosen`: the probe of every
        fold). `arguments["split"]` has every split in full, with folds, seed and cell size.
    layers : DataFrame
        One row per site x pool x prompt x group x split, controls among them: `site, tower,
        layer, pool, prompt, group, split, control, n, d, alpha, r2, r2_se, r2_<target>,
        r2_se_<target>, ...`.
        `alpha` is the one that all folds chose, or the geometric mean of theirs where they
        differ. R2, `rmse_<target>`, `mae_<target>` and `spearman_<target>` are means over folds;
        `mean_km` and `median_km` are of all held-out samples together. `control`, `prompt` and
        `group` are empty text where they do not apply; `layer` is missing where a site is no block.
        A column that was not computed is absent.
    samples : DataFrame
        `id`, targets, `fold_<split>` and other columns, in the order of the rows.
    probes : dict of str to Probe
        One per site, pool and prompt, under `Probe.name`.
    predictions : DataFrame
        Held-out predictions of the best probe of every split: `split, id, site, pool, prompt,
        fold, <target>, <target>_predicted`, and `error_km` for coordinates. Empty when no rows were
        kept to predict from.
    rows : mapping of str to Tensor [n, d], or None
        Pooled rows under the probes' names, when kept.
    grams : mapping of str to Gram, or None
        Sufficient statistics under the probes' names, when kept.
    path : Path or None
        The folder the run was saved to or opened from.
    """

    info: dict[str, Any]
    layers: pd.DataFrame
    samples: pd.DataFrame
    probes: dict[str, Probe]
    predictions: pd.DataFrame = field(default_factory=pd.DataFrame)
    rows: Mapping[str, torch.Tensor] | None = None
    grams: Mapping[str, Gram] | None = None
    path: Path | None = None

    def __post_init__(self) -> None:
        self.layers = _tidy(self.layers)

    def __repr__(self) -> str:
        from .report import text

        pools = self.layers.loc[self.layers["control"] == "", "pool"].nunique()
        try:
            best = f"; best: {self.best!r}"
        except (KeyError, ValueError):  # no split, no R2, no probes
            best = ""
        return f"Run({text.headline(self)}, {pools} pools{best})"

    @property
    def splits(self) -> list[str]:
        """Names of the splits, the first one first."""
        table = self.layers
        return list(
            dict.fromkeys(table["split"][(table["control"] == "") & (table["group"] == "")])
        )

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets."""
        return next(iter(self.probes.values())).targets if self.probes else ()

    @property
    def best(self) -> Probe:
        """The probe with the highest R2 in the first split, controls and groups left out.

        Optimistic: the folds that report its R2 also chose it, among all sites. For a number to
        publish, see `best_layer(split).honest`.
        """
        choice = self.best_layer(next(iter(self.splits), "")).optimistic
        name = key(choice.site, choice.pool, choice.prompt)
        if name not in self.probes:
            msg = f"the run has no probe named {name!r}; it has {', '.join(self.probes) or 'none'}"
            raise KeyError(msg)
        return self.probes[name]

    def best_layer(self, split: str) -> BestLayer:
        """Return the best site of a split, optimistic and honest.

        Raises
        ------
        ValueError
            When the run has no such split, or no R2 in it.
        """
        honest = self.info.get("honest", {}).get(split)
        row = self.rows_of(split).sort_values("r2", ascending=False, kind="stable").iloc[0]
        if pd.isna(row["r2"]):
            msg = f"no site of split {split!r} has an R²; is every target constant?"
            raise ValueError(msg)
        return BestLayer(split, _choice(row), None if honest is None else _choice(honest))

    def rows_of(self, split: str) -> pd.DataFrame:
        """Rows of `layers` of one split that are neither a control nor a group.

        Raises
        ------
        ValueError
            When the run has no such split.
        """
        table = self.layers
        found = table[(table["split"] == split) & (table["control"] == "") & (table["group"] == "")]
        if found.empty:
            msg = f"the run has no split {split!r}; it has {', '.join(self.splits) or 'none'}"
            raise ValueError(msg)
        return found

    def controls_of(self, split: str) -> pd.DataFrame:
        """Rows of `layers` of one split that are controls; none is no error."""
        table = self.layers
        return table[(table["split"] == split) & (table["control"] != "") & (table["group"] == "")]

    def summary(self) -> str:
        """Tell the run in at most 100 columns: the best sites of every split and group.

        The last paragraph is one sentence on what was found.
        """
        from .report import text

        return text.summary(self)

    def layer_table(self, split: str) -> str:
        """R2 of one split as text: a row per site, a column per pool and prompt."""
        from .report import text

        return text.layer_table(self, split)

    def subspace(
        self,
        *,
        fractions: Sequence[float] | None = None,
        split: str | None = None,
        sites: str | Sequence[str] | None = None,
        rankings: Sequence[str] | None = None,
        random: int = 5,
        seed: int = 0,
        protocol: Protocol = "corrected",
        progress: bool = False,
    ) -> Subspace:
        """Find which dimensions hold the targets, from rows or statistics: no forward pass.

        In every training part the dimensions are ranked for each target on its own, the ridge is
        refit on the first of them, and the held-out part scores the refit. The alpha of a training
        part is that of its solution on all dimensions, chosen among the run's by generalised
        cross-validation, for all targets together.

        Parameters
        ----------
        fractions
            Shares of the dimensions to keep, above 0 and at most 1; all of them, 1, is always
            measured. More of them cost little. None takes 0.1, 0.2 to 1.
        split
            A split of the run; None takes the first.
        sites
            Names or globs; None takes every site.
        rankings
            Some of `coef` (by |coef|), `coef_std` (by |coef| times the feature's standard
            deviation), `forward` (greedy selection) and `backward` (elimination); None takes all.
        random
            How many random orders to measure beside, as a control; `seed` draws them.
        protocol
            `study` adds the ranking `study`: the procedure of Locatelli et al. (ICML 2026) with its
            faults. One order, by |coef| of latitude, for all targets and all folds, from the fold
            with the best held-out R²; so what is scored has chosen the order. Alpha is chosen for
            every share and target, where the run keeps rows by exact leave-one-out, as the study
            does, else by generalised cross-validation; `Subspace.study` says which.
        progress
            Show a bar on stderr.

        Returns
        -------
        Subspace

        Raises
        ------
        ValueError
            When the run keeps neither rows nor statistics, for an argument that is wrong, or where
            a layer cannot be solved.
        """
        from .subspace.measure import FRACTIONS, of_run
        from .subspace.ranking import RANKINGS

        return of_run(
            self,
            fractions=FRACTIONS if fractions is None else fractions,
            rankings=RANKINGS if rankings is None else rankings,
            split=split,
            sites=sites,
            random=random,
            seed=seed,
            protocol=protocol,
            progress=progress,
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the run's folder, all of it or nothing.

        Everything goes into a hidden folder beside `path` that is renamed at the end, run.json
        last, so that a run that was cut off is never taken for a whole one.

        Parameters
        ----------
        path : path
            The folder to make. An empty one may be there already.
        overwrite : bool
            Replace the run that is there. A folder that is not a run, or holds files that its
            run did not write, is never replaced.

        Returns
        -------
        Path
            The folder, absolute.

        Raises
        ------
        FileExistsError
            When something is there that may not be replaced.
        OSError
            When the disk is full or not writable; nothing is left behind.
        """
        target = Path(path).expanduser().resolve()
        # A value that JSON lacks must fail before gigabytes are written.
        _folder.plain(self.info, "info")
        with _folder.making(target, _nbytes(self), overwrite) as folder:
            _write(self, folder, path)
        self.path = target
        return target


def open(path: str | Path) -> Run:
    """Open a run's folder.

    Tables and probes are read at once; rows and statistics when they are asked for.

    Raises
    ------
    FileNotFoundError
        When the folder, its run.json or a file that run.json lists is missing.
    ValueError
        When a file is damaged or has another size than run.json says, or run.json is not a run's;
        when the folder is of an experiment with edits.
    """
    folder = Path(path).expanduser().resolve()
    if (folder / "steering.json").exists():
        raise ValueError(f"{folder} holds an experiment, not a run: gf.open_steered opens it")
    info, tables = _folder.read_info(folder)
    frames = {
        name: _folder.read_table(folder / f"{name}.csv", tables[f"{name}.csv"])
        if f"{name}.csv" in tables
        else pd.DataFrame()
        for name in _PARTS
    }
    run = Run(
        info,
        frames["layers"],
        frames["samples"],
        _read_probes(folder / "probe.safetensors"),
        frames["predictions"],
        path=folder,
    )
    if (folder / "rows.safetensors").exists():
        run.rows = _stored_rows(folder / "rows.safetensors")
    if (folder / "gram.safetensors").exists():
        run.grams = _stored_grams(folder / "gram.safetensors")
    return run


def beside(layers: pd.DataFrame) -> pd.DataFrame:
    """Give the R2 of every control at each place of a table of layers.

    Parameters
    ----------
    layers
        As `Run.layers`.

    Returns
    -------
    DataFrame
        The index of `layers`, and a column a control: its R2 in the same group and split, at the
        same site, pool and prompt, or where it has no such sites, as a raw input has not, its
        highest. Missing in the rows of controls.
    """
    own = layers["control"] == ""
    sites = set(layers["site"][own])
    out = pd.DataFrame(index=layers.index)
    for control, rows in layers[~own].groupby("control", sort=False):
        raw = rows[~rows["site"].isin(sites)]
        values = pd.Series(float("nan"), index=layers.index)
        for table, first in ((rows, 0), (raw, 2), (raw, 3)):
            keys = ["site", "pool", "prompt", "group", "split"][first:]
            highest = table.groupby(keys)["r2"].max()
            here = highest.reindex(pd.MultiIndex.from_frame(layers[keys])).to_numpy()
            values = values.fillna(pd.Series(here, index=layers.index))
        out[str(control)] = values.where(own)
    return out


def _tidy(layers: pd.DataFrame) -> pd.DataFrame:
    """Check the key columns and give them one form: text without NaN, whole layers or none."""
    missing = [c for c in ("site", "pool", "split", "r2") if c not in layers.columns]
    if missing:
        msg = f"the table of layers has no column {missing[0]!r}; it has {list(layers.columns)}"
        raise ValueError(msg)
    layers = layers.reset_index(drop=True)
    for name in ("site", "pool", "prompt", "group", "split", "control"):
        column = layers[name] if name in layers.columns else pd.Series("", index=layers.index)
        layers[name] = column.astype(object).where(column.notna(), "").astype(str)
    if "layer" in layers.columns:
        layers["layer"] = pd.to_numeric(layers["layer"], errors="coerce").astype("Int64")
    return layers


def _choice(row: Any) -> Choice:
    site, pool, prompt = (str(row.get(c) or "") for c in _ID)
    r2, se = (float("nan") if row.get(c) is None else float(row[c]) for c in ("r2", "r2_se"))
    return Choice(site, pool, prompt, r2, se)


# ---------------------------------------------------------------- writing


def _nbytes(run: Run) -> int:
    """Count what the files will take, about: exact for tensors, a guess for text and pictures."""
    tensors = [*(run.rows or {}).values()]
    tensors += [t for p in run.probes.values() for t in (p.coef, p.intercept)]
    for gram in (run.grams or {}).values():
        tensors += [gram.matrix] if gram.shift is None else [gram.matrix, gram.shift]
    frames = [run.layers, run.samples, run.predictions]
    text = sum(2 * int(f.memory_usage().sum()) for f in frames)  # 17 digits are 8 bytes in memory
    return _PAGES + text + sum(t.nbytes for t in tensors)


def _write(run: Run, folder: Path, told: str | Path) -> None:
    """Write all files; `told` is the path that the pages tell to open, as the caller gave it."""
    from safetensors.torch import save_file

    from . import gram, report

    tables = {}
    for name in _PARTS:
        frame: pd.DataFrame = getattr(run, name)
        if len(frame.columns):
            tables[f"{name}.csv"] = _folder.write_table(frame, folder / f"{name}.csv")
    _write_probes(run.probes, folder / "probe.safetensors")
    if run.rows is not None:
        rows = {name: x.contiguous() for name, x in run.rows.items()}
        save_file(rows, folder / "rows.safetensors")
    if run.grams is not None:
        gram.save(run.grams, folder / "gram.safetensors")
    report.write_report(run, folder, told)
    _folder.seal(folder, run.info, tables)


def _write_probes(probes: Mapping[str, Probe], path: Path) -> None:
    from safetensors.torch import save_file

    tensors, about = {}, {}
    for name, probe in probes.items():
        tensors[f"{name}/coef"] = probe.coef.contiguous()
        tensors[f"{name}/intercept"] = probe.intercept.contiguous()
        about[name] = {c: getattr(probe, c) for c in (*_ID, "targets", "alpha")}
    save_file(
        tensors, path, metadata={"geofast.probes": json.dumps(_folder.plain(about, "probes"))}
    )


# ---------------------------------------------------------------- reading


def _read_probes(path: Path) -> dict[str, Probe]:
    from safetensors import safe_open

    with _folder.reading(path), safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["geofast.probes"])
        return {
            name: Probe(
                a["site"],
                a["pool"],
                a["prompt"],
                tuple(a["targets"]),
                a["alpha"],
                file.get_tensor(f"{name}/coef"),
                file.get_tensor(f"{name}/intercept"),
            )
            for name, a in about.items()
        }


def _stored_rows(path: Path) -> Mapping[str, torch.Tensor]:
    from safetensors import safe_open

    def read(name: str) -> torch.Tensor:
        with _folder.reading(path), safe_open(path, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    with _folder.reading(path), safe_open(path, "pt") as file:
        return _Stored(file.keys(), read)


def _stored_grams(path: Path) -> Mapping[str, Gram]:
    from safetensors import safe_open

    from . import gram

    loaded: dict[str, Gram] = {}

    def read(name: str) -> Gram:
        if not loaded:
            with _folder.reading(path):
                loaded.update(gram.load(path))
        return loaded[name]

    with _folder.reading(path), safe_open(path, "pt") as file:
        suffix = "/matrix"
        names = [n[: -len(suffix)] for n in file.keys() if n.endswith(suffix)]  # noqa: SIM118
    return _Stored(names, read)
