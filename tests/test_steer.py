"""Experiments with edits on tiny random models, against one pair at a time in float64."""

import copy
import dataclasses
import json

import families
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from scipy import stats

import geofast as gf
from geofast.data import from_arrays
from geofast.effects import study
from geofast.effects.arms import CONTROLS, Written, left_out, make_arms, mean_differences, shuffled
from geofast.effects.dims import ranked_dims
from geofast.effects.experiment import steer
from geofast.effects.outcome import MEASURES, open_steered, summarise
from geofast.effects.request import Request
from geofast.geo import great_circle_km
from geofast.geo.gazetteer import Entry, Gazetteer
from geofast.subspace.ranking import random_orders

N, TOKENS, SITE, LAST = 40, 4, "lm.layers.0", "lm.layers.2"
PAIRS = [("s0", "s1"), ("s0", "s2"), ("s3", "s1"), ("s4", "s5"), ("s6", "s0"), ("s7", "s8")]


@pytest.fixture(scope="module")
def model():
    module = tiny.llama()
    module.generation_config.eos_token_id = None
    with torch.no_grad():  # so that what it says depends on what it was asked
        module.lm_head.weight *= 8
        module.lm_head.weight[:2] = 0  # says no padding
        module.model.embed_tokens.weight *= 20
    return gf.load(module, processor=tiny.tokenizer())


