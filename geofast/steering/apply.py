"""Hooks that show jobs the tokens that they are about, and put back what the jobs make of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..capture import modules_around
from ..models import Model, Site, Stage
from ..models.layout import Call, Layout, as_tokens, lay_out
from ..models.phi4 import Phi4
from .edit import Edit, several


@dataclass(frozen=True)
class Tokens:
    """Which tokens a job is shown."""

    sample: torch.Tensor
    """int64 [n]: the row of the batch that each is of."""
    samples: int
    """How many rows the batch has."""
    number: torch.Tensor | int
    """int64 [n]: its number among the tokens of its role in its prompt; of a generated token, which
    comes alone, 1 and up."""
    counts: torch.Tensor | None
    """int64 [samples]: how many tokens of the role the prompts have; None where one comes alone,
    and is generated or of role `last`."""

    def take(self, which: torch.Tensor) -> Tokens:
        """Return some of the tokens of prompts, bool [n]."""
        assert isinstance(self.number, torch.Tensor)
        return replace(self, sample=self.sample[which], number=self.number[which])


@dataclass(frozen=True)
class Job:
    """Something to do at a site whenever the model runs."""

    site: Site
    role: str
    phase: str
    visit: Callable[[torch.Tensor, Tokens], torch.Tensor | None]
    """Given hidden states [n, d], returns what shall stand there, or None to leave them."""


@contextmanager
def edited(
    model: Model, edits: Edit | Sequence[Edit], copies: int = 1, *, begun: bool = False
) -> Iterator[None]:
    """Apply edits, one after the other, to whatever `model.module` runs inside the block.

    A call without a cache, or with an empty one, is a prompt; one of a single token on top of a
    cache is a generated one, or where that lacks it the last of the prompt. Of two blocks inside
    each other the inner one's edits come first. The model is as it was when the block ends, after
    an exception too.

    Parameters
    ----------
    model
        From `load`.
    edits
        Those with values for single samples want a batch of just these, in their order.
    copies
        How many rows of the batch each sample has: `num_beams` or `num_return_sequences` of
        `generate`, whichever is larger. Rows of one sample lie together, as transformers has them.
    begun
        The first call has a cache that holds the prompt but for its last token, and no edit is of
        other tokens of it.

    Raises
    ------
    ValueError
        At once when an edit does not go with the model; when the model runs, when the batch has
        other samples than the edit, a sample no token of its role, or the hidden states another
        width.
    RuntimeError
        When a site did not run, as in a model that was compiled before; when several tokens come
        on top of a cache, so that prompt and generated tokens cannot be told apart.
    """
    jobs = [
        Job(site, edit.role, edit.phase, _Change(edit, site.name, i, copies))
        for edit in several(edits)
        for i, site in enumerate(edit.sites_in(model))
        if len(edit.dims)
    ]
    # Ahead of other hooks: by such transformers keeps the layers that LLaVA takes from its tower.
    with watching(model, jobs, ahead=True, begun=begun):
        yield


@contextmanager
def watching(
    model: Model, jobs: Sequence[Job], *, ahead: bool = False, begun: bool = False
) -> Iterator[None]:
    """Do jobs, one after the other where they are at one site, while the model runs.

    `ahead` of whatever other hooks are there, or after them; `begun` as for `edited`.
    """
    if not jobs:
        yield
        return
    with ExitStack() as hooks:
        watcher = _Watcher(model, jobs, ahead, begun)
        watcher.attach(hooks)
        yield
        watcher.require_met()


@contextmanager
def fitting(model: Model, edits: Sequence[Edit]) -> Iterator[None]:
    """Refuse edits for another width when the model runs; they change nothing."""
    towers = {t.name: t for t in model.towers}
    with ExitStack() as hooks:
        for edit in edits:
            for site in edit.sites_in(model):
                check = partial(_require_width, edit, site, towers[site.tower].channels_first)
                hooks.callback(_on_site(site, check, False).remove)
        yield


def _require_width(edit: Edit, site: Site, channels_first: bool, hidden: torch.Tensor) -> None:
    width = hidden.shape[1 if channels_first and hidden.ndim == 4 else -1]
    if width != edit.width:
        raise _of_width(site.name, width, edit)


def _of_width(site: str, width: int, edit: Edit) -> ValueError:
    return ValueError(f"{site} is {width} wide, and the edit is for {edit.width}")


_Placed = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class _Change:
    """What an edit makes of hidden states at one of its sites."""

    def __init__(self, edit: Edit, site: str, i: int, copies: int) -> None:
        self._edit, self._site, self._copies = edit, site, copies
        self._values = edit.values[i if len(edit.values) > 1 else 0]
        self._whole = torch.equal(edit.dims, torch.arange(edit.width))
        self._placed: dict[tuple[torch.device, torch.dtype], _Placed] = {}

    def __call__(self, hidden: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        edit = self._edit
        if hidden.shape[1] != edit.width:
            raise _of_width(self._site, hidden.shape[1], edit)
        writes = edit.mode in ("swap", "patch")
        # Sums in half precision would lose what the edit is to reach.
        exact = torch.promote_types(hidden.dtype, torch.float32)
        values, dims, left, right = self._on(hidden.device, hidden.dtype if writes else exact)
        made = hidden if writes else hidden.to(exact)
        change = values[self._sample(tokens), self._number(tokens)]
        if left is not None and right is not None:
            change = (change - made @ right.T) @ left.T
        if self._whole:
            made = change.expand_as(hidden) if writes else made + change
        elif writes:
            made = made.index_copy(1, dims, change.expand(len(made), -1))
        else:
            made = made.index_add(1, dims, change.expand(len(made), -1))
        return made.to(hidden.dtype)

    def _on(self, device: torch.device, dtype: torch.dtype) -> _Placed:
        if (device, dtype) not in self._placed:
            edit = self._edit
            left, right = (
                None if t is None else t.to(device, dtype) for t in (edit.left, edit.right)
            )
            values, dims = self._values.to(device, dtype), edit.dims.to(device)
            self._placed[device, dtype] = values, dims, left, right
        return self._placed[device, dtype]

    def _sample(self, tokens: Tokens) -> torch.Tensor | int:
        have = len(self._values)
        if have == 1:
            return 0
        if tokens.samples == have:
            return tokens.sample
        if tokens.samples == have * self._copies:
            return tokens.sample // self._copies
        msg = f"{self._site} has {tokens.samples} samples in this batch, and the edit is for {have}"
        if self._copies > 1:
            msg += f" of {self._copies} rows each"
        raise ValueError(msg)

    def _number(self, tokens: Tokens) -> torch.Tensor | int:
        have = self._values.shape[1]
        if have == 1:
            return 0
        if tokens.counts is None:
            assert isinstance(tokens.number, int)
            if tokens.number >= have:
                msg = f"the edit has values for {have - 1} generated tokens, and here is one more: "
                raise ValueError(msg + "generate fewer, or take states of more steps")
            return tokens.number
        if self._edit.role != "last" and bool((tokens.counts != have).any()):
            bad = int((tokens.counts != have).nonzero()[0])
            msg = f"sample {bad} has {int(tokens.counts[bad])} {self._edit.role} tokens at "
            msg += f"{self._site}, and the edit has values for {have}: take inputs of one length, "
            raise ValueError(msg + "or role='last'")
        return tokens.number


class _Watcher:
    """The hooks, and the state of the run under way."""

    def __init__(self, model: Model, jobs: Sequence[Job], ahead: bool, begun: bool) -> None:
        self._stages, self._ahead, self._begun = model.stages, ahead, begun
        self._towers = {t.name: t for t in model.towers}
        self._jobs: dict[str, list[Job]] = {}
        self._sites = {job.site.name: job.site for job in jobs}
        for job in jobs:
            self._jobs.setdefault(job.site.name, []).append(job)
        self._met = False
        self._calls: dict[str, Call] = {}
        self._expected: set[str] = set()
        self._seen: set[str] = set()
        self._prompt = 0  # its length
        self._step = 0  # which generated token it is, from 1; 0 in the prompt
        self._alone = False  # one token on top of a cache: a generated one, or the prompt's last
        self._layouts: dict[tuple[Any, ...], Layout] = {}
        self._places: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor, Tokens]] = {}
        self._ends: dict[tuple[torch.device, str], Tokens] = {}  # those of a role that end prompts

    def attach(self, hooks: ExitStack) -> None:
        """Register every hook so that leaving `hooks` removes it."""
        bodies = [stage.body for stage in self._stages]

        def add(handle: RemovableHandle) -> None:
            hooks.callback(handle.remove)

        for stage in self._stages:
            add(_before(stage.body, partial(self._start, stage)))
            if isinstance(stage.body, Phi4):
                add(_before(stage.body.model, partial(self._start_inside, stage)))
        for stage in self._stages:
            names = {s.tower for s in self._sites.values()} & {t.name for t in stage.towers}
            # What a projector is given, its vision tower was given before.
            for name in sorted({"vision" if n == "projector" else n for n in names}):
                tower = self._towers[name]
                around = modules_around(stage.body, (*tower.blocks, tower.head)[0])
                inner = [module for module in around if not any(module is b for b in bodies)]
                if inner and name != "lm":
                    add(_before(inner[0], partial(self._start_tower, name)))
                for module in around:
                    add(_before(module, partial(self._note_mask, name)))
        for name, jobs in self._jobs.items():
            site = self._sites[name]
            add(_on_site(site, partial(self._at, site, jobs), self._ahead))
        for stage in self._stages:
            finish = _untraced(partial(self._finish, stage))
            add(stage.body.register_forward_hook(finish))

    def require_met(self) -> None:
        """Refuse a block in which nothing was changed."""
        if not self._met:
            raise RuntimeError(
                f"{next(iter(self._sites))} did not run, so nothing was edited: run the model "
                "inside the block, and if it was compiled before, under "
                "torch.compiler.set_stance('force_eager')"
            )

    def _start(self, stage: Stage, given: Mapping[str, Any]) -> None:
        call = Call(given)
        before = self._stages[: self._stages.index(stage) + 1]
        names = [t.name for s in before for t in s.towers]
        self._calls.update(dict.fromkeys(names, call))
        self._expected = set(names)
        self._seen.clear()
        self._layouts.clear()
        self._places.clear()
        self._count(given)

    def _start_inside(self, stage: Stage, given: Mapping[str, Any]) -> None:
        """Note a call that does without `Phi4`, as transformers' `generate` makes."""
        if given.get("inputs_embeds") is None:
            self._start(stage, given)

    def _start_tower(self, name: str, given: Mapping[str, Any]) -> None:
        """Note a call of a tower that no stage has called, as transformers' `generate` makes."""
        if name in self._expected:
            self._expected.discard(name)
            return
        self._calls[name] = self._calls["projector"] = Call(given)
        self._seen = {n for n in self._seen if self._sites[n].tower == "lm"}
        self._layouts.clear()
        self._places.clear()

    def _count(self, given: Mapping[str, Any]) -> None:
        """Tell a prompt from a generated token."""
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        tokens = next(
            (given[n].shape[1] for n in ("input_ids", "inputs_embeds") if given.get(n) is not None),
            0,
        )
        self._alone = past > 0 and tokens == 1
        if past == 0:
            self._prompt, self._step = tokens, 0
        elif self._alone:
            self._prompt = self._prompt or past + self._begun
            self._step = past - self._prompt + 1
        else:
            msg = f"{tokens} tokens come on top of {past} in the cache: neither a prompt nor one "
            raise RuntimeError(msg + "generated token; leave prefill_chunk_size and assistants out")

    def _note_mask(self, tower: str, given: Mapping[str, Any]) -> None:
        if not (self._alone and tower == "lm"):
            if tower == "lm":
                given = {**given, "attention_mask": _of_tokens(given.get("attention_mask"))}
            self._calls.setdefault(tower, Call()).note_mask(tower, given)

    def _at(self, site: Site, jobs: Sequence[Job], hidden: torch.Tensor) -> torch.Tensor | None:
        if site.name in self._seen:
            raise RuntimeError(f"{site.name} ran twice in one forward pass; it cannot be edited")
        self._seen.add(site.name)
        self._met = True
        alone = site.tower == "lm" and self._alone
        other = "prompt" if alone and self._step else "steps"
        due = [job for job in jobs if job.phase != other]
        if not due:
            return None
        call = Call() if alone else self._calls.get(site.tower, Call())
        # A copy: the model may keep what it has made, and autograd wants it as it was.
        copy = hidden.clone(memory_format=torch.contiguous_format)
        tokens = as_tokens(site, self._towers[site.tower], copy, call)
        changed = False
        for job in due:
            where: Any
            if alone and not self._step and job.role != "last":
                which = self._ends[tokens.device, job.role]
                where = which.sample, -1
            elif alone:
                rows = tokens.shape[0]
                everyone = torch.arange(rows, device=tokens.device)
                where, which = (slice(None), -1), Tokens(everyone, rows, self._step, None)
            else:
                *where, which = self._find(site, tokens, job.role, call)
                where = tuple(where)
            made = job.visit(tokens[where], which)
            if made is not None:
                tokens[where] = made
                changed = True
        return copy if changed else None

    def _find(
        self, site: Site, tokens: torch.Tensor, role: str, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor, Tokens]:
        """Return the sequences and the places in them of all tokens of a role."""
        kind = (site.tower, site.is_vector, tokens.device, *tokens.shape[:2])
        if kind not in self._layouts:
            self._layouts[kind] = lay_out(site, self._towers[site.tower], tokens, call)
        if (of_role := (*kind, role)) not in self._places:
            *_, at, which = found = _places(self._layouts[kind], role, site, tokens.shape[1])
            self._places[of_role] = found
            if site.tower == "lm":
                self._ends[tokens.device, role] = which.take(at == tokens.shape[1] - 1)
        return self._places[of_role]

    def _finish(self, stage: Stage, module: nn.Module, args: Any, output: Any) -> None:
        self._expected.clear()
        here = {t.name for t in stage.towers}
        phase = "steps" if self._step else "prompt"
        missed = [
            name
            for name, jobs in self._jobs.items()
            if self._sites[name].tower in here
            and name not in self._seen
            and any(job.phase in (phase, "both") for job in jobs)
        ]
        if missed:
            raise RuntimeError(
                f"{missed[0]} did not run in this forward pass ({len(missed)} sites missed): leave "
                "it out, or if the model was compiled before, run it under "
                "torch.compiler.set_stance('force_eager')"
            )


