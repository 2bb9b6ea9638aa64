"""Share the teacher's heads of keys and values, train on, and record how the loss comes back.

python scripts/experiments/uptrain_kv_heads.py [--steps 120] [--out PATH] [--fresh]

The unchanged teacher is trained on as well, since more training alone changes the loss. Runs
that are recorded already are kept. About half an hour on two cores with bfloat16 instructions.
"""

import shutil
from dataclasses import asdict, replace
from functools import partial

import torch
from recorded_runs import RecordedRuns, in_a_sentence, options

from gptlite.checkpoints import load_pretrained
from gptlite.corpus import load_corpus
from gptlite.device import fast_dtype, pick_device, processor_name
from gptlite.model import GPT
from gptlite.smaller_caches import share_kv_heads
from gptlite.train import TrainConfig, evaluate, train

EVERY = 20  # steps between two looks at the held-out text


def uptrained(
    teacher: GPT, n_kv_head: int, config: TrainConfig, device: torch.device, dtype: torch.dtype
) -> dict:
    """The losses of one run: a curve over the first held-out windows, and all at its end.

    The curve is [[step, nats], ...].
    """
    corpus, T = load_corpus("plays"), teacher.config.block_size
    model = share_kv_heads(teacher, n_kv_head)
    model = with_dropout(model, 0.1).to(device)  # as the teacher was trained
    glimpse = corpus.val[: 64 * T + 1]
    before = evaluate(model, glimpse, T)
    compile = bool(shutil.which("c++"))
    log = train(model, corpus, config, eval_every=EVERY, dtype=dtype, compile=compile)
    curve = [[0, before], *log["val_loss"], [config.steps, evaluate(model, glimpse, T)]]
    val_loss = evaluate(model, corpus.val, T)
    return {"curve": curve, "val_loss": val_loss, "seconds": log["seconds"]}


def with_dropout(model: GPT, dropout: float) -> GPT:
    """The same weights in a model that drops out in training."""
    made = GPT(replace(model.config, dropout=dropout))
    made.load_state_dict(model.state_dict())
    return made


def main() -> None:
    """Train for each number of heads what is not recorded yet."""
    args = options(__doc__, "uptraining/kv_heads", 120).parse_args()
    rates = {"lr": 0.004, "adamw_lr": 4e-4, "warmup": 10, "decay_from": 0.1}
    config = TrainConfig(steps=args.steps, batch_size=16, **rates)
    command = f"python scripts/experiments/uptrain_kv_heads.py --steps {args.steps}"
    recorded = RecordedRuns(args.out, command, args.fresh, train=asdict(config))
    device = pick_device()
    dtype, teacher = fast_dtype(device), load_pretrained("teacher").model
    machine = {"device": processor_name(device), "dtype": str(dtype)[6:]}
    n_head = teacher.config.n_head
    for heads in (h for h in range(n_head, 0, -1) if n_head % h == 0):
        do = partial(uptrained, teacher, heads, config, device, dtype)
        loss = recorded.run(str(heads), do, **machine)["val_loss"]
        said = f"{heads} head{'s' * (heads > 1)}: {loss:.4f} nats a character"
        print(f"{said} over all held-out plays", flush=True)


if __name__ == "__main__":
    in_a_sentence(main)
