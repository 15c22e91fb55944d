"""Generation under edits, and the states of other inputs that edits take from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models import Model
from ..models.model import require_several, takes_looks
from .apply import Job, Tokens, watching
from .asking import (
    Prompt,
    ask,
    can_generate,
    prompt_of,
    require_tokenizer,
    run,
    takes_images,
)
from .edit import EDIT_ROLES, Edit, require_role, several


@dataclass(frozen=True, eq=False, repr=False)
class States:
    """Hidden states of some inputs at some sites; made by `gf.states`."""

    at: Mapping[str, torch.Tensor]
    """By site, [inputs, tokens, d] on the CPU in the model's dtype: the tokens of the role in the
    prompt, in their order, then the generated ones."""
    role: str
    in_prompt: int
    """How many of the tokens are the prompt's."""
    model: str

    def __repr__(self) -> str:
        shapes = [f"{site}: {list(x.shape)}" for site, x in self.at.items()]
        few = shapes if len(shapes) < 4 else [shapes[0], "...", shapes[-1]]
        return f"States({', '.join(few)}; role={self.role})"


def states(
    model: Model,
    inputs: Sequence[Any],
    sites: str | Sequence[str],
    role: str = "last",
    *,
    steps: int = 0,
    batch_size: int = 32,
) -> States:
    """Keep the hidden states of all inputs, each run once.

    Parameters
    ----------
    model
        From `load`. One that talks about images is asked its one prompt; see `Model.asking`.
    inputs
        As the model takes them.
    sites
        Names or globs.
    role
        Which tokens of the prompt; all inputs must have as many.
    steps
        How many generated tokens to follow, for role `last`: the model answers greedily, its end
        token ruled out, and the state of each token that it feeds back is kept.
    batch_size
        Inputs in one forward pass.

    Raises
    ------
    ValueError
        When there is no input, a site or the role is unknown, an input has no token of the role or
        another number than those before it; when steps are asked of what does not generate.
    """
    if role not in EDIT_ROLES:
        raise ValueError(f"role must be one of {', '.join(EDIT_ROLES)}; got {role!r}")
    if steps and role != "last":
        raise ValueError(f"steps= follows the last token; role is {role!r}")
    require_several(inputs)
    if not inputs:
        raise ValueError("inputs is empty: there are no states to keep")
    wanted = model.sites(sites)
    require_role(model, wanted, role)
    ahead = [site.name for site in wanted if site.tower != "lm"]
    if steps and ahead:
        raise ValueError(f"{ahead[0]} runs once, before anything is generated: leave steps= out")
    kept: dict[str, list[torch.Tensor]] = {site.name: [] for site in wanted}
    phase = "both" if steps else "prompt"
    speaks = len(ahead) < len(wanted) and (
        steps > 0 or (can_generate(model) and (takes_images(model) or not model.prompts))
    )
    for start in range(0, len(inputs), batch_size):
        some = inputs[start : start + batch_size]
        seen: dict[str, list[torch.Tensor]] = {site.name: [] for site in wanted}
        jobs = [
            Job(s, role, phase if s.tower == "lm" else "prompt", _Keep(role, seen[s.name], start))
            for s in wanted
        ]
        with watching(model, jobs):
            if speaks:
                # As `generate` runs it, to the last bit: padded on the left, with its positions.
                both = {"max_new_tokens": steps + 1, "min_new_tokens": steps + 1}
                run(model, prompt_of(model, some), **both)
            else:
                model.until(wanted).forward(model.prepare(some))
        for name, parts in seen.items():
            kept[name].append(torch.cat(parts, 1))
    for parts in kept.values():
        counts = [t.shape[1] for t in parts for _ in t]
        if len({*counts}) > 1:
            raise UnequalError(role, 0, counts)
    of_sites = {name: parts[0].shape[1] for name, parts in kept.items()}
    if len({*of_sites.values()}) > 1:
        raise ValueError(f"the sites have different numbers of {role} tokens, {of_sites}: take one")
    at = {name: torch.cat(parts) for name, parts in kept.items()}
    return States(at, role, next(iter(at.values())).shape[1] - steps, model.name)


