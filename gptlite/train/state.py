"""What a training run keeps on disk, so that it goes on exactly where it was."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from gptlite.checkpoints import load_weights, own_tensors
from gptlite.tensor_files import read_tensors, write_tensors

# what an optimizer remembers of a parameter
MEMORY = {"Muon": {"momentum_buffer"}, "AdamW": {"step", "exp_avg", "exp_avg_sq"}}
ANEW = "delete it to start anew"


def write_state(
    path: Path,
    model: nn.Module,
    optimizers: list[Optimizer],
    scaler: GradScaler,
    info: dict[str, Any],
) -> None:
    """Write weights in float32, the optimizers' tensors and an `info` with the run's "log".

    A FloatingPointError names a tensor that is not finite; an older state then stays.
    """
    tensors = {f"model.{n}": t for n, t in own_tensors(model).items()}
    for i, optimizer in enumerate(optimizers):
        for p, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{p}.{key}": t for key, t in state.items()}
    for name in _not_finite(tensors):
        steps = len(info["log"]["train_loss"])
        raise FloatingPointError(
            f"{name} is not finite after {steps} steps, which are not saved; a lower "
            "learning rate may help."
        )
    write_tensors(path, tensors, {**info, "scaler": scaler.state_dict()})


def read_state(
    path: Path,
    model: nn.Module,
    optimizers: list[Optimizer],
    scaler: GradScaler,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Put a saved run into model, optimizers and scaler; return the info saved with it.

    `facts` are what makes this run, as {"train": ..., "config": ...} and single values. A
    ValueError says how another run differs, or what is wrong with the file, and nothing has
    changed then. The number of steps alone may differ; a fact that older files lack is taken
    to be the same.
    """
    tensors, info = read_tensors(path)
    if not _is_state(info):
        raise ValueError(f"{path} is not the state of a training run; {ANEW}.")
    mine, theirs = _flat(facts), _flat({**facts, "recipe": {}, **info})
    mine.pop("steps")
    changed = [f"{k} {theirs.get(k)} -> {v}" for k, v in mine.items() if theirs.get(k) != v]
    if changed:
        raise ValueError(f"{path} holds another run ({', '.join(changed)}); {ANEW}.")
    done, steps = len(info["log"]["train_loss"]), facts["train"]["steps"]
    if done > steps:
        raise ValueError(f"{path} has been trained for {done} steps, but steps is {steps}.")
    for name in _not_finite(tensors):
        raise ValueError(f"{path} holds a run that failed: {name} is not finite; {ANEW}.")
    memories = _memories(tensors, optimizers)
    scale = info.get("scaler") or {}
    if memories is None or scale.keys() != scaler.state_dict().keys():
        raise ValueError(f"{path} holds a run with other optimizers; {ANEW}.")
    weights = {n[6:]: t for n, t in tensors.items() if n.startswith("model.")}
    load_weights(model, weights, path)
    for optimizer, memory in zip(optimizers, memories, strict=True):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": memory})
    if scale:
        scaler.load_state_dict(scale)
    return info


def _is_state(info: dict[str, Any]) -> bool:
    log = info.get("log")
    return (
        all(isinstance(info.get(key), dict) for key in ("train", "config"))
        and isinstance(info.get("scaler") or {}, dict)
        and isinstance(log, dict)
        and all(isinstance(log.get(key), list) for key in ("train_loss", "val_loss"))
        and isinstance(log.get("seconds"), (int, float))
    )


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of a run, those of its two configurations by their own names."""
    return {**facts, **facts["train"], **facts["config"], "train": None, "config": None}


def _not_finite(tensors: dict[str, Tensor]) -> Iterator[str]:
    return (name for name, tensor in tensors.items() if not tensor.isfinite().all())


def _memories(
    tensors: dict[str, Tensor], optimizers: list[Optimizer]
) -> list[dict[int, dict[str, Tensor]]] | None:
    """What each optimizer remembers of each parameter; None if other optimizers wrote it."""
    parameters = [[p for g in o.param_groups for p in g["params"]] for o in optimizers]
    found: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            try:
                i, p, key = name.split(".")[1:]
                shape = parameters[int(i)][int(p)].shape
            except (ValueError, IndexError):
                return None
            if tensor.shape != (() if key == "step" else shape):
                return None
            found[int(i)].setdefault(int(p), {})[key] = tensor
    for optimizer, memory in zip(optimizers, found, strict=True):
        if any(one.keys() != MEMORY[type(optimizer).__name__] for one in memory.values()):
            return None
    return found
