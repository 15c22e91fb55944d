"""Generation under edits: what the hooks take, and pairs in batches against one pair at a time.

SmolLM2-135M on the CPU. The loop beside the pairs is the study's: for every pair, at every step,
the target is run whole to take its state, then the source, with a cache, has it written in. As many
places as the study's: 51.
"""

import statistics
import time
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch

import geofast as gf
from geofast.data import demos
from geofast.steering import apply
from geofast.steering.generation import prompt_of

pytestmark = pytest.mark.assets

BATCH, TOKENS, ROUNDS = 16, 8, 3
SHARE = 0.03  # of the bare generation, inside the hooks
SITE, DIMS = "lm.layers.12", torch.arange(0, 576, 3)
PAIRS, PLACES, LOOPED, PAIR_TOKENS = 200, 51, 5, 6
HOOKS = ("_start", "_note_mask", "_at", "_finish")


@pytest.fixture(scope="module")
def prompts():
    names = demos.cities(PLACES).table["name"]
    return [f"The city of {name} is in the country of" for name in names]


@pytest.fixture(scope="module")
def model():
    model = gf.load(demos.smollm2(), device="cpu", dtype=torch.float32)
    model.module.generation_config.eos_token_id = None  # every answer of one length
    return model


@contextmanager
def stopwatch():
    """Yield a list to which every hook adds the seconds that it took."""
    seconds = []

    def timed(hook):
        def run(*args):
            start = time.perf_counter()
            try:
                return hook(*args)
            finally:
                seconds.append(time.perf_counter() - start)

        return run

    with ExitStack() as stack:
        for name in HOOKS:
            plain = getattr(apply._Watcher, name)
            stack.enter_context(mock.patch.object(apply._Watcher, name, timed(plain)))
        yield seconds


def test_generation_with_an_edit(benchmark, model, prompts):
    """In pairs with the bare one; what is asserted is the steadier figure, the time in hooks."""
    benchmark.group = f"generation, SmolLM2-135M, batch {BATCH}, {TOKENS} tokens"
    texts = prompts[:BATCH]
    held = gf.states(model, texts[::-1], SITE, steps=TOKENS - 1)
    edit = gf.swap(held, DIMS, phase="both")

    def run(*edits):
        start = time.perf_counter()
        said = model.generate(texts, edits, max_new_tokens=TOKENS)
        return time.perf_counter() - start, said

    assert run(edit)[1] != run()[1]
    own = gf.swap(gf.states(model, texts, SITE, steps=TOKENS - 1), DIMS, phase="both")
    assert run(own)[1] == run()[1]
    with stopwatch() as inside:
        rounds = []
        for _ in range(ROUNDS):
            inside.clear()
            rounds.append((run()[0], run(edit)[0], sum(inside)))
    alone, _, hooks = map(statistics.median, zip(*rounds, strict=True))
    benchmark.extra_info["paired ratio"] = f"{statistics.median(e / b for b, e, _ in rounds):.3f}"
    benchmark.extra_info["in hooks"] = f"{100 * hooks / alone:.2f} %"
    benchmark.pedantic(run, (edit,), rounds=1)
    assert hooks / alone < SHARE


@torch.inference_mode()
def looped(model, source, target):
    """One pair as the study runs it; greedy."""
    layer = model.sites(SITE)[0].module
    whole, step = (prompt_of(model, [text])["input_ids"] for text in (target, source))
    state, cache, said = torch.empty(0), None, []

    def keep(_module, _args, output):
        nonlocal state
        state = output[:, -1].clone()

    def write(_module, _args, output):
        output[:, -1, DIMS] = state[:, DIMS]
        return output

    for _ in range(PAIR_TOKENS):
        handle = layer.register_forward_hook(keep)
        logits = model.module(input_ids=whole, use_cache=False).logits[:, -1]
        handle.remove()
        whole = torch.cat([whole, logits.argmax(-1, keepdim=True)], 1)
        handle = layer.register_forward_hook(write)
        made = model.module(input_ids=step, past_key_values=cache, use_cache=True)
        handle.remove()
        cache, step = made.past_key_values, made.logits[:, -1].argmax(-1, keepdim=True)
        said.append(int(step))
    return model.collate.tokenizer.decode(said, skip_special_tokens=True)


def test_pairs(benchmark, model, prompts):
    benchmark.group = f"{PAIRS} pairs of {PLACES} places, {PAIR_TOKENS} tokens"
    pairs = [(i % PLACES, (i + 1 + 7 * i % (PLACES - 1)) % PLACES) for i in range(PAIRS)]
    assert all(source != target for source, target in pairs)
    assert len({*pairs}) == PAIRS

    def batched():
        held = gf.states(model, prompts, SITE, steps=PAIR_TOKENS - 1)
        edit = gf.swap(held, DIMS, phase="both").take([t for _, t in pairs])
        sources = [prompts[s] for s, _ in pairs]
        return model.generate(sources, [edit], batch_size=40, max_new_tokens=PAIR_TOKENS)

    start = time.perf_counter()
    said = batched()
    middle = time.perf_counter()
    for (source, target), text in list(zip(pairs, said, strict=True))[:LOOPED]:
        assert looped(model, prompts[source], prompts[target]) == text
    one = (time.perf_counter() - middle) / LOOPED
    benchmark.extra_info["the study's loop"] = f"{one * PAIRS:.0f} s (from {LOOPED} pairs)"
    benchmark.extra_info["times quicker"] = f"{one * PAIRS / (middle - start):.1f}"
    benchmark.pedantic(batched, rounds=1)
