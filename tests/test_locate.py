"""A sweep, and patching curves, against one forward pass at a time with a hook of its own."""

import json
from contextlib import contextmanager
from dataclasses import replace

import families
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image

import geofast as gf
from geofast.data import from_arrays
from geofast.effects.dims import ranked_dims, std_of
from geofast.effects.intervals import bootstrap_means
from geofast.effects.locate import locate as sweep
from geofast.effects.patching import patching
from geofast.effects.probed import require_probed
from geofast.geo.gazetteer import Entry, Gazetteer

N, SHARES = 24, (0.1, 0.4)
PAIRS = [(0, 5), (1, 5), (2, 7), (0, 9)]


@pytest.fixture(scope="module")
def model():
    """In float64: what differs from the reference is no rounding."""
    return gf.load(tiny.llama().double(), processor=tiny.tokenizer())


@pytest.fixture(scope="module")
def samples():
    """Texts of three to five words; the name of a place is a word that is in no text."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{w}" for w in rng.integers(0, 60, 3 + i % 3)) for i in range(N)]
    place = [f"w{60 + i}" for i in range(N)]
    return from_arrays(
        texts, rng.uniform(-60, 60, N), rng.uniform(-150, 150, N), place=place, code=[1.0] * N
    )


@pytest.fixture(scope="module")
def run(samples):
    model = gf.load(tiny.llama(), processor=tiny.tokenizer())
    return gf.probe(model, samples, sites="lm.layers.*", storage="rows", pool=["last", "mean"])


@pytest.fixture(scope="module")
def pairs(samples):
    ids = samples.table["id"]
    return pd.DataFrame(
        {"source": [ids[a] for a, _ in PAIRS], "target": [ids[b] for _, b in PAIRS]}
    )


def locate(model, samples, pairs, run, **options):
    return sweep(model, samples, pairs, run, **({"names": "place", "role": "last"} | options))


# ------ the reference


@contextmanager
def hooked(layer, change):
    """Change the states [tokens, d] of one sample at a layer's output."""

    def hook(_module, _args, output):
        states = (output[0] if isinstance(output, tuple) else output).clone()
        states[0] = change(states[0])
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = layer.register_forward_hook(hook, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def ids_of(model, text):
    return {"input_ids": torch.tensor([model.collate.tokenizer(text)["input_ids"]])}


@torch.no_grad()
def next_token(model, inputs, layer=None, change=None):
    if layer is None:
        return model.module(**inputs, use_cache=False).logits[0, -1].double().log_softmax(0)
    with hooked(layer, change):
        return next_token(model, inputs)


@torch.no_grad()
def state_of(model, inputs, layer):
    kept = []
    handle = layer.register_forward_hook(
        lambda _m, _a, out: kept.append((out[0] if isinstance(out, tuple) else out)[0].clone())
    )
    model.module(**inputs, use_cache=False)
    handle.remove()
    return kept[0]


def log_odds(logs, two):
    return float(logs[two[1]] - logs[two[0]])


def apart(before, after, two):
    rest = [i for i in range(len(before)) if i not in two]
    p, q = (x[rest].exp() / x[rest].exp().sum() for x in (before, after))
    return float((p * (p / q).log()).sum())


def reference(model, samples, run, pair, trial, dims):
    """Effect and damage of one edit of one pair."""
    layer = model.module.model.layers[int(trial["site"].rpartition(".")[2])]
    source, target = (ids_of(model, samples.inputs[i]) for i in pair)
    two = [model.collate.tokenizer(samples.table["place"][i])["input_ids"][0] for i in pair]
    held = state_of(model, target, layer)[-1]
    name = f"{trial['site']}/{trial['pool']}"
    probe = run.probes[name]
    goal = torch.tensor(samples.table[["latitude", "longitude"]].to_numpy()[pair[1]])

    def change(states):
        if trial["mode"] == "set":
            miss = goal - (states[-1] @ probe.coef + probe.intercept)
            states[-1, dims] += torch.linalg.pinv(probe.coef[dims].T) @ miss
        else:
            states[-1, dims] = held[dims]
        return states

    before, after = next_token(model, source), next_token(model, source, layer, change)
    return log_odds(after, two) - log_odds(before, two), apart(before, after, two)


def test_a_sweep_is_what_one_pair_at_a_time_gives(model, samples, run, pairs):
    found = locate(
        model, samples, pairs, run, shares=SHARES, batch_size=3,
        modes=["swap", "set", "patch"], max_damage=100.0, seed=3,
    )  # fmt: skip
    table, sites = found.table, [f"lm.layers.{i}" for i in range(3)]
    assert len(table) == 3 * (2 + 2 + 1)
    assert (table["pool"] == "last").all()
    generator = torch.Generator().manual_seed(3)
    random = {site: torch.randperm(32, generator=generator) for site in sites}
    for _, trial in table.iterrows():
        order = ranked_dims(run, f"{trial['site']}/last")
        assert trial["dims"] == round(32 * trial["share"])
        arms = {}
        for arm, full in (("", order), ("random_", random[trial["site"]])):
            each = [reference(model, samples, run, p, trial, full[: trial["dims"]]) for p in PAIRS]
            arms[f"{arm}effect"], arms[f"{arm}damage"] = map(np.array, zip(*each, strict=True))
        less = arms["random_effect"] if arms["random_effect"].mean() > 0 else 0.0
        arms["score"] = arms["effect"] - less
        low, high = bootstrap_means(np.stack(list(arms.values()), 1), seed=3)
        for (name, values), a, b in zip(arms.items(), low, high, strict=True):
            got = trial[[name, f"{name}_low", f"{name}_high"]].astype(float)
            np.testing.assert_allclose(got, [values.mean(), a, b], atol=2e-6)
    assert (table["effect"].abs() > 1e-3).sum() > 10
    assert table["score"].is_monotonic_decreasing
    assert found.best == tuple(table.loc[0, ["site", "share", "mode"]])
    assert (table[table["mode"] == "patch"]["score"] <= 0).all()  # random: all dimensions too
    assert (table["random_effect"] > 0).any()
    assert (table["random_effect"] < 0).any()


def test_nothing_that_is_not_edited_runs_again(model, samples, run, pairs):
    """Of prompts, whatever is tried: targets for states and answers, sources but for their ends."""
    lengths = []
    handle = model.body.register_forward_pre_hook(
        lambda _m, _a, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    for sites, shares in ((["lm.layers.1"], [0.4]), (None, SHARES)):
        lengths.clear()
        locate(model, samples, pairs, run, sites=sites, shares=shares)
        assert len([length for length in lengths if length > 1]) == 3
        arms = 1 + 2 * len(shares) * (1 if sites else 3)
        assert len([length for length in lengths if length == 1]) == arms
    handle.remove()


def test_the_budget_is_what_the_target_itself_does(model, samples, run, pairs):
    found = locate(model, samples, pairs, run, shares=[0.1, 1.0], modes="set")
    whole = []
    for pair in PAIRS:
        two = [model.collate.tokenizer(samples.table["place"][i])["input_ids"][0] for i in pair]
        source, target = (next_token(model, ids_of(model, samples.inputs[i])) for i in pair)
        whole.append((log_odds(target, two) - log_odds(source, two), apart(source, target, two)))
    got = [found.info[name] for name in ("target_effect", "target_damage")]
    np.testing.assert_allclose(got, np.mean(whole, 0), atol=2e-6)
    assert found.info["budget"] == found.info["target_damage"]
    middle = float(found.table["damage"].median())
    table = locate(
        model, samples, pairs, run, shares=[0.1, 1.0], modes="set", max_damage=middle
    ).table
    over = table["damage"] > middle
    assert over.tolist() == [False] * 3 + [True] * 3
    assert (table["score"].isna() == over).all()
    none = locate(model, samples, pairs, run, shares=[0.4], sites="lm.layers.1", max_damage=0.0)
    with pytest.raises(ValueError, match="more damage than 0 nats"):
        _ = none.best
    assert "no setting does more than random dimensions" in str(none)


def test_whole_states_are_ranked_by_effect_and_not_said_to_do_nothing(model, samples, run):
    ids, place = samples.table["id"], samples.table["place"].to_numpy(copy=True)
    place[[0, 5, 2, 7]] = place[[5, 0, 7, 2]]  # with their own names the effects are below 0
    named = replace(samples, table=samples.table.assign(place=place))
    pairs = pd.DataFrame({"source": ids[[0, 2]], "target": ids[[5, 7]].to_numpy()})
    found = locate(model, named, pairs, run, modes=["patch"], max_damage=100.0)
    assert (found.table["effect"] > 0).all()
    assert not found.table["score"].any()
    assert found.table["effect"].is_monotonic_decreasing
    assert not found.table["damage"].is_monotonic_increasing
    assert "no setting does more" not in str(found)


def test_a_swap_with_itself_changes_nothing(model, samples, run):
    texts = [samples.inputs[0]] * 2
    twins = from_arrays(texts, [1.0, 2.0], [3.0, 4.0], ids=["a", "b"], place=["w60", "w61"])
    pairs = pd.DataFrame({"source": ["a", "b"], "target": ["b", "a"]})
    modes = ["swap", "patch"]
    table = locate(model, twins, pairs, run, modes=modes).table
    assert (table[["effect", "damage", "random_effect"]].abs() < 1e-6).all(axis=None)


def test_names_by_level_are_the_gazetteers(model, samples, run, pairs):
    named = from_arrays(
        samples.inputs, *samples.table[["latitude", "longitude"]].to_numpy().T,
        nation=[f"C{i}" for i in range(N)],
    )  # fmt: skip
    usual = Gazetteer(Entry("country", f"w{60 + i}", codes=(f"C{i}",)) for i in range(N))
    few = dict(sites="lm.layers.1", shares=[0.4])
    found = locate(
        model, named, pairs, run, names={"country": "nation"}, gazetteer=usual, **few
    ).table
    pd.testing.assert_frame_equal(found, locate(model, samples, pairs, run, **few).table)


def test_names_that_begin_alike_are_left_out(model, samples, run, pairs):
    table = samples.table.assign(place=lambda t: t["place"].where(t["id"] != "5", "w60"))
    alike = from_arrays(samples.inputs, table["latitude"], table["longitude"], place=table["place"])
    few = dict(sites="lm.layers.1", shares=[0.4])
    found = locate(model, alike, pairs, run, **few)
    assert found.info["pairs"] == {"asked": 4, "used": 3, "alike": 1}
    rest = locate(model, alike, pairs.iloc[1:], run, **few)
    pd.testing.assert_frame_equal(found.table, rest.table)
    assert "1 whose names begin alike" in str(found)
    with pytest.raises(ValueError, match="every pair begin with the same token"):
        locate(model, alike, pairs.iloc[:1], run, **few)


def test_in_words_and_in_files(model, samples, run, pairs, tmp_path):
    pairs.to_csv(tmp_path / "pairs.csv", index=False)
    found = locate(model, samples, tmp_path / "pairs.csv", run, modes=["swap", "set"])
    assert max(map(len, str(found).splitlines())) <= 100
    assert found.table["site"].iloc[0] in str(found)
    assert "12 more" in str(found)
    assert "no setting does more" not in str(found)
    assert found.save(tmp_path / "made") == tmp_path / "made"
    again = pd.read_csv(tmp_path / "made/locate.csv", keep_default_na=False, na_values=[""])
    columns = [c for c in found.table if c != "prompt"]
    pd.testing.assert_frame_equal(again[columns], found.table[columns])
    info = json.loads((tmp_path / "made/locate.json").read_text())
    assert info["names"] == "place"
    assert info["pairs"]["used"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shares": [0.0]}, "shares must be above 0"),
        ({"modes": "add"}, "modes must be some of swap, set, patch; got .'add'"),
        ({"max_damage": -1.0}, "max_damage must be 0 nats or more"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"role": "sky"}, "role must be one of last, all, .*; got 'sky'"),
        ({"prompt": "w1 {name}"}, "the run was never asked"),
        ({"ranking": "best"}, "ranking must be one of coef"),
        ({"sites": "lm.layers.7"}, "never probed a site 'lm.layers.7'"),
        ({"names": "nation"}, "no column 'nation'; it has id, latitude"),
        ({"names": "code"}, "a name must be text; column 'code' has 1.0"),
        ({"names": {"nation": "place"}}, "columns by place, region"),
        ({"pairs": pd.DataFrame({"source": ["0"]})}, "no column 'target'; it has source"),
        ({"pairs": pd.DataFrame({"source": ["0"], "target": ["x"]})}, "row 0: .* no sample 'x'"),
        ({"pairs": pd.DataFrame({"source": [], "target": []})}, "has no pair"),
    ],
)
def test_bad_arguments_stop_before_the_model_is_loaded(
    samples, run, pairs, monkeypatch, changes, message
):
    def never(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr("geofast.effects.locate.load", never)
    given = {"pairs": pairs} | changes
    with pytest.raises(ValueError, match=message):
        locate("model", samples, given.pop("pairs"), run, **given)


def test_sites_are_in_the_order_of_the_pass_without_the_model(run):
    found = require_probed(run, ["lm.layers.2", "lm.layers.[01]"], "last")
    assert [at.site for at in found] == [f"lm.layers.{i}" for i in range(3)]
    assert [at.probe.pool for at in found] == ["last"] * 3
    assert {at.role for at in require_probed(run, ["lm.layers.1/mean"])} == {"all"}
    joined = replace(run.probes["lm.layers.1/last"], pool="last+mean")
    with pytest.raises(ValueError, match="joins several"):
        require_probed(replace(run, probes={joined.name: joined}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "pairs.csv is no CSV with source and target: No columns"),
        (b"\xff\xfe\x00\x01", "pairs.csv is no CSV with source and target: .*utf-8"),
        (b"source,target\n0,\n", "pairs.csv, row 0: no target is given"),
        (b"source,target\nNA,0\n", "pairs.csv, row 0: .* has no sample 'NA', the source"),
    ],
)
def test_files_that_name_no_pairs(model, samples, run, tmp_path, text, message):
    (tmp_path / "pairs.csv").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        locate(model, samples, tmp_path / "pairs.csv", run)


