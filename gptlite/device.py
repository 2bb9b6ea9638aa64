"""Where to run and in which number format: asked of the machine, never assumed."""

import platform
import time
from functools import cache
from pathlib import Path

import torch


def pick_device() -> torch.device:
    """The first CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def fast_dtype(device: torch.device) -> torch.dtype:
    """The format in which a device multiplies matrices fastest: bfloat16, float16 or float32.

    A GPU says so by its compute capability. A CPU is timed: one without bfloat16 instructions
    still accepts bfloat16 and emulates it, up to several hundred times slower.
    """
    if device.type == "cuda":
        new = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if new else torch.float16

    def seconds(dtype: torch.dtype) -> float:
        a, best = torch.ones(256, 256, dtype=dtype), float("inf")
        for _ in range(3):
            start = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - start)
        return best

    return torch.bfloat16 if seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def processor_name(device: torch.device) -> str:
    """The GPU or processor as it calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # Linux; elsewhere Python knows a name, if a short one
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
