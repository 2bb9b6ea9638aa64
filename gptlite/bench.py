"""The one timer of the book: warm-up, synchronisation, medians with spread, and peak memory."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlite.device import pick_device, synchronize
from gptlite.generate import decode_one_token, prefill, stream
from gptlite.kv_cache import KVCache
from gptlite.model import GPT
from gptlite.units import three_digits, time_unit

Fn = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of `times`, and the quartiles around its middle half."""

    median: float
    low: float
    high: float
    times: tuple[float, ...]

    @classmethod
    def of(cls, times: Sequence[float]) -> "Timing":
        """The timing of calls that took `times`, in seconds."""
        return cls(*_median_and_quartiles(times), tuple(times))

    def __str__(self) -> str:
        unit, name = time_unit(self.median)
        median, low, high = (three_digits(t / unit) for t in (self.median, self.low, self.high))
        return f"{median} {name} ({low} to {high})"


@dataclass(frozen=True)
class Ratio:
    """How many times longer one thing took than another: the median round, and quartiles."""

    median: float
    low: float
    high: float
    ratios: tuple[float, ...]

    def __str__(self) -> str:
        median, low, high = map(three_digits, (self.median, self.low, self.high))
        return f"{median}x ({low} to {high})"


def ratio(a: Timing, b: Timing) -> Ratio:
    """The speed-up of b over a: a / b, round by round, of two timings of `measure_alternately`.

    A slow moment of the machine falls on both halves of a round and cancels in their ratio; in
    a ratio of two medians it would not.
    """
    if len(a.times) != len(b.times):
        rounds = f"{len(a.times)} and {len(b.times)} rounds"
        raise ValueError(f"the timings have {rounds}, but must have as many each.")
    ratios = tuple(x / y for x, y in zip(a.times, b.times, strict=True))
    return Ratio(*_median_and_quartiles(ratios), ratios)


def measure(
    fn: Fn, *, repeats: int = 7, warmup: int = 2, device: torch.device | None = None
) -> Timing:
    """Time `repeats` calls of `fn` after `warmup` calls that are not timed."""
    return measure_alternately({"fn": fn}, repeats=repeats, warmup=warmup, device=device)["fn"]


def measure_alternately(
    fns: dict[str, Fn], *, repeats: int = 7, warmup: int = 1, device: torch.device | None = None
) -> dict[str, Timing]:
    """Time several functions in turns, a b a b ...: the machine's drift falls on all alike."""
    _at_least("repeats", repeats, 1)
    _at_least("warmup", warmup, 0)
    device = pick_device() if device is None else torch.device(device)
    for fn in fns.values():
        for _ in range(warmup):  # the first calls allocate, compile and fill the caches
            fn()
    times: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(repeats):
        for name, fn in fns.items():
            times[name].append(_seconds(fn, device))
    return {name: Timing.of(t) for name, t in times.items()}


def _seconds(fn: Fn, device: torch.device) -> float:
    # a GPU works behind: without the first, the clock would start while it is still busy with
    # what came before; without the second, it would stop when the work is queued
    synchronize(device)
    start = time.perf_counter_ns()
    fn()
    synchronize(device)
    return (time.perf_counter_ns() - start) / 1e9


@dataclass(frozen=True)
class GenerationTiming:
    """Seconds to the first token, for each further one (a run's mean), and in all.

    `steps` holds the median seconds of the first, the second, ... token; `batch` is how many
    sequences grew at once.
    """

    first: Timing
    per_token: Timing
    total: Timing
    steps: tuple[float, ...]
    batch: int = 1

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second while decoding, over the whole batch; not counting the prompt."""
        return self.batch / self.per_token.median

    def __str__(self) -> str:
        speed = f"{three_digits(self.tokens_per_second)} tokens/s"
        return f"first token {self.first}, then {self.per_token} each: {speed}"


def measure_generation(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    make_cache: Callable[[], Any] | None = None,
    repeats: int = 3,
) -> GenerationTiming:
    """Time greedy generation from a prompt (B, T), each run with a fresh cache, or with none.

    The first token pays for reading the prompt (prefill), the others for one step each
    (decode): two different costs, which an average over all tokens would mix in proportions
    that depend on the lengths chosen.
    """
    _at_least("max_new_tokens", max_new_tokens, 2)
    _at_least("repeats", repeats, 1)

    def run(n: int) -> list[float]:
        cache = make_cache() if make_cache else None
        synchronize(idx.device)
        clock = [time.perf_counter_ns()]
        for _ in stream(model, idx, n, cache, temperature=0):
            synchronize(idx.device)  # a token counts from when it could be shown
            clock.append(time.perf_counter_ns())
        return [(b - a) / 1e9 for a, b in pairwise(clock)]

    run(2)  # warm-up
    runs = [run(max_new_tokens) for _ in range(repeats)]
    steps = tuple(_median_and_quartiles(step)[0] for step in zip(*runs, strict=True))
    first = Timing.of([r[0] for r in runs])
    per_token = Timing.of([sum(r[1:]) / (max_new_tokens - 1) for r in runs])
    whole = Timing.of([sum(r) for r in runs])
    return GenerationTiming(first, per_token, whole, steps, len(idx))


def measure_decoding(
    models: dict[str, GPT], context: int, new: int = 16, repeats: int = 9
) -> dict[str, Timing]:
    """Seconds of one more token at batch 1 with a cache, the models in turns.

    A round reads `new` tokens, one at a time, behind `context` others, and counts their mean.
    """
    for name, value in (("context", context), ("new", new)):
        _at_least(name, value, 1)

    def decoder(model: GPT) -> Fn:
        weight = model.wte.weight
        dtype, device = weight.dtype, weight.device
        cache = KVCache(model.config, max_len=context + new, dtype=dtype, device=device)
        prompt = torch.zeros(1, context, dtype=torch.long, device=weight.device)

        @torch.inference_mode()
        def decode() -> None:
            cache.rewind(context)
            for _ in range(new):
                decode_one_token(model, prompt[:, :1], cache)

        with torch.inference_mode():
            prefill(model, prompt, cache)
        return decode

    device = next(iter(models.values())).wte.weight.device
    decoders = {name: decoder(model) for name, model in models.items()}
    timed = measure_alternately(decoders, repeats=repeats, device=device)
    return {name: Timing.of([s / new for s in t.times]) for name, t in timed.items()}


def peak_memory(fn: Fn, device: torch.device | None = None) -> int:
    """Bytes that PyTorch holds at most during `fn`, above what it held before.

    This counts tensors and the operators' own buffers, whatever allocates through PyTorch; what
    a library keeps for itself (a matrix product's packed panels) is not seen.
    """
    device = pick_device() if device is None else torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # or the profiler's library would report each start on standard error
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        fn()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return _highest([e for e in events if e["name"] == "[memory]"])


def _highest(events: list[dict[str, Any]]) -> int:
    """The most bytes live at once, of blocks allocated (bytes > 0) and freed (bytes < 0)."""
    live: dict[int, int] = {}
    now = highest = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            live[address] = size
            now += size
            highest = max(highest, now)
        else:  # a block older than the profile counts for nothing, as it did before
            now -= live.pop(address, 0)
    return highest


def _median_and_quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(quarters)
    return median.item(), low.item(), high.item()


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}, but must be at least {least}.")
