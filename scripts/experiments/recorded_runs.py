"""Experiments of many runs, each recorded when it is done: one that was interrupted goes on where it was."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptlite.device import processor_name
from gptlite.files import write_atomically


class RecordedRuns:
    """A JSON file of runs by name, with the facts that are the same for all of them, the machine and the date.

    A file with other facts, such as another command, is begun anew.
    """

    def __init__(self, path: Path, **facts: Any):
        facts = json.loads(json.dumps(facts))  # as they will be read back
        there = json.loads(path.read_text()) if path.exists() else {}
        same = {key: there.get(key) for key in facts} == facts
        self.path, self.record = path, there if same else {**facts, "runs": {}}

    def run(self, name: str, do: Callable[[], dict], **machine: str) -> dict:
        """What is recorded under a name; if there is nothing yet, `do` does it. `machine` says what else ran it."""
        runs = self.record["runs"]
        if name not in runs:
            runs[name] = do()
            device = machine.pop("device", None) or processor_name(torch.device("cpu"))
            self.record["machine"] = {"device": device, "torch": torch.__version__, **machine}
            self.record["date"] = time.strftime("%Y-%m-%d")
            self.write()
        return runs[name]

    def write(self) -> None:
        """Write the file, which appears whole or not at all."""
        write_atomically(self.path, (json.dumps(self.record, indent=1) + "\n").encode())
