"""What pytest needs to know about this repository: where scripts are, what nbval compares."""

import sys
from pathlib import Path

# the tests of the scripts import them by name
SCRIPTS = Path(__file__).parent / "scripts"
sys.path[:0] = [str(SCRIPTS / folder) for folder in ("", "experiments", "notebooks", "site")]

# A drawing follows Matplotlib's version and HTML its maker's:
# what is compared is text, Markdown and stdout.
NOT_COMPARED = (
    "application/vnd.gptlite.figure+html", "image/svg+xml", "text/html", "stderr",
)  # fmt: skip


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "colab: runs every notebook in a fresh environment like Colab's"
    )


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):  # nbval's collector of one notebook
        collector.skip_compare += NOT_COMPARED
