"""Files: where the book's own and the reader's cache are, written whole or not at all."""

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def cache_folder() -> Path:
    """The folder of what is downloaded or compiled once, made if missing.

    It is $GPTLITE_CACHE, or gptlite in the user's cache folder. Where there is no home, or none
    that can be written to, it is a folder of the user's own beside the temporary files, which
    may be gone after a restart. A PermissionError says that neither can be had.
    """
    chosen = os.environ.get("GPTLITE_CACHE")
    if chosen:
        if not _can_write(Path(chosen)):
            raise PermissionError(
                f"GPTLITE_CACHE is {chosen}, where nothing can be written; name another folder."
            )
        return Path(chosen)
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user of whom nobody knows, as in many containers
        return _temporary_folder()
    return home / "gptlite" if _can_write(home / "gptlite") else _temporary_folder()


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _temporary_folder() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    folder = Path(tempfile.gettempdir()) / f"gptlite-{user}"
    # others can make folders there as well, and code is loaded from this one
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    mine = not hasattr(os, "getuid") or (found.st_uid == user and not found.st_mode & 0o022)
    if not (stat.S_ISDIR(found.st_mode) and mine):
        raise PermissionError(
            f"{folder} belongs to somebody else; set GPTLITE_CACHE to a folder of your own."
        )
    return folder


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears, or replaces another, only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except BaseException:  # a full disk, a folder of that name, an impatient reader
        part.unlink(missing_ok=True)
        raise


def check_can_write(path: Path) -> None:
    """Raise an OSError if no file could be put at a path: before the work, not after it."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it.")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise PermissionError(
            f"{path} cannot be written, because nothing can be in {folder}; name another place."
        )


def as_json(value: Any, what: str) -> Any:
    """The value as it is read back from JSON: tuples are lists then, and keys are strings.

    A ValueError says what of it JSON cannot hold.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}, {value!r}, cannot be kept as JSON ({error}).") from None


def check_sha256(path: Path, expected: str, remedy: str) -> None:
    """Raise a ValueError with a `remedy` if a file is not the expected one."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(f"{path} has SHA-256 {found}, but {expected} was expected; {remedy}.")
