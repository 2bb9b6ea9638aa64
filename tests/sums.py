"""A tiny text that a tiny model can learn: sums, in words; and the model."""

from dataclasses import replace

import torch

from gptlite.corpus import CharTokenizer, Corpus
from gptlite.model import GPT, GPTConfig

TEXT = "".join(f"{a} and {b} make {a + b};\n" for a in range(12) for b in range(12))
VOCABULARY = len(set(TEXT))
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=VOCABULARY)


def corpus() -> Corpus:
    """The text cut in two, with a tokenizer of its own characters."""
    tokenizer = CharTokenizer(TEXT)
    tokens = tokenizer.encode(TEXT).short()
    return Corpus("sums", tokens[:2000], tokens[2000:], tokenizer)


def new_model(seed: int = 0, **config: int) -> GPT:
    """A model of SHAPE but for `config`, freshly initialised."""
    torch.manual_seed(seed)
    return GPT(replace(SHAPE, **config))
