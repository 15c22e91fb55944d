"""Hooks on every site of one forward pass, pooled where the tokens are."""

from __future__ import annotations

import inspect
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ._ops import send
from .models import Model, Site, Stage, Tower, find_towers, match_sites
from .models.layout import Call, Layout, as_tokens, lay_out
from .pooling import ROLES, Pool, parse_pools, pool
from .rows import Blame, Rows
from .streams import capturing

Pools = str | Sequence[str] | Mapping[str, str | Sequence[str]] | None


class NonFiniteError(FloatingPointError):
    """A pooled value is NaN or infinite; `sample` is its place in the batch.

    What a GPU pooled is looked at later: `sample` is then its place among the rows so far.
    """

    def __init__(self, key: str, dtype: torch.dtype, place: int, first: int | None = None) -> None:
        self.sample = place + (first or 0)
        advice = "look at its input and at the model's weights"
        if dtype == torch.float16:
            advice = "load the model with dtype=torch.float32 or bfloat16 (--dtype)"
        super().__init__(
            f"{key}: {_sample(place, first)} has NaN or infinite activations in "
            f"{str(dtype).removeprefix('torch.')}; {advice}"
        )


class NoTokenError(ValueError):
    """A sample has no token of a role that a pool takes; `sample` as in `NonFiniteError`."""

    def __init__(self, message: str, sample: int) -> None:
        self.sample = sample
        super().__init__(message)


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
    blocks, is called with; tiles and packed patches come back to the images that they are of (see
    `models.layout`). The model is as it was when the block ends, after an exception too.

    A CUDA graph can be made of a pass inside the block, once another has made room for its rows.
    Each replay writes to the rows of that pass: take them away before the next, and look yourself
    for values that are not finite. Of `each`, and of images that a model packs or cuts into tiles,
    no graph can be made.

    Parameters
    ----------
    model
        A `Model`, or any nn.Module whose blocks can be found by structure.
    sites
        Names or globs (`lm.layers.*`); None takes `embed`, every layer and `joint` of every tower,
        and the projector.
    pool
        A pool or several (`"last"`, `["cls", "mean:patch"]`), a mapping from tower to such, or
        None for each tower's default.
    rows
        Where to put the rows; None makes a new `Rows`.

    Yields
    ------
    Rows
        `rows["lm.layers.3/last"]` is float32 [n, d] on the CPU, a row a sample in the order in
        which they came; of the pool `each`, a row a token.

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
    stages = model.stages if isinstance(model, Model) else (Stage(model, find_towers(model)),)
    towers = [tower for stage in stages for tower in stage.towers]
    wanted = match_sites(towers, sites)
    pools = pools_by_tower(towers, wanted, pool)
    if isinstance(model, Model) and model.stop is not None:
        last = model.deepest([model.stop, *wanted])
        if (last.tower, last.layer) != (model.stop.tower, model.stop.layer):
            raise ValueError(f"{last.name} lies beyond {model.stop.name}, where this model stops")
    rows = Rows() if rows is None else rows
    with ExitStack() as hooks:
        for stage in stages:
            _refuse_two_towers(stage, wanted)
            names = {t.name for t in stage.towers}
            if here := [site for site in wanted if site.tower in names]:
                Recorder(stage, here, pools, rows).attach(hooks)
        yield rows
        rows.verify()


def _refuse_two_towers(stage: Stage, sites: Sequence[Site]) -> None:
    # Each reads inputs of its own, so a row of the one is no row of the other.
    paths = {t.name: t.path for t in stage.towers if any(s.tower == t.name for s in sites)}
    if {"vision", "text"} <= paths.keys():
        part = paths["vision"].partition(".")[0]
        msg = (
            f"{type(stage.body).__name__} has two towers (vision, text), each for inputs of its "
            f"own: capture model.{part} and call that, choose sites='vision.layers.*', or take the "
            "model from gf.load"
        )
        raise ValueError(msg)


def pools_by_tower(
    towers: Sequence[Tower], sites: Sequence[Site], pools: Pools
) -> dict[str, tuple[Pool, ...]]:
    """Return the pools of every tower that has one of `sites`."""
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


