"""Each loss against its closed form and finite differences; the loops learn what they say."""

import math
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sums import SHAPE, new_model

from gptlite.distillation.losses import (
    WARM,
    CoTraining,
    Distillation,
    Ensemble,
    HiddenMatching,
    forward_kl,
    kl,
    logit_mse,
    mutual_loss,
    reverse_kl,
    with_hidden_state,
)
from gptlite.train import TrainConfig, next_token_loss, train

QUICK = TrainConfig(steps=30, batch_size=8, warmup=2)
LOSSES = [forward_kl, reverse_kl, logit_mse]
TEMPERATURES = st.sampled_from([0.5, 1.0, 2.0, 7.0])


def logits(*shape, seed=0, size=2.0):
    return size * torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def exact(loss):
    """The loss without its cast to float32, for finite differences."""

    def f(z, v, T):
        p, q = ((x / T).log_softmax(-1) for x in (v, z))
        if loss is logit_mse:
            off = z - v
            return (off - off.mean(-1, keepdim=True)).square().mean() / 2
        p, q = (p, q) if loss is forward_kl else (q, p)
        return T**2 * (p.exp() * (p - q)).sum(-1).mean()

    return f


def gradient(loss, student, teacher, T):
    student = student.float().requires_grad_()
    loss(student, teacher.float(), T).backward()
    return student.grad.double()


# The losses


@given(st.sampled_from(LOSSES), TEMPERATURES, st.integers(2, 9), st.integers(0, 99))
def test_gradients_against_finite_differences(loss, T, V, seed):
    student, teacher = logits(3, V, seed=seed), logits(3, V, seed=seed + 100)
    f, h, found = exact(loss), 1e-6, torch.empty(3, V, dtype=torch.float64)
    for i in range(3):
        for j in range(V):
            up, down = student.clone(), student.clone()
            up[i, j], down[i, j] = up[i, j] + h, down[i, j] - h
            found[i, j] = (f(up, teacher, T) - f(down, teacher, T)) / (2 * h)
    assert loss(student, teacher, T).item() == pytest.approx(
        f(student, teacher, T).item(), rel=1e-4, abs=1e-6
    )
    torch.testing.assert_close(gradient(loss, student, teacher, T), found, atol=1e-5, rtol=1e-3)


@given(TEMPERATURES, st.integers(2, 9), st.integers(0, 99))
def test_gradients_against_the_closed_forms(T, V, seed):
    student, teacher = logits(4, V, seed=seed), logits(4, V, seed=seed + 100)
    q, p = (student / T).softmax(-1), (teacher / T).softmax(-1)
    torch.testing.assert_close(
        gradient(forward_kl, student, teacher, T), T * (q - p) / 4, atol=1e-5, rtol=1e-3
    )
    log_ratio = q.log() - p.log()
    closed = T * q * (log_ratio - (q * log_ratio).sum(-1, keepdim=True)) / 4
    torch.testing.assert_close(
        gradient(reverse_kl, student, teacher, T), closed, atol=1e-5, rtol=1e-3
    )
    off = student - teacher
    closed = (off - off.mean(-1, keepdim=True)) / off.numel()
    torch.testing.assert_close(
        gradient(logit_mse, student, teacher, T), closed, atol=1e-5, rtol=1e-3
    )


def test_at_high_temperature_all_are_the_mean_square_of_the_centred_logits():
    student, teacher = logits(5, 7), logits(5, 7, seed=1)
    limit = logit_mse(student, teacher).item()
    for loss in (forward_kl, reverse_kl):
        off = [abs(loss(student, teacher, T).item() - limit) for T in (10.0, 100.0)]
        assert off[1] < off[0] / 5 and off[1] < 0.02 * limit


