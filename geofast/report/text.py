"""A run in words and plain tables: the finding, the summary, R2 by layer."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd

from ..run import beside
from .numbers import km, number, with_error
from .verdict import Score, denied, reads, score

if TYPE_CHECKING:
    from ..run import Run

SHORT = {"latitude": "lat", "longitude": "lon", "random-weights": "random"}
WIDTH = 100  # of a terminal
_LABEL = 20  # characters of a prompt label that a table shows
_NARROW = 12  # beside several controls
_NAMED = 5  # samples


@dataclass(frozen=True)
class Table:
    """Headers and cells, all text. Columns of `left` hold words, the others numbers."""

    headers: list[str]
    cells: list[list[str]]
    left: int

    def text(self) -> str:
        """As aligned plain text in 100 columns; of the last that do not fit, the names alone."""
        widths = [max(map(len, column)) for column in zip(self.headers, *self.cells, strict=True)]
        shown = len(widths)
        while sum(widths[:shown]) + 2 * (shown - 1) > WIDTH and shown > self.left + 1:
            shown -= 1
        lines = []
        for row in (self.headers, ["-" * w for w in widths], *self.cells):
            padded = [
                c.ljust(w) if i < self.left else c.rjust(w)
                for i, (c, w) in enumerate(zip(row[:shown], widths[:shown], strict=True))
            ]
            lines.append("  ".join(padded).rstrip())
        if hidden := self.headers[shown:]:
            several = f"{len(hidden)} more columns" if len(hidden) > 1 else "One more column"
            lines.append(fill(f"{several} in layers.csv: {', '.join(hidden)}"))
        return "\n".join(lines)

    def markdown(self) -> str:
        """As a Markdown table."""
        rule = ["---" if i < self.left else "---:" for i in range(len(self.headers))]
        rows = ([c.replace("|", "\\|") for c in row] for row in (self.headers, rule, *self.cells))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# ---------------------------------------------------------------- names


class Told(Protocol):
    """A run, or an experiment: its `info` says what was done."""

    info: dict[str, Any]


def model_name(run: Told) -> str:
    """Name the model in short: `hf:facebook/dinov2-small` is `dinov2-small`."""
    name = _name(run.info.get("model"), "the model")
    kind, colon, rest = name.partition(":")
    if colon and kind == "open_clip":
        return rest
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].removeprefix("hf:")


def data_name(run: Told) -> str:
    """Name the data as the run's information does."""
    return _name(run.info.get("data"), "the data")


def _name(value: Any, default: str) -> str:
    if isinstance(value, dict):
        value = value.get("name")
    return str(value) if value else default


def split_words(split: str) -> str:
    """Tell a split in words: `blocks15` is `15-degree blocks`."""
    if split == "kfold":
        return "random folds"
    if block := re.fullmatch(r"blocks([\d.]+)", split):
        return f"{block[1]}-degree blocks"
    if split.startswith("group:"):
        return f"folds by {split.removeprefix('group:')}"
    return f"split {split}"


def place(run: Run, site: str, pool: str, prompt: str = "") -> str:
    """Name a site with its pool and prompt."""
    parts = [site, pool, f"prompt {prompt_name(run, prompt, 40, ': ')}" if prompt else ""]
    return ", ".join(p for p in parts if p)


def prompt_name(run: Run, prompt: str, width: int | None = None, mark: str = " ") -> str:
    """Name a prompt: as it is, or where the run has long ones, by its number and its beginning."""
    number = next((i for i, p in enumerate(long_prompts(run), 1) if p == prompt), 0)
    return clip_label(f"{number}{mark}{prompt}" if number else prompt, width or _label_width(run))


def long_prompts(run: Run) -> list[str]:
    """Return all prompts of a run, which a legend tells in full; none when no table cuts one."""
    prompts = [p for p in dict.fromkeys(run.layers["prompt"]) if p]
    return prompts if any(len(one_line(p)) > _label_width(run) for p in prompts) else []


def _label_width(run: Run) -> int:
    return _LABEL if run.layers["control"].nunique() < 3 else _NARROW


def clip_label(label: str, width: int = _LABEL) -> str:
    """Cut a long label, with an ellipsis; it has no line breaks then."""
    label = one_line(label)
    return label if len(label) <= width else label[: width - 1] + "…"


