"""A model that talks about images: one pass for tower, projector and language model.

A random LLaVA of small real shapes, loaded and fed as `gf.load` does it: a CLIP tower of DINOv2-S's
size, 196 patches an image, and a language model of SmolLM2's width with 12 layers. Two poolings in
the tower, the last token in the language model. The processor is a real one, its tokenizer one of
the tests', which knows few words.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import overhead
import pytest
import torch
from PIL import Image

import geofast as gf
from geofast.models.model import handing
from geofast.rows import Rows

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import conftest  # noqa: F401 - makes torchvision importable
import families

BATCH, PAIRS = 8, 5
POOLS = {"vision": ["cls", "mean:patch"], "projector": "mean:patch", "lm": "last"}
PROMPTS = [" ".join(f"w{i}" for i in range(words)) for words in (12, 16, 20)]
NAME = "LLaVA (tower 384 x 12, language model 576 x 12)"


def llava():
    """The model and its processor."""
    import transformers as t

    vision = t.CLIPVisionConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_hidden_layers=12,
        image_size=224, patch_size=16,
    )  # fmt: skip
    text = t.LlamaConfig(
        hidden_size=576, num_hidden_layers=12, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, vocab_size=49152,
    )  # fmt: skip
    token = families.IDS[families.IMAGE]
    config = t.LlavaConfig(vision_config=vision, text_config=text, image_token_index=token)
    processor = t.LlavaProcessor(
        t.CLIPImageProcessorPil(), families.tokenizer(), patch_size=16,
        chat_template=families.chat(families.IMAGE), vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return t.LlavaForConditionalGeneration(config), processor


def job_of(make, size):
    """The model as `gf.load` gives it, and a batch of images with every prompt."""
    torch.manual_seed(0)
    module, processor = make()
    model = gf.load(module.eval(), processor=processor).asking(PROMPTS)
    noise = np.random.default_rng(0).integers(0, 256, (size, 8, 8, 3), dtype=np.uint8)
    return model, model.prepare([Image.fromarray(n).resize((224, 224)) for n in noise])


def alone(batch, i=0):
    """The batch with one of its prompts."""
    return batch | {"prompts": batch["prompts"][i : i + 1]}


def probed(model, batch, rows=None):
    with gf.capture(model, pool=POOLS, rows=rows) as rows:
        rows.label = ""
        model.forward(batch, lambda i: setattr(rows, "label", f"prompt {i}"))
    return rows


@torch.inference_mode()
def bare(model, batch):
    model.body(pixel_values=batch["image"]["pixel_values"], **batch["prompts"][0], use_cache=False)


def forwards(model, batch, times):
    """The bare forward and the probed one; there is room for the rows of so many batches."""
    rows = Rows(times * BATCH)
    return partial(bare, model, batch), partial(probed, model, alone(batch), rows)


def forwards_of(name):
    assert name == NAME
    return forwards(*job_of(llava, BATCH), times=2)


# ------ other ways to the same rows


@torch.inference_mode()
def stacked(model, batch):
    """All hidden states, returned by the model and pooled and stacked afterwards."""
    seen = model.body.get_image_features(
        batch["image"]["pixel_values"], output_hidden_states=True, return_dict=True
    )
    vision = [torch.stack([h[:, 0], h[:, 1:].mean(1)]) for h in seen.hidden_states]
    with handing(model.body, batch["image"], seen) as images:
        given = {**batch["prompts"][0], **images}
        text = model.body(**given, use_cache=False, output_hidden_states=True)
    between = torch.stack([features.mean(0) for features in seen.pooler_output])
    return torch.stack(vision), between, torch.stack([h[:, -1] for h in text.hidden_states])


def copy_all(states, _module, _args, out):
    states.append((out[0] if isinstance(out, tuple) else out).clone())


@torch.inference_mode()
def study(model, batch):
    """One image at a time, in two passes; every token of every layer is copied, one is kept."""
    tower, language = model.body.vision_tower, model.body.language_model
    pixels, rows = batch["image"]["pixel_values"], []
    for i in range(len(pixels)):
        states = []
        keep = partial(copy_all, states)
        blocks = [*tower.encoder.layers, *language.layers]
        handles = [block.register_forward_hook(keep) for block in blocks]
        tower(pixels[i : i + 1])
        vision = [h[0, 0] for h in states]
        states.clear()
        model.module.generate(
            pixel_values=pixels[i : i + 1],
            **{k: v[i : i + 1] for k, v in batch["prompts"][0].items()},
            max_new_tokens=1, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        text = [h[0, -1] for h in states[len(tower.encoder.layers) :]]
        for handle in handles:
            handle.remove()
        rows.append((torch.stack(vision), torch.stack(text)))
    return [torch.stack(part, 1) for part in zip(*rows, strict=True)]


def a_run_for_each(model, batch):
    return [probed(model, alone(batch, i)) for i in range(len(PROMPTS))]


def layers(rows, model, number, ending):
    """Rows [layers + 1, batch, d] of one of the model's towers, from `embed` on."""
    tower = model.towers[number]
    names = ["embed", *(f"layers.{i}" for i in range(len(tower.blocks)))]
    return torch.stack([rows[f"{tower.name}.{name}/{ending}"] for name in names])


def check(model, batch):
    """Hold the rows of every site to those of the other ways, and of a run for each prompt."""
    close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)
    rows = probed(model, alone(batch))
    cls, mean = (layers(rows, model, 0, pool) for pool in POOLS["vision"])
    last = layers(rows, model, 2, "last/prompt 0")
    vision, between, text = stacked(model, batch)
    close(rows["projector/mean:patch"], between)
    close(torch.stack([cls, mean], 1), vision)
    close(last[:-1], text[:-1])  # the last hidden state is given after the final norm
    vision, text = study(model, batch)
    close(cls[1:], vision)
    close(last[1:], text)
    together = probed(model, batch)
    for i, rows in enumerate(a_run_for_each(model, batch)):
        for key in rows:
            mine = together[key.replace("prompt 0", f"prompt {i}")]
            torch.testing.assert_close(mine, rows[key], atol=0, rtol=0)


@pytest.fixture(scope="module")
def job():
    job = job_of(llava, BATCH)
    check(*job)
    return job


GROUP = f"whole pass: {NAME}, batch {BATCH}"


def test_one_prompt(benchmark, job):
    benchmark.group = GROUP
    overhead.measure(benchmark, *forwards(*job, times=PAIRS + 4), PAIRS)


def test_bare_forward(benchmark, job):
    benchmark.group = GROUP
    benchmark.pedantic(bare, job, rounds=3)


def test_output_hidden_states_stacked(benchmark, job):
    benchmark.group = GROUP
    benchmark.pedantic(stacked, job, rounds=3)


def test_study(benchmark, job):
    benchmark.group = GROUP
    benchmark.pedantic(study, job, rounds=2)


def test_three_prompts(benchmark, job):
    benchmark.group = f"{GROUP}, three prompts"
    benchmark.pedantic(probed, job, rounds=3)


def test_a_run_for_each_prompt(benchmark, job):
    benchmark.group = f"{GROUP}, three prompts"
    benchmark.pedantic(a_run_for_each, job, rounds=3)


def test_peak_memory(benchmark):
    benchmark.group = f"peak memory: {NAME}, batch {BATCH}"
    overhead.measure_memory(benchmark, __file__, NAME)
