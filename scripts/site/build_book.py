"""Build the site, warnings as errors, and print the page to open: python scripts/site/build_book.py _build/html.

It always builds everything: Sphinx reports a warning only for a page that it reads, so a second, partial build would
pass where the first one failed.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def build(log: Path) -> int:
    """Run Jupyter Book, showing how far it is; its full output goes to `log`. Its exit status."""
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
            elif step := re.match(
                r"(reading sources|writing output)\.\.\. \[\s*(\d+)%\] (\S+)", line
            ):
                print(f"  {step[1]:16} {step[2]:>3}%  {step[3]}", flush=True)
    return process.wait()


def main() -> None:
    """The command line."""
    site, started = ROOT / sys.argv[1], time.perf_counter()
    for stale in (site, site.parent / ".doctrees"):
        shutil.rmtree(stale, ignore_errors=True)
    if f"{site.parent.name}/apps" in (ROOT / "_config.yml").read_text(encoding="utf-8"):
        import static_apps

        print("Making what is served beside the pages", flush=True)
        static_apps.fill(site.parent)
    log = site.parent / "book.log"
    if build(log) or not (site / "index.html").exists():
        print(
            "\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-8:])
        )
        sys.exit(
            f"make: the book was not built; see above; the whole log is in {log.relative_to(ROOT)}."
        )
    pages = len(list(site.rglob("*.html"))) - (site / "netron" / "index.html").exists()
    print(
        f"Built {pages} pages in {time.perf_counter() - started:.0f} s. Open {(site / 'index.html').as_uri()}"
    )


if __name__ == "__main__":
    main()
