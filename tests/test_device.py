"""The machine is asked; its answers are simulated, so that no test depends on it or a clock."""

import itertools

import pytest
import torch

from gptlite import device
from gptlite.device import fast_dtype, pick_device, processor_name, synchronize

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def asked_anew():
    """The answer is kept; here each test asks another machine."""
    fast_dtype.cache_clear()
    yield
    fast_dtype.cache_clear()


@pytest.mark.parametrize("available", [True, False])
def test_a_gpu_is_taken_where_there_is_one(monkeypatch, available):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert pick_device() == (CUDA if available else CPU)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((12, 1), torch.bfloat16),
    ],
)
def test_a_gpu_says_its_format_by_its_capability(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fast_dtype(CUDA) == dtype


def clock(seconds):
    """A clock that shows these durations between its 1st and 2nd reading, 3rd and 4th, ..."""
    return iter(itertools.accumulate(t for duration in seconds for t in (1.0, duration)))


@pytest.mark.parametrize(
    ("bfloat16", "float32", "dtype"),
    [
        ([9, 1, 1], [2, 2, 2], torch.bfloat16),  # slow at first, while kernels are chosen
        ([500, 400, 450], [2, 2, 2], torch.float32),  # emulated
        ([2, 2, 2], [2, 2, 2], torch.float32),  # no faster: then the exact one
        ([3, 3, 3], [2, 9, 9], torch.float32),  # disturbed: the best of each counts
    ],
)
def test_a_cpu_is_timed(monkeypatch, bfloat16, float32, dtype):
    readings = clock([*bfloat16, *float32])
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(readings))
    assert fast_dtype(CPU) == dtype


def test_the_answer_on_this_machine_is_a_format_that_can_be_multiplied():
    dtype = fast_dtype(CPU)
    assert torch.equal(
        torch.eye(4, dtype=dtype) @ torch.ones(4, 4, dtype=dtype), torch.ones(4, 4, dtype=dtype)
    )


def test_only_a_gpu_has_to_be_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    synchronize(CPU)
    synchronize(CUDA)
    assert waited == [CUDA]


def test_the_processors_name(monkeypatch):
    assert processor_name(CPU).strip()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    assert processor_name(CUDA) == "A GPU"
    monkeypatch.setattr(device.Path, "exists", lambda self: False)  # not Linux
    monkeypatch.setattr(device.platform, "processor", lambda: "")
    monkeypatch.setattr(device.platform, "machine", lambda: "arm64")
    assert processor_name(CPU) == "arm64"
