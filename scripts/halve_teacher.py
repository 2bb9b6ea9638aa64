"""Halve the teacher in four ways, three seeds each, on the same number of characters, and record what each way loses.

python scripts/halve_teacher.py [--steps 600] [--out assets/results/pruning/halves.json]

Half is half the layers, half the heads and half the width. Trained on the text alone; distilled from the teacher;
distilled step by step, each model the next one's teacher, through scales 0.9 ... 0.5; and cut out of the teacher by
importance (its width stays), then trained on, with the teacher and without. All see the same number of characters, the
steps together. Hours on two cores; runs that are recorded already under the same command are kept.
"""

import argparse
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from recorded_runs import RecordedRuns

from gptlite.checkpoints import load_pretrained
from gptlite.corpus import cache_folder, load_corpus, sample_batch
from gptlite.distillation import Distillation
from gptlite.distillation_labels import LabelStore, write_labels
from gptlite.model import GPT
from gptlite.pruning_structure import gradient_importance, most_important, scaled_config, shrink
from gptlite.train import TrainConfig, evaluate, train

OUT = Path(__file__).resolve().parent.parent / "assets" / "results" / "pruning" / "halves.json"
SCALES = (0.9, 0.8, 0.7, 0.6, 0.5)
SEEDS = (0, 1, 2)
TRAIN = TrainConfig(batch_size=16, warmup=20)
ALPHA, TEMPERATURE = 0.9, 1.0
EVERY = 50  # steps between two looks at the held-out text
CALIBRATION = 8  # batches of 16 windows, for importance


class Halving:
    """The teacher, its labels, and the record of what was made of them."""

    def __init__(self, steps: int, out: Path):
        self.corpus, self.config = load_corpus("plays"), replace(TRAIN, steps=steps)
        self.teacher = load_pretrained("teacher").model
        self.half = scaled_config(self.teacher.config, SCALES[-1])
        T = self.teacher.config.block_size
        path = cache_folder() / f"labels-{steps}"  # the same as those of distill_students.py
        self.store: LabelStore = write_labels(path, self.teacher, self.corpus, T, n=steps * TRAIN.batch_size)
        command = f"python scripts/halve_teacher.py --steps {steps}"
        facts = {"train": asdict(self.config), "scales": SCALES, "alpha": ALPHA, "temperature": TEMPERATURE}
        self.recorded = RecordedRuns(out, command=command, **facts)

    def train(self, model: GPT, name: str, steps: int, seed: int, teacher: GPT | None, alpha: float = ALPHA) -> dict:
        """Train a model in place, by the labels if no teacher is given; its log."""
        state = cache_folder() / "halves" / f"{name.replace(' ', '_').replace(',', '')}-{steps}.state"
        loss = Distillation(teacher, TEMPERATURE, alpha)
        sample = self.store.sample if teacher is None else lambda *arguments: self.store.sample(*arguments)[:2]
        config = replace(self.config, steps=steps, seed=seed)
        options = {"state_path": state, "eval_every": EVERY, "compile": bool(shutil.which("c++"))}
        return train(model, self.corpus, config, loss_fn=loss, sample=sample, recipe={"name": name}, **options)

    def measured(self, model: GPT, log: dict) -> dict:
        """What is recorded of a finished model."""
        loss = evaluate(model, self.corpus.val, model.config.block_size)
        shape = {name: getattr(model.config, name) for name in ("n_layer", "n_head", "n_embd", "hidden")}
        return {**shape, "parameters": model.n_params(), "val_loss": loss, "curve": log["val_loss"]}

    def direct(self, seed: int, alpha: float) -> dict:
        """Half the size from fresh weights, by the text alone (alpha 0) or by the teacher."""
        torch.manual_seed(seed)
        model = GPT(self.half)
        name = f"direct, alpha {alpha:g}, seed {seed}"
        return self.measured(model, self.train(model, name, self.config.steps, seed, None, alpha))

    def in_steps(self, seed: int) -> dict:
        """Each scale's model from fresh weights, taught by the one before, for an equal share of the steps."""
        before, share, stages = None, self.config.steps // len(SCALES), []
        for scale in SCALES:
            torch.manual_seed(seed)
            model = GPT(scaled_config(self.teacher.config, scale))
            log = self.train(model, f"in steps, {scale}, seed {seed}", share, seed, before)
            stages.append({"scale": scale, **self.measured(model, log)})
            before = model.eval()
        return {**stages[-1], "stages": stages}

    def cut(self, seed: int, teach: bool) -> dict:
        """The most important half of the teacher's layers, heads and neurons, trained on."""
        T, c = self.teacher.config.block_size, self.teacher.config
        batches = [sample_batch(self.corpus.train, T, 16, step, seed) for step in range(CALIBRATION)]
        found = gradient_importance(self.teacher, batches)
        layers = most_important(found.layers, self.half.n_layer)
        model = shrink(
            self.teacher,
            layers,
            most_important(found.heads, self.half.n_head),
            most_important(found.neurons, c.hidden // 2),
        )
        at_once = evaluate(model, self.corpus.val[: 64 * T + 1], T)
        name, alpha = f"cut, {'taught' if teach else 'alone'}, seed {seed}", ALPHA if teach else 0.0
        log = self.train(model, name, self.config.steps, seed, None, alpha)
        return {**self.measured(model, log), "layers": layers.tolist(), "before_training": at_once}


def main() -> None:
    """Do what is not recorded yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    halving = Halving(args.steps, args.out)
    for seed in SEEDS:
        ways: dict[str, Callable[[], dict]] = {
            "text alone": lambda seed=seed: halving.direct(seed, 0.0),
            "distilled": lambda seed=seed: halving.direct(seed, ALPHA),
            "in steps": lambda seed=seed: halving.in_steps(seed),
            "cut, taught": lambda seed=seed: halving.cut(seed, True),
            "cut, text alone": lambda seed=seed: halving.cut(seed, False),
        }
        for name, do in ways.items():
            loss = halving.recorded.run(f"{name}, seed {seed}", do)["val_loss"]
            print(f"{name}, seed {seed}: {loss:.4f} nats a character", flush=True)


if __name__ == "__main__":
    main()
