"""GPTlite against Hugging Face's GPT-2, attention written out by hand, and itself."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptlite.checkpoints import from_hugging_face, to_hugging_face
from gptlite.kv_cache import KVCache
from gptlite.model import (
    GPT,
    GPT2_SMALL,
    GPT2_XL,
    GPTConfig,
    causal_mask,
    check_tied,
    naive_attention,
    sdpa_attention,
    watch,
)

SHAPES = [
    {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "vocab_size": 5},
    {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 17, "vocab_size": 65},
    {"n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 101},
]


def prompt(V, B, T, seed=0):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def random_weights(model, seed):
    """The same module with weights so large that every part of it shows in the logits."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attention", [naive_attention, sdpa_attention])
def test_agrees_with_hugging_face_taking_its_weights(shape, attention):
    transformers = pytest.importorskip("transformers")
    sizes = {k: shape[k] for k in ("n_layer", "n_head", "n_embd", "vocab_size")}
    config = transformers.GPT2Config(
        n_positions=shape["block_size"], bos_token_id=None, eos_token_id=None, **sizes
    )
    theirs = random_weights(transformers.GPT2LMHeadModel(config), 1)
    ours = from_hugging_face(theirs).set_attention(attention)
    for T in (1, shape["block_size"]):
        idx = prompt(shape["vocab_size"], 2, T)
        torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_hugging_face_giving_its_weights(shape):
    pytest.importorskip("transformers")
    ours = random_weights(GPT(GPTConfig(**shape)), 2)
    theirs = to_hugging_face(ours)
    idx = prompt(shape["vocab_size"], 2, shape["block_size"])
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=0)
    assert theirs.lm_head.weight is theirs.transformer.wte.weight  # tied there as well
    back = from_hugging_face(theirs)
    assert back.config == ours.config
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), back.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"activation_function": "relu"}, "activation_function is relu"),
        ({"n_inner": 99}, "n_inner is 99"),
        ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon is 0.001"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    ],
)
def test_a_variant_of_gpt2_is_refused_rather_than_computed_wrong(change, named):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=5, **change
    )
    with pytest.raises(ValueError, match=re.escape(f"the model's {named}, but GPT-2's")):
        from_hugging_face(transformers.GPT2LMHeadModel(config))


def test_grouped_queries_do_not_fit_into_gpt2(make_model):
    with pytest.raises(
        ValueError,
        match=r"GPT-2 has no grouped queries, but the model has 2 KV heads for 4 heads\.",
    ):
        to_hugging_face(make_model(n_kv_head=2))


@pytest.mark.parametrize(
    ("change", "widths"), [({"head_size": 3}, "12 and 64"), ({"n_hidden": 20}, "16 and 20")]
)
def test_other_widths_do_not_fit_into_gpt2(make_model, change, widths):
    with pytest.raises(
        ValueError, match=f"as wide as its 16 channels .* the model's are {widths} wide"
    ):
        to_hugging_face(make_model(n_head=4, n_embd=16, **change))


