"""What this machine can do, measured: the experiments behind `roofline.Machine.calibrate`."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from gptlite.bench import measure
from gptlite.kv_cache import KVCache
from gptlite.model import GPT, GPTConfig


def step_seconds(config: GPTConfig, device: torch.device, repeats: int) -> float:
    """Seconds of one decoding step of a model; for a tiny one, what its launches take."""
    model, cache = GPT(config).to(device).eval(), KVCache(config, device=device)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    steps = 20  # between two synchronisations, which would cost a GPU more than a step

    def run() -> None:
        for _ in range(steps):
            cache.rewind(0)
            model(token, cache)

    return measure(run, repeats=repeats, device=device).median / steps


def read_bandwidth(device: torch.device, repeats: int) -> tuple[float, str]:
    """Bytes/s at best of the fastest kernel over a buffer that no cache holds, and its name.

    No single operator is trusted with the roof: which one keeps the memory busy differs from
    processor to processor.
    """
    numbers = 1 << (28 if device.type == "cuda" else 26)  # 1 GiB or 256 MiB
    # ones: pages of zeros that were never written are one and the same page, read from cache
    floats, row = torch.ones(numbers, device=device), torch.ones(8192, device=device)
    integers, matrix = floats.view(torch.int64), floats.view(-1, 8192)
    kernels: dict[str, Callable[[], object]] = {
        "float32 sum": floats.sum,
        "int64 sum": integers.sum,
        "int64 max": integers.max,
        "matrix times vector": lambda: matrix @ row,
    }
    seconds = {
        name: min(measure(fn, repeats=repeats, device=device).times)
        for name, fn in kernels.items()
    }
    fastest = min(seconds, key=seconds.__getitem__)
    return floats.nbytes / seconds[fastest], fastest


def matvec_bandwidths(device: torch.device, repeats: int, overhead: float) -> list[list[float]]:
    """Pairs [bytes, bytes/s] of `F.linear` on one row through ever more matrices in turn.

    This is how decoding reads its weights: each matrix once a token, and all others before it
    comes again. As long as all fit into the processor's cache they are read from there. The
    `overhead`, the seconds that each call takes to launch, is taken off.
    """
    # matrices of 64 MiB, or of 2.25 MiB
    n, most = (4096, 16) if device.type == "cuda" else (768, 128)
    row, bias, result = torch.ones(1, n, device=device), torch.ones(n, device=device), []
    matrices = [torch.ones(n, n, device=device) for _ in range(most)]
    for count in (2**i for i in range(most.bit_length())):
        # few matrices several times, so that there is something to time
        turn = matrices[:count] * max(1, 8 // count)

        def read(turn: list[torch.Tensor] = turn) -> None:
            for weight in turn:
                F.linear(row, weight, bias)

        seconds = measure(read, repeats=repeats, device=device).median
        # half of it at least: an overhead that was disturbed must not eat the time
        seconds = max(seconds - len(turn) * overhead, seconds / 2)
        result.append([count * matrices[0].nbytes, len(turn) * matrices[0].nbytes / seconds])
    return result


def linear_rates(
    dtype: torch.dtype, device: torch.device, repeats: int, overhead: float
) -> list[list[float]]:
    """Pairs [rows, FLOP/s] of `F.linear` on 4 to 1024 rows through matrices in turn.

    This is how a pass over several positions multiplies; over a single one it hardly does more
    than read. The kernel needs many rows to come near the rate of a large square product, and
    it waits for weights that no cache holds. The `overhead` is taken off as above.
    """
    # matrices of 64 MiB, or of 4 MiB, in float32
    n, most = (2048, 8) if device.type == "cuda" else (512, 32)
    matrices = [torch.ones(4 * n, n, dtype=dtype, device=device) for _ in range(most)]
    bias, result = torch.ones(4 * n, dtype=dtype, device=device), []
    for rows in (4**i for i in range(1, 6)):
        x = torch.ones(rows, n, dtype=dtype, device=device)
        flops = 2 * rows * matrices[0].numel()
        # with many rows a CPU is busy for long, and whether the weights are at hand matters
        # less
        turn = matrices[: most if device.type == "cuda" else max(2, int(8e9 / flops))]

        def multiply(x: torch.Tensor = x, turn: list[torch.Tensor] = turn) -> None:
            for weight in turn:
                F.linear(x, weight, bias)

        seconds = measure(multiply, repeats=repeats, device=device).median / len(turn)
        result.append([rows, flops / max(seconds - overhead, seconds / 2)])
    return result


def gemm_rate(dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    """FLOP/s at best of a product of square matrices, doubled from 64 until one takes 25 ms.

    It starts small since a processor without instructions for `dtype` may emulate it, hundreds
    of times slower, and ends at 8192. Where threads wait for a busy core a small product takes
    25 ms too, but one of twice the size then takes no longer.
    """
    best, before = 0.0, math.inf
    for n in (2**i for i in range(6, 14)):
        a = torch.ones(n, n, dtype=dtype, device=device)

        def multiply(a: torch.Tensor = a) -> torch.Tensor:
            return a @ a

        seconds = min(measure(multiply, repeats=repeats, warmup=1, device=device).times)
        best = max(best, 2 * n**3 / seconds)
        # after eight times the work: the arithmetic sets the time, and not the waiting
        if seconds > max(0.025, 4 * before):
            break
        before = seconds
    return best
