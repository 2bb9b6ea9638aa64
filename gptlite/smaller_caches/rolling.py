"""Fewer tokens: the first and the last of a text of any length (Xiao et al., 2023)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gptlite.kv_cache import LayerCache, check_block_size, check_keys
from gptlite.model import GPTConfig
from gptlite.smaller_caches.late import LateKVCache


class RollingKVCache(LateKVCache):
    """Keys and values of the first `sinks` tokens and the last `window` of a longer text.

    Attention over few tokens breaks when it loses the first ones, on which it rests where
    nothing else fits (Xiao et al., 2023). A token takes the slot of the one that has just left
    the window. Once the model's positions are used up they come round again, without those of
    the sinks; a model has to be trained for that.
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
        self.window, self.sinks, self.later = window, sinks, []

    def room_for(self, T: int) -> bool:
        """Whether T more tokens fit: always."""
        return True

    def positions(self, T: int, block_size: int, device: torch.device) -> Tensor:
        """Positions (T,) of the next T tokens: in the text, and once used up round again."""
        check_block_size(self.max_len, block_size)
        self.later.clear()
        token = torch.arange(self.length, self.length + T, device=device)
        around = self.sinks + (token - self.sinks) % (block_size - self.sinks)
        return torch.where(token < self.sinks, token, around)

    def layer(self, i: int) -> "RollingLayerCache":
        """What block i of the model needs to see."""
        k, v = self._keys_and_values(i)
        return RollingLayerCache(k, v, self.length, self.window, self.sinks, self.later)

    def rewind(self, length: int = 0) -> None:
        """Forget all but the first `length` tokens, none of which may be overwritten yet."""
        if length and self.length > self.max_len:
            raise ValueError(
                f"a cache that has rolled on to {self.length} tokens can only be rewound to 0."
            )
        super().rewind(length)


@dataclass(frozen=True)
class RollingLayerCache(LayerCache):
    """One layer's keys and values (B, H_kv, sinks + window, D), after `length` tokens."""

    window: int
    sinks: int
    later: list[Callable[[], object]] | None = None  # None: what is to be written is at once

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k and v (B, H_kv, T, D); return them behind what was kept.

        A single token takes its slot, and what is kept now is returned.
        """
        check_keys(k, self.k)
        k, v, T, kept = k.detach(), v.detach(), k.shape[2], min(self.length, self.k.shape[2])
        if self._in_place(T):  # its slot is a Python number, so that no device is waited for
            slot = self._slot(self.length)
            self._write(slice(slot, slot + 1), k, v)
            return self.k[:, :, : max(kept, slot + 1)], self.v[:, :, : max(kept, slot + 1)]
        both = torch.cat([self.k[:, :, :kept], k], 2), torch.cat([self.v[:, :, :kept], v], 2)
        new = [n for n in range(T) if n < self.sinks - self.length or n >= T - self.window]
        slots = [self._slot(self.length + n) for n in new]
        write = partial(self._write, slots, k[:, :, new], v[:, :, new])
        write() if self.later is None else self.later.append(write)
        return both

    def _write(self, slots: slice | list[int], k: Tensor, v: Tensor) -> None:
        self.k[:, :, slots], self.v[:, :, slots] = k, v

    def _slot(self, token: int) -> int:
        return token if token < self.sinks else self.sinks + (token - self.sinks) % self.window

    def _in_place(self, T: int) -> bool:
        # whose slot one token takes is out of sight; but a full cache may be rewound to it
        return T == 1 and (self.later is None or self.length != self.k.shape[2])

    def mask(self, T: int) -> Tensor | None:
        """True (T, kept + T) where one of T queries may see a key: a sink or in its window."""
        if self._in_place(T):
            return None  # what has left the window has just been overwritten
        slot = torch.arange(min(self.length, self.k.shape[2]), device=self.k.device)
        # the last token that took the slot
        newest = self.length - 1 - (self.length - 1 - slot) % self.window
        queries = torch.arange(self.length, self.length + T, device=self.k.device)[:, None]
        keys = torch.cat([torch.where(slot < self.sinks, slot, newest), queries[:, 0]])
        return (keys <= queries) & ((keys < self.sinks) | (keys > queries - self.window))
