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
from .models import Model, Stage, Tower, match_sites
from .models.checkpoint import pinned
from .models.hub import said
from .models.inputs import Tokenize
from .models.layout import Call, as_tokens
from .models.model import _evaluating
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
        alone = _one_by_one(exact, given.examples)
        return Float32(
            _differences(_one_by_one(model, given.examples), alone),
            _differences(_rows(exact, given.examples), alone),
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
    advice = "padding or batching changes the result: use batch_size=1"
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
    advice = "the model reads its padding: use batch_size=1"
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
    with _evaluating(model.module):
        for stage, arguments in _calls(model, batch):
            states = _states(stage, arguments)
            for tower in stage.towers:
                if not tower.blocks:
                    continue
                if states is None or len(states) != 1 + len(tower.blocks):
                    none.append(tower.name)
                elif wrong := _unlike(stage, tower, arguments, states):
                    known, detail = wrong
                    if not known:
                        advice = "the hooks read another place: report this model"
                        return Check("", "fail", detail, advice)
                    notes.append(detail)
    if none:
        notes.append(f"the model gives none of {', '.join(none)}")
    return Check("", "note" if notes else "pass", "; ".join(notes) or "every site is the same")


def _unlike(
    stage: Stage, tower: Tower, arguments: Mapping[str, Any], states: Sequence[torch.Tensor]
) -> tuple[bool, str] | None:
    """Say where a tower's sites differ from the hidden states, and whether that is known."""
    patterns = [f"{tower.name}.embed", f"{tower.name}.layers.*"]
    norm = f"{tower.name}.norm"
    mine = _raw(stage, arguments, [*patterns, norm] if tower.norm is not None else patterns)
    normed = mine.pop(norm, None)
    pairs = zip(mine.items(), states, strict=True)
    wrong = [name for (name, x), y in pairs if not _same(x, y)]
    if not wrong:
        return None
    last = f"{tower.name}.layers.{len(tower.blocks) - 1}"
    if wrong == [last] and normed is not None and _same(normed, states[-1]):
        return True, f"{last}: theirs is after the final norm, geofast's before it"
    return False, f"{len(wrong)} of {len(mine)} sites differ, the first {wrong[0]}"


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


@torch.inference_mode()
def _states(stage: Stage, given: Mapping[str, Any]) -> Sequence[torch.Tensor] | None:
    try:
        out = stage.body(**given, output_hidden_states=True, return_dict=True)
    except TypeError:  # not a model of transformers
        return None
    states: Sequence[torch.Tensor] | None = getattr(out, "hidden_states", None)
    return states


@torch.inference_mode()
def _raw(stage: Stage, given: Mapping[str, Any], patterns: list[str]) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, hidden: torch.Tensor) -> None:
        seen[name] = hidden

    with ExitStack() as hooks:
        for site in match_sites(stage.towers, patterns):
            hooks.callback(site.watch(partial(keep, site.name)).remove)
        stage.body(**given)
    return seen


# ------ roles


def _roles(model: Model, given: Given) -> Check:
    """Hold what geofast calls a token against what it depends on, and against the processor."""
    parts: list[Check] = []
    for tower in model.towers:
        if model.kind == "image" and tower.tokens == "patch" and tower.blocks:
            parts.append(_patches(model, tower, given.examples[0]))
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


def _embedded(model: Model, tower: Tower, inputs: Sequence[Any]) -> torch.Tensor:
    """Return what the first block of a tower is given: [sequences, tokens, dim]."""
    batch = model.prepare(inputs)
    (site,) = model.sites(f"{tower.name}.embed")
    seen: list[torch.Tensor] = []
    with ExitStack() as hooks:
        hooks.callback(site.watch(seen.append).remove)
        replace(model, stop=site).forward(batch)
    return as_tokens(site, tower, seen[0], Call(batch.get("image", batch)))


