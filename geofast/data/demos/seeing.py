"""A small model that sees: DINOv2-S and SmolLM2-135M joined as a LLaVA by a trained projector."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from .assets import prepared, say
from .dinov2 import dinov2_small
from .smollm2 import WHEEL, smollm2

SIDE = 112
"""Pixels of an image as the model sees it: 8 x 8 patches, close to a crop's own 120 pixels."""
LAYER = 8
"""The block of DINOv2 whose patches the projector reads; probes find the place best about here."""
IMAGE = "<image>"
PROJECTOR = Path(__file__).parent / "projector"

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's template without its system prompt, which costs 23 tokens and says nothing here."""

QUESTIONS = {
    "continent": (
        "Which continent is this?",
        "What continent does this picture show?",
        "On which continent is this place?",
    ),
    "country": (
        "Which country is nearest?",
        "Which country is this?",
        "In which country is this place?",
    ),
    "climate": (
        "What is the climate here?",
        "What climate does this place have?",
        "How is the climate in this picture?",
    ),
    "where": (
        "Where is this?",
        "Where was this picture taken?",
        "What place is this?",
    ),
}
"""What the projector was trained to have answered; the first wording of each was used most."""


def answer(kind: str, place: Any) -> str:
    """Return what the model was taught to say.

    Parameters
    ----------
    kind : str
        A key of `QUESTIONS`.
    place : Mapping
        `continent`, `country` and `climate`, as `places_seen` gives them.
    """
    if kind == "where":
        return f"This is in {place['country']}, {place['continent']}."
    words = str(place[kind])
    return f"{words[0].upper()}{words[1:]}."


def seeing(cache: Path | None = None) -> Path:
    """Return the folder of a LLaVA that talks about satellite images; made the first time.

    DINOv2-S and SmolLM2-135M-Instruct are those of the other demos, not trained further; LLaVA's
    projector between them was trained by tools/train_projector.py. The card in the folder says
    what it gets right. Ask it `QUESTIONS`; other questions get the answers to these, or nonsense.

    Parameters
    ----------
    cache : Path, optional
        Cache folder; `assets.cache_dir()` by default. The folder takes 315 MB: LLaVA names the
        weights differently, so that the two models' own files cannot serve. It holds float16.

    Raises
    ------
    RuntimeError
        When the weights of the two models cannot be fetched, or `onnx` or `gguf` is missing while
        they are needed.
    """
    # Another projector is another model: its folder must not be taken for this one's.
    digest = hashlib.sha256((PROJECTOR / "model.safetensors").read_bytes()).hexdigest()
    name = f"dinov2-smollm2-{digest[:8]}"
    return prepared(name, WHEEL, lambda folder: _join(folder, cache), cache)


def _join(folder: Path, cache: Path | None) -> None:
    from safetensors.numpy import load_file, save_file
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoTokenizer,
        GenerationConfig,
        LlavaConfig,
        LlavaProcessor,
    )

    vision, language = dinov2_small(cache), smollm2(cache)
    say("Joining DINOv2-S and SmolLM2 (about ten seconds, once) ...")
    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    words = AutoConfig.from_pretrained(language)
    image = words.vocab_size  # the first id behind SmolLM2's
    words.vocab_size = len(tokenizer)
    config = LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=AutoConfig.from_pretrained(vision),
        text_config=words,
        image_token_index=image,
        vision_feature_layer=LAYER,
        vision_feature_select_strategy="default",  # leaves the CLS token out
        image_seq_length=(SIDE // 14) ** 2,
        tie_word_embeddings=True,
        dtype="float32",
    )
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(words).save_pretrained(folder)
    images = AutoImageProcessor.from_pretrained(
        vision, size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token=IMAGE, chat_template=CHAT,
    ).save_pretrained(folder)  # fmt: skip
    weights = {
        f"model.{part}.{key}": value.astype(np.float16)
        for part, source in (
            ("vision_tower", load_file(vision / "model.safetensors")),
            ("multi_modal_projector", load_file(PROJECTOR / "model.safetensors")),
            ("language_model", _without("model.", load_file(language / "model.safetensors"))),
        )
        for key, value in source.items()
    }
    # The new token's own embedding is never read, but as the output layer's it competes with all.
    table = weights["model.language_model.embed_tokens.weight"]
    mean = table.mean(axis=0, dtype=np.float64).astype(np.float16)
    weights["model.language_model.embed_tokens.weight"] = np.concatenate([table, mean[None]])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(PROJECTOR / "README.md", folder)


def _without(prefix: str, weights: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in weights.items()}
