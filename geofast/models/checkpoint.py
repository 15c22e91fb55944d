"""Weights of a Hugging Face checkpoint: whole or spread, plain or quantised."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .example import example_for
from .hub import Source, reading, said, untrusted
from .model import Model
from .packages import require_torchvision_that_fits
from .reach import reaching
from .structure import block_lists

DeviceMap = str | Mapping[str, int | str | torch.device]

_PACKAGES = {
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel", "accelerate"),
}
"""What transformers needs to run a checkpoint that was quantised so."""
QUANTISED = "its weights are quantised"
"""Why weights cannot be changed where they are."""


def read_config(source: Source) -> Any:
    """Read the configuration, with a masked autoencoder's masking off.

    Raises
    ------
    ValueError
        When it is broken, of an unknown type, or needs code that is not trusted.
    FileNotFoundError
        When there is none.
    RuntimeError
        When a GGUF file is broken.
    """
    import transformers

    if source.gguf:
        with reading("configuration", source):
            return transformers.AutoConfig.from_pretrained(source.path, **source.options)
    try:
        config = transformers.AutoConfig.from_pretrained(source.path, **source.options)
    except ImportError:
        require_torchvision_that_fits()
        raise
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(untrusted(source.path)) from error
        if (Path(source.path) / "config.json").exists() or "model type" in str(error):
            msg = f"the config.json of {source.path} cannot be used: {said(error)}"
            raise ValueError(msg) from error
        msg = f"{source.path} is a {_place(source)} without a Hugging Face checkpoint: "
        raise FileNotFoundError(msg + said(error)) from error
    if hasattr(config, "mask_ratio"):
        config.mask_ratio = 0.0  # masked autoencoders hide random patches, in eval mode too
    return config


def _place(source: Source) -> str:
    return "folder" if Path(source.path).is_dir() else "repository"


def read_module(
    source: Source,
    config: Any,
    device: torch.device,
    dtype: torch.dtype | str | None,
    device_map: DeviceMap | None,
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Load the weights, in eval mode, where they shall run.

    Returns
    -------
    torch.nn.Module
        The model.
    dict
        Of its parameters, those outside its blocks that the checkpoint lacks, by name: they are
        random. `refuse_random` tells whether that matters.

    Raises
    ------
    ImportError
        When a package is missing.
    RuntimeError
        When weights are missing, broken or do not fit the configuration.
    """
    options = dict(source.options)
    quantised = quantisation(config)
    if device_map is not None:
        _require(source, "is spread by device_map= (--device-map)", ("accelerate",))
        options["device_map"] = device_map if isinstance(device_map, str) else dict(device_map)
    elif quantised:
        options["device_map"] = {"": str(device)}  # they cannot be moved later
    if quantised:
        method = _method(quantised)
        _require(source, f"is quantised ({method})", _PACKAGES.get(method, ()))
    if source.gguf:
        _require(source, "is a GGUF file", ("gguf", "accelerate"))
        options |= _dequantised()
    dtype = dtype or ("auto" if quantised else default_dtype(device))
    with reading("weights", source):
        module, absent = _weights(auto_class(config), source.path, config, dtype, options)
    module = module.eval() if "device_map" in options else module.eval().to(device)
    state = module.state_dict(keep_vars=True)
    return module, {key: state[key] for key in absent if key in state}


def require_device_map(device_map: DeviceMap) -> None:
    """Refuse what is neither `auto` nor a mapping to devices.

    Raises
    ------
    ValueError
        Naming what is wrong with it.
    """
    if isinstance(device_map, str):
        if device_map != "auto":
            msg = f"device_map= is 'auto' or a mapping from parts to devices; got {device_map!r}"
            raise ValueError(msg)
        return
    for part, place in device_map.items():
        try:
            if place != "disk":
                torch.device(place)
        except RuntimeError as error:
            msg = f"device_map= sends {part!r} to {place!r}, which is no device; write cpu, disk, "
            raise ValueError(msg + "cuda:0") from error


def _require(source: Source, why: str, packages: tuple[str, ...]) -> None:
    if absent := [name for name in packages if find_spec(name) is None]:
        msg = f"{source.name} {why}, which needs {' and '.join(absent)}: "
        raise ImportError(msg + f"pip install {' '.join(absent)}")


def _dequantised() -> dict[str, Any]:
    # Else transformers keeps the blocks packed where it can fetch a kernel for them from the Hub,
    # and puts attention of its own in place.
    import transformers

    kind = getattr(transformers, "GgufConfig", None)  # older ones always dequantise
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def quantisation(config: Any) -> Mapping[str, Any] | None:
    """Return how the weights are stored, as config.json says; None for plain numbers."""
    inner = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for part in (config, inner):
        if found := getattr(part, "quantization_config", None):
            given: Mapping[str, Any] = found if isinstance(found, Mapping) else found.to_dict()
            return None if _method(given) == "gguf" else given  # which `read_module` dequantises
    return None


