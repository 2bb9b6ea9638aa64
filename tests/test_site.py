"""The built site, read as files: links, descriptions, weight, configuration, no other host."""

import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import book_extension
import jupyter_book
import notebook_files
import pytest
import setup_cell
import yaml
from nbformat import v4
from site_files import ROOT, SITE, Page, built_site, chapters, documents, pages

pytestmark = pytest.mark.site
MAX_PAGE_BYTES = 3_000_000


@pytest.fixture(scope="module")
def site() -> Path:
    return built_site()


@pytest.fixture(scope="module")
def all_pages(site: Path) -> dict[Path, Page]:
    return {page.path: page for page in pages()}


def target(page: Page, link: str) -> Path:
    path = unquote(urlsplit(link).path)
    return (page.path.parent / path).resolve() if path else page.path


def is_internal(link: str) -> bool:
    return not urlsplit(link).scheme and not link.startswith("//")


def test_every_document_of_the_contents_is_a_page(site):
    missing = [name for name in documents() if not (site / f"{name}.html").exists()]
    assert not missing


def test_internal_links_lead_somewhere(all_pages):
    broken = []
    left_out = not (
        SITE / "netron"
    ).exists()  # then a click on such a link says so; test_static_apps.py wants it there
    for page in all_pages.values():
        for link in filter(is_internal, page.links):
            path = target(page, link)
            if left_out and path.parent.name == "netron":
                continue
            anchor = unquote(urlsplit(link).fragment)
            if path.is_dir():
                path = path / "index.html"
            if not path.exists():
                broken.append(f"{page.path.relative_to(SITE)}: {link} is no file")
            elif anchor and path in all_pages and anchor not in all_pages[path].ids:
                broken.append(f"{page.path.relative_to(SITE)}: {link} has no such anchor")
    assert not broken


def test_external_links_are_secure(all_pages):
    plain = {
        link for page in all_pages.values() for link in page.links if link.startswith("http:")
    }
    assert not plain


def test_images_say_what_they_show(all_pages):
    silent = {
        str(p.path.relative_to(SITE)): p.undescribed
        for p in all_pages.values()
        if p.undescribed
    }
    assert not silent


def test_a_page_has_one_title_and_a_language(all_pages):
    articles = [
        page
        for path, page in all_pages.items()
        if path.name not in ("search.html", "genindex.html")
    ]
    assert not [page.path.name for page in articles if len(page.headings) != 1]
    assert {page.lang for page in all_pages.values()} == {"en"}


def test_resources_are_the_sites_own(all_pages):
    foreign = {
        r
        for page in all_pages.values()
        for r in page.resources
        if not is_internal(r) and not r.startswith("data:")
    }
    assert not foreign
    missing = {
        r
        for page in all_pages.values()
        for r in page.resources
        if is_internal(r) and not target(page, r).exists()
    }
    assert not missing


def test_styles_and_scripts_name_no_other_host(all_pages):
    """What a page loads may not load more from elsewhere: no remote @import, font or script."""
    loaded = {
        target(page, r) for page in all_pages.values() for r in page.resources if is_internal(r)
    }
    for path in (p for p in loaded if p.suffix == ".css"):
        assert not re.findall(
            r"(?:@import|url\()\s*[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")
        ), path
    hosts = r"unpkg\.com|jsdelivr\.net|cdnjs\.cloudflare\.com|googleapis\.com|gstatic\.com"
    hosts += r"|google-analytics|mybinder\.org"
    for page in all_pages.values():
        scripts = re.findall(
            r"<script[^>]*>(.*?)</script>",
            page.path.read_text(encoding="utf-8"),
            flags=re.DOTALL,
        )
        assert not re.findall(hosts, "".join(scripts)), page.path


def test_pages_are_light(all_pages):
    """A page with all it refers to: markup, styles, scripts, images."""
    for page in all_pages.values():
        files = {target(page, r) for r in page.resources if is_internal(r)} | {page.path}
        weight = sum(path.stat().st_size for path in files if path.is_file())
        assert weight < MAX_PAGE_BYTES, f"{page.path.relative_to(SITE)} weighs {weight:,} bytes"


