"""bench/gpu.py without a GPU: every part runs, loses nothing, and says what is wrong."""

import importlib
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pretend import DEVICE, Pretend

import geofast as gf
from geofast import _device, _ops, _reference, pooling

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module", autouse=True)
def on_path():
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


def part(name):
    return importlib.import_module(f"gpu_parts.{name}")


@pytest.fixture
def gpu():
    return importlib.import_module("gpu")


@pytest.fixture
def new_run(tmp_path):
    return lambda **options: part("run").Run(tmp_path / "events", 60, dry=True, **options)


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The outcome of a dry run: exit code, what it printed and its JSON."""
    out = tmp_path_factory.mktemp("gpu") / "out.json"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
        code = importlib.import_module("gpu").main(["--dry", "--out", str(out)])
    return code, "\n".join(printed), json.loads(out.read_text())


def test_every_part_runs_and_says_that_a_dry_run_measures_nothing(dry, gpu):
    code, printed, found = dry
    failed = {name: p["errors"] for name, p in found["parts"].items() if p["state"] != "done"}
    assert (code, failed, found["ok"]) == (0, {}, True)
    assert "its figures say nothing" in printed
    assert [*found["parts"]] == gpu.ALL
    assert found["dry"]
    assert {"python", "torch", "cuda", "triton", "cupy", "transformers"} <= {*found["machine"]}
    for name, one in found["parts"].items():
        assert one["seconds"] >= 0
        assert one["tables"] or name == "install", name


def test_the_json_has_a_verdict_on_every_target_of_the_engine(dry):
    _, printed, found = dry
    figures = {(t["part"], t["figure"], *t["goal"]) for t in found["targets"]}
    assert figures >= {
        ("images", "ratio", "at most", 1.01),
        ("images", "ratio", "at most", 1.02),
        ("images", "ratio", "at most", 1.5),
        ("images", "ours faster", "at least", 20),
        ("language", "ratio", "at most", 1.01),
        ("language", "ratio", "at most", 1.02),
        ("edits", "ratio", "at most", 1.03),
        ("pooling", "% of copy", "at least", 85),
        ("pooling", "to mean", "at most", 1.1),
        ("gram", "addmm_ from rows to ours", "at least", 1.0),
    }
    assert figures & {("gram", f"% of {what}", "at least", 65) for what in ("float64", "copy")}
    met = sum(t["verdict"] == "met" for t in found["targets"])
    assert f"{met} of {len(found['targets'])} met" in printed
    assert printed.count("- MISSED: ") == len(found["targets"]) - met


def test_factors_of_each_precision_are_timed_and_the_target_is_of_geofasts_choice(dry):
    _, _, found = dry
    tables = found["parts"]["solve"]["tables"]
    for name in ("from statistics", "exact leave-one-out, from rows"):
        rows = {row["values"]["factors"]: row for row in tables[name]}
        assert [*rows] == ["geofast's choice", "float32 first", "float64 alone"]
        assert "Cholesky in float32" in rows["float32 first"]["values"]["method"]
        assert "Cholesky in float64" in rows["float64 alone"]["values"]["method"]
        assert not any(rows[forced]["goals"] for forced in [*rows][1:])
    (busy,) = tables["busy GPU"]
    kernels = tables[f"kernels of {busy['values']['what']}"]
    assert 0 < sum(row["values"]["calls"] for row in kernels) <= busy["values"]["launches"]


def test_time_on_two_streams_counts_once():
    def event(start, end):
        length = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(time_range=length)

    events = [event(5000, 9000), event(0, 2000), event(1000, 4000), event(1500, 1600)]
    assert part("profiled").busy(events) == 8.0
    assert part("profiled").total(events) == 9.1


@pytest.mark.parametrize(
    ("got", "goal", "expected"),
    [
        (1.01, ("at most", 1.01), "met"),
        (1.011, ("at most", 1.01), "MISSED"),
        (65.0, ("at least", 65), "met"),
        (64.9, ("at least", 65), "MISSED"),
        (float("nan"), ("at least", 65), "MISSED"),
        (None, ("at most", 1.01), "not measured"),
    ],
)
def test_a_verdict_stands_beside_its_figure(got, goal, expected):
    report = part("report")
    row = {"values": {"model": "ViT", "ratio": got}, "goals": {"ratio": goal}}
    (target,) = report.targets({"images": {"tables": {"t": [row]}}})
    assert (target["verdict"], target["row"]) == (expected, "ViT")
    assert report.cell(row, "ratio").endswith(f": {expected})")
    told = report.summary([target])
    assert (f"- {expected}: images, ViT: ratio" in told) == (expected != "met")


def test_without_a_gpu_it_says_so_and_ends_with_2(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert "needs a GPU" in told.err


def test_parts_that_do_not_fit_are_left_out_with_a_line(gpu, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert gpu.main(["--dry", "--seconds", "1", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {p["state"] for p in found["parts"].values()} == {"left out"}
    assert not found["ok"]
    assert capsys.readouterr().out.count("are left of the time for all parts") == len(gpu.ALL)


def test_a_part_takes_no_time_that_others_need(gpu):
    needs = sum(gpu.PARTS[name].own for name in gpu.ALL)
    default = gpu.parser().parse_args([]).seconds - gpu.GRACE
    assert needs <= default < 480
    for spare in (0, 300):  # every part but the first gets its own, whatever the first takes
        left = needs + spare
        for i, name in enumerate(gpu.ALL):
            seconds, part = gpu.seconds_for(left, gpu.ALL[i:]), gpu.PARTS[name]
            assert part.own <= seconds <= min(part.most, part.own + spare)
            left -= seconds
            spare -= seconds - part.own
    # Where parts took too long, all others get as much of their own.
    late = ["gram", "solve", "edits"]
    assert gpu.seconds_for(60, late) == pytest.approx(30)
    assert gpu.seconds_for(30, late[1:]) == pytest.approx(20)


def test_ways_that_take_turns_follow_different_ones(new_run):
    order, run = [], new_run()
    run.dry = False
    ways = {name: partial(order.append, name) for name in "abc"}
    found = part("timing").in_turn(run, ways, 3, 60)
    assert "".join(order) == "abccbaabc"
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_gram_of_few_rows_is_held_to_the_memory_and_one_of_many_to_the_products(new_run):
    gram, run = part("gram"), new_run()
    figures = [("copy", 4300.0), ("float64", 60.0)]
    rows = [{"values": {"what": what, "figure": figure}} for what, figure in figures]
    run.given = {"parts": {"ceilings": {"tables": {"ceilings": rows}}}}
    for n in (2, 4000):
        job = gram.Job(run, 300, n)
        gram.record(
            run, "t", job, {"float64": 1e-3, "float32": 1e-3}, dict.fromkeys(gram.BOUNDS), {}
        )
    few, many = part("report").gather(run.path)["tables"]["t"]
    assert few["goals"]["% of copy"] == many["goals"]["% of float64"] == ["at least", 65]
    assert few["values"]["% of copy"] == pytest.approx(100 * (8 * 303**2 + 2 * 300 * 4) / 4.3e9)
    assert many["values"]["% of float64"] == pytest.approx(100 * 4000 * 300**2 / 60e9)


def test_some_parts_come_with_what_they_need(gpu):
    assert gpu.chosen("solve,gram") == ["install", "ceilings", "gram", "solve"]
    with pytest.raises(SystemExit, match="no part grams"):
        gpu.chosen("grams")


def test_a_part_that_fails_keeps_its_figures_and_costs_the_others_nothing(gpu, tmp_path, capsys):
    class Ceilings:
        @staticmethod
        def main(run):
            run.row("ceilings", what="copy", figure=7.0)
            raise RuntimeError("the GPU fell over")

    out = tmp_path / "out.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gpu_parts.ceilings", Ceilings)
        code = gpu.main(["--dry", "--only", "pooling", "--out", str(out)])
    found = json.loads(out.read_text())["parts"]
    assert (code, found["ceilings"]["state"], found["pooling"]["state"]) == (1, "failed", "done")
    assert found["ceilings"]["tables"]["ceilings"][0]["values"] == {"what": "copy", "figure": 7.0}
    assert "the GPU fell over" in found["ceilings"]["errors"][0]
    assert "FAILED: ceilings" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed_and_fails(new_run, monkeypatch):
    def wrong(x, roles, pools, out, starts=None):
        pooling.pool(x, roles, pools, out, starts)
        out[0][0, 0] *= 1.001

    monkeypatch.setattr(part("pooling"), "pool", wrong)
    run = new_run()
    part("pooling").main(run)
    found = part("report").gather(run.path)
    assert "pool cls is off by" in found["errors"][0]
    assert not found["tables"]


def test_wrong_sums_fail_and_a_broken_peer_is_a_note(new_run, monkeypatch):
    gram, run = part("gram"), new_run()
    ways = gram.peer_ways(run) | {"broken": (None, lambda out, x, shift: out.add_(1))}
    monkeypatch.setattr(gram, "peer_ways", lambda run: ways)
    gram.main(run)
    found = part("report").gather(run.path)
    assert not found["errors"]
    assert ["broken" in note for note in found["notes"]] == [True]
    monkeypatch.setitem(gram.BOUNDS, "float64", -1.0)  # sums this small may be exact
    gram.main(run)
    assert "products='float64': off by" in part("report").gather(run.path)["errors"][0]


def test_an_edit_that_changes_what_it_must_not_is_not_timed(new_run, monkeypatch):
    edits, run = part("edits"), new_run()
    direction = torch.linspace(-1, 1, 64)
    monkeypatch.setattr(
        edits, "nothing", lambda site, width: gf.add(site, direction, 9.0, 9.0, phase="both")
    )
    edits.main(run)
    found = part("report").gather(run.path)
    assert "an edit that adds 0 changes the answers" in found["errors"][0]
    assert not found["tables"]


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    path = tmp_path / "events"
    path.write_text('{"note": "a"}\n{"row": {"table": "t", "val')
    assert part("report").gather(path) == {"tables": {}, "notes": ["a"], "errors": []}
    assert part("report").gather(tmp_path / "none")["notes"] == []


def test_a_program_is_ended_in_time_with_what_it_started(tmp_path):
    pulse = tmp_path / "pulse"
    inner = "import time\nfor i in range(300):\n    time.sleep(0.1)\n"
    inner += f"    open({str(pulse)!r}, 'a').write('.')"
    outer = "import subprocess, sys; print('on', flush=True); "
    outer += f"subprocess.run([sys.executable, '-c', {inner!r}])"
    code, printed = part("process").call([sys.executable, "-c", outer], 4)
    assert (code, printed.strip()) == (None, "on")
    beats = pulse.read_text()
    assert 0 < len(beats) < 300  # it was not waited for
    time.sleep(1)
    assert pulse.read_text() == beats
    assert part("process").call([sys.executable, "-c", "raise SystemExit(3)"], 9) == (3, "")


def test_a_part_of_its_own_process_is_given_what_it_reads(gpu, tmp_path):
    options = gpu.parser().parse_args(["--quick"])
    command = gpu.command_of("gram", 12.3, options, tmp_path / "o.json", tmp_path / "e")
    assert Path(command[1]) == BENCH / "gpu.py"
    read = gpu.parser().parse_args(command[2:])
    assert (read.part, read.seconds, read.quick, read.dry) == ("gram", 12.3, True, False)
    assert (read.out, read.events) == (str(tmp_path / "o.json"), str(tmp_path / "e"))
    for name in {*gpu.PARTS} - {"install", "tests"}:
        assert callable(gpu.main_of(name))


def test_a_dry_run_where_geofast_is_not_installed_installs_it(gpu, monkeypatch, tmp_path):
    """Its parts are processes then, which are told that they are dry."""
    ran = []

    def call(command, seconds, *, env, **_):
        ran.append((gpu.parser().parse_args(command[2:]), env["PYTHONPATH"].split(":")[0]))
        return 0, ""

    monkeypatch.setattr(gpu.install, "install", lambda run: tmp_path)
    monkeypatch.setattr(gpu.process, "call", call)
    assert gpu.main(["--dry", "--only", "gram", "--out", str(tmp_path / "o.json")]) == 0
    assert [(o.part, o.dry, at) for o, at in ran] == [
        (name, True, str(tmp_path)) for name in ("ceilings", "gram")
    ]


def test_nothing_is_measured_where_the_install_failed(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu.install, "install", lambda run: run.error("no compiler"))
    out = tmp_path / "o.json"
    assert gpu.main(["--dry", "--only", "gram", "--out", str(out)]) == 1
    states = {name: one["state"] for name, one in json.loads(out.read_text())["parts"].items()}
    assert states == {"install": "failed", "ceilings": "left out", "gram": "left out"}
    assert "left out: the install failed" in capsys.readouterr().out


def test_a_gpu_test_that_skips_or_is_interpreted_is_a_failure(new_run, tmp_path):
    checks, run = part("checks"), new_run()
    xml = """<testsuites><testsuite>
      <testcase classname="tests.test_a" name="x[native]"/>
      <testcase classname="tests.test_a" name="y[native]"><skipped message="no GPU"/></testcase>
      <testcase classname="tests.test_a" name="z[interpreted]"><error/></testcase>
    </testsuite></testsuites>"""
    (tmp_path / "report.xml").write_text(xml)
    checks.judge(run, 1, "what pytest said", tmp_path / "report.xml")
    found = part("report").gather(run.path)
    told = "\n".join(found["errors"])
    assert "1 skipped: tests.test_a::y[native]" in told
    assert "1 failed: tests.test_a::z[interpreted]" in told
    assert "ran under Triton's interpreter" in told
    assert "what pytest said" in told
    (row,) = found["tables"]["tests on the GPU"]
    assert row["values"] == {"passed": 1, "failed": 1, "skipped": 1}


def test_the_tests_of_all_kernels_are_found():
    checks = part("checks")
    names = {file.name for file in checks.files_with_a_gpu_part()}
    assert names >= {*checks.NEEDED}
    command = checks.command([Path("tests/test_a.py")], Path("r.xml"), 70)
    assert command[1:3] == ["-m", "pytest"]
    assert "not emulated" in command


def test_geofast_is_built_apart_from_the_checkout(monkeypatch, new_run, tmp_path):
    install = part("install")
    monkeypatch.setattr(install.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(install, "editable", lambda: None)
    calls = []

    def pip(command, seconds, cwd):
        source, target = map(Path, (command[-1], command[command.index("--target") + 1]))
        calls.append(target)
        assert {"geofast", "kernels", "csrc", "pyproject.toml"} <= {
            p.name for p in source.iterdir()
        }
        assert not source.is_relative_to(install.ROOT)
        assert not target.is_relative_to(install.ROOT)
        (target / "geofast").mkdir(parents=True)
        return 0, ""

    monkeypatch.setattr(install, "call", pip)
    run = new_run()
    run.dry = False
    folder = install.install(run)
    assert install.install(run) == folder
    assert calls == [folder]  # once
    assert str(folder) == part("checks").environment(folder)["PYTHONPATH"].split(":")[0]


@pytest.mark.parametrize(("code", "told"), [(None, "pip ran out of time"), (1, "pip ended with 1")])
def test_a_build_that_fails_is_told_and_not_kept(code, told, monkeypatch, new_run, tmp_path):
    install, run = part("install"), new_run()
    monkeypatch.setattr(install.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(install, "editable", lambda: None)
    monkeypatch.setattr(
        install, "call", lambda command, seconds, cwd: (code, "the compiler's words")
    )
    run.dry = False
    assert install.install(run) is None
    (error,) = part("report").gather(run.path)["errors"]
    assert error == f"{told}:\nthe compiler's words"


class Far:
    """Operations of a device: the reference on the numbers themselves, and torch's solvers."""

    @staticmethod
    def pool(x, roles, jobs):
        _reference.pool(x.near, roles.near, [(op, bit, out.near) for op, bit, out in jobs])

    @staticmethod
    def grams(xs, shifts, z, order, offsets, outs, *, products):
        offsets = getattr(offsets, "near", offsets)
        for x, shift, out in zip(xs, shifts, outs, strict=True):
            _reference.gram(x.near, shift.near, z.near, order.near, offsets, out.near)


