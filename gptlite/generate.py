"""Generating text: the naive loop, and prefill followed by decoding when there is a cache."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gptlite.corpus import CharTokenizer
from gptlite.model import GPT, Cache


class TextCache(Cache, Protocol):
    """What generating asks of a cache beyond what the model does."""

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        ...

    def room_for(self, T: int) -> bool:
        """Whether T more tokens fit."""
        ...

    def rewind(self, length: int = 0) -> None:
        """Forget all but the first `length` tokens."""
        ...


def probabilities(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """The distribution (B, V) that `sample` draws from, given logits (B, V).

    At temperature 0 all of it is on one token. `top_k` keeps the k likeliest tokens (and what
    is as likely as the k-th), `top_p` the fewest whose probabilities, at that temperature,
    reach p (Holtzman et al., 2020).
    """
    V = logits.shape[-1]
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}, but must be 0 (greedy) or more.")
    if top_k is not None and not 1 <= top_k <= V:
        raise ValueError(f"top_k is {top_k}, but must be from 1 to the vocabulary's {V}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, but must be above 0 and at most 1.")
    most = logits.amax(dim=-1, keepdim=True)  # (B, 1), NaN where there is one
    if not most.isfinite().all():
        found = most.flatten().tolist()
        raise ValueError(f"the largest logits are {found}, but must be finite.")
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), V).float()
    logits, most = logits.float(), most.float()
    out = logits == -torch.inf
    if top_k is not None:
        out |= logits < logits.topk(top_k).values[:, -1:]
    # at most 0, so that no temperature overflows; below float32's least one there is no lower
    logits = (logits - most) / max(temperature, torch.finfo(torch.float32).tiny)
    logits = logits.masked_fill(out, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.softmax(dim=-1).sort(descending=True)
        # what stands before a token reaches p without it; before the first stands nothing
        drop = ordered.cumsum(dim=-1) - ordered >= top_p
        drop[:, 0] = False
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return logits.softmax(dim=-1)


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A token (B, 1) drawn from logits (B, V) as `probabilities` says; at 0 the likeliest."""
    p = probabilities(logits, temperature, top_k, top_p)
    if temperature == 0:
        return p.argmax(dim=-1, keepdim=True)
    return torch.multinomial(p, 1, generator=generator)


def prefill(model: GPT, idx: Tensor, cache: Cache) -> Tensor:
    """Read a prompt (B, T) into the cache in one pass; logits (B, V) after its last token."""
    return model(idx, cache, last_only=True)[:, -1]


def decode_one_token(model: GPT, token: Tensor, cache: Cache) -> Tensor:
    """Read one more token (B, 1) into the cache; logits (B, V) after it."""
    return model(token, cache)[:, -1]


def stream(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    cache: TextCache | None = None,
    **sampling: Any,
) -> Iterator[Tensor]:
    """Continue idx (B, T), yielding each token (B, 1) as it is drawn with `sample`'s options.

    Without a cache the whole context is computed anew for each token. With one, the prompt is
    read once and then one token at a time. The text is the same, also past `block_size`: there
    every position moves with each token, so no key can be kept, and the window is read anew
    into the cache each time. A cache that always has room, as a rolling one, goes on instead.
    """
    block_size = model.config.block_size
    if idx.ndim != 2:
        raise ValueError(
            f"the prompt's shape is {tuple(idx.shape)}, but must be (B, T); "
            "idx[None] is a batch of 1."
        )
    if not 1 <= idx.shape[1] <= block_size:
        raise ValueError(
            f"the prompt has {idx.shape[1]} tokens, but must have from 1 to "
            f"block_size = {block_size}."
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but must be at least 0.")
    if cache is not None:
        _check_text(cache, 0)
        # the last token is drawn, but read by nobody
        read = min(block_size, idx.shape[1] + max_new_tokens - 1)
        if not cache.room_for(read):
            raise ValueError(
                f"the cache has no room for the {read} tokens that it has to hold."
            )
    return _stream(model, idx, max_new_tokens, cache, sampling)


@torch.inference_mode()
def _stream(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    cache: TextCache | None,
    sampling: dict[str, Any],
) -> Iterator[Tensor]:
    read = 0  # tokens of this text in the cache
    for _ in range(max_new_tokens):
        window = idx[:, -model.config.block_size :]
        if cache is None:
            logits = model(window, last_only=True)[:, -1]
        else:
            _check_text(cache, read)
            if read and cache.room_for(1):
                logits = decode_one_token(model, idx[:, -1:], cache)
            else:
                cache.rewind(0)
                logits = prefill(model, window, cache)
            read = cache.length
        token = sample(logits, **sampling)
        idx = torch.cat([idx, token], dim=1)
        yield token


def _check_text(cache: TextCache, read: int) -> None:
    """Raise a ValueError if a cache does not hold the `read` tokens that a text left in it."""
    if cache.length != read:
        left = (
            f" where this one left {read}, so give each its own"
            if read
            else "; rewind it first"
        )
        raise ValueError(f"the cache holds {cache.length} tokens of another text{left}.")


def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    cache: TextCache | None = None,
    **sampling: Any,
) -> Tensor:
    """Continue idx (B, T) by `max_new_tokens`: tokens (B, T + max_new_tokens); see `stream`."""
    return torch.cat([idx, *stream(model, idx, max_new_tokens, cache, **sampling)], dim=1)


def stream_text(
    model: GPT,
    tokenizer: CharTokenizer,
    prompt: str,
    max_new_tokens: int,
    cache: TextCache | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """Continue a prompt, yielding the text piece by piece."""
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character.")
    idx = tokenizer.encode(prompt)[None].to(model.wpe.weight.device)  # (1, T)
    # here, so that what is wrong is said at once
    tokens = stream(model, idx, max_new_tokens, cache, **sampling)
    return (tokenizer.decode(token[0]) for token in tokens)
