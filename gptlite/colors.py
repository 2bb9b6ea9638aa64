"""The colours of the book's figures."""

from operator import mul

# The hues of Okabe and Ito (2008), which colour-blind readers tell apart, without yellow. Their
# lightness is chosen so that each stands out 3:1 from a white page and from a dark one, and
# each from every other. Black is not among them, because `figure` turns it into the page's own
# text colour: use "black" for what is to look like text.
COLORS = {
    "blue": "#006BA8",
    "orange": "#BD8300",
    "green": "#007555",
    "red": "#A54A00",
    "purple": "#C66A9D",
    "sky": "#209CE2",
}


def shades(n: int) -> list[str]:
    """Return `n` colours for what has an order, such as layers: blue, by purple, to orange.

    Every one stands out 3:1 from a white page and from a dark one. A colormap such as viridis
    does not: it begins almost black and ends almost white, and one of the two vanishes.
    """
    if n < 1:
        raise ValueError(f"n is {n}, but at least one colour must be asked for.")
    # light is mixed, so that no mixture is darker or lighter than both of its parts
    stops = [_light(COLORS[name]) for name in ("blue", "purple", "orange")]
    colors = []
    for i in range(n):
        place = 2 * i / max(1, n - 1)
        weights = [max(0, 1 - abs(place - stop)) for stop in range(3)]
        channels = zip(*stops, strict=True)
        colors.append(_hexadecimal([sum(map(mul, weights, values)) for values in channels]))
    return colors


def _light(color: str) -> list[float]:
    """Return the linear red, green and blue of a colour such as #006BA8 (IEC 61966-2-1)."""
    values = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]


def _hexadecimal(light: list[float]) -> str:
    """Return the colour whose linear red, green and blue are `light`."""
    curved = [12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in light]
    return "#" + "".join(f"{round(255 * v):02X}" for v in curved)
