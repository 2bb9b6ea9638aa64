"""Knowledge distillation: losses that teach a student a teacher's whole distribution.

All take logits (..., V) and average over positions. A `temperature` divides both sides' logits.
With it the gradient shrinks by its square, which each loss undoes (Hinton et al., 2015), so
that one learning rate serves all temperatures.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gptlite.model import GPT, watch

# (student's logits, teacher's logits, temperature) -> a scalar
Divergence = Callable[[Tensor, Tensor, float], Tensor]

WARM = (
    30.0  # a temperature from which on float32 is too coarse for the difference of both sides
)


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """`kl` of the student from the teacher: it must allow all that the teacher does."""
    return kl(teacher, student, temperature)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """`kl` of the teacher from the student: it must allow nothing that the teacher does not."""
    return kl(student, teacher, temperature)


def kl(p: Tensor, q: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) of two sides' logits, both over the temperature, times its square.

    In nats, the mean of all positions. What p gives no probability (a logit of -inf) counts for
    nothing; what q alone gives none makes it infinite.
    """
    _check(p, q, temperature)
    dtype = torch.float32 if temperature <= WARM else torch.float64
    log_p, log_q = ((z.to(dtype) / temperature).log_softmax(-1) for z in (p, q))
    log_ratio = (log_p - log_q).masked_fill(log_p == -math.inf, 0)
    return (temperature**2 * (log_p.exp() * log_ratio).sum(-1).mean()).float()


def logit_mse(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Half the mean square difference of logits, without each side's mean.

    It is the limit of `kl` at high temperatures, and has none of its own (Kim et al., 2021,
    compare the two).
    """
    _check(student, teacher, temperature)
    if teacher.isinf().any():
        raise ValueError(
            "a logit of the teacher is infinite; `forward_kl` can be taught by it."
        )
    off = student.float() - teacher.float()
    return (off - off.mean(-1, keepdim=True)).square().mean() / 2


def _check(some: Tensor, other: Tensor, temperature: float) -> None:
    _check_temperature(temperature)
    if some.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"the vocabularies differ: one side has {some.shape[-1]} logits, "
            f"the other {other.shape[-1]}."
        )
    if some.shape != other.shape:
        raise ValueError(
            f"both sides must have one shape, but they are {tuple(some.shape)} "
            f"and {tuple(other.shape)}."
        )


def _check_temperature(temperature: float) -> None:
    # beyond these the quotients of logits, or the loss's digits, are lost in any precision
    if not 1e-6 <= temperature <= 1e6:
        raise ValueError(f"the temperature is {temperature}, but must be from 1e-6 to 1e6.")


@dataclass(frozen=True)
class Distillation:
    """A loss for the training loop: `alpha` of a divergence, the rest of cross-entropy.

    The teacher's logits come with the batch (`LabelStore.sample`), or from `teacher`, which is
    asked at each step.
    """

    teacher: nn.Module | None = None
    temperature: float = 1.0
    alpha: float = 0.5
    divergence: Divergence = forward_kl

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(
                f"alpha is {self.alpha}, but must be from 0 (the text alone) to 1 "
                "(the teacher alone)."
            )
        _check_temperature(self.temperature)

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch x, y (B, T); without logits (B, T, V), the teacher is asked."""
        logits = model(x)
        if labels is None:
            if self.teacher is None:
                raise ValueError(
                    "there is neither a teacher nor labels; give one, or sample a LabelStore."
                )
            with torch.no_grad():
                labels = self.teacher(x)
        soft = self.divergence(logits, labels, self.temperature)
        return self.alpha * soft + (1 - self.alpha) * cross_entropy(logits, y)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy, in nats, of logits (B, T, V) with the tokens y (B, T) to come."""
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


class Ensemble(nn.Module):
    """Several teachers as one: the logarithm of their mean probability."""

    def __init__(self, *teachers: nn.Module):
        super().__init__()
        if not teachers:
            raise ValueError("an ensemble needs at least one teacher.")
        self.teachers = nn.ModuleList(teachers)

    def forward(self, idx: Tensor) -> Tensor:
        """Log-probabilities (B, T, V)."""
        each = torch.stack([teacher(idx).float().log_softmax(-1) for teacher in self.teachers])
        return each.logsumexp(0) - math.log(len(each))


class CoTraining(nn.Module):
    """Two models that learn together, each also from the other (Zhang et al., 2018).

    For the training loop it is one model, whose loss is `mutual_loss`.
    """

    def __init__(self, first: GPT, second: GPT):
        super().__init__()
        self.first, self.second, self.config = first, second, first.config

    @property
    def h(self) -> nn.ModuleList:
        """The blocks of both."""
        return nn.ModuleList([*self.first.h, *self.second.h])

    def forward(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(idx), self.second(idx)


def mutual_loss(
    pair: nn.Module, x: Tensor, y: Tensor, alpha: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Both models' losses: the text, and a divergence from the other, which learns nothing."""
    a, b = pair(x)
    text = cross_entropy(a, y), cross_entropy(b, y)
    other = forward_kl(a, b.detach(), temperature), forward_kl(b, a.detach(), temperature)
    first, second = ((1 - alpha) * t + alpha * o for t, o in zip(text, other, strict=True))
    return first + second


class HiddenMatching(nn.Module):
    """A student and a projection of one of its hidden states to a teacher's width.

    (FitNets; Romero et al., 2015.) For the training loop it is the model, and its `loss` the
    loss; what is wanted at the end is `student`.
    """

    def __init__(
        self, student: GPT, teacher: GPT, layers: tuple[int, int], weight: float = 1.0
    ):
        super().__init__()
        for gpt, layer in zip((student, teacher), layers, strict=True):
            if not 0 <= layer < gpt.config.n_layer:
                last = gpt.config.n_layer - 1
                raise ValueError(f"the layer is {layer}, but must be from 0 to {last}.")
        self.student, self.config = student, student.config
        self.layers, self.weight = layers, weight
        self.projection = nn.Linear(student.config.n_embd, teacher.config.n_embd)
        self._teacher = [teacher]  # in a list: it is not a part of what learns

    @property
    def h(self) -> nn.ModuleList:
        """The student's blocks."""
        return self.student.h

    def forward(self, idx: Tensor) -> tuple[Tensor, Tensor]:
        """The student's logits (B, T, V), and its guess at the teacher's hidden state."""
        logits, hidden = with_hidden_state(self.student, idx, self.layers[0])
        return logits, self.projection(hidden)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy with the text, and the guess's square error in shares of the state's.

        `model` is this one, or what the training loop has wrapped it in.
        """
        logits, guess = model(x)
        with torch.no_grad():
            _, theirs = with_hidden_state(self._teacher[0], x, self.layers[1])
        off = F.mse_loss(guess, theirs) / theirs.square().mean()
        return cross_entropy(logits, y) + self.weight * off


def with_hidden_state(model: GPT, idx: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V), and the hidden state (B, T, C) that leaves a layer."""
    seen: list[Tensor] = []
    with watch([model.h[layer]], lambda block, inputs, output: seen.append(output)):
        return model(idx), seen[0]
