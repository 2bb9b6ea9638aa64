"""An exported GPT in ONNX Runtime where a PyTorch model stood, under the same `generate`."""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gptlite.model import GPTConfig
from gptlite.onnx_export.cache import cache_names, empty_past

if TYPE_CHECKING:
    import onnxruntime


class PastTensor:
    """Keys or values, or all of both, of P tokens: an array (.., P, D) that grows."""

    def __init__(self, shape: tuple[int, ...], max_len: int):
        full = math.prod(shape[:-2]) * max_len * shape[-1]
        # memory that is new at each step would cost more
        self.buffers = [np.empty(full, np.float32) for _ in range(2)]
        self.value: np.ndarray = self.buffers[0][:0].reshape(shape)

    def join(self, *parts: np.ndarray) -> None:
        """Become the parts (.., P, D), one behind the other, in the buffer not in use."""
        P = sum(part.shape[-2] for part in parts)
        shape = (*parts[0].shape[:-2], P, parts[0].shape[-1])
        free = next(b for b in self.buffers if not np.may_share_memory(b, self.value))
        out = free[: math.prod(shape)].reshape(shape)
        self.value = np.concatenate(parts, axis=-2, out=out)


class OnnxCache:
    """The past that a graph without state is given at each step: one tensor, or 2 n_layer.

    It stands where a `gptlite.kv_cache.KVCache` would in `generate` and `measure_generation`.
    """

    def __init__(self, config: GPTConfig, *, B: int = 1, by_layer: bool = False):
        self.max_len = config.block_size
        shape: tuple[int, ...] = (B, config.kv_heads, 0, config.head_dim)
        shape = shape if by_layer else (2 * config.n_layer, *shape)
        names = cache_names(config, "past", by_layer)
        self.past = {name: PastTensor(shape, self.max_len) for name in names}

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
        """Keep what a step returned: all (`present`, `present.k0`), or what is new (`new`)."""
        word, dot, layer = name.partition(".")
        tensor = self.past[f"past{dot}{layer}"]
        if word == "present":
            tensor.value = array
        else:
            tensor.join(tensor.value, array)


class OnnxGPT:
    """An exported GPT that is called as a `GPT` is: logits = model(idx, cache), of tensors."""

    def __init__(self, session: "onnxruntime.InferenceSession", config: GPTConfig):
        self.session, self.config = session, config
        # idx, and with a cache past; logits, and with a cache present or new
        self.takes = [given.name for given in session.get_inputs()]
        self.returns = [output.name for output in session.get_outputs()]

    def __call__(
        self, idx: Tensor, cache: OnnxCache | None = None, last_only: bool = False
    ) -> Tensor:
        """Logits (B, T, V) without a cache, or (B, 1, V), of the last position, with one."""
        _check_length(idx, 0 if cache is None else cache.length, self.config)
        feed = {"idx": idx.numpy()} | ({} if cache is None else cache.feed())
        if feed.keys() != set(self.takes):
            takes, given = (", ".join(sorted(names)[:2]) for names in (self.takes, feed))
            remedy = "its cache needs the export's by_layer"
            raise ValueError(f"the graph takes {takes}, but is given {given}; {remedy}.")
        logits, *rest = self.session.run(self.returns, feed)
        if cache is not None:
            for name, array in zip(self.returns[1:], rest, strict=True):
                cache.take(name, array)
        return torch.from_numpy(logits[:, -1:] if last_only else logits)


class BoundGPT:
    """An `OnnxGPT` with IO binding: the cache stays the runtime's own array, never NumPy's.

    It runs a `CachedGPT` that was exported with its cache in one tensor.
    """

    def __init__(self, session: "onnxruntime.InferenceSession", config: GPTConfig):
        graph = OnnxGPT(session, config)
        if (graph.takes, graph.returns) != (["idx", "past"], ["logits", "present"]):
            ends = [", ".join(names[:2]) for names in (graph.takes, graph.returns)]
            found = f"the graph takes {ends[0]} and returns {ends[1]}"
            remedy = "idx, past and logits, present: export_cached(model, CachedGPT)"
            raise ValueError(f"{found}, but can be bound only with {remedy}.")
        self.session, self.config = session, config

    def __call__(self, idx: Tensor, cache: "BoundCache", last_only: bool = False) -> Tensor:
        """Logits (B, 1, V) of the last position."""
        _check_length(idx, cache.length, self.config)
        binding = self.session.io_binding()
        binding.bind_cpu_input("idx", idx.numpy())
        binding.bind_ortvalue_input("past", cache.value)
        for name in ("logits", "present"):
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        logits, cache.value = binding.get_outputs()
        return torch.from_numpy(logits.numpy())


class BoundCache:
    """A cache whose past is one value of ONNX Runtime, for a `BoundGPT`."""

    def __init__(self, config: GPTConfig, *, B: int = 1):
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


def _check_length(idx: Tensor, past: int, config: GPTConfig) -> None:
    if (longest := past + idx.shape[1]) > config.block_size:
        most = f"the model's block_size of {config.block_size}"
        raise ValueError(f"{longest} tokens are more than {most}.")
