"""Weights in few bits: grids, the fits that choose codes, Linears, whole models and files."""

from gptlite.quantization.activations import RoundedInputLinear, input_peaks
from gptlite.quantization.files import load_quantized, save_quantized
from gptlite.quantization.fits import awq, gptq, relative_error
from gptlite.quantization.grids import (
    INT4,
    INT8,
    Grid,
    Quantized,
    fit_grid,
    from_codes,
    round_to_nearest,
    to_codes,
)
from gptlite.quantization.linear import (
    Int4Linear,
    Int8Linear,
    QuantizedEmbedding,
    QuantizedLinear,
    pack,
    unpack,
)
from gptlite.quantization.model import LayerReport, quantize_model
from gptlite.quantization.training import LoRALinear, NF4Linear, QATLinear, nf4_levels, qlora

__all__ = [
    "INT4",
    "INT8",
    "Grid",
    "Int4Linear",
    "Int8Linear",
    "LayerReport",
    "LoRALinear",
    "NF4Linear",
    "QATLinear",
    "Quantized",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RoundedInputLinear",
    "awq",
    "fit_grid",
    "from_codes",
    "gptq",
    "input_peaks",
    "load_quantized",
    "nf4_levels",
    "pack",
    "qlora",
    "quantize_model",
    "relative_error",
    "round_to_nearest",
    "save_quantized",
    "to_codes",
    "unpack",
]
