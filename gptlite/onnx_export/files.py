"""ONNX files: read whole, checked, and written with a digest of their weights.

A message of protobuf, and so a model in one file, holds 2 GB at most. A larger one keeps its
weights in a second file, beside the first (https://onnx.ai/onnx/repo-docs/ExternalData.html).
"""

import math
import os
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

OLDEST_OPSET = 7  # ONNX Runtime reads operator sets from this one on
LARGEST = 2**31 - 1  # bytes of a message of protobuf
BESIDE = 1024  # bytes of a weight that is worth a place in the second file
DIGEST = "gptlite.sha256"  # the name of the digest in a file's metadata
ITEMSIZE = {1: 4, 6: 4, 7: 8, 10: 2, 11: 8, 16: 2}  # bytes, by ONNX's number for a type


def parse_onnx(path: Path) -> "onnx.ModelProto":
    """The model in a file, without weights that lie beside it.

    An error says if it is missing, cut short or no ONNX.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise FileNotFoundError(f"there is no ONNX file at {path}; export the model first.")
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except DecodeError:
        model = onnx.ModelProto()
    if not (model.ir_version and model.opset_import and model.HasField("graph")):
        raise ValueError(f"{path.name} is no ONNX model, or was cut short; export it again.")
    return model


def load_onnx(path: Path | str) -> "onnx.ModelProto":
    """A model from a file that `check_onnx_file` passes, with all its weights."""
    import onnx

    path = Path(path)
    model = check_onnx_file(path)
    onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    _set_digest(model, None)  # it is the file's: the model's weights may be changed
    return model


def check_onnx_file(path: Path) -> "onnx.ModelProto":
    """The model in a file, without weights that lie beside it, if all of it is sound.

    An error says what is missing, cut short, changed since it was written, or breaks a rule.
    """
    model = parse_onnx(path)
    _check_rules(model, path.name)
    for tensor in _beside(model):
        where, start, length = _place(tensor)
        if not (path.parent / where).is_file():
            lies = "which must lie beside it, but does not"
            raise FileNotFoundError(f"{path.name} keeps its weights in {where}, {lies}.")
        if (path.parent / where).stat().st_size < start + length:
            raise ValueError(f"{where}, with weights of {path.name}, was cut short.")
    written = next((e.value for e in model.metadata_props if e.key == DIGEST), None)
    if written not in (None, _digest(model, path.parent)):
        remedy = "copy it again, with what lies beside it, or export it again"
        raise ValueError(f"{path.name} was written with other weights; {remedy}.")
    _run_checker(str(path), path.name)
    return model


def check_onnx(model: "onnx.ModelProto", name: str = "the model") -> None:
    """A ValueError, in a sentence, unless a model can be read and ONNX's checker passes it."""
    _check_rules(model, name)
    if (size := message_bytes(model)) > LARGEST:
        remedy = "write it with save_onnx, which checks it, and open the file"
        many = f"{size:,} bytes of weights, too many for one message"
        raise ValueError(f"{name} has {many}; {remedy}.")
    _run_checker(model, name)


def save_onnx(model: "onnx.ModelProto", path: Path | str, beside: bool | None = None) -> None:
    """Write a model with a digest of its weights; they lie in a second file if `beside`.

    None puts them there if they are too large for one. The second file is named as the first
    with .data behind it. Nothing is overwritten before all is written and checked.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = write_onnx(model, Path(folder) / path.name, beside, with_digest=True)
        check_onnx_file(written[-1])
        for part in written:
            os.replace(part, path.with_name(part.name))


def write_onnx(
    model: "onnx.ModelProto", path: Path, beside: bool | None = None, with_digest: bool = False
) -> list[Path]:
    """Write a model as `save_onnx` does, but unchecked; return the files, the model last."""
    import onnx

    if elsewhere := _beside(model):
        where = _place(elsewhere[0])[0]
        raise ValueError(f"the model's weights lie in {where}; read it with load_onnx.")
    saved, data = onnx.ModelProto(), path.with_name(path.name + ".data")
    saved.CopyFrom(model)
    _set_digest(saved, _digest(model, path.parent) if with_digest else None)
    beside = message_bytes(model) > LARGEST if beside is None else beside
    if beside:
        with data.open("wb") as file:
            for tensor in saved.graph.initializer:
                if len(content := tensor.raw_data) >= BESIDE:
                    file.write(bytes(-file.tell() % 4096))  # pages, for whoever maps the file
                    start, length = file.tell(), file.write(content)
                    onnx.external_data_helper.set_external_data(
                        tensor, data.name, start, length
                    )
                    tensor.ClearField("raw_data")
    path.write_bytes(saved.SerializeToString())
    return [data, path] if beside else [path]


def message_bytes(model: "onnx.ModelProto") -> int:
    """About the bytes of the model as one message: those of its weights."""
    tensors = model.graph.initializer
    return sum(ITEMSIZE.get(t.data_type, 1) * math.prod(t.dims) for t in tensors)


def _check_rules(model: "onnx.ModelProto", name: str) -> None:
    import onnx

    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    opset, newest = opsets.get("ai.onnx"), onnx.defs.onnx_opset_version()
    if opset is None or not OLDEST_OPSET <= opset <= newest:
        read = f"opsets {OLDEST_OPSET} to {newest} can be read"
        raise ValueError(f"{name} is written in opset {opset}, but {read}; export it again.")
    if not model.graph.output:
        raise ValueError(f"{name} has no output; it is not a whole ONNX graph.")


def _run_checker(model: "onnx.ModelProto | str", name: str) -> None:
    import onnx

    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} breaks a rule of ONNX ({reason}).") from None


def _beside(model: "onnx.ModelProto") -> list["onnx.TensorProto"]:
    return [t for t in model.graph.initializer if t.data_location == t.EXTERNAL]


def _place(tensor: "onnx.TensorProto") -> tuple[str, int, int]:
    """The file of a weight that lies beside its model, where it begins there, and its bytes."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    size = ITEMSIZE.get(tensor.data_type, 1) * math.prod(tensor.dims)
    return entries["location"], int(entries.get("offset", 0)), int(entries.get("length", size))


def _digest(model: "onnx.ModelProto", folder: Path) -> str:
    """SHA-256 of the weights' names, types, shapes and bytes, wherever these lie."""
    digest = sha256()
    for tensor in model.graph.initializer:
        digest.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}".encode())
        for piece in _content(tensor, folder):
            digest.update(piece)
    return digest.hexdigest()


def _content(tensor: "onnx.TensorProto", folder: Path) -> Iterator[bytes]:
    if tensor.data_location != tensor.EXTERNAL:
        yield tensor.raw_data or tensor.SerializeToString(deterministic=True)
        return
    where, start, left = _place(tensor)
    with (folder / where).open("rb") as file:
        file.seek(start)
        while piece := file.read(min(left, 1 << 24)):
            left -= len(piece)
            yield piece


def _set_digest(model: "onnx.ModelProto", digest: str | None) -> None:
    kept = [entry for entry in model.metadata_props if entry.key != DIGEST]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    if digest is not None:
        model.metadata_props.add(key=DIGEST, value=digest)
