from pathlib import Path
from types import SimpleNamespace

import families
import numpy as np
import pytest
import tiny
import torch
from torch import nn

import geofast as gf
from geofast.doctor import example, quick
from geofast.models.inputs import text_collate
from geofast.models.twin import random_twin

ROOT = Path(__file__).parents[1]
WORDS = ["w1 w2", "w3", "w4 w5 w6 w7"]
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def language(**changes):
    module = tiny.llama()
    return gf.load(module, prepare=text_collate(tiny.tokenizer(), module.model), **changes)


def outcome(model, name, examples=WORDS):
    (check,) = gf.doctor(model, examples, only=[name]).checks
    return check


def test_a_sound_model_passes():
    diagnosis = gf.doctor(language(), WORDS)
    found = {c.name: c.outcome for c in diagnosis.checks}
    assert found == {
        "repeats": "pass", "batch": "pass", "padding": "pass", "hidden_states": "note",
        "roles": "skip", "dtype": "skip", "weights": "fail",
    }  # fmt: skip
    assert not diagnosis.ok  # nobody trained it
    text = str(diagnosis)
    assert "NOT to be trusted" in text
    assert "-> nobody has trained this model" in text
    assert "lm.layers.2: theirs is after the final norm" in text


def test_chance_is_seen():
    model = language()
    layer = model.module.model.layers[1].mlp
    layer.register_forward_hook(lambda _m, _a, out: nn.functional.dropout(out, 0.1, training=True))
    check = outcome(model, "repeats")
    assert check.outcome == "fail"
    assert "lm.layers." in check.detail
    assert "switch it off" in check.advice
    assert [c.outcome for c in quick(model, WORDS)] == ["fail", "fail"]


def test_a_model_that_mixes_its_samples():
    model = language()
    layer = model.module.model.layers[1].mlp
    layer.register_forward_hook(lambda _m, _a, out: out + 10 * out.mean(0, keepdim=True))
    check = outcome(model, "batch")
    assert check.outcome == "fail"
    assert "use batch_size=1" in check.advice
    assert outcome(model, "repeats").outcome == "pass"
    assert [c.outcome for c in quick(model, WORDS)] == ["pass", "fail"]
    assert [c.name for c in quick(model, WORDS, batched=False)] == ["repeats"]
    samples = gf.data.from_arrays(WORDS * 4, np.arange(12), np.arange(12))
    with pytest.raises(ValueError, match=r"fails the check 'batch': .* \(--unchecked\) goes on"):
        gf.probe(model, samples, split=gf.KFold(3))
    for told in ({"check": False}, {"batch_size": 1}):
        assert len(gf.probe(model, samples, split=gf.KFold(3), **told).layers)


def test_positions_that_padding_moves():
    module = tiny.gpt2()
    model = gf.load(module, prepare=text_collate(tiny.tokenizer(), module))
    check = outcome(model, "padding")
    assert check.outcome == "note"
    assert "geofast pads on the right" in check.detail


def test_hooks_at_another_place_than_the_hidden_states():
    model = language()
    body = model.body
    true = body.forward

    def shifted(*args, **given):
        out = true(*args, **given)
        if out.hidden_states is None:
            return out
        first, *rest = out.hidden_states
        return SimpleNamespace(hidden_states=(first + 1, *rest))

    body.forward = shifted
    check = outcome(model, "hidden_states")
    assert check.outcome == "fail"
    assert "the first lm.embed" in check.detail


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    return gf.load(families.save(families.qwen2_5_vl, tmp_path_factory.mktemp("talking")))


def test_tokens_of_images_that_are_taken_for_others(talking, monkeypatch):
    (check, _) = gf.doctor(talking, only=["roles"]).checks
    assert check.outcome == "pass"
    assert check.detail.startswith("64, 60, 60 image tokens")
    from geofast.models import layout

    def all_but_the_last(site, tower, tokens, call):
        roles = true(site, tower, tokens, call)
        roles[:, -8:] |= 16
        return roles

    true = layout._roles
    monkeypatch.setattr(layout, "_roles", all_but_the_last)
    (check, _) = gf.doctor(talking, only=["roles"]).checks
    assert check.outcome == "fail"


def test_the_noise_of_narrow_numbers():
    check = outcome(language(dtype=torch.bfloat16), "dtype")
    assert check.outcome == "pass"
    assert 1e-4 < float(check.detail.split()[2]) < 0.1


def test_weights_that_somebody_trained():
    model = language()
    for p in model.module.parameters():
        p.data *= 1.5
    assert outcome(model, "weights").outcome == "pass"


def test_the_twin_is_drawn_as_the_class_draws():
    model = language()
    before = torch.random.get_rng_state()
    twin, other = random_twin(model, 3), random_twin(model, 4)
    assert torch.equal(before, torch.random.get_rng_state())
    name = "model.layers.0.mlp.up_proj.weight"
    mine, theirs = model.module.get_parameter(name), twin.module.get_parameter(name)
    assert not torch.equal(mine, theirs)
    assert not torch.equal(theirs, other.module.get_parameter(name))
    torch.testing.assert_close(mine.std(), theirs.std(), rtol=0.1, atol=0)
    with gf.capture(twin) as rows:
        twin.forward(twin.prepare(WORDS))
    with gf.capture(model) as own:
        model.forward(model.prepare(WORDS))
    assert not torch.allclose(rows["lm.layers.2/last"], own["lm.layers.2/last"])

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

    blocks = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), Own()) for _ in range(2)])
    with pytest.raises(ValueError, match=r"0.1.weight of Sequential does not say how it is drawn"):
        random_twin(gf.load(blocks, prepare=torch.stack))


def test_the_examples_differ_in_size():
    assert len({image.size for image in example("image")}) == 3


def test_the_page_of_families_is_what_the_checks_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import families_page

    made, lacking = families_page.table()
    written = (ROOT / "docs" / "families.md").read_text()
    for name in lacking:
        written = "".join(
            line for line in written.splitlines(True) if not line.startswith(f"| {name} |")
        )
    assert made == written
    assert "fail" not in made
