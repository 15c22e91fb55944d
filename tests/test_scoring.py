"""Arms of edits and given answers, against one sample at a time that runs whole without a cache."""

import families
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import geofast as gf
from geofast.steering import asking, scoring
from geofast.steering.generation import generate_arms
from geofast.steering.scoring import answer_ids, follow, score

SITE = "lm.layers.1"
INPUTS = ["w1 w2 w3", "w6 w9", "w1 w2 w3", "w7 w8 w9 w4"]
ANSWERS = ["w5 w4", "w9", "w10 w11 w12", "w3"]
DIMS = torch.arange(0, 32, 3)


def language(make=tiny.llama):
    module = make()
    module.generation_config.eos_token_id = None
    return gf.load(module, processor=tiny.tokenizer())


def edits_of(width=32):
    direction = torch.randn(width, generator=torch.Generator().manual_seed(1))
    return {
        phase: gf.add(SITE, direction, [3.0, -3.0, 9.0, 1.0], 1.0, phase=phase)
        for phase in ("prompt", "steps", "both")
    }


def alone(model, edit, row):
    """Log-probabilities [tokens, vocab] before each token of one answer; no cache."""
    tokenizer = model.collate.tokenizer
    prompt, answer = (
        tokenizer(t, add_special_tokens=False)["input_ids"] for t in (INPUTS[row], ANSWERS[row])
    )

    def hook(_module, _args, hidden):
        hidden = hidden.clone()
        first = len(prompt) - 1 if edit.phase != "steps" else len(prompt)
        last = len(prompt) if edit.phase == "prompt" else hidden.shape[1]
        hidden[:, first:last, edit.dims] += edit.values[0, row].float()
        return hidden

    handle = model.module.model.layers[1].register_forward_hook(hook) if edit else None
    with torch.no_grad():
        logits = model.module(torch.tensor([prompt + answer])).logits[0]
    if handle:
        handle.remove()
    return logits[len(prompt) - 1 : -1].log_softmax(1), answer


@pytest.mark.parametrize("phase", ["prompt", "steps", "both"])
def test_scores_are_those_of_one_sample_without_a_cache(phase):
    model, edit = language(), edits_of()[phase]
    bare, edited = score(model, INPUTS, ANSWERS, [[], [edit]], kl=True, batch_size=3)
    assert bare.counts.tolist() == [2, 1, 3, 1]
    assert not bare.kl.any()
    for row in range(4):
        before, answer = alone(model, None, row)
        after, _ = alone(model, edit, row)
        n = len(answer)
        at = torch.arange(n), torch.tensor(answer)
        torch.testing.assert_close(bare.log_prob[row, :n].float(), before[at], atol=2e-5, rtol=0)
        torch.testing.assert_close(edited.log_prob[row, :n].float(), after[at], atol=2e-5, rtol=0)
        kl = (before.exp() * (before - after)).sum(1)
        torch.testing.assert_close(edited.kl[row, :n].float(), kl, atol=2e-5, rtol=1e-3)
        assert edited.log_prob[row, n:].tolist() == [0] * (3 - n)
        mean = float(-after[at].mean())
        assert float(edited.perplexity[row]) == pytest.approx(np.exp(mean), rel=1e-4)
    assert (edited.kl[1, 0] == 0) == (phase == "steps")


def test_every_distinct_prompt_is_read_once_for_all_arms():
    model, edits = language(), edits_of()
    arms = [[], [edits["prompt"]], [edits["both"]]]
    asking.looks_ahead(model, INPUTS[0])  # tried once
    lengths = []
    handle = model.body.register_forward_pre_hook(
        lambda _m, _a, given: lengths.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    said = generate_arms(model, INPUTS, arms, batch_size=4, max_new_tokens=3)
    handle.remove()
    assert lengths == [(3, 3)] + [(4, 1)] * 9
    for texts, arm in zip(said, arms, strict=True):
        one = [
            model.generate([text], [e.take([row]) for e in arm], max_new_tokens=3)[0]
            for row, text in enumerate(INPUTS)
        ]
        assert texts == one


def test_what_comes_before_the_last_token_is_read_with_its_edit():
    model = language()
    early = gf.add(SITE, torch.ones(32), 4.0, 1.0, role="all")
    said = generate_arms(model, INPUTS, [[], [early]], max_new_tokens=3)
    assert said[1] == [model.generate([text], [early], max_new_tokens=3)[0] for text in INPUTS]
    assert said[0] != said[1]


def pictures(n):
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 255, (32, 32 * (1 + i % 2), 3), np.uint8))
        for i in range(n)
    ]


