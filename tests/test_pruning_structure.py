"""The smaller model computes what the larger does with silent parts; importance finds them."""

import copy
import re
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gptlite.checkpoints import load, save
from gptlite.corpus import CharTokenizer
from gptlite.generate import generate
from gptlite.kv_cache import KVCache
from gptlite.model import GPT, GPTConfig
from gptlite.pruning.importance import (
    activation_importance,
    gradient_importance,
    most_important,
)
from gptlite.pruning.masks import magnitude_mask, prune_weights
from gptlite.pruning.shape_search import scaled_config
from gptlite.pruning.structure import greedy_layers, shrink

SHAPE = GPTConfig(n_layer=3, n_head=4, n_embd=16, block_size=8, vocab_size=11)


def new_model(seed=0, **config):
    torch.manual_seed(seed)
    model = GPT(replace(SHAPE, **config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases and LayerNorms, too
    return model


def tokens(seed=0, B=4):
    return torch.randint(
        SHAPE.vocab_size, (B, 8), generator=torch.Generator().manual_seed(seed)
    )


def silenced(model, layers=None, heads=None, neurons=None):
    """The same model with all but the chosen parts set to zero."""
    D = model.config.head_dim
    with torch.no_grad():
        for i, block in enumerate(model.h):
            if heads is not None:
                gone = [h for h in range(model.config.n_head) if h not in heads[i].tolist()]
                for h in gone:
                    block.attn.c_proj.weight[:, h * D : (h + 1) * D] = 0
            if neurons is not None:
                gone = torch.ones(model.config.hidden, dtype=torch.bool)
                gone[neurons[i]] = False
                block.mlp.c_proj.weight[:, gone] = 0
            if layers is not None and i not in layers.tolist():
                for linear in (block.attn.c_proj, block.mlp.c_proj):
                    linear.weight.zero_(), linear.bias.zero_()
    return model


@given(st.data())
def test_the_smaller_model_is_the_silenced_one(data):
    def some(most):
        return data.draw(
            st.lists(st.integers(0, most - 1), min_size=1, max_size=most, unique=True)
        )

    def rows(most):
        n = data.draw(st.integers(1, most))
        return torch.tensor(
            [data.draw(st.permutations(range(most)))[:n] for _ in range(SHAPE.n_layer)]
        )

    layers = torch.tensor(some(SHAPE.n_layer)) if data.draw(st.booleans()) else None
    heads = rows(SHAPE.n_head) if data.draw(st.booleans()) else None
    neurons = rows(4 * SHAPE.n_embd) if data.draw(st.booleans()) else None
    model, idx = new_model(), tokens()
    small = shrink(model, layers, heads, neurons)
    wanted = silenced(new_model(), layers, heads, neurons)(idx)
    torch.testing.assert_close(small(idx), wanted, atol=1e-4, rtol=1e-4)
    assert small.config.n_layer == (SHAPE.n_layer if layers is None else len(layers))
    assert small.config.n_head == (SHAPE.n_head if heads is None else heads.shape[1])
    assert small.config.hidden == (4 * SHAPE.n_embd if neurons is None else neurons.shape[1])
    assert small.config.head_dim == SHAPE.head_dim and small.lm_head.weight is small.wte.weight


def test_all_parts_are_the_same_model_and_the_original_is_left_alone():
    model, idx = new_model(), tokens()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    small = shrink(model)
    assert torch.equal(small(idx), model(idx))
    small.wte.weight.data.zero_()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_shrunk_model_decodes_saves_and_loads(tmp_path):
    numbers = torch.tensor([[0, 2]] * 3)
    small = shrink(new_model(), torch.tensor([0, 2]), numbers, torch.arange(20).repeat(3, 1))
    tokenizer = CharTokenizer("abcdefghijk")
    start = tokens(B=1)[:, :3]
    plain, cached = (
        generate(small, start, 5, cache, temperature=0)
        for cache in (None, KVCache(small.config, max_len=8))
    )
    assert torch.equal(plain, cached)
    save(tmp_path / "small.safetensors", small, tokenizer, {}, dtype=torch.float32)
    again = load(tmp_path / "small.safetensors").model
    assert again.config == small.config and torch.equal(again(start), small(start))


# Importance


@pytest.mark.parametrize("by", ["activation", "gradient"])
def test_parts_that_do_nothing_matter_nothing(by):
    model, D = new_model(), SHAPE.head_dim
    with torch.no_grad():
        qkv = model.h[1].attn.c_attn
        qkv.weight[2 * 16 + D : 2 * 16 + 2 * D] = 0  # the values of head 1
        qkv.bias[2 * 16 + D : 2 * 16 + 2 * D] = 0
        model.h[0].mlp.c_fc.weight[5], model.h[0].mlp.c_fc.bias[5] = 0, 0  # gelu(0) is 0
        for linear in (model.h[2].attn.c_proj, model.h[2].mlp.c_proj):
            linear.weight.zero_(), linear.bias.zero_()
        for ln in (n for n in model.modules() if isinstance(n, nn.LayerNorm)):
            ln.weight[3] = ln.bias[3] = 0
    batches = [(tokens(seed), tokens(seed + 50)) for seed in range(3)]
    found = (
        gradient_importance(model, batches)
        if by == "gradient"
        else activation_importance(model, [x for x, _ in batches])
    )
    assert (
        found.heads.shape == (3, 4)
        and found.neurons.shape == (3, 64)
        and found.layers.shape == (3,)
    )
    assert (
        found.channels.shape == (16,)
        and found.channels.ne(0).sum() == 15
        and found.channels[3] == 0
    )
    assert found.heads[1, 1] == 0 and found.neurons[0, 5] == 0 and found.layers[2].abs() < 1e-6
    assert found.heads[0].min() > 0 and found.layers[:2].min() > 1e-5
    assert not any(
        block._forward_hooks or block.mlp.c_proj._forward_pre_hooks for block in model.h
    )


def test_the_gradient_is_what_a_factor_before_the_answer_does_to_the_loss():
    model, (x, y), h = new_model().double(), (tokens(), tokens(9)), 1e-5
    found = gradient_importance(model, [(x, y)])

    def loss_with(weight, columns, factor):
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[:, columns] *= factor
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
            weight.copy_(kept)
        return loss

    D = SHAPE.head_dim
    for i in range(3):
        for weight, columns, mine in (
            (model.h[i].attn.c_proj.weight, slice(2 * D, 3 * D), found.heads[i, 2]),
            (model.h[i].mlp.c_proj.weight, slice(7, 8), found.neurons[i, 7]),
        ):
            slope = (loss_with(weight, columns, 1 + h) - loss_with(weight, columns, 1 - h)) / (
                2 * h
            )
            assert mine.item() == pytest.approx(abs(slope), rel=1e-3, abs=1e-8)


def test_the_gradient_of_a_channel_is_that_of_all_who_read_it():
    model, (x, y), h = new_model().double(), (tokens(), tokens(9)), 1e-5
    found = gradient_importance(model, [(x, y)]).channels

    def loss_with(factor):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for ln in (n for n in other.modules() if isinstance(n, nn.LayerNorm)):
                ln.weight[5] *= factor
                ln.bias[5] *= factor
            return F.cross_entropy(other(x).flatten(0, 1), y.flatten()).item()

    slope = (loss_with(1 + h) - loss_with(1 - h)) / (2 * h)
    assert found[5].item() == pytest.approx(abs(slope), rel=1e-3, abs=1e-8)


class NormOfSome(nn.Module):
    """A LayerNorm over some of its channels; the others it answers with zero."""

    def __init__(self, ln, some):
        super().__init__()
        self.ln, self.some = ln, some

    def forward(self, x):
        y = torch.zeros_like(x)
        weight, bias = self.ln.weight[self.some], self.ln.bias[self.some]
        y[..., self.some] = F.layer_norm(
            x[..., self.some], weight.shape, weight, bias, self.ln.eps
        )
        return y


@given(st.permutations(range(16)), st.integers(1, 16))
def test_channels_that_go_are_as_if_nobody_read_them(order, n):
    some, model, idx = torch.tensor(sorted(order[:n])), new_model(), tokens()
    small = shrink(model, layers=torch.tensor([0, 2]), channels=torch.tensor(order[:n]))
    wanted = shrink(model, layers=torch.tensor([0, 2]))
    for block in wanted.h:
        block.ln_1, block.ln_2 = NormOfSome(block.ln_1, some), NormOfSome(block.ln_2, some)
    wanted.ln_f = NormOfSome(wanted.ln_f, some)
    torch.testing.assert_close(small(idx), wanted(idx), atol=1e-4, rtol=1e-4)
    assert (
        small.config.n_embd == n
        and small.config.head_dim == 4
        and small.lm_head.weight is small.wte.weight
    )


def test_layers_go_one_after_another():
    model, asked = new_model(), []
    cost = {(0, 1): 3.0, (0, 2): 1.0, (1, 2): 2.0, (0,): 5.0, (2,): 4.0}
    numbers = {id_of(block): i for i, block in enumerate(model.h)}

    def loss(small):
        asked.append(tuple(numbers[id_of(block)] for block in small.h))
        return cost[asked[-1]]

    assert greedy_layers(model, 1, loss).tolist() == [2]
    assert sorted(asked) == [
        (0,),
        (0, 1),
        (0, 2),
        (1, 2),
        (2,),
    ]  # without 1 at first: (1,) is not asked about
    assert greedy_layers(model, 3, loss).tolist() == [0, 1, 2]
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"{n} parts are to stay, but there are 3"):
            greedy_layers(model, n, loss)


def id_of(block):
    """What tells a block from the others, in a copy as well."""
    return block.mlp.c_fc.weight[0, 0].item()


def test_the_most_important_in_order():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [4.0, 3.0, 2.0, 1.0]])
    assert most_important(scores, 2).tolist() == [[1, 3], [0, 1]]
    for n in (0, 5):
        with pytest.raises(ValueError, match=f"{n} parts are to stay, but there are 4"):
            most_important(scores, n)


