"""Edits against a reference that edits one sample at a time and runs all of it at every step."""

import math
from contextlib import contextmanager

import families
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import geofast as gf
from geofast.steering.asking import prompt_of, run

STEPS = 5
SOURCES = ["w1 w2 w3 w4 w5", "w6", "w7 w8 w9"]
TARGETS = ["w20 w21", "w30 w31 w32 w33", "w40"]
DIMS = torch.tensor([1, 4, 30, 7, 8, 9, 17])
SITE = "lm.layers.1"


def language(make):
    module = make()
    module.generation_config.eos_token_id = None
    return gf.load(module, processor=tiny.tokenizer())


def layers_of(model):
    base = model.module.base_model
    for path in ("layers", "h", "language_model.layers"):
        try:
            return base.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError(type(base))


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())


def probe_of(width=32, site=SITE, pool="last"):
    generator = torch.Generator().manual_seed(3)
    coef = torch.randn(width, 2, generator=generator, dtype=torch.float64)
    intercept = torch.tensor([10.0, -20.0], dtype=torch.float64)
    return gf.Probe(site, pool, "", ("latitude", "longitude"), 1.0, coef, intercept)


# ------ the reference


@contextmanager
def editing(layer, length, change, phase, where):
    """Change a layer's output at explicit places: of the prompt, `where`; after it, all."""

    def hook(_module, _args, output):
        states = (output[0] if isinstance(output, tuple) else output).clone()
        assert states.shape[0] == 1
        places = [(p, 0) for p in where] if phase != "steps" else []
        if phase != "prompt":
            places += [(p, p - length + 1) for p in range(length, states.shape[1])]
        for place, step in places:
            state = states[0, place].double()
            states[0, place] = change(state, step).to(states.dtype)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def answer(model, inputs, steps=STEPS, watch=None):
    """Greedy decoding without a cache; tokens, logits of every step, states of `watch`."""
    ids, logits, seen = inputs["input_ids"], [], []
    handles = []
    if watch is not None:

        def keep(_module, _args, output):
            seen.append((output[0] if isinstance(output, tuple) else output)[0, -1].clone())

        handles.append(watch.register_forward_hook(keep))
    for _ in range(steps):
        out = model.module(**inputs | {"input_ids": ids}, use_cache=False).logits[0, -1]
        logits.append(out)
        ids = torch.cat([ids, out.argmax().view(1, 1)], 1)
    for handle in handles:
        handle.remove()
    return ids[0, -steps:], torch.stack(logits), seen


def ids_of(model, text):
    return {"input_ids": torch.tensor([model.collate.tokenizer(text)["input_ids"]])}


def fast(model, inputs, edits, steps=STEPS, copies=1, **options):
    """Tokens and logits of one batch with a cache."""
    with model.edited(edits, copies):
        arguments = prompt_of(model, inputs)
        made = run(
            model, arguments, max_new_tokens=steps, output_logits=True,
            return_dict_in_generate=True, pad_token_id=0, **options,
        )  # fmt: skip
    logits = torch.stack(made.logits, 1)
    return made.sequences[:, arguments["input_ids"].shape[1] :], logits


def swap_held(model):
    layer = layers_of(model)[1]
    held = [answer(model, ids_of(model, s), 1, layer)[2][0].double() for s in TARGETS]
    edit = gf.swap(gf.states(model, TARGETS, SITE), DIMS, phase="both")

    def change(b, state, _step):
        state[DIMS] = held[b][DIMS]
        return state

    return edit, change


def swap_own(model):
    layer = layers_of(model)[1]
    own = [answer(model, ids_of(model, s), STEPS, layer)[2] for s in TARGETS]
    edit = gf.swap(gf.states(model, TARGETS, SITE, steps=STEPS - 1), DIMS, phase="both")

    def change(b, state, step):
        state[DIMS] = own[b][step][DIMS].double()
        return state

    return edit, change


def patch(model):
    layer = layers_of(model)[1]
    held = [answer(model, ids_of(model, s), 1, layer)[2][0].double() for s in TARGETS]
    return gf.patch(gf.states(model, TARGETS, SITE)), lambda b, _state, _step: held[b]


def add(model):
    direction, amounts = torch.linspace(-1, 1, 32) ** 3, [2.0, -3.0, 0.5]

    def change(b, state, _step):
        return state + amounts[b] * 0.25 * direction.double() / direction.double().norm()

    return gf.add(SITE, direction, amounts, 0.25, phase="steps"), change


