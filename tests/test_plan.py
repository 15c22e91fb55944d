"""Which cross-validations a probe does, and what it leaves out."""

from functools import partialmethod
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from pretend import Pretend

import geofast as gf
from geofast import _ops, _reference
from geofast.capture import Recorder
from geofast.data import from_arrays
from geofast.plan import (
    bytes_beside,
    check_disk,
    make_plan,
    make_tasks,
    with_cells,
    without_skipped,
)
from geofast.rows import Rows

TARGETS = ("latitude", "longitude")
KFOLD = gf.KFold()


def plan_of(storage, memory, monkeypatch, n=2, cells=5, passes=1, gpus=0, weights=0):
    monkeypatch.setattr(import_module("geofast.plan"), "_memory", lambda: memory)
    model = gf.load(tiny.dinov2(), prepare=lambda _: {})
    samples = from_arrays([np.zeros((28, 28, 3), np.uint8)] * n, np.zeros(n), np.zeros(n))
    return make_plan(
        model, {"": samples}, [32] * 3, targets=2, cells=cells, storage=storage, select=None,
        passes=passes, waiting=10, gpus=["cuda:0", "cuda:1"][:gpus],
        weights=weights,
    )  # fmt: skip


WAITING = 4 * 10 * 3 * 32  # bytes of ten rows of every site
ROWS, GRAMS = 4 * 3 * 2 * 32, 8 * 5 * 3 * 35**2  # bytes of three sites; the Grams are larger


def test_statistics_are_held_against_the_memory(monkeypatch):
    plan = plan_of("gram", 4 * GRAMS, monkeypatch)
    assert (plan.kind, plan.kept) == ("gram", GRAMS)
    assert "warning" not in plan.sentence
    plan = plan_of("gram", 4 * GRAMS - 4, monkeypatch)
    assert "warning: statistics take more than 25% of the machine's memory" in plan.sentence
    plan_of("gram", GRAMS, monkeypatch)
    with pytest.raises(
        ValueError, match=r"statistics need under 1 MB, more than the machine's under 1 MB"
    ):
        plan_of("gram", GRAMS - 1, monkeypatch)


def test_statistics_lie_on_gpus_that_have_room(monkeypatch):
    """Half of what is free on every one of them; layers are spread evenly."""
    free = {"cuda:0": 2 * (GRAMS + WAITING), "cuda:1": GRAMS + WAITING}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[gpu], 0))
    plan = plan_of("gram", 4 * GRAMS, monkeypatch, gpus=1)
    assert plan.stay
    assert plan.waiting == WAITING
    assert "statistics (Gram matrices) on the GPU" in plan.sentence
    of_rows = plan_of("rows", 4 * GRAMS, monkeypatch, gpus=1)
    assert of_rows.stay
    assert "pooled rows on the GPU" in of_rows.sentence
    assert not of_rows.waiting
    assert not plan_of("rows", 4 * ROWS - 4, monkeypatch, gpus=1).stay  # on disk
    assert not plan_of("rows", 4 * GRAMS, monkeypatch).stay
    assert plan_of("gram", 4 * GRAMS, monkeypatch, gpus=2).stay
    assert plan_of("gram", 4 * GRAMS, monkeypatch, gpus=2, weights=1).stay  # half a byte each
    assert not plan_of("gram", 4 * GRAMS, monkeypatch, gpus=2, weights=4).stay
    free["cuda:1"] -= 2
    assert not plan_of("gram", 4 * GRAMS, monkeypatch, gpus=2).stay
    assert plan.pinned == 0
    free["cuda:0"] -= 2
    plan = plan_of("gram", 4 * GRAMS, monkeypatch, gpus=1)
    assert not plan.stay
    assert plan.pinned == 3 * 2048  # a power of two for the ten rows of every site, 1,280 bytes
    free["cuda:0"] = 0
    assert plan_of("rows", 4 * GRAMS, monkeypatch, gpus=1, passes=2).pinned == 2 * 3 * 256
    assert plan_of("rows", 4 * GRAMS, monkeypatch, passes=2).pinned == 0
    assert "on the CPU, because more than 50% of the under 1 MB that are free on" in plan.sentence


@pytest.mark.parametrize("stay", [True, False])
@pytest.mark.parametrize(("family", "passes"), [("llama", 1), ("dinov2", 30)])
def test_what_probing_holds_beside_a_model(family, passes, stay, monkeypatch):
    """On a pretended GPU, by a pool that allocates nothing, as the kernels do."""

    def pool(x, roles, jobs):
        _reference.pool(x.near, roles.near, [(op, bit, out.near) for op, bit, out in jobs])

    def count(recorder, run, *args):
        before = gpu.allocated
        gpu.reset_peak()
        run(recorder, *args)
        taken.append(held[0] + gpu.peak - before)
        held[0] += gpu.allocated - before

    real, there = _ops.backend, SimpleNamespace(pool=pool)
    monkeypatch.setattr(_ops, "backend", lambda d: there if d == Pretend.device else real(d))
    held, taken = [0], []
    for name in ("_start", "_read"):
        monkeypatch.setattr(Recorder, name, partialmethod(count, getattr(Recorder, name)))
    batch = 6
    given = torch.zeros(batch, 40, dtype=torch.int64)
    given = torch.zeros(batch, 3, 28, 28) if family == "dinov2" else given
    with Pretend() as gpu, torch.no_grad():
        model, given = getattr(tiny, family)().to(gpu.device), given.to(gpu.device)
        with gf.capture(model, pool="mean+max", rows=Rows(99 * batch, stay=stay)) as rows:
            model(given)  # makes room for rows
            rows.verify()
            held[0] = 0
            taken.clear()
            for _ in range(passes):
                model(given)
            count(rows, Rows.verify)
    tokens = 40 if family == "llama" else 5
    most = bytes_beside(
        batch=batch, tokens=tokens, state=0, rows=len(rows) * 2 * 32, travel=not stay,
        unseen=passes * batch * (len(rows) + 1), added=0, targets=2,
    )  # fmt: skip
    assert most / 2 < max(taken) < most


