"""What the tests of training share: runs of a few steps of a tiny model."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from sums import VOCABULARY

from gptlite.model import GPT, GPTConfig
from gptlite.train import TrainConfig, train

ROOT = Path(__file__).parent.parent
SHAPE = GPTConfig(
    n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=VOCABULARY, dropout=0.1
)
QUICK = TrainConfig(steps=6, batch_size=4, warmup=2)


def new_model(**config):
    torch.manual_seed(3)
    return GPT(replace(SHAPE, **config))


def quiet(model, corpus, config, **options):
    return train(model, corpus, config, **{"eval_every": 0} | options)


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def run_python(*args):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *args], env=env, cwd=ROOT, capture_output=True, text=True
    )
