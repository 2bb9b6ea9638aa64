"""Prune the teacher's weights at once and gradually, train on under the masks, and record what each loses.

python scripts/experiments/prune_teacher.py [--steps 120] [--out assets/results/pruning/weights.json]

Each share of zeros is reached at once, before the first step, or over the first two thirds of the steps; two of each
four at once. All see the same batches, with the unpruned teacher's labels. A model that has lost little wants a lower
learning rate than one that has lost much: each share takes the best of three for masks at once, in a third of the
steps, by the loss on some held-out windows. Runs that are recorded already under the same command are kept. An hour on
two cores.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from recorded_runs import RecordedRuns
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

OUT = Path(__file__).resolve().parents[2] / "assets" / "results" / "pruning" / "weights.json"
SPARSITIES = (0.5, 0.8, 0.9)
RATES = (1e-5, 1e-4, 1e-3)
ADAMW = replace(
    TRAIN, warmup=5, optimizer="adamw"
)  # Muon's steps are as large for a model that has nothing to learn


class Pruning(Teaching):
    """The teacher, its labels, and the record of what pruning made of it."""

    def __init__(self, steps: int, out: Path):
        super().__init__(replace(ADAMW, steps=steps), "pruned")
        command = f"python scripts/experiments/prune_teacher.py --steps {steps}"
        self.recorded = RecordedRuns(
            out, command=command, train=asdict(self.config), rates=RATES
        )

    def rate(self, share: str, mask_of: Callable[[Tensor], Tensor]) -> float:
        """The learning rate with which the teacher, masked at once, comes down furthest in a third of the steps."""

        def lost(rate: float) -> float:
            model = prune_weights(copy.deepcopy(self.teacher), mask_of)
            config = replace(self.config, steps=self.config.steps // 3, adamw_lr=rate)
            self.train(model, f"{share}, rate {rate}", TAUGHT, self.store.sample, config=config)
            return self.glimpse(model)

        tried = self.recorded.run(
            f"{share}, rates", lambda: {"tried": [[rate, lost(rate)] for rate in RATES]}
        )["tried"]
        return min(tried, key=lambda pair: pair[1])[0]

    def run(
        self,
        share: str,
        way: str,
        mask_of: Callable[[Tensor], Tensor],
        rate: float,
        before_step: Callable[[GPT, int], None] | None = None,
    ) -> None:
        """Mask a copy of the teacher, train it on, and record its loss before and after, now or before."""

        def do() -> dict:
            model = prune_weights(copy.deepcopy(self.teacher), mask_of)
            at_once, config = self.glimpse(model), replace(self.config, adamw_lr=rate)
            log = self.train(
                model, name, TAUGHT, self.store.sample, config=config, before_step=before_step
            )
            zeros = [
                (linear.weight == 0).float().mean().item()
                for linear in _linears(bake_masks(model))
            ]
            curve = [
                [0, at_once],
                *log["val_loss"],
                [len(log["train_loss"]), self.glimpse(model)],
            ]
            found = {"share": share, "way": way, "rate": rate, "zeros": sum(zeros) / len(zeros)}
            return {
                **found,
                "curve": curve,
                "val_loss": self.loss(model),
                "seconds": log["seconds"],
            }

        name = f"{share}, {way}" if way else share
        print(
            f"{name}: {self.recorded.run(name, do)['val_loss']:.4f} nats a character",
            flush=True,
        )


def _linears(model: GPT) -> list:
    return [m for block in model.h for part in (block.attn, block.mlp) for m in part.children()]


def main() -> None:
    """Do what is not recorded yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    pruning = Pruning(args.steps, args.out)
    none = partial(magnitude_mask, sparsity=0.0)
    pruning.run(
        "none", "", none, pruning.rate("none", none)
    )  # what training on is worth by itself
    pruning.run("2 of 4", "at once", two_of_four_mask, pruning.rate("2 of 4", two_of_four_mask))
    for sparsity in SPARSITIES:
        share, mask_of = f"{sparsity:.0%}", partial(magnitude_mask, sparsity=sparsity)
        rate = pruning.rate(share, mask_of)
        pruning.run(share, "at once", mask_of, rate)
        pruning.run(
            share, "gradually", none, rate, gradual_pruning(sparsity, 2 * args.steps // 3)
        )


if __name__ == "__main__":
    main()
