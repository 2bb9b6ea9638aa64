"""Flash attention (Dao et al., 2022; Dao, 2023): exact attention in tiles, without a matrix of scores in memory.

Here in plain PyTorch, forward and backward, to be read and counted; `kernel` is the same in Triton. A tile is
what a GPU's program holds on its chip; `Traffic` counts the bytes that go between there and memory.
"""

import math
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64  # queries, and keys, in a tile


class Partial(NamedTuple):
    """Attention to some of the keys, unfinished: what has to be known of them to go on with others."""

    maximum: Tensor  # (..., Tq, 1): the largest score m, so that no exponential overflows
    total: Tensor  # (..., Tq, 1): the sum of exp(score - m)
    weighted: Tensor  # (..., Tq, D): the sum of exp(score - m) * value

    def output(self) -> Tensor:
        """Softmax-weighted values (..., Tq, D), if these were all keys."""
        return self.weighted / self.total

    def logsumexp(self) -> Tensor:
        """The logarithm of the sum of exp(score), (..., Tq): all that the backward pass needs of the softmax."""
        return (self.maximum + self.total.log()).squeeze(-1)


def attend(scores: Tensor, v: Tensor) -> Partial:
    """Scores (..., Tq, Tk) and values (..., Tk, D) of some keys as a `Partial`; a score of -inf is of a hidden key."""
    maximum = scores.amax(-1, keepdim=True).clamp(
        min=torch.finfo(scores.dtype).min
    )  # finite, if all are hidden
    weights = (scores - maximum).exp()
    return Partial(maximum, weights.sum(-1, keepdim=True), weights @ v)


