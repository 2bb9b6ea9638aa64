"""The model in the browser: it writes what PyTorch writes, and what fails says what to do."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from screenshot import serving
from site_files import built_site
from test_site_browser import PHONE, axe_faults

from gptlite.checkpoints import load_pretrained
from gptlite.generate import generate
from gptlite.kv_cache import KVCache
from gptlite.units import quantity

playwright_api = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.browser, pytest.mark.site]

PAGE = "book/try_it.html"
WAIT = 120_000  # ms, for a busy machine; no test passes by being fast
RUNTIME = "ort-wasm-simd-threaded.wasm"
PROMPT = "FLORIZEL:\nWhat you do\n"
RECORD = """() => {
    const app = document.querySelector('.try-it');
    const text = (selector) => app.querySelector(selector)?.textContent ?? '';
    window.seen = [];
    const look = () => {
        const state = {status: text('[role=status]'), bytes: text('.bytes'),
            predicted: text('tbody td'), measured: text('tbody td:last-child'),
            written: text('[role=log] mark').length};
        const last = JSON.stringify(window.seen.at(-1));
        if (JSON.stringify(state) !== last) window.seen.push(state);
    };
    const all = {subtree: true, childList: true, characterData: true};
    new MutationObserver(look).observe(app, all);
}"""


@pytest.fixture(scope="module")
def site() -> Path:
    """The built site, if it has the model in it."""
    if not (built_site() / "try_it" / "models" / "models.json").exists():
        message = "the model was left out of the built site; `make book` says why."
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    return built_site()


@pytest.fixture(scope="module")
def about(site) -> dict:
    """What models.json says."""
    return json.loads((site / "try_it" / "models" / "models.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    with serving(site) as where:
        yield where


def open_in(context, where: str):
    """The page in a browser context; it notes what is asked for and what goes wrong."""
    page = context.new_page()
    page.set_default_timeout(WAIT)
    page.asked, page.faults = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on(
        "console",
        lambda m: m.type in ("error", "warning") and page.faults.append(f"console: {m.text}"),
    )
    page.on("pageerror", lambda error: page.faults.append(f"exception: {error}"))
    page.goto(where, wait_until="networkidle")
    return page


@pytest.fixture
def open_page(browser, address):
    """A function that opens the page, with nothing loaded; keywords go to the context."""
    contexts = []

    def open_(where: str = f"{address}/{PAGE}", **options):
        contexts.append(browser.new_context(**options))
        return open_in(contexts[-1], where)

    yield open_
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def page(browser, address):
    """The page for tests that come to it one after another, so that models are loaded once."""
    context = browser.new_context()
    yield open_in(context, f"{address}/{PAGE}")
    context.close()


def fill(page, prompt=PROMPT, precision="int8", count=12, temperature=0, cache=True) -> None:
    page.fill("textarea", prompt)
    page.check(f"input[value={precision}]")
    page.fill("input[name=count]", str(count))
    page.fill("input[name=temperature]", str(temperature))
    page.set_checked("input[name=cache]", cache)


def start(page, **choices) -> None:
    fill(page, **choices)
    page.click("button[type=submit]")


def status(page) -> str:
    """What the page says when the run has ended."""
    page.wait_for_function(
        "document.querySelector('.try-it').dataset.state === 'idle'", timeout=WAIT
    )
    return page.text_content("[role=status]")


def written(page) -> str:
    """What the model has added to the prompt."""
    return page.text_content("[role=log] mark")


def run(page, **choices) -> str:
    """Start, wait for the end, and return what was written; that it ended well is checked."""
    start(page, **choices)
    said = status(page)
    assert "characters written" in said, said
    return written(page)


def test_nothing_of_the_model_is_asked_for_before_the_click(open_page, about):
    page = open_page()
    assert not [url for url in page.asked if "/try_it/" in url]
    stated = page.text_content("article")
    assert all(
        quantity(model["bytes"], "bytes") in stated for model in about["models"].values()
    )
    run(page)
    files = {url.rsplit("/", 1)[1] for url in page.asked if "/try_it/" in url}
    assert {"page.js", "gpt.js", "int8.onnx", "ort.wasm.bundle.min.mjs", RUNTIME} <= files
    assert not {"fp32.onnx", "int4.onnx"} & files


def test_the_model_writes_what_pytorch_writes(page, about):
    model, tokenizer = (checkpoint := load_pretrained("teacher")).model, checkpoint.tokenizer
    idx = tokenizer.encode(PROMPT)[None]
    expected = tokenizer.decode(
        generate(model, idx, 100, KVCache(model.config), temperature=0)[0, idx.shape[1] :]
    )
    assert run(page, precision="fp32", count=100) == expected
    greedy = about["greedy"]
    assert (
        run(page, prompt=greedy["prompt"], precision="fp32", count=len(greedy["text"]))
        == greedy["text"]
    )


def test_the_text_is_the_same_without_the_cache(page):
    cached = run(page, precision="fp32", count=30)
    assert run(page, precision="fp32", count=30, cache=False) == cached
    assert {"fp32, cache", "fp32, no cache"} <= set(
        page.locator(".results tbody th").all_text_contents()
    )


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_text_streams(page, precision):
    page.evaluate(RECORD)
    text = run(page, precision=precision, count=150, temperature=0.7)
    lengths = [
        state["written"]
        for state in page.evaluate("window.seen")
        if state["status"] == "Writing."
    ]
    assert len(text) == 150
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 5


def test_the_prediction_stands_before_the_first_character_and_beside_the_measurement(open_page):
    page = open_page()
    page.evaluate(RECORD)
    run(page, count=40)
    seen = page.evaluate("window.seen")
    assert any(
        state["predicted"] and not state["measured"] and not state["written"] for state in seen
    )
    assert not any(state["written"] and not state["predicted"] for state in seen)
    cells = (
        page.locator(".results table")
        .first.locator("tbody tr")
        .first.locator("th, td")
        .all_text_contents()
    )
    assert cells[0] == "int8, cache"
    assert all(re.fullmatch(r"[\d.,]+( ms)?", cell) for cell in cells[1:5]), cells
    assert re.fullmatch(r"\d+% (longer|shorter)|as predicted", cells[5])
    predicted, measured = (float(cells[i].replace(",", "")) for i in (3, 4))
    gap = (
        0
        if cells[5] == "as predicted"
        else int(cells[5].split("%")[0]) * (1 if "longer" in cells[5] else -1)
    )
    assert gap == pytest.approx(
        100 * (predicted / measured - 1), abs=2
    )  # of figures with three digits
    terms = [
        float(number) for number in re.findall(r"([\d.]+) ms", page.text_content(".terms"))
    ]
    assert sum(terms[:-1]) == pytest.approx(terms[-1], rel=0.02)


def test_the_download_is_counted_to_its_end(open_page, about):
    page = open_page()
    page.evaluate(RECORD)
    run(page)
    counted = [
        state["bytes"].split() for state in page.evaluate("window.seen") if state["bytes"]
    ]
    assert len(counted) > 2
    got, _, total, unit = counted[-1]
    assert got == total and unit == "MB"
    runtime = int(page.get_attribute(".try-it", "data-runtime-bytes"))
    assert float(total) == pytest.approx(
        (runtime + about["models"]["int8"]["bytes"]) / 1e6, abs=0.1
    )
    assert not page.locator("progress").is_visible()


def test_a_screen_reader_hears_states_and_not_characters(open_page):
    page = open_page()
    page.evaluate(RECORD)
    run(page, count=60)
    heard = list(dict.fromkeys(state["status"] for state in page.evaluate("window.seen")))
    assert len(heard) == 5  # nothing yet, loading, timing, writing, done
    assert page.get_attribute("[role=log]", "aria-live") == "off"
    page.focus("[role=log]")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "log"


def test_an_empty_prompt_begins_with_a_new_line(page):
    run(page, prompt="")
    assert "begins with a new line" in status(page)
    assert page.text_content("[role=log]") == "\n" + written(page)


def test_unknown_characters_are_named_and_left_out(page):
    run(page, prompt="Été 42 😀!")
    assert "“É”, “é”, “4”, “2”, “😀”" in status(page)
    assert page.text_content("[role=log]") == "t  !" + written(page)
    run(page, prompt="日本")
    assert "“日”, “本”" in status(page) and "begins with a new line" in status(page)


def test_a_double_click_starts_one_run(open_page):
    page = open_page()
    fill(page, count=150)
    page.dblclick("button[type=submit]")
    page.wait_for_selector("[role=log] mark:not(:empty)")
    page.click("button[type=submit]")  # nor does a click in the middle
    assert "150 characters written" in status(page)
    assert len(written(page)) == 150
    assert len([url for url in page.asked if url.endswith("/int8.onnx")]) == 1
    run(page)
    assert (
        len([url for url in page.asked if url.endswith("/int8.onnx")]) == 1
    )  # what was loaded is kept


def test_stop_ends_a_run_and_another_can_start(page):
    assert page.is_disabled("button[name=stop]")
    start(page, precision="int4", count=200)
    page.wait_for_selector("[role=log] mark:not(:empty)")
    page.click("button[name=stop]")
    assert "Stopped." in status(page)
    assert 0 < len(written(page)) < 200
    assert len(run(page, precision="int4", count=5)) == 5


def test_stop_ends_a_download(open_page):
    page = open_page()
    page.route("**/int8.onnx", lambda route: None)  # never answered
    start(page)
    page.wait_for_selector("progress:not([hidden])")
    page.click("button[name=stop]")
    assert status(page) == "Stopped."
    page.unroute("**/int8.onnx")
    assert len(run(page)) == 12


def test_the_text_ends_where_the_context_does(page, about):
    block_size, prompt = about["config"]["block_size"], "ROMEO:\n" + "love " * 38
    text = run(page, prompt=prompt, count=256)
    assert f"The model sees {block_size} characters" in status(page)
    assert len(prompt) + len(text) == block_size + 1  # the last one is written and not read


@pytest.mark.parametrize(
    ("how", "file"),
    [
        ("missing", file)
        for file in ("gpt.js", "models.json", "int8.onnx", "calibrate-int8.onnx", RUNTIME)
    ]
    + [("unreachable", file) for file in ("page.js", "int8.onnx", "ort.wasm.bundle.min.mjs")],
)
def test_a_file_that_does_not_come_is_said_with_what_to_do(open_page, how, file):
    page = open_page()
    page.route(
        f"**/{file}",
        lambda r: r.abort() if how == "unreachable" else r.fulfill(status=404, body=""),
    )
    start(page)
    page.wait_for_function(
        "!/^(Nothing|Loading|Timing)/.test(document.querySelector('[role=status]').textContent)"
    )
    said = page.text_content("[role=status]")
    assert said.endswith(".") and ". " not in said  # one sentence
    assert "reload the page" in said or "press Start again" in said
    if file.endswith((".json", ".onnx", ".wasm")):
        assert file in said
        page.unroute(f"**/{file}")
        assert len(run(page)) == 12  # a second try may succeed


@pytest.mark.parametrize("body", ["", "short", "zeros"])
def test_a_broken_model_is_refused_in_a_sentence(open_page, about, body):
    size = about["models"]["int8"]["bytes"]
    page = open_page()
    page.route(
        "**/int8.onnx",
        lambda r: r.fulfill(body={"": b"", "short": b"\0" * 1000, "zeros": b"\0" * size}[body]),
    )
    start(page)
    said = status(page)
    assert "reload the page" in said and said.endswith(".")
    assert body == "zeros" or f"of {size}" in said
    assert page.locator("[role=log]").text_content() == ""


def test_it_works_with_the_keyboard_alone(page):
    fill(page)
    page.focus("textarea")
    stops = []
    while "submit" not in stops:
        page.keyboard.press("Tab")
        stops.append(
            page.evaluate("document.activeElement.name || document.activeElement.type")
        )
        if stops[-1] == "precision":
            page.keyboard.press("ArrowRight")
        if stops[-1] == "cache":
            page.keyboard.press("Space")
    assert stops == ["precision", "count", "temperature", "cache", "submit"]
    page.keyboard.press("Enter")
    assert "12 characters written" in status(page)
    assert "int4, no cache" in page.locator(".results tbody th").all_text_contents()
    assert page.evaluate("document.activeElement.type") == "submit"  # where the reader was


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_accessibility_with_results(page, scheme):
    page.emulate_media(color_scheme=scheme)
    run(page)
    assert page.locator("html").get_attribute("data-theme") == scheme
    assert not axe_faults(page)


def test_a_phone_scrolls_only_downwards_with_results(page):
    page.set_viewport_size(PHONE)
    run(page, count=60, temperature=1)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.locator(".results table").first.is_visible()


def test_it_works_under_a_path_and_asks_no_other_host(open_page, site, tmp_path):
    (tmp_path / "some" / "where").mkdir(parents=True)
    (tmp_path / "some" / "where" / "book").symlink_to(site, target_is_directory=True)
    with serving(tmp_path) as address:
        page = open_page(f"{address}/some/where/book/{PAGE}")
        assert len(run(page)) == 12
    assert not [
        url
        for url in page.asked
        if not url.startswith((f"{address}/some/where/book/", "data:", "blob:"))
    ]
    assert not page.faults


def test_without_javascript_the_page_says_what_is_missing(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address}/{PAGE}")
    assert "JavaScript" in page.text_content("[role=status]")
    assert page.is_disabled("button[type=submit]")
    context.close()


@pytest.fixture(scope="module")
def module(browser, address):
    """A function that calls another, written in JavaScript, on one of the page's modules."""
    page = browser.new_page()
    page.goto(f"{address}/{PAGE}")
    yield lambda name, function: page.evaluate(
        f"async () => ({function})(await import('../try_it/{name}.js'))"
    )
    page.close()


