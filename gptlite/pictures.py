"""A picture for every viewer of a notebook: a PNG, and a drawing that the book's site takes."""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

# No viewer knows this kind of output, so all of them show the PNG beside it: JupyterLab, which
# drops a drawing in a notebook that it does not trust, GitHub, VS Code and Colab. The site
# takes it instead (scripts/site/book_extension.py), since it has the page's own colours.
DRAWING = "application/vnd.gptlite.figure+html"
PIXELS = 2  # of a PNG, for each pixel of a page: screens are that fine
LEAST_TEXT = 9  # pixels that a letter's size has on a phone, at least


def output(drawing: str, png: bytes, alt: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return data and metadata of a notebook's output that shows a picture in every viewer."""
    width, height = (side // PIXELS for side in _opened(png).size)
    data = {
        DRAWING: drawing,
        "image/png": base64.b64encode(png).decode(),
        "text/plain": f"Figure: {alt}",
    }
    return data, {"image/png": {"alt": alt, "width": width, "height": height}}


def small_png(pictures: Sequence[bytes], widest: int = 850) -> bytes:
    """Return PNG files as one small PNG on white, side by side in rows of `widest` pixels.

    It has a palette of 64 colours: a figure has few, and some more where edges are smoothed.
    """
    from PIL import Image

    gap = 16 * PIXELS
    left = top = bottom = 0
    places: list[tuple[Image.Image, int, int]] = []
    for picture in map(_opened, pictures):
        if left and left + picture.width > widest * PIXELS:
            left, top = 0, bottom + gap
        places.append((picture, left, top))
        left += picture.width + gap
        bottom = max(bottom, top + picture.height)
    width = max(left + picture.width for picture, left, _ in places)
    whole = Image.new("RGB", (width, bottom), "white")
    for picture, left, top in places:
        whole.paste(picture, (left, top))
    file = io.BytesIO()
    whole.quantize(64, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def _opened(png: bytes) -> "Image":
    """Return the PNG file as a picture without transparency."""
    from PIL import Image

    return Image.open(io.BytesIO(png)).convert("RGB")
