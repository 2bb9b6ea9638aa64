"""Linears that leave zeros out of memory.

Their numbers come with a column for each (CSR), or with a bit for each weight (a bitmap).
"""

import warnings
from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gptlite.kernels.load import load_cpp_or_warn

WORD = 64  # weights that share a word of bits


class CsrLinear(nn.Module):
    """A Linear whose weight is stored as its nonzero numbers and their columns (CSR).

    PyTorch multiplies it, in float32 or float64: on CPUs it has no other CSR product.
    """

    numbers: Tensor
    columns: Tensor
    starts: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.bias = linear.in_features, linear.bias
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            sparse = linear.weight.detach().to_sparse_csr()
        self.register_buffer("numbers", sparse.values())  # row by row
        self.register_buffer("columns", sparse.col_indices().int())
        self.register_buffer("starts", sparse.crow_indices().int())  # (out + 1,)

    def forward(self, x: Tensor) -> Tensor:
        weight, rows = self.weight, x.reshape(-1, x.shape[-1])  # (B T, in)
        with torch.autocast(x.device.type, enabled=False):
            y = (weight @ rows.to(weight.dtype).T).T
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], len(self.starts) - 1)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), sparse, made of its parts anew each time."""
        wide = self.numbers if self.numbers.dtype == torch.float64 else self.numbers.float()
        parts, size = (
            (self.starts, self.columns, wide),
            (len(self.starts) - 1, self.in_features),
        )
        return torch.sparse_csr_tensor(*parts, size, device=wide.device, check_invariants=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers, their columns, and where each row begins."""
        return sum(t.nbytes for t in self.buffers())


@cache
def load_kernel() -> bool:
    """Register `torch.ops.gptlite.bitmap_linear`; False, with a warning, if it is not built."""
    if not load_cpp_or_warn("sparse_linear.cpp", "Weights will be made dense at each product"):
        return False

    @torch.library.register_fake("gptlite::bitmap_linear")
    def _(
        x: Tensor, numbers: Tensor, bits: Tensor, starts: Tensor, bias: Tensor | None
    ) -> Tensor:
        return x.new_empty(*x.shape[:-1], bits.shape[0])

    return True


class BitmapLinear(nn.Module):
    """A Linear stored as its nonzero numbers and, for each weight, a bit: is it one of them?

    For up to `few` rows in float32 on the CPU one kernel reads that; for all else the weight is
    made dense each time.
    """

    few = 8  # with many rows a matrix product does better
    numbers: Tensor
    bits: Tensor
    starts: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.bias = weight.shape[1], linear.bias
        mask = F.pad(weight != 0, (0, -weight.shape[1] % WORD))  # (out, in), whole words
        places = torch.arange(8, dtype=torch.uint8, device=weight.device)
        octets = (mask.unflatten(1, (-1, 8)).byte() << places).sum(-1, dtype=torch.uint8)
        self.register_buffer("numbers", weight[weight != 0])  # row by row
        # (out, in / 64), the first octet lowest (little-endian)
        self.register_buffer("bits", octets.view(torch.int64))
        # (out + 1,): of each row's numbers
        self.register_buffer("starts", F.pad(mask.sum(-1).cumsum(0), (1, 0)))
        self.has_kernel = load_kernel()

    def forward(self, x: Tensor) -> Tensor:
        readable = x.device.type == "cpu" and x.dtype == self.numbers.dtype == torch.float32
        few = x.numel() <= self.few * x.shape[-1]
        learning = torch.is_grad_enabled() and x.requires_grad
        if self.has_kernel and readable and few and not learning:
            return torch.ops.gptlite.bitmap_linear(
                x, self.numbers, self.bits, self.starts, self.bias
            )
        return F.linear(x, self.weight, self.bias)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), zeros and all, made anew each time."""
        places = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        mask = (self.bits.view(torch.uint8)[..., None] >> places & 1).bool().flatten(1)
        mask = mask[:, : self.in_features]
        return self.numbers.new_zeros(mask.shape).masked_scatter_(mask, self.numbers)

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers, the bits, and where each row begins."""
        return sum(t.nbytes for t in self.buffers())
