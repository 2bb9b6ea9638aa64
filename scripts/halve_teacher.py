"""Halve the teacher in five ways, three seeds each, on the same number of characters, and record what each way loses.

python scripts/halve_teacher.py [--steps 1200] [--out assets/results/pruning/halves.json]

Half is half the layers, half the heads and half the width. Trained on the text alone; distilled from the teacher;
distilled step by step, each model the next one's teacher, through scales 0.9 ... 0.5; and cut out of the teacher by
importance (its width stays), then trained on, with the teacher and without. All see the same number of characters, the
steps together. Hours on two cores; runs that are recorded already under the same command are kept.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from recorded_runs import RecordedRuns
from teaching import TAUGHT, TRAIN, Teaching

from gptlite.corpus import sample_batch
from gptlite.model import GPT
from gptlite.pruning_structure import gradient_importance, most_important, scaled_config, shrink

OUT = Path(__file__).resolve().parent.parent / "assets" / "results" / "pruning" / "halves.json"
SCALES = (0.9, 0.8, 0.7, 0.6, 0.5)
SEEDS = (0, 1, 2)
CALIBRATION = 8  # batches of 16 windows, for importance


class Halving(Teaching):
    """The teacher, its labels, and the record of what was made of them."""

    def __init__(self, steps: int, out: Path):
        super().__init__(replace(TRAIN, steps=steps), "halves")
        self.half = scaled_config(self.teacher.config, SCALES[-1])
        command = f"python scripts/halve_teacher.py --steps {steps}"
        facts = {"train": asdict(self.config), "scales": SCALES, "alpha": TAUGHT.alpha}
        self.recorded = RecordedRuns(out, command=command, **facts)

    def taught(self, model: GPT, name: str, seed: int, alpha: float) -> dict:
        """Train a model by the labels, and what is recorded of it."""
        log = self.train(model, name, replace(TAUGHT, alpha=alpha), self.store.sample, seed)
        return self.measured(model, log)

    def measured(self, model: GPT, log: dict) -> dict:
        """What is recorded of a finished model."""
        shape = {name: getattr(model.config, name) for name in ("n_layer", "n_head", "n_embd", "hidden")}
        found = {"parameters": model.n_params(), "val_loss": self.loss(model), "curve": log["val_loss"]}
        return {**shape, **found}

    def direct(self, seed: int, alpha: float) -> dict:
        """Half the size from fresh weights, by the text alone (alpha 0) or by the teacher."""
        torch.manual_seed(seed)
        return self.taught(GPT(self.half), f"direct, alpha {alpha:g}, seed {seed}", seed, alpha)

    def in_steps(self, seed: int) -> dict:
        """Each scale's model from fresh weights, taught by the one before, for an equal share of the steps."""
        share = replace(self.config, steps=self.config.steps // len(SCALES))
        stages, before, sample = [], None, self.store.sample
        for scale in SCALES:
            torch.manual_seed(seed)
            model = GPT(scaled_config(self.teacher.config, scale))
            loss = replace(TAUGHT, teacher=before)
            log = self.train(model, f"in steps, {scale}, seed {seed}", loss, sample, seed, share)
            stages.append({"scale": scale, **self.measured(model, log)})
            before, sample = model.eval(), self.unlabelled
        return {**stages[-1], "stages": stages}

    def cut(self, seed: int, teach: bool) -> dict:
        """The most important half of the teacher's layers, heads and neurons, trained on."""
        batches = [sample_batch(self.corpus.train, self.T, 16, step, seed) for step in range(CALIBRATION)]
        found = gradient_importance(self.teacher, batches)
        layers = most_important(found.layers, self.half.n_layer)
        heads = most_important(found.heads, self.half.n_head)
        neurons = most_important(found.neurons, self.teacher.config.hidden // 2)
        model = shrink(self.teacher, layers, heads, neurons)
        at_once = self.glimpse(model)
        made = self.taught(
            model, f"cut, {'taught' if teach else 'alone'}, seed {seed}", seed, TAUGHT.alpha if teach else 0.0
        )
        return {**made, "layers": layers.tolist(), "before_training": at_once}


def main() -> None:
    """Do what is not recorded yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    halving = Halving(args.steps, args.out)
    for seed in SEEDS:
        ways: dict[str, Callable[[], dict]] = {
            "text alone": lambda seed=seed: halving.direct(seed, 0.0),
            "distilled": lambda seed=seed: halving.direct(seed, TAUGHT.alpha),
            "in steps": lambda seed=seed: halving.in_steps(seed),
            "cut, taught": lambda seed=seed: halving.cut(seed, True),
            "cut, text alone": lambda seed=seed: halving.cut(seed, False),
        }
        for name, do in ways.items():
            loss = halving.recorded.run(f"{name}, seed {seed}", do)["val_loss"]
            print(f"{name}, seed {seed}: {loss:.4f} nats a character", flush=True)


if __name__ == "__main__":
    main()
