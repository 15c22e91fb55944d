"""A module of transformers and its processors become a `Model`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .inputs import (
    Conversations,
    Converse,
    ImageTransform,
    InOrder,
    image_marks,
    stack_images,
    text_collate,
)
from .model import Model, Stage, headless
from .phi4 import NOTE, Phi4, is_phi4
from .prefix import with_counted_prefix
from .processors import Part
from .structure import Tower, find_towers


def assemble(
    name: str, module: nn.Module, bring: Callable[[Part], Any], notes: Sequence[str] = ()
) -> Model:
    """Find the towers of `module`, and set up what feeds them.

    Parameters
    ----------
    name
        What reports call the model.
    module
        Of transformers.
    bring
        Returns tokenizer or image processor.
    notes
        See `Model.notes`.

    Raises
    ------
    ValueError
        When it reads neither images nor text, its blocks cannot be found, or its tokens cannot be
        told apart.
    """
    return with_counted_prefix(_assembled(name, module, bring, tuple(notes)))


def _assembled(
    name: str, module: nn.Module, bring: Callable[[Part], Any], notes: tuple[str, ...]
) -> Model:
    body: Any = headless(module)
    if is_phi4(body):
        body, notes = Phi4(body), (*notes, NOTE)
    towers = {t.name: t for t in find_towers(body)}
    looks = hasattr(body, "get_image_features")
    if looks and hasattr(body, "get_text_features") and {"vision", "text"} <= towers.keys():
        return _comparing(name, module, towers, bring("processor"), notes)
    # Florence-2's language model is told of an image by an encoder, Kosmos-2's class says nothing.
    if {"vision", "text"} <= towers.keys() or (looks and body.config.is_encoder_decoder):
        msg = (
            f"{name} is a {type(module).__name__}, which looks at images and reads text, but "
            "neither compares the two, as CLIP does, nor has a decoder that reads both, as LLaVA "
            "has. Pass one of its parts, an nn.Module, with prepare= to probe it"
        )
        raise ValueError(msg)
    if looks and "lm" in towers:
        return conversing(name, module, body, towers, bring("processor"), notes)
    if {"vision", "lm"} <= towers.keys():
        # Phi-4-multimodal by the code that comes with it, and not by that of transformers.
        towers = {"lm": towers["lm"]}
        notes += ("it has no call for its vision tower alone: only its language model is read",)
    stages = (Stage(body, tuple(towers.values())),)
    reads = getattr(body, "main_input_name", None)
    if reads == "input_ids":
        if not {"lm", "text"} & towers.keys():
            msg = (
                f"{name} is a {type(module).__name__}, which reads text, but the blocks that read "
                f"it were not found, only {' and '.join(t.path for t in towers.values())}. Pass "
                "the nn.Module itself with prepare=, its blocks named in a method geofast_towers() "
                "that returns a tuple of geofast.models.Tower"
            )
            raise ValueError(msg)
        collate = text_collate(bring("tokenizer"), body)
        return Model(name, module, stages, "text", None, collate, notes=notes)
    if reads != "pixel_values":
        msg = (
            f"{name} is a {type(module).__name__}, which reads {reads}: neither images nor text. "
            "Pass the nn.Module itself with prepare= to probe it"
        )
        raise ValueError(msg)
    transform = ImageTransform(bring("image processor"))
    # Hiera's configuration has a ratio in any case; it masks where it `is_mae`.
    masks = all(getattr(m, "is_mae", True) for m in body.modules())
    if masks and hasattr(body.config, "mask_ratio"):
        return _unmasked(name, module, stages, transform, notes)
    return Model(name, module, stages, "image", transform, stack_images, notes=notes)


def _unmasked(
    name: str,
    module: nn.Module,
    stages: tuple[Stage, ...],
    transform: ImageTransform,
    notes: tuple[str, ...],
) -> Model:
    """Take a masked autoencoder that masks nothing."""
    config: Any = module.config
    if config.mask_ratio:
        msg = f"{name} hides random patches: set its config.mask_ratio to 0.0 before it is loaded"
        raise ValueError(msg)
    notes = (*notes, "masking is off: the model sees every patch, in order")
    model = Model(name, module, stages, "image", transform, stack_images, notes=notes)
    if not isinstance(config.image_size, int):  # Hiera does not shuffle what it does not mask
        return model
    return replace(model, collate=InOrder((config.image_size // config.patch_size) ** 2))


class _Method(nn.Module):
    """A method of a model as a module, so that hooks see where a call begins and ends."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name
        takes = inspect.signature(getattr(model, name)).parameters
        self.takes = {*takes, "output_hidden_states", "return_dict"}
        if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            # LLaVA's does not name its image_sizes before transformers 5.18.
            self.takes |= {*inspect.signature(model.forward).parameters}

    def _get_name(self) -> str:
        return f"{type(self.model).__name__}.{self.name}"

    def forward(self, **given: Any) -> Any:
        return getattr(self.model, self.name)(**{k: v for k, v in given.items() if k in self.takes})


def _comparing(
    name: str,
    module: nn.Module,
    towers: dict[str, Tower],
    processor: Any,
    notes: tuple[str, ...] = (),
) -> Model:
    """Take a model that compares images with texts: one tower for each."""
    config: Any = module.config
    # SigLIP was trained to read padding up to the end: its joint embedding is that of the last.
    fixed = config.model_type.startswith("siglip")
    collate = text_collate(processor.tokenizer, module.get_submodule("text_model"), fixed=fixed)
    stages = (Stage(_Method(module, "get_text_features"), (towers["text"],)),)
    text = Model(name, module, stages, "text", None, collate, notes=notes)
    stages = (Stage(_Method(module, "get_image_features"), (towers["vision"],)),)
    transform = ImageTransform(processor.image_processor)
    return Model(name, module, stages, "image", transform, stack_images, text, notes)


def conversing(
    name: str,
    module: nn.Module,
    body: nn.Module,
    towers: dict[str, Tower],
    processor: Any,
    notes: tuple[str, ...] = (),
) -> Model:
    """Take a model that talks about images: the vision tower once an image, the LM every prompt."""
    look = tuple(tower for tower in towers.values() if tower.name != "lm")
    talk = Stage(body, (replace(towers["lm"], image_marks=image_marks(processor)),))
    collate = text_collate(processor.tokenizer, body)
    text = Model(name, module, (talk,), "text", None, collate, notes=notes)
    stages = (Stage(_Method(body, "get_image_features"), look), talk)
    together = Conversations(processor.tokenizer.pad_token_id)
    converse = Converse(processor, collate.context)
    return Model(name, module, stages, "image", converse, together, text, notes)
