"""What the machine can do at most: read memory, multiply and add. Compiled where it runs."""

import ctypes
import itertools
import statistics
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

SOURCE = r"""
#include <cstdint>

extern "C" uint64_t read_all(const uint64_t* p, int64_t n) {
    uint64_t total = 0;
#pragma omp parallel for simd schedule(static) reduction(+ : total)
    for (int64_t i = 0; i < n; ++i) total += p[i];
    return total;
}

// Ten sums in registers hide the latency of an addition; they differ, or they would be made as one.
#define EACH _Pragma("GCC unroll 10") for (int j = 0; j < 10; ++j)
template <class T>
double multiply_add(int64_t steps) {
    typedef T Vector __attribute__((vector_size(32)));
    double total = 0;
#pragma omp parallel reduction(+ : total)
    {
        Vector sums[10], all = {};
        const Vector one = Vector{} + T(0.9999999), two = Vector{} + T(0.0000001);
        EACH sums[j] = Vector{} + T(j);
        for (int64_t i = 0; i < steps; ++i) EACH sums[j] = sums[j] * one + two;
        EACH all += sums[j];
        total += all[0];
    }
    return total;
}
extern "C" double multiply_add_float32(int64_t steps) { return multiply_add<float>(steps); }
extern "C" double multiply_add_float64(int64_t steps) { return multiply_add<double>(steps); }
"""


@cache
def _library():
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory(prefix="geofast-bench-") as folder:
        Path(folder, "limits.cpp").write_text(SOURCE)
        subprocess.run(["c++", *flags, "limits.cpp", "-o", "limits.so"], cwd=folder, check=True)
        library = ctypes.CDLL(str(Path(folder, "limits.so")))  # once loaded, the file may go
    library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    for name in ("float32", "float64"):
        function = getattr(library, f"multiply_add_{name}")
        function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_double
    return library


def read_all(x):
    """Add up the memory of a tensor as 64-bit words on all threads: nothing reads faster."""
    _library().read_all(x.data_ptr(), x.numel() * x.element_size() // 8)


def multiply_add(dtype, threads):
    """Return the floating-point operations of one burst, which it runs; AVX2 only."""
    steps = 8_000_000
    getattr(_library(), f"multiply_add_{dtype}")(steps)
    return 2 * 10 * (8 if dtype == "float32" else 4) * steps * threads


def in_turn(ways, inputs, rounds):
    """Return every way's seconds, round by round, each call on another input.

    The clock of a machine drifts, and what else runs on it only adds time, so ways are compared by
    the fast decile of rounds taken in turn.
    """
    turn = itertools.cycle(inputs)
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            x = next(turn)
            start = time.perf_counter()
            way(x)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def fast(seconds):
    """Return the fast decile."""
    return statistics.quantiles(seconds, n=10)[0]
