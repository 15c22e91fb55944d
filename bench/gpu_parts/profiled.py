"""Where the time of one call goes on the GPU: by kernel, by stream, and idle."""

from collections import defaultdict

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .timing import host_seconds, in_turn

TOP = 12  # kernels that are shown
COPIES = ("Memcpy", "Memset")


def breakdown(run, what, call):
    """Record how busy the GPU is in one call, and the kernels that take longest.

    A dry run counts operators of the CPU in their place.
    """
    call()
    (wall,) = in_turn(run, {what: call}, 1, 0)[what]
    kind = (ProfilerActivity.CPU, DeviceType.CPU)
    if run.device.type == "cuda":
        kind = (ProfilerActivity.CUDA, DeviceType.CUDA)
    with profile(activities=[kind[0]]) as found:
        host_seconds(run, call)  # until the GPU is done
    events = [e for e in found.events() if e.device_type == kind[1]]
    if not events:
        run.note(f"{what}: the profiler saw nothing of the GPU")
        return
    streams = by(events, lambda e: e.device_resource_id)
    each = sorted(map(busy, streams.values()), reverse=True)
    copies = sum(e.name.startswith(COPIES) for e in events)
    run.row(
        "busy GPU", what=what, **{
            "wall ms": 1e3 * wall, "busy ms": busy(events), "launches": len(events) - copies,
            "copies and fills": copies, "streams": len(streams),
            "ms on other streams": sum(each[1:]),
            "of these beside the first": sum(each) - busy(events),
        },
    )  # fmt: skip
    kernels = by(events, lambda e: e.name)
    longest = sorted(kernels, key=lambda name: -total(kernels[name]))
    for name in longest[:TOP]:
        run.row(
            f"kernels of {what}", kernel=short(name), calls=len(kernels[name]),
            ms=total(kernels[name]), **{"% of busy": 100 * total(kernels[name]) / busy(events)},
        )  # fmt: skip


def by(events, key):
    found = defaultdict(list)
    for event in events:
        found[key(event)].append(event)
    return found


def total(events):
    """Return the milliseconds of all, one after the other."""
    return sum(e.time_range.elapsed_us() for e in events) / 1e3


def busy(events):
    """Return the milliseconds in which any of them runs."""
    found, until = 0.0, float("-inf")
    for start, end in sorted((e.time_range.start, e.time_range.end) for e in events):
        found += max(0.0, end - max(start, until))
        until = max(until, end)
    return found / 1e3


def short(name):
    """Return the beginning of a kernel's name, without what all of torch's have."""
    return name.removeprefix("void ").replace("at::native::", "").replace("|", "/")[:90]
