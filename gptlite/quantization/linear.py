"""Linears whose weights are codes of eight or four bits, read by one kernel."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gptlite.kernels.load import load_cpp_or_warn
from gptlite.quantization.grids import INT4, INT8, Quantized, from_codes, round_to_nearest

SIDE = 32  # rows of a weight that lie side by side in memory, as the kernel reads them
BLOCK = 64  # numbers of a row of x that the kernel rounds with one scale


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (N, K) int8 as the kernel reads them: (N / 32, K bits / 32, 128) uint8.

    The rows are filled up to whole 32. 128 bytes hold four codes of each of 32 rows, and with
    four bits the next four in the bytes' upper halves.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}, but codes are packed in 4 or 8.")
    if codes.shape[1] % (32 // bits):
        raise ValueError(
            f"{codes.shape[1]} codes of {bits} bits a row do not fill vectors of {32 // bits}."
        )
    whole = F.pad(codes, (0, 0, 0, -codes.shape[0] % SIDE)).to(torch.int16)
    unsigned = (whole + 2 ** (bits - 1)).to(torch.uint8)
    sides = unsigned.view(-1, SIDE, codes.shape[1] // 4, 4).transpose(1, 2)
    # now (N / 32, K / 4, 32, 4)
    if bits == 4:
        low, high = sides.unflatten(1, (-1, 2)).unbind(2)
        sides = low | high << 4
    return sides.flatten(-2).contiguous()


def unpack(packed: Tensor, bits: int, rows: Tensor) -> Tensor:
    """The codes (..., K) of the given rows (...) of what `pack` packed."""
    # (..., K bits / 32, 4)
    fours = packed.unflatten(-1, (SIDE, 4))[rows // SIDE, :, rows % SIDE]
    if bits == 4:
        fours = torch.stack([fours & 15, fours >> 4], -2).flatten(-3, -2)
    return (fours.flatten(-2).to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


@cache
def load_kernel() -> bool:
    """Register `torch.ops.gptlite.quantized_linear`; False, with a warning, if it fails."""
    told = "Codes will be dequantized at each product"
    if not load_cpp_or_warn("quantized_linear.cpp", told):
        return False

    @torch.library.register_fake("gptlite::quantized_linear")
    def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, N: int) -> Tensor:
        return x.new_empty(*x.shape[:-1], N)

    return True


class QuantizedLinear(nn.Module):
    """A Linear whose weight is codes, which a kernel reads, or which are dequantized.

    The kernel runs on the CPU. It rounds x as well, to eight bits with a scale for each 64
    numbers, and multiplies integers. It takes symmetric grids with groups of 64 or a multiple.
    Where x needs a gradient there is one, for x alone.
    """

    grid = INT4
    codes: Tensor
    scale: Tensor
    middle: Tensor | None
    input_scale: Tensor | None

    def __init__(self, linear: nn.Linear, quantized: Quantized | None = None):
        super().__init__()
        q = quantized or round_to_nearest(linear.weight.detach(), self.grid)
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.bits, self.bias = 4 if q.bits <= 4 else 8, linear.bias  # bits as stored
        self.register_buffer("codes", pack(q.codes, self.bits))
        self.register_buffer("scale", _by_side(q.scale))
        self.register_buffer("middle", None if q.middle is None else _by_side(q.middle))
        self.register_buffer("input_scale", q.input_scale)
        group = self.in_features // q.scale.shape[1]
        self.has_kernel = q.middle is None and group % BLOCK == 0 and load_kernel()

    def forward(self, x: Tensor) -> Tensor:
        readable = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
        if self.has_kernel and readable and not (torch.is_grad_enabled() and x.requires_grad):
            x = x if self.input_scale is None else x * self.input_scale.to(x.dtype)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return torch.ops.gptlite.quantized_linear(
                x, self.codes, self.scale, bias, self.out_features
            )
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) that the codes stand for, in float32, computed each time."""
        return self.rows(torch.arange(self.out_features, device=self.codes.device))

    def rows(self, idx: Tensor) -> Tensor:
        """Rows idx (...) of the weight: (..., in), in float32."""
        at = idx // SIDE, slice(None), idx % SIDE
        middle = None if self.middle is None else self.middle[at]
        codes = unpack(self.codes, self.bits, idx)
        return from_codes(codes, self.scale[at], middle, self.input_scale)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is read for a product, the bias included."""
        return sum(t.nbytes for t in (*self.buffers(), *self.parameters()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        # model.to(dtype) leaves integers alone, and so the scales, bit for bit
        self._view_scales(torch.int16)
        super()._apply(fn, recurse)
        self._view_scales(torch.bfloat16)
        return self

    def _view_scales(self, dtype: torch.dtype) -> None:
        for name in ("scale", "middle"):
            tensor = getattr(self, name)
            setattr(self, name, tensor if tensor is None else tensor.view(dtype))


def _by_side(scale: Tensor) -> Tensor:
    """Scales (N, groups) as the kernel reads them: (N / 32, groups, 32)."""
    whole = F.pad(scale.bfloat16(), (0, 0, 0, -len(scale) % SIDE))
    return whole.unflatten(0, (-1, SIDE)).transpose(1, 2).contiguous()


class Int8Linear(QuantizedLinear):
    """Eight bits, one scale a row."""

    grid = INT8


class Int4Linear(QuantizedLinear):
    """Four bits in groups of 64, each with a scale: 4.25 bits a weight."""


class QuantizedEmbedding(nn.Module):
    """An embedding that looks its rows up in a head's codes, with which it is tied."""

    like: Tensor

    def __init__(self, head: QuantizedLinear, dtype: torch.dtype):
        super().__init__()
        # not a child: its tensors are the head's and must not be saved twice
        self._head = (head,)
        # follows the model's .to()
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def head(self) -> QuantizedLinear:
        """The head whose codes these are."""
        return self._head[0]

    def forward(self, idx: Tensor) -> Tensor:
        N = self.head.out_features
        # a compiled graph has no branch on what is in a tensor
        looks = not torch.compiler.is_compiling() and idx.numel()
        if looks and not 0 <= idx.min() <= idx.max() < N:
            raise IndexError(
                f"tokens are from {idx.min()} to {idx.max()}, but must be from 0 to {N - 1}."
            )
        return self.head.rows(idx).to(self.like.dtype)
