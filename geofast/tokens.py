"""`tokens`: what every token of a model is, and where in the image it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os.path import isfile
from typing import Any

import pandas as pd
import torch
from torch import nn

from .capture import Recorder, modules_around
from .data.samples import SampleError, decode, reason_of
from .models import Model, Site, Stage, Tower
from .models.example import examples_of
from .models.layout import Call, Layout, as_tokens
from .models.places import find_grids, image_places, patch_places, projected_places
from .pooling import ROLES, role_bit
from .rows import Rows

_COLUMNS = ["site", "prompt", "sample", "token", "role", "last", "tile", "row", "column", "text"]
_QUESTION = "Where was this photo taken?"
_LINES, _WIDE, _FIRST = 16, 64, 10  # what a listing shows of a site, of a text, of an order


def tokens(
    model: Model, inputs: Sequence[Any], sites: str | Sequence[str] | None = None
) -> pd.DataFrame:
    """Tell what every token is at a site, and which part of the image it stands for.

    Parameters
    ----------
    model
        From `load`. One that talks about images is asked its `prompts`.
    inputs
        As the model takes them: PIL images, strings, or latitudes and longitudes.
    sites
        Names or globs (`vision.layers.*`); None takes the `embed` of every tower, and the
        projector. The tokens are the same in every layer of most models; those of Swin and
        ConvNeXt get fewer from stage to stage.

    Returns
    -------
    pandas.DataFrame
        A row a token: `site`; `prompt`, empty outside a language model that is asked one; `sample`
        and `token`, both from 0, the tokens of a sample's tiles end to end, in the order in which
        the model has them; `role`: `cls`, `register`, `patch`, `image`, `text`, `padding`, `vector`
        where a site is one vector a sample, or `other` for what is none of these and only counts
        for `all` (what stands around an image: its start, its end, the breaks between its lines);
        `last`, whether it is the one that the pool `last` takes; `tile`, `row` and `column` from 0,
        counted from the top left of the tile, in patches, or where a projector merges them in
        merged ones; -1 for what is no part of the image and where it is not known; `text`, the
        token in words, for what reads text.

        Tiles are numbered as the processor cuts them: LLaVA-NeXT and OneVision put the whole image
        first, InternVL and Idefics 3 last; the tiles between go row by row.

    Raises
    ------
    ValueError
        When a pattern matches no site, and as `capture` does.
    """
    chosen = [f"{t.name}.embed" if t.blocks else t.name for t in model.towers]
    wanted = model.sites(chosen if sites is None else sites)
    # What the language model is told of an image, its vision tower saw before.
    watched = [s for s in model.every_site if s in wanted or s.name == "vision.embed"]
    heard: list[_Heard] = []
    asked = [""]
    with ExitStack() as hooks:
        for stage in model.stages:
            names = {t.name for t in stage.towers}
            if here := [s for s in watched if s.tower in names]:
                _Listener(stage, here, heard, asked).attach(hooks)
        batch = model.prepare(inputs)
        model.until(wanted).forward(batch, lambda i: asked.append(model.prompts[i]))
    seen = next((one for one in heard if one.site.name == "vision.embed"), None)
    return pd.concat(
        [_table(model, one, seen) for one in heard if one.site in wanted], ignore_index=True
    )


@dataclass(frozen=True)
class _Heard:
    """A site as a forward pass met it."""

    site: Site
    stage: Stage
    prompt: str
    shape: torch.Size
    call: Call
    layout: Layout

    @property
    def tower(self) -> Tower:
        """The tower of the site; of a projector, the vision tower before it."""
        name = "vision" if self.site.tower == "projector" else self.site.tower
        return next(t for t in self.stage.towers if t.name == name)

    @property
    def around(self) -> list[nn.Module]:
        """The modules from the one that was called down to the tower's blocks."""
        return modules_around(self.stage.body, self.tower.blocks[0])


class _Listener(Recorder):
    """Hooks that keep what is known of the tokens, in place of rows."""

    def __init__(
        self, stage: Stage, sites: Sequence[Site], heard: list[_Heard], asked: list[str]
    ) -> None:
        super().__init__(stage, sites, {s.tower: () for s in sites}, Rows())
        self._stage, self._heard, self._asked = stage, heard, asked

    def _read(self, site: Site, hidden: torch.Tensor) -> None:
        tokens = as_tokens(site, self._towers[site.tower], hidden, self._call)
        layout, _ = self._layout(site, tokens)
        prompt = self._asked[-1] if site.tower == "lm" else ""
        self._heard.append(_Heard(site, self._stage, prompt, hidden.shape, self._call, layout))
        self._seen.add(site.name)


def _table(model: Model, one: _Heard, seen: _Heard | None) -> pd.DataFrame:
    roles, starts = one.layout.roles.cpu(), one.layout.starts
    if starts is None:
        starts = tuple(range(0, roles.numel() + 1, roles.shape[1]))
    kinds = [_role(bits) for bits in roles.flatten().tolist()]
    if one.tower.tokens == "all":
        kinds = ["vector"] * len(kinds)  # of a place
    table = pd.DataFrame({"role": kinds})
    lengths = torch.tensor(starts).diff()
    table["sample"] = torch.arange(len(lengths)).repeat_interleave(lengths).numpy()
    table["token"] = table.groupby("sample").cumcount()
    real = table[table["role"] != "padding"]
    table["last"] = table.index.isin(real.groupby("sample").tail(1).index)
    table[["tile", "row", "column"]] = _places(one, seen, roles).numpy()
    table["text"] = _words(model, one.call, len(table))
    return table.assign(site=one.site.name, prompt=one.prompt)[_COLUMNS]