@pytest.mark.parametrize(
    "family", [families.llava, families.qwen2_vl, families.qwen2_5_vl, families.gemma3]
)
def test_images_are_looked_at_once_and_say_what_they_say_alone(family, monkeypatch):
    torch.manual_seed(3)
    module, processor = family()
    module.generation_config.eos_token_id = None
    model = gf.load(module.eval(), processor=processor).asking(["w1 w2 w3"])
    few = pictures(3)
    images = [few[0], few[1], few[0], few[2]]
    width = gf.states(model, few, SITE).at[SITE].shape[-1]
    direction = torch.randn(width, generator=torch.Generator().manual_seed(1))
    arms = [[], [gf.add(SITE, direction, [30.0, -30.0, 20.0, 9.0], 1.0, phase="both")]]
    assert not asking.looks_ahead(model, images[0])
    looked, taken = [], []
    take = asking._Prefix.take
    monkeypatch.setattr(asking._Prefix, "take", lambda *given: (taken.append(1), take(*given))[1])
    tower = next(t for t in model.towers if t.name == "vision")
    handle = tower.blocks[0].register_forward_hook(lambda *_: looked.append(1))
    said = generate_arms(model, images, arms, batch_size=4, max_new_tokens=4)
    handle.remove()
    assert (len(looked), len(taken)) == (1, 2)
    for texts, arm in zip(said, arms, strict=True):
        assert texts == [
            model.generate([image], [e.take([row]) for e in arm], max_new_tokens=4)[0]
            for row, image in enumerate(images)
        ]
    assert said[0] != said[1]


def both_ways(model, inputs, arm, answers):
    """Log-probabilities of answers, each prompt read for each of them and read once."""
    found, reads = [], []
    for again in (False, True):
        logs = []

        def answer(_arm, rows, prompt, logs=logs):
            for texts in answers:
                steps = scoring.forced(model, prompt(), [texts[row] for row in rows])
                logs += [one for _, one in steps]

        lengths = []
        handle = (
            model.towers[-1]
            .blocks[0]
            .register_forward_hook(
                lambda _m, _a, out, lengths=lengths: lengths.append(
                    (out[0] if isinstance(out, tuple) else out).shape[1]
                )
            )
        )
        asking.ask(model, inputs, [arm], answer, batch_size=8, again=again)
        handle.remove()
        found.append(torch.stack(logs))
        reads.append(sum(n > 1 for n in lengths))
    return found, reads


TWO = [["w5 w4", "w9 w1"], ["w3", "w2"]]


@pytest.mark.parametrize(
    "family", [families.llava, families.qwen2_vl, families.qwen2_5_vl, families.gemma3]
)
@pytest.mark.parametrize(
    ("site", "role", "phase"),
    [
        (SITE, "image", "prompt"),
        (SITE, "text", "prompt"),
        (SITE, "text", "both"),
        (SITE, "text", "steps"),
        ("lm.embed", "all", "prompt"),
        ("vision.layers.0", "patch", "prompt"),
    ],
)
def test_a_prompt_read_once_under_an_edit_says_what_it_says_when_read_again(
    family, site, role, phase
):
    torch.manual_seed(3)
    module, processor = family()
    model = gf.load(module.eval(), processor=processor).asking(["w1 w2 w3"])
    images = [pictures(3)[i] for i in (0, 2)]
    other = gf.states(model, images[::-1], site, role)
    arm = [gf.swap(other, torch.arange(0, 16))]
    if phase != "prompt":
        way = other.at[site][0, 0].float()
        arm = [gf.add(site, way, [9.0, -9.0], 1.0, role=role, phase=phase)]
    (anew, once), reads = both_ways(model, images, arm, TWO)
    assert reads == [2, 1]
    torch.testing.assert_close(once, anew, atol=2e-5, rtol=0)
    (bare, _), _ = both_ways(model, images, [], TWO)
    assert (bare - anew).abs().max() > 1e-3


@pytest.mark.parametrize("phase", ["prompt", "steps", "both"])
def test_padded_texts_read_once_under_an_edit_say_what_they_say_when_read_again(phase):
    model = language()
    edit = gf.add(SITE, torch.ones(32), [3.0, -3.0, 9.0, 1.0], 1.0, role="text", phase=phase)
    (anew, once), reads = both_ways(model, INPUTS, [edit], [ANSWERS, ANSWERS[::-1]])
    assert reads == [2, 1]
    torch.testing.assert_close(once, anew, atol=2e-5, rtol=0)


def test_follow_shows_whole_distributions():
    model, seen = language(), {}

    def see(arm, rows, step, _ids, logs):
        for row, log in zip(rows, logs, strict=True):
            seen[arm, row, step] = log

    follow(model, INPUTS, ANSWERS, [[]], see)
    assert len(seen) == 4 * 3
    assert all(float(log.exp().sum()) == pytest.approx(1, abs=1e-5) for log in seen.values())
    (bare,) = score(model, INPUTS, ANSWERS)
    ids = model.collate.tokenizer(ANSWERS[2])["input_ids"]
    assert bare.log_prob[2].tolist() == [float(seen[0, 2, i][ids[i]]) for i in range(3)]


def test_settings_of_the_checkpoint_do_not_bend_the_scores():
    model = language()
    (bare,) = score(model, INPUTS, ANSWERS)
    model.module.generation_config.repetition_penalty = 3.0
    model.module.generation_config.suppress_tokens = list(range(50))
    (same,) = score(model, INPUTS, ANSWERS)
    assert torch.equal(bare.log_prob, same.log_prob)


