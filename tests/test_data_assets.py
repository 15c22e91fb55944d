"""Fetching pinned wheels, on a small wheel in a local folder that pip is pointed to."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

from geofast.data.demos import assets

MEMBER = "tiny/data/a.txt"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Point pip to a folder with one wheel, and the pins to that wheel."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    path = folder / "tiny_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, "hello")
        archive.writestr("tiny/unwanted.txt", "no")
        archive.writestr(
            "tiny_asset-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\nRequires-Dist: nowhere==9\n",
        )
        archive.writestr(
            "tiny_asset-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny_asset-1.0.dist-info/RECORD", "")
    pin(monkeypatch, hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("GEOFAST_CACHE", str(tmp_path / "cache ü"))
    return path


def pin(monkeypatch, sha256):
    wheel = assets.Asset("tiny-asset", "1.0", sha256, 7, (MEMBER,))
    monkeypatch.setattr(assets, "ASSETS", {"tiny-asset": wheel})


def everything(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_member_is_fetched_once(index, monkeypatch, capsys):
    path = assets.asset("tiny-asset", MEMBER)
    assert path.read_text() == "hello"
    assert everything(assets.cache_dir()) == [f"tiny-asset-1.0/{MEMBER}"]  # no wheel, no scratch
    assert f"Fetching tiny-asset 1.0 (7 MB) into {assets.cache_dir()}" in capsys.readouterr().err

    def never(*_, **__):
        raise AssertionError("fetched twice")

    monkeypatch.setattr(subprocess, "run", never)
    assert assets.asset("tiny-asset", MEMBER) == path
    assert capsys.readouterr().err == ""


def test_two_at_once(index):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(assets.asset("tiny-asset", MEMBER)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_text() for path in found] == ["hello", "hello"]
    assert everything(assets.cache_dir()) == [f"tiny-asset-1.0/{MEMBER}"]


def test_another_file_under_the_name(index, monkeypatch):
    pin(monkeypatch, "0" * 64)
    message = (
        f"cannot fetch tiny-asset 1.0 (7 MB), which holds {MEMBER}: the index served a file that "
        "does not have the pinned sha256. Without a network, fill the cache on another machine, "
        f"copy it here and set GEOFAST_CACHE to that folder (now {assets.cache_dir()})."
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        assets.asset("tiny-asset", MEMBER)
    assert everything(assets.cache_dir()) == []


def test_what_pip_let_through_is_checked_again(index, monkeypatch):
    def fake(command, **_):
        (Path(command[command.index("-d") + 1]) / "x.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fake)
    with pytest.raises(RuntimeError, match="the file does not have the pinned sha256"):
        assets.asset("tiny-asset", MEMBER)
    assert everything(assets.cache_dir()) == []


def test_no_such_wheel(index):
    index.unlink()
    with pytest.raises(RuntimeError, match=r"cannot fetch .*pip said: Could not find a version"):
        assets.asset("tiny-asset", MEMBER)
    assert everything(assets.cache_dir()) == []


def test_offline(index, monkeypatch):
    index.unlink()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    monkeypatch.setenv("PIP_RETRIES", "1")
    message = r"cannot fetch .*: the package index cannot be reached. Without a network, fill the"
    with pytest.raises(RuntimeError, match=message):
        assets.asset("tiny-asset", MEMBER)


def test_no_pip(index, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match=r"has no pip \(run: uv pip install pip\)"):
        assets.asset("tiny-asset", MEMBER)


def test_a_member_that_is_not_unpacked(index):
    with pytest.raises(ValueError, match=f"tiny-asset 1.0 unpacks {MEMBER}, not b.txt"):
        assets.asset("tiny-asset", "b.txt")


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv("GEOFAST_CACHE", "~/elsewhere")
    assert assets.cache_dir() == Path.home() / "elsewhere"
    monkeypatch.setenv("GEOFAST_CACHE", "")
    assert assets.cache_dir() == Path.home() / ".cache" / "geofast"


def test_a_prepared_folder_is_built_once_for_every_pin(tmp_path, monkeypatch):
    calls = []
    pin(monkeypatch, "a" * 64)

    def build(folder):
        calls.append(folder)
        (folder / "a").write_text("x")

    for _ in range(2):
        folder = assets.prepared("thing", "tiny-asset", build, tmp_path / "cache")
        assert folder == tmp_path / "cache" / "tiny-asset-1.0-aaaaaaaa" / "thing"
        assert (folder / "a").read_text() == "x"
    assert len(calls) == 1
    pin(monkeypatch, "b" * 64)
    assert assets.prepared("thing", "tiny-asset", build, tmp_path / "cache") != folder
    assert len(calls) == 2


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    pin(monkeypatch, "a" * 64)

    def build(folder):
        (folder / "a").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device"):
        assets.prepared("thing", "tiny-asset", build, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_another_process_overtakes(tmp_path, monkeypatch):
    pin(monkeypatch, "a" * 64)
    theirs = tmp_path / "tiny-asset-1.0-aaaaaaaa" / "thing"

    def build(folder):
        (folder / "a").write_text("mine")
        theirs.mkdir(parents=True)
        (theirs / "a").write_text("theirs")

    folder = assets.prepared("thing", "tiny-asset", build, tmp_path)
    assert (folder / "a").read_text() == "theirs"
    assert everything(tmp_path) == ["tiny-asset-1.0-aaaaaaaa/thing/a"]


def test_the_pins():
    for name, wheel in assets.ASSETS.items():
        assert name == wheel.name
        assert re.fullmatch("[0-9a-f]{64}", wheel.sha256)
