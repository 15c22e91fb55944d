"""The checks that `doctor` makes of a model, each against the model itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from .capture import capture
from .models import Model, Stage, Tower
from .models.checkpoint import pinned
from .models.hub import said
from .models.inputs import Tokenize
from .models.layout import Call, as_tokens
from .models.model import _evaluating
from .models.reach import reaching
from .models.twin import random_twin
from .ridge import cross_validate
from .rows import Rows
from .tokens import tokens

Outcome = Literal["pass", "note", "fail", "skip"]

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_SAME = _TOLERANCE[torch.float32]
_NOISY = 2.0  # times the noise of a coarser dtype: two passes that should agree may be so far apart
_NOISE = 0.01  # of R2: what a coarser dtype may move it by
_TRAINED = 0.2  # of a tower's matrices, unlike those that nobody trained
_BATCH = 8
_NAMED = 4  # of what nobody has trained
_SEED = 1736251  # of the twin; none that people draw their own weights with


@dataclass(frozen=True)
class Check:
    """One check: what came out, and what to do about it."""

    name: str
    outcome: Outcome
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class Known:
    """Samples with places, to tell differences in R2."""

    inputs: list[Any]
    """Transformed already."""
    places: torch.Tensor
    """float64 [n, 2]."""
    fold: torch.Tensor
    """int64 [n]."""


@dataclass(frozen=True)
class Float32:
    """What a copy of the model in float32 tells of a coarser dtype. Differences are by key."""

    noise: dict[str, float]
    """How far single inputs are from it, in the model's own dtype."""
    batch: dict[str, float]
    """How far a batch is from single inputs, in float32."""
    r2: dict[str, tuple[float, float]] | None
    """As `_r2`; None without data."""


@dataclass(frozen=True)
class Given:
    """What a model is examined with."""

    examples: Sequence[Any]
    known: Known | None = None
    sites: str | Sequence[str] | None = None
    """Where two passes and batches are compared; None for every layer."""
    float32: Float32 | str = "nothing was computed in float32"
    """Or why there is none."""

    @property
    def noise(self) -> dict[str, float] | None:
        """What the dtype alone does, by key; None where nobody has measured it."""
        return None if isinstance(self.float32, str) else self.float32.noise


# ------ what is compared


def _pools(model: Model) -> dict[str, list[str]]:
    """The default pools, and the mean over all tokens, which no mistake escapes."""
    return {t.name: [t.default_pool, "mean"] for t in model.towers}


def _exact() -> Rows:
    """Rows in float64: pooled in float32, they would add a noise of their own."""
    return Rows(dtype=torch.float64)


def _rows(
    model: Model, inputs: Sequence[Any], sites: str | Sequence[str] | None = None
) -> dict[str, torch.Tensor]:
    with capture(model, sites, _pools(model), rows=_exact()) as rows:
        model.forward(model.prepare(inputs), lambda i: setattr(rows, "label", str(i)))
    return dict(rows)


def _one_by_one(
    model: Model, inputs: Sequence[Any], sites: str | Sequence[str] | None = None
) -> dict[str, torch.Tensor]:
    alone = [_rows(model, [one], sites) for one in inputs]
    return {key: torch.cat([rows[key] for rows in alone]) for key in alone[0]}


