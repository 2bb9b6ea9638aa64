"""Caches that overwrite what they hold, but not before a call has gone well."""

from collections.abc import Callable

import torch
from torch import Tensor

from gptlite.kv_cache import KVCache


class LateKVCache(KVCache):
    """A KV cache whose layers leave in `later` what is to be written over their past.

    It is done when all layers have answered; what a call that failed has left is forgotten.
    """

    later: list[Callable[[], object]]

    def positions(self, T: int, block_size: int, device: torch.device) -> Tensor:
        """Positions (T,) of the next T tokens in the text, with which a call begins."""
        self.later.clear()
        return super().positions(T, block_size, device)

    def advance(self, T: int) -> None:
        """Count T appended tokens as past; called once, after the last layer."""
        for write in self.later:
            write()
        self.later.clear()
        super().advance(T)
