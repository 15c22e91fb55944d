import weakref

import pytest
import tiny
import torch

import geofast as gf
from geofast.models import find_towers
from geofast.models.model import text_collate


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("make", [tiny.dinov2, tiny.vit, tiny.clip_vision])
def test_vision_sites_are_the_hidden_states(make):
    model = make()
    size = model.config.image_size
    pixels = torch.randn(3, 3, size, size)
    with gf.capture(model, pool=["cls", "mean:patch", "max", "last"]) as rows, torch.no_grad():
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    tower = find_towers(model)[0]
    names = ["vision.embed", *(f"vision.layers.{i}" for i in range(len(tower.blocks)))]
    assert len(states) == len(names)
    for name, state in zip(names, states, strict=True):
        torch.testing.assert_close(rows[f"{name}/cls"], state[:, 0])
        torch.testing.assert_close(rows[f"{name}/mean:patch"], state[:, 1:].mean(1))
        torch.testing.assert_close(rows[f"{name}/max"], state.amax(1))
        torch.testing.assert_close(rows[f"{name}/last"], state[:, -1])


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_language_sites_are_the_hidden_states_but_for_the_last(make):
    """transformers gives the last state after the final norm; the site is before it."""
    model = make()
    ids = torch.arange(12).view(2, 6) + 2
    with gf.capture(model, ["lm.embed", "lm.layers.*", "lm.norm"]) as rows, torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    depth = len(find_towers(model)[0].blocks)
    names = ["lm.embed", *(f"lm.layers.{i}" for i in range(depth))]
    for name, state in zip(names[:-1], states[:-1], strict=True):
        torch.testing.assert_close(rows[f"{name}/last"], state[:, -1])
    last = rows[f"{names[-1]}/last"]
    assert not torch.allclose(last, states[-1][:, -1])
    torch.testing.assert_close(rows["lm.norm/last"], states[-1][:, -1])
    norm = find_towers(model)[0].norm
    torch.testing.assert_close(norm(last).detach(), states[-1][:, -1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_padded_batches_give_what_single_samples_give(make, side):
    module = make()
    collate = text_collate(tiny.tokenizer(side), module.base_model)
    texts = ["w1 w2 w3 w4 w5 w6 w7", "w8", "w9 w10 w11"]
    pools = ["last", "mean", "max", "min", "mean:text+last"]
    with gf.capture(module.base_model, pool=pools) as together, torch.no_grad():
        module.base_model(**collate(texts))
    with gf.capture(module.base_model, pool=pools) as alone, torch.no_grad():
        for text in texts:
            module.base_model(**collate([text]))
    assert len(together) == len(alone) > 0
    for key in alone:
        torch.testing.assert_close(together[key], alone[key], atol=2e-6, rtol=1e-5)


def test_left_padding_without_positions_would_differ():
    """The opposite: positions are what makes left padding right."""
    module = tiny.gpt2()
    collate = text_collate(tiny.tokenizer("left"), module.base_model)
    batch = collate(["w1 w2 w3 w4 w5", "w8"])
    with gf.capture(module.base_model) as right, torch.no_grad():
        module.base_model(**batch)
    del batch["position_ids"]
    with gf.capture(module.base_model) as wrong, torch.no_grad():
        module.base_model(**batch)
    assert not torch.allclose(right["lm.layers.1/last"][1], wrong["lm.layers.1/last"][1])


def test_batches_append_and_concatenation_widens():
    model = tiny.dinov2()
    pixels = torch.randn(5, 3, 28, 28)
    with gf.capture(model, "vision.layers.1", ["cls+mean:patch"]) as rows, torch.no_grad():
        for part in pixels.split(2):
            model(pixel_values=part)
    (key,) = rows
    assert rows[key].shape == (5, 64)
    with gf.capture(model, "vision.layers.1", ["cls", "mean:patch"]) as parts, torch.no_grad():
        model(pixel_values=pixels)
    torch.testing.assert_close(rows[key], torch.cat([parts[k] for k in parts], 1))


def test_the_model_is_left_as_it_was_after_an_exception():
    model = tiny.llama()
    before = hooks_of(model)
    kept = []

    def fail():
        with gf.capture(model) as rows:
            kept.append(rows)
            model(input_ids=torch.ones(1, 3, dtype=torch.int64))
            assert hooks_of(model) > before
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert hooks_of(model) == before
    assert len(kept[0]["lm.embed/last"]) == 1
    with pytest.raises(ValueError, match="no site matches"), gf.capture(model, "absent.*"):
        pass
    assert hooks_of(model) == before


def test_a_failed_forward_adds_no_rows():
    model = tiny.llama()
    ids = torch.ones(2, 3, dtype=torch.int64)
    with gf.capture(model) as rows, torch.no_grad():
        model(input_ids=ids)
        handle = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=ids)
        handle.remove()
        model(input_ids=ids + 1)
    assert all(len(rows[key]) == 4 for key in rows)


def test_neither_head_nor_cache_runs():
    module = tiny.llama()
    model = gf.load(
        module,
        prepare=lambda texts: tiny.tokenizer()(texts, return_tensors="pt", padding=True).data,
    )
    module.lm_head.register_forward_hook(lambda *_: 1 / 0)
    seen = {}
    module.model.register_forward_hook(
        lambda m, a, kw, out: seen.update(kw, out=out), with_kwargs=True
    )
    batch = model.prepare(["w1 w2"])
    batch.pop("token_type_ids", None)
    with gf.capture(model) as rows:
        model.forward(batch)
    assert len(rows["lm.layers.2/last"]) == 1
    assert seen["use_cache"] is False
    assert seen["out"].past_key_values is None


def test_infinite_activations_name_site_sample_and_dtype():
    model = tiny.llama().half()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e4)
        model.model.embed_tokens.weight[7] *= 1000
    ids = torch.tensor([[2, 3], [3, 7], [4, 5]])
    model.model.layers[1].register_forward_hook(
        lambda m, a, out: out.index_fill(0, torch.tensor([1]), torch.inf)
    )
    message = r"lm.layers.1/last: sample 1 of the batch has .* in float16; load the model with"
    with gf.capture(model) as rows, pytest.raises(FloatingPointError, match=message):
        model(input_ids=ids)
    assert rows.n == 0


def test_a_site_that_does_not_run_is_named():
    model = tiny.llama()
    ids = torch.ones(1, 3, dtype=torch.int64)
    with gf.capture(model, "lm.layers.*"), torch.no_grad():
        model.model.layers = model.model.layers[:2]
        model.config.num_hidden_layers = 2
        with pytest.raises(RuntimeError, match=r"lm\.layers\.2 did not run in this forward pass"):
            model(input_ids=ids)


def test_a_pool_needs_its_tokens():
    model = tiny.llama()
    message = "pool 'cls' at lm.embed: sample 0 of the batch has no cls token"
    with gf.capture(model, pool="cls"), pytest.raises(ValueError, match=message):
        model(input_ids=torch.ones(1, 3, dtype=torch.int64))


def test_nothing_with_a_token_axis_outlives_the_hooks():
    model = tiny.llama(layers=4)
    states = []
    for block in model.model.layers:
        block.register_forward_hook(lambda m, a, out: states.append(weakref.ref(out)))
    with gf.capture(model) as rows, torch.no_grad():
        model.model(input_ids=torch.ones(2, 50, dtype=torch.int64), use_cache=False)
        assert len(states) == 4
        assert not any(state() is not None for state in states)
    assert len(rows) == 5
