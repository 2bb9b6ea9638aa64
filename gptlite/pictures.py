"""A picture for every viewer of a notebook: a PNG, and a drawing that the book's site takes."""

import base64
import html
import io
import math
import re
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image

# No viewer knows this kind of output, so all of them show the PNG beside it: JupyterLab, which
# drops a drawing in a notebook that it does not trust, GitHub, VS Code and Colab. The site
# takes it instead (scripts/site/book_extension.py), since it has the page's own colours.
DRAWING = "application/vnd.gptlite.figure+html"
PIXELS = 2  # of a PNG, for each pixel of a page: screens are that fine
LEAST_TEXT = 9  # pixels that a letter's size has on a phone, at least


def output(figure: str, png: bytes, alt: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return data and metadata of a notebook's output that shows a picture in every viewer."""
    width, height = (side // PIXELS for side in _opened(png).size)
    data = {
        DRAWING: figure,
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


class Drawing(NamedTuple):
    """What stands inside an <svg>, and its sides in points."""

    body: str
    width: float
    height: float

    def element(self, attributes: str, style: str) -> str:
        """Return the <svg>."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {attributes} '
            f'viewBox="0 0 {self.width:.2f} {self.height:.2f}" fill="currentColor" '
            f'stroke-linejoin="round" style="{style};height:auto">{self.body}</svg>'
        )

    def natural(self) -> int:
        """Return its width in pixels where there is room."""
        return round(self.width * 4 / 3)

    def least(self) -> int:
        """Return the width in pixels at which the smallest text can still be read."""
        sizes = re.findall(r"font(?:-size)?: (?:[a-z]+ )*([\d.]+)px", self.body)
        return math.ceil(LEAST_TEXT * self.width / min(map(float, sizes), default=math.inf))


def html_figure(drawings: list[Drawing], alt: str) -> str:
    """Return drawings as one described figure: side by side, or, where narrow, stacked.

    Where even one does not fit, it scrolls in its own box.
    """
    if not alt.strip():
        raise ValueError("alt is empty, but must say in a sentence what the figure shows.")
    image, unseen = f'role="img" aria-label="{html.escape(alt)}"', 'aria-hidden="true"'
    if len(drawings) == 1:
        [one] = drawings
        width = f"width:{one.natural()}px;min-width:{one.least()}px;max-width:100%"
        content = one.element(image, width)
    else:
        # a line is broken where a panel would have less than four fifths of its width; on a
        # phone no two stand side by side
        panels = [
            f'<div style="flex:{one.natural()} 1 {max(0.8 * one.natural(), 160):.0f}px;'
            f'max-width:{one.natural()}px;min-width:{one.least()}px">'
            f"{one.element(unseen, 'display:block;width:100%')}</div>"
            for one in drawings
        ]
        flow = "display:flex;flex-wrap:wrap;align-items:flex-end;gap:0.5em 1em"
        content = f'<div {image} style="{flow}">{"".join(panels)}</div>'
    box = 'class="gptlite-figure" style="margin:1em 0;overflow-x:auto"'
    return f"<figure {box}>{content}</figure>"


# a drawing's <style> would reach every other drawing of the page; its rules become attributes
# of the root instead
_DOCUMENT = re.compile(
    r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", re.DOTALL
)
_LEGEND_BOX = re.compile(
    r'(id="legend_\d+">\s*<g id="patch_\d+">\s*<path d="[^"]*" style=")fill: #ffffff'
)


_NUMBER = re.compile(r"<text>((?:<tspan [^>]*>[\d.−]+</tspan>)+)</text>")


def drawing(svg: str) -> Drawing:
    """Return the content of Matplotlib's document, small and harmless to a page around it."""
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg)
    assert size is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = _LEGEND_BOX.sub(r"\1fill: none", _DOCUMENT.sub("", body))
    body = re.sub(r"<[^>]+>", lambda tag: _tidy(tag[0]), body)
    body = _NUMBER.sub(_in_one_piece, re.sub(r">\s+<", "><", body.strip()))
    # the transparent background of the figure and of its axes
    body = re.sub(r'<path d="[^"]*" style="fill: none"/>', "", body)
    return Drawing(_unique_ids(body), float(size[1]), float(size[2]))


def _in_one_piece(number: re.Match[str]) -> str:
    """Return a number of a logarithmic axis as one text, not as digits set in another font."""
    first = re.search(r' y="([^" ]*)[^"]*" style="([^"]*)"', number[0])
    assert first is not None
    digits = re.sub("<[^>]*>", "", number[1])
    return f'<text y="{first[1]}" style="{first[2]}">{digits}</text>'


def _tidy(tag: str) -> str:
    """Return a tag with the text colour and the font of the page, and short numbers."""
    if "base64," in tag:
        return tag.replace("\n", "").replace("xlink:href", "href")
    tag = re.sub(r"\s+", " ", tag).replace("xlink:href", "href")
    tag = tag.replace("#000000", "currentColor")
    tag = re.sub(r"font-family: (?:(?:'[^']*', )*sans-serif|'DejaVu Sans')(?:; )?", "", tag)
    # in the `font:` of Matplotlib before 3.10
    tag = re.sub(r"(?:'[^']*', )+sans-serif", "sans-serif", tag)
    return re.sub(
        r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), tag
    )


def _unique_ids(body: str) -> str:
    """Return the drawing with ids of its own, those that nothing refers to dropped."""
    prefix = "f" + sha256(body.encode()).hexdigest()[:8]
    used = dict.fromkeys(re.findall(r'(?:url\(|href=")#([\w.-]+)', body))
    names = {old: f"{prefix}-{i}" for i, old in enumerate(used)}
    body = re.sub(
        r' id="([^"]*)"', lambda m: f' id="{names[m[1]]}"' if m[1] in names else "", body
    )
    return re.sub(r'(url\(|href=")#([\w.-]+)', lambda m: f"{m[1]}#{names[m[2]]}", body)
