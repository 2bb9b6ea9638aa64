"""Masks: as many zeros as asked, of the smallest weights, that survive all training."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st
from sums import SHAPE, new_model

from gptlite.checkpoints import load, save
from gptlite.pruning.masks import (
    MaskedLinear,
    bake_masks,
    gradual_pruning,
    magnitude_mask,
    prune_weights,
    sparsity_at,
    two_of_four_mask,
)
from gptlite.pruning.sparse_linear import BitmapLinear
from gptlite.train import TrainConfig, next_token_loss, train

QUICK = TrainConfig(steps=8, batch_size=4, warmup=2)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def share(sparsity):
    return partial(magnitude_mask, sparsity=sparsity)


def masked(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, MaskedLinear)}


# Which weights


@given(st.integers(1, 6), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
def test_exactly_the_smallest_go(N, K, sparsity, seed):
    weight = random(N, K, seed=seed)
    mask = magnitude_mask(weight, sparsity)
    assert mask.dtype == torch.bool and mask.shape == weight.shape
    assert int((~mask).sum()) == round(sparsity * N * K)
    if mask.any() and not mask.all():
        assert weight[mask].abs().min() >= weight[~mask].abs().max()


def test_weights_that_are_all_alike_are_counted_all_the_same():
    assert int(magnitude_mask(torch.ones(4, 5), 0.3).sum()) == 14


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_two_of_each_four_stay_and_they_are_the_largest(N, fours, seed):
    weight = random(N, 4 * fours, seed=seed)
    groups, mask = weight.abs().view(N, -1, 4), two_of_four_mask(weight).view(N, -1, 4)
    assert (mask.sum(-1) == 2).all()
    kept, gone = groups[mask].view(N, -1, 2), groups[~mask].view(N, -1, 2)
    assert (kept.amin(-1) >= gone.amax(-1)).all()


def test_the_schedule_begins_at_nothing_ends_at_all_and_slows_down():
    path = [sparsity_at(step, 10, 0.8) for step in range(13)]
    assert path[0] == 0 and path[10] == path[12] == 0.8
    steps = [b - a for a, b in zip(path[:11], path[1:11], strict=False)]
    assert steps == sorted(steps, reverse=True) and steps[-1] > 0


def test_half_way_an_eighth_is_left_to_go():
    """0.8 (1 - (1/2)^3) after half of the steps, 0.8 (1 - (1/4)^3) after three quarters."""
    assert sparsity_at(5, 10, 0.8) == pytest.approx(0.7)
    assert sparsity_at(6, 8, 0.8) == pytest.approx(0.7875)


# They stay zero


def test_the_twin_with_zeros_computes_the_same():
    model, twin, idx = new_model(), new_model(), torch.randint(SHAPE.vocab_size, (2, 8))
    prune_weights(model, share(0.6))
    for name, layer in masked(model).items():
        twin.get_submodule(name).weight.data *= layer.mask
    assert torch.equal(model(idx), twin(idx))
    assert len(masked(model)) == 4 * SHAPE.n_layer
    bake_masks(model)
    assert torch.equal(model(idx), twin(idx)) and not masked(model)
    assert model.lm_head.weight is model.wte.weight and (model.wte.weight != 0).all()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("mask_of", [share(0.5), two_of_four_mask])
def test_masks_survive_training_saving_and_resuming(tmp_path, corpus, optimizer, mask_of):
    config = replace(QUICK, optimizer=optimizer)
    path = tmp_path / "run.state"
    whole, parts = (prune_weights(new_model(), mask_of) for _ in range(2))
    masks = {n: m.mask.clone() for n, m in masked(whole).items()}
    train(whole, corpus, config, eval_every=0)
    train(parts, corpus, config, eval_every=0, state_path=path, stop_after=3, save_every=1)
    again = prune_weights(
        new_model(7), share(0.1)
    )  # other weights and masks, until the state is read
    train(again, corpus, config, eval_every=0, state_path=path)
    for name, layer in masked(whole).items():
        assert torch.equal(layer.mask, masks[name]) and torch.equal(
            masked(again)[name].mask, masks[name]
        )
        assert torch.equal(layer.weight, masked(again)[name].weight)
    baked = bake_masks(whole)
    save(tmp_path / "model.safetensors", baked, corpus.tokenizer, {})
    read = load(tmp_path / "model.safetensors").model
    for name, mask in masks.items():
        weight = read.get_submodule(name).weight
        assert torch.equal(weight != 0, mask & (weight != 0)) and int(
            (weight == 0).sum()
        ) >= int((~mask).sum())
        assert (weight[mask] != 0).float().mean() > 0.99


def test_what_is_masked_gets_no_gradient(corpus):
    model = prune_weights(new_model(), share(0.5))
    x = corpus.val[:64].view(8, 8).long()
    next_token_loss(model, x, x).backward()
    for layer in masked(model).values():
        assert (layer.weight.grad[~layer.mask] == 0).all() and (
            layer.weight.grad[layer.mask] != 0
        ).any()


def test_masking_anew_takes_more_and_keeps_what_is_gone():
    model = prune_weights(new_model(), share(0.3))
    before = {n: m.mask.clone() for n, m in masked(model).items()}
    for layer in masked(model).values():
        layer.weight.data[~layer.mask] = 9.0  # what an optimizer may have left behind the mask
    prune_weights(model, share(0.6))
    for name, layer in masked(model).items():
        assert not (layer.mask & ~before[name]).any()
        assert int((~layer.mask).sum()) == round(0.6 * layer.mask.numel())


@pytest.mark.parametrize("already", [False, True])
def test_masks_that_fail_half_way_leave_the_model_as_it_was(already):
    model, seen = new_model(), []
    if already:
        prune_weights(model, share(0.3))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]

    def interrupted(weight):
        seen.append(weight)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return magnitude_mask(weight, 0.9)

    with pytest.raises(KeyboardInterrupt):
        prune_weights(model, interrupted)
    with pytest.raises(ValueError, match="the mask is"):  # a mask of another shape, at last
        prune_weights(model, lambda w: (w != 0)[:, : 16 if w.shape[1] == 16 else 1])
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()


def test_masking_anew_keeps_the_modules():
    """Which a compiled model, or one of several processes, holds on to."""
    model = prune_weights(new_model(), share(0.3))
    before = masked(model)
    prune_weights(model, share(0.6))
    assert all(masked(model)[name] is layer for name, layer in before.items())


def test_blocks_without_linears_have_nothing_to_mask():
    model = new_model().swap_linears(BitmapLinear)
    with pytest.raises(ValueError, match="the blocks have no Linear to mask"):
        prune_weights(model, share(0.5))


def test_gradually_step_by_step_and_across_an_interruption(tmp_path, corpus):
    def options(path=None):
        return {
            "before_step": gradual_pruning(0.75, 6, every=2),
            "eval_every": 0,
            "state_path": path,
        }

    whole, parts, again = (prune_weights(new_model(), share(0)) for _ in range(3))
    seen, take_away = [], gradual_pruning(0.75, 6, every=2)

    def watched(model, step):
        take_away(model, step)
        seen.append([m.mask.clone() for m in masked(model).values()])

    train(whole, corpus, QUICK, **options() | {"before_step": watched})
    shares = [1 - masks[0].float().mean().item() for masks in seen]
    numbers = seen[0][0].numel()
    expected = [
        round(sparsity_at(n, 6, 0.75) * numbers) / numbers for n in (0, 0, 2, 2, 4, 4, 6, 6)
    ]
    assert shares == pytest.approx(expected)
    for before, after in zip(seen[:-1], seen[1:], strict=True):  # what is gone stays away
        assert not any((b & ~a).any() for a, b in zip(before, after, strict=True))
    train(parts, corpus, QUICK, **options(tmp_path / "run.state"), stop_after=3, save_every=3)
    train(again, corpus, QUICK, **options(tmp_path / "run.state"))
    for name, layer in masked(whole).items():
        assert torch.equal(layer.mask, masked(again)[name].mask)
        assert torch.equal(layer.weight, masked(again)[name].weight)


# Storage


def test_zeros_alone_save_nothing():
    model = new_model()
    held = sum(p.nbytes for p in model.parameters())
    baked = bake_masks(prune_weights(model, share(0.9)))
    assert sum(p.nbytes for p in baked.parameters()) == held


# What is refused


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan")])
def test_a_sparsity_that_is_none(sparsity):
    with pytest.raises(
        ValueError, match=re.escape(f"the sparsity is {sparsity}, but must be from 0")
    ):
        magnitude_mask(torch.ones(2, 2), sparsity)


@pytest.mark.parametrize("wrong", [(1.5, 4, 1), (-0.5, 4, 1), (0.5, 0, 1), (0.5, 4, 0)])
def test_a_schedule_that_is_none(wrong):
    with pytest.raises(ValueError, match="from 0 to 1, and at least 1, are right"):
        gradual_pruning(*wrong)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="rows of 6 weights cannot be cut into fours"):
        two_of_four_mask(torch.ones(2, 6))
    linear = nn.Linear(4, 2)
    for mask in (torch.ones(4, 2) > 0, torch.ones(2, 4)):
        with pytest.raises(
            ValueError,
            match=r"the mask is \(\d, \d\) torch\.\w+, but must be \(2, 4\) torch.bool",
        ):
            MaskedLinear(linear, mask)
