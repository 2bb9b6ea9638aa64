"""The built site in Chromium: what a reader sees on a desk, on a phone, in the dark, on paper, by screen reader."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest
import setup_cell
from screenshot import serving
from site_files import built_site, chapters, documents

pytestmark = [pytest.mark.browser, pytest.mark.site]

MAX_BYTES = 1_500_000  # on the wire: static hosts compress text
PHONE = {"width": 360, "height": 740}
PAGES = [f"{name}.html" for name in documents()]
CHAPTERS = [f"notebooks/{name}.html" for name in chapters()]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(built_site()) as where:
        yield where


@pytest.fixture
def open_page(browser, address):
    """A function that opens a page of the site and waits until its mathematics is set; keywords go to the context."""
    contexts = []

    def open_(path: str, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.faults, page.sizes = [], []
        page.on(
            "console", lambda m: m.type == "error" and page.faults.append(f"console: {m.text}")
        )
        page.on("pageerror", lambda error: page.faults.append(f"exception: {error}"))
        page.on(
            "request",
            lambda r: (
                r.url.startswith((address, "data:", "blob:"))
                or page.faults.append(f"asks {r.url}")
            ),
        )
        page.on(
            "response", lambda r: r.status < 400 or page.faults.append(f"{r.status}: {r.url}")
        )
        page.on(
            "requestfinished",
            lambda request: page.sizes.append(on_the_wire(request.response())),
        )
        page.goto(f"{address}/{path}", wait_until="networkidle")
        page.evaluate(
            "window.MathJax && MathJax.startup && MathJax.startup.promise.then(() => true)"
        )
        return page

    yield open_
    for context in contexts:
        context.close()


def on_the_wire(response) -> int:
    """Bytes that a static host sends: text compressed, fonts and pictures as they are."""
    body, kind = response.body(), response.headers.get("content-type", "")
    return len(gzip.compress(body)) if kind.startswith(("text/", "application/")) else len(body)


# A listing has thousands of coloured words, and axe takes a millisecond for the contrast of each: one of a kind stays.
SAMPLE_CODE = """() => {
    const behind = new Map([...document.querySelectorAll('pre')].map(pre => [pre, [pre, pre.parentElement].map(
        e => getComputedStyle(e).backgroundColor + e.className).join()]));
    const kind = word => {
        const {color, backgroundColor, fontWeight} = getComputedStyle(word);
        return [word.className, color, backgroundColor, fontWeight, behind.get(word.closest('pre'))].join();
    };
    const words = [...document.querySelectorAll('pre span')].filter(e => !e.children.length), kinds = words.map(kind);
    const first = new Map(kinds.map((kind, i) => [kind, i]).reverse());
    words.forEach((word, i) => { if (first.get(kinds[i]) !== i) word.replaceWith(word.textContent); });
    return first.size;
}"""


def axe_faults(page) -> list[str]:
    """Serious and critical faults that axe-core finds: rule, and the first element. The page is changed by it."""
    import axe_playwright_python

    page.evaluate(SAMPLE_CODE)
    page.add_script_tag(path=str(Path(axe_playwright_python.__file__).parent / "axe.min.js"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    return [
        f"{v['id']}: {v['nodes'][0]['html'][:200]} ({len(v['nodes'])} times)" for v in serious
    ]


def test_one_pale_word_of_a_listing_is_found(browser):
    words = '<span class="k">for</span> ' * 50
    page = browser.new_page()
    for style, expected in (("", 0), ("color: #eee", 1)):
        listing = f'<pre style="background: white">{words}<span class="k" style="{style}">if</span> {words}</pre>'
        page.set_content(
            f'<html lang="en"><title>A listing</title><main>{listing}</main></html>'
        )
        faults = axe_faults(page)
        assert page.locator("pre span").count() == 1 + expected  # one of a kind
        assert [fault.partition(":")[0] for fault in faults] == ["color-contrast"] * expected
    page.close()


@pytest.mark.parametrize("path", PAGES)
def test_a_page_loads_without_faults_or_other_hosts(open_page, path):
    page = open_page(path)
    page.mouse.wheel(0, 20_000)
    page.wait_for_timeout(200)
    assert not page.faults
    assert 10_000 < sum(page.sizes) < MAX_BYTES


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(open_page, path, scheme):
    page = open_page(path, color_scheme=scheme)
    assert page.locator("html").get_attribute("data-theme") == scheme
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    page.wait_for_timeout(200)
    assert not axe_faults(page)


@pytest.mark.parametrize("path", PAGES)
def test_a_phone_scrolls_only_downwards(open_page, path):
    page = open_page(path, viewport=PHONE)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    wide = """() => {
        const widest = [...document.querySelectorAll('article *')].sort(
            (a, b) => b.getBoundingClientRect().right - a.getBoundingClientRect().right)[0];
        return [document.documentElement.scrollWidth, widest.outerHTML.slice(0, 200)];
    }"""
    width, widest = page.evaluate(wide)
    assert width <= PHONE["width"], widest


@pytest.mark.parametrize("path", CHAPTERS)
def test_figures_fit_a_phone_and_can_be_read_there(open_page, path):
    page = open_page(path, viewport=PHONE)
    sizes = page.evaluate("""() => [...document.querySelectorAll('figure.gptlite-figure')].map(f => {
        const svg = f.querySelector('svg').getBoundingClientRect();
        const graph = f.querySelector('svg').style.minWidth !== '', text = [...f.querySelectorAll('svg text')];
        const smallest = Math.min(...text.map(t => parseFloat(t.getAttribute('font-size')) * t.getScreenCTM().a));
        return [svg.width, f.getBoundingClientRect().width, svg.height, graph && smallest, f.style.overflowX];
    })""")
    assert sizes
    for svg, box, height, smallest, overflow in sizes:
        assert svg > 150 and height > 60
        # the drawing of a graph keeps its size, so that it can be read, and scrolls in its own box; a figure fits
        assert (smallest >= 9 and overflow == "auto") if smallest else svg <= box + 1


@pytest.mark.parametrize("path", CHAPTERS)
def test_figures_take_the_pages_text_colour(open_page, path):
    """Text in a figure is dark on a light page and light on a dark one."""

    def lightness(scheme: str) -> list[float]:
        page = open_page(path, color_scheme=scheme)
        colours = page.evaluate("""() => [document.body, ...document.querySelectorAll('figure.gptlite-figure svg')]
            .map((e, i) => getComputedStyle(e)[i ? 'color' : 'backgroundColor'])
            .map(colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number))""")
        return [sum(rgb) / 765 for rgb in colours]

    background, *text = lightness("light")
    assert background > 0.9 and text and max(text) < 0.3
    background, *text = lightness("dark")
    assert background < 0.2 and text and min(text) > 0.7


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
def test_folded_solutions_open_with_the_keyboard(open_page, path):
    page = open_page(path)
    folded = page.locator("article details")
    assert folded.count() >= 3
    for i in range(folded.count()):
        box = folded.nth(i)
        if box.evaluate("d => d.open"):
            continue
        inside = box.locator(":scope > :not(summary)").first
        assert not inside.is_visible()
        box.locator("summary").first.focus()
        page.keyboard.press("Enter")
        inside.wait_for(state="visible")


@pytest.mark.parametrize("path", CHAPTERS)
def test_the_colab_button_leads_to_the_notebook(open_page, path):
    page = open_page(path)
    if not setup_cell.published():
        assert page.locator(".dropdown-launch-buttons").count() == 0
        return
    page.locator(".dropdown-launch-buttons button").click()
    link = page.locator("a[href*='colab.research.google.com']:visible").first
    assert link.get_attribute("href") == setup_cell.colab_link(
        Path(path).with_suffix(".ipynb").name
    )


@pytest.mark.parametrize("path", CHAPTERS)
def test_mathematics_is_set(open_page, path):
    page = open_page(path)
    assert page.locator("mjx-container").count() > 5
    assert page.locator("mjx-merror").count() == 0
    families = page.evaluate(
        "[...document.fonts].filter(f => f.status === 'loaded').map(f => f.family)"
    )
    assert {"Source Serif 4", "Source Code Pro"} <= {family.strip('"') for family in families}


@pytest.mark.parametrize("path", CHAPTERS)
def test_a_chapter_prints(open_page, path):
    """On paper: no menus, solutions open, black on white whatever the screen showed."""
    page = open_page(path, color_scheme="dark")
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    for menu in (
        ".bd-sidebar-primary",
        ".bd-sidebar-secondary",
        ".bd-header-article",
        ".prev-next-area",
    ):
        assert not page.locator(menu).first.is_visible()
    assert page.evaluate("[...document.querySelectorAll('article details')].every(d => d.open)")
    text, paper = page.evaluate("""() => ['color', 'backgroundColor'].map(
        key => getComputedStyle(document.querySelector(key === 'color' ? 'article p' : 'body'))[key])""")
    assert text == "rgb(0, 0, 0)"
    assert paper in ("rgb(255, 255, 255)", "rgba(0, 0, 0, 0)")
    assert page.pdf(format="A4").startswith(b"%PDF")


@pytest.mark.parametrize("path", CHAPTERS)
def test_a_chapter_reads_without_javascript(open_page, browser, address, path):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address}/{path}")
    assert page.locator("article h1").is_visible()
    assert page.locator("figure.gptlite-figure svg").first.is_visible()
    context.close()
