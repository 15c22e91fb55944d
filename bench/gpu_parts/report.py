"""Events of a part put together, tables and the JSON."""

import json

from .run import verdict

SIGNS = {"at most": "<=", "at least": ">="}


def gather(path):
    """Return what a part recorded: tables, notes and errors.

    A line that a crash cut short is left out. Tables are {name: [{"values": ..., "goals": ...}]}.
    """
    found = {"tables": {}, "notes": [], "errors": []}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            ((kind, value),) = json.loads(line).items()
        except ValueError:
            continue
        if kind == "row":
            rows = found["tables"].setdefault(value["table"], [])
            rows.append({"values": value["values"], "goals": value["goals"]})
        else:
            found[f"{kind}s"].append(value)
    return found


def shown(value):
    """Return a value as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3e}" if value and abs(value) < 1e-3 else f"{value:,.4g}"
    return str(value)


def cell(row, column):
    """Return a value of a row, with its goal and whether that is met."""
    if column not in row["values"] and column not in row["goals"]:
        return ""
    text = shown(row["values"].get(column))
    if column in row["goals"]:
        kind, limit = row["goals"][column]
        got = row["values"].get(column)
        text += f" ({SIGNS[kind]} {limit:g}: {verdict(got, (kind, limit))})"
    return text


def table(rows):
    """Return lines of a Markdown table."""
    columns = list(dict.fromkeys(c for row in rows for c in [*row["values"], *row["goals"]]))
    cells = [columns, *([cell(row, c) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def text_of(name, part):
    """Return a part as text: its tables, notes and errors."""
    lines = [f"## {name}: {part['state']}, {part['seconds']:.0f} s", ""]
    for title, rows in part["tables"].items():
        lines += [f"**{title}**", "", *table(rows), ""]
    lines += [f"- {note}" for note in part["notes"]]
    lines += [f"- FAILED: {error.strip()}" for error in part["errors"]]
    return "\n".join(lines) + "\n"


def targets(parts):
    """Return every goal of every row: part, table, which row, column, figure, limit and verdict."""
    found = []
    for name, part in parts.items():
        for title, rows in part["tables"].items():
            for row in rows:
                # What a row is called: its words and counts, not its figures.
                which = ", ".join(
                    f"{k} {v}" if isinstance(v, int) else str(v)
                    for k, v in row["values"].items()
                    if isinstance(v, (str, int)) and v != "" and k not in row["goals"]
                )
                for column, goal in row["goals"].items():
                    got = row["values"].get(column)
                    found.append(
                        {
                            "part": name, "table": title, "row": which, "figure": column,
                            "got": got, "goal": list(goal), "verdict": verdict(got, goal),
                        }
                    )  # fmt: skip
    return found


def summary(found):
    """Return the missed and the unmeasured targets, line by line, and how many were met."""
    met = sum(t["verdict"] == "met" for t in found)
    lines = [f"## targets (for one H200): {met} of {len(found)} met", ""]
    for t in found:
        if t["verdict"] != "met":
            kind, limit = t["goal"]
            sign = SIGNS[kind]
            what = f"{t['part']}, {t['row']}: {t['figure']} {shown(t['got'])} ({sign} {limit:g})"
            lines.append(f"- {t['verdict']}: {what}")
    return "\n".join(lines) + "\n"
