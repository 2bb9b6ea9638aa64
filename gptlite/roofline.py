"""What a step costs in bytes, FLOPs and launches, what a machine can do of each in a second, and so how long it takes.

The roofline (Williams, Waterman and Patterson, 2009): data is moved while arithmetic is done, so the slower of the two
sets the time. Launching an operator has a price of its own, which rules where the operators are small.
"""

import json
import math
import time
from bisect import bisect_right
from dataclasses import asdict, dataclass, field

import torch

from gptlite import calibration
from gptlite.bench import three_digits, time_unit
from gptlite.device import pick_device, processor_name
from gptlite.model import GPTConfig

CALIBRATED_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Cost:
    """Bytes read and written, floating-point operations, and operators launched; costs add up."""

    bytes: int = 0
    flops: int = 0
    ops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops, self.ops + other.ops)

    @property
    def intensity(self) -> float:
        """FLOPs for each byte: what decides whether memory or arithmetic sets the time."""
        return self.flops / self.bytes


def operator_costs(
    config: GPTConfig,
    Tq: int,
    Tk: int,
    B: int = 1,
    dtype: torch.dtype = torch.float32,
    last_only: bool = True,
    cache: bool = True,
) -> dict[str, Cost]:
    """The cost of each operator, over all layers, when the model reads the last Tq of Tk tokens of B sequences.

    An operator reads its inputs, weights included, and writes its output once. A multiply-add is 2 FLOPs; only matrix
    products count, since what is done number by number is little beside them. Attention is one fused operator over the
    whole rectangle Tq x Tk, as PyTorch counts it: a kernel that skips what the causal mask hides does up to half less
    of it when Tq = Tk. The mask that `sdpa_attention` builds when 1 < Tq < Tk is not counted.
    """
    _check(config, Tq, Tk, B)
    L, C, V, KV = config.n_layer, config.n_embd, config.vocab_size, config.kv_heads * config.head_dim
    A, hidden = config.n_head * config.head_dim, config.hidden  # A is C, unless heads have been taken out
    size, tokens = dtype.itemsize, B * Tq
    last = B if last_only else tokens  # positions whose logits are wanted

    def linear(rows: int, wide: int, out: int, bias: bool = True, times: int = L) -> Cost:
        numbers = (wide + bias) * out + rows * (wide + out)  # weights once, however many rows; each row in and out
        return Cost(times * numbers * size, times * 2 * rows * wide * out, times)

    def elementwise(numbers: int, times: int = L) -> Cost:
        return Cost(times * numbers * size, 0, times)

    gathered = 4 * tokens * C + 3 * Tq * C  # both kinds of rows read, written, read by the sum; the sum written
    indices = 8 * (tokens + 2 * Tq)  # int64: tokens read, positions written and read
    appended = 2 * 2 * tokens * KV if cache else 0  # new keys and values, read and written into the cache
    attended = 2 * tokens * A + 2 * B * Tk * KV  # queries in, answers out; all keys and values, once for a group
    return {
        "embedding": Cost(gathered * size + indices, 0, 4),
        "layer_norm": elementwise(2 * C + 2 * tokens * C, 2 * L) + elementwise(2 * C + 2 * last * C, 1),
        "c_attn": linear(tokens, C, A + 2 * KV),
        "attention": Cost(L * (appended + attended) * size, L * 4 * B * Tq * Tk * A, L * (3 if cache else 1)),
        "attn.c_proj": linear(tokens, A, C),
        "c_fc": linear(tokens, C, hidden),
        "gelu": elementwise(2 * tokens * hidden),
        "mlp.c_proj": linear(tokens, hidden, C),
        "residual": elementwise(3 * tokens * C, 2 * L),  # two numbers in, their sum out
        "lm_head": linear(last, C, V, bias=False, times=1),
    }


