"""The `geofast` command."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn, TextIO

_LEVELS = ("place", "region", "country", "continent")
_CONTROLS = ["random-dims", "random-direction", "shuffled-labels", "mean-difference"]
_SHOWN = ("run.json", "steering.json")
_MODES = (
    "swap: the target's state in those dimensions; set: the smallest change there after which the "
    "probe reads the target's place; patch: the target's whole state, whatever the share"
)
_ERRORS = (ValueError, OSError, RuntimeError, FloatingPointError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; an error prints as one line and exits with 1."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # as of `geofast show RUN | head`, which has read enough
        _discard(sys.stdout)  # for the flush at the exit
        return 141  # what a shell makes of SIGPIPE
    except _ERRORS as error:
        if options.traceback:
            raise
        print(f"geofast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("geofast: stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def _discard(stream: TextIO) -> None:
    """Send what is written to a stream from now on nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Patient:
    """A stream whose reader may leave."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, as long as somebody reads."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            _discard(self._stream)
            return len(text)

    def flush(self) -> None:
        """Flush, as long as somebody reads."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            _discard(self._stream)


@contextmanager
def _whoever_listens() -> Iterator[None]:
    """Go on when the reader of our output leaves: the run is in the folder, not in the pipe."""
    out: Any = _Patient(sys.stdout)
    err: Any = _Patient(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        yield


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"geofast: {message}; see {self.prog} --help\n")


