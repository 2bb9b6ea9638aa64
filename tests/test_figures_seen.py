"""Every figure is a picture wherever a notebook is read, in a new clone too.

JupyterLab runs here, with a new trust database and the notebooks that are stored. GitHub, VS
Code and Colab cannot; they show an output's image/png, whether they trust it or not.
"""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from urllib.request import urlopen

import matplotlib.pyplot as plt
import nbformat
import notebook_files
import pytest
from nbformat import v4
from PIL import Image

from gptlite.figures import figure_html, figure_output, style
from gptlite.pictures import DRAWING

CHAPTERS = [path.stem for path in notebook_files.find([])]
PHONE = 328  # pixels that a phone's page has for a figure
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # else only what is in view exists
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


def figures(notebook):
    """The outputs that are figures, in today's form or as an inline drawing."""
    return [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if DRAWING in (data := output.get("data", {}))
        or "<svg" in data.get("text/html", "")
        or any(mime.startswith("image/") for mime in data)
    ]


def output(fig, alt):
    data, metadata = figure_output(fig, alt)
    plt.close("all")
    return v4.new_output("display_data", data=data, metadata=metadata)


@pytest.fixture(scope="module")
def small():
    """A notebook with a figure, one of panels, and one as an inline drawing, as it was once."""
    style()
    fig = plt.subplots()[0]
    outputs = [
        output(fig, "A frame."),
        output(plt.subplots(1, 3)[0], "Three frames."),
        v4.new_output("display_data", data={"text/html": figure_html(fig, "An old frame.")}),
    ]
    cells = [v4.new_markdown_cell("# A notebook")]
    cells += [v4.new_code_cell("figure(...)", outputs=[each]) for each in outputs]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


@pytest.fixture(scope="module")
def lab(tmp_path_factory, small):
    """The address of JupyterLab as on the first day of a clone, where nothing is trusted."""
    pytest.importorskip("jupyterlab")
    home = tmp_path_factory.mktemp("home")
    for name, settings in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(settings))
    clone = home / "clone"
    shutil.copytree(notebook_files.NOTEBOOKS, clone, ignore=shutil.ignore_patterns(".*"))
    nbformat.write(small, clone / "small.ipynb")
    own = {"HOME": home, "JUPYTERLAB_SETTINGS_DIR": home / "settings"}
    for kind in ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR"):
        own[f"JUPYTER_{kind}"] = home / kind.lower()
    own["JUPYTERLAB_WORKSPACES_DIR"] = own["IPYTHONDIR"] = home / "others"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={clone}"]
    with (home / "log").open("w") as log:
        environment = {**os.environ, **{key: str(value) for key, value in own.items()}}
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        while server.poll() is None:
            try:
                urlopen(f"{address}/api", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        assert server.poll() is None, (home / "log").read_text()
        yield address
    finally:
        # not asked to end: it would wait for the kernel of a notebook, which ends by itself
        server.kill()
        server.wait()


# A picture is seen if the browser has decoded it, and it takes room on the page.
SEEN = """() => [...document.querySelectorAll('.jp-OutputArea-output img')].map(img => {
    const {width, height} = img.getBoundingClientRect();
    return img.checkVisibility() && img.complete && img.naturalWidth > 0 && [width, height];
})"""


def pictures_seen(browser, lab, name, expected):
    """Width and height of each picture that JupyterLab shows when a notebook is opened."""
    from playwright.sync_api import TimeoutError as NotSeen

    with urlopen(f"{lab}/api/contents/{name}.ipynb") as answer:
        cells = json.load(answer)["content"]["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["metadata"].get("trusted") for cell in code)
    page = browser.new_page(viewport={"width": 1366, "height": 900})
    try:
        page.goto(f"{lab}/doc/tree/{name}.ipynb", timeout=120_000)
        page.locator(".jp-CodeCell").nth(len(code) - 1).wait_for(timeout=120_000)
        with suppress(NotSeen):  # what is there then is returned
            page.wait_for_function(f"({SEEN})().filter(Boolean).length >= {expected}")
        return page.evaluate(SEEN)
    finally:
        page.close()


@pytest.mark.browser
def test_figures_are_seen_in_a_notebook_that_is_not_trusted_and_inline_drawings_are_not(
    browser, lab, small
):
    seen = pictures_seen(browser, lab, "small", expected=2)
    said = [each.metadata["image/png"] for each in figures(small)[:2]]
    assert len(figures(small)) == 3
    for (width, height), size in zip(seen, said, strict=True):
        assert (width, height) == pytest.approx((size["width"], size["height"]), rel=0.02)


def chapter(name):
    return notebook_files.read(notebook_files.NOTEBOOKS / f"{name}.ipynb")


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_stored_figure_has_a_picture_a_drawing_and_words(name):
    assert figures(chapter(name))
    for each in figures(chapter(name)):
        assert {DRAWING, "image/png", "text/plain"} == set(each.data)
        alt = each.metadata["image/png"]["alt"]
        assert each.data["text/plain"] == f"Figure: {alt}"
        image = Image.open(io.BytesIO(base64.b64decode(each.data["image/png"])))
        assert min(image.size) > 200 and len(image.convert("RGB").getcolors(1 << 24)) > 2


@pytest.mark.parametrize("name", CHAPTERS)
def test_no_stored_figure_scrolls_on_a_phone_but_graphs(name):
    """So its text has nine pixels there: the drawing's least width is where it has."""
    for each in figures(chapter(name)):
        drawing = each.data.get(DRAWING, "")
        widths = [int(width) for width in re.findall(r"min-width:(\d+)px", drawing)]
        assert widths
        assert "<figcaption>" in drawing or max(widths) <= PHONE, each.data["text/plain"]


@pytest.mark.browser
@pytest.mark.parametrize("name", CHAPTERS)
def test_every_figure_of_a_chapter_is_seen_before_anything_is_run(browser, lab, name):
    expected = len(figures(chapter(name)))
    seen = pictures_seen(browser, lab, name, expected)
    assert len(seen) == expected and all(seen)
    assert all(width > 150 and height > 60 for width, height in seen)
