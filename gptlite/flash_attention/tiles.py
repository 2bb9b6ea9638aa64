"""Flash attention (Dao et al., 2022; Dao, 2023): exact attention in tiles of scores.

Here in plain PyTorch, forward and backward, to be read and counted; `kernel` is the same in
Triton. A tile is what a GPU's program holds on its chip; `Traffic` counts the bytes that go
between there and memory.
"""

import math
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64  # queries, and keys, in a tile


class Partial(NamedTuple):
    """Attention to some of the keys, unfinished: all that is needed to go on with others."""

    maximum: Tensor  # (..., Tq, 1): the largest score m, so that no exponential overflows
    total: Tensor  # (..., Tq, 1): the sum of exp(score - m)
    weighted: Tensor  # (..., Tq, D): the sum of exp(score - m) * value

    def output(self) -> Tensor:
        """Softmax-weighted values (..., Tq, D), if these were all keys."""
        return self.weighted / self.total

    def logsumexp(self) -> Tensor:
        """log(sum of exp(score)), (..., Tq): with it the softmax can be computed again."""
        return (self.maximum + self.total.log()).squeeze(-1)


def attend(scores: Tensor, v: Tensor) -> Partial:
    """Scores (..., Tq, Tk) and values (..., Tk, D) of some keys, as a `Partial`.

    A score of -inf is that of a hidden key.
    """
    lowest = torch.finfo(scores.dtype).min
    maximum = scores.amax(-1, keepdim=True).clamp(min=lowest)  # finite, if all are hidden
    weights = (scores - maximum).exp()
    return Partial(maximum, weights.sum(-1, keepdim=True), weights @ v)


def merge(a: Partial, b: Partial) -> Partial:
    """Attention to both's keys (Milakov and Gimelshein, 2018): associative, so in any order."""
    maximum = torch.maximum(a.maximum, b.maximum)
    scale_a, scale_b = (a.maximum - maximum).exp(), (b.maximum - maximum).exp()
    total = a.total * scale_a + b.total * scale_b
    return Partial(maximum, total, a.weighted * scale_a + b.weighted * scale_b)


@dataclass
class Traffic:
    """Bytes between memory and chip, counted at each tile that is loaded or stored."""

    read: int = 0
    written: int = 0

    def load(self, *tiles: Tensor) -> list[Tensor]:
        """The tiles in float32, as the chip computes with them."""
        self.read += sum(tile.nbytes for tile in tiles)
        return [tile.float() for tile in tiles]

    def store(self, place: Tensor, tile: Tensor) -> None:
        """Write a tile to its place in memory, in that memory's number format."""
        self.written += place.nbytes
        place.copy_(tile)