# Scaling


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 4),
    st.floats(0.01, 1),
    st.sampled_from([None, 1, 2, 3]),
)
def test_scaling_keeps_every_divisibility_and_the_context(L, H, D, scale, kv):
    config = GPTConfig(L, H, H * D, 64, 11, n_kv_head=kv if kv and H % kv == 0 else None)
    kv = config.n_kv_head
    if round(L * scale) < 1 or round(H * scale) < 1:
        with pytest.raises(ValueError, match=r"a scale of .* leaves \d+ layers and \d+ heads"):
            scaled_config(config, scale)
        return
    small = scaled_config(config, scale)
    assert small.n_embd % small.n_head == 0 and small.block_size == 64
    assert small.n_layer == round(L * scale) and small.n_head == round(H * scale)
    assert abs(small.n_embd - H * D * scale) <= small.n_head / 2 or small.head_dim == 1
    assert small.n_head % small.kv_heads == 0 and (kv is None or small.kv_heads <= kv)
    GPT(small)
    assert scaled_config(config, 1) == config


def test_the_steps_to_one_half_become_smaller_each_time():
    shapes = [scaled_config(GPTConfig(), scale) for scale in (1, 0.9, 0.8, 0.7, 0.6, 0.5)]
    widths = [shape.n_embd for shape in shapes]
    assert widths == sorted(set(widths), reverse=True) and widths[-1] == 192
    assert all(shape.block_size == 256 for shape in shapes)
    pruned = replace(SHAPE, head_size=8, n_hidden=20)
    assert (
        scaled_config(pruned, 0.5).n_hidden == 10
        and scaled_config(pruned, 0.5).head_size is None
    )


