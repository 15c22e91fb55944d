"""What bench/run.py makes of the benchmarks' reports, and that no benchmark is dead."""

import importlib.util
import json
from pathlib import Path

import families
import pytest
import tiny
import torch

BENCH = Path(__file__).parents[1] / "bench"
COLLECT = ("--collect-only", "-qq", "-p", "no:cacheprovider", "--benchmark-disable")


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("bench_run", BENCH / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def benchmark(name, seconds, group=None, **params):
    return {
        "name": name, "fullname": f"bench/bench_a.py::{name}", "group": group,
        "params": params or None, "stats": {"median": seconds}, "extra_info": {},
    }  # fmt: skip


def test_the_last_two_runs_of_the_same_benchmarks(run, tmp_path):
    def save(name, day, *benchmarks, machine="here"):
        path = tmp_path / machine / name
        path.parent.mkdir(exist_ok=True)
        members = [benchmark(b, 1.0) for b in benchmarks]
        path.write_text(json.dumps({"datetime": f"2026-01-{day:02}T", "benchmarks": members}))
        return path

    save("0009.json", 1, "x", "y")
    two = save("0002.json", 2, "y", "x")
    one_file = save("0003.json", 3, "x")
    assert run.last_alike([one_file, two]) is None
    four = save("0001.json", 4, "x", "y")
    save("0005.json", 5, "z")
    save("0001.json", 6, "x", "y", machine="there")
    assert run.last_alike(tmp_path.rglob("*.json")) == (two, four)


def test_tables_name_every_way(run):
    jobs = [
        benchmark("test_geofast[d768-gcv]", 0.1, "probe d=768", job="d768", select="gcv"),
        benchmark("test_geofast[d768-loo]", 0.5, "probe d=768", job="d768", select="loo"),
        benchmark("test_torch_cholesky[d768]", 0.2, "probe d=768", job="d768"),
    ]
    jobs[2]["extra_info"] = {"layers": 2, "GB/s": 3}
    assert run.table(jobs).splitlines() == [
        "**probe d=768**",
        "",
        "| way | milliseconds | ratio | note |",
        "|---|---|---|---|",
        "| geofast (gcv) | 100 | 1 |  |",
        "| geofast (loo) | 500 | 5 |  |",
        "| torch cholesky | 100 | 1 | GB/s 3 |",
    ]


@pytest.mark.parametrize("options", [[], ["-k", "pool"]])
def test_runs_with_options_are_not_kept(run, monkeypatch, tmp_path, capsys, options):
    commands = []

    def pytest_was_called(command):
        commands.append(command)
        path = next(c for c in command if str(c).startswith("--benchmark-json="))
        members = [benchmark("test_geofast", 1.0, "job")]
        report = {"machine_info": {"python_version": "3", "processor": "cpu"}}
        Path(path.partition("=")[2]).write_text(json.dumps({**report, "benchmarks": members}))
        return 0

    monkeypatch.setattr(run.subprocess, "call", pytest_was_called)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "version", lambda name: "1")  # himalaya need not be there
    assert run.main(options) == 0
    assert "| geofast | 1e+03 | 1 |" in capsys.readouterr().out
    assert ("--benchmark-autosave" in commands[0]) == (not options)
    assert len([*tmp_path.rglob("bench_a.md")]) == (not options)


def test_no_table_where_nothing_was_run(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run.subprocess, "call", lambda command: 5)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    assert run.main(["-k", "nothing"]) == 5
    assert "no benchmark was run" in capsys.readouterr().err
    assert not [*tmp_path.rglob("*")]


# ------ the benchmarks themselves


class Collected:
    """A plugin of pytest that notes what was collected."""

    def pytest_collection_finish(self, session):
        self.files = {item.path.name for item in session.items}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


@pytest.mark.usefixtures("bench")
def test_every_file_has_benchmarks():
    found = Collected()
    assert pytest.main([*COLLECT, str(BENCH)], plugins=[found]) == 0
    assert found.files == {path.name for path in BENCH.glob("bench_*.py")}
    assert "bench_talking.py" in found.files


def small(bench, kind):
    """A benchmark's module, and the smallest job for it."""
    if kind == "talking":
        module = bench("bench_talking")
        return module, module.job_of(families.llava, 2)
    module = bench("bench_pass")
    torch.manual_seed(0)
    if kind == "vision":
        return module, (tiny.vit(), module.images(2, 32), ["cls", "mean:patch"])
    return module, (tiny.llama().model, module.texts(2, 90), ["last"])


def off(rows):
    return rows + 1e-2 if isinstance(rows, torch.Tensor) else [part + 1e-2 for part in rows]


@pytest.mark.parametrize("kind", ["vision", "language", "talking"])
def test_every_way_of_the_pass_gives_the_same_rows(bench, monkeypatch, kind):
    module, job = small(bench, kind)
    module.check(*job)
    for way in ("stacked", "study"):
        with monkeypatch.context() as changed:
            found = getattr(module, way)(*job)
            changed.setattr(module, way, lambda *_, found=found: off(found))
            with pytest.raises(AssertionError, match="not close"):
                module.check(*job)


@pytest.mark.parametrize("kind", ["vision", "language", "talking"])
def test_what_capture_adds_is_measured(bench, kind):
    overhead, (module, job) = bench("overhead"), small(bench, kind)
    bare, probed = module.forwards(*job, times=7)
    with overhead.stopwatch() as inside:
        probed()
        before = len(inside)
        bare()
    assert len(inside) == before > 0
    assert min(overhead.in_pairs(bare, probed, 1)) > 0
    alone, together = overhead.peaks(bare, probed)
    assert alone > 0
    assert together - alone < overhead.MEGABYTES