def set_to(model):
    probe, places = probe_of(), torch.tensor([[48.9, 2.3], [-33.9, 151.2], [90.0, -180.0]])

    def change(b, state, _step):
        miss = places[b].double() - (state @ probe.coef + probe.intercept)
        state[DIMS] += torch.linalg.pinv(probe.coef[DIMS].T) @ miss
        return state

    return gf.set_to(probe, *places.T, DIMS, phase="both"), change


def ablate(model):
    coef = probe_of().coef

    def change(_b, state, _step):
        return state - coef @ torch.linalg.pinv(coef) @ state

    return gf.ablate(probe_of(), phase="both"), change


CASES = [swap_held, swap_own, patch, add, set_to, ablate]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_batched_and_cached_is_what_one_sample_without_a_cache_gives(make, case):
    model = language(make)
    edit, change = case(model)
    tokens, logits = fast(model, SOURCES, [edit])
    bare, _ = fast(model, SOURCES, [])
    layer, moved = layers_of(model)[1], 0
    for b, text in enumerate(SOURCES):
        inputs = ids_of(model, text)
        length = inputs["input_ids"].shape[1]
        with editing(layer, length, lambda h, s, b=b: change(b, h, s), edit.phase, [length - 1]):
            wanted, expected, _ = answer(model, inputs)
        torch.testing.assert_close(logits[b], expected, atol=2e-5, rtol=1e-4)
        assert tokens[b].tolist() == wanted.tolist()
        moved += tokens[b].tolist() != bare[b].tolist()
    assert moved or edit.mode == "ablate"


@pytest.mark.parametrize("role", ["last", "text", "all"])
def test_edits_are_applied_in_their_order(role):
    model = language(tiny.llama)
    first = gf.add(SITE, torch.ones(32), 10.0, 0.5, role=role, phase="both")
    second = gf.set_to(probe_of(), 10.0, 20.0, DIMS, role=role, phase="both")
    coef, intercept = probe_of().coef, probe_of().intercept
    goal = torch.tensor([10.0, 20.0], dtype=torch.float64)

    def change(state, _step):
        state = state + 5 / math.sqrt(32)
        miss = goal - (state @ coef + intercept)
        state[DIMS] += torch.linalg.pinv(coef[DIMS].T) @ miss
        return state

    _, logits = fast(model, SOURCES, [first, second])
    _, other = fast(model, SOURCES, [second, first])
    for b, text in enumerate(SOURCES):
        inputs = ids_of(model, text)
        length = inputs["input_ids"].shape[1]
        where = [length - 1] if role == "last" else range(length)
        with editing(layers_of(model)[1], length, change, "both", where):
            _, expected, _ = answer(model, inputs)
        torch.testing.assert_close(logits[b], expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(logits, other, atol=1e-3)


# ------ images


def pictures(n, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(n)]


def talking():
    torch.manual_seed(0)
    module, processor = families.llava()
    module.generation_config.eos_token_id = None
    return gf.load(module.eval(), processor=processor).asking(["w1 w2"])


def asked(model, image):
    batch = model.prepare([image])
    pixels = {k: v for k, v in batch["image"].items() if k != "tiles"}
    return pixels | {"input_ids": batch["prompts"][0]["input_ids"]}


@pytest.mark.parametrize(
    ("site", "role", "phase"),
    [
        ("lm.layers.0", "image", "prompt"),
        ("lm.layers.1", "last", "both"),
        ("lm.layers.1", "text", "prompt"),
        ("vision.layers.1", "patch", "prompt"),
        ("vision.layers.0", "cls", "prompt"),
        ("projector", "patch", "prompt"),
    ],
)
def test_images_as_one_sample_without_a_cache(site, role, phase):
    model = talking()
    tower, module = site.partition(".")[0], model.sites(site)[0].module
    sources, targets = pictures(3), pictures(3, seed=1)
    dims = torch.arange(0, 32, 3)
    edit = gf.swap(gf.states(model, targets, site, role), dims, phase=phase)
    tokens, logits = fast(model, sources, [edit])
    _, bare = fast(model, sources, [])
    assert not torch.allclose(logits, bare, atol=1e-4)
    for b, image in enumerate(sources):
        inputs, of_target = asked(model, image), asked(model, targets[b])
        ids = inputs["input_ids"][0]
        if tower == "lm":
            is_image = ids == model.module.config.image_token_index
            where = {"image": is_image, "text": ~is_image}.get(role)
            where = [len(ids) - 1] if where is None else where.nonzero()[:, 0].tolist()
            length = len(ids)
        else:
            tokens_there = 16 if tower == "projector" else 17
            where = [0] if role == "cls" else list(range(tokens_there - 16, tokens_there))
            length = tokens_there
        seen = []
        handle = module.register_forward_hook(
            lambda _m, _a, out, seen=seen: seen.append(
                (out[0] if isinstance(out, tuple) else out)[0].clone()
            )
        )
        answer(model, of_target, 1)
        handle.remove()
        queue = [seen[0][p].double() for p in where]
        held = dict(zip(where, queue, strict=True))

        def hook(_m, _a, out, held=held, length=length, last=queue[-1]):
            states = (out[0] if isinstance(out, tuple) else out).clone()
            for place in range(states.shape[1]):
                if place in held or (phase == "both" and place >= length):
                    states[0, place, dims] = held.get(place, last)[dims].to(states.dtype)
            return (states, *out[1:]) if isinstance(out, tuple) else states

        # Ahead of transformers' own hook, which keeps the layer that LLaVA takes from its tower.
        handle = module.register_forward_hook(hook, prepend=True)
        wanted, expected, _ = answer(model, inputs)
        handle.remove()
        torch.testing.assert_close(logits[b], expected, atol=2e-5, rtol=1e-4)
        assert tokens[b].tolist() == wanted.tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])  # masks of truths and of numbers