@pytest.mark.parametrize("scale", [0, -1, 1.5, 0.01])
def test_a_scale_that_leaves_nothing_or_adds_something(scale):
    with pytest.raises(ValueError, match=re.escape(f"a scale of {scale} leaves")):
        scaled_config(SHAPE, scale)


def test_parts_that_are_not_there():
    model = new_model()
    for layers in ([3], [-1], [0, 0], []):
        with pytest.raises(ValueError, match="layers"):
            shrink(model, torch.tensor(layers, dtype=torch.long))
    for heads in (
        torch.tensor([[0], [1]]),
        torch.tensor([[0], [1], [4]]),
        torch.tensor([[1, 1]] * 3),
    ):
        with pytest.raises(ValueError, match="heads"):
            shrink(model, heads=heads)
    with pytest.raises(ValueError, match=r"neurons must be different numbers from 0 to 63"):
        shrink(model, neurons=torch.tensor([[64]] * 3))
    with pytest.raises(ValueError, match=r"channels must be different numbers from 0 to 15"):
        shrink(model, channels=torch.tensor([3, 3]))
    with pytest.raises(
        ValueError, match="heads that share 2 KV heads cannot be taken out one by one"
    ):
        shrink(new_model(n_kv_head=2), heads=torch.tensor([[0]] * 3))


def test_a_head_that_is_another_matrix_is_tied_again_or_refused():
    model, idx = new_model(), tokens()
    wanted = model(idx)
    model.lm_head.weight = nn.Parameter(model.wte.weight.detach().clone())
    assert torch.equal(shrink(model)(idx), wanted)
    model.lm_head.weight = nn.Parameter(model.wte.weight.detach() + 1)
    with pytest.raises(ValueError, match=r"lm_head\.weight is another matrix than wte\.weight"):
        shrink(model)


def test_a_model_with_swapped_parts_is_not_cut():
    model = prune_weights(new_model(), lambda w: magnitude_mask(w, 0.5))
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn is a gptlite\S+MaskedLinear"):
        shrink(model)
