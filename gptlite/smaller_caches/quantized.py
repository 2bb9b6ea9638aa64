"""Fewer bits: keys with a scale a channel, values with one a token (Liu et al., 2024)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gptlite.kv_cache import LayerCache, check_keys, kv_cache_shape
from gptlite.model import GPTConfig
from gptlite.smaller_caches.late import LateKVCache


def quantize(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Codes of `bits` bits, packed along the last dimension, and a scale (2, ...) a group.

    The scale is a group's step and least value, in float16. A group runs along `dim`; a number
    is about code * step + least, off by half a step.
    """
    least, most = x.aminmax(dim=dim, keepdim=True)
    # where all numbers are equal there is no step
    step = ((most - least) / (2**bits - 1)).clamp(min=2**-14)
    scale = torch.stack([step, least]).half()
    codes = ((x - scale[1]) / scale[0]).round().clamp(0, 2**bits - 1).byte()
    parts = codes.unflatten(-1, (-1, 8 // bits)) << _shifts(bits, x.device)
    return parts.sum(-1, dtype=torch.uint8), scale


def dequantize(packed: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The numbers that `quantize` has rounded."""
    codes = (packed[..., None] >> _shifts(bits, packed.device) & 2**bits - 1).flatten(-2)
    return (codes.float() * scale[0].float() + scale[1].float()).to(dtype)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


def quantized_kv_cache_bytes(
    config: GPTConfig,
    *,
    B: int = 1,
    max_len: int | None = None,
    bits: int = 8,
    group: int = 32,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes of a `QuantizedKVCache`, known before it is made."""
    L, B, H, T, D = kv_cache_shape(config, B=B, max_len=max_len)
    groups = math.ceil(T / group)
    keys = groups * (group * D * bits // 8 + 4 * D) + group * D * dtype.itemsize
    values = T * (D * bits // 8 + 4)
    return L * B * H * (keys + values)


class QuantizedKVCache(LateKVCache):
    """Keys and values in few bits, keys with a scale for each channel, values with one a token.

    Some channels of the keys are large in every token, so a channel of `group` tokens shares a
    scale (Liu et al., 2024). A group that is not full yet waits in `dtype`, which is also the
    format in which attention gets everything.
    """

    k: Tensor
    v: Tensor

    def __init__(
        self,
        config: GPTConfig,
        *,
        B: int = 1,
        max_len: int | None = None,
        bits: int = 8,
        group: int = 32,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        L, B, H, T, D = kv_cache_shape(config, B=B, max_len=max_len)
        if bits not in (2, 4, 8) or D * bits % 8:
            raise ValueError(
                f"bits is {bits}, but must be 2, 4 or 8, "
                f"and {D} such codes must fill whole bytes."
            )
        if group < 1:
            raise ValueError(f"group is {group}, but must be at least 1.")
        self.bits, self.length, self.later = bits, 0, []
        groups, width = math.ceil(T / group), D * bits // 8
        self.k = torch.zeros(L, B, H, groups, group, width, dtype=torch.uint8, device=device)
        self.v = torch.zeros(L, B, H, T, width, dtype=torch.uint8, device=device)
        # step and least value of each channel of a group, and of each token
        half = torch.float16
        self.k_scale = torch.zeros(2, L, B, H, groups, 1, D, dtype=half, device=device)
        self.v_scale = torch.zeros(2, L, B, H, T, 1, dtype=half, device=device)
        # keys of the group that is not full
        self.recent = torch.zeros(L, B, H, group, D, dtype=dtype, device=device)

    @property
    def max_len(self) -> int:
        """Tokens that fit."""
        return self.v.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, whatever `length` is."""
        return sum(t.nbytes for t in (self.k, self.k_scale, self.v, self.v_scale, self.recent))

    def layer(self, i: int) -> "QuantizedLayerCache":
        """What block i of the model needs to see."""
        kept, scales = self._keys_and_values(i), (self.k_scale[:, i], self.v_scale[:, i])
        return QuantizedLayerCache(
            *kept, self.length, *scales, self.recent[i], self.bits, self.later
        )

    def rewind(self, length: int = 0) -> None:
        """Forget all but the first `length` tokens; keys of a full group stay rounded."""
        before, (first, rest) = self.length, divmod(length, self.recent.shape[3])
        super().rewind(length)
        if rest and first < before // self.recent.shape[3]:
            codes, scale = self.k[:, :, :, first], self.k_scale[:, :, :, :, first]
            self.recent.copy_(dequantize(codes, scale, self.bits, self.recent.dtype))


@dataclass(frozen=True)
class QuantizedLayerCache(LayerCache):
    """One layer: k (B, H_kv, groups, group, bytes) and v (B, H_kv, max_len, bytes) in codes."""

    k_scale: Tensor  # (2, B, H_kv, groups, 1, D)
    v_scale: Tensor  # (2, B, H_kv, max_len, 1)
    recent: Tensor  # (B, H_kv, group, D)
    bits: int
    later: list[Callable[[], object]]  # done when all layers have answered

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k and v (B, H_kv, T, D); return past and present, mostly rounded.

        They have the shape (B, H_kv, length + T, D).
        """
        check_keys(k, self.recent)
        k, v, dtype, end = k.detach(), v.detach(), k.dtype, self.length + k.shape[2]
        new = slice(self.length, end)
        self.v[:, :, new], self.v_scale[:, :, :, new] = quantize(v, self.bits, -1)
        group = self.recent.shape[2]
        before, full = self.length // group, end // group  # groups that were full, and are
        k = torch.cat([self.recent[:, :, : self.length - before * group], k], 2)
        whole, tail = k.split([(full - before) * group, end - full * group], 2)
        if full > before:
            whole, new = whole.unflatten(2, (-1, group)), slice(before, full)
            self.k[:, :, new], self.k_scale[:, :, :, new] = quantize(whole, self.bits, -2)
        tail = tail.clone()
        self.later.append(lambda: self.recent[:, :, : tail.shape[2]].copy_(tail))
        codes, scale = self.k[:, :, :full], self.k_scale[:, :, :, :full]
        keys = dequantize(codes, scale, self.bits, dtype).flatten(2, 3)
        codes, scale = self.v[:, :, :end], self.v_scale[:, :, :, :end]
        return torch.cat([keys, tail], 2), dequantize(codes, scale, self.bits, dtype)
