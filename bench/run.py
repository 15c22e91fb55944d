"""Run the benchmarks and print, for every job, what each way costs beside geofast.

python bench/run.py              run all, print the tables, write them to bench/results/
python bench/run.py FILE         run one file, likewise
python bench/run.py -k pool      run some, print only
python bench/run.py --compare    show pytest-benchmark's comparison of the last two runs
"""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
STORE = f"--benchmark-storage=file://{RESULTS / 'runs'}"


def main(arguments):
    if "--compare" in arguments:
        saved = sorted((RESULTS / "runs").rglob("*.json"), key=lambda p: p.name)[-2:]
        if len(saved) < 2:
            sys.exit("two saved runs are needed: call `make bench` at both commits")
        compare = [
            "compare",
            *map(str, saved),
            "--group-by=fullname",
            "--columns=median,iqr,rounds",
        ]
        return subprocess.call(
            [Path(sys.executable).with_name("pytest-benchmark"), STORE, *compare]
        )
    files = [a for a in arguments if a.endswith(".py")] or [str(HERE)]
    options = [a for a in arguments if not a.endswith(".py")]
    RESULTS.mkdir(exist_ok=True)
    pytest = [Path(sys.executable).with_name("pytest"), *files, "-q", "-W", "default", *options]
    code = subprocess.call([*pytest, "--benchmark-autosave", "--benchmark-quiet", STORE])
    saved = sorted((RESULTS / "runs").rglob("*.json"), key=lambda p: p.stat().st_mtime)
    if not saved:
        return code
    report = json.loads(saved[-1].read_text())
    folder = RESULTS / name_of(report)
    folder.mkdir(exist_ok=True)
    for name, members in by_file(report).items():
        text = f"Measured on {machine(report)}.\n\n{table(members)}"
        print(text)
        if not options:  # all of the file was run
            (folder / f"{name}.md").write_text(text)
    return code


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
            select = f" ({b['param']})" if b.get("param") and b is not members[0] else ""
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
