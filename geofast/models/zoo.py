"""Models of open_clip (`open_clip:ARCH/pretrained`) and of timm (`timm:NAME`)."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .hub import find
from .inputs import stack_images
from .model import Batch, Model, Stage
from .packages import optional
from .prefix import with_counted_prefix
from .structure import find_towers

_OF_A_FOLDER = ("hf-hub:", "local-dir:")
"""How both libraries spell a repository of the Hub and a folder, which bring all they need."""


_FEW = 3  # tags that a message names


def load(library: str, name: str, device: torch.device, dtype: torch.dtype | None) -> Model:
    """Load `name` by `library`, open_clip or timm; see `load_open_clip` and `load_timm`."""
    return (load_timm if library == "timm" else load_open_clip)(name, device, dtype)


def load_open_clip(name: str, device: torch.device, dtype: torch.dtype | None) -> Model:
    """Load a model that compares images with texts, by open_clip.

    Parameters
    ----------
    name
        `ARCH/pretrained`, the latter one of open_clip's tags or the path of a checkpoint;
        `hf-hub:ORGANISATION/REPOSITORY` or `local-dir:FOLDER`.
    device
        Where to put it.
    dtype
        None takes float32.

    Returns
    -------
    Model
        Takes images; `other` takes texts. Padding of texts is no token of theirs, though the
        towers that were trained with it read it.

    Raises
    ------
    ImportError
        When open_clip is not installed.
    ValueError
        For an architecture or a tag that open_clip does not have, or without a tag.
    FileNotFoundError, PermissionError, ConnectionError
        When there is no such checkpoint, it is gated, or the Hub cannot be reached.
    RuntimeError
        When the checkpoint cannot be fetched or does not fit the architecture; when torchvision
        does not fit torch.
    """
    open_clip = optional("open_clip", "open_clip_torch")
    of_a_folder = name.startswith(_OF_A_FOLDER)
    architecture, _, weights = (name, "", "") if of_a_folder else name.partition("/")
    if of_a_folder:
        _require_place(name, "open_clip_config.json")
    else:
        _require_open_clip_has(open_clip, architecture, weights)
    notes: tuple[str, ...] = ()
    build = partial(open_clip.create_model, architecture, pretrained_text=False)
    # open_clip only warns when the architecture's activation is not the one of the training.
    if open_clip.get_pretrained_cfg(architecture, weights).get("quick_gelu"):
        build = partial(build, force_quick_gelu=True)
        notes = ("its activation is QuickGELU, with which these weights were trained",)
    with _fetching(name):
        module = build(pretrained=weights or None, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(architecture)
    module = module.eval().to(device, dtype)
    configured = open_clip.transform.PreprocessCfg(**module.visual.preprocess_cfg)
    transform = open_clip.transform.image_transform_v2(configured, is_train=False)
    called = f"{architecture}/{Path(weights).name}" if weights else _short(name)
    untrained = partial(build, load_weights=False)
    model = partial(Model, f"open_clip:{called}", module, notes=notes, untrained=untrained)
    text = model((_side(module, "text"),), "text", None, _Tokenize(tokenizer))
    image = model((_side(module, "image"),), "image", _Transform(transform), _stack, text)
    return with_counted_prefix(image)


def load_timm(name: str, device: torch.device, dtype: torch.dtype | None) -> Model:
    """Load an image encoder by timm, without its head.

    Parameters
    ----------
    name
        A name of timm's, with or without a tag; `hf-hub:ORGANISATION/REPOSITORY` or
        `local-dir:FOLDER`.
    device
        Where to put it.
    dtype
        None takes float32.

    Raises
    ------
    ImportError
        When timm is not installed.
    ValueError
        For a name or a tag that timm does not have, or one without trained weights; for a model
        whose tokens cannot be told apart.
    FileNotFoundError, PermissionError, ConnectionError
        When there is no such checkpoint, it is gated, or the Hub cannot be reached.
    RuntimeError
        When the checkpoint cannot be fetched or does not fit the architecture; when torchvision
        does not fit torch.
    """
    timm = optional("timm", "timm")
    of_a_folder = name.startswith(_OF_A_FOLDER)
    if not of_a_folder:
        _require_timm_has(timm, name)
    else:
        _require_place(name, "config.json")
    build = partial(timm.create_model, name, num_classes=0)
    with _fetching(name):
        module = build(pretrained=True)
    module = module.eval().to(device, dtype)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(module))
    stage = Stage(_Call(module, "forward_features"), find_towers(module))
    called = _short(name) if of_a_folder else name
    model = Model(
        f"timm:{called}", module, (stage,), "image", _Transform(transform), _stack, untrained=build
    )
    return with_counted_prefix(model)


def _short(name: str) -> str:
    """Name a folder as it is called itself, and a repository in full."""
    source, _, place = name.partition(":")
    return Path(place).name if source == "local-dir" else place


def _require_place(name: str, file: str) -> None:
    """See that the folder or repository is there; the libraries ask the Hub for half a minute."""
    source, _, place = name.partition(":")
    if source == "local-dir" and not Path(place).is_dir():
        raise FileNotFoundError(f"there is no folder {place}")
    if not find(place.partition("@")[0], file=file).complete:
        raise FileNotFoundError(f"{place} has no {file}: it is of another library")


def _require_open_clip_has(library: Any, architecture: str, weights: str) -> None:
    known = library.list_models()
    if architecture not in known:
        near = _near(architecture, known)
        raise ValueError(f"open_clip has no architecture {architecture!r}{near}")
    tags = library.list_pretrained_tags_by_model(architecture)
    has = _has(weights, tags) if tags else "it has none of its own"
    if not weights:
        msg = (
            f"open_clip:{architecture} names no weights: write open_clip:{architecture}/TAG or "
            f"open_clip:{architecture}/CHECKPOINT; of tags, {has}"
        )
        raise ValueError(msg)
    if known_as := library.get_pretrained_cfg(architecture, weights):
        repository, _, file = known_as.get("hf_hub", "").rpartition("/")
        if repository:
            find(repository, file=file or "open_clip_model.safetensors")
        return
    if Path(weights).is_file():
        return
    if len(Path(weights).parts) > 1 or Path(weights).suffix:
        raise FileNotFoundError(f"there is no file {weights}; of tags for {architecture}, {has}")
    raise ValueError(f"open_clip has no weights {weights!r} for {architecture}: {has}")


def _require_timm_has(library: Any, name: str) -> None:
    architecture = name.partition(".")[0]
    if not library.is_model(architecture):
        near = _near(architecture, library.list_models())
        raise ValueError(f"timm has no model {architecture!r}{near}")
    if library.models.is_model_pretrained(name):
        known_as = library.models.get_pretrained_cfg(name)
        if known_as.hf_hub_id:
            find(known_as.hf_hub_id, file=known_as.hf_hub_filename or "model.safetensors")
        return
    tags = library.list_pretrained(f"{architecture}.*")
    has = _has(name, tags) if tags else "timm:local-dir:FOLDER takes your own"
    raise ValueError(f"timm has no trained weights {name!r}: {has}")


def _has(tag: str, tags: Sequence[str]) -> str:
    """Say which tags there are: of many the three that are nearest to `tag`, or the first."""
    if len(tags) <= _FEW:
        return f"it has {', '.join(tags)}"
    if not tag:
        return f"it has {', '.join(tags[:_FEW])} and {len(tags) - _FEW} more"
    near = difflib.get_close_matches(tag, tags, _FEW, cutoff=0)
    return f"the nearest of {len(tags)} that it has are {', '.join(near)}"


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known)
    return f"; the nearest are {', '.join(near)}" if near else ""


@contextmanager
def _fetching(name: str) -> Iterator[None]:
    """Turn whatever a broken checkpoint raises into one sentence."""
    try:
        yield
    except Exception as error:
        said = str(error).strip().splitlines() or [repr(error)]
        msg = (
            f"{name} cannot be loaded: {said[0].rstrip('.:')} ({type(error).__name__}). Is the "
            "checkpoint whole, and of this architecture?"
        )
        raise RuntimeError(msg) from error


class _Call(nn.Module):
    """A method of a model as a module, so that hooks see where a call begins and ends."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        """Call the method; hooks take the mask [batch, tokens] from here, the model has its own."""
        # CoCa scales its embedding to length 1 unless it is told.
        more = {"normalize": False} if self.method.startswith("encode") else {}
        return getattr(self.model, self.method)(inputs, **more)


def _side(module: nn.Module, kind: str) -> Stage:
    """Return the call that encodes images or texts, its tower and its joint embedding."""
    body = _Call(module, f"encode_{kind}")
    name = {"image": "vision", "text": "text"}[kind]
    tower = next((t for t in find_towers(module) if t.name == name), None)
    if tower is None:
        msg = f"no residual blocks found in the {name} tower of this {type(module).__name__}"
        raise ValueError(msg)
    # What the call returns: most of these projections are no module.
    return Stage(body, (replace(tower, head=body),))


@dataclass(frozen=True)
class _Transform:
    """One PIL image to pixel values [channels, height, width]; picklable."""

    transform: Any

    def __call__(self, image: Any) -> torch.Tensor:
        pixels: torch.Tensor = self.transform(image.convert("RGB"))
        return pixels


def _stack(images: list[torch.Tensor]) -> Batch:
    return {"inputs": stack_images(images)["pixel_values"]}


@dataclass(frozen=True)
class _Tokenize:
    """Strings to token ids and mask, by a tokenizer of open_clip; picklable.

    Every text is padded to the whole context, as the towers want it.
    """

    encode: Any
    """Of open_clip: texts to ids [batch, context]."""

    @property
    def tokenizer(self) -> Any:
        """The one that knows its words: that of transformers inside, or CLIP's own."""
        return getattr(self.encode, "tokenizer", self.encode)

    def __call__(self, texts: list[str]) -> Batch:
        """Return `inputs`, ids [batch, context], and `attention_mask`, 1 where a token is real.

        Raises
        ------
        ValueError
            For an empty text, or one that is longer than the model's context.
        """
        context = self.encode.context_length
        ids = self.encode(texts)
        mask = self._mask(ids)
        # open_clip cuts what is too long, and says nothing.
        whole = self._mask(self.encode(texts, context_length=context + 1)).sum(1)
        for text, length, needs in zip(texts, mask.sum(1).tolist(), whole.tolist(), strict=True):
            if not length:
                raise ValueError(f"the text {text!r} has no token; give the model a longer prompt")
            if needs > length:
                msg = f"the text {text[:40]!r}... is too long; the model takes {context} tokens"
                raise ValueError(msg)
        return {"inputs": ids, "attention_mask": mask}

    def _mask(self, ids: torch.Tensor) -> torch.Tensor:
        padding: int | None = getattr(self.tokenizer, "pad_token_id", None)
        if padding is not None:
            return (ids != padding).long()
        # CLIP's own tokenizer pads with 0, which is an exclamation mark inside a word too.
        return (ids != 0).long().flip(1).cummax(1).values.flip(1)
