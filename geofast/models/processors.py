"""Tokenizers and image processors: those of a checkpoint, or those that the user gives."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from .hub import Source, reading

Part = Literal["tokenizer", "image processor", "processor"]
"""The last is both in one."""


@dataclass(frozen=True)
class OfCheckpoint:
    """Reads what the checkpoint brings."""

    source: Source

    def __call__(self, part: Part) -> Any:
        """Return the part.

        Raises
        ------
        RuntimeError
            When it is missing or broken.
        """
        import transformers

        with reading(part, self.source):
            if part == "processor" and not find_spec("torchvision"):
                return _without_videos(self.source)
            kind: Any = {
                "tokenizer": transformers.AutoTokenizer,
                "image processor": transformers.AutoImageProcessor,
                "processor": transformers.AutoProcessor,
            }[part]
            return kind.from_pretrained(self.source.path, **self.source.options)


def _without_videos(source: Source) -> Any:
    """Assemble a processor without its part for videos, which needs torchvision and is not read."""
    import transformers
    from transformers.models.auto import processing_auto

    config = transformers.AutoConfig.from_pretrained(source.path, **source.options)
    names: Any = getattr(processing_auto, "PROCESSOR_MAPPING_NAMES")  # noqa: B009 - not exported
    if config.model_type not in names:  # it brings a processor of its own
        return transformers.AutoProcessor.from_pretrained(source.path, **source.options)
    kind: Any = getattr(transformers, names[config.model_type])

    class ImagesAndText(kind):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return argument and super().check_argument_for_proper_class(name, argument)

    parts: dict[str, Any] = {
        "image_processor": transformers.AutoImageProcessor,
        "tokenizer": transformers.AutoTokenizer,
    }
    read = {n: auto.from_pretrained(source.path, **source.options) for n, auto in parts.items()}
    known, _ = kind.get_processor_dict(source.path, **source.options)
    return ImagesAndText.from_args_and_dict([read.get(n) for n in kind.get_attributes()], known)


@dataclass(frozen=True)
class OfProcessor:
    """Takes the parts of the processor that the user gives."""

    processor: Any

    def __call__(self, part: Part) -> Any:
        """Return the part.

        Raises
        ------
        ValueError
            When there is none.
        """
        import transformers

        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        images = getattr(self.processor, "image_processor", self.processor)
        reads_text = isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
        sees = isinstance(images, transformers.ImageProcessingMixin)
        found, there = {
            "tokenizer": (tokenizer, reads_text),
            "image processor": (images, sees),
            "processor": (self.processor, reads_text and sees),
        }[part]
        if not there:
            wanted = {"processor": "an image processor with a tokenizer"}.get(part, f"its {part}")
            got = type(self.processor).__name__
            raise ValueError(f"processor= must be {wanted} for this model; got {got}")
        return found
