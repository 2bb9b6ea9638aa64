"""How fast the model in the page is, predicted and measured, in a headless Chromium.

python scripts/site/time_try_it.py [ROUNDS]      5 rounds by default

After `make book`, on a machine that does nothing else; the book keeps the table. A round visits
each way to run in a browser context of its own, with nothing loaded. There the page runs twice:
the first run says when the first token comes, cold; the second is warm, for by then the browser
has compiled for speed. All numbers are those that the page shows.
"""

import json
import platform
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from screenshot import CHROMIUM_FLAGS, ROOT, serving

from gptlite.device import processor_name
from gptlite.files import write_atomically

RECORD = ROOT / "assets" / "results" / "try_it" / "speeds.json"
PAGE = "book/try_it.html"
WAIT = 300_000  # ms
IDLE = "document.querySelector('.try-it').dataset.state === 'idle'"
VERSION = "import(new URL('../try_it/ort/ort.wasm.bundle.min.mjs', location))"
VERSION += ".then((ort) => ort.env.versions.web)"


@dataclass(frozen=True)
class Way:
    """A way to run the model: what the reader chooses."""

    precision: str
    cached: bool
    characters: int

    @property
    def key(self) -> str:
        """What the page calls its row in the first table."""
        return f"{self.precision} {'true' if self.cached else 'false'}"


# all cached ones write as many, since a token takes longer the more there are before it
WAYS = (
    Way("fp32", True, 200),
    Way("int8", True, 200),
    Way("int4", True, 200),
    Way("fp32", False, 60),
)


def number(cell: str) -> float:
    """The number at the start of a table's cell: 1234.0 of "1,234 ms"."""
    found = re.match(r"[\d,]+(\.\d+)?(?= |$)", cell)
    if not found:
        raise ValueError(
            f"the page shows {cell!r} where a number should be; it may have stopped early."
        )
    return float(found[0].replace(",", ""))


def visit(page: Any, way: Way) -> dict[str, float]:
    """Milliseconds of the page, opened anew and run twice as `way` says; and GB/s if shown."""

    def cells(table: int, key: str) -> list[str]:
        row = page.locator(".results table").nth(table).locator(f'tr[data-key="{key}"]')
        return row.locator("th, td").all_text_contents()

    def run() -> list[str]:
        page.click("button[type=submit]")
        page.wait_for_function(IDLE)
        if "characters written" not in (said := page.text_content("[role=status]")):
            raise RuntimeError(f"the page did not write; it says: {said}")
        return cells(0, way.key)

    page.check(f"input[value={way.precision}]")
    page.fill("input[name=count]", str(way.characters))
    page.fill("input[name=temperature]", "0")
    page.set_checked("input[name=cache]", way.cached)
    cold, warm = run(), run()
    predicted, measured = 1e3 / number(warm[3]), 1e3 / number(warm[4])
    numbers = {"first_ms": number(cold[2]), "predicted_ms": predicted, "measured_ms": measured}
    numbers["measured_to_predicted"] = measured / predicted
    return numbers | (
        {"products_gb_s": number(cells(1, way.precision)[3])} if way.cached else {}
    )


def summary(rounds: Iterable[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median and range of each number, to four digits, over the rounds."""
    rounds = list(rounds)
    columns = {name: [numbers[name] for numbers in rounds] for name in rounds[0]}
    statistic = {"median": statistics.median, "low": min, "high": max}
    return {
        name: {word: float(f"{of(values):.4g}") for word, of in statistic.items()}
        for name, values in columns.items()
    }


def keep(record: dict[str, Any], path: Path = RECORD) -> None:
    """Write a record into the file, in the place of an older one of its machine."""
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    others = [other for other in there if other["machine"] != record["machine"]]
    write_atomically(path, (json.dumps([*others, record], indent=1) + "\n").encode())


def measure(rounds: int, site: Path, chromium: str) -> dict[str, Any]:
    """The record of this machine."""
    from playwright.sync_api import sync_playwright

    found = {way: [] for way in WAYS}
    with serving(site) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        for i in range(rounds):
            for way in WAYS:
                context = browser.new_context()
                page = context.new_page()
                page.set_default_timeout(WAIT)
                page.goto(f"{address}/{PAGE}", wait_until="networkidle")
                found[way].append(visit(page, way))
                runtime = page.evaluate(VERSION)
                context.close()
                shown = ", ".join(
                    f"{name} {value:.3g}" for name, value in found[way][-1].items()
                )
                print(f"round {i + 1}, {way.key}: {shown}", flush=True)
        version = browser.version
        browser.close()
    return {
        "machine": processor_name(torch.device("cpu")),
        "system": platform.system(),
        "browser": f"Chromium {version}, headless",
        "onnxruntime-web": runtime,
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python scripts/site/time_try_it.py {rounds}",
        "rounds": rounds,
        "rows": [asdict(way) | summary(numbers) for way, numbers in found.items()],
    }


def main() -> None:
    """The command line."""
    given = sys.argv[1] if len(sys.argv) > 1 else "5"
    if not given.isdecimal() or int(given) < 1:
        sys.exit(f"ROUNDS is {given}, but must be a whole number from 1 on.")
    site, chromium = (
        ROOT / "_build" / "html",
        shutil.which("chromium") or shutil.which("google-chrome"),
    )
    if chromium is None:
        sys.exit(
            "There is no Chromium here; install it (Debian, Ubuntu: apt install chromium)."
        )
    if not (site / "try_it" / "models" / "models.json").exists():
        sys.exit("The model in the page is not built; run `make book` first.")
    keep(measure(int(given), site, chromium))
    print(f"Wrote {RECORD.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
