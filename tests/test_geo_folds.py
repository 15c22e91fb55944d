from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn import model_selection

from geofast.geo import Blocks, GroupKFold, KFold, Split, as_split, parse_split


def places(n, seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "id": [f"p{i}" for i in range(n)],
            "latitude": np.degrees(np.arcsin(rng.uniform(-1, 1, n))),
            "longitude": rng.uniform(-180, 180, n),
            "country": [f"c{int(g)}" for g in rng.geometric(0.1, n)],
        }
    )


def balance(fold, folds=5):
    return np.bincount(fold, minlength=folds)


# ---------------------------------------------------------------------------- random folds


@pytest.mark.parametrize(
    ("n", "folds", "seed"), [(5, 5, 42), (12, 5, 42), (999, 10, 0), (5000, 3, 7)]
)
def test_kfold_is_scikit_learns(n, folds, seed):
    theirs = model_selection.KFold(folds, shuffle=True, random_state=seed)
    expected = np.empty(n, dtype=int)
    for number, (_, test) in enumerate(theirs.split(np.zeros(n))):
        expected[test] = number
    np.testing.assert_array_equal(KFold(folds, seed).assign(places(n)), expected)


def test_kfold_leaves_numpys_global_generator_alone():
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    KFold().assign(places(20))
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


# ---------------------------------------------------------------------------- blocks


def test_a_block_is_never_cut():
    table = places(3000)
    fold = Blocks(15).assign(table)
    row = np.floor((table.latitude + 90) / 15)
    column = np.floor((table.longitude + 180) / 15)
    per_cell = pd.Series(fold).groupby([row, column]).nunique()
    assert len(per_cell) > 200
    assert (per_cell == 1).all()
    random = pd.Series(KFold().assign(table)).groupby([row, column]).nunique()
    assert (random > 1).mean() > 0.8  # the opposite: random folds do cut them


def test_blocks_are_balanced_and_repeatable():
    table = places(3000)
    fold = Blocks(15).assign(table)
    assert np.ptp(balance(fold)) <= 3
    np.testing.assert_array_equal(fold, Blocks(15).assign(table))
    assert (fold != Blocks(15, seed=1).assign(table)).any()


def test_edges_of_the_map():
    latitude = [90, 89.9, -90, -89.9, 10, 10, 40, -40]
    longitude = [0, 1, 0, 1, 180, -180, 20, -20]
    table = pd.DataFrame({"latitude": latitude, "longitude": longitude})
    fold = Blocks(45, folds=5).assign(table)  # five occupied cells, one for each fold
    assert fold[0] == fold[1]  # the pole itself belongs to the last row
    assert fold[2] == fold[3]
    assert fold[4] == fold[5]  # 180 E is 180 W
    assert sorted({fold[0], fold[2], fold[4], fold[6], fold[7]}) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("degrees", [0, -5, 91])
def test_impossible_blocks(degrees):
    with pytest.raises(ValueError, match=f"above 0 and at most 90 degrees, got {degrees}"):
        Blocks(degrees)


def test_fewer_blocks_than_folds():
    table = pd.DataFrame({"latitude": [1.0] * 9, "longitude": [1.0] * 9})
    message = "1 cells of 15 degrees cannot fill 5 folds; take smaller cells or fewer folds"
    with pytest.raises(ValueError, match=message):
        Blocks(15).assign(table)


# ---------------------------------------------------------------------------- groups


def test_groups_stay_together_and_are_balanced():
    table = places(2000)
    fold = GroupKFold("country").assign(table)
    assert (pd.Series(fold).groupby(table.country).nunique() == 1).all()
    assert np.ptp(balance(fold)) <= 20
    shuffled = table.sample(frac=1, random_state=3)
    again = GroupKFold("country").assign(shuffled)
    np.testing.assert_array_equal(again, fold[shuffled.index])  # the order of rows is nothing


def test_the_largest_group_comes_first_to_the_emptiest_fold():
    table = pd.DataFrame({"g": ["a"] * 6 + ["b"] * 5 + ["c"] * 3 + ["d"] * 3 + ["e"]})
    fold = GroupKFold("g", folds=2).assign(table)
    # a -> 0 (6), b -> 1 (5), c or d -> 1 (8), the other -> 0 (9), e -> 1 (9).
    assert balance(fold, 2).tolist() == [9, 9]