def _patches(model: Model, tower: Tower, image: Any) -> Check:
    """What changes when the image is turned into its negative is a patch, nothing else is."""
    (roles,) = _read(model, tower, [image])
    changed = _embedded(model, tower, [image]) != _embedded(model, tower, [_negative(image)])
    of_image = changed.any(-1).flatten().tolist()
    if len(of_image) != len(roles) or not any(of_image) or "patch" not in roles:
        return _misread(f"{tower.name}: {sum(of_image)} of {len(of_image)} tokens see the image")
    before, counted = of_image.index(True), roles.index("patch")
    if before != counted:
        said = ", ".join(roles[:counted]) or "none"
        return _misread(f"{before} tokens come before the patches; geofast counts {said}")
    wrong = [i for i, sees in enumerate(of_image) if sees and roles[i] != "patch"]
    if wrong:
        return _misread(f"token {wrong[0]} sees the image, and geofast calls it {roles[wrong[0]]}")
    config = getattr(model.module, "config", None)
    config = getattr(config, "vision_config", None) or config
    registers = getattr(config, "num_register_tokens", None)
    if registers is not None and tower.prefix.count("register") != registers:
        named = tower.prefix.count("register")
        return _misread(f"the config says {registers} registers, geofast {named}")
    kinds = [f"{roles.count(r)} {r}" for r in dict.fromkeys(roles)]
    return Check("", "pass", f"{', '.join(kinds)}{_by_size(model, image, config, roles)}")


def _by_size(model: Model, image: Any, config: Any, roles: Sequence[str]) -> str:
    """Say how many patches the processor's pixels make, where the config tells their size."""
    batch = model.prepare([image])
    pixels, side = batch.get("image", batch).get("pixel_values"), getattr(config, "patch_size", 0)
    sides = [side, side] if isinstance(side, int) else side
    if pixels is None or pixels.ndim < 4 or len(sides) != 2 or not all(sides):
        return ""
    height, width = (n // s for n, s in zip(pixels.shape[-2:], sides, strict=True))
    tiles = pixels.shape[:-3].numel()
    many = f"{tiles} x " if tiles > 1 else ""
    verb = "as" if roles.count("patch") == tiles * height * width else "but"
    return f", {verb} {many}{height} x {width} by patch_size"


def _negative(image: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.invert(image.convert("RGB"))


def _image_tokens(model: Model, tower: Tower, images: Sequence[Any]) -> Check:
    """What changes with the image is an image's token, and has the id that the processor gives."""
    roles = _read(model, tower, images)
    ids = model.prepare(images)["prompts"][0]["input_ids"]
    changed = _embedded(model, tower, images) != _embedded(model, tower, [*map(_negative, images)])
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
    hidden = _embedded(model, tower, inputs).double()
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
    fine, advice = given.float32.r2, "too coarse: load the model with dtype=torch.float32"
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
        twin = random_twin(model)
    except ValueError as error:
        return Check("", "skip", str(error))
    theirs = dict(twin.module.named_parameters())
    pairs = {id(p): (p, theirs[name]) for name, p in model.module.named_parameters()}
    said, untrained = [], []
    for tower in model.towers:
        matrices = [pairs[id(p)] for p in _matrices(tower) if id(p) in pairs]
        trained = sum(_unlike_random(a, b) for a, b in matrices)
        if matrices:
            said.append(f"{trained} of {len(matrices)} in {tower.name}")
        if trained < _TRAINED * len(matrices):
            untrained.append(tower.name)
    detail = f"matrices unlike those of a random twin: {', '.join(said)}"
    if given.known is not None:
        mine, random = _r2(model, given.known), _r2(twin, given.known)
        best = max(mine, key=lambda key: mine[key])
        detail += f"; R² at {best} {mine[best][0]:.3f}, of the twin {random[best][0]:.3f}"
    if not untrained:
        return Check("", "pass", detail)
    advice = f"nobody has trained {' and '.join(untrained)}: load weights"
    return Check("", "fail", detail, advice)


def _matrices(tower: Tower) -> list[nn.Parameter]:
    return [p for block in tower.blocks for p in block.parameters() if p.ndim > 1]


def _unlike_random(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether numbers are spread otherwise, or have other tails.

    Of GeoCLIP's finest capsule, training left the spread within 3 %, and the fourth moment, 1.8 of
    the uniform numbers that it began with, is 2.0 to 2.2. By chance, that moment of n normal
    numbers differs by sqrt(24 / n).
    """
    spread, tails = zip(*(_moments(x) for x in (a, b)), strict=True)
    chance = max(0.1, 6 * (24 / a.numel()) ** 0.5)
    differs = abs(spread[0] - spread[1]) > 0.05 * spread[1]
    return bool(differs or abs(tails[0] - tails[1]) > chance)


def _moments(x: torch.Tensor) -> tuple[float, float]:
    x = x.detach().float()
    spread = x.std()
    return float(spread), float(((x - x.mean()) / spread).pow(4).mean())


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
