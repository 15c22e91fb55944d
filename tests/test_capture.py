import re
import sys
import weakref

import pytest
import tiny
import torch
from torch import nn

import geofast as gf
from geofast import pooling
from geofast.models import find_towers
from geofast.models.inputs import text_collate
from geofast.rows import Rows
from geofast.streams import Aside


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


SENTENCES = [[3, 4, 5, 6, 7, 8, 9], [10], [11, 12, 13]]
POOLS = ["last", "mean", "max", "min", "mean:text+last"]


def padded(side, sentences=SENTENCES):
    """Batch of unequal sentences; the padding has an id of its own, so that it shows."""
    longest = max(map(len, sentences))
    ids = torch.full((len(sentences), longest), 99)
    for row, sentence in zip(ids, sentences, strict=True):
        row[slice(len(sentence)) if side == "right" else slice(-len(sentence), None)] = (
            torch.tensor(sentence)
        )
    mask = (ids != 99).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def one_by_one(module, pool=POOLS):
    with gf.capture(module, pool=pool) as rows, torch.no_grad():
        for sentence in SENTENCES:
            module(input_ids=torch.tensor([sentence]))
    return rows


def assert_same(rows, expected, atol=2e-6):
    assert list(rows) == list(expected)
    assert rows.n == expected.n > 0
    for key in expected:
        torch.testing.assert_close(rows[key], expected[key], atol=atol, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_padded_batches_give_what_single_samples_give(make, side):
    model = make().base_model
    with gf.capture(model, pool=POOLS) as rows, torch.no_grad():
        model(**padded(side))
    assert_same(rows, one_by_one(model))


def roberta():
    from transformers import RobertaConfig, RobertaForCausalLM

    torch.manual_seed(0)
    return RobertaForCausalLM(RobertaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=100, pad_token_id=0, max_position_embeddings=64, is_decoder=True,
    )).eval()  # fmt: skip


def rwkv():
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    return RwkvForCausalLM(RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=100)).eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.bloom, roberta, rwkv])
def test_the_tokenizers_batches_give_what_single_samples_give(make, side):
    """On whichever side the tokenizer pads for generation; some models cannot take the left."""
    model = make().base_model
    texts = [" ".join(f"w{i - 2}" for i in sentence) for sentence in SENTENCES]
    with gf.capture(model, pool=POOLS) as rows, torch.no_grad():
        model(**text_collate(tiny.tokenizer(side), model)(texts))
    assert_same(rows, one_by_one(model))


def test_left_padding_without_positions_would_differ():
    """The opposite: positions are what makes left padding right."""
    module = tiny.gpt2()
    batch = padded("left", [[3, 4, 5, 6, 7], [10]])
    with gf.capture(module.base_model) as right, torch.no_grad():
        module.base_model(**batch)
    del batch["position_ids"]
    with gf.capture(module.base_model) as wrong, torch.no_grad():
        module.base_model(**batch)
    assert not torch.allclose(right["lm.layers.1/last"][1], wrong["lm.layers.1/last"][1])


class Wrapper(nn.Module):
    """A model of somebody's around a language model, with names of its own."""

    def __init__(self):
        super().__init__()
        self.language = tiny.llama()

    def forward(self, words, real):
        return self.language(input_ids=words, attention_mask=real)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_the_mask_is_found_on_the_way_to_the_blocks(dtype):
    model = Wrapper()
    batch = padded("right")
    with gf.capture(model, pool=POOLS) as rows, torch.no_grad():
        model(batch["input_ids"], batch["attention_mask"].to(dtype))
    assert_same(rows, one_by_one(model.language))


def test_any_number_but_zero_in_a_mask_is_a_token():
    """Packed sequences are numbered 1, 2, 3 in the mask."""
    model = tiny.llama()
    ids = torch.tensor([[3, 4, 5, 6]])
    with gf.capture(model, pool=POOLS) as rows, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.tensor([[1, 1, 2, 2]]))
    with gf.capture(model, pool=POOLS) as expected, torch.no_grad():
        model(input_ids=ids)
    assert_same(rows, expected)


