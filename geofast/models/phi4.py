"""Phi-4-multimodal, which looks at images from within the embedding of its language model.

The other families of transformers have a `get_image_features`, and take what it returns back as
`mm_encoder_outputs`. `Phi4` gives both to this one. It reads an image in parts: the whole, made
small, and crops of it. Every two by two patches become one token; the crops are joined, every line
of tokens ends with a token of its own, and so does every line of the whole image, which comes last,
after one more token that stands for no part of the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu

NOTE = "causal attention in its vision tower is off: transformers has it by mistake"


def is_phi4(body: nn.Module) -> bool:
    """Whether it is Phi-4-multimodal, without its head."""
    return getattr(getattr(body, "config", None), "model_type", None) == "phi4_multimodal"


class Phi4(nn.Module):
    """The model with the calls of the other families.

    transformers (5.23) has its vision tower attend as a language model does, to what comes before
    alone, in every batch in which nothing is masked. The code that comes with the checkpoint on the
    Hub never does (vision_siglip_navit.py), nor does this: it changes `model`.
    """

    model: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        embed = model.embed_tokens_extend.image_embed
        self.projector = _Projector(embed.img_projection_up, embed.img_projection_down)
        for part in embed.img_processor.modules():
            if hasattr(part, "is_causal"):
                part.is_causal = False

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor,
        image_attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Return [tokens, dim], what all images are to the language model, end to end.

        Parameters
        ----------
        pixel_values
            [images, parts, channels, height, width], the whole image first; crops that only fill
            up are left out.
        image_sizes
            int64 [images, 2], height and width of the crops joined, in pixels.
        image_attention_mask
            Bool [images, parts, rows, columns]: whether a patch is of the image, or of its padding.
        """
        embed = self.model.embed_tokens_extend.image_embed
        grids = _grids(image_sizes, pixel_values.shape[-1])
        parts = [1 + down * across for down, across in grids]
        pixels, mask = (
            torch.cat([x[:n] for x, n in zip(padded, parts, strict=True)])
            for padded in (pixel_values, image_attention_mask)
        )
        patches = _look(embed.img_processor, embed.layer_idx, pixels, mask)
        square = patches.unflatten(1, (math.isqrt(patches.shape[1]), -1)).permute(0, 3, 1, 2)
        if hasattr(embed, "img_processor_padding"):  # where their number is odd
            square = embed.img_processor_padding(square)
        merged = embed.image_token_compression(square).permute(0, 2, 3, 1)
        with _at_hand(embed):
            ends = embed.sub_img_feature_extensor, embed.global_img_feature_extensor
            line_end, between = (end.to(merged).flatten() for end in ends)
            joined = [
                _join(image, inside, across, line_end, between)
                for image, inside, (_, across) in zip(
                    merged.split(parts), mask.split(parts), grids, strict=True
                )
            ]
        projected: torch.Tensor = self.projector(torch.cat(joined))
        return projected

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: Any = None,
        image_attention_mask: Any = None,
        use_cache: bool | None = None,
        **more: Any,
    ) -> Any:
        """Run the language model, on images or on what `get_image_features` made of them."""
        seen = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            seen = self.get_image_features(pixel_values, image_sizes, image_attention_mask)
        embedded = self.model.embed_tokens(input_ids)
        if seen is not None:
            image = input_ids == self.config.vision_config.image_token_id
            embedded[image.to(embedded.device)] = seen.to(embedded)
        return self.model(
            inputs_embeds=embedded, attention_mask=attention_mask, use_cache=use_cache, **more
        )


class _Projector(nn.Module):
    """What the model does to the features of one image after the other, for all at once."""

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.down(gelu(self.up(features)))
        return projected


def _look(tower: Any, layer: int, pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Run the vision tower, and return the hidden states that the projector takes.

    Not by `output_hidden_states`: transformers counts every block twice after the tower and the
    whole model have both been asked for them, in this order. The head that follows serves nobody,
    and fails where accelerate keeps its weights elsewhere: the pass stops before it.
    """
    kept: list[torch.Tensor] = []
    module = [tower.embeddings, *tower.encoder.layers][layer]
    with ExitStack() as hooks:
        keep = module.register_forward_hook(lambda _module, _args, output: kept.append(output))
        hooks.callback(keep.remove)
        hooks.callback(tower.head.register_forward_pre_hook(_before_the_head).remove)
        hooks.enter_context(suppress(_LookedError))
        tower(pixels, patch_attention_mask=mask)
    return kept[0]


class _LookedError(Exception):
    """The vision tower has run, but for its head."""


def _before_the_head(_module: nn.Module, _args: Any) -> None:
    raise _LookedError


@contextmanager
def _at_hand(module: nn.Module) -> Iterator[None]:
    """Fetch parameters that accelerate keeps elsewhere, of a module that is not itself called."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
    try:
        yield
    finally:
        if hook is not None:
            hook.post_forward(module, None)


def token_places(given: Mapping[str, Any]) -> list[torch.Tensor] | None:
    """Return tile, row and column of the tokens that every image becomes.

    Parameters
    ----------
    given
        What `get_image_features` is called with; None is returned for the call of another family.

    Returns
    -------
    list of torch.Tensor
        Of each image int64 [tokens, 3]: tile 0 is the whole image, the crops follow row by row;
        rows and columns count tokens. -1 for what ends a line and what stands between.
    """
    if not {"pixel_values", "image_sizes", "image_attention_mask"} <= given.keys():
        return None
    mask = given["image_attention_mask"].cpu()
    side, nowhere = (mask.shape[-1] + 1) // 2, torch.full((3,), -1)
    found = []
    for inside, (down, across) in zip(
        mask, _grids(given["image_sizes"], given["pixel_values"].shape[-1]), strict=True
    ):
        tiles = torch.arange(1 + down * across)
        places = torch.cartesian_prod(tiles, torch.arange(side), torch.arange(side))
        places = places.view(-1, side, side, 3)
        found.append(_join(places, inside[: len(tiles)], across, nowhere, nowhere))
    return found


def _grids(sizes: torch.Tensor, side: int) -> list[tuple[int, int]]:
    """Return how many crops are below and beside each other, of every image."""
    return [(height // side, width // side) for height, width in sizes.tolist()]


def _join(
    parts: torch.Tensor,
    mask: torch.Tensor,
    across: int,
    line_end: torch.Tensor,
    between: torch.Tensor,
) -> torch.Tensor:
    """Lay the parts of an image out in the order in which the language model reads them.

    Parameters
    ----------
    parts
        [1 + crops, side, side, dim], the whole image first.
    mask
        Bool [1 + crops, rows, columns] of patches, two by two for a place in `parts`.
    across
        How many crops are beside each other.
    line_end, between
        [dim].

    Returns
    -------
    torch.Tensor
        [tokens, dim]: the crops joined, without the lines and columns that are padding; `between`;
        the whole image.
    """
    crops, inside = (
        x.unflatten(0, (-1, across)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        for x in (parts[1:], mask[1:, ::2, ::2])
    )
    crops = crops[: int(inside[:, 0].sum()), : int(inside[0].sum())]
    lines = [
        torch.cat([x, line_end.expand(len(x), 1, -1)], 1).flatten(0, 1) for x in (crops, parts[0])
    ]
    return torch.cat([lines[0], between[None], lines[1]])
