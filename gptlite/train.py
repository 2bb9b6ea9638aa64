"""The one training loop of the book: teacher, student and draft, on one process or several.

    python -m gptlite.train teacher
    torchrun --nproc-per-node 2 -m gptlite.train draft

A run can be killed at any moment: started again, it goes on from its last state exactly.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from gptlite import checkpoints
from gptlite.corpus import Corpus, load_corpus, sample_batch, windows
from gptlite.device import fast_dtype, pick_device, processor_name
from gptlite.model import GPT, GPTConfig
from gptlite.muon import Muon

LossFn = Callable[
    ..., Tensor
]  # (model, x (B, T), y (B, T), and what else a batch has) -> the mean loss, a scalar
Sampler = Callable[
    [Tensor, int, int, int, int], tuple[Tensor, ...]
]  # as `sample_batch`: (tokens, T, B, step, seed)
BeforeStep = Callable[
    [GPT, int], None
]  # (model, step): what else changes in the course of a run, such as masks


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the learning rate warms up, stays, and falls linearly to nothing (a trapezoid)."""

    steps: int = 2000
    batch_size: int = 32  # sequences of block_size tokens a step, over all processes
    optimizer: str = (
        "muon"  # for the blocks' matrices; everything else takes AdamW. Or "adamw" for all
    )
    lr: float = 0.02  # of the blocks' matrices
    adamw_lr: float = 2e-3  # of the rest
    weight_decay: float = 0.1
    warmup: int = 100
    decay_from: float = 0.4  # share of the steps after which the learning rate falls
    clip: float = 1.0  # the largest norm of a gradient
    seed: int = 0

    def __post_init__(self):
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but must be at least {least}."
                )
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"the optimizer is {self.optimizer!r}, but must be muon or adamw.")


def lr_factor(step: int, train: TrainConfig) -> float:
    """The learning rate of a step, as a share of the highest one: a trapezoid that ends at 0.02."""
    start = train.decay_from * train.steps
    falling = (train.steps - step) / max(1, train.steps - start)
    return min((step + 1) / max(1, train.warmup), 1.0, max(0.02, falling))