def test_a_mask_that_cannot_be_pooled_with():
    model = tiny.llama()
    ids = torch.tensor([[3, 4, 5, 6]])
    mask = torch.zeros(1, 1, 4, 4)
    message = r"attention_mask must be \[batch, tokens\] for pooling; got \[1, 1, 4, 4\]"
    with gf.capture(model), pytest.raises(ValueError, match=message):
        model(input_ids=ids, attention_mask=mask)
    with gf.capture(model), pytest.raises(ValueError, match="for pooling; got dict"):
        model(input_ids=ids, attention_mask={"full_attention": mask})


def test_patches_of_padding_are_left_out():
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    torch.manual_seed(0)
    small = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=64)
    model = Siglip2VisionModel(Siglip2VisionConfig(**small, patch_size=2, num_patches=16)).eval()
    pixels, real = torch.randn(2, 16, 12), torch.ones(2, 16, dtype=torch.int64)
    real[1, 8:] = 0
    sizes = torch.tensor([[4, 4], [2, 4]])
    with gf.capture(model, pool="mean:patch") as rows, torch.no_grad():
        model(pixel_values=pixels, pixel_attention_mask=real, spatial_shapes=sizes)
    with gf.capture(model, pool="mean:patch") as alone, torch.no_grad():
        model(pixels[1:, :8], pixel_attention_mask=real[1:, :8], spatial_shapes=sizes[1:])
    for key in rows:
        torch.testing.assert_close(rows[key][1:], alone[key], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [tiny.dinov2, tiny.llama, tiny.gpt2])
def test_narrow_models(make, dtype):
    """Rows of a narrow model are float32 means of its own hidden states, not of rounded ones."""
    model = make().to(dtype)
    tower = find_towers(model)[0]
    if tower.name == "vision":
        batch, role = {"pixel_values": torch.randn(3, 3, 28, 28).to(dtype)}, "patch"
        sites, skip = ["vision.embed", "vision.layers.*"], 1
    else:
        batch, role = {"input_ids": torch.arange(18).view(3, 6) + 2}, "text"
        sites, skip = ["lm.embed", *(f"lm.layers.{i}" for i in range(len(tower.blocks) - 1))], 0
    with gf.capture(model, sites, [f"mean:{role}", "max", "last"]) as rows, torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    names = dict.fromkeys(key.partition("/")[0] for key in rows)
    assert len(names) == len(tower.blocks) + (tower.name == "vision")
    for name, state in zip(names, states, strict=False):
        assert state.dtype == dtype
        assert rows[f"{name}/last"].dtype == torch.float32
        assert torch.equal(rows[f"{name}/last"], state[:, -1].float())
        assert torch.equal(rows[f"{name}/max"], state.amax(1).float())
        mean = state[:, skip:].double().mean(1).float()
        torch.testing.assert_close(rows[f"{name}/mean:{role}"], mean, atol=1e-6, rtol=1e-6)
        assert not torch.equal(mean, mean.to(dtype).float())


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