def merge(a: Partial, b: Partial) -> Partial:
    """Attention to the keys of both (Milakov and Gimelshein, 2018): associative, so in any order, on any machine."""
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
    """Causal attention of q (B, H, Tq, D) to k, v (B, H_kv, Tk, D): the result, and the log-sum-exps (B, H, Tq)."""
    traffic = Traffic() if traffic is None else traffic
    (B, H, Tq, D), (H_kv, Tk) = q.shape, k.shape[1:3]
    q, k, v = (
        q.view(B, H_kv, H // H_kv, Tq, D),
        k[:, :, None],
        v[:, :, None],
    )  # heads that share keys side by side
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    for i in range(0, Tq, block_q):
        rows = slice(i, min(i + block_q, Tq))
        (q_i,) = traffic.load(q[..., rows, :])
        found = []
        for j in range(
            0, rows.stop + Tk - Tq, block_k
        ):  # tiles that lie wholly in the future are skipped
            columns = slice(j, min(j + block_k, Tk))
            k_j, v_j = traffic.load(k[..., columns, :], v[..., columns, :])
            tile = attend(_scores(q_i, k_j, i + Tk - Tq, j), v_j)
            found = [merge(*found, tile) if found else tile]
        traffic.store(out[..., rows, :], found[0].output())
        traffic.store(lse[..., rows], found[0].logsumexp())
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
    """Gradients of q, k and v, given that of the result; the weights are computed again from the log-sum-exps."""
    traffic = Traffic() if traffic is None else traffic
    (B, H, Tq, D), (H_kv, Tk) = q.shape, k.shape[1:3]
    shape = (B, H_kv, H // H_kv, Tq, D)
    q, grad, out, lse = (
        q.view(shape),
        grad.reshape(shape),
        out.view(shape),
        lse.view(shape[:-1]),
    )
    k, v = k[:, :, None], v[:, :, None]
    dq, dk, dv = (
        torch.zeros_like(q, dtype=torch.float32),
        torch.empty_like(k),
        torch.empty_like(v),
    )
    delta = _projections(grad, out, block_q, traffic)
    for j in range(0, Tk, block_k):
        columns = slice(j, min(j + block_k, Tk))
        k_j, v_j = traffic.load(k[..., columns, :], v[..., columns, :])
        dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
        for i in range(
            max(0, j - (Tk - Tq)) // block_q * block_q, Tq, block_q
        ):  # those that see a key of the tile
            rows = slice(i, min(i + block_q, Tq))
            q_i, grad_i = traffic.load(q[..., rows, :], grad[..., rows, :])
            lse_i, delta_i, dq_i = traffic.load(
                lse[..., rows, None], delta[..., rows, None], dq[..., rows, :]
            )
            weights = (_scores(q_i, k_j, i + Tk - Tq, j) - lse_i).exp()
            d_scores = weights * (grad_i @ v_j.mT - delta_i) / math.sqrt(D)
            traffic.store(dq[..., rows, :], dq_i + d_scores @ k_j)
            dk_j += (d_scores.mT @ q_i).sum(
                2, keepdim=True
            )  # over the heads that share the key
            dv_j += (weights.mT @ grad_i).sum(2, keepdim=True)
        traffic.store(dk[..., columns, :], dk_j)
        traffic.store(dv[..., columns, :], dv_j)
    return dq.view(B, H, Tq, D).to(q.dtype), dk.squeeze(2), dv.squeeze(2)


def _projections(grad: Tensor, out: Tensor, block_q: int, traffic: Traffic) -> Tensor:
    """Each query's product of its gradient and its result, (..., Tq): the mean of dP over all its keys."""
    delta = out.new_empty(out.shape[:-1], dtype=torch.float32)
    for i in range(0, out.shape[-2], block_q):
        rows = slice(i, min(i + block_q, out.shape[-2]))
        grad_i, out_i = traffic.load(grad[..., rows, :], out[..., rows, :])
        traffic.store(delta[..., rows], (grad_i * out_i).sum(-1))
    return delta


def _scores(q: Tensor, k: Tensor, first_q: int, first_k: int) -> Tensor:
    """Scores (..., rows, columns) of one tile, -inf where a key comes after its query; the first stand at these."""
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
    """The bytes of `flash_forward`, by formula: queries once, and keys and values once for each block of queries."""
    ends = [
        min(i + block_q, Tq) + Tk - Tq for i in range(0, Tq, block_q)
    ]  # keys that a block's last query sees
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
    """The bytes of `flash_backward`: keys and values once, and all that belongs to queries once for each block of keys.

    The gradient of the queries is kept in float32 meanwhile, and read and written each time.
    """
    starts = [max(0, j - (Tk - Tq)) // block_q * block_q for j in range(0, Tk, block_k)]
    queries = sum(Tq - start for start in starts)
    read = B * (
        2 * itemsize * D * (H * Tq + H_kv * Tk) + H * queries * (2 * itemsize * D + 4 * D + 8)
    )
    return Traffic(read, B * (H * (4 * Tq + 4 * D * queries) + 2 * itemsize * D * H_kv * Tk))


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
    """Causal attention in tiles, with its own backward pass; `model.set_attention` takes it. Slow: it is to be read."""
    return _Flash.apply(*checked(q, k, v, mask))


def split_kv_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, splits: int = 4
) -> Tensor:
    """Attention with the keys in `splits` parts, each on its own, merged at the end (flash-decoding, Dao et al., 2023).

    For a single query there is but one block of queries; the parts are what many processors can share.
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
    """The tensors, contiguous, as tiles want them; a sentence about what does not fit together."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        raise ValueError(
            f"q, k and v have the shapes {shapes}, but must be (B, H, Tq, D) and twice (B, H_kv, Tk, D)."
        )
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            f"q has batch and head size {q.shape[0]}, {q.shape[3]}, but k {k.shape[0]}, {k.shape[3]}."
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads, which the {k.shape[1]} heads of k do not divide."
        )
    if not 0 < q.shape[2] <= k.shape[2]:
        raise ValueError(
            f"there are {q.shape[2]} queries and {k.shape[2]} keys, but each query needs its own key."
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ):
        types = f"{q.dtype}, {k.dtype} and {v.dtype}"
        raise TypeError(
            f"q, k and v are {types}, but must all be torch.float32, torch.bfloat16 or torch.float16."
        )
    if mask is not None:
        raise ValueError(
            "flash attention knows the causal mask alone; give it no mask, or take sdpa_attention."
        )
    return [t.contiguous() for t in (q, k, v)]
