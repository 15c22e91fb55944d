"""All that geofast claims of a GPU, in one call on a machine that has one: under eight minutes.

python bench/gpu.py                    install, test, measure; print tables, write JSON
python bench/gpu.py --out FILE         the JSON's place (default: gpu.json under temporary files)
python bench/gpu.py --quick            fewer sizes and rounds
python bench/gpu.py --seconds 300      the time for all of it; parts that do not fit are left out
python bench/gpu.py --only gram,solve  some parts; --only tune tries other tiles, which takes long
python bench/gpu.py --dry              every part at tiny sizes on the CPU: does it run at all?

Every part is a process of its own and writes down each figure at once, so that a kernel that takes
the GPU down costs its part alone. Exit code 1 says that a part failed, a wrong result included; a
missed target does not.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_parts import checks, install, process, report
from gpu_parts.run import Run


class Part(NamedTuple):
    """Module and function of gpu_parts, and its seconds: the most it may take, and its own.

    Its own are kept free for it while the parts before it run; most of its figures take no more.
    """

    main: str
    most: float
    own: float


PARTS = {  # the order is that of importance, but that ceilings are what others are held to
    "install": Part("install.install", 150, 60),
    "ceilings": Part("ceilings.main", 40, 15),
    "tests": Part("checks.main", 130, 80),
    "images": Part("forwards.main_images", 140, 90),
    "language": Part("forwards.main_language", 90, 50),
    "gram": Part("gram.main", 100, 60),
    "solve": Part("solve.main", 90, 40),
    "pooling": Part("pooling.main", 50, 20),
    "edits": Part("edits.main", 40, 20),
    "table": Part("table.main", 40, 10),
    "tune": Part("tune.main", 500, 60),  # not unless it is asked for
}
ALL = [name for name in PARTS if name != "tune"]
GRACE = 5  # seconds between the end of a part's time and the end of its process
LEAST = 5  # seconds in which it is worth while to begin a part
NO_GPU = (
    "bench/gpu.py needs a GPU that torch can use, and torch.cuda.is_available() is False (torch "
    "{torch}, built for CUDA {cuda}): run it on a machine with one, or see with --dry that it runs."
)


def main(arguments=None):
    options = parser().parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        print(NO_GPU.format(torch=torch.__version__, cuda=torch.version.cuda), file=sys.stderr)
        return 2
    if options.part:
        return child(options)
    out = Path(options.out or Path(tempfile.gettempdir(), "geofast-gpu.json"))
    found = {
        "machine": machine(options.dry),
        "dry": options.dry,
        "quick": options.quick,
        "parts": {},
    }
    print(f"{' '.join(f'{k} {v};' for k, v in found['machine'].items())}\n")
    if options.dry:
        print("A dry run on the CPU at tiny sizes: its figures say nothing.\n")
    end = time.monotonic() + options.seconds
    options.folder = None
    out.write_text("{}\n")  # no part is measured in vain because there is no room for its figures
    names = chosen(options.only)
    for i, name in enumerate(names):
        left = end - time.monotonic() - GRACE
        seconds = seconds_for(left, names[i:])
        if found["parts"].get("install", {}).get("state") == "failed":
            found["parts"][name] = left_out("the install failed")
        elif seconds < LEAST:
            found["parts"][name] = left_out(
                f"{max(left, 0):.0f} s are left of the time for all parts (--seconds)"
            )
        else:
            found["parts"][name] = timed(name, seconds, options, out)
        print(report.text_of(name, found["parts"][name]), flush=True)
        found["targets"] = report.targets(found["parts"])
        found["ok"] = all(p["state"] == "done" for p in found["parts"].values())
        out.write_text(json.dumps(found, indent=1) + "\n")
    print(report.summary(found["targets"]))
    print(f"{out}; {options.seconds - (end - time.monotonic()):.0f} s in all")
    failed = [name for name, part in found["parts"].items() if part["state"] == "failed"]
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


def parser():
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    found.add_argument("--out", metavar="FILE")
    found.add_argument("--quick", action="store_true")
    found.add_argument("--dry", action="store_true")
    found.add_argument("--seconds", type=float, default=470)
    found.add_argument("--only", metavar="PARTS", default=",".join(ALL))
    # What follows starts one part, in a process of its own.
    found.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    found.add_argument("--events", help=argparse.SUPPRESS)
    return found


def chosen(only):
    """Return the parts that are asked for, in order, and the two that all others need."""
    asked = {"install", "ceilings", *only.split(",")}
    unknown = asked - {*PARTS}
    if unknown:
        sys.exit(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return [name for name in PARTS if name in asked]


def seconds_for(left, names):
    """Return the seconds for the first of these parts: what the others' own leave of those `left`.

    Where they leave less than its own, all get the same share of theirs.
    """
    first, *rest = (PARTS[name] for name in names)
    kept = sum(part.own for part in rest)
    return min(first.most, max(left - kept, left * first.own / (first.own + kept)))


def left_out(why):
    empty = {"tables": {}, "notes": [f"left out: {why}"], "errors": []}
    return {"state": "left out", "seconds": 0.0, **empty}


def timed(name, seconds, options, out):
    """Run a part to its end or the end of its time; return what it recorded."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="geofast-bench-") as folder:
        events = Path(folder, "events")
        run = Run(events, seconds, options.dry, options.quick, given(out))
        try:
            if name == "install":
                options.folder = install.install(run)
            elif name == "tests":
                checks.main(run, checks.environment(options.folder))
            elif options.dry and options.folder is None:
                with run.case(name):
                    main_of(name)(run)
            else:
                apart(name, run, options, out)
        except Exception as error:
            run.error(f"{name}: {type(error).__name__}: {error}")
        found = report.gather(events)
    state = "failed" if found["errors"] else "done"
    return {"state": state, "seconds": time.monotonic() - start, **found}


