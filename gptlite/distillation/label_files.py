"""A store of labels on disk: whose labels they are, their bytes, and how many are there.

`labels.bin` has a record for each position of each window: log-probabilities in float16, of all
tokens or of the k likeliest with their numbers. `about.json` says whose they are, and how many
windows are there.
"""

import hashlib
import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gptlite.files import check_sha256, write_atomically

KEYS = {"teacher", "corpus", "n", "T", "V", "k", "done"}  # of about.json


def fingerprint(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that any change of a model's weights or settings changes.

    Settings are what its modules keep in dataclasses, as a GPT its config.
    """
    digest = hashlib.sha256()
    for module in model.modules():
        for setting in vars(module).values():
            if is_dataclass(setting) and not isinstance(setting, type):
                # a new option changes no old model
                told = {name: v for name, v in asdict(setting).items() if v is not None}
                digest.update(json.dumps(told).encode())
    for name, t in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
        octets = t.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(octets.numpy().tobytes())
    return digest.hexdigest()[:16]


def record_dtype(V: int, k: int | None) -> np.dtype:
    """A token's record: V log-probabilities, or k of them with their tokens' numbers."""
    if k is None:
        return np.dtype([("log_p", "<f2", (V,))])
    if not 1 <= k <= V:
        raise ValueError(f"k is {k}, but must be from 1 to the vocabulary's {V}.")
    number = "<u1" if V <= 256 else "<u4" if V > 65536 else "<u2"
    return np.dtype([("log_p", "<f2", (k,)), ("token", number, (k,))])


def label_bytes(n: int, T: int, V: int, k: int | None = None) -> int:
    """Bytes of the labels of n windows of T tokens: 2 V a token, or 3 to 6 for each of k."""
    return n * T * record_dtype(V, k).itemsize


def open_store(path: Path, about: dict[str, Any]) -> int:
    """The windows that a store has already; a new one gets its folder and file first."""
    size = label_bytes(about["n"], about["T"], about["V"], about["k"])
    if (path / "about.json").exists():
        there = read_about(path)
        refuse_others(path, there, about)
        check_size(path / "labels.bin", size)
        return there["done"]
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "labels.bin", "wb") as file:
        file.truncate(size)
    return 0


def read_about(path: Path) -> dict[str, Any]:
    """The description of the labels at `path`, which is their about.json."""
    try:
        about = json.loads((path / "about.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no labels at {path}; write_labels makes them.") from None
    except ValueError as error:
        raise ValueError(
            f"{path / 'about.json'} is not whole ({error}); delete the folder."
        ) from None
    if not isinstance(about, dict) or not about.keys() >= KEYS:
        raise ValueError(f"{path / 'about.json'} does not describe labels; delete the folder.")
    return about


def refuse_others(path: Path, there: dict[str, Any], about: dict[str, Any]) -> None:
    """A ValueError names what differs between the labels that are there and those wanted."""
    changed = [
        f"{key} {there.get(key)} -> {value}"
        for key, value in about.items()
        if there.get(key) != value
    ]
    if changed:
        raise ValueError(
            f"the labels at {path} are others ({', '.join(changed)}); "
            "delete them or choose another path."
        )


def seal(path: Path) -> None:
    """Note the digest of labels that are whole, by which a flipped bit is found."""
    about = read_about(path)
    digest = hashlib.sha256((path / "labels.bin").read_bytes()).hexdigest()
    write_atomically(path / "about.json", json.dumps(about | {"sha256": digest}).encode())


def check_labels(path: Path, about: dict[str, Any]) -> None:
    """A ValueError if the labels have not the size or the digest that about.json says."""
    file = path / "labels.bin"
    check_size(file, label_bytes(about["n"], about["T"], about["V"], about["k"]))
    if "sha256" in about:
        check_sha256(file, about["sha256"], "delete the folder")


def check_size(path: Path, expected: int) -> None:
    """A ValueError if a file has not its size, or is not there."""
    size = path.stat().st_size if path.exists() else 0
    if size != expected:
        raise ValueError(
            f"{path} has {size} bytes, but must have {expected}; delete the folder."
        )