def test_runs_and_models_that_do_not_go_together(model, samples, run, pairs):
    other = gf.load(tiny.gpt2(), processor=tiny.tokenizer())
    with pytest.raises(
        ValueError, match="run is of LlamaForCausalLM, and this model is GPT2LMHead"
    ):
        locate(other, samples, pairs, run)
    headless = gf.load(tiny.llama().model, processor=tiny.tokenizer())
    with pytest.raises(ValueError, match="makes no text"):
        locate(headless, samples, pairs, replace(run, info={}))
    bare = replace(run, rows=None, grams=None)
    with pytest.raises(ValueError, match="keeps neither rows nor statistics of lm"):
        locate(model, samples, pairs, bare)
    assert len(locate(model, samples, pairs, bare, ranking="coef").table) == 12


# ------ the dimensions


def test_orders_of_dimensions(run):
    name = "lm.layers.1/last"
    coef = run.probes[name].coef.abs()
    spread = run.rows[name].double().numpy().std(0)
    for ranking, weight in (("coef", coef), ("coef_std", coef * torch.tensor(spread)[:, None])):
        low, high = weight.amin(0), weight.amax(0)
        score = ((weight - low) / (high - low)).sum(1)
        assert ranked_dims(run, name, ranking).tolist() == score.argsort(descending=True).tolist()
    y = torch.tensor(run.samples[["latitude", "longitude"]].to_numpy())
    gram = gf.Gram(32, 2).update(run.rows[name], y)
    statistics = replace(run, rows=None, grams={name: gram})
    np.testing.assert_allclose(std_of(statistics, name), spread, rtol=1e-9)
    found = run.subspace(sites="lm.layers.1", rankings=["forward"], random=0).ranks[name]["forward"]
    best = [min(o.tolist().index(d) for o in found) for d in range(32)]
    order = ranked_dims(run, name, "forward").tolist()
    assert sorted(order) == list(range(32))
    assert [best[d] for d in order] == sorted(best)
    assert order[0] == found[0, 0]


