"""A small model taught by a large one: the losses, and labels computed once and kept."""

from gptlite.distillation.label_files import label_bytes
from gptlite.distillation.labels import LabelStore, spread_rest, write_labels
from gptlite.distillation.losses import (
    CoTraining,
    Distillation,
    Ensemble,
    HiddenMatching,
    forward_kl,
    kl,
    logit_mse,
    mutual_loss,
    reverse_kl,
)

__all__ = [
    "CoTraining",
    "Distillation",
    "Ensemble",
    "HiddenMatching",
    "LabelStore",
    "forward_kl",
    "kl",
    "label_bytes",
    "logit_mse",
    "mutual_loss",
    "reverse_kl",
    "spread_rest",
    "write_labels",
]
