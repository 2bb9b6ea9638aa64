"""The built site, for the tests that read it."""

import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
SOURCES = (
    "_config.yml",
    "_toc.yml",
    "book/*",
    "notebooks/*.ipynb",
    "assets/**/*",
    "scripts/site/*.py",
    "gptlite/**/*.py",
)


@cache
def built_site() -> Path:
    """The folder of the site, built first if it is missing or older than its sources."""
    made = (SITE / "index.html").stat().st_mtime if (SITE / "index.html").exists() else 0.0
    changed = max(path.stat().st_mtime for pattern in SOURCES for path in ROOT.glob(pattern))
    if made < changed:
        done = subprocess.run(
            [sys.executable, "scripts/site/build_book.py", "_build/html"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return SITE


class Page(HTMLParser):
    """What a page refers to: its ids, links, resources that load by themselves, and images."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.lang = path, ""
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.undescribed: list[str] = []
        self.headings: list[str] = []
        self.text: list[str] = []
        self._skip = self._article = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        a = {name: value or "" for name, value in attrs}
        self.ids |= {
            a[key] for key in ("id", "name") if a.get(key) and (key == "id" or tag == "a")
        }
        self._article += tag == "article"
        self._skip += tag in ("script", "style", "pre", "code")
        if tag == "html":
            self.lang = a.get("lang", "")
        elif tag == "a" and a.get("href"):
            self.links.append(a["href"])
        elif tag == "link" and not {
            "canonical",
            "search",
            "next",
            "prev",
            "index",
            "genindex",
        } & set(a.get("rel", "").split()):
            self.resources.append(a.get("href", ""))
        elif tag in ("script", "img", "iframe", "source", "video", "audio", "embed") and a.get(
            "src"
        ):
            self.resources.append(a["src"])
        elif tag == "h1" and self._article:
            self.headings.append(a.get("id", ""))
        if tag == "img" and not a.get("alt", "").strip():
            self.undescribed.append(a.get("src", "img"))
        if (
            tag == "svg"
            and "aria-hidden" not in a
            and not (a.get("role") == "img" and a.get("aria-label", "").strip())
        ):
            self.undescribed.append(self.get_starttag_text() or "svg")

    def handle_endtag(self, tag: str) -> None:
        self._article -= tag == "article"
        self._skip -= tag in ("script", "style", "pre", "code")

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.text.append(data)


def pages() -> list[Page]:
    """Every page of the site but the redirect at its root, and Netron, which is a program."""
    others = (SITE / "index.html", SITE / "netron" / "index.html")
    return [Page(path) for path in sorted(built_site().rglob("*.html")) if path not in others]


def chapters() -> list[str]:
    """The names of the chapters, in the order of the book."""
    import yaml

    parts = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    files = [chapter["file"] for part in parts for chapter in part["chapters"]]
    return [file.removeprefix("notebooks/") for file in files if file.startswith("notebooks/")]


def documents() -> list[str]:
    """All files of the table of contents, the root first."""
    import yaml

    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    return [
        toc["root"],
        *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"]),
    ]
