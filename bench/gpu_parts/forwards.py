"""The whole pass on models of real shapes: what probing every layer adds to the bare forward.

Weights are random and in bfloat16, so figures are of speed alone. The probed model is a second tree
of modules on the same weights, on which `gf.capture` stays open, as it does for a pass of the
engine: bare and probed forwards take turns without a hook being put on or taken off.
"""

import copy
import itertools
import statistics
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch

import geofast as gf
from geofast.accumulate import Statistics
from geofast.batching import Budget
from geofast.extract import _FLUSH
from geofast.models import find_towers
from geofast.rows import Rows
from geofast.streams import Aside

from .profiled import breakdown
from .timing import host_seconds, in_turn, paired

CELLS = 5
PATCHES = "each:patch"
LIMITS = {"cls": 1.01, "last": 1.01, "mean": 1.02, "every patch": 1.5}


@dataclass(frozen=True)
class Job:
    """A model, a batch, and what is measured of them."""

    name: str
    make: object
    inputs: object
    batch: int
    pools: dict
    forwards: int
    """In a timed window."""
    share: float
    """Of the part's time."""
    whole: bool = True
    """Whether to measure the other ways too, not the ratio alone."""
    passes: int = 1
    """How often the study runs the model over a sample."""
    flush: int = _FLUSH


IMAGES = {"cls": "cls", "mean": "mean:patch"}


def vit(run, side):
    from transformers import ViTConfig, ViTModel

    size = small(run, dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16))
    size["intermediate_size"] = 4 * size["hidden_size"]
    return built(run, ViTModel, ViTConfig(patch_size=14, image_size=side, **size))


def clip(run, side):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    size = small(run, dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16))
    size["intermediate_size"] = 4 * size["hidden_size"]
    return built(run, CLIPVisionModel, CLIPVisionConfig(patch_size=14, image_size=side, **size))


def qwen(run):
    from transformers import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    size = dict(
        hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        intermediate_size=18944, vocab_size=152064,
    )  # fmt: skip
    sections = [2, 3, 3] if run.dry else [16, 24, 24]
    size = small(run, size)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    ids = {"bos_token_id": None, "eos_token_id": None}
    return built(
        run, Qwen2_5_VLTextModel, Qwen2_5_VLTextConfig(rope_parameters=rope, **ids, **size)
    )


def small(run, size):
    """Make a model's size tiny for a dry run."""
    tiny = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=99,
    )  # fmt: skip
    return {k: tiny[k] for k in size} if run.dry else size


def built(run, kind, config):
    """Make a model with random weights where it will run."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(run.device):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(default)


def images(run, batch, side):
    return {"pixel_values": torch.randn(batch, 3, side, side, device=run.device).bfloat16()}


def tokens(run, batch, count, dim):
    x = torch.randn(batch, count, dim, device=run.device).bfloat16()
    # Without a mask: the model would wait for the GPU to see that nothing is padding.
    return {"inputs_embeds": x, "use_cache": False}


def image_jobs(run):
    side, large = (28, 42) if run.dry else (224, 336)
    whole = Job(
        name="ViT-L/14 at 224", make=partial(vit, run, side),
        inputs=partial(images, run, side=side), batch=64,
        pools=IMAGES | {"every patch": PATCHES}, forwards=32, share=0.3,
    )  # fmt: skip
    rest = replace(whole, pools=IMAGES, whole=False)
    jobs = [
        whole,
        replace(rest, name="CLIP-L at 224", make=partial(clip, run, side), share=0.3),
        replace(
            rest, name="ViT-L/14 at 336", make=partial(vit, run, large),
            inputs=partial(images, run, side=large), share=0.5,
        ),
        replace(rest, batch=256, forwards=8, share=0.8),
    ]  # fmt: skip
    return [tiny(job) for job in jobs] if run.dry else jobs


def language_jobs(run):
    count, dim = (10, 64) if run.dry else (500, 3584)
    job = Job(
        name="Qwen2.5-VL-7B's language model, 500 tokens", make=partial(qwen, run),
        inputs=partial(tokens, run, count=count, dim=dim), batch=8,
        pools={"last": "last", "mean": "mean"}, forwards=8, share=0.8, passes=2,
    )  # fmt: skip
    return [replace(tiny(job), forwards=1)] if run.dry else [job]


def tiny(job):
    return replace(job, batch=3, forwards=2, flush=6)


def main_images(run):
    main(run, image_jobs(run))


def main_language(run):
    main(run, language_jobs(run))


def main(run, jobs):
    run.note(
        "forwards: seconds of a window of forwards, until the GPU is done, in turns with the bare "
        "one; ratios are medians over turns. A window shorter than a flush has its share of one "
        "added. The flush: rows of all layers into five float64 Grams each."
    )
    for job in jobs[:1] if run.quick else jobs:
        if run.enough(15, f"{job.name}, batch {job.batch}"):
            with run.case(f"{job.name}, batch {job.batch}"):
                measure(run, job)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def clone(module):
    """Return another tree of modules on the same weights."""
    kept = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in kept})


def targets(n):
    return torch.randn(n, 2, dtype=torch.float64), torch.randint(0, CELLS, (n,))


class Probed:
    """A model in a pass of the engine: rows stay on the GPU until they go into statistics."""

    def __init__(self, job, module, pool, stack):
        self.module, self.job = clone(module), job
        self.rows = Rows(job.flush + job.batch, stay=True)
        self.statistics = Statistics(CELLS, Budget(tokens=0), self.rows.aside)
        self.rows.take_tokens = self.statistics.tokens.take
        stack.enter_context(gf.capture(self.module, pool=pool, rows=self.rows))

    def forward(self, batch):
        n, at = self.job.batch, self.rows.n
        self.statistics.tokens.begin(range(at, at + n), *targets(n))
        with torch.inference_mode():
            self.module(**batch)
        if self.rows.n >= self.job.flush:
            self.flush()

    def flush(self):
        self.rows.verify()
        self.statistics.add(self.rows, *targets(self.rows.n))
        self.rows.clear()

    def fill(self):
        """Make up the rows that a flush waits for."""
        missing = self.job.flush - self.rows.n
        for key in self.rows:
            have = self.rows[key]
            self.rows.reserve(key, have.shape[1], missing, have.device).normal_()
        self.rows.commit(dict.fromkeys(self.rows, missing), missing)

    @property
    def kept_bytes(self):
        """Bytes of the rows' room and of the statistics."""
        rows = sum(store.nbytes for store in self.rows._store.values())
        return rows + sum(gram.matrix.nbytes for gram in self.statistics.grams.values())