def one_line(words: str) -> str:
    r"""Write line breaks and tabs, which would break a table, as `\n`, `\r` and `\t`."""
    return words.replace("\n", r"\n").replace("\r", r"\r").replace("\t", r"\t")


# ---------------------------------------------------------------- the finding


def finding(run: Run) -> list[str]:
    """Say what was found, in sentences made from the numbers; the first one is the title."""
    first, *others = run.splits
    best = top(run, first)
    name = model_name(run)
    sentences = [f"{name} {_verdict(run, first)}."]
    if pd.notna(best.get("median_km")):
        sentences.append(f"The median error of the best probe is {km(best['median_km'])} km.")
    honest = run.best_layer(first).honest
    if honest is not None:
        score = with_error(honest.r2, honest.r2_se)
        sentences.append(
            f"Chosen on inner folds, the best layer scores R² {score}; "
            f"the highest of the table is {number(best['r2'])}."
        )
    sentences += [_elsewhere(run, split, best["r2"]) for split in others]
    controls = best_controls(run, first)
    if controls:
        told = (f"{row['control']} {number(row['r2'])}" for row in controls)
        sentences.append(f"For comparison, the highest R² of controls: {', '.join(told)}.")
    if high := [row["control"] for row in controls if round(row["r2"] - best["r2"], 3) >= 0]:
        one = "scores" if len(high) == 1 else "score"
        sentences.append(
            f"{' and '.join(high)} {one} no lower than {name}, whose R² is then no sign of "
            "learning."
        )
    return sentences


def top(run: Run, split: str) -> pd.Series[Any]:
    """Row of the table with the highest R2 of a split."""
    return run.rows_of(split).sort_values("r2", ascending=False, kind="stable").iloc[0]


def _verdict(run: Run, split: str) -> str:
    """Say which targets are read, and where.

    By the best of the table, unless the layer chosen on inner folds does not read what that reads.
    """
    best = top(run, split)
    claimed = _scores(run, best)
    where = place(run, best["site"], best["pool"], best["prompt"])
    if (row := run.info.get("honest", {}).get(split)) is not None:
        honest = _scores(run, row)
        if denied(claimed, honest):
            claimed, where = honest, "the layer chosen on inner folds"
    twins = [row for row in best_controls(run, split) if row["control"] == "random-weights"]
    twin = _scores(run, twins[0]) if twins else {}
    return reads(claimed, twin, f"{where}; {split_words(split)}")


def _scores(run: Run, row: Any) -> dict[str, Score]:
    """R2 of the targets that `row` has one of; with less than two, their mean under all names."""
    known = {t: row.get(f"r2_{t}") for t in run.targets if pd.notna(row.get(f"r2_{t}"))}
    if len(known) < 2:
        name = next(iter(known), " and ".join(run.targets) or "the target")
        return {name: score(row["r2"], row.get("r2_se"))}
    return {t: score(r2, row.get(f"r2_se_{t}", row.get("r2_se"))) for t, r2 in known.items()}


def _elsewhere(run: Run, split: str, reference: float) -> str:
    row = top(run, split)
    change = round(float(row["r2"]), 3) - round(float(reference), 3)
    verb = "falls to" if change < 0 else "rises to" if change > 0 else "stays at"
    parts = [f"{t} {number(row[f'r2_{t}'])}" for t in run.targets if f"r2_{t}" in row]
    detail = f" ({', '.join(parts)})" if len(parts) in (2, 3) else ""
    return f"With {split_words(split)} the highest R² {verb} {number(row['r2'])}{detail}."


def best_controls(run: Run, split: str) -> list[pd.Series[Any]]:
    """Return the best row of every control of a split."""
    table = run.controls_of(split).sort_values("r2", ascending=False, kind="stable")
    return [rows.iloc[0] for _, rows in table.groupby("control", sort=False)]


def has_sites(run: Run, rows: pd.DataFrame) -> bool:
    """Tell whether a control's rows are of the model's own sites, and not of a raw input."""
    return not set(run.layers["site"][run.layers["control"] == ""]).isdisjoint(rows["site"])


# ---------------------------------------------------------------- tables


