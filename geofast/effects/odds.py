"""How edits move the next token: from the source's name towards the target's, and all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..models import Model
from ..steering.asking import can_generate, is_late, once, require_tokenizer
from ..steering.edit import Edit
from ..steering.generation import States, states
from ..steering.scoring import answer_ids, divergence, follow

BYTES = 512 << 20
"""Of the values of edits that are in memory at once, where later arms reuse nothing."""


@dataclass(frozen=True, eq=False)
class Asked:
    """Prompts of pairs, and the tokens with which the names of their places begin."""

    sources: Sequence[Any]
    """[n] inputs, which are run and edited."""
    targets: Sequence[Any]
    """Each target's input, once."""
    of_pair: torch.Tensor
    """int64 [n]: the number of each pair's target among them."""
    tokens: torch.Tensor
    """int64 [n, 2]: the first tokens of the source's and of the target's name."""
    kept: NDArray[np.bool_]
    """Which of the pairs that there were: all but those whose names begin alike."""

    @classmethod
    def of(
        cls, model: Model, sources: Sequence[Any], targets: Sequence[Any],
        source_names: Sequence[str], target_names: Sequence[str],
    ) -> Asked:  # fmt: skip
        """Find the tokens of names as they go on after the source's prompt.

        Raises
        ------
        ValueError
            When the model makes no text, brought no tokenizer or would be asked several prompts; a
            name is not a word or has no token; or the names of every pair begin alike.
        """
        _require_speech(model)
        ends = _ends(model, sources)
        each = [_first(model, ends, names) for names in (source_names, target_names)]
        tokens = torch.tensor(each).T
        kept = (tokens[:, 0] != tokens[:, 1]).numpy()
        if not kept.any():
            raise ValueError(
                f"the names of every pair begin with the same token ({source_names[0]!r} and "
                f"{target_names[0]!r}, ...): take other names, or other pairs"
            )
        numbers = kept.nonzero()[0].tolist()
        distinct, of_pair = once([targets[i] for i in numbers])
        some = [sources[i] for i in numbers]
        return cls(some, distinct, torch.from_numpy(of_pair), tokens[torch.from_numpy(kept)], kept)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.sources)


@dataclass(frozen=True, eq=False)
class Odds:
    """What edits do to the next token, in nats."""

    effect: torch.Tensor
    """float64 [arms, n]: change of log p(target's token) - log p(source's token)."""
    damage: torch.Tensor
    """float64 [arms, n]: KL(unedited || edited) of the token, given that it is neither of the
    two."""
    whole: torch.Tensor
    """float64 [n]: what the effect would be if the target itself were asked."""
    whole_damage: torch.Tensor
    """float64 [n]: what the damage would be."""


def odds(
    model: Model,
    asked: Asked,
    goal: torch.Tensor,
    arms: Sequence[Sequence[Edit]],
    batch_size: int,
) -> Odds:
    """Run the sources up to their next token, under every arm of edits.

    Parameters
    ----------
    model
        From `load`.
    asked
        The n pairs.
    goal
        What `next_tokens` says of the targets.
    arms
        Edits of each arm, with values for the n pairs.
    batch_size
        Inputs that run together.
    """
    n = len(asked)
    made = Odds(*torch.zeros(2, len(arms), n).double(), *torch.zeros(2, n).double())
    late = [all(is_late(s, edit.role) for edit in arm for s in edit.sites) for arm in arms]
    texts = asked.tokens[:, 1:].tolist()
    # What a prompt is before its last token is read once, where no arm of a call changes it.
    for part in sorted(set(late), reverse=True) or [True]:
        here = [i for i, is_ in enumerate(late) if is_ == part]
        some = [(), *(arms[i] for i in here)]
        see = _Compare(asked, goal, here, made)
        follow(model, asked.sources, texts, some, see, batch_size=batch_size)
    return made


