"""What a part is given: its device, its time, and where its figures go."""

import json
import time
import traceback
from contextlib import contextmanager

import torch

KINDS = {"at most": lambda got, limit: got <= limit, "at least": lambda got, limit: got >= limit}


class WrongResultError(AssertionError):
    """A result that is about to be timed is not right."""


class Run:
    """One part under way.

    Every event is on disk as soon as it is known, so a crash loses nothing of what came before.

    Parameters
    ----------
    path
        File of events, one JSON object a line.
    seconds
        How long the part may take.
    dry
        Whether to run everything at tiny sizes on the CPU, to see that it runs.
    quick
        Whether to take fewer sizes and rounds.
    given
        Figures of the parts before: `parts.ceilings` and so on, as in the final JSON.
    """

    def __init__(self, path, seconds, dry=False, quick=False, given=None):
        self.path, self.dry, self.quick, self.given = path, dry, quick, given or {}
        self.device = torch.device("cpu" if dry else "cuda")
        self._end = time.monotonic() + seconds
        self._said = set()

    def left(self):
        """Return the seconds that are left."""
        return self._end - time.monotonic()

    def enough(self, seconds, what):
        """Return whether there is time for something; if not, a note says that it was left out."""
        if self.left() >= seconds:
            return True
        self.note(f"{what}: left out, the time of this part is over")
        return False

    def row(self, table, goals=None, **values):
        """Record a row; `goals` are {column: ("at most" or "at least", limit)}."""
        values = {k: v.item() if hasattr(v, "item") else v for k, v in values.items()}
        self._send("row", {"table": table, "values": values, "goals": goals or {}})

    def note(self, text):
        """Record a sentence, once."""
        if text not in self._said:
            self._said.add(text)
            self._send("note", text)

    def error(self, text):
        """Record what went wrong; the part goes on, and has failed."""
        self._send("error", text)

    def require(self, condition, text):
        """Stop a case whose result is wrong."""
        if not condition:
            raise WrongResultError(text)

    def sync(self):
        """Wait for the GPU; an error that it met by then is raised here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @contextmanager
    def case(self, name):
        """Record the failure of one case, and go on with the next if the GPU still answers."""
        try:
            yield
            self.sync()
        except Exception as error:
            self.error(f"{name}: {type(error).__name__}: {error}\n{traceback.format_exc()}")
            self.sync()

    @contextmanager
    def peer(self, name):
        """Record why a peer could not be measured, which is no failure of ours."""
        try:
            yield
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            self.note(f"{name} was not measured: {type(error).__name__}: {reason[:300]}")
            self.sync()

    def _send(self, kind, value):
        with open(self.path, "a") as file:
            file.write(json.dumps({kind: value}) + "\n")


def ceiling(run, name):
    """Return a figure of the part `ceilings`, None if it was not measured."""
    for row in run.given.get("parts", {}).get("ceilings", {}).get("tables", {}).get("ceilings", []):
        if row["values"]["what"] == name:
            return row["values"]["figure"]
    return None


def share(part, whole):
    """Return `part` in per cent of `whole`, None where there is none."""
    return None if part is None or not whole else 100 * part / whole


def verdict(got, goal):
    """Return "met", "MISSED" or "not measured" for a figure and its goal."""
    kind, limit = goal
    if got is None:
        return "not measured"
    return "met" if KINDS[kind](got, limit) else "MISSED"
