"""Controls: what a probe finds without the model's training, or without the model at all.

`random-weights` probes a twin of the model that nobody trained; `pixels` and `tokens` probe the
input itself, as the site `input`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from .data import Samples
from .data.stream import batches
from .extract import Extracted, Storage
from .gram import Gram
from .models import Model

CONTROLS = ("random-weights", "pixels", "tokens")
SIDE = 16
"""Of a thumbnail, in pixels."""
VOCABULARY = 1024
"""How many kinds of tokens a bag counts at most."""

_INPUT = {"pixels": "image", "tokens": "text"}
_BLOCK = 1024  # samples at a time


def check_controls(names: Sequence[str], kind: str, baselines: Iterable[str]) -> None:
    """Refuse controls that there are not, or not of such samples.

    Raises
    ------
    ValueError
        For an unknown name, a raw input of another kind, or a baseline of the same name.
    """
    for name in names:
        if name not in CONTROLS:
            raise ValueError(f"unknown control {name!r}; there is {', '.join(CONTROLS)}")
        if name in _INPUT and _INPUT[name] != kind:
            msg = f"the control {name!r} is for samples of kind {_INPUT[name]}; these are {kind}"
            raise ValueError(f"{msg}: leave it out")
        if name in baselines:
            raise ValueError(f"the baseline {name!r} has a control's name; give it another")


def check_tokens(model: Model, inputs: Mapping[str, Samples]) -> None:
    """Refuse a bag of tokens of a model whose tokens cannot be counted.

    Raises
    ------
    ValueError
        When it is given no token ids.
    """
    samples = next(iter(inputs.values()))
    next(_token_ids(model, samples.inputs[:1]))


def raw_inputs(
    name: str,
    model: Model,
    inputs: Mapping[str, Samples],
    storage: Storage,
    kept: NDArray[np.int64],
    workers: int,
) -> Extracted:
    """Read the inputs themselves, as a pass over a model would read its sites.

    `pixels` are an image's 16 x 16 RGB thumbnail, 768 numbers. `tokens` count, in a text as `model`
    is given it, prompt included, each of the 1024 token ids that are the most frequent over all
    these texts.

    Parameters
    ----------
    name
        `pixels` or `tokens`.
    model
        Whose tokens are counted.
    inputs
        Samples by prompt, as `extract.worded` returns them.
    storage
        Rows or statistics, with targets and cells of all the samples.
    kept
        Which samples went through the model.
    workers
        Processes that decode images.

    Returns
    -------
    Extracted
        Rows [n, d] or statistics under `input/NAME`, or `input/NAME/PROMPT`.

    Raises
    ------
    ValueError
        When the model is given no `input_ids`, or an image cannot be read again.
    """
    rows, grams = {}, {}
    for label, samples in inputs.items():
        key = "/".join(filter(None, ("input", name, label)))
        samples = samples.take(kept)
        blocks = _thumbnails(samples, workers) if name == "pixels" else _bags(model, samples)
        if storage.kind == "rows":
            rows[key] = torch.cat([*blocks])
        else:
            grams[key] = _gram(blocks, storage, torch.from_numpy(kept))
    if storage.kind == "rows":
        return Extracted(kept, rows, None)
    return Extracted(kept, None, grams)


def _gram(blocks: Iterator[torch.Tensor], storage: Storage, kept: torch.Tensor) -> Gram:
    y, cell = storage.targets[kept], storage.cell[kept]
    gram: Gram | None = None
    done = 0
    for x in blocks:
        gram = gram or Gram(x.shape[1], y.shape[1], storage.count)
        part = slice(done, done + len(x))
        gram.update(x, y[part], cell[part])
        done += len(x)
    assert gram is not None  # no samples, no pass
    return gram


# ------ images


def thumbnail(image: Image.Image) -> torch.Tensor:
    """Return the 16 x 16 RGB pixels of an image, each the mean of its area from 0 to 1: [768]."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small, dtype=np.float32).ravel() / 255)


def _thumbnails(samples: Samples, workers: int) -> Iterator[torch.Tensor]:
    everyone = range(len(samples))
    stream = batches(samples, everyone, _BLOCK, transform=thumbnail, workers=workers, strict=True)
    for batch in stream:
        yield torch.stack(batch.inputs)


# ------ texts


def _bags(model: Model, samples: Samples) -> Iterator[torch.Tensor]:
    """Yield counts of tokens, float32 [block, at most 1024]."""
    ids = [one for part in _token_ids(model, samples.inputs) for one in part]
    kinds, times = torch.cat(ids).unique(return_counts=True)
    frequent = times.sort(descending=True, stable=True).indices[:VOCABULARY]
    column = torch.full((int(kinds.max()) + 1,), -1)
    column[kinds[frequent]] = torch.arange(len(frequent))
    for start in range(0, len(ids), _BLOCK):
        block = ids[start : start + _BLOCK]
        text = torch.arange(len(block)).repeat_interleave(torch.tensor([*map(len, block)]))
        at = column[torch.cat(block)]
        bag = torch.zeros(len(block), len(frequent))
        yield bag.index_put_((text[at >= 0], at[at >= 0]), torch.tensor(1.0), accumulate=True)


def _token_ids(model: Model, texts: Sequence[Any]) -> Iterator[list[torch.Tensor]]:
    for start in range(0, len(texts), _BLOCK):
        part = list(texts[start : start + _BLOCK])
        batch = model.collate([model.transform(t) for t in part] if model.transform else part)
        ids = batch.get("input_ids", batch.get("inputs"))  # the latter is open_clip's
        if ids is None or ids.is_floating_point():
            got = ", ".join(batch)
            msg = f"the control 'tokens' counts input_ids, and prepare= of {model.name} makes {got}"
            raise ValueError(msg)
        mask = batch.get("attention_mask", batch.get("real"))  # the latter is SigLIP's
        mask = torch.ones_like(ids) if mask is None else mask
        yield [one[real] for one, real in zip(ids, mask.bool(), strict=True)]
