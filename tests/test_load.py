"""Loading: devices, quantised checkpoints, adapters, processors, and what goes wrong."""

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from importlib import import_module
from types import SimpleNamespace

import families
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import nn

import geofast as gf
from geofast.models import checkpoint, hub
from geofast.models.inputs import text_collate
from geofast.models.layout import Call, lay_out
from geofast.models.skeleton import skeleton
from geofast.models.twin import random_twin

WORDS = ["w1 w2", "w3", "w4 w5 w6 w7"]


def rows_of(model, inputs=WORDS):
    with gf.capture(model) as rows:
        model.forward(model.prepare(inputs))
    return dict(rows)


def assert_same(rows, expected, **tolerance):
    assert rows.keys() == expected.keys()
    for key in rows:
        torch.testing.assert_close(rows[key], expected[key], **tolerance)


def distance(rows, expected, key):
    return float((rows[key] - expected[key]).norm() / expected[key].norm())


def names(model):
    return [site.name for site in model.every_site]


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """The folder of a tiny language model."""
    folder = tmp_path_factory.mktemp("models") / "lm"
    # On CPUs with AVX-512, bitsandbytes 0.50 reads 4-bit weights wrongly whose width is no multiple
    # of 64.
    tiny.llama(width=64).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(lm):
    return rows_of(gf.load(lm))


# ------ devices

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm",
         "model.rotary_emb", "lm_head")  # fmt: skip


@pytest.mark.parametrize(
    ("on_disk", "note"),
    [
        ((), ()),
        (("model.layers.1",), ("device_map keeps parts of the model on cpu and disk",)),
        (("model.embed_tokens", "model.layers.0"), ("device_map keeps parts of the model on cpu",)),
        (PARTS, ("device_map keeps parts of the model on disk",)),
    ],
)
def test_parts_on_the_disk_are_read_as_they_are_elsewhere(lm, plain, on_disk, note):
    pytest.importorskip("accelerate")
    model = gf.load(lm, device_map={p: "disk" if p in on_disk else "cpu" for p in PARTS})
    away = {n for n, p in model.module.named_parameters() if p.is_meta}
    assert bool(away) == bool(on_disk)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert [n[: len(m)] for n, m in zip(model.notes, note, strict=True)] == list(note)
    assert_same(rows_of(model), plain, rtol=0, atol=0)
    assert {n for n, p in model.module.named_parameters() if p.is_meta} == away


def test_the_device_map_that_accelerate_makes(lm, plain):
    pytest.importorskip("accelerate")
    assert_same(rows_of(gf.load(lm, device_map="auto")), plain)


def test_a_module_that_is_offloaded_already(plain):
    accelerate = pytest.importorskip("accelerate")
    module = tiny.llama(width=64)
    accelerate.cpu_offload(module, torch.device("cpu"))
    assert all(p.is_meta for p in module.parameters())
    model = gf.load(module, processor=tiny.tokenizer())
    assert model.device == torch.device("cpu")
    assert_same(rows_of(model), plain)
    with pytest.raises(ValueError, match="no twin of random weights: parts of it are fetched"):
        random_twin(model)


def test_inputs_go_where_the_first_layer_is_made_to_run():
    module = tiny.llama()
    model = gf.load(module, processor=tiny.tokenizer())
    assert model.device == torch.device("cpu")
    module.model.embed_tokens._hf_hook = SimpleNamespace(execution_device="meta")
    assert model.device == torch.device("meta")
    assert model.prepare(WORDS)["input_ids"].is_meta


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("everywhere", "'auto' or a mapping from parts to devices; got 'everywhere'"),
        ({"": "nowhere"}, "sends '' to 'nowhere', which is no device"),
        (
            {"model.layers.0": "disk", "lm_head": "cpu"},
            "does not give any device for .*model.embed_tokens.weight.* [.]{3}$",
        ),
    ],
)
def test_device_maps_that_cannot_be(lm, device_map, message):
    pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match=message) as caught:
        gf.load(lm, device_map=device_map)
    assert "device_map" in str(caught.value)


def test_device_and_device_map_are_not_given_together(lm):
    with pytest.raises(ValueError, match="give device= or device_map=, not both"):
        gf.load(lm, device="cpu", device_map="auto")
    with pytest.raises(ValueError, match="device_map goes with a checkpoint"):
        gf.load(tiny.llama(), device_map="auto", processor=tiny.tokenizer())


def test_the_layout_of_tokens_is_where_they_are():
    """Two blocks of a tower may lie on two devices; the meta device stands for the second."""
    tower = next(t for t in gf.load(tiny.llama(), processor=tiny.tokenizer()).towers)
    site = next(tower.sites())
    call = Call({"input_ids": torch.ones(2, 3, dtype=torch.int64)})
    call.note_mask("lm", {"attention_mask": torch.ones(2, 3)})
    for device in ("cpu", "meta"):
        hidden = torch.empty(2, 3, 8, device=device)
        assert lay_out(site, tower, hidden, call).roles.device == hidden.device


def test_a_pass_over_two_devices_lays_out_each(monkeypatch):
    """Rows of a block that lies elsewhere than the one before it need roles of their own there."""
    capture = import_module("geofast.capture")
    module = tiny.llama()
    module.model.layers[1].register_forward_hook(lambda _m, _a, out: out.to("meta"))
    module.model.layers[2].forward = lambda hidden, **_: hidden
    module.model.norm.forward = lambda hidden: hidden
    seen = []

    def pool(hidden, roles, pools, out, starts=None):
        seen.append((str(hidden.device), str(roles.device), {str(o.device) for o in out}))
        for o in out:
            o.fill_(1)

    monkeypatch.setattr(capture, "pool", pool)
    monkeypatch.setattr(capture.Recorder, "_require_tokens", lambda *_: None)
    monkeypatch.setattr(capture.Recorder, "_check", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other, **_: self)
    with capture.capture(module.model), torch.no_grad():
        module.model(input_ids=torch.tensor([[3, 4]]))
    assert seen == [(d, d, {d}) for d in ("cpu", "cpu", "meta", "meta")]


