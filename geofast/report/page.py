"""The pages of a run's folder: README.md, and report.html that needs no other file."""

from __future__ import annotations

import json
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from . import figures, frame, text

if TYPE_CHECKING:
    from ..run import Run

ALPHA_WORDS = {
    "loo": "by exact leave-one-out inside each training part",
    "gcv": "by generalised cross-validation inside each training part",
    "folds": "by inner folds of each training part",
}


def write_report(run: Run, folder: str | Path, told: str | Path | None = None) -> None:
    """Write layers.png, map.png, README.md and report.html into an existing folder.

    Without matplotlib the pages have no pictures; without held-out coordinates they have no map.
    A picture or page that cannot be made warns, and the warning is kept in `info["warnings"]`.

    Parameters
    ----------
    run : Run
    folder : path
    told : path, optional
        What the pages tell to open; `folder` by default, which may go by another name later.
    """
    folder = Path(folder)
    told = folder if told is None else Path(told)
    pictures = {"layers.png": partial(figures.layer_curve, run)}
    if figures.has_map(run):
        pictures["map.png"] = partial(figures.map_of_predictions, run)
    pages = {
        "README.md": lambda drawn: _markdown(run, folder, drawn, told),
        "report.html": lambda drawn: _html(run, folder, drawn, told),
    }
    frame.write(run.info, folder, pictures, pages)


# ---------------------------------------------------------------- what both pages say


def _method(run: Run) -> list[str]:
    """Sentences on how the numbers came about; what the run does not record is left out."""
    info, arguments = run.info, run.info.get("arguments", {})
    said = [
        "Every site's hidden states were pooled during one forward pass, and a ridge regression "
        "with an intercept was fitted to the pooled rows of each."
    ]
    choice = ALPHA_WORDS.get(str(arguments.get("select", "")))
    if choice:
        said.append(f"Its penalty was chosen {choice}.")
    if info.get("final_alpha"):
        final = info["final_alpha"]
        said.append(f"The saved probes are fitted to all samples, their penalty chosen {final}.")
    folds = [
        f"{run.samples[f'fold_{split}'].nunique()} ({text.split_words(split)})"
        for split in run.splits
        if f"fold_{split}" in run.samples.columns
    ]
    if folds:
        said.append(f"Number of folds: {', '.join(folds)}.")
    said.append(
        "R² is computed on each held-out fold, about that fold's own mean, and averaged over folds "
        f"and targets ({', '.join(run.targets)}); ± is its standard error over folds. R² is 1 for "
        "perfect predictions, 0 for always predicting the mean, and below 0 for worse than that."
    )
    ran = [f"{name} {info[name]}" for name in ("device", "dtype", "backend") if info.get(name)]
    if ran:
        said.append(f"It ran with {', '.join(map(str, ran))}.")
    return said


def _caption(run: Run, name: str) -> str:
    if name == "map.png":
        return (
            "True places (dots) and the held-out predictions of the best probe (ends of the "
            f"lines), for at most {figures.MAP_SAMPLES} evenly chosen samples."
        )
    said = ["Held-out R² by layer."]
    if "r2_se" in run.layers.columns:
        wide = ", left out where they cover the axis" * figures.leaves_bands_out(run)
        said.append(f"Bands are ± 1.96 standard errors over folds{wide}.")
    marks = {
        c: mark for split in run.splits for c, mark in figures.control_marks(run, split).items()
    }
    if marks:
        told = ", ".join(f"{control} with {mark}" for control, mark in marks.items())
        said.append(f"Thin lines are controls: {told}.")
    agreed = {text.majority(run, split) for split in run.splits if run.best_layer(split).honest}
    if True in agreed:
        said.append("The star is the layer chosen on inner folds and scored on outer ones.")
    if False in agreed:
        said.append("A black line is the R² of layers chosen on inner folds that differ by fold.")
    return " ".join(said)


