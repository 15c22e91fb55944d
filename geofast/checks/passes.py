"""Two passes agree, and so do a batch, single inputs, and padding on either side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..capture import capture
from ..models import Model
from .compare import (
    SAME,
    Check,
    Given,
    differences,
    exact_rows,
    judge,
    pools_of,
    read_one_by_one,
    read_rows,
)


def check_repeats(model: Model, given: Given) -> Check:
    once, again = (read_rows(model, given.examples, given.sites) for _ in range(2))
    advice = "something in the model is random, as masking or dropout is: switch it off"
    return judge(model, differences(again, once), advice, given.noise)


def check_batch(model: Model, given: Given) -> Check:
    alone = read_one_by_one(model, given.examples, given.sites)
    off = differences(read_rows(model, given.examples, given.sites), alone)
    advice = "padding or batching changes the result: use batch_size=1 (--batch-size)"
    check = judge(model, off, advice, given.noise)
    if check.outcome == "fail" or given.float32 is None:
        return check
    # What samples do to each other may be less than the noise.
    where, most = max(given.float32.batch.items(), key=lambda item: item[1])
    if most <= SAME:
        return check
    detail = f"in float32 off by {most:.1e} of the inputs' spread at most, at {where}"
    return Check("", "fail", detail, advice)


def check_padding(model: Model, given: Given) -> Check:
    batch = model.prepare(given.examples)
    texts = batch["prompts"][0] if "prompts" in batch else batch
    mask = texts.get("attention_mask")
    if mask is None or model.kind == "location":
        why = "reads its padding, always on the right" if model.kind == "text" else "has no padding"
        return Check("", "skip", f"the model {why}")
    if bool(mask.all()):
        return Check("", "skip", "the examples are of one length")
    alone = {key.removesuffix("/0"): x for key, x in read_one_by_one(model, given.examples).items()}
    left = _to_the_left(texts)
    moved = {**batch, "prompts": [left]} if "prompts" in batch else left
    rows = []
    for padded in (batch, moved):
        with capture(model, pool=pools_of(model), rows=exact_rows()) as one:
            model.forward(padded)
        rows.append(dict(one))
    on_the_right, on_the_left = (differences(found, alone) for found in rows)
    noise = given.noise and {key.removesuffix("/0"): x for key, x in given.noise.items()}
    advice = "the model reads its padding: use batch_size=1 (--batch-size)"
    check = judge(model, on_the_right, advice, noise)
    if check.outcome == "fail":
        return check
    check = judge(model, on_the_left, "", noise)
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
