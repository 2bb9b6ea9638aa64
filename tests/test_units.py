"""Numbers are printed with the digits that count, in the unit that reads well."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptlite.units import quantity, three_digits, time_unit


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (0.9996, "1.00"),
        (1.234, "1.23"),
        (9.996, "10.0"),
        (12.34, "12.3"),
        (99.96, "100"),
        (123.4, "123"),
        (1234.4, "1,234"),
        (1234567, "1,234,567"),
        (-2.5, "-2.50"),
        (1.5e-7, "1.50e-07"),
    ],
)
def test_three_digits(value, text):
    assert three_digits(value) == text


@given(st.floats(1e-12, 1e12))
def test_three_digits_are_enough_for_half_a_percent(value):
    text = three_digits(value).replace(",", "")
    assert math.isclose(float(text), value, rel_tol=0.0051)
    assert "e" in text or value >= 999 or len(text.replace(".", "").lstrip("0")) == 3


@pytest.mark.parametrize(
    ("seconds", "unit"),
    [(1.0, (1.0, "s")), (0.99, (1e-3, "ms")), (1e-3, (1e-3, "ms")), (9e-4, (1e-6, "µs"))],
)
def test_a_time_has_the_largest_unit_that_it_fills(seconds, unit):
    assert time_unit(seconds) == unit


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", "12.3 ms"),
        (12.0, "s", "12.0 s"),
        (4_718_592, "bytes", "4.72 MB"),
        (12, "bytes", "12 bytes"),
        (1500, "bytes", "1.50 kB"),
        (497_759_232, "bytes", "498 MB"),
        (3_114_000_000, "bytes", "3.11 GB"),
        (5.3, "x", "5.30x"),
        (24.123, "tokens/s", "24.1 tokens/s"),
        (10_770_816, "parameters", "10,770,816 parameters"),
        (7, "nodes", "7 nodes"),
    ],
)
def test_quantities_read_well(value, unit, text):
    assert quantity(value, unit) == text
