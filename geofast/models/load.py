"""`load`: a Hub id, a folder or a module becomes a `Model`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from .._ops import no_gpu
from . import zoo
from .adapters import Adapter, base_of, find_adapter, put_on, refuse_one_inside, wears_one
from .assemble import assemble
from .checkpoint import (
    DeviceMap,
    notes,
    read_config,
    read_module,
    refuse_random,
    require_device_map,
)
from .hub import Source, find
from .location import load_location
from .model import Batch, Model, wrap
from .packages import quietly
from .processors import OfCheckpoint, OfProcessor

LIBRARIES = ("open_clip", "timm", "location")
"""What names of models begin with that transformers does not load."""


class Loading(TypedDict):
    """How `load` and `skeleton` are asked for a model that is named."""

    device: str | torch.device | None
    dtype: torch.dtype | None
    device_map: DeviceMap | None
    adapter: str | Path | None
    merge: bool
    trust_remote_code: bool


def load(
    model: str | Path | nn.Module | Model,
    *,
    prepare: Callable[[list[Any]], Batch] | None = None,
    processor: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    adapter: str | Path | None = None,
    merge: bool = False,
    trust_remote_code: bool = False,
) -> Model:
    """Load a model for probing.

    Parameters
    ----------
    model
        A Hugging Face Hub id (`facebook/dinov2-small`, with or without `hf:`), a local folder, a
        GGUF file (`model.gguf`, or `ID:FILE.gguf` on the Hub), the folder or id of a PEFT adapter,
        `open_clip:ARCH/TAG` or `timm:NAME` (see `models.zoo`), `location:geoclip` or
        `location:satclip:FILE` (see `models.location`), or an nn.Module together with `processor`
        or `prepare`. Vision encoders, language models and text encoders, models that compare
        images with texts (CLIP, SigLIP) and models that talk about images (LLaVA, Qwen-VL, Gemma
        3). The last two take images; `reading("text")` takes texts. Checkpoints quantised by
        bitsandbytes, GPTQ or AWQ run as they are, those of GGUF are dequantised.
    prepare
        For an nn.Module: from a list of inputs to the module's keyword arguments.
    processor
        For an nn.Module of transformers: its tokenizer, image processor, or both in one.
    device
        None takes a GPU where there is one, else the CPU; an nn.Module stays where it is.
    dtype
        None takes float32 on the CPU, where narrower types run slower, and the checkpoint's own
        dtype elsewhere and where it is quantised; an nn.Module keeps its own.
    device_map
        For a checkpoint, in place of `device`: `auto` spreads it over all GPUs, the main memory and
        the disk, in this order; or a mapping from parts to devices, as accelerate takes it.
    adapter
        For a checkpoint: the folder or Hub id of a PEFT adapter to put on.
    merge
        Add the adapter to the weights; its layers run no longer.
    trust_remote_code
        Run the Python files that come with the checkpoint. They can do whatever you can.

    Raises
    ------
    FileNotFoundError
        When there is no such folder, file or model on the Hub.
    PermissionError
        When it is gated.
    ConnectionError
        When the Hub cannot be reached, and the model is not in its cache.
    ValueError
        When the model reads neither images nor text, or its blocks cannot be found; when
        config.json cannot be read or names a model type that transformers does not know; when the
        checkpoint needs code that is not trusted; when an adapter was made for another model.
    ImportError
        When a package is missing that the checkpoint needs: bitsandbytes, peft, accelerate.
    RuntimeError
        When weights, tokenizer or image processor are missing, broken or do not fit the
        configuration.
    """
    loading: Loading = {
        "device": device, "dtype": dtype, "device_map": device_map, "adapter": adapter,
        "merge": merge, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    require_fitting(model, {"prepare": prepare, "processor": processor, **loading})
    if isinstance(model, Model):
        return model
    where = default_device(device)
    if isinstance(model, nn.Module):
        return _from_module(model.to(where if device else None, dtype), prepare, processor)
    library, _, of_library = str(model).partition(":")
    if library in LIBRARIES:
        if library == "location":
            made = load_location(of_library, where, dtype)
        else:
            made = zoo.load(library, of_library, where, dtype)
        return replace(made, source=f"{library}:{_lasting(library, of_library)}")
    source, worn = find_checkpoint(model, loading)
    return _from_checkpoint(source, where, dtype, device_map, worn, merge)


def require_fitting(model: str | Path | nn.Module | Model, given: Mapping[str, Any]) -> None:
    """Refuse arguments of `load` that do not go with such a model, or with each other.

    Raises
    ------
    ValueError
        Naming the arguments.
    """
    named = [name for name, value in given.items() if value is not None and value is not False]
    if isinstance(model, Model):
        if named:
            raise ValueError(f"{model.name} is loaded already: leave {' and '.join(named)} out")
        return
    if "device" in named and "device_map" in named:
        raise ValueError("give device= or device_map=, not both: the latter says where parts go")
    if isinstance(model, nn.Module):
        if extra := [n for n in named if n not in ("prepare", "processor", "device", "dtype")]:
            raise ValueError(f"{' and '.join(extra)} goes with a checkpoint, not with an nn.Module")
        return
    for name in ("prepare", "processor"):
        if name in named:
            msg = f"{name}= goes with an nn.Module; a checkpoint brings its own processor"
            raise ValueError(msg)
    if str(model).partition(":")[0] in LIBRARIES:
        if extra := [name for name in named if name not in ("device", "dtype")]:
            raise ValueError(f"{' and '.join(extra)} goes with a checkpoint of transformers")
    elif "device_map" in named:
        require_device_map(given["device_map"])


def find_checkpoint(model: str | Path, loading: Loading) -> tuple[Source, Adapter | None]:
    """Find what `load` is to read: the checkpoint, and the adapter to put on it.

    Raises
    ------
    FileNotFoundError, PermissionError, ConnectionError, ValueError
        See `load`.
    """
    text = str(model).removeprefix("hf:")
    source = find(text, trust_remote_code=loading["trust_remote_code"])
    source, worn = base_and_adapter(text, source, loading["adapter"])
    if loading["merge"] and worn is None:
        raise ValueError(
            "merge=True (--merge-adapter) goes with an adapter: name it by adapter= (--adapter)"
        )
    if not source.gguf:
        refuse_one_inside(source)
    return source, worn


def default_device(device: str | torch.device | None) -> torch.device:
    """Return `device`, or a GPU where there is one that torch can use, else the CPU.

    Raises
    ------
    RuntimeError
        When it is a GPU that is not there, or that torch cannot use.
    """
    if device is None:
        return torch.device("cpu" if no_gpu() else "cuda")
    where = torch.device(device)
    if where.type == "cuda" and (why := no_gpu(where)):
        msg = f"there is no GPU for device={str(where)!r}: {why}; leave device= (--device) out"
        raise RuntimeError(msg)
    return where


def _from_module(module: nn.Module, prepare: Any, processor: Any) -> Model:
    kind = type(module).__name__
    if prepare is not None and processor is not None:
        raise ValueError("prepare= and processor= both make the module's inputs: give one of them")
    if prepare is None and processor is None:
        msg = (
            f"load({kind}) needs prepare=, a function from a list of inputs to the module's "
            "keyword arguments, or processor=, the Hugging Face processor of such a model"
        )
        raise ValueError(msg)
    module = base_of(module)
    name = type(module).__name__ + (" + adapter" if wears_one(module) else "")
    if prepare is not None:
        return replace(wrap(module, prepare), name=name)
    return assemble(name, module, OfProcessor(processor))


def base_and_adapter(
    text: str, source: Source, adapter: str | Path | None
) -> tuple[Source, Adapter | None]:
    """Return the base and the adapter on it, where the model named is an adapter itself too."""
    if adapter is None and source.complete:
        return source, None
    worn = find_adapter(text if adapter is None else str(adapter))
    if adapter is not None and worn is None:
        raise FileNotFoundError(f"{adapter} holds no adapter: it has no adapter_config.json")
    if adapter is not None or worn is None:
        return source, worn
    try:
        return find(worn.base, trust_remote_code=source.trust_remote_code), worn
    except OSError as error:
        msg = f"{error}. The adapter {text} names it as its base: if that is elsewhere, load it "
        raise type(error)(f"{msg}with adapter={text!r} (--adapter)") from error


@quietly()
def _from_checkpoint(
    source: Source,
    device: torch.device,
    dtype: torch.dtype | None,
    device_map: DeviceMap | None,
    adapter: Adapter | None,
    merge: bool,
) -> Model:
    config = read_config(source)
    module, absent = read_module(source, config, device, dtype, device_map)
    remarks = notes(source, module)
    if adapter is not None:
        remarks += put_on(module, source.name, adapter, merge=merge)
    name = called(source, adapter, merge=merge)
    model = assemble(name, module, OfCheckpoint(source), remarks)
    refuse_random(source, model, absent)
    return replace(model, source=_whence(source, config, adapter, merge))


def called(source: Source, adapter: Adapter | None, *, merge: bool) -> str:
    """Return what reports call a checkpoint with an adapter on, or without one."""
    more = "" if adapter is None else f" + {adapter.name}" + " (merged)" * merge
    return source.name + more


def _whence(source: Source, config: Any, adapter: Adapter | None, merge: bool) -> str:
    """Say where the weights came from, so that others find the same."""
    commit = getattr(config, "_commit_hash", None)
    base = f"{source.origin}@{commit}" if source.repository and commit else source.origin
    return base + ("" if adapter is None else f" + {adapter.origin}" + " (merged)" * merge)


def _lasting(library: str, name: str) -> str:
    """Return the name of a model of another library, the path in it made absolute."""
    own = library == "open_clip" and not name.startswith(("hf-hub:", "local-dir:"))
    mark = "/" if own else ":"
    before, _, after = name.partition(mark)
    path = Path(after).expanduser()
    local = path.is_file() if own else before in ("local-dir", "satclip")
    return f"{before}{mark}{path.resolve()}" if local else name
