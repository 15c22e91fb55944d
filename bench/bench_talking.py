"""A model that talks about images: one pass for tower, projector and language model.

A random LLaVA of small real shapes: a CLIP tower of DINOv2-S's size, 196 patches an image, and a
language model of SmolLM2's width with 12 layers. Batch 8, two poolings in the tower, the last token
in the language model.
"""

import statistics
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import geofast as gf
from geofast.models import find_towers
from geofast.models.assemble import conversing

BATCH, PATCHES, IMAGE_TOKEN = 8, 196, 7
POOLS = {"vision": ["cls", "mean:patch"], "projector": "mean:patch", "lm": "last"}
PROMPTS = 3
PAIRS = 7


@pytest.fixture(scope="module")
def llava():
    import transformers as t

    torch.manual_seed(0)
    vision = t.CLIPVisionConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_hidden_layers=12,
        image_size=224, patch_size=16,
    )  # fmt: skip
    text = t.LlamaConfig(
        hidden_size=576, num_hidden_layers=12, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, vocab_size=49152,
    )  # fmt: skip
    config = t.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    return t.LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(1)
    prompts = []
    for i in range(PROMPTS):
        words = torch.randint(10, 49000, (BATCH, 12 + 4 * i))
        ids = torch.cat([torch.full((BATCH, PATCHES), IMAGE_TOKEN), words], 1)
        prompts.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return {"image": {"pixel_values": torch.randn(BATCH, 3, 224, 224)}, "prompts": prompts}


def loaded(llava):
    """The model as `gf.load` has it; its batches are made here."""
    towers = {t.name: t for t in find_towers(llava.model)}
    words = SimpleNamespace(pad_token="<pad>", pad_token_id=0)
    return conversing("LLaVA", llava, llava.model, towers, SimpleNamespace(tokenizer=words))


def probed(model, batch):
    with gf.capture(model, pool=POOLS) as rows:
        model.forward(batch, lambda i: setattr(rows, "label", f"prompt {i}"))
    return rows


def one_prompt(batch):
    return {"image": batch["image"], "prompts": batch["prompts"][:1]}


@torch.inference_mode()
def bare(llava, batch):
    llava.model(**batch["image"], **batch["prompts"][0], use_cache=False)


@torch.inference_mode()
def stacked(llava, batch):
    """All hidden states, returned by the model and pooled and stacked afterwards."""
    seen = llava.model.get_image_features(
        batch["image"]["pixel_values"], output_hidden_states=True, return_dict=True
    )
    vision = [torch.cat([h[:, 0], h[:, 1:].mean(1)], 1) for h in seen.hidden_states]
    text = llava.model(
        **batch["prompts"][0], mm_encoder_outputs={"image": seen}, use_cache=False,
        output_hidden_states=True,
    )  # fmt: skip
    return torch.stack(vision), torch.stack([h[:, -1] for h in text.hidden_states])


def copy_all(states, _module, _args, out):
    states.append((out[0] if isinstance(out, tuple) else out).clone())


@torch.inference_mode()
def study(llava, batch):
    """One image at a time, in two passes; every token of every layer is copied, one is kept."""
    tower, language = llava.model.vision_tower, llava.model.language_model
    rows = []
    for i in range(BATCH):
        states = []
        keep = partial(copy_all, states)
        blocks = [*tower.encoder.layers, *language.layers]
        handles = [block.register_forward_hook(keep) for block in blocks]
        tower(batch["image"]["pixel_values"][i : i + 1])
        vision = [h[0, 0] for h in states]
        states.clear()
        llava.generate(
            **{k: v[i : i + 1] for k, v in batch["image"].items()},
            **{k: v[i : i + 1] for k, v in batch["prompts"][0].items()},
            max_new_tokens=1, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        text = [h[0, -1] for h in states[len(tower.encoder.layers) :]]
        for handle in handles:
            handle.remove()
        rows.append((torch.stack(vision), torch.stack(text)))
    return [torch.stack(part, 1) for part in zip(*rows, strict=True)]


GROUP = f"whole pass: LLaVA (tower 384 x 12, language model 576 x 12), batch {BATCH}"


def test_one_prompt(benchmark, llava, batch):
    model, given = loaded(llava), one_prompt(batch)
    rows = probed(model, given)
    vision, text = stacked(llava, given)
    torch.testing.assert_close(rows["lm.layers.5/last/prompt 0"], text[6], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        rows["vision.layers.5/cls"], vision[6][:, :384], atol=1e-5, rtol=1e-4
    )
    ratios = []
    for _ in range(PAIRS):
        start = time.perf_counter()
        bare(llava, given)
        middle = time.perf_counter()
        probed(model, given)
        ratios.append((time.perf_counter() - middle) / (middle - start))
    benchmark.group = GROUP
    benchmark.extra_info["paired ratio to the bare forward"] = f"{statistics.median(ratios):.3f}"
    benchmark.pedantic(probed, (model, given), rounds=3)


def test_bare_forward(benchmark, llava, batch):
    benchmark.group = GROUP
    benchmark.pedantic(bare, (llava, one_prompt(batch)), rounds=3)


def test_output_hidden_states_stacked(benchmark, llava, batch):
    benchmark.group = GROUP
    benchmark.pedantic(stacked, (llava, one_prompt(batch)), rounds=3)


def test_study(benchmark, llava, batch):
    given = one_prompt(batch)
    vision, text = study(llava, given)
    rows = probed(loaded(llava), given)
    torch.testing.assert_close(vision[5], rows["vision.layers.5/cls"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(text[5], rows["lm.layers.5/last/prompt 0"], atol=1e-5, rtol=1e-4)
    benchmark.group = GROUP
    benchmark.pedantic(study, (llava, given), rounds=2)


def three_runs(model, batch):
    return [
        probed(model, {"image": batch["image"], "prompts": [prompt]}) for prompt in batch["prompts"]
    ]


def test_three_prompts(benchmark, llava, batch):
    model = loaded(llava)
    rows = probed(model, batch)
    for i, alone in enumerate(three_runs(model, batch)):
        torch.testing.assert_close(
            rows[f"lm.layers.11/last/prompt {i}"], alone["lm.layers.11/last/prompt 0"]
        )
    benchmark.group = f"{GROUP}, three prompts"
    benchmark.pedantic(probed, (model, batch), rounds=3)


def test_a_run_for_each_prompt(benchmark, llava, batch):
    benchmark.group = f"{GROUP}, three prompts"
    benchmark.pedantic(three_runs, (loaded(llava), batch), rounds=3)
