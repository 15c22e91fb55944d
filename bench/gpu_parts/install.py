"""geofast as this checkout has it, built where nothing else is touched.

The checkout may be read-only and the Python shared: a copy of the sources is built into a folder
of its own under the user's temporary files, which goes first on the import path of the parts.
"""

import hashlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from .process import call

ROOT = Path(__file__).parents[2]
SOURCES = ("geofast", "kernels", "csrc", "CMakeLists.txt", "pyproject.toml")
LEFT_OUT = shutil.ignore_patterns(".*", "build", "__pycache__", "shared", "*.so", "results")


def install(run):
    """Return the folder to import geofast from, None where it is installed; note what was done."""
    there = editable()
    if there:
        stale = older_than_sources(there)
        run.note(f"geofast is installed editable from this checkout ({there})")
        if stale:
            say = run.note if run.dry else run.error
            say(f"{stale} is older than its sources: install the checkout again")
        return None
    folder = Path(tempfile.gettempdir(), f"geofast-bench-{os.getuid()}-{fingerprint()}")
    if (folder / "done").exists():
        run.note(f"this geofast was installed before, in {folder}")
        return folder
    with tempfile.TemporaryDirectory(prefix="geofast-source-") as copied:
        source = Path(copied, "geofast")
        shutil.copytree(ROOT, source, ignore=LEFT_OUT)
        code, output = call(command(source, folder), run.left(), cwd=copied)
    if code != 0:
        ended = "ran out of time" if code is None else f"ended with {code}"
        run.error(f"pip {ended}:\n{output[-4000:]}")
        return None
    (folder / "done").touch()
    run.note(f"installed in {folder}")
    return folder


def command(source, folder):
    return [
        sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-index",
        "--no-build-isolation", "--no-deps", "--no-cache-dir", "--upgrade",
        "--target", str(folder), str(source),
    ]  # fmt: skip


def fingerprint():
    """Return what tells one build from another: the sources and the Python."""
    digest = hashlib.sha256(f"{sys.version} {sysconfig.get_platform()}".encode())
    for name in SOURCES:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so":
                digest.update(str(path.relative_to(ROOT)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def editable():
    """Return the compiled core of an editable install of this checkout, None if there is none."""
    found = importlib.util.find_spec("geofast")
    if found is None or not found.origin or Path(found.origin) != ROOT / "geofast" / "__init__.py":
        return None
    try:
        core = importlib.util.find_spec("geofast._core")
    except ImportError:  # the sources alone, on the import path
        return None
    return core and Path(core.origin)


def older_than_sources(core):
    """Return the compiled file that an edit of its sources has outdated, None if none is."""
    rooms = {"_core": ROOT / "csrc", "_cuda": ROOT / "kernels" / "cuda"}
    for name, sources in rooms.items():
        for built in core.parent.glob(f"{name}.*.so"):
            newest = max((p.stat().st_mtime for p in sources.rglob("*") if p.is_file()), default=0)
            if built.stat().st_mtime < newest:
                return built
    return None
