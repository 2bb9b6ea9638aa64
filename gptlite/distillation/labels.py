"""A teacher's answers on disk: computed once, keyed by sample, read back under any shuffle by any number of workers.

A store is a folder. `labels.bin` has a record for each position of each window: log-probabilities in float16, of all
tokens or of the k likeliest with their numbers. `about.json` says whose they are, and how many windows are there.
"""

import hashlib
import json
import os
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gptlite.corpus import Corpus, draw_windows, windows
from gptlite.files import write_atomically

LEAST = (
    -60.0
)  # a log-probability that float16 holds well, and that no temperature near 1 makes count


def fingerprint(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that any change of a model's weights or shape changes."""
    config = getattr(model, "config", None)
    shape = asdict(config) if is_dataclass(config) else {}
    shape = {
        name: value for name, value in shape.items() if value is not None
    }  # a new option changes no old model
    digest = hashlib.sha256(json.dumps(shape).encode())
    for name, t in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
        digest.update(
            t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def record_dtype(V: int, k: int | None) -> np.dtype:
    """What is stored for a token: V log-probabilities, or k of them with the numbers of the tokens they are of."""
    if k is None:
        return np.dtype([("log_p", "<f2", (V,))])
    if not 1 <= k <= V:
        raise ValueError(f"k is {k}, but must be from 1 to the vocabulary's {V}.")
    return np.dtype(
        [
            ("log_p", "<f2", (k,)),
            ("token", "<u1" if V <= 256 else "<u4" if V > 65536 else "<u2", (k,)),
        ]
    )


def label_bytes(n: int, T: int, V: int, k: int | None = None) -> int:
    """Bytes of the labels of n windows of T tokens: 2 V a token, or 3 to 6 for each of k."""
    return n * T * record_dtype(V, k).itemsize


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
    """Ask the teacher about the first n windows of the training text (default: all) and keep its answers at `path`.

    Interrupted, it goes on where it was; a store of another teacher, text or kind is refused. `stop_after` ends at
    the first batch that reaches this window, as a kill would, and returns None.
    """
    from tqdm.auto import tqdm

    V, device = len(corpus.tokenizer), next(teacher.parameters()).device
    dtype, whole = record_dtype(V, k), (len(corpus.train) - 1) // T
    n = whole if n is None else n
    if not 1 <= n <= whole:
        raise ValueError(
            f"labels of {n} windows are asked for, but the text has from 1 to {whole} of {T} tokens."
        )
    about = {
        "teacher": fingerprint(teacher),
        "corpus": corpus.fingerprint,
        "n": n,
        "T": T,
        "V": V,
        "k": k,
    }
    done = _begun(path, about)
    labels = np.memmap(path / "labels.bin", dtype, "r+", shape=(n, T))
    left = windows(corpus.train[done * T : n * T + 1], T=T, B=B) if done < n else ()
    was_training = teacher.training
    teacher.eval()
    try:
        with tqdm(total=n, initial=done, desc="labels", unit="window", mininterval=1) as bar:
            for x, _ in left:
                if stop_after is not None and done >= stop_after:
                    return None
                with torch.no_grad():
                    log_p = (
                        teacher(x.to(device)).float().log_softmax(-1).clamp(min=LEAST).cpu()
                    )  # (B, T, V)
                if k is not None:
                    log_p, token = log_p.topk(k)
                    labels["token"][done : done + len(x)] = token.numpy()
                labels["log_p"][done : done + len(x)] = log_p.numpy()
                labels.flush()  # what about.json says is there
                done += len(x)
                write_atomically(
                    path / "about.json", json.dumps({**about, "done": done}).encode()
                )
                bar.update(len(x))
    finally:
        teacher.train(was_training)
    return LabelStore(path, corpus)


def _begun(path: Path, about: dict[str, Any]) -> int:
    """Windows that a store has already; a new one gets its folder and a file of its size."""
    size = label_bytes(about["n"], about["T"], about["V"], about["k"])
    if (path / "about.json").exists():
        there = _read_about(path)
        _refuse_others(path, there, about)
        _check_size(path / "labels.bin", size)
        return there["done"]
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "labels.bin", "wb") as file:
        file.truncate(size)
    return 0


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.exists() else 0
    if size != expected:
        raise ValueError(
            f"{path} has {size} bytes, but must have {expected}; delete the folder."
        )


def _refuse_others(path: Path, there: dict[str, Any], about: dict[str, Any]) -> None:
    changed = [
        f"{key} {there.get(key)} -> {value}"
        for key, value in about.items()
        if there.get(key) != value
    ]
    if changed:
        raise ValueError(
            f"the labels at {path} are others ({', '.join(changed)}); delete them or choose another path."
        )


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads((path / "about.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no labels at {path}; write_labels makes them.") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path / 'about.json'} is not whole ({error}); delete the folder."
        ) from None
    if not isinstance(about, dict) or not about.keys() >= {
        "n",
        "T",
        "V",
        "k",
        "done",
        "corpus",
        "teacher",
    }:
        raise ValueError(f"{path / 'about.json'} does not describe labels; delete the folder.")
    return about