@given(st.sampled_from(LOSSES), TEMPERATURES, st.integers(0, 99))
def test_a_divergence_is_zero_only_for_the_same_predictions(loss, T, seed):
    student = logits(3, 5, seed=seed)
    assert (
        abs(loss(student, student + 3, T).item()) < 1e-6 * T**2 + 1e-6
    )  # logits are defined up to a number added to all
    assert loss(student, logits(3, 5, seed=seed + 100), T).item() > 1e-3


def test_forward_kl_is_pytorchs_and_the_mean_is_over_positions():
    student, teacher = logits(2, 3, 5).float(), logits(2, 3, 5, seed=1).float()
    flat = [z.log_softmax(-1).flatten(0, 1) for z in (student, teacher)]
    theirs = F.kl_div(*flat, reduction="batchmean", log_target=True)
    torch.testing.assert_close(forward_kl(student, teacher), theirs)
    wrong = F.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(wrong, 3 * theirs)  # not flattened: divided by B and not by B T


def test_the_direction_counts():
    two, one = torch.tensor([[5.0, 5.0, -5.0]]), torch.tensor([[5.0, -5.0, -5.0]])
    assert (
        forward_kl(one, two) > 4 > 1 > reverse_kl(one, two)
    )  # a student that misses one of two answers


def test_what_the_teacher_rules_out_counts_for_nothing():
    """p is (3/4, 1/4, 0) and q uniform: 3/4 log(9/4) + 1/4 log(3/4), whoever learns."""
    ruled_out = torch.tensor([[math.log(3), 0.0, -math.inf]])
    expected = 0.75 * math.log(9 / 4) + 0.25 * math.log(3 / 4)
    for T in (1.0, 2.0 * WARM):
        z, even = (T * ruled_out).requires_grad_(), torch.zeros(1, 3, requires_grad=True)
        loss = kl(z, even, T)
        loss.backward()
        assert loss.item() == pytest.approx(T**2 * expected, rel=1e-6)
        closed = T * torch.tensor([[1 / 3 - 3 / 4, 1 / 3 - 1 / 4, 1 / 3]])  # T (q - p)
        torch.testing.assert_close(even.grad, closed)
        slope = T * 3 / 16 * math.log(3)  # T p (1 - p) times the difference of the log ratios
        torch.testing.assert_close(z.grad, torch.tensor([[slope, -slope, 0.0]]))
    assert kl(torch.zeros(1, 3), ruled_out) == math.inf  # what is ruled out, but expected
    assert kl(ruled_out, ruled_out) == 0
    with pytest.raises(ValueError, match="a logit of the teacher is infinite"):
        logit_mse(torch.zeros(1, 3), ruled_out)


@pytest.mark.parametrize("T", [WARM, 1e3, 1e5, 1e6])
def test_hot_distributions_are_told_apart(T):
    """For two tokens: p's first has 1/2 + d, with d = tanh(2 / 2T) / 2, and q is even."""
    teacher, student = torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2)
    d = math.tanh(1 / T) / 2
    # (1/2 + d) log(1 + 2d) + (1/2 - d) log(1 - 2d), as its series: no difference of equals
    series = sum((2 * d) ** (2 * n) / (2 * n * (2 * n - 1)) for n in range(1, 9))
    assert forward_kl(student, teacher, T).item() == pytest.approx(T**2 * series, rel=1e-3)
    assert forward_kl(student, student, T).item() == 0


def test_up_to_usual_temperatures_all_is_computed_in_float32():
    """So that what was trained before comes out the same, bit for bit."""
    student, teacher = logits(4, 6).float(), logits(4, 6, seed=1).float()
    for T in (0.5, 1.0, 4.0, WARM):
        log_p, log_q = ((z / T).log_softmax(-1) for z in (teacher, student))
        before = T**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        assert torch.equal(forward_kl(student, teacher, T), before)


@pytest.mark.parametrize("loss", LOSSES)
def test_logits_in_bfloat16_are_computed_in_float32(loss):
    student, teacher = logits(4, 6).bfloat16(), logits(4, 6, seed=1).bfloat16()
    assert loss(student, teacher).dtype == torch.float32
    assert loss(student, teacher) == loss(student.float(), teacher.float())


