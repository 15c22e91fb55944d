"""`patching`: which layers and which tokens carry what a model answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..models import Model, Site, Tower
from ..models.load import load
from ..models.model import require_several
from ..report.numbers import number
from ..report.text import Table, clip_label, fill
from ..steering.asking import once, require_tokenizer
from ..steering.edit import EDIT_ROLES, Edit
from ..steering.make import patch
from .intervals import bootstrap_means
from .odds import BYTES, Asked, next_tokens, odds, prompt_ids, states_of
from .writing import about, save

Token = str | int
EACH = "each"

_SHOWN = 9  # columns of the table in words


@dataclass(frozen=True, eq=False, repr=False)
class Patched:
    """How much of a change of answer each layer and token carries; made by `gf.patching`.

    Attributes
    ----------
    table : DataFrame
        A row per site x token: `site`; `token`, a role or a position; `effect`, the mean change of
        log p(target's name) - log p(source's name) of the next token, in nats, when the target's
        whole state is written there; and `restored`, that as a share of the change when the target
        itself is asked: of the means over pairs, so that no pair with a small change counts for
        much. Each with the ends of its 95 % bootstrap interval over pairs, `_low` and `_high`, of
        the share linearised.
    info : dict
        What was asked, and what it ran on; `tokens`, in the order of figures; `target_effect`, the
        mean change when the target itself is asked; `words`, by position, what stands there in
        prompts, of the language model alone: the first of several with an ellipsis.
    """

    table: pd.DataFrame
    info: dict[str, Any]

    def grid(self, value: str = "restored") -> pd.DataFrame:
        """Return one column of `table` as a row a site and a column a token, as figures take it.

        A role that a tower does not have is missing there.
        """
        sites = self.table["site"].unique()
        by_token = self.table.groupby("token", sort=False)
        columns = {token: rows.set_index("site")[value] for token, rows in by_token}
        return pd.DataFrame(columns).reindex(index=sites, columns=self.info["tokens"])

    def __repr__(self) -> str:
        sites, tokens = self.grid().shape
        return f"Patched({sites} sites x {tokens} tokens, {self.info['pairs']['used']} pairs)"

    def __str__(self) -> str:
        return _text(self.grid(), self.info)

    def save(self, folder: str | Path) -> Path:
        """Write patching.csv (`table`), patching.json (`info`) and patching.png.

        The folder is made where missing. Without matplotlib there is no picture, and a warning,
        which `info` keeps.

        Raises
        ------
        OSError
            When they cannot be written.
        """
        from ..report import patching as report

        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        report.write(self, folder)
        return save(self.table, self.info, folder, "patching")


def patching(
    model: str | Path | nn.Module | Model,
    sources: Sequence[Any],
    targets: Sequence[Any],
    names: Sequence[tuple[str, str]],
    *,
    sites: str | Sequence[str] | None = None,
    tokens: Token | Sequence[Token] = "last",
    seed: int = 0,
    batch_size: int = 32,
) -> Patched:
    """Write the target's whole state into the source's run, one site and token at a time.

    What an edit before the last token changes is run again; everything else runs once: every
    target, and every prompt up to its last token for all sites at which only that one is patched.

    Parameters
    ----------
    model
        From `load`, or what it takes. One that talks about images is asked its one prompt; see
        `Model.asking`.
    sources
        The n inputs that are run and patched.
    targets
        The n inputs whose states are written.
    names
        Of each pair, with what the source's and what the target's answer begins. Pairs whose names
        begin with the same token are left out.
    sites
        Names or globs; None takes `embed`, every layer and the projector.
    tokens
        Roles, one or several: `last` (of the language model alone), `text`, `image`, `patch`,
        `cls`, `register`, `all`; positions among all tokens of a prompt, from 0, or from its end
        below 0; or `each`, every position. Of each site those roles that its tower has. All inputs
        must have the same number of tokens of the role, and for positions of tokens.
    seed
        Of the bootstrap.
    batch_size
        Inputs that run together.

    Returns
    -------
    Patched

    Raises
    ------
    ValueError
        Before the model is loaded: when there are not as many sources as targets and names, or
        none; when `tokens`, `names` or `batch_size` are wrong. Before it runs: when it makes no
        text; a site is unknown, or a role that no tower of the sites has; texts have different
        numbers of tokens, or no such position; the names of every pair begin alike. For images,
        whose tokens a model counts, afterwards.
    TypeError
        When the sources or the targets are one text.

    References
    ----------
    Meng et al., Locating and editing factual associations in GPT, NeurIPS 2022 (arXiv:2202.05262);
    with another prompt in place of noise as Wang et al., ICLR 2023 (arXiv:2211.00593).
    """
    began = time.perf_counter()
    if not len(sources) == len(targets) == len(names) or not len(names):
        raise ValueError(
            "give as many sources, targets and pairs of names, one or more; got "
            f"{len(sources)}, {len(targets)} and {len(names)}"
        )
    for inputs in (sources, targets):
        require_several(inputs)
    if bad := [pair for pair in names if not _is_pair(pair)]:
        raise ValueError(f"names must be pairs of texts, source's and target's; got {bad[0]!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more; got {seed}")
    roles, positions = _wanted(tokens)
    model = load(model)
    chosen = model.sites(sites)
    where = _where(model, chosen, roles)
    asked = Asked.of(model, sources, targets, *([pair[side] for pair in names] for side in (0, 1)))
    of_text = [site.tower == "lm" for site in chosen]
    words: dict[int, str] = {}
    if any(of_text) and (positions is None or positions or {"text", "all"} & {*roles}):
        ids = _ids_of_one_length(model, asked, positions or [])
        words = _words(model, ids, positions) if all(of_text) else {}
    goal = next_tokens(model, asked.targets, batch_size)
    held = states_of(model, asked.targets, where, batch_size)
    arms = [[patch(held[key]).take(asked.of_pair)] for key in where]
    made = odds(model, asked, goal, arms, batch_size)
    found: dict[tuple[str, Token], torch.Tensor] = dict(zip(where, made.effect, strict=True))
    if positions is None or positions:
        for keys, some in _single(
            model, asked, [site.name for site in chosen], positions, batch_size
        ):
            found |= dict(zip(keys, odds(model, asked, goal, some, batch_size).effect, strict=True))
    single = sorted({token for _, token in found if isinstance(token, int)})
    every = [*roles, *single]
    rows = [(site.name, token) for site in chosen for token in every]
    table = _table({key: found[key] for key in rows if key in found}, made.whole, seed)
    info = {
        **about(model), "tokens": every, "seed": seed, "target_effect": float(made.whole.mean()),
        "words": words,
        "pairs": {"asked": len(names), "used": len(asked), "alike": len(names) - len(asked)},
        "seconds": round(time.perf_counter() - began, 3),
    }  # fmt: skip
    return Patched(table, info)


def _wanted(tokens: Token | Sequence[Token]) -> tuple[list[str], list[int] | None]:
    """Part tokens into roles and positions; None for every position."""
    several = [tokens] if isinstance(tokens, str | int) else list(dict.fromkeys(tokens))
    bad = [t for t in several if not (isinstance(t, int) or t in (*EDIT_ROLES, EACH))]
    if bad or not several:
        allowed = ", ".join((*EDIT_ROLES, EACH))
        raise ValueError(f"tokens must be positions, or some of {allowed}; got {bad or several}")
    roles = [t for t in several if isinstance(t, str) and t != EACH]
    return roles, None if EACH in several else [t for t in several if isinstance(t, int)]


def _is_pair(names: Any) -> bool:
    return isinstance(names, tuple | list) and [type(name) for name in names] == [str, str]


def _where(model: Model, sites: Sequence[Site], roles: Sequence[str]) -> list[tuple[str, str]]:
    """Pair every site with those of the roles that its tower has."""
    towers = {tower.name: tower for tower in model.towers}
    has = {site.name: _roles(model, towers[site.tower]) for site in sites}
    for role in roles:
        if not any(role in there for there in has.values()):
            msg = f"no tower of these sites has {role} tokens; they have "
            raise ValueError(msg + ", ".join(dict.fromkeys(r for rs in has.values() for r in rs)))
    return [(site.name, role) for site in sites for role in roles if role in has[site.name]]


def _roles(model: Model, tower: Tower) -> tuple[str, ...]:
    last = ("last",) if tower.name == "lm" else ()
    return (*model.roles(tower), *last, "all")


def _ids_of_one_length(model: Model, asked: Asked, positions: Sequence[int]) -> torch.Tensor:
    """Return the tokens of all prompts, int64 [prompts, tokens], the first source's first.

    Refuse prompts of different lengths, and positions that they do not have.
    """
    inputs = once([*asked.sources, *asked.targets])[0]
    ids = prompt_ids(model, inputs)
    lengths = sorted({len(one) for one in ids})
    if len(lengths) > 1:
        raise ValueError(
            f"the prompts have {lengths[0]} to {lengths[-1]} tokens: take those of one number, or "
            "tokens='last'"
        )
    _check_positions(positions, lengths[0], "the prompts")
    return torch.stack(ids)


def _words(model: Model, ids: torch.Tensor, positions: Sequence[int] | None) -> dict[int, str]:
    """Say what stands at positions of prompts."""
    decode = require_tokenizer(model).decode
    found = {}
    for position in range(ids.shape[1]) if positions is None else positions:
        first, *others = ids[:, position].unique_consecutive().tolist()
        found[position] = str(decode([first])).strip(" ") + (" …" if others else "")
    return found


def _check_positions(positions: Sequence[int], count: int, where: str) -> None:
    for position in positions:
        if not -count <= position < count:
            raise ValueError(f"there is no position {position}: {where} have {count} tokens")


def _single(
    model: Model,
    asked: Asked,
    sites: Sequence[str],
    positions: Sequence[int] | None,
    batch_size: int,
) -> Iterator[tuple[list[tuple[str, Token]], list[list[Edit]]]]:
    """Yield arms that patch one position each, some at a time, and their sites and positions.

    At all other tokens they write the source's own state, which is there already.
    """
    sources, of_source = once(asked.sources)
    everywhere = [(site, "all") for site in sites]
    own, theirs = (
        states_of(model, inputs, everywhere, batch_size) for inputs in (sources, asked.targets)
    )
    for site in sites:
        mine, others = (held[site, "all"].at[site] for held in (own, theirs))
        if mine.shape[1:] != others.shape[1:]:
            msg = f"sources have {mine.shape[1]} tokens at {site}, and targets {others.shape[1]}"
            raise ValueError(f"{msg}: take inputs of one number")
        count = mine.shape[1]
        every = range(count) if positions is None else positions
        _check_positions(every, count, site)
        mine, others = mine[torch.from_numpy(of_source)], others[asked.of_pair]
        step = max(1, BYTES // mine.nbytes)
        for start in range(0, len(every), step):
            some = every[start : start + step]
            arms = [[_patch_one(model, site, mine, others, position)] for position in some]
            yield [(site, position) for position in some], arms


def _patch_one(
    model: Model, site: str, mine: torch.Tensor, others: torch.Tensor, position: int
) -> Edit:
    values, d = mine.clone(), mine.shape[-1]
    values[:, position] = others[:, position]
    every = torch.arange(d)
    return Edit("patch", (site,), d, every, values[None], "all", model=model.name)


def _table(
    found: Mapping[tuple[str, Token], torch.Tensor], whole: torch.Tensor, seed: int
) -> pd.DataFrame:
    effect = torch.stack(list(found.values()), 1).numpy()  # [n, rows]
    full = whole.numpy()[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = effect.mean(0) / full.mean()
        # A ratio of means, linear about itself: of these the mean is the ratio.
        about_share = share + (effect - share * full) / full.mean()
    columns: dict[str, Any] = {}
    for name, values in (("effect", effect), ("restored", about_share)):
        low, high = bootstrap_means(values, seed=seed)
        columns |= {name: values.mean(0), f"{name}_low": low, f"{name}_high": high}
    keys = [{"site": site, "token": token} for site, token in found]
    return pd.DataFrame(keys).join(pd.DataFrame(columns))


def _text(grid: pd.DataFrame, info: Mapping[str, Any]) -> str:
    pairs = info["pairs"]
    alike = f" ({pairs['alike']} whose names begin alike left out)" if pairs["alike"] else ""
    head = (
        "Share, in percent, of the change of answer that the target's whole state restores where "
        f"it is written, of {pairs['used']} pairs{alike}. The change is that of log p(target's "
        "name) - log p(source's name) of the next token when the target itself is asked: "
        f"{info['target_effect']:.2f} nats."
    )
    if info["target_effect"] <= 0:
        head += " Not above 0: the model does not name these targets, and the shares mean little."
    # The tokens that carry most, in their order.
    most = grid.abs().max().fillna(0).nlargest(_SHOWN).index
    shown = [token for token in grid.columns if token in most]
    cells = [
        [clip_label(str(site), 26), *(number(100 * row[token], 1) for token in shown)]
        for site, row in grid.iterrows()
    ]
    blocks = [fill(head), Table(["site", *map(str, shown)], cells, 1).text()]
    if more := len(grid.columns) - len(shown):
        blocks.append(f"{more} more tokens carry less.")
    return "\n\n".join(blocks)