def test_widths_of_heads_and_mlp_are_free():
    config = GPTConfig(
        n_layer=2, n_head=3, n_embd=16, block_size=8, vocab_size=11, head_size=5, n_hidden=7
    )
    model, idx = GPT(config).eval(), torch.randint(11, (2, 8))
    assert model.h[0].attn.c_attn.weight.shape == (45, 16) and model.h[
        0
    ].attn.c_proj.weight.shape == (16, 15)
    assert model.h[1].mlp.c_fc.weight.shape == (7, 16) and (config.head_dim, config.hidden) == (
        5,
        7,
    )
    cache = KVCache(config, B=2, max_len=8)
    parts = [model(part, cache) for part in idx.split(3, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(idx), atol=1e-5, rtol=1e-5)


def attention_by_hand(q, k, v):
    """One query, head and sequence at a time, in float64, sharing nothing with the package."""
    (B, H, Tq, D), (H_kv, Tk) = q.shape, k.shape[1:3]
    y = torch.zeros(B, H, Tq, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h * H_kv // H  # consecutive heads share keys and values
            for i in range(Tq):
                seen = Tk - Tq + i + 1  # the last query sees every key
                weights = [
                    math.exp(q[b, h, i].double() @ k[b, g, j].double() / D**0.5)
                    for j in range(seen)
                ]
                y[b, h, i] = sum(
                    w / sum(weights) * v[b, g, j].double() for j, w in enumerate(weights)
                )
    return y


@given(
    B=st.integers(1, 2),
    H_kv=st.integers(1, 3),
    queries_per_key=st.integers(1, 3),
    D=st.sampled_from([1, 4, 8]),
    Tq=st.integers(1, 5),
    past=st.integers(0, 5),
)
def test_both_attentions_are_the_equation(B, H_kv, queries_per_key, D, Tq, past):
    torch.manual_seed(0)
    q = torch.randn(B, H_kv * queries_per_key, Tq, D)
    k, v = torch.randn(2, B, H_kv, past + Tq, D)
    expected = attention_by_hand(q, k, v).float()
    for attention in (naive_attention, sdpa_attention):
        torch.testing.assert_close(attention(q, k, v), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_grouped_queries_equal_all_heads_with_the_keys_copied(make_model):
    """Weights of a grouped model copied into a model with all heads give the same logits."""
    few = make_model(n_kv_head=2)
    many = make_model(n_kv_head=4)
    many.load_state_dict(
        {k: v for k, v in few.state_dict().items() if "c_attn" not in k}, strict=False
    )
    for a, b in zip(few.h, many.h, strict=True):
        for name in ("weight", "bias"):
            q, k, v = getattr(a.attn.c_attn, name).split([32, 16, 16])
            k, v = (
                t.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for t in (k, v)
            )
            getattr(b.attn.c_attn, name).copy_(torch.cat([q, k, v]))
    idx = prompt(17, 2, 24)
    torch.testing.assert_close(few(idx), many(idx), atol=1e-5, rtol=1e-5)
    assert few.n_params() < many.n_params()


@pytest.mark.parametrize(("Tq", "Tk"), [(1, 1), (1, 4), (3, 3), (2, 5)])
def test_the_mask_is_a_rectangle(Tq, Tk):
    expected = [[j <= i + Tk - Tq for j in range(Tk)] for i in range(Tq)]
    assert causal_mask(Tq, Tk).tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("attention", [naive_attention, sdpa_attention])
def test_no_position_sees_its_future(make_model, attention):
    model = make_model(n_kv_head=2).set_attention(attention)
    a, b = prompt(17, 1, 24), prompt(17, 1, 24, seed=1)
    b[:, :10] = a[:, :10]
    assert torch.equal(model(a)[:, :10], model(b)[:, :10])
    assert not torch.allclose(model(a)[:, 10:], model(b)[:, 10:])


@torch.no_grad()
def test_every_token_and_its_position_reach_the_last_logits(make_model):
    model = make_model()
    idx = prompt(17, 1, 24)
    last = model(idx)[:, -1]
    for t in range(24):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % 17
        assert not torch.allclose(model(changed)[:, -1], last)
    assert not torch.allclose(model(idx.flip(1).roll(-1, 1))[:, -1], last)


def test_every_layer_norm_adds_gpt2s_epsilon_to_the_variance(make_model):
    """By hand in float64; inputs so small that 1e-6, or none, would double the answer."""
    norms = [m for m in make_model().modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 2 * 2 + 1
    x = 1e-3 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for norm in norms:
        for row, found in zip(x.double(), norm(x), strict=True):
            mean = sum(row.tolist()) / 32
            variance = sum((n - mean) ** 2 for n in row.tolist()) / 32
            expected = (row - mean) / math.sqrt(variance + 1e-5) * norm.weight + norm.bias
            torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_last_only_is_the_last_of_all(make_model):
    model = make_model()
    idx = prompt(17, 3, 9)
    logits = model(idx, last_only=True)
    assert logits.shape == (3, 1, 17)
    torch.testing.assert_close(logits, model(idx)[:, -1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_last_only_spares_the_heads_work(make_model):
    """The point of it: the head, the widest matrix, sees one position."""
    model, seen = make_model(), []
    model.lm_head.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].shape[1])
    )
    model(prompt(17, 1, 9), last_only=True)
    assert seen == [1]


def test_parameters_are_counted_once():
    assert GPT(GPTConfig()).n_params() == 10_770_816
    with torch.device("meta"):
        assert GPT(GPT2_SMALL).n_params() == 124_439_808  # OpenAI's "124M"
        assert GPT(GPT2_XL).n_params() == 1_557_611_200  # and "1558M"
    model = GPT(GPTConfig())
    assert model.lm_head.weight is model.wte.weight


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig())
    small = 0.02 / math.sqrt(2 * 6)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            expected = small if "c_proj" in name else 0.02
            assert abs(p.std().item() / expected - 1) < 0.02, name
        else:
            assert torch.equal(
                p,
                torch.ones_like(p) if re.search(r"ln_.*weight", name) else torch.zeros_like(p),
            ), name
    loss = torch.nn.functional.cross_entropy(
        model(prompt(65, 1, 64)).flatten(0, 1), prompt(65, 1, 64, seed=1)[0]
    )
    assert abs(loss.item() - math.log(65)) < 0.2  # it knows nothing yet


def test_dropout_works_in_training_only(make_model):
    model, idx = make_model(dropout=0.5), prompt(17, 1, 9)
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))
    torch.manual_seed(0)
    first = model(idx)
    torch.manual_seed(0)
    assert torch.equal(model(idx), first)