@pytest.mark.parametrize("temperature", [0, -1.0, 1e-320, 1e9, math.inf, math.nan])
def test_a_temperature_that_is_none(temperature):
    says = f"the temperature is {temperature}, but must be from 1e-6 to 1e6."
    for loss in LOSSES:
        with pytest.raises(ValueError, match=re.escape(says)):
            loss(logits(2, 3), logits(2, 3), temperature)
    with pytest.raises(ValueError, match=re.escape(says)):
        Distillation(temperature=temperature)


def test_labels_that_do_not_fit():
    for loss in LOSSES:
        with pytest.raises(
            ValueError,
            match=r"one side has (4 logits, the other 3|3 logits, the other 4)",
        ):
            loss(logits(2, 3), logits(2, 4))
        with pytest.raises(
            ValueError, match=r"must have one shape, but they are \(\d, 3\) and \(\d, 3\)"
        ):
            loss(logits(2, 3), logits(5, 3))


@pytest.mark.parametrize("alpha", [-0.1, 1.5, math.nan])
def test_a_share_that_is_none(alpha):
    with pytest.raises(ValueError, match=f"alpha is {alpha}, but must be from 0"):
        Distillation(alpha=alpha)


# The training loop


def test_alpha_is_the_teachers_share(corpus):
    model, teacher = new_model(), new_model(1)
    x = torch.randint(SHAPE.vocab_size, (3, 8))
    y = torch.randint(SHAPE.vocab_size, (3, 8))
    text, soft = next_token_loss(model, x, y), forward_kl(model(x), teacher(x), 2.0)
    for alpha in (0.0, 0.3, 1.0):
        torch.testing.assert_close(
            Distillation(teacher, 2.0, alpha)(model, x, y), alpha * soft + (1 - alpha) * text
        )
    torch.testing.assert_close(
        Distillation(None, 2.0, 0.3)(model, x, y, teacher(x)), 0.3 * soft + 0.7 * text
    )


def test_the_teacher_does_not_learn_and_is_asked_only_without_labels():
    model, teacher = new_model(), new_model(1)
    x = torch.zeros(1, 8, dtype=torch.long)
    Distillation(teacher)(model, x, x).backward()
    assert all(p.grad is None for p in teacher.parameters()) and all(
        p.grad is not None for p in model.parameters()
    )
    with pytest.raises(ValueError, match="neither a teacher nor labels"):
        Distillation()(model, x, x)
    Distillation()(model, x, x, torch.zeros(1, 8, SHAPE.vocab_size))


@pytest.mark.parametrize("divergence", LOSSES)
def test_a_student_comes_nearer_to_its_teacher(corpus, divergence):
    student, teacher = new_model(), new_model(1).eval()
    with torch.no_grad():
        for p in teacher.parameters():
            p.mul_(3)  # an opinion
    x = corpus.val[:64].view(8, 8).long()
    before = divergence(student(x), teacher(x)).item()
    train(
        student,
        corpus,
        QUICK,
        loss_fn=Distillation(teacher, 1.0, 1.0, divergence),
        eval_every=0,
    )
    assert divergence(student(x), teacher(x)).item() < 0.5 * before


def test_an_ensemble_is_the_mean_probability():
    models = [new_model(seed) for seed in range(3)]
    x = torch.randint(SHAPE.vocab_size, (2, 8))
    mean = sum(m(x).softmax(-1) for m in models) / 3
    torch.testing.assert_close(Ensemble(*models)(x).exp(), mean)
    with pytest.raises(ValueError, match="an ensemble needs at least one teacher"):
        Ensemble()


