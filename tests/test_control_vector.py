"""Control vectors, read back as llama.cpp reads them: `direction.<n>` is added after block n."""

from contextlib import ExitStack

import families
import numpy as np
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType, GGUFReader

import geofast as gf
from geofast.steering.control_vector import save_control_vector


@pytest.fixture(scope="module")
def model():
    return gf.load(tiny.llama(4), processor=tiny.tokenizer())


def direction(seed=0, width=32):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adding(sites, amount=2.0, **options):
    options = {"role": "all", "phase": "both"} | options
    return gf.add(sites, options.pop("along", direction()), amount, 1.5, **options)


def as_llama_cpp_reads(path):
    """Follow common_control_vector_load_one and llama_adapter_cvec::apply: by block, from 0."""
    buffer, width = {}, None
    for tensor in GGUFReader(path).tensors:
        head, _, number = tensor.name.partition(".")
        assert head == "direction"
        assert int(number) > 0
        assert tensor.tensor_type == GGMLQuantizationType.F32
        assert len(tensor.shape) == 1
        assert width in (None, len(tensor.data))
        width = len(tensor.data)
        buffer[width * (int(number) - 1)] = tensor.data  # "layer 1 at [0]"
    return {1 + offset // width: torch.from_numpy(data.copy()) for offset, data in buffer.items()}


def logits(model, ids):
    with torch.no_grad():
        return model.module(input_ids=ids).logits


def test_llama_cpp_adds_what_the_edits_add(model, tmp_path):
    edits = [adding("lm.layers.[12]"), adding("lm.layers.2", -0.5, along=direction(1))]
    save_control_vector(edits, tmp_path / "there.gguf", model)
    blocks = as_llama_cpp_reads(tmp_path / "there.gguf")
    assert sorted(blocks) == [1, 2]
    ids = torch.randint(2, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    with model.edited(edits):
        expected = logits(model, ids)
    with ExitStack() as hooks:
        for i, added in blocks.items():
            block = model.module.model.layers[i]
            hooks.callback(
                block.register_forward_hook(lambda _m, _a, out, added=added: out + added).remove
            )
        found = logits(model, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (logits(model, ids) - expected).abs().max() > 0.01


def test_the_file_has_the_keys_and_bytes_of_a_control_vector(model, tmp_path):
    path = tmp_path / "there.gguf"
    save_control_vector(adding("lm.layers.3", dims=[4, 9]), path, model)
    raw = path.read_bytes()
    assert raw[:4] == b"GGUF"
    reader = GGUFReader(path)
    fields = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    assert fields == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 1,
    }
    (tensor,) = reader.tensors
    assert tensor.name == "direction.3"
    expected = np.zeros(32, np.float32)
    unit = direction()[[4, 9]] / direction()[[4, 9]].norm()
    expected[[4, 9]] = (unit * 2.0 * 1.5).float().numpy()
    assert tensor.data.tobytes() == expected.tobytes()
    assert expected.tobytes() in raw


def test_the_language_model_of_one_that_sees(tmp_path):
    model = gf.load(str(families.save(families.llava, tmp_path / "llava")))
    save_control_vector(adding("lm.layers.1"), tmp_path / "there.gguf", model)
    reader = GGUFReader(tmp_path / "there.gguf")
    hint = reader.fields["controlvector.model_hint"].contents()
    assert hint == model.module.config.text_config.model_type
    with pytest.raises(ValueError, match="language model's residual stream"):
        save_control_vector(adding("vision.layers.1", phase="both"), tmp_path / "no.gguf", model)


def probe():
    coef = torch.stack([direction(1), direction(2)], 1)
    return gf.Probe(
        "lm.layers.1", "last", "", ("latitude", "longitude"), 1.0, coef, torch.zeros(2).double()
    )


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: gf.set_to(probe(), 10, 20), "what Edit.set at lm.layers.1.* adds depends"),
        (lambda: gf.ablate(probe()), "adds depends on what it finds"),
        (lambda: adding("lm.layers.1", [1.0, 2.0]), "has values for several samples"),
        (lambda: adding("lm.layers.1", role="last"), "make it with role='all', phase='both'"),
        (lambda: adding("lm.layers.1", phase="prompt"), "make it with role='all', phase='both'"),
        (lambda: adding("lm.layers.1.attn"), "residual stream .*, not to lm.layers.1.attn"),
        (lambda: adding("lm.embed"), "not to lm.embed"),
        (lambda: adding("lm.norm"), "not to lm.norm"),
        (lambda: adding("lm.layers.*"), "cannot reach lm.layers.0"),
        (lambda: adding("lm.layers.9"), "no site matches 'lm.layers.9'"),
        (lambda: adding("lm.layers.1", model="another"), "was made for another"),
        (list, "no edit"),
        (lambda: adding("lm.layers.1", along=direction(0, 8)), "for 8 dimensions, and .* has 32"),
    ],
)
def test_what_a_control_vector_cannot_hold_is_refused(model, tmp_path, make, reason):
    path = tmp_path / "there.gguf"
    with pytest.raises(ValueError, match=reason):
        save_control_vector(make(), path, model)
    assert not path.exists()


def test_states_of_other_inputs_are_refused(model, tmp_path):
    taken = gf.states(model, ["w1 w2"], "lm.layers.1")
    for edit in (gf.swap(taken), gf.patch(taken)):
        with pytest.raises(ValueError, match="depends on what it finds"):
            save_control_vector(edit, tmp_path / "there.gguf", model)
