"""Asks a model about inputs under several arms of edits, every prompt read as seldom as may be."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..models import Model
from ..models.model import as_taken, evaluating, looked_at, takes_looks
from .apply import Job, edited, fitting, watching
from .edit import Edit

_GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "max_new_tokens": 20}
_LOOKS = "mm_encoder_outputs"  # as transformers calls images that were looked at

Prompt = Callable[[], dict[str, Any]]
"""Makes, at every call anew, what `run` takes to answer some rows."""

Answer = Callable[[int, list[int], Prompt], None]
"""Given the number of an arm, rows and their prompt."""


def ask(
    model: Model,
    inputs: Sequence[Any],
    arms: Sequence[Sequence[Edit]],
    answer: Answer,
    *,
    batch_size: int,
    copies: int = 1,
    share: bool = True,
    again: bool = False,
) -> None:
    """Call `answer` for some rows of `inputs` at a time under every arm, its edits in force.

    Where several rows or arms have the same input, and edits are at last tokens of the language
    model alone, all but the last token of every distinct input is read once: later tokens change
    nothing before them, unless the model looks ahead in a prompt. Other edits change what is read,
    so every row is read under every arm: once where `answer` says by `again` that it asks for each
    prompt several times. All arms of a call go the same way, so that what they differ by is edits.

    Raises
    ------
    ValueError
        Before anything runs, when an edit does not go with the model or has values for another
        number of samples; before anything is answered, when one is for another width.
    """
    for arm in arms:
        for edit in arm:
            edit.sites_in(model)
            if edit.samples not in (1, len(inputs)):
                raise ValueError(
                    f"the edit {edit!r} is for {edit.samples} samples, and there are {len(inputs)} "
                    "inputs"
                )
    distinct, index = once(inputs)
    numbers = index.tolist()
    edits = [edit for arm in arms for edit in arm]
    share &= len(inputs) * len(arms) > len(distinct)
    share &= all(is_late(site, edit.role) for edit in edits for site in edit.sites)
    share = share and not looks_ahead(model, distinct[0])
    in_text = all(site.tower == "lm" for edit in edits for site in edit.sites_in(model))
    rest = list(range(len(inputs)))
    # The first arm is checked by its own edits; the others must not fail after it was answered.
    with ExitStack() as ahead:
        ahead.enter_context(fitting(model, [edit for arm in arms[1:] for edit in arm]))
        for start in range(0, len(distinct) if share else 0, batch_size):
            some = distinct[start : start + batch_size]
            prefix = _Prefix.read(model, prompt_of(model, some))
            if prefix is None:
                break
            here = [row for row in rest if numbers[row] < start + batch_size]
            rest = [row for row in rest if numbers[row] >= start + batch_size]
            for rows in _chunks(here, batch_size):
                which = torch.tensor([numbers[row] - start for row in rows])
                for number, arm in enumerate(arms):
                    with edited(model, _take(arm, rows), copies, begun=True):
                        answer(number, rows, partial(prefix.take, which, copies))
                    ahead.close()
        for rows in _chunks(rest, batch_size):
            some = [inputs[row] for row in rows]
            prompt: Prompt = partial(prompt_of, model, some)
            prompt = prompt().copy if in_text else prompt
            for number, arm in enumerate(arms):
                with edited(model, _take(arm, rows), copies):
                    answer(number, rows, _read_once(model, prompt) if again else prompt)
                ahead.close()


def run(model: Model, arguments: dict[str, Any], **options: Any) -> Any:
    """Run the module's own `generate`, greedily where nothing is said."""
    options = _GREEDY | options
    if (pad := getattr(tokenizer_of(model), "pad_token_id", None)) is not None:
        options.setdefault("pad_token_id", pad)
    module: Any = model.module
    arguments = dict(arguments)
    with evaluating(module), torch.inference_mode(), ExitStack() as inside:
        if _LOOKS in arguments and not takes_looks(module):
            inside.enter_context(looked_at(model.body, arguments.pop(_LOOKS)["image"]))
        return module.generate(**arguments, **options)


def prompt_of(model: Model, inputs: Sequence[Any]) -> dict[str, Any]:
    """Return what `run` takes: padded on the left, images looked at already.

    An edit in a vision tower or a projector must therefore be in force when this is called. A
    module that cannot be handed looks has the images beside them, and `run` takes the looks out.

    Raises
    ------
    ValueError
        When the model makes no text, or would be asked several prompts.
    """
    if not can_generate(model):
        raise ValueError(f"{model.name} makes no text: it has no language model to generate with")
    if len(model.prompts) > 1:
        msg = f"{model.name} would be asked {len(model.prompts)} prompts: choose one by "
        raise ValueError(msg + "model.asking([prompt])")
    batch = model.prepare(inputs)
    if "prompts" not in batch:
        return _to_left(batch)
    if not takes_images(model):
        msg = f"{type(model.module).__name__} takes images by names of its own: run "
        raise ValueError(msg + "model.module.generate inside model.edited(edits)")
    (prompt,) = batch["prompts"]
    images = {} if takes_looks(model.module) else as_taken(batch["image"])
    return {**_to_left(prompt), **images, _LOOKS: {"image": model.look(batch)}}


def takes_images(model: Model) -> bool:
    """Tell whether the module's `generate` takes images, looked at before or not."""
    takes = inspect.signature(model.module.forward).parameters
    return takes_looks(model.module) or "pixel_values" in takes


def can_generate(model: Model) -> bool:
    """Tell whether the model makes text."""
    can: Any = getattr(model.module, "can_generate", None)
    return can is not None and bool(can()) and any(t.name == "lm" for t in model.towers)


