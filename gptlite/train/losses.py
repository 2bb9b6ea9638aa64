"""What training minimises, and the mean of it over a text."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptlite.corpus import windows

# (model, x (B, T), y (B, T), and what else a batch has) -> the mean loss, a scalar
LossFn = Callable[..., Tensor]


def next_token_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy in nats of the next token, averaged over B * T positions."""
    return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())


def penalized_loss(model: nn.Module, x: Tensor, y: Tensor, weight: float) -> Tensor:
    """`next_token_loss` less `weight` times the entropy of the predictions.

    See Pereyra et al. (2017). What the loss alone would predict with probability p becomes
    softer, about as at a temperature of 1 + weight. It cures a model that has seen its text so
    often that it is surer of it than of any other text it should be.
    """
    log_p = model(x).float().log_softmax(-1)  # (B, T, V)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    return F.nll_loss(log_p.flatten(0, 1), y.flatten()) - weight * entropy


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: Tensor,
    T: int,
    B: int = 32,
    loss_fn: LossFn = next_token_loss,
) -> float:
    """Mean loss over every whole window of T tokens, each predicted once, without dropout.

    The windows are those of `corpus.windows`.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    total = count = 0.0
    try:
        for x, y in windows(tokens, T=T, B=B):
            total += loss_fn(model, x.to(device), y.to(device)).item() * len(x)
            count += len(x)
    finally:
        model.train(was_training)
    return total / count
