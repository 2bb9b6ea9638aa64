"""A search for a GPT's shape: the lowest loss of all shapes that decode within a budget of time (Optuna's TPE)."""

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
    """A shape, what a token takes with it (in the budget's unit), and its loss: None if it was too slow to train."""

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


def search(
    like: GPTConfig, attempt: Callable[[int, GPTConfig], Tried], trials: int, seed: int = 0
) -> list[Tried]:
    """What became of each of `trials` shapes, in order; `attempt(i, config)` measures one and trains it if it may.

    What was too slow counts as worse than all that was not. The choices follow from the seed and the results alone: a
    search whose attempts are kept can be repeated without any of them.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the search needs Optuna; pip install optuna.") from None
    if trials < 1:
        raise ValueError(f"trials is {trials}, but must be at least 1.")
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    found = []
    for i in range(trials):
        trial = study.ask()
        found.append(attempt(i, suggest_config(trial, like)))
        if found[-1].loss is None:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, found[-1].loss)
    return found


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points that no other beats in one coordinate without losing in the other, by their first."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front