def test_dropout_stands_on_the_embedding_and_on_each_residual_branch(make_model):
    model, seen = make_model(dropout=0.5).train(), []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, inputs, output: seen.append(module.p))
    model(prompt(17, 1, 9))
    assert seen == [0.5] * (1 + 2 * model.config.n_layer)


def test_set_attention_reaches_every_layer(make_model):
    model, calls = make_model(n_layer=3), []

    def counting(q, k, v, mask=None):
        calls.append(q.shape)
        return naive_attention(q, k, v, mask)

    assert model.set_attention(counting) is model
    model(prompt(17, 2, 5))
    assert calls == [(2, 4, 5, 8)] * 3


@pytest.mark.parametrize("attention", [naive_attention, sdpa_attention])
def test_a_mask_says_which_keys_are_seen(attention):
    """What is hidden may hold anything: the answer is that of the keys that are seen, alone."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    seen = torch.tensor([True, True, False, True, False, False])
    expected = naive_attention(q, k[:, :, seen], v[:, :, seen])
    k[:, :, ~seen], v[:, :, ~seen] = 1e4, -1e4
    torch.testing.assert_close(attention(q, k, v, seen[None]), expected)


def test_swap_linears_reaches_each_one_and_keeps_the_tied_head(make_model):
    model, expected = make_model(n_layer=3), make_model(n_layer=3)(prompt(17, 2, 5))
    swapped = []

    class Swapped(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight, self.bias = linear.weight, linear.bias
            swapped.append(self)

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight, self.bias)

    names = list(model.state_dict())
    assert model.swap_linears(Swapped) is model
    assert len(swapped) == 3 * 4 + 1
    assert not any(type(m) is torch.nn.Linear for m in model.modules())
    assert list(model.state_dict()) == names
    assert model.lm_head.weight is model.wte.weight
    assert torch.equal(model(prompt(17, 2, 5)), expected)
    with pytest.raises(ValueError, match="the model has no Linear left to swap"):
        model.swap_linears(Swapped)  # a second kind would silently not be used


def test_swap_linears_swaps_those_that_are_chosen_by_name(make_model):
    model = make_model()
    model.swap_linears(
        lambda linear: torch.nn.Sequential(linear),
        where=lambda name, linear: name.startswith("h.1.") and linear.out_features == 32,
    )
    swapped = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Sequential)]
    assert swapped == ["h.1.attn.c_proj", "h.1.mlp.c_proj"]
    with pytest.raises(ValueError, match=r"none is to be swapped of the Linears h\.0\.attn"):
        model.swap_linears(torch.nn.Sequential, where=lambda name, linear: False)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_swap_that_fails_leaves_the_model_as_it_was(make_model, error):
    """Half of it done would be finished with another kind the next time, without a word."""
    model, made = make_model(), []

    def make(linear):
        if len(made) == 4:
            raise error
        made.append(linear)
        return torch.nn.Sequential(linear)

    before = dict(model.named_modules())
    with pytest.raises(error):
        model.swap_linears(make)
    assert dict(model.named_modules()) == before


def test_what_is_watched_is_seen_until_the_watch_ends(make_model):
    model, idx, seen = make_model(), prompt(17, 1, 5), []
    expected = model(idx)
    heads = [block.attn.c_proj for block in model.h]
    with watch(heads, lambda module, inputs, output: seen.append((module, *inputs, output))):
        model(idx)
    model(idx)
    assert [module for module, _, _ in seen] == heads
    for module, x, y in seen:
        assert torch.equal(module(x), y)
    with watch([model.ln_f], lambda module, inputs, output: torch.zeros_like(output)):
        assert not model(idx).any()  # what it returns takes the output's place
    assert torch.equal(model(idx), expected)


def test_a_watch_that_fails_leaves_nothing_behind(make_model):
    model = make_model()

    def fail(module, inputs, output):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watch(model.h, fail):
        model(prompt(17, 1, 5))
    with pytest.raises(AttributeError), watch([*model.h, None], fail):
        pass
    model(prompt(17, 1, 5))


def part(model, how):
    """Part a model's head from its embedding as it happens in three ways."""
    if how == "set":
        model.lm_head = torch.nn.Linear(32, 17, bias=False)
    elif how == "assign":
        tensors = {n: t.clone() for n, t in model.state_dict().items()}
        model.load_state_dict(tensors, assign=True)
    else:
        model.to("meta").to_empty(device="cpu")
        for p in model.parameters():
            torch.nn.init.ones_(p)
    assert model.lm_head.weight is not model.wte.weight


