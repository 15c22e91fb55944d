"""What a model is to the engine: a module to run, its towers, and how a batch is prepared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from .structure import Site, Tower, find_towers, match_sites

if TYPE_CHECKING:
    from ..steering import Edit

Kind = Literal["image", "text", "location"]
Batch = Mapping[str, Any]
"""Arguments of a call. In two stages: `image`, those of the first, and `prompts`, a list of those
of the second."""


@dataclass(frozen=True)
class Stage:
    """A call of a forward pass: `body` is called, and runs the blocks of `towers`."""

    body: nn.Module = field(repr=False)
    towers: tuple[Tower, ...]


@dataclass(frozen=True)
class Model:
    """A module and what the engine needs to feed it; made by `load`."""

    name: str
    """Hub id, folder or class name: what the reports call the model."""
    module: nn.Module
    """The whole module, heads included."""
    stages: tuple[Stage, ...]
    """The calls of a forward pass, one after the other."""
    kind: Kind
    """What one input is: a PIL image, a string, or latitude and longitude in degrees."""
    transform: Callable[[Any], Any] | None
    """Runs on one input, ahead of the model and in a worker process; None leaves it as it is."""
    collate: Callable[[list[Any]], Batch]
    """Makes the keyword arguments of `body` from transformed inputs, on the CPU."""
    other: Model | None = None
    """The same model for inputs of the other kind, where it takes both."""
    notes: tuple[str, ...] = ()
    """What was changed in the model so that it can be probed."""
    stop: Site | None = None
    """The site after which a forward pass is broken off."""
    untrained: Callable[[], nn.Module] | None = None
    """Builds `module` anew, with the random weights that its library draws; None where the class
    of `module` and its config do."""
    source: str = ""
    """Where `load` found it: an absolute path, or an id of the Hub with `@` and its commit; of
    open_clip, timm and location encoders what it was given, a path in it made absolute."""

    def __repr__(self) -> str:
        towers = ", ".join(f"{tower.name} ({len(tower.blocks)} blocks)" for tower in self.towers)
        return f"Model({self.name}, reads {self.kind}: {towers}; {self.dtype} on {self.device})"

    @property
    def body(self) -> nn.Module:
        """The part that is run last: no language-model head."""
        return self.stages[-1].body

    @property
    def towers(self) -> tuple[Tower, ...]:
        """All towers, in the order in which they run."""
        return tuple(tower for stage in self.stages for tower in stage.towers)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the first layer, or that on which it is made to run."""
        for module in self.stages[0].body.modules():
            hook = getattr(module, "_hf_hook", None)  # accelerate's
            if (device := getattr(hook, "execution_device", None)) is not None:
                return torch.device(device)
            if (parameter := next(module.parameters(recurse=False), None)) is not None:
                return parameter.device
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first floating-point parameter."""
        return next(p.dtype for p in self.module.parameters() if p.is_floating_point())

    @property
    def every_site(self) -> tuple[Site, ...]:
        """All sites, those that are read only when somebody asks included."""
        return tuple(site for tower in self.towers for site in tower.sites())

    def sites(self, patterns: str | Sequence[str] | None = None) -> tuple[Site, ...]:
        """Return the sites that `patterns` name; see `structure.match_sites`."""
        return match_sites(self.towers, patterns)

    def roles(self, tower: Tower) -> tuple[str, ...]:
        """Return what the tokens of a tower may be, given inputs of `kind`.

        `all` they are in any case.
        """
        image = ("image",) if self.kind == "image" and tower.image_token is not None else ()
        roles = dict.fromkeys((*tower.prefix, *image, tower.tokens, *tower.suffix))
        return tuple(role for role in roles if role != "all")

    @property
    def prompts(self) -> tuple[str, ...]:
        """What a model that talks about images is asked about each; () for every other model."""
        return tuple(getattr(self.transform, "prompts", ()))

    def reading(self, kind: str) -> Model:
        """Return the model as it takes inputs of `kind`.

        Raises
        ------
        ValueError
            When it does not.
        """
        for model in (self, self.other):
            if model is not None and model.kind == kind:
                return model
        msg = f"{self.name} reads {self.kind}, not {kind}: name the samples' {self.kind} column"
        msg += f" ({self.kind}=, --{self.kind})" if self.kind != "location" else ""
        raise ValueError(msg)

    def asking(self, prompts: Sequence[str]) -> Model:
        """Return the model with other prompts about every image.

        Raises
        ------
        ValueError
            When the model takes no prompt beside an image.
        """
        if not self.prompts:
            msg = f"{self.name} takes no prompt beside an image; leave prompts= out (--prompt)"
            raise ValueError(msg)
        converse: Any = self.transform
        return replace(self, transform=replace(converse, prompts=tuple(prompts)))

    def deepest(self, sites: Sequence[Site]) -> Site:
        """Return the one of `sites` that a forward pass meets last."""
        order = {site.name: i for i, site in enumerate(self.every_site)}
        return max(sites, key=lambda site: order[site.name])

    def until(self, sites: Sequence[Site]) -> Model:
        """Return the model that stops after the deepest of `sites`, which `sites` returned."""
        last = self.deepest(sites)
        if last.layer is not None:  # its branches run in whatever order, but inside the block
            (last,) = self.sites(f"{last.tower}.layers.{last.layer}")
        return replace(self, stop=last)

    def prepare(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """Make the keyword arguments of `body` from raw inputs, on the model's device."""
        require_several(inputs)
        ready = [self.transform(x) for x in inputs] if self.transform else list(inputs)
        return self.to_device(self.collate(ready))

    def to_device(self, batch: Batch) -> dict[str, Any]:
        """Move a batch to the model; floating-point inputs take its dtype.

        `tiles` are for us alone, who need to know them before a GPU could tell.
        """
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"prepare= must return the keyword arguments of {type(self.body).__name__}, a "
                f"dict; got a {type(batch).__name__}"
            )
        return {k: value if k == "tiles" else self._moved(value) for k, value in batch.items()}

    def _moved(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(self.device, self.dtype if value.is_floating_point() else None)
        if isinstance(value, Mapping):
            return self.to_device(value)
        return [self._moved(v) for v in value] if isinstance(value, list) else value

    @torch.inference_mode()
    def forward(self, batch: Batch, before: Callable[[int], None] = lambda _: None) -> None:
        """Run the model for its hooks, in eval mode; nothing is returned and no cache is built.

        `before` is called with the number of each prompt, where a batch has several.
        """
        with evaluating(self.module), ExitStack() as hooks:
            if self.stop is not None:
                hooks.callback(self.stop.watch(_reached).remove)
                hooks.enter_context(suppress(_ReachedError))
            first, *more = self.stages
            if not more and "prompts" not in batch:
                _run(first.body, batch)
                return
            seen = _look(first, batch)
            for stage in more:
                for i, prompt in enumerate(batch["prompts"]):
                    before(i)
                    shown = handing(stage.body, batch["image"], seen)
                    with shown as images, suppress(_ReachedError):
                        _run(stage.body, {**prompt, **images})

    @torch.inference_mode()
    def look(self, batch: Batch) -> Any:
        """Run the first of two stages, in eval mode, and return what it makes of the images."""
        with evaluating(self.module):
            return _look(self.stages[0], batch)

    def edited(self, edits: Edit | Sequence[Edit], copies: int = 1) -> AbstractContextManager[None]:
        """Apply edits to whatever the model runs inside the block.

        A call without a cache, or with an empty one, is a prompt; one of a single token on top of a
        cache is a generated one. Of two blocks inside each other the inner one's edits come first.
        The model is as it was when the block ends, after an exception too.

        Parameters
        ----------
        edits
            One after the other. Those with values for single samples want batches of just these,
            in their order.
        copies
            How many rows of the batch each sample has: `num_beams` or `num_return_sequences` of the
            module's `generate`, whichever is larger.

        Raises
        ------
        ValueError
            On entering, when an edit does not go with the model; in a forward pass, when the batch
            has other samples than the edit, a sample has no token of its role, or the hidden states
            have another width.
        RuntimeError
            When a site did not run, as in a model that was compiled before; when several tokens
            come on top of a cache, so that prompt and generated tokens cannot be told apart.
        """
        from ..steering import edited

        return edited(self, edits, copies)

    def generate(
        self,
        inputs: Sequence[Any],
        edits: Edit | Sequence[Edit] = (),
        *,
        batch_size: int | None = None,
        **options: Any,
    ) -> list[str]:
        """Answer inputs, with the hidden states edited on the way.

        Parameters
        ----------
        inputs
            As the model takes them: strings, or images, about which its one prompt is asked
            (see `asking`). They are padded on the left.
        edits
            Applied one after the other. Those with values for single samples have them for these
            inputs, in their order; see `Edit.take`.
        batch_size
            Inputs that run together; None takes all.
        options
            Of transformers' `generate`: `max_new_tokens` (20 here), `num_beams`, `do_sample`,
            `temperature` and the like. Greedy when nothing is said.

        Returns
        -------
        list of str
            What is generated for each input, special tokens left out; with
            `num_return_sequences`, so many for each, together.

        Raises
        ------
        ValueError
            Before anything is generated: when the model makes no text, an edit does not go with
            it, has values for another number of samples or for fewer generated tokens; otherwise
            as `edited` does.
        """
        from ..steering import generate

        return generate(self, inputs, edits, batch_size=batch_size, **options)


class _ReachedError(Exception):
    """The deepest site that is wanted has been read."""


def _reached(hidden: torch.Tensor) -> None:
    raise _ReachedError


def _look(first: Stage, batch: Batch) -> Any:
    seen = _run(first.body, batch["image"])
    if getattr(seen, "hidden_states", None) is not None:
        # LLaVA's tower returns every layer, of which it reads one. The language model takes the
        # features; all layers of a batch need not stay in memory beside it. Mistral 3's features
        # are no field of what it returns before transformers 5.18, and are not copied with it.
        features = seen.pooler_output
        seen = replace(seen, hidden_states=None)
        seen.pooler_output = features
    return seen


def require_several(inputs: Any) -> None:
    """Refuse one text where several are to come, which would be taken letter by letter."""
    if isinstance(inputs, str):
        raise TypeError(f"inputs must be a list; got one text, {inputs[:40]!r}: write [...] around")


def takes_looks(module: nn.Module) -> bool:
    """Tell whether a module takes images that were looked at before in place of images.

    Most of transformers do since 5.18. ModernVBERT's do not, and BLIP-2's wants the images too.
    """
    takes = inspect.signature(module.forward).parameters
    images = takes.get("pixel_values")
    instead = images is None or images.default is not images.empty
    return "mm_encoder_outputs" in takes and instead


@contextmanager
def handing(body: nn.Module, images: Batch, seen: Any) -> Iterator[Batch]:
    """Give the arguments by which `body` is shown `seen`, what it made of the images before."""
    if takes_looks(body):
        yield {"mm_encoder_outputs": {"image": seen}}
        return
    with looked_at(body, seen):
        yield as_taken(images)


@contextmanager
def looked_at(body: Any, seen: Any) -> Iterator[None]:
    """Have a module's own `get_image_features` return `seen`, where no argument can hand it over.

    Raises
    ------
    RuntimeError
        When one run inside the block did not ask it for the images once.
    """
    asked = 0

    @wraps(body.get_image_features)  # whose parameters transformers' `generate` may look up
    def look_again(*_: Any, **__: Any) -> Any:
        nonlocal asked
        asked += 1
        return seen

    own = vars(body).get("get_image_features")  # of this module, not of its class
    body.get_image_features = look_again
    try:
        yield
    finally:
        del body.get_image_features
        if own is not None:
            body.get_image_features = own
    if asked != 1:
        raise RuntimeError(
            f"the forward pass of {type(body).__name__} called its get_image_features {asked} "
            "times, not once: geofast cannot tell what its language model was shown of an image. "
            "transformers 5.18 or newer may help; else probe one tower of it, as a module of its "
            "own with prepare="
        )


def as_taken(images: Batch) -> dict[str, Any]:
    """Return what a module takes of images: `tiles` are for us alone."""
    return {k: v for k, v in images.items() if k != "tiles"}


def _run(body: nn.Module, batch: Batch) -> Any:
    takes = inspect.signature(body.forward).parameters
    # LLaVA's hands what it does not know on to its language model.
    hands_on = hasattr(body, "get_image_features") and "kwargs" in takes
    takes_cache = "use_cache" in takes or hands_on
    return body(**batch, **({"use_cache": False} if takes_cache else {}))


def headless(module: nn.Module) -> nn.Module:
    """Return the part of a transformers model that is under its head; any other model as it is."""
    body = getattr(module, "base_model", module) if hasattr(module, "base_model_prefix") else module
    assert isinstance(body, nn.Module)
    # DINOv3 calls its stack of blocks so, which does not take pixels.
    takes = inspect.signature(body.forward).parameters
    return body if getattr(module, "main_input_name", "input_ids") in takes else module


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a module and its parts in eval mode, and leave each in the mode that it was in."""
    # Module by module: a model may keep some of its parts in eval mode while it trains others.
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def wrap(
    module: nn.Module,
    prepare: Callable[[list[Any]], Batch],
    *,
    kind: Kind | None = None,
) -> Model:
    """Take any module with a function that prepares its keyword arguments.

    Parameters
    ----------
    module
        Its blocks are found by structure. It stays in the mode, training or eval, that it is in.
    prepare
        From a list of inputs (PIL images or strings) to the keyword arguments of `module`.
    kind
        What an input is; None takes `image` for a vision tower, `location` for that of a location
        encoder and `text` for any other.
    """
    towers = find_towers(module)
    first = {tower.name.partition(".")[0] for tower in towers}
    guess: Kind = "image" if "vision" in first else "location" if "location" in first else "text"
    stages = (Stage(headless(module), towers),)
    return Model(type(module).__name__, module, stages, kind or guess, None, prepare)