class Late(Aside):
    """What is pooled beside the model, as late as a GPU may: when the model waits for it."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.waiting = []

        def pooled_later(*args):
            self.waiting.append(args)
            return True

        monkeypatch.setattr(sys.modules["geofast.capture"], "pool", pooled_later)

    def join(self):
        for args in self.waiting:
            pooling.pool(*args)
        self.waiting.clear()


def falcon():
    from transformers import FalconConfig, FalconModel

    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=100)
    model = FalconModel(FalconConfig(**small, new_decoder_architecture=True)).eval()
    return model, "lm.layers.*.mlp", torch.arange(12).view(3, 4) + 2


class Overwriting(nn.Sequential):
    def forward(self, x):
        return x.add_(super().forward(x))


def overwriting():
    torch.manual_seed(0)
    blocks = (Overwriting(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3))
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(*blocks)), None, torch.randn(3, 4, 8)


@pytest.mark.parametrize("make", [falcon, overwriting])
def test_what_the_model_writes_over_is_read_before(make, monkeypatch):
    """Falcon adds its attention to what its MLP returned; others write over the stream itself."""
    model, sites, x = make()
    with gf.capture(model, sites, "mean") as expected, torch.no_grad():
        for _ in range(3):
            model(x)
    rows = Rows()
    rows.aside = Late(monkeypatch)
    with gf.capture(model, sites, "mean", rows=rows), torch.no_grad():
        for _ in range(3):
            model(x)
    assert_same(rows, expected, atol=0)


def test_a_model_that_writes_over_nothing_waits_for_its_first_pass_alone(monkeypatch):
    model = tiny.llama()
    ids = torch.arange(12).view(3, 4) + 2
    rows, left = Rows(), []
    rows.aside = late = Late(monkeypatch)
    model.model.norm.register_forward_pre_hook(lambda *_: left.append(len(late.waiting)))
    with gf.capture(model, ["lm.layers.*", "lm.norm"], rows=rows), torch.no_grad():
        for _ in range(3):
            model(input_ids=ids)
    assert left == [0, 3, 3]


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
    message = (
        r"^lm.layers.1/last: sample 1 of the batch has NaN or infinite activations in float16; "
        r"load the model with dtype=torch.float32 or bfloat16 \(--dtype\)$"
    )
    with gf.capture(model) as rows, pytest.raises(FloatingPointError, match=message):
        model(input_ids=ids)
    assert rows.n == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pool", ["mean", "max", "min", "mean:text+last"])
def test_one_nan_among_the_tokens_is_enough(pool, dtype):
    model = tiny.llama().to(dtype)
    spoilt = {}

    def spoil(_module, _args, out):
        return out.index_put(spoilt["where"], torch.tensor(torch.nan, dtype=dtype))

    model.model.layers[1].register_forward_hook(spoil)
    name = str(dtype).removeprefix("torch.")
    advice = "load the model" if dtype == torch.float16 else "look at its input and at the model's"
    message = re.escape(f"lm.layers.1/{pool}: sample 1 of the batch has NaN or infinite ")
    batch = padded("left", [[3, 4, 5, 6], [7, 8]])
    with gf.capture(model, "lm.layers.1", pool) as rows, torch.no_grad():
        spoilt["where"] = torch.tensor([1]), torch.tensor([2])
        with pytest.raises(FloatingPointError, match=f"{message}activations in {name}; {advice}"):
            model(**batch)
        spoilt["where"] = torch.tensor([1]), torch.tensor([0])  # padding: no matter
        model(**batch)
    assert rows.n == 2


def test_a_part_that_runs_alone_is_told():
    """Nothing would say where its passes begin and end: its rows would be lost or mixed."""
    model = tiny.llama()
    ids = torch.ones(1, 3, dtype=torch.int64)
    message = "lm.embed ran outside a call of the LlamaForCausalLM that capture watches"
    with gf.capture(model) as rows:
        model(input_ids=ids)
        with pytest.raises(RuntimeError, match=message):
            model.model(input_ids=ids)
    assert rows.n == 1


def test_a_model_that_was_compiled_before():
    """Its hooks are not run; the way out that the error gives is right."""
    model = tiny.llama()
    compiled = torch.compile(model, backend="eager")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        compiled(input_ids=ids)
        with gf.capture(model) as expected:
            model(input_ids=ids)
        with gf.capture(model) as rows:
            with pytest.raises(RuntimeError, match=r"torch.compiler.set_stance\('force_eager'\)"):
                compiled(input_ids=ids)
            assert rows.n == 0
            with torch.compiler.set_stance("force_eager"):
                compiled(input_ids=ids)
    torch._dynamo.reset()
    assert_same(rows, expected)


def test_tokens_before_samples_are_refused():
    """Torch's own encoder takes [tokens, batch, dim] unless it is told otherwise."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with gf.capture(model, pool="mean") as rows, torch.no_grad():
        model(torch.randn(3, 5, 16))
    assert rows.n == 3

    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = model

        def forward(self, x):
            return self.encoder(x.transpose(0, 1)).transpose(0, 1)

    swapped = Swapped()
    message = r"vision.embed is \[5, 3, 16\], not \[batch, tokens, dim\]: the batch has 3 samples"
    with gf.capture(swapped), pytest.raises(ValueError, match=message):
        swapped(torch.randn(3, 5, 16))