@pytest.mark.parametrize("how", ["assign", "to_empty"])
def test_a_head_that_is_equal_is_tied_again(make_model, how):
    model = make_model()
    part(model, how)
    check_tied(model)
    assert model.lm_head.weight is model.wte.weight
    check_tied(model)


@pytest.mark.parametrize("how", ["set", "assign", "to_empty"])
def test_a_head_of_its_own_is_refused_and_kept(make_model, how):
    model = make_model()
    part(model, how)
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1
    before = model.lm_head.weight
    with pytest.raises(ValueError, match=r"lm_head\.weight is another matrix than wte\.weight"):
        check_tied(model)
    assert model.lm_head.weight is before


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"device": "meta"}])
def test_a_head_of_another_kind_is_refused(make_model, change):
    model = make_model()
    model.lm_head.weight = torch.nn.Parameter(model.wte.weight.detach().to(**change))
    with pytest.raises(ValueError, match=r"lm_head\.weight is another matrix than wte\.weight"):
        check_tied(model)


def test_a_head_with_a_bias_is_refused(make_model):
    model = make_model()
    model.lm_head.bias = torch.nn.Parameter(torch.ones(17))
    with pytest.raises(ValueError, match="the model's head has a bias"):
        check_tied(model)


def test_more_tokens_than_positions(make_model):
    with pytest.raises(
        ValueError, match=r"25 tokens are more than the model's block_size of 24\."
    ):
        make_model()(prompt(17, 1, 25))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_layer": 0}, "n_layer is 0, but must be at least 1."),
        ({"n_head": -2}, "n_head is -2, but must be at least 1."),
        ({"block_size": 0}, "block_size is 0, but must be at least 1."),
        ({"vocab_size": 0}, "vocab_size is 0, but must be at least 1."),
        ({"n_kv_head": 0}, "n_kv_head is 0, but must be at least 1."),
        ({"head_size": 0}, "head_size is 0, but must be at least 1."),
        ({"n_hidden": 0}, "n_hidden is 0, but must be at least 1."),
        ({"n_embd": 100}, "n_embd is 100, which n_head = 6 does not divide."),
        ({"n_kv_head": 4}, "n_head is 6, which n_kv_head = 4 does not divide."),
        ({"n_kv_head": 12}, "n_head is 6, which n_kv_head = 12 does not divide."),
        ({"dropout": 1.0}, "dropout is 1.0, but must be at least 0 and below 1."),
        ({"dropout": -0.1}, "dropout is -0.1, but must be at least 0 and below 1."),
    ],
)
def test_a_shape_that_cannot_be(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GPTConfig(**config)


def test_a_configuration_cannot_change_under_a_model():
    with pytest.raises(AttributeError):
        GPTConfig().n_layer = 3