@pytest.mark.parametrize("family", [families.llava_next, families.qwen2_vl, families.gemma3])
def test_tiles_packed_patches_and_masks_of_four_axes(family, attention):
    """A batch of unequal pictures, edited in both towers, says what each says alone."""
    torch.manual_seed(0)
    module, processor = family()
    module.set_attn_implementation(attention)
    module.generation_config.eos_token_id = None
    model = gf.load(module.eval(), processor=processor).asking(["w1 w2 w3"])
    images = [p.resize(size) for p, size in zip(pictures(2), [(32, 32), (64, 32)], strict=True)]
    directions = torch.randn(32, generator=torch.Generator().manual_seed(1))
    edits = [
        gf.add("vision.layers.1", directions, [3.0, -2.0], 1.0, role="patch"),
        gf.add("lm.layers.0", directions, [1.0, 2.0], 1.0, role="image"),
        gf.add("lm.layers.1", directions, [-1.0, 4.0], 1.0, phase="both"),
    ]
    tokens, logits = fast(model, images, edits)
    _, bare = fast(model, images, [])
    assert not torch.allclose(logits, bare, atol=1e-3)
    for b, image in enumerate(images):
        alone, expected = fast(model, [image], [edit.take([b]) for edit in edits])
        torch.testing.assert_close(logits[b], expected[0], atol=5e-5, rtol=1e-3)
        assert tokens[b].tolist() == alone[0].tolist()


def test_transformers_own_generate_is_edited_too():
    model = talking()
    images, targets = pictures(2), pictures(2, seed=1)
    edits = [
        gf.swap(gf.states(model, targets, "vision.layers.0", "patch")),
        gf.swap(gf.states(model, targets, "lm.layers.1"), DIMS, phase="both"),
    ]
    tokens, _ = fast(model, images, edits)
    batch = model.prepare(images)
    arguments = {k: v for k, v in batch["image"].items() if k != "tiles"} | batch["prompts"][0]
    with model.edited(edits):
        own = model.module.generate(**arguments, max_new_tokens=STEPS, do_sample=False)
    assert own[:, -STEPS:].tolist() == tokens.tolist()