# ------ weights that a checkpoint lacks


def without(family, folder, part):
    """A checkpoint from which the parameters are gone whose name has `part` in it."""
    from safetensors.torch import load_file, save_file

    path = families.save(family, folder) / "model.safetensors"
    weights = load_file(path)
    rest = {key: value for key, value in weights.items() if part not in key}
    assert len(rest) < len(weights)
    save_file(rest, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "part", "said"),
    [
        (families.vit, "patch_embeddings", "embeddings.patch_embeddings.projection.bias and 1"),
        (families.vit, "cls_token", "embeddings.cls_token"),
        (families.llava, "multi_modal_projector", "model.multi_modal_projector.linear_1.bias"),
        (families.llava, "language_model.model.embed", "model.language_model.embed_tokens.weight"),
        (families.llama, "embed_tokens", "model.embed_tokens.weight"),
        (families.llama, "model.norm", "model.norm.weight"),
        (families.bert, "embeddings.", "embeddings.LayerNorm.bias and 4 more"),
        (families.clip, "visual_projection", "visual_projection.weight"),
        (families.clip, "text_model.embeddings", "text_model.embeddings.position_embedding.weight"),
        (families.siglip, "vision_model.head.probe", "vision_model.head.probe"),
    ],
)
def test_what_the_sites_depend_on_must_be_in_the_checkpoint(family, part, said, tmp_path):
    folder = without(family, tmp_path, part)
    with pytest.raises(RuntimeError, match=f"sites depend on are absent: {said}") as caught:
        gf.load(folder)
    assert "Is the checkpoint whole? Fetch or save it again" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "part"),
    [
        (families.vit, "pooler"),
        (families.bert, "pooler"),
        (families.beit, "pooler"),
        (families.clip, "logit_scale"),
        (families.llama, "lm_head"),
        (families.llava, "lm_head"),
        (families.siglip_vision, "head."),
    ],
)
def test_what_no_site_depends_on_may_be_absent(family, part, tmp_path):
    whole = gf.load(families.save(family, tmp_path))
    model = gf.load(without(family, tmp_path, part))
    assert all(bool(p.isfinite().all()) for p in model.module.parameters())
    inputs = WORDS if model.kind == "text" else [Image.new("RGB", (40, 40), "red")]
    assert_same(rows_of(model, inputs), rows_of(whole, inputs))


def test_what_is_absent_is_tried_with_an_image_that_the_model_takes(tmp_path):
    """Its processor does not resize."""
    from transformers import ViTImageProcessorPil

    folder = without(families.vit, tmp_path, "pooler")
    ViTImageProcessorPil(do_resize=False).save_pretrained(folder)
    assert gf.load(folder).kind == "image"


def test_a_whole_checkpoint_is_loaded_without_a_pass(lm, monkeypatch):
    monkeypatch.setattr(gf.Model, "forward", lambda *_: pytest.fail("a forward pass"))
    gf.load(lm)


# ------ quantised checkpoints


def bits(number, **more):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return transformers.BitsAndBytesConfig(**{f"load_in_{number}bit": True}, **more)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("number", "computed", "least", "most"), [(4, "float16", 0.01, 0.2), (8, "float16", 1e-3, 0.02)]
)
def test_weights_that_bitsandbytes_has_quantised(
    lm, plain, tmp_path, number, computed, least, most
):
    from transformers import AutoModelForCausalLM

    more = {"bnb_4bit_compute_dtype": torch.float16, "bnb_4bit_quant_type": "nf4"}
    more = more if number == 4 else {}
    AutoModelForCausalLM.from_pretrained(
        lm, quantization_config=bits(number, **more), dtype=torch.float16
    ).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model = gf.load(tmp_path)
    kinds = {type(m).__name__ for m in model.module.modules()}
    assert {4: "Linear4bit", 8: "Linear8bitLt"}[number] in kinds
    assert (model.dtype, model.device) == (torch.float16, torch.device("cpu"))
    note = f"weights are quantised: bitsandbytes {number} bit, computed in {computed}"
    assert model.notes == (note,)
    assert least < distance(rows_of(model), plain, "lm.layers.2/last") < most
    found = {c.name: c.outcome for c in gf.doctor(model, WORDS).checks}
    assert (found["repeats"], found["batch"], found["dtype"]) == ("pass", "pass", "skip")
    with pytest.raises(ValueError, match="no twin of random weights: its weights are quantised"):
        random_twin(model)


