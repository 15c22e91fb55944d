import random

import numpy as np
import pytest
import torch

from geofast import accumulate
from geofast.accumulate import Statistics, TokenStatistics
from geofast.batching import Budget
from geofast.gram import Gram, update
from geofast.models.layout import Layout
from geofast.streams import Aside

WIDTHS = {"a": 3, "b": 4}


def test_every_row_is_added_once_wherever_memory_runs_out(monkeypatch):
    chance = random.Random(1)
    failed = 0

    def short(grams, rows, y, cell):
        """Run out of memory now and then, with some cells of some sites added."""
        nonlocal failed
        if len(y) == 1 or chance.random() < 0.5:
            return update(grams, rows, y, cell)
        failed += 1
        whole, cells = chance.randint(0, len(grams) - 1), chance.randint(0, grams[0].cells)
        if whole:
            update(grams[:whole], rows[:whole], y, cell)
        some = slice(whole, whole + 1)
        update(grams[some], rows[some], y, torch.where(cell < cells, cell, -1))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("geofast.accumulate.update", short)
    for seed in range(60):
        r = np.random.default_rng(seed)
        n, cells = chance.randint(3, 60), chance.randint(1, 6)
        y = torch.from_numpy(r.normal(size=(n, 2)))
        rows = {key: torch.from_numpy(r.normal(size=(n, d))) for key, d in WIDTHS.items()}
        cell = torch.from_numpy(r.integers(-1, cells, n))
        statistics = Statistics(cells, budget := Budget(1), Aside())
        order, done = r.permutation(n), 0
        while done < n:
            some = order[done : done + chance.randint(1, 40)]
            statistics.add({key: x[some] for key, x in rows.items()}, y[some], cell[some])
            done += len(some)
            budget.rows *= chance.choice((0, 1, 7))
        for key, x in rows.items():
            whole = Gram(x.shape[1], 2, cells).update(x, y, cell)
            assert statistics.grams[key].count.tolist() == whole.count.tolist()
            torch.testing.assert_close(statistics.grams[key]._about(whole.shift), whole.matrix)
    assert failed > 100


def test_what_memory_never_takes_is_named(monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr("geofast.accumulate.update", full)
    rows = {key: torch.zeros(5, d) for key, d in WIDTHS.items()}
    with pytest.raises(RuntimeError, match="the statistics of a and 1 more do not fit into the"):
        Statistics(1, Budget(1), Aside()).add(rows, torch.zeros(5, 1), torch.zeros(5).long())


def test_statistics_of_tokens_begin_again_where_memory_ran_out(monkeypatch):
    """Before the shift of the first batch was known, which comes again in halves."""
    left = [1]

    def short(hidden, chosen):
        if left:
            raise torch.OutOfMemoryError(f"CUDA out of memory, {left.pop()}")
        return mean(hidden, chosen)

    mean = accumulate._mean
    monkeypatch.setattr(accumulate, "_mean", short)
    r = torch.Generator().manual_seed(0)
    hidden, y = torch.randn(4, 5, 3, generator=r), torch.randn(4, 2, generator=r)
    statistics, cell = TokenStatistics(2, grams := {}), torch.tensor([0, 1, 1, 0])
    for some in ([0, 1, 2, 3], [0, 1], [2, 3]):
        statistics.begin(some, y[some], cell[some])
        layout = Layout(torch.full((len(some), 5), 255, dtype=torch.uint8), None)
        try:
            statistics.take("a", hidden[some].flatten(0, 1), layout, "all")
        except torch.OutOfMemoryError:
            statistics.fail()
    of_token = cell.repeat_interleave(5)
    whole = Gram(3, 2, 2).update(hidden.flatten(0, 1), y.repeat_interleave(5, 0), of_token)
    assert grams["a"].count.tolist() == whole.count.tolist()
    torch.testing.assert_close(grams["a"]._about(whole.shift), whole.matrix)


def test_statistics_that_no_memory_has_room_for_are_named(monkeypatch):
    def full(*_, device):
        raise MemoryError

    monkeypatch.setattr(accumulate, "Gram", full)
    with pytest.raises(RuntimeError, match="the statistics of a do not fit into the memory of cpu"):
        Statistics(1, Budget(1), Aside()).add(
            {"a": torch.zeros(5, 3)}, torch.zeros(5, 1), torch.zeros(5).long()
        )
