"""A calibration has every part, whatever the machine; how fast it is, no test says."""

import time

import pytest
import torch

from gptlite import calibration
from gptlite.bench import Timing
from gptlite.costs import decode_cost
from gptlite.model import GPTConfig
from gptlite.roofline import CALIBRATED_DTYPES, Machine, predict

CPU = torch.device("cpu")


def one_time(seconds):
    return Timing.of([seconds])


@pytest.fixture(scope="module")
def machine():
    return Machine.calibrate(CPU, quick=True)


def test_a_calibration_says_what_was_measured_on_what(machine):
    assert machine.device == "cpu"
    assert machine.name
    assert machine.threads == torch.get_num_threads()
    assert machine.torch == torch.__version__
    assert time.strptime(machine.date, "%Y-%m-%d")
    assert set(machine.flops) == set(CALIBRATED_DTYPES)
    assert machine.read_kernel in (
        "float32 sum",
        "int64 sum",
        "int64 max",
        "matrix times vector",
        "F.linear",
    )


def test_a_slow_moment_does_not_set_the_price_of_a_launch(monkeypatch):
    ops = []
    moments = iter([3e-3, 1e-3, 2e-3])
    monkeypatch.setattr(
        calibration,
        "step_seconds",
        lambda config, *_: ops.append(decode_cost(config, 1).ops) or next(moments),
    )
    monkeypatch.setattr(calibration, "read_bandwidth", lambda *_: (1e9, "float32 sum"))
    monkeypatch.setattr(calibration, "matvec_bandwidths", lambda *_: [[1e6, 1e9]])
    monkeypatch.setattr(calibration, "gemm_rate", lambda *_: 1e9)
    monkeypatch.setattr(calibration, "linear_rates", lambda *_: [[4, 1e9]])
    assert Machine.calibrate(CPU).overhead == pytest.approx(1e-3 / ops[0])


def test_the_working_sets_double_up_to_far_more_than_a_cache(machine):
    sizes = [size for size, _ in machine.matvec]
    assert sizes == [768 * 768 * 4 * 2**i for i in range(8)]


def test_the_rows_grow_up_to_a_long_prompt_in_each_format_that_is_not_emulated(machine):
    usable = {
        kind for kind, rate in machine.flops.items() if rate > machine.flops["float32"] / 10
    }
    assert set(machine.linear) == usable >= {"float32"}
    for pairs in machine.linear.values():
        assert [rows for rows, _ in pairs] == [4, 16, 64, 256, 1024]
    assert (
        machine.linear["float32"][-1][1] > machine.linear["float32"][0][1]
    )  # four rows do not fill a kernel


def test_the_roof_is_above_what_decoding_reads_from_memory(machine):
    assert machine.read_bandwidth >= machine.matvec[-1][1]


def test_a_calibrated_machine_predicts_and_survives_its_file(machine):
    again = Machine.from_json(machine.to_json())
    assert again == machine
    cost = decode_cost(GPTConfig(), 256)
    p = predict(
        cost, again, bandwidth=again.matvec_bandwidth(cost.bytes), rate=again.linear_rate(1)
    )
    assert p.seconds == p.overhead + max(p.memory, p.compute)


def test_a_disturbed_overhead_does_not_eat_the_time(monkeypatch):
    """A launch said to take longer than the whole call must not make the rest negative."""
    monkeypatch.setattr(calibration, "measure", lambda *args, **kwargs: one_time(1e-3))
    rates = calibration.matvec_bandwidths(CPU, 1, overhead=1.0)
    rates += calibration.linear_rates(torch.float32, CPU, 1, overhead=1.0)
    assert all(rate > 0 for _, rate in rates)


def test_launches_are_taken_off_what_matrices_in_turn_take(monkeypatch):
    """By hand: a turn takes a second, and each of its calls a millisecond to launch."""
    monkeypatch.setattr(calibration, "measure", lambda *args, **kwargs: one_time(1.0))
    matvec = calibration.matvec_bandwidths(CPU, 1, overhead=1e-3)
    matrix = 768 * 768 * 4
    assert matvec[0] == [matrix, pytest.approx(8 * matrix / 0.992)]  # one matrix, eight times
    assert matvec[4] == [16 * matrix, pytest.approx(16 * matrix / 0.984)]
    assert matvec[7] == [128 * matrix, pytest.approx(128 * matrix / 0.872)]
    linear = calibration.linear_rates(torch.float32, CPU, 1, overhead=1e-3)
    # 2 x 4 rows x (2048 x 512) FLOPs for each of 32 matrices; with 1024 rows, of 3
    assert linear[0] == [4, pytest.approx(32 * 8_388_608 / 0.968)]
    assert linear[-1] == [1024, pytest.approx(3 * 2_147_483_648 / 0.997)]


