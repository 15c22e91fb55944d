"""`load`: a Hub id, a folder or a module becomes a `Model`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .model import Batch, ImageTransform, Model, stack_images, text_collate, wrap
from .structure import find_towers


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
        an nn.Module together with `prepare`. Vision encoders and causal language models.
    prepare
        For an nn.Module: from a list of inputs to the module's keyword arguments.
    device
        None takes a GPU where there is one, else the CPU.
    dtype
        None takes float32 on the CPU, where narrower types run slower, and the checkpoint's own
        dtype elsewhere.

    Raises
    ------
    FileNotFoundError
        When there is no such folder and the Hub cannot be reached or has no such model.
    ValueError
        When the model is neither a vision encoder nor a causal language model, or its blocks
        cannot be found.
    """
    if isinstance(model, Model):
        return model
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(model, nn.Module):
        if prepare is None:
            msg = (
                f"load({type(model).__name__}) needs prepare=, a function from a list of inputs "
                "to the module's keyword arguments"
            )
            raise ValueError(msg)
        return wrap(model if device is None else model.to(where), prepare)
    if prepare is not None:
        raise ValueError("prepare= goes with an nn.Module; a checkpoint brings its own processor")
    return _from_checkpoint(str(model).removeprefix("hf:"), where, dtype)


def _from_checkpoint(source: str, device: torch.device, dtype: torch.dtype | None) -> Model:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(_why_not(source, error)) from error
    torch_dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
    if _is_causal(config):
        loader: Any = transformers.AutoModelForCausalLM
    else:
        loader = transformers.AutoModel
    module: nn.Module = loader.from_pretrained(source, dtype=torch_dtype)
    module = module.eval().to(device)
    body: nn.Module = module.base_model  # type: ignore[assignment]
    name = Path(source).name if Path(source).exists() else source
    towers = find_towers(body)
    if loader is transformers.AutoModelForCausalLM:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        return Model(name, module, body, towers, "text", None, text_collate(tokenizer, body))
    if getattr(body, "main_input_name", None) != "pixel_values":
        msg = (
            f"{source} is a {type(module).__name__}: neither a vision encoder nor a causal "
            "language model. Pass the nn.Module itself with prepare= to probe it"
        )
        raise ValueError(msg)
    processor = transformers.AutoImageProcessor.from_pretrained(source)
    return Model(name, module, body, towers, "image", ImageTransform(processor), stack_images)


def _is_causal(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    named = getattr(config, "architectures", None) or []
    if named:
        return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named)
    return config.model_type in CAUSAL


def _why_not(source: str, error: Exception) -> str:
    if Path(source).is_dir():
        return f"{source} is a folder without a Hugging Face checkpoint: {_first_line(error)}"
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_path:
        return f"there is no folder {source}"
    return (
        f"{source} is not a local folder, and the Hugging Face Hub gave no model of that name "
        f"({_first_line(error)}). Check the name, the network and, for a gated model, your token"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