def test_a_probe_says_that_the_weights_are_quantised(lm, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(
        lm, quantization_config=bits(4), dtype=torch.float32
    ).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    r = np.random.default_rng(0)
    samples = gf.data.from_arrays(
        [f"w{i} w{i + 1}" for i in range(24)], *r.uniform(-50, 50, (2, 24))
    )
    run = gf.probe(tmp_path, samples, split=gf.KFold(3))
    assert "weights are quantised: bitsandbytes 4 bit, computed in float32" in run.info["warnings"]


@pytest.mark.parametrize(
    ("method", "packages"), [("gptq", "gptqmodel optimum"), ("awq", "gptqmodel accelerate"),
                             ("bitsandbytes", "bitsandbytes accelerate")],
)  # fmt: skip
def test_a_quantised_checkpoint_names_the_packages_that_it_needs(lm, tmp_path, method, packages,
                                                                  monkeypatch):  # fmt: skip
    config = json.loads((lm / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(checkpoint, "find_spec", lambda _: None)
    said = rf"is quantised \({method}\), which needs .*: pip install {packages}$"
    with pytest.raises(ImportError, match=said):
        gf.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "note"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq 4 bit, computed in bfloat16"),
        ({"quant_method": "awq", "w_bit": 3}, "awq 3 bit, computed in bfloat16"),
        ({"quant_method": "fp8"}, "fp8, computed in bfloat16"),
        ({"load_in_8bit": True}, "bitsandbytes 8 bit, computed in float16"),
    ],
)
def test_what_is_said_of_quantised_weights(config, note):
    module = tiny.llama().to(torch.bfloat16)
    module.config.quantization_config = config
    source = hub.Source("somewhere", "model")
    assert checkpoint.notes(source, module) == [f"weights are quantised: {note}"]
    module.config.quantization_config = {"quant_method": "gguf"}
    assert checkpoint.notes(source, module) == []


# ------ GGUF

CHARACTERS = ["<pad>", "<s>", "</s>", "Ġ", "w", *"0123456789", "w1"]
HALVES = {"q_proj": "attn_q", "k_proj": "attn_k"}
LLAMA_CPP = HALVES | {
    "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
    "down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def write_gguf(path, module):
    """Write a Llama as llama.cpp does, matrices in 8 bits, and put what is left of them into it."""
    gguf = pytest.importorskip("gguf")
    config = module.config
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(64)
    w.add_embedding_length(config.hidden_size)
    w.add_block_count(config.num_hidden_layers)
    w.add_feed_forward_length(config.intermediate_size)
    w.add_head_count(config.num_attention_heads)
    w.add_head_count_kv(config.num_key_value_heads)
    w.add_layer_norm_rms_eps(config.rms_norm_eps)
    w.add_rope_freq_base(10000.0)
    w.add_vocab_size(config.vocab_size)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    words = CHARACTERS + [f"<{i}>" for i in range(config.vocab_size - len(CHARACTERS))]
    w.add_token_list(words)
    w.add_token_types([3] * 3 + [1] * (len(words) - 3))
    w.add_token_merges(["w 1"])
    w.add_pad_token_id(0)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, parameter in module.named_parameters():
        *before, what, _ = name.split(".")
        value = parameter.detach().numpy()
        if what in HALVES:
            heads = config.num_attention_heads
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        theirs = f"blk.{before[2]}.{LLAMA_CPP[what]}" if "layers" in before else LLAMA_CPP[what]
        if value.ndim == 1:
            w.add_tensor(f"{theirs}.weight", value)
            continue
        packed = gguf.quants.quantize(value, kind)
        w.add_tensor(f"{theirs}.weight", packed, raw_dtype=kind)
        # Each row is quantised by itself: the order of rows makes no difference.
        own = gguf.quants.quantize(parameter.detach().numpy(), kind)
        parameter.data = torch.from_numpy(gguf.quants.dequantize(own, kind))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def test_a_gguf_file(tmp_path, plain, capfd):
    pytest.importorskip("accelerate")
    module = tiny.llama()
    before = module.model.layers[0].mlp.up_proj.weight.detach().clone()
    write_gguf(tmp_path / "tiny.gguf", module)
    assert not torch.equal(before, module.model.layers[0].mlp.up_proj.weight)
    capfd.readouterr()
    model = gf.load(tmp_path / "tiny.gguf")
    skeleton(tmp_path / "tiny.gguf")
    assert capfd.readouterr().err == ""  # no bar, where no terminal is
    assert (model.name, model.kind, model.dtype) == ("tiny.gguf", "text", torch.float32)
    assert model.notes == ("weights are dequantised from tiny.gguf, computed in float32",)
    assert type(model.module.model.layers[0].mlp.up_proj) is nn.Linear
    assert model.module.config._attn_implementation == "sdpa"
    batch = model.prepare(WORDS[:2])
    assert model.collate.tokenizer.decode(batch["input_ids"][0]) == "w1 w2"
    with gf.capture(model) as rows:
        model.forward(batch)
    with gf.capture(module.model) as expected, torch.no_grad():
        module.model(**batch)
    assert_same(dict(rows), dict(expected), rtol=1e-5, atol=1e-6)
    assert {c.outcome for c in gf.doctor(model, WORDS, only=["repeats", "batch"]).checks} == {
        "pass"
    }
    twin = random_twin(model)
    assert not torch.equal(twin.module.lm_head.weight, model.module.lm_head.weight)


def test_gguf_files_that_are_not_there_or_broken(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none.gguf"):
        gf.load(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"nothing of the kind" * 9)
    with pytest.raises((ValueError, RuntimeError), match=r"bad.gguf|cannot be") as caught:
        gf.load(tmp_path / "bad.gguf")
    assert "\n" not in str(caught.value)


def test_a_gguf_file_on_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "_ask", lambda *what: (asked.append(what), (True, None))[1])
    source = hub.find("someone/model-GGUF:model.Q4_1.gguf")
    assert asked == [("someone/model-GGUF", "model.Q4_1.gguf")]
    assert (source.path, source.gguf) == ("someone/model-GGUF", "model.Q4_1.gguf")
    assert source.name == "model.Q4_1.gguf"
    assert source.options == {"trust_remote_code": False, "gguf_file": "model.Q4_1.gguf"}


# ------ adapters


def lora(folder, out, loader="AutoModelForCausalLM", **changes):
    """Save an adapter that does something: B is not zero."""
    import transformers

    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "up_proj"]
    config = peft.LoraConfig(
        **{"r": 4, "target_modules": targets, "task_type": "CAUSAL_LM"} | changes
    )
    worn = peft.get_peft_model(getattr(transformers, loader).from_pretrained(folder), config)
    for name, parameter in worn.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    worn.save_pretrained(out)
    return worn.eval()


def another(folder, **changes):
    """A tiny Llama of another shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = dict(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=128, vocab_size=100, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**small | changes)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


# peft asks an old torch function, and transformers' old name of checkpointing.
old = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*:DeprecationWarning",
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
)


@pytest.fixture(scope="module")
def adapter(lm):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora(lm, lm.parent / "tuned")
    return lm.parent / "tuned"


@old
def test_an_adapter_on_off_and_merged(lm, plain, adapter):
    on, merged = gf.load(lm, adapter=adapter), gf.load(lm, adapter=adapter, merge=True)
    off, alone = gf.load(lm), gf.load(adapter)
    assert [m.name for m in (on, merged, off, alone)] == [
        "lm + tuned", "lm + tuned (merged)", "lm", "lm + tuned",
    ]  # fmt: skip
    assert on.notes == merged.notes == ()
    assert names(on) == names(merged) == names(off)
    rows = rows_of(on)
    assert_same(rows, rows_of(merged), rtol=1e-5, atol=1e-6)
    assert_same(rows, rows_of(alone), rtol=0, atol=0)
    assert_same(rows_of(off), plain, rtol=0, atol=0)
    assert distance(rows, plain, "lm.layers.2/last") > 0.1
    assert not any("lora" in name for name, _ in merged.module.named_modules())
    for model in (on, merged):
        found = {c.name: c.outcome for c in gf.doctor(model, WORDS).checks}
        assert (found["repeats"], found["batch"], found["hidden_states"]) == (
            "pass",
            "pass",
            "note",
        )


@old
def test_the_twin_of_a_model_with_an_adapter(lm, adapter):
    with pytest.raises(ValueError, match=r"an adapter is on; merge it \(merge=True, --merge"):
        random_twin(gf.load(lm, adapter=adapter))
    merged = gf.load(lm, adapter=adapter, merge=True)
    assert distance(rows_of(random_twin(merged)), rows_of(merged), "lm.layers.2/last") > 0.1


@old
def test_blocks_are_found_inside_what_peft_has_wrapped(lm, plain, adapter):
    import peft
    from transformers import AutoModelForCausalLM

    worn = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(lm), adapter).eval()
    expected = rows_of(gf.load(lm, adapter=adapter))
    by_hand = text_collate(tiny.tokenizer(), worn.get_base_model().model)
    for given in ({"processor": tiny.tokenizer()}, {"prepare": by_hand}):
        model = gf.load(worn, **given)
        assert model.name == "LlamaForCausalLM + adapter"
        assert_same(rows_of(model), expected, rtol=0, atol=0)
    with gf.capture(worn) as rows, torch.no_grad():
        worn(**by_hand(WORDS))
    assert_same(dict(rows), expected, rtol=0, atol=0)


@old
def test_an_adapter_of_the_model_without_its_head(lm, plain, tmp_path):
    bare = lora(lm, tmp_path / "emb", "AutoModel", task_type="FEATURE_EXTRACTION")
    rows = rows_of(gf.load(lm, adapter=tmp_path / "emb"))
    with gf.capture(bare) as expected, torch.no_grad():
        bare(**text_collate(tiny.tokenizer(), bare)(WORDS))
    assert_same(rows, dict(expected), rtol=1e-5, atol=1e-6)


@old
def test_an_adapter_runs_in_the_models_dtype(lm, adapter):
    model = gf.load(lm, adapter=adapter, dtype=torch.bfloat16)
    assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}


@old
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_hidden_layers": 5},
            r"12 tensors are in one and not in the other, the first .*layers.3",
        ),
        (
            {"num_hidden_layers": 2},
            r"6 tensors are in one and not in the other, the first .*layers.2",
        ),
        ({"hidden_size": 32}, r"size mismatch for .*lora_A"),
    ],
)
def test_an_adapter_for_another_model(lm, adapter, tmp_path, changes, message):
    other = another(tmp_path / "other", **changes)
    said = rf"the adapter tuned, made for {lm}, does not fit other: {message}"
    with pytest.raises(ValueError, match=said) as caught:
        gf.load(other, adapter=adapter)
    assert "\n" not in str(caught.value)


@old
def test_adapters_that_do_not_go_on(lm, adapter, tmp_path):
    import peft

    tiny.bloom().save_pretrained(tmp_path / "bloom")
    tiny.tokenizer().save_pretrained(tmp_path / "bloom")
    with pytest.raises(ValueError, match=r"does not fit bloom: Target modules .* not found"):
        gf.load(tmp_path / "bloom", adapter=adapter)
    with pytest.raises(FileNotFoundError, match=r"holds no adapter: it has no adapter_config.json"):
        gf.load(lm, adapter=tmp_path / "bloom")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        gf.load(lm, adapter=tmp_path / "none")
    with pytest.raises(ValueError, match=r"merge=True \(--merge-adapter\) goes with an adapter"):
        gf.load(lm, merge=True)
    with pytest.raises(ValueError, match="is loaded already: leave adapter and merge out"):
        gf.load(gf.load(lm), adapter=adapter, merge=True)
    peft.PromptTuningConfig(
        num_virtual_tokens=2, task_type="CAUSAL_LM", base_model_name_or_path=str(lm)
    ).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="the adapter prompt adds tokens of its own to every text"):
        gf.load(lm, adapter=tmp_path / "prompt")
    with pytest.raises(ValueError, match="no adapter can be put on it"):
        gf.load(lm, adapter=adapter, device_map={"": "disk"})
    own = json.loads((adapter / "adapter_config.json").read_text())
    own["base_model_name_or_path"] = None
    (tmp_path / "nobodys").mkdir()
    (tmp_path / "nobodys" / "adapter_config.json").write_text(json.dumps(own))
    with pytest.raises(ValueError, match="does not say what base_model_name_or_path is"):
        gf.load(tmp_path / "nobodys")
    own["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "nobodys" / "adapter_config.json").write_text(json.dumps(own))
    with pytest.raises(
        FileNotFoundError, match=r"there is no folder .*gone. The adapter .*nobodys"
    ):
        gf.load(tmp_path / "nobodys")


def rewrite(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SPOILED = {
    "not JSON": lambda f: (f / CONFIG).write_text("{not json"),
    "a list": lambda f: (f / CONFIG).write_text("[]"),
    "of an unknown type": lambda f: rewrite(f, peft_type="NOPE"),
    "of an unknown task": lambda f: rewrite(f, task_type="NOPE"),
    "of odd targets": lambda f: rewrite(f, target_modules=3),
    "weights cut off": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:99]),
    "no weights": lambda f: (f / WEIGHTS).unlink(),
    "pickled": lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
}
SAID = {
    "not JSON": rf"tuned/{CONFIG} cannot be read \(Expecting .*\): fetch or save the adapter again",
    "a list": rf"tuned/{CONFIG} cannot be read \(it holds a list, not an object\): fetch or save",
    "of an unknown type": rf"{CONFIG} cannot be used by peft .* no peft_type 'NOPE': upgrade peft",
    "of an unknown task": rf"{CONFIG} cannot be used by peft .*Invalid task type: 'NOPE'",
    "of odd targets": "does not fit lm: 'int' object is not .*; put it on the model that it was",
    "weights cut off": rf"tuned/{WEIGHTS} cannot be loaded: .*\(SafetensorError\); fetch or save",
    "no weights": rf"tuned has {CONFIG}, but no {WEIGHTS} or adapter_model.bin: fetch or save",
    "pickled": r"tuned/adapter_model.bin cannot be loaded: .*\(UnpicklingError\); fetch or save",
}


@old
@pytest.mark.parametrize("how", SPOILED)
def test_a_broken_adapter_is_one_sentence(lm, adapter, tmp_path, how):
    shutil.copytree(adapter, tmp_path / "tuned")
    SPOILED[how](tmp_path / "tuned")
    with pytest.raises((ValueError, RuntimeError), match=SAID[how]) as caught:
        gf.load(lm, adapter=tmp_path / "tuned")
    assert "\n" not in str(caught.value)


@old
def test_an_adapter_of_another_kind_of_model(adapter, tmp_path):
    folder = families.save(families.vit, tmp_path / "vit")
    said = "the adapter tuned, made for .*, does not fit vit: .*; put it on the model that it was"
    with pytest.raises(ValueError, match=said):
        gf.load(folder, adapter=adapter)


@old
@pytest.mark.filterwarnings("ignore:Merge lora module:UserWarning")
def test_an_adapter_on_quantised_weights(lm, adapter, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(
        lm, quantization_config=bits(4), dtype=torch.float32
    ).save_pretrained(tmp_path / "lm")
    tiny.tokenizer().save_pretrained(tmp_path / "lm")
    exact = rows_of(gf.load(lm, adapter=adapter))
    off = rows_of(gf.load(tmp_path / "lm"))
    quantised = "weights are quantised: bitsandbytes 4 bit, computed in float32"
    again = "the sum of the weights and the adapter tuned is quantised again"
    for merge, notes in ((False, (quantised,)), (True, (quantised, again))):
        model = gf.load(tmp_path / "lm", adapter=adapter, merge=merge)
        assert model.notes == notes
        rows = rows_of(model)
        assert distance(rows, off, "lm.layers.2/last") > 1
        assert distance(rows, exact, "lm.layers.2/last") < 0.4


@old
def test_an_adapter_with_another_name_for_its_base_is_told(lm, adapter, tmp_path):
    other = another(tmp_path / "sibling")
    model = gf.load(other, adapter=adapter)
    assert model.notes == (f"the adapter tuned was made for {lm}, not for sibling",)


@old
def test_a_folder_with_a_model_and_an_adapter_is_refused(lm, tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    lora(lm, tmp_path)
    for take in (gf.load, skeleton):
        said = r"holds a model and an adapter: put the adapter's files"
        with pytest.raises(ValueError, match=said):
            take(tmp_path)


def test_without_peft(lm, adapter, monkeypatch):
    from geofast.models import adapters

    monkeypatch.setattr(adapters, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"the adapter tuned needs peft: pip install peft"):
        gf.load(lm, adapter=adapter)


@old
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("family", [families.llava, families.qwen2_5_vl])
def test_a_model_that_talks_about_images_with_an_adapter_and_off_the_disk(family, tmp_path):
    """Its vision tower and its language model are adapted, and called by different methods."""
    base = families.save(family, tmp_path / "base")
    lora(base, tmp_path / "tuned", "AutoModelForImageTextToText", target_modules="all-linear")
    image = [Image.new("RGB", (40, 50), "red"), Image.new("RGB", (60, 40), "blue")]
    off = rows_of(gf.load(base), image)
    on = rows_of(gf.load(base, adapter=tmp_path / "tuned"), image)
    merged = rows_of(gf.load(base, adapter=tmp_path / "tuned", merge=True), image)
    assert_same(on, merged, rtol=1e-4, atol=1e-5)
    for key in ("vision.layers.2", "lm.layers.2/last"):
        key = next(k for k in off if k.startswith(key))
        assert distance(on, off, key) > 0.01
    away = gf.load(base, device_map={"": "disk"})
    assert away.device == torch.device("cpu")
    assert_same(rows_of(away, image), off, rtol=1e-5, atol=1e-6)


def test_an_adapter_on_the_hub(lm, adapter, monkeypatch):
    """The id of an adapter alone: its repository has no config.json."""
    import huggingface_hub

    from geofast.models.load import base_and_adapter

    asked = []

    def ask(repository, file):
        asked.append((repository, file))
        return file == "adapter_config.json", None

    monkeypatch.setattr(hub, "_ask", ask)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(adapter))
    source, worn = base_and_adapter("some/adapter", hub.find("some/adapter"), None)
    assert asked == [("some/adapter", "config.json"), ("some/adapter", "adapter_config.json")]
    assert (source.path, source.name, worn.name, worn.base) == (
        str(lm), "lm", "some/adapter", str(lm)
    )  # fmt: skip


# ------ modules with a processor


@pytest.mark.parametrize(
    "family", [families.vit, families.bert, families.clip, families.llava, families.qwen2_5_vl]
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_module_with_its_processor_is_what_its_checkpoint_is(family, tmp_path):
    model = gf.load(families.save(family, tmp_path))
    torch.manual_seed(0)
    module, processor = family()
    own = gf.load(module, processor=processor)
    assert own.name == type(module).__name__
    r = np.random.default_rng(0)
    image = Image.fromarray(r.integers(0, 255, (40, 50, 3), dtype=np.uint8))
    for kind, inputs in (("image", [image]), ("text", WORDS)):
        if kind in {m.kind for m in (model, model.other) if m}:
            expected = rows_of(model.reading(kind), inputs)
            assert_same(rows_of(own.reading(kind), inputs), expected, rtol=1e-5, atol=1e-6)
    if model.prompts:
        assert own.asking(["w1"]).prompts == ("w1",)


@pytest.mark.parametrize(
    ("make", "processor", "message"),
    [
        (tiny.llama, families.vit()[1], "its tokenizer for this model; got ViTImageProcessorPil"),
        (tiny.vit, tiny.tokenizer(), "its image processor for this model; got"),
        (tiny.clip, tiny.tokenizer(), "an image processor with a tokenizer for this model"),
    ],
)
def test_a_processor_for_other_inputs(make, processor, message):
    with pytest.raises(ValueError, match=message):
        gf.load(make(), processor=processor)


def test_how_a_module_is_fed():
    with pytest.raises(ValueError, match=r"needs prepare=, .* or processor=, the Hugging Face"):
        gf.load(tiny.llama())
    with pytest.raises(ValueError, match="both make the module's inputs: give one"):
        gf.load(tiny.llama(), prepare=list, processor=tiny.tokenizer())


def test_a_module_that_masks_is_refused_until_it_does_not(lm):
    module, processor = families.vit_mae()
    with pytest.raises(ValueError, match=r"hides random patches: set its config.mask_ratio to 0"):
        gf.load(module, processor=processor)
    module.config.mask_ratio = 0.0
    assert "masking is off" in gf.load(module, processor=processor).notes[0]
    with pytest.raises(ValueError, match=r"processor= goes with an nn.Module"):
        gf.load(lm, processor=processor)


# ------ the Hub


def refuse(monkeypatch, error):
    import huggingface_hub

    def ask(url):
        assert url == "https://huggingface.co/some/model/resolve/main/config.json"
        raise error

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)


def answered(kind, status):
    from huggingface_hub import errors

    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return getattr(errors, kind)("no", response=response)


@pytest.mark.parametrize(
    ("kind", "raised", "message"),
    [
        ("GatedRepoError", PermissionError,
         r"some/model is gated: ask for access at https://huggingface.co/some/model, then log in "),
        ("RepositoryNotFoundError", FileNotFoundError,
         "some/model is not a local folder, and the Hugging Face Hub has no model of that name"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses(monkeypatch, kind, raised, message):
    refuse(monkeypatch, answered(kind, 401))
    with pytest.raises(raised, match=message):
        gf.load("some/model")


def test_weights_that_are_gated(monkeypatch):
    """The Hub may show the configuration to everybody, and the weights only to some."""
    source = hub.Source("some/model", "model")
    error = OSError("You are trying to access a gated repo.")
    error.__cause__ = answered("GatedRepoError", 403)
    with pytest.raises(PermissionError, match="is gated"), hub.reading("weights", source):
        raise error


def test_no_network_is_told_at_once():
    script = (
        "import time, geofast as gf, transformers\n"
        "start = time.time()\n"
        "try: gf.load('some/model')\n"
        "except ConnectionError as error: print(time.time() - start, error)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False,
        env=environment | {"HF_ENDPOINT": "http://127.0.0.1:9"},
    )  # fmt: skip
    seconds, _, said = done.stdout.partition(" ")
    assert float(seconds) < 15, done.stderr  # transformers alone: 24
    assert said.startswith("some/model is neither a local folder nor in the Hub's cache, and")
    assert "cannot be reached" in said


def test_offline_on_purpose(monkeypatch):
    from huggingface_hub import constants, errors

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuse(monkeypatch, errors.OfflineModeIsEnabled("no"))
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set: unset it, or fetch"):
        gf.load("some/model")


def test_a_model_of_the_cache_needs_no_network(lm, plain, tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0" * 40
    repository = tmp_path / "models--some--model"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "snapshots" / commit).symlink_to(lm)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refuse(monkeypatch, answered("HfHubHTTPError", 503))
    start = time.time()
    model = gf.load("some/model")
    assert time.time() - start < 15  # a wait for the Hub would take 23
    assert model.notes == ("the Hugging Face Hub was not reached: the model is the cache's",)
    assert_same(rows_of(model), plain, rtol=0, atol=0)


def test_a_bug_of_ours_is_no_missing_network(monkeypatch):
    refuse(monkeypatch, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        gf.load("some/model")


def test_names_that_no_repository_can_have():
    with pytest.raises(FileNotFoundError, match="it is no name on the Hugging Face Hub"):
        gf.load("some model")


def test_weights_that_do_not_fit_into_memory(lm, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(checkpoint, "_weights", full)
    with pytest.raises(
        RuntimeError, match=r"the weights of .*lm do not fit into memory: device_map"
    ):
        gf.load(lm)


# ------ code of the checkpoint's own

OWN = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class OwnConfig(PretrainedConfig):
    model_type = "nobodys"


class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(100, 8)
        layers = [nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(layers)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        hidden = self.words(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Returns a checkpoint that brings its code, with so many blocks."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def make(depth):
        from safetensors.torch import save_file

        folder = tmp_path / f"own{depth}"
        folder.mkdir()
        (folder / f"own{depth}.py").write_text(OWN)
        config = {
            "model_type": "nobodys", "depth": depth, "architectures": ["OwnModel"],
            "auto_map": {f"Auto{part}": f"own{depth}.Own{part}" for part in ("Config", "Model")},
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        weights = {"words.weight": torch.randn(100, 8)}
        for i in range(depth):
            weights |= {
                f"blocks.{i}.0.weight": torch.randn(8, 8), f"blocks.{i}.0.bias": torch.randn(8),
                f"blocks.{i}.1.weight": torch.ones(8), f"blocks.{i}.1.bias": torch.zeros(8),
            }  # fmt: skip
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        tiny.tokenizer().save_pretrained(folder)
        return folder

    return make


def test_code_of_a_checkpoint_runs_when_it_is_trusted(own, monkeypatch):
    folder = own(3)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is there to answer"))
    said = r"brings Python code of its own, .* trust_remote_code=True \(--trust-remote-code\)"
    with pytest.raises(ValueError, match=said):
        gf.load(folder)
    model = gf.load(folder, trust_remote_code=True)
    assert type(model.module).__name__ == "OwnModel"
    rows = rows_of(model)
    assert list(rows) == ["text.embed/mean:text", *(f"text.layers.{i}/mean:text" for i in range(3))]


def test_a_model_whose_blocks_are_not_found_says_how_to_name_them(own):
    with pytest.raises(
        ValueError, match=r"no residual blocks found in OwnModel: looked for"
    ) as caught:
        gf.load(own(0), trust_remote_code=True)
    assert "geofast_towers" in str(caught.value)


def test_sites_that_are_named_by_hand():
    """What the error advises."""
    from geofast.models import Tower

    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def geofast_towers(self):
            blocks = (self.first, self.second)
            return (Tower("vision", "first, second", blocks, None, (), "patch"),)

        def forward(self, x):
            return self.second(self.first(x))

    model = gf.load(Loose(), prepare=lambda x: {"x": torch.stack(x)})
    x = torch.randn(2, 3, 4)
    with gf.capture(model, pool="mean") as rows:
        model.forward(model.prepare(list(x)))
    torch.testing.assert_close(rows["vision.embed/mean"], x.mean(1))
    expected = model.module.first(x).mean(1).detach()
    torch.testing.assert_close(rows["vision.layers.0/mean"], expected)


# ------ what a pass leaves alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    """A sum in the model's own dtype would lose what single tokens add to it."""
    module = tiny.llama().to(dtype)
    model = gf.load(module, processor=tiny.tokenizer())
    states = []
    watch = model.sites("lm.layers.1")[0].watch(states.append)
    text = " ".join(f"w{i}" for i in range(60))
    with gf.capture(model, "lm.layers.1", "mean") as rows:
        model.forward(model.prepare([text]))
    watch.remove()
    assert states[0].dtype == dtype
    exact = states[0].double().mean(1)
    torch.testing.assert_close(rows["lm.layers.1/mean"].double(), exact, rtol=1e-6, atol=1e-7)
    narrow = functools.reduce(torch.add, states[0][0]) / torch.tensor(60, dtype=dtype)
    assert (narrow.double() - exact).abs().max() > 1e-6


@pytest.mark.parametrize("family", [families.vit, families.llava])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_attention_stays_what_it_is(family, tmp_path):
    model = gf.load(families.save(family, tmp_path))
    image = Image.new("RGB", (40, 40), "red")
    kinds = {m.config._attn_implementation for m in model.module.modules() if hasattr(m, "config")}
    assert kinds == {"sdpa"}
    calls = []
    real = nn.functional.scaled_dot_product_attention

    def counted(*args, **more):
        calls.append(1)
        return real(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", counted)
        rows_of(model, [image])
    assert len(calls) >= sum(len(t.blocks) for t in model.towers)
    after = {m.config._attn_implementation for m in model.module.modules() if hasattr(m, "config")}
    assert after == kinds


# ------ the command, and probes


@old
def test_the_command_takes_what_load_takes(lm, adapter, own, capsys):
    from geofast.cli import main

    assert main(["sites", str(lm), "--adapter", str(adapter)]) == 0
    assert capsys.readouterr().out.startswith("lm + tuned: text in, float32")
    assert main(["sites", str(adapter), "--merge-adapter", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.startswith("lm + tuned (merged): text in, bfloat16")
    assert main(["sites", str(lm), "--device-map", "auto"]) == 0
    capsys.readouterr()
    assert main(["doctor", str(lm), "--adapter", str(adapter)]) == 0
    assert capsys.readouterr().out.startswith("lm + tuned: all is well")
    folder = own(2)
    assert main(["sites", str(folder)]) == 1
    assert "allow it with trust_remote_code=True (--trust-remote-code)" in capsys.readouterr().err
    assert main(["sites", str(folder), "--trust-remote-code"]) == 0
    with pytest.raises(SystemExit):
        main(["doctor", str(lm), "--device", "cpu", "--device-map", "auto"])
    assert "--device-map: not allowed with argument --device" in capsys.readouterr().err


@old
def test_a_probe_of_an_adapter_spread_by_a_device_map(lm, adapter, tmp_path, capsys):
    from geofast.cli import main

    r = np.random.default_rng(0)
    places = r.uniform(-50, 50, (24, 2))
    lines = [f"w{i} w{i + 1},{a},{b}" for i, (a, b) in enumerate(places)]
    (tmp_path / "places.csv").write_text("\n".join(["name,latitude,longitude", *lines]))
    asked = ["probe", str(lm), str(tmp_path / "places.csv"), "--text", "name", "--folds", "3"]
    out = tmp_path / "run"
    more = ["--adapter", str(adapter), "--merge-adapter", "--device-map", "auto", "--out", str(out)]
    assert main([*asked, *more]) == 0
    run = gf.open(out)
    assert run.info["model"] == "lm + tuned (merged)"
    samples = gf.data.read(tmp_path / "places.csv", text="name")
    other = gf.probe(lm, samples, split=gf.KFold(3), adapter=adapter, device_map="auto")
    assert other.info["model"] == "lm + tuned"
    np.testing.assert_allclose(run.layers["r2"], other.layers["r2"], rtol=1e-3, atol=1e-4)
    off = gf.probe(lm, samples, split=gf.KFold(3))
    assert abs(off.layers["r2"].to_numpy() - other.layers["r2"].to_numpy())[1:].min() > 1e-3
    disk = gf.probe(lm, samples, split=gf.KFold(3), device_map={"": "disk"})
    np.testing.assert_allclose(disk.layers["r2"], off.layers["r2"])
    assert "device_map keeps parts of the model on disk" in disk.info["warnings"]
    assert disk.info["device"] == "cpu"


@pytest.mark.parametrize(
    "model",
    ["some/model", "no/such/folder", "{lm}:broken"],
    ids=["no network", "no folder", "code"],
)
def test_nothing_is_written_where_a_model_is_refused(lm, own, tmp_path, monkeypatch, capsys, model):
    from geofast.cli import main

    refuse(monkeypatch, answered("HfHubHTTPError", 503))
    where = str(own(2)) if model == "{lm}:broken" else model
    (tmp_path / "places.csv").write_text(
        "name,latitude,longitude\n" + "\n".join(f"w{i},{i},{i * i % 7}" for i in range(12))
    )
    out = tmp_path / "below" / "run"
    before = sorted(tmp_path.iterdir())
    asked = ["probe", where, str(tmp_path / "places.csv"), "--text", "name", "--out", str(out)]
    assert main(asked) == 1
    told, said = capsys.readouterr().err.splitlines()
    assert told == f"loading {where} ..."
    assert said.startswith("geofast: ")
    assert sorted(tmp_path.iterdir()) == before


def test_where_a_checkpoint_of_the_hub_came_from(monkeypatch):
    from geofast.models.load import _whence

    def whence(text, config):
        return _whence(hub.find(text), config, None, False)

    config = SimpleNamespace(_commit_hash="0123abcd")
    for folder in (None, "/cache/models--some--model/snapshots/0123abcd"):
        monkeypatch.setattr(hub, "_ask", lambda *_, folder=folder: (True, folder))
        assert whence("some/model", config) == "some/model@0123abcd"
        assert whence("some/model", SimpleNamespace()) == "some/model"
        assert whence("some/model:a.gguf", config) == "some/model:a.gguf@0123abcd"


@old
def test_where_a_folder_and_its_adapter_are(lm, adapter, monkeypatch):
    import huggingface_hub

    monkeypatch.chdir(lm.parent)
    assert gf.load("lm").source == str(lm)
    assert gf.load("lm", adapter="tuned").source == f"{lm} + {adapter}"
    assert gf.load("tuned", merge=True).source == f"{lm} + {adapter} (merged)"
    fetched = lm.parent / "models--some--tuned" / "snapshots" / "0123abcd"
    shutil.copytree(adapter, fetched)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(fetched))
    for folder in (None, str(fetched)):  # there and fetched, or of the cache because nobody answers
        monkeypatch.setattr(hub, "_ask", lambda *_, folder=folder: (True, folder))
        assert gf.load(lm, adapter="some/tuned").source == f"{lm} + some/tuned@0123abcd"


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("open_clip:ViT-B-32/openai", "open_clip:ViT-B-32/openai"),
        ("open_clip:ViT-B-32/mine.pt", "open_clip:ViT-B-32/{here}/mine.pt"),
        ("open_clip:hf-hub:some/model", "open_clip:hf-hub:some/model"),
        ("open_clip:local-dir:mine", "open_clip:local-dir:{here}/mine"),
        ("timm:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224"),
        ("timm:local-dir:mine", "timm:local-dir:{here}/mine"),
        ("location:geoclip", "location:geoclip"),
        ("location:satclip:mine.pt", "location:satclip:{here}/mine.pt"),
    ],
)
def test_where_a_model_of_another_library_is(name, source, tmp_path, monkeypatch):
    made, asked = gf.load(tiny.llama(), processor=tiny.tokenizer()), []
    load = import_module("geofast.models.load")
    monkeypatch.setattr(load.zoo, "load", lambda *what: (asked.append(what[1]), made)[1])
    monkeypatch.setattr(load, "load_location", lambda *what: (asked.append(what[0]), made)[1])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine.pt").touch()
    (tmp_path / "some" / "model").mkdir(parents=True)  # which is not meant by hf-hub:
    monkeypatch.chdir(tmp_path)
    assert gf.load(name).source == source.format(here=tmp_path)
    assert asked == [name.partition(":")[2]]  # as it was given
