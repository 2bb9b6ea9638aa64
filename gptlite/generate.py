"""Generating text: the naive loop, and prefill followed by decoding when there is a cache."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gptlite.corpus import CharTokenizer
from gptlite.kv_cache import KVCache
from gptlite.model import GPT


def probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """The distribution (B, V) that `sample` draws from, given logits (B, V); at temperature 0 all of it on one token.

    `top_k` keeps the k likeliest tokens (and what is as likely as the k-th), `top_p` the fewest whose probabilities
    reach p (Holtzman et al., 2020).
    """
    V = logits.shape[-1]
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}, but must be 0 (greedy) or more.")
    if top_k is not None and not 1 <= top_k <= V:
        raise ValueError(f"top_k is {top_k}, but must be from 1 to the vocabulary's {V}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, but must be above 0 and at most 1.")
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), V).float()
    logits = logits.float()
    if top_k is not None:
        kth = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    logits = (
        logits - logits.amax(dim=-1, keepdim=True)
    ) / temperature  # at most 0, so that no temperature overflows
    if top_p is not None and top_p < 1:
        ordered, order = logits.softmax(dim=-1).sort(descending=True)
        drop = (
            ordered.cumsum(dim=-1) - ordered >= top_p
        )  # what stands before it reaches p without it
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return logits.softmax(dim=-1)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token (B, 1) from logits (B, V) as `probabilities` says; temperature 0 takes the likeliest."""
    p = probabilities(logits, temperature, top_k, top_p)
    return (
        p.argmax(dim=-1, keepdim=True)
        if temperature == 0
        else torch.multinomial(p, 1, generator=generator)
    )


def prefill(model: GPT, idx: Tensor, cache: KVCache) -> Tensor:
    """Read a prompt (B, T) into the cache in one pass; logits (B, V) after its last token."""
    return model(idx, cache, last_only=True)[:, -1]


def decode_one_token(model: GPT, token: Tensor, cache: KVCache) -> Tensor:
    """Read one more token (B, 1) into the cache; logits (B, V) after it."""
    return model(token, cache)[:, -1]


def stream(
    model: GPT, idx: Tensor, max_new_tokens: int, cache: KVCache | None = None, **sampling
) -> Iterator[Tensor]:
    """Continue idx (B, T), yielding each new token (B, 1) as soon as it is drawn; `sampling` goes to `sample`.

    Without a cache the whole context is computed anew for each token. With one, the prompt is read once and then one
    token at a time. The text is the same, also past `block_size`: there every position moves with each token, so no
    key can be kept, and the window is read anew into the cache each time.
    """
    block_size = model.config.block_size
    if idx.ndim != 2:
        raise ValueError(
            f"the prompt's shape is {tuple(idx.shape)}, but must be (B, T); idx[None] is a batch of 1."
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but must be at least 0.")
    if not 1 <= idx.shape[1] <= block_size:
        raise ValueError(
            f"the prompt has {idx.shape[1]} tokens, but must have from 1 to block_size = {block_size}."
        )
    if cache is not None and cache.length:
        raise ValueError(
            f"the cache holds {cache.length} tokens of another text; rewind it first."
        )
    if cache is not None and cache.max_len < min(block_size, idx.shape[1] + max_new_tokens):
        raise ValueError(
            f"the cache has room for {cache.max_len} tokens, but the text will have more."
        )
    return _stream(model, idx, max_new_tokens, cache, sampling)


@torch.inference_mode()
def _stream(
    model: GPT, idx: Tensor, max_new_tokens: int, cache: KVCache | None, sampling: dict
) -> Iterator[Tensor]:
    block_size = model.config.block_size
    for _ in range(max_new_tokens):
        window = idx[:, -block_size:]
        if cache is None:
            logits = model(window, last_only=True)[:, -1]
        elif 0 < cache.length < block_size:
            logits = decode_one_token(model, idx[:, -1:], cache)
        else:
            cache.rewind(0)
            logits = prefill(model, window, cache)
        token = sample(logits, **sampling)
        idx = torch.cat([idx, token], dim=1)
        yield token


def generate(
    model: GPT, idx: Tensor, max_new_tokens: int, cache: KVCache | None = None, **sampling
) -> Tensor:
    """Continue idx (B, T) by `max_new_tokens`: tokens (B, T + max_new_tokens); see `stream`."""
    return torch.cat([idx, *stream(model, idx, max_new_tokens, cache, **sampling)], dim=1)


def stream_text(
    model: GPT,
    tokenizer: CharTokenizer,
    prompt: str,
    max_new_tokens: int,
    cache: KVCache | None = None,
    **sampling,
) -> Iterator[str]:
    """Continue a prompt, yielding the text piece by piece."""
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character.")
    idx = tokenizer.encode(prompt)[None].to(model.wpe.weight.device)  # (1, T)
    tokens = stream(
        model, idx, max_new_tokens, cache, **sampling
    )  # here, so that what is wrong is said at once
    return (tokenizer.decode(token[0]) for token in tokens)
