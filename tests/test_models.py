import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import nn

import geofast as gf
from geofast.models import describe, find_towers, match_sites, structure


def mpt():
    from transformers import MptConfig, MptForCausalLM

    return MptForCausalLM(MptConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=100)).eval()


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=100, state_size=4)
    return MambaForCausalLM(config).eval()


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, vocab_size=100,
        word_embed_proj_dim=32,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("make", "tower", "blocks", "prefix", "pool"),
    [
        (tiny.dinov2, "vision", 3, ("cls",), "cls"),
        (tiny.vit, "vision", 2, ("cls",), "cls"),
        (tiny.clip_vision, "vision", 2, ("cls",), "cls"),
        (tiny.llama, "lm", 3, (), "last"),
        (tiny.gpt2, "lm", 2, (), "last"),
        (tiny.bloom, "lm", 2, (), "last"),
        (mpt, "lm", 2, (), "last"),
        (mamba, "lm", 2, (), "last"),
        (tiny.bert, "text", 2, (), "mean:text"),
    ],
)
def test_towers_are_found_by_structure(make, tower, blocks, prefix, pool):
    (found,) = find_towers(make())
    assert (found.name, len(found.blocks), found.prefix) == (tower, blocks, prefix)
    assert found.default_pool == pool
    assert make is tiny.bert or found.norm is not None


def test_registers_are_told_from_patches():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_register_tokens=4
    )
    (tower,) = find_towers(Dinov2WithRegistersModel(config))
    assert tower.prefix == ("cls", *["register"] * 4)


def test_models_know_nothing_of_what_is_built_on_them():
    """Of the package around them they take what tokens may be, how tensors travel, and a demo.

    `Model.edited` and `Model.generate` are the names of what steering does, and only they ask it.
    """
    room = Path(gf.models.__file__).parent
    taken = {
        name
        for path in room.glob("*.py")
        for name in re.findall(r"^ *from \.\.(\w*)", path.read_text(), re.MULTILINE)
    }
    assert taken == {"pooling", "data", "_ops", "steering"}
    asks = [p.name for p in room.glob("*.py") if "from ..steering" in p.read_text()]
    assert asks == ["model.py"]
    assert "\nfrom ..steering" not in (room / "model.py").read_text()


SEES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
    patch_size=8,
)  # fmt: skip


def test_a_token_of_the_head_that_pools_is_no_token_of_the_blocks():
    """AIMv2's attention pooling asks with a `cls_token`; its blocks see patches alone."""
    from transformers import Aimv2VisionConfig, Aimv2VisionModel, ViTImageProcessorPil

    torch.manual_seed(0)
    module = Aimv2VisionModel(Aimv2VisionConfig(**SEES)).eval()
    assert "head.cls_token" in dict(module.named_parameters())
    model = gf.load(module, processor=ViTImageProcessorPil(size={"height": 32, "width": 32}))
    (tower,) = model.towers
    assert (tower.prefix, tower.default_pool) == ((), "mean:patch")
    assert tower.norm is module.rms_norm
    batch = {"pixel_values": torch.randn(2, 3, 32, 32)}
    with gf.capture(module, "vision.norm") as rows, torch.no_grad():
        whole = module(**batch).last_hidden_state
    torch.testing.assert_close(rows["vision.norm/mean:patch"], whole.mean(1))


class Tokens(nn.Module):
    """Patches, and learned tokens wherever."""

    def __init__(self, where, name, count=2):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.where = where
        self.register_parameter(name, nn.Parameter(torch.randn(1, count, 16)))
        self.learned = getattr(self, name)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)) for _ in range(2)
        )
        self.norm = nn.LayerNorm(16)

    def forward(self, pixel_values):
        x = self.patches(pixel_values).flatten(2).mT
        learned = self.learned.expand(len(x), -1, -1)
        order = {
            "first": [learned, x], "last": [x, learned], "among": [x[:, :1], learned, x[:, 1:]],
        }  # fmt: skip
        x = torch.cat(order.get(self.where, [x]), 1)
        x = self.blocks[0](x)
        if self.where == "between":
            x = torch.cat([learned, x], 1)
        x = self.blocks[1](x)
        return self.norm(torch.cat([learned, x], 1) if self.where == "after" else x)