def test_the_tokenizer_is_the_books(module, about):
    tokens = load_pretrained("teacher").tokenizer.encode(PROMPT).tolist()
    there = f"({{Tokenizer}}) => new Tokenizer({json.dumps(about['vocabulary'])})"
    assert module("tokenizer", f"(m) => ({there})(m).encode({json.dumps(PROMPT)})") == {
        "tokens": tokens,
        "unknown": [],
    }
    assert module("tokenizer", f"(m) => ({there})(m).decode({tokens})") == PROMPT
    assert module("tokenizer", f"(m) => ({there})(m).encode('é€é')") == {
        "tokens": [],
        "unknown": ["é", "€"],
    }


def test_a_cache_grows_in_place_row_by_row(module):
    grown = module(
        "gpt",
        """({append}) => {
        // three rows of two, and room
        const cache = Float32Array.from([1, 2, 11, 12, 21, 22, 0, 0, 0, 0, 0, 0, 0]);
        append(cache, 3, 2, Float32Array.of(3, 13, 23));
        append(cache, 3, 3, Float32Array.of(4, 14, 24));
        return [...cache];
    }""",
    )
    assert grown == [1, 2, 3, 4, 11, 12, 13, 14, 21, 22, 23, 24, 0]


def test_an_empty_cache_takes_the_prompt(module):
    assert module(
        "gpt",
        """({append}) => {
        const cache = new Float32Array(5);
        append(cache, 2, 0, Float32Array.of(1, 2, 3, 4));
        return [...cache];
    }""",
    ) == [1, 2, 3, 4, 0]