def _differences(
    rows: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Return the largest difference at every key, relative to the spread of the inputs."""
    found = {}
    for key, x in expected.items():
        spread = (x - x.mean(0)).norm(dim=1).mean()
        least = 0.1 * x.norm(dim=1).mean()  # inputs may be much the same
        off = (rows[key] - x).norm(dim=1).max()
        found[key] = float(off / torch.maximum(spread, least)) if off else 0.0
    return found


def _judge(
    model: Model, off: Mapping[str, float], advice: str, noise: Mapping[str, float] | None = None
) -> Check:
    """Judge differences, by the noise of the model's dtype where that is known."""
    limit = dict.fromkeys(off, _TOLERANCE.get(model.dtype, _SAME))
    if noise is not None:
        limit = {key: max(_SAME, _NOISY * noise[key]) for key in off}
    where = max(off, key=lambda key: off[key] / limit[key])
    detail = "no difference"
    if any(off.values()):
        detail = f"off by {off[where]:.1e} of the inputs' spread at most, at {where}"
        if noise is not None:
            narrow = str(model.dtype).removeprefix("torch.")
            detail += f", where {narrow} alone makes {noise[where]:.1e}"
    fine = off[where] <= limit[where]
    return Check("", "pass" if fine else "fail", detail, "" if fine else advice)


def in_float32(model: Model, given: Given) -> Float32 | str:
    """Return what a copy of `model` in float32 tells of its dtype, or why there is none."""
    if model.dtype == torch.float32:
        return "float32 is what it runs in"
    if why := pinned(model.module):
        return why
    try:
        exact = copy.deepcopy(model)
        exact.module.float()
        alone = _one_by_one(exact, given.examples, given.sites)
        return Float32(
            _differences(_one_by_one(model, given.examples, given.sites), alone),
            _differences(_rows(exact, given.examples, given.sites), alone),
            None if given.known is None else _r2(exact, given.known),
        )
    except RuntimeError as error:  # no memory for it, or no kernel
        return f"a copy in float32 cannot be run: {said(error)}"


def _r2(model: Model, known: Known) -> dict[str, tuple[float, float]]:
    """Held-out R2 of every site, and its standard error over folds; below 0 is as good as 0."""
    model = replace(model, transform=None)
    with capture(model) as rows:
        for start in range(0, len(known.inputs), _BATCH):
            model.forward(model.prepare(known.inputs[start : start + _BATCH]))
    found = {}
    for key, x in rows.items():
        r2 = cross_validate(x, known.places, known.fold).r2
        assert r2 is not None
        by_fold = r2.mean(1).clamp_min(0)
        found[key] = float(by_fold.mean()), float(by_fold.std() / len(by_fold) ** 0.5)
    return found


# ------ passes


def _repeats(model: Model, given: Given) -> Check:
    once, again = (_rows(model, given.examples, given.sites) for _ in range(2))
    advice = "something in the model is random, as masking or dropout is: switch it off"
    return _judge(model, _differences(again, once), advice, given.noise)


def _batch(model: Model, given: Given) -> Check:
    alone = _one_by_one(model, given.examples, given.sites)
    off = _differences(_rows(model, given.examples, given.sites), alone)
    advice = "padding or batching changes the result: use batch_size=1 (--batch-size)"
    check = _judge(model, off, advice, given.noise)
    if check.outcome == "fail" or isinstance(given.float32, str):
        return check
    # What samples do to each other may be less than the noise.
    where, most = max(given.float32.batch.items(), key=lambda item: item[1])
    if most <= _SAME:
        return check
    detail = f"in float32 off by {most:.1e} of the inputs' spread at most, at {where}"
    return Check("", "fail", detail, advice)


def _padding(model: Model, given: Given) -> Check:
    batch = model.prepare(given.examples)
    texts = batch["prompts"][0] if "prompts" in batch else batch
    mask = texts.get("attention_mask")
    if mask is None or model.kind == "location":
        why = "reads its padding, always on the right" if model.kind == "text" else "has no padding"
        return Check("", "skip", f"the model {why}")
    if bool(mask.all()):
        return Check("", "skip", "the examples are of one length")
    alone = {key.removesuffix("/0"): x for key, x in _one_by_one(model, given.examples).items()}
    left = _to_the_left(texts)
    moved = {**batch, "prompts": [left]} if "prompts" in batch else left
    rows = []
    for padded in (batch, moved):
        with capture(model, pool=_pools(model), rows=_exact()) as one:
            model.forward(padded)
        rows.append(dict(one))
    on_the_right, on_the_left = (_differences(found, alone) for found in rows)
    noise = given.noise and {key.removesuffix("/0"): x for key, x in given.noise.items()}
    advice = "the model reads its padding: use batch_size=1 (--batch-size)"
    check = _judge(model, on_the_right, advice, noise)
    if check.outcome == "fail":
        return check
    check = _judge(model, on_the_left, "", noise)
    if check.outcome == "pass":
        return check
    detail = f"{check.detail}, padded on the left; geofast pads on the right, where texts are right"
    return Check("", "note", detail)


def _to_the_left(batch: Mapping[str, Any]) -> dict[str, Any]:
    mask = batch["attention_mask"]
    order = mask.argsort(dim=1, stable=True)  # padding first
    tensors = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}
    moved = {k: v.gather(1, order) for k, v in tensors.items() if v.shape == mask.shape}
    return {**batch, **moved}


