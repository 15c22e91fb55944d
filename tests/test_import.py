import subprocess
import sys

import pytest

import geofast as gf

SCRIPT = """
import sys, torch
def refuse(*_, **__): raise AssertionError("importing geofast asked for CUDA")
torch.cuda.current_device = torch.cuda.init = refuse
torch.cuda._lazy_init = torch.cuda.is_available = refuse
import geofast
for name in set(geofast.__all__) - {"RidgeCV"}:
    getattr(geofast, name)
heavy = {"transformers", "triton", "matplotlib", "sklearn", "h5py", "onnx", "gguf"}
print(sorted(heavy & set(sys.modules)))
"""


def test_importing_is_light(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_every_public_name_is_there():
    assert sorted(gf.__all__) == gf.__all__
    assert all(hasattr(gf, name) for name in gf.__all__)
    assert dir(gf) == gf.__all__


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["probe", "--pol"]])
def test_what_needs_no_model_imports_no_torch(tmp_path, words):
    script = (
        "import sys, geofast\nfrom geofast.cli import main\n"
        f"try: main({words})\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["data", "geo", "models", "pooling", "ridge", "rows", "_core"])
def test_a_room_is_there_when_it_is_asked_for(tmp_path, name):
    script = f"import geofast; print(geofast.{name}.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == f"geofast.{name}"


@pytest.mark.parametrize("name", ["capture", "doctor", "plan", "probe", "tokens"])
def test_a_function_keeps_its_name_from_the_module_that_has_the_same(tmp_path, name):
    script = f"import importlib, geofast\nimportlib.import_module('geofast.{name}')\n"
    script += (
        f"print(callable(geofast.{name}))\nfrom geofast import {name}\nprint(callable({name}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.split() == ["True", "True"]


def test_what_is_not_there_is_no_attribute():
    assert not hasattr(gf, "latitudes")
    assert not hasattr(gf, "__wrapped__")
    with pytest.raises(ImportError, match="cannot import name 'latitudes'"):
        exec("from geofast import latitudes")
