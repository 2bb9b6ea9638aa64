"""Build the site, warnings as errors, and print the page to open.

python scripts/site/build_book.py _build/html

It always builds everything: Sphinx reports a warning only for a page that it reads, so a
second, partial build would pass where the first one failed.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import book_extension

ROOT = Path(__file__).resolve().parents[2]
STEP = re.compile(r"(reading sources|writing output)\.\.\. \[\s*(\d+)%\] (\S+)")


def build(log: Path) -> int:
    """The exit status of Jupyter Book, shown at work; its full output goes to `log`."""
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    command = [str(jupyter_book), "build", "-W", "-n", "--keep-going", "--all", str(ROOT)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        )
        for raw in process.stdout:
            line = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", raw).rstrip()  # without colours
            file.write(line + "\n")
            if re.search(r"WARNING|ERROR|[Ee]xception|Traceback", line):
                print(f"  {line}", flush=True)
            elif step := STEP.match(line):
                print(f"  {step[1]:16} {step[2]:>3}%  {step[3]}", flush=True)
    return process.wait()


def start_apps(folder: Path) -> subprocess.Popen | None:
    """Begin to make the apps that the site serves beside its pages, where this book has any.

    They take as long as the pages, and a second process makes them meanwhile.
    """
    script = ROOT / "scripts" / "site" / "static_apps.py"
    if not script.exists():
        return None
    print("Making what is served beside the pages, and the pages", flush=True)
    return subprocess.Popen([sys.executable, str(script), str(folder)], cwd=ROOT)


def main() -> None:
    """The command line."""
    site, started = ROOT / sys.argv[1], time.perf_counter()
    for stale in (site, site.parent / ".doctrees"):
        shutil.rmtree(stale, ignore_errors=True)
    apps = start_apps(site.parent)
    log = site.parent / "book.log"
    failed = build(log) or not (site / "index.html").exists()
    # what fails there is left out, with a warning; a fault of the script itself fails the build
    failed = (apps is not None and apps.wait() != 0) or failed
    if failed:
        lines = log.read_text(errors="replace").splitlines()
        print("\n".join(f"  {line}" for line in lines[-8:]))
        where = log.relative_to(ROOT)
        sys.exit(f"make: the book was not built; see above; the whole log is in {where}.")
    if apps is not None:
        shutil.copytree(site.parent / "apps", site, dirs_exist_ok=True)
        book_extension.place_app(site, site / "try_it")
    pages = len(list(site.rglob("*.html"))) - (site / "netron" / "index.html").exists()
    took = f"{time.perf_counter() - started:.0f} s"
    print(f"Built {pages} pages in {took}. Open {(site / 'index.html').as_uri()}")


if __name__ == "__main__":
    main()
