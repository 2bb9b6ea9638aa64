"""What experiments with the teacher share: its labels, and one way to train from them."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptlite.checkpoints import load_pretrained
from gptlite.corpus import load_corpus
from gptlite.distillation.labels import write_labels
from gptlite.distillation.losses import Distillation
from gptlite.files import cache_folder
from gptlite.model import GPT
from gptlite.train import TrainConfig, evaluate, train

EVERY = 50  # steps between two looks at the held-out text
# good for small models that learn from the text
TRAIN = TrainConfig(batch_size=8, warmup=30, lr=0.03, adamw_lr=0.01)
# the best of what scripts/experiments/distill_students.py has swept
TAUGHT = Distillation(alpha=0.9)


class Teaching:
    """The teacher, and its labels for every batch of a run.

    `folder` is where unfinished runs are kept, in the cache.
    """

    def __init__(self, config: TrainConfig, folder: str):
        self.config, self.corpus = config, load_corpus("plays")
        trained = load_pretrained("teacher").model
        self.T, self.folder = trained.config.block_size, cache_folder() / folder
        n = config.steps * config.batch_size
        path = cache_folder() / f"labels-{n}"
        self.store = write_labels(path, trained, self.corpus, self.T, n=n)
        # no dropout in what is made of it: labels are written without, and a brief training
        # does not overfit
        self.teacher = GPT(replace(trained.config, dropout=0.0)).eval()
        self.teacher.load_state_dict(trained.state_dict())

    def unlabelled(self, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """The same batches as the store's, without the teacher's answers."""
        return self.store.sample(*arguments)[:2]

    def state(self, name: str, steps: int) -> Path:
        """Where a run of this name is kept."""
        return self.folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}-{steps}.state"

    def train(
        self,
        model: nn.Module,
        name: str,
        loss_fn: Callable,
        sample: Callable,
        seed: int = 0,
        config: TrainConfig | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """Train a model in place; its log. `others` are options of the training loop.

        A run that has been finished is read from where it was kept.
        """
        config = replace(config or self.config, seed=seed)
        options: dict[str, Any] = {"state_path": self.state(name, config.steps)}
        options |= {"recipe": {"name": name}, "eval_every": EVERY}
        options |= {"loss_fn": loss_fn, "sample": sample, "compile": bool(shutil.which("c++"))}
        return train(model, self.corpus, config, **options | others)

    def glimpse(self, model: GPT) -> float:
        """Over the first 64 windows of the held-out plays, as the curves of a run."""
        return evaluate(model, self.corpus.val[: 64 * self.T + 1], self.T)

    def loss(self, model: GPT) -> float:
        """Over all held-out plays, in nats a character."""
        return evaluate(model, self.corpus.val, self.T)
