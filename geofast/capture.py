"""Hooks on every site of one forward pass, pooled where the tokens are."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .models import Model, Site, Tower, find_towers, match_sites
from .pooling import Pool, parse_pools, pool, role_bit
from .rows import Rows

Pools = str | Sequence[str] | Mapping[str, str | Sequence[str]] | None


class NonFiniteError(FloatingPointError):
    """A pooled value is NaN or infinite; `sample` is its place in the batch."""

    def __init__(self, key: str, sample: int, dtype: torch.dtype) -> None:
        self.sample = sample
        advice = "look at its input and at the model's weights"
        if dtype == torch.float16:
            advice = "load the model with dtype=torch.float32 or bfloat16"
        super().__init__(
            f"{key}: sample {sample} of the batch has NaN or infinite activations in "
            f"{str(dtype).removeprefix('torch.')}; {advice}"
        )


@contextmanager
def capture(
    model: Model | nn.Module,
    sites: str | Sequence[str] | None = None,
    pool: Pools = None,
    *,
    rows: Rows | None = None,
) -> Iterator[Rows]:
    """Pool the hidden states of every site while the model runs, and keep the rows.

    Inside the block, run the model as often as you like; each run adds a batch of rows. Nothing
    with a token axis outlives a hook. Padding is left out by the `attention_mask` [batch, tokens]
    (in a vision tower, the `pixel_attention_mask`) that the model, or a module between it and the
    blocks, is called with. The model is as it was when the block ends, after an exception too.

    Parameters
    ----------
    model
        A `Model`, or any nn.Module whose blocks can be found by structure.
    sites
        Names or globs (`lm.layers.*`); None takes `embed` and every layer of every tower.
    pool
        A pool or several (`"last"`, `["cls", "mean:patch"]`), a mapping from tower to such, or
        None for each tower's default.
    rows
        Where to put the rows; None makes a new `Rows`.

    Yields
    ------
    Rows
        `rows["lm.layers.3/last"]` is float32 [n, d] on the CPU, a row a sample in the order in
        which they came.

    Raises
    ------
    ValueError
        When a pattern matches no site, a pool is unknown, or a sample has no token to pool; when
        sites of an image tower and of a text tower beside it are asked for; when hidden states
        are not [batch, tokens, dim] with the batch that the model was called with.
    NonFiniteError
        A FloatingPointError, when a pooled value is NaN or infinite; names site, sample and dtype.
    RuntimeError
        When a site did not run in a forward pass, or ran outside one.
    """
    towers = model.towers if isinstance(model, Model) else find_towers(model)
    body = model.body if isinstance(model, Model) else model
    wanted = match_sites(towers, sites)
    _refuse_two_towers(body, towers, wanted)
    pools = _pools_by_tower(towers, wanted, pool)
    recorder = _Recorder(
        body, {t.name: t for t in towers}, wanted, pools, Rows() if rows is None else rows
    )
    with ExitStack() as hooks:
        recorder.attach(hooks)
        yield recorder.rows


def _refuse_two_towers(body: nn.Module, towers: Sequence[Tower], sites: Sequence[Site]) -> None:
    # Each reads inputs of its own, so a row of the one is no row of the other.
    paths = {t.name: t.path for t in towers if any(site.tower == t.name for site in sites)}
    if {"vision", "text"} <= paths.keys():
        part = paths["vision"].partition(".")[0]
        msg = (
            f"{type(body).__name__} has two towers (vision, text), which are not supported "
            f"together yet: capture model.{part} and call that, or choose sites='vision.layers.*'"
        )
        raise ValueError(msg)


def _pools_by_tower(
    towers: Sequence[Tower], sites: Sequence[Site], pools: Pools
) -> dict[str, tuple[Pool, ...]]:
    by_tower = {}
    names = [t.name for t in towers]
    for name in pools if isinstance(pools, Mapping) else ():
        if name not in names:
            raise ValueError(f"pool= names a tower {name!r}; there is {', '.join(names)}")
    for tower in towers:
        if not any(site.tower == tower.name for site in sites):
            continue
        chosen = pools.get(tower.name) if isinstance(pools, Mapping) else pools
        by_tower[tower.name] = parse_pools(chosen or tower.default_pool)
    return by_tower


class _Recorder:
    """The hooks of one `capture`, and the state of the forward pass under way."""

    def __init__(
        self,
        body: nn.Module,
        towers: Mapping[str, Tower],
        sites: Sequence[Site],
        pools: Mapping[str, tuple[Pool, ...]],
        rows: Rows,
    ) -> None:
        self.rows = rows
        self._body = body
        self._towers = towers
        self._sites = sites
        self._pools = pools
        self._running = False
        self._called_with: set[int] = set()
        self._masks: dict[str, torch.Tensor] = {}
        self._roles: dict[str, torch.Tensor] = {}
        self._batch: int | None = None
        self._seen: set[str] = set()

    def attach(self, hooks: ExitStack) -> None:
        """Register every hook so that leaving `hooks` removes it."""
        start = self._body.register_forward_pre_hook(self._start, with_kwargs=True)
        hooks.callback(start.remove)
        for name in self._pools:
            for module in _around(self._body, self._towers[name].blocks[0]):
                take_mask = partial(self._take_mask, name)
                handle = module.register_forward_pre_hook(take_mask, with_kwargs=True)
                hooks.callback(handle.remove)
        for site in self._sites:
            hooks.callback(site.watch(partial(self._read, site)).remove)
        hooks.callback(self._body.register_forward_hook(self._finish).remove)

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _arguments(module, args, kwargs).values()
        self._called_with = {len(t) for t in given if isinstance(t, torch.Tensor) and t.ndim}
        self._masks.clear()
        self._roles.clear()
        self._seen.clear()
        self._batch = None
        self._running = True

    def _take_mask(
        self, tower: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        name = "pixel_attention_mask" if tower == "vision" else "attention_mask"
        mask = _arguments(module, args, kwargs).get(name)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            self._masks[tower] = mask
        elif mask is not None and tower not in self._masks:
            # Further in, models make [batch, 1, tokens, tokens] of a mask that was seen before.
            got = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
            raise ValueError(f"{name} must be [batch, tokens] for pooling; got {got}")

    def _read(self, site: Site, hidden: torch.Tensor) -> None:
        if hidden.ndim == 2:
            hidden = hidden[:, None]
        if hidden.ndim != 3:
            shape = list(hidden.shape)
            msg = f"{site.name} gave hidden states of shape {shape}, not [batch, tokens, dim]"
            raise ValueError(msg)
        if not self._running:
            called = type(self._body).__name__
            raise RuntimeError(
                f"{site.name} ran outside a call of the {called} that capture watches: call that "
                "module itself, or give capture the one that you call"
            )
        if site.name in self._seen:
            raise RuntimeError(
                f"{site.name} ran twice in one forward pass; its rows would be mixed"
            )
        batch, _, dim = hidden.shape
        if self._called_with and batch not in self._called_with:
            sizes = " or ".join(map(str, sorted(self._called_with)))
            shape = list(hidden.shape)
            msg = f"{site.name} is {shape}, not [batch, tokens, dim]: the batch has {sizes} samples"
            raise ValueError(msg)
        if self._batch not in (None, batch):
            msg = f"{site.name} saw {batch} samples where the sites before it saw {self._batch}"
            raise ValueError(msg)
        self._batch = batch
        pools = self._pools[site.tower]
        keys = [f"{site.name}/{p.name}" for p in pools]
        room = [self.rows.reserve(k, p.width(dim), batch) for k, p in zip(keys, pools, strict=True)]
        # Pool where the tokens are; only [batch, dim] travels to the host.
        out = room if hidden.is_cpu else [r.new_empty(r.shape, device=hidden.device) for r in room]
        if hidden.stride(-1) != 1:
            hidden = hidden.contiguous()
        pool(hidden.detach(), self._roles_of(site, hidden), pools, out)
        for r, o in zip(room, out, strict=True):
            if r is not o:
                r.copy_(o)
        self._check_finite(keys, room, hidden.dtype)
        self._seen.add(site.name)

    def _roles_of(self, site: Site, hidden: torch.Tensor) -> torch.Tensor:
        roles = self._roles.get(site.tower)
        if roles is None or roles.shape[1] != hidden.shape[1]:
            tower, mask = self._towers[site.tower], self._masks.get(site.tower)
            roles = self._roles[site.tower] = token_roles(tower, hidden, mask)
            _require_tokens(self._pools[site.tower], roles, site)
        return roles

    def _check_finite(self, keys: list[str], room: list[torch.Tensor], dtype: torch.dtype) -> None:
        for key, rows in zip(keys, room, strict=True):
            # One operation where all is well; only a sum that is not finite is looked into.
            if math.isfinite(float(rows.sum())):
                continue
            if not torch.isfinite(rows).all():
                bad = int((~torch.isfinite(rows).all(1)).nonzero()[0])
                raise NonFiniteError(key, bad, dtype)

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        missed = [s.name for s in self._sites if s.name not in self._seen]
        if missed:
            msg = (
                f"{missed[0]} did not run in this forward pass ({len(missed)} sites missed); "
                "leave it out of sites=, or if the model was compiled before, run it under "
                "torch.compiler.set_stance('force_eager')"
            )
            raise RuntimeError(msg)
        self._running = False
        self.rows.commit(self._batch or 0)


def _around(body: nn.Module, block: nn.Module) -> list[nn.Module]:
    """Return the modules from `body` down to `block`, which is left out."""
    path = next((name for name, module in body.named_modules() if module is block), "")
    parts = path.split(".")
    return [body.get_submodule(".".join(parts[:i])) for i in range(len(parts))]


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def token_roles(tower: Tower, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the role byte of every token of `hidden` [batch, tokens, dim]: uint8 [batch, tokens].

    `mask` [batch, tokens] is the model's attention mask, 0 at padding; None: no padding.
    """
    batch, tokens, _ = hidden.shape
    bits = torch.ones(tokens, dtype=torch.uint8)
    # CLIP's final norm sees the CLS token alone: what has no room for patches has none.
    if len(tower.prefix) < tokens:
        bits |= 1 << role_bit(tower.tokens)
        for i, role in enumerate(tower.prefix):
            bits[i] = 1 << role_bit(role) | 1
    roles = bits.to(hidden.device).repeat(batch, 1)
    if mask is not None:
        if mask.shape != roles.shape:
            shape = list(mask.shape)
            msg = f"attention_mask is {shape} for hidden states of {batch} x {tokens} tokens"
            raise ValueError(msg)
        roles *= (mask != 0).to(roles.device)
    return roles


def _require_tokens(pools: Sequence[Pool], roles: torch.Tensor, site: Site) -> None:
    for p in pools:
        for _, role in p.parts:
            empty = ((roles >> role_bit(role)) & 1).sum(1) == 0
            if empty.any():
                first = int(empty.nonzero()[0])
                msg = f"sample {first} of the batch has no {role} token"
                raise ValueError(f"pool {p.name!r} at {site.name}: {msg}")