def summary_table(run: Run, split: str) -> Table:
    """Best site of every pool and prompt of a split, with every control there beside it."""
    rows, controls = run.rows_of(split), beside(run.layers)
    prompts = bool((rows["prompt"] != "").any())
    targets = [t for t in run.targets if f"r2_{t}" in rows.columns][:3]
    has_km = "median_km" in rows.columns
    headers = ["pool", *(["prompt"] if prompts else []), "best site", "R² ± se"]
    headers += [SHORT.get(t, t) for t in targets] + (["median km"] if has_km else [])
    headers += [_control_name(c) for c in controls]
    cells = []
    for (pool, prompt), part in rows.groupby(["pool", "prompt"], sort=False):
        top = part.sort_values("r2", ascending=False, kind="stable").iloc[0]
        row = [pool, *([prompt_name(run, prompt)] if prompts else []), top["site"]]
        row += [with_error(top["r2"], top.get("r2_se"))]
        row += [number(top[f"r2_{t}"]) for t in targets]
        row += [km(top["median_km"])] if has_km else []
        cells.append([*row, *map(number, controls.loc[top.name])])
    return Table(headers, cells, 3 if prompts else 2)


def _control_name(control: str) -> str:
    return clip_label(SHORT.get(control, control), 10)


def groups_table(run: Run, split: str) -> Table | None:
    """Best site of every group of a split, its samples and controls; None without groups."""
    table, controls = run.layers, beside(run.layers)
    rows = table[(table["split"] == split) & (table["control"] == "") & (table["group"] != "")]
    if rows.empty:
        return None
    several = bool((rows["prompt"] != "").any())
    cells = []
    for group, part in rows.groupby("group", sort=False):
        best = part.sort_values("r2", ascending=False, kind="stable").iloc[0]
        cell = [clip_label(str(group)), best["site"], best["pool"]]
        cell += [prompt_name(run, best["prompt"])] if several else []
        cell += [f"{best['n']:,}", with_error(best["r2"], best.get("r2_se"))]
        cells.append([*cell, *map(number, controls.loc[best.name])])
    words = ["group", "best site", "pool", *(["prompt"] if several else [])]
    return Table([*words, "n", "R² ± se", *map(_control_name, controls)], cells, len(words))


def notes(run: Run, split: str) -> list[str]:
    """Lines below a split's table: the honest best layer, and the highest R2 of every control."""
    lines = []
    honest = run.best_layer(split).honest
    if honest is None:
        lines.append("Best sites are optimistic: the folds that report an R² also chose the site.")
    else:
        score = with_error(honest.r2, honest.r2_se)
        chosen = honest_place(run, split)
        lines.append(f"Honest best (chosen on inner folds, scored on outer): R² {score}; {chosen}")
    for row in best_controls(run, split):
        parts = [
            f"{SHORT.get(t, t)} {number(row[f'r2_{t}'])}"
            for t in run.targets
            if f"r2_{t}" in row and pd.notna(row[f"r2_{t}"])
        ]
        detail = f" ({', '.join(parts)})" if parts else ""
        line = f"Control {row['control']}: highest R²"
        if has_sites(run, row.to_frame().T):
            detail += f"; column {_control_name(row['control'])} is its R² at the same site"
            line += " of its sites"
        lines.append(f"{line} {number(row['r2'])}{detail}")
    return lines


def majority(run: Run, split: str) -> bool:
    """Tell whether most folds chose the place that is kept as the honest best of a split.

    A run that does not say what its folds chose is taken at its word.
    """
    chosen = _chosen(run, split)
    return not chosen or 2 * chosen.most_common(1)[0][1] > chosen.total()


def honest_place(run: Run, split: str) -> str:
    """Say where the honest best of a split is, and how many folds chose what."""
    honest = run.best_layer(split).honest
    assert honest is not None
    chosen = _chosen(run, split)
    if not chosen:
        return place(run, honest.site, honest.pool, honest.prompt)
    (first, votes), *others = chosen.most_common()
    folds = chosen.total()
    if votes == 1 < folds:
        one = len({name.split("/")[0] for name in chosen}) == folds
        return f"each of {folds} folds chose another layer{'' if one else ', pool or prompt'}"
    told = f"{'all' if votes == folds else f'{votes} of'} {folds} folds chose"
    if majority(run, split) or len({tuple(name.split("/", 2)[1:]) for name in chosen}) > 1:
        more = f"; the others, {len(others)} other places" if not majority(run, split) else ""
        return f"{told} {_place_of(run, first)}{more}"
    site, _, rest = _place_of(run, first).partition(", ")
    sites = [f"{n} {name.split('/')[0]}" for name, n in others]
    return f"{', '.join([f'{told} {site}', *sites])} ({rest})"


