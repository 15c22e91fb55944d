"""What a probe found, as the tables of its run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from .data import Samples
from .geo import error_km, fold_scores
from .plan import Task
from .request import Labelled
from .run import beside, key
from .solving import Solved


def layers_table(
    solved: Sequence[Solved], tasks: Sequence[Task], y: torch.Tensor, targets: Sequence[str]
) -> pd.DataFrame:
    rows = []
    for s in solved:
        task, r2 = tasks[s.task], s.solution.r2
        assert r2 is not None
        assert s.solution.mse is not None
        per_fold = r2.mean(1)
        row: dict[str, Any] = {
            "site": s.site,
            "tower": "" if s.site == "input" else s.site.partition(".")[0],
            "layer": _layer(s.site),
            "pool": s.pool,
            "prompt": s.prompt,
            "group": task.group,
            "split": task.split,
            "control": s.control,
            "n": s.n,
            "d": s.d,
            "alpha": _common_alpha(s.solution.alpha),
            "r2": float(per_fold.mean()),
            "r2_se": _standard_error(per_fold),
        }
        for i, name in enumerate(targets):
            row[f"r2_{name}"] = float(r2[:, i].mean())
            row[f"r2_se_{name}"] = _standard_error(r2[:, i])
            row[f"rmse_{name}"] = float(s.solution.mse[:, i].sqrt().mean())
        rows.append(row | _row_scores(s, task, y, targets))
    table = pd.DataFrame(rows)
    return table.join(beside(table).add_prefix("r2:"))


def _row_scores(s: Solved, task: Task, y: torch.Tensor, targets: Sequence[str]) -> dict[str, float]:
    """Scores that need predictions; none without."""
    if s.solution.predictions is None:
        return {}
    fold = task.fold
    if s.member is not None:
        y, fold = y[s.member], fold[s.member]
    guess, truth = s.solution.predictions.numpy(), y.numpy()
    scores = fold_scores(guess[None], truth, fold.numpy())
    out = {}
    for i, name in enumerate(targets):
        out[f"mae_{name}"] = float(scores.mae[0, :, i].mean())
        out[f"spearman_{name}"] = float(scores.spearman[0, :, i].mean())
    if {"latitude", "longitude"} <= set(targets):
        place = [targets.index(name) for name in ("latitude", "longitude")]
        km = error_km(*truth[:, place].T, *guess[:, place].T)
        out |= {"mean_km": float(km.mean()), "median_km": float(np.median(km))}
    return out


def _layer(site: str) -> int | None:
    parts = site.split(".")
    return int(parts[2]) if len(parts) > 2 and parts[1] == "layers" else None


def _common_alpha(alpha: torch.Tensor) -> float:
    """Return the alpha of all folds, exactly; where they differ, their geometric mean."""
    first = float(alpha[0])
    return first if bool((alpha == first).all()) else float(alpha.log().mean().exp())


def _standard_error(per_fold: torch.Tensor) -> float:
    return float(per_fold.std() / len(per_fold) ** 0.5)


def honest_best(
    solved: Sequence[Solved], layers: pd.DataFrame, targets: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Choose the probe on inner folds, score it on outer ones; by split, for everybody."""
    honest = {}
    for split in dict.fromkeys(layers["split"]):
        named = (layers["split"] == split) & (layers["group"] == "") & (layers["control"] == "")
        candidates = [solved[i] for i in np.flatnonzero(named).tolist()]
        if not candidates or candidates[0].solution.inner_r2 is None:
            continue
        inner = torch.stack([c.inner_r2 for c in candidates])
        chosen = inner.nan_to_num(-torch.inf).argmax(0)
        by_target = torch.stack([_outer(candidates[c], f) for f, c in enumerate(chosen.tolist())])
        r2 = by_target.mean(1)
        names = [key(c.site, c.pool, c.prompt) for c in (candidates[int(i)] for i in chosen)]
        most = candidates[int(chosen.mode().values)]
        honest[split] = {
            "site": most.site,
            "pool": most.pool,
            "prompt": most.prompt,
            "r2": float(r2.mean()),
            "r2_se": _standard_error(r2),
            **{f"r2_{t}": float(by_target[:, i].mean()) for i, t in enumerate(targets)},
            **{f"r2_se_{t}": _standard_error(by_target[:, i]) for i, t in enumerate(targets)},
            "chosen": names,
        }
    return honest


def _outer(s: Solved, fold: int) -> torch.Tensor:
    assert s.solution.r2 is not None
    return s.solution.r2[fold]


def predictions_table(
    solved: Sequence[Solved],
    tasks: Sequence[Task],
    given: Labelled,
    targets: Sequence[str],
) -> pd.DataFrame:
    """Held-out predictions of the best probe of every split."""
    tables = [_best_predictions(s, tasks[s.task], given, targets) for s in _bests(solved, tasks)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _bests(solved: Sequence[Solved], tasks: Sequence[Task]) -> Iterator[Solved]:
    for t, task in enumerate(tasks):
        real = [
            s
            for s in solved
            if s.task == t and not s.control and s.solution.predictions is not None
        ]
        if real and not task.group:
            yield max(real, key=lambda s: float(s.r2.mean()))


def _best_predictions(
    s: Solved, task: Task, given: Labelled, targets: Sequence[str]
) -> pd.DataFrame:
    assert s.solution.predictions is not None
    guess = s.solution.predictions.numpy()
    table = pd.DataFrame({"split": task.split, "id": given.samples.table["id"].to_numpy()})
    table["site"], table["pool"], table["prompt"] = s.site, s.pool, s.prompt
    table["fold"] = task.fold.numpy()
    for i, name in enumerate(targets):
        table[name], table[f"{name}_predicted"] = given.y[:, i].numpy(), guess[:, i]
    if {"latitude", "longitude"} <= set(targets):
        table["error_km"] = error_km(
            table["latitude"], table["longitude"],
            table["latitude_predicted"], table["longitude_predicted"],
        )  # fmt: skip
    return table


def samples_table(samples: Samples, tasks: Sequence[Task]) -> pd.DataFrame:
    table = samples.table.copy()
    for task in tasks:
        if not task.group:
            table[f"fold_{task.split}"] = task.fold.numpy()
    return table