def test_a_cache_goes_by_the_graphs_names_and_holds_nothing_else(module):
    fed = module(
        "gpt",
        """({Cache}) => {
        class Tensor {
            constructor(type, data, dims) { this.data = [...data]; this.dims = dims; }
        }
        const session = {inputNames: ['idx', 'past.k0', 'past.v0']};
        const cache = new Cache({Tensor}, session, {n_kv_head: 2, head_dim: 1, block_size: 3});
        const fresh = (...data) => ({data: Float32Array.from(data)});
        const empty = cache.feed();
        cache.take({'new.k0': fresh(1, 2, 11, 12), 'new.v0': fresh(5, 6, 15, 16)}, 2);
        cache.take({'new.k0': fresh(3, 13), 'new.v0': fresh(7, 17)}, 1);
        const entries = (inputs) => Object.entries(inputs).map(([k, t]) => [k, t.data, t.dims]);
        return [empty, cache.feed()].map(entries);
    }""",
    )
    assert fed == [
        [["past.k0", [], [1, 2, 0, 1]], ["past.v0", [], [1, 2, 0, 1]]],
        [
            ["past.k0", [1, 2, 3, 11, 12, 13], [1, 2, 3, 1]],
            ["past.v0", [5, 6, 7, 15, 16, 17], [1, 2, 3, 1]],
        ],
    ]


