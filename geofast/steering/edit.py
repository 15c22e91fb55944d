"""`Edit`: a change of hidden states as data, and the file that keeps it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..models import Model, Site, match_sites
from ..pooling import ROLES

Mode = Literal["swap", "patch", "add", "set", "ablate"]
Phase = Literal["prompt", "steps", "both"]
EDIT_ROLES = ("last", *ROLES)
"""Which tokens an edit changes: the last that is not padding, or every one of a pool's role."""

_OF_GENERATED = ("last", "text", "all")  # what a generated token is
_FORMAT = 1
_TENSORS = ("dims", "values", "left", "right")


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """A change of the hidden states h of some tokens at some sites.

    `swap`, `patch`, `add`, `set_to` and `ablate` make one. In dimensions g = `dims`:

    ==============  ==========================================
    swap, patch     h[g] = values
    add             h[g] = h[g] + values
    set, ablate     h[g] = h[g] + left @ (values - right @ h)
    ==============  ==========================================

    What is added is computed in float32 (float64 where the model is), then rounded to the model's
    dtype; what is written is written as it is.

    Attributes
    ----------
    mode : str
    sites : tuple of str
        Names, or where `values` are the same for all, globs (`lm.layers.*`).
    width : int
        Width d of the hidden states there.
    dims : Tensor, int64 [m]
        The dimensions that change, each once.
    values : Tensor [sites, samples, tokens, m]
        Each of the first three sizes may be 1: the same for all. `tokens` are those of the role in
        the prompt, in their order, then the generated ones. For `set` and `ablate` the last size
        is k.
    role : str
        `last`, or a pool's role: `text`, `image`, `patch`, `cls`, `register`, `all`. A generated
        token is `last`, `text` and `all`.
    phase : str
        `prompt`, `steps` (every generated token that is fed back), or `both`.
    left : Tensor [m, k], or None
    right : Tensor [k, d], or None
    model : str
        Name of the model that it is for; empty where it does not say.

    Raises
    ------
    ValueError, TypeError
        When the parts do not fit each other.
    """

    mode: Mode
    sites: tuple[str, ...]
    width: int
    dims: torch.Tensor
    values: torch.Tensor
    role: str = "last"
    phase: Phase = "prompt"
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    model: str = ""

    def __post_init__(self) -> None:
        for name, allowed in (("mode", get_args(Mode)), ("phase", get_args(Phase))):
            if (got := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {got!r}")
        if self.role not in EDIT_ROLES:
            raise ValueError(f"role must be one of {', '.join(EDIT_ROLES)}; got {self.role!r}")
        if not isinstance(self.sites, tuple) or not self.sites:
            raise ValueError(f"sites must be a tuple of one name or more; got {self.sites!r}")
        if self.phase != "prompt" and self.role not in _OF_GENERATED:
            msg = f"no generated token is a {self.role} token: use phase='prompt', or one of the "
            raise ValueError(msg + f"roles {', '.join(_OF_GENERATED)}")
        self._check_dims()
        self._check_values()

    def _check_dims(self) -> None:
        dims, width = self.dims, self.width
        if dims.ndim != 1 or dims.dtype != torch.int64:
            msg = f"dims must be int64 [m]; got {dims.dtype} {list(dims.shape)}"
            raise TypeError(msg)
        bad = dims[(dims < 0) | (dims >= width)]
        if len(bad):
            raise ValueError(f"dimension {int(bad[0])} is out of range: the width is {width}")
        if len(dims.unique()) < len(dims):
            raise ValueError("dims names a dimension twice")

    def _check_values(self) -> None:
        values, m = self.values, len(self.dims)
        projects = self.mode in ("set", "ablate")
        if projects:
            k = 0 if self.left is None else self.left.shape[-1]
            shapes = [None if t is None else list(t.shape) for t in (self.left, self.right)]
            if shapes != [[m, k], [k, self.width]]:
                msg = f"mode {self.mode!r} needs left [{m}, k] and right [k, {self.width}]"
                raise ValueError(f"{msg}; got {shapes[0]} and {shapes[1]}")
            m = k
        elif self.left is not None or self.right is not None:
            raise ValueError(f"mode {self.mode!r} takes neither left nor right")
        if values.ndim != 4 or values.shape[3] != m or not values.is_floating_point():
            msg = f"values must be floating-point [sites, samples, tokens, {m}]; got {values.dtype}"
            raise ValueError(f"{msg} {list(values.shape)}")
        if values.shape[0] not in (1, len(self.sites)):
            msg = f"values are for {values.shape[0]} sites, and sites names {len(self.sites)}"
            raise ValueError(msg)
        if values.shape[2] > 1 and self.phase != "prompt" and self.role != "last":
            msg = "values for single tokens go with phase='prompt' or with role='last'"
            raise ValueError(msg)
        parts = [t for t in (values, self.left, self.right) if t is not None]
        if not all(t.isfinite().all() for t in parts):
            raise ValueError(f"an edit of mode {self.mode!r} has values that are not finite")

    def __repr__(self) -> str:
        few = self.sites if len(self.sites) < 4 else (self.sites[0], "...", self.sites[-1])
        return (
            f"Edit({self.mode} at {', '.join(few)}: {len(self.dims)} of {self.width} dims, "
            f"role={self.role}, phase={self.phase}, samples={self.samples})"
        )

    @property
    def samples(self) -> int:
        """How many samples there are values for; 1: the same for all."""
        return self.values.shape[1]

    def take(self, samples: Sequence[int] | torch.Tensor) -> Edit:
        """Return the edit with the values of `samples`, in that order; a number may come again.

        With the states of all targets in one edit, `take` gives every source the one whose states
        are written into it: for pairs of numbers (source, target),
        `model.generate([inputs[s] for s, t in pairs], edits=[edit.take([t for s, t in pairs])])`.

        Raises
        ------
        IndexError
            When there is no such sample.
        """
        index = torch.as_tensor(samples, dtype=torch.int64)
        bad = index[(index < 0) | (index >= self.samples)]
        if len(bad):
            raise IndexError(f"the edit has {self.samples} samples, no number {int(bad[0])}")
        return replace(self, values=self.values[:, index])

    def sites_in(self, model: Model) -> tuple[Site, ...]:
        """Return the sites of `model` that the edit is for; where each has values, in their order.

        Raises
        ------
        ValueError
            When it is for another model, a site is not there or has no token of the role, or a
            token that is generated is to be changed where none comes by.
        """
        if self.model and not same_model(self.model, model.name):
            raise ValueError(f"the edit was made for {self.model}, and this model is {model.name}")
        if len(self.values) == 1:
            sites = match_sites(model.towers, self.sites)
        else:
            sites = tuple(site for name in self.sites for site in match_sites(model.towers, name))
            if len(sites) != len(self.values):
                msg = f"the edit has values for {len(self.values)} sites, and its globs match "
                raise ValueError(f"{msg}{len(sites)}: name every site")
        ahead = [s.name for s in sites if s.tower != "lm"]
        if ahead and self.phase != "prompt":
            msg = f"{ahead[0]} runs once, before anything is generated: use phase='prompt'"
            raise ValueError(msg)
        require_role(model, sites, self.role)
        return sites


def same_model(one: str, other: str) -> bool:
    """Tell whether two names are of one model, in a folder here perhaps and on a hub there."""
    ends = {re.split(r"[/\\]", name.rstrip("/\\"))[-1] for name in (one, other)}
    return len(ends) == 1


def require_role(model: Model, sites: Sequence[Site], role: str) -> None:
    """Refuse a role that no token has at one of some sites, whatever the input."""
    towers = {t.name: t for t in model.towers}
    for site in sites if role not in ("last", "all") else ():
        tower = towers[site.tower]
        # A vector is of every role; in its norm alone, DINOv3's ConvNeXt has a cls.
        open_ = site.is_vector or (tower.channels_first and site.name.endswith(".norm"))
        if not open_ and role not in (roles := model.roles(tower)):
            has = " and ".join(roles) or "a single vector"
            raise ValueError(f"{site.name} has no {role} token, but {has}: choose one by role=")


def several(edits: Edit | Sequence[Edit]) -> list[Edit]:
    """Return edits in their order; one by itself is one."""
    return [edits] if isinstance(edits, Edit) else list(edits)


def save_edits(edits: Edit | Sequence[Edit], path: str | Path) -> None:
    """Write edits, in their order, to a safetensors file with a JSON header.

    Raises
    ------
    OSError
        When it cannot be written.
    """
    from safetensors.torch import save_file

    tensors, headers = {}, []
    for i, edit in enumerate(several(edits)):
        about: dict[str, Any] = {
            "mode": edit.mode, "sites": edit.sites, "width": edit.width, "role": edit.role,
            "phase": edit.phase, "model": edit.model,
        }  # fmt: skip
        headers.append(about)
        for name in _TENSORS:
            if (tensor := getattr(edit, name)) is not None:
                # Two edits may share a tensor, which safetensors refuses.
                tensors[f"{i}/{name}"] = tensor.detach().cpu().contiguous().clone()
    header = json.dumps({"format": _FORMAT, "edits": headers})
    path = Path(path)
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"geofast.edits": header})
    path.chmod(mode)  # which safetensors narrows to the owner


def load_edits(path: str | Path) -> list[Edit]:
    """Read what `save_edits` wrote; nothing in it is run.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    ValueError
        When it is not one of ours, of a newer format, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["geofast.edits"])
            if header["format"] > _FORMAT:
                msg = f"format {header['format']}; this geofast reads {_FORMAT}: upgrade it"
                raise ValueError(msg)
            names = set(file.keys())
            edits = []
            for i, about in enumerate(header["edits"]):
                there = [name for name in _TENSORS if f"{i}/{name}" in names]
                tensors = {name: file.get_tensor(f"{i}/{name}") for name in there}
                about["sites"] = tuple(about["sites"])
                edits.append(Edit(**about, **tensors))
    except (SafetensorError, KeyError, TypeError, ValueError) as err:
        msg = f"{path} holds no edits that can be read ({type(err).__name__}: {err}); "
        raise ValueError(msg + "write them anew with save_edits") from err
    return edits
