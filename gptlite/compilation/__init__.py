"""Faster arithmetic in the same model: Linears that stream their weights, attention that fuses.

Two kernels in Triton are in `fused_triton`, which is imported on request.
"""

from gptlite.compilation.linears import (
    GemvLinear,
    ReductionLinear,
    load_kernels,
    pack_weights,
    reduction_attention,
    single_query_attention,
)

__all__ = [
    "GemvLinear",
    "ReductionLinear",
    "load_kernels",
    "pack_weights",
    "reduction_attention",
    "single_query_attention",
]
