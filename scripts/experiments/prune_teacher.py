"""Prune the teacher's weights at once and gradually, train on, and record what each loses.

python scripts/experiments/prune_teacher.py [--steps 120] [--out PATH] [--fresh]

Each share of zeros is reached at once, before the first step, or over the first two thirds of
the steps; two of each four at once. All see the same batches, with the unpruned teacher's
labels. A model that has lost little wants a lower learning rate than one that has lost much:
each share takes the best of three for masks at once, in a third of the steps, by the loss on
some held-out windows. Runs that are recorded already are kept. An hour on two cores.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from recorded_runs import RecordedRuns, in_a_sentence, options
from teaching import TAUGHT, TRAIN, Teaching
from torch import Tensor

from gptlite.model import GPT
from gptlite.pruning.masks import (
    bake_masks,
    gradual_pruning,
    magnitude_mask,
    prune_weights,
    two_of_four_mask,
)

SPARSITIES = (0.5, 0.8, 0.9)
RATES = (1e-5, 1e-4, 1e-3)
# Muon's steps are as large for a model that has nothing to learn
ADAMW = replace(TRAIN, warmup=5, optimizer="adamw")


class Pruning(Teaching):
    """The teacher, its labels, and the record of what pruning made of it."""

    def __init__(self, steps: int, out: Path, fresh: bool):
        config = replace(ADAMW, steps=steps)
        command = f"python scripts/experiments/prune_teacher.py --steps {steps}"
        self.recorded = RecordedRuns(out, command, fresh, train=asdict(config), rates=RATES)
        super().__init__(config, "pruned")

    def rate(self, share: str, mask_of: Callable[[Tensor], Tensor]) -> float:
        """The learning rate that brings the masked teacher down furthest in some steps."""

        def lost(rate: float) -> float:
            model = prune_weights(copy.deepcopy(self.teacher), mask_of)
            config = replace(self.config, steps=self.config.steps // 3, adamw_lr=rate)
            self.train(model, f"{share}, rate {rate}", TAUGHT, self.store.sample, config=config)
            return self.glimpse(model)

        def do() -> dict:
            return {"tried": [[rate, lost(rate)] for rate in RATES]}

        tried = self.recorded.run(f"{share}, rates", do)["tried"]
        return min(tried, key=lambda pair: pair[1])[0]

    def run(
        self,
        share: str,
        way: str,
        mask_of: Callable[[Tensor], Tensor],
        rate: float,
        before_step: Callable[[GPT, int], None] | None = None,
    ) -> None:
        """Mask a copy of the teacher, train it on, and record its loss before and after."""

        def do() -> dict:
            model = prune_weights(copy.deepcopy(self.teacher), mask_of)
            at_once = self.glimpse(model)
            others = {"config": replace(self.config, adamw_lr=rate), "before_step": before_step}
            log = self.train(model, name, TAUGHT, self.store.sample, **others)
            linears = _linears(bake_masks(model))
            zeros = [(linear.weight == 0).float().mean().item() for linear in linears]
            last = [len(log["train_loss"]), self.glimpse(model)]
            found = {"share": share, "way": way, "rate": rate, "zeros": sum(zeros) / len(zeros)}
            found["curve"] = [[0, at_once], *log["val_loss"], last]
            return {**found, "val_loss": self.loss(model), "seconds": log["seconds"]}

        name = f"{share}, {way}" if way else share
        loss = self.recorded.run(name, do)["val_loss"]
        print(f"{name}: {loss:.4f} nats a character", flush=True)


def _linears(model: GPT) -> list:
    return [m for block in model.h for part in (block.attn, block.mlp) for m in part.children()]


def main() -> None:
    """Do what is not recorded yet."""
    args = options(__doc__, "pruning/weights", 120).parse_args()
    pruning = Pruning(args.steps, args.out, args.fresh)
    none = partial(magnitude_mask, sparsity=0.0)
    # what training on is worth by itself
    pruning.run("none", "", none, pruning.rate("none", none))
    pruning.run("2 of 4", "at once", two_of_four_mask, pruning.rate("2 of 4", two_of_four_mask))
    for sparsity in SPARSITIES:
        share, mask_of = f"{sparsity:.0%}", partial(magnitude_mask, sparsity=sparsity)
        rate = pruning.rate(share, mask_of)
        pruning.run(share, "at once", mask_of, rate)
        gradually = gradual_pruning(sparsity, 2 * args.steps // 3)
        pruning.run(share, "gradually", none, rate, gradually)


if __name__ == "__main__":
    in_a_sentence(main)