def _method(quantised: Mapping[str, Any]) -> str:
    method = quantised.get("quant_method", "bitsandbytes")  # the first of all did not say
    return str(getattr(method, "value", method))


def pinned(module: nn.Module) -> str | None:
    """Say why the weights of `module` cannot be changed where they are; None where they can."""
    if quantisation(getattr(module, "config", None)):
        return QUANTISED
    if any(p.is_meta for p in module.parameters()):
        return "parts of it are fetched from the disk or main memory when they run"
    return None


def notes(source: Source, module: nn.Module) -> list[str]:
    """Say in what the loaded weights differ from plain ones on one device."""
    said = []
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    if source.cached:
        said.append("the Hugging Face Hub was not reached: the model is the cache's")
    if source.gguf:
        said.append(f"weights are dequantised from {source.gguf}, computed in {_word(dtype)}")
    if quantised := quantisation(getattr(module, "config", None)):
        said.append(_stored(quantised, dtype))
    places = {str(p) for p in getattr(module, "hf_device_map", {}).values()}
    if len(places) > 1 or "disk" in places:
        said.append(f"device_map keeps parts of the model on {' and '.join(sorted(places))}")
    return said


def _stored(quantised: Mapping[str, Any], dtype: torch.dtype) -> str:
    bits = quantised.get("bits", quantised.get("w_bit"))
    computed = _word(dtype)
    if _method(quantised) == "bitsandbytes":
        bits = 4 if quantised.get("load_in_4bit") else 8
        # LLM.int8() makes float16 of what it is given before it makes int8 of it.
        four = _word(quantised.get("bnb_4bit_compute_dtype") or "float32")
        computed = four if bits == 4 else "float16"
    stored = f"{_method(quantised)} {bits} bit" if bits else _method(quantised)
    return f"weights are quantised: {stored}, computed in {computed}"


def _word(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def auto_class(config: Any) -> Any:
    """Return the class of transformers that loads the checkpoint whole, its head included."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    of_its_own = type(config).__module__.startswith("transformers_modules")
    own = config.auto_map if of_its_own else {}
    for name in ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel"):
        if name in own:
            return getattr(transformers, name)
    if _is_causal(config):
        return auto.AutoModelForCausalLM
    talks = config.model_type in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if talks and hasattr(config, "vision_config"):
        return auto.AutoModelForImageTextToText
    return auto.AutoModel


def _is_causal(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    named = getattr(config, "architectures", None) or []
    if named:
        return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named)
    return config.model_type in CAUSAL


def default_dtype(device: torch.device) -> torch.dtype | str:
    """Return what `load` takes on `device` where nobody says; `auto` is the checkpoint's own."""
    return torch.float32 if device.type == "cpu" else "auto"


def _weights(
    loader: Any, path: str, config: Any, dtype: Any, options: Mapping[str, Any]
) -> tuple[nn.Module, list[str]]:
    """Load the module, see that its blocks have come out of the checkpoint, and say what has not.

    transformers fills what a checkpoint lacks with random numbers, and only logs it.
    """
    module: nn.Module
    module, info = loader.from_pretrained(
        path, config=config, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True,
        **options,
    )  # fmt: skip
    for key, found, expected in sorted(info["mismatched_keys"]):
        msg = f"{key} is {list(found)} in the file and {list(expected)} by config.json"
        raise ValueError(msg)
    inside = tuple(f".{path}." for path, _ in block_lists(module))
    absent = sorted(info["missing_keys"])
    if of_blocks := [key for key in absent if f".{key}".startswith(inside)]:
        raise ValueError(
            f"{len(of_blocks)} parameters of its blocks are absent, the first {of_blocks[0]}"
        )
    return module, absent


def refuse_random(source: Source, model: Model, absent: Mapping[str, torch.Tensor]) -> None:
    """Refuse a model of which parameters that a forward pass reads are random.

    Where something is absent, and only there, it takes a pass over an example to tell.

    Raises
    ------
    RuntimeError
        When there are any of `absent`, which `read_module` returned.
    """
    # A buffer of integers is no weight: the class has computed it from the configuration.
    random = {
        key: t for key, t in absent.items() if t.is_floating_point() or isinstance(t, nn.Parameter)
    }
    read = {
        key
        for view in (model, model.other)
        if view is not None and random
        for key in reaching(view, [example_for(view)], random)
    }
    with reading("weights", source):
        if read:
            more = f" and {len(read) - 1} more" if len(read) > 1 else ""
            raise ValueError(f"parameters that its sites depend on are absent: {min(read)}{more}")
