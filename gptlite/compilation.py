"""Faster arithmetic in the same model: Linears that stream their weights, and an attention that a compiler can fuse.

At batch 1 a matrix product is a reduction: each weight is used once, so its speed is that of reading it.
"""

import math
import os
import shutil
import sys
import sysconfig
import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gptlite.corpus import cache_folder
from gptlite.device import fast_dtype, processor_name
from gptlite.model import sdpa_attention


class ReductionLinear(nn.Module):
    """A Linear that treats one row as multiply-and-sum, which `torch.compile` fuses with what stands around it.

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


KERNELS = ("gemv.cpp", "single_query_attention.cpp", "lanes.h")  # beside this file


@cache
def load_kernels() -> None:
    """Build the C++ kernels, once for each processor and torch, and register them as `torch.ops.gptlite`."""
    folder = Path(__file__).parent
    made_of = [torch.__version__, processor_name(torch.device("cpu"))]
    made_of += [(folder / name).read_text(encoding="utf-8") for name in KERNELS]
    library = cache_folder() / f"kernels-{sha256(' '.join(made_of).encode()).hexdigest()[:12]}.so"
    if library.exists():
        torch.ops.load_library(str(library))
    else:  # it appears there whole or not at all, whoever else builds it
        with tempfile.TemporaryDirectory(dir=library.parent) as built:
            _build_and_load([folder / name for name in KERNELS if name.endswith(".cpp")], built).replace(library)

    @torch.library.register_fake("gptlite::gemv")
    def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @torch.library.register_fake("gptlite::single_query_attention")
    def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return q.new_empty(q.shape)


def _build_and_load(sources: list[Path], folder: str) -> Path:
    """The shared library of C++ files, built in `folder` for this processor; an OSError says what is missing."""
    from torch.utils import cpp_extension

    os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # where pip puts ninja
    if not (shutil.which(cpp_extension.get_cxx_compiler().split()[0]) and shutil.which("ninja")):
        raise OSError("the kernels are built where they run: install a C++ compiler and ninja (pip install ninja).")
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]  # Apple's compiler lacks it: one thread then
    flags = {"extra_cflags": ["-O3", "-march=native", *openmp], "extra_ldflags": openmp}
    files = [str(source) for source in sources]
    return Path(cpp_extension.load("gptlite_kernels", files, build_directory=folder, is_python_module=False, **flags))


def _refuse_gradients(who: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{who} has no backward pass; call it under torch.no_grad().")


class GemvLinear(nn.Module):
    """A Linear on the CPU that reads its weights once, at memory's speed, for up to `few` rows; more take `F.linear`.

    Weights are float32 or bfloat16; for float16 PyTorch has such a kernel itself. It has no backward pass. Many rows
    are multiplied in float32 where the processor would emulate bfloat16.
    """

    few = 4  # with many rows a matrix product does better: it uses a weight for several while a register holds it

    def __init__(self, linear: nn.Linear):
        super().__init__()
        load_kernels()
        self.weight, self.bias = linear.weight, linear.bias
        emulated = self.weight.dtype == torch.bfloat16 and fast_dtype(self.weight.device) == torch.float32
        self.many = torch.float32 if emulated else self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > self.few * x.shape[-1] or x.dtype == torch.float16:
            bias = None if self.bias is None else self.bias.to(self.many)
            return F.linear(x.to(self.many), self.weight.to(self.many), bias).to(x.dtype)
        _refuse_gradients("GemvLinear", x, self.weight)
        return torch.ops.gptlite.gemv(x, self.weight, self.bias)


def reduction_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of one query as two reductions and a softmax, for a compiler to fuse; more queries take SDPA."""
    B, H, Tq, D = q.shape
    if Tq > 1:
        return sdpa_attention(q, k, v, mask)
    groups = q.view(B, k.shape[1], -1, 1, D)  # (B, H_kv, H / H_kv, 1, D): the heads that share keys side by side
    scores = (groups * k[:, :, None]).sum(-1) / math.sqrt(D)  # (B, H_kv, H / H_kv, Tk)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)  # the mask is (1, Tk)
    weights = scores.softmax(-1)
    return (weights[..., None] * v[:, :, None]).sum(-2).view(B, H, 1, D)


def single_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of one query by one kernel on the CPU, which reads visible keys alone; more queries take SDPA.

    Numbers are float32 or bfloat16, added up in float32; float16 takes SDPA. It has no backward pass. Compiled code
    needs `load_kernels()` before it, which making a GemvLinear calls.
    """
    if q.shape[2] > 1 or q.dtype == torch.float16:
        return sdpa_attention(q, k, v, mask)
    if not torch.compiler.is_compiling():
        load_kernels()
    _refuse_gradients("single_query_attention", q, k, v)
    return torch.ops.gptlite.single_query_attention(q, k, v, mask)
