"""ONNX Runtime: running an exported GPT where a PyTorch model stood, with the same `generate` around it."""

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gptlite.model import GPTConfig
from gptlite.onnx_export.cache import cache_names, empty_past

if TYPE_CHECKING:
    import onnx
    import onnxruntime

OLDEST_OPSET = 7  # ONNX Runtime reads operator sets from this one on


def parse_onnx(path: Path) -> "onnx.ModelProto":
    """The model in a file, without weights that lie beside it; an error says if it is missing, cut short or no ONNX."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise FileNotFoundError(f"there is no ONNX file at {path}; export the model first.")
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except DecodeError:
        model = None
    if model is None or not (
        model.ir_version and model.opset_import and model.HasField("graph")
    ):
        raise ValueError(f"{path.name} is no ONNX model, or was cut short; export it again.")
    return model


def load_onnx(path: Path | str) -> "onnx.ModelProto":
    """A model from a file, with all its weights, and checked; a sentence says what is wrong with any other file."""
    import onnx

    path = Path(path)
    model = parse_onnx(path)
    missing = sorted(
        {where for where in _external_files(model) if not (path.parent / where).is_file()}
    )
    if missing:
        raise FileNotFoundError(
            f"{path.name} keeps its weights in {missing[0]}, which must lie beside it, but does not."
        )
    onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    check_onnx(model, path.name)
    return model


def check_onnx(model: "onnx.ModelProto", name: str = "the model") -> None:
    """A ValueError, in a sentence, unless ONNX's checker passes the graph and its opset is one that can be read."""
    import onnx

    opset = next(
        (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None
    )
    newest = onnx.defs.onnx_opset_version()
    if opset is None or not OLDEST_OPSET <= opset <= newest:
        raise ValueError(
            f"{name} is written in opset {opset}, but opsets {OLDEST_OPSET} to {newest} can be read; export it again."
        )
    if not model.graph.output:
        raise ValueError(f"{name} has no output; it is not a whole ONNX graph.")
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ValueError(
            f"{name} breaks a rule of ONNX ({str(error).strip().splitlines()[0]})."
        ) from None


def open_session(
    model: "onnx.ModelProto | Path | str",
    threads: int | None = None,
    optimize: bool = True,
    providers: list[str] | None = None,
) -> "onnxruntime.InferenceSession":
    """A session that runs a model or a file, on the CPU or other `providers`; `threads` None means PyTorch's number."""
    model = load_onnx(model) if isinstance(model, (str, Path)) else model
    return _session(model, _options(threads, optimize), providers)


def optimized(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The graph after ONNX Runtime's optimiser, as it would run here: for looking at, since it suits one machine."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        options = _options(1, True)
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        _session(model, options, None)
        return onnx.load(options.optimized_model_filepath)


class PastTensor:
    """Keys or values, or all of both, of P tokens: an array (.., P, D) that grows by what comes behind it."""

    def __init__(self, shape: tuple[int, ...], max_len: int):
        full = math.prod(shape[:-2]) * max_len * shape[-1]
        self.buffers = [
            np.empty(full, np.float32) for _ in range(2)
        ]  # memory that is new at each step would cost more
        self.value = self.buffers[0][:0].reshape(shape)

    def join(self, *parts: np.ndarray) -> None:
        """Become the parts (.., P, D), one behind the other, in the buffer that is not in use."""
        shape = (
            *parts[0].shape[:-2],
            sum(part.shape[-2] for part in parts),
            parts[0].shape[-1],
        )
        free = next(
            buffer for buffer in self.buffers if not np.may_share_memory(buffer, self.value)
        )
        self.value = np.concatenate(parts, axis=-2, out=free[: math.prod(shape)].reshape(shape))


class OnnxCache:
    """The past that a graph without state is given again at each step, in one tensor or, `by_layer`, in 2 n_layer.

    It stands where a `gptlite.kv_cache.KVCache` would in `generate` and `measure_generation`.
    """

    def __init__(self, config: GPTConfig, B: int = 1, by_layer: bool = False):
        self.max_len = config.block_size
        shape = (B, config.kv_heads, 0, config.head_dim)
        shape = shape if by_layer else (2 * config.n_layer, *shape)
        self.past = {
            name: PastTensor(shape, self.max_len)
            for name in cache_names(config, "past", by_layer)
        }

    @property
    def length(self) -> int:
        """Tokens in the cache, P."""
        return next(iter(self.past.values())).value.shape[-2]

    def room_for(self, T: int) -> bool:
        """Whether T more tokens fit."""
        return self.length + T <= self.max_len

    def feed(self) -> dict[str, np.ndarray]:
        """The graph's inputs beside idx."""
        return {name: tensor.value for name, tensor in self.past.items()}

    def rewind(self, length: int = 0) -> None:
        """Forget all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {self.length} tokens cannot be rewound to {length}.")
        for tensor in self.past.values():
            tensor.join(tensor.value[..., :length, :])

    def take(self, name: str, array: np.ndarray) -> None:
        """What a step returned: a tensor as a whole (`present`, `present.k0`), or what comes behind it (`new.k0`)."""
        word, dot, layer = name.partition(".")
        tensor = self.past[f"past{dot}{layer}"]
        if word == "present":
            tensor.value = array
        else:
            tensor.join(tensor.value, array)


class OnnxGPT:
    """An exported GPT that is called as a `GPT` is: logits = model(idx, cache), tensors in and out."""

    def __init__(self, session: "onnxruntime.InferenceSession", config: GPTConfig):
        self.session, self.config = session, config
        self.takes = {given.name for given in session.get_inputs()}  # idx; with a cache, past
        self.returns = [
            output.name for output in session.get_outputs()
        ]  # logits; with a cache, present or new

    def __call__(
        self, idx: Tensor, cache: OnnxCache | None = None, last_only: bool = False
    ) -> Tensor:
        """Logits (B, T, V) without a cache, or (B, 1, V), of the last position, with one."""
        past = 0 if cache is None else cache.length
        if past + idx.shape[1] > self.config.block_size:
            longest = self.config.block_size
            raise ValueError(
                f"{past + idx.shape[1]} tokens are more than the model's block_size of {longest}."
            )
        feed = {"idx": idx.numpy()} | ({} if cache is None else cache.feed())
        if feed.keys() != self.takes:
            takes, given = (", ".join(sorted(names)[:2]) for names in (self.takes, feed))
            raise ValueError(
                f"the graph takes {takes}, but is given {given}; its cache needs the export's by_layer."
            )
        logits, *rest = self.session.run(self.returns, feed)
        for name, array in zip(self.returns[1:], rest, strict=True):
            cache.take(name, array)
        return torch.from_numpy(logits[:, -1:] if last_only else logits)


class BoundGPT(OnnxGPT):
    """The same with IO binding: the cache stays the runtime's own array, handed on without a copy to NumPy."""

    def __call__(self, idx: Tensor, cache: "BoundCache", last_only: bool = False) -> Tensor:
        """Logits (B, 1, V) of the last position."""
        binding = self.session.io_binding()
        binding.bind_cpu_input("idx", idx.numpy())
        binding.bind_ortvalue_input("past", cache.value)
        for name in self.returns:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        logits, cache.value = binding.get_outputs()
        return torch.from_numpy(logits.numpy())


class BoundCache:
    """A cache whose past is one value of ONNX Runtime; for a graph that returns one `present`."""

    def __init__(self, config: GPTConfig, B: int = 1):
        self.max_len = config.block_size
        self.empty = empty_past(config, B)[0].numpy()
        self.rewind(0)

    @property
    def length(self) -> int:
        """Tokens in the cache, P."""
        return self.value.shape()[3]

    def room_for(self, T: int) -> bool:
        """Whether T more tokens fit."""
        return self.length + T <= self.max_len

    def rewind(self, length: int = 0) -> None:
        """Forget everything; only that is possible here."""
        import onnxruntime

        if length:
            raise ValueError(f"a bound cache can be rewound to 0 alone, not to {length}.")
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy(self.empty)


def _options(threads: int | None, optimize: bool) -> "onnxruntime.SessionOptions":
    try:
        import onnxruntime
    except ImportError:
        raise ImportError(
            "onnxruntime is not installed, but runs ONNX files: pip install onnxruntime"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    options.log_severity_level = 3  # errors alone
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    )
    return options


def _session(
    model: "onnx.ModelProto", options: "onnxruntime.SessionOptions", providers: list[str] | None
) -> "onnxruntime.InferenceSession":
    import onnxruntime

    check_onnx(model)
    providers = providers or ["CPUExecutionProvider"]
    missing = sorted(set(providers) - set(onnxruntime.get_available_providers()))
    if missing:
        have = ", ".join(onnxruntime.get_available_providers())
        raise ValueError(f"this onnxruntime has no {missing[0]}; it has {have}.")
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=providers
        )
    except Exception as error:  # its exceptions have no common parent of their own
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run the model ({reason})."
        ) from None


def _external_files(model: "onnx.ModelProto") -> list[str]:
    return [
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == tensor.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    ]
