"""The KV cache: keys and values of the past, kept so that each token is computed once (Shazeer, 2019)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gptlite.model import GPTConfig


def kv_cache_shape(config: GPTConfig, B: int = 1, max_len: int | None = None) -> tuple[int, int, int, int, int]:
    """Shape (n_layer, B, n_kv_head, max_len, head_dim) of the keys, and again of the values."""
    max_len = config.block_size if max_len is None else max_len
    if B < 1:
        raise ValueError(f"the batch is {B}, but must be at least 1.")
    if not 0 < max_len <= config.block_size:
        raise ValueError(f"max_len is {max_len}, but must be from 1 to the model's block_size of {config.block_size}.")
    return config.n_layer, B, config.kv_heads, max_len, config.head_dim


def kv_cache_bytes(
    config: GPTConfig, B: int = 1, max_len: int | None = None, dtype: torch.dtype = torch.float32
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
        self.k = torch.zeros(shape, dtype=dtype, device=device)  # (n_layer, B, H_kv, max_len, D)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def max_len(self) -> int:
        """Tokens that fit."""
        return self.k.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, whatever `length` is."""
        return self.k.nbytes + self.v.nbytes

    def layer(self, i: int) -> "LayerCache":
        """What block i of the model needs to see."""
        if i >= len(self.k):
            raise ValueError(f"the model has more layers than the {len(self.k)} that the cache is for.")
        return LayerCache(self.k[i], self.v[i], self.length)

    def advance(self, T: int) -> None:
        """Count T appended tokens as past; called once, after the last layer."""
        self.length += T

    def rewind(self, length: int = 0) -> None:
        """Forget all but the first `length` tokens; their keys and values stay where they are."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {self.length} tokens cannot be rewound to {length}.")
        self.length = length


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
        B, H_kv, max_len, D = self.k.shape
        end = self.length + k.shape[2]
        if (k.shape[0], k.shape[1], k.shape[3]) != (B, H_kv, D):
            found = f"batch {k.shape[0]}, {k.shape[1]} KV heads of size {k.shape[3]}"
            raise ValueError(f"the model brings {found}, but the cache is for batch {B}, {H_kv} KV heads of size {D}.")
        if (k.dtype, k.device) != (self.k.dtype, self.k.device):
            mine = f"{self.k.dtype} on {self.k.device}"
            raise TypeError(f"the model's keys are {k.dtype} on {k.device}, but the cache holds {mine}.")
        if end > max_len:
            raise ValueError(f"{end} tokens do not fit into a cache of {max_len}.")
        self.k[:, :, self.length : end] = k.detach()  # else the cache would keep the graph of every past step alive
        self.v[:, :, self.length : end] = v.detach()
        return self.k[:, :, :end], self.v[:, :, :end]
