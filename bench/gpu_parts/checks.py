"""The tests of the kernels, natively. One that does not run is a failure."""

import os
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path

from .install import ROOT
from .process import call

ASKS = "cuda.is_available()"  # in a file of tests: some of them run on a GPU where there is one
NEEDED = ("test_kernels_pool.py", "test_kernels_gram.py", "test_cuda_gram.py")
WORKERS = 6  # kernels are compiled by the host
HANGS = 40  # seconds of a test after which it is ended, so that the others are known


def main(run, env):
    """Run the tests; record how many passed, and every other by name."""
    files = files_with_a_gpu_part()
    missing = sorted({*NEEDED} - {file.name for file in files})
    if missing:
        run.error(f"no such tests, or they never ask for a GPU: {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="geofast-tests-") as folder:
        if run.dry:
            files = [Path(folder, "test_dry.py")]
            files[0].write_text("def test_nothing():\n    pass\n")
        report = Path(folder, "report.xml")
        # Not from the checkout, where `import geofast` would find the sources.
        code, output = call(
            command(files, report, max(run.left() - 10, 1)), run.left(), cwd=folder, env=env
        )
        judge(run, code, output, report)


def files_with_a_gpu_part():
    """Return the files of tests some of which run on a GPU, where there is one."""
    found = sorted((ROOT / "tests").glob("test_*.py"))
    return [f for f in found if ASKS in f.read_text() and f.name != "test_bench_gpu.py"]


def command(files, report, seconds):
    options = ["-q", "-p", "no:cacheprovider", "-W", "default", "-k", "not emulated", "--tb=short"]
    options += ["-n", str(WORKERS)] if find_spec("xdist") and len(files) > 1 else []
    if find_spec("pytest_timeout"):  # which writes the report of what ran by then
        ends = [f"--timeout={HANGS}", "--timeout-method=thread"]  # a thread ends a hanging GPU too
        options += [*ends, f"--session-timeout={seconds:.0f}"]
    paths = ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}", f"--junitxml={report}"]
    return [sys.executable, "-m", "pytest", *options, *paths, *map(str, files)]


def judge(run, code, output, report):
    """Record the outcome."""
    if code is None:
        run.error(f"the time for the tests was over; the last lines:\n{output[-2000:]}")
    outcomes = outcomes_of(report.read_text()) if report.exists() else {}
    for outcome in ("failed", "skipped"):
        names = [name for name, one in outcomes.items() if one == outcome]
        if names:
            more = ", ..." if len(names) > 20 else ""
            run.error(f"{len(names)} {outcome}: {', '.join(names[:20])}{more}")
    interpreted = [name for name in outcomes if "interpreted" in name]
    if interpreted:
        run.error(f"{len(interpreted)} ran under Triton's interpreter, the first {interpreted[0]}")
    for file in NEEDED if not run.dry else ():
        if not any(file.removesuffix(".py") in name for name in outcomes):
            run.error(f"{file}: none of its tests ran")
    if code:
        run.error(f"pytest ended with {code}:\n{output[-6000:]}")
    counts = {
        k: sum(one == k for one in outcomes.values()) for k in ("passed", "failed", "skipped")
    }
    goals = {"passed": ("at least", 1), "skipped": ("at most", 0), "failed": ("at most", 0)}
    run.row("tests on the GPU", goals, **counts)


def outcomes_of(xml):
    """Return "passed", "failed" or "skipped" of every test of a JUnit report."""
    found = {}
    for case in ElementTree.fromstring(xml).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = (
            "failed"
            if kinds & {"failure", "error"}
            else "skipped"
            if "skipped" in kinds
            else "passed"
        )
        found[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return found


def environment(folder):
    """Return the environment in which geofast is imported from `folder`, if one is given."""
    paths = [str(folder) if folder else "", os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
    }