class LabelStore(torch.utils.data.Dataset):
    """Windows of a text with a teacher's answers: item i is always x (T,), y (T,) and logits (T, V) of window i.

    It opens its file anew in every process, so any number of a DataLoader's workers may read it.
    """

    def __init__(self, path: Path, corpus: Corpus, teacher: nn.Module | None = None):
        about = _read_about(path)
        mine = {"corpus": corpus.fingerprint, "V": len(corpus.tokenizer)}
        _refuse_others(
            path, about, mine if teacher is None else mine | {"teacher": fingerprint(teacher)}
        )
        self.n, self.T, self.V, self.k = (about[key] for key in ("n", "T", "V", "k"))
        if about["done"] < self.n:
            raise ValueError(
                f"the labels at {path} end at window {about['done']} of {self.n}; write_labels goes on."
            )
        self.path, self.tokens, self.nbytes = (
            path,
            corpus.train,
            label_bytes(self.n, self.T, self.V, self.k),
        )
        _check_size(path / "labels.bin", self.nbytes)
        self._opened: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.n

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_opened": None,
        }  # a copy of the file's content would travel otherwise

    @property
    def records(self) -> np.ndarray:
        """The file's records (n, T), mapped into memory by this process."""
        if self._opened is None or self._opened[0] != os.getpid():
            labels = np.memmap(
                self.path / "labels.bin",
                record_dtype(self.V, self.k),
                "r",
                shape=(self.n, self.T),
            )
            self._opened = os.getpid(), labels
        return self._opened[1]

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        if not 0 <= i < self.n:
            raise IndexError(
                f"window {i} is asked for, but there are windows 0 to {self.n - 1}."
            )
        x, y, logits = self.batch(torch.tensor([i]))
        return x[0], y[0], logits[0]

    def batch(self, i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Windows i (B,): inputs and targets (B, T), and the teacher's log-probabilities (B, T, V) in float32."""
        rows = self.tokens[(self.T * i)[:, None] + torch.arange(self.T + 1)].long()
        records = self.records[i.numpy()]
        log_p = torch.from_numpy(records["log_p"].astype(np.float32))
        if self.k is not None:
            log_p = spread_rest(
                log_p, torch.from_numpy(records["token"].astype(np.int64)), self.V
            )
        return rows[:, :-1], rows[:, 1:], log_p

    def sample(
        self, tokens: Tensor, T: int, B: int, step: int, seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`sample_batch` with the teacher's answers, for the training loop; each pass takes every window once."""
        if T != self.T:
            raise ValueError(
                f"the labels are for windows of {self.T} tokens, but {T} are asked for."
            )
        if tokens is not self.tokens and not torch.equal(tokens, self.tokens):
            raise ValueError(
                "the labels are of another text than the one to train on; write them anew."
            )
        return self.batch(draw_windows(self.n, T, B, step, seed)[0])


def spread_rest(log_p: Tensor, token: Tensor, V: int) -> Tensor:
    """Log-probabilities (..., V) from those of k tokens (..., k): what is left of one is shared by all others alike."""
    k = log_p.shape[-1]
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=1e-6)  # (..., 1)
    others = (rest / max(V - k, 1)).log().clamp(min=LEAST)
    return others.expand(*log_p.shape[:-1], V).scatter(-1, token, log_p)
