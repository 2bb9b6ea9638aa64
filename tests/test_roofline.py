"""Predictions are the roofline's, by hand; a machine survives its file, a broken one not."""

import json
from dataclasses import replace

import pytest
import torch

from gptlite.costs import Cost
from gptlite.roofline import Machine, predict

MACHINE = Machine(
    name="a machine",
    device="cpu",
    threads=2,
    read_bandwidth=10e9,
    read_kernel="float32 sum",
    matvec=[[1e6, 40e9], [10e6, 20e9], [1000e6, 5e9]],
    flops={"float32": 100e9, "bfloat16": 400e9},
    overhead=1e-5,
    date="2026-01-01",
    torch="2.6.0",
)


@pytest.mark.parametrize(
    ("cost", "binds", "text"),
    [
        (Cost(bytes=20_000_000, flops=1000, ops=1), "memory", "2.01 ms, bound by memory"),
        (Cost(bytes=1000, flops=10**9, ops=1), "compute", "10.0 ms, bound by compute"),
        (Cost(bytes=1000, flops=1000, ops=50), "overhead", "500 µs, bound by overhead"),
    ],
)
def test_the_largest_term_binds(cost, binds, text):
    p = predict(cost, MACHINE)
    assert p.binds == binds
    assert str(p) == text
    assert p.seconds == p.overhead + max(p.memory, p.compute)
    assert (p.memory, p.compute, p.overhead) == pytest.approx(
        (cost.bytes / 10e9, cost.flops / 100e9, cost.ops * 1e-5)
    )


def test_a_gpu_launches_while_it_works():
    p = predict(Cost(10**8, 10**8, 500), replace(MACHINE, device="cuda"))
    assert p.seconds == p.memory == 0.01 > p.overhead


def test_a_faster_dtype_and_a_slower_operator_change_their_own_term():
    cost = Cost(10**8, 10**10, 1)
    plain, half = predict(cost, MACHINE), predict(cost, MACHINE, torch.bfloat16)
    slow, few_rows = predict(cost, MACHINE, bandwidth=1e9), predict(cost, MACHINE, rate=1e9)
    assert (few_rows.compute, few_rows.memory) == (plain.compute * 100, plain.memory)
    assert (half.compute, half.memory) == (plain.compute / 4, plain.memory)
    assert (slow.compute, slow.memory) == (plain.compute, plain.memory * 10)


def test_bandwidth_between_the_sizes_measured():
    for size, rate in MACHINE.matvec:
        assert MACHINE.matvec_bandwidth(size) == pytest.approx(rate)
    assert MACHINE.matvec_bandwidth(1) == 40e9
    assert MACHINE.matvec_bandwidth(10**12) == 5e9
    assert MACHINE.matvec_bandwidth(100e6) == pytest.approx(12.5e9)  # half way in the logarithm
    assert replace(MACHINE, matvec=[[5.0, 7.0]]).matvec_bandwidth(3) == 7.0


def test_the_rate_between_the_numbers_of_rows_measured():
    machine = replace(MACHINE, linear={"float32": [[1, 2e9], [16, 40e9], [256, 90e9]]})
    for rows, rate in machine.linear["float32"]:
        assert machine.linear_rate(rows) == pytest.approx(rate)
    assert machine.linear_rate(4) == pytest.approx(21e9)  # half way in the logarithm
    assert machine.linear_rate(1000) == 90e9
    assert (
        machine.linear_rate(4, torch.bfloat16) == MACHINE.flops["bfloat16"]
    )  # not measured by rows
    with pytest.raises(ValueError, match="not calibrated for float64"):
        machine.linear_rate(4, torch.float64)


def test_a_machine_survives_its_file():
    for machine in (MACHINE, replace(MACHINE, linear={"float32": [[1, 2e9], [16, 40e9]]})):
        assert Machine.from_json(machine.to_json()) == machine


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"overhead": None}, "missing 1 required positional argument: 'overhead'"),
        ({"colour": "grey"}, "unexpected keyword argument 'colour'"),
        ({"overhead": 0}, "overhead is 0, but must be above 0."),
        ({"read_bandwidth": float("nan")}, "read_bandwidth is nan, but must be above 0."),
        ({"flops": {"float32": -1}}, "float32 is -1, but must be above 0."),
        ({"matvec": []}, "matvec is empty"),
        ({"matvec": [[1, -2]]}, "matvec at 1 bytes is -2"),
        ({"matvec": 3}, "not iterable"),
        (
            {"linear": {"float32": [[4, 0]]}},
            "linear in float32 at 4 rows is 0, but must be above 0.",
        ),
        ({"threads": "two"}, "not supported between"),
    ],
)
def test_a_broken_file_is_no_machine(change, reason):
    fields = json.loads(MACHINE.to_json()) | change
    text = json.dumps({name: value for name, value in fields.items() if value is not None})
    with pytest.raises(ValueError, match=r"^this is not a machine's calibration") as error:
        Machine.from_json(text)
    assert reason in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "[1, 2]", "3", "null", '"machine"'])
def test_what_is_no_object_is_no_machine(text):
    with pytest.raises(ValueError, match=r"^this is not a machine's calibration"):
        Machine.from_json(text)


def test_a_format_that_is_not_calibrated_is_refused():
    said = r"^a machine is not calibrated for int8; it is for float32, bfloat16\.$"
    with pytest.raises(ValueError, match=said):
        predict(Cost(1, 1, 1), MACHINE, torch.int8)
