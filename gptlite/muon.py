"""Muon: momentum made orthogonal, for matrices.

It is Jordan et al.'s (2024, https://kellerjordan.github.io/posts/muon/), and `torch.optim.Muon`
is the same update. This one works from torch 2.6 on, and in the number format that the machine
multiplies fastest: PyTorch's always orthogonalises in bfloat16, which a CPU without such
instructions emulates.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalize(G: Tensor, steps: int = 5) -> Tensor:
    """About U V^T where G = U S V^T, for G (..., m, n).

    Five steps bring singular values into [0.68, 1.21]. Newton-Schulz: from X = G / ||G||,
    X <- (a + b X X^T + c (X X^T)^2) X. A singular value below about 0.0015 of the norm needs
    more steps; one of zero stays zero.
    """
    # steepest at zero, so that small singular values grow fastest
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = G.shape[-2] > G.shape[-1]
    X = G.mT if tall else G  # (..., m, n) with m <= n, so that X X^T is the smaller square
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        # X X^T anew from X each time: carried from step to step it would be cheaper, but its
        # rounding errors make eigenvalues negative, and those grow without bound (in bfloat16
        # at once, for a matrix of low rank)
        gram = X @ X.mT  # (..., m, m)
        X = a * X + (b * gram + c * gram @ gram) @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay; for matrices only."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "dtype": dtype},
        )
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim != 2:
                raise ValueError(
                    f"Muon takes matrices, but a parameter has the shape {tuple(p.shape)}."
                )

    @torch.no_grad()
    def step(self, closure=None):
        """Update what has a gradient, matrices of one shape together; return closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append((p, p.grad))
            for (rows, columns), pairs in by_shape.items():
                momenta = [self._momentum(*pair, group["momentum"]) for pair in pairs]
                updates = torch.stack(momenta)
                updates = orthogonalize(updates.to(group["dtype"])).to(pairs[0][0].dtype)
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)
        return loss

    def _momentum(self, p: Tensor, grad: Tensor, beta: float) -> Tensor:
        buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        buffer.lerp_(grad, 1 - beta)
        return grad.lerp(buffer, beta)  # Nesterov: look one step ahead