def next_token_loss(model: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy in nats of the next token, averaged over B * T positions."""
    return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())


def penalized_loss(model: torch.nn.Module, x: Tensor, y: Tensor, weight: float) -> Tensor:
    """`next_token_loss` less `weight` times the entropy of the predictions (Pereyra et al., 2017).

    What the loss alone would predict with probability p becomes softer, about as at a temperature of 1 + weight: a cure
    for a model that has seen its text so often that it is surer of it than of any other text it should be.
    """
    log_p = model(x).float().log_softmax(-1)  # (B, T, V)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    return F.nll_loss(log_p.flatten(0, 1), y.flatten()) - weight * entropy


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    tokens: Tensor,
    T: int,
    B: int = 32,
    loss_fn: LossFn = next_token_loss,
) -> float:
    """Mean loss over every whole window of T tokens, each predicted once (see `corpus.windows`); no dropout."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    total = count = 0.0
    for x, y in windows(tokens, T=T, B=B):
        total += loss_fn(model, x.to(device), y.to(device)).item() * len(x)
        count += len(x)
    model.train(was_training)
    return total / count


def make_optimizers(
    model: GPT, train: TrainConfig, dtype: torch.dtype
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks and AdamW for the rest, or AdamW for everything."""
    matrices = [p for p in model.h.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adamw = {"betas": (0.9, 0.95), "weight_decay": 0.0}
    if train.optimizer == "muon":
        # float16 has too few exponent bits for the iteration: a GPU without bfloat16 takes float32
        return [
            Muon(
                matrices,
                train.lr,
                0.95,
                train.weight_decay,
                torch.float32 if dtype == torch.float16 else dtype,
            ),
            torch.optim.AdamW(rest, train.adamw_lr, **adamw),
        ]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": rest}]
    return [torch.optim.AdamW(groups, train.adamw_lr, **adamw)]


class Run:
    """A training run: all that its next step depends on. It can be saved after any step, and go on from there."""

    def __init__(
        self,
        model: GPT,
        corpus: Corpus,
        config: TrainConfig,
        loss_fn: LossFn,
        dtype: torch.dtype,
        compile: bool,
        recipe: dict[str, Any],
        sample: Sampler = sample_batch,
        before_step: BeforeStep | None = None,
    ):
        self.model, self.corpus, self.config, self.loss_fn, self.dtype = (
            model,
            corpus,
            config,
            loss_fn,
            dtype,
        )
        self.recipe, self.sample, self.before_step = recipe, sample, before_step
        self.device = next(model.parameters()).device
        self.rank, self.world = (
            (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        )
        if config.batch_size % self.world:
            raise ValueError(
                f"batch_size is {config.batch_size}, which {self.world} processes do not divide."
            )
        self.optimizers = make_optimizers(model, config, dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.log: dict[str, Any] = {"train_loss": [], "val_loss": [], "seconds": 0.0}
        runner = torch.nn.parallel.DistributedDataParallel(model) if self.world > 1 else model
        self.runner = torch.compile(runner) if compile else runner

    def step(self) -> None:
        """Train on the next batch, and log its loss: the batch and the dropout depend on seed and step alone."""
        step, seed, T = (
            len(self.log["train_loss"]),
            self.config.seed,
            self.model.config.block_size,
        )
        if self.before_step is not None:
            self.before_step(self.model, step)
        batch = self.sample(self.corpus.train, T, self.config.batch_size, step, seed)
        batch = [
            t[self.rank :: self.world].to(self.device) for t in batch
        ]  # each process takes its share
        torch.manual_seed((1_000_003 * seed + step) * self.world + self.rank)  # of dropout
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss_fn(self.runner, *batch)
        self.scaler.scale(loss).backward()
        self._update(lr_factor(step, self.config))
        loss = loss.detach()
        if self.world > 1:
            dist.all_reduce(loss)
        self.log["train_loss"].append(round(loss.item() / self.world, 6))
        if not math.isfinite(self.log["train_loss"][-1]):
            raise FloatingPointError(
                f"the loss is not finite at step {step}; a lower learning rate may help."
            )

    def _update(self, factor: float) -> None:
        """One step of every optimizer at `factor` of its learning rate, from gradients of norm at most `clip`."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()

    def save(self, path: Path) -> None:
        """Write all that the run needs to go on: float32 weights, the optimizers' tensors, configuration and log."""
        tensors = {f"model.{n}": t for n, t in checkpoints.own_tensors(self.model).items()}
        for i, optimizer in enumerate(self.optimizers):
            for p, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{p}.{key}": t for key, t in state.items()}
        info = {
            "log": self.log,
            "train": asdict(self.config),
            "config": asdict(self.model.config),
        }
        info |= {
            "corpus": self.corpus.fingerprint,
            "scaler": self.scaler.state_dict(),
            "recipe": self.recipe,
        }
        checkpoints.write_tensors(path, tensors, info)

    def restore(self, path: Path) -> None:
        """Go on from a saved run; a ValueError says how another run differs.

        The number of steps alone may: the run is then prolonged or cut short, its learning rate on the new schedule,
        and the log says so: "prolonged" lists [the step reached, the number of steps until then].
        """
        tensors, info = checkpoints.read_tensors(path)
        weights = {
            n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")
        }
        if not weights or not info.keys() >= {"log", "train", "config"}:
            raise ValueError(
                f"{path} is not the state of a training run; delete it to start anew."
            )
        mine = asdict(self.config) | asdict(self.model.config)
        mine |= {"corpus": self.corpus.fingerprint, "recipe": self.recipe}
        theirs = {
            "corpus": mine["corpus"],
            "recipe": {},
            **info,
            **info["train"],
            **info["config"],
        }
        theirs["steps"] = self.config.steps
        changed = [f"{k} {theirs.get(k)} -> {v}" for k, v in mine.items() if theirs.get(k) != v]
        if changed:
            raise ValueError(
                f"{path} holds another run ({', '.join(changed)}); delete it to start anew."
            )
        done = len(info["log"]["train_loss"])
        if done > self.config.steps:
            raise ValueError(
                f"{path} has been trained for {done} steps, but steps is {self.config.steps}."
            )
        checkpoints.load_weights(self.model, weights, path)
        for i, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, t in tensors.items():
                if name.startswith(f"optimizer.{i}."):
                    p, key = name.split(".")[2:]
                    state.setdefault(int(p), {})[key] = t
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        if info.get("scaler"):
            self.scaler.load_state_dict(info["scaler"])
        self.log = info["log"]
        if info["train"]["steps"] != self.config.steps:
            self.log.setdefault("prolonged", []).append([done, info["train"]["steps"]])


def train(
    model: GPT,
    corpus: Corpus,
    config: TrainConfig,
    *,
    loss_fn: LossFn = next_token_loss,
    sample: Sampler = sample_batch,
    state_path: Path | None = None,
    save_every: int = 100,
    eval_every: int = 250,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    recipe: dict[str, Any] | None = None,
    stop_after: int | None = None,
    before_step: BeforeStep | None = None,
) -> dict[str, Any]:
    """Train `model` in place; return a log of "train_loss" per step, "val_loss" as [[step, nats]...] and "seconds".

    With `state_path` the run is saved there every `save_every` steps and at its end, and goes on from there, exactly,
    if the file exists. Under `torchrun` each process takes its share of every batch. `stop_after` ends early at that
    step, as a kill would. `sample` draws the batches; all that it gives goes to `loss_fn`, after the model. `recipe`
    names what else makes the run, such as its loss: a state of another is refused. `before_step` may change the model,
    as long as its parameters and buffers stay the same tensors.
    """
    T = model.config.block_size
    if eval_every:
        next(
            windows(corpus.val, T=T, B=1)
        )  # a text that is too short is refused now, not when it is needed
    run = Run(model, corpus, config, loss_fn, dtype, compile, recipe or {}, sample, before_step)
    if state_path and state_path.exists():
        run.restore(state_path)
    log, chief = run.log, run.rank == 0
    first, before, started = len(log["train_loss"]), log["seconds"], time.perf_counter()
    steps = range(first, config.steps if stop_after is None else min(config.steps, stop_after))
    shown = {} if chief else {"disable": True}  # what is not said here, TQDM_DISABLE decides
    bar = tqdm(
        steps,
        initial=first,
        total=config.steps,
        desc="training",
        unit="step",
        mininterval=1,
        **shown,
    )
    model.train()
    for step in bar:
        run.step()
        seconds, last = time.perf_counter() - started, step + 1 == config.steps
        log["seconds"] = before + seconds
        speed = (step + 1 - first) * config.batch_size * T / seconds
        bar.set_postfix_str(
            f"loss {log['train_loss'][-1]:.3f}, {speed:,.0f} tokens/s", refresh=False
        )
        if chief and eval_every and (step + 1) % eval_every == 0 and not last:
            glimpse = corpus.val[: 64 * T + 1]  # all of it is evaluated when the run is over
            log["val_loss"].append([step + 1, evaluate(model, glimpse, T)])
            tqdm.write(
                f"step {step + 1}: loss {log['train_loss'][-1]:.4f}, held out {log['val_loss'][-1][1]:.4f}"
            )
        if chief and state_path and (last or (save_every and (step + 1) % save_every == 0)):
            run.save(state_path)
    model.eval()
    return log


PRESETS = {
    "teacher": (
        GPTConfig(dropout=0.1),
        TrainConfig(steps=5500, batch_size=16),
    ),  # 10.8 M parameters
    "student": (
        GPTConfig(n_layer=3, n_head=4, n_embd=160),
        TrainConfig(steps=1500),
    ),  # 1.0 M parameters
    "draft": (
        GPTConfig(n_layer=2, n_head=4, n_embd=128),
        TrainConfig(steps=2000),
    ),  # 0.4 M parameters
}


def main(argv: Iterable[str] | None = None) -> None:
    """The command line: train a preset on a corpus and write assets/checkpoints/NAME.safetensors."""
    args = _parse(argv)
    model_config, config = PRESETS[args.preset]
    given = {k: v for k, v in vars(args).items() if v is not None}
    config = replace(config, **{k: given[k] for k in asdict(config) if k in given})
    model_config = replace(
        model_config, **{k: given[k] for k in asdict(model_config) if k in given}
    )
    device = pick_device()
    if "LOCAL_RANK" in os.environ:  # under torchrun
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            torch.cuda.set_device(device := torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    corpus = load_corpus(args.corpus)
    next(
        windows(corpus.val, T=model_config.block_size, B=1)
    )  # refuses a text that is too short to be evaluated on
    torch.manual_seed(config.seed)
    model = GPT(replace(model_config, vocab_size=len(corpus.tokenizer))).to(device)
    dtype = fast_dtype(device) if args.dtype == "auto" else getattr(torch, args.dtype)
    begun = _begin(model, args.start) if args.start else {}
    loss_fn = next_token_loss
    if args.confidence_penalty is not None:
        loss_fn = partial(penalized_loss, weight=args.confidence_penalty)
        begun["confidence_penalty"] = args.confidence_penalty
    out = args.out or checkpoints.FOLDER / f"{args.preset}.safetensors"
    state = args.state or out.with_name(out.stem + ".state")
    print(
        f"{model.n_params():,} parameters on {device} in {dtype}; the run is kept in {state}",
        file=sys.stderr,
    )
    options = {
        "dtype": dtype,
        "compile": args.compile,
        "eval_every": args.eval_every,
        "save_every": args.save_every,
    }
    log = train(
        model, corpus, config, loss_fn=loss_fn, state_path=state, recipe=begun, **options
    )
    if not dist.is_initialized() or dist.get_rank() == 0:
        val_loss = evaluate(model, corpus.val, model.config.block_size)
        info = {
            "command": _command(args, config.steps, log.get("prolonged", [])),
            "val_loss": val_loss,
            "corpus": Path(corpus.name).stem,
            "fingerprint": corpus.fingerprint,
            "train": asdict(config),
            **begun,
            "log": log,
            "machine": {
                "device": processor_name(device),
                "torch": torch.__version__,
                "dtype": str(dtype),
            },
            "date": time.strftime("%Y-%m-%d"),
        }
        if out.suffix == ".json":  # an experiment: its record is kept, not its weights
            record = {**info, "config": asdict(model.config), "parameters": model.n_params()}
            checkpoints.write_atomically(out, json.dumps(record).encode())
        else:
            checkpoints.save(out, model, corpus.tokenizer, info)
        print(
            f"{out}: held-out loss {val_loss:.4f} nats a character, {log['seconds'] / 60:.1f} minutes"
        )
    if dist.is_initialized():
        dist.destroy_process_group()


def _begin(model: GPT, path: Path) -> dict[str, Any]:
    """Load the weights of a checkpoint, or of another run's state, into the model; how those came about."""
    tensors, info = checkpoints.read_tensors(path)
    weights = {
        n.removeprefix("model."): t
        for n, t in tensors.items()
        if not n.startswith("optimizer.")
    }
    checkpoints.load_weights(model, weights, path)
    if not info.keys() >= {"log", "train"}:
        raise ValueError(
            f"{path} does not say how it was trained; start from what python -m gptlite.train has written."
        )
    return {
        "start": {
            "name": path.stem,
            "train": info["train"],
            "steps": len(info["log"]["train_loss"]),
        }
    }


def _command(args: argparse.Namespace, steps: int, prolonged: list[list[int]]) -> str:
    """The command that makes the same weights anywhere: what was asked for, without where this machine keeps files.

    A run that was prolonged takes a command for each of its lengths, one line each.
    """
    elsewhere = ("preset", "out", "state", "save_every", "eval_every", "compile")
    given = {k: v for k, v in vars(args).items() if v is not None and k not in elsewhere}
    given |= {name: Path(given[name]).stem for name in ("corpus", "start") if name in given}
    lines = []
    for reached, length in [*prolonged, (steps, steps)]:
        asked = given | ({"steps": length} if prolonged else {})
        options = [f"--{name.replace('_', '-')}={value}" for name, value in asked.items()]
        stopped = "" if reached == length else f"  # stopped at step {reached}"
        lines.append(
            shlex.join(["python", "-m", "gptlite.train", args.preset, *options]) + stopped
        )
    return "\n".join(lines)


def _parse(argv: Iterable[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gptlite.train", description=__doc__.splitlines()[0]
    )
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument(
        "--corpus", default="plays", help="plays, tinyshakespeare, or the path of a text file"
    )
    for name, value in (asdict(TrainConfig()) | {"dropout": 0.0}).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), help="default: the preset's"
        )
    parser.add_argument(
        "--start",
        type=Path,
        help="weights to begin with: a checkpoint, or the state of another run",
    )
    parser.add_argument(
        "--confidence-penalty",
        type=float,
        metavar="WEIGHT",
        help="of the entropy of the predictions; default: none",
    )
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16")
    )
    has_compiler = bool(shutil.which("c++") or shutil.which("g++") or torch.cuda.is_available())
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=has_compiler
    )
    parser.add_argument("--eval-every", type=int, default=250, metavar="STEPS")
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument(
        "--out",
        type=Path,
        help="default: assets/checkpoints/PRESET.safetensors; a name in .json keeps a record of the run and no weights",
    )
    parser.add_argument(
        "--state", type=Path, help="where the unfinished run is kept; default: beside --out"
    )
    return parser.parse_args(list(argv) if argv is not None else None)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
