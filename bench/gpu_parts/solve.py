"""The solve stage: every layer, fold and penalty at once, from statistics on the device."""

import statistics
import sys
import time
from contextlib import nullcontext
from functools import partial
from unittest import mock

import torch

import geofast as gf
from geofast.gram import Gram
from geofast.ridge.solve import cross_validate_many, solve_many

from .profiled import breakdown
from .timing import in_turn

FOLDS, TARGETS = 5, 2
OWN = "geofast's choice"
FACTORS = {  # the precisions of Cholesky factors that are tried, one after the other
    OWN: None,
    "float32 first": [torch.float32, torch.float64],
    "float64 alone": [torch.float64],
}


def main(run):
    sizes = [(24, 1024, 0.040), (32, 4096, 0.3)]
    for layers, d, limit in [(2, 300, 0.04)] if run.dry else sizes[:1] if run.quick else sizes:
        if run.enough(10, f"{layers} layers of d={d}"):
            with run.case(f"{layers} layers of d={d}"):
                many(run, layers, d, limit)
    layers, n, d = (1, 400, 300) if run.dry else (24, 5000, 1024)
    if run.enough(10, "leave-one-out"):
        with run.case("leave-one-out"):
            left_out(run, layers, n, d)
    if run.enough(10, "one layer from rows, against peers"):
        with run.case("peers"):
            from_rows(run)


def rows_of(run, n, d, seed):
    """Rows [n, d] with a power-law spectrum and large means, targets [n, k] in their directions."""
    torch.manual_seed(seed)
    new = {"device": run.device}
    latent = torch.randn(n, d, **new)
    scale = 1.0 / torch.arange(1, d + 1, device=run.device)
    x = latent * (0.5 * scale / scale.square().mean().sqrt())
    x += 0.05 * torch.randn(n, d, **new) + 5 * torch.randn(d, **new)
    y = latent[:, :16].double() @ torch.randn(16, TARGETS, dtype=torch.float64, **new)
    return x, (y + torch.randn(n, TARGETS, dtype=torch.float64, **new)).cpu()


def gram_of(run, x, y, fold):
    return Gram(x.shape[1], TARGETS, FOLDS, device=run.device).update(x, y, fold)


def many(run, layers, d, limit):
    """Time statistics of many layers on the device, and hold one layer to a direct solution."""
    n = 2 * d if run.dry else 8 * d
    grams = []
    for seed in range(layers):
        x, y = rows_of(run, n, d, seed)
        grams.append(gram_of(run, x, y, torch.arange(n) % FOLDS))
    del x, y

    def hold(found):
        for layer in (0, layers - 1):
            compare(run, grams[layer], found[layer])

    values = {"layers": layers, "d": d, "rows": n}
    solve = partial(solve_many, grams, gf.ALPHAS)
    by_factors(run, "from statistics", solve, hold, {"ms": ("at most", 1e3 * limit)}, values)
    breakdown(run, f"a solve of {layers} layers, d={d}", solve)


def by_factors(run, table, solve, hold, goals, values):
    """Record a row for each precision of factors; the goals are those of what geofast chooses."""
    ways, method = {}, {}
    for name, dtypes in FACTORS.items():
        way = partial(solved_with, dtypes, solve)
        with nullcontext() if name == OWN else run.peer(f"{table}, {values}, {name}"):
            found = way()
            hold(found)
            ways[name], method[name] = way, found[0].method
    for name, seconds in in_turn(run, ways, 7, 10).items():
        run.row(
            table, goals if name == OWN else {}, **values, factors=name,
            ms=1e3 * statistics.median(seconds), fastest_ms=1e3 * min(seconds),
            method=method[name],
        )  # fmt: skip


def solved_with(dtypes, solve):
    """Solve with such factors whatever geofast would choose; None leaves the choice to it."""
    module = sys.modules[solve_many.__module__]
    with mock.patch.object(module, "_precisions", return_value=dtypes) if dtypes else nullcontext():
        return solve()


def compare(run, gram, solution):
    """Hold scores and penalties to those of a direct solution in float64, fold by fold."""
    if isinstance(solution, ValueError):
        raise solution
    for f in range(FOLDS):
        alpha, r2 = direct(gram, f, [float(solution.alpha[f])] if f else gf.ALPHAS)
        run.require(
            alpha == float(solution.alpha[f]),
            f"fold {f}: GCV is least at {alpha:g}, and {float(solution.alpha[f]):g} was chosen",
        )
        off = float((r2.cpu() - solution.r2[f]).abs().max())
        run.require(off < 1e-6, f"fold {f}: R2 is off by {off:.1e}")


def direct(gram, fold, alphas):
    """Return the penalty of least GCV and its held-out R2 [k], by a Cholesky for every penalty."""
    d = gram.dim
    full = gram.matrix + gram.matrix.tril(-1).mT
    train, held = full.sum(0) - full[fold], full[fold]
    n, s, t = train[d, d], train[d, :d], train[d, d + 1 :]
    a = train[:d, :d] - torch.outer(s, s) / n
    b = train[:d, d + 1 :] - torch.outer(s, t) / n
    yy = (train[d + 1 :, d + 1 :] - torch.outer(t, t) / n).diagonal().sum()
    eye, best = torch.eye(d, dtype=a.dtype, device=a.device), None
    for alpha in alphas:
        lower = torch.linalg.cholesky(a + alpha * eye)
        w = torch.cholesky_solve(b, lower)
        df = d - alpha * torch.linalg.solve_triangular(lower, eye, upper=False).square().sum()
        rss = yy - 2 * (w * b).sum() + (w * (a @ w)).sum()
        curve = float(rss / (n - 1 - df) ** 2)
        if best is None or curve < best[0]:
            best = curve, alpha, w
    _, alpha, w = best
    # Held-out rows about their means: their products with [w, -1] and the intercept.
    m, hs, ht = held[d, d], held[d, :d], held[d, d + 1 :]
    hx, hb = held[:d, :d], held[:d, d + 1 :]
    c = (t - w.mT @ s) / n
    sse = held[d + 1 :, d + 1 :].diagonal() - 2 * (w * hb).sum(0) + (w * (hx @ w)).sum(0)
    sse += m * c**2 + 2 * c * (w.mT @ hs - ht)
    return alpha, 1 - sse / (held[d + 1 :, d + 1 :].diagonal() - ht**2 / m)