def _chosen(run: Run, split: str) -> Counter[str]:
    """Count the folds that chose a place, by the name of its probe."""
    return Counter(run.info["honest"][split].get("chosen", []))


def _place_of(run: Run, name: str) -> str:
    site, pool, *prompt = name.split("/", 2)
    return place(run, site, pool, *prompt)


def layers_by_site(run: Run, split: str) -> Table:
    """R2 of a split: a row per site, a column per pool and prompt, and what controls have there.

    A control with sites stands beside every column, a raw input once, at the end.
    """
    rows = run.rows_of(split)
    controls = beside(run.layers).loc[rows.index]
    columns: list[tuple[str, pd.Series[float]]] = []
    of_split = run.controls_of(split)
    raw = [c for c in controls if not has_sites(run, of_split[of_split["control"] == c])]
    parts = rows.groupby(["pool", "prompt"], sort=False)
    for (pool, prompt), part in parts:
        name = clip_label(f"{pool} {prompt_name(run, prompt)}".strip(), 18)
        own = part.set_index("site")["r2"]
        columns.append((name, own))
        for control in controls.columns.drop(raw):
            there = pd.Series(controls.loc[part.index, control].to_numpy(), part["site"])
            beneath = f": {name}" if parts.ngroups > 1 else ""
            columns.append((f"{_control_name(control)}{beneath}", there))
    inputs = ((_control_name(c), controls[c].groupby(rows["site"]).max()) for c in raw)
    columns.extend(inputs)
    sites = list(dict.fromkeys(rows["site"]))
    cells = [[site, *(number(values.get(site)) for _, values in columns)] for site in sites]
    return Table(["site", *(name for name, _ in columns)], cells, 1)


def layer_table(run: Run, split: str) -> str:
    """`layers_by_site` as text."""
    return f"R² by site, {split_words(split)}\n\n{layers_by_site(run, split).text()}"


def headline(run: Run) -> str:
    """One line: which model, which data, how much of both."""
    sites = run.layers.loc[run.layers["control"] == "", "site"].nunique()
    skipped = run.info.get("counts", {}).get("skipped", 0)
    samples = f"{len(run.samples):,} samples" + (f" ({skipped:,} skipped)" if skipped else "")
    places = f"{sites} site{'s' * (sites != 1)}"
    return f"{model_name(run)} on {data_name(run)}: {samples}, {places}"


def skipped(run: Run) -> list[str]:
    """Say how many samples were left out; name the first five and say why."""
    why = run.info.get("counts", {}).get("why", [])
    if not why:
        return []
    told = [f"Skipped {len(why):,} sample{'s' * (len(why) > 1)}", *why[:_NAMED]]
    if len(why) > _NAMED:
        told.append(f"and {len(why) - _NAMED:,} more, all of them in run.json and report.html")
    return told


def summary(run: Run) -> str:
    """Tell a run in at most 100 columns; the last paragraph is the finding."""
    blocks = [fill(headline(run))]
    for split in run.splits:
        table = summary_table(run, split).text()
        below = [fill(line, "  ") for line in notes(run, split)]
        blocks.append("\n".join([split_words(split).capitalize(), table, *below]))
        if (groups := groups_table(run, split)) is not None:
            blocks.append(f"Groups, {split_words(split)}\n{groups.text()}")
    if prompts := long_prompts(run):
        told = (fill(f"{i}: {one_line(p)}") for i, p in enumerate(prompts, 1))
        blocks.append("\n".join(["Prompts", *told]))
    if warned := run.info.get("warnings"):
        blocks.append("\n".join(fill(f"Warning: {w}", "  ") for w in warned))
    found, *more = finding(run)
    blocks += [fill(" ".join(more))] if more else []
    return "\n\n".join([*blocks, fill(found)])


def fill(words: str, indent: str = "") -> str:
    """Break a line for a terminal of 100 columns; names and paths stay whole."""
    return textwrap.fill(
        words, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
