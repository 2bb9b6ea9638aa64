"""Two fused kernels in Triton (Tillet, Kung and Cox, 2019), beside the eager code they replace.

A chain of pointwise operations moves each number to memory and back once an operation; a fused
kernel moves it once. Without a GPU the kernels run in Triton's interpreter, if
TRITON_INTERPRET=1 is set before anything imports Triton.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the fused kernels are written in Triton; install it with pip install triton."
    ) from error


def add_layer_norm_eager(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Residual stream and normalised copy, both (..., C), as between two parts of a block."""
    residual = residual + x
    return residual, F.layer_norm(residual, weight.shape, weight, bias)


def bias_gelu_eager(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of x + bias, (..., C): what happens inside the MLP."""
    return F.gelu(x + bias, approximate="tanh")


@triton.jit
def _add_layer_norm(x, residual, weight, bias, added, normed, C, eps, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)  # one program a row; BLOCK is C, rounded up to a power of two
    inside = column < C
    at = tl.program_id(0).to(tl.int64) * C + column
    total = tl.load(x + at, inside, 0.0).to(tl.float32)
    total += tl.load(residual + at, inside, 0.0).to(tl.float32)
    total = total.to(added.dtype.element_ty)  # rounded as it is stored, as in the eager code
    tl.store(added + at, total, inside)
    total = total.to(tl.float32)
    mean = tl.sum(total, 0) / C
    centred = tl.where(inside, total - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / C + eps)
    w, b = tl.load(weight + column, inside, 0.0), tl.load(bias + column, inside, 0.0)
    result = centred * scale * w.to(tl.float32) + b.to(tl.float32)
    tl.store(normed + at, result.to(normed.dtype.element_ty), inside)


@triton.jit
def _bias_gelu(x, bias, y, n, C, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    z = tl.load(x + at, inside, 0.0).to(tl.float32)
    z += tl.load(bias + at % C, inside, 0.0).to(tl.float32)
    inner = 0.7978845608028654 * (z + 0.044715 * z * z * z)  # sqrt(2 / pi)
    result = z * tl.sigmoid(2.0 * inner)  # (1 + tanh(u)) / 2 is sigmoid(2 u)
    tl.store(y + at, result.to(y.dtype.element_ty), inside)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm_eager` in one kernel: inputs are read once, results written once."""
    x, residual, weight, bias = _checked(x=x, residual=residual, weight=weight, bias=bias)
    added, normed = torch.empty_like(x), torch.empty_like(x)
    C, rows = x.shape[-1], x.numel() // x.shape[-1]
    block = triton.next_power_of_2(C)
    _add_layer_norm[(rows,)](x, residual, weight, bias, added, normed, C, eps, BLOCK=block)
    return added, normed


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """`bias_gelu_eager` in one kernel: x is read once, the result written once."""
    x, bias = _checked(x=x, bias=bias)
    y, n, block = torch.empty_like(x), x.numel(), 1024
    _bias_gelu[(triton.cdiv(n, block),)](x, bias, y, n, x.shape[-1], BLOCK=block)
    return y


def _checked(**tensors: Tensor) -> list[Tensor]:
    """The tensors, contiguous, as the kernels' pointers assume; an error if one does not."""
    x = tensors["x"]
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"x has the shape {tuple(x.shape)}, but must have at least one column."
        )
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        known = "torch.float32, torch.bfloat16 or torch.float16"
        raise TypeError(f"x is {x.dtype}, but must be {known}.")
    for name, t in tensors.items():
        shape = x.shape if name in ("x", "residual") else x.shape[-1:]
        if t.shape != shape:
            sizes = f"{tuple(t.shape)}, but must have {tuple(shape)}"
            raise ValueError(f"{name} has the shape {sizes}.")
        if (t.dtype, t.device) != (x.dtype, x.device):
            found = f"{t.dtype} on {t.device}"
            raise TypeError(f"{name} is {found}, but x is {x.dtype} on {x.device}.")
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values()):
        raise RuntimeError(
            "the kernels have no backward pass; call them under torch.no_grad()."
        )
    # if sum is a JITFunction, Triton was imported to compile
    if x.device.type == "cpu" and isinstance(tl.sum, triton.JITFunction):
        remedy = "set TRITON_INTERPRET=1 before anything imports Triton, as torch.compile does"
        raise RuntimeError(f"on a CPU, {remedy}.")
    return [t.contiguous() for t in tensors.values()]