def measure(run, job):
    torch.manual_seed(0)
    seconds = job.share * run.left()
    module, batch = job.make(), job.inputs(batch=job.batch)
    for pool in job.pools.values():
        check(run, job, module, batch, pool)
    # Products of all tokens are apart from the others, whose next forward would run on a GPU that
    # has just been heated.
    each = {kind: pool for kind, pool in job.pools.items() if pool == PATCHES}
    rows = replace(job, pools={k: pool for k, pool in job.pools.items() if k not in each})
    found = against_bare(run, rows, module, batch, seconds)
    if each:
        against_bare(run, replace(job, pools=each), module, batch, seconds / 2)
    if job.whole:
        with ExitStack() as stack:
            probed = Probed(job, module, [*rows.pools.values()][-1], stack)
            breakdown(run, f"{job.name}, probed", partial(probed.forward, batch))
        others(run, rows, module, batch, found)


def against_bare(run, job, module, batch, seconds):
    """Record a row for every pool; return all ways' seconds a window."""
    bare = partial(forward, module, batch)
    ways, peaks = {"bare": partial(times, job, bare)}, {"bare": peak_bytes(run, bare)}
    host = {"bare": host_seconds(run, bare)}
    with ExitStack() as stack:
        probed = {kind: Probed(job, module, pool, stack) for kind, pool in job.pools.items()}
        for kind, one in probed.items():
            call = partial(one.forward, batch)
            peaks[kind], host[kind] = peak_bytes(run, call), host_seconds(run, call)
            one.rows.clear()
            ways[kind] = partial(times, job, call)
            if job.whole:
                ways[f"{kind}, no side stream"] = partial(inline, ways[kind])
        for way in ways.values():
            way()  # the statistics are made, and torch's memory
        found = in_turn(run, ways, 3 if run.quick else 5, seconds)
        for kind, one in probed.items():
            more = {
                "host ms": 1e3 * host[kind],
                "bare host ms": 1e3 * host["bare"],
                "MB more": (peaks[kind] - peaks["bare"]) / 1e6,
                "MB of rows and statistics": one.kept_bytes / 1e6,
            }
            report(run, job, kind, found, flush_share(run, job, kind, one), more)
    return found


def report(run, job, kind, found, flush, more):
    """Record a pool's row; `flush` are the seconds of one that a window has to bear besides."""
    bare = statistics.median(found["bare"])
    ratio, alone = paired(found, kind, "bare") + flush / bare, None
    if job.whole:
        alone = paired(found, f"{kind}, no side stream", "bare") + flush / bare
    goals = {"ratio": ("at most", LIMITS[kind])}
    values = {
        "model": job.name, "batch": job.batch, "pool": kind, "ratio": ratio,
        "no side stream": alone, "bare ms": 1e3 * bare / job.forwards,
        "bare spread": (max(found["bare"]) - min(found["bare"])) / bare,
        "flush share": flush / bare, "samples/s": job.batch * job.forwards / (ratio * bare),
    }  # fmt: skip
    run.row("probing every layer", goals, **values, **more, rounds=len(found["bare"]))