def counted(module):
    from geofast.models.model import Model, Stage
    from geofast.models.prefix import with_counted_prefix

    def stack(images):
        arrays = [np.asarray(image.resize((32, 32)), np.float32) / 255 for image in images]
        return {"pixel_values": torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)}

    stages = (Stage(module, find_towers(module)),)
    return with_counted_prefix(Model("mine", module, stages, "image", None, stack)).towers[0]


@pytest.mark.parametrize(
    ("where", "name", "prefix", "suffix", "normed"),
    [
        ("first", "cls_token", ("cls", "cls"), (), True),
        ("first", "learned_tokens", ("register", "register"), (), True),
        ("last", "cls_token", (), ("cls", "cls"), True),  # as in Llama 4
        ("last", "learned_tokens", (), ("register", "register"), True),
        ("after", "cls_token", (), (), False),  # as in CaiT: the norm would see what is no patch
        ("nowhere", "reg_token", (), (), False),
        ("nowhere", "learned_tokens", (), (), True),
    ],
)
def test_tokens_before_the_patches_are_counted(where, name, prefix, suffix, normed):
    tower = counted(Tokens(where, name))
    assert (tower.prefix, tower.suffix) == (prefix, suffix)
    assert (tower.norm is not None) == normed


@pytest.mark.parametrize("where", ["among", "between"])
def test_tokens_that_cannot_be_told_apart(where):
    with pytest.raises(ValueError, match="mine has cls tokens, but its blocks do not begin with"):
        counted(Tokens(where, "cls_token"))


def test_without_numbers_nothing_is_counted():
    module = Tokens("after", "cls_token").to("meta")
    assert counted(module).prefix == ("cls", "cls")


