"""What a step costs, counted: bytes moved, floating-point operations, operators launched."""

from dataclasses import dataclass

import torch

from gptlite.model import GPTConfig


@dataclass(frozen=True)
class Cost:
    """Bytes read and written, floating-point operations, operators launched; costs add up."""

    bytes: int = 0
    flops: int = 0
    ops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops, self.ops + other.ops)

    @property
    def intensity(self) -> float:
        """FLOPs for each byte: what decides whether memory or arithmetic sets the time."""
        return self.flops / self.bytes


def operator_costs(
    config: GPTConfig,
    Tq: int,
    Tk: int,
    B: int = 1,
    dtype: torch.dtype = torch.float32,
    last_only: bool = True,
    cache: bool = True,
) -> dict[str, Cost]:
    """The cost of each operator, over all layers, to read the last Tq of Tk tokens of B texts.

    An operator reads its inputs, weights included, and writes its output once. A multiply-add
    is 2 FLOPs; only matrix products count, since what is done number by number is little beside
    them. Attention is one fused operator over the whole rectangle Tq x Tk, as PyTorch counts
    it: a kernel that skips what the causal mask hides does up to half less of it when Tq = Tk.
    The mask that `sdpa_attention` builds when 1 < Tq < Tk is not counted.
    """
    _check(config, Tq, Tk, B)
    L, C, V, hidden = config.n_layer, config.n_embd, config.vocab_size, config.hidden
    # channels of all queries, C unless heads have been taken out, and of all keys
    A, KV = config.n_head * config.head_dim, config.kv_heads * config.head_dim
    size, tokens = dtype.itemsize, B * Tq
    last = B if last_only else tokens  # positions whose logits are wanted

    def linear(rows: int, wide: int, out: int, bias: bool = True, times: int = L) -> Cost:
        # weights once, however many rows; each row in and out
        numbers = (wide + bias) * out + rows * (wide + out)
        return Cost(times * numbers * size, times * 2 * rows * wide * out, times)

    def elementwise(numbers: int, times: int = L) -> Cost:
        return Cost(times * numbers * size, 0, times)

    # both kinds of rows read, written, read by the sum; the sum written
    gathered = 4 * tokens * C + 3 * Tq * C
    indices = 8 * (tokens + 2 * Tq)  # int64: tokens read, positions written and read
    # new keys and values, read and written into the cache
    appended = 2 * 2 * tokens * KV if cache else 0
    # queries in, answers out; all keys and values, once for a group
    attended = 2 * tokens * A + 2 * B * Tk * KV
    launches = 3 if cache else 1
    attention = Cost((appended + attended) * size * L, 4 * B * Tq * Tk * A * L, launches * L)
    norms = elementwise(2 * C + 2 * tokens * C, 2 * L) + elementwise(2 * C + 2 * last * C, 1)
    return {
        "embedding": Cost(gathered * size + indices, 0, 4),
        "layer_norm": norms,
        "c_attn": linear(tokens, C, A + 2 * KV),
        "attention": attention,
        "attn.c_proj": linear(tokens, A, C),
        "c_fc": linear(tokens, C, hidden),
        "gelu": elementwise(2 * tokens * hidden),
        "mlp.c_proj": linear(tokens, hidden, C),
        "residual": elementwise(3 * tokens * C, 2 * L),  # two numbers in, their sum out
        "lm_head": linear(last, C, V, bias=False, times=1),
    }


def prefill_cost(
    config: GPTConfig, T: int, B: int = 1, dtype: torch.dtype = torch.float32
) -> Cost:
    """The cost of reading T tokens into a cache, with the logits of the last alone."""
    return sum(operator_costs(config, T, T, B, dtype).values(), Cost())


def decode_cost(
    config: GPTConfig, context: int, B: int = 1, dtype: torch.dtype = torch.float32
) -> Cost:
    """The cost of one token with a cache that attends to `context` tokens, itself included."""
    return sum(operator_costs(config, 1, context, B, dtype).values(), Cost())


def naive_cost(
    config: GPTConfig, context: int, B: int = 1, dtype: torch.dtype = torch.float32
) -> Cost:
    """The cost of one token without a cache: all of `context` is computed anew."""
    return sum(operator_costs(config, context, context, B, dtype, cache=False).values(), Cost())


def _check(config: GPTConfig, Tq: int, Tk: int, B: int) -> None:
    if B < 1:
        raise ValueError(f"B is {B}, but must be at least 1.")
    if not 1 <= Tk <= config.block_size:
        most = f"block_size = {config.block_size}"
        raise ValueError(f"the context is {Tk} tokens, but must be from 1 to {most}.")
    if not 1 <= Tq <= Tk:
        possible = f"from 1 to the context's {Tk} are possible"
        raise ValueError(f"there are {Tq} queries, but {possible}.")
