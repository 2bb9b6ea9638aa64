"""Operators by what they do, as ONNX and as PyTorch name them."""

import re

# in lower case, letters and digits only
OPERATORS = {
    "matmul": "matmul gemm linear addmm mm bmm baddbmm einsum matmulinteger qlinearmatmul",
    "normalise": (
        "layernormalization nativelayernorm layernorm simplifiedlayernormalization "
        "rmsnormalization rmsnorm softmax logsoftmax reducemean reducesum reducemax reducemin "
        "mean sum var amax amin any all cumsum argmax topk"
    ),
    "elementwise": (
        "add sub rsub mul div truediv floordiv mod pow sqrt rsqrt reciprocal neg abs exp log "
        "tanh sigmoid sin cos erf gelu relu silu where not and or logicalnot logicaland "
        "logicalor bitwisenot bitwiseand bitwiseor equal less greater lessorequal "
        "greaterorequal eq ne lt le gt ge isnan min max minimum maximum clip clamp floor ceil "
        "round sign maskedfill trilu tril triu"
    ),
    "shape": (
        "reshape view unsafeview transpose permute t concat cat stack split splitwithsizes "
        "chunk slice select squeeze unsqueeze expand tile repeat repeatinterleave flatten "
        "shape size symsize gather gathernd gatherelements scatternd scatterelements "
        "indexselect index indexput embedding getitem copy contiguous clone alias identity "
        "constantofshape scalartensor range arange ones zeros full oneslike zeroslike "
        "fulllike onehot pad"
    ),
    "cast": (
        "cast castlike to tocopy type float half bfloat16 int long bool quantizelinear "
        "dequantizelinear dynamicquantizelinear quantizepertensor dequantizepertensor "
        "quantizeperchannel dequantizeperchannel"
    ),
    "random": (
        "dropout nativedropout randomuniform randomuniformlike randomnormal randomnormallike "
        "bernoulli multinomial rand randn randlike randnlike"
    ),
    "control": "if loop scan cond whileloop",
    "fused": (
        "attention multiheadattention groupqueryattention rotaryembedding "
        "scaleddotproductattention matmulnbits fastgelu quickgelu biasgelu "
        "skiplayernormalization embedlayernormalization dynamicquantizematmul"
    ),
}
_KINDS = {name: kind for kind, names in OPERATORS.items() for name in names.split()}


def kind_of(op: str, domain: str = "") -> str:
    """One of OPERATORS, or "other"; what only a runtime knows is fused."""
    unknown = "fused" if domain not in ("", "ai.onnx") else "other"
    return _KINDS.get(re.sub("[^a-z0-9]", "", op.lower()), unknown)
