"""What the pages of any folder share: the frame and its style, tables, pictures, facts, use."""

from __future__ import annotations

import base64
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from . import canvas
from .text import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5f5f5f; --paper: #fff; --rule: #ddd;
  --tint: #f6f6f4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --soft: #a5a5a5; --paper: #17181a;
  --rule: #3a3b3e; --tint: #202225; } }
body { margin: 2rem auto; max-width: 62rem; padding: 0 1.2rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.55rem; line-height: 1.25; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--rule); }
.finding { font-size: 1.1rem; }
.scroll { overflow: auto; }
details .scroll { max-height: 34rem; }  /* its bar would lie thousands of rows below */
thead th { position: sticky; top: 0; background: var(--paper); }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 600; }
th.word, td.word { text-align: left; }
.facts td { white-space: normal; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.facts td:first-child { white-space: nowrap; overflow-wrap: normal; }
figure { margin: 1.2rem 0; }
img { width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption, .note { color: var(--soft); font-size: .9rem; }
pre { background: var(--tint); padding: .8rem 1rem; overflow-x: auto; font-size: .86rem; }
details { margin-top: 1rem; } summary { cursor: pointer; }
"""


def use(table: str) -> str:
    """What the numbers are for, and what not; `table` is the file with places of samples."""
    return (
        "This is an analysis of what a model's hidden states encode, over many samples at once. It "
        "is not a tool for finding where a person is, and its predictions should not be used as "
        "one: they are linear guesses with errors of hundreds or thousands of kilometres. "
        "Photographs carry traces of the people who took them; "
        f"share {table} only if you may share their places."
    )


def document(title: str, body: Sequence[str]) -> str:
    """Return a page that needs no other file; `body` is what comes below its heading."""
    title = escape(title)
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style>"
    )
    lines = [
        "<!doctype html>",
        f'<html lang="en"><head>{head}</head><body>',
        f"<h1>{title}</h1>",
        *body,
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"


def table(cells: Table) -> str:
    """A table, words to the left."""

    def row(line: list[str], tag: str) -> str:
        words = [' class="word"' if i < cells.left else "" for i in range(len(line))]
        inner = (f"<{tag}{w}>{escape(c)}</{tag}>" for c, w in zip(line, words, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    body = "\n".join(row(line, "td") for line in cells.cells)
    head = row(cells.headers, "th")
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def picture(path: Path, caption: str) -> str:
    """A picture and its caption."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    caption = escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def write(
    info: MutableMapping[str, Any],
    folder: Path,
    pictures: Mapping[str, Callable[[], Figure]],
    pages: Mapping[str, Callable[[list[str]], str]],
) -> None:
    """Draw what can be drawn, and write pages, each told which pictures there are.

    What cannot be made warns, and the warning is kept in `info`: numbers that took hours must not
    be lost to a drawing.
    """
    drawn = []
    for name in pictures:
        (folder / name).unlink(missing_ok=True)  # no page may show another's
    for name, make in pictures.items():
        try:
            with kept_going(info, name):
                canvas.save(make(), folder / name)
                drawn.append(name)
        except ImportError as err:
            warn(info, f"the report has no pictures: {err}")
            break
    for name, page in pages.items():
        with kept_going(info, name):
            (folder / name).write_text(page(drawn), encoding="utf-8")


def facts(info: Mapping[str, Any], without: Collection[str]) -> str:
    """What JSON keeps of how something was made, as a table; some keys are told elsewhere."""
    told = ((str(k), _fact(v)) for k, v in info.items() if k not in without and v is not None)
    rows = (f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in told)
    return f'<table class="facts">{"".join(rows)}</table>'


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{k}: {_fact(v)}" for k, v in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_fact(v) for v in value) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def whole(frame: pd.DataFrame) -> Table:
    """Turn a table into text, words first."""
    words = [c for c in frame.columns if not pd.api.types.is_numeric_dtype(frame[c].dtype)]
    numbers = [c for c in frame.columns if c not in words]
    columns = []
    for name in [*words, *numbers]:
        column = frame[name]
        if name in words:
            columns.append([str(v) for v in column])
        elif pd.api.types.is_float_dtype(column.dtype):
            columns.append(["" if pd.isna(v) else f"{v:.4g}" for v in column])
        else:
            columns.append(["" if pd.isna(v) else str(v) for v in column])
    cells = [list(row) for row in zip(*columns, strict=True)]
    return Table([*words, *numbers], cells, len(words))


@contextmanager
def kept_going(info: MutableMapping[str, Any], name: str) -> Iterator[None]:
    """Turn a failure of the drawing or the wording into a warning; a full disk stays an error."""
    try:
        yield
    except (ImportError, OSError):
        raise
    except Exception as err:
        warn(info, f"{name} could not be made: {type(err).__name__}: {err}")


def warn(info: MutableMapping[str, Any], message: str) -> None:
    """Warn, and keep the warning in `info`."""
    kept = info.setdefault("warnings", [])
    if message not in kept:
        kept.append(message)
    warnings.warn(message, stacklevel=2)
