"""Training through rounded weights, and beside them: gradients for the right numbers alone."""

import copy
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gptlite.distillation.label_files import fingerprint
from gptlite.quantization.grids import INT4, INT8, Grid, round_to_nearest
from gptlite.quantization.training import LoRALinear, NF4Linear, QATLinear, nf4_levels, qlora
from gptlite.train import next_token_loss

CLOSE = {"atol": 2e-6, "rtol": 2e-5}
BITSANDBYTES = [
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
]  # fmt: skip


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(K=64, N=8, bias=True):
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=bias)


def batch(seed=0):
    """Texts of a model's size in which each token tells the next."""
    start = torch.randint(17, (8, 1), generator=torch.Generator().manual_seed(seed))
    tokens = (start + 3 * torch.arange(13)) % 17
    return tokens[:, :-1], tokens[:, 1:]


def learn(model, steps=30, lr=0.01):
    """The losses before and after some steps on one batch."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    losses = []
    for _ in range(steps):
        loss = next_token_loss(model, *batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


# through the rounding


@given(
    st.builds(Grid, st.integers(2, 8), st.sampled_from([None, 8, 64]), st.booleans()),
    st.booleans(),
    st.integers(0, 9),
)
def test_it_computes_with_the_nearest_points_of_the_grid(grid, bias, seed):
    linear, x = make(bias=bias), random(2, 3, 64, seed=seed)
    nearest = round_to_nearest(linear.weight.detach(), grid).dequantize()
    torch.testing.assert_close(
        QATLinear(linear, grid)(x), F.linear(x, nearest, linear.bias), **CLOSE
    )


@pytest.mark.parametrize("grid", [INT8, INT4, Grid(2, 64), Grid(3, None, symmetric=False)])
def test_it_learns_as_a_linear_that_has_the_rounded_weight(grid):
    linear, x, wanted = make(), random(5, 64), random(5, 8, seed=1)
    twin = copy.deepcopy(linear)
    twin.weight.data = round_to_nearest(linear.weight.detach(), grid).dequantize()
    grads = []
    for layer, own in (
        (QATLinear(linear, grid), x.clone().requires_grad_()),
        (twin, x.clone().requires_grad_()),
    ):
        (layer(own).tanh() - wanted).square().sum().backward()
        grads.append((layer.weight.grad, layer.bias.grad, own.grad))
    for mine, theirs in zip(*grads, strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_the_weight_that_learns_is_the_one_in_full_precision():
    linear = make()
    before, layer = linear.weight.detach().clone(), QATLinear(linear, Grid(2, 64))
    assert layer.weight is linear.weight and layer.bias is linear.bias
    layer(random(5, 64)).sum().backward()
    assert torch.equal(layer.weight, before)
    torch.optim.SGD(layer.parameters(), 1e-4).step()  # too small a step for any code to change
    assert not torch.equal(layer.weight, before)
    assert layer.state_dict().keys() == linear.state_dict().keys() == {"weight", "bias"}


def test_a_model_trains_through_rounding_under_the_names_that_it_had(make_model):
    model = make_model()
    names = list(model.state_dict())
    twin = copy.deepcopy(model).swap_linears(lambda linear: QATLinear(linear, Grid(3, 8)))
    assert list(twin.state_dict()) == names
    assert twin.lm_head.weight is twin.wte.weight
    first, last = learn(twin)
    assert last < 0.5 * first
    model.load_state_dict(twin.state_dict())  # and is a plain one again
    for linear in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        linear.weight.data = round_to_nearest(linear.weight.detach(), Grid(3, 8)).dequantize()
    model.wte.weight = nn.Parameter(
        twin.wte.weight.detach().clone()
    )  # which is not rounded where it is looked up
    with torch.no_grad():
        torch.testing.assert_close(model(batch()[0]), twin(batch()[0]), atol=1e-3, rtol=1e-3)


def test_weights_that_are_no_numbers_are_refused_in_training():
    linear = make()
    linear.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the weight has 1 numbers that are infinite or NaN"):
        QATLinear(linear, INT4)(random(1, 64))


# NF4


def test_the_levels_are_those_that_are_published():
    levels = nf4_levels()
    assert levels.dtype == torch.float32 and levels.shape == (16,)
    torch.testing.assert_close(levels, torch.tensor(BITSANDBYTES), atol=1e-4, rtol=0)
    assert levels[0] == -1 and levels[7] == 0 and levels[15] == 1
    assert (levels.diff() > 0).all()


@given(
    st.integers(1, 5), st.sampled_from([2, 8, 64]), st.integers(1, 3),
    st.sampled_from([0.0, 1e-42, 1e-30, 1e-3, 1.0, 1e30]), st.integers(0, 99),
)  # fmt: skip
def test_every_weight_gets_the_nearest_level(N, group, groups, size, seed):
    linear = nn.Linear(group * groups, N)
    linear.weight.data = size * random(N, group * groups, seed=seed)
    layer, weight = NF4Linear(linear, group), linear.weight.detach().unflatten(-1, (-1, group))
    scale = layer.scale.float()
    torch.testing.assert_close(scale, weight.abs().amax(-1), rtol=2**-8, atol=2e-38)
    points = scale[..., None, None] * nf4_levels()  # (N, groups, 1, 16)
    least = (points - weight[..., None]).abs().amin(-1).flatten(1)
    off = (layer.weight - linear.weight.detach()).abs()
    assert (off <= least * (1 + 1e-4) + 1e-6 * scale.max()).all()


def test_codes_lie_two_in_a_byte():
    linear = nn.Linear(16, 1, bias=False)
    linear.weight.data = nf4_levels()[None].clone()
    layer = NF4Linear(linear, 16)
    assert layer.codes.dtype == torch.uint8
    assert layer.codes.tolist() == [[low | low + 1 << 4 for low in range(0, 16, 2)]]
    assert torch.equal(layer.weight, nf4_levels()[None])


@pytest.mark.parametrize(("K", "N"), [(64, 8), (384, 5)])
def test_a_weight_takes_four_bits_and_a_quarter(K, N):
    layer = NF4Linear(make(K, N))
    assert layer.codes.shape == (N, K // 2) and layer.scale.shape == (N, K // 64)
    assert 8 * (layer.codes.nbytes + layer.scale.nbytes) == 4.25 * N * K
    assert set(layer.state_dict()) == {"codes", "scale", "bias"}


def test_on_normal_weights_it_is_nearer_than_whole_numbers():
    linear = make(64, 256)
    linear.weight.data = random(256, 64)
    errors = [
        (weight - linear.weight.detach()).square().mean()
        for weight in (
            NF4Linear(linear).weight,
            round_to_nearest(linear.weight.detach(), INT4).dequantize(),
        )
    ]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("bias", [True, False])
def test_a_gradient_reaches_the_input_and_no_weight(bias):
    linear = make(bias=bias)
    layer, x = NF4Linear(linear), random(2, 3, 64).requires_grad_()
    y = layer(x)
    assert torch.equal(y, F.linear(x, layer.weight, linear.bias))
    y.backward(random(2, 3, 8, seed=1))
    torch.testing.assert_close(x.grad, random(2, 3, 8, seed=1) @ layer.weight)
    assert not any(p.requires_grad for p in layer.parameters())
    assert linear.weight.requires_grad  # that one is as it was


def test_nf4_computes_in_the_format_of_its_input():
    layer = NF4Linear(make()).to(torch.bfloat16)
    assert layer(random(3, 64).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("K", "group"), [(100, 64), (9, 3), (64, 128)])
def test_groups_that_do_not_fit_nf4_are_refused(K, group):
    message = f"rows of {K} weights cannot be cut into groups of {group}, or those into pairs."
    with pytest.raises(ValueError, match=re.escape(message)):
        NF4Linear(nn.Linear(K, 2), group)


@pytest.mark.parametrize("group", [0, -64])
def test_groups_of_none_are_refused(group):
    with pytest.raises(ValueError, match=rf"groups? (of|is) {group}\b"):
        NF4Linear(make(), group)


def test_weights_that_are_no_numbers_have_no_level():
    for poison in (torch.nan, torch.inf):
        linear = make()
        linear.weight.data[1, :2] = poison
        with pytest.raises(
            ValueError, match="the weight has 2 numbers that are infinite or NaN"
        ):
            NF4Linear(linear)


# beside it


@given(st.integers(1, 8), st.sampled_from([1.0, 16.0]), st.booleans())
def test_an_adapter_begins_as_its_base(rank, alpha, bias):
    base, x = make(bias=bias), random(2, 3, 64)
    layer = LoRALinear(base, (8, 64), rank, alpha)
    assert layer.A.shape == (rank, 64) and layer.B.shape == (8, rank)
    assert torch.equal(layer(x), base(x))
    assert layer.A.abs().min() > 0 and layer.A.std() < 0.3


def test_an_adapter_adds_a_product_of_low_rank():
    base, x = make(), random(3, 64)
    layer = LoRALinear(base, (8, 64), rank=2, alpha=6.0)
    layer.B.data = random(8, 2, seed=1)
    torch.testing.assert_close(
        layer(x), base(x) + 3 * x @ (layer.B @ layer.A).T, atol=1e-4, rtol=1e-4
    )


def test_the_adapter_alone_learns():
    base, x, wanted = NF4Linear(make()), random(16, 64), random(16, 8, seed=1)
    layer = LoRALinear(base, (8, 64), rank=4)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["A", "B"]
    optimizer, losses = torch.optim.Adam([layer.A, layer.B], 0.01), []
    for _ in range(30):
        loss = (layer(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    changed = {
        name for name, t in layer.state_dict().items() if not torch.equal(t, before[name])
    }
    assert changed == {"A", "B"}


@pytest.mark.parametrize("rank", [-1, 0, 9, 64])
def test_ranks_that_a_weight_cannot_have(rank):
    message = f"rank is {rank}, but for a weight of (8, 64) must be from 1 to 8."
    with pytest.raises(ValueError, match=re.escape(message)):
        LoRALinear(make(), (8, 64), rank)
    LoRALinear(make(), (8, 64), 8)


def test_qlora_freezes_all_but_its_adapters(make_model):
    model = make_model()
    original = copy.deepcopy(model)
    assert qlora(model, rank=2, group=8) is model
    for block, other in zip(model.h, original.h, strict=True):
        for parent, was in ((block.attn, other.attn), (block.mlp, other.mlp)):
            for name, linear in was.named_children():
                found = getattr(parent, name)
                assert isinstance(found, LoRALinear) and isinstance(found.base, NF4Linear)
                assert torch.equal(found.base.weight, NF4Linear(linear, 8).weight)
                assert torch.equal(found.base.bias, linear.bias)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * 4 * 2 and all(name.endswith((".A", ".B")) for name in learning)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert numbers == 2 * 2 * sum(
        sum(m.weight.shape) for m in original.h[0].modules() if isinstance(m, nn.Linear)
    )
    assert model.lm_head.weight is model.wte.weight and torch.equal(
        model.lm_head.weight, original.lm_head.weight
    )


def test_qlora_begins_as_the_model_in_nf4_and_learns(make_model):
    model = make_model()
    four = copy.deepcopy(model)
    for block in four.h:
        for parent in (block.attn, block.mlp):
            for name, linear in list(parent.named_children()):
                setattr(parent, name, NF4Linear(linear, 8))
    qlora(model, rank=4, group=8)
    assert torch.equal(model(batch()[0]), four(batch()[0]))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    first, last = learn(model)
    assert last < 0.7 * first
    changed = {
        name for name, t in model.state_dict().items() if not torch.equal(t, before[name])
    }
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


def test_adapters_beside_adapters_are_refused(make_model):
    model = qlora(make_model(), rank=2, group=8)
    with pytest.raises(ValueError, match="already"):
        qlora(model, rank=2, group=8)


def test_qlora_with_groups_that_do_not_fit_is_refused(make_model):
    with pytest.raises(
        ValueError,
        match=r"rows of 32 weights cannot be cut into groups of 64, or those into pairs\.",
    ):
        qlora(make_model())


def test_qlora_that_fails_half_way_leaves_the_model_as_it_was(make_model):
    """The MLP's second matrix has rows of 20, the first three have rows of 32."""
    model = make_model(n_hidden=20)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match="rows of 20 weights cannot be cut into groups of 8"):
        qlora(model, rank=2, group=8)
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())
    qlora(model, rank=2, group=4)


