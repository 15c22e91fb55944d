"""Seconds of work on a GPU, or on the CPU where `--dry` only wants to see that it runs."""

import math
import statistics
import time

import torch

CACHE = 256 << 20  # bytes; several times the L2 of any GPU so far
ROUNDS = 20


def median_seconds(run, calls, budget=0.5, launches=None):
    """Return the median seconds of a call; `calls` take turns, each with inputs of its own.

    On a GPU they are captured in a graph and its replays are timed with events, so that the host's
    share is left out. With `launches`, for what cannot be captured, the GPU is made to wait until
    the host has launched so many times.
    """
    for call in calls:
        call()
    run.sync()
    if run.device.type != "cuda":
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)
    replay, ahead = _graph(run, calls, launches)
    first = _elapsed(replay, ahead)
    rounds = min(ROUNDS, max(3, int(budget / max(first, 1e-6))))
    return statistics.median(_elapsed(replay, ahead) for _ in range(rounds)) / len(calls)


def _graph(run, calls, launches):
    """Return what runs all calls, and for how many clocks the GPU is to wait for the host first."""
    ahead = 400_000 * (launches or len(calls))  # 200 us a launch

    def one_by_one():
        for call in calls:
            call()

    if launches:
        return one_by_one, ahead
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            one_by_one()
    except Exception as error:
        run.sync()
        reason = (str(error).splitlines() or [""])[0]
        run.note(f"timed launch by launch where no graph could be captured: {reason[:200]}")
        return one_by_one, ahead
    graph.replay()
    return graph.replay, 0


def _elapsed(call, ahead):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if ahead:
        torch.cuda._sleep(ahead)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def copies(nbytes, least=2, most=128):
    """Return how many sets of inputs of so many bytes lie beyond the cache."""
    return max(least, min(most, math.ceil(CACHE / max(nbytes, 1))))


def in_turn(run, ways, rounds, seconds):
    """Return each way's seconds, round by round: the clock drifts, so ways take turns.

    Every other round goes backwards, so that none always follows the same other. A way is a
    function that waits for nothing; it is timed until the GPU has done its work. After two rounds
    no round is begun that would end after `seconds`.
    """
    found = {name: [] for name in ways}
    begun = time.perf_counter()
    for i in range(1 if run.dry else rounds):
        spent = time.perf_counter() - begun
        if i >= 2 and spent * (i + 1) / i > seconds:
            break
        for name, way in [*ways.items()][:: -1 if i % 2 else 1]:
            run.sync()
            start = time.perf_counter()
            way()
            run.sync()
            found[name].append(time.perf_counter() - start)
    return found


def host_seconds(run, call):
    """Return how long the host takes to launch what a call does, without waiting for it."""
    run.sync()
    start = time.perf_counter()
    call()
    took = time.perf_counter() - start
    run.sync()
    return took


def paired(found, name, base):
    """Return the median over rounds of one way's seconds to another's."""
    return statistics.median(a / b for a, b in zip(found[name], found[base], strict=True))
