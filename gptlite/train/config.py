"""How to train: the configuration of a run, its learning rate at each step, its optimizers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gptlite.model import GPT
from gptlite.muon import Muon


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the learning rate warms up, stays, and falls linearly (a trapezoid)."""

    steps: int = 2000
    # sequences of block_size tokens a step, over all processes
    batch_size: int = 32
    # "muon" for the blocks' matrices, while the rest takes AdamW; or "adamw" for all
    optimizer: str = "muon"
    lr: float = 0.02  # of the blocks' matrices, if they take Muon
    adamw_lr: float = 2e-3  # of the rest
    weight_decay: float = 0.1
    warmup: int = 100
    decay_from: float = 0.4  # share of the steps after which the learning rate falls
    clip: float = 1.0  # the largest norm of a gradient; 0 is none
    seed: int = 0

    def __post_init__(self):
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup", 0)):
            _check(name, getattr(self, name), least, whole=True)
        for name in ("lr", "adamw_lr", "weight_decay", "clip"):
            _check(name, getattr(self, name), 0)
        _check("decay_from", self.decay_from, 0, 1)
        _check("seed", self.seed, 0, 2**32 - 1, whole=True)
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"the optimizer is {self.optimizer!r}, but must be muon or adamw.")
        if self.adamw_lr == 0 and (self.lr == 0 or self.optimizer == "adamw"):
            raise ValueError("all learning rates are 0, so that nothing would be trained.")


def _check(
    name: str, value: float, least: float, most: float = math.inf, whole: bool = False
) -> None:
    """Raise a ValueError that names a number of the wrong kind or size."""
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not (fits and math.isfinite(value) and least <= value <= most):
        kind = "whole" if whole else "finite"
        size = f"from {least} to {most}" if most < math.inf else f"of at least {least}"
        raise ValueError(f"{name} is {value!r}, but must be a {kind} number {size}.")


def lr_factor(step: int, train: TrainConfig) -> float:
    """The learning rate of a step, as a share of the highest: a trapezoid that ends at 0.02."""
    start = train.decay_from * train.steps
    falling = (train.steps - step) / max(1, train.steps - start)
    return min((step + 1) / max(1, train.warmup), 1.0, max(0.02, falling))


def gpts(model: nn.Module) -> list[GPT]:
    """Every GPT that a model is made of: itself, or the parts that learn in it."""
    return [module for module in model.modules() if isinstance(module, GPT)]


def block_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices inside the blocks of every GPT in a model, for which Muon is made."""
    return [p for gpt in gpts(model) for p in gpt.h.parameters() if p.ndim == 2]


def make_optimizers(
    matrices: Iterable[nn.Parameter],
    rest: Iterable[nn.Parameter],
    train: TrainConfig,
    dtype: torch.dtype,
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and AdamW for the rest, or AdamW for everything.

    `dtype` is the number format that the machine multiplies in. Only matrices decay.
    """
    betas = (0.9, 0.95)
    if train.optimizer == "muon":
        # float16 has too few exponent bits for the iteration
        format = torch.float32 if dtype == torch.float16 else dtype
        return [
            Muon(matrices, train.lr, 0.95, train.weight_decay, format),
            torch.optim.AdamW(rest, train.adamw_lr, betas, weight_decay=0.0),
        ]
    groups: list[dict[str, Any]] = [
        {"params": list(matrices), "weight_decay": train.weight_decay},
        {"params": list(rest)},
    ]
    return [torch.optim.AdamW(groups, train.adamw_lr, betas, weight_decay=0.0)]
