"""A GPT as an ONNX graph: exported, run without PyTorch, its weights rounded, drawn."""

from gptlite.onnx_export.cache import (
    AppendingGPT,
    CachedGPT,
    ConcatLayer,
    PairLayer,
    PastCache,
    masked_attention,
    two_part_attention,
)
from gptlite.onnx_export.exporters import (
    TwoHeadBlock,
    export,
    export_cached,
    export_gpt,
    export_torchscript,
)
from gptlite.onnx_export.files import check_onnx, load_onnx, save_onnx
from gptlite.onnx_export.graph_drawing import draw_graph
from gptlite.onnx_export.graphs import count, diff_markdown, inside
from gptlite.onnx_export.runtime import BoundCache, BoundGPT, OnnxCache, OnnxGPT
from gptlite.onnx_export.sessions import open_session, optimized
from gptlite.onnx_export.weights import (
    quantize_dynamic,
    quantize_int4,
    quantize_static,
    store_half,
)

__all__ = [
    "AppendingGPT",
    "BoundCache",
    "BoundGPT",
    "CachedGPT",
    "ConcatLayer",
    "OnnxCache",
    "OnnxGPT",
    "PairLayer",
    "PastCache",
    "TwoHeadBlock",
    "check_onnx",
    "count",
    "diff_markdown",
    "draw_graph",
    "export",
    "export_cached",
    "export_gpt",
    "export_torchscript",
    "inside",
    "load_onnx",
    "masked_attention",
    "open_session",
    "optimized",
    "quantize_dynamic",
    "quantize_int4",
    "quantize_static",
    "save_onnx",
    "store_half",
    "two_part_attention",
]
