"""The KV cache: keys and values of the past; each token is computed once (Shazeer, 2019).

The chapters' smaller ones are in `gptlite.smaller_caches`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gptlite.model import GPTConfig
from gptlite.model import LayerCache as AnyLayerCache


def kv_cache_shape(
    config: GPTConfig, *, B: int = 1, max_len: int | None = None
) -> tuple[int, int, int, int, int]:
    """Shape (n_layer, B, n_kv_head, max_len, head_dim) of the keys, and again of the values."""
    longest = config.block_size
    max_len = longest if max_len is None else max_len
    if B < 1:
        raise ValueError(f"the batch is {B}, but must be at least 1.")
    if not 0 < max_len <= longest:
        raise ValueError(
            f"max_len is {max_len}, but must be from 1 to the model's block_size of {longest}."
        )
    return config.n_layer, B, config.kv_heads, max_len, config.head_dim


def kv_cache_bytes(
    config: GPTConfig,
    *,
    B: int = 1,
    max_len: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes that such a cache takes, known before it is made."""
    return 2 * math.prod(kv_cache_shape(config, B=B, max_len=max_len)) * dtype.itemsize


class KVCache:
    """Keys and values of `length` tokens for each of B sequences, in memory allocated once.

    `model(idx, cache)` reads the past, appends idx's keys and values, and moves `length` on,
    all layers together: after a call that fails the cache holds what it held before.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        B: int = 1,
        max_len: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        shape = kv_cache_shape(config, B=B, max_len=max_len)  # (n_layer, B, H_kv, max_len, D)
        self.k: Tensor | list[Tensor] = torch.zeros(shape, dtype=dtype, device=device)
        self.v: Tensor | list[Tensor] = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def max_len(self) -> int:
        """Tokens that fit."""
        return self.k[0].shape[2]  # of the first layer

    @property
    def nbytes(self) -> int:
        """Bytes allocated, whatever `length` is."""
        return sum(tensor.nbytes for tensor in (*self.k, *self.v))

    def room_for(self, T: int) -> bool:
        """Whether T more tokens fit."""
        return self.length + T <= self.max_len

    def positions(self, T: int, block_size: int, device: torch.device) -> Tensor:
        """Positions (T,) of the next T tokens in the text, on the device of the model."""
        check_block_size(self.max_len, block_size)
        _check_room(self.length + T, self.max_len)
        return torch.arange(self.length, self.length + T, device=device)

    def layer(self, i: int) -> AnyLayerCache:
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
        """Forget all but the first `length` tokens, whose keys stay where they are."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {self.length} tokens cannot be rewound to {length}.")
        self.length = length


def check_block_size(max_len: int, block_size: int) -> None:
    """Raise a ValueError if a cache holds more tokens than the model has positions."""
    if max_len > block_size:
        raise ValueError(
            f"{max_len} tokens are more than the model's block_size of {block_size}."
        )


def _check_room(end: int, max_len: int) -> None:
    if end > max_len:
        raise ValueError(f"{end} tokens do not fit into a cache of {max_len}.")


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values (B, H_kv, max_len, D), the first `length` of them past."""

    k: Tensor
    v: Tensor
    length: int

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, H_kv, T, D) behind the past; return past and present together.

        They have the shape (B, H_kv, length + T, D). The cache keeps values, not how they were
        computed: no gradient flows through it.
        """
        check_keys(k, self.k)
        end = self.length + k.shape[2]
        _check_room(end, self.k.shape[2])
        # detached, else the cache would keep the graph of every past step alive
        self.k[:, :, self.length : end] = k.detach()
        self.v[:, :, self.length : end] = v.detach()
        return self.k[:, :, :end], self.v[:, :, :end]

    def mask(self, T: int) -> Tensor | None:
        """Which of these keys the last T queries may see; None: each all up to itself."""
        return None


def check_keys(k: Tensor, kept: Tensor) -> None:
    """Raise a ValueError or TypeError unless k (B, H_kv, T, D) fits behind what is kept."""
    brings, holds = (
        f"batch {t.shape[0]}, {t.shape[1]} KV heads of size {t.shape[3]}" for t in (k, kept)
    )
    if brings != holds:
        raise ValueError(f"the model brings {brings}, but the cache is for {holds}.")
    brings, holds = (f"{t.dtype} on {t.device}" for t in (k, kept))
    if brings != holds:
        raise TypeError(f"the model's keys are {brings}, but the cache holds {holds}.")


class StaticKVCache(KVCache):
    """A KV cache in which no shape or Python number changes from step to step: for a compiler.

    Its length is a tensor's value, and every step gets all `max_len` keys under a mask, at the
    price of reading those that are not there yet; the first tokens, with nothing before them,
    see each other alone. (As `StaticCache` in Transformers and the cache of gpt-fast. Its
    tensors are no buffers, so on a GPU `mode="reduce-overhead"` needs
    `torch._dynamo.mark_static_address` on each.)
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        B: int = 1,
        max_len: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        L, *shape = kv_cache_shape(config, B=B, max_len=max_len)
        # a tensor for each layer: of a larger one, with a layer changed, a compiler copies all
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(L)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(L)]
        # how many tokens there are, as kernels see it; in Python one thing changes, and once: a
        # prompt, with nothing before it, is another program anyway
        self.past = torch.zeros((), dtype=torch.long, device=device)
        self.empty = True

    @property
    def length(self) -> int:
        """Tokens in the cache; on a GPU, reading it waits for all that was queued before."""
        return int(self.past)

    @length.setter
    def length(self, length: int) -> None:
        self.past.fill_(length)
        self.empty = length == 0

    def positions(self, T: int, block_size: int, device: torch.device) -> Tensor:
        """Positions (T,) of the next T tokens in the text.

        Compiled code does not ask whether they fit: there the caller does, or a kernel fails.
        """
        check_block_size(self.max_len, block_size)
        if not torch.compiler.is_compiling():
            _check_room(self.length + T, self.max_len)
        return self.past.to(device) + torch.arange(T, device=device)

    def layer(self, i: int) -> "StaticLayerCache":
        """What block i of the model needs to see; the length is not read, which would wait."""
        return StaticLayerCache(*self._keys_and_values(i), self.past, self.empty)

    def advance(self, T: int) -> None:
        """Count T appended tokens as past; called once, after the last layer."""
        self.past.add_(T)
        self.empty = False


@dataclass(frozen=True)
class StaticLayerCache:
    """One layer's keys and values (B, H_kv, max_len, D), as many past as `length` says."""

    k: Tensor
    v: Tensor
    length: Tensor
    empty: bool

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, H_kv, T, D) behind the past; return all that there is room for.

        With nothing before them k and v themselves are returned: all else would be masked.
        """
        check_keys(k, self.k)
        k, v = k.detach(), v.detach()
        at = self.length + torch.arange(k.shape[2], device=k.device)  # (T,)
        self.k.index_copy_(2, at, k)
        self.v.index_copy_(2, at, v)
        return (k, v) if self.empty else (self.k, self.v)

    def mask(self, T: int) -> Tensor | None:
        """True (T, max_len) where one of the last T queries may see a key: up to its own."""
        if self.empty:
            return None
        keys = torch.arange(self.k.shape[2], device=self.k.device)
        queries = torch.arange(T, device=self.k.device)
        return keys <= self.length + queries[:, None]