def forward(module, batch, **options):
    with torch.inference_mode():
        return module(**batch, **options)


def times(job, call):
    for _ in range(job.forwards):
        call()


def inline(way):
    """Run a way with all probing on the model's own stream."""
    with mock.patch.object(Aside, "beside", return_value=nullcontext()):
        way()


def flush_share(run, job, kind, probed):
    """Seconds of a flush that fall to one window; 0 where windows hold flushes already."""
    if kind == "every patch" or job.forwards * job.batch >= job.flush:
        return 0.0
    found = []
    for _ in range(4):
        probed.fill()
        run.sync()
        start = time.perf_counter()
        probed.flush()
        probed.rows.aside.join()
        run.sync()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:]) * job.forwards * job.batch / job.flush


def check(run, job, module, batch, pool):
    """Hold the rows of every site to the hidden states that the same forward returned."""
    with ExitStack() as stack:
        probed = Probed(replace(job, flush=job.batch), module, pool, stack)
        probed.statistics.tokens.begin(range(job.batch), *targets(job.batch))
        hidden_states = states(probed.module, batch)
        probed.rows.verify()
        (tower,) = find_towers(probed.module)
        sites = ["embed", *(f"layers.{i}" for i in range(len(tower.blocks)))]
        # The last hidden state may be returned after a final norm.
        for site, hidden in zip(sites[:-1], hidden_states[:-1], strict=True):
            key = f"{tower.name}.{site}/{pool}"
            if pool == PATCHES:
                got = sum_of_rows(probed.statistics.grams[key])
                want = hidden[:, 1:].double().sum((0, 1))
            else:
                got, want = probed.rows[key].double(), pooled(hidden, pool).double()
            off = float((got - want).norm() / want.norm())
            run.require(off < 1e-5, f"{key} is off by {off:.1e}")


def sum_of_rows(gram):
    """Return the sum of all rows that statistics have seen: float64 [d]."""
    d = gram.dim
    return gram.matrix[:, d, :d].sum(0) + gram.count.sum() * gram.shift[:d]


def pooled(hidden, pool):
    """Rows [batch, d] in plain torch."""
    ways = {
        "cls": lambda: hidden[:, 0],
        "last": lambda: hidden[:, -1],
        "mean": lambda: hidden.float().mean(1),
        "mean:patch": lambda: hidden[:, 1:].float().mean(1),
    }
    return ways[pool]()


def peak_bytes(run, call):
    """Return the bytes that a call holds at its peak, above what was there; on the CPU 0."""
    call()
    if run.device.type != "cuda":
        return 0
    run.sync()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    run.sync()
    return torch.cuda.max_memory_allocated() - before


# ------ other ways to the same rows


def others(run, job, module, batch, found):
    """What the model's own hidden states cost, and the study's way."""
    bare = statistics.median(found["bare"]) / job.forwards
    ours = max(statistics.median(found[kind]) for kind in job.pools) / job.forwards / job.batch
    given, few = clone(module), min(16, job.batch)
    ways = {
        "hidden states, pooled by torch": lambda: pool_states(
            states(given, batch), job.pools.values()
        ),
        "hidden states, all to the host": lambda: [h.cpu() for h in states(given, batch)],
        "the study's": lambda: study(given, batch, few, job.pools.values()),
    }
    for name, way in ways.items():
        way()
        seconds = statistics.median(in_turn(run, {name: way}, 5, 10)[name])
        samples, goals, note = job.batch, {}, ""
        if name == "the study's":
            seconds, samples = seconds * job.passes, few
            goals = {"ours faster": ("at least", 20)} if job.passes == 1 else {}
            note = f"{few} samples one by one; passes of the model: {job.passes}"
        each = seconds / samples
        figures = {"samples/s": 1 / each, "to bare": each * job.batch / bare}
        figures["ours faster"] = each / ours
        run.row("other ways", goals, model=job.name, way=name, **figures, note=note)


def states(module, batch):
    return forward(module, batch, output_hidden_states=True).hidden_states


def pool_states(hidden_states, pools):
    return [torch.stack([pooled(h, pool) for h in hidden_states]) for pool in pools]


def study(module, batch, samples, pools):
    """Rows of the first samples, one at a time: every token of every layer goes to the host."""
    rows = []
    for i in range(samples):
        kept = []
        hooks = [
            block.register_forward_hook(
                lambda _m, _a, out, kept=kept: kept.append(first(out).cpu())
            )
            for block in find_towers(module)[0].blocks
        ]
        forward(module, {k: v[i : i + 1] if torch.is_tensor(v) else v for k, v in batch.items()})
        for hook in hooks:
            hook.remove()
        rows.append(pool_states(kept, pools))
    return rows


def first(out):
    return out[0] if isinstance(out, tuple) else out
