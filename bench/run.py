"""Run the benchmarks and print, for every job, what each way costs beside geofast.

python bench/run.py              run all, print the tables, write them to bench/results/
python bench/run.py FILE         run one file, likewise
python bench/run.py -k pool      run some, print only
python bench/run.py --compare    show pytest-benchmark's comparison of the last two whole runs
                                 of the same benchmarks
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
STORE = f"--benchmark-storage=file://{RESULTS / 'runs'}"


def main(arguments):
    if "--compare" in arguments:
        return compare()
    files = [a for a in arguments if a.endswith(".py")] or [str(HERE)]
    options = [a for a in arguments if not a.endswith(".py")]
    code, report = run(files, options)
    if report is None:
        print("no benchmark was run, so there is no table", file=sys.stderr)
        return code or 1
    for name, members in by_file(report).items():
        text = f"Measured on {machine(report)}.\n\n{table(members)}"
        print(text)
        if not options:  # all of the file was run
            folder = RESULTS / name_of(report)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.md").write_text(text)
    return code


def run(files, options):
    """Return pytest's exit code and its report, None if nothing was measured.

    A run with options may lack benchmarks: it is not kept, so nothing is compared with it.
    """
    pytest = [Path(sys.executable).with_name("pytest"), *files, "-q", "-W", "default", *options]
    keep = [] if options else ["--benchmark-autosave", STORE]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        code = subprocess.call([*pytest, "--benchmark-quiet", f"--benchmark-json={path}", *keep])
        return code, json.loads(path.read_text()) if path.exists() else None


def compare():
    """Show what changed between the last two runs of the same benchmarks."""
    saved = last_alike((RESULTS / "runs").rglob("*.json"))
    if saved is None:
        sys.exit(
            "two saved runs of the same benchmarks are needed: call `make bench` at both commits"
        )
    command = [Path(sys.executable).with_name("pytest-benchmark"), STORE, "compare"]
    options = ["--group-by=fullname", "--columns=median,iqr,rounds"]
    return subprocess.call([*command, *map(str, saved), *options])


def last_alike(paths):
    """Return the newest two reports of one machine with the same benchmarks, the older first."""
    reports = [(json.loads(path.read_text()), path) for path in paths]
    later = {}
    for report, path in sorted(reports, key=lambda r: r[0]["datetime"], reverse=True):
        alike = path.parent, frozenset(b["fullname"] for b in report["benchmarks"])
        if alike in later:
            return path, later[alike]
        later[alike] = path
    return None


def by_file(report):
    """Return benchmarks by the file that they stand in."""
    files = {}
    for b in report["benchmarks"]:
        files.setdefault(Path(b["fullname"].partition("::")[0]).stem, []).append(b)
    return files


def table(benchmarks):
    """Return Markdown tables: by job, seconds a layer and the ratio to geofast's first way."""
    lines, groups = [], {}
    for b in benchmarks:
        groups.setdefault(b["group"] or b["name"], []).append(b)
    for group, members in groups.items():
        lines += [f"**{group}**", "", "| way | milliseconds | ratio | note |", "|---|---|---|---|"]
        first = seconds(members[0])
        for b in members:
            name = b["name"].split("[")[0].removeprefix("test_").replace("_", " ")
            # The group says the other parameters.
            select = f" ({b['params']['select']})" if "select" in (b["params"] or {}) else ""
            note = "; ".join(f"{k} {v}" for k, v in b["extra_info"].items() if k != "layers")
            lines.append(
                f"| {name}{select} | {1e3 * seconds(b):,.3g} | {seconds(b) / first:.3g} | {note} |"
            )
        lines.append("")
    return "\n".join(lines)


def seconds(b):
    """Return the median, a layer where the job has several."""
    return b["stats"]["median"] / b["extra_info"].get("layers", 1)


def processor(report):
    info = report["machine_info"]
    cpu = info.get("cpu", {})
    return f"{cpu.get('count', '?')} x {cpu.get('brand_raw', info['processor'])}"


def name_of(report):
    """Return the machine's name for a file."""
    return "-".join(re.findall(r"\w+", processor(report).lower()))


def machine(report):
    info = report["machine_info"]
    parts = [
        processor(report),
        f"Python {info['python_version']}",
    ]
    parts += [f"{name} {version(name)}" for name in ("torch", "numpy", "scikit-learn", "himalaya")]
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
