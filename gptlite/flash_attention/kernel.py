"""Flash attention's forward pass as a kernel in Triton (Tillet, Kung and Cox, 2019).

Without a GPU it runs in Triton's interpreter, if TRITON_INTERPRET=1 is set before anything
imports Triton.
"""

import math

import torch
from torch import Tensor

from gptlite.flash_attention.tiles import checked

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the kernel is written in Triton; install it with pip install triton."
    ) from error


@triton.jit
def _flash_forward(
    q, k, v, out, scale, groups, Tq, Tk, D,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    # a block of queries of one head of one sequence
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, d = block * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    q_at = head * Tq * D + row[:, None] * D + d[None, :]
    inside = (row < Tq)[:, None] & (d < D)[None, :]
    queries = tl.load(q + q_at, inside, 0.0)
    if WIDEN:
        queries = queries.to(tl.float32)
    maximum = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    weighted = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    position = row + Tk - Tq  # of a query among the keys
    # keys that the last query sees; what follows is skipped
    end = tl.minimum((block + 1) * BLOCK_Q, Tq) + Tk - Tq
    for first in range(0, end, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        at = (head // groups) * Tk * D + column[:, None] * D + d[None, :]
        there = (column < Tk)[:, None] & (d < D)[None, :]
        keys, values = tl.load(k + at, there, 0.0), tl.load(v + at, there, 0.0)
        if WIDEN:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(column[None, :] <= position[:, None], scores, -float("inf"))
        # finite: every query sees a key of the first tile
        new = tl.maximum(maximum, tl.max(scores, 1))
        shrink, weights = tl.exp(maximum - new), tl.exp(scores - new[:, None])
        total = total * shrink + tl.sum(weights, 1)
        found = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        weighted = weighted * shrink[:, None] + found
        maximum = new
    tl.store(out + q_at, (weighted / total[:, None]).to(out.dtype.element_ty), inside)


def triton_flash_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    """`flash_attention` in one kernel, without a backward pass.

    q is (B, H, Tq, D), k and v are (B, H_kv, Tk, D).
    """
    q, k, v = checked(q, k, v, mask)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError("the kernel has no backward pass; call it under torch.no_grad().")
    interpreted = not isinstance(tl.sum, triton.JITFunction)
    if q.device.type == "cpu" and not interpreted:  # Triton was imported to compile
        remedy = "set TRITON_INTERPRET=1 before anything imports Triton, as torch.compile does"
        raise RuntimeError(f"on a CPU, {remedy}.")
    (B, H, Tq, D), (H_kv, Tk) = q.shape, k.shape[1:3]
    out = torch.empty_like(q)
    # what fits on a chip
    block_q, block_k = (128, 64) if q.dtype != torch.float32 else (64, 32)
    block_q = max(16, min(block_q, triton.next_power_of_2(Tq)))
    grid = (triton.cdiv(Tq, block_q), B * H)
    options = {"BLOCK_Q": block_q, "BLOCK_K": block_k}
    options["BLOCK_D"] = max(16, triton.next_power_of_2(D))
    # the interpreter multiplies bfloat16 as integers
    options["WIDEN"] = interpreted and q.dtype == torch.bfloat16
    _flash_forward[grid](q, k, v, out, 1 / math.sqrt(D), H // H_kv, Tq, Tk, D, **options)
    return out
