"""Smaller KV caches, of fewer heads (Ainslie et al., 2023), tokens (Xiao et al., 2023) or bits (Liu et al., 2024)."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gptlite.kv_cache import KVCache, LayerCache, check_block_size, check_keys, kv_cache_shape
from gptlite.model import GPT, GPTConfig, causal_mask


def share_kv_heads(model: GPT, n_kv_head: int) -> GPT:
    """A copy of a model with fewer heads of keys and values, each the mean of those that it replaces.

    Not the same function: a little training afterwards wins back most of what the means lose (Ainslie et al., 2023).
    """
    config = model.config
    if n_kv_head < 1 or config.kv_heads % n_kv_head:
        raise ValueError(
            f"n_kv_head is {n_kv_head}, which does not divide the model's {config.kv_heads} KV heads."
        )
    made = GPT(replace(config, n_kv_head=n_kv_head), model.h[0].attn.attention).to(
        model.wte.weight
    )
    tensors = model.state_dict()
    for name in [
        name for name in tensors if "c_attn" in name
    ]:  # weight (C + 2 H_kv D, C) or bias (C + 2 H_kv D)
        width = config.kv_heads * config.head_dim
        q, k, v = tensors[name].split([config.n_head * config.head_dim, width, width])
        grouped = [
            t.view(n_kv_head, -1, config.head_dim, *t.shape[1:]) for t in (k, v)
        ]  # (H_kv, group, D, ...)
        tensors[name] = torch.cat([q, *(t.mean(1).flatten(0, 1) for t in grouped)])
    made.load_state_dict(tensors)
    return made.train(model.training)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention in which heads that share keys are further queries of one head, so that no key is copied or read twice.

    Takes and returns what every attention does: q (B, H, Tq, D), k and v (B, H_kv, Tk, D).
    """
    (B, H, Tq, D), (H_kv, Tk) = q.shape, k.shape[1:3]
    if H % H_kv:
        raise ValueError(f"q has {H} heads, which the {H_kv} heads of k do not divide.")
    if mask is None and Tq > 1:
        mask = causal_mask(Tq, Tk, q.device)
    rows = q.reshape(B, H_kv, H // H_kv * Tq, D)  # (B, H_kv, group * Tq, D)
    mask = None if mask is None else mask.repeat(H // H_kv, 1)  # (group * Tq, Tk)
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).view(B, H, Tq, D)


class RollingKVCache(KVCache):
    """Keys and values of the first `sinks` tokens and of the last `window`, for a text of any length.

    Attention over few tokens breaks when it loses the first ones, on which it rests where nothing else fits (Xiao et
    al., 2023). A token takes the slot of the one that has just left the window. Once the model's positions are used up
    they come round again, without those of the sinks; a model has to be trained for that. What has been overwritten is
    gone: a call that fails on its way through the layers leaves a cache that has to be rewound to 0.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        B: int = 1,
        window: int = 64,
        sinks: int = 4,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        if window < 1 or sinks < 0:
            raise ValueError(
                f"window is {window} and sinks is {sinks}, but they must be at least 1 and 0."
            )
        super().__init__(config, B=B, max_len=sinks + window, dtype=dtype, device=device)
        self.window, self.sinks = window, sinks

    def room_for(self, T: int) -> bool:
        """Whether T more tokens fit: always."""
        return True

    def positions(self, T: int, block_size: int, device: torch.device) -> Tensor:
        """Positions (T,) of the next T tokens: in the text, and when all are used round again."""
        check_block_size(self.max_len, block_size)
        token = torch.arange(self.length, self.length + T, device=device)
        around = self.sinks + (token - self.sinks) % (block_size - self.sinks)
        return torch.where(token < self.sinks, token, around)

    def layer(self, i: int) -> "RollingLayerCache":
        """What block i of the model needs to see."""
        return RollingLayerCache(
            *self._keys_and_values(i), self.length, self.window, self.sinks
        )

    def rewind(self, length: int = 0) -> None:
        """Forget all but the first `length` tokens, as long as none of them has been overwritten; or everything."""
        if length and self.length > self.max_len:
            raise ValueError(
                f"a cache that has rolled on to {self.length} tokens can only be rewound to 0."
            )
        super().rewind(length)


@dataclass(frozen=True)
class RollingLayerCache(LayerCache):
    """One layer's keys and values (B, H_kv, sinks + window, D), after `length` tokens of a text."""

    window: int
    sinks: int

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k and v (B, H_kv, T, D); return them behind what was kept, or for a single token what is kept now."""
        check_keys(k, self.k)
        k, v, T = k.detach(), v.detach(), k.shape[2]
        if (
            T == 1
        ):  # all that it takes; the slot is a Python number, so that no device is waited for
            slot = self._slot(self.length)
            self.k[:, :, slot : slot + 1], self.v[:, :, slot : slot + 1] = k, v
            kept = min(self.length + 1, self.k.shape[2])
            return self.k[:, :, :kept], self.v[:, :, :kept]
        kept, end = min(self.length, self.k.shape[2]), self.length + T
        both = torch.cat([self.k[:, :, :kept], k], 2), torch.cat([self.v[:, :, :kept], v], 2)
        stays = [n for n in range(self.length, end) if n < self.sinks or n >= end - self.window]
        new, slots = ([n - self.length for n in stays], [self._slot(n) for n in stays])
        self.k[:, :, slots], self.v[:, :, slots] = k[:, :, new], v[:, :, new]
        return both

    def _slot(self, token: int) -> int:
        return token if token < self.sinks else self.sinks + (token - self.sinks) % self.window

    def mask(self, T: int) -> Tensor | None:
        """True (T, kept + T) where one of T queries may see a key: a sink, or one of the last `window` tokens."""
        if T == 1:
            return None  # what has left the window has just been overwritten
        slot = torch.arange(min(self.length, self.k.shape[2]), device=self.k.device)
        newest = (
            self.length - 1 - (self.length - 1 - slot) % self.window
        )  # the last token that took the slot
        new = torch.arange(self.length, self.length + T, device=self.k.device)
        keys, queries = (
            torch.cat([torch.where(slot < self.sinks, slot, newest), new]),
            new[:, None],
        )
        return (keys <= queries) & ((keys < self.sinks) | (keys > queries - self.window))


def quantize(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Codes of `bits` bits, packed along the last dimension, and the step and least value (2, ...) of each group.

    A group runs along `dim`. A number is about code * step + least, off by half a step; both are float16.
    """
    least, most = x.aminmax(dim=dim, keepdim=True)
    step = ((most - least) / (2**bits - 1)).clamp(
        min=2**-14
    )  # where all numbers are equal there is none
    scale = torch.stack([step, least]).half()
    codes = (
        ((x - scale[1]) / scale[0])
        .round()
        .clamp(0, 2**bits - 1)
        .byte()
        .unflatten(-1, (-1, 8 // bits))
    )
    return (codes << _shifts(bits, x.device)).sum(-1, dtype=torch.uint8), scale


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


class QuantizedKVCache(KVCache):
    """Keys and values in few bits, keys with a scale for each channel, values with one a token (Liu et al., 2024).

    Some channels of the keys are large in every token, so a channel of `group` tokens shares a scale. A group that is
    not full yet waits in `dtype`, which is also the format in which attention gets everything.
    """

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
                f"bits is {bits}, but must be 2, 4 or 8, and {D} such codes must fill whole bytes."
            )
        if group < 1:
            raise ValueError(f"group is {group}, but must be at least 1.")
        groups = math.ceil(T / group)
        codes, scales = (
            {"dtype": torch.uint8, "device": device},
            {"dtype": torch.float16, "device": device},
        )
        self.k = torch.zeros(L, B, H, groups, group, D * bits // 8, **codes)
        self.k_scale = torch.zeros(
            2, L, B, H, groups, 1, D, **scales
        )  # step and least value of each channel
        self.v = torch.zeros(L, B, H, T, D * bits // 8, **codes)
        self.v_scale = torch.zeros(2, L, B, H, T, 1, **scales)  # and of each token
        self.recent = torch.zeros(
            L, B, H, group, D, dtype=dtype, device=device
        )  # keys of the unfinished group
        self.bits, self.length = bits, 0

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
        k, v = self._keys_and_values(i)
        return QuantizedLayerCache(
            k, v, self.length, self.k_scale[:, i], self.v_scale[:, i], self.recent[i], self.bits
        )

    def rewind(self, length: int = 0) -> None:
        """Forget all but the first `length` tokens; keys of a group that was full come back rounded."""
        before, (first, rest) = self.length, divmod(length, self.recent.shape[3])
        super().rewind(length)
        if rest and first < before // self.recent.shape[3]:
            group = dequantize(
                self.k[:, :, :, first],
                self.k_scale[:, :, :, :, first],
                self.bits,
                self.recent.dtype,
            )
            self.recent.copy_(group)


@dataclass(frozen=True)
class QuantizedLayerCache(LayerCache):
    """One layer of a `QuantizedKVCache`: k (B, H_kv, groups, group, bytes), v (B, H_kv, max_len, bytes)."""

    k_scale: Tensor  # (2, B, H_kv, groups, 1, D)
    v_scale: Tensor  # (2, B, H_kv, max_len, 1)
    recent: Tensor  # (B, H_kv, group, D)
    bits: int

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k and v (B, H_kv, T, D); return past and present (B, H_kv, length + T, D), mostly rounded."""
        check_keys(k, self.recent)
        k, v, start, end = k.detach(), v.detach(), self.length, self.length + k.shape[2]
        self.v[:, :, start:end], self.v_scale[:, :, :, start:end] = quantize(v, self.bits, -1)
        group = self.recent.shape[2]
        for first in range(
            start // group * group, end, group
        ):  # the groups that new tokens fall into
            a, b = max(first, start), min(first + group, end)
            self.recent[:, :, a - first : b - first] = k[:, :, a - start : b - start]
            if b == first + group:
                i = first // group
                self.k[:, :, i], self.k_scale[:, :, :, i] = quantize(self.recent, self.bits, -2)
        full = end // group
        keys = dequantize(
            self.k[:, :, :full], self.k_scale[:, :, :, :full], self.bits, k.dtype
        ).flatten(2, 3)
        values = dequantize(self.v[:, :, :end], self.v_scale[:, :, :, :end], self.bits, k.dtype)
        return torch.cat([keys, self.recent[:, :, : end - full * group]], 2), values