class Recorder:
    """The hooks of one `capture`, and the state of the forward pass under way."""

    def __init__(
        self,
        stage: Stage,
        sites: Sequence[Site],
        pools: Mapping[str, tuple[Pool, ...]],
        rows: Rows,
    ) -> None:
        self._rows = rows
        self._body = stage.body
        self._towers = {t.name: t for t in stage.towers}
        self._sites = sites
        # By tower, and whether the site is one vector a sample, which one pool takes.
        self._pools = {
            (tower, is_vector): _by_kind(some[:1] if is_vector else some)
            for tower, some in pools.items()
            for is_vector in (False, True)
        }
        self._running = False
        self._call = Call()
        self._layouts: dict[tuple[Any, ...], Layout] = {}
        self._samples: int | None = None
        self._seen: set[str] = set()
        self._counts: dict[str, int] = {}
        self._unlooked: list[tuple[str, torch.Tensor, Blame]] = []
        self._passed = self._overwrites = False
        self._last: Callable[[], torch.Tensor | None] = lambda: None

    def attach(self, hooks: ExitStack) -> None:
        """Register every hook so that leaving `hooks` removes it."""
        start = self._body.register_forward_pre_hook(_untraced(self._start), with_kwargs=True)
        hooks.callback(start.remove)
        for name in {site.tower for site in self._sites}:
            # What a projector is given, its vision tower was given before.
            tower = self._towers["vision" if name == "projector" else name]
            for module in modules_around(self._body, (*tower.blocks, tower.head)[0]):
                note = _untraced(partial(self._note_mask, tower.name))
                handle = module.register_forward_pre_hook(note, with_kwargs=True)
                hooks.callback(handle.remove)
        for site in self._sites:
            hooks.callback(site.watch(_untraced(partial(self._read, site))).remove)
        hooks.callback(self._body.register_forward_hook(_untraced(self._finish)).remove)

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._rows.aside.settle()
        self._call = Call(_arguments(module, args, kwargs))
        self._layouts.clear()
        self._seen.clear()
        self._counts = {}
        self._unlooked.clear()
        self._samples = None
        self._running = True

    def _note_mask(
        self, tower: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._call.note_mask(tower, _arguments(module, args, kwargs))

    def _read(self, site: Site, hidden: torch.Tensor) -> None:
        if not self._running:
            called = self._body._get_name()
            raise RuntimeError(
                f"{site.name} ran outside a call of the {called} that capture watches: call that "
                "module itself, or give capture the one that you call"
            )
        if site.name in self._seen:
            raise RuntimeError(
                f"{site.name} ran twice in one forward pass; its rows would be mixed"
            )
        tokens = as_tokens(site, self._towers[site.tower], hidden.detach(), self._call)
        if not tokens.shape[-1]:
            raise ValueError(f"{site.name} gave hidden states of width 0: {list(hidden.shape)}")
        layout, is_new = self._layout(site, tokens)
        batch = layout.samples
        if self._samples not in (None, batch):
            msg = f"{site.name} saw {batch} samples where the sites before it saw {self._samples}"
            raise ValueError(msg)
        self._samples = batch
        pooled, each = self._pools[site.tower, site.is_vector]
        if tokens.stride(-1) != 1:
            tokens = tokens.contiguous()
        if is_new:
            self._require_tokens((*pooled, *each), site, layout)
        if pooled:
            self._pool(site, pooled, tokens, layout)
        for p in each:
            self._take_each(site, p, tokens, layout)
        self._spare(site, hidden)
        self._seen.add(site.name)
        # Here and not when the model is done: a forward pass may stop at the deepest site.
        if len(self._seen) == len(self._sites):
            self._watch()  # a pass that failed has nobody to blame
            self._rows.commit(self._counts, batch)
            self._passed = True

    def _spare(self, site: Site, hidden: torch.Tensor) -> None:
        """Have a GPU's model wait where it may write over what is being read beside it.

        Falcon adds what its attention returns to what its MLP returned, in place. The blocks of
        others return what they were given, changed: the first pass tells, and overlaps nothing. A
        block that changes what it was given and returns something else is not noticed.
        """
        self._overwrites |= hidden is self._last()
        self._last = weakref.ref(hidden)
        is_branch = site.name.endswith((".attn", ".mlp"))
        if is_branch or self._overwrites or not self._passed:
            self._rows.aside.join()

    def _pool(
        self, site: Site, pools: Sequence[Pool], tokens: torch.Tensor, layout: Layout
    ) -> None:
        """Put a row a sample where they are kept; at most [batch, dim] travels to the host."""
        rows, (batch, dim), where = self._rows, (layout.samples, tokens.shape[-1]), tokens.device
        keys = [rows.key(site.name, p.name) for p in pools]
        widths = [p.width(dim) for p in pools]
        room = [rows.reserve(k, w, batch, where) for k, w in zip(keys, widths, strict=True)]
        with rows.aside.beside(where, tokens, layout.roles):
            out = [r if r.device == where else torch.empty_like(r, device=where) for r in room]
            sound = pool(tokens, layout.roles, pools, out, layout.starts)
            for key, r, o in zip(keys, room, out, strict=True):
                if r is not o:
                    r.copy_(o, non_blocking=True)
                if not sound:
                    self._check(key, o, partial(NonFiniteError, key, tokens.dtype))
        self._counts |= dict.fromkeys(keys, batch)

    def _take_each(self, site: Site, p: Pool, tokens: torch.Tensor, layout: Layout) -> None:
        """Hand the tokens of a role on, or make each a row: sample by sample, in their order."""
        ((_, role),), rows, dim = p.parts, self._rows, tokens.shape[-1]
        key = rows.key(site.name, p.name)
        hidden, count = tokens.reshape(-1, dim), 0
        with rows.aside.beside(tokens.device, tokens, hidden, layout.roles, layout.sample):
            means = torch.empty(layout.samples, dim, device=tokens.device)
            if not pool(tokens, layout.roles, parse_pools(f"mean:{role}"), [means], layout.starts):
                self._check(key, means, partial(NonFiniteError, key, tokens.dtype))
            if rows.take_tokens is not None:
                rows.take_tokens(key, hidden, layout, role)
            else:
                chosen = hidden[layout.has(role).flatten()]
                count = len(chosen)
                rows.reserve(key, dim, count, tokens.device).copy_(chosen)
        self._counts[key] = count

    def _layout(self, site: Site, tokens: torch.Tensor) -> tuple[Layout, bool]:
        """Return the layout of the tokens, and whether no site before had it."""
        # The blocks of a tower may lie on several devices, each with its roles.
        kind = (site.tower, site.is_vector, tokens.device, *tokens.shape[:2])
        is_new = kind not in self._layouts
        if is_new:
            self._layouts[kind] = lay_out(site, self._towers[site.tower], tokens, self._call)
        return self._layouts[kind], is_new

    def _require_tokens(self, pools: Sequence[Pool], site: Site, layout: Layout) -> None:
        """Refuse a sample without a token of a role that is asked for."""
        asked = {role: p for p in reversed(pools) for _, role in reversed(p.parts)}
        for role, p in reversed(asked.items()):
            signs = torch.where(_lacking(layout, role), math.nan, 0.0)
            key = self._rows.key(site.name, p.name)
            self._check(key, signs[:, None], partial(_lack, p, role, site, layout))

    def _check(self, key: str, values: torch.Tensor, blame: Blame) -> None:
        """Have `blame` say what is wrong with the sample whose values [samples, d] are not finite.

        On a GPU nobody waits for them here.
        """
        if not values.is_cpu:
            self._unlooked.append((key, values, blame))
            return
        bad = (~values.isfinite().all(1)).nonzero()
        if len(bad):
            raise blame(int(bad[0]), None)

    def _watch(self) -> None:
        """Have what was not looked at be looked at later: by a few launches, for all sites at once.

        In a CUDA graph they would tell of its replays, and nobody would ask.
        """
        alike: dict[Any, list[int]] = {}
        for i, (_, values, _) in enumerate(self._unlooked):
            if not capturing(values.device):
                alike.setdefault((values.device, values.dtype, values.shape), []).append(i)
        signs: dict[int, torch.Tensor] = {}
        for (device, *_), some in alike.items():
            with self._rows.aside.beside(device):
                together = torch.stack([self._unlooked[i][1] for i in some])
                signs |= zip(some, (together * 0).sum(2).unbind(), strict=True)
        for i in sorted(signs):  # as the model meets them
            key, _, blame = self._unlooked[i]
            self._rows.watch(key, signs[i], blame)
        self._unlooked.clear()

    def _finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        missed = [s.name for s in self._sites if s.name not in self._seen]
        if missed:
            msg = (
                f"{missed[0]} did not run in this forward pass ({len(missed)} sites missed); "
                "leave it out of sites= (--sites), or if the model was compiled before, run it "
                "under torch.compiler.set_stance('force_eager')"
            )
            raise RuntimeError(msg)
        self._running = False


def _untraced(hook: Callable[..., None]) -> Callable[..., None]:
    """Keep torch.compile from looking into a hook; without it, do not load it, which takes 2 s."""
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook


def modules_around(body: nn.Module, block: nn.Module | None) -> list[nn.Module]:
    """Return the modules from `body` down to `block`, which is left out."""
    path = next((name for name, module in body.named_modules() if module is block), "")
    parts = path.split(".")
    return [body.get_submodule(".".join(parts[:i])) for i in range(len(parts))]


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs


def _by_kind(pools: Sequence[Pool]) -> tuple[list[Pool], list[Pool]]:
    """Part the pools into those of a row a sample and those of a row a token."""
    return [p for p in pools if p.each is None], [p for p in pools if p.each is not None]


def _lacking(layout: Layout, role: str) -> torch.Tensor:
    """Which samples have no token of `role`: bool [samples]."""
    has = layout.has(role)
    if layout.starts is None:
        return ~has.any(1)
    starts = send(torch.tensor(layout.starts), has.device)
    return torch.nn.functional.pad(has[0].cumsum(0), (1, 0))[starts].diff() == 0


def _lack(
    p: Pool, role: str, site: Site, layout: Layout, place: int, first: int | None
) -> NoTokenError:
    there = [r for r in ROLES[1:] if layout.has(r).any()]
    msg = f"pool {p.name!r} at {site.name}: {_sample(place, first)} has no {role} token"
    msg += f"; here are {', '.join(there)} tokens" if there else ""
    return NoTokenError(msg, place + (first or 0))


def _sample(place: int, first: int | None) -> str:
    """Name the sample at a place in the batch, whose first row is number `first` if it is over."""
    return f"sample {place} of the batch" if first is None else f"sample {first + place}"
