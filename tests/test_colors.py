"""The colours stand out from both pages and from each other, also for the colour-blind."""

import itertools
import math
import re
from pathlib import Path

import pytest

from gptlite.colors import COLORS, shades

STYLE = (Path(__file__).parent.parent / "assets" / "site" / "gptlite.css").read_text()
PAGES = ["#FFFFFF", "#121212", *re.findall(r"--pst-color-background: (#\w{6})", STYLE)]


def linear(colour):
    """Linear red, green and blue of a colour such as #0072B2 (IEC 61966-2-1)."""
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]


def luminance(rgb):
    return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]


def contrast(a, b):
    """WCAG 2.2's contrast ratio."""
    low, high = sorted(luminance(linear(colour)) for colour in (a, b))
    return (high + 0.05) / (low + 0.05)


def lab(rgb):
    """CIE L*a*b* of linear RGB under D65."""
    x = (0.4124 * rgb[0] + 0.3576 * rgb[1] + 0.1805 * rgb[2]) / 0.95047
    z = (0.0193 * rgb[0] + 0.1192 * rgb[1] + 0.9505 * rgb[2]) / 1.08883
    fx, fy, fz = (
        v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, luminance(rgb), z)
    )
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


# Machado, Oliveira and Fernandes (2009), severity 1, for linear RGB
SIGHT = {
    "full": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
}


def test_contrast_is_wcags():
    assert contrast("#FFFFFF", "#000000") == pytest.approx(21)
    assert contrast("#FFFFFF", "#777777") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("name", COLORS)
@pytest.mark.parametrize("page", PAGES)
def test_every_colour_stands_out_from_a_light_and_a_dark_page(name, page):
    assert contrast(COLORS[name], page) >= 3


def seen(colour, sight):
    """CIE L*a*b* of a colour as somebody of this sight sees it."""
    rgb = linear(colour)
    rows = (sum(m * v for m, v in zip(row, rgb, strict=True)) for row in SIGHT[sight])
    return lab([min(1, max(0, value)) for value in rows])


@pytest.mark.parametrize("sight", SIGHT)
def test_the_colours_are_told_apart(sight):
    for a, b in itertools.combinations(COLORS.values(), 2):
        assert math.dist(seen(a, sight), seen(b, sight)) > 15, (a, b)  # 2.3 is noticed


@pytest.mark.parametrize("n", [1, 2, 3, 6, 12, 36])
def test_every_shade_stands_out_from_a_light_and_a_dark_page(n):
    assert len(shades(n)) == len(set(shades(n))) == n
    for colour, page in itertools.product(shades(n), PAGES):
        assert contrast(colour, page) >= 3, (colour, page)


@pytest.mark.parametrize("sight", SIGHT)
def test_shades_have_an_order_that_everybody_sees(sight):
    """From blue to yellow, which protanopes and deuteranopes see; six are told apart."""
    colours = [seen(colour, sight) for colour in shades(6)]
    assert [b for _, _, b in colours] == sorted(b for _, _, b in colours)
    for a, b in itertools.combinations(colours, 2):
        assert math.dist(a, b) > 5


def test_shades_begin_and_end_with_colours_of_the_book():
    assert shades(3) == [COLORS["blue"], COLORS["purple"], COLORS["orange"]]
    with pytest.raises(ValueError, match="n is 0, but at least one colour"):
        shades(0)
