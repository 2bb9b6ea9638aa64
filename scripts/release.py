"""Make a release: python scripts/release.py 0.2.0

It writes the version into the package, CITATION.cff, the changelog and the setup cells, builds
the wheel into dist/, tries it outside the checkout, commits and tags. Nothing is pushed. What
fails leaves the checkout as it was.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("pyproject.toml", "README.md", "LICENSE")  # beside the package, to build it

# run where no checkout is on the path: the model, the cache, the kernels' sources, and the
# sentence that says where the trained weights are
TRY = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import gptlite
from gptlite.checkpoints import load_pretrained
from gptlite.generate import generate
from gptlite.kernels.load import FOLDER
from gptlite.kv_cache import KVCache
from gptlite.model import GPT, GPTConfig

assert gptlite.__file__.startswith(sys.argv[1]), gptlite.__file__
model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=5)).eval()
tokens = generate(model, torch.zeros(1, 1, dtype=torch.long), 3, KVCache(model.config))
assert tokens.shape == (1, 4)
assert list(FOLDER.glob("*.cpp")) and list(FOLDER.glob("*.h")), FOLDER
try:
    load_pretrained("teacher")
except (OSError, ValueError) as error:
    print(gptlite.__version__, error)
"""


class ReleaseError(Exception):
    """Why there is no release, in one sentence."""


def run(*command: object, cwd: Path = ROOT) -> str:
    """The output of a command; ReleaseError with its last line if it fails."""
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise ReleaseError(f"`{' '.join(map(str, command[:4]))} ...` failed: {said[-1]}")
    return done.stdout


def numbers(version: str) -> tuple[int, ...]:
    """A version as numbers that compare; ReleaseError if it is not of the form 1.2.3."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ReleaseError(f"the version is {version!r}, but must be of the form 1.2.3.")
    return tuple(map(int, version.split(".")))


def current(root: Path = ROOT) -> str:
    """The version that the package has."""
    text = (root / "gptlite" / "__init__.py").read_text(encoding="utf-8")
    return re.findall(r'(?m)^__version__ = "(.+)"$', text)[0]


def released(changelog: str, version: str, date: str) -> str:
    """The changelog with what was unreleased under the version; an error if that is nothing."""
    found = re.search(r"(?ms)^## Unreleased\n(.*?)(?=^## |\Z)", changelog)
    if not found or not found[1].strip():
        raise ReleaseError("CHANGELOG.md has nothing under Unreleased; say there what changed.")
    heading = f"## Unreleased\n\n## {version} ({date})\n"
    return changelog.replace("## Unreleased\n", heading, 1)


def write_version(version: str, date: str, root: Path = ROOT) -> None:
    """Write the version wherever it stands."""
    edits = {
        "gptlite/__init__.py": (r'(?m)^__version__ = ".*"$', f'__version__ = "{version}"'),
        "CITATION.cff": (r"(?m)^version: .*$", f"version: {version}"),
    }
    for name, (pattern, new) in edits.items():
        path = root / name
        path.write_text(
            re.sub(pattern, new, path.read_text(encoding="utf-8")), encoding="utf-8"
        )
    citation = root / "CITATION.cff"
    dated = re.sub(r"(?m)^date-released: .*$", f"date-released: {date}", citation.read_text())
    citation.write_text(dated, encoding="utf-8")
    changelog = root / "CHANGELOG.md"
    text = changelog.read_text(encoding="utf-8")
    changelog.write_text(released(text, version, date), encoding="utf-8")


def build_wheel(folder: Path, root: Path = ROOT) -> Path:
    """The wheel of the package, built into a folder from a copy of what git knows.

    In the checkout itself a build leaves a folder, and takes from it what is gone by now.
    """
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        for name in run("git", "ls-files", "gptlite", *NEEDED, cwd=root).splitlines():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, copy / name)
        run(
            sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ".", cwd=copy
        )
    return max(folder.glob("gptlite-*.whl"), key=lambda path: path.stat().st_mtime)


def try_wheel(wheel: Path) -> str:
    """What the package says that a wheel installs, used where there is no checkout."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "site"
        install = ("-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel)
        run(sys.executable, *install, cwd=Path(folder))
        return run(sys.executable, "-I", "-c", TRY, target.resolve(), cwd=Path(folder)).strip()


def release(version: str) -> Path:
    """The wheel of a new release, committed and tagged."""
    if numbers(version) <= numbers(current()):
        raise ReleaseError(f"the version is {version}, but must be above {current()}.")
    if run("git", "status", "--porcelain"):
        raise ReleaseError("the checkout has changes; commit them first.")
    if run("git", "tag", "--list", f"v{version}"):
        raise ReleaseError(f"there is a tag v{version} already.")
    try:
        write_version(version, time.strftime("%Y-%m-%d"))
        run(sys.executable, "scripts/notebooks/setup_cell.py", "--write")
        wheel = build_wheel(ROOT / "dist")
        print(f"outside the checkout the wheel says: {try_wheel(wheel)}")
        run("git", "commit", "--all", "--quiet", "--message", f"Release {version}")
        run("git", "tag", "--annotate", f"v{version}", "--message", f"GPTlite {version}")
    except BaseException:
        run("git", "restore", "--staged", "--worktree", ".")
        raise
    return wheel


def main() -> None:
    """The command line."""
    if len(sys.argv) != 2:
        sys.exit("release: name a version: make release VERSION=0.2.0")
    try:
        wheel = release(sys.argv[1])
    except ReleaseError as why:
        sys.exit(f"release: {why}")
    print(f"{wheel.relative_to(ROOT)} is built. Publish with: git push --follow-tags")


if __name__ == "__main__":
    main()
