"""PEFT adapters: put on a model, or merged into its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from .checkpoint import quantisation
from .hub import Source, find, said
from .model import headless

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Adapter:
    """An adapter that lies in a folder."""

    name: str
    folder: Path
    base: str
    """What it was trained on, as it says itself."""
    origin: str
    """Where it is found again: an absolute path, or its id on the Hub with `@` and its commit."""


def find_adapter(text: str) -> Adapter | None:
    """Return the adapter in a folder or a repository of the Hub; None where there is none.

    Raises
    ------
    FileNotFoundError, PermissionError, ConnectionError
        As `hub.find`.
    ValueError
        When its configuration is broken, or does not say what it was trained on.
    """
    source = find(text, file=_CONFIG)
    if not source.complete:
        return None
    folder = Path(source.path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(text, allow_patterns=["adapter_*"]))
    if not (base := _read(folder / _CONFIG).get("base_model_name_or_path")):
        raise ValueError(f"{_CONFIG} of {text} does not say what base_model_name_or_path is")
    commit = f"@{folder.name}" if source.repository and folder.parent.name == "snapshots" else ""
    return Adapter(source.name, folder, base, source.origin + commit)


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, not an object")
    except ValueError as error:
        msg = f"{path} cannot be read ({said(error)}): fetch or save the adapter again"
        raise ValueError(msg) from error
    return config


def refuse_one_inside(source: Source) -> None:
    """Refuse a checkpoint with an adapter beside its weights, which transformers puts on unasked.

    Raises
    ------
    ValueError
        When it has one.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(source.path):
        msg = (
            f"{source.path} holds a model and an adapter: put the adapter's files (adapter_*) into "
            "a folder of their own, and name it by adapter= (--adapter) to have it on"
        )
        raise ValueError(msg)


def put_on(module: nn.Module, base: str, adapter: Adapter, *, merge: bool) -> list[str]:
    """Put an adapter on `module`, in place, and return what there is to say about it.

    Its blocks stay where they are, so that sites keep their names.

    Parameters
    ----------
    module
        The whole model, of transformers.
    base
        Its name.
    adapter
        Of the weights, as LoRA is; one that adds tokens of its own is refused.
    merge
        Add it to the weights and take it off again.

    Raises
    ------
    ImportError
        When peft is missing.
    ValueError
        When it was made for another model, is not of the weights, or peft does not know it.
    RuntimeError
        When its weights are missing or broken.
    """
    config = _config(adapter)
    if config.is_prompt_learning:
        msg = f"the adapter {adapter.name} adds tokens of its own to every text: geofast takes "
        raise ValueError(msg + "adapters of the weights, such as LoRA")
    if any(p.is_meta for p in module.parameters()):
        msg = f"{base} is partly on the disk or in main memory, where no adapter can be put on it: "
        raise ValueError(msg + "merge it on a larger machine and save the result")
    # One for embeddings was trained on the model without its head.
    adapted: Any = headless(module) if config.task_type == "FEATURE_EXTRACTION" else module
    worn = _worn(adapted, config, base, adapter)
    if merge:
        worn.merge_and_unload()
    module.eval()
    remarks = []
    if merge and quantisation(getattr(module, "config", None)):
        remarks.append(f"the sum of the weights and the adapter {adapter.name} is quantised again")
    if Path(adapter.base).name.lower() != Path(base).name.lower():
        remarks.append(f"the adapter {adapter.name} was made for {adapter.base}, not for {base}")
    return remarks


def _peft(adapter: Adapter) -> Any:
    if find_spec("peft") is None:
        raise ImportError(f"the adapter {adapter.name} needs peft: pip install peft")
    import peft

    return peft


def _config(adapter: Adapter) -> Any:
    peft = _peft(adapter)
    try:
        config = peft.PeftConfig.from_pretrained(str(adapter.folder))
    except Exception as error:  # an older or newer peft wrote it, or another tool
        why = f"it knows no peft_type {error}" if isinstance(error, KeyError) else said(error)
        msg = f"{adapter.folder / _CONFIG} cannot be used by peft {peft.__version__}, {why}: "
        raise ValueError(f"{msg}upgrade peft, or save the adapter again") from error
    config.base_model_name_or_path = None  # which peft would compare, and warn of
    return config


def _worn(module: Any, config: Any, base: str, adapter: Adapter) -> Any:
    """Return what peft makes of `module` with the adapter on it."""
    peft = _peft(adapter)
    try:
        worn = peft.get_peft_model(module, config, autocast_adapter_dtype=False)
        found = worn.load_adapter(
            str(adapter.folder), "default", torch_device="cpu", autocast_adapter_dtype=False
        )
    except Exception as error:  # peft asks the module for whatever such models have
        _require_weights(adapter)
        why = str(error).strip().splitlines()[:2][-1]  # torch says in the first that there is more
        raise ValueError(_misfit(base, adapter, said(why))) from error
    if odd := sorted([*found.missing_keys, *found.unexpected_keys]):
        why = f"{len(odd)} tensors are in one and not in the other, the first {odd[0]}"
        raise ValueError(_misfit(base, adapter, why))
    return worn


def _require_weights(adapter: Adapter) -> None:
    """See that the weights are there and whole."""
    path = next((p for n in _WEIGHTS if (p := adapter.folder / n).is_file()), None)
    again = "fetch or save the adapter again"
    if path is None:
        msg = f"{adapter.folder} has {_CONFIG}, but no {' or '.join(_WEIGHTS)}: {again}"
        raise RuntimeError(msg)
    try:
        _peft(adapter).load_peft_weights(str(adapter.folder), device="cpu")
    except Exception as error:  # of safetensors, pickle or torch
        msg = f"{path} cannot be loaded: {said(error)} ({type(error).__name__}); {again}"
        raise RuntimeError(msg) from error


def _misfit(base: str, adapter: Adapter, why: str) -> str:
    fits = f"the adapter {adapter.name}, made for {adapter.base}, does not fit {base}: {why}"
    return f"{fits}; put it on the model that it was made for"


def wears_one(module: nn.Module) -> bool:
    """Whether an adapter is on: layers of PEFT stand around those of the model."""
    return any(hasattr(part, "base_layer") for part in module.modules())


def base_of(module: nn.Module) -> nn.Module:
    """Return the model that PEFT has wrapped, its adapter on; any other as it is.

    Raises
    ------
    ValueError
        When the adapter is in the wrapping: it adds tokens of its own.
    """
    inside: Any = getattr(module, "get_base_model", None)
    config: Any = getattr(module, "active_peft_config", None)
    if inside is None or config is None:
        return module
    if config.is_prompt_learning:
        msg = f"{type(module).__name__} adds tokens of its own to every text: geofast takes "
        raise ValueError(msg + "adapters of the weights, such as LoRA")
    base = inside()
    assert isinstance(base, nn.Module)
    return base
