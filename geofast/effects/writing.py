"""What measurements of the next token are written with: a table, and what it ran on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from .. import _folder
from ..models import Model
from ..report.numbers import number


def about(model: Model) -> dict[str, Any]:
    """Say what a measurement ran on."""
    return {
        "model": model.name,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def save(table: pd.DataFrame, info: Mapping[str, Any], folder: str | Path, name: str) -> Path:
    """Write a table as CSV and what is said of it as JSON."""
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")
    text = json.dumps(_folder.plain(info, "info"), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return folder


def with_ends(row: pd.Series[Any], name: str, digits: int = 2) -> str:
    """Write a number and its interval."""
    value, low, high = (number(row[f"{name}{end}"], digits) for end in ("", "_low", "_high"))
    return f"{value} ({low} to {high})" if value else ""