@pytest.fixture(scope="module")
def samples(model):
    """Texts, and as the country of each the first word that the model answers."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 98, rng.integers(2, 6))) for _ in range(N)]
    said = [text.split()[0] for text in model.generate(texts, max_new_tokens=TOKENS)]
    return from_arrays(
        texts, rng.uniform(-60, 70, N), rng.uniform(-180, 180, N),
        ids=[f"s{i}" for i in range(N)], country=said, name=[f"w{7 * i % 98}" for i in range(N)],
    )  # fmt: skip


@pytest.fixture(scope="module")
def gazetteer():
    return Gazetteer([Entry("country", f"w{i}", parent="") for i in range(98)])


@pytest.fixture(scope="module")
def run(model, samples):
    return gf.probe(model, samples, pool="last", split=gf.KFold(2), alphas=[1.0, 10.0], check=False)


@pytest.fixture(scope="module")
def pairs(samples):
    """Those of `PAIRS` whose countries differ."""
    of = samples.table.set_index("id")["country"]
    found = pd.DataFrame([p for p in PAIRS if of[p[0]] != of[p[1]]], columns=["source", "target"])
    assert len(found) >= 4
    return found


@pytest.fixture(scope="module")
def steered(model, samples, run, pairs, gazetteer):
    return steer(
        model, samples, pairs, run, site=SITE, shares=(0, 0.5, 1), ranking="coef",
        names={"country": "country"}, gazetteer=gazetteer, max_new_tokens=TOKENS, batch_size=3,
    )  # fmt: skip


def options(gazetteer, **changes):
    given = dict(
        site=SITE, names={"country": "country"}, gazetteer=gazetteer, max_new_tokens=TOKENS
    )
    return given | changes


# ------ the reference: one pair, float64, no cache


class Slow:
    """The same model in float64, one sequence at a time, everything run at every step."""

    def __init__(self, model):
        self.module = copy.deepcopy(model.module).double()
        self.tokenizer = model.collate.tokenizer

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def read(self, ids, start=0, change=None, layer=0):
        """Logits [tokens, vocab] and states after a layer; `change` is made from `start` on."""
        seen = []

        def hook(_module, _args, output):
            states = output.clone()
            if change is not None:
                for place in range(start, states.shape[1]):
                    states[0, place] = change(states[0, place], place - start)
            seen.append(states[0])
            return states

        handle = self.module.model.layers[layer].register_forward_hook(hook)
        logits = self.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        handle.remove()
        return logits, seen[0]

    def answer(self, prompt, change=None, layer=0):
        """Greedy tokens, and the state at each step."""
        start, ids = len(prompt) - 1, list(prompt)
        for _ in range(TOKENS):
            logits, states = self.read(ids, start, change, layer)
            ids.append(int(logits[-1].argmax()))
        return ids[len(prompt) :], states[start:]

    def logs(self, prompt, answer, change=None, layer=0):
        """Log-probabilities [tokens, vocab] before each token of an answer."""
        start = len(prompt) - 1
        logits, _ = self.read([*prompt, *answer[:-1]], start, change, layer)
        return logits[start:].log_softmax(1)


@pytest.fixture(scope="module")
def slow(model):
    return Slow(model)


def changes_of(arm, slow, run, samples, source, target, share):
    """What an arm makes of a state [d] at a step, by other code than ours."""
    texts = dict(zip(samples.table["id"], samples.inputs, strict=True))
    _, states = slow.answer(slow.ids(texts[target]))
    coef = run.probes[f"{SITE}/last"].coef
    if arm in ("edit", "random dims"):
        weight = coef.abs()
        weight = ((weight - weight.amin(0)) / (weight.amax(0) - weight.amin(0))).sum(1)
        order = weight.argsort(descending=True)
        if arm == "random dims":
            order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
        dims = order[: round(32 * share)]

        def write(state, step):
            state = state.clone()
            state[dims] = states[step][dims]
            return state

        return write
    assert arm == "mean difference"
    table, rows = samples.table, run.rows[f"{SITE}/last"].double()
    others = ~table["id"].isin([source, target])

    def mean(one):
        me = table[table["id"] == one].iloc[0]
        near = others & (table["country"] == me["country"])
        if not near.any():
            km = great_circle_km(
                table["latitude"], table["longitude"], me["latitude"], me["longitude"]
            )
            near = table.index.isin(pd.Series(km)[others].nsmallest(10).index)
        return rows[torch.tensor(np.asarray(near))].mean(0)

    return lambda state, _step: state + mean(target) - mean(source)


@pytest.mark.parametrize("arm", ["edit", "random dims", "mean difference"])
def test_every_measure_is_what_one_pair_in_float64_gives(
    steered, slow, run, samples, pairs, arm, model
):
    texts = dict(zip(samples.table["id"], samples.inputs, strict=True))
    country = samples.table.set_index("id")["country"]
    probe, moved, judged = run.probes[f"{LAST}/last"], 0, 0
    for source, target in pairs.itertuples(index=False):
        change = changes_of(arm, slow, run, samples, source, target, 0.5)
        prompt = slow.ids(texts[source])
        said, _ = slow.answer(prompt, change)
        plain, _ = slow.answer(prompt)
        rows = steered.pairs[steered.pairs["share"] == 0.5]
        row = rows[(rows["source"] == source) & (rows["target"] == target) & (rows["arm"] == arm)]
        row = row.iloc[0]
        assert row["answer"] == slow.tokenizer.decode(said)
        moved += said != plain

        (to,), (own,) = slow.ids(country[target]), slow.ids(country[source])
        first = slow.logs(prompt, [to], change)[0]
        assert row["log_odds"] == pytest.approx(float(first[to] - first[own]), abs=1e-3)

        before, after = slow.logs(prompt, plain), slow.logs(prompt, plain, change)
        divergence = (before.exp() * (before - after)).sum(1).mean()
        assert row["kl"] == pytest.approx(float(divergence), rel=2e-3, abs=1e-5)

        alone = slow.logs(prompt, said)[range(TOKENS), said].mean()
        assert row["perplexity"] == pytest.approx(float((-alone).exp()), rel=2e-3)

        start = len(prompt) - 1
        with_change = lambda s, i, change=change: change(s, i)  # noqa: E731
        _, states = last_state(slow, prompt, start, with_change)
        latitude, longitude = probe(states[None])[0].tolist()
        assert row["reading_latitude"] == pytest.approx(latitude, abs=0.02)
        place = samples.table.set_index("id").loc[target, ["latitude", "longitude"]]
        km = great_circle_km(*place, np.clip(latitude, -90, 90), longitude)
        assert row["km"] == pytest.approx(float(km), abs=5)

        words = row["answer"].split()
        assert row["own_country"] == row["kept"] == (country[source] in words)
        if country[target] in texts[source].split():  # what stands in the prompt tells nothing
            assert pd.isna(row["to_country"])
            assert pd.isna(row["moved"])
        else:
            assert row["to_country"] == row["moved"] == (country[target] in words)
            judged += 1
    assert moved
    assert judged


def last_state(slow, prompt, start, change):
    seen = []
    last = slow.module.model.layers[2]
    handle = last.register_forward_hook(lambda _m, _a, out: seen.append(out[0, -1]))
    logits, _ = slow.read(prompt, start, change)
    handle.remove()
    return logits, seen[0]


# ------ planted structure


def test_every_later_site_is_read(steered, run, model):
    table = steered.readings
    later = [s.name for s in model.every_site if f"{s.name}/last" in run.probes]
    later = later[later.index(SITE) + 1 :]
    assert len(later) > 1
    edit = table[(table["arm"] == "edit") & (table["share"] == 0.5)]
    assert edit["site"].tolist() == later
    assert steered.info["read_at"] == f"{later[-1]}/last"
    last = table[table["site"] == later[-1]].set_index(["arm", "share"])["km"]
    summary = steered.summary.set_index(["arm", "share"])["km"]
    pd.testing.assert_series_equal(last, summary)
    assert edit["km"].nunique() == len(later)
    assert (edit["km_low"] < edit["km"]).all()


def test_nothing_changes_at_share_0(steered):
    table = steered.pairs
    zero, none = table[table["share"] == 0], table[table["arm"] == "none"]
    assert sorted(zero["arm"].unique()) == sorted(["none", "edit", *CONTROLS])
    assert (zero["kl"] == 0).all()
    assert (zero["stability"] == 1).all()
    for _, rows in zero.groupby("arm"):
        assert rows["answer"].tolist() == none["answer"].tolist()
        assert rows["log_odds"].tolist() == none["log_odds"].tolist()
    assert none["kept"].all()
    edited = table[(table["share"] == 0.5) & (table["arm"] == "edit")]
    assert (edited["kl"] > 1e-3).all()


@pytest.mark.parametrize("mode", ["swap", "patch"])
def test_a_full_swap_after_the_last_layer_answers_as_the_target(
    model, samples, run, pairs, gazetteer, mode
):
    found = steer(
        model, samples, pairs, run, shares=(1.0,), mode=mode,
        **options(gazetteer, site=LAST, controls=["random dims", "random direction"]),
    )  # fmt: skip
    texts = dict(zip(samples.table["id"], samples.inputs, strict=True))
    theirs = model.generate([texts[t] for t in pairs["target"]], max_new_tokens=TOKENS)
    by = found.pairs.set_index("arm")
    assert by.loc["edit", "answer"].tolist() == theirs
    assert by.loc["edit", "moved"].all()
    assert by.loc["edit", "log_odds"].gt(0).all()
    assert "random dims" not in by.index  # they would be all of them: the edit itself
    assert not by.loc["random direction", "moved"].all()
    row = found.summary.set_index("arm").loc["edit"]
    assert row["moved"] == 1
    judged = by.loc["edit", "moved"].notna().sum()
    assert row["moved_low"] == pytest.approx(0.025 ** (1 / judged))  # exact, where all agree
    assert pd.isna(row["moved_p"])
    assert found.info["read_at"] == ""
    assert by["km"].isna().all()


def test_set_moves_what_later_sites_read(model, samples, run, pairs, gazetteer):
    """At the same site the reading would be exact; one layer on it is near."""
    found = steer(
        model, samples, pairs, run, shares=(1.0,), mode="set", role="last", phase="prompt",
        **options(gazetteer, site="lm.layers.1"),
    )  # fmt: skip
    km = found.summary.set_index("arm")["km"]
    assert km["edit"] < km["none"]
    (edit,) = found.edits
    assert (edit.mode, edit.phase, edit.samples) == ("set", "prompt", pairs["target"].nunique())


def test_arms_and_their_edits(model, samples, run):
    """Random directions are as long as the change; arms of the same dimensions are one."""
    texts = list(samples.inputs[:6])
    probe = run.probes[f"{SITE}/last"]
    states = gf.states(model, texts, SITE, steps=2)
    place = Written(
        probe, "swap", "last", "both", model.name, np.array([0, 0, 2]), np.array([1, 3, 4]),
        states, None, torch.zeros(6, 2, dtype=torch.float64),
    )  # fmt: skip
    order = ranked_dims(run, probe.name, "coef")
    arms = make_arms(place, run, order, (0.0, 0.01, 0.25, 1.0), CONTROLS[:3], "coef", 3, None)
    names = [(name, share) for name, share, _ in arms.table]
    assert names == [
        ("none", 0.0),
        *((a, s) for s in (0, 0.01, 0.25) for a in ("edit", *CONTROLS[:3])),
        *((a, 1) for a in ("edit", "random direction")),  # other dimensions there are none
    ]
    number = {(name, share): k for name, share, k in arms.table}
    assert number["edit", 0.0] == number["random direction", 0.0] == 0
    assert len({k for (_, share), k in number.items() if share == 0.25}) == 4
    some = np.array([2, 1])
    (least,) = arms.makes[number["edit", 0.01]](some)
    assert least.dims.tolist() == [int(order[0])]  # no share but 0 is of none
    (edit,) = arms.makes[number["edit", 0.25]](some)
    (random,) = arms.makes[number["random direction", 0.25]](some)
    (control,) = arms.makes[number["random dims", 0.25]](some)
    x = states.at[SITE].double()
    dims = order[:8].sort().values
    assert torch.equal(edit.dims, dims)
    assert torch.equal(edit.values[0], states.at[SITE][[4, 3]][..., dims])
    change = (x[[4, 3], 0] - x[[2, 0], 0])[:, dims].norm(dim=1)
    torch.testing.assert_close(
        random.values[0, :, 0].double().norm(dim=1), change, rtol=1e-5, atol=0
    )
    assert random.values.shape == (1, 2, 1, 32)
    assert control.dims.tolist() == sorted(random_orders(32, 1, 3)[0][:8].tolist())
    assert [e.samples for e in arms.edits(np.array([1, 3, 4]))] == [3, 3, 3]


def test_dimensions_that_a_search_found_are_those_that_an_edit_writes(model, samples, run):
    found = run.subspace(sites=SITE, rankings=["forward"], fractions=[0.25], random=0)
    dims = found.dims(SITE, "longitude", 0.25)
    texts = list(samples.inputs[:2])
    own = gf.states(model, texts, SITE)
    with model.edited(gf.swap(own, dims).take([1, 0])):
        made = gf.states(model, texts, SITE).at[SITE]
    others = torch.ones(32, dtype=torch.bool).index_fill(0, dims, False)
    assert len(dims) == 8
    assert torch.equal(made[..., dims], own.at[SITE][[1, 0]][..., dims])
    assert torch.equal(made[..., others], own.at[SITE][..., others])


def test_shuffled_labels_are_of_the_same_rows(run):
    name = f"{SITE}/last"
    other = shuffled(run, name, 5)
    for target in ("latitude", "longitude"):
        mine, theirs = run.samples[target], other.samples[target]
        assert sorted(mine) == sorted(theirs)
        assert mine.tolist() != theirs.tolist()
    x = run.rows[name].double().numpy()
    y = other.samples[["latitude", "longitude"]].to_numpy()
    centred = x - x.mean(0)
    alpha = run.probes[name].alpha
    coef = np.linalg.solve(centred.T @ centred + alpha * np.eye(32), centred.T @ (y - y.mean(0)))
    np.testing.assert_allclose(other.probes[name].coef.numpy(), coef, rtol=1e-6, atol=1e-8)
    assert not torch.equal(ranked_dims(other, name, "coef"), ranked_dims(run, name, "coef"))


def test_mean_differences_leave_the_pair_out(run):
    name = f"{SITE}/last"
    where = torch.from_numpy(run.samples[["latitude", "longitude"]].to_numpy(copy=True))
    both = where[[0, 1]][None]
    found = mean_differences(run, name, [("s0", "s1")], both, "", None)
    rows, table = run.rows[name].double(), run.samples
    means = []
    for k in (0, 1):
        km = great_circle_km(
            table["latitude"], table["longitude"], *table.loc[k, ["latitude", "longitude"]]
        )
        means.append(rows[np.argsort(np.where(table.index < 2, np.inf, km))[:10]].mean(0))
    torch.testing.assert_close(found[0], means[1] - means[0])
    made = mean_differences(run, name, [("s0", "s1")], both, "country", [("?", "?")])
    torch.testing.assert_close(made, found)  # no other sample of that country


def test_controls_that_need_rows(model, samples, run, pairs, gazetteer):
    bare = dataclasses.replace(run, rows=None)
    assert left_out(run, f"{SITE}/last", CONTROLS) == {}
    found = steer(model, samples, pairs, bare, ranking="coef", **options(gazetteer))
    assert list(found.info["left_out"]) == ["shuffled labels", "mean difference"]
    assert "keeps no rows" in str(found)
    assert found.summary["arm"].tolist() == ["none", "edit", "random dims", "random direction"]
    with pytest.raises(ValueError, match="neither rows nor statistics"):
        steer(model, samples, pairs, bare, **options(gazetteer))


# ------ tables


def test_tables(steered, pairs):
    table = steered.pairs
    assert table.columns.tolist() == [
        "source", "target", "arm", "share", "answer", "to_country", "own_country", "moved", "kept",
        "log_odds", "km", "kl", "perplexity", "repetition", "stability", "source_latitude",
        "source_longitude", "target_latitude", "target_longitude", "reading_latitude",
        "reading_longitude",
    ]  # fmt: skip
    assert (table[["moved", "to_country"]].dtypes == "boolean").all()
    arms = 1 + 3 * 5 - 2  # at share 1 two controls would be the edit itself
    assert len(table) == arms * len(pairs)
    assert len(steered.summary) == arms
    wanted = ["arm", "share", "n"]
    for measure in MEASURES:
        wanted += [measure, f"{measure}_low", f"{measure}_high"]
        wanted += [f"{measure}_p"] if measure in ("moved", "log_odds", "km") else []
    assert steered.summary.columns.tolist() == wanted
    info = steered.info
    assert (info["site"], info["role"], info["phase"], info["mode"]) == (
        SITE,
        "last",
        "both",
        "swap",
    )
    assert (info["read_at"], info["level"]) == (f"{LAST}/last", "country")
    assert info["pairs"] == {"asked": len(pairs), "kept": len(pairs), "left_out": {}}
    assert info["edits"]["shares"] == [0.5, 1.0]
    assert steered.edits[1].samples == pairs["target"].nunique() == len(info["edits"]["samples"])


def test_summary_is_means_and_paired_tests():
    rng = np.random.default_rng(0)
    arms = (("none", 0.0), ("edit", 0.7), ("random dims", 0.2))
    rows = [
        {
            "arm": arm, "share": 0.0 if arm == "none" else 0.4,
            "moved": bool(rng.random() < hit) if pair else None, "kept": None,
            "log_odds": rng.normal(hit), "km": 1000 * rng.random(),
        }
        for arm, hit in arms
        for pair in range(30)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    table[["moved", "kept"]] = table[["moved", "kept"]].astype("boolean")
    table[["kl", "perplexity", "repetition", "stability"]] = 1.0
    found = summarise(table).set_index("arm")
    values = {arm: part.reset_index() for arm, part in table.groupby("arm")}
    edit, random = values["edit"], values["random dims"]
    assert found.loc["edit", "moved"] == edit["moved"].dropna().mean()
    assert found.loc["edit", "n"] == 30
    one = (edit["moved"] & ~random["moved"]).sum(), (random["moved"] & ~edit["moved"]).sum()
    wanted = stats.binomtest(int(one[0]), int(sum(one))).pvalue
    assert found.loc["edit", "moved_p"] == pytest.approx(wanted)
    wanted = stats.ttest_rel(edit["log_odds"], random["log_odds"]).pvalue
    assert found.loc["edit", "log_odds_p"] == pytest.approx(wanted, rel=0.5, abs=0.02)
    assert found.loc[["none", "random dims"], "km_p"].isna().all()
    assert np.isnan(found.loc["edit", "kept"])
    assert found.loc["edit", "moved_low"] < found.loc["edit", "moved"]
    assert found.loc["edit", ["kl_low", "kl", "kl_high"]].tolist() == [1, 1, 1]


def test_words_fit_100_columns(steered):
    lines = str(steered).splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("mean difference") for line in lines)
    assert "swap at lm.layers.0" in str(steered)
    assert "pairs" in repr(steered)


def test_saved_and_opened(steered, tmp_path, monkeypatch):
    def write(_steered, folder, _told):  # the pages have tests of their own, and take long
        (folder / "README.md").write_text("words")

    monkeypatch.setattr("geofast.report.steering.write", write)
    folder = steered.save(tmp_path / "out")
    again = open_steered(folder)
    pd.testing.assert_frame_equal(again.pairs, steered.pairs)
    pd.testing.assert_frame_equal(again.summary, steered.summary)
    assert again.info == json.loads(json.dumps(steered.info))
    for mine, theirs in zip(again.edits, steered.edits, strict=True):
        assert torch.equal(mine.values, theirs.values)
        assert torch.equal(mine.dims, theirs.dims)
    assert str(again) == str(steered)
    with pytest.raises(FileExistsError):
        steered.save(folder)
    steered.save(folder, overwrite=True)
    (folder / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError):
        steered.save(folder, overwrite=True)
    (folder / "summary.csv").write_text("x")
    with pytest.raises(ValueError, match=r"summary\.csv has 1 bytes"):
        open_steered(folder)
    with pytest.raises(FileNotFoundError, match=r"no steering\.json"):
        open_steered(tmp_path)


# ------ which pairs


def test_only_pairs_whose_countries_are_known_are_kept(model, samples, run, gazetteer):
    table = samples.table.copy()
    of = table["country"].tolist()
    same = 2
    table.loc[same, "country"] = of[0]
    other = next(i for i in range(3, N) if of[i] != of[0])
    further = next(i for i in range(3, N) if of[i] not in (of[0], of[other]))
    table.loc[1, "country"] = "w97" if of[1] != "w97" else "w96"
    texts = list(samples.inputs)
    given = dataclasses.replace(samples, table=table, inputs=texts)
    asked = [(0, same), (0, 1), (1, 0), (0, other), (other, further)]
    asked = pd.DataFrame([(f"s{a}", f"s{b}") for a, b in asked], columns=["source", "target"])
    found = steer(model, given, asked, run, **options(gazetteer, controls=[]))
    assert found.info["pairs"] == {
        "asked": 5, "kept": 2,
        "left_out": {
            "both of one country": 1,
            "unedited, the model does not name the target's country": 1,
            "unedited, the model does not name the source's country": 1,
        },
    }  # fmt: skip
    kept = found.pairs[found.pairs["arm"] == "edit"]
    assert kept["target"].tolist() == [f"s{other}", f"s{further}"]
    every = steer(model, given, asked, run, **options(gazetteer, controls=[], keep="all"))
    assert len(every.pairs[every.pairs["arm"] == "edit"]) == 5
    assert every.pairs["moved"].isna().sum() == 2  # of one country: nothing can be learnt
    assert every.pairs["log_odds"].isna().sum() == 2
    with pytest.raises(ValueError, match="of 1 pair none is left"):
        steer(model, given, asked[:1], run, **options(gazetteer, controls=[]))


def test_names_in_the_prompt_tell_nothing(model, samples, run, gazetteer, pairs):
    source = int(pairs["source"][0][1:])
    texts = list(samples.inputs)
    texts[source] = f"{samples.table['country'][source]} {texts[source]}"
    given = dataclasses.replace(samples, inputs=texts)
    with pytest.raises(ValueError, match="the country stands in the prompt"):
        steer(model, given, pairs[:1], run, **options(gazetteer))


def test_without_names_there_are_readings_and_damage(model, samples, run, pairs):
    found = steer(
        model, samples, pairs, run, site=SITE, names={}, keep="all", max_new_tokens=2,
        controls=["random dims"],
    )  # fmt: skip
    assert found.pairs[["log_odds"]].isna().all(axis=None)
    assert found.pairs["moved"].isna().all()
    assert found.pairs[["kl", "perplexity", "km"]].notna().all(axis=None)
    assert "km" in str(found)
    count = len({*pairs["source"], *pairs["target"]})
    assert found.info["fitted"] == count
    assert f"probes were fitted to {count} of these {count} samples" in " ".join(str(found).split())
    with pytest.raises(ValueError, match="keep='known' asks"):
        steer(model, samples, pairs, run, names={})


def test_a_column_of_numbers_is_no_name_unless_it_is_asked_for(samples):
    numbers = samples.table.drop(columns="country").assign(region=range(len(samples)))
    asked = dict(shares=[0.4], mode="swap", role=None, controls=[], max_new_tokens=2, keep="all")
    some = dataclasses.replace(samples, table=numbers)
    pairs = pd.DataFrame(PAIRS, columns=["source", "target"])
    found = Request.of(some, pairs, **asked, names=None, protocol="corrected")
    assert found.names == {"place": "name"}


# ------ the study's protocol


def test_the_studys_judge_keeps_its_faults():
    castle = study.Spot.of(
        {"name": "Royal Castle", "alternate_names": "Royal Castle in Warsaw;", "city": "Warsaw",
         "country": "Poland", "region": np.nan}, {}
    )  # fmt: skip
    assert castle == study.Spot(
        ("Royal Castle", "Royal Castle in Warsaw", ""), ("Warsaw", "Poland")
    )
    assert study.stability("anything", castle)  # by the empty alias
    muscat = study.Spot.of({"place": "Old Town", "country": "Oman"}, {"place": "place"})
    assert study.efficacy("how romantic", muscat)  # a substring
    assert not study.stability("how romantic", muscat)
    assert study.scores("The ROYAL CASTLE of oman", castle, muscat) == {
        "study_stability": True, "study_efficacy": True, "study_success": True,
    }  # fmt: skip
    assert not study.known("Old town, somewhere", muscat)
    assert study.known("Old town, Oman", muscat)


def test_the_studys_scores_stand_beside_ours(model, samples, run, pairs, gazetteer):
    given = study.SWAP | {"shares": (0.0, 0.5, 1.0), "max_new_tokens": TOKENS}
    given |= {"names": {"country": "country"}, "gazetteer": gazetteer}
    found = steer(model, samples, pairs, run, keep="all", **given)
    assert not found.pairs["study_known"].any()  # these answers name a country, and no spot
    with pytest.raises(ValueError, match=r"6: unedited, .* the source's place with its city"):
        steer(model, samples, pairs, run, **given)
    assert found.summary["arm"].unique().tolist() == ["none", "edit", "random dims"]
    country, name = (samples.table.set_index("id")[c] for c in ("country", "name"))
    for row in found.pairs.itertuples():
        assert row.study_efficacy == (country[row.target] in row.answer)
        assert row.study_stability == (name[row.source] in row.answer)
    assert {"study_efficacy_low", "study_success"} <= set(found.summary.columns)
    assert "by substrings" in str(found)
    assert found.pairs["study_known"].dtype == "boolean"


# ------ images


def test_images_and_tokens_of_a_role(gazetteer):
    torch.manual_seed(0)
    module, processor = families.llava()
    module.generation_config.eos_token_id = None
    model = gf.load(module.eval(), processor=processor)
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(12)
    ]
    samples = from_arrays(
        [np.asarray(p) for p in pictures], rng.uniform(-60, 60, 12), rng.uniform(-180, 180, 12),
        ids=range(12), country=[f"w{i}" for i in range(12)],
    )  # fmt: skip
    run = gf.probe(
        model, samples, prompts="w1 w2", pool={"vision": "mean:patch", "lm": "mean:image"},
        sites=["vision.layers.0", "vision.layers.1", "lm.layers.*"], split=gf.KFold(2),
        check=False, workers=0,
    )  # fmt: skip
    pairs = pd.DataFrame({"source": [0, 1, 1], "target": [2, 2, 3]})
    for site, read in (("vision.layers.0", "vision.layers.1"), ("lm.layers.0", "lm.layers.2")):
        found = steer(
            model.asking(["w1 w2"]), samples, pairs, run, site=site, keep="all", shares=(0.5, 1.0),
            gazetteer=gazetteer, max_new_tokens=3,
        )  # fmt: skip
        assert found.info["phase"] == "prompt"
        assert found.info["read_at"].split("/")[0] == read
        by = found.pairs.set_index(["arm", "share"])
        assert by.loc[("edit", 0.5), "kl"].gt(0).all()
        assert by[["kl", "km"]].notna().all(axis=None)
        assert by["perplexity"].isna().equals(by["answer"] == "")
        # Every patch is the target's: so is what the probe reads later, in both towers.
        if site == "vision.layers.0":
            full, none = by.loc[("edit", 1.0)], by.loc[("none", 0.0)]
            apart = [abs(t["reading_latitude"].diff().iloc[1]) for t in (full, none)]
            assert apart[0] < 0.5 * apart[1]


# ------ bad input, before anything is generated


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": [("s0", "s99")]}, "no sample 's99'"),
        ({"pairs": []}, "has no pair"),
        ({"pairs": [("s0", "s1"), ("s0", "s1")]}, "'s0' and 's1' comes twice"),
        ({"pairs": [("s0", "s1"), ("s2", "s2")]}, "the pair of 's2' is of one sample"),
        ({"site": "lm.layers.*"}, "site must be one site; .lm.layers... is lm.layers"),
        ({"site": "lm.layers.9"}, "never probed a site 'lm.layers.9'; it has lm.embed"),
        ({"role": "image"}, "image"),
        ({"role": "patches"}, "role must be one of last"),
        ({"role": "text"}, r"id s3 has 4 text tokens, and .* id s0 has 5: take inputs of one"),
        ({"mode": "add"}, "mean difference"),
        ({"shares": (1.5,)}, "shares must be 0 to 1"),
        ({"seed": -1}, "seed must be 0 or more; got -1"),
        ({"batch_size": 0}, "batch_size must be 1 or more; got 0"),
        ({"names": {"country": "latitude"}}, "a name must be text; column 'latitude' has "),
        ({"shares": ()}, "shares must be 0 to 1"),
        ({"controls": ["random"]}, "controls must be one of random dims"),
        ({"names": {"country": "land"}}, "has no column 'land'; it has id"),
        ({"names": {"land": "country"}}, "a level of names must be one of place"),
        ({"ranking": "size"}, "ranking must be one of coef"),
        ({"keep": "some"}, "keep must be one of known, all"),
        ({"protocol": "theirs"}, "protocol must be one of corrected, study"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"mode": "set", "shares": (0.02,)}, "cannot move latitude and longitude apart"),
        ({"off": 1}, "latitude 91.0 is off the sphere"),
        ({"twice": 1}, "two samples with the id 's0'"),
        ({"blank": 1}, "has no country"),
        ({"other": 1}, "the run is of another"),
        ({"text": 1}, "makes no text"),
        ({"narrow": 1}, "is 32 wide, and the run's probe is for 16"),
    ],
)
def test_bad_input_stops_before_anything_is_generated(
    model, samples, run, gazetteer, pairs, changes, message, monkeypatch
):
    def refuse(*_, **__):
        raise AssertionError("something was generated")

    changes, table = dict(changes), samples.table.copy()
    if "pairs" in changes:
        pairs = pd.DataFrame(changes.pop("pairs"), columns=["source", "target"])
    if changes.pop("off", 0):
        table.loc[int(pairs["target"][0][1:]), "latitude"] = 91.0
        changes["mode"] = "set"
    if changes.pop("twice", 0):
        table.loc[1, "id"] = "s0"
    if changes.pop("blank", 0):
        table.loc[int(pairs["target"][0][1:]), "country"] = None
    if changes.pop("other", 0):
        run = dataclasses.replace(run, info=run.info | {"model": "another"})
    if changes.pop("narrow", 0):
        probe = run.probes[f"{SITE}/last"]
        run = dataclasses.replace(
            run, probes={probe.name: dataclasses.replace(probe, coef=probe.coef[:16])}
        )
        changes |= {"ranking": "coef", "controls": []}
    if changes.pop("text", 0):
        model = gf.load(tiny.bert(), processor=tiny.tokenizer())
    given = dataclasses.replace(samples, table=table)
    monkeypatch.setattr("geofast.effects.experiment.generate_arms", refuse)
    with pytest.raises(ValueError, match=message):
        steer(model, given, pairs, run, **options(gazetteer, **changes))


def test_samples_and_pairs_from_files(model, samples, run, pairs, gazetteer, tmp_path, monkeypatch):
    monkeypatch.setattr("geofast.report.write_report", lambda *_: None)
    table = samples.table.assign(text=list(samples.inputs))
    table.to_csv(tmp_path / "samples.csv", index=False)
    pairs.to_csv(tmp_path / "pairs.csv", index=False)
    folder = run.save(tmp_path / "run")
    found = steer(
        model, tmp_path / "samples.csv", tmp_path / "pairs.csv", folder,
        **options(gazetteer, controls=["random dims"]),
    )  # fmt: skip
    assert found.info["run"] == str(folder)
    assert len(found.pairs) == 3 * len(pairs)
    with pytest.raises(FileNotFoundError):
        steer(model, samples, tmp_path / "none.csv", run, **options(gazetteer))
