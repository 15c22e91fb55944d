"""The whole pass: what probing every site adds to the bare forward of the same model.

Beside it two other ways to the same rows: hidden states that the model returns, pooled and stacked
afterwards, and the study's, one sample at a time with every token of every layer copied.
"""

import overhead
import pytest
import torch

import geofast as gf
from geofast.models import find_towers
from geofast.rows import Rows

BATCH, PAIRS = 16, 5


def dinov2_small():
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)).eval()


def clip_base():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(patch_size=16)).eval()


def smollm2():
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, vocab_size=49152,
    )  # fmt: skip
    return LlamaModel(config).eval()


def images(batch, side=224):
    return {"pixel_values": torch.randn(batch, 3, side, side)}


def texts(batch, words=49000):
    ids = torch.randint(2, words, (batch, 32))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


JOBS = {
    "DINOv2-S": (dinov2_small, images, ["cls", "mean:patch"]),
    "CLIP-B/16": (clip_base, images, ["cls", "mean:patch"]),
    "SmolLM2-135M, 32 tokens": (smollm2, texts, ["last"]),
}


def job_of(name):
    torch.manual_seed(0)
    make, inputs, pools = JOBS[name]
    return make(), inputs(BATCH), pools


def forwards(module, batch, pools, times):
    """The bare forward and the probed one; there is room for the rows of so many batches."""
    rows = Rows(times * BATCH)

    @torch.inference_mode()
    def bare():
        module(**batch)

    @torch.inference_mode()
    def probed():
        with gf.capture(module, pool=pools, rows=rows):
            module(**batch)

    return bare, probed


def forwards_of(name):
    return forwards(*job_of(name), times=2)


def pooled(hidden, pools):
    """Rows [pools, batch, d] in plain torch."""
    ways = {
        "cls": lambda: hidden[:, 0],
        "last": lambda: hidden[:, -1],
        "mean:patch": lambda: hidden[:, 1:].mean(1),
    }
    return torch.stack([ways[pool]() for pool in pools])


@torch.inference_mode()
def stacked(module, batch, pools):
    """Rows [sites, pools, batch, d] of the hidden states that the model returns."""
    states = module(**batch, output_hidden_states=True).hidden_states
    return torch.stack([pooled(h, pools) for h in states])


@torch.inference_mode()
def study(module, batch, pools):
    """Rows [layers, pools, batch, d], one sample at a time; each layer copied whole."""
    rows = []
    for i in range(len(next(iter(batch.values())))):
        states = []
        hooks = [
            block.register_forward_hook(lambda _m, _a, out, keep=states: keep.append(out.clone()))
            for block in find_towers(module)[0].blocks
        ]
        one = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        module(**one)
        for hook in hooks:
            hook.remove()
        rows.append(torch.stack([pooled(h, pools) for h in states]))
    return torch.cat(rows, 2)


def check(module, batch, pools):
    """Hold the rows of every site to those of the other two ways."""
    with torch.inference_mode(), gf.capture(module, pool=pools) as rows:
        module(**batch)
    (tower,) = find_towers(module)
    sites = ["embed", *(f"layers.{i}" for i in range(len(tower.blocks)))]
    mine = torch.stack(
        [torch.stack([rows[f"{tower.name}.{site}/{pool}"] for pool in pools]) for site in sites]
    )
    # A language model returns its last hidden state after the final norm.
    theirs = stacked(module, batch, pools)[:-1]
    torch.testing.assert_close(mine[:-1], theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine[1:], study(module, batch, pools), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module", params=JOBS)
def job(request):
    job = job_of(request.param)
    check(*job)
    return f"whole pass: {request.param}, batch {BATCH}", job


def test_probed_forward(benchmark, job):
    benchmark.group, (module, batch, pools) = job
    bare, probed = forwards(module, batch, pools, times=PAIRS + 4)
    overhead.measure(benchmark, bare, probed, PAIRS)


def test_bare_forward(benchmark, job):
    benchmark.group, (module, batch, pools) = job
    bare, _ = forwards(module, batch, pools, times=1)
    benchmark.pedantic(bare, rounds=3, warmup_rounds=1)


def test_output_hidden_states_stacked(benchmark, job):
    benchmark.group, given = job
    benchmark.pedantic(stacked, given, rounds=3)


def test_study(benchmark, job):
    benchmark.group, given = job
    benchmark.pedantic(study, given, rounds=2)


@pytest.mark.parametrize("name", JOBS)
def test_peak_memory(benchmark, name):
    benchmark.group = f"peak memory: {name}, batch {BATCH}"
    overhead.measure_memory(benchmark, __file__, name)
