"""Files: where the book's own and the reader's cache are, written whole or not at all, with their checksums verified."""

import hashlib
import os
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def cache_folder() -> Path:
    """Where downloads are kept: $GPTLITE_CACHE, or gptlite in the user's cache folder; made if missing."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptlite"
    folder = Path(os.environ.get("GPTLITE_CACHE") or default)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears, or replaces another, only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def check_sha256(path: Path, expected: str, remedy: str) -> None:
    """Raise a ValueError with a `remedy` if a file is not the expected one."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(f"{path} has SHA-256 {found}, but {expected} was expected; {remedy}.")