def test_no_markup_is_left_unrendered(all_pages):
    """A role or directive that was not understood stands on the page as it was typed."""
    left = re.compile(r"\{(?:glue|cite|doc|ref|term|trained|numref|math)[:}]|:::|\$\$|#@title")
    for page in all_pages.values():
        assert not left.findall("".join(page.text)), page.path


@pytest.mark.parametrize("name", chapters())
def test_a_chapter_has_its_colab_button_where_there_is_an_address(site, name):
    links = Page(site / "notebooks" / f"{name}.html").links
    assert (setup_cell.colab_link(f"{name}.ipynb") in links) == setup_cell.published()


def test_without_an_address_no_page_leads_there_and_every_page_says_so(all_pages):
    if setup_cell.published():
        pytest.skip("the book has an address")
    for page in all_pages.values():
        assert "OWNER/REPO" not in page.path.read_text(encoding="utf-8"), page.path
        assert book_extension.NO_ADDRESS in " ".join("".join(page.text).split()), page.path


def test_a_book_with_an_address_has_its_buttons(tmp_path):
    """The same configuration, of a repository that is somewhere: Colab, source, address."""
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell("# A\n\nText.")])
    notebook_files.write(notebook, tmp_path / "a.ipynb")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: a\n")
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    config["repository"]["url"] = "https://github.com/ann/book"
    (tmp_path / "_config.yml").write_text(yaml.safe_dump(config))
    for needed in ("scripts", "gptlite", "assets", "book"):
        (tmp_path / needed).symlink_to(ROOT / needed)
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    done = subprocess.run([jupyter_book, "build", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    page = (tmp_path / "_build" / "html" / "a.html").read_text(encoding="utf-8")
    assert "https://colab.research.google.com/github/ann/book/blob/main/a.ipynb" in page
    assert '<link rel="canonical" href="https://ann.github.io/book/a.html"' in page
    assert "https://github.com/ann/book/issues/new" in page
    assert book_extension.NO_ADDRESS not in page


def test_the_site_map_lists_every_page(site):
    listed = (site / "sitemap.xml").read_text(encoding="utf-8")
    assert all(f"/{name}.html" in listed for name in documents())


def known_keys() -> dict:
    """The keys of Jupyter Book 1.x: of its default configuration and its schema."""
    folder = Path(jupyter_book.__file__).parent
    default = yaml.safe_load((folder / "default_config.yml").read_text(encoding="utf-8"))
    schema = json.loads((folder / "config_schema.json").read_text(encoding="utf-8"))[
        "properties"
    ]
    keys: dict = {}
    for key in default.keys() | schema.keys():
        inner = default.get(key) if isinstance(default.get(key), dict) else {}
        keys[key] = set(inner) | set(schema.get(key, {}).get("properties", {}))
    return keys


def unknown_keys(config: dict) -> list[str]:
    known = known_keys()
    found = [key for key in config if key not in known]
    for key, value in config.items():
        if isinstance(value, dict) and known.get(key):
            found += [f"{key}.{inner}" for inner in value if inner not in known[key]]
    return found


def test_the_configuration_has_no_unknown_key():
    assert not unknown_keys(yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8")))


def test_an_unknown_key_is_found():
    assert unknown_keys(
        {"titel": "x", "html": {"faviconn": ""}, "sphinx": {"config": {"anything": 1}}}
    ) == [
        "titel",
        "html.faviconn",
    ]


def test_a_warning_fails_the_build(tmp_path):
    """A page with a broken link fails the build, and a sentence says where to look."""
    (tmp_path / "scripts" / "site").mkdir(parents=True)
    for name in ("build_book.py", "book_extension.py"):
        (tmp_path / "scripts" / "site" / name).write_bytes(
            (ROOT / "scripts" / "site" / name).read_bytes()
        )
    (tmp_path / "_config.yml").write_text("title: Broken\nonly_build_toc_files: true\n")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: page\n")
    (tmp_path / "page.md").write_text("# Page\n\n[nowhere](missing.md)\n")
    done = subprocess.run(
        [sys.executable, "scripts/site/build_book.py", "_build/html"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "missing.md" in done.stdout
    assert "make: the book was not built" in done.stderr
