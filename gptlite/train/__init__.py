"""The one training loop of the book: teacher, student and draft, on one process or several.

    python -m gptlite.train teacher
    torchrun --nproc-per-node 2 -m gptlite.train draft

A run can be killed at any moment: started again, it goes on from its last state exactly. How
to train is in `config`, what to minimise in `losses`, the loop in `loop`, what it keeps in
`state`, and the commands above in `__main__`.
"""

from gptlite.train.config import TrainConfig, block_matrices, lr_factor, make_optimizers
from gptlite.train.loop import Run, train
from gptlite.train.losses import LossFn, evaluate, next_token_loss, penalized_loss

__all__ = [
    "LossFn",
    "Run",
    "TrainConfig",
    "block_matrices",
    "evaluate",
    "lr_factor",
    "make_optimizers",
    "next_token_loss",
    "penalized_loss",
    "train",
]