def test_images_are_of_the_side_that_the_config_says():
    """Neither processor resizes; CLIP's would set smaller images into black margins."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        CLIPVisionModel,
        ViTConfig,
        ViTImageProcessorPil,
        ViTModel,
    )

    torch.manual_seed(0)
    small = ViTModel(ViTConfig(**SEES)).eval()
    large = CLIPVisionModel(CLIPVisionConfig(**SEES | {"image_size": 256, "patch_size": 16})).eval()
    crop = CLIPImageProcessorPil(do_resize=False, crop_size={"height": 256, "width": 256})
    for module, processor in ((small, ViTImageProcessorPil(do_resize=False)), (large, crop)):
        model = gf.load(module, processor=processor)
        (tower,) = model.towers
        assert (tower.prefix, tower.suffix) == (("cls",), ())
        assert f"{1 + (16 if module is small else 256)} x 32   cls" in describe(model)


def test_margins_that_a_processor_adds_are_no_tokens_of_their_own():
    from transformers import DonutImageProcessorPil, DonutSwinConfig, DonutSwinModel

    torch.manual_seed(0)
    config = DonutSwinConfig(
        image_size=(128, 64), patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2],
        window_size=4,
    )  # fmt: skip
    sides = {"height": 128, "width": 64}
    for shape in ([128, 64], [64, 64]):  # set into the middle, square images have margins
        config.image_size = shape
        module = DonutSwinModel(config).eval()
        model = gf.load(module, processor=DonutImageProcessorPil(size=sides))
        assert {(t.prefix, t.suffix, t.default_pool) for t in model.towers} == {
            ((), (), "mean:patch")
        }


def test_a_model_that_cannot_take_its_images_is_loaded_all_the_same():
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    module = ViTModel(ViTConfig(**SEES)).eval()
    model = gf.load(module, processor=ViTImageProcessorPil(size={"height": 64, "width": 64}))
    assert model.towers[0].prefix == ("cls",)
    with gf.capture(model), pytest.raises(ValueError, match="doesn't match model"):
        model.forward(model.prepare([Image.new("RGB", (32, 32))]))


@pytest.mark.parametrize(("count", "prefix"), [(16, ("register",) * 16), (17, ())])
def test_so_many_tokens_without_a_name_are_registers(count, prefix):
    assert counted(Tokens("first", "learned_tokens", count)).prefix == prefix


def jamba():
    """Blocks with attention and blocks with Mamba take turns."""
    from transformers import JambaConfig, JambaForCausalLM

    torch.manual_seed(0)
    config = JambaConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64, vocab_size=100, attn_layer_period=2, attn_layer_offset=1,
        num_experts=2, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
    )  # fmt: skip
    return JambaForCausalLM(config).eval()


def test_blocks_of_two_classes_that_take_turns():
    module = jamba()
    model = gf.load(module, processor=tiny.tokenizer())
    (tower,) = model.towers
    assert (tower.name, tower.path, len(tower.blocks)) == ("lm", "layers", 4)
    assert len({type(block) for block in tower.blocks}) == 2
    assert tower.branches == ("attn", "mlp")
    assert "some also .attn and .mlp" in structure._ranges([tower])
    attended = [s.name for s in tower.sites() if s.name.endswith(".attn")]
    assert attended == ["lm.layers.1.attn", "lm.layers.3.attn"]
    batch = model.prepare(["w1 w2 w3"])
    with gf.capture(model) as rows:
        model.forward(batch)
    with torch.no_grad():
        states = module.model(**batch, output_hidden_states=True).hidden_states
    for i, name in enumerate(("embed", "layers.0", "layers.1", "layers.2")):
        torch.testing.assert_close(rows[f"lm.{name}/last"], states[i][:, -1])


def test_parts_of_a_block_are_no_stack():
    from transformers import T5Config, T5Model

    small = dict(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=100)
    found = find_towers(T5Model(T5Config(**small)))
    assert [tower.path for tower in found] == ["encoder.block", "decoder.block"]


def mllama():
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    torch.manual_seed(0)
    vision = dict(
        hidden_size=32, num_hidden_layers=2, num_global_layers=2, attention_heads=4,
        intermediate_size=64, image_size=32, patch_size=8, intermediate_layers_indices=[1],
        vision_output_dim=64, max_num_tiles=2, supported_aspect_ratios=[[1, 1], [1, 2]],
    )  # fmt: skip
    text = dict(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        vocab_size=120, num_key_value_heads=2, cross_attention_layers=[1, 3], pad_token_id=0,
    )  # fmt: skip
    return MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text))


def test_a_language_model_with_cross_attention_now_and_then(monkeypatch):
    module = mllama().eval()
    model = gf.load(module, processor=tiny.tokenizer())
    assert [(t.name, len(t.blocks)) for t in model.towers] == [("lm", 4)]
    with gf.capture(model, ["lm.layers.0", "lm.layers.2"]) as rows:
        model.forward(model.prepare(["w1 w2", "w3"]))
    assert rows.n == 2
    message = r"lm.layers.1 did not run in this forward pass \(1 sites missed\); leave it out"
    with gf.capture(model, "lm.layers.[12]"), pytest.raises(RuntimeError, match=message):
        model.forward(model.prepare(["w1 w2"]))
    monkeypatch.setattr(structure, "_is_stack", lambda _, blocks: len({*map(type, blocks)}) == 1)
    message = r"reads text, but the blocks that read it were not found, only vision_model.*layers"
    with pytest.raises(ValueError, match=message):
        gf.load(module, processor=tiny.tokenizer())


def kosmos2():
    from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration

    vision = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=28, patch_size=14,
    )  # fmt: skip
    text = dict(vocab_size=100, embed_dim=32, layers=2, ffn_dim=64, attention_heads=2)
    return Kosmos2ForConditionalGeneration(Kosmos2Config(vision_config=vision, text_config=text))


def florence2():
    from transformers import Florence2Config, Florence2ForConditionalGeneration

    vision = dict(
        embed_dim=[8, 16, 32, 64], num_heads=[1, 2, 4, 8], num_groups=[1, 2, 4, 8],
        depths=[1, 1, 2, 1], projection_dim=32,
    )  # fmt: skip
    text = dict(
        model_type="bart", vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64,
    )  # fmt: skip
    config = Florence2Config(vision_config=vision, text_config=text, projection_dim=32)
    return Florence2ForConditionalGeneration(config)


@pytest.mark.parametrize("make", [kosmos2, florence2, lambda: florence2().model])
def test_images_and_texts_that_meet_in_a_way_of_their_own_are_refused(make):
    module = make()
    message = f"is a {type(module).__name__}, which looks at images and reads text, but neither"
    with pytest.raises(ValueError, match=message):
        gf.load(module, processor=tiny.tokenizer())


def test_sites_and_globs():
    towers = find_towers(tiny.llama())
    assert [s.name for s in match_sites(towers)] == [
        "lm.embed",
        *(f"lm.layers.{i}" for i in range(3)),
    ]
    assert [s.name for s in match_sites(towers, "lm.layers.[12]")] == ["lm.layers.1", "lm.layers.2"]
    assert [s.name for s in match_sites(towers, ["lm.norm", "lm.layers.0.attn"])] == [
        "lm.layers.0.attn", "lm.norm",
    ]  # fmt: skip
    assert match_sites(towers, "lm.layers.1")[0].layer == 1
    with pytest.raises(
        ValueError,
        match=r"no site matches 'lm.layer.1'; this model has lm.embed, lm.layers.0 to .2",
    ):
        match_sites(towers, "lm.layer.1")
    with pytest.raises(ValueError, match=r"sites= is empty; this model has lm.embed"):
        match_sites(towers, [])


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_branches_add_up_to_the_block(make):
    model = make()
    with (
        gf.capture(model, ["lm.layers.0", "lm.layers.1", "lm.layers.1.*"], "last") as rows,
        torch.no_grad(),
    ):
        model(input_ids=torch.arange(5)[None] + 2)
    total = rows["lm.layers.0/last"] + rows["lm.layers.1.attn/last"] + rows["lm.layers.1.mlp/last"]
    torch.testing.assert_close(total, rows["lm.layers.1/last"])


def test_branches_come_before_layer_scale():
    model = tiny.dinov2()
    scale = [layer.layer_scale1.lambda1.data.fill_(0.5) for layer in model.encoder.layer][1]
    model.encoder.layer[1].layer_scale2.lambda1.data.fill_(0.25)
    wanted = ["vision.layers.0", "vision.layers.1", "vision.layers.1.*"]
    own = []
    model.encoder.layer[1].attention.register_forward_hook(lambda m, a, out: own.append(out))
    with gf.capture(model, wanted, "cls") as rows, torch.no_grad():
        model(pixel_values=torch.randn(2, 3, 28, 28))
    before, attn, mlp, after = (
        rows[f"vision.layers.{name}/cls"] for name in ("0", "1.attn", "1.mlp", "1")
    )
    (given,) = own
    given = given[0] if isinstance(given, tuple) else given  # transformers has had both
    torch.testing.assert_close(attn, given[:, 0])
    torch.testing.assert_close(before + scale * attn + 0.25 * mlp, after)
    assert not torch.allclose(before + attn + mlp, after, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "branches"),
    [
        (tiny.llama, ("attn", "mlp")),
        (tiny.gpt2, ("attn", "mlp")),
        (tiny.dinov2, ("attn", "mlp")),
        (opt, ("attn",)),
        (tiny.bert, ("attn",)),  # its `output` adds the residual and norms: the block's own output
        (tiny.bloom, ()),  # its modules add the residual that they are given
        (mamba, ()),
    ],
)
def test_branches_that_a_block_lacks_are_no_sites(make, branches):
    (tower,) = find_towers(make())
    assert tower.branches == branches
    named = {site.name.partition(".layers.0.")[2] for site in tower.sites()} - {""}
    assert named == set(branches)
    if "mlp" not in branches:
        words = r" \(each also .attn\)" if branches else r"(, |$)"
        with pytest.raises(ValueError, match=rf"this model has .*layers.0 to .1{words}"):
            match_sites([tower], f"{tower.name}.layers.1.mlp")


@pytest.mark.parametrize(
    ("make", "lacks"), [(tiny.llama, []), (opt, ["mlp"]), (mamba, ["attn", "mlp"])]
)
def test_the_list_of_sites_says_which_branches_are_not_there(make, lacks):
    module = make()
    text = describe(gf.load(module, prepare=lambda _: {"input_ids": torch.tensor([[3, 4]])}))
    assert "did not run" not in text
    said = [line for line in text.splitlines() if line.startswith("no .")]
    assert said == [f"no .{b}: the blocks have no module that returns that branch" for b in lacks]


def test_a_module_without_blocks_says_what_was_looked_for():
    with pytest.raises(
        ValueError, match=r"no residual blocks found in Linear: .* into a ModuleList, or name them"
    ):
        find_towers(nn.Linear(3, 3))


def test_blocks_that_are_put_into_a_list_are_found():
    """What the error advises."""

    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))

        def forward(self, x):
            return self.b(self.a(x))

    model = Loose()
    with pytest.raises(ValueError, match="no residual blocks"):
        find_towers(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    model.blocks = nn.ModuleList([model.a, model.b])
    x = torch.randn(2, 4)
    after = model.a(x)
    with gf.capture(model, pool="mean") as rows, torch.no_grad():
        model(x)
    torch.testing.assert_close(rows["vision.layers.0/mean"], after.detach())


class Plain(nn.Module):
    """A model of nobody's: blocks in a Sequential, points in."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inside = nn.Linear(2, 16)
        self.blocks = nn.Sequential(
            *[nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.LayerNorm(16)) for _ in range(3)]
        )

    def forward(self, points):
        return self.blocks(self.inside(points))