def test_the_fastest_kernel_is_named(monkeypatch):
    seconds = iter([4e-3, 1e-3, 2e-3, 3e-3])
    monkeypatch.setattr(calibration, "measure", lambda *args, **kwargs: one_time(next(seconds)))
    assert calibration.read_bandwidth(CPU, 1) == ((1 << 28) / 1e-3, "int64 sum")


@pytest.mark.parametrize(
    ("seconds_at_64", "sizes"),
    [(0.1, [64, 128]), (0.0015, [64, 128, 256]), (1e-6, [64, 128, 256, 512, 1024, 2048])],
)
def test_a_slow_format_is_given_up_early(monkeypatch, seconds_at_64, sizes):
    """Where 64 x 64 takes 1.5 ms, 8192 x 8192 would take 52 minutes."""
    tried = []

    def measured(fn, **kwargs):
        (matrix,) = fn.__defaults__
        tried.append(len(matrix))
        return one_time(seconds_at_64 * (len(matrix) / 64) ** 3)

    monkeypatch.setattr(calibration, "measure", measured)
    assert calibration.gemm_rate(torch.float32, CPU, 1) == pytest.approx(
        2 * 64**3 / seconds_at_64
    )
    assert tried == sizes


def test_threads_that_wait_for_a_core_do_not_end_the_search(monkeypatch):
    seconds = iter([0.04, 0.05, 0.03, 0.03, 0.02, 0.2])  # of 64, 128, 256, 512, 1024 and 2048
    monkeypatch.setattr(calibration, "measure", lambda *args, **kwargs: one_time(next(seconds)))
    assert calibration.gemm_rate(torch.float32, CPU, 1) == 2 * 1024**3 / 0.02


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The file in which calibrations are kept, and how often the machine is really measured."""
    measured = []
    rates = {"read_bandwidth": 2e9, "read_kernel": "float32 sum", "matvec": [[1e6, 1e9]]}
    rates |= {"flops": {"float32": 1e9}, "overhead": 1e-6}

    def measure(cls, device, quick):
        measured.append(quick)
        here = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        return Machine(name="a", device=device.type, date=str(len(measured)), **rates, **here)

    monkeypatch.setattr(Machine, "_measure", classmethod(measure))
    monkeypatch.setenv("GPTLITE_CALIBRATION", str(tmp_path / "kept" / "machines.json"))
    return tmp_path / "kept" / "machines.json", measured


def test_a_calibration_is_shared_by_the_same_threads_and_torch_alone(kept, monkeypatch):
    file, measured = kept
    first = Machine.calibrate(CPU)
    assert Machine.calibrate(CPU) == first
    assert measured == [False]
    assert Machine.calibrate(CPU, quick=True) != first
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert Machine.calibrate(CPU).threads == 64
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert Machine.calibrate(CPU).torch == "9.9"
    assert measured == [False, True, False, False]
    monkeypatch.undo()
    monkeypatch.setenv("GPTLITE_CALIBRATION", str(file))
    assert Machine.calibrate(CPU) == first


def test_without_a_file_every_calibration_is_measured(kept, monkeypatch):
    file, measured = kept
    monkeypatch.delenv("GPTLITE_CALIBRATION")
    assert Machine.calibrate(CPU) != Machine.calibrate(CPU)
    assert not file.exists()
    assert measured == [False, False]


@pytest.mark.parametrize("content", ["{", "[]", '"x"'])
def test_a_file_of_something_else_is_named_and_stays(kept, content):
    file, measured = kept
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(
        ValueError, match=r"machines.json is no file of calibrations .*delete it"
    ):
        Machine.calibrate(CPU)
    assert file.read_text() == content
    assert not measured
