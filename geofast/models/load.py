"""`load`: a Hub id, a folder or a module becomes a `Model`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .inputs import (
    Conversations,
    Converse,
    ImageTransform,
    InOrder,
    stack_images,
    text_collate,
)
from .model import Batch, Model, Stage, headless, wrap
from .structure import Tower, block_lists, find_towers


def load(
    model: str | Path | nn.Module | Model,
    *,
    prepare: Callable[[list[Any]], Batch] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Model:
    """Load a model for probing.

    Parameters
    ----------
    model
        A Hugging Face Hub id (`facebook/dinov2-small`, with or without `hf:`), a local folder, or
        an nn.Module together with `prepare`. Vision encoders, language models and text encoders,
        models that compare images with texts (CLIP, SigLIP) and models that talk about images
        (LLaVA, Qwen-VL, Gemma 3). The last two take images; `reading("text")` takes texts.
    prepare
        For an nn.Module: from a list of inputs to the module's keyword arguments.
    device
        None takes a GPU where there is one, else the CPU; an nn.Module stays where it is.
    dtype
        None takes float32 on the CPU, where narrower types run slower, and the checkpoint's own
        dtype elsewhere; an nn.Module keeps its own.

    Raises
    ------
    FileNotFoundError
        When there is no such folder and the Hub cannot be reached or has no such model.
    ValueError
        When the model reads neither images nor text, or its blocks cannot be found; when
        config.json cannot be read or names a model type that transformers does not know.
    RuntimeError
        When weights, tokenizer or image processor are missing, broken or do not fit the
        configuration.
    """
    if isinstance(model, Model):
        given = {"prepare": prepare, "device": device, "dtype": dtype}
        if extra := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{model.name} is loaded already: leave {' and '.join(extra)} out")
        return model
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda" and not torch.cuda.is_available():
        msg = f"there is no GPU for device={str(where)!r} that torch can use; leave device= out"
        raise RuntimeError(msg)
    if isinstance(model, nn.Module):
        if prepare is None:
            msg = (
                f"load({type(model).__name__}) needs prepare=, a function from a list of inputs "
                "to the module's keyword arguments"
            )
            raise ValueError(msg)
        return wrap(model.to(device=where if device else None, dtype=dtype), prepare)
    if prepare is not None:
        raise ValueError("prepare= goes with an nn.Module; a checkpoint brings its own processor")
    return _from_checkpoint(str(model).removeprefix("hf:"), where, dtype)


def _from_checkpoint(source: str, device: torch.device, dtype: torch.dtype | None) -> Model:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        if (Path(source) / "config.json").exists() or "model type" in str(error):
            msg = f"the config.json of {source} cannot be used: {_said(error)}"
            raise ValueError(msg) from error
        raise FileNotFoundError(_why_not(source, error)) from error
    if hasattr(config, "mask_ratio"):
        config.mask_ratio = 0.0  # masked autoencoders hide random patches, in eval mode too
    auto = _auto_class(config)
    with _reading("weights", source):
        module = _weights(auto, source, config, dtype or _default_dtype(device))
    module = module.eval().to(device)
    name = Path(source).name if Path(source).exists() else source
    return _with_processors(name, source, module)


def _with_processors(name: str, source: str, module: nn.Module) -> Model:
    import transformers

    body: Any = headless(module)
    towers = {t.name: t for t in find_towers(body)}
    if hasattr(body, "get_image_features") and "lm" in towers:
        return _conversing(name, module, body, towers, _processor(source))
    if hasattr(body, "get_image_features") and {"vision", "text"} <= towers.keys():
        return _comparing(name, module, towers, _processor(source))
    stages = (Stage(body, tuple(towers.values())),)
    reads = getattr(body, "main_input_name", None)
    if reads == "input_ids":
        with _reading("tokenizer", source):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        return Model(name, module, stages, "text", None, text_collate(tokenizer, body))
    if reads != "pixel_values":
        msg = (
            f"{source} is a {type(module).__name__}, which reads {reads}: neither images nor text. "
            "Pass the nn.Module itself with prepare= to probe it"
        )
        raise ValueError(msg)
    with _reading("image processor", source):
        processor = transformers.AutoImageProcessor.from_pretrained(source)
    transform = ImageTransform(processor)
    if hasattr(body.config, "mask_ratio"):
        patches = (body.config.image_size // body.config.patch_size) ** 2
        note = "masking is off: the model sees every patch, in order"
        return Model(name, module, stages, "image", transform, InOrder(patches), notes=(note,))
    return Model(name, module, stages, "image", transform, stack_images)


class _Method(nn.Module):
    """A method of a model as a module, so that hooks see where a call begins and ends."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.takes = tuple(inspect.signature(getattr(model, name)).parameters)

    def forward(self, **given: Any) -> Any:
        takes = (*self.takes, "output_hidden_states", "return_dict")
        return getattr(self.model, self.name)(**{k: v for k, v in given.items() if k in takes})


