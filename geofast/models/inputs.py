"""From raw inputs to the arguments of a model: images, texts, and images with prompts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .model import Batch

_VISION = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class ImageTransform:
    """One PIL image to what a vision tower takes, by a Hugging Face image processor; picklable."""

    processor: Any

    def __call__(self, image: Any) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return pixel values [channels, height, width]; with masks and sizes, each [1, ...]."""
        # Many processors take grey, palette and transparent images for what they are not.
        made = self.processor(images=image.convert("RGB"), return_tensors="pt")
        tensors = {k: torch.as_tensor(made[k]) for k in _VISION if k in made}
        return tensors if len(tensors) > 1 else tensors["pixel_values"][0]


def stack_images(images: list[Any]) -> Batch:
    """Make a batch of pixel values.

    Raises
    ------
    ValueError
        When the processor let images of different sizes through.
    """
    if images and isinstance(images[0], Mapping):
        return merge(images)
    sizes = sorted({tuple(image.shape) for image in images})
    if len(sizes) > 1:
        msg = (
            f"the image processor made images of different sizes in one batch ({sizes[0]} and "
            f"{sizes[1]}): use batch_size=1 (--batch-size), or a processor that resizes "
            "to a fixed size"
        )
        raise ValueError(msg)
    return {"pixel_values": torch.stack(images)}


@dataclass(frozen=True)
class InOrder:
    """Makes batches for a masked autoencoder, which shuffles the patches of every image."""

    patches: int

    def __call__(self, images: list[torch.Tensor]) -> Batch:
        """Stack images, with the `noise` [batch, patches] by which patches are sorted: in order."""
        batch = stack_images(images)
        return {**batch, "noise": torch.arange(self.patches).repeat(len(images), 1)}


@dataclass(frozen=True)
class Tokenize:
    """Strings to token ids and mask, by a Hugging Face tokenizer."""

    tokenizer: Any
    context: float
    """The longest prompt that the model takes, in tokens."""
    fixed: bool = False
    """Pad every text to the whole context, and have the model read the padding too; it is no text
    all the same, which `real` says."""
    segments: bool = False
    """Say that all of a text is of the first segment: PaliGemma reads that both ways, as it was
    trained to, and would read a text alone so but not one that is padded."""

    def __call__(self, texts: list[str]) -> Batch:
        """Pad on the right to the longest, whichever side the tokenizer pads for generation.

        There every text stands at the positions that it has alone, in every model. On the left it
        does not: RoBERTa counts positions from its padding id, and RWKV has no attention mask.

        Raises
        ------
        ValueError
            For an empty text, or one that is longer than the model's context.
        """
        batch = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        for text, length in zip(texts, mask.sum(1).tolist(), strict=True):
            if not length:
                raise ValueError(f"the text {text!r} has no token; give the model a longer prompt")
            if length > self.context:
                msg = (
                    f"the text {text[:40]!r}... has {length} tokens; the model takes {self.context}"
                )
                raise ValueError(msg)
        if self.fixed:
            room = (0, int(self.context) - ids.shape[1])
            ids = nn.functional.pad(ids, room, value=self.tokenizer.pad_token_id)
            return {"input_ids": ids, "real": nn.functional.pad(mask, room)}
        segments = {"token_type_ids": torch.zeros_like(ids)} if self.segments else {}
        return {"input_ids": ids, "attention_mask": mask, **segments}


def text_collate(tokenizer: Any, body: nn.Module, *, fixed: bool = False) -> Tokenize:
    """Set a tokenizer up for batches of `body`."""
    if tokenizer.pad_token is None:
        # Masked, so any id will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    talks = hasattr(getattr(body, "config", None), "text_config")
    segments = talks and "token_type_ids" in inspect.signature(body.forward).parameters
    return Tokenize(tokenizer, context_of(tokenizer, body), fixed, segments)


def context_of(tokenizer: Any, body: nn.Module) -> float:
    """Return how many tokens `body` takes at most; nearly infinite where nothing says."""
    whole: Any = getattr(body, "config", None)
    config = getattr(whole, "text_config", whole)
    positions = getattr(config, "max_position_embeddings", None) or -1
    limits = [positions] if positions > 0 else []  # XLNet has none, says -1
    for path, table in body.named_modules():
        # RoBERTa's positions begin after the one that is the padding's.
        if isinstance(table, nn.Embedding) and "position" in path and table.padding_idx is not None:
            limits.append(table.num_embeddings - table.padding_idx - 1)
    # What a tokenizer states is a habit, not what the model can take; 1e30 where nobody set it.
    return min(limits, default=tokenizer.model_max_length)


