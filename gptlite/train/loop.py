"""The training loop: batches, gradients, steps of the optimizers, and what is kept of them."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptlite.corpus import Corpus, sample_batch, windows
from gptlite.files import as_json, check_can_write
from gptlite.train.config import TrainConfig, block_matrices, gpts, lr_factor, make_optimizers
from gptlite.train.losses import LossFn, evaluate, next_token_loss
from gptlite.train.state import read_state, write_state

# as `sample_batch`: (tokens, T, B, step, seed) -> what a loss takes after the model
Sampler = Callable[[Tensor, int, int, int, int], tuple[Tensor, ...]]
# (model, step): what else changes in the course of a run, such as masks
BeforeStep = Callable[[Any, int], None]
FORMATS = (torch.float32, torch.bfloat16, torch.float16)


class Run:
    """A training run: all that its next step depends on. It can be saved after any step."""

    def __init__(
        self,
        model: nn.Module,
        corpus: Corpus,
        config: TrainConfig,
        loss_fn: LossFn,
        dtype: torch.dtype,
        compile: bool,
        recipe: dict[str, Any],
        sample: Sampler = sample_batch,
        before_step: BeforeStep | None = None,
    ):
        self.model, self.corpus, self.config, self.loss_fn = model, corpus, config, loss_fn
        self.dtype, self.sample, self.before_step = dtype, sample, before_step
        if dtype not in FORMATS:
            raise ValueError(f"dtype is {dtype}, but must be float32, bfloat16 or float16.")
        self.gpts = gpts(model)
        if not self.gpts:
            raise ValueError(f"{type(model).__name__} has no GPT in it that could be trained.")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("no parameter learns; call requires_grad_() on those that should.")
        model.zero_grad(set_to_none=True)  # of whatever was asked of it before
        self.device = next(model.parameters()).device
        self.rank, self.world = 0, 1
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if config.batch_size % self.world:
            size = config.batch_size
            raise ValueError(
                f"batch_size is {size}, which {self.world} processes do not divide."
            )
        matrices = block_matrices(model)
        chosen = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        self.optimizers = make_optimizers(matrices, rest, config, dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.log: dict[str, Any] = {"train_loss": [], "val_loss": [], "seconds": 0.0}
        shape = self.gpts[0].config
        self.T = shape.block_size
        self.facts: dict[str, Any] = {
            "train": asdict(config),
            "config": asdict(shape),
            "corpus": corpus.fingerprint,
            "recipe": recipe,
            "dtype": str(dtype),
        }
        runner = nn.parallel.DistributedDataParallel(model) if self.world > 1 else model
        self.runner = torch.compile(runner) if compile else runner

    def step(self) -> None:
        """Train on the next batch, and log its loss.

        The batch and the dropout depend on seed and step alone. A FloatingPointError says that
        loss or gradients are not finite; the weights are then those of the step before.
        """
        step, seed = len(self.log["train_loss"]), self.config.seed
        if self.before_step is not None:
            self.before_step(self.model, step)
        batch = self.sample(self.corpus.train, self.T, self.config.batch_size, step, seed)
        # each process takes its share
        mine = [t[self.rank :: self.world].to(self.device) for t in batch]
        torch.manual_seed((1_000_003 * seed + step) * self.world + self.rank)  # of dropout
        mixed = torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)
        with torch.enable_grad(), mixed:
            loss = self.loss_fn(self.runner, *mine)
        self.scaler.scale(loss).backward()
        loss = loss.detach()
        if self.world > 1:
            dist.all_reduce(loss)
        self._check(loss.isfinite(), "the loss is")
        self._update(lr_factor(step, self.config))
        self.log["train_loss"].append(round(loss.item() / self.world, 6))

    def _update(self, factor: float) -> None:
        """One step of each optimizer at `factor` of its learning rate, the gradient clipped."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf)
        finite, scale = bool(norm.isfinite()), self.scaler.get_scale()
        for optimizer in self.optimizers:
            if finite:
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        # float16 scales gradients up, and where they overflow leaves the step out: all of it
        overflowed = 1 <= self.scaler.get_scale() < scale
        self._check(finite or overflowed, "the gradients are")

    @torch.no_grad()
    def check(self) -> None:
        """Raise a FloatingPointError if what was learned can predict nothing any more."""
        window = self.corpus.train[None, : self.T].long().to(self.device)
        for gpt in self.gpts:
            self._check(gpt(window).isfinite().all(), "the predictions are")

    def look(self) -> None:
        """Log and tell the loss over the first 64 held-out windows."""
        from tqdm.auto import tqdm

        loss = evaluate(self.model, self.corpus.val[: 64 * self.T + 1], self.T)
        self._check(math.isfinite(loss), "the held-out loss is")
        step, last = len(self.log["train_loss"]), self.log["train_loss"][-1]
        self.log["val_loss"].append([step, loss])
        tqdm.write(f"step {step}: loss {last:.4f}, held out {loss:.4f}")

    def _check(self, finite: bool | Tensor, what: str) -> None:
        if not finite:
            step = len(self.log["train_loss"])
            raise FloatingPointError(
                f"{what} not finite at step {step}; a lower learning rate may help."
            )

    def save(self, path: Path) -> None:
        """Write all that the run needs to go on; what predicts nothing overwrites nothing."""
        self.check()
        info = {**self.facts, "log": self.log}
        write_state(path, self.model, self.optimizers, self.scaler, info)

    def restore(self, path: Path) -> None:
        """Go on from a saved run; a ValueError says how another run differs.

        The number of steps alone may: the run is then prolonged or cut short, its learning rate
        on the new schedule, and the log says so: "prolonged" lists [the step reached, the
        number of steps until then].
        """
        info = read_state(path, self.model, self.optimizers, self.scaler, self.facts)
        self.log = info["log"]
        before = info["train"].get("steps")
        if before != self.config.steps:
            done = len(self.log["train_loss"])
            self.log.setdefault("prolonged", []).append([done, before])


