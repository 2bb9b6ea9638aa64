"""The built site in Chromium: what a reader sees on a desk, a phone, paper, and in the dark."""

import gzip
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import setup_cell
from screenshot import serving
from site_files import built_site, chapters, documents

pytestmark = [pytest.mark.browser, pytest.mark.site]

MAX_BYTES = 1_500_000  # on the wire: static hosts compress text
DESK = {"width": 1366, "height": 768}  # the commonest small screen
PHONE = {"width": 360, "height": 740}
PAGES = [f"{name}.html" for name in documents()]
CHAPTERS = [f"notebooks/{name}.html" for name in chapters()]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(built_site()) as where:
        yield where


def opened(browser, address: str, path: str, **options):
    """A page of the site, by itself, its mathematics set; it notes what goes wrong."""
    page = browser.new_context(**{"viewport": DESK, **options}).new_page()
    page.faults, page.sizes = [], []

    def note(is_fault: bool, sentence: str) -> None:
        if is_fault:
            page.faults.append(sentence)

    ours = (address, "data:", "blob:")
    page.on("console", lambda m: note(m.type == "error", f"console: {m.text}"))
    page.on("pageerror", lambda error: note(True, f"exception: {error}"))
    page.on("request", lambda r: note(not r.url.startswith(ours), f"asks {r.url}"))
    page.on("response", lambda r: note(r.status >= 400, f"{r.status}: {r.url}"))
    page.on("requestfinished", lambda r: page.sizes.append(on_the_wire(r.response())))
    page.goto(f"{address}/{path}", wait_until="networkidle")
    page.evaluate("window.MathJax?.startup?.promise.then(() => true)")
    return page


@pytest.fixture(scope="class")
def page(browser, address, request):
    """A page in one colour scheme, opened once for all checks of a class.

    Each check leaves it as it was: as wide, and with the same solutions open.
    """
    path, scheme = request.param
    page = opened(browser, address, path, color_scheme=scheme)
    yield page
    page.context.close()


@pytest.fixture
def open_page(browser, address):
    """A function that opens a page for one test alone."""
    pages = []

    def open_(path: str, **options):
        pages.append(opened(browser, address, path, **options))
        return pages[-1]

    yield open_
    for page in pages:
        page.context.close()


@contextmanager
def on_a_phone(page) -> Iterator[None]:
    """The page as a phone shows it."""
    page.set_viewport_size(PHONE)
    yield
    page.set_viewport_size(DESK)


@contextmanager
def unfolded(page) -> Iterator[None]:
    """The page with all that can be unfolded: solutions, and the code of folded cells."""
    were = page.evaluate(
        """() => [...document.querySelectorAll('details')].map(d => {
            const open = d.open;
            d.open = true;
            return open;
        })"""
    )
    yield
    page.evaluate(
        "were => document.querySelectorAll('details').forEach((d, i) => { d.open = were[i]; })",
        were,
    )


def on_the_wire(response) -> int:
    """Bytes that a static host sends: text compressed, fonts and pictures as they are."""
    body, kind = response.body(), response.headers.get("content-type", "")
    return len(gzip.compress(body)) if kind.startswith(("text/", "application/")) else len(body)


# A listing has thousands of coloured words, and axe takes a millisecond for the contrast of
# each: one of a kind stays while it looks.
SAMPLE_CODE = """() => {
    const style = e => getComputedStyle(e).backgroundColor + e.className;
    const listings = [...document.querySelectorAll('pre')];
    const behind = new Map(listings.map(pre => [pre, style(pre) + style(pre.parentElement)]));
    const kind = word => {
        const {color, backgroundColor, fontWeight} = getComputedStyle(word);
        const ground = behind.get(word.closest('pre'));
        return [word.className, color, backgroundColor, fontWeight, ground].join();
    };
    const words = [...document.querySelectorAll('pre span')].filter(e => !e.children.length);
    const kinds = words.map(kind), first = new Map(kinds.map((kind, i) => [kind, i]).reverse());
    const others = words.filter((word, i) => first.get(kinds[i]) !== i);
    window.sampled = others.map(word => [word, document.createTextNode(word.textContent)]);
    window.sampled.forEach(([word, text]) => word.replaceWith(text));
    return first.size;
}"""
AS_IT_WAS = "window.sampled.forEach(([word, text]) => text.replaceWith(word))"


