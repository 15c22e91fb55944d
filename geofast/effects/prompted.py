"""Samples and a model in the words in which a run asked them."""

from __future__ import annotations

from dataclasses import replace

from ..data import Samples
from ..extract import worded
from ..models import Model
from ..run import Run
from .probed import require_run_of, require_sites_of


def chosen_prompt(run: Run, prompt: str | None = None) -> str | None:
    """Return one of a run's prompts; None takes its only one, and is one where it has none.

    Raises
    ------
    ValueError
        When the run was asked several prompts and none is named, or never this one.
    """
    many = run.info.get("arguments", {}).get("prompts") or []
    told = ", ".join(map(repr, many)) or "none"
    if prompt is None and len(many) > 1:
        raise ValueError(
            f"the run was asked several prompts: choose one by prompt= (--prompt): {told}"
        )
    if prompt is not None and prompt not in many:
        raise ValueError(f"the run was never asked {prompt!r}; its prompts: {told}")
    return many[0] if prompt is None and many else prompt


def worded_as(run: Run, samples: Samples, prompt: str | None) -> tuple[Run, Samples]:
    """Put texts into one of a run's prompts, and leave what the run found of others out.

    Parameters
    ----------
    run
        Of any model.
    samples
        Of the kind that the run read. Images stay as they are.
    prompt
        From `chosen_prompt`.

    Raises
    ------
    ValueError
        When the run read another kind of samples, or the prompt names a column that they lack.
    """
    kind = run.info.get("kind", samples.kind)
    if kind != samples.kind:
        raise ValueError(
            f"the run read {kind}, and {samples.source} was read as {samples.kind}: name the "
            "column that the run read (image=, text=, --image, --text)"
        )
    if prompt is None:
        return run, samples
    if any(probe.prompt for probe in run.probes.values()):  # there were several
        here = ("", prompt)  # a vision tower is read once for all
        probes = {name: probe for name, probe in run.probes.items() if probe.prompt in here}
        run = replace(run, layers=run.layers[run.layers["prompt"].isin(here)], probes=probes)
    return run, worded(samples, prompt)[""]


def asked_as(run: Run, model: Model, samples: Samples, prompt: str | None) -> Model:
    """Return a run's model as it reads such samples, and is asked a prompt about images.

    Raises
    ------
    ValueError
        When it is another model, or does not read such samples.
    """
    require_run_of(run, model)
    model = model.reading(samples.kind)
    require_sites_of(run, model)
    return model if prompt is None or samples.kind == "text" else model.asking([prompt])