# ------ what must hold to the last bit


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_an_edit_of_nothing_and_a_swap_with_itself_change_no_bit(make):
    model = language(make)
    _, bare = fast(model, SOURCES, [])
    own = gf.states(model, SOURCES, "lm.layers.*", steps=STEPS - 1)
    nothing = gf.swap(own, gf.top_dims(probe_of(), 0.0), phase="both")
    zero = gf.add("lm.layers.*", torch.ones(32), 0.0, 1.0, role="all", phase="both")
    itself = gf.swap(own, DIMS, phase="both")
    for edits in ([], [nothing], [zero], [itself], [gf.patch(own, phase="both")]):
        assert torch.equal(fast(model, SOURCES, edits)[1], bare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("site", ["lm.embed", "lm.layers.1", "lm.layers.0.attn", "lm.norm"])
def test_a_swap_of_all_dimensions_is_the_targets_residual(site, dtype):
    model = language(tiny.llama)
    model.module.to(dtype)
    held = gf.states(model, TARGETS, site)
    assert held.at[site].dtype == dtype
    with model.edited([gf.patch(held)]), gf.capture(model, site, "last") as rows:
        model.forward(model.prepare(SOURCES))
    assert torch.equal(rows[f"{site}/last"], held.at[site][:, 0].float())
    with model.edited([gf.swap(held, DIMS)]), gf.capture(model, site, "last") as rows:
        model.forward(model.prepare(SOURCES))
    with gf.capture(model, site, "last") as bare:
        model.forward(model.prepare(SOURCES))
    others = torch.tensor([d for d in range(32) if d not in DIMS])
    key = f"{site}/last"
    assert torch.equal(rows[key][:, DIMS], held.at[site][:, 0, DIMS].float())
    assert torch.equal(rows[key][:, others], bare[key][:, others])
    assert not torch.equal(rows[key], bare[key])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_in_a_forward_pass(side):
    model = language(tiny.llama)
    edit = gf.set_to(probe_of(), [1.0, 2.0, 3.0], [4.0, 5.0, 6.0], DIMS)
    batch = tiny.tokenizer(side)(SOURCES, padding=True, return_tensors="pt")
    batch = {k: batch[k] for k in ("input_ids", "attention_mask")}
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with model.edited([edit]), gf.capture(model, SITE, ["last", "mean"]) as rows, torch.no_grad():
        model.body(**batch)
    for b, text in enumerate(SOURCES):
        with model.edited([edit.take([b])]), gf.capture(model, SITE, ["last", "mean"]) as alone:
            model.forward(model.prepare([text]))
        for key in alone:
            torch.testing.assert_close(rows[key][b], alone[key][0], atol=1e-4, rtol=1e-4)
    read = probe_of()(rows[f"{SITE}/last"])
    assert torch.allclose(read, torch.tensor([[1.0, 4], [2, 5], [3, 6]]).double(), atol=1e-3)


# ------ the phases


def test_prompt_and_generated_tokens_are_told_apart():
    model = language(tiny.llama)
    _, bare = fast(model, SOURCES, [])
    edits = {p: gf.add(SITE, torch.randn(32), 9.0, 1.0, phase=p) for p in ("prompt", "steps")}
    _, prompt = fast(model, SOURCES, [edits["prompt"]])
    _, steps = fast(model, SOURCES, [edits["steps"]])
    assert not torch.allclose(prompt[:, 0], bare[:, 0], atol=1e-3)
    assert torch.equal(steps[:, 0], bare[:, 0])
    assert not torch.allclose(steps[:, 1], bare[:, 1], atol=1e-3)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_keep_to_the_edit_of_their_sample(options):
    model = language(tiny.gpt2)
    edits = [
        gf.swap(gf.states(model, TARGETS, SITE, steps=STEPS - 1), phase="both"),
        gf.add("lm.layers.0", torch.randn(32), [5.0, -5.0, 0.0], 1.0, phase="both"),
    ]
    said = model.generate(SOURCES, edits, max_new_tokens=STEPS, **options)
    fixed = {"cache_implementation": "static"}
    assert said == model.generate(SOURCES, edits, max_new_tokens=STEPS, **options, **fixed)
    bare = model.generate(SOURCES, max_new_tokens=STEPS, **options)
    alone = [
        text
        for b, source in enumerate(SOURCES)
        for text in model.generate(
            [source], [e.take([b]) for e in edits], max_new_tokens=STEPS, **options
        )
    ]
    assert said == alone
    assert said != bare


def test_sampling_and_several_answers():
    model = language(tiny.llama)
    edits = [gf.swap(gf.states(model, TARGETS, SITE), phase="both")]
    greedy = model.generate(SOURCES, edits, max_new_tokens=STEPS)
    sampled = model.generate(
        SOURCES, edits, max_new_tokens=STEPS, do_sample=True, top_k=1, num_return_sequences=2
    )
    assert sampled == [text for text in greedy for _ in range(2)]


# ------ pairs


def test_pairs_take_the_states_of_targets_that_ran_once():
    model = language(tiny.llama)
    pairs = [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1), (1, 2)]
    calls = []
    handle = model.body.register_forward_hook(lambda *_: calls.append(1))
    held = gf.states(model, TARGETS, SITE, steps=STEPS - 1)
    handle.remove()
    assert len(calls) == STEPS  # for all targets together
    edit = gf.swap(held, phase="both").take([t for _, t in pairs])
    sources = [SOURCES[s] for s, _ in pairs]
    said = model.generate(sources, [edit], batch_size=4, max_new_tokens=STEPS)
    for (source, target), text in zip(pairs, said, strict=True):
        one = gf.swap(gf.states(model, [TARGETS[target]], SITE, steps=STEPS - 1), phase="both")
        assert model.generate([SOURCES[source]], [one], max_new_tokens=STEPS) == [text]