def tokenizer_of(model: Model) -> Any:
    """Return the tokenizer of the texts; None where the model brought none."""
    found = getattr(model.collate, "tokenizer", None)
    return found or getattr(getattr(model.transform, "processor", None), "tokenizer", None)


def require_tokenizer(model: Model) -> Any:
    """Return the tokenizer of the texts, or raise ValueError."""
    tokenizer = tokenizer_of(model)
    if tokenizer is None:
        msg = f"{model.name} brought no tokenizer: run model.module.generate inside "
        raise ValueError(msg + "model.edited(edits)")
    return tokenizer


@dataclass(frozen=True)
class _Prefix:
    """Some prompts, read but for their last tokens."""

    model: Model
    ids: torch.Tensor
    mask: torch.Tensor
    cache: Any
    deltas: dict[Any, torch.Tensor]
    """By module: how far positions are ahead of numbers of tokens, which Qwen-VL keeps so."""

    @classmethod
    def read(cls, model: Model, given: dict[str, Any], *, whole: bool = False) -> _Prefix | None:
        """Read prompts; None where what the model keeps cannot be handed to several answers.

        They are read `whole` where edits are in force, which look for their tokens in all of it;
        what is kept of the last one is then thrown away.
        """
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        ids = given["input_ids"]
        mask = given.setdefault("attention_mask", torch.ones_like(ids))
        if not mask[:, :-1].any(1).all():  # a prompt of one token has nothing before it
            return None
        before = (
            given
            if whole
            else {
                k: v[:, :-1] if isinstance(v, torch.Tensor) and v.shape == ids.shape else v
                for k, v in given.items()
            }
        )
        made = run(model, dict(before), max_new_tokens=1, return_dict_in_generate=True)
        layers = getattr(made.past_key_values, "layers", [])
        # Others write into what they hold, or have no rows to choose from.
        if {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}:
            return None
        if whole:
            window = min((getattr(x, "sliding_window", inf) for x in layers), default=inf)
            if ids.shape[1] >= window:  # a window that has moved on cannot be moved back
                return None
            made.past_key_values.crop(-1)
        deltas = {
            module: delta
            for module in model.module.modules()
            if isinstance(delta := getattr(module, "rope_deltas", None), torch.Tensor)
        }
        return cls(model, ids, mask, made.past_key_values, deltas) if layers else None

    def take(self, which: torch.Tensor, copies: int) -> dict[str, Any]:
        """Return what `generate` takes to answer some of the prompts; a number may come again."""
        which = which.to(self.ids.device)
        rows = which.repeat_interleave(copies)
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        cache.batch_select_indices(rows)
        for module, delta in self.deltas.items():
            # Positions are worked out before `generate` makes its copies.
            module.rope_deltas = delta[which.to(delta.device)]
        return {
            "input_ids": self.ids[which],
            "attention_mask": self.mask[which],
            "past_key_values": cache,
        }


_AHEAD: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def looks_ahead(model: Model, sample: Any) -> bool:
    """Tell whether a prompt's last token changes what is kept of those before it, as in PaliGemma.

    Tried on a sample, once for a module.
    """
    if model.module not in _AHEAD:
        kept = []
        (site,) = model.sites("lm.embed")
        given = prompt_of(model, [sample])
        for jobs in ([], [Job(site, "last", "prompt", lambda hidden, _: hidden + 1)]):
            with watching(model, jobs, ahead=True):
                made = run(model, dict(given), max_new_tokens=1, return_dict_in_generate=True)
            layers = getattr(made.past_key_values, "layers", [])
            kept.append([getattr(layer, "keys", None) for layer in layers])
        # To the last bit: what is masked adds nothing at all.
        _AHEAD[model.module] = any(
            isinstance(a, torch.Tensor) and not torch.equal(a[..., :-1, :], b[..., :-1, :])
            for a, b in zip(*kept, strict=True)
        )
    return _AHEAD[model.module]


def _read_once(model: Model, prompt: Prompt) -> Prompt:
    """Make a prompt that is read already, where that can be."""
    given = prompt()
    prefix = _Prefix.read(model, given, whole=True)
    return prompt if prefix is None else partial(prefix.take, torch.arange(len(prefix.ids)), 1)


def once(inputs: Sequence[Any]) -> tuple[list[Any], NDArray[np.int64]]:
    """Return each input once, and the number of each: equal texts and the same objects are one."""
    numbers: dict[Any, int] = {}
    several = [x if isinstance(x, str) else id(x) for x in inputs]
    index = [numbers.setdefault(key, len(numbers)) for key in several]
    distinct = dict(zip(index, inputs, strict=True))
    return list(distinct.values()), np.array(index, dtype=np.int64)


def is_late(site: str, role: str) -> bool:
    """Tell whether an edit there leaves alone whatever comes before a prompt's last token."""
    return role == "last" and site.startswith("lm.")


def _take(arm: Sequence[Edit], rows: list[int]) -> list[Edit]:
    return [edit.take(rows) if edit.samples > 1 else edit for edit in arm]


def _chunks(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def _to_left(batch: dict[str, Any]) -> dict[str, Any]:
    """Move the padding of every sequence to its left; the mask says where it is."""
    mask = batch.get("attention_mask")
    if mask is None:
        return batch
    # Stable: padding first, the tokens in their order after it.
    order = (mask != 0).int().argsort(dim=1, stable=True)
    return {
        k: v.gather(1, order) if isinstance(v, torch.Tensor) and v.shape == mask.shape else v
        for k, v in batch.items()
    }
