"""Search for the shape of the best student that decodes within a budget, and record every shape that was tried.

python scripts/experiments/search_architecture.py [--trials 24] [--steps 200] [--long 1200] [--budget 0.4] [--out PATH]

A shape's latency is the time of one more token, eager, at batch 1 and with a cache, over the teacher's in the same
turns. What is within the budget is taught briefly by the teacher's labels, and so are the hand-made students. The best
of those that were found is then taught for as long as the hand-made ones in scripts/experiments/distill_students.py, with three
seeds: it was chosen by its loss, which flatters it. What is recorded already under the same command is kept. An hour
on two cores.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import optuna
import torch
from distill_students import SIZES
from recorded_runs import RecordedRuns
from teaching import TAUGHT, TRAIN, Teaching

from gptlite.bench import measure_decoding, ratio
from gptlite.model import GPT, GPTConfig
from gptlite.pruning.shape_search import Tried, pareto_front, search

OUT = Path(__file__).resolve().parents[2] / "assets" / "results" / "pruning" / "search.json"
SEEDS = (0, 1, 2)
CONTEXT, NEW = 64, 16  # tokens of the past, and timed tokens


class Search(Teaching):
    """Times and teaches shapes, and keeps what it found."""

    def __init__(self, steps: int, budget: float, command: str, out: Path):
        super().__init__(replace(TRAIN, steps=steps), "search")
        self.budget = budget
        facts = {"train": asdict(self.config), "budget": budget, "context": CONTEXT}
        self.recorded = RecordedRuns(out, command=command, **facts)

    def attempt(self, name: str, config: GPTConfig) -> Tried:
        """One shape, measured and, if it is fast enough, taught, now or before."""

        def do() -> dict:
            torch.manual_seed(0)
            model = GPT(config)
            times = measure_decoding(
                {"it": model.eval(), "teacher": self.teacher}, CONTEXT, NEW
            )
            relative = ratio(times["it"], times["teacher"])
            loss = None
            if relative.median <= self.budget:
                self.train(
                    model.train(), f"{name} {self.shape(config)}", TAUGHT, self.store.sample
                )
                loss = self.loss(model)
            found = {
                "parameters": model.n_params(),
                "latency": [relative.median, relative.low, relative.high],
            }
            return {"config": asdict(config), **found, "val_loss": loss}

        run = self.recorded.run(name, do, threads=str(torch.get_num_threads()))
        if run["config"] != asdict(config):
            raise ValueError(f"{self.recorded.path} has another shape for {name!r}; delete it.")
        tried = Tried(config, run["latency"][0], run["val_loss"])
        says = "too slow" if tried.loss is None else f"{tried.loss:.4f} nats a character"
        print(
            f"{name}: {self.shape(config)}, {tried.latency:.2f} of the teacher's time, {says}",
            flush=True,
        )
        return tried

    def teach_long(self, config: GPTConfig, steps: int, seed: int) -> None:
        """One shape, taught for many steps, now or before."""

        def do() -> dict:
            long = Teaching(replace(TRAIN, steps=steps), "search")
            torch.manual_seed(seed)
            model = GPT(config)
            long.train(
                model, f"{self.shape(config)}, seed {seed}", TAUGHT, long.store.sample, seed
            )
            return {
                "config": asdict(config),
                "parameters": model.n_params(),
                "val_loss": self.loss(model),
            }

        name = f"{self.shape(config)}, {steps} steps, seed {seed}"
        loss = self.recorded.run(name, do, threads=str(torch.get_num_threads()))["val_loss"]
        print(f"{name}: {loss:.4f} nats a character", flush=True)

    @staticmethod
    def shape(c: GPTConfig) -> str:
        """Layers, heads, KV heads, channels and neurons in a file's name."""
        return f"{c.n_layer}-{c.n_head}-{c.kv_heads}-{c.n_embd}-{c.hidden}"


def main() -> None:
    """Try what is not recorded yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--long", type=int, default=1200, help="steps that the best shape is taught"
    )
    parser.add_argument("--budget", type=float, default=0.4, help="of the teacher's time")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    command = f"python scripts/experiments/search_architecture.py --steps {args.steps} --budget {args.budget}"
    searching = Search(args.steps, args.budget, command, args.out)
    like = searching.teacher.config
    for size, (layers, heads, channels) in SIZES.items():
        searching.attempt(
            f"by hand, {size}", replace(like, n_layer=layers, n_head=heads, n_embd=channels)
        )
    found = search(like, lambda i, config: searching.attempt(f"trial {i}", config), args.trials)
    taught = [t for t in found if t.loss is not None]
    for i in pareto_front([(t.latency, t.loss) for t in taught]):
        print(
            f"front: {searching.shape(taught[i].config)}, {taught[i].latency:.2f}, {taught[i].loss:.4f}"
        )
    for seed in SEEDS if taught else ():
        searching.teach_long(min(taught, key=lambda t: t.loss).config, args.long, seed)


if __name__ == "__main__":
    main()
