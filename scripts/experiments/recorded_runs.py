"""Experiments of many runs, each recorded when it is done: an interrupted one goes on there."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gptlite.device import processor_name
from gptlite.files import as_json, check_can_write, write_atomically
from gptlite.results import FOLDER, runs


class RecordedRuns:
    """A record of runs by name, with the parameters that all of them share.

    `results.runs` reads it. A file with other parameters is refused in a ValueError that names
    the first difference, and stays as it is; `fresh` begins a new record in its place when
    there is something to write.
    """

    def __init__(self, path: Path, command: str, fresh: bool = False, **parameters: Any):
        check_can_write(path)
        self.path, self.command = path, command
        parameters = as_json(parameters, "the parameters")
        self.record = {"command": command, **parameters, "runs": {}}
        if path.exists() and not fresh:
            self.record = runs(path.stem, path.parent)
            for name, there, here in _differences(self.record, parameters):
                raise ValueError(
                    f"{path} was recorded with {name} {there}, but it is {here} now; name "
                    "another --out, or overwrite the record with --fresh."
                )

    def run(self, name: str, do: Callable[[], dict], **machine: str) -> dict:
        """What is recorded under a name; if there is nothing yet, `do` does it.

        `machine` says what else ran it. A run on another machine than the first one's carries
        its own.
        """
        done = self.record["runs"]
        if name not in done:
            found = do()
            device = machine.pop("device", None) or processor_name(torch.device("cpu"))
            mine = {"device": device, "torch": torch.__version__, **machine}
            if self.record.setdefault("machine", mine) != mine:
                found = {**found, "machine": mine}
            done[name] = found
            self.record |= {"command": self.command, "date": time.strftime("%Y-%m-%d")}
            self.write()
        return done[name]

    def write(self) -> None:
        """Write the file, which appears whole or not at all."""
        write_atomically(self.path, (json.dumps(self.record, indent=1) + "\n").encode())


def _differences(there: dict, here: dict, outer: str = "") -> Iterator[tuple[str, str, str]]:
    """Names of the parameters that are not as recorded, with both values."""
    for name, value in here.items():
        if name not in there:
            yield outer + name, "not named", json.dumps(value)
        elif isinstance(value, dict) and isinstance(there[name], dict):
            yield from _differences(there[name], value, f"{name}.")
        elif there[name] != value:
            yield outer + name, json.dumps(there[name]), json.dumps(value)


def options(about: str, record: str, steps: int) -> argparse.ArgumentParser:
    """The options that every experiment has; `record` is where its runs are, by default."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--out", type=Path, default=FOLDER / f"{record}.json")
    parser.add_argument(
        "--fresh", action="store_true", help="overwrite a record with other parameters"
    )
    return parser


def in_a_sentence(main: Callable[[], None]) -> None:
    """Run a script; what it refuses ends it with a sentence instead of a trace."""
    try:
        main()
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
