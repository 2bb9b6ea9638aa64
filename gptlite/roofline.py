"""What a machine can do in a second, and so how long a counted cost takes on it.

The roofline (Williams, Waterman and Patterson, 2009): data is moved while arithmetic is done,
so the slower of the two sets the time. Launching an operator has a price of its own, which
rules where the operators are small.
"""

import json
import math
import os
import time
from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import device as Device  # under another name: inside Machine `torch` is a field
from torch import dtype as Dtype
from torch import float32

from gptlite import calibration
from gptlite.costs import Cost, decode_cost
from gptlite.device import pick_device, processor_name
from gptlite.files import write_atomically
from gptlite.model import GPTConfig
from gptlite.units import quantity

CALIBRATED_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Machine:
    """A machine's rates in calibration: bytes/s, FLOP/s by dtype, seconds an operator launched.

    `read_bandwidth` is the roof, the best that any kernel tried reached over memory
    (`read_kernel` names it). `matvec` holds what decoding's own operator, one row through
    `F.linear`, reached: pairs of working set and bytes/s. `flops` is the rate of large square
    products, `linear` what `F.linear` reached with fewer rows: pairs of rows and FLOP/s.
    """

    name: str
    device: str  # "cpu" or "cuda"
    threads: int
    read_bandwidth: float
    read_kernel: str
    matvec: list[list[float]]
    flops: dict[str, float]
    overhead: float
    date: str
    torch: str
    linear: dict[str, list[list[float]]] = field(default_factory=dict)

    def __post_init__(self):
        rates = {"read_bandwidth": self.read_bandwidth, "overhead": self.overhead, **self.flops}
        rates["threads"] = self.threads
        rates |= {f"matvec at {size} bytes": rate for size, rate in self.matvec}
        for kind, pairs in self.linear.items():
            rates |= {f"linear in {kind} at {n} rows": rate for n, rate in pairs}
        for name, rate in rates.items():
            if not 0 < rate < math.inf:
                raise ValueError(f"{name} is {rate}, but must be above 0.")
        if not self.matvec:
            pair = "pair of a working set and its bandwidth"
            raise ValueError(f"matvec is empty, but must hold at least one {pair}.")

    @classmethod
    def calibrate(cls, device: Device | None = None, quick: bool = False) -> "Machine":
        """Measure this machine; `quick` is rougher. Other work under way spoils it.

        Several programs can share a calibration: where $GPTLITE_CALIBRATION names a file, what
        was measured with the same processor, threads and torch is read from it, or else added.
        """
        device = pick_device() if device is None else torch.device(device)
        if not (file := os.environ.get("GPTLITE_CALIBRATION")):
            return cls._measure(device, quick)
        key = f"{processor_name(device)}, {torch.get_num_threads()} threads"
        key += f", torch {torch.__version__}{', quick' * quick}"
        known = _read_calibrations(Path(file))
        if key not in known:
            known[key] = asdict(cls._measure(device, quick))
            write_atomically(Path(file), json.dumps(known, indent=1).encode())
        return cls.from_json(json.dumps(known[key]))

    @classmethod
    def _measure(cls, device: Device, quick: bool) -> "Machine":
        """The machine, measured now."""
        repeats, tries = (3, 3) if quick else (15, 9)
        dtypes = {name: getattr(torch, name) for name in CALIBRATED_DTYPES}
        # next to nothing but launches
        tiny = GPTConfig(n_layer=4, n_head=1, n_embd=8, block_size=8, vocab_size=8)
        with torch.inference_mode():
            # launches are timed in an instant, and a slow moment outlasts it: so at three
            # moments, and the least counts
            ops = decode_cost(tiny, 1).ops
            launches = [calibration.step_seconds(tiny, device, repeats) / ops]
            bandwidth, kernel = calibration.read_bandwidth(device, repeats)
            launches.append(calibration.step_seconds(tiny, device, repeats) / ops)
            # a GPU's launches run ahead of its work and are not in its times
            waited = 0.0 if device.type == "cuda" else min(launches)
            matvec = calibration.matvec_bandwidths(device, repeats, waited)
            # the roof is above all that was seen, also when a slow moment lowered it
            if matvec[-1][1] > bandwidth:
                bandwidth, kernel = matvec[-1][1], "F.linear"
            flops = {n: calibration.gemm_rate(d, device, tries) for n, d in dtypes.items()}
            linear = {
                name: calibration.linear_rates(dtypes[name], device, tries, waited)
                for name, rate in flops.items()
                if rate > flops["float32"] / 10  # the others are emulated
            }
            launches.append(calibration.step_seconds(tiny, device, repeats) / ops)
        return cls(
            name=processor_name(device),
            device=device.type,
            threads=torch.get_num_threads(),
            read_bandwidth=bandwidth,
            read_kernel=kernel,
            matvec=matvec,
            flops=flops,
            overhead=min(launches),
            date=time.strftime("%Y-%m-%d"),
            torch=torch.__version__,
            linear=linear,
        )

    def matvec_bandwidth(self, working_set: float) -> float:
        """Bytes/s at which `F.linear` streams weights for one row.

        Between two uses of a weight `working_set` bytes pass: what fits into the processor's
        cache is read again from there, faster than memory gives it. Interpolated over the
        logarithm of the size; outside the sizes measured, the nearest.
        """
        return _interpolate(self.matvec, working_set)

    def linear_rate(self, rows: int, dtype: Dtype = float32) -> float:
        """FLOP/s at which `F.linear` multiplies `rows` rows with weights that come from memory.

        Interpolated over the logarithm of the rows; outside the numbers measured, the nearest;
        where none was measured, `flops`.
        """
        kind = _calibrated(self, dtype)
        pairs = self.linear.get(kind)
        return _interpolate(pairs, rows) if pairs else self.flops[kind]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Machine":
        """What `to_json` wrote; a ValueError says what is wrong with anything else."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"this is not a machine's calibration ({error}).") from None


def _interpolate(pairs: list[list[float]], x: float) -> float:
    """The second number of pairs at x, interpolated over log x; outside, the nearest."""
    places, values = zip(*pairs, strict=True)
    i = bisect_right(places, x)
    if i in (0, len(places)):
        return values[min(i, len(places) - 1)]
    share = math.log(x / places[i - 1]) / math.log(places[i] / places[i - 1])
    return values[i - 1] + share * (values[i] - values[i - 1])


def _read_calibrations(file: Path) -> dict[str, Any]:
    """Calibrations kept in a file, none if it is not there; a ValueError if it holds others."""
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{file} is no file of calibrations ({error}); delete it.") from None
    if not isinstance(known, dict):
        kind = type(known).__name__
        raise ValueError(f"{file} is no file of calibrations (it holds a {kind}); delete it.")
    return known


def _calibrated(machine: Machine, dtype: torch.dtype) -> str:
    """The name of a dtype that the machine is calibrated for."""
    kind = str(dtype).removeprefix("torch.")
    if kind not in machine.flops:
        known = ", ".join(machine.flops)
        raise ValueError(f"{machine.name} is not calibrated for {kind}; it is for {known}.")
    return kind


@dataclass(frozen=True)
class Prediction:
    """Seconds predicted, their three terms, and the largest's name: the one that `binds`."""

    seconds: float
    memory: float
    compute: float
    overhead: float
    binds: str

    def __str__(self) -> str:
        return f"{quantity(self.seconds, 's')}, bound by {self.binds}"


def predict(
    cost: Cost,
    machine: Machine,
    dtype: torch.dtype = torch.float32,
    bandwidth: float | None = None,
    rate: float | None = None,
) -> Prediction:
    """How long `cost` takes on `machine` at best.

    Sharper with `bandwidth` (bytes/s) and `rate` (FLOP/s) of the operators that do the work.
    """
    kind = _calibrated(machine, dtype)
    memory = cost.bytes / (bandwidth or machine.read_bandwidth)
    compute = cost.flops / (rate or machine.flops[kind])
    overhead = cost.ops * machine.overhead
    terms = {"memory": memory, "compute": compute, "overhead": overhead}
    # a CPU launches and works in turns; a GPU works through a queue that is filled ahead of it,
    # so the two overlap
    work = max(memory, compute)
    seconds = max(overhead, work) if machine.device == "cuda" else overhead + work
    return Prediction(seconds, memory, compute, overhead, max(terms, key=terms.__getitem__))
