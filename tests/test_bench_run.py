"""What bench/run.py makes of the benchmarks' reports."""

import importlib.util
import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def run():
    path = Path(__file__).parents[1] / "bench" / "run.py"
    spec = importlib.util.spec_from_file_location("bench_run", path)
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
