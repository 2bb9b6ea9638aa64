"""Attention in tiles: no square of scores is ever in memory; `kernel` is the same in Triton."""

from gptlite.flash_attention.tiles import (
    Partial,
    Traffic,
    attend,
    backward_traffic,
    flash_attention,
    flash_backward,
    flash_forward,
    forward_traffic,
    merge,
    split_kv_attention,
)

__all__ = [
    "Partial",
    "Traffic",
    "attend",
    "backward_traffic",
    "flash_attention",
    "flash_backward",
    "flash_forward",
    "forward_traffic",
    "merge",
    "split_kv_attention",
]
