"""Train a tiny model, being killed again and again: `python kill_training.py FOLDER`.

For test_train_state. Writes FOLDER/killed.json and FOLDER/whole.json: the losses and the
weights of the killed run, and of one left alone.
Each life is a fork of this process, because a fresh Python takes seconds to import torch.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # an optimizer imports it at its first step: here once, not in every life

from gptlite.checkpoints import read_tensors
from gptlite.corpus import CharTokenizer, Corpus
from gptlite.model import GPT, GPTConfig
from gptlite.train import TrainConfig, next_token_loss, train

TEXT = "the quick brown fox jumps over the lazy dog; " * 50
STEPS = 25


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def write_half(part, content):
    with part.open("wb") as file:
        file.write(content[: len(content) // 2])
    die()


def at_call(n, deadly, harmless):
    """The function `harmless`, but `deadly` at its n-th call."""
    calls = iter(range(1, 10**6))
    return lambda *args: deadly(*args) if next(calls) == n else harmless(*args)


def live(state, moment=None):
    """One life of the run, ended at `moment` or when it has finished and told its result."""
    loss_fn = at_call(3, die, next_token_loss) if moment == "in a step" else next_token_loss
    if moment == "while writing":
        Path.write_bytes = at_call(2, write_half, Path.write_bytes)
    if moment == "between writing and renaming":
        os.replace = at_call(2, die, os.replace)
    tokenizer = CharTokenizer(TEXT)
    tokens = tokenizer.encode(TEXT).to(torch.int16)
    corpus = Corpus("fox", tokens[:1800], tokens[1800:], tokenizer)
    torch.manual_seed(3)
    model = GPT(
        GPTConfig(
            n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=len(tokenizer), dropout=0.1
        )
    )
    config = TrainConfig(steps=STEPS, batch_size=4, warmup=2)
    log = train(
        model, corpus, config, loss_fn=loss_fn, state_path=state, save_every=1, eval_every=10
    )
    weights = hashlib.sha256(
        b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    ).hexdigest()
    state.with_suffix(".json").write_text(
        json.dumps([log["train_loss"], log["val_loss"], weights])
    )


def fork(*args):
    pid = os.fork()
    if pid == 0:
        live(*args)
        os._exit(0)
    return pid


def main(folder):
    torch.set_num_threads(1)
    random.seed(1)
    state, done = folder / "killed.state", 0
    for moment in [
        "in a step",
        "while writing",
        "between writing and renaming",
        *(random.random() / 5 for _ in "12345"),
    ]:
        pid = fork(state, moment)
        if isinstance(moment, float):  # whatever it is doing after so many seconds
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert status == signal.SIGKILL or isinstance(moment, float), (
            f"survived being killed {moment}"
        )
        before, done = (
            done,
            len(read_tensors(state)[1]["log"]["train_loss"]) if state.exists() else 0,
        )
        assert done >= before, f"{before} steps were saved, and after a kill {done}"
        assert done < STEPS or isinstance(moment, float), (
            "the run was over before it could be killed"
        )
    for path in (state, folder / "whole.state"):
        assert os.waitpid(fork(path), 0)[1] == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
