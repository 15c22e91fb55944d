"""Samples and a model in the words in which a run asked them."""

from __future__ import annotations

from dataclasses import replace

from ..data import Samples
from ..extract import worded
from ..models import Model
from ..run import Run


def prompted(
    model: Model, samples: Samples, run: Run, prompt: str | None = None
) -> tuple[Model, Samples, Run]:
    """Put texts into a run's prompt, or have the model ask it about images.

    Parameters
    ----------
    model
        From `load`.
    samples
        Of the kind that the run read.
    run
        Of the model.
    prompt
        One of the run's; None takes its only one.

    Returns
    -------
    model, samples
        To be run: inputs go into the model as they went into it for the run.
    run
        Without what it found of other prompts.

    Raises
    ------
    ValueError
        When the run was asked several prompts and none is named, or never this one; when the model
        does not read such samples.
    """
    many = run.info.get("arguments", {}).get("prompts") or []
    told = ", ".join(map(repr, many)) or "none"
    if prompt is None and len(many) > 1:
        raise ValueError(
            f"the run was asked several prompts: choose one by prompt= (--prompt): {told}"
        )
    if prompt is not None and prompt not in many:
        raise ValueError(f"the run was never asked {prompt!r}; its prompts: {told}")
    chosen = many[0] if prompt is None and many else prompt
    if len(many) > 1:
        probes = {name: probe for name, probe in run.probes.items() if probe.prompt == chosen}
        run = replace(run, layers=run.layers[run.layers["prompt"] == chosen], probes=probes)
    model = model.reading(samples.kind)
    if chosen is None:
        return model, samples, run
    if samples.kind == "text":
        return model, worded(samples, chosen)[""], run
    return model.asking([chosen]), samples, run
