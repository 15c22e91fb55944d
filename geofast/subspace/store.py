"""The folder of a search for dimensions: three tables, and the orders that all rows make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .. import _folder

if TYPE_CHECKING:
    from .result import Subspace

FORMAT = 1  # raised when an older geofast could misread a newer folder
RANKS = "subspace.safetensors"
_ABOUT = "geofast.subspace"
_TABLES = {
    "curves": "subspace.csv",
    "smallest": "subspace_smallest.csv",
    "stability": "subspace_stability.csv",
}


def refuse_run(folder: str | Path) -> None:
    """Refuse the folder of a run, which is replaced only while nothing but its own files is there.

    Raises
    ------
    FileExistsError
        When `folder` has a run.json.
    """
    if (Path(folder).expanduser() / "run.json").exists():
        raise FileExistsError(
            f"{folder} is a run's folder, where nothing else may lie: give another, as "
            f"{Path(folder).with_name(f'{Path(folder).name}-found')}"
        )


def check_free(folder: str | Path, overwrite: bool) -> None:
    """As `refuse_run`; also refuse a folder that holds a search, unless it may be replaced.

    Raises
    ------
    FileExistsError
        When `folder` has a run.json, or tables or orders of a search and `overwrite` is False.
    """
    refuse_run(folder)
    there = [(Path(folder).expanduser() / name).exists() for name in (RANKS, *_TABLES.values())]
    if any(there) and not overwrite:
        raise FileExistsError(
            f"{folder} holds a search for dimensions already; pass overwrite=True (--overwrite), "
            "or choose another path"
        )


def write(found: Subspace, folder: Path) -> None:
    """Write the tables, and last the orders: their file tells what is in the others."""
    from safetensors.torch import save_file

    tables = {}
    for name, file in _TABLES.items():
        kinds = _folder.write_table(getattr(found, name), folder / file)
        tables[name] = {"columns": kinds, "bytes": (folder / file).stat().st_size}
    about = {
        "format": FORMAT,
        "targets": found.targets,
        "split": found.split,
        "study": found.study,
        "select": found.select,
        "draws": found.draws,
        "train": found.train,
        "rankings": {name: [*by_ranking] for name, by_ranking in found.ranks.items()},
        "tables": tables,
    }
    ranks = {
        f"{name}/{ranking}": order.contiguous()
        for name, by_ranking in found.ranks.items()
        for ranking, order in by_ranking.items()
    }
    path = folder / RANKS
    path.touch()
    mode = path.stat().st_mode
    save_file(ranks, path, metadata={_ABOUT: json.dumps(about, ensure_ascii=False)})
    path.chmod(mode)  # which safetensors narrows to the owner


def read(folder: str | Path) -> Subspace:
    """Read what `write` wrote; see `Subspace.open`."""
    from safetensors import SafetensorError, safe_open

    from .result import Subspace

    folder = Path(folder).expanduser()
    path = folder / RANKS
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} holds no search for dimensions: there is no {RANKS} in it; give a folder "
            "that Subspace.save or `geofast subspace RUN --out FOLDER` wrote"
        )
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[_ABOUT])
            if about["format"] > FORMAT:
                raise ValueError(
                    f"it has format {about['format']}, and this geofast reads {FORMAT}"
                )
            ranks = {
                name: {ranking: file.get_tensor(f"{name}/{ranking}") for ranking in rankings}
                for name, rankings in about["rankings"].items()
            }
        targets, tables = tuple(about["targets"]), {}
        for name, table in about["tables"].items():
            size = (folder / _TABLES[name]).stat().st_size
            if size != table["bytes"]:
                raise ValueError(f"{_TABLES[name]} has {size} bytes instead of {table['bytes']}")
            tables[name] = _folder.read_table(folder / _TABLES[name], table["columns"])
        # Folders of an older version do not tell: it had no other way.
        older = "gcv" if (tables["curves"]["ranking"] == "study").any() else ""
        study = about.get("study", older)
        later = {name: about[name] for name in ("select", "draws", "train") if name in about}
        split = about["split"]
        return Subspace(**tables, ranks=ranks, targets=targets, split=split, study=study, **later)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder} holds no search for dimensions that can be read ({_first_line(error)}); "
            "search again: `geofast subspace RUN --out FOLDER`"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
