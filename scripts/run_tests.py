"""Run the tests part by part, and say how long each part took.

python scripts/run_tests.py            all tests, and the chapters that changed
python scripts/run_tests.py --all      all tests, and every chapter
python scripts/run_tests.py --check    what needs no site, no browser and no chapter executed

A chapter is executed if what made its outputs changed (scripts/notebooks/digests.py), and one
that did not change is executed in turn: each day another. Chapters run one at a time and alone,
since they measure; everything else runs in two processes. A part that fails ends none of the
others.
"""

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "notebooks"))

import digests
import notebook_files

ROOT = notebook_files.ROOT
QUICK = "not site and not browser and not notebook and not slow"
TWO_PROCESSES = ["-n", "2", "--dist", "loadfile"]
NBVAL = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=900", "-p", "no:xdist"]


@dataclass(frozen=True)
class Part:
    """A command of the tests: what it is called, and what its environment has besides."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def run(self) -> bool:
        """Whether the command ended well; its output is shown as it comes."""
        print(f"\n=== {self.name}", flush=True)
        environment = {**os.environ, **self.environment}
        return not subprocess.run(self.command, cwd=ROOT, env=environment).returncode


def python(*arguments: str) -> list[str]:
    """A command for the Python that runs this."""
    return [sys.executable, *arguments]


def quick_parts() -> list[Part]:
    """What reads the code without running it, and the notebooks without executing them."""
    return [
        Part("ruff check", python("-m", "ruff", "check", ".")),
        Part("ruff format", python("-m", "ruff", "format", "--check", ".")),
        Part("mypy", python("-m", "mypy")),
        Part("stored notebooks", python("scripts/notebooks/check_notebooks.py")),
    ]


def all_parts(chapters: list[Path], calibration: Path) -> list[Part]:
    """Every test, and some chapters, which share one calibration of the machine."""
    paths = [str(path.relative_to(ROOT)) for path in chapters]
    return [
        *quick_parts(),
        Part("book", python("scripts/site/build_book.py", "_build/html")),
        Part("tests", python("-m", "pytest", *TWO_PROCESSES, "--durations=12", "tests")),
        Part(
            "chapters",
            python("-m", "pytest", *NBVAL, "--durations=5", *paths),
            {"GPTLITE_CALIBRATION": str(calibration)},
        ),
    ]


def reasons(paths: list[Path]) -> dict[Path, list[str]]:
    """What changed of each chapter since it was executed, if anything."""
    notebooks = {path: notebook_files.read(path) for path in paths}
    return {
        path: digests.changes(digests.stored(notebook), digests.made_from(notebook))
        for path, notebook in notebooks.items()
    }


def in_turn(changed: dict[Path, list[str]], day: int) -> Path | None:
    """The chapter that did not change and has its turn on a day; None if all changed."""
    paths = list(changed)
    first = day % len(paths)
    return next((path for path in paths[first:] + paths[:first] if not changed[path]), None)


def chosen(changed: dict[Path, list[str]], day: int, every: bool = False) -> dict[Path, str]:
    """The chapters to execute, each with the reason why."""
    turn = in_turn(changed, day)
    found = {}
    for path, why in changed.items():
        if why:
            found[path] = shortened(why)
        elif every:
            found[path] = "nothing changed, but all are executed"
        elif path == turn:
            found[path] = "nothing changed, but it is its turn today"
    return found


def shortened(why: list[str], most: int = 3) -> str:
    """The first of many reasons, and how many more there are."""
    more = [f"{len(why) - most} more"] if len(why) > most else []
    return ", ".join([*why[:most], *more])


def announce(changed: dict[Path, list[str]], executed: dict[Path, str]) -> None:
    """Print which chapters are executed, and why the others are not."""
    print("Chapters to execute:")
    for path, why in executed.items():
        print(f"  {path.stem}: {why}.")
    others = [path.stem for path in changed if path not in executed]
    if others:
        print(f"Not executed, as nothing that made their outputs changed: {', '.join(others)}.")
        print("(`make test-all` executes every chapter.)")


def report(times: dict[str, tuple[float, bool]]) -> None:
    """Print how long each part took, and which failed."""
    print("\nTime of each part")
    for name, (seconds, well) in times.items():
        print(f"  {name:18}{seconds:7.0f} s{'' if well else '   FAILED'}")
    print(f"  {'all':18}{sum(seconds for seconds, _ in times.values()):7.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 if every part ended well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="execute every chapter")
    which.add_argument("--check", action="store_true", help="execute none, and open no page")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if options.check:
            quick = python("-m", "pytest", *TWO_PROCESSES, "-q", "-m", QUICK, "tests")
            parts = [*quick_parts(), Part("tests", quick)]
        else:
            changed = reasons(notebook_files.find([]))
            executed = chosen(changed, datetime.date.today().toordinal(), options.all)
            announce(changed, executed)
            parts = all_parts(list(executed), Path(folder) / "calibration.json")
        times = {}
        for part in parts:
            started = time.perf_counter()
            well = part.run()
            times[part.name] = (time.perf_counter() - started, well)
    report(times)
    return 0 if all(well for _, well in times.values()) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"run_tests: {error}")