# ------ hooks


def _hidden_states(model: Model, given: Given) -> Check:
    batch = model.prepare(given.examples)
    notes: list[str] = []
    none: list[str] = []
    if "prompts" in batch:  # twice the same: what the first does to the image shows in the second
        batch["prompts"] *= 2
    mine = _raw(model, partial(model.forward, batch))
    with _evaluating(model.module), torch.inference_mode():
        if unlike := _unlike_whole(model, batch, mine):
            return _misplaced(unlike)
        for stage, arguments in _calls(model, batch):
            states = _states(stage, arguments)
            for tower in stage.towers:
                if not tower.blocks:
                    continue
                if states is None or len(states) != 1 + len(tower.blocks):
                    none.append(tower.name)
                elif wrong := _unlike(tower, mine, states):
                    known, detail = wrong
                    if not known:
                        return _misplaced(detail)
                    notes.append(detail)
    if none:
        notes.append(f"the model gives none of {', '.join(none)}")
    return Check("", "note" if notes else "pass", "; ".join(notes) or "every site is the same")


def _misplaced(detail: str) -> Check:
    return Check("", "fail", detail, "the hooks read another place: report this model")


def _unlike_whole(
    model: Model, batch: Mapping[str, Any], mine: Mapping[str, torch.Tensor]
) -> str | None:
    """Say where two calls, the image's and the prompt's, do not give what one for both does."""
    if "prompts" not in batch:
        return None
    stage, arguments = _calls(model, batch)[-1]
    whole = _raw(model, partial(stage.body, **arguments))
    wrong = [name for name, x in mine.items() if name not in whole or not _same(x, whole[name])]
    if not wrong:
        return None
    said = f"{len(wrong)} of {len(mine)} sites differ from those of one call for image and prompt"
    return f"{said}, the first {wrong[0]}"


def _unlike(
    tower: Tower, mine: Mapping[str, torch.Tensor], states: Sequence[torch.Tensor]
) -> tuple[bool, str] | None:
    """Say where a tower's sites differ from the hidden states, and whether that is known."""
    layers = [f"{tower.name}.layers.{i}" for i in range(len(tower.blocks))]
    names = [f"{tower.name}.embed", *layers]
    wrong = [name for name, y in zip(names, states, strict=True) if not _same(mine[name], y)]
    if not wrong:
        return None
    normed = mine.get(f"{tower.name}.norm")
    if wrong == layers[-1:] and normed is not None and _same(normed, states[-1]):
        return True, f"{layers[-1]}: theirs is after the final norm, geofast's before it"
    return False, f"{len(wrong)} of {len(names)} sites differ, the first {wrong[0]}"


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two passes gave one tensor; a GPU may sum in another order from pass to pass."""
    if x.shape != y.shape:
        return False
    limit = max(1e-5, 2 * torch.finfo(y.dtype).eps)
    return bool((x.double() - y.double()).norm() <= limit * y.double().norm())


def _calls(model: Model, batch: Mapping[str, Any]) -> list[tuple[Stage, dict[str, Any]]]:
    if "prompts" not in batch:
        return [(model.stages[0], dict(batch))]
    image = {k: v for k, v in batch["image"].items() if k != "tiles"}
    look, talk = model.stages
    return [(look, batch["image"]), (talk, {**image, **batch["prompts"][0]})]


def _states(stage: Stage, given: Mapping[str, Any]) -> Sequence[torch.Tensor] | None:
    try:
        out = stage.body(**given, output_hidden_states=True, return_dict=True)
    except TypeError:  # not a model of transformers
        return None
    states: Sequence[torch.Tensor] | None = getattr(out, "hidden_states", None)
    return states


def _raw(model: Model, call: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """Return the hidden states before, between and after the blocks while `call` runs the model."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, hidden: torch.Tensor) -> None:
        seen[name] = hidden

    norms = [site for site in model.every_site if site.name.endswith(".norm")]
    with ExitStack() as hooks:
        for site in [*model.sites(), *norms]:
            hooks.callback(site.watch(partial(keep, site.name)).remove)
        call()
    return seen


