"""The pages of an experiment's folder: README.md, and report.html that needs no other file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from . import frame
from . import steering_figures as figures
from . import steering_text as text
from .text import Table

if TYPE_CHECKING:
    from ..effects.outcome import Steered

_EDITED = (
    " An edited model says what it was made to say: its answers are evidence about the model, and "
    "about no place."
)
_MARKS = """<style>
.answers td { white-space: normal; text-align: left; vertical-align: top; min-width: 9rem; }
.answers td:first-child { min-width: 6rem; }
.answers p { margin: 0; }
mark { color: inherit; padding: 0 .15em; border-radius: 2px; }
mark.target { background: #0072b238; font-weight: 600; }
mark.source { background: none; border-bottom: 2px dotted var(--soft); border-radius: 0; }
</style>"""
_LEGEND = (
    '<mark class="target">The target\'s place</mark>, <mark class="source">the source\'s</mark>.'
)


def write(steered: Steered, folder: str | Path, told: str | Path | None = None) -> None:
    """Write effects.png, readings.png, map.png, README.md and report.html into an existing folder.

    Without matplotlib the pages have no pictures; without readings of a later site they have no
    map, and without those of several no readings.png. What cannot be drawn or worded warns, and
    the warning is kept in `info["warnings"]`.

    Parameters
    ----------
    steered : Steered
    folder : path
    told : path, optional
        What the pages tell to open; `folder` by default, which may go by another name later.
    """
    folder = Path(folder)
    told = folder if told is None else Path(told)
    pictures = {"effects.png": partial(figures.effect_and_damage, steered)}
    if text.has_readings(steered):
        pictures["readings.png"] = partial(figures.readings_of_sites, steered)
    if figures.has_map(steered):
        pictures["map.png"] = partial(figures.map_of_readings, steered)
    pages = {
        "README.md": lambda drawn: _markdown(steered, folder, drawn, told),
        "report.html": lambda drawn: _html(steered, folder, drawn, told),
    }
    frame.write(steered.info, folder, pictures, pages)


# ---------------------------------------------------------------- what both pages say


def _method(steered: Steered) -> list[str]:
    """Sentences on what was done and measured."""
    info = steered.info
    what = {
        "swap": "the target's state was written into the source's, in the chosen dimensions",
        "set": "the source's state was moved by the smallest change in the chosen dimensions after "
        "which the run's probe reads the target's place",
        "patch": "the target's whole state was written in place of the source's",
    }
    when = {
        "prompt": "in the prompt", "steps": "at every generated token",
        "both": "in the prompt and at every generated token",
    }  # fmt: skip
    said = [
        f"A pair is a source, which is run, and a target. At {info['site']}, on the tokens of role "
        f"{info['role']!r}, {when[info['phase']]}, {what[info['mode']]}."
    ]
    if asked := text.first_asked(steered):
        said.append(f"The first source is asked: {asked!r}.")
    if info["mode"] != "patch":
        said.append(f"Dimensions are ranked by {info['ranking']}, from the run's probe there.")
    read = info["read_at"]
    km = [f"km: from the target's place to what the run's probe at {read} reads."] if read else []
    said += text.fitted(steered)
    said += [f"Control {c}: {text.CONTROL_WORDS[c]}." for c in text.controls(steered)]
    said += [
        "An answer names a place where a gazetteer finds one of its names or aliases as whole "
        "words. What stands in the prompt, or is the same for both places, does not count.",
        "Log odds: log p(target's name) - log p(source's name) where the answer begins, in nats.",
        "KL: from the unedited model's next-token distribution, over the tokens of the unedited "
        "answer, in nats. Perplexity: of the answer, under the unedited model.",
        *km,
        "Repetition: the share of an answer's word triples that it has said before. Stability: how "
        "much of the unedited answer is still there, names of places apart (ROUGE-L; 1: all).",
        "In parentheses, and as bars or bands: 95 % bootstrap intervals over pairs; the exact ones "
        "of Clopper and Pearson where a rate is 0 or 100 %. Pairs that share a source or a target "
        "are not independent, so they are somewhat too narrow.",
    ]
    if text.tested(steered):
        said += [
            "p: two-sided, against as many random dimensions of the same share, of the same pairs "
            "(one draw of them; McNemar's exact test, or sign flips), not corrected for the number "
            "of rows.",
        ]
    if len(text.shares(steered)) > 1:
        said.append(
            "The finding, the answers side by side and the map are of the first share that was "
            "asked for, so that these answers have not chosen it."
        )
    ran = [f"{name} {info[name]}" for name in ("device", "dtype") if info.get(name)]
    return [*said, f"It ran with {', '.join(ran)}."] if ran else said


def _caption(steered: Steered, name: str) -> str:
    share = text.share_words(text.shown_share(steered))
    if name == "map.png":
        control = text.shown_control(steered)
        return (
            f"The first {figures.MAP_PAIRS} pairs with a reading, at a share of {share}: from the "
            "source's place (dot) an arrow to where the run's probe reads "
            f"{steered.info['read_at']} after the edit, a dotted line from there to the target's "
            "place (ring). An edit that works has its arrowheads in the rings; the panel below "
            f"shows the same pairs {f'with {control}' if control else 'unedited'}."
        )
    if name == "readings.png":
        return (
            "Distance from the target's place to what the run's probes of later sites read, mean "
            f"over pairs, at a share of {share}; bands: 95 % intervals, dashed: the unedited model."
        )
    return (
        "Effect and damage, with 95 % intervals over pairs; the dashed line is the unedited model. "
        "Over damage, the best edit is at the top left: it moves the answer and nothing else."
    )


def _examples_caption(steered: Steered, shown: int) -> str:
    share = text.share_words(text.shown_share(steered))
    return (
        f"The first {shown} pairs of the table, whatever became of them; the edit and its control "
        f"at a share of {share}."
    )


def _again(told: Path) -> str:
    name = json.dumps(str(told), ensure_ascii=False)
    return f"{_OPEN.format(name=name)}\n{_USES}"


_OPEN = "import geofast as gf\n\nsteered = gf.open_steered({name})"
_USES = """steered.summary   # a row per arm and share
steered.pairs     # a row per pair, arm and share, with the answer
steered.readings  # a row per arm, share and later site
print(steered)    # what this page says"""


def _tables(steered: Steered) -> list[tuple[str, Table]]:
    found = [("Effect", text.effect_table(steered)), ("Damage", text.damage_table(steered))]
    if text.has_readings(steered):
        share = text.share_words(text.shown_share(steered))
        heading = f"Mean km from the target's place to what later sites read, at a share of {share}"
        found.append((heading, text.readings_table(steered)))
    if study := text.study_table(steered):
        found.append(("The study's own scores, by substrings", study))
    return found


# ---------------------------------------------------------------- README.md


def _markdown(steered: Steered, folder: Path, pictures: list[str], told: Path) -> str:
    parts = [f"# {text.headline(steered)}", " ".join(text.finding(steered))]
    for name in pictures:
        caption = _caption(steered, name)
        parts.append(f"![{caption}]({name})\n\n{caption}")
    for heading, table in _tables(steered):
        parts += [f"## {heading}", table.markdown()]
    if found := text.examples(steered):
        caption = _examples_caption(steered, len(found))
        parts += ["## Answers side by side", f"{caption} **The target's place**, *the source's*."]
        parts.append(_examples_markdown(found))
    if lines := text.left_out(steered):
        parts += ["## Left out", "\n".join(f"- {line}" for line in lines)]
    parts += ["## Open it again", f"```python\n{_again(told)}\n```"]
    parts += ["## Method", "\n".join(f"- {line}" for line in _method(steered))]
    if steered.info.get("warnings"):
        parts += ["## Warnings", "\n".join(f"- {w}" for w in steered.info["warnings"])]
    parts += ["## Use", frame.use("pairs.csv") + _EDITED]
    return "\n\n".join(parts) + "\n"


def _examples_markdown(found: Sequence[text.Example]) -> str:
    def plain(words: str) -> str:
        return re.sub(r"([\\`*_\[\]<>#])", r"\\\1", words)

    columns = _columns(found)
    cells = []
    for one in found:
        line = [f"{plain(one.source)} → {plain(one.target)}"]
        for column in columns:
            answer = one.answers.get(column)
            words = _marked(answer.text, one, plain, "**{}**", "*{}*") if answer else ""
            line.append(words)
        cells.append(line)
    return Table(["pair", *columns], cells, 1 + len(columns)).markdown()


def _columns(found: Sequence[text.Example]) -> list[str]:
    return list(dict.fromkeys(column for one in found for column in one.answers))


def _marked(
    answer: str, one: text.Example, plain: Callable[[str], str], target: str, source: str
) -> str:
    """Mark the names of both places in an answer; `plain` makes other words harmless."""
    kinds = {name.casefold(): source for name in one.own}
    kinds |= {name.casefold(): target for name in one.other if name.casefold() not in kinds}
    if not kinds:
        return plain(answer)
    longest = sorted(kinds, key=len, reverse=True)
    either = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, longest))})(?!\w)", re.IGNORECASE)
    pieces = either.split(answer)  # names are at odd places
    return "".join(
        kinds[piece.casefold()].format(plain(piece)) if i % 2 else plain(piece)
        for i, piece in enumerate(pieces)
    )