def _comparing(name: str, module: nn.Module, towers: dict[str, Tower], processor: Any) -> Model:
    """Take a model that compares images with texts: one tower for each."""
    config: Any = module.config
    # SigLIP was trained to read padding up to the end: its joint embedding is that of the last.
    fixed = config.model_type.startswith("siglip")
    collate = text_collate(processor.tokenizer, module.get_submodule("text_model"), fixed=fixed)
    stages = (Stage(_Method(module, "get_text_features"), (towers["text"],)),)
    text = Model(name, module, stages, "text", None, collate)
    stages = (Stage(_Method(module, "get_image_features"), (towers["vision"],)),)
    transform = ImageTransform(processor.image_processor)
    return Model(name, module, stages, "image", transform, stack_images, text)


def _conversing(
    name: str, module: nn.Module, body: nn.Module, towers: dict[str, Tower], processor: Any
) -> Model:
    """Take a model that talks about images: the vision tower once an image, the LM every prompt."""
    look = tuple(tower for tower in towers.values() if tower.name != "lm")
    talk = Stage(body, (towers["lm"],))
    collate = text_collate(processor.tokenizer, body)
    text = Model(name, module, (talk,), "text", None, collate)
    stages = (Stage(_Method(body, "get_image_features"), look), talk)
    together = Conversations(processor.tokenizer.pad_token_id)
    return Model(name, module, stages, "image", Converse(processor), together, text)


def _processor(source: str) -> Any:
    import transformers

    with _reading("processor", source):
        if find_spec("torchvision"):
            return transformers.AutoProcessor.from_pretrained(source)
        return _image_processor_with_tokenizer(source)


def _image_processor_with_tokenizer(source: str) -> Any:
    """Assemble a processor without its part for videos, which needs torchvision and is not read."""
    import transformers
    from transformers.models.auto import processing_auto

    config = transformers.AutoConfig.from_pretrained(source)
    names: Any = getattr(processing_auto, "PROCESSOR_MAPPING_NAMES")  # noqa: B009 - not exported
    kind: Any = getattr(transformers, names[config.model_type])

    class ImagesAndText(kind):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return argument and super().check_argument_for_proper_class(name, argument)

    parts = {
        "image_processor": transformers.AutoImageProcessor.from_pretrained(source),
        "tokenizer": transformers.AutoTokenizer.from_pretrained(source),
    }
    known, _ = kind.get_processor_dict(source)
    return ImagesAndText.from_args_and_dict([parts.get(n) for n in kind.get_attributes()], known)


def _auto_class(config: Any) -> Any:
    """Return the class of transformers that loads the checkpoint whole, its head included."""
    from transformers.models.auto import modeling_auto as auto

    if _is_causal(config):
        return auto.AutoModelForCausalLM
    talks = config.model_type in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if talks and hasattr(config, "vision_config"):
        return auto.AutoModelForImageTextToText
    return auto.AutoModel


def _default_dtype(device: torch.device) -> torch.dtype | str:
    return torch.float32 if device.type == "cpu" else "auto"


def _weights(loader: Any, source: str, config: Any, dtype: Any) -> nn.Module:
    """Load the module, and see that its blocks have come out of the checkpoint.

    transformers fills what a checkpoint lacks with random numbers, and only logs it.
    """
    module: nn.Module
    module, info = loader.from_pretrained(
        source, config=config, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
    )
    for key, found, expected in sorted(info["mismatched_keys"]):
        msg = f"{key} is {list(found)} in the file and {list(expected)} by config.json"
        raise ValueError(msg)
    inside = tuple(f".{path}." for path, _ in block_lists(module))
    absent = sorted(key for key in info["missing_keys"] if f".{key}".startswith(inside))
    if absent:
        raise ValueError(
            f"{len(absent)} parameters of its blocks are absent, the first {absent[0]}"
        )
    return module


@contextmanager
def _reading(what: str, source: str) -> Iterator[None]:
    """Turn whatever a broken file raises into one sentence."""
    try:
        yield
    except Exception as error:
        msg = (
            f"the {what} of {source} cannot be loaded: {_said(error) or repr(error)} "
            f"({type(error).__name__}). Is the checkpoint whole? Fetch or save it again"
        )
        raise RuntimeError(msg) from error


def _is_causal(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    named = getattr(config, "architectures", None) or []
    if named:
        return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named)
    return config.model_type in CAUSAL


def _why_not(source: str, error: Exception) -> str:
    if Path(source).is_dir():
        return f"{source} is a folder without a Hugging Face checkpoint: {_said(error)}"
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_path:
        return f"there is no folder {source}"
    return (
        f"{source} is not a local folder, and the Hugging Face Hub gave no model of that name "
        f"({_said(error)}). Check the name, the network and, for a gated model, your token"
    )


def _said(error: Exception) -> str:
    return re.split(r"\.?\s*\n|\. ", str(error).strip(), maxsplit=1)[0].rstrip(".")