@pytest.mark.parametrize("sites", [None, "*.layers.2"])
def test_a_block_that_comes_twice_is_refused(sites):
    first, second = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2))
    model = nn.Sequential(first, second, first)
    with gf.capture(model, sites, "mean"), pytest.raises(RuntimeError, match="ran twice in one"):
        model(torch.randn(3, 5, 8))
    with gf.capture(model, "*.layers.1", "mean") as rows, torch.no_grad():
        model(torch.randn(3, 5, 8))
    assert rows.n == 3


def test_blocks_that_return_lists():
    from transformers import OpenAIGPTConfig, OpenAIGPTModel

    model = OpenAIGPTModel(OpenAIGPTConfig(vocab_size=100, n_embd=32, n_layer=2, n_head=2)).eval()
    ids = torch.tensor([[3, 4, 5]])
    with gf.capture(model, pool="last") as rows, torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(rows) == len(states)
    for key, state in zip(rows, states, strict=True):
        assert torch.equal(rows[key], state[:, -1])

    class Dictionary(nn.Sequential):
        def forward(self, x):
            return {"x": x}

    blocks = nn.Sequential(*[Dictionary(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2)])
    message = "vision.layers.0 is a dict in this model, not a tensor"
    with gf.capture(blocks), pytest.raises(ValueError, match=message):
        blocks(torch.randn(3, 5, 8))
    Dictionary.forward = lambda self, x: ()
    message = "vision.layers.0 is a tuple in this model, not a tensor"
    with gf.capture(blocks), pytest.raises(ValueError, match=message):
        blocks(torch.randn(3, 5, 8))


@pytest.mark.parametrize("pool", ["mean", "each"])
def test_hidden_states_of_no_samples_no_tokens_or_no_width(pool):
    class Narrow(nn.Sequential):
        def forward(self, x):
            return super().forward(x)[..., :width]

    width = 8
    blocks = nn.Sequential(*[Narrow(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2)])
    with gf.capture(blocks, pool=pool) as rows, torch.no_grad():
        blocks(torch.randn(3, 5, 8))
        blocks(torch.randn(0, 5, 8))
    assert rows.n == 3
    message = f"pool '{pool}' at vision.embed: sample 0 of the batch has no all token"
    with gf.capture(blocks, pool=pool), pytest.raises(ValueError, match=message):
        blocks(torch.randn(3, 0, 8))
    width = 0
    message = r"vision.layers.0 gave hidden states of width 0: \[3, 5, 0\]"
    with gf.capture(blocks, pool=pool), pytest.raises(ValueError, match=message):
        blocks(torch.randn(3, 5, 8))


STRIDES = {
    "batch and tokens": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "tokens and dim": lambda x: x.mT.contiguous().mT,
    "every other number": lambda x: torch.stack([x, -x], 3)[..., 0],
    "a slice of tokens": lambda x: torch.cat([x, x], 1)[:, 5:],
    "a slice of numbers": lambda x: torch.cat([x, x], 2)[..., 1:9],
    "one sample for all": lambda x: x[:1].expand(3, -1, -1),
    "one number for all": lambda x: x[..., :1].expand(-1, -1, 8),
}