def test_any_module_with_a_prepare_function():
    model = gf.load(Plain(), prepare=lambda points: {"points": torch.tensor(points)})
    points = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    with gf.capture(model, "*.layers.2", "mean") as rows:
        model.forward(model.prepare(points))
    (key,) = rows
    torch.testing.assert_close(rows[key], model.module(torch.tensor(points)).detach())
    with pytest.raises(ValueError, match="needs prepare="):
        gf.load(Plain())


class Dropping(Plain):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, points):
        return self.blocks(self.drop(self.inside(points)))


def test_a_module_keeps_its_mode():
    """The engine runs it in eval mode, and gives every part its own mode back."""
    module = Dropping().train()
    module.blocks[1].eval()
    before = [m.training for m in module.modules()]
    model = gf.load(module, prepare=lambda points: {"points": torch.tensor(points)})
    assert [m.training for m in module.modules()] == before
    points = [[1.0, 2.0]] * 50
    with gf.capture(model, "*.layers.2", "mean") as rows:
        model.forward(model.prepare(points))
    assert [m.training for m in module.modules()] == before
    assert (rows["vision.layers.2/mean"].std(0) == 0).all()  # no dropout
    with pytest.raises(TypeError):
        model.forward({"nothing": torch.ones(1)})
    assert [m.training for m in module.modules()] == before
    with gf.capture(module, "*.layers.2", "mean") as rows, torch.no_grad():
        module(torch.tensor(points))  # the opposite: in its own mode it drops
    assert (rows["vision.layers.2/mean"].std(0) > 0).all()