def _again(told: Path) -> str:
    name = json.dumps(str(told), ensure_ascii=False)
    return f"import geofast as gf\n\nrun = gf.open({name})\n{_USES}"


_USES = """run.layers            # the whole table, one row per site, pool, prompt and split
probe = run.best      # a linear map: probe(x) gives the targets of pooled rows x [n, d]
print(run.summary())  # what this page says"""


# ---------------------------------------------------------------- README.md


def _markdown(run: Run, folder: Path, pictures: list[str], told: Path) -> str:
    parts = [f"# {text.headline(run)}", " ".join(text.finding(run))]
    for split in run.splits:
        parts.append(f"## {text.split_words(split).capitalize()}")
        parts.append(text.summary_table(run, split).markdown())
        parts.append("\n".join(f"- {line}" for line in text.notes(run, split)))
        if (groups := text.groups_table(run, split)) is not None:
            parts.append(groups.markdown())
    if left_out := text.skipped(run):
        parts += [f"## {left_out[0]}", "\n".join(f"- {line}" for line in left_out[1:])]
    if prompts := text.long_prompts(run):
        # A prompt is told as it is, whatever Markdown would make of it.
        items = (f"{i}. `{text.one_line(p)}`" for i, p in enumerate(prompts, 1))
        parts += ["## Prompts", "\n".join(items)]
    for name in pictures:
        caption = _caption(run, name)
        parts.append(f"![{caption}]({name})\n\n{caption}")
    parts += ["## Open it again", f"```python\n{_again(told)}\n```"]
    parts += ["## Method", " ".join(_method(run))]
    if run.info.get("warnings"):
        parts += ["## Warnings", "\n".join(f"- {w}" for w in run.info["warnings"])]
    parts += ["## Use", frame.use("samples.csv")]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------- report.html


def _html(run: Run, folder: Path, pictures: list[str], told: Path) -> str:
    body = [f'<p class="finding">{escape(" ".join(text.finding(run)))}</p>']
    for split in run.splits:
        body.append(f"<h2>{escape(text.split_words(split).capitalize())}</h2>")
        body.append(frame.table(text.summary_table(run, split)))
        body += [f'<p class="note">{escape(line)}</p>' for line in text.notes(run, split)]
        if (groups := text.groups_table(run, split)) is not None:
            body.append(frame.table(groups))
    if prompts := text.long_prompts(run):
        items = "".join(f"<li>{escape(text.one_line(p))}</li>" for p in prompts)
        body.append(f"<h2>Prompts</h2><ol>{items}</ol>")
    body += [frame.picture(folder / name, _caption(run, name)) for name in pictures]
    body.append("<h2>Method</h2>")
    body.append(f"<p>{escape(' '.join(_method(run)))}</p>")
    for message in run.info.get("warnings", []):
        body.append(f'<p class="note">Warning: {escape(str(message))}</p>')
    body.append(f"<h2>Open it again</h2><pre>{escape(_again(told))}</pre>")
    body.append(f"<h2>Use</h2><p>{escape(frame.use('samples.csv'))}</p>")
    if why := run.info.get("counts", {}).get("why"):
        items = "".join(f"<li>{escape(str(reason))}</li>" for reason in why)
        heading = escape(text.skipped(run)[0])
        body.append(f"<h2>{heading}</h2><details><summary>Why</summary><ol>{items}</ol></details>")
    body.append("<h2>R² by site</h2>")
    for split in run.splits:
        body.append(f"<h3>{escape(text.split_words(split).capitalize())}</h3>")
        body.append(frame.table(text.layers_by_site(run, split)))
    body.append("<h2>Everything</h2><details><summary>The whole table, layers.csv</summary>")
    body.append(frame.table(frame.whole(run.layers)) + "</details>")
    body.append("<details><summary>How it was made, run.json</summary>")
    body.append(
        f"{frame.facts(run.info, {'honest', 'warnings', 'fold_of_cell'})}</details>"
    )  # told elsewhere
    return frame.document(text.headline(run), body)
