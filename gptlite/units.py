"""Numbers as the book prints them: three digits that count, in a unit that reads well."""

import math


def three_digits(value: float) -> str:
    """A number with three digits that count: 0.0123, 1.23, 123; from 1000 on, all: 1,234."""
    if not value:
        return "0"
    rounded = abs(float(f"{value:.2e}"))  # 9.999 is 10.0
    exponent = math.floor(math.log10(rounded))
    return f"{value:.2e}" if exponent < -4 else f"{value:,.{max(0, 2 - exponent)}f}"


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit in which a time reads well, as its length in seconds and its name."""
    return (1.0, "s") if seconds >= 1 else (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "µs")


def quantity(value: float, unit: str) -> str:
    """A number and its unit as printed: "12.3 ms", "4.72 MB", "5.30x", "24.1 tokens/s"."""
    scale = 1.0
    if unit == "s":
        scale, unit = time_unit(value)
    elif unit == "bytes":
        sizes = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
        scale, unit = next((size for size in sizes if value >= size[0]), (1.0, "bytes"))
    exact = isinstance(value, int) and scale == 1
    text = f"{value:,}" if exact else three_digits(value / scale)
    return text + unit if unit == "x" else f"{text} {unit}"
