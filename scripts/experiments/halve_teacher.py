"""Halve the teacher in five ways, on the same number of characters; record what each way loses.

python scripts/experiments/halve_teacher.py [--steps 1200] [--out PATH] [--fresh]

Half is half the layers, half the heads and half the width, whichever way, each with three
seeds. Trained on the text alone; distilled from the teacher; distilled step by step, each model
the next one's teacher, through scales 0.9 ... 0.5, each from fresh weights; and cut out of the
teacher, then trained on at a third of the learning rates, with the teacher and without. One
more fresh half is distilled at these rates, to tell the head start from the rates. Beside
these, with one seed, half the layers, heads and neurons in a stream that keeps its width, cut
out and fresh. All see the same windows in the same order; the steps share them. Hours on two
cores; runs that are recorded already are kept.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from recorded_runs import RecordedRuns, in_a_sentence, options
from teaching import TAUGHT, TRAIN, Teaching

from gptlite.corpus import sample_batch
from gptlite.model import GPT
from gptlite.pruning.importance import gradient_importance, most_important
from gptlite.pruning.shape_search import scaled_config
from gptlite.pruning.structure import greedy_layers, shrink
from gptlite.train import next_token_loss

SCALES = (0.9, 0.8, 0.7, 0.6, 0.5)
SEEDS = (0, 1, 2)
LOWER = 1 / 3  # of the learning rates: the full ones undo what a model has learned already
CALIBRATION = 64  # batches of two windows of the text, to choose by


class Halving(Teaching):
    """The teacher, its labels, and the record of what was made of them."""

    def __init__(self, steps: int, out: Path, fresh: bool):
        config = replace(TRAIN, steps=steps)
        command = f"python scripts/experiments/halve_teacher.py --steps {steps}"
        parameters = {"train": asdict(config), "scales": SCALES, "alpha": TAUGHT.alpha}
        self.recorded = RecordedRuns(out, command, fresh, **parameters)
        super().__init__(config, "halves")
        self.half = scaled_config(self.teacher.config, SCALES[-1])

    def taught(self, model: GPT, name: str, seed: int, alpha: float, rate: float = 1.0) -> dict:
        """Train a model by the labels, at a share of the rates; what is recorded of it."""
        lr, adamw_lr = rate * self.config.lr, rate * self.config.adamw_lr
        config, loss = (
            replace(self.config, lr=lr, adamw_lr=adamw_lr),
            replace(TAUGHT, alpha=alpha),
        )
        log = self.train(model, name, loss, self.store.sample, seed, config)
        return self.measured(model, log)

    def measured(self, model: GPT, log: dict) -> dict:
        """What is recorded of a finished model."""
        names = ("n_layer", "n_head", "n_embd", "hidden")
        found = {name: getattr(model.config, name) for name in names}
        found |= {"parameters": model.n_params(), "val_loss": self.loss(model)}
        last = [len(log["train_loss"]), self.glimpse(model)]
        return {**found, "curve": [*log["val_loss"], last]}

    def direct(self, seed: int, alpha: float, rate: float = 1.0) -> dict:
        """Half the size from fresh weights, by the text alone (alpha 0) or by the teacher."""
        torch.manual_seed(seed)
        name = f"direct, alpha {alpha:g}, seed {seed}" + _rate(rate)
        return self.taught(GPT(self.half), name, seed, alpha, rate)

    def in_steps(self, seed: int) -> dict:
        """Each scale's model from fresh weights, taught by the one before, in equal shares."""
        share = replace(self.config, steps=self.config.steps // len(SCALES))
        stages, before, sample = [], None, self.store.sample
        for i, scale in enumerate(SCALES):
            torch.manual_seed(seed)
            model = GPT(scaled_config(self.teacher.config, scale))
            loss = replace(TAUGHT, teacher=before)
            mine = partial(_later, sample, i * share.steps)
            log = self.train(model, f"in steps, {scale}, seed {seed}", loss, mine, seed, share)
            stages.append({"scale": scale, **self.measured(model, log)})
            before, sample = model.eval(), self.unlabelled
        return {**stages[-1], "stages": stages}

    def cut_out(self, seed: int, wide: bool) -> tuple[GPT, list[int]]:
        """What is left of the teacher without what it can spare most, and the layers that stay.

        Layers go first, one after another, then heads and neurons, and unless it stays wide,
        channels.
        """
        c, text = self.half, self.corpus.train
        batches = [sample_batch(text, self.T, 2, step, seed) for step in range(CALIBRATION)]

        @torch.no_grad()
        def loss(model: GPT) -> float:
            some = batches[: CALIBRATION // 4]
            return sum(next_token_loss(model, *batch).item() for batch in some)

        layers = greedy_layers(self.teacher, c.n_layer, loss)
        model = shrink(self.teacher, layers)
        found = gradient_importance(model, batches)
        heads = most_important(found.heads, c.n_head)
        neurons = most_important(found.neurons, c.hidden)
        channels = None if wide else most_important(found.channels, c.n_embd)
        return shrink(model, None, heads, neurons, channels), layers.tolist()

    def cut(self, seed: int, teach: bool, rate: float = LOWER, wide: bool = False) -> dict:
        """What was cut out of the teacher, trained on."""
        model, layers = self.cut_out(seed, wide)
        at_once = self.glimpse(model)
        name = f"cut, {'taught' if teach else 'alone'}, seed {seed}" + _rate(rate)
        name = f"wide, {name}" if wide else name
        made = self.taught(model, name, seed, TAUGHT.alpha if teach else 0.0, rate)
        return {**made, "layers": layers, "before_training": at_once}

    def wide(self, seed: int) -> dict:
        """The shape of what was cut out with its width, taught from fresh weights."""
        config = self.cut_out(seed, wide=True)[0].config
        torch.manual_seed(seed)
        return self.taught(GPT(config), f"wide, seed {seed}", seed, TAUGHT.alpha)


def _rate(rate: float) -> str:
    """A share of the learning rates in the name of a run."""
    return f", rate {rate:.2g}" if rate != 1 else ""


def _later(
    sample: Callable, before: int, tokens: torch.Tensor, T: int, B: int, step: int, seed: int
) -> tuple:
    """What is sampled after so many steps."""
    return sample(tokens, T, B, before + step, seed)


def main() -> None:
    """Do what is not recorded yet."""
    args = options(__doc__, "pruning/halves", 1200).parse_args()
    halving = Halving(args.steps, args.out, args.fresh)
    direct, cut, alpha = halving.direct, halving.cut, TAUGHT.alpha
    ways: dict[str, Callable[[int], dict]] = {
        "text alone": partial(direct, alpha=0.0),
        "distilled": partial(direct, alpha=alpha),
        "in steps": halving.in_steps,
        "distilled at a third of the rate": partial(direct, alpha=alpha, rate=LOWER),
        "cut, taught": partial(cut, teach=True),
        "cut, text alone": partial(cut, teach=False),
    }
    once: dict[str, Callable[[int], dict]] = {
        "cut, taught at the full rate": partial(cut, teach=True, rate=1.0),
        "wide, distilled": halving.wide,
        "wide, cut, taught": partial(cut, teach=True, wide=True),
        "wide, cut, taught at the full rate": partial(cut, teach=True, rate=1.0, wide=True),
    }
    for seed in SEEDS:
        for way, do in (ways | once if seed == SEEDS[0] else ways).items():
            name = f"{way}, seed {seed}"
            loss = halving.recorded.run(name, partial(do, seed))["val_loss"]
            print(f"{name}: {loss:.4f} nats a character", flush=True)


if __name__ == "__main__":
    in_a_sentence(main)
