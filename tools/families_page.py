"""Write docs/families.md: every model family, and what `geofast doctor` says of it.

python tools/families_page.py          write it
The tests call `table` and compare.
"""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import families  # noqa: E402

import geofast as gf  # noqa: E402

CHECKS = ("repeats", "batch", "padding", "hidden_states", "roles")
WORDS = ["w1 w2", "w3", "w4 w5 w6 w7"]
HEAD = """# Model families

Every row is a tiny random checkpoint of a family, saved with the processor class that it really
has, loaded by `gf.load` and examined by `geofast doctor`; `python tools/families_page.py` writes
this page, and a test holds it to what the checks say now. `pass`: equal; `note`: a known
difference, by design of the model (transformers gives the last hidden state of a language model
after its final norm; texts padded on the left stand elsewhere than alone, which is why geofast pads
on the right); `-`: does not apply. Two rows, image and text, where a model takes both.

| family | sites | input | repeats | batch = single | left = right | hidden states | image tokens |
|---|---|---|---|---|---|---|---|
"""


def table():
    """Return the page, and the families that could not be run here, with the package they lack."""
    lines, lacking = [], {}
    for family in (
        *families.VISION_FAMILIES,
        *families.COMPARING_FAMILIES,
        *families.TALKING_FAMILIES,
        *families.LANGUAGE_FAMILIES,
    ):
        needed = families.NEEDS.get(family.__name__)
        if needed and not find_spec(needed):
            lacking[family.__name__] = needed
            continue
        with tempfile.TemporaryDirectory() as folder:
            model = gf.load(families.save(family, folder))
        lines += [row(family.__name__, view) for view in (model, model.other) if view]
    return HEAD + "\n".join(lines) + "\n", lacking


def row(name, view):
    examples = WORDS if view.kind == "text" else None
    checks = gf.doctor(view, examples, only=CHECKS).checks
    # A model for both kinds of input is examined with both.
    found = {c.name.removeprefix(f"{view.kind}: "): c.outcome for c in checks}
    words = ["-" if found[c] == "skip" else found[c] for c in CHECKS]
    towers = ", ".join(t.name for t in view.towers)
    return f"| {name.replace('_', ' ')} | {towers} | {view.kind} | {' | '.join(words)} |"


if __name__ == "__main__":
    page, missing = table()
    for family, package in missing.items():
        print(f"{family} left out: transformers' processor needs {package}", file=sys.stderr)
    (ROOT / "docs" / "families.md").write_text(page)
