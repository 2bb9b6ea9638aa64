"""A search for a GPT's shape: the lowest loss of all that decode within a budget of time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gptlite.model import GPTConfig

if TYPE_CHECKING:
    import optuna

CHOICES = {  # what a shape is made of; every combination of these is a GPT
    "layers": (1, 2, 3, 4, 5, 6),
    "heads": (1, 2, 4, 8),
    "head size": (16, 32, 48, 64),
    "queries of a KV head": (1, 2, 4, 8),
    "MLP ratio": (1, 2, 3, 4, 6),
}


@dataclass(frozen=True)
class Tried:
    """A shape, a token's time in the budget's unit, and its loss: None if it was too slow."""

    config: GPTConfig
    latency: float
    loss: float | None


def suggest_config(trial: "optuna.trial.BaseTrial", like: GPTConfig) -> GPTConfig:
    """A shape of Optuna's choice, for the context and the vocabulary of another."""
    chosen = {
        name: trial.suggest_categorical(name, choices) for name, choices in CHOICES.items()
    }
    H, C = chosen["heads"], chosen["heads"] * chosen["head size"]
    return replace(
        like,
        n_layer=chosen["layers"],
        n_head=H,
        n_embd=C,
        n_kv_head=max(1, H // chosen["queries of a KV head"]),
        head_size=None,
        n_hidden=chosen["MLP ratio"] * C,
    )


def scaled_config(config: GPTConfig, scale: float) -> GPTConfig:
    """A config with about `scale` times the layers, heads and channels.

    Each is rounded so that heads divide the channels. The context stays, so that a teacher's
    labels fit. KV heads are the most, up to as many, that divide the heads.
    """
    n_layer, n_head = round(config.n_layer * scale), round(config.n_head * scale)
    if not 0 < scale <= 1 or n_layer < 1 or n_head < 1:
        raise ValueError(
            f"a scale of {scale} leaves {n_layer} layers and {n_head} heads; at least one of "
            "each must stay."
        )
    dividing = [k for k in range(1, config.kv_heads + 1) if n_head % k == 0]
    return replace(
        config,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_head * max(1, round(config.n_embd * scale / n_head)),
        n_kv_head=config.n_kv_head and max(dividing),
        n_hidden=config.n_hidden and max(1, round(config.n_hidden * scale)),
        head_size=None,
    )


def search(
    like: GPTConfig, attempt: Callable[[int, GPTConfig], Tried], trials: int, seed: int = 0
) -> list[Tried]:
    """The `trials` shapes that were tried; `attempt(i, config)` measures one and may train it.

    The tree-structured Parzen estimator weighs all choices of a shape together. What was too
    slow counts as worse than all that was not. The choices follow from the seed and the results
    alone: a search whose attempts are kept can be repeated without any of them.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the search needs Optuna; pip install optuna.") from None
    if trials < 1:
        raise ValueError(f"trials is {trials}, but must be at least 1.")
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
    study, found = optuna.create_study(sampler=sampler), list[Tried]()
    for i in range(trials):
        trial = study.ask()
        found.append(attempt(i, suggest_config(trial, like)))
        if found[-1].loss is None:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, found[-1].loss)
    return found


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that none beats in one coordinate without losing in the other, in order."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front