# ------ roles


def _roles(model: Model, given: Given) -> Check:
    """Hold what geofast calls a token against what it depends on, and against the processor."""
    parts: list[Check] = []
    for tower in model.towers:
        if model.kind == "image" and tower.tokens == "patch" and tower.blocks:
            parts.append(_patches(model, tower, given.examples))
        elif model.kind == "image" and tower.image_token is not None:
            parts.append(_image_tokens(model, tower, given.examples))
        elif model.kind == "text" and tower.blocks:
            parts.append(_texts(model, tower, given.examples))
    if not parts:
        return Check("", "skip", "a place is one vector")
    failed = [part for part in parts if part.outcome == "fail"]
    return failed[0] if failed else replace(parts[0], detail="; ".join(p.detail for p in parts))


def _misread(detail: str) -> Check:
    return Check("", "fail", detail, "tokens are taken for what they are not: report this model")


def _read(model: Model, tower: Tower, inputs: Sequence[Any]) -> list[list[str]]:
    """Return what geofast says of the tokens before a tower's first block, by sample."""
    told = tokens(model, inputs, f"{tower.name}.embed")
    told = told[told["prompt"] == told["prompt"].iloc[0]]
    return [list(one["role"]) for _, one in told.groupby("sample")]


def _embedded(model: Model, tower: Tower, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return what the first block of a tower is given: [sequences, tokens, dim]."""
    (site,) = model.sites(f"{tower.name}.embed")
    seen: list[torch.Tensor] = []
    with ExitStack() as hooks:
        hooks.callback(site.watch(seen.append).remove)
        replace(model, stop=site).forward(batch)
    return as_tokens(site, tower, seen[0], Call(batch.get("image", batch)))


def _patches(model: Model, tower: Tower, images: Sequence[Any]) -> Check:
    """What changes when images are turned into their negatives is a patch, nothing else is.

    A patch of a margin that the processor adds, and that the model takes for image, changes with
    the pixels alone. How many patches there are is told by the processor too, where it does.
    """
    roles = _read(model, tower, images)
    batch = model.prepare(images)
    plain = _embedded(model, tower, batch)
    of_image, of_pixels = (
        (_embedded(model, tower, other) != plain).any(-1).flatten().tolist()
        for other in (model.prepare([*map(_negative, images)]), _other_pixels(batch))
    )
    called = [role for mine in roles for role in mine]
    if len(of_image) != len(called) or not any(of_image) or "patch" not in called:
        return _misread(f"{tower.name}: {sum(of_image)} of {len(of_image)} tokens see the image")
    before, counted = of_image.index(True), called.index("patch")
    if before != counted:
        said = ", ".join(called[:counted]) or "none"
        return _misread(f"{before} tokens come before the patches; geofast counts {said}")
    owner = [(i, place) for i, mine in enumerate(roles) for place in range(len(mine))]
    for (i, place), role, sees, drawn in zip(owner, called, of_image, of_pixels, strict=True):
        if sees != (role == "patch") and not (role == "patch" and drawn):
            said = "sees the image" if sees else "does not see the image"
            return _misread(f"token {place} of example {i} {said}, and geofast calls it {role}")
    patches = [mine.count("patch") for mine in roles]
    config = _config_of_images(model)
    told = _told_by_the_processor(batch.get("image", batch), config, packed=len(plain) == 1)
    if told not in (None, patches):
        counts = " and ".join(", ".join(map(str, n)) for n in (told, patches))
        return _misread(f"patches by the processor, and as geofast counts them: {counts}")
    registers = getattr(config, "num_register_tokens", None)
    if registers is not None and tower.prefix.count("register") != registers:
        named = tower.prefix.count("register")
        return _misread(f"the config says {registers} registers, geofast {named}")
    margin = sum(role == "patch" and not sees for role, sees in zip(called, of_image, strict=True))
    added = f" ({margin} of them margin that the model takes for image)" if margin else ""
    kinds = [_counted(roles, role) for role in dict.fromkeys(called)]
    by_size = _by_size(batch, config, roles) if told is None else ", as the processor says"
    return Check("", "pass", f"{', '.join(kinds)}{added}{by_size}")


def _other_pixels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch with other numbers wherever there are pixels, margins included."""
    pixels = batch.get("image", batch)
    other = {
        key: 1 - x if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for key, x in pixels.items()
    }
    return {**batch, "image": other} if "image" in batch else other


def _counted(roles: Sequence[Sequence[str]], role: str) -> str:
    counts = [mine.count(role) for mine in roles]
    return f"{', '.join(map(str, counts if len({*counts}) > 1 else counts[:1]))} {role}"


def _config_of_images(model: Model) -> Any:
    config = getattr(model.module, "config", None)
    return getattr(config, "vision_config", None) or config


def _told_by_the_processor(
    pixels: Mapping[str, Any], config: Any, *, packed: bool
) -> list[int] | None:
    """Return how many patches each image has by the processor's grids, sizes or masks."""
    for name in ("image_grid_thw", "spatial_shapes"):
        if name in pixels:
            return [int(n) for n in pixels[name].prod(1)]
    mask = pixels.get("pixel_attention_mask", pixels.get("image_attention_mask"))
    side = getattr(config, "patch_size", None)
    if mask is None and packed and "image_sizes" in pixels and isinstance(side, int):
        return [int(n) for n in (pixels["image_sizes"] // side).prod(1)]
    if mask is None:
        return None
    of_pixels = mask.shape[-2:] == pixels["pixel_values"].shape[-2:]
    if mask.ndim == 4 and of_pixels and isinstance(side, int):
        mask = nn.functional.max_pool2d(mask.float(), side)
    tiles = pixels.get("tiles", torch.ones(len(mask), dtype=torch.int64)).tolist()
    return [int((m[:n] if m.ndim == 3 else m).sum()) for m, n in zip(mask, tiles, strict=True)]


def _by_size(batch: Mapping[str, Any], config: Any, roles: Sequence[Sequence[str]]) -> str:
    """Say how many patches the processor's pixels make, where the config tells their size."""
    pixels = batch.get("image", batch)
    values, side = pixels.get("pixel_values"), getattr(config, "patch_size", 0)
    sides = [side, side] if isinstance(side, int) else side
    if values is None or values.ndim < 4 or len(sides) != 2 or not all(sides):
        return ""
    height, width = (n // s for n, s in zip(values.shape[-2:], sides, strict=True))
    tiles = pixels["tiles"].tolist() if "tiles" in pixels else [1] * len(roles)
    verb = (
        "as" if [m.count("patch") for m in roles] == [n * height * width for n in tiles] else "but"
    )
    several = f"{', '.join(map(str, tiles if len({*tiles}) > 1 else tiles[:1]))} x "
    return f", {verb} {several if max(tiles) > 1 else ''}{height} x {width} by patch_size"


def _negative(image: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.invert(image.convert("RGB"))


def _image_tokens(model: Model, tower: Tower, images: Sequence[Any]) -> Check:
    """What changes with the image is an image's token, and has the id that the processor gives."""
    roles = _read(model, tower, images)
    batch = model.prepare(images)
    ids = batch["prompts"][0]["input_ids"]
    negative = model.prepare([*map(_negative, images)])
    changed = _embedded(model, tower, batch) != _embedded(model, tower, negative)
    marked = _marked(model, ids)
    for i, (mine, of_image) in enumerate(zip(roles, changed.any(-1).tolist(), strict=True)):
        image = [role == "image" for role in mine]
        for place, sees in enumerate(of_image):
            if sees and not image[place]:
                said = f"token {place} of example {i} sees the image, and geofast calls it"
                return _misread(f"{said} {mine[place]}: its id is {int(ids[i, place])}")
        if not any(of_image):
            return _misread(f"no token of the language model sees example {i}")
        if marked is not None and image != marked[i].tolist():
            theirs = int(marked[i].sum())
            said = f"the processor gives example {i} {theirs} image tokens, geofast counts"
            return _misread(f"{said} {sum(image)}")
    off = _pooled_otherwise(model, tower, images, "image", roles)
    if off > _TOLERANCE[torch.float32]:
        return _misread(f"mean:image is not the mean of the image tokens, by {off:.1e}")
    counts = ", ".join(str(mine.count("image")) for mine in roles)
    return Check("", "pass", f"{counts} image tokens")


def _marked(model: Model, ids: torch.Tensor) -> torch.Tensor | None:
    """Return which ids [batch, tokens] the processor has put for images, if it says so."""
    processor: Any = getattr(model.transform, "processor", None)
    # Several: first the image's, then those that stand around it. Gemma's `image_token_id` is what
    # the user writes, in whose place the image's come.
    several = getattr(processor, "image_token_ids", [getattr(processor, "image_token_id", None)])
    return None if several[0] is None else ids == several[0]


def _texts(model: Model, tower: Tower, texts: Sequence[Any]) -> Check:
    """A text has the tokens that the tokenizer makes of it alone, and no padding has a role."""
    roles = _read(model, tower, texts)
    real = [[r for r in mine if r != "padding"] for mine in roles]
    alone = [_count(model, text) + len(tower.suffix) for text in texts]
    if [*map(len, real)] != alone:
        counts = " and ".join(", ".join(map(str, c)) for c in (alone, map(len, real)))
        return _misread(f"tokens by the tokenizer, and as geofast counts them: {counts}")
    off = max(
        _pooled_otherwise(model, tower, texts, role, roles) for role in {*real[0]} - {"other"}
    )
    if off > _TOLERANCE[torch.float32]:
        return _misread(f"{tower.name}: a pool is not of the tokens that it names, by {off:.1e}")
    tokenizer = getattr(model.collate, "tokenizer", None)
    special = getattr(tokenizer, "all_special_ids", ())
    first = model.prepare(texts[:1]).get("input_ids")
    said = ", ".join(map(str, alone))
    if first is None:
        return Check("", "pass", f"{said} text tokens")
    among = sum(int(i) in special for i in first[0][: alone[0]])
    return Check("", "pass", f"{said} text tokens ({among} special ones in the first)")


def _count(model: Model, text: Any) -> int:
    """Count the tokens of a text, by transformers' tokenizer or else as it is given alone."""
    if isinstance(model.collate, Tokenize):
        return len(model.collate.tokenizer(text)["input_ids"])
    batch = model.prepare([text])
    mask = batch.get("attention_mask", batch.get("real"))
    if mask is not None:
        return int(mask.sum())
    return next(v.shape[1] for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim > 1)


def _pooled_otherwise(
    model: Model, tower: Tower, inputs: Sequence[Any], role: str, roles: Sequence[Sequence[str]]
) -> float:
    """How far the pool of a role is from the mean of the tokens that have it, relative to that."""
    site, pool = f"{tower.name}.embed", f"mean:{role}"
    hidden = _embedded(model, tower, model.prepare(inputs)).double()
    expected = [
        h[[r == role for r in mine]].mean(0).cpu() for h, mine in zip(hidden, roles, strict=True)
    ]
    with capture(model, site, {tower.name: pool}, rows=_exact()) as rows:
        model.forward(model.prepare(inputs))
    (found,) = (rows[key] for key in list(rows)[:1])
    wanted = torch.stack(expected)
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


# ------ numbers and weights


def _dtype(model: Model, given: Given) -> Check:
    if isinstance(given.float32, str):
        return Check("", "skip", given.float32)
    fine, advice = given.float32.r2, "too coarse: load the model with dtype=torch.float32 (--dtype)"
    if given.known is None or fine is None:
        advice += ", or give data (--data) to see what that does to R²"
        return _judge(model, given.float32.noise, advice)
    coarse = _r2(model, given.known)
    moved = {key: abs(coarse[key][0] - fine[key][0]) for key in fine}
    # What is less than the folds differ by is nothing that a probe would tell.
    matters = any(moved[key] > max(_NOISE, se) for key, (_, se) in fine.items())
    most = max(moved, key=lambda key: moved[key])
    detail = (
        f"{_judge(model, given.float32.noise, '').detail}; R² of {len(given.known.inputs)} samples "
        f"moves by at most {moved[most]:.4f}, at {most}, where its standard error is "
        f"{fine[most][1]:.4f}"
    )
    return Check("", "fail" if matters else "pass", detail, advice if matters else "")


def _weights(model: Model, given: Given) -> Check:
    try:
        found = _matrices(model)
        twin = random_twin(model) if given.known is not None else None
    except (ValueError, torch.OutOfMemoryError) as error:
        return Check("", "skip", said(error))
    counts, untrained = [], []
    inside: set[int] = set()
    for tower in model.towers:
        of_blocks = {id(p) for block in tower.blocks for p in block.parameters()}
        matrices = [m.trained for m in found.values() if id(m.parameter) in of_blocks]
        inside |= of_blocks
        if matrices:
            counts.append(f"{sum(matrices)} of {len(matrices)} in {tower.name}")
        if sum(matrices) < _TRAINED * len(matrices):
            untrained.append(tower.name)
    # Of embeddings, projectors and joint heads each one counts: what comes after it is noise.
    around = {
        name: m.parameter
        for name, m in found.items()
        if m.drawn and not m.trained and id(m.parameter) not in inside
    }
    untrained += reaching(model, given.examples[:1], around)
    detail = f"matrices unlike those of a random twin: {', '.join(counts)}"
    if given.known is not None and twin is not None:
        mine, random = _r2(model, given.known), _r2(twin, given.known)
        best = max(mine, key=lambda key: mine[key])
        detail += f"; R² at {best} {mine[best][0]:.3f}, of the twin {random[best][0]:.3f}"
    if not untrained:
        return Check("", "pass", detail)
    named = untrained[:_NAMED] + [f"{n} more" for n in [len(untrained) - _NAMED] if n > 0]
    return Check("", "fail", detail, f"nobody has trained {' and '.join(named)}: load weights")


@dataclass(frozen=True)
class _Matrix:
    parameter: torch.Tensor
    trained: bool
    """Whether it is unlike that of a random twin."""
    drawn: bool
    """Whether the twin's is another: positions of sines and cosines are the same in both."""


def _matrices(model: Model) -> dict[str, _Matrix]:
    twins = dict(random_twin(model, _SEED).module.named_parameters())
    return {
        name: _Matrix(p, _unlike_random(p, twins[name]), not torch.equal(p, twins[name]))
        for name, p in model.module.named_parameters()
        if p.squeeze().ndim > 1
    }


def _unlike_random(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether numbers are spread otherwise, have other tails, or rows of other lengths.

    Of GeoCLIP's finest capsule, training left the spread within 3 %, and the fourth moment, 1.8 of
    the uniform numbers that it began with, is 2.0 to 2.2. By chance, that moment of n normal
    numbers differs by sqrt(24 / n), and the spread of m lengths by 1 / sqrt(m).
    """
    (spread, tails, lengths), (its_spread, its_tails, its_lengths) = map(_moments, (a, b))
    return (
        abs(spread - its_spread) > 0.05 * its_spread
        or abs(tails - its_tails) > max(0.1, 6 * (24 / a.numel()) ** 0.5)
        or abs(lengths - its_lengths) > 6 * its_lengths / len(a.squeeze()) ** 0.5
    )


def _moments(x: torch.Tensor) -> tuple[float, float, float]:
    """Return the spread, the fourth moment relative to it, and the spread of the rows' lengths."""
    x = x.detach().float().squeeze()
    spread = x.std()
    lengths = x.flatten(1).norm(dim=1).std()
    return float(spread), float(((x - x.mean()) / spread).pow(4).mean()), float(lengths)


CHECKS: dict[str, Callable[[Model, Given], Check]] = {
    "repeats": _repeats,
    "batch": _batch,
    "padding": _padding,
    "hidden_states": _hidden_states,
    "roles": _roles,
    "dtype": _dtype,
    "weights": _weights,
}
OF_DTYPE = {"repeats", "batch", "padding", "dtype"}
"""The checks that ask what a coarser dtype does."""