def test_base_model_means_something_in_transformers_only():
    class Ours(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model = Plain()

        def forward(self, kilometres):
            return self.base_model(kilometres / 1000)

    model = gf.load(Ours(), prepare=lambda x: {"kilometres": torch.tensor(x)})
    assert model.body is model.module
    assert gf.load(tiny.llama(), prepare=list).body is not model.module


def test_positions_in_an_embedding_do_not_make_a_text_tower():
    """CLIP's vision tower has them, and so do many models of nobody's."""

    class Patches(Plain):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 14, 14)
            self.positions = nn.Embedding(4, 16)

    assert find_towers(Patches())[0].name == "vision"
    assert find_towers(tiny.clip().vision_model)[0].name == "vision"


@pytest.fixture
def checkpoints(tmp_path):
    from transformers import BitImageProcessorPil

    tiny.dinov2().save_pretrained(tmp_path / "vision")
    BitImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(tmp_path / "vision")
    tiny.llama().save_pretrained(tmp_path / "lm")
    tiny.tokenizer().save_pretrained(tmp_path / "lm")
    tiny.sound().save_pretrained(tmp_path / "sound")
    return tmp_path


def test_load_a_vision_folder(checkpoints):
    from PIL import Image

    model = gf.load(checkpoints / "vision")
    assert (model.name, model.kind, model.dtype) == ("vision", "image", torch.float32)
    batch = model.prepare([Image.new("RGB", (50, 40), "red"), Image.new("RGB", (30, 60))])
    assert batch["pixel_values"].shape == (2, 3, 28, 28)
    text = describe(model)
    assert "vision.layers.2" in text
    assert "5 x 32" in text
    assert "1 cls, then patch" in text


def test_load_a_language_model_folder(checkpoints):
    model = gf.load(f"hf:{checkpoints / 'lm'}", dtype=torch.bfloat16)
    assert (model.kind, model.dtype) == ("text", torch.bfloat16)
    assert not any("head" in name for name, _ in model.body.named_modules())
    batch = model.prepare(["w1 w2 w3", "w4"])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    with pytest.raises(ValueError, match="the model takes 64"):
        model.prepare(["w1 " * 65])
    with pytest.raises(ValueError, match="has no token"):
        model.prepare(["w1", ""])


