"""Towers, blocks and token layouts, found by the structure of a module and not by its name.

A tower is a stack of residual blocks: the largest list of modules of one class that belongs to it,
or of a few classes that take turns.
The residual stream before block 0 is the site `<tower>.embed`, after block i
`<tower>.layers.<i>`, and `<tower>.norm` is what the final norm makes of the last one. Models that
compare images with texts have `<tower>.joint`, one vector a sample in the space that both share,
before it is scaled to length 1. Between a vision tower and a language model stands the `projector`.

`<tower>.layers.<i>.attn` and `.mlp` are what the block's attention and feed-forward modules
return, as they return it. What the block does to it afterwards is not in it: DINOv2's LayerScale,
the second norms of Gemma 2. What the module does itself is: BERT's attention adds the residual and
norms the sum. Where the block has no such module, as OPT has no `.mlp`, there is no such site.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

_ORDER = ("location", "vision", "projector", "text", "lm")
_BETWEEN = ("projector", "connector", "merger", "aligner")


@dataclass(frozen=True)
class Site:
    """A named place in a model where hidden states are read."""

    name: str
    tower: str
    layer: int | None
    """Block index; None for `embed` and `norm`."""
    module: nn.Module = field(repr=False)
    at: str
    """`input` or `output` of `module`."""

    @property
    def is_vector(self) -> bool:
        """Whether a sample is one vector here, whatever the pool."""
        return self.name.endswith(".joint")

    def watch(self, read: Callable[[torch.Tensor], None]) -> RemovableHandle:
        """Call `read` with the hidden states whenever a forward pass meets the site."""
        if self.at == "output":
            return self.module.register_forward_hook(
                lambda _module, _args, output: read(self._tensor(output))
            )
        first = next(iter(inspect.signature(self.module.forward).parameters))
        return self.module.register_forward_pre_hook(
            lambda _module, args, kwargs: read(self._tensor(args[0] if args else kwargs[first])),
            with_kwargs=True,
        )

    def _tensor(self, value: Any) -> torch.Tensor:
        hidden = value[0] if isinstance(value, tuple | list) and value else value
        if not isinstance(hidden, torch.Tensor):
            msg = f"{self.name} is a {type(hidden).__name__} in this model, not a tensor"
            raise ValueError(msg)
        return hidden


@dataclass(frozen=True)
class Tower:
    """A stack of residual blocks, and what its first tokens are."""

    name: str
    path: str
    """Where the list of blocks is in the model, for messages."""
    blocks: tuple[nn.Module, ...] = field(repr=False)
    norm: nn.Module | None = field(repr=False)
    prefix: tuple[str, ...]
    """Roles of the tokens that come before the patches: `cls`, `register`."""
    tokens: str
    """Role of all the others: `patch` in a vision tower, `text` in a text tower or LM."""
    head: nn.Module | None = field(default=None, repr=False)
    """Makes the joint embedding; without blocks, the projector itself."""
    image_token: int | None = None
    """The id that stands for an image's tokens among the text."""
    channels_first: bool = False
    """Whether hidden states with two spatial axes are [batch, dim, height, width]."""
    tokens_first: bool = False
    """Whether the blocks keep [tokens, batch, dim]."""
    suffix: tuple[str, ...] = ()
    """Roles of the tokens that come after the others: CoCa's texts end with their `cls`."""
    image_marks: tuple[int, ...] = ()
    """Ids that only stand around images, as `<|vision_start|>`: neither text nor image."""

    @property
    def branches(self) -> tuple[str, ...]:
        """Which of `attn` and `mlp` its blocks have, or some of them."""
        return tuple(sorted({branch for block in self.blocks for branch in _branches(block)}))

    @property
    def default_pool(self) -> str:
        """`cls` for towers that have one, else `mean:patch`; `last` for language models."""
        if self.name == "lm":
            return "last"
        return "cls" if "cls" in self.prefix else f"mean:{self.tokens}"

    @property
    def default_sites(self) -> tuple[str, ...]:
        """Names and globs of what is read when nobody says what."""
        if not self.blocks:
            return (self.name,)
        joint = (f"{self.name}.joint",) if self.head is not None else ()
        return (f"{self.name}.embed", f"{self.name}.layers.*", *joint)

    def sites(self) -> Iterator[Site]:
        """Yield the tower's sites, from the first block to the last; branches after their block."""
        if not self.blocks and self.head is not None:
            yield Site(self.name, self.name, None, self.head, "output")
            return
        yield Site(f"{self.name}.embed", self.name, None, self.blocks[0], "input")
        for i, block in enumerate(self.blocks):
            yield Site(f"{self.name}.layers.{i}", self.name, i, block, "output")
            for branch, module in _branches(block).items():
                yield Site(f"{self.name}.layers.{i}.{branch}", self.name, i, module, "output")
        if self.norm is not None:
            yield Site(f"{self.name}.norm", self.name, None, self.norm, "output")
        if self.head is not None:
            yield Site(f"{self.name}.joint", self.name, None, self.head, "output")


