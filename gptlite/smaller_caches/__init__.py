"""Smaller KV caches, of fewer heads, tokens or bits, and what a model needs for them."""

from gptlite.smaller_caches.heads import grouped_attention, share_kv_heads
from gptlite.smaller_caches.quantized import (
    QuantizedKVCache,
    QuantizedLayerCache,
    dequantize,
    quantize,
    quantized_kv_cache_bytes,
)
from gptlite.smaller_caches.rolling import RollingKVCache, RollingLayerCache

__all__ = [
    "QuantizedKVCache",
    "QuantizedLayerCache",
    "RollingKVCache",
    "RollingLayerCache",
    "dequantize",
    "grouped_attention",
    "quantize",
    "quantized_kv_cache_bytes",
    "share_kv_heads",
]
