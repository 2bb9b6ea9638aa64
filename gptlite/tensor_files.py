"""Files of tensors: safetensors with an `info` in JSON, and a digest of both.

Nothing in them is unpickled, and a bit that has been flipped since is noticed.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlite.files import write_atomically


def write_tensors(path: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write tensors and an `info` for JSON to one file, which appears only when it is whole.

    A ValueError names what in `info` would not be read as it is written.
    """
    import safetensors.torch

    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    check_json(info, "info")
    text = json.dumps(info)
    metadata = {"info": text, "sha256": digest(whole, text)}
    # not with safetensors' own save_file: that lets nobody else read the file
    write_atomically(path, safetensors.torch.save(whole, metadata))


def read_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote; a ValueError says how a file is broken or foreign."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        info = json.loads(metadata.get("info", "null"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint ({error}).") from None
    if not isinstance(info, dict):
        raise ValueError(f"{path} is not a GPTlite checkpoint: it does not say what it holds.")
    found = digest(tensors, metadata["info"])
    # files from before there were digests have none
    if metadata.get("sha256", found) != found:
        raise ValueError(f"{path} is damaged: its SHA-256 is {found}; restore it from a copy.")
    return {name: t.to(device) for name, t in tensors.items()}, info


def digest(tensors: dict[str, Tensor], info: str) -> str:
    """SHA-256 of tensors, with their names, formats and shapes, and of a text beside them."""
    sha256 = hashlib.sha256(info.encode())
    for name, t in sorted(tensors.items()):
        sha256.update(f"\n{name} {t.dtype} {tuple(t.shape)}\n".encode())
        sha256.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def check_json(value: Any, name: str) -> None:
    """Raise a ValueError that names what JSON would not give back, as a tuple or NaN."""
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{name} has the key {key!r}, but JSON's are all strings.")
            check_json(part, f"{name}[{key!r}]")
    elif isinstance(value, list):
        for i, part in enumerate(value):
            check_json(part, f"{name}[{i}]")
    elif not isinstance(value, str | int | float | None) or value != value:
        raise ValueError(f"{name} is {value!r}, which JSON does not give back as it is.")
