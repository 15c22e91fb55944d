"""Generation under edits, and the states of other inputs that edits take from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models import Model
from ..models.model import evaluating
from .apply import Job, Tokens, edited, watching
from .edit import EDIT_ROLES, Edit

_GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "max_new_tokens": 20}


@dataclass(frozen=True, eq=False)
class States:
    """Hidden states of some inputs at some sites; made by `gf.states`."""

    at: Mapping[str, torch.Tensor]
    """By site, [inputs, tokens, d] on the CPU in the model's dtype: the tokens of the role in the
    prompt, in their order, then the generated ones."""
    role: str
    in_prompt: int
    """How many of the tokens are the prompt's."""
    model: str


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
    if not inputs:
        raise ValueError("inputs is empty: there are no states to keep")
    wanted = model.sites(sites)
    ahead = [site.name for site in wanted if site.tower != "lm"]
    if steps and ahead:
        raise ValueError(f"{ahead[0]} runs once, before anything is generated: leave steps= out")
    kept: dict[str, list[torch.Tensor]] = {site.name: [] for site in wanted}
    phase = "both" if steps else "prompt"
    speaks = len(ahead) < len(wanted) and (steps > 0 or _can_generate(model))
    for start in range(0, len(inputs), batch_size):
        some = inputs[start : start + batch_size]
        seen: dict[str, list[torch.Tensor]] = {site.name: [] for site in wanted}
        jobs = [
            Job(s, role, phase if s.tower == "lm" else "prompt", _Keep(role, seen[s.name]))
            for s in wanted
        ]
        with watching(model, jobs):
            if speaks:
                # As `generate` runs it, to the last bit: padded on the left, with its positions.
                _generate(model, some, max_new_tokens=steps + 1, min_new_tokens=steps + 1)
            else:
                model.until(wanted).forward(model.prepare(some))
        for name, parts in seen.items():
            kept[name].append(torch.cat(parts, 1))
    numbers = sorted({t.shape[1] for parts in kept.values() for t in parts})
    if len(numbers) > 1:
        raise ValueError(_unequal(numbers[0], numbers[-1], role))
    at = {name: torch.cat(parts) for name, parts in kept.items()}
    return States(at, role, next(iter(at.values())).shape[1] - steps, model.name)


class _Keep:
    """Keeps what it sees, [samples, tokens, d] a run."""

    def __init__(self, role: str, seen: list[torch.Tensor]) -> None:
        self._role, self._seen = role, seen

    def __call__(self, hidden: torch.Tensor, tokens: Tokens) -> None:
        if tokens.counts is not None and bool((tokens.counts != tokens.counts[0]).any()):
            few, many = int(tokens.counts.min()), int(tokens.counts.max())
            raise ValueError(_unequal(few, many, self._role))
        self._seen.append(hidden.view(tokens.samples, -1, hidden.shape[-1]).cpu())


def _unequal(few: int, many: int, role: str) -> str:
    return f"the inputs and sites have {few} to {many} {role} tokens: take those of one number"


def generate(
    model: Model,
    inputs: Sequence[Any],
    edits: Sequence[Edit] = (),
    *,
    batch_size: int | None = None,
    **options: Any,
) -> list[str]:
    """See `Model.generate`."""
    inputs = list(inputs)
    if not inputs:
        return []
    tokenizer = _tokenizer(model)
    if tokenizer is None:
        msg = f"{model.name} brought no tokenizer: run model.module.generate inside "
        raise ValueError(msg + "model.edited(edits)")
    if options.get("use_cache") is False:
        raise ValueError("without a cache every step is a prompt: leave use_cache=False out")
    if "generation_config" in options:
        raise ValueError("give what generation_config= says by name: max_new_tokens=, num_beams=")
    options = _GREEDY | options
    copies = max(options["num_beams"], options["num_return_sequences"])
    steps = options["max_new_tokens"] - 1
    for edit in edits:
        edit.sites_in(model)
        if edit.samples not in (1, len(inputs)):
            msg = f"the edit {edit!r} is for {edit.samples} samples, and there are {len(inputs)}"
            raise ValueError(msg + " inputs")
        have = edit.values.shape[2]
        if edit.phase != "prompt" and 1 < have <= steps:
            msg = f"the edit {edit!r} has states of {have - 1} generated tokens, and "
            raise ValueError(f"{msg}max_new_tokens={steps + 1} feeds {steps} back")
    said = []
    for start in range(0, len(inputs), batch_size or len(inputs)):
        numbers = range(start, min(start + (batch_size or len(inputs)), len(inputs)))
        here = [edit.take(numbers) if edit.samples > 1 else edit for edit in edits]
        with edited(model, here, copies):
            ids = _generate(model, [inputs[i] for i in numbers], **options)
        said += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return said


def _generate(model: Model, inputs: Sequence[Any], **options: Any) -> torch.Tensor:
    """Return the ids of the generated tokens, int64 [rows, tokens]."""
    arguments = prompt_of(model, inputs)
    options = _GREEDY | options
    if (pad := getattr(_tokenizer(model), "pad_token_id", None)) is not None:
        options.setdefault("pad_token_id", pad)
    module: Any = model.module
    with evaluating(module), torch.inference_mode():
        ids: torch.Tensor = module.generate(**arguments, **options)
    return ids[:, arguments["input_ids"].shape[1] :]


def prompt_of(model: Model, inputs: Sequence[Any]) -> dict[str, Any]:
    """Return what the module's own `generate` takes: padded on the left, images looked at already.

    An edit in a vision tower or a projector must therefore be in force when this is called.

    Raises
    ------
    ValueError
        When the model makes no text, or would be asked several prompts.
    """
    if not _can_generate(model):
        raise ValueError(f"{model.name} makes no text: it has no language model to generate with")
    if len(model.prompts) > 1:
        msg = f"{model.name} would be asked {len(model.prompts)} prompts: choose one by "
        raise ValueError(msg + "model.asking([prompt])")
    batch = model.prepare(inputs)
    if "prompts" not in batch:
        return _to_left(batch)
    if "mm_encoder_outputs" not in inspect.signature(model.module.forward).parameters:
        msg = f"{type(model.module).__name__} takes no images that were looked at before: run "
        raise ValueError(msg + "model.module.generate inside model.edited(edits)")
    (prompt,) = batch["prompts"]
    return {**_to_left(prompt), "mm_encoder_outputs": {"image": model.look(batch)}}


def _to_left(batch: dict[str, Any]) -> dict[str, Any]:
    """Move the padding of every sequence to its left; the mask says where it is."""
    mask = batch.get("attention_mask")
    if mask is None:
        return batch
    # Stable: padding first, the tokens in their order after it.
    order = (mask != 0).int().argsort(dim=1, stable=True)
    return {
        k: v.gather(1, order) if isinstance(v, torch.Tensor) and v.shape == mask.shape else v
        for k, v in batch.items()
    }


def _can_generate(model: Model) -> bool:
    can: Any = getattr(model.module, "can_generate", None)
    return can is not None and bool(can()) and any(t.name == "lm" for t in model.towers)


def _tokenizer(model: Model) -> Any:
    """Return the tokenizer of the texts; None where the model brought none."""
    found = getattr(model.collate, "tokenizer", None)
    return found or getattr(getattr(model.transform, "processor", None), "tokenizer", None)