def _of_tokens(mask: Any) -> Any:
    """Make [batch, tokens] of a causal mask [batch, 1, tokens, keys], or of several by kind.

    transformers' `generate` makes such for some models. Every token sees itself, but padding does
    not.
    """
    if isinstance(mask, Mapping):
        mask = next((m for m in mask.values() if m is not None), None)
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        itself = mask[:, 0].diagonal(dim1=1, dim2=2)
        mask = itself if itself.dtype == torch.bool else itself == 0
    return mask


def _places(
    layout: Layout, role: str, site: Site, length: int
) -> tuple[torch.Tensor, torch.Tensor, Tokens]:
    index = layout.has("all" if role == "last" else role).flatten().nonzero()[:, 0]
    sample = layout.sample[index]
    counts = sample.bincount(minlength=layout.samples)
    if bool((counts == 0).any()):
        lacking = int((counts == 0).nonzero()[0])
        raise ValueError(f"sample {lacking} of the batch has no {role} token at {site.name}")
    ends = counts.cumsum(0)
    if role == "last":
        index, counts = index[ends - 1], torch.ones_like(counts)
        sample = torch.arange(layout.samples, device=index.device)
        number = torch.zeros_like(sample)
    else:
        number = torch.arange(len(index), device=index.device) - (ends - counts)[sample]
    tokens = Tokens(sample, layout.samples, number, counts)
    return index // length, index % length, tokens