def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_q: int = BLOCK,
    block_k: int = BLOCK,
    traffic: Traffic | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of q (B, H, Tq, D) to k, v (B, H_kv, Tk, D), and its log-sum-exps.

    The result is (B, H, Tq, D), the log-sum-exps are (B, H, Tq).
    """
    traffic = Traffic() if traffic is None else traffic
    (B, H, Tq, D), (H_kv, Tk) = q.shape, k.shape[1:3]
    q = q.view(B, H_kv, H // H_kv, Tq, D)  # the heads that share keys side by side
    k, v = k[:, :, None], v[:, :, None]
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    for i in range(0, Tq, block_q):
        rows = slice(i, min(i + block_q, Tq))
        (q_i,) = traffic.load(q[..., rows, :])
        found: Partial | None = None
        # tiles that lie wholly in the future are skipped
        for j in range(0, rows.stop + Tk - Tq, block_k):
            columns = slice(j, min(j + block_k, Tk))
            k_j, v_j = traffic.load(k[..., columns, :], v[..., columns, :])
            tile = attend(_scores(q_i, k_j, i + Tk - Tq, j), v_j)
            found = tile if found is None else merge(found, tile)
        assert found is not None  # each query sees its own key
        traffic.store(out[..., rows, :], found.output())
        traffic.store(lse[..., rows], found.logsumexp())
    return out.view(B, H, Tq, D), lse.view(B, H, Tq)


def flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_q: int = BLOCK,
    block_k: int = BLOCK,
    traffic: Traffic | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given that of the result; weights come from the log-sum-exps."""
    traffic = Traffic() if traffic is None else traffic
    (B, H, Tq, D), (H_kv, Tk) = q.shape, k.shape[1:3]
    shape = (B, H_kv, H // H_kv, Tq, D)
    q, grad, out = q.view(shape), grad.reshape(shape), out.view(shape)
    k, v, lse = k[:, :, None], v[:, :, None], lse.view(shape[:-1])
    dq = torch.zeros_like(q, dtype=torch.float32)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    delta = _projections(grad, out, block_q, traffic)
    for j in range(0, Tk, block_k):
        columns = slice(j, min(j + block_k, Tk))
        k_j, v_j = traffic.load(k[..., columns, :], v[..., columns, :])
        dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
        # the queries that see a key of the tile
        for i in range(max(0, j - (Tk - Tq)) // block_q * block_q, Tq, block_q):
            rows = slice(i, min(i + block_q, Tq))
            q_i, grad_i = traffic.load(q[..., rows, :], grad[..., rows, :])
            lse_i, delta_i = traffic.load(lse[..., rows, None], delta[..., rows, None])
            (dq_i,) = traffic.load(dq[..., rows, :])
            weights = (_scores(q_i, k_j, i + Tk - Tq, j) - lse_i).exp()
            d_scores = weights * (grad_i @ v_j.mT - delta_i) / math.sqrt(D)
            traffic.store(dq[..., rows, :], dq_i + d_scores @ k_j)
            # over the heads that share the key
            dk_j += (d_scores.mT @ q_i).sum(2, keepdim=True)
            dv_j += (weights.mT @ grad_i).sum(2, keepdim=True)
        traffic.store(dk[..., columns, :], dk_j)
        traffic.store(dv[..., columns, :], dv_j)
    return dq.view(B, H, Tq, D).to(q.dtype), dk.squeeze(2), dv.squeeze(2)


def _projections(grad: Tensor, out: Tensor, block_q: int, traffic: Traffic) -> Tensor:
    """Each query's gradient times its result, (..., Tq): the mean of dP over all its keys."""
    delta = out.new_empty(out.shape[:-1], dtype=torch.float32)
    for i in range(0, out.shape[-2], block_q):
        rows = slice(i, min(i + block_q, out.shape[-2]))
        grad_i, out_i = traffic.load(grad[..., rows, :], out[..., rows, :])
        traffic.store(delta[..., rows], (grad_i * out_i).sum(-1))
    return delta


def _scores(q: Tensor, k: Tensor, first_q: int, first_k: int) -> Tensor:
    """Scores (..., rows, columns) of the tile that begins with query first_q and key first_k.

    They are -inf where a key comes after its query.
    """
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if first_k + k.shape[-2] - 1 <= first_q:  # all of the tile lies in the past
        return scores
    queries = torch.arange(first_q, first_q + q.shape[-2], device=q.device)
    keys = torch.arange(first_k, first_k + k.shape[-2], device=q.device)
    return scores.masked_fill(keys > queries[:, None], -math.inf)


def forward_traffic(
    B: int,
    H: int,
    H_kv: int,
    Tq: int,
    Tk: int,
    D: int,
    itemsize: int,
    block_q: int = BLOCK,
    block_k: int = BLOCK,
) -> Traffic:
    """The bytes of `flash_forward`, by formula.

    Queries are read once, keys and values once for each block of queries.
    """
    # keys that each block's last query sees
    ends = [min(i + block_q, Tq) + Tk - Tq for i in range(0, Tq, block_q)]
    keys = sum(min(Tk, math.ceil(end / block_k) * block_k) for end in ends)
    read = itemsize * B * D * (H * Tq + 2 * H_kv * keys)
    return Traffic(read, B * H * Tq * (itemsize * D + 4))


def backward_traffic(
    B: int,
    H: int,
    H_kv: int,
    Tq: int,
    Tk: int,
    D: int,
    itemsize: int,
    block_q: int = BLOCK,
    block_k: int = BLOCK,
) -> Traffic:
    """The bytes of `flash_backward`, by formula.

    Keys and values are read once, and all that belongs to queries once for each block of keys.
    The gradient of the queries is kept in float32 meanwhile, and read and written each time.
    """
    starts = [max(0, j - (Tk - Tq)) // block_q * block_q for j in range(0, Tk, block_k)]
    queries = sum(Tq - start for start in starts)
    once = 2 * itemsize * D * (H * Tq + H_kv * Tk)
    read = once + H * queries * (2 * itemsize * D + 4 * D + 8)
    written = H * (4 * Tq + 4 * D * queries) + 2 * itemsize * D * H_kv * Tk
    return Traffic(B * read, B * written)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = flash_forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return flash_backward(grad, *ctx.saved_tensors)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention in tiles, with its own backward pass, for `model.set_attention`.

    It is slow: it is to be read.
    """
    return _Flash.apply(*checked(q, k, v, mask))


def split_kv_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, splits: int = 4
) -> Tensor:
    """Attention with the keys in `splits` parts, each on its own, merged at the end.

    For a single query there is but one block of queries; the parts are what many processors can
    share (flash-decoding, Dao et al., 2023).
    """
    q, k, v = checked(q, k, v, None)
    B, H, Tq, D = q.shape
    if splits < 1:
        raise ValueError(f"splits is {splits}, but must be at least 1.")
    Tk = k.shape[2]
    if mask is None:
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    grouped = q.view(B, k.shape[1], -1, Tq, D).float()
    parts = []
    for keys in torch.arange(Tk).tensor_split(min(splits, Tk)):
        columns = slice(int(keys[0]), int(keys[-1]) + 1)
        scores = grouped @ k[:, :, None, columns].float().mT / math.sqrt(D)
        scores = scores.masked_fill(~mask[:, columns], -math.inf)
        parts.append(attend(scores, v[:, :, None, columns].float()))
    return reduce(merge, parts).output().view(B, H, Tq, D).to(q.dtype)


def checked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The tensors, contiguous, as tiles want them; an error if they do not fit together."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        wanted = "(B, H, Tq, D) and twice (B, H_kv, Tk, D)"
        raise ValueError(f"q, k and v have the shapes {shapes}, but must be {wanted}.")
    (B, H, Tq, D), (H_kv, Tk) = q.shape, k.shape[1:3]
    if k.shape[0] != B or k.shape[3] != D:
        sizes = f"{k.shape[0]}, {k.shape[3]}"
        raise ValueError(f"q has batch and head size {B}, {D}, but k {sizes}.")
    if H % H_kv:
        raise ValueError(f"q has {H} heads, which the {H_kv} heads of k do not divide.")
    if not 0 < Tq <= Tk:
        counts = f"{Tq} queries and {Tk} keys"
        raise ValueError(f"there are {counts}, but each query needs its own key.")
    known = (torch.float32, torch.bfloat16, torch.float16)
    if not q.dtype == k.dtype == v.dtype or q.dtype not in known:
        types = f"{q.dtype}, {k.dtype} and {v.dtype}"
        names = "torch.float32, torch.bfloat16 or torch.float16"
        raise TypeError(f"q, k and v are {types}, but must all be {names}.")
    if mask is not None:
        remedy = "give it no mask, or take sdpa_attention"
        raise ValueError(f"flash attention knows the causal mask alone; {remedy}.")
    return [t.contiguous() for t in (q, k, v)]