def test_group_errors():
    table = places(30)
    message = "no column 'nation' to split by; their columns are: id, latitude, longitude, country"
    with pytest.raises(ValueError, match=message):
        GroupKFold("nation").assign(table)
    with pytest.raises(ValueError, match=r"3 groups in column 'country' cannot fill 5 folds"):
        GroupKFold("country").assign(table.assign(country=["a", "b", "c"] * 10))
    table.loc[[4, 7], "country"] = None
    message = r"2 samples have no value in column 'country' \(the first is p4\)"
    with pytest.raises(ValueError, match=message):
        GroupKFold("country").assign(table)


@pytest.mark.parametrize("split", [KFold(10), Blocks(15, 10), GroupKFold("country", 10)])
def test_fewer_samples_than_folds(split):
    message = "8 samples cannot fill 10 folds; take fewer folds or more samples"
    with pytest.raises(ValueError, match=message):
        split.assign(places(8))


@pytest.mark.parametrize("make", [KFold, Blocks, lambda folds: GroupKFold("g", folds=folds)])
def test_one_fold_is_no_split(make):
    with pytest.raises(ValueError, match="at least 2 folds, got 1"):
        make(folds=1)


# ---------------------------------------------------------------------------- any splitter


def test_our_own_pass_through():
    for split in (KFold(), Blocks(30), GroupKFold("country")):
        assert isinstance(split, Split)
        assert as_split(split) is split


def test_scikit_learns_splitters_are_taken():
    table = places(50)
    split = as_split(model_selection.KFold(5, shuffle=True, random_state=42))
    assert split.name == "kfold"
    np.testing.assert_array_equal(split.assign(table), KFold().assign(table))
    split = as_split(model_selection.GroupKFold(3), name="nations", groups="country")
    assert split.name == "nations"
    assert (pd.Series(split.assign(table)).groupby(table.country).nunique() == 1).all()


@pytest.mark.parametrize(
    ("splitter", "leaves", "repeats"),
    [
        (model_selection.ShuffleSplit(1, test_size=10, random_state=0), 40, 0),
        (model_selection.RepeatedKFold(n_splits=5, n_repeats=2), 0, 50),
    ],
)
def test_splitters_that_do_not_partition(splitter, leaves, repeats):
    message = f"leave out {leaves} and repeat {repeats} of the 50 samples; take a splitter"
    with pytest.raises(ValueError, match=message):
        as_split(splitter).assign(places(50))


def test_a_splitter_that_refuses():
    with pytest.raises(ValueError, match="KFold could not split the 3 samples: Cannot have"):
        as_split(model_selection.KFold(5)).assign(places(3))
    pattern = r"GroupKFold could not split the 9 samples: .* Write geofast's GroupKFold\(column\)"
    with pytest.raises(ValueError, match=pattern):
        as_split(model_selection.GroupKFold(3)).assign(places(9))


@pytest.mark.parametrize("wrong", [5, None, KFold, model_selection.KFold])
def test_not_a_split(wrong):
    with pytest.raises(TypeError, match=r"a split is one of geofast's .* got "):
        as_split(wrong)


# ---------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("text", "expected", "name"),
    [
        ("kfold", KFold(5), "kfold"),
        ("kfold:10", KFold(10), "kfold"),
        ("blocks", Blocks(15), "blocks15"),
        ("blocks:7.5", Blocks(7.5), "blocks7.5"),
        ("group:country", GroupKFold("country"), "group:country"),
        ("group:a:b", GroupKFold("a:b"), "group:a:b"),
    ],
)
def test_parse_split(text, expected, name):
    assert parse_split(text) == expected
    assert as_split(text) == expected
    assert expected.name == name


def test_parse_split_takes_folds_and_seed():
    assert parse_split("blocks:15", folds=3, seed=7) == Blocks(15, 3, 7)


@pytest.mark.parametrize(
    "text", ["", "group", "group:", "random", "kfold:x", "kfold:1", "blocks:0"]
)
def test_parse_split_refuses(text):
    with pytest.raises(ValueError, match=f"cannot read the split '{text}'"):
        parse_split(text)


@pytest.mark.parametrize("text", ["blocks:15:3", "kfold:2.5", "blah", "groups:country"])
def test_parse_split_lists_its_forms(text):
    with pytest.raises(ValueError, match=rf"'{text}'; write kfold, kfold:10 .* or group:COLUMN"):
        parse_split(text)


def test_too_few_folds_are_not_blamed_on_the_split():
    with pytest.raises(ValueError, match=r"^a split needs at least 2 folds, got 1: .*--folds"):
        parse_split("kfold", folds=1)
    assert parse_split("kfold:3", folds=2) == KFold(3)