def _on_site(
    site: Site, change: Callable[[torch.Tensor], torch.Tensor | None], ahead: bool
) -> RemovableHandle:
    """Call `change` with the hidden states at a site, and run the model on with what it returns."""
    if site.at == "output":

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            made = change(_first(site, output))
            return None if made is None else _with_first(output, made)

        return site.module.register_forward_hook(_untraced(after), prepend=ahead)
    name = _names_of(site.module)[0]

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = change(_first(site, args[0] if args else kwargs[name]))
        if made is None:
            return None
        if args:
            return (_with_first(args[0], made), *args[1:]), kwargs
        return args, kwargs | {name: _with_first(kwargs[name], made)}

    return site.module.register_forward_pre_hook(_untraced(before), with_kwargs=True, prepend=ahead)


def _first(site: Site, value: Any) -> torch.Tensor:
    hidden = value[0] if isinstance(value, tuple | list) else value
    if not isinstance(hidden, torch.Tensor):
        msg = f"{site.name} is a {type(hidden).__name__} in this model, not a tensor"
        raise ValueError(msg)
    return hidden


def _with_first(value: Any, made: torch.Tensor) -> Any:
    return type(value)([made, *value[1:]]) if isinstance(value, tuple | list) else made


def _before(module: nn.Module, note: Callable[[Mapping[str, Any]], None]) -> RemovableHandle:
    """Call `note` with the arguments of every call of a module, by name."""
    names = _names_of(module)

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(dict(zip(names, args, strict=False)) | kwargs)

    return module.register_forward_pre_hook(_untraced(hook), with_kwargs=True)


def _names_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward."""
    forward: Any = module.forward
    return _names(getattr(forward, "__func__", forward))[isinstance(forward, MethodType) :]


@lru_cache(maxsize=256)
def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    # Every block of a model has the same one, and finding out takes 0.1 ms.
    return tuple(inspect.signature(function).parameters)


def _untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile from looking into a hook: the model may be compiled inside the block."""
    disabled: Callable[..., Any] = torch.compiler.disable(hook)
    return disabled