def test_an_answer_is_scored_past_a_token_that_ends_answers():
    model, ids = language(), [[12, 11, 14, 13]]
    (whole,) = score(model, INPUTS[:1], ids)
    model.module.generation_config.eos_token_id = 11
    (same,) = score(model, INPUTS[:1], ids)
    assert same.counts.tolist() == [4]
    assert torch.equal(whole.log_prob, same.log_prob)


def test_an_edit_that_half_precision_cannot_hold_is_not_without_damage():
    module = tiny.llama().half()
    model = gf.load(module, processor=tiny.tokenizer())
    edit = gf.add(SITE, torch.ones(32), 1e6, 1.0)
    bare, broken = score(model, INPUTS, ANSWERS, [[], [edit]], kl=True)
    assert not bare.kl.any()
    assert broken.kl[:, 0].isnan().all()
    assert broken.kl[0, 2:].tolist() == [0.0]  # after the end of the answer


def test_what_has_no_probability_before_adds_no_divergence():
    before = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    after = torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.5, 0.0]]).log()
    found = scoring.divergence(before, after)
    assert found.tolist() == pytest.approx([np.log(2), np.log(2)], rel=1e-6)


def test_an_answer_of_ids_is_taken_as_it_is_and_a_text_goes_on_with_a_space(monkeypatch):
    model = language()
    tokenizer = model.collate.tokenizer
    ids = [tokenizer(text)["input_ids"] for text in ANSWERS]
    (of_text,), (of_ids,) = score(model, INPUTS, ANSWERS), score(model, INPUTS, ids)
    assert torch.equal(of_text.log_prob, of_ids.log_prob)
    said = []

    class Spy:
        """A tokenizer that keeps what it is asked."""

        all_special_tokens = ()

        def decode(self, ids, **_):
            return "a\n" if int(ids) else "a"

        def __call__(self, text, **_):
            said.append(text)
            return {"input_ids": [1]}

    monkeypatch.setattr(scoring, "require_tokenizer", lambda _: Spy())
    for end, text in ((0, "Lima"), (0, " Lima"), (1, "Lima")):
        answer_ids(model, torch.tensor([end]), text)
    assert said == [" Lima", " Lima", "Lima"]


def test_bad_answers():
    model = language()
    with pytest.raises(ValueError, match="4 inputs and 1 answers"):
        score(model, INPUTS, ["w1"])
    with pytest.raises(ValueError, match="answer to input 2 is empty"):
        score(model, INPUTS, ["w1", "w1", "", "w1"])
    with pytest.raises(ValueError, match="is for 2 samples, and there are 4"):
        score(model, INPUTS, ANSWERS, [[edits_of()["both"].take([0, 1])]])


@pytest.mark.parametrize("inputs", [INPUTS, ["w1", "w2", "w3", "w4"]])
def test_no_arm_is_answered_before_the_width_of_every_edit_is_seen(inputs):
    model, answered = language(), []
    wrong = gf.add(SITE, torch.ones(16), 1.0, 1.0, phase="steps")
    asking.looks_ahead(model, INPUTS[0])  # tried once
    model.module.lm_head.register_forward_hook(lambda *_: answered.append(1))
    with pytest.raises(ValueError, match=r"lm.layers.1 is 32 wide, and the edit is for 16"):
        generate_arms(model, inputs, [[], [edits_of()["both"]], [wrong]])
    assert len(answered) <= 1  # the pass in which it was seen
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules()]
    assert sum(hooks) == 1


def test_a_prompt_of_one_token_is_read_whole():
    model, edit = language(), edits_of()["both"]
    short = ["w1 w2", "w3", "w3", "w4"]
    said = generate_arms(model, short, [[edit]], max_new_tokens=3)[0]
    assert said == [
        model.generate([text], [edit.take([i])], max_new_tokens=3)[0]
        for i, text in enumerate(short)
    ]
    assert asking.once(short)[1].tolist() == [0, 1, 1, 2]


def test_one_text_is_no_list_and_one_edit_is_enough(tmp_path):
    model = language()
    edit = edits_of()["both"].take([0])
    for ask in (model.generate, lambda text: gf.states(model, text, SITE)):
        with pytest.raises(TypeError, match="got one text, 'w1 w2 w3'"):
            ask(INPUTS[0])
    with pytest.raises(TypeError, match="got one text"):
        score(model, "w1", ["w1"])
    said = model.generate(INPUTS, edit, max_new_tokens=3)
    assert said == model.generate(INPUTS, [edit], max_new_tokens=3)
    with model.edited(edit):
        model.forward(model.prepare(INPUTS))
    gf.save_edits(edit, tmp_path / "one.safetensors")
    (again,) = gf.load_edits(tmp_path / "one.safetensors")
    assert torch.equal(again.values, edit.values)
    held = gf.states(model, INPUTS, "lm.layers.*")
    assert repr(held) == (
        "States(lm.layers.0: [4, 1, 32], lm.layers.1: [4, 1, 32], lm.layers.2: [4, 1, 32]; "
        "role=last)"
    )