class _Keep:
    """Keeps what it sees, [samples, tokens, d] a run."""

    def __init__(self, role: str, seen: list[torch.Tensor], start: int) -> None:
        self._role, self._seen, self._start = role, seen, start

    def __call__(self, hidden: torch.Tensor, tokens: Tokens) -> None:
        if tokens.counts is not None and bool((tokens.counts != tokens.counts[0]).any()):
            raise UnequalError(self._role, self._start, tokens.counts.tolist())
        self._seen.append(hidden.view(tokens.samples, -1, hidden.shape[-1]).cpu())


class UnequalError(ValueError):
    """Inputs have different numbers of tokens of a role; `rows` are the first and one unlike it."""

    def __init__(self, role: str, start: int, counts: Sequence[int]) -> None:
        unlike = next(i for i, count in enumerate(counts) if count != counts[0])
        self.rows, self.counts, self.role = (
            (start, start + unlike),
            (counts[0], counts[unlike]),
            role,
        )
        super().__init__(self.words(*(f"input {row}" for row in self.rows)))

    def words(self, first: str, other: str) -> str:
        """Say so of inputs by their names."""
        (few, many), role = self.counts, self.role
        return (
            f"{other} has {many} {role} tokens, and {first} has {few}: take inputs of one number, "
            "or role='last' (--role last)"
        )


def generate(
    model: Model,
    inputs: Sequence[Any],
    edits: Edit | Sequence[Edit] = (),
    *,
    batch_size: int | None = None,
    **options: Any,
) -> list[str]:
    """See `Model.generate`."""
    size = len(inputs) or 1 if batch_size is None else batch_size
    return generate_arms(model, inputs, [several(edits)], batch_size=size, **options)[0]


def generate_arms(
    model: Model,
    inputs: Sequence[Any],
    arms: Sequence[Sequence[Edit]],
    *,
    batch_size: int = 32,
    **options: Any,
) -> list[list[str]]:
    """Answer inputs under each of several arms of edits.

    Where edits are at the last token, of the language model, every distinct input is read once for
    all arms and rows; see `ask`.

    Parameters
    ----------
    model, inputs, options
        As for `Model.generate`.
    arms
        Edits of each arm; none for the model as it is.
    batch_size
        Inputs that run together.

    Returns
    -------
    list of list of str
        For every arm what `Model.generate` gives.

    Raises
    ------
    ValueError
        As `Model.generate`.
    """
    require_several(inputs)
    inputs = list(inputs)
    if not inputs:
        return [[] for _ in arms]
    require_tokenizer(model)
    if options.get("use_cache") is False:
        raise ValueError("without a cache every step is a prompt: leave use_cache=False out")
    if options.get("prefill_chunk_size") is not None:
        raise ValueError("a prompt is read whole: leave prefill_chunk_size= out")
    if "generation_config" in options:
        raise ValueError("give what generation_config= says by name: max_new_tokens=, num_beams=")
    each = options.get("num_return_sequences") or 1
    copies = max(options.get("num_beams") or 1, each)
    if copies > 1 and model.prompts and not takes_looks(model.module):
        raise ValueError(
            f"{type(model.module).__name__} of this transformers gives one answer about an image: "
            "leave num_beams= and num_return_sequences= out (most give several since version 5.18)"
        )
    steps = options.setdefault("max_new_tokens", 20) - 1
    for edit in (edit for arm in arms for edit in arm):
        have = edit.values.shape[2]
        if edit.phase != "prompt" and 1 < have <= steps:
            msg = f"the edit {edit!r} has states of {have - 1} generated tokens, and "
            raise ValueError(f"{msg}max_new_tokens={steps + 1} feeds {steps} back")
    said = [[""] * (len(inputs) * each) for _ in arms]

    def answer(arm: int, rows: list[int], prompt: Prompt) -> None:
        texts = texts_of(model, prompt(), **options)
        for i, row in enumerate(rows):
            said[arm][row * each : (row + 1) * each] = texts[i * each : (i + 1) * each]

    share = not {"cache_implementation", "past_key_values"} & options.keys()
    ask(model, inputs, arms, answer, batch_size=batch_size, copies=copies, share=share)
    return said


def texts_of(model: Model, arguments: dict[str, Any], **options: Any) -> list[str]:
    """Answer what `prompt_of` makes, and return the words."""
    made = run(model, arguments, **options)[:, arguments["input_ids"].shape[1] :]
    texts: list[str] = require_tokenizer(model).batch_decode(made, skip_special_tokens=True)
    return texts