# ------ exact leave-one-out of every layer's rows


def left_out(run, layers, n, d):
    """Time rows of many layers on the device, and hold one fold to its spectrum."""
    pairs = [rows_of(run, n, d, seed) for seed in range(layers)]
    tables, y, fold = [x for x, _ in pairs], pairs[0][1], torch.arange(n) % FOLDS
    first, last = (
        spectral(tables[layer][(fold != 0).to(run.device)], y[fold != 0])
        for layer in (0, layers - 1)
    )

    def hold(found):
        for layer, curve in ((0, first), (layers - 1, last)):
            if isinstance(found[layer], ValueError):
                raise found[layer]
            # Of two alphas that do as well, rounding may prefer either.
            chosen = curve[gf.ALPHAS.index(float(found[layer].alpha[0]))]
            run.require(
                chosen <= min(curve) * (1 + 1e-9),
                f"layer {layer}: the leave-one-out error is {chosen:g}, at least {min(curve):g}",
            )

    values = {"layers": layers, "d": d, "rows": n}
    solve = partial(cross_validate_many, tables, y, fold, gf.ALPHAS)
    by_factors(run, "exact leave-one-out, from rows", solve, hold, {}, values)
    if not run.dry:  # on the CPU it is 86,000 operators, which the profiler takes 15 seconds for
        breakdown(run, f"leave-one-out of {layers} layers, d={d}", solve)


def spectral(x, y):
    """Return the leave-one-out error of every penalty, from the eigenvectors of X'X."""
    x, y = x.double(), y.to(x.device)
    x, y = x - x.mean(0), y - y.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)
    turned, found = x @ vectors, []
    for alpha in gf.ALPHAS:
        inverse = 1 / (values.clamp_min(0) + alpha)
        fit = turned @ (inverse[:, None] * (turned.T @ y))
        free = 1 - 1 / len(x) - turned.square() @ inverse
        found.append(float(((y - fit) / free[:, None]).square().mean()))
    return found


# ------ one layer, from rows, and other ways to it


def from_rows(run):
    n, d = (300, 20) if run.dry else (5000, 1024)
    x, y = rows_of(run, n, d, 0)
    fold = torch.arange(n) % FOLDS

    def ours():
        return solve_many([gram_of(run, x, y, fold)], gf.ALPHAS)[0]

    ours()
    seconds = statistics.median(in_turn(run, {"ours": ours}, 7, 3)["ours"])
    r2 = ours().r2.mean()
    row = {"d": d, "rows": n, "r2": r2}
    run.row("one layer", **row, way="geofast, statistics and solution", ms=1e3 * seconds, ratio=1.0)
    peers = {"geofast on the CPU": on_cpu, "scikit-learn, one fold of five": sklearn_fold}
    if not run.dry:
        peers["himalaya on CUDA"] = himalaya
    for name, way in peers.items():
        with run.peer(name):
            took, theirs = way(x, y, fold)
            values = {"d": d, "rows": n, "r2": theirs, "way": name}
            run.row("one layer", **values, ms=1e3 * took, ratio=took / seconds)


def on_cpu(x, y, fold):
    x = x.cpu()
    found = []
    for _ in range(3):
        start = time.perf_counter()
        gram = Gram(x.shape[1], TARGETS, FOLDS).update(x, y, fold)
        r2 = solve_many([gram], gf.ALPHAS)[0].r2.mean()
        found.append(time.perf_counter() - start)
    return statistics.median(found), float(r2)


def sklearn_fold(x, y, fold):
    """RidgeCV by leave-one-out, as the study has it; timed in one fold, times five."""
    from sklearn.linear_model import RidgeCV
    from sklearn.metrics import r2_score

    x, y, held = x.cpu().numpy(), y.numpy(), (fold == 0).numpy()
    start = time.perf_counter()
    model = RidgeCV(alphas=gf.ALPHAS).fit(x[~held], y[~held])
    r2 = r2_score(y[held], model.predict(x[held]))
    return FOLDS * (time.perf_counter() - start), float(r2)


def himalaya(x, y, fold):
    """RidgeCV on CUDA in every fold, its penalty chosen on five inner ones."""
    from himalaya.backend import set_backend
    from himalaya.ridge import RidgeCV
    from sklearn.metrics import r2_score

    set_backend("torch_cuda", on_error="raise")
    y32, fold = y.float().to(x.device), fold.to(x.device)
    for _ in range(2):  # the first makes the libraries' workspaces
        torch.cuda.synchronize()
        start = time.perf_counter()
        scores = []
        for f in range(FOLDS):
            model = RidgeCV(alphas=list(gf.ALPHAS), fit_intercept=True, cv=5)
            model.fit(x[fold != f], y32[fold != f])
            guess = model.predict(x[fold == f])
            scores.append(r2_score(y[(fold == f).cpu()], guess.cpu()))
        took = time.perf_counter() - start
    return took, sum(scores) / len(scores)
