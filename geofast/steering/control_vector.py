"""Directions that are added, as a control vector for llama.cpp.

A control vector is a GGUF file of architecture `controlvector` with tensors `direction.<n>`,
float32 [d]. llama.cpp adds `direction.<n>` to what its block n makes, counted from 0, after both of
its residual additions: geofast's site `lm.layers.<n>`. It does so at every token, of the prompt and
of the answer. Its loader (`common/common.cpp`, `common_control_vector_load_one`) refuses n = 0, and
`llama_adapter_cvec::apply` (`src/llama-adapter.cpp`) begins with block 1, so that the residual
after the first block cannot be reached. `model_hint` and `layer_count` are for people: the loader
reads neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..models import Model, Site
from .edit import Edit, several

_ADDS = "llama.cpp adds one direction to every token of prompt and answer"


def save_control_vector(edits: Edit | Sequence[Edit], path: str | Path, model: Model) -> None:
    """Write edits that add directions as a GGUF control vector for llama.cpp.

    `llama-cli -m MODEL.gguf --control-vector PATH` then adds what the edits add;
    `--control-vector-scaled PATH:2` adds twice as much. Several edits of one layer are summed.

    Parameters
    ----------
    edits
        From `gf.add`, with `role="all"` and `phase="both"`, at sites `lm.layers.<i>` from 1 on.
    path
        The file to write.
    model
        The model that they are for: it says which layers a glob means.

    Raises
    ------
    ValueError
        When there is no edit, or one that a control vector cannot hold: of another mode, with
        values for several samples, for some of the tokens or one phase, at a site that is not the
        residual stream of the language model or comes before its second block; when an edit is
        for another model or width, or the model is none of transformers.
    ImportError
        Without the package gguf.
    OSError
        When the file cannot be written.
    """
    edits = several(edits)
    if not edits:
        raise ValueError("there is no edit to write")
    config = _config(model)
    directions: dict[int, torch.Tensor] = {}
    for edit in edits:
        for layer, direction in _directions(edit, model, config.hidden_size).items():
            directions[layer] = directions.get(layer, 0) + direction
    _write(directions, Path(path), config.model_type)


def _directions(edit: Edit, model: Model, width: int) -> dict[int, torch.Tensor]:
    """By layer, float64 [d]."""
    _require_one_direction(edit)
    for site in model.sites(edit.sites):
        _require_reached(site)
    if edit.role != "all" or edit.phase != "both":
        msg = f"{_ADDS}, and {edit!r} is for some of them: "
        raise ValueError(msg + "make it with role='all', phase='both'")
    if edit.width != width:
        raise ValueError(f"the edit is for {edit.width} dimensions, and {model.name} has {width}")
    directions = {}
    for i, site in enumerate(edit.sites_in(model)):
        direction = torch.zeros(width, dtype=torch.float64)
        direction[edit.dims] = edit.values[i if len(edit.values) > 1 else 0, 0, 0].cpu().double()
        assert site.layer is not None
        directions[site.layer] = direction
    return directions


def _require_one_direction(edit: Edit) -> None:
    if edit.mode != "add":
        raise ValueError(f"{_ADDS}, and what {edit!r} adds depends on what it finds")
    if edit.samples > 1 or edit.values.shape[2] > 1:
        several = "samples" if edit.samples > 1 else "tokens"
        raise ValueError(f"{_ADDS}, and {edit!r} has values for several {several}: make one each")


def _require_reached(site: Site) -> None:
    if site.layer is None or site.name != f"lm.layers.{site.layer}":
        msg = "llama.cpp adds to the language model's residual stream (lm.layers.<i>), not to "
        raise ValueError(msg + site.name)
    if site.layer == 0:
        msg = "llama.cpp cannot reach lm.layers.0: its first control vector is that of lm.layers.1"
        raise ValueError(msg)


def _config(model: Model) -> Any:
    """Return the configuration of the language model."""
    config: Any = getattr(model.module, "config", None)
    if not hasattr(config, "get_text_config"):
        raise ValueError(f"{model.name} has no configuration of transformers: llama.cpp knows none")
    return config.get_text_config()


def _write(directions: dict[int, torch.Tensor], path: Path, hint: str) -> None:
    try:
        from gguf import GGUFWriter
    except ImportError as err:
        raise ImportError("control vectors need the package gguf: pip install gguf") from err
    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(directions))
    for layer in sorted(directions):
        writer.add_tensor(f"direction.{layer}", directions[layer].float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