def test_two_that_learn_together_both_learn_and_agree_more(corpus):
    x = corpus.val[:64].view(8, 8).long()
    apart = {}
    for alpha in (0.0, 0.9):
        pair = CoTraining(new_model(0), new_model(1, n_layer=1, n_embd=8))
        before = [next_token_loss(m, x, x).item() for m in (pair.first, pair.second)]
        train(
            pair,
            corpus,
            QUICK,
            loss_fn=lambda m, x, y, a=alpha: mutual_loss(m, x, y, a),
            eval_every=0,
        )
        assert all(
            next_token_loss(m, *next_two(corpus)).item() < b
            for m, b in zip((pair.first, pair.second), before, strict=True)
        )
        apart[alpha] = forward_kl(*(m(x) for m in (pair.first, pair.second))).item()
    assert apart[0.9] < apart[0.0]


def test_what_learns_together_is_saved_and_goes_on_together(corpus, tmp_path):
    def learn(**options):
        pair = CoTraining(new_model(0), new_model(1))
        train(pair, corpus, QUICK, loss_fn=mutual_loss, eval_every=0, **options)
        return pair

    path, whole = tmp_path / "pair.state", learn()
    learn(state_path=path, stop_after=3, save_every=3)
    again = learn(state_path=path)
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    assert again.first.lm_head.weight is again.first.wte.weight


def next_two(corpus):
    rows = corpus.val[:65].long()
    return rows[:-1].view(8, 8), rows[1:].view(8, 8)


def test_neither_of_two_learns_to_please_the_other():
    """Each side of the divergence has a gradient for its own model alone."""
    pair, x = CoTraining(new_model(0), new_model(1)), torch.zeros(2, 8, dtype=torch.long)
    mutual_loss(pair, x, x, alpha=1.0).backward()
    answers = {0: pair.first(x).detach(), 1: pair.second(x).detach()}
    for seed, model in enumerate((pair.first, pair.second)):
        alone = new_model(seed)
        forward_kl(alone(x), answers[1 - seed]).backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_hidden_states_come_nearer_and_the_student_alone_is_what_remains(corpus):
    student, teacher = new_model(), new_model(1, n_embd=32).eval()
    matching = HiddenMatching(student, teacher, (0, 1))
    assert set(matching.state_dict()) == {
        *(f"student.{n}" for n in student.state_dict()),
        "projection.weight",
        "projection.bias",
    }
    x, y = next_two(corpus)

    def off():
        return (matching.loss(matching, x, y) - next_token_loss(student, x, y)).item()

    before = off()
    train(matching, corpus, QUICK, loss_fn=matching.loss, eval_every=0)
    assert off() < 0.9 * before
    assert all(p.grad is None for p in teacher.parameters())


def test_a_guess_of_nothing_is_off_by_one_whatever_the_teachers_size():
    x, y = torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)
    for size in (1.0, 10.0):
        teacher = new_model(1).eval()
        teacher.h[-1].mlp.c_proj.bias.data.fill_(size)
        matching = HiddenMatching(new_model(), teacher, (0, 1), weight=0.25)
        nn.init.zeros_(matching.projection.weight)
        nn.init.zeros_(matching.projection.bias)
        off = matching.loss(matching, x, y) - next_token_loss(matching.student, x, y)
        assert off.item() == pytest.approx(0.25, abs=1e-6)


def test_a_hidden_state_is_what_leaves_the_layer():
    model, x = new_model(), torch.randint(SHAPE.vocab_size, (2, 8))
    for layer in range(SHAPE.n_layer):
        out, hidden = with_hidden_state(model, x, layer)
        inner = model.wte(x) + model.wpe(torch.arange(8))
        for block in model.h[: layer + 1]:
            inner = block(inner)
        assert torch.equal(hidden, inner) and torch.equal(out, model(x))
    assert not any(block._forward_hooks for block in model.h)


@pytest.mark.parametrize("layers", [(2, 0), (0, 5), (-1, 0)])
def test_a_layer_that_is_not_there(layers):
    with pytest.raises(ValueError, match=r"the layer is -?\d, but must be from 0 to 1\."):
        HiddenMatching(new_model(), new_model(1), layers)
