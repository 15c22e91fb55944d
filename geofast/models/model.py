"""What a model is to the engine: a module to run, its towers, and how a batch is prepared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, Literal

import torch
from torch import nn

from .structure import Site, Tower, find_towers, match_sites

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Model:
    """A module and what the engine needs to feed it; made by `load`."""

    name: str
    """Hub id, folder or class name: what the reports call the model."""
    module: nn.Module
    """The whole module, heads included."""
    body: nn.Module
    """The part that is run: no language-model head."""
    towers: tuple[Tower, ...]
    kind: Literal["image", "text"]
    """What one input is: a PIL image or a string."""
    transform: Callable[[Any], Any] | None
    """Runs on one input, ahead of the model and in a worker process; None leaves it as it is."""
    collate: Callable[[list[Any]], Batch]
    """Makes the keyword arguments of `body` from transformed inputs, on the CPU."""

    @property
    def device(self) -> torch.device:
        """Where the first parameter lives."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first floating-point parameter."""
        return next(p.dtype for p in self.module.parameters() if p.is_floating_point())

    def sites(self, patterns: str | Sequence[str] | None = None) -> tuple[Site, ...]:
        """Return the sites that `patterns` name; see `structure.match_sites`."""
        return match_sites(self.towers, patterns)

    def prepare(self, inputs: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Make the keyword arguments of `body` from raw inputs, on the model's device."""
        ready = [self.transform(x) for x in inputs] if self.transform else list(inputs)
        return self.to_device(self.collate(ready))

    def to_device(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Move a batch to the model; floating-point inputs take its dtype."""
        return {
            key: t.to(self.device, self.dtype if t.is_floating_point() else None)
            for key, t in batch.items()
        }

    @torch.inference_mode()
    def forward(self, batch: Batch) -> None:
        """Run the body for its hooks, in eval mode; nothing is returned and no cache is built."""
        takes_cache = "use_cache" in inspect.signature(self.body.forward).parameters
        with _evaluating(self.body):
            self.body(**batch, **({"use_cache": False} if takes_cache else {}))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    # Module by module: a model may keep some of its parts in eval mode while it trains others.
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def wrap(
    module: nn.Module,
    prepare: Callable[[list[Any]], Batch],
    *,
    kind: Literal["image", "text"] | None = None,
) -> Model:
    """Take any module with a function that prepares its keyword arguments.

    Parameters
    ----------
    module
        Its blocks are found by structure. It stays in the mode, training or eval, that it is in.
    prepare
        From a list of inputs (PIL images or strings) to the keyword arguments of `module`.
    kind
        What an input is; None takes `image` for a vision tower and `text` for any other.
    """
    towers = find_towers(module)
    guess: Literal["image", "text"] = "image" if any(t.name == "vision" for t in towers) else "text"
    # transformers' models name what lies under their heads; elsewhere base_model may mean anything.
    body = module.base_model if hasattr(module, "base_model_prefix") else module
    assert isinstance(body, nn.Module)
    return Model(type(module).__name__, module, body, towers, kind or guess, None, prepare)


@dataclass(frozen=True)
class ImageTransform:
    """One PIL image to pixel values, by a Hugging Face image processor; picklable."""

    processor: Any

    def __call__(self, image: Any) -> torch.Tensor:
        """Return pixel values [channels, height, width]."""
        # Many processors take grey, palette and transparent images for what they are not.
        values = self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        return torch.as_tensor(values)[0]


def stack_images(images: list[torch.Tensor]) -> Batch:
    """Make a batch of pixel values.

    Raises
    ------
    ValueError
        When the processor let images of different sizes through.
    """
    sizes = sorted({tuple(image.shape) for image in images})
    if len(sizes) > 1:
        msg = (
            f"the image processor made images of different sizes in one batch ({sizes[0]} and "
            f"{sizes[1]}): use batch_size=1, or a processor that resizes to a fixed size"
        )
        raise ValueError(msg)
    return {"pixel_values": torch.stack(images)}


@dataclass(frozen=True)
class Tokenize:
    """Strings to token ids and mask, by a Hugging Face tokenizer."""

    tokenizer: Any
    context: float
    """The longest prompt that the model takes, in tokens."""

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
        return {"input_ids": ids, "attention_mask": mask}


def text_collate(tokenizer: Any, body: nn.Module) -> Tokenize:
    """Set a tokenizer up for batches of `body`."""
    if tokenizer.pad_token is None:
        # Masked, so any id will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    context = getattr(getattr(body, "config", None), "max_position_embeddings", None) or -1
    return Tokenize(tokenizer, context if context > 0 else inf)  # XLNet has none and says -1


def describe(model: Model) -> str:
    """List the sites with shape, token roles and default pool, from one example run."""
    shapes: dict[str, str] = {}

    def note(name: str, hidden: torch.Tensor) -> None:
        shapes[name] = " x ".join(map(str, hidden.shape[1:]))

    with ExitStack() as hooks:
        for site in (site for tower in model.towers for site in tower.sites()):
            hooks.callback(site.watch(partial(note, site.name)).remove)
        model.forward(model.prepare([_example(model.kind)]))
    lines = [f"{model.name}: {model.kind} in, {str(model.dtype).removeprefix('torch.')}"]
    for tower in model.towers:
        prefix = [f"{tower.prefix.count(r)} {r}" for r in dict.fromkeys(tower.prefix)]
        roles = ", ".join([*prefix, f"then {tower.tokens}" if prefix else tower.tokens])
        lines.append(
            f"\n{tower.name}: {len(tower.blocks)} blocks at {tower.path!r}; tokens: {roles}"
        )
        lines.append(f"{'site':28}{'tokens x width':>18}   default pool")
        for site in tower.sites():
            shape = shapes.get(site.name, "did not run")
            lines.append(f"{site.name:28}{shape:>18}   {tower.default_pool}")
        lines += [
            f"no .{branch}: the blocks have no module that returns that branch"
            for branch in ("attn", "mlp")
            if branch not in tower.branches
        ]
    return "\n".join(lines)


def _example(kind: str) -> Any:
    if kind == "text":
        return "Paris"
    from PIL import Image

    return Image.new("RGB", (224, 224), "grey")
