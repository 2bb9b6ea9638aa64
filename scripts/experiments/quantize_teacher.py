"""Quantize the teacher in every way that the chapter names, and record what each loses.

python scripts/experiments/quantize_teacher.py [--steps 40] [--out PATH] [--fresh]

Losses are over the held-out plays. Runs that are recorded already are kept. About an hour on
two cores.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from recorded_runs import RecordedRuns, in_a_sentence, options
from torch import Tensor
from tqdm.auto import tqdm

from gptlite.checkpoints import load_pretrained
from gptlite.corpus import Corpus, load_corpus, sample_batch
from gptlite.distillation.losses import forward_kl
from gptlite.model import GPT
from gptlite.quantization.activations import RoundedInputLinear, input_peaks
from gptlite.quantization.fits import awq, gptq
from gptlite.quantization.grids import INT4, INT8, Grid, round_to_nearest
from gptlite.quantization.model import quantize_model
from gptlite.quantization.training import NF4Linear, QATLinear, qlora
from gptlite.train import TrainConfig, evaluate, next_token_loss, train

NEAREST = {
    "int8, a scale a row": INT8,
    "int4, groups of 64": INT4,
    "int4, a scale a row": Grid(4, None),
}
NEAREST |= {"int4 with middle, groups of 64": Grid(4, 64, symmetric=False)}
NEAREST |= {f"int{bits}, groups of 64": Grid(bits, 64) for bits in (3, 2)}
CALIBRATION = 32  # windows of the training text
QAT = TrainConfig(batch_size=16, lr=0.002, adamw_lr=2e-4, warmup=5, decay_from=0.1)
PLAY = 108_000  # characters: most of the last of the held-out plays
# held-out characters over which the divergence from the teacher's predictions is taken
GLIMPSE = 30_000
QLORA = {"rank": 8, "lr": 1e-3, "batch": 8}


def runs(teacher: GPT, corpus: Corpus, steps: int) -> dict[str, Callable[[], dict]]:
    """What is to be recorded, by name, each as a function that does it."""
    T = teacher.config.block_size
    calibration, _ = sample_batch(corpus.train, T, CALIBRATION, step=0, seed=1)

    def divergence(model: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return forward_kl(model(x), teacher(x))

    def loss(model: GPT) -> dict:
        kl = evaluate(model, corpus.val[:GLIMPSE], T, B=8, loss_fn=divergence)
        return {"val_loss": evaluate(model, corpus.val, T, B=8), "kl": kl}

    def bits_of(grid: Grid) -> float:
        shapes = [m.weight.shape for m in teacher.modules() if isinstance(m, torch.nn.Linear)]
        bits = sum(grid.bits_per_weight(K) * N * K for N, K in shapes)
        return bits / sum(N * K for N, K in shapes)

    def fitted(grid: Grid, fit: Callable) -> Callable[[], dict]:
        def run() -> dict:
            model = copy.deepcopy(teacher)
            began = time.perf_counter()
            quantize_model(model, grid, fit, None if fit is round_to_nearest else calibration)
            seconds = time.perf_counter() - began
            return {**loss(model), "seconds": seconds, "bits": bits_of(grid)}

        return run

    def in_nf4() -> dict:
        return {**loss(copy.deepcopy(teacher).swap_linears(NF4Linear)), "bits": bits_of(INT4)}

    def rounded_inputs(static: bool, power: float | None = None) -> Callable[[], dict]:
        def run() -> dict:
            model = copy.deepcopy(teacher)
            peaks = input_peaks(model, calibration)

            def rounded(linear: torch.nn.Linear) -> RoundedInputLinear:
                return RoundedInputLinear(linear, peaks[linear] if static else None, power)

            return loss(model.swap_linears(rounded))

        return run

    def through_rounding(grid: Grid) -> Callable[[], dict]:
        def run() -> dict:
            model = copy.deepcopy(teacher)
            model.swap_linears(lambda linear: QATLinear(linear, grid))
            log = train(model, corpus, replace(QAT, steps=steps), eval_every=0)
            found = {**loss(model), "seconds": log["seconds"], "bits": bits_of(grid)}
            return {**found, "curve": log["train_loss"]}

        return run

    found = {
        "float32": lambda: loss(teacher),
        "bfloat16": lambda: loss(copy.deepcopy(teacher).bfloat16()),
    }
    found |= {
        f"{name}, nearest": fitted(grid, round_to_nearest) for name, grid in NEAREST.items()
    }
    found |= {f"int{bits}, groups of 64, GPTQ": fitted(Grid(bits, 64), gptq) for bits in (4, 3)}
    found["int2, groups of 64, QAT"] = through_rounding(Grid(2, 64))
    found["QLoRA"] = lambda: fine_tuned(teacher, corpus, steps)
    found["int8 inputs, static"] = rounded_inputs(static=True)
    found["int8 inputs, dynamic"] = rounded_inputs(static=False)
    found["int8 inputs, static, smoothed"] = rounded_inputs(static=True, power=0.5)
    found["int4, groups of 64, AWQ"] = fitted(INT4, awq)
    found["int4 clipped, groups of 64, AWQ"] = fitted(replace(INT4, clip=True), awq)
    found["int3, groups of 64, AWQ"] = fitted(Grid(3, 64), awq)
    for bits in (4, 3, 2):
        for name, fit in (("nearest", round_to_nearest), ("GPTQ", gptq)):
            clipped = Grid(bits, 64, clip=True)
            found[f"int{bits} clipped, groups of 64, {name}"] = fitted(clipped, fit)
    found["int3, groups of 64, QAT"] = through_rounding(Grid(3, 64))
    found["int2 clipped, groups of 64, QAT"] = through_rounding(Grid(2, 64, clip=True))
    found["int2, groups of 64, GPTQ"] = fitted(Grid(2, 64), gptq)
    found["NF4, groups of 64, nearest"] = in_nf4
    return found


def fine_tuned(teacher: GPT, corpus: Corpus, steps: int) -> dict:
    """The teacher in NF4 with adapters that learn a play that it does not know.

    The losses are on what follows in the play.
    """
    T = teacher.config.block_size
    known, unknown = corpus.val[-PLAY : -PLAY // 3], corpus.val[-PLAY // 3 :]
    torch.manual_seed(0)
    model = copy.deepcopy(teacher)
    found = {"float32": evaluate(model, unknown, T)}
    qlora(model, QLORA["rank"])
    found["NF4"] = evaluate(model, unknown, T)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=QLORA["lr"], weight_decay=0.0)
    with torch.enable_grad():
        for step in tqdm(range(2 * steps), desc="QLoRA", unit="step", mininterval=1):
            next_token_loss(model, *sample_batch(known, T, QLORA["batch"], step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    found["NF4 and adapters"] = evaluate(model, unknown, T)
    made = {**QLORA, "steps": 2 * steps, "val_loss": found["NF4 and adapters"]}
    return {**made, "losses": found, "learning": sum(p.numel() for p in learning)}


@torch.no_grad()
def main() -> None:
    """Do what is not recorded yet, and write after each."""
    args = options(__doc__, "quantization/teacher", 40).parse_args()
    command = f"python scripts/experiments/quantize_teacher.py --steps {args.steps}"
    parameters = {"steps": args.steps, "calibration": CALIBRATION, "glimpse": GLIMPSE}
    recorded = RecordedRuns(args.out, command, args.fresh, **parameters)
    teacher, corpus = load_pretrained("teacher").model, load_corpus("plays")
    for name, do in runs(teacher, corpus, args.steps).items():
        print(f"{name}: {recorded.run(name, do)['val_loss']:.4f} nats a character", flush=True)


if __name__ == "__main__":
    in_a_sentence(main)