def far_backend(device, real=_ops.backend):
    if device != DEVICE:
        return real(device)
    names = {n: getattr(_device, n) for n in dir(_device) if not n.startswith("__")}
    ours = {n: getattr(Far, n) for n in ("pool", "grams")}
    return type(
        "Backend", (), {k: staticmethod(v) if callable(v) else v for k, v in (names | ours).items()}
    )


@pytest.mark.parametrize(
    "main",
    [
        "pooling.main",
        "table.main",
        "gram.main",
        "solve.main",
        "forwards.main_language",
        "edits.main",
    ],
)
def test_parts_mix_no_devices(main, new_run, monkeypatch):
    module, function = main.split(".")
    measure = getattr(part(module), function)  # decorates with what is replaced below
    monkeypatch.setattr(_ops, "backend", far_backend)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # as wrapped tensors want it
    run = new_run(quick=True)
    run.device = DEVICE
    with Pretend():
        measure(run)
    found = part("report").gather(run.path)
    assert found["errors"] == []
    assert found["tables"]


def test_every_tile_is_tried_and_its_result_held_to_the_reference(new_run, monkeypatch):
    # Stand-ins: what imports the kernels first, decides whether they are interpreted.
    kernels = SimpleNamespace(blocks=lambda capability: {})
    both = SimpleNamespace(pool=kernels, gram=kernels)
    monkeypatch.setitem(sys.modules, "geofast.kernels", both)
    tune, run = part("tune"), new_run()
    for name in ("pool_tiles", "gram_tiles"):
        few = [*getattr(tune, name)()][:2]
        assert [*few[0]] == [*few[1]]
        monkeypatch.setattr(tune, name, lambda few=few: few)
    tune.main(run)
    found = part("report").gather(run.path)
    assert (found["errors"], found["notes"]) == ([], [])
    assert len(found["tables"]["pooling"]) == 4
    assert len(found["tables"]["Gram with float32 products"]) == 2