def test_states_of_a_model_without_tokenizer_or_head():
    ids = [[3, 4, 5], [6, 7, 8]]
    make = lambda some: {"input_ids": torch.tensor(some)}  # noqa: E731
    module = tiny.llama()
    headed, bare = gf.load(module, prepare=make), gf.load(module.model, prepare=make)
    held = gf.states(headed, ids, SITE).at[SITE]
    torch.testing.assert_close(held, gf.states(bare, ids, SITE).at[SITE])
    with pytest.raises(ValueError, match="brought no tokenizer"):
        headed.generate(ids)
    with pytest.raises(ValueError, match="makes no text"):
        gf.states(bare, ids, SITE, steps=2)
    vision = gf.load(tiny.dinov2(), prepare=lambda images: {"pixel_values": torch.stack(images)})
    images = list(torch.randn(2, 3, 28, 28))
    with pytest.raises(ValueError, match="runs once"):
        gf.states(vision, images, "vision.layers.1", steps=2)
    edit = gf.patch(gf.states(vision, images, "vision.layers.1", "patch"))
    with vision.edited([edit.take([1, 0])]), gf.capture(vision, pool=["cls", "mean:patch"]) as rows:
        vision.forward(vision.prepare(images))
    with gf.capture(vision, pool=["cls", "mean:patch"]) as plain:
        vision.forward(vision.prepare(images))
    key = "vision.layers.1/mean:patch"
    assert torch.equal(rows[key], plain[key].flip(0))
    assert torch.equal(rows["vision.layers.1/cls"], plain["vision.layers.1/cls"])
    assert not torch.equal(rows["vision.layers.2/cls"], plain["vision.layers.2/cls"])


def test_states_are_the_same_in_batches_of_any_size():
    model = language(tiny.llama)
    whole = gf.states(model, TARGETS, "lm.layers.*", steps=2)
    parts = gf.states(model, TARGETS, "lm.layers.*", steps=2, batch_size=2)
    assert list(whole.at) == ["lm.layers.0", "lm.layers.1", "lm.layers.2"]
    for name, held in whole.at.items():
        assert held.shape == (3, 3, 32)
        torch.testing.assert_close(held, parts.at[name], atol=1e-5, rtol=1e-4)


# ------ closed forms


def test_set_is_the_smallest_change_and_touches_no_other_dimension():
    probe, state = probe_of(), torch.randn(4, 32, dtype=torch.float64)
    edit = gf.set_to(probe, 48.9, 2.3, DIMS)
    change = (edit.values[0, :, 0] - state @ edit.right.T) @ edit.left.T
    moved = state.index_add(1, DIMS, change)
    goal = torch.tensor([48.9, 2.3], dtype=torch.float64).expand(4, 2)
    torch.testing.assert_close(probe(moved), goal)
    # Any other change that reaches the goal differs by what the probe does not see, and is longer.
    blind = torch.randn(4, 7, dtype=torch.float64)
    blind -= blind @ torch.linalg.pinv(probe.coef[DIMS].T).mT.mT @ probe.coef[DIMS].T
    longer = change + blind
    torch.testing.assert_close(probe(state.index_add(1, DIMS, longer)), goal)
    assert (longer.norm(dim=1) > change.norm(dim=1)).all()


def _rows(n=400, d=12, rank=None):
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(rank or d, d, generator=generator, dtype=torch.float64)
    x = torch.randn(n, rank or d, generator=generator, dtype=torch.float64) @ mix + 30
    y = x[:, :2] * 4 + torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return x, y


