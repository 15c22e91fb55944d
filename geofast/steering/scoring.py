"""How likely a model finds given answers, under edits: no generation, any phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models import Model
from ..models.model import require_several
from .asking import Prompt, ask, require_tokenizer, run
from .edit import Edit

See = Callable[[int, list[int], int, torch.Tensor, torch.Tensor], None]
"""Given the number of an arm, rows, the number of a token, its ids in the rows' answers (int64
[rows], -1 after the end of one) and log-probabilities [rows, vocab]."""

# What a checkpoint's own settings of generation would make of an answer is not asked here.
_PLAIN = {
    "return_dict_in_generate": True, "output_logits": True, "min_new_tokens": None,
    "eos_token_id": None,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Scores:
    """How likely given answers are; made by `gf.score`."""

    log_prob: torch.Tensor
    """float64 [rows, tokens]: of each token of the answer, in nats; 0 after its end."""
    counts: torch.Tensor
    """int64 [rows]: how many tokens the answers have."""
    kl: torch.Tensor | None = None
    """float64 [rows, tokens], when asked for: the divergence KL(unedited || edited) of the next
    token's distribution, in nats, before each token; 0 after its end. As `log_prob` not a number
    where an edit leaves none that the model's dtype holds."""

    @property
    def total(self) -> torch.Tensor:
        """Log-probability of each answer, float64 [rows], in nats."""
        return self.log_prob.sum(1)

    @property
    def perplexity(self) -> torch.Tensor:
        """float64 [rows]: exp of the mean negative log-probability of an answer's tokens."""
        return (-self.total / self.counts).exp()


def score(
    model: Model,
    inputs: Sequence[Any],
    texts: Sequence[str | Sequence[int]],
    arms: Sequence[Sequence[Edit]] = ((),),
    *,
    kl: bool = False,
    batch_size: int = 32,
) -> list[Scores]:
    """Score given answers under each of several arms of edits.

    The model reads each input and is then handed the answer token by token, so that edits of every
    phase are in force as in generation.

    Parameters
    ----------
    model, inputs
        As for `Model.generate`.
    texts
        The answer to each input; a string, or ids of tokens. A string goes on where the prompt
        ends: with a space between, where neither has white space there.
    arms
        Edits of each arm; none for the model as it is.
    kl
        Whether to compare the distributions with those of the model as it is.
    batch_size
        Inputs that run together.

    Returns
    -------
    list of Scores
        One for each arm.

    Raises
    ------
    ValueError
        When an answer is empty, there are not as many as inputs, or as `Model.generate`.
    """
    counts = torch.zeros(len(inputs), dtype=torch.int64)
    # Where the edited arms are compared, the first is the model as it is.
    every = [(), *arms] if kl else list(arms)
    log_prob = torch.zeros(len(every), len(inputs), 1, dtype=torch.float64)
    diverged = torch.zeros_like(log_prob)
    unedited: dict[int, torch.Tensor] = {}

    def see(arm: int, rows: list[int], step: int, ids: torch.Tensor, logs: torch.Tensor) -> None:
        nonlocal log_prob, diverged
        if step == log_prob.shape[2]:
            log_prob = torch.nn.functional.pad(log_prob, (0, 1))
            diverged = torch.nn.functional.pad(diverged, (0, 1))
        index = torch.tensor(rows)
        there = ids >= 0
        counts[index] = counts[index].maximum(there.cpu() * (step + 1))
        found = logs.gather(1, ids.clamp(min=0)[:, None])[:, 0].double()
        log_prob[arm, index, step] = found.where(there, 0.0).cpu()
        if kl and arm == 0:
            unedited[step] = logs
        elif kl:
            apart = divergence(unedited[step], logs).where(there, 0.0)
            diverged[arm, index, step] = apart.cpu()

    follow(model, inputs, texts, every, see, batch_size=batch_size)
    return [
        Scores(log_prob[arm], counts, diverged[arm] if kl else None)
        for arm in range(int(kl), len(every))
    ]


def follow(
    model: Model,
    inputs: Sequence[Any],
    texts: Sequence[str | Sequence[int]],
    arms: Sequence[Sequence[Edit]],
    see: See,
    *,
    batch_size: int = 32,
) -> None:
    """Show `see` the distribution before every token of given answers; see `score`."""
    require_several(inputs)
    require_tokenizer(model)
    if len(texts) != len(inputs):
        raise ValueError(f"there are {len(inputs)} inputs and {len(texts)} answers: give as many")
    empty = [row for row, text in enumerate(texts) if not len(text)]
    if empty:
        raise ValueError(f"the answer to input {empty[0]} is empty: there is nothing to score")

    def answer(arm: int, rows: list[int], prompt: Prompt) -> None:
        steps = forced(model, prompt(), [texts[row] for row in rows])
        for step, (ids, logs) in enumerate(steps):
            see(arm, rows, step, ids, logs)

    ask(model, list(inputs), arms, answer, batch_size=batch_size)


def forced(
    model: Model, arguments: dict[str, Any], texts: Sequence[str | Sequence[int]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Answer what `prompt_of` makes with given texts, token by token.

    Yields ids of tokens (int64 [rows], -1 after the end of a text) and the log-probabilities before
    them, float32 [rows, vocab].
    """
    ids = _answers(model, arguments["input_ids"], texts)
    made = run(
        model, arguments, max_new_tokens=ids.shape[1], logits_processor=[_Force(ids)], **_PLAIN
    )
    for step, logits in enumerate(made.logits):
        yield ids[:, step], logits.float().log_softmax(1)


def divergence(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return KL(before || after) of log-probabilities [n, vocab], in nats: float64 [n]."""
    before, after = before.double(), after.double()
    # What has no probability before adds nothing, whatever it has after.
    terms = torch.where(before == -torch.inf, 0.0, before.exp() * (before - after))
    return terms.sum(1).clamp(min=0)


def answer_ids(model: Model, prompt_ids: torch.Tensor, text: str) -> list[int]:
    """Return the tokens of a text that goes on where a prompt (int64 [tokens]) ends."""
    tokenizer = require_tokenizer(model)
    end = tokenizer.decode(prompt_ids[-1:], skip_special_tokens=False)
    if not (end[-1:].isspace() or text[:1].isspace() or end in tokenizer.all_special_tokens):
        text = f" {text}"
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _answers(
    model: Model, prompts: torch.Tensor, texts: Sequence[str | Sequence[int]]
) -> torch.Tensor:
    """Ids of answers, -1 after their ends: int64 [rows, tokens]."""
    each = [
        answer_ids(model, prompt, text) if isinstance(text, str) else list(text)
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    most = max(map(len, each))
    return torch.tensor([[*ids, *[-1] * (most - len(ids))] for ids in each], device=prompts.device)


class _Force:
    """Lets nothing but the next token of an answer follow."""

    def __init__(self, ids: torch.Tensor) -> None:
        self._ids, self._step = ids.clamp(min=0), 0

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced.scatter_(1, self._ids[:, self._step, None], 0.0)
        self._step += 1
        return forced