class _Version(argparse.Action):
    """Prints the version; nothing is imported until then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from ._core import __version__

        print(f"geofast {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="geofast",
        description="Where does a model keep the place? Probe every layer in one pass.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="probe a real model on real data, from the package index"
    )
    demo.add_argument("name", choices=["satellite", "cities", "steer-cities", "steer-images"])
    demo.add_argument("--out", type=Path, help="run folder (default: runs/NAME)")
    demo.add_argument("--samples", type=_count, help="fewer samples, for a quick look")
    demo.add_argument("--overwrite", action="store_true", help="replace the run folder")
    demo.add_argument("--alphas", nargs="+", type=float, help="penalties (default: 12, 0.1 to 1e4)")
    demo.set_defaults(run=_demo)

    probe = commands.add_parser("probe", help="probe a model on geotagged samples")
    _model_argument(probe)
    probe.add_argument("data", help="CSV, TSV, Parquet, HDF5, or a folder of images with EXIF GPS")
    probe.add_argument("--out", type=Path, required=True, help="run folder to write")
    _probe_options(probe)
    probe.set_defaults(run=_probe)

    plan = commands.add_parser(
        "plan", help="print what a probe would read, hold and take, before weights are loaded"
    )
    _model_argument(plan)
    plan.add_argument("data", help="as for probe, and so are all options")
    plan.add_argument("--out", type=Path, help="the run folder: has its disk the room?")
    _probe_options(plan)
    plan.set_defaults(run=_plan)

    sites = commands.add_parser("sites", help="print the sites of a model")
    _model_argument(sites)
    _loading_options(sites)
    sites.add_argument(
        "--example", nargs="?", const="", metavar="PATH_OR_TEXT",
        help="also print what every token of one sample is: of this image or text, or of a "
        "built-in one; a text is what a model that talks about images is asked about that",
    )  # fmt: skip
    sites.set_defaults(run=_sites)

    doctor = commands.add_parser("doctor", help="check that a model is read rightly")
    _model_argument(doctor)
    doctor.add_argument("--data", help="samples to take examples from, and to say noise in R² by")
    doctor.add_argument("--image", help="column of image paths")
    doctor.add_argument("--text", help="column of texts")
    _loading_options(doctor)
    doctor.set_defaults(run=_doctor)

    subspace = commands.add_parser(
        "subspace", help="find which dimensions hold the place, from a run: no forward pass"
    )
    subspace.add_argument("folder", type=Path, help="a run's, with rows or statistics")
    subspace.add_argument("--out", type=Path, help="folder for tables, picture and page")
    subspace.add_argument("--sites", nargs="+", help="names or globs (default: all of the run)")
    subspace.add_argument("--split", help="a split of the run (default: the first)")
    subspace.add_argument(
        "--fractions", nargs="+", type=float, metavar="SHARE",
        help="shares of the dimensions to keep (default: 0.1, 0.2 to 1)",
    )  # fmt: skip
    subspace.add_argument(
        "--rankings", nargs="+", choices=["coef", "coef_std", "forward", "backward"],
        help="by |coef|, by |coef| x standard deviation, greedily, by elimination (default: all)",
    )  # fmt: skip
    subspace.add_argument(
        "--random", type=_count_from_0, default=5, help="random orders beside (default: 5)"
    )
    subspace.add_argument("--seed", type=_count_from_0, default=0, help="of those (default: 0)")
    subspace.add_argument(
        "--protocol", choices=["corrected", "study"], default="corrected",
        help="study: also the study's procedure, faults included",
    )  # fmt: skip
    subspace.add_argument("--overwrite", action="store_true", help="replace an earlier search")
    subspace.set_defaults(run=_subspace)

    what = "write one place over another inside a model, and measure what it answers"
    steer = commands.add_parser("steer", help=what, description=f"{what.capitalize()}.")
    _model_argument(steer)
    _pairs_options(
        steer, "Answers are searched for these: names, or codes of countries (FR). Default: "
        "columns called like the levels, and name or city for the place.",
    )  # fmt: skip
    steer.add_argument(
        "--out", type=Path, required=True, help="folder to write: tables, edits, report.html"
    )
    steer.add_argument(
        "--site", help="a site that the run probed (default: that of its best probe)"
    )
    steer.add_argument(
        "--share", nargs="+", type=float, default=[0.4],
        help="of the site's dimensions, 0 to 1, the first by --ranking; of several the finding is "
        "of the first (default: 0.4)",
    )  # fmt: skip
    steer.add_argument(
        "--mode", choices=["swap", "set", "patch"], default="swap",
        help=f"{_MODES} (default: swap)",
    )  # fmt: skip
    steer.add_argument(
        "--phase", choices=["prompt", "steps", "both"],
        help="edit the prompt's tokens, the generated ones, or both (default: both for the last "
        "token of a language model, else prompt)",
    )  # fmt: skip
    steer.add_argument(
        "--control", nargs="*", choices=_CONTROLS, default=_CONTROLS,
        help="what is measured beside the edit (default: all); no name: nothing",
    )  # fmt: skip
    steer.add_argument(
        "--all-pairs", action="store_true",
        help="also pairs whose places the unedited model does not name",
    )  # fmt: skip
    steer.add_argument(
        "--protocol", choices=["corrected", "study"], default="corrected",
        help="study: also the study's scores, faults included",
    )  # fmt: skip
    steer.add_argument(
        "--max-new-tokens", type=_count, default=20, help="of an answer (default: 20)"
    )
    steer.add_argument("--overwrite", action="store_true", help="replace the experiment's folder")
    _loading_options(steer)
    steer.set_defaults(run=_steer)

    what = "try edits at sites, shares and in modes, by their effect on the next token alone"
    locate = commands.add_parser("locate", help=what, description=f"{what.capitalize()}.")
    _model_argument(locate)
    _pairs_options(
        locate, "With what an answer begins: names, or codes of countries (FR); of several the "
        "country's. Default: --country country.",
    )  # fmt: skip
    locate.add_argument("--out", type=Path, help="folder for locate.csv and locate.json")
    locate.add_argument(
        "--sites", nargs="+",
        help="sites that the run probed, names or globs as 'lm.layers.*' (default: all)",
    )  # fmt: skip
    locate.add_argument(
        "--share", nargs="+", type=float, default=[0.1, 0.2, 0.4, 1.0],
        help="of a site's dimensions, above 0 to 1 (default: 0.1 0.2 0.4 1)",
    )  # fmt: skip
    locate.add_argument(
        "--mode", nargs="+", choices=["swap", "set", "patch"], default=["swap"],
        help=f"one or several; {_MODES} (default: swap)",
    )  # fmt: skip
    _loading_options(locate)
    locate.set_defaults(run=_locate)

    what = "print what a run, an experiment or a search found"
    show = commands.add_parser("show", help=what, description=f"{what.capitalize()}.")
    show.add_argument(
        "folder", type=Path, help="what probe, subspace, steer, locate or a demo wrote"
    )
    show.set_defaults(run=_show)
    return parser


def _model_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model",
        help="Hugging Face Hub id or folder, FILE.gguf, ID:FILE.gguf, or a PEFT adapter; "
        "open_clip:ARCH/PRETRAINED, timm:NAME, location:geoclip, location:satclip:FILE",
    )


def _loading_options(command: argparse.ArgumentParser) -> None:
    loading = command.add_argument_group("how the model is loaded")
    place = loading.add_mutually_exclusive_group()
    place.add_argument(
        "--device", type=_device, help="cpu, cuda or cuda:N (default: a GPU where there is one)"
    )
    place.add_argument(
        "--device-map", choices=["auto"],
        help="auto spreads the model over all GPUs, the main memory and the disk",
    )  # fmt: skip
    loading.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"],
        help="of the model (default: float32 on the CPU, the checkpoint's own elsewhere)",
    )  # fmt: skip
    loading.add_argument("--adapter", help="folder or Hub id of a PEFT adapter to put on")
    loading.add_argument(
        "--merge-adapter", action="store_true", help="add the adapter to the weights"
    )
    loading.add_argument(
        "--trust-remote-code", action="store_true",
        help="run the Python files that come with the model, which can do whatever you can",
    )  # fmt: skip


def _pairs_options(command: argparse.ArgumentParser, names: str) -> None:
    """What `steer` and `locate` share."""
    command.add_argument(
        "--run", type=Path, required=True, dest="folder", metavar="FOLDER",
        help="what probe wrote of this model: its probes say which dimensions hold the place",
    )  # fmt: skip
    command.add_argument(
        "--pairs", required=True, metavar="CSV",
        help="with columns source and target, ids of samples: the source is run and edited, the "
        "target's state or place is written into it",
    )  # fmt: skip
    data = command.add_argument_group("data")
    data.add_argument("--data", help="the samples (default: those of the run, read again)")
    _reading_options(data)
    data.add_argument("--prompt", help="one of the run's (default: its only one)")
    named = command.add_argument_group("what places are called", names)
    for level in _LEVELS:
        named.add_argument(f"--{level}", metavar="COLUMN", help=f"column of the {level}")
    how = command.add_argument_group("how it is edited")
    how.add_argument(
        "--role",
        help="which tokens: last, text, image, patch, cls, register or all (default: those that "
        "the probe's pool reads)",
    )
    how.add_argument(
        "--ranking", choices=["coef", "coef_std", "forward", "backward"],
        help="which dimensions come first, as for subspace (default: coef_std)",
    )  # fmt: skip
    how.add_argument(
        "--seed", type=_count_from_0, default=0, help="of random controls (default: 0)"
    )
    how.add_argument(
        "--batch-size", type=_count, default=32, help="inputs that run together (default: 32)"
    )


def _reading_options(data: argparse._ArgumentGroup) -> None:
    data.add_argument("--image", help="column of image paths")
    data.add_argument("--text", help="column of texts")
    data.add_argument("--id", help="column that names each sample (default: id, or the row)")
    data.add_argument("--latitude", default="latitude", help="column (default: %(default)s)")
    data.add_argument("--longitude", default="longitude", help="column (default: %(default)s)")


def _probe_options(probe: argparse.ArgumentParser) -> None:
    data = probe.add_argument_group("data")
    _reading_options(data)
    data.add_argument("--targets", nargs="+", metavar="COLUMN", help="regress these instead")
    data.add_argument("--group", help="also probe each value of this column on its own")
    data.add_argument("--strict", action="store_true", help="stop at the first bad sample")
    what = probe.add_argument_group("what is read")
    what.add_argument(
        "--sites", nargs="+", help="names or globs, as 'lm.layers.*' (default: all layers)"
    )
    what.add_argument(
        "--pool", nargs="+",
        help="how a sample's tokens become one row: cls, last, mean, max or min; mean:patch for "
        "one role; a+b for both side by side; each:patch makes every patch a row (default: the "
        "tower's own, which `geofast sites` prints)",
    )  # fmt: skip
    what.add_argument(
        "--prompt", nargs="+", help="of text, as 'The city of {text}'; or about images"
    )
    how = probe.add_argument_group("how it is scored")
    how.add_argument(
        "--split", nargs="+", default=["kfold"],
        help="kfold, kfold:10, blocks:15, group:COLUMN (default: kfold)",
    )  # fmt: skip
    how.add_argument(
        "--folds", type=_count, default=5, help="folds of a split that names none (default: 5)"
    )
    how.add_argument("--seed", type=int, default=42, help="of the folds (default: 42)")
    how.add_argument(
        "--control", nargs="+", default=[], choices=["random-weights", "pixels", "tokens"],
        help="also probe a twin of the model with random weights, or the input itself: 16 x 16 "
        "pixels of images, a bag of the tokens of texts",
    )  # fmt: skip
    how.add_argument("--alphas", nargs="+", type=float, help="penalties (default: 12, 0.1 to 1e4)")
    how.add_argument(
        "--select", choices=["loo", "gcv", "folds"],
        help="how alpha is chosen in each training part: exact leave-one-out, generalised "
        "cross-validation, or inner folds (default: loo where rows are kept, else gcv)",
    )  # fmt: skip
    how.add_argument(
        "--storage", choices=["auto", "rows", "gram"], default="auto",
        help="keep pooled rows, or only their statistics (gram), whose size is the same for any "
        "number of samples, but without predictions and kilometres (default: auto, rows while "
        "they fit a quarter of the memory)",
    )  # fmt: skip
    _loading_options(probe)
    run = probe.add_argument_group("running")
    run.add_argument(
        "--batch-size", type=_count,
        help="at most so many samples in a forward pass (default: by a budget of tokens)",
    )  # fmt: skip
    run.add_argument(
        "--workers",
        type=_count_from_0,
        help="processes that decode images ahead of the model (default: 1 for images, 0 for text)",
    )
    run.add_argument("--unchecked", action="store_true", help="go on where the model fails a check")
    run.add_argument("--overwrite", action="store_true", help="replace the run folder")


def _count(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least}, got {text!r}")
    return int(text)


def _count_from_0(text: str) -> int:
    return _count(text, 0)


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"write cpu, cuda or cuda:N, got {text!r}")
    return text


def _probe(o: argparse.Namespace) -> None:
    from . import _folder
    from .probe import probe

    out = o.out.expanduser().resolve()
    _folder.check_free(out, o.overwrite)  # before the forward pass, not after it
    with _whoever_listens():
        run = probe(o.model, **_arguments(o, _folder.above(out)), progress=True)
        run.save(o.out, overwrite=o.overwrite)
    _print(run, o.out)


def _plan(o: argparse.Namespace) -> None:
    from . import _folder
    from .forecast import plan

    scratch = o.out and _folder.above(o.out.expanduser().resolve())
    print(plan(o.model, **_arguments(o, scratch), progress=True))


def _arguments(o: argparse.Namespace, scratch: Path | None) -> dict[str, Any]:
    """Read the samples, and return what `probe` and `plan` take beside the model."""
    from .data import read
    from .geo.folds import parse_split
    from .models.location import of_places

    samples = read(
        o.data, image=o.image, text=o.text, location=of_places(o.model), latitude=o.latitude,
        longitude=o.longitude, id=o.id, strict=o.strict,
    )  # fmt: skip
    optional = {"targets": o.targets, "alphas": o.alphas}
    return {
        "data": samples, "sites": o.sites, "pool": o.pool, "prompts": o.prompt,
        "split": [parse_split(text, o.folds, o.seed) for text in o.split],
        "group": o.group, "select": o.select, "storage": o.storage, "batch_size": o.batch_size,
        "workers": o.workers, "scratch": scratch, "strict": o.strict, "check": not o.unchecked,
        "controls": o.control, **_loading(o),
        **{name: value for name, value in optional.items() if value},
    }  # fmt: skip


def _demo(o: argparse.Namespace) -> None:
    from . import _folder, demo

    out = o.out or Path("runs") / o.name
    make = getattr(demo, o.name.replace("-", "_"))
    if o.name.startswith("steer-"):
        _steer_demo(o, out, make)
        return
    _folder.check_free(out.expanduser().resolve(), o.overwrite)
    with _whoever_listens():
        run = make(o.samples, **({"alphas": o.alphas} if o.alphas else {}))
        run.save(out, overwrite=o.overwrite)
    _print(run, out)


def _steer_demo(o: argparse.Namespace, out: Path, make: Any) -> None:
    """Save a run, a sweep and experiments into folders of one, and print what edits change."""
    from . import _folder

    if o.alphas:
        raise ValueError("--alphas is of the demos that probe: satellite and cities")
    if out.is_dir() and any(out.iterdir()) and not o.overwrite:
        msg = f"{out} holds something already; pass --overwrite, or choose another path"
        raise FileExistsError(msg)
    _folder.check_free(out.expanduser().resolve() / "run", o.overwrite)
    with _whoever_listens():
        for name, part in make(o.samples):
            options = {} if name == "locate" else {"overwrite": o.overwrite}
            part.save(out / name, **options)
            if name != "run":
                print(f"\n{name}: {out / name}\n\n{part}\n")


def _sites(o: argparse.Namespace) -> None:
    from .models import describe, load
    from .tokens import explain

    model = load(o.model, **_loading(o))
    if o.example is None:
        print(describe(model))
    else:  # first, so that an example that cannot be read is told before all else
        said = explain(model, o.example or None)
        print(f"{describe(model)}\n\n{said}")


def _loading(o: argparse.Namespace) -> dict[str, Any]:
    import torch

    return {
        "device": o.device,
        "device_map": o.device_map,
        "dtype": getattr(torch, o.dtype) if o.dtype else None,
        "adapter": o.adapter,
        "merge": o.merge_adapter,
        "trust_remote_code": o.trust_remote_code,
    }


def _doctor(o: argparse.Namespace) -> None:
    from .data import read
    from .doctor import doctor
    from .models.location import of_places

    places = of_places(o.model)
    data = o.data and read(o.data, image=o.image, text=o.text, location=places)
    diagnosis = doctor(o.model, data=data, **_loading(o))
    print(diagnosis)
    if not diagnosis.ok:
        raise SystemExit(1)


def _subspace(o: argparse.Namespace) -> None:
    from .run import open as open_run
    from .subspace.store import check_free

    if o.out:
        check_free(o.out, o.overwrite)  # before the search, not after it
    with _whoever_listens():
        found = open_run(o.folder).subspace(
            fractions=o.fractions, split=o.split, sites=o.sites, rankings=o.rankings,
            random=o.random, seed=o.seed, protocol=o.protocol, progress=True,
        )  # fmt: skip
        out = found.save(o.out, overwrite=o.overwrite) if o.out else None
    if out:
        _print_pages(out, "subspace.html")
        print()
    print(found)


def _steer(o: argparse.Namespace) -> None:
    from . import _folder
    from .effects.experiment import steer
    from .subspace.store import refuse_run

    refuse_run(o.out)
    out = o.out.expanduser().resolve()
    if (out / "steering.json").exists() and not o.overwrite:
        msg = f"{out} holds an experiment already; pass --overwrite, or choose another path"
        raise FileExistsError(msg)
    if not (out / "steering.json").exists():
        _folder.check_free(out, overwrite=False)
    with _whoever_listens():
        found = steer(
            **_asked(o), site=o.site, shares=o.share, mode=o.mode, phase=o.phase,
            controls=[name.replace("-", " ") for name in o.control], names=_names(o) or None,
            keep="all" if o.all_pairs else "known", protocol=o.protocol,
            max_new_tokens=o.max_new_tokens, progress=True,
        )  # fmt: skip
        found.save(o.out, overwrite=o.overwrite)
    _print_pages(o.out, "report.html")
    print(f"\n{found}")


def _locate(o: argparse.Namespace) -> None:
    from .effects.locate import locate
    from .subspace.store import refuse_run

    if o.out:
        refuse_run(o.out)
        if o.out.expanduser().is_file():
            raise FileExistsError(f"{o.out} is a file: --out takes a folder")
    with _whoever_listens():
        found = locate(
            **_asked(o), names=_names(o) or {"country": "country"}, sites=o.sites, shares=o.share,
            modes=o.mode,
        )  # fmt: skip
        if o.out:
            found.save(o.out)
    print(found)


def _names(o: argparse.Namespace) -> dict[str, str]:
    return {level: column for level in _LEVELS if (column := getattr(o, level))}


def _asked(o: argparse.Namespace) -> dict[str, Any]:
    """Read the run and its samples, and return what both `steer` and `locate` take."""
    from .run import open as open_run

    run = open_run(o.folder)
    samples = _samples_of(o, run)
    return {
        "model": o.model, "data": samples, "pairs": o.pairs, "run": run, "prompt": o.prompt,
        "role": o.role, "ranking": o.ranking, "seed": o.seed, "batch_size": o.batch_size,
        **_loading(o),
    }  # fmt: skip


def _samples_of(o: argparse.Namespace, run: Any) -> Any:
    """Read the samples; without --data those of the run, which must be the ones that it had."""
    from .data import read

    source = o.data or run.info.get("sources", {}).get("data")
    if not source:
        raise ValueError(f"{o.folder} does not say where its samples lie: give --data")
    samples = read(
        source, image=o.image, text=o.text, latitude=o.latitude, longitude=o.longitude, id=o.id
    )
    strange = set(run.samples["id"].astype(str)) - set(samples.table["id"].astype(str))
    if strange and not o.data:
        raise ValueError(
            f"{source} has no sample {min(strange)!r}, and the run has: if it was read otherwise, "
            "say --id, --text or --image as then, or give --data"
        )
    return samples


def _show(o: argparse.Namespace) -> None:
    from .effects.outcome import open_steered
    from .run import open as open_run

    if (o.folder / "steering.json").exists():
        found = open_steered(o.folder)
        _print_pages(o.folder, "report.html")
        print(f"\n{found}")
        return
    if not (o.folder / "run.json").exists() and _show_search(o.folder):
        return
    inside = sorted({path.parent.name for path in o.folder.glob("*/*.json") if path.name in _SHOWN})
    if inside and not (o.folder / "run.json").exists():
        msg = f"{o.folder} holds no run itself: show one of those inside, {', '.join(inside)}"
        raise FileNotFoundError(msg)
    _print(open_run(o.folder), o.folder)


def _show_search(folder: Path) -> bool:
    """Print what `subspace`, `locate` or `patching` wrote; False when it is none of these."""
    if (folder / "subspace.safetensors").exists():
        from .subspace import Subspace

        searched = Subspace.open(folder)
        _print_pages(folder, "subspace.html")
        print(f"\n{searched}")
    elif (folder / "locate.json").exists():
        print(_located(folder))
    elif (folder / "patching.json").exists():
        raise ValueError(
            f"{folder} holds what patching found, which show does not print: its table is "
            "patching.csv, which pandas.read_csv opens"
        )
    else:
        return False
    return True


def _located(folder: Path) -> Any:
    import json

    import pandas as pd

    from . import _folder
    from .effects.locate import Located

    path = folder / "locate.json"
    with _folder.reading(path):
        info = json.loads(path.read_text(encoding="utf-8"))
    return Located(pd.read_csv(folder / "locate.csv"), info)


def _print(run: Any, folder: Path) -> None:
    from .report import text

    for line in text.skipped(run):
        print(text.fill(line, "  "))
    _print_pages(folder, "report.html")
    print(f"\n{run.summary()}")


def _print_pages(folder: Path, page: str) -> None:
    for path in [*sorted(folder.glob("*.png")), folder / page]:
        if path.exists():
            print(path)