def _r2(x, y):
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    miss = y - design @ torch.linalg.pinv(design) @ y
    return 1 - miss.square().sum() / (y - y.mean(0)).square().sum()


@pytest.mark.parametrize("rank", [None, 8])
def test_erasure_leaves_nothing_linear_and_is_the_papers_formula(rank):
    x, y = _rows(rank=rank)
    gram = gf.Gram(12, 2, 3)
    gram.update(x, y, torch.arange(400) % 3)
    edit = gf.ablate(gram, sites=SITE, role="last")
    erased = x + (edit.values[0, :, 0] - x @ edit.right.T) @ edit.left.T
    assert _r2(x, y) > 0.9
    assert abs(_r2(erased, y)) < 1e-8
    mean = x.mean(0)
    cov, cross = torch.cov(x.T, correction=0), (x - mean).T @ (y - y.mean(0)) / len(x)
    values, vectors = torch.linalg.eigh(cov)
    kept = values > values.max() * 1e-10
    w = vectors[:, kept] @ (vectors[:, kept] / values[kept].sqrt()).T
    p = (w @ cross) @ torch.linalg.pinv(w @ cross)
    expected = x - (x - mean) @ (torch.linalg.pinv(w) @ p @ w).T
    torch.testing.assert_close(erased, expected, atol=1e-6, rtol=1e-6)


def test_erasure_inside_some_dimensions_leaves_the_others():
    x, y = _rows()
    gram = gf.Gram(12, 2)
    gram.update(x, y)
    edit = gf.ablate(gram, torch.tensor([5, 0, 1]), sites=SITE, role="last")
    change = (edit.values[0, :, 0] - x @ edit.right.T) @ edit.left.T
    erased = x.index_add(1, edit.dims, change)
    assert abs(_r2(erased[:, [0, 1, 5]], y)) < 1e-8 < 0.5 < _r2(x[:, [0, 1, 5]], y)


def test_a_direction_is_scaled_by_the_spread_along_it():
    x, y = _rows()
    gram = gf.Gram(12, 2)
    gram.update(x, y)
    direction = torch.randn(12)
    unit = direction.double() / direction.double().norm()
    edit = gf.add(SITE, direction, [1.0, -2.0], gram)
    spread = (x @ unit).std(correction=0)
    expected = torch.stack([spread * unit, -2 * spread * unit])
    torch.testing.assert_close(edit.values[0, :, 0], expected)


def test_top_dims_are_the_studys():
    probe = probe_of()
    weight = probe.coef.abs().numpy()
    scaled = (weight - weight.min(0)) / (weight.max(0) - weight.min(0))
    assert gf.top_dims(probe, 0.4).tolist() == np.argsort(-scaled.sum(1))[:13].tolist()
    std = torch.rand(32)
    weight = weight * std.numpy()[:, None]
    scaled = (weight - weight.min(0)) / (weight.max(0) - weight.min(0))
    assert gf.top_dims(probe, 0.1, std).tolist() == np.argsort(-scaled.sum(1))[:3].tolist()
    assert gf.top_dims(probe, 0.0).tolist() == []


# ------ files


def test_edits_come_back_from_a_file(tmp_path):
    model = language(tiny.llama)
    edits = [
        gf.swap(gf.states(model, TARGETS, "lm.layers.*"), DIMS, phase="both"),
        gf.set_to(probe_of(), 1.0, 2.0),
        gf.ablate(probe_of(), DIMS, sites="lm.layers.[01]", role="text", model="LlamaForCausalLM"),
        gf.add(SITE, torch.ones(32), 1.0, 2.0),
    ]
    gf.save_edits(edits, tmp_path / "edits.safetensors")
    back = gf.load_edits(tmp_path / "edits.safetensors")
    assert list(map(repr, back)) == list(map(repr, edits))
    for one, other in zip(edits, back, strict=True):
        assert one.model == other.model
        for name in ("dims", "values", "left", "right"):
            mine, its = getattr(one, name), getattr(other, name)
            assert (mine is None) == (its is None)
            assert mine is None or (mine.dtype == its.dtype and torch.equal(mine, its))
    (tmp_path / "other").write_bytes(b"not one")
    with pytest.raises(ValueError, match="no edits that can be read"):
        gf.load_edits(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        gf.load_edits(tmp_path / "absent")


# ------ the model is put back


def test_the_model_is_put_back_after_an_exception():
    model = language(tiny.llama)
    before, (_, bare) = hooks_of(model), fast(model, SOURCES, [])
    edit = gf.add(SITE, torch.ones(32), [5.0], 1.0, phase="both")
    with model.edited([edit]):
        assert hooks_of(model) > before
        model.forward(model.prepare(SOURCES))
    with pytest.raises(KeyError), model.edited([edit]):
        raise KeyError
    assert hooks_of(model) == before
    with pytest.raises(ValueError, match="is for 5"):
        fast(model, SOURCES, [edit.take([0] * 5)])
    assert hooks_of(model) == before
    assert torch.equal(fast(model, SOURCES, [])[1], bare)


def test_gradients_pass_through_an_edit():
    model = language(tiny.llama)
    edit = gf.swap(gf.states(model, TARGETS, SITE), DIMS)
    batch = model.prepare(SOURCES)
    with model.edited([edit]):
        model.module(**batch).logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.module.parameters())


