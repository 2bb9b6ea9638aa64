"""What holds the project together: import rules, versions, addresses, the Makefile's words."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import make_venv
import pytest
import set_address
import setup_cell

import gptlite

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options
    )


def test_imports_run_one_way():
    done = run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")
    assert done.returncode == 0, done.stdout


def test_a_technique_that_imports_another_is_found(tmp_path):
    """The rules are not empty: a copy in which the model imports the cache breaks them."""
    shutil.copytree(ROOT / "gptlite", tmp_path / "gptlite")
    model = tmp_path / "gptlite" / "model.py"
    model.write_text("from gptlite import kv_cache\n" + model.read_text())
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "gptlite.model is not allowed to import gptlite.kv_cache" in done.stdout


def test_importing_a_module_loads_nothing_heavy():
    heavy = ["transformers", "matplotlib", "onnx", "onnxruntime", "torchao", "IPython"]
    code = "import sys, gptlite.kv_cache, gptlite.show; "
    code += f"print([m for m in {heavy} if m in sys.modules])"
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"


def test_one_version_everywhere():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"(?m)^version: {re.escape(gptlite.__version__)}$", citation)
    assert importlib.metadata.version("gptlite") == gptlite.__version__


def test_every_requirement_is_pinned():
    lines = [
        line.split(";")[0].strip()
        for line in (ROOT / "requirements.txt").read_text().splitlines()
    ]
    lines = [line.partition("#")[0].strip() for line in lines]
    loose = [line for line in lines if line and not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    # a release of Netron stops working half a year after it was built: none can be kept
    assert [re.split("[<>=]", line)[0] for line in loose] == ["netron"]


def test_one_address_everywhere():
    """README leads to Colab only where there is an address."""
    address = setup_cell.repository()[0].removeprefix("https://github.com/")
    readme, citation = (
        (ROOT / name).read_text(encoding="utf-8") for name in set_address.FOLLOWERS
    )
    named = re.findall(r"colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)", readme)
    assert set(named) == ({address} if setup_cell.published() else set())
    assert f'repository-code: "https://github.com/{address}"' in citation


def test_the_address_moves_and_nothing_else_does():
    text = (
        "see https://github.com/a/b/blob/main/x, https://github.com/a/bc, "
        "https://a.github.io/b/ "
        "and https://colab.research.google.com/github/a/b/blob/main/y; "
        "https://github.com/karpathy/nanoGPT stays"
    )
    moved = set_address.follow(text, "a/b", "New/book")
    assert "github.com/New/book/blob/main/x" in moved
    assert "https://github.com/a/bc" in moved
    assert "https://new.github.io/book/" in moved
    assert "colab.research.google.com/github/New/book/blob/main/y" in moved
    assert "karpathy/nanoGPT" in moved


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"(?m)^\.PHONY: (.*)$", makefile)[1].split())
    shown = run("make", "help").stdout
    assert all(re.search(rf"(?m)^{target} ", shown) for target in targets)


def test_make_says_that_python_is_missing(tmp_path):
    done = run("make", "book", "PYTHON=no-such-python", f"VENV={tmp_path / 'venv'}")
    assert done.returncode
    assert "there is no no-such-python here" in done.stdout + done.stderr


def refusal(tmp_path: Path) -> str:
    with pytest.raises(SystemExit) as stop:
        make_venv.main(str(tmp_path / "venv"))
    return str(stop.value)


def test_an_old_python_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(make_venv, "FLOOR", (99, 0))
    assert "but the book needs 99.0 or newer" in refusal(tmp_path)


def test_a_missing_venv_module_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert "has no venv module; install it" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            "WARNING: Retrying ... NewConnectionError: Failed to establish a new connection",
            "is there a network?",
        ),
        (
            "ERROR: Could not find a version that satisfies x\n"
            "ERROR: No matching distribution found for x",
            "lacks a package",
        ),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: something else", "its own message is above"),
    ],
)
def test_a_failed_install_says_why(tmp_path, monkeypatch, said, sentence):
    (tmp_path / "venv").mkdir()
    monkeypatch.setattr(make_venv, "run", lambda *a, **k: 0)
    monkeypatch.setattr(make_venv, "pip_install", lambda *a: (1, said.lower()))
    assert sentence in refusal(tmp_path)


def test_the_install_script_is_read_by_an_old_python():
    """It says that a Python is too old, so it may use nothing that an old one cannot parse."""
    source = (ROOT / "scripts" / "make_venv.py").read_text()
    assert not re.search(r"\bf[\"']|:=|\bmatch \w+:|-> |: (?:str|int|Path)\b", source)