# ---------------------------------------------------------------- report.html


def _html(steered: Steered, folder: Path, pictures: list[str], told: Path) -> str:
    body = [f'<p class="finding">{escape(" ".join(text.finding(steered)))}</p>']
    body += [frame.picture(folder / name, _caption(steered, name)) for name in pictures]
    for heading, table in _tables(steered):
        body += [f"<h2>{escape(heading)}</h2>", frame.table(table)]
    if found := text.examples(steered):
        body += ["<h2>Answers side by side</h2>", _examples_html(found)]
        said = _examples_caption(steered, len(found))
        body.append(f'<p class="note">{escape(said)} {_LEGEND}</p>')
    if lines := text.left_out(steered):
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        body.append(f"<h2>Left out</h2><ul>{items}</ul>")
    items = "".join(f"<li>{escape(line)}</li>" for line in _method(steered))
    body.append(f"<h2>Method</h2><ul>{items}</ul>")
    for message in steered.info.get("warnings", []):
        body.append(f'<p class="note">Warning: {escape(str(message))}</p>')
    body.append(f"<h2>Open it again</h2><pre>{escape(_again(told))}</pre>")
    body.append(f"<h2>Use</h2><p>{escape(frame.use('pairs.csv') + _EDITED)}</p>")
    body.append("<h2>Everything</h2>")
    for name, table in (("summary", steered.summary), ("readings", steered.readings)):
        whole = frame.table(frame.whole(table))
        body.append(f"<details><summary>The whole table, {name}.csv</summary>{whole}</details>")
    facts = frame.facts(steered.info, {"warnings", "samples", "edits"})
    body.append(f"<details><summary>How it was made, steering.json</summary>{facts}</details>")
    return frame.document(text.headline(steered), [_MARKS, *body])


def _examples_html(found: Sequence[text.Example]) -> str:
    columns = _columns(found)
    target, source = '<mark class="target">{}</mark>', '<mark class="source">{}</mark>'
    rows = []
    for one in found:
        cells = [f"<td>{escape(one.source)} → {escape(one.target)}</td>"]
        for column in columns:
            answer = one.answers.get(column, text.Answer("", ""))
            words = f"<p>{_marked(answer.text, one, escape, target, source)}</p>"
            if answer.verdict:
                words += f'<p class="note">{escape(answer.verdict)}</p>'
            cells.append(f"<td>{words}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f'<th class="word">{escape(c)}</th>' for c in ("pair", *columns))
    return (
        f'<div class="scroll"><table class="answers"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