class Block(torch.nn.Module):
    """Returns a tuple, as blocks of older models do, and takes its input by name."""

    def __init__(self):
        super().__init__()
        self.norm, self.mlp = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)

    def forward(self, states):
        return states + self.mlp(self.norm(states)), "more"


class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(10, 8)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))

    def forward(self, input_ids):
        states = self.embed(input_ids)
        for block in self.blocks:
            states, more = block(states=states)
            assert more == "more"
        return states


def test_blocks_that_return_tuples_and_take_their_input_by_name():
    model = gf.load(Stack(), prepare=lambda ids: {"input_ids": torch.tensor(ids)})
    inputs = [[1, 2, 3], [4, 5, 6]]
    batch, held = model.prepare(inputs), gf.states(model, [[7, 8, 9]], "text.*", role="text")
    assert list(held.at) == ["text.embed"]
    with torch.no_grad():
        expected = model.module(torch.tensor([[7, 8, 9]])).expand(2, -1, -1)
        bare = model.module(**batch)
        with model.edited([gf.patch(held)]):
            torch.testing.assert_close(model.module(**batch), expected)
        one = gf.patch(gf.states(model, [[7, 8, 9]], "text.layers.1"))
        with model.edited([one]):
            made = model.module(**batch)
    torch.testing.assert_close(made[:, 2], expected[:, 2])
    assert torch.equal(made[:, :2], bare[:, :2])


def test_a_model_compiled_before_is_refused_and_one_compiled_inside_is_itself_after():
    model = gf.load(Stack(), prepare=lambda ids: {"input_ids": torch.tensor(ids)})
    edit, ids = gf.add("text.layers.0", torch.ones(8), 5.0, 1.0), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        bare = model.module(ids)
        model.module.compile(backend="eager")
        with model.edited([edit]):
            inside = model.module(ids)
        assert torch.equal(model.module(ids), bare)
        torch.compiler.reset()
        assert torch.equal(model.module(ids), bare)
        with pytest.raises(RuntimeError, match="compiled before"), model.edited([edit]):
            model.module(ids)
    assert not torch.allclose(inside, bare, atol=1e-3)


# ------ bad input