def prefill_cost(config: GPTConfig, T: int, B: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
    """The cost of reading a prompt of T tokens into a cache, with the logits of its last token alone."""
    return sum(operator_costs(config, T, T, B, dtype).values(), Cost())


def decode_cost(config: GPTConfig, context: int, B: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
    """The cost of one token with a cache, when `context` tokens, itself included, are attended to."""
    return sum(operator_costs(config, 1, context, B, dtype).values(), Cost())


def naive_cost(config: GPTConfig, context: int, B: int = 1, dtype: torch.dtype = torch.float32) -> Cost:
    """The cost of one token without a cache: all of `context` is computed anew."""
    return sum(operator_costs(config, context, context, B, dtype, cache=False).values(), Cost())


def _check(config: GPTConfig, Tq: int, Tk: int, B: int) -> None:
    if B < 1:
        raise ValueError(f"B is {B}, but must be at least 1.")
    if not 1 <= Tk <= config.block_size:
        raise ValueError(f"the context is {Tk} tokens, but must be from 1 to block_size = {config.block_size}.")
    if not 1 <= Tq <= Tk:
        raise ValueError(f"there are {Tq} queries, but from 1 to the context's {Tk} are possible.")


@dataclass(frozen=True)
class Machine:
    """What a machine did in calibration: bytes/s, FLOP/s by dtype, and seconds for each operator launched.

    `read_bandwidth` is the roof, the best that any kernel tried reached over memory (`read_kernel` names it). `matvec`
    holds what decoding's own operator, one row through `F.linear`, reached: pairs of working set and bytes/s. `flops`
    is the rate of large square products, `linear` what `F.linear` reached with fewer rows: pairs of rows and FLOP/s.
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
        rates |= {"threads": self.threads} | {f"matvec at {size} bytes": rate for size, rate in self.matvec}
        rates |= {f"linear in {kind} at {n} rows": rate for kind, pairs in self.linear.items() for n, rate in pairs}
        for name, rate in rates.items():
            if not 0 < rate < math.inf:
                raise ValueError(f"{name} is {rate}, but must be above 0.")
        if not self.matvec:
            raise ValueError("matvec is empty, but must hold at least one pair of a working set and its bandwidth.")

    @classmethod
    def calibrate(cls, device: torch.device | None = None, quick: bool = False) -> "Machine":
        """Measure this machine: seconds, of which `quick` saves most and is rougher; other work under way spoils it."""
        device = pick_device() if device is None else torch.device(device)
        repeats = 3 if quick else 15
        tiny = GPTConfig(n_layer=4, n_head=1, n_embd=8, block_size=8, vocab_size=8)  # next to nothing but launches
        with torch.inference_mode():
            # launches are timed in an instant, and a slow moment outlasts it: so at three moments, and the least counts
            ops = decode_cost(tiny, 1).ops
            launches = [calibration.step_seconds(tiny, device, repeats) / ops]
            bandwidth, kernel = calibration.read_bandwidth(device, repeats)
            launches.append(calibration.step_seconds(tiny, device, repeats) / ops)
            # a GPU's launches run ahead of its work and are not in its times
            waited = 0.0 if device.type == "cuda" else min(launches)
            matvec = calibration.matvec_bandwidths(device, repeats, waited)
            if matvec[-1][1] > bandwidth:  # the roof is above all that was seen, also when a slow moment lowered it
                bandwidth, kernel = matvec[-1][1], "F.linear"
            tries = min(repeats, 9)
            flops = {name: calibration.gemm_rate(getattr(torch, name), device, tries) for name in CALIBRATED_DTYPES}
            usable = [name for name, rate in flops.items() if rate > flops["float32"] / 10]  # the others are emulated
            linear = {n: calibration.linear_rates(getattr(torch, n), device, tries, waited) for n in usable}
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
        """Bytes/s at which `F.linear` streams weights for one row, if `working_set` bytes pass between two uses of one.

        What fits into the processor's cache is read again from there, faster than memory gives it. Interpolated
        over the logarithm of the size; outside the sizes measured, the nearest.
        """
        return _interpolate(self.matvec, working_set)

    def linear_rate(self, rows: int, dtype: torch.dtype = torch.float32) -> float:
        """FLOP/s at which `F.linear` multiplies `rows` rows with weights that come from memory; `flops` if not known.

        Interpolated over the logarithm of the rows; outside the numbers measured, the nearest.
        """
        kind = _calibrated(self, dtype)
        return _interpolate(self.linear[kind], rows) if self.linear.get(kind) else self.flops[kind]

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
    """The second number of pairs that rise in their first, at x, over the logarithm; outside, that of the nearest."""
    places, values = zip(*pairs, strict=True)
    i = bisect_right(places, x)
    if i in (0, len(places)):
        return values[min(i, len(places) - 1)]
    share = math.log(x / places[i - 1]) / math.log(places[i] / places[i - 1])
    return values[i - 1] + share * (values[i] - values[i - 1])


def _calibrated(machine: Machine, dtype: torch.dtype) -> str:
    """The name of a dtype that the machine is calibrated for."""
    kind = str(dtype).removeprefix("torch.")
    if kind not in machine.flops:
        raise ValueError(f"{machine.name} is not calibrated for {kind}; it is for {', '.join(machine.flops)}.")
    return kind


@dataclass(frozen=True)
class Prediction:
    """Seconds predicted, the three terms they are made of, and the largest of these: the one that `binds`."""

    seconds: float
    memory: float
    compute: float
    overhead: float
    binds: str

    def __str__(self) -> str:
        unit, name = time_unit(self.seconds)
        return f"{three_digits(self.seconds / unit)} {name}, bound by {self.binds}"


def predict(
    cost: Cost,
    machine: Machine,
    dtype: torch.dtype = torch.float32,
    bandwidth: float | None = None,
    rate: float | None = None,
) -> Prediction:
    """How long `cost` takes on `machine` at best.

    Sharper with the `bandwidth` (bytes/s) and the `rate` (FLOP/s) of the operators that do the work.
    """
    kind = _calibrated(machine, dtype)
    memory = cost.bytes / (bandwidth or machine.read_bandwidth)
    compute = cost.flops / (rate or machine.flops[kind])
    overhead = cost.ops * machine.overhead
    terms = {"memory": memory, "compute": compute, "overhead": overhead}
    # a CPU launches and works in turns; a GPU works through a queue that is filled ahead of it, so the two overlap
    work = max(memory, compute)
    seconds = max(overhead, work) if machine.device == "cuda" else overhead + work
    return Prediction(seconds, memory, compute, overhead, max(terms, key=terms.__getitem__))
