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
    """Codes (N, K) int8 as the kernel reads them: (N / 32, K bits / 32, 128) uint8, the rows filled up to whole 32.

    128 bytes hold four codes of each of 32 rows, and with four bits the next four in the bytes' upper halves.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}, but codes are packed in 4 or 8.")
    if codes.shape[1] % (32 // bits):
        raise ValueError(
            f"{codes.shape[1]} codes of {bits} bits a row do not fill whole vectors of {32 // bits}."
        )
    codes = F.pad(codes, (0, 0, 0, -codes.shape[0] % SIDE)).to(torch.int16) + 2 ** (
        bits - 1
    )  # without a sign
    sides = (
        codes.to(torch.uint8).view(-1, SIDE, codes.shape[1] // 4, 4).transpose(1, 2)
    )  # (N / 32, K / 4, 32, 4)
    if bits == 4:
        low, high = sides.unflatten(1, (-1, 2)).unbind(2)
        sides = low | high << 4
    return sides.flatten(-2).contiguous()


def unpack(packed: Tensor, bits: int, rows: Tensor) -> Tensor:
    """The codes (..., K) of the given rows (...) of what `pack` packed."""
    fours = packed.unflatten(-1, (SIDE, 4))[
        rows // SIDE, :, rows % SIDE
    ]  # (..., K bits / 32, 4)
    if bits == 4:
        fours = torch.stack([fours & 15, fours >> 4], -2).flatten(-3, -2)
    return (fours.flatten(-2).to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


@cache
def load_kernel() -> bool:
    """Register `torch.ops.gptlite.quantized_linear`; False, and a warning, where it cannot be built."""
    if not load_cpp_or_warn(
        "quantized_linear.cpp", "Codes will be dequantized at each product"
    ):
        return False

    @torch.library.register_fake("gptlite::quantized_linear")
    def _(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, N: int) -> Tensor:
        return x.new_empty(*x.shape[:-1], N)

    return True


class QuantizedLinear(nn.Module):
    """A Linear whose weight is codes. One kernel on the CPU reads them; for all else they are dequantized each time.

    The kernel rounds x as well, to eight bits with a scale for each 64 numbers, and multiplies integers. It takes
    symmetric grids with groups of 64 or a multiple. Where x needs a gradient there is one, for x alone.
    """

    grid = INT4

    def __init__(self, linear: nn.Linear, quantized: Quantized | None = None):
        super().__init__()
        q = quantized or round_to_nearest(linear.weight.detach(), self.grid)
        bits = 4 if q.bits <= 4 else 8  # as stored
        middle = None if q.middle is None else _by_side(q.middle)
        self._take(linear, pack(q.codes, bits), _by_side(q.scale), middle, q.input_scale)

    @classmethod
    def from_parts(
        cls,
        linear: nn.Linear,
        codes: Tensor,
        scale: Tensor,
        middle: Tensor | None,
        input_scale: Tensor | None,
    ) -> "QuantizedLinear":
        """One in the place of `linear`, of tensors as another one had them."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._take(linear, codes, scale, middle, input_scale)
        return made

    def _take(
        self,
        linear: nn.Linear,
        codes: Tensor,
        scale: Tensor,
        middle: Tensor | None,
        input_scale: Tensor | None,
    ) -> None:
        self.out_features, self.in_features, self.bias = (
            linear.out_features,
            linear.in_features,
            linear.bias,
        )
        sides, K = -(-self.out_features // SIDE), self.in_features
        self.bits = 32 * codes.shape[1] // K if codes.ndim == 3 else 0
        groups = scale.shape[1] if scale.ndim == 3 else 0
        whole = (sides, K * self.bits // 32, 4 * SIDE)
        if (
            self.bits not in (4, 8) or codes.shape != whole
            or groups < 1 or K % groups or scale.shape != (sides, groups, SIDE)
        ):  # fmt: skip
            raise ValueError(
                f"codes {tuple(codes.shape)} and scales {tuple(scale.shape)} are not those of "
                f"{self.out_features} rows of {K} weights in four or eight bits."
            )
        if codes.dtype != torch.uint8:
            raise ValueError(f"codes are {codes.dtype}, but must be torch.uint8.")
        for name, tensor, shape in (
            ("middle", middle, scale.shape),
            ("input_scale", input_scale, (K,)),
        ):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"the {name} is {tuple(tensor.shape)}, but must be {tuple(shape)}."
                )
        middle = None if middle is None else middle.bfloat16()
        for name, tensor in (
            ("codes", codes), ("scale", scale.bfloat16()), ("middle", middle), ("input_scale", input_scale)
        ):  # fmt: skip
            self.register_buffer(name, tensor)
        group = K // groups
        self.has_kernel = middle is None and group % BLOCK == 0 and load_kernel()

    def forward(self, x: Tensor) -> Tensor:
        readable = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
        if self.has_kernel and readable and not (torch.is_grad_enabled() and x.requires_grad):
            x = x if self.input_scale is None else x * self.input_scale.to(x.dtype)
            return torch.ops.gptlite.quantized_linear(
                x, self.codes, self.scale, self.bias, self.out_features
            )
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) that the codes stand for, in float32, computed anew each time."""
        return self.rows(torch.arange(self.out_features, device=self.codes.device))

    def rows(self, idx: Tensor) -> Tensor:
        """Rows idx (...) of the weight: (..., in), in float32."""
        scale, middle = (
            None if t is None else t[idx // SIDE, :, idx % SIDE]
            for t in (self.scale, self.middle)
        )
        return from_codes(unpack(self.codes, self.bits, idx), scale, middle, self.input_scale)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is read for a product, the bias included."""
        return sum(t.nbytes for t in (*self.buffers(), *self.parameters()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        self._view_scales(
            torch.int16
        )  # model.to(dtype) leaves integers alone, and so the scales, bit for bit
        super()._apply(fn, recurse)
        self._view_scales(torch.bfloat16)
        return self

    def _view_scales(self, dtype: torch.dtype) -> None:
        for name in ("scale", "middle"):
            tensor = getattr(self, name)
            setattr(self, name, tensor if tensor is None else tensor.view(dtype))


def _by_side(scale: Tensor) -> Tensor:
    """Scales (N, groups) as the kernel reads them: (N / 32, groups, 32)."""
    return (
        F.pad(scale, (0, 0, 0, -len(scale) % SIDE))
        .unflatten(0, (-1, SIDE))
        .transpose(1, 2)
        .contiguous()
    )


class Int8Linear(QuantizedLinear):
    """Eight bits, one scale a row."""

    grid = INT8


class Int4Linear(QuantizedLinear):
    """Four bits in groups of 64, each with a scale: 4.25 bits a weight."""


class QuantizedEmbedding(nn.Module):
    """An embedding that looks its rows up in a head's codes, with which it is tied."""

    def __init__(self, head: QuantizedLinear, dtype: torch.dtype):
        super().__init__()
        self._head = (
            head,
        )  # not a child: its tensors are the head's and must not be saved twice
        self.register_buffer(
            "like", torch.empty(0, dtype=dtype), persistent=False
        )  # follows the model's .to()

    def forward(self, idx: Tensor) -> Tensor:
        head = self._head[0]
        if (
            not torch.compiler.is_compiling()
            and idx.numel()
            and not 0 <= idx.min() <= idx.max() < head.out_features
        ):
            raise IndexError(
                f"tokens are from {idx.min()} to {idx.max()}, but must be from 0 to {head.out_features - 1}."
            )
        return head.rows(idx).to(self.like.dtype)