def apart(name, run, options, out):
    """Run a part in a process of its own, which writes to the same file of events."""
    command = command_of(name, run.left(), options, out, run.path)
    env = checks.environment(options.folder)
    code, _ = process.call(command, run.left() + GRACE, cwd=run.path.parent, env=env, show=True)
    if code is None:
        run.error("the time of this part was over, and its process was ended")
    elif code:
        run.error(f"its process ended with {code}; what it printed stands above")


def command_of(name, seconds, options, out, events):
    flags = [f"--{flag}" for flag in ("quick", "dry") if getattr(options, flag)]
    return [
        sys.executable, str(Path(__file__).resolve()), "--part", name, *flags,
        "--seconds", f"{seconds:.1f}", "--out", str(out.resolve()), "--events", str(events),
    ]  # fmt: skip


def child(options):
    """Be the process of one part."""
    run = Run(options.events, options.seconds, options.dry, options.quick, given(Path(options.out)))
    with run.case(options.part):
        main_of(options.part)(run)
    return 0


def main_of(name):
    module, function = PARTS[name].main.split(".")
    return getattr(importlib.import_module(f"gpu_parts.{module}"), function)


def given(out):
    """Return what the parts before found."""
    return json.loads(out.read_text()) if out.exists() else {}


def machine(dry):
    """Return what the figures depend on."""
    found = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for name in ("triton", "cupy", "transformers", "himalaya"):
        found[name] = version(name)
    found["commit"] = first_line("git", "-C", str(install.ROOT), "rev-parse", "--short", "HEAD")
    found["nvcc"] = first_line("nvcc", "--version", find="release")
    found["cpus"] = os.cpu_count()
    if not dry:
        # Not from torch, which would put this process on the GPU beside the one that measures.
        query = "--query-gpu=name,compute_cap,driver_version"
        line = first_line("nvidia-smi", query, "--format=csv,noheader") or "unknown"
        found["device, capability, driver"] = line
    return found


def version(package):
    """Return the installed version of a package, None if there is none."""
    from importlib.metadata import distributions

    names = {d.metadata["Name"].lower(): d.version for d in distributions() if d.metadata["Name"]}
    return next(
        (v for k, v in names.items() if k == package or k.startswith(f"{package}-cuda")), None
    )


def first_line(*command, find=""):
    """Return the first line with `find` that a program prints, None if it cannot be run."""
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next((line.strip() for line in printed.splitlines() if find in line), None)


if __name__ == "__main__":
    sys.exit(main())