def test_the_disk_must_have_room_for_rows_and_run(monkeypatch, tmp_path):
    free = [0]
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free[0]))
    kept = plan_of("rows", 4 * ROWS, monkeypatch)
    check_disk(kept, None)  # it stays in memory, and nobody says where it will be saved
    on_disk = plan_of("rows", 4 * ROWS - 4, monkeypatch)
    both = plan_of("rows", 4 * ROWS - 4, monkeypatch, passes=2)
    for plan, place, needed in (
        (kept, tmp_path, ROWS), (on_disk, tmp_path, ROWS), (on_disk, None, ROWS),
        (both, None, 2 * ROWS),
    ):  # fmt: skip
        free[0] = needed
        check_disk(plan, place)
        free[0] -= 1
        with pytest.raises(OSError, match="make room"):
            check_disk(plan, place)


def test_a_twin_leaves_as_many_rows_again(monkeypatch):
    one = plan_of("auto", 16 * ROWS, monkeypatch)
    both = plan_of("auto", 16 * ROWS, monkeypatch, passes=2)
    assert (both.size, both.kept, both.floats) == (2 * one.size, one.kept, one.floats)
    assert plan_of("auto", 8 * ROWS - 4, monkeypatch, passes=2).on_disk


def test_auto_keeps_rows_that_fit_or_are_smaller_or_must_be(monkeypatch):
    """Of 200 samples the rows are larger than statistics of one cell."""
    rows, grams = 100 * ROWS, GRAMS // 5
    told = []
    for memory in (4 * rows, 4 * rows - 4, grams, grams - 1):
        plan = plan_of("auto", memory, monkeypatch, n=200, cells=1)
        told.append((plan.kind, plan.on_disk, plan.kept))
    kept = ("gram", False, grams)
    assert told == [("rows", False, rows), kept, kept, ("rows", True, 0)]
    plan = plan_of("auto", 4 * ROWS, monkeypatch)  # they fit
    assert (plan.kind, plan.on_disk, plan.kept) == ("rows", False, ROWS)
    plan = plan_of("auto", 4 * ROWS - 4, monkeypatch)  # they do not, and are smaller
    assert (plan.kind, plan.on_disk, plan.kept) == ("rows", True, 0)


def places(n=30, **columns):
    r = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "id": [str(i) for i in range(n)],
            "latitude": r.uniform(-80, 80, n),
            "longitude": r.uniform(-170, 170, n),
            **columns,
        }
    )


def tasks_of(table, splits=(KFOLD,), group=None):
    y = torch.tensor(table[list(TARGETS)].to_numpy())
    return make_tasks(table, splits, group, y, TARGETS)


def test_a_fold_needs_two_samples():
    with pytest.raises(ValueError, match=r"fold 4 of split 'kfold' has too few samples \(1\)"):
        tasks_of(places(9))
    assert len(tasks_of(places(10))[0]) == 1


def test_a_target_that_is_constant_in_a_fold_is_named():
    table = places(35, city=list("abcde") * 7)
    for city, value in zip("abcde", range(5), strict=True):
        table.loc[table["city"] == city, "longitude"] = float(value)
    pattern = r"target 'longitude' is \d for all 7 samples of fold \d of split 'group:city'"
    with pytest.raises(ValueError, match=pattern):
        tasks_of(table, [gf.GroupKFold("city")])
    assert len(tasks_of(table)[0]) == 1


def test_groups_that_cannot_be_scored_are_left_out_with_a_warning():
    zone = ["few"] * 4 + ["b"] * 12 + ["same"] * 14
    table = places(30, zone=zone)
    table.loc[table["zone"] == "same", "latitude"] = 7.5
    tasks, (warning,) = tasks_of(table, group="zone")
    assert [t.group for t in tasks] == ["", "b"]
    assert "Groups left out: few (kfold), same (kfold)" in warning
    assert "4 samples cannot fill 5 folds" in warning
    assert tasks_of(table)[1] == []


def test_skipped_samples_keep_the_folds_they_were_gathered_in():
    table = places(30, zone=["a"] * 6 + ["b"] * 11 + ["c"] * 13)
    tasks, _ = tasks_of(table, [gf.KFold(3)], "zone")
    cells, tasks = with_cells(tasks)
    y = torch.tensor(table[list(TARGETS)].to_numpy())
    kept = np.array([i for i in range(30) if i not in (2, 9)])
    after, warned = without_skipped(tasks, kept, y, TARGETS)
    assert [t.group for t in after] == ["", "b", "c"]
    assert "a (kfold)" in warned[0]
    for task, before in zip(after, [tasks[0], tasks[2], tasks[3]], strict=True):
        assert torch.equal(task.fold, before.fold[kept])
        assert torch.equal(task.fold, task.fold_of_cell[cells[kept]])


def test_a_split_that_lost_a_fold_is_refused():
    table = places(10)
    tasks, _ = tasks_of(table)
    _, tasks = with_cells(tasks)
    y = torch.tensor(table[list(TARGETS)].to_numpy())
    kept = (tasks[0].fold < 4).nonzero()[:, 0].numpy()
    with pytest.raises(ValueError, match=r"fold 4 of split 'kfold' has too few samples \(0\)"):
        without_skipped(tasks, kept, y, TARGETS)
