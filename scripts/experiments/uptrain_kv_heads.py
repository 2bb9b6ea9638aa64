"""Share the teacher's heads of keys and values, train on for a little, and record how the held-out loss comes back.

python scripts/experiments/uptrain_kv_heads.py [--steps 120] [--out assets/results/uptraining/kv_heads.json]

The unchanged teacher is trained on as well, since more training alone changes the loss. About half an
hour on two cores with bfloat16 instructions.
"""

import argparse
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from recorded_runs import RecordedRuns

from gptlite.checkpoints import load_pretrained
from gptlite.corpus import load_corpus
from gptlite.device import fast_dtype, pick_device, processor_name
from gptlite.model import GPT
from gptlite.smaller_caches import share_kv_heads
from gptlite.train import TrainConfig, evaluate, train

OUT = (
    Path(__file__).resolve().parents[2] / "assets" / "results" / "uptraining" / "kv_heads.json"
)
EVERY = 20  # steps between two looks at the held-out text


def uptrained(
    teacher: GPT, n_kv_head: int, config: TrainConfig, device: torch.device, dtype: torch.dtype
) -> dict:
    """The losses of one run: [[step, nats], ...] over the first held-out windows, and over all of them at its end."""
    corpus, T = load_corpus("plays"), teacher.config.block_size
    model = share_kv_heads(teacher, n_kv_head)
    model = with_dropout(model, 0.1).to(device)  # as the teacher was trained
    glimpse = corpus.val[: 64 * T + 1]
    before = evaluate(model, glimpse, T)
    log = train(
        model, corpus, config, eval_every=EVERY, dtype=dtype, compile=bool(shutil.which("c++"))
    )
    curve = [[0, before], *log["val_loss"], [config.steps, evaluate(model, glimpse, T)]]
    return {
        "curve": curve,
        "val_loss": evaluate(model, corpus.val, T),
        "seconds": log["seconds"],
    }


def with_dropout(model: GPT, dropout: float) -> GPT:
    """The same weights in a model that drops out in training."""
    made = GPT(replace(model.config, dropout=dropout))
    made.load_state_dict(model.state_dict())
    return made


def main() -> None:
    """Train for each number of heads; what is recorded already under the same command is kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    config = TrainConfig(
        steps=args.steps, batch_size=16, lr=0.004, adamw_lr=4e-4, warmup=10, decay_from=0.1
    )
    device = pick_device()
    dtype, teacher = fast_dtype(device), load_pretrained("teacher").model
    command = f"python scripts/experiments/uptrain_kv_heads.py --steps {args.steps}"
    recorded = RecordedRuns(args.out, command=command, train=asdict(config))
    machine = {"device": processor_name(device), "dtype": str(dtype)[6:]}
    for heads in (
        h for h in range(teacher.config.n_head, 0, -1) if teacher.config.n_head % h == 0
    ):
        do = partial(uptrained, teacher, heads, config, device, dtype)
        loss = recorded.run(str(heads), do, **machine)["val_loss"]
        print(
            f"{heads} head{'s' * (heads > 1)}: {loss:.4f} nats a character over all held-out plays"
        )


if __name__ == "__main__":
    main()