def test_sampling_follows_the_distribution_and_is_greedy_at_zero(module):
    draw = "({sample}) => [0, 0.24, 0.26, 0.49, 0.51, 0.999].map("
    draw += "(r) => sample(Float32Array.of(%s), %s, () => r))"
    quarter = "Math.log(1), Math.log(1), Math.log(2)"  # probabilities 1/4, 1/4, 1/2
    assert module("gpt", draw % (quarter, 1)) == [0, 0, 1, 1, 2, 2]
    assert module("gpt", draw % (quarter, 0)) == [2] * 6
    assert module("gpt", draw % ("5, 5, 1", 0)) == [0] * 6  # the first of equals, as PyTorch
    assert module("gpt", draw % ("1000, 0, -1000", 0.001)) == [0] * 6  # no overflow


def test_the_loop_reads_the_prompt_once_and_stops_at_the_context(module):
    calls = """async ({stream}) => {
        const reads = [], model = {config: {block_size: 5}, forget: () => reads.push('forget'),
            read: async (tokens) => {
                reads.push([...tokens]);
                return Float32Array.of(0, 1, 0);
            }};
        const text = [], options = {count: 9, cached: %s};
        for await (const token of stream(model, [2, 0, 2], options)) text.push(token);
        return {reads, text};
    }"""
    assert module("gpt", calls % "true") == {
        "reads": ["forget", [2, 0, 2], [1], [1]],
        "text": [1, 1, 1],
    }
    without = module("gpt", calls % "false")
    assert [read for read in without["reads"] if read != "forget"] == [
        [2, 0, 2],
        [2, 0, 2, 1],
        [2, 0, 2, 1, 1],
    ]
    assert without["reads"][-2] == "forget" and without["text"] == [1, 1, 1]


