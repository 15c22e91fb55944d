"""Packages that are missing, or that do not fit what is there."""

import json
import sys
import warnings

import pytest
import tiny
import torch
import transformers

import geofast as gf
from geofast.models import packages
from geofast.models.hub import find, reading

SMALL = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    intermediate_size=64,
)  # fmt: skip


@pytest.fixture
def misfit(tmp_path, monkeypatch):
    """A torchvision for another torch, as it behaves when it is imported."""
    transformers.LlamaConfig()  # which looks for torchvision once and for all
    folder = tmp_path / "torchvision"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    (tmp_path / "torchvision-0.0.7.dist-info").mkdir()
    (tmp_path / "torchvision-0.0.7.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.0.7\n"
    )
    (tmp_path / "timm.py").write_text("")
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("torchvision", "timm"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))


MESSAGE = (
    rf"torchvision 0.0.7 was built for another torch than {torch.__version__}, which is here "
    r"\(operator torchvision::nms does not exist\): install the torchvision that belongs to torch"
).replace("+", r"\+")


@pytest.mark.usefixtures("misfit")
def test_a_torchvision_for_another_torch(tmp_path):
    with pytest.raises(RuntimeError, match=MESSAGE):
        gf.load("timm:vit_tiny_patch16_224")
    source = find(str(tmp_path))
    with pytest.raises(RuntimeError, match=MESSAGE), reading("weights", source):
        raise ImportError("operator torchvision::nms does not exist")


@pytest.mark.usefixtures("misfit")
def test_a_torchvision_for_another_torch_where_a_configuration_needs_it(tmp_path, monkeypatch):
    """As transformers has it: of Llama's configuration it imports torchvision, and hides why."""

    def broken(*_, **__):
        raise ModuleNotFoundError("Could not import module 'LlamaConfig'")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", broken)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RuntimeError, match=MESSAGE):
        gf.load(tmp_path)


def test_a_configuration_that_cannot_be_imported_for_another_reason(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ModuleNotFoundError("Could not import module 'LlamaConfig'")

    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", broken)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModuleNotFoundError, match="Could not import module 'LlamaConfig'"):
        gf.load(tmp_path)


def test_without_torchvision_another_error_stays_itself(monkeypatch, tmp_path):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    source = find(str(tmp_path))
    message = r"weights of .* cannot be loaded: broken"
    with pytest.raises(RuntimeError, match=message), reading("weights", source):
        raise OSError("broken")


@pytest.mark.parametrize(("name", "package"), [("open_clip", "open_clip_torch"), ("timm", "timm")])
def test_a_package_that_is_not_installed(name, package, monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    message = f"a model of the package {name}, which is not here: pip install {package}$"
    with pytest.raises(ImportError, match=message):
        gf.load(f"{name}:ViT-B-32/openai")


def test_what_is_nobodys_business_is_not_said(tmp_path, capfd, caplog):
    config = transformers.LlamaConfig(vocab_size=100, bos_token_id=1, eos_token_id=2, **SMALL)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"eos_token_id": 5000}))
    before = warnings.filters[:]
    capfd.readouterr()
    gf.load(tmp_path)
    assert (capfd.readouterr().err, caplog.messages) == ("", [])
    assert warnings.filters == before
    assert transformers.utils.logging.is_progress_bar_enabled()
    # transformers says it once, so another one is asked for.
    (tmp_path / "config.json").write_text(json.dumps(saved | {"eos_token_id": 5001}))
    transformers.AutoConfig.from_pretrained(tmp_path)
    assert "Model config: eos_token_id must be" in caplog.text


def test_only_the_warning_that_is_meant_is_kept_quiet():
    with packages.quietly():
        warnings.warn("`is_gradient_checkpointing` is deprecated and", FutureWarning, stacklevel=1)
        with pytest.raises(FutureWarning, match="something else"):  # all others are errors here
            warnings.warn("`something else` is deprecated", FutureWarning, stacklevel=1)
