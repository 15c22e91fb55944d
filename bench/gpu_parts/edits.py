"""Generation under an edit: what it adds to the bare model's.

Weights are random and in bfloat16, so figures are of speed alone. The edit is a swap at the middle
layer, on the last token of the prompt and every generated one; a window is one answer to a batch,
with all that an edit brings: its hooks put on and taken off, its values sent to the GPU.
"""

import statistics
from functools import partial

import torch

import geofast as gf

from .forwards import built, small
from .timing import in_turn, paired

BATCH, PROMPT, NEW = 16, 64, 32
SHARE = 0.4
LIMIT = 1.03
NAME = "Qwen2.5-VL-7B's language model, 14 of 28 layers"


def main(run):
    run.note(
        "edits: seconds of an answer, until the GPU is done, in turns with the bare one; ratios "
        "are medians over turns."
    )
    with run.case(NAME):
        measure(run)


def measure(run):
    torch.manual_seed(0)
    model = qwen(run)
    count, new = (5, 3) if run.dry else (PROMPT, NEW)
    vocab = model.module.config.vocab_size
    prompts, others = torch.randint(0, vocab, (2, 3 if run.dry else BATCH, count))
    layers = model.module.config.num_hidden_layers
    site, width = f"lm.layers.{layers // 2}", model.module.config.hidden_size
    dims = torch.randperm(width)[: round(SHARE * width)]
    swap = partial(swapped, model, site, dims, new)
    bare = partial(answer, model, prompts, new)
    edited = partial(bare, swap(others))
    check(run, bare, swap(prompts), nothing(site, width), swap(others))
    ways = {"bare": bare, "edited": edited}
    found = in_turn(run, ways, 5 if run.quick else 15, 0.7 * run.left())
    alone, with_edit = (statistics.median(found[way]) for way in ways)
    run.row(
        "generation with an edit", {"ratio": ("at most", LIMIT)}, model=NAME, batch=len(prompts),
        edit=f"swap at {site}, {len(dims)} of {width} dims, phase both",
        ratio=paired(found, "edited", "bare"),
        **{
            "bare ms a token": 1e3 * alone / new,
            "edited ms a token": 1e3 * with_edit / new,
            "bare spread": (max(found["bare"]) - min(found["bare"])) / alone,
        },
        prompt=count, new=new, rounds=len(found["bare"]),
    )  # fmt: skip


def qwen(run):
    """Return the text model of that shape, with a head, which is of another class by itself."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    size = dict(
        hidden_size=3584, num_hidden_layers=14, num_attention_heads=28, num_key_value_heads=4,
        intermediate_size=18944, vocab_size=152064,
    )  # fmt: skip
    ids = {"bos_token_id": None, "eos_token_id": None}  # every answer of one length
    module = built(run, Qwen2ForCausalLM, Qwen2Config(**ids, **small(run, size)))
    return gf.load(module, prepare=batch_of)


def batch_of(prompts):
    ids = torch.stack(prompts)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def swapped(model, site, dims, new, prompts):
    """Return the edit that writes the states of `prompts`, at every step their own."""
    held = gf.states(model, list(prompts), site, steps=new - 1)
    return gf.swap(held, dims, phase="both")


def nothing(site, width):
    """Return an edit that adds 0."""
    return gf.add(site, torch.ones(width), 0.0, 1.0, phase="both")


def answer(model, prompts, new, *edits):
    """Return the tokens that the model makes: int64 [batch, new]."""
    with torch.inference_mode(), model.edited(edits):
        made = model.module.generate(
            **model.prepare(list(prompts)), do_sample=False, max_new_tokens=new
        )
    return made[:, prompts.shape[1] :]


def check(run, bare, own, zero, other):
    """Edits that change nothing leave every token as it is, and the one that is timed does not."""
    want = bare()
    run.require(torch.equal(bare(zero), want), "an edit that adds 0 changes the answers")
    run.require(torch.equal(bare(own), want), "a swap with its own states changes the answers")
    run.require(not torch.equal(bare(other), want), "the swap changes no answer")