def test_all_is_made_where_the_weight_is():
    linear, x = make(), random(3, 64)
    with torch.device("meta"):  # where all would land that is not said to be elsewhere
        base = NF4Linear(linear)
        assert base.weight.device.type == "cpu"
        nf4_levels.cache_clear()
        assert torch.equal(NF4Linear(linear)(x), base(x))
        layer = LoRALinear(base, (8, 64))
        assert {p.device.type for p in layer.parameters()} == {"cpu"}


def test_nf4_and_adapters_are_loaded_and_make_the_fingerprint():
    other = make()
    other.weight.data.mul_(-2)
    pairs = [(NF4Linear(make()), NF4Linear(other))]
    pairs.append(tuple(LoRALinear(base, (8, 64)) for base in pairs[0]))
    for one, two in pairs:
        assert fingerprint(one) != fingerprint(two)
        two.load_state_dict(one.state_dict())
        assert fingerprint(one) == fingerprint(two)
        assert torch.equal(one(random(3, 64)), two(random(3, 64)))


def test_teachers_on_other_grids_have_other_fingerprints():
    one, two = (QATLinear(make(), Grid(bits, 64)) for bits in (3, 4))
    assert fingerprint(one) != fingerprint(two)


@torch.no_grad()
def test_a_model_with_adapters_answers_in_a_run_in_bfloat16(make_model):
    model = qlora(make_model(), rank=2, group=8)
    exact = model(batch()[0])
    with torch.autocast("cpu", torch.bfloat16):
        found = model(batch()[0])
    assert (found.float() - exact).norm() < 0.1 * exact.norm()