# ------ patching

SOURCES, GOALS = ["w1 w2 w3", "w4 w5 w6", "w1 w2 w3"], ["w7 w8 w9", "w10 w2 w12", "w13 w14 w6"]
NAMES = [("w60", "w61"), ("w62", "w63"), ("w60", "w64")]


def test_patching_is_what_one_pair_at_a_time_gives(model):
    tokens = ["last", "each", "text", "all", -1]
    found = patching(model, SOURCES, GOALS, NAMES, tokens=tokens, batch_size=2, seed=4)
    sites = ["lm.embed", *(f"lm.layers.{i}" for i in range(3))]
    grid = found.grid()
    assert grid.index.tolist() == sites
    assert set(grid.columns) == {"last", "text", "all", 0, 1, 2}
    layers = [model.module.model.embed_tokens, *model.module.model.layers]
    whole, ids = [], model.collate.tokenizer
    for source, goal, names in zip(SOURCES, GOALS, NAMES, strict=True):
        two = [ids(name)["input_ids"][0] for name in names]
        logs = [next_token(model, ids_of(model, text)) for text in (source, goal)]
        whole.append(log_odds(logs[1], two) - log_odds(logs[0], two))
    for _, row in found.table.iterrows():
        layer, places = layers[sites.index(row["site"])], slice(None)
        if row["token"] not in ("text", "all"):
            places = 2 if row["token"] == "last" else row["token"]
        effects = []
        for source, goal, names in zip(SOURCES, GOALS, NAMES, strict=True):
            two = [ids(name)["input_ids"][0] for name in names]
            held = state_of(model, ids_of(model, goal), layer)

            def change(states, held=held, places=places):
                states[places] = held[places]
                return states

            inputs = ids_of(model, source)
            after = next_token(model, inputs, layer, change)
            effects.append(log_odds(after, two) - log_odds(next_token(model, inputs), two))
        low, high = bootstrap_means(np.array(effects)[:, None], seed=4)
        got = row[["effect", "effect_low", "effect_high"]].astype(float)
        np.testing.assert_allclose(got, [np.mean(effects), *low, *high], atol=2e-6)
        share = np.mean(effects) / np.mean(whole)
        np.testing.assert_allclose(row["restored"], share, atol=1e-5)
        assert row["restored_low"] - 1e-9 <= row["restored"] <= row["restored_high"] + 1e-9
    assert found.info["target_effect"] == pytest.approx(np.mean(whole), abs=2e-6)
    assert max(map(len, str(found).splitlines())) <= 100