def axe_faults(page) -> list[str]:
    """Serious and critical faults that axe-core finds: rule, and the first element."""
    import axe_playwright_python

    page.axe_kinds = page.evaluate(SAMPLE_CODE)
    if not page.evaluate("typeof axe === 'object'"):
        script = Path(axe_playwright_python.__file__).parent / "axe.min.js"
        page.add_script_tag(path=str(script))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    page.evaluate(AS_IT_WAS)
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    return [
        f"{v['id']}: {v['nodes'][0]['html'][:200]} ({len(v['nodes'])} times)" for v in serious
    ]


def test_one_pale_word_of_a_listing_is_found(browser):
    words = '<span class="k">for</span> ' * 50
    page = browser.new_page()
    for style, expected in (("", 0), ("color: #eee", 1)):
        pale = f'<span class="k" style="{style}">if</span>'
        listing = f'<pre style="background: white">{words}{pale} {words}</pre>'
        content = f'<html lang="en"><title>A listing</title><main>{listing}</main></html>'
        page.set_content(content)
        before = page.content()
        faults = axe_faults(page)
        assert page.axe_kinds == 1 + expected  # one of a kind
        assert [fault.partition(":")[0] for fault in faults] == ["color-contrast"] * expected
        assert page.locator("main").inner_html() in before  # and the others are back
    page.close()


class PageChecks:
    """What holds of every page."""

    def test_it_loads_without_faults_or_other_hosts(self, page):
        page.mouse.wheel(0, 20_000)
        page.wait_for_timeout(200)
        assert not page.faults
        assert 10_000 < sum(page.sizes) < MAX_BYTES

    def test_no_code_scrolls_sideways(self, page):
        with unfolded(page):
            wide = page.evaluate("""() => [...document.querySelectorAll('article pre')]
                .filter(pre => pre.scrollWidth > pre.clientWidth)
                .map(pre => pre.textContent.trim().slice(0, 60))""")
        assert not wide

    def test_a_phone_scrolls_only_downwards(self, page):
        with on_a_phone(page), unfolded(page):
            width, widest = page.evaluate("""() => {
                const right = element => element.getBoundingClientRect().right;
                const all = [...document.querySelectorAll('article *')];
                const [widest] = all.sort((a, b) => right(b) - right(a));
                return [document.documentElement.scrollWidth, widest.outerHTML.slice(0, 200)];
            }""")
        assert width <= PHONE["width"], widest

    def test_accessibility(self, page, request):
        scheme = request.node.callspec.params["page"][1]
        assert page.locator("html").get_attribute("data-theme") == scheme
        with unfolded(page):
            page.wait_for_timeout(200)
            assert not axe_faults(page)