def test_what_cannot_be_loaded(checkpoints, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        gf.load(tmp_path / "absent")
    (tmp_path / "photos.csv").write_text("image,latitude,longitude")
    with pytest.raises(FileNotFoundError, match=r"photos.csv is a file and no checkpoint: name"):
        gf.load(tmp_path / "photos.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="is a folder without a Hugging Face checkpoint"):
        gf.load(tmp_path / "empty")
    with pytest.raises(ValueError, match="which reads input_values: neither images nor text"):
        gf.load(checkpoints / "sound")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "nobody"}', "the config.json of .* cannot be used: .*nobody"),
        ('{"model_type": ', "the config.json of .* cannot be used: "),
    ],
)
def test_a_config_that_is_there_but_of_no_use(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        gf.load(tmp_path)


def test_no_argument_is_dropped_without_a_word():
    module = tiny.vit()
    model = gf.load(module, prepare=list, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="is loaded already: leave device and dtype out"):
        gf.load(model, device="cpu", dtype=torch.float32)


def test_a_causal_checkpoint_is_one_without_its_head_too(checkpoints):
    from transformers import AutoModel

    tiny.bloom().save_pretrained(checkpoints / "bloom")
    tiny.tokenizer("left").save_pretrained(checkpoints / "bloom")
    assert gf.load(checkpoints / "bloom").sites()[0].name == "lm.embed"
    bare = AutoModel.from_pretrained(checkpoints / "bloom")
    assert type(bare).__name__ == "BloomModel"
    assert find_towers(bare)[0].default_pool == "last"


def test_two_towers_need_their_processor(tmp_path):
    tiny.clip().save_pretrained(tmp_path / "clip")
    with pytest.raises(RuntimeError, match=r"the processor of .*clip cannot be loaded: .*whole"):
        gf.load(tmp_path / "clip")


def test_masked_autoencoders_see_the_whole_image(tmp_path):
    from transformers import ViTImageProcessorPil, ViTMAEConfig, ViTMAEModel

    torch.manual_seed(0)
    config = ViTMAEConfig(
        hidden_size=32, num_attention_heads=2, image_size=32, patch_size=8, num_hidden_layers=2,
        intermediate_size=64,
    )  # fmt: skip
    ViTMAEModel(config).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    model = gf.load(tmp_path)
    batch = {"pixel_values": torch.randn(2, 3, 32, 32)}
    with gf.capture(model, pool="mean:patch") as rows:
        model.forward(batch)
        model.forward(batch)
    for key in rows:
        torch.testing.assert_close(rows[key][:2], rows[key][2:])


def hiera(**changes):
    from transformers import HieraConfig

    small = dict(embed_dim=8, image_size=[32, 32], depths=[1] * 4, num_heads=[1] * 4)
    return HieraConfig(**small | changes)


def test_hiera_masks_in_one_of_its_forms_only(tmp_path):
    from transformers import HieraModel, ViTImageProcessorPil

    torch.manual_seed(0)
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    HieraModel(hiera()).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    plain = gf.load(tmp_path)
    assert plain.notes == ()
    masking = HieraModel(hiera(), is_mae=True)
    with pytest.raises(ValueError, match=r"hides random patches: set its config.mask_ratio to 0"):
        gf.load(masking, processor=processor)
    seeing = HieraModel(hiera(mask_ratio=0.0), is_mae=True).eval()
    seeing.load_state_dict(plain.module.state_dict())
    seeing = gf.load(seeing, processor=processor)
    assert "masking is off" in seeing.notes[0]
    batch = {"pixel_values": torch.randn(2, 3, 32, 32)}
    rows = []
    for model in (plain, plain, seeing):
        with gf.capture(model, pool=["mean:patch", "last"]) as one:
            model.forward(batch)
        rows.append(dict(one))
    assert "vision.layers.3/mean:patch" in rows[0]
    for other in rows[1:]:
        for key, expected in rows[0].items():
            torch.testing.assert_close(other[key], expected)


def break_weights(folder):
    path = folder / "model.safetensors"
    return path, path.read_bytes()


def truncate(folder):
    path, content = break_weights(folder)
    path.write_bytes(content[: len(content) // 2])
    return "the weights of .* cannot be loaded: .*not fully covered"


def spoil(folder):
    break_weights(folder)[0].write_bytes(b"no weights" * 100)
    return r"the weights of .*\(SafetensorError\)"


def remove(folder):
    break_weights(folder)[0].unlink()
    return "the weights of .* no file named model.safetensors"


def pickled(folder):
    break_weights(folder)[0].unlink()
    (folder / "pytorch_model.bin").write_bytes(b"hi")
    return "the weights of .* cannot be loaded"


def widen(folder):
    change(folder, '"hidden_size": 32', '"hidden_size": 64')
    return r"lm_head.weight is \[100, 32\] in the file and \[100, 64\] by config.json"


def deepen(folder):
    change(folder, '"num_hidden_layers": 3', '"num_hidden_layers": 5')
    return r"18 parameters of its blocks are absent, the first model.layers.3.input_layernorm"


def change(folder, old, new):
    text = (folder / "config.json").read_text()
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new))


def forget_words(folder):
    (folder / "tokenizer.json").write_text("{")
    return "the tokenizer of .* cannot be loaded"


@pytest.mark.parametrize("damage", [truncate, spoil, remove, pickled, widen, deepen, forget_words])
def test_a_broken_checkpoint_is_one_sentence(checkpoints, damage):
    message = damage(checkpoints / "lm")
    with pytest.raises(RuntimeError, match=message) as caught:
        gf.load(checkpoints / "lm")
    assert str(checkpoints / "lm") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Is the checkpoint whole? Fetch or save it again" in str(caught.value)


def test_a_checkpoint_may_lack_what_no_site_reads(checkpoints):
    """DINOv2's mask token, ViT's pooler."""
    from safetensors.torch import load_file, save_file

    path = checkpoints / "vision" / "model.safetensors"
    weights = load_file(path)
    del weights["embeddings.mask_token"]
    save_file(weights, path, metadata={"format": "pt"})
    assert gf.load(checkpoints / "vision").kind == "image"


def test_no_image_processor(checkpoints):
    (checkpoints / "vision" / "preprocessor_config.json").unlink()
    with pytest.raises(RuntimeError, match=r"the image processor of .*vision cannot be loaded"):
        gf.load(checkpoints / "vision")


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK"])
def test_images_of_every_mode(mode):
    from PIL import Image
    from transformers import ViTImageProcessorPil

    from geofast.models.inputs import ImageTransform

    transform = ImageTransform(ViTImageProcessorPil(size={"height": 8, "width": 8}))
    image = Image.new("RGB", (12, 10), (204, 204, 204))  # a palette has it
    expected = transform(image)
    assert expected.shape == (3, 8, 8)
    torch.testing.assert_close(transform(image.convert(mode)), expected, atol=0.02, rtol=0)


def test_a_tokenizer_without_padding():
    from geofast.models.inputs import text_collate

    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    assert tokenizer.eos_token is None
    batch = text_collate(tokenizer, nn.Linear(1, 1))(["w1 w2", "w3"])
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_images_of_different_sizes_are_refused():
    from geofast.models.inputs import stack_images

    with pytest.raises(ValueError, match="images of different sizes in one batch"):
        stack_images([torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)])


def test_one_text_is_not_taken_letter_by_letter():
    model = gf.load(tiny.llama().eval(), processor=tiny.tokenizer())
    for take in (model.prepare, lambda text: gf.tokens(model, text)):
        with pytest.raises(TypeError, match=r"inputs must be a list; got one text, 'w1 w2': write"):
            take("w1 w2")


def test_a_model_and_its_sites_are_shown_in_a_line():
    model = gf.load(tiny.llama().eval(), processor=tiny.tokenizer())
    said = "Model(LlamaForCausalLM, reads text: lm (3 blocks); torch.float32 on cpu)"
    assert repr(model) == said
    assert max(len(repr(site)) for site in model.sites()) < 100
    assert len(repr(model.towers)) < 300


def test_prepare_must_return_arguments():
    model = gf.load(tiny.dinov2(), prepare=lambda images: torch.zeros(len(images), 3, 28, 28))
    with pytest.raises(TypeError, match=r"keyword arguments of Dinov2Model, a dict; got a Tensor"):
        model.prepare([Image.new("RGB", (28, 28))])