@dataclass(frozen=True)
class Converse:
    """One PIL image and every prompt about it, by a Hugging Face processor; picklable.

    Raises
    ------
    ValueError
        When a prompt is longer than the context, whatever the image.
    """

    processor: Any
    context: float
    """The longest prompt that the model takes, in tokens, those of the image included."""
    prompts: tuple[str, ...] = ("",)

    def __post_init__(self) -> None:
        for prompt in filter(None, self.prompts):
            alone = self.processor.tokenizer(_user_turn(self.processor, prompt, image=False))
            self._require_room(f"the prompt {prompt[:40]!r}... has", len(alone["input_ids"]))

    def _require_room(self, what: str, tokens: int) -> None:
        if tokens > self.context:
            raise ValueError(f"{what} {tokens} tokens; the model takes {self.context}")

    def __call__(self, image: Any) -> dict[str, Any]:
        """Return `image`, what the vision tower takes, and `prompts`, what the LM takes for each.

        Tensors are as the processor makes them for one image; `tiles` [1] says in how many parts
        the image was cut.

        Raises
        ------
        ValueError
            When the image and a prompt are longer than the context.
        """
        image = image.convert("RGB")
        texts = [_user_turn(self.processor, prompt) for prompt in self.prompts]
        made = [self.processor(images=[image], text=[t], return_tensors="pt") for t in texts]
        for prompt, one in zip(self.prompts, made, strict=True):
            both = f"this image and the prompt {prompt[:40]!r}{'...' * (len(prompt) > 40)} have"
            self._require_room(both, len(one["input_ids"][0]))
        pixels = {k: torch.as_tensor(v) for k, v in made[0].items() if k not in _TEXT}
        if "image_pixel_values" in pixels:  # what Phi-4's processor calls them
            pixels["pixel_values"] = pixels.pop("image_pixel_values")
            pixels["image_attention_mask"] = pixels["image_attention_mask"].bool()
        pixels["tiles"] = torch.tensor([_tiles(pixels["pixel_values"])])
        prompts = [{k: torch.as_tensor(m[k]) for k in _TEXT if k in m} for m in made]
        return {"image": pixels, "prompts": prompts}


def _tiles(pixels: torch.Tensor) -> int:
    # [images, tiles, channels, height, width] or [tiles, ...]; packed patches are one image.
    return pixels.shape[:-3].numel() if pixels.ndim >= 4 else 1


def image_marks(processor: Any) -> tuple[int, ...]:
    """Return the ids that stand around images: special ones that no talk without an image has.

    Those of the tokenizer (`bos_token` and the like) and those of the chat template are not among
    them, nor are line breaks that a template sets around an image: they are text.
    """
    tokenizer = processor.tokenizer
    added: Any = getattr(tokenizer, "added_tokens_decoder", {})
    special = {id for id, token in added.items() if token.special} | {*tokenizer.all_special_ids}
    named = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    ordinary = {getattr(tokenizer, f"{name}_token_id", None) for name in named}
    without = tokenizer(_user_turn(processor, "a", image=False))["input_ids"]
    return tuple(sorted(special - ordinary - {*without}))


def _user_turn(processor: Any, prompt: str, *, image: bool = True) -> str:
    """Word a user's turn: the image, then the prompt, up to where the model would answer."""
    if getattr(processor, "chat_template", None) is None:
        return f"{processor.image_token if image else ''}{prompt}"
    pictures = [{"type": "image"}] if image else []
    content = pictures + ([{"type": "text", "text": prompt}] if prompt else [])
    turn = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(turn, add_generation_prompt=True))


@dataclass(frozen=True)
class Conversations:
    """Makes a batch of what `Converse` returns."""

    pad: int
    """The token id to pad with; it is masked."""

    def __call__(self, samples: list[dict[str, Any]]) -> Batch:
        """Merge samples: `image` of all, and for every prompt the ids of all."""
        # Phi-4 masks nothing in the crops that fill up.
        image = merge([s["image"] for s in samples], image_attention_mask=1)
        # Qwen's positions inside the language model follow the grid of the patches.
        grid = {k: image[k] for k in ("image_grid_thw",) if k in image}
        prompts = [
            merge([s["prompts"][i] for s in samples], input_ids=self.pad) | grid
            for i in range(len(samples[0]["prompts"]))
        ]
        return {"image": image, "prompts": prompts}


def merge(samples: Sequence[Mapping[str, torch.Tensor]], **fill: int) -> dict[str, torch.Tensor]:
    """Lay tensors [n_i, ...] one after the other, padded at the ends to the largest of each size.

    `fill` gives what to pad with; 0 for all others.
    """
    out = {}
    for key in samples[0]:
        parts = [s[key] for s in samples]
        sizes = [max(s) for s in zip(*(p.shape[1:] for p in parts), strict=True)]
        padded = []
        for part in parts:
            room = [
                n for a, b in zip(sizes[::-1], part.shape[:0:-1], strict=True) for n in (0, a - b)
            ]
            padded.append(nn.functional.pad(part, room, value=fill.get(key, 0)))
        out[key] = torch.cat(padded)
    return out