@pytest.mark.parametrize("stride", STRIDES)
def test_hidden_states_of_any_strides(stride):
    class Strided(nn.Sequential):
        def forward(self, x):
            states.append(STRIDES[stride](super().forward(x)))
            return states[-1]

    states = []
    blocks = nn.Sequential(*[Strided(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2)])
    with gf.capture(blocks, "*.layers.*", ["mean", "last", "max"]) as rows, torch.no_grad():
        blocks(torch.randn(3, 5, 8))
    for i, state in enumerate(states):
        torch.testing.assert_close(rows[f"vision.layers.{i}/mean"], state.mean(1))
        assert torch.equal(rows[f"vision.layers.{i}/last"], state[:, -1])
        assert torch.equal(rows[f"vision.layers.{i}/max"], state.amax(1))


def test_maps_with_the_channels_last_in_memory():
    class Block(nn.Sequential):
        pass

    def convolutions():
        return Block(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1))

    model = nn.Sequential(convolutions(), convolutions())
    maps, found = torch.randn(2, 8, 4, 5), []
    for order in (torch.contiguous_format, torch.channels_last):
        with gf.capture(model, pool=["mean", "max"]) as rows, torch.no_grad():
            out = model.to(memory_format=order)(maps.contiguous(memory_format=order))
        assert out.is_contiguous(memory_format=order)
        torch.testing.assert_close(rows["vision.layers.1/mean"], out.mean((2, 3)))
        found.append(rows)
    assert_same(*found)


def test_a_norm_that_sees_the_cls_token_alone():
    """CLIP norms it after the blocks; there are no patches to pool there."""
    model = tiny.clip_vision()
    pixels = torch.randn(2, 3, 28, 28)
    with gf.capture(model, "vision.norm", "mean") as rows, torch.no_grad():
        pooled = model(pixel_values=pixels).pooler_output
    torch.testing.assert_close(rows["vision.norm/mean"], pooled)
    message = "pool 'mean:patch' at vision.norm: sample 0 of the batch has no patch token"
    with gf.capture(model, "vision.norm", "mean:patch"), pytest.raises(ValueError, match=message):
        model(pixel_values=pixels)


def test_two_towers_are_refused_together():
    model = tiny.clip()
    message = r"CLIPModel has two towers \(vision, text\).* capture model.vision_model"
    with pytest.raises(ValueError, match=message), gf.capture(model):
        pass
    pixels, ids = torch.randn(2, 3, 28, 28), torch.tensor([[3, 4], [5, 6]])
    with gf.capture(model.vision_model) as advised, torch.no_grad():
        model.vision_model(pixel_values=pixels)
    with gf.capture(model, ["vision.embed", "vision.layers.*"]) as rows, torch.no_grad():
        model(input_ids=ids, pixel_values=pixels)
    assert_same(rows, advised)


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


def test_a_pool_for_a_tower_that_is_not_there():
    with (
        pytest.raises(ValueError, match="pool= names a tower 'vision'; there is lm"),
        gf.capture(tiny.llama(), pool={"vision": "cls"}),
    ):
        pass


def test_nothing_with_a_token_axis_outlives_the_hooks():
    model = tiny.llama(layers=4)
    states = []
    for block in model.model.layers:
        block.register_forward_hook(lambda m, a, out: states.append(weakref.ref(out)))
    with gf.capture(model.model) as rows, torch.no_grad():
        model.model(input_ids=torch.ones(2, 50, dtype=torch.int64), use_cache=False)
        assert len(states) == 4
        assert not any(state() is not None for state in states)
    assert len(rows) == 5


def test_a_float64_model_is_read_in_float64():
    model, ids = tiny.llama().double(), torch.arange(12).view(2, 6) + 2
    with gf.capture(model, "lm.layers.*", ["last", "mean"]) as rows, torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(rows["lm.layers.0/last"], states[1][:, -1].float())
    assert torch.equal(rows["lm.layers.0/mean"], states[1].mean(1).float())
