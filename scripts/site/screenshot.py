"""Take the picture of a page that README shows, after `make book`.

python scripts/site/screenshot.py
"""

import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve import make_server

ROOT = Path(__file__).resolve().parents[2]
PAGE, PICTURE = "notebooks/kv_cache.html", ROOT / "assets" / "figures" / "page.png"
# a page needs no network, and Chromium none of its own services
CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@contextmanager
def serving(site: Path) -> Iterator[str]:
    """Serve a folder on a free port of this machine while the block runs; its address."""
    server = make_server(site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    """The command line."""
    from playwright.sync_api import sync_playwright

    site = ROOT / "_build" / "html"
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit(
            "There is no Chromium here; install it (on Debian and Ubuntu: apt-get install"
            " chromium)."
        )
    if not (site / PAGE).exists():
        sys.exit("The book is not built; run `make book` first.")
    with serving(site) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        page = browser.new_page(
            viewport={"width": 1280, "height": 860}, device_scale_factor=1.5
        )
        page.goto(f"{address}/{PAGE}")
        page.wait_for_function("window.MathJax && MathJax.startup && MathJax.startup.promise")
        page.evaluate("MathJax.startup.promise")
        first = "document.querySelector('.cell_output figure, .cell_output svg')"
        page.evaluate(f"{first}.scrollIntoView({{block: 'center'}})")
        page.wait_for_timeout(500)  # the table of contents follows
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(PICTURE))
        browser.close()
    print(f"Wrote {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