def find_towers(root: nn.Module) -> tuple[Tower, ...]:
    """Find the towers of `root`; a module with a method `geofast_towers` says itself what they are.

    Raises
    ------
    ValueError
        When no list of blocks is found; the message says what was looked for.
    """
    declared: Callable[[], tuple[Tower, ...]] | None = getattr(root, "geofast_towers", None)
    if declared is not None:
        return declared()
    largest: dict[str, tuple[tuple[bool, int], str, nn.Module]] = {}
    for path, blocks in block_lists(root):
        name = _tower_name(root, path, blocks)
        if name is None:
            continue
        # CoCa has a captioner beside its text tower, as large, which reads images and texts.
        size = "text_decoder" not in path, sum(p.numel() for p in blocks.parameters())
        if name not in largest or size > largest[name][0]:
            largest[name] = size, path, blocks
    if not largest:
        msg = (
            f"no residual blocks found in {type(root).__name__}: looked for a ModuleList or "
            "Sequential of two or more modules of one class, or a ModuleList of a few classes that "
            "take turns, each with submodules that hold parameters. Put the blocks of a model of "
            "your own into a ModuleList, or name them in a method geofast_towers() that returns a "
            "tuple of geofast.models.Tower"
        )
        raise ValueError(msg)
    found = {
        n: _tower(root, n, *_with_siblings(root, path, blocks))
        for n, (_, path, blocks) in largest.items()
    }
    if {"vision", "text"} <= found.keys():
        found = {n: replace(tower, head=_joint(root, tower)) for n, tower in found.items()}
    if {"vision", "lm"} <= found.keys() and (projector := _projector(root, found)) is not None:
        found["projector"] = projector
    return tuple(found[n] for n in _ORDER if n in found)


def match_sites(
    towers: Sequence[Tower], patterns: str | Sequence[str] | None = None
) -> tuple[Site, ...]:
    """Return the sites that `patterns` name, in the order of the forward pass.

    Parameters
    ----------
    towers
        From `find_towers`.
    patterns
        A name, a glob (`lm.layers.*`), or several. A star stays between two dots: `lm.*` takes no
        layer, and `lm.layers.*` no branch (`.attn`, `.mlp`). None: `embed`, every layer and `joint`
        of every tower, and the projector.

    Raises
    ------
    ValueError
        When a pattern matches nothing, or there is none; the message lists the model's sites.
    """
    sites = [site for tower in towers for site in tower.sites()]
    if patterns is None:
        patterns = [name for t in towers for name in t.default_sites]
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        names = [s.name for s in sites if matches(s.name, pattern)]
        if not names:
            msg = f"no site matches {pattern!r}; this model has {_ranges(towers)}"
            raise ValueError(msg)
        chosen.update(names)
    if not chosen:
        raise ValueError(f"sites= is empty; this model has {_ranges(towers)}")
    return tuple(site for site in sites if site.name in chosen)