def train(
    model: nn.Module,
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
    """Train `model` in place; return a log of "train_loss" per step, "val_loss" and "seconds".

    "val_loss" is [[step, nats], ...]. The model is a GPT, or made of several: see
    `block_matrices`. With `state_path` the run is saved there every `save_every` steps and at
    its end, and goes on from there, exactly, if the file exists. Under `torchrun` each process
    takes its share of every batch. `stop_after` ends early at that step, as a kill would.
    `sample` draws the batches; all that it gives goes to `loss_fn`, after the model. `recipe`
    names what else makes the run, such as its loss: a state of another is refused.
    `before_step` may change the model, as long as its parameters and buffers stay the same
    tensors. A FloatingPointError ends a run whose numbers are not finite; nothing of it is
    written over an older state.
    """
    for name, value in (("save_every", save_every), ("eval_every", eval_every)):
        if value < 0:
            raise ValueError(f"{name} is {value}, but must be at least 0 (0 is never).")
    recipe = as_json(recipe or {}, "the recipe")
    run = Run(model, corpus, config, loss_fn, dtype, compile, recipe, sample, before_step)
    if eval_every:
        # a text that is too short is refused now, not when it is needed
        next(windows(corpus.val, T=run.T, B=1))
    if state_path:
        check_can_write(state_path)
        if state_path.exists():
            run.restore(state_path)
    first = len(run.log["train_loss"])
    model.train()
    for step in _progress(run, config.steps if stop_after is None else stop_after):
        last = step == config.steps
        if run.rank == 0 and eval_every and step % eval_every == 0 and not last:
            run.look()
        if run.rank == 0 and state_path and (last or (save_every and step % save_every == 0)):
            run.save(state_path)
    if len(run.log["train_loss"]) > first:
        run.check()
    model.eval()
    return run.log


def _progress(run: Run, end: int) -> Iterator[int]:
    """Train until a number of steps is reached; after each, how many that are."""
    from tqdm.auto import tqdm

    log, total = run.log, run.config.steps
    first, before, started = len(log["train_loss"]), log["seconds"], time.perf_counter()
    # what is not said here, TQDM_DISABLE decides
    shown = {} if run.rank == 0 else {"disable": True}
    steps = range(first + 1, min(total, end) + 1)
    bar = tqdm(steps, "training", total, initial=first, unit="step", mininterval=1, **shown)
    for step in bar:
        run.step()
        seconds = time.perf_counter() - started
        log["seconds"] = before + seconds
        speed = (step - first) * run.config.batch_size * run.T / seconds
        said = f"loss {log['train_loss'][-1]:.3f}, {speed:,.0f} tokens/s"
        bar.set_postfix_str(said, refresh=False)
        yield step