class ChapterChecks(PageChecks):
    """What holds of every chapter besides."""

    def test_mathematics_and_fonts_are_there(self, page):
        assert page.locator("mjx-container").count() > 5
        assert page.locator("mjx-merror").count() == 0
        loaded = page.evaluate(
            "[...document.fonts].filter(f => f.status === 'loaded').map(f => f.family)"
        )
        families = {family.strip('"') for family in loaded}
        assert {"Source Serif 4", "Source Code Pro"} <= families

    def test_figures_fit_a_phone_and_can_be_read_there(self, page):
        with on_a_phone(page), unfolded(page):
            figures = page.evaluate("""() => {
                const size = text => {
                    const {a, b} = text.getScreenCTM(); // of what is turned, too
                    return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(a, b);
                };
                return [...document.querySelectorAll('figure.gptlite-figure')].map(figure => ({
                    graph: figure.querySelector('figcaption') !== null,
                    room: figure.clientWidth,
                    panels: [...figure.querySelectorAll('svg')].map(svg => {
                        const {left, right, top, bottom} = svg.getBoundingClientRect();
                        return {left, right, top, bottom};
                    }),
                    smallest: Math.min(
                        ...[...figure.querySelectorAll('text, tspan')].map(size)),
                    overflow: getComputedStyle(figure).overflowX,
                }));
            }""")
        assert figures
        for figure in figures:
            widths = [panel["right"] - panel["left"] for panel in figure["panels"]]
            assert min(widths) > 150 and figure["smallest"] >= 9
            # the drawing of a graph scrolls in its own box; other figures fit
            fits = max(widths) <= figure["room"]
            assert figure["overflow"] == "auto" if figure["graph"] else fits
            for above, below in itertools.pairwise(figure["panels"]):
                assert above["bottom"] <= below["top"]

    def test_figures_take_the_pages_text_colour(self, page, request):
        """Text in a figure is dark on a light page and light on a dark one."""
        colours = page.evaluate("""() => {
            const figures = [...document.querySelectorAll('figure.gptlite-figure svg')];
            return [getComputedStyle(document.body).backgroundColor,
                ...figures.map(figure => getComputedStyle(figure).color)];
        }""")
        shades = [re.findall(r"[\d.]+", colour)[:3] for colour in colours]
        background, *text = [sum(map(float, rgb)) / 765 for rgb in shades]
        assert text
        if request.node.callspec.params["page"][1] == "light":
            assert background > 0.9 and max(text) < 0.3
        else:
            assert background < 0.2 and min(text) > 0.7

    def test_the_colab_button_leads_to_the_notebook(self, page, request):
        if not setup_cell.published():
            assert page.locator(".dropdown-launch-buttons").count() == 0
            return
        name = Path(request.node.callspec.params["page"][0]).with_suffix(".ipynb").name
        page.locator(".dropdown-launch-buttons button").click()
        link = page.locator("a[href*='colab.research.google.com']:visible").first
        assert link.get_attribute("href") == setup_cell.colab_link(name)
        page.keyboard.press("Escape")

    def test_folded_solutions_open_with_the_keyboard(self, page):
        folded = page.locator("article details:not([open])")
        assert folded.count() >= 3
        # the first that is still closed, until none is
        for _ in range(folded.count()):
            box = folded.first.element_handle()
            assert not box.query_selector(":scope > :not(summary)").is_visible()
            box.query_selector("summary").focus()
            page.keyboard.press("Enter")
            box.query_selector(":scope > :not(summary)").wait_for_element_state("visible")
        assert folded.count() == 0

    def test_it_prints(self, page):
        """On paper: no menus, solutions open, black on white whatever the screen showed."""
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = false; })")
        page.emulate_media(media="print")
        page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        sides = (".bd-sidebar-primary", ".bd-sidebar-secondary")
        for menu in (*sides, ".bd-header-article", ".prev-next-area"):
            assert not page.locator(menu).first.is_visible()
        details = "[...document.querySelectorAll('article details')]"
        assert page.evaluate(f"{details}.every(d => d.open)")
        text = page.evaluate("getComputedStyle(document.querySelector('article p')).color")
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert text == "rgb(0, 0, 0)"
        assert paper in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)")
        assert page.pdf(format="A4").startswith(b"%PDF")
        page.emulate_media(media="screen")


def in_both(paths: list[str]):
    """The checks of a class for each page, light and dark, opened once for all of them."""
    each = [(path, scheme) for path in paths for scheme in ("light", "dark")]
    ids = [f"{path}-{scheme}" for path, scheme in each]
    return pytest.mark.parametrize("page", each, ids=ids, indirect=True, scope="class")


@in_both([path for path in PAGES if path not in CHAPTERS])
class TestAPage(PageChecks):
    """Every page that is no chapter."""


@in_both(CHAPTERS)
class TestAChapter(ChapterChecks):
    """Every chapter."""


def test_the_switch_turns_the_page_dark_and_back(open_page):
    page = open_page(PAGES[0], color_scheme="light")
    seen = []
    for _ in range(3):
        page.locator("button.theme-switch-button:visible").first.click()
        seen.append(
            (
                page.locator("html").get_attribute("data-mode"),
                page.locator("html").get_attribute("data-theme"),
            )
        )
    assert {"light", "dark"} <= {theme for _, theme in seen}
    assert len(set(seen)) == 3
    assert not page.faults


def test_search_finds_the_rectangle(open_page):
    page = open_page("search.html?q=rectangle")
    results = page.locator("#search-results li a")
    results.first.wait_for()
    page.locator("#search-results a[href*='kv_cache']").first.wait_for()
    assert not page.faults


def test_search_is_one_key_away(open_page):
    page = open_page(PAGES[0])
    page.keyboard.press("Control+k")
    page.keyboard.type("rectangle")
    page.keyboard.press("Enter")
    page.locator("#search-results a[href*='kv_cache']").first.wait_for()


@pytest.mark.parametrize("path", CHAPTERS)
def test_a_chapter_reads_without_javascript(open_page, browser, address, path):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address}/{path}")
    assert page.locator("article h1").is_visible()
    assert page.locator("figure.gptlite-figure svg").first.is_visible()
    context.close()
