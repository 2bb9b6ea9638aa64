"""The KV cache: keys and values of the past, kept so that each token is computed once (Shazeer, 2019)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gptlite.model import GPTConfig


def kv_cache_shape(
    config: GPTConfig, B: int = 1, max_len: int | None = None
) -> tuple[int, int, int, int, int]:
    """Shape (n_layer, B, n_kv_head, max_len, head_dim) of the keys, and again of the values."""
    max_len = config.block_size if max_len is None else max_len
    if B < 1:
        raise ValueError(f"the batch is {B}, but must be at least 1.")
    if not 0 < max_len <= config.block_size:
        raise ValueError(
            f"max_len is {max_len}, but must be from 1 to the model's block_size of {config.block_size}."
        )
    return config.n_layer, B, config.kv_heads, max_len, config.head_dim


def kv_cache_bytes(
    config: GPTConfig,
    B: int = 1,
    max_len: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes that such a cache takes, known before it is made."""
    return 2 * math.prod(kv_cache_shape(config, B, max_len)) * dtype.itemsize


class KVCache:
    """Keys and values of `length` tokens for each of B sequences, in memory that is allocated once.

    `model(idx, cache)` reads the past, appends idx's keys and values, and moves `length` on, all layers together: after
    a call that fails the cache holds what it held before.
    """

    def __init__(
        self,
        config: GPTConfig,
        B: int = 1,
        max_len: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = kv_cache_shape(config, B, max_len)
        self.k = torch.zeros(
            shape, dtype=dtype, device=device
        )  # (n_layer, B, H_kv, max_len, D)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def max_len(self) -> int:
        """Tokens that fit."""
        return self.k[0].shape[2]  # of the first layer

    @property
    def nbytes(self) -> int:
        """Bytes allocated, whatever `length` is."""
        return sum(tensor.nbytes for tensor in (*self.k, *self.v))

    def positions(self, T: int, device: torch.device) -> Tensor:
        """Positions (T,) of the next T tokens in the text, on the device of the model that asks."""
        _check_room(self.length + T, self.max_len)
        return torch.arange(self.length, self.length + T, device=device)

    def layer(self, i: int) -> "LayerCache":
        """What block i of the model needs to see."""
        return LayerCache(*self._keys_and_values(i), self.length)

    def _keys_and_values(self, i: int) -> tuple[Tensor, Tensor]:
        if i >= len(self.k):
            raise ValueError(
                f"the model has more layers than the {len(self.k)} that the cache is for."
            )
        return self.k[i], self.v[i]

    def advance(self, T: int) -> None:
        """Count T appended tokens as past; called once, after the last layer."""
        self.length += T

    def rewind(self, length: int = 0) -> None:
        """Forget all but the first `length` tokens; their keys and values stay where they are."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {self.length} tokens cannot be rewound to {length}.")
        self.length = length


def _check_room(end: int, max_len: int) -> None:
    if end > max_len:
        raise ValueError(f"{end} tokens do not fit into a cache of {max_len}.")


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values (B, H_kv, max_len, D), of which the first `length` are past."""

    k: Tensor
    v: Tensor
    length: int

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, H_kv, T, D) behind the past; return past and present together (B, H_kv, length + T, D).

        The cache keeps values, not how they were computed: no gradient flows through it.
        """
        self._check(k)
        end = self.length + k.shape[2]
        _check_room(end, self.k.shape[2])
        self.k[:, :, self.length : end] = (
            k.detach()
        )  # else the cache would keep the graph of every past step alive
        self.v[:, :, self.length : end] = v.detach()
        return self.k[:, :, :end], self.v[:, :, :end]

    def mask(self, T: int) -> Tensor | None:
        """Which of the keys that `append` returned each of the last T queries may see; None: all up to itself."""
        return None

    def _check(self, k: Tensor) -> None:
        B, H_kv, _, D = self.k.shape
        if (k.shape[0], k.shape[1], k.shape[3]) != (B, H_kv, D):
            found = f"batch {k.shape[0]}, {k.shape[1]} KV heads of size {k.shape[3]}"
            raise ValueError(
                f"the model brings {found}, but the cache is for batch {B}, {H_kv} KV heads of size {D}."
            )
        if (k.dtype, k.device) != (self.k.dtype, self.k.device):
            mine = f"{self.k.dtype} on {self.k.device}"
            raise TypeError(
                f"the model's keys are {k.dtype} on {k.device}, but the cache holds {mine}."
            )


class StaticKVCache(KVCache):
    """A KV cache in which no shape and no Python number changes from step to step, as a compiler wants it.

    Its length is a tensor's value, and every step gets all `max_len` keys under a mask, at the price of reading those
    that are not there yet; the first tokens, with nothing before them, see each other alone. (As `StaticCache` in
    Transformers and the cache of gpt-fast. Its tensors are no buffers, so `mode="reduce-overhead"` on a GPU needs
    `torch._dynamo.mark_static_address` on each.)
    """

    def __init__(
        self,
        config: GPTConfig,
        B: int = 1,
        max_len: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        # how many tokens there are, as kernels see it; made first, since the line below sets `length`
        self.past = torch.zeros((), dtype=torch.long, device=device)
        super().__init__(config, B, max_len, dtype, device)
        # a tensor for each layer: a compiler that sees one layer of a larger tensor changed copies all of it
        self.k, self.v = ([layer.clone() for layer in tensor] for tensor in (self.k, self.v))

    @property
    def length(self) -> int:
        """Tokens in the cache; on a GPU, reading it waits for all that was queued before."""
        return int(self.past)

    @length.setter
    def length(self, length: int) -> None:
        self.past.fill_(length)
        self.empty = (
            length == 0
        )  # the one thing that changes in Python, and once: a prompt is another program anyway

    def positions(self, T: int, device: torch.device) -> Tensor:
        """Positions (T,) of the next T tokens in the text.

        Compiled code does not ask whether they fit: there the caller does, or the step fails in one of its kernels.
        """
        if not torch.compiler.is_compiling():
            _check_room(self.length + T, self.max_len)
        return self.past.to(device) + torch.arange(T, device=device)

    def layer(self, i: int) -> "StaticLayerCache":
        """What block i of the model needs to see; no Python number is read from the length, which would wait for it."""
        return StaticLayerCache(*self._keys_and_values(i), self.past, self.empty)

    def advance(self, T: int) -> None:
        """Count T appended tokens as past; called once, after the last layer."""
        self.past.add_(T)
        self.empty = False


@dataclass(frozen=True)
class StaticLayerCache(LayerCache):
    """One layer's keys and values (B, H_kv, max_len, D), of which as many are past as the tensor `length` says."""

    length: Tensor
    empty: bool

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, H_kv, T, D) behind the past; return all max_len keys and values, also those to come.

        With nothing before them k and v are returned themselves, since all else would be masked.
        """
        self._check(k)
        k, v = k.detach(), v.detach()
        at = self.length + torch.arange(k.shape[2], device=k.device)  # (T,)
        self.k.index_copy_(2, at, k)
        self.v.index_copy_(2, at, v)
        return (k, v) if self.empty else (self.k, self.v)

    def mask(self, T: int) -> Tensor | None:
        """True (T, max_len) where one of the last T queries may see a key: those that are written, up to its own."""
        if self.empty:
            return None
        keys, queries = (
            torch.arange(self.k.shape[2], device=self.k.device),
            torch.arange(T, device=self.k.device),
        )
        return keys <= self.length + queries[:, None]