def test_what_must_restore_all_or_nothing(model):
    table = patching(model, SOURCES, GOALS, NAMES, tokens=["last", "all", 0, 1]).table
    ends = ["restored", "restored_low", "restored_high"]
    row = table.set_index(["site", "token"])[ends]
    for site, token in (("lm.layers.2", "last"), ("lm.embed", "all"), ("lm.layers.1", "all")):
        np.testing.assert_allclose(row.loc[(site, token)], 1, atol=1e-5)
    for position in (0, 1):  # nobody reads them after the last layer
        np.testing.assert_allclose(row.loc[("lm.layers.2", position)], 0, atol=1e-5)
    assert (row.loc["lm.layers.0"].loc[[0, "last"], "restored"].abs() > 1e-3).all()


def pictures(n, seed):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(n)]


def test_patching_of_images():
    torch.manual_seed(0)
    module, processor = families.llava()
    talking = gf.load(module.eval(), processor=processor).asking(["w1 w2"])
    sources, goals = pictures(2, 0), pictures(2, 1)
    names = [("w50", "w51"), ("w52", "w53")]
    sites = ["vision.embed", "vision.layers.0", "projector", "lm.embed", "lm.layers.*"]
    tokens = ["cls", "patch", "image", "text", "last", "all"]
    found = patching(talking, sources, goals, names, sites=sites, tokens=tokens)
    grid = found.grid()
    assert grid.loc["projector"].notna().tolist() == [False, True, False, False, False, True]
    assert grid.loc["lm.embed"].notna().tolist() == [False, False, True, True, True, True]
    for site, token in (
        ("vision.embed", "all"), ("projector", "patch"), ("lm.embed", "image"),
        ("lm.layers.0", "all"), ("lm.layers.2", "last"),
    ):  # fmt: skip
        assert grid.loc[site, token] == pytest.approx(1, abs=1e-2)
    assert grid.loc["lm.embed", "text"] == pytest.approx(0, abs=1e-3)
    effect = found.grid("effect")
    target = found.info["target_effect"]
    assert abs(effect.loc["vision.layers.0", "patch"] - target) > 1e-6
    assert abs(effect.loc["lm.layers.1", "image"] - target) > 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "first"}, "tokens must be positions, or some of last"),
        ({"tokens": []}, "tokens must be positions"),
        ({"tokens": "patch"}, "no tower of these sites has patch tokens; they have text, last"),
        ({"tokens": [0, 3]}, "no position 3: the prompts have 3 tokens"),
        ({"targets": ["w1", *GOALS[1:]], "tokens": "each"}, "prompts have 1 to 3 tokens"),
        ({"targets": GOALS[1:]}, "give as many sources, targets and pairs of names"),
        ({"names": [("w1", "w1")] * 3}, "every pair begin with the same token"),
        ({"sites": "lm.layers.9"}, "no site matches 'lm.layers.9'"),
        ({"names": ["w1", "w2", "w3"]}, "names must be pairs of texts, .*; got 'w1'"),
        (
            {"names": [("w1", 2.0), *NAMES[1:]]},
            r"names must be pairs of texts, .*; got \('w1', 2.0",
        ),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be 0 or more"),
    ],
)
def test_bad_patches_stop_before_the_model_runs(model, changes, message):
    def never(*_):
        raise AssertionError("the model ran")

    handle = model.body.register_forward_pre_hook(never)
    given = {"sources": SOURCES, "targets": GOALS, "names": NAMES, **changes}
    with pytest.raises(ValueError, match=message):
        patching(model, **given)
    handle.remove()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "first"}, "tokens must be positions"),
        ({"names": NAMES[1:]}, "give as many sources"),
        ({"sources": "w12"}, r"inputs must be a list; got one text, 'w12'"),
    ],
)
def test_patching_loads_a_model_when_all_else_is_right(tmp_path, monkeypatch, changes, message):
    def never(*_, **__):
        raise AssertionError("loaded")

    given = {"sources": SOURCES, "targets": GOALS, "names": NAMES}
    with monkeypatch.context() as patched:
        patched.setattr("geofast.effects.patching.load", never)
        with pytest.raises((ValueError, TypeError), match=message):
            patching("model", **given | changes)
    tiny.llama().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    found = patching(str(tmp_path), **given, sites="lm.layers.1")
    assert found.info["model"] == tmp_path.name
