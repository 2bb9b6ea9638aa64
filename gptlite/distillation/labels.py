"""A teacher's answers on disk: computed once, keyed by sample, read under any shuffle.

Any number of a DataLoader's workers may read them. A store is a folder; `label_files` says what
is in it.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gptlite.corpus import Corpus, draw_windows, windows
from gptlite.distillation.label_files import (
    check_labels,
    fingerprint,
    label_bytes,
    open_store,
    read_about,
    record_dtype,
    refuse_others,
    seal,
)
from gptlite.files import write_atomically

# a log-probability that float16 holds well, and that no temperature near 1 makes count
LEAST = -60.0


def write_labels(
    path: Path,
    teacher: nn.Module,
    corpus: Corpus,
    T: int,
    k: int | None = None,
    n: int | None = None,
    B: int = 32,
    stop_after: int | None = None,
) -> "LabelStore | None":
    """Keep the teacher's answers to the first n windows of the training text (default: all).

    Interrupted, as by `stop_after` windows (then None), it goes on; other labels are refused.
    """
    from tqdm.auto import tqdm

    V, whole = len(corpus.tokenizer), (len(corpus.train) - 1) // T
    n = whole if n is None else n
    if not 1 <= n <= whole:
        raise ValueError(f"n is {n}, but the text has from 1 to {whole} windows of {T} tokens.")
    whose = {"teacher": fingerprint(teacher), "corpus": corpus.fingerprint}
    about = {**whose, "n": n, "T": T, "V": V, "k": k}
    done = open_store(path, about)
    labels = np.memmap(path / "labels.bin", record_dtype(V, k), "r+", shape=(n, T))
    left = windows(corpus.train[done * T : n * T + 1], T=T, B=B) if done < n else ()
    with tqdm(total=n, initial=done, desc="labels", unit="window", mininterval=1) as bar:
        for x, _ in left:
            if stop_after is not None and done >= stop_after:
                return None
            log_p = _ask(teacher, x)
            if k is not None:
                log_p, token = log_p.topk(k)
                labels["token"][done : done + len(x)] = token.numpy()
            labels["log_p"][done : done + len(x)] = log_p.numpy()
            labels.flush()  # what about.json says is there
            done += len(x)
            write_atomically(path / "about.json", json.dumps({**about, "done": done}).encode())
            bar.update(len(x))
    seal(path)
    return LabelStore(path, corpus)


@torch.no_grad()
def _ask(teacher: nn.Module, x: Tensor) -> Tensor:
    """The teacher's log-probabilities (B, T, V), none below LEAST, on the CPU."""
    was_training = teacher.training
    teacher.eval()
    try:
        logits = teacher(x.to(next(teacher.parameters()).device))
    finally:
        teacher.train(was_training)
    log_p = logits.float().log_softmax(-1).clamp(min=LEAST).cpu()
    if log_p.isnan().any():
        raise ValueError("the teacher's logits are NaN or +inf, but must be numbers.")
    return log_p


class LabelStore(torch.utils.data.Dataset):
    """Windows of a text with a teacher's answers.

    Item i is always x (T,), y (T,) and logits (T, V) of window i. It opens its file anew in
    every process, so any number of a DataLoader's workers may read it.
    """

    def __init__(self, path: Path, corpus: Corpus, teacher: nn.Module | None = None):
        about = read_about(path)
        wanted = {"corpus": corpus.fingerprint, "V": len(corpus.tokenizer)}
        if teacher is not None:
            wanted["teacher"] = fingerprint(teacher)
        refuse_others(path, about, wanted)
        self.n, self.T, self.V, self.k = (about[key] for key in ("n", "T", "V", "k"))
        if about["done"] < self.n:
            raise ValueError(
                f"the labels at {path} end at window {about['done']} of {self.n}; "
                "write_labels goes on."
            )
        self.path, self.tokens = path, corpus.train
        self.nbytes = label_bytes(self.n, self.T, self.V, self.k)
        check_labels(path, about)
        self._opened: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.n

    def __getstate__(self) -> dict[str, Any]:
        # a copy of the file's content would travel otherwise
        return {**self.__dict__, "_opened": None}

    @property
    def records(self) -> np.ndarray:
        """The file's records (n, T), mapped into memory by this process."""
        if self._opened is None or self._opened[0] != os.getpid():
            file, dtype = self.path / "labels.bin", record_dtype(self.V, self.k)
            self._opened = os.getpid(), np.memmap(file, dtype, "r", shape=(self.n, self.T))
        return self._opened[1]

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        if not 0 <= i < self.n:
            raise IndexError(
                f"window {i} is asked for, but there are windows 0 to {self.n - 1}."
            )
        x, y, logits = self.batch(torch.tensor([i]))
        return x[0], y[0], logits[0]

    def batch(self, i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Windows i (B,): inputs and targets (B, T), log-probabilities (B, T, V) in float32."""
        rows = self.tokens[(self.T * i)[:, None] + torch.arange(self.T + 1)].long()
        records = self.records[i.numpy()]
        log_p = torch.from_numpy(records["log_p"].astype(np.float32))
        if self.k is not None:
            token = torch.from_numpy(records["token"].astype(np.int64))
            log_p = spread_rest(log_p, token, self.V)
        return rows[:, :-1], rows[:, 1:], log_p

    def sample(
        self, tokens: Tensor, T: int, B: int, step: int, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`sample_batch` with the teacher's answers; each pass takes every window once."""
        if T != self.T:
            raise ValueError(f"the labels are for windows of {self.T} tokens, not of {T}.")
        if tokens is not self.tokens and not torch.equal(tokens, self.tokens):
            raise ValueError(
                "the labels are of another text than the one to train on; write them anew."
            )
        return self.batch(draw_windows(self.n, T, B, step, seed)[0])


def spread_rest(log_p: Tensor, token: Tensor, V: int) -> Tensor:
    """Log-probabilities (..., V) from those of k tokens (..., k): all others share the rest."""
    k = log_p.shape[-1]
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=1e-6)  # (..., 1)
    others = (rest / max(V - k, 1)).log().clamp(min=LEAST)
    return others.expand(*log_p.shape[:-1], V).scatter(-1, token, log_p)
