"""Train students with and without a teacher, and record what the teacher is worth.

python scripts/experiments/distill_students.py [--steps 1200] [--out PATH] [--fresh]

Baseline and distilled student of one size and seed see the same windows in the same order, on
the same schedule; there are three seeds. Runs that are recorded already are kept, and one that
was interrupted goes on where it was. The first runs sweep temperature, share and loss on the
smallest student; the rest use the best of them. Some hours on two cores.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from recorded_runs import RecordedRuns, in_a_sentence, options
from teaching import TRAIN, Teaching
from torch import Tensor, nn

from gptlite.distillation.labels import spread_rest
from gptlite.distillation.losses import (
    CoTraining,
    Distillation,
    Ensemble,
    HiddenMatching,
    forward_kl,
    logit_mse,
    mutual_loss,
    reverse_kl,
)
from gptlite.model import GPT, GPTConfig
from gptlite.train import TrainConfig

# layers, heads, channels
SIZES = {"0.2 M": (2, 4, 88), "0.5 M": (3, 4, 112), "1 M": (3, 4, 160)}
SEEDS = (0, 1, 2)
SWEEP = {  # temperature, alpha, divergence
    **{f"KL, T 1, alpha {alpha}": (1, alpha, forward_kl) for alpha in (0.25, 0.5, 0.9, 1)},
    **{
        f"KL, T {T}, alpha {alpha}": (T, alpha, forward_kl)
        for T in (2, 4)
        for alpha in (0.5, 0.9)
    },
    "reverse KL, T 1, alpha 0.9": (1, 0.9, reverse_kl),
    "MSE, alpha 0.9": (1, 0.9, logit_mse),
}
# of the blocks' matrices and of the rest: half and twice what all others have
RATES = ((0.015, 0.005), (0.06, 0.02))
K = 8  # of the top-k labels
# the student's layer that learns to guess a layer of the teacher: each the middle one
HIDDEN = (0, 2)


class Students(Teaching):
    """All runs of the experiment, each by a name, and the record that they are kept in."""

    def __init__(self, steps: int, out: Path, fresh: bool = False):
        config = replace(TRAIN, steps=steps)
        command = f"python scripts/experiments/distill_students.py --steps {steps}"
        self.recorded = RecordedRuns(out, command, fresh, train=asdict(config), k=K)
        super().__init__(config, "students")

    def run(self, name: str, *recipe: Any, **options: Any) -> float:
        """The loss over all held-out plays of a student `trained` so, now or before."""

        def do() -> dict:
            model, log = self.trained(name, *recipe, **options)
            found = {
                "parameters": model.n_params(),
                "steps": len(log["train_loss"]),
                "curve": log["val_loss"],
            }
            return {**found, "val_loss": self.loss(model), "seconds": log["seconds"]}

        loss = self.recorded.run(name, do)["val_loss"]
        print(f"{name}: {loss:.4f} nats a character", flush=True)
        return loss

    def trained(
        self,
        name: str,
        size: str,
        seed: int,
        loss_fn: Callable,
        sample: Callable | None = None,
        config: TrainConfig | None = None,
        wrap: Callable[[GPT], nn.Module] | None = None,
    ) -> tuple[GPT, dict[str, Any]]:
        """A student and its log; `wrap` makes of it what is trained, if that is more."""
        model, sample = self.student(size, seed), sample or self.store.sample
        if wrap is None:
            return model, self.train(model, name, loss_fn, sample, seed, config)
        others = {"compile": False, "eval_every": 0}
        return model, self.train(wrap(model), name, loss_fn, sample, seed, config, **others)

    def student(self, size: str, seed: int) -> GPT:
        """A student that knows nothing."""
        layers, heads, channels = SIZES[size]
        torch.manual_seed(seed)
        c = self.teacher.config
        return GPT(GPTConfig(layers, heads, channels, c.block_size, c.vocab_size))

    def top_k(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """A batch with what a store of the K likeliest tokens would give, from one of all."""
        x, y, log_p = self.store.sample(*arguments)
        return x, y, spread_rest(*log_p.topk(K), log_p.shape[-1])


def matching_loss(model: HiddenMatching, x: Tensor, y: Tensor) -> Tensor:
    """The loss that belongs to a student with its projection."""
    return model.loss(model, x, y)


def main() -> None:
    """Do what is not recorded yet."""
    args = options(__doc__, "distillation/students", 1200).parse_args()
    students = Students(args.steps, args.out, args.fresh)
    smallest, *_ = SIZES
    swept = {}
    for name, (temperature, alpha, divergence) in SWEEP.items():
        loss = Distillation(None, temperature, alpha, divergence)
        swept[name] = students.run(f"sweep, {name}", smallest, 0, loss)
    best = min((n for n in swept if n.startswith("KL")), key=swept.get)
    students.recorded.record["best"] = best
    distilled, alone = Distillation(None, *SWEEP[best]), Distillation(alpha=0)
    for seed in SEEDS:
        for size in SIZES:
            students.run(f"{size}, baseline, seed {seed}", size, seed, alone)
            students.run(f"{size}, distilled, seed {seed}", size, seed, distilled)
            run = f"{size}, distilled in 3/4 of the steps, seed {seed}", size, seed, distilled
            students.run(*run, config=replace(students.config, steps=3 * args.steps // 4))
        students.run(
            f"{smallest}, top {K}, seed {seed}", smallest, seed, distilled, students.top_k
        )
    largest, *smaller = reversed(SIZES)
    before = students.trained(f"{largest}, distilled, seed 0", largest, 0, distilled)[0]
    ask = students.unlabelled
    for size in smaller:  # each student teaches the next, smaller one
        loss = replace(distilled, teacher=before.eval())
        run = f"{size}, iterated, seed 0", size, 0, loss, ask
        students.run(*run)
        before = students.trained(*run)[0]
    several = [
        students.trained(f"{largest}, baseline, seed {s}", largest, s, alone)[0].eval()
        for s in SEEDS
    ]
    for name, teacher in (
        (f"one teacher of {largest}", several[0]),
        (f"three teachers of {largest}", Ensemble(*several)),
    ):
        loss = replace(distilled, teacher=teacher)
        students.run(f"{smallest}, {name}, seed 0", smallest, 0, loss, ask)

    def pair(model: GPT) -> CoTraining:
        return CoTraining(model, students.student(smallest, 1))

    def matching(model: GPT) -> HiddenMatching:
        return HiddenMatching(model, students.teacher, HIDDEN)

    for name, wrap, loss in (
        ("two that learn together", pair, mutual_loss),
        ("hidden states", matching, matching_loss),
    ):
        students.run(f"{smallest}, {name}, seed 0", smallest, 0, loss, ask, wrap=wrap)
    for name, loss in (("baseline", alone), ("distilled", distilled)):  # whether the gain lasts
        run = f"{smallest}, {name} in 4 times the steps, seed 0", smallest, 0, loss
        students.run(*run, config=replace(students.config, steps=4 * args.steps))
    for lr, adamw_lr in RATES:  # the text alone must have had the better ones
        name = f"{smallest}, baseline at rates {lr:g} and {adamw_lr:g}, seed 0"
        config = replace(students.config, lr=lr, adamw_lr=adamw_lr)
        students.run(name, smallest, 0, alone, config=config)


if __name__ == "__main__":
    in_a_sentence(main)