@pytest.mark.parametrize("shape", [(2, 65, 130), (1, 3, 17), (5, 1, 1), (3, 9, 16)], ids=str)
@pytest.mark.parametrize("sites", [1, 4])
def test_one_launch_pools_every_site_as_the_reference_does(sites, shape, new_run):
    pytest.importorskip("triton")
    pool_sites, run = part("pool_sites").pool_sites, new_run()
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where it is interpreted
    xs = [torch.randn(shape, device=device).bfloat16() for _ in range(sites)]
    roles = part("pooling").roles_for(xs[0], min(1, shape[1] - 1))
    pools = [pooling.Pool.parse(name) for name in part("table").POOLS["all at once"]]
    outs = [part("pooling").outs_for(x, pools) for x in xs]
    pool_sites(xs, roles, part("table").jobs_of(pools, outs))
    for x, out in zip(xs, outs, strict=True):
        part("pooling").require_right(run, x, roles, pools, out)


COMPILES = """
import sys, torch
from geofast.kernels.compile_report import line_of
sys.path.insert(0, sys.argv[1])
from gpu_parts import pool_sites, table
from geofast.pooling import Pool

def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")

for pools in table.POOLS.values():
    xs = [empty(64, 257, 1024, dtype=torch.bfloat16)] * 25
    outs = [[empty(64, 1024) for _ in pools] for _ in xs]
    jobs = table.jobs_of([Pool.parse(name) for name in pools], outs)
    _, arguments = pool_sites.launch(xs, empty(64, 257, dtype=torch.uint8), jobs)
    for architecture in (80, 90, 100):
        line = line_of(" ".join(pools), pool_sites.sites_kernel, arguments, architecture)
        print(line)
        assert not line.refused
"""


def test_the_launch_for_every_site_compiles_without_spills():
    pytest.importorskip("triton")
    # In a process of its own: the interpreter is in the place of the compiler here.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-c", COMPILES, str(BENCH)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout + ran.stderr