def matches(name: str, pattern: str) -> bool:
    # A star stays inside one part of the name: lm.layers.* must not take lm.layers.3.attn too.
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _ranges(towers: Sequence[Tower]) -> str:
    def of(t: Tower) -> str:
        if not t.blocks:
            return t.name
        layers = f"{t.name}.layers.0 to .{len(t.blocks) - 1}"
        if t.branches:
            alike = all(len(_branches(block)) == len(t.branches) for block in t.blocks)
            which = " and ".join("." + branch for branch in t.branches)
            layers += f" ({'each' if alike else 'some'} also {which})"
        last = [f"{t.name}.norm"] * (t.norm is not None) + [f"{t.name}.joint"] * bool(t.head)
        return ", ".join([f"{t.name}.embed", layers, *last])

    return "; ".join(of(t) for t in towers)


def block_lists(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every outermost list of blocks in `root`, with its path."""
    inside: tuple[str, ...] = ()
    for path, module in root.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or path.startswith(inside or "\0"):
            continue
        if len(module) >= 2 and all(map(_is_block, module)) and _is_stack(path, module):
            inside += (path + ".",)
            yield path, module


def _is_stack(path: str, blocks: nn.ModuleList | nn.Sequential) -> bool:
    """Whether blocks are of one class, or of some that take turns and are called alike.

    Jamba's have attention or Mamba. The parts of a block of T5, which make a list too, come once.
    """
    kinds = {type(block) for block in blocks}
    if len(kinds) == 1:
        return True
    several = isinstance(blocks, nn.ModuleList) and len(kinds) < len(blocks)
    alone = not any(part.isdigit() for part in path.split("."))  # not one list of many
    takes = {tuple(inspect.signature(kind.forward).parameters)[1:2] for kind in kinds}
    return several and alone and len(takes) == 1


def _is_block(module: nn.Module) -> bool:
    holders = sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())
    return holders >= 2


def _tower_name(root: nn.Module, path: str, blocks: nn.Module) -> str | None:
    if "audio" in path.lower():
        return None
    if _of_images(path):
        return "vision"
    if image_token(root) is not None:
        return "lm"
    if "text" in path.lower() and "language" not in path.lower():
        return "text"
    if "language" not in path.lower() and _reads_pixels(root):
        return "vision"
    return "lm" if _is_causal(root, blocks) else "text"


def image_token(root: nn.Module) -> int | None:
    """Return the id that stands for an image's tokens among the text, or None."""
    config = getattr(root, "config", None)
    for owner in (config, getattr(config, "vision_config", None)):
        for name in ("image_token_id", "image_token_index"):
            if isinstance(value := getattr(owner, name, None), int):
                return value
    return None


def _is_causal(root: nn.Module, blocks: nn.Module) -> bool:
    # Most attention modules of transformers say it. Those of Bloom and MPT do not, and Mamba has
    # none: there the class does, or the checkpoint's. Any other model has a text tower.
    if any(getattr(m, "is_causal", False) for m in blocks.modules()):
        return True
    of_checkpoint = getattr(getattr(root, "config", None), "architectures", None) or []
    names = (type(root).__name__, *of_checkpoint)
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def _reads_pixels(root: nn.Module) -> bool:
    main = getattr(root, "main_input_name", None)
    if main is not None:
        return bool(main == "pixel_values")
    # Tokens are looked up in an Embedding; but positions may be too, where a convolution cuts
    # patches.
    # A vision tower with a name of its own does not make pixels of what stands beside it: CLIP's
    # first form keeps its text tower at the top.
    kinds = {type(m) for path, m in root.named_modules() if not _of_images(path)}
    return nn.Conv2d in kinds or nn.Embedding not in kinds


def _of_images(path: str) -> bool:
    return any(part in path.lower() for part in ("vision", "visual", "image"))


def _with_siblings(root: nn.Module, path: str, blocks: nn.Module) -> tuple[str, nn.Module]:
    """Join the lists of a ResNet, which has one a stage: `layer1` to `layer4`."""
    around, _, last = path.rpartition(".")
    stem = last.rstrip("0123456789")
    if stem in ("", last):
        return path, blocks
    kinds = {type(block) for block in blocks.children()}
    lists = [
        beside
        for name, beside in root.get_submodule(around).named_children()
        if name.rstrip("0123456789") == stem and {type(b) for b in beside.children()} == kinds
    ]
    joined = nn.ModuleList(block for beside in lists for block in beside.children())
    return f"{path.removesuffix(last)}{stem}*", joined


def _tower(root: nn.Module, name: str, path: str, blocks: nn.Module) -> Tower:
    # The tower is the innermost module around the blocks that holds parameters of its own kind:
    # embeddings and the final norm live beside the list or one level above it.
    around = [root.get_submodule(".".join(path.split(".")[:i])) for i in range(path.count(".") + 1)]
    whole = around[-2] if len(around) > 1 else around[0]
    prefix = _prefix(whole, blocks) if name == "vision" else ()
    suffix = _suffix(whole) if name == "text" else ()
    norm = next((n for m in reversed(around[-2:]) if (n := _final_norm(m)) is not None), None)
    tokens = "patch" if name == "vision" else "text"
    # Not children(): it leaves out a block that comes again, and the numbers would shift.
    assert isinstance(blocks, nn.ModuleList | nn.Sequential)
    # Blocks that convolve keep the channels where convolutions want them.
    channels_first = any(isinstance(m, nn.Conv2d) for m in blocks.modules())
    token = image_token(root) if name == "lm" else None
    # torch's own attention wants the tokens first, unless it is told.
    attentions = [m for m in blocks.modules() if isinstance(m, nn.MultiheadAttention)]
    tokens_first = any(not m.batch_first for m in attentions)
    return Tower(
        name, path, tuple(blocks), norm, prefix, tokens, None, token, channels_first, tokens_first,
        suffix,
    )  # fmt: skip


def _joint(root: nn.Module, tower: Tower) -> nn.Module | None:
    """What takes one tower of two into the space that they share."""
    around = tower.path.partition(".")[0]
    side = {"vision": ("visual", "vision", "image"), "text": ("text",)}[tower.name]
    for name in (*(f"{word}_projection" for word in side), f"{around}.head"):
        try:
            return root.get_submodule(name)
        except AttributeError:
            continue
    return None


def _projector(root: nn.Module, towers: Mapping[str, Tower]) -> Tower | None:
    """What stands between the vision tower and the language model."""
    language = towers["lm"].path.rpartition(".")[0]
    for path, module in root.named_modules():
        named = path.rpartition(".")[2].lower().endswith(_BETWEEN)
        if named and not f"{path}.".startswith((f"{language}.", f"{towers['vision'].path}.")):
            return Tower("projector", path, (), None, (), "patch", module)
    return None


def _prefix(tower: nn.Module, blocks: nn.Module) -> tuple[str, ...]:
    cls: list[str] = []
    registers: list[str] = []
    first = next(blocks.parameters())
    for path, parameter in tower.named_parameters():
        if parameter is first:  # AIMv2's cls is of the head, which pools what the blocks made
            break
        leaf = path.rsplit(".", 1)[-1]
        count = parameter.shape[-2] if parameter.ndim == 3 else 1
        if leaf in ("cls_token", "class_embedding", "class_token"):
            cls += ["cls"] * count
        elif leaf in ("register_tokens", "reg_token", "distillation_token", "dist_token"):
            registers += ["register"] * count
    return tuple(cls + registers)


def _suffix(tower: nn.Module) -> tuple[str, ...]:
    return ("cls",) if isinstance(getattr(tower, "cls_emb", None), nn.Parameter) else ()


def _final_norm(around: nn.Module) -> nn.Module | None:
    norms = {
        name: m for name, m in around.named_children() if type(m).__name__.lower().endswith("norm")
    }
    # timm's fc_norm is for what a head pools of the tokens.
    late = [m for name, m in norms.items() if "pre" not in name.lower() and name != "fc_norm"]
    return late[-1] if late else None


def _branches(block: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, module in block.named_children():
        name = name.lower()
        if "norm" in name + type(module).__name__.lower():
            continue
        # Bloom's modules take the residual and add it: theirs is the stream, not a branch of it.
        if "residual" in inspect.signature(module.forward).parameters:
            continue
        if "attn" in name or "attention" in name:
            found.setdefault("attn", module)
        elif "mlp" in name or "feed_forward" in name:
            found.setdefault("mlp", module)
    return found