def test_what_does_not_go_with_the_model_is_refused_before_it_runs():
    model = language(tiny.llama)
    calls = []
    model.body.register_forward_pre_hook(lambda *_: calls.append(1))
    good = dict(direction=torch.ones(32), amount=1.0, spread=1.0)
    cases = [
        (gf.add(SITE, **good, model="other/model"), "was made for other/model"),
        (gf.add("lm.layers.7", **good), "no site matches 'lm.layers.7'"),
        (gf.add(SITE, **good | {"amount": [1.0, 2.0]}), "2 samples, and there are 3 inputs"),
    ]
    for edit, message in cases:
        with pytest.raises(ValueError, match=message):
            model.generate(SOURCES, [edit])
    own = gf.swap(gf.states(model, TARGETS, SITE, steps=2), phase="both")
    calls.clear()
    with pytest.raises(ValueError, match="states of 2 generated tokens, and max_new_tokens=4"):
        model.generate(SOURCES, [own], max_new_tokens=4)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(SOURCES, [own], use_cache=False)
    with pytest.raises(ValueError, match="a prompt is read whole: leave prefill_chunk_size= out"):
        model.generate(SOURCES, [own], prefill_chunk_size=4)
    with pytest.raises(ValueError, match="generation_config="):
        model.generate(SOURCES, [own], generation_config=model.module.generation_config)
    for role in ("image", "cls"):
        with pytest.raises(ValueError, match=f"lm.layers.1 has no {role} token, but text: choose"):
            model.generate(SOURCES, [gf.add(SITE, **good, role=role)])
    with pytest.raises(ValueError, match="has no image token"):
        gf.states(model, TARGETS, SITE, "image")
    assert not calls
    with pytest.raises(ValueError, match="32 wide, and the edit is for 16"):
        model.generate(SOURCES, [gf.add(SITE, torch.ones(16), 1.0, 1.0)])
    lacking = tiny.tokenizer()(["w1 w2", ""], padding=True, return_tensors="pt")
    with (
        pytest.raises(ValueError, match="sample 1 of the batch has no text token"),
        model.edited([gf.add(SITE, **good, role="text")]),
    ):
        model.body(input_ids=lacking["input_ids"], attention_mask=lacking["attention_mask"])
    with pytest.raises(ValueError, match="input 1 has 4 text tokens, and input 0 has 2"):
        gf.states(model, TARGETS, SITE, "text")
    with pytest.raises(ValueError, match="has 5 text tokens"):
        model.generate([SOURCES[0]], [gf.swap(gf.states(model, ["w1 w2"], SITE, "text"))])
    with pytest.raises(RuntimeError, match="did not run"), model.edited([gf.add(SITE, **good)]):
        pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gf.set_to(probe_of(), 90.5, 0.0), "latitude 90.5 is off the sphere"),
        (lambda: gf.set_to(probe_of(), 0.0, -181.0), "longitude -181.0 is off the sphere"),
        (lambda: gf.set_to(probe_of(), math.nan, 0.0), "latitude nan is off"),
        (lambda: gf.set_to(probe_of(), [1.0, 2.0], [3.0]), "2 latitudes and 1 longitudes"),
        (lambda: gf.set_to(probe_of(), 0.0, 0.0, [3]), "cannot move latitude and longitude apart"),
        (lambda: gf.set_to(probe_of(), 0.0, 0.0, [3, 32]), "dimension 32 is out of range"),
        (lambda: gf.set_to(probe_of(), 0.0, 0.0, [3, -1]), "dimension -1 is out of range"),
        (lambda: gf.set_to(probe_of(), 0.0, 0.0, [3, 4, 3]), "names a dimension twice"),
        (lambda: gf.set_to(probe_of(pool="max+min"), 0.0, 0.0), "joins several"),
        (lambda: gf.set_to(probe_of(pool="max:image"), 0.0, 0.0), "pools the extremes of tokens"),
        (lambda: gf.ablate(probe_of(), role="word"), "role must be one of"),
        (lambda: gf.ablate(probe_of(), role="image", phase="both"), "no generated token"),
        (lambda: gf.ablate(probe_of(), phase="later"), "phase must be one of"),
        (lambda: gf.ablate(gf.Gram(4, 1)), "give sites= and role="),
        (lambda: gf.add(SITE, torch.zeros(8), 1.0, 1.0), "direction has length 0.0"),
        (lambda: gf.add(SITE, torch.ones(8), 1.0, 0.0), "spread must be positive"),
        (lambda: gf.add(SITE, torch.ones(8), math.inf, 1.0), "not finite"),
        (lambda: gf.top_dims(probe_of(), 1.5), "share must be 0 to 1"),
        (lambda: gf.add(SITE, torch.ones(8), [1.0], 1.0).take([1]), "no number 1"),
    ],
)
def test_bad_parts(make, message):
    with pytest.raises((ValueError, IndexError), match=message):
        make()


@pytest.mark.parametrize(
    ("pool", "role"),
    [
        ("cls", "cls"), ("last", "last"), ("mean", "all"), ("max:image", "image"),
        ("each:patch", "patch"), ("max+min", None), ("last+mean:text", None),
    ],
)  # fmt: skip
def test_what_a_pool_reads_is_what_an_edit_of_its_probe_changes(pool, role):
    assert gf.Pool.parse(pool).role == role
    if role is not None:
        assert gf.ablate(probe_of(pool=pool)).role == role
