"""`make lab` opens the first chapter in JupyterLab and asks its reader nothing."""

import os
import re
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.browser, pytest.mark.slow]


def lab_command() -> tuple[dict[str, str], list[str]]:
    """The environment and the command line that `make lab` runs."""
    said = subprocess.run(
        ["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    words = shlex.split(next(line for line in said.splitlines() if "jupyterlab" in line))
    settings = [word for word in words if re.match(r"[A-Z_]+=", word)]
    return dict(word.split("=", 1) for word in settings), words[len(settings) :]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of JupyterLab as `make lab` starts it, for somebody who never started it."""
    home = tmp_path_factory.mktemp("home")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings, command = lab_command()
    environment = os.environ | settings | {"HOME": str(home), "JUPYTER_PLATFORM_DIRS": "1"}
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        environment.pop(name, None)
    options = ["--no-browser", f"--ServerApp.port={port}", "--IdentityProvider.token="]
    options += ["--allow-root"] if os.geteuid() == 0 else []
    log = (home / "log.txt").open("w")
    server = subprocess.Popen(
        [*command, *options],
        cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=1).read()
                break
            except OSError:
                assert server.poll() is None, (home / "log.txt").read_text()[-2000:]
                time.sleep(0.5)
        else:
            pytest.fail((home / "log.txt").read_text()[-2000:])
        # where the command leads a browser to: the file that it names, in whose folder it is
        yield f"{address}/lab/tree/{Path(command[-1]).name}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
        log.close()


def test_the_first_chapter_opens_and_nothing_is_asked(lab, browser):
    toc = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    first = re.search(r"notebooks/(\w+)", toc)[1]
    assert lab.endswith(f"/lab/tree/{first}.ipynb")
    page = browser.new_page()
    page.goto(lab)
    title = page.locator(".jp-Notebook h1").first
    title.wait_for(timeout=90_000)
    page.wait_for_timeout(6_000)  # the question about news came after five seconds
    asked = page.locator(".jp-Dialog, .jp-Notification-Toast, .Toastify__toast")
    assert [asked.nth(i).inner_text() for i in range(asked.count())] == []
    page.close()
