"""Faster arithmetic in the same model: Linears that stream weights, attention that fuses.

At batch 1 a matrix product is a reduction: each weight is used once, so its speed is that of
reading it.
"""

import math
from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gptlite.device import fast_dtype
from gptlite.kernels.load import load_cpp
from gptlite.model import GPT, sdpa_attention


class ReductionLinear(nn.Module):
    """A Linear that takes one row as multiply-and-sum, which `torch.compile` can fuse.

    It is made for compiled code: in eager mode it writes a product as large as the weight.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != x.shape[-1]:
            return F.linear(x, self.weight, self.bias)
        y = (self.weight * x.reshape(-1)).sum(-1)  # (out, in) -> (out,)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


@cache
def load_kernels() -> None:
    """Register the C++ kernels as `torch.ops.gptlite`, each with a twin for the compiler.

    The twin knows only shapes.
    """
    load_cpp("gemv.cpp", "single_query_attention.cpp")

    @torch.library.register_fake("gptlite::gemv")
    def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @torch.library.register_fake("gptlite::single_query_attention")
    def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return q.new_empty(q.shape)


def _refuse_gradients(who: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{who} has no backward pass; call it under torch.no_grad().")


class GemvLinear(nn.Module):
    """A Linear on the CPU that reads its weights once, at memory's speed, for up to `few` rows.

    More take `F.linear`, in float32 where the processor would emulate bfloat16. Weights are
    float32 or bfloat16; for float16 PyTorch has such a kernel itself. No backward pass.
    """

    # with more a matrix product does better: it uses a weight for several, while in a register
    few = 4

    def __init__(self, linear: nn.Linear):
        super().__init__()
        load_kernels()
        self.weight, self.bias = linear.weight, linear.bias
        # whether this processor emulates bfloat16
        self.emulated = fast_dtype(self.weight.device) == torch.float32

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > self.few * x.shape[-1] or x.dtype == torch.float16:
            if self.emulated and x.dtype == self.weight.dtype == torch.bfloat16:
                bias = None if self.bias is None else self.bias.float()
                return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)
            return F.linear(x, self.weight, self.bias)
        _refuse_gradients("GemvLinear", x, self.weight, self.bias)
        return torch.ops.gptlite.gemv(x, self.weight, self.bias)


def pack_weights(model: GPT) -> GPT:
    """The same model, its weights laid one after another into one piece of memory.

    Large pages (on Linux, with THP_MEM_ALLOC_ENABLE=1) cover one large piece but for its end,
    and many small ones in part or not at all; and what is asked for beyond the end of one
    matrix is mostly the beginning of the next.
    """
    parameters = list(model.parameters())
    starts, line = [0], 64 // parameters[0].itemsize  # each begins with a line of the cache
    for p in parameters:
        starts.append(starts[-1] + math.ceil(p.numel() / line) * line)
    memory = parameters[0].new_empty(starts[-1])
    for p, start in zip(parameters, starts, strict=False):
        p.data = memory[start : start + p.numel()].view(p.shape).copy_(p.data)
    return model


def reduction_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of one query as two reductions and a softmax, to be fused; more take SDPA."""
    B, H, Tq, D = q.shape
    if Tq > 1:
        return sdpa_attention(q, k, v, mask)
    # the heads that share keys side by side: (B, H_kv, H / H_kv, 1, D)
    groups = q.view(B, k.shape[1], -1, 1, D)
    scores = (groups * k[:, :, None]).sum(-1) / math.sqrt(D)  # (B, H_kv, H / H_kv, Tk)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)  # the mask is (1, Tk)
    weights = scores.softmax(-1)
    return (weights[..., None] * v[:, :, None]).sum(-2).view(B, H, 1, D)


def single_query_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Attention of one query by one kernel on the CPU, which reads visible keys alone.

    Numbers are float32 or bfloat16, added up in float32. Float16 and more queries take SDPA. It
    has no backward pass. Compiled code needs `load_kernels()` before it, which making a
    GemvLinear calls.
    """
    if q.shape[2] > 1 or q.dtype == torch.float16:
        return sdpa_attention(q, k, v, mask)
    if not torch.compiler.is_compiling():
        load_kernels()
    _refuse_gradients("single_query_attention", q, k, v)
    return torch.ops.gptlite.single_query_attention(q, k, v, mask)
