"""Numbers as people read them."""

from __future__ import annotations

from typing import Any

import pandas as pd


def number(value: Any, digits: int = 3) -> str:
    """Write a number; a missing one is empty text."""
    if value is None or pd.isna(value):
        return ""
    text = f"{float(value):.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text


def with_error(value: Any, se: Any, digits: int = 3) -> str:
    """Write a number and its standard error, where there is one."""
    error = number(se, digits)
    return f"{number(value, digits)} ± {error}" if error else number(value, digits)


def km(value: Any) -> str:
    """Write kilometres, to the whole one."""
    return "" if value is None or pd.isna(value) else f"{float(value):,.0f}"