class _Compare:
    """Compares the next token under every arm of a call with that of the first, unedited."""

    def __init__(self, asked: Asked, goal: torch.Tensor, arms: Sequence[int], made: Odds) -> None:
        self._asked, self._goal, self._arms, self._made = asked, goal, arms, made
        self._odds = self._others = torch.empty(0)

    def __call__(
        self, arm: int, rows: list[int], _step: int, _ids: torch.Tensor, logs: torch.Tensor
    ) -> None:
        two, made = self._asked.tokens[rows].to(logs.device), self._made
        if arm == 0:
            self._odds, self._others = _log_odds(logs, two), _others(logs, two)
            ends = self._goal[self._asked.of_pair[rows]].to(logs.device)
            made.whole[rows] = (_log_odds(ends, two) - self._odds).cpu()
            made.whole_damage[rows] = divergence(self._others, _others(ends, two)).cpu()
        else:
            i = self._arms[arm - 1]
            made.effect[i, rows] = (_log_odds(logs, two) - self._odds).cpu()
            made.damage[i, rows] = divergence(self._others, _others(logs, two)).cpu()


def next_tokens(model: Model, inputs: Sequence[Any], batch_size: int) -> torch.Tensor:
    """Return log-probabilities of the token after each prompt: float32 [n, vocab], on the CPU."""
    made: dict[int, torch.Tensor] = {}

    def see(_arm: int, rows: list[int], _step: int, _ids: torch.Tensor, logs: torch.Tensor) -> None:
        made.update(zip(rows, logs.cpu(), strict=True))

    follow(model, inputs, [[0]] * len(inputs), [()], see, batch_size=batch_size)
    return torch.stack([made[row] for row in range(len(inputs))])


def states_of(
    model: Model, inputs: Sequence[Any], wanted: Sequence[tuple[str, str]], batch_size: int
) -> dict[tuple[str, str], States]:
    """Keep the states of inputs at sites and the tokens of roles: one pass for a tower and role."""
    found: dict[tuple[str, str], States] = {}
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for site, role in wanted:
        groups.setdefault((site.partition(".")[0], role), {})[site] = None
    for (_, role), sites in groups.items():
        held = states(model, inputs, list(sites), role, batch_size=batch_size)
        found |= {(site, role): replace(held, at={site: held.at[site]}) for site in sites}
    return found


def prompt_ids(model: Model, inputs: Sequence[Any]) -> list[torch.Tensor]:
    """Return the tokens of every prompt, without padding: int64 [tokens] each."""
    batch: dict[str, Any] = model.prepare(inputs)
    (batch,) = batch.get("prompts", [batch])
    ids = batch["input_ids"].cpu()
    mask = batch.get("attention_mask")
    there = torch.ones_like(ids) if mask is None else mask.cpu()
    return [one[kept.bool()] for one, kept in zip(ids, there, strict=True)]


def _log_odds(logs: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    of_source, of_target = logs.gather(1, two).double().unbind(1)
    return of_target - of_source


def _others(logs: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [n, vocab] given that it is neither token of `two` [n, 2]."""
    return logs.scatter(1, two, -torch.inf).log_softmax(1)


def _require_speech(model: Model) -> None:
    if not can_generate(model):
        raise ValueError(f"{model.name} makes no text: it has no language model to name a place")
    require_tokenizer(model)
    if len(model.prompts) > 1:
        msg = f"{model.name} would be asked {len(model.prompts)} prompts: choose one by "
        raise ValueError(msg + "model.asking([prompt])")


def _ends(model: Model, inputs: Sequence[Any]) -> list[torch.Tensor]:
    """Return the tokens of every prompt; about images all end alike, as the first does."""
    distinct, index = once(inputs)
    if model.prompts:
        return prompt_ids(model, distinct[:1]) * len(inputs)
    ids = prompt_ids(model, distinct)
    return [ids[i] for i in index.tolist()]


def _first(model: Model, ends: Sequence[torch.Tensor], names: Sequence[str]) -> list[int]:
    found: dict[tuple[int, str], int] = {}
    tokens = []
    for end, name in zip(ends, names, strict=True):
        key = int(end[-1]), name
        if key not in found:
            ids = answer_ids(model, end, name)
            if not ids:
                raise ValueError(f"the name {name!r} has no token in {model.name}")
            found[key] = ids[0]
        tokens.append(found[key])
    return tokens
