"""Search for the best student that decodes within a budget, and record every shape tried.

python scripts/experiments/search_architecture.py [--trials 24] [--steps 200] [--long 1200]
    [--budget 0.4] [--out PATH] [--fresh]

A shape's latency is the time of one more token, eager, at batch 1 and with a cache, over the
teacher's in the same turns. What is within the budget is taught briefly by the teacher's
labels, and so are the hand-made students. The best of those that were found is then taught for
as long as the hand-made ones in scripts/experiments/distill_students.py, with three seeds: it
was chosen by its loss, which flatters it. What is recorded already is kept. An hour on two
cores.
"""

from dataclasses import asdict, replace
from pathlib import Path

import optuna
import torch
from distill_students import SIZES
from recorded_runs import RecordedRuns, in_a_sentence, options
from teaching import TAUGHT, TRAIN, Teaching

from gptlite.bench import measure_decoding, ratio
from gptlite.model import GPT, GPTConfig
from gptlite.pruning.shape_search import Tried, pareto_front, search

SEEDS = (0, 1, 2)
CONTEXT, NEW = 64, 16  # tokens of the past, and timed tokens


class Search(Teaching):
    """Times and teaches shapes, and keeps what it found."""

    def __init__(self, steps: int, budget: float, out: Path, fresh: bool):
        config, self.budget = replace(TRAIN, steps=steps), budget
        script = "python scripts/experiments/search_architecture.py"
        command = f"{script} --steps {steps} --budget {budget}"
        parameters = {"train": asdict(config), "budget": budget, "context": CONTEXT}
        self.recorded = RecordedRuns(out, command, fresh, **parameters)
        super().__init__(config, "search")

    def attempt(self, name: str, config: GPTConfig) -> Tried:
        """One shape, measured and, if it is fast enough, taught, now or before."""

        def do() -> dict:
            torch.manual_seed(0)
            model = GPT(config)
            both = {"it": model.eval(), "teacher": self.teacher}
            times = measure_decoding(both, CONTEXT, NEW)
            relative = ratio(times["it"], times["teacher"])
            found = {"config": asdict(config), "parameters": model.n_params()}
            found["latency"] = [relative.median, relative.low, relative.high]
            loss = None
            if relative.median <= self.budget:
                run = f"{name} {self.shape(config)}"
                self.train(model.train(), run, TAUGHT, self.store.sample)
                loss = self.loss(model)
            return {**found, "val_loss": loss}

        run = self.recorded.run(name, do, threads=str(torch.get_num_threads()))
        if run["config"] != asdict(config):
            raise ValueError(
                f"{self.recorded.path} has another shape for {name!r}; name another --out, or "
                "overwrite the record with --fresh."
            )
        tried = Tried(config, run["latency"][0], run["val_loss"])
        says = "too slow" if tried.loss is None else f"{tried.loss:.4f} nats a character"
        speed = f"{tried.latency:.2f} of the teacher's time"
        print(f"{name}: {self.shape(config)}, {speed}, {says}", flush=True)
        return tried

    def teach_long(self, config: GPTConfig, steps: int, seed: int) -> None:
        """One shape, taught for many steps, now or before."""

        def do() -> dict:
            long = Teaching(replace(TRAIN, steps=steps), "search")
            torch.manual_seed(seed)
            model = GPT(config)
            run = f"{self.shape(config)}, seed {seed}"
            long.train(model, run, TAUGHT, long.store.sample, seed)
            found = {"config": asdict(config), "parameters": model.n_params()}
            return {**found, "val_loss": self.loss(model)}

        name = f"{self.shape(config)}, {steps} steps, seed {seed}"
        loss = self.recorded.run(name, do, threads=str(torch.get_num_threads()))["val_loss"]
        print(f"{name}: {loss:.4f} nats a character", flush=True)

    @staticmethod
    def shape(c: GPTConfig) -> str:
        """Layers, heads, KV heads, channels and neurons in a file's name."""
        return f"{c.n_layer}-{c.n_head}-{c.kv_heads}-{c.n_embd}-{c.hidden}"


def main() -> None:
    """Try what is not recorded yet."""
    parser = options(__doc__, "pruning/search", 200)
    parser.add_argument("--trials", type=int, default=24)
    long = "steps that the best shape is taught"
    parser.add_argument("--long", type=int, default=1200, help=long)
    parser.add_argument("--budget", type=float, default=0.4, help="of the teacher's time")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searching = Search(args.steps, args.budget, args.out, args.fresh)
    like = searching.teacher.config
    for size, (layers, heads, channels) in SIZES.items():
        config = replace(like, n_layer=layers, n_head=heads, n_embd=channels)
        searching.attempt(f"by hand, {size}", config)
    found = search(like, lambda i, config: searching.attempt(f"trial {i}", config), args.trials)
    taught = [t for t in found if t.loss is not None]
    for i in pareto_front([(t.latency, t.loss) for t in taught]):
        best = taught[i]
        print(f"front: {searching.shape(best.config)}, {best.latency:.2f}, {best.loss:.4f}")
    for seed in SEEDS if taught else ():
        searching.teach_long(min(taught, key=lambda t: t.loss).config, args.long, seed)


if __name__ == "__main__":
    in_a_sentence(main)
