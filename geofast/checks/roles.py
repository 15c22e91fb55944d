"""What tokens are said to be, against what they depend on and what the processor says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..capture import capture
from ..models import Model, Tower
from ..models.inputs import Tokenize
from ..models.layout import Call, as_tokens
from ..tokens import tokens
from .compare import TOLERANCE, Check, Given, exact_rows


def check_roles(model: Model, given: Given) -> Check:
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
    # Hiera's patches overlap: how many there are is up to what lies between them.
    name = "patch_stride" if hasattr(config, "patch_stride") else "patch_size"
    values, side = pixels.get("pixel_values"), getattr(config, name, 0)
    sides = [side, side] if isinstance(side, int) else side
    if values is None or values.ndim < 4 or len(sides) != 2 or not all(sides):
        return ""
    height, width = (n // s for n, s in zip(values.shape[-2:], sides, strict=True))
    tiles = pixels["tiles"].tolist() if "tiles" in pixels else [1] * len(roles)
    agree = [m.count("patch") for m in roles] == [n * height * width for n in tiles]
    several = f"{', '.join(map(str, tiles if len({*tiles}) > 1 else tiles[:1]))} x "
    grid = f"{several if max(tiles) > 1 else ''}{height} x {width}"
    return f", {'' if agree else 'but '}{grid} by config.{name}"


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
    if off > TOLERANCE[torch.float32]:
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
    if off > TOLERANCE[torch.float32]:
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
    with capture(model, site, {tower.name: pool}, rows=exact_rows()) as rows:
        model.forward(model.prepare(inputs))
    (found,) = (rows[key] for key in list(rows)[:1])
    wanted = torch.stack(expected)
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max())
