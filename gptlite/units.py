"""Numbers as the book prints them: three digits that count, and a unit in which they read well."""

import math


def three_digits(value: float) -> str:
    """A number with three digits that count: 0.0123, 1.23, 123; from 1000 on, all of them, in thousands."""
    if not value:
        return "0"
    exponent = math.floor(
        math.log10(abs(float(f"{value:.2e}")))
    )  # of the rounded value: 9.999 is 10.0
    return f"{value:.2e}" if exponent < -4 else f"{value:,.{max(0, 2 - exponent)}f}"


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit in which a time reads well, as its length in seconds and its name."""
    return (1.0, "s") if seconds >= 1 else (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "µs")


def quantity(value: float, unit: str) -> str:
    """A number and its unit as the book prints them: "12.3 ms", "4.72 MB", "5.30x", "24.1 tokens/s"."""
    if unit == "s":
        scale, unit = time_unit(value)
    elif unit == "bytes":
        scale, unit = next(
            ((s, n) for s, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if value >= s),
            (1, "bytes"),
        )
    else:
        scale = 1
    text = (
        f"{value:,}" if isinstance(value, int) and scale == 1 else three_digits(value / scale)
    )
    return text + unit if unit == "x" else f"{text} {unit}"
