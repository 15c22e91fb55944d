"""What `gf.capture` adds to a model's own forward: time, and memory at its peak.

Forwards are timed in pairs, bare and probed in turn, because the clock of a machine drifts by more
than the difference. Where others use the machine too, even the paired ratio moves by several per
cent, so it is printed; what is asserted is the time inside the hooks, as a share of the bare
forward, which is the steadier figure.
"""

import importlib
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from unittest import mock

SHARE = 0.01  # of the bare forward, inside the hooks
MEGABYTES = 32  # above the bare forward's peak
HOOKS = ("_start", "_note_mask", "_read", "_finish")


@contextmanager
def stopwatch():
    """Yield a list to which every hook of `gf.capture` adds the seconds that it took."""
    seconds = []

    def timed(hook):
        def run(*args):
            start = time.perf_counter()
            hook(*args)
            seconds.append(time.perf_counter() - start)

        return run

    recorder = import_module("geofast.capture").Recorder  # gf.capture is the function
    with ExitStack() as stack:
        for name in HOOKS:
            plain = getattr(recorder, name)
            stack.enter_context(mock.patch.object(recorder, name, timed(plain)))
        yield seconds


def in_pairs(bare, probed, pairs):
    """Return the share of the bare forward that is spent inside the hooks, and the paired ratio."""
    with stopwatch() as inside:
        probed()  # makes room for the rows
        rounds = []
        for _ in range(pairs):
            inside.clear()
            start = time.perf_counter()
            bare()
            middle = time.perf_counter()
            probed()
            rounds.append((middle - start, time.perf_counter() - middle, sum(inside)))
    alone, _, hooks = map(statistics.median, zip(*rounds, strict=True))
    return hooks / alone, statistics.median(p / b for b, p, _ in rounds)


def measure(benchmark, bare, probed, pairs):
    """Time the probed forward, and hold what the hooks take of it to its limit."""
    share, ratio = in_pairs(bare, probed, pairs)
    benchmark.extra_info["paired ratio"] = f"{ratio:.4f}"
    benchmark.extra_info["in hooks"] = f"{100 * share:.2f} %"
    benchmark.pedantic(probed, rounds=3)
    assert share < SHARE


# ------ memory


def peaks(bare, probed):
    """Return megabytes at the peak of the bare forward and of the probed one, in this process."""
    bare()  # torch keeps some memory from its first forward on
    return _peak(bare), _peak(probed)


def _peak(forward):
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak up to now
    for _ in range(2):
        forward()
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024


def measure_memory(benchmark, file, name):
    """Hold the peak of the job `name` of a benchmark's file to its limit, in its own process."""
    command = [sys.executable, __file__, Path(file).stem, name]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back

    def run():
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, env=environment, check=True
        )
        return [float(word) for word in done.stdout.split()]

    bare, probed = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info["MB above bare"] = f"{probed - bare:.1f} of {bare:.0f}"
    assert probed - bare < MEGABYTES


if __name__ == "__main__":
    print(*peaks(*importlib.import_module(sys.argv[1]).forwards_of(sys.argv[2])))