def test_parts_are_timed_in_turns_and_each_by_itself(module):
    order, seconds = module(
        "predict",
        """async ({timed}) => {
        const real = performance.now;
        let order = '', clock = 0; // a clock that the parts alone move on
        performance.now = () => clock;
        try {
            const parts = [
                () => { order += 'a'; clock += 3; },
                () => { order += 'b'; clock += 0.5; },
            ];
            const seconds = await timed(parts);
            return [order, seconds];
        } finally { performance.now = real; }
    }""",
    )
    assert re.fullmatch("(ab)+", order)
    assert seconds == pytest.approx([0.003, 0.0005])


def test_a_prediction_is_the_sum_of_three_parts_that_do_not_know_the_model(page, about):
    start(page, precision="fp32")
    status(page)
    words = page.text_content(".terms")
    parts = ["of matrix products", "of attention", "for what stands between"]
    assert re.findall(rf" ms ({'|'.join(parts)})", words) == parts
    for name in ("fp32", "attention", "between"):
        assert about["calibration"][name] == f"calibrate-{name}.onnx"
        assert [url for url in page.asked if url.endswith(f"/calibrate-{name}.onnx")]


def test_a_token_is_timed_by_the_median_of_windows(module):
    call = "({tokenTime}) => tokenTime(%s) ?? 'none'"
    assert module("predict", call % "[]") == "none"
    assert module("predict", call % "[3]") == 3
    assert (
        module("predict", call % "[0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4]") == 2
    )  # a coarse clock
    assert module("predict", call % "[...Array(20).fill(1), 100]") == 1  # one interruption
