"""The whole pass: what probing every site adds to the bare forward of the same model.

Forwards are timed in pairs, bare and probed in turn, because the machine's clock drifts by more
than the difference; the note gives the median of the paired ratios, and the share of the forward
that was spent inside the hooks, which is the steadier figure. Beside them two other ways to the
same rows: hidden states that the model returns, pooled and stacked afterwards, and the study's, one
sample at a time with every token of every layer copied.
"""

import os
import statistics
import subprocess
import sys
import time

import pytest
import torch

import geofast as gf
from geofast.models import find_towers
from geofast.rows import Rows

PAIRS = 5


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


def images(batch):
    return {"pixel_values": torch.randn(batch, 3, 224, 224)}


def texts(batch):
    ids = torch.randint(2, 49000, (batch, 32))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


JOBS = {
    "DINOv2-S": (dinov2_small, images, ["cls", "mean:patch"]),
    "CLIP-B/16": (clip_base, images, ["cls", "mean:patch"]),
    "SmolLM2-135M, 32 tokens": (smollm2, texts, ["last"]),
}


def group_of(name):
    return f"whole pass: {name}, batch 16"


@pytest.mark.parametrize("name", JOBS)
def test_probed_forward(benchmark, monkeypatch, name):
    torch.manual_seed(0)
    make, inputs, pools = JOBS[name]
    module, batch = make(), inputs(16)
    recorder = sys.modules["geofast.capture"]._Recorder  # gf.capture is the function
    hooks = _Stopwatch(monkeypatch, recorder, "_read")
    ratios, bare = [], []
    with torch.inference_mode():
        states = module(**batch, output_hidden_states=True).hidden_states

        rows = Rows(16 * (2 * PAIRS + 2))  # room for all, as a probe of so many samples has

        def probed():
            with gf.capture(module, pool=pools, rows=rows):
                module(**batch)

        probed()
        key = next(k for k in rows if k.endswith(f"embed/{pools[0]}"))
        torch.testing.assert_close(rows[key][:16], states[0][:, 0 if pools[0] == "cls" else -1])
        hooks.seconds = 0.0
        for _ in range(PAIRS):
            start = time.perf_counter()
            module(**batch)
            middle = time.perf_counter()
            probed()
            end = time.perf_counter()
            bare.append(middle - start)
            ratios.append((end - middle) / (middle - start))
        share = hooks.seconds / PAIRS / statistics.median(bare)
        benchmark.group = group_of(name)
        benchmark.extra_info["paired ratio"] = f"{statistics.median(ratios):.4f}"
        benchmark.extra_info["in hooks"] = f"{100 * share:.2f} %"
        benchmark.pedantic(probed, rounds=PAIRS)
    assert share < 0.01


@pytest.mark.parametrize("name", JOBS)
def test_bare_forward(benchmark, name):
    torch.manual_seed(0)
    make, inputs, _ = JOBS[name]
    module, batch = make(), inputs(16)
    benchmark.group = group_of(name)
    with torch.inference_mode():
        benchmark.pedantic(lambda: module(**batch), rounds=PAIRS, warmup_rounds=1)


def pooled(hidden, pools):
    """Rows [batch, d] of the pools of JOBS, in plain torch."""
    ways = {
        "cls": lambda: hidden[:, 0],
        "last": lambda: hidden[:, -1],
        "mean:patch": lambda: hidden[:, 1:].mean(1),
    }
    return [ways[pool]() for pool in pools]


def stacked(module, batch, pools):
    """Rows [sites, pools, batch, d] of the hidden states that the model returns."""
    states = module(**batch, output_hidden_states=True).hidden_states
    return torch.stack([torch.stack(pooled(h, pools)) for h in states])


def study(module, batch, pools):
    """Rows [layers, pools, batch, d], one sample at a time; each layer copied whole."""
    rows = []
    for i in range(16):
        states = []
        hooks = [
            block.register_forward_hook(lambda _m, _a, out, keep=states: keep.append(out.clone()))
            for block in find_towers(module)[0].blocks
        ]
        one = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        module(**one)
        for hook in hooks:
            hook.remove()
        rows.append(torch.stack([torch.stack(pooled(h, pools)) for h in states]))
    return torch.cat(rows, 2)


def timed(benchmark, name, way, third):
    """Time another way to the rows; its layer `third` must be ours."""
    torch.manual_seed(0)
    make, inputs, pools = JOBS[name]
    module, batch = make(), inputs(16)
    benchmark.group = group_of(name)
    with torch.inference_mode():
        with gf.capture(module, pool=pools) as rows:
            module(**batch)
        tower = find_towers(module)[0].name
        for pool, expected in zip(pools, way(module, batch, pools)[third], strict=True):
            mine = rows[f"{tower}.layers.2/{pool}"]
            torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)
        benchmark.pedantic(way, (module, batch, pools), rounds=3)


@pytest.mark.parametrize("name", JOBS)
def test_output_hidden_states_stacked(benchmark, name):
    timed(benchmark, name, stacked, third=3)


@pytest.mark.parametrize("name", JOBS)
def test_study(benchmark, name):
    timed(benchmark, name, study, third=2)


class _Stopwatch:
    """Adds up the seconds that one method takes."""

    def __init__(self, monkeypatch, owner, name):
        self.seconds = 0.0
        plain = getattr(owner, name)

        def timed(*args):
            start = time.perf_counter()
            plain(*args)
            self.seconds += time.perf_counter() - start

        monkeypatch.setattr(owner, name, timed)


MEMORY = """
import sys, torch
import bench_pass
import geofast as gf
make, inputs, pools = bench_pass.JOBS[sys.argv[1]]
module, batch = make(), inputs(16)
with torch.inference_mode():
    if sys.argv[2] == "bare":
        for _ in range(3): module(**batch)
    else:
        with gf.capture(module, pool=pools) as rows:
            for _ in range(3): module(**batch)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.parametrize("name", JOBS)
def test_peak_memory(benchmark, name):
    """Peak memory above the bare forward, in a process of its own each."""

    def peak(way):
        command = [sys.executable, "-c", MEMORY, name, way]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=__file__.rpartition("/")[0],
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is given back
        )  # fmt: skip
        return int(done.stdout) / 1024

    benchmark.group = f"peak memory: {name}, batch 16"
    bare = min(peak("bare") for _ in range(2))
    above = benchmark.pedantic(lambda: min(peak("probed") for _ in range(2)) - bare, rounds=1)
    benchmark.extra_info["MB above bare"] = f"{above:.1f} of {bare:.0f}"
    assert above < 32