def _role(bits: int) -> str:
    if bits == 255:
        return "vector"
    named = [role for role in ROLES[1:] if bits >> role_bit(role) & 1]
    return named[0] if named else "other" if bits else "padding"


def _places(one: _Heard, seen: _Heard | None, roles: torch.Tensor) -> torch.Tensor:
    places = torch.full((roles.numel(), 3), -1)
    if one.site.is_vector or seen is None:
        return places
    if one.site.tower == "vision":
        return patch_places(one.around, one.tower, one.shape, one.call, one.layout)
    grids = find_grids(seen.around, seen.tower, seen.shape, seen.call, seen.layout)
    if grids is None:
        return places
    if one.site.tower == "projector":
        return projected_places(one.around, grids, roles.numel(), one.call)
    image = (roles >> role_bit("image") & 1).bool()
    if len(image) == len(grids):
        counts = image.sum(1).tolist()
        places[image.flatten()] = torch.cat(image_places(seen.around, grids, counts, seen.call))
    return places


def _words(model: Model, call: Call, tokens: int) -> list[str]:
    ids = call.given.get("input_ids", call.given.get("inputs"))
    processor = getattr(model.transform, "processor", None)
    tokenizer = getattr(model.collate, "tokenizer", getattr(processor, "tokenizer", None))
    if tokenizer is None or ids is None or ids.is_floating_point() or tokens < ids.numel():
        return [""] * tokens
    words = {i: tokenizer.decode([i]) for i in ids.unique().tolist()}
    more = [""] * (tokens // len(ids) - ids.shape[1])  # the cls that ends a text of CoCa
    return [word for row in ids.tolist() for word in [*(words[i] for i in row), *more]]


# ------ for people


def explain(model: Model, given: str | None = None) -> str:
    """Say in lines what the tokens of one example are, tower by tower.

    Parameters
    ----------
    model
        From `load`.
    given
        The path of an image, or a text: to a model that talks about images, what it is asked about
        the built-in one. None takes built-in examples, one for each tower of a model that has two.

    Raises
    ------
    ValueError
        When there is no such file and the model reads no text.
    """
    parts = []
    for view, one, called in _examples(model, given):
        table = tokens(view, [one])
        parts.append(f"example: {called}")
        parts += [_listing(str(site), rows) for site, rows in table.groupby("site", sort=False)]
    return "\n\n".join(parts)


def _examples(model: Model, given: str | None) -> list[tuple[Model, Any, str]]:
    if given is not None and isfile(given):  # Path.is_file raises for a text too long for a name
        try:
            image = decode(given)
        except Exception as error:  # Pillow's plugins raise much
            raise SampleError(given, reason_of(error)) from error
        return [(model.reading("image"), image, f"{given}, {image.width} x {image.height} pixels")]
    if given is not None and model.prompts:
        model = model.asking([given])
    elif given is not None:
        if "text" not in (model.kind, model.other.kind if model.other else ""):
            raise ValueError(f"there is no file {given}, and {model.name} reads no text")
        return [(model.reading("text"), given, repr(given))]
    elif model.prompts:
        model = model.asking([_QUESTION])
    found = []
    for view in [model, model.other] if model.other and not model.prompts else [model]:
        one = examples_of(view.kind)[1]
        called = repr(one)
        if view.kind == "image":
            called = f"an image of {one.width} x {one.height} pixels"
            called += "".join(f", asked {prompt!r}" for prompt in view.prompts)
        found.append((view, one, called))
    return found


def _listing(site: str, table: pd.DataFrame) -> str:
    counts = ", ".join(f"{n} {role}" for role, n in table["role"].value_counts(sort=False).items())
    tiles = table["tile"].max() + 1
    lines = [f"{site}: {counts}" + (f"; {tiles} tiles" if tiles > 1 else "")]
    kind = table["role"].where(table["tile"] < 0, table["role"] + table["tile"].astype(str))
    runs = [run for _, run in table.groupby((kind != kind.shift()).cumsum())]
    shown = [_line(run, tiles > 1) for run in runs]
    if len(shown) > _LINES:
        shown[_LINES - 3 : -2] = [f"  ... {len(shown) - _LINES + 1} more such lines"]
    return "\n".join(lines + shown)


def _line(run: pd.DataFrame, tiled: bool) -> str:
    first, last = run["token"].iloc[0], run["token"].iloc[-1]
    where = f"{first}" if first == last else f"{first}-{last}"
    said = ""
    if run["tile"].iloc[0] >= 0:
        said = (f"tile {run['tile'].iloc[0]}, " if tiled else "") + _grid(run)
    elif run["role"].iloc[0] == "patch":
        said = "of which part of the image, is not known"
    elif run["role"].iloc[0] == "image":
        said = "no one part of the image"
    elif run["text"].any() and run["role"].iloc[0] != "padding":
        words = " ".join(word.strip() or repr(word) for word in run["text"])
        said = words if len(words) <= _WIDE else words[:_WIDE] + " ..."
    end = "  (last)" if run["last"].any() else ""
    return f"  {where:10} {run['role'].iloc[0]:9} {said}".rstrip() + end


def _grid(run: pd.DataFrame) -> str:
    """Describe which patches of a tile follow each other, and in what order."""
    rows, columns = run["row"], run["column"]
    said = f"{_span('row', rows)}, {_span('column', columns)}"
    area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    if len(run) == area and run.equals(run.sort_values(["row", "column"])):
        return said if rows.min() == rows.max() else f"{said}, row by row"
    order = " ".join(f"{r},{c}" for r, c in zip(rows[:_FIRST], columns[:_FIRST], strict=True))
    return f"{said}, not row by row but {order} ..."


def _span(name: str, values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return f"{name} {low}" if low == high else f"{name}s {low}-{high}"
