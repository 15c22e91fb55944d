"""A folder that is written whole or not at all, and read only when it is whole.

run.json comes last and lists every file with its size. Tables are CSV that reads back bit for bit.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import torch

FORMAT = 1  # raised when an older geofast could misread a newer folder


# ---------------------------------------------------------------- writing


def check_free(target: Path, overwrite: bool) -> None:
    """Refuse a target that is there, unless it is empty or a run that may be replaced.

    Also one that could not be made. `target` is absolute.
    """
    place = above(target)
    if not place.is_dir():
        msg = f"{target} cannot be made: {place} is not a folder; choose another path"
        raise NotADirectoryError(msg)
    try:
        os.rmdir(tempfile.mkdtemp(prefix=f".{target.name}.", dir=place))
    except OSError as err:
        reason = os.strerror(err.errno or errno.EIO)
        msg = f"{target} cannot be made: {place} takes no folder ({reason}); choose another path"
        raise type(err)(msg) from err
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        listed = _load_json(target / "run.json")["files"]
    except (OSError, ValueError, KeyError):
        msg = f"{target} is there and is not a run's folder; choose another path or remove it"
        raise FileExistsError(msg) from None
    if not overwrite:
        msg = (
            f"{target} holds a run already; pass overwrite=True (--overwrite), or choose another "
            "path"
        )
        raise FileExistsError(msg)
    strangers = sorted({p.name for p in target.iterdir()} - {"run.json", *listed})
    if strangers:
        msg = (
            f"{target} holds {strangers[0]!r}, which its run did not write; move it away before "
            "the run is replaced, or choose another path"
        )
        raise FileExistsError(msg)


def check_space(place: Path, needed: int) -> None:
    """Refuse a run whose `needed` bytes of rows or statistics the disk of `place` cannot take."""
    free = shutil.disk_usage(place).free
    if needed > free:
        msg = (
            f"the run will need {_size(needed)} in {place}, where {_size(free)} are free; make "
            "room, write it to another disk, or probe fewer sites, pools or prompts"
        )
        raise OSError(errno.ENOSPC, msg)


def above(target: Path) -> Path:
    """Return the nearest parent that is there."""
    return next(p for p in target.parents if p.exists())


@contextmanager
def making(target: Path, needed: int, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden folder beside `target`, and rename it into place at the end.

    Parameters
    ----------
    target : Path
        Absolute.
    needed : int
        Bytes that will be written, about; refused at once when the disk has fewer.
    overwrite : bool
        Replace the run that is there.

    Raises
    ------
    FileExistsError
        When something is there that may not be replaced, at the start or at the end.
    OSError
        When it could not be written; the hidden folder is gone then.
    """
    from safetensors import SafetensorError

    check_free(target, overwrite)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if needed > shutil.disk_usage(target.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process with the same number
        partial.mkdir()
        yield partial
        check_free(target, overwrite)  # someone else may have been quicker
        _swap(partial, target)
    except FileExistsError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except (OSError, SafetensorError) as err:
        shutil.rmtree(partial, ignore_errors=True)
        _raise_unwritten(err, target, needed)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def seal(folder: Path, info: Mapping[str, Any], tables: Mapping[str, Mapping[str, str]]) -> None:
    """Write run.json: `info`, the kinds of the tables' columns, and every file with its size."""
    files = sorted(folder.iterdir())
    for file in files:
        # safetensors makes files that only their owner may read; a folder's mode has the umask.
        file.chmod(folder.stat().st_mode & 0o666)
        _sync(file)
    about = {"geofast_run": FORMAT, **info, "tables": tables}
    about["files"] = {f.name: f.stat().st_size for f in files}
    text = json.dumps(plain(about, "info"), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "run.json").write_text(text + "\n", encoding="utf-8")
    _sync(folder / "run.json")
    _sync(folder)


def write_table(frame: pd.DataFrame, path: Path) -> dict[str, str]:
    """Write a table as CSV; return the kind of every column, which `read_table` needs."""
    frame.to_csv(path, index=False, lineterminator="\n", encoding="utf-8")
    return {str(name): _kind(frame[name]) for name in frame.columns}


def _kind(column: pd.Series[Any]) -> str:
    """Name a column's kind for run.json; what is neither number nor truth is text."""
    return str(column.dtype) if pd.api.types.is_numeric_dtype(column.dtype) else "text"


def plain(value: Any, where: str) -> Any:
    """Turn a value into strict JSON's types; what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, (np.generic, np.ndarray)):
        return plain(value.tolist(), where)
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (Path, torch.dtype, torch.device)):
        return str(value)
    msg = f"{where} is a {type(value).__name__}; run.json takes text, numbers, lists and mappings"
    raise TypeError(msg)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # only POSIX can flush a folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(partial: Path, target: Path) -> None:
    """Rename the new folder into place; an old run is set aside first and removed after."""
    if not target.exists():
        partial.rename(target)
    elif not any(target.iterdir()):
        target.rmdir()
        partial.rename(target)
    else:
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        target.rename(old)
        try:
            partial.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old)
    _sync(target.parent)


def _raise_unwritten(err: Exception, target: Path, needed: int) -> NoReturn:
    # safetensors reports the system's error as text only: "... (os error 28)".
    found = re.search(r"os error (\d+)", str(err))
    code = err.errno if isinstance(err, OSError) else int(found[1]) if found else None
    reason = os.strerror(code) if code else str(err)
    msg = f"could not write the run to {target}: {reason}. "
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = _size(shutil.disk_usage(above(target)).free)
        msg += f"It needs about {_size(needed)} and {free} are free there; nothing was left "
        msg += "behind. Make room or save elsewhere."
    else:
        msg += "Nothing was left behind; save elsewhere."
    raise OSError(code or errno.EIO, msg) from err


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


# ---------------------------------------------------------------- reading


_AGAIN = "copy the folder again, or run the probe again"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into one sentence with its name."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, KeyError, TypeError, ValueError) as err:
        msg = f"{path} is damaged ({type(err).__name__}: {err}); {_AGAIN}"
        raise ValueError(msg) from err


def _load_json(path: Path) -> dict[str, Any]:
    with reading(path):
        about = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(about, dict) or not {"geofast_run", "tables", "files"} <= about.keys():
        msg = f"{path} is not a geofast run's, or not all of it; {_AGAIN}"
        raise ValueError(msg)
    return about


def read_info(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """Read run.json and check that every file it lists is whole."""
    if not folder.is_dir():
        msg = f"there is no folder {folder}"
        raise FileNotFoundError(msg)
    if not (folder / "run.json").exists():
        msg = (
            f"{folder} is not a run's folder, or a run that was cut off: it has no run.json. "
            "Give another folder, or run the probe again"
        )
        raise FileNotFoundError(msg)
    info = _load_json(folder / "run.json")
    version = info.pop("geofast_run")
    if version > FORMAT:
        msg = f"{folder} was written in format {version}; this geofast reads {FORMAT}: upgrade it"
        raise ValueError(msg)
    tables, files = info.pop("tables"), info.pop("files")
    for name, size in files.items():
        if not name.endswith((".csv", ".safetensors")):
            continue  # pages and pictures are for people, who may edit or remove them
        if not (folder / name).exists():
            msg = f"{folder / name} is missing, though run.json lists it; {_AGAIN}"
            raise FileNotFoundError(msg)
        found = (folder / name).stat().st_size
        if found != size:
            msg = f"{folder / name} has {found} bytes where run.json says {size}; {_AGAIN}"
            raise ValueError(msg)
    return info, tables


def read_table(path: Path, kinds: Mapping[str, str]) -> pd.DataFrame:
    """Read a table exactly as it was; missing text comes back as empty text."""
    # All as text first: "" must stay empty text, "NA" a country, and floats keep their last bit.
    with reading(path):
        with path.open(encoding="utf-8", newline="") as file:
            frame = pd.read_csv(file, dtype=str, keep_default_na=False, lineterminator="\n")
        return _with_kinds(frame, kinds)


def _with_kinds(frame: pd.DataFrame, kinds: Mapping[str, str]) -> pd.DataFrame:
    for name, kind in kinds.items():
        text = frame[name]
        if kind.lower().startswith(("int", "uint")):
            numbers = [int(v) if v else pd.NA for v in text]
            frame[name] = pd.Series(pd.array(numbers, dtype=kind), index=frame.index)
        elif kind in ("bool", "boolean"):
            truths = [v == "True" if v else pd.NA for v in text]
            frame[name] = pd.Series(pd.array(truths, dtype=kind), index=frame.index)
        elif kind != "text":
            frame[name] = text.where(text != "", "nan").astype(object).astype(kind)
    return frame
