"""Recorded measurements, one file a machine, and the table that sets a reader's beside them."""

import json
import math
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gptlite.bench import Ratio, Timing
from gptlite.files import ASSETS, write_atomically
from gptlite.roofline import Machine
from gptlite.units import quantity, three_digits

FOLDER = ASSETS / "results"


@dataclass(frozen=True)
class Measurement:
    """One measured number with its quartiles, and the unit, command, date and context of it."""

    # what was measured, as the table prints it; its name in the file of its machine
    metric: str
    value: float
    low: float
    high: float
    unit: str  # "s", "bytes", "x" for a ratio, or any other, such as "tokens/s"
    command: str = ""  # what to run to measure it again
    date: str = ""
    torch: str = ""
    context: dict[str, Any] = field(default_factory=dict)  # dtype, batch, context length, ...

    def __post_init__(self):
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        for name, number in numbers.items():
            real = isinstance(number, (int, float)) and not isinstance(number, bool)
            if not (real and math.isfinite(number)):
                raise ValueError(
                    f"the {name} of {self.metric!r} is {number!r}, but must be a finite number."
                )
        if not self.low <= self.value <= self.high:
            raise ValueError(
                f"{self.metric!r} has {self.value} outside its spread, "
                f"{self.low} to {self.high}."
            )
        if not all(isinstance(text, str) and text for text in (self.metric, self.unit)):
            raise ValueError(
                f"a measurement has metric {self.metric!r} and unit {self.unit!r}, but both "
                "must be names."
            )


def measurement(
    metric: str,
    measured: Timing | Ratio | float,
    unit: str = "",
    command: str = "",
    **context: Any,
) -> Measurement:
    """A `Measurement` of a timing in seconds, of a ratio, or of a number without spread.

    Of such a number the unit must be given.
    """
    if isinstance(measured, (Timing, Ratio)):
        unit = unit or ("s" if isinstance(measured, Timing) else "x")
        value, low, high = measured.median, measured.low, measured.high
    else:
        value = low = high = measured
    return Measurement(metric, value, low, high, unit, command, context=context)


@dataclass(frozen=True)
class Results:
    """A machine, as calibrated when it was last recorded, and its measurements by metric."""

    machine: Machine
    measurements: dict[str, Measurement]


def machine_title(machine: Machine) -> str:
    """The machine in a table's heading: processor and threads, or GPU."""
    if machine.device == "cuda":
        return machine.name
    return f"{machine.name}, {machine.threads} thread{'s' if machine.threads > 1 else ''}"


def record(
    machine: Machine, measurements: Iterable[Measurement], folder: Path = FOLDER
) -> Path:
    """Add measurements to the machine's file, and return its path.

    Each takes the place of an older one of its metric, with today's date and the torch release
    beside it. The file appears whole or not at all.
    """
    stem = re.sub(r"[^a-z0-9]+", "-", machine_title(machine).lower()).strip("-")
    path = folder / f"{stem}.json"
    known = _read(path).measurements if path.exists() else {}
    today = time.strftime("%Y-%m-%d")
    known |= {m.metric: replace(m, date=today, torch=machine.torch) for m in measurements}
    content = {"machine": asdict(machine), "measurements": [asdict(m) for m in known.values()]}
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return path


def load(folder: Path = FOLDER) -> dict[str, Results]:
    """All recorded results by the stem of their file; a ValueError names one that is broken."""
    return {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}


def runs(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """The record of an experiment of many runs, such as "distillation/students".

    Under "runs" it has what each run found, by the run's name; beside them the "command" that
    made them, their "machine" and "date", and the parameters that all of them share. What
    writes it is `RecordedRuns` in scripts/experiments. A FileNotFoundError names the records
    that there are, and a ValueError says what is wrong with a file that is not whole.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        records = (p.relative_to(folder).with_suffix("") for p in folder.glob("*/*.json"))
        known = sorted(record.as_posix() for record in records)
        raise FileNotFoundError(
            f"there is no record {path}; known are {', '.join(known) or 'none'}."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON and broken UTF-8 are ValueErrors
        raise ValueError(f"{path} is not a record of runs ({error}).") from None
    if not isinstance(content, dict) or not isinstance(content.get("runs"), dict):
        raise ValueError(f"{path} is not a record of runs (it has no runs).")
    for key in ("command", "machine", "date"):
        if key not in content:
            raise ValueError(f"{path} is not a record of runs (it has no {key}).")
    return content


def _read(path: Path) -> Results:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        machine = Machine.from_json(json.dumps(content["machine"]))
        measurements = [Measurement(**m) for m in content["measurements"]]
    except KeyError as error:
        raise ValueError(f"{path} is not a results file (it has no {error}).") from None
    except (ValueError, TypeError) as error:  # broken JSON and broken UTF-8 are ValueErrors
        raise ValueError(f"{path} is not a results file ({error}).") from None
    by_metric = {m.metric: m for m in measurements}
    if len(by_metric) < len(measurements):
        raise ValueError(f"{path} is not a results file (a metric is in it twice).")
    return Results(machine, by_metric)


def beside_the_book(
    machine: Machine,
    measurements: Iterable[Measurement],
    recorded: dict[str, Results] | None = None,
) -> str:
    """A Markdown table of measurements made here beside the same metrics in the book's records.

    It has a column for each recorded machine that has one of them, and in it how many times as
    much was measured here. What was measured here may be one of the records itself, as on the
    book's pages: then it stands beside the others, and not beside itself.
    """
    here = {m.metric: m for m in measurements}
    recorded = load() if recorded is None else recorded
    others = [r for r in recorded.values() if here.keys() & r.measurements.keys()]
    own = [r for r in others if _is_record(machine, here, r)]
    others = [r for r in others if r not in own]
    whose = "the book's" if own else "here"
    rows = [
        ["", f"{whose}: {machine_title(machine)}", *(machine_title(r.machine) for r in others)],
        ["---"] + ["---:"] * (1 + len(others)),
    ]
    for metric, mine in here.items():
        theirs = [_beside(mine, r.measurements.get(metric), not own) for r in others]
        rows.append([metric, quantity(mine.value, mine.unit), *theirs])
    lines = (" | ".join(cell.replace("|", r"\|") for cell in row) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


def _is_record(machine: Machine, here: dict[str, Measurement], other: Results) -> bool:
    """Whether what was measured here has been recorded just so, as when the book is made."""
    if not here or machine_title(machine) != machine_title(other.machine):
        return False
    theirs = (other.measurements.get(metric) for metric in here)
    return all(
        r is not None and (m.value, m.low, m.high, m.unit) == (r.value, r.low, r.high, r.unit)
        for m, r in zip(here.values(), theirs, strict=True)
    )


def _beside(mine: Measurement, other: Measurement | None, compare: bool) -> str:
    if other is None:
        return "not recorded"
    if mine.unit != other.unit:
        raise ValueError(
            f"{mine.metric!r} is in {mine.unit} here, but was recorded in {other.unit}."
        )
    there = quantity(other.value, other.unit)
    if not (compare and other.value):
        return there
    return f"{there} (here {three_digits(mine.value / other.value)}x)"
