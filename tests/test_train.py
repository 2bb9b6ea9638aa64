"""Training: that it learns, and that what would train nothing is refused before it begins."""

import math
import re
from dataclasses import replace

import pytest
import torch
from tiny_runs import QUICK, SHAPE, new_model, quiet, same_weights

from gptlite.checkpoints import read_tensors
from gptlite.corpus import Corpus, sample_batch
from gptlite.distillation import Distillation
from gptlite.quantization import INT8, Grid, quantize_model
from gptlite.train import (
    TrainConfig,
    block_matrices,
    evaluate,
    loop,
    lr_factor,
    make_optimizers,
    next_token_loss,
    penalized_loss,
    train,
)

# It learns


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_loss_goes_down(corpus, optimizer):
    """From knowing nothing to less than the entropy of characters, on held-out text too."""
    frequency = torch.bincount(corpus.train.long()) / len(corpus.train)
    entropy = -(frequency * frequency.clamp_min(1e-9).log()).sum().item()
    model = new_model(dropout=0.0)
    config = TrainConfig(
        steps=80, batch_size=16, warmup=10, optimizer=optimizer, lr=0.02, adamw_lr=8e-3
    )
    losses = quiet(model, corpus, config)["train_loss"]
    assert len(losses) == 80
    assert abs(losses[0] - math.log(SHAPE.vocab_size)) < 0.2
    assert losses[-1] < 0.7 * entropy
    assert evaluate(model, corpus.val, 8) < 0.8 * entropy
    assert not model.training


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    model = new_model()
    matrices = {p for p in model.h.parameters() if p.ndim == 2}
    rest = set(model.parameters()) - matrices
    assert set(block_matrices(model)) == matrices
    config = TrainConfig(lr=0.3, adamw_lr=0.1)
    muon, adamw = make_optimizers(matrices, rest, config, torch.float32)
    assert type(muon).__name__ == "Muon"
    assert set(muon.param_groups[0]["params"]) == matrices
    assert len(matrices) == 4 * 2
    assert set(adamw.param_groups[0]["params"]) == rest
    assert (muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]) == (0.3, 0.1)
    config = TrainConfig(optimizer="adamw", weight_decay=0.2)
    (alone,) = make_optimizers(matrices, rest, config, torch.float32)
    assert {p: g["weight_decay"] for g in alone.param_groups for p in g["params"]} == {
        p: 0.2 if p in matrices else 0.0 for p in model.parameters()
    }


class Two(torch.nn.Module):
    """Models that learn together, and more; it has neither blocks nor a shape itself."""

    def __init__(self):
        super().__init__()
        self.models = torch.nn.ModuleList([new_model(), new_model(n_layer=1)])
        self.between = torch.nn.Linear(3, 3)

    def forward(self, x):
        return [model(x) for model in self.models]


def test_several_models_are_trained_as_one(corpus, tmp_path):
    """Muon takes the matrices of all their blocks; and nothing has to pretend to be a GPT."""

    def both(two, x, y):
        return sum(next_token_loss(lambda _, out=out: out, x, y) for out in two(x))

    two, whole = Two(), Two()
    expected = [p for model in two.models for p in model.h.parameters() if p.ndim == 2]
    assert len(expected) == 3 * 4
    assert list(map(id, block_matrices(two))) == list(map(id, expected))
    losses = quiet(whole, corpus, QUICK, loss_fn=both)["train_loss"]
    path = tmp_path / "two.state"
    quiet(Two(), corpus, QUICK, loss_fn=both, state_path=path, save_every=1, stop_after=3)
    assert quiet(two, corpus, QUICK, loss_fn=both, state_path=path)["train_loss"] == losses
    assert all(map(same_weights, two.models, whole.models))
    assert not same_weights(two.models[0], new_model())


def test_the_learning_rate_is_a_trapezoid(corpus):
    config = TrainConfig(steps=100, warmup=10, decay_from=0.4)
    factors = [lr_factor(step, config) for step in range(100)]
    assert factors[:10] == [(i + 1) / 10 for i in range(10)]
    assert factors[10:41] == [1.0] * 31
    assert factors[70] == 0.5
    assert all(a > b for a, b in zip(factors[40:98], factors[41:99], strict=True))
    assert factors[99] == 0.02
    assert lr_factor(0, replace(config, warmup=0)) == 1.0
    assert [lr_factor(s, replace(config, decay_from=1.0)) for s in (50, 99)] == [1.0, 1.0]


def test_each_step_uses_the_learning_rate_of_that_step(corpus, monkeypatch):
    """A rate of zero moves nothing; a factor is never applied to a rate that has one."""
    seen = []
    monkeypatch.setattr(loop, "lr_factor", lambda step, config: 0.5)
    original = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        seen.append([group["lr"] for group in self.param_groups])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    quiet(new_model(), corpus, replace(QUICK, optimizer="adamw", adamw_lr=0.01))
    assert seen == [[0.005, 0.005]] * 6
    monkeypatch.setattr(loop, "lr_factor", lambda step, config: 0.0)
    model = new_model()
    quiet(model, corpus, QUICK)
    assert same_weights(model, new_model())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_are_clipped(corpus, monkeypatch, dtype):
    """The optimizer sees a norm of `clip` at most, over all parameters, and nothing scaled."""
    norms = []

    def spy(self, closure=None):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.stack([g.norm() for g in grads]).norm().item())

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    for clip in (0.01, 1e9):
        quiet(
            new_model(),
            corpus,
            replace(QUICK, steps=1, clip=clip, optimizer="adamw"),
            dtype=dtype,
        )
    assert norms[0] == pytest.approx(0.01, rel=1e-3)
    assert 0.1 < norms[1] < 10


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_without_a_largest_norm_nothing_is_clipped(corpus, optimizer):
    config = replace(QUICK, optimizer=optimizer)
    off, large = new_model(), new_model()
    losses = quiet(off, corpus, replace(config, clip=0))["train_loss"]
    assert losses == quiet(large, corpus, replace(config, clip=1e9))["train_loss"]
    assert same_weights(off, large)
    assert not same_weights(off, new_model())


def test_what_was_asked_of_a_model_before_is_not_trained_on(corpus):
    """Gradients may be left over, from a measure of importance or a run that failed."""
    model, fresh = new_model(), new_model()
    next_token_loss(model, *sample_batch(corpus.train, 8, 4, 9)).backward()
    quiet(model, corpus, QUICK)
    quiet(fresh, corpus, QUICK)
    assert same_weights(model, fresh)


@torch.no_grad()
def test_it_trains_wherever_it_is_called(corpus):
    losses = quiet(new_model(), corpus, QUICK)["train_loss"]
    with torch.enable_grad():
        assert losses == quiet(new_model(), corpus, QUICK)["train_loss"]
    assert not torch.is_grad_enabled()


def test_the_loss_can_be_swapped(corpus):
    """As distillation does: it gets the model, the inputs and the targets of a step."""
    calls = []

    def half(model, x, y):
        calls.append((x, y))
        return 0.5 * next_token_loss(model, x, y)

    swapped = quiet(new_model(), corpus, QUICK, loss_fn=half)["train_loss"]
    assert swapped[0] == pytest.approx(
        0.5 * quiet(new_model(), corpus, QUICK)["train_loss"][0], abs=1e-5
    )
    for step, (x, y) in enumerate(calls):
        expected = sample_batch(corpus.train, 8, 4, step)
        assert torch.equal(x, expected[0])
        assert torch.equal(y, expected[1])


@pytest.mark.parametrize("grid", [INT8, Grid(4, 16)])
def test_a_quantized_teacher_teaches_in_every_number_format(corpus, grid):
    """`--dtype auto` takes what this machine is fastest in: the teacher must not mind."""
    teacher = new_model(n_embd=32).eval()
    quantize_model(teacher, grid)
    losses = [
        quiet(new_model(), corpus, QUICK, loss_fn=Distillation(teacher), dtype=dtype)
        for dtype in loop.FORMATS
    ]
    exact, *others = (torch.tensor(log["train_loss"]) for log in losses)
    for other in others:
        torch.testing.assert_close(other, exact, atol=0.05, rtol=0)


def test_the_penalty_is_the_entropy_of_the_predictions(corpus):
    model = new_model(dropout=0.0)
    x, y = sample_batch(corpus.train, 8, 4, 0)
    p = model(x).softmax(-1)
    entropy = torch.distributions.Categorical(p).entropy().mean()
    plain = next_token_loss(model, x, y)
    torch.testing.assert_close(penalized_loss(model, x, y, 0.0), plain)
    torch.testing.assert_close(penalized_loss(model, x, y, 0.3), plain - 0.3 * entropy)


def test_the_penalty_makes_predictions_softer():
    """Where the text teaches 0.9, it becomes about what a temperature of 1 + weight makes."""

    class Bias(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return self.logits.expand(*x.shape, 2)

    y = torch.tensor([[0] * 9 + [1]])
    for weight, odds in ((0.0, 9.0), (0.2, 9.0 ** (1 / 1.2))):
        model = Bias()
        optimizer = torch.optim.Adam(model.parameters(), 0.05)
        for _ in range(400):
            optimizer.zero_grad()
            penalized_loss(model, y, y, weight).backward()
            optimizer.step()
        assert (model.logits[0] - model.logits[1]).exp().item() == pytest.approx(odds, rel=0.1)


# Evaluation


def test_evaluation_covers_every_whole_window_once(corpus):
    model, calls = new_model(), []

    def counting(model, x, y):
        calls.append((x, y, model.training, torch.is_grad_enabled()))
        return next_token_loss(model, x, y)

    model.train()
    tokens = corpus.val[:83]  # ten windows of 8 and their targets, two tokens over
    found = evaluate(model, tokens, 8, B=3, loss_fn=counting)
    assert torch.equal(torch.cat([x.flatten() for x, _, _, _ in calls]), tokens[:80].long())
    assert torch.equal(torch.cat([y.flatten() for _, y, _, _ in calls]), tokens[1:81].long())
    assert [(t, g) for _, _, t, g in calls] == [(False, False)] * 4
    assert model.training  # as it was
    model.eval()
    pairs = ((tokens[i : i + 8], tokens[i + 1 : i + 9]) for i in range(0, 80, 8))
    one_by_one = [
        next_token_loss(model, x[None].long(), y[None].long()).item() for x, y in pairs
    ]
    assert found == pytest.approx(
        sum(one_by_one) / 10, abs=1e-5
    )  # the last batch, of one window, weighs as one
    assert not model.training


def test_the_loss_is_in_nats_per_token():
    class Uniform(torch.nn.Module):
        def forward(self, x):
            return torch.zeros(*x.shape, 7)

    assert next_token_loss(
        Uniform(), torch.zeros(2, 3).long(), torch.ones(2, 3).long()
    ).item() == pytest.approx(math.log(7))


def test_a_text_too_short_to_evaluate_is_refused_before_training(corpus):
    short = Corpus("short", corpus.train, corpus.val[:8], corpus.tokenizer)
    message = "the text has 8 tokens, but one window of 8 and its targets needs 9."
    for call in (
        lambda: evaluate(new_model(), short.val, 8),
        lambda: train(new_model(), short, QUICK, loss_fn=lambda *a: pytest.fail("trained")),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_held_out_losses_are_logged_on_the_way(corpus):
    log = train(new_model(), corpus, QUICK, eval_every=2)
    assert [step for step, _ in log["val_loss"]] == [2, 4]  # the caller evaluates at the end
    assert all(isinstance(loss, float) for _, loss in log["val_loss"])
    assert (
        log["train_loss"] == quiet(new_model(), corpus, QUICK)["train_loss"]
    )  # looking changes nothing


# What cannot be trained


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"steps": 0}, "steps is 0, but must be a whole number of at least 1."),
        ({"steps": 2.5}, "steps is 2.5, but must be a whole number of at least 1."),
        ({"steps": True}, "steps is True, but must be a whole number of at least 1."),
        ({"batch_size": 0}, "batch_size is 0, but must be a whole number of at least 1."),
        ({"warmup": -1}, "warmup is -1, but must be a whole number of at least 0."),
        ({"lr": -0.1}, "lr is -0.1, but must be a finite number of at least 0."),
        ({"lr": INF}, "lr is inf, but must be a finite number of at least 0."),
        ({"lr": "1"}, "lr is '1', but must be a finite number of at least 0."),
        ({"adamw_lr": NAN}, "adamw_lr is nan, but must be a finite number of at least 0."),
        (
            {"weight_decay": -1},
            "weight_decay is -1, but must be a finite number of at least 0.",
        ),
        ({"clip": -1}, "clip is -1, but must be a finite number of at least 0."),
        ({"decay_from": NAN}, "decay_from is nan, but must be a finite number from 0 to 1."),
        ({"decay_from": 1.5}, "decay_from is 1.5, but must be a finite number from 0 to 1."),
        ({"seed": -1}, "seed is -1, but must be a whole number from 0 to 4294967295."),
        ({"seed": 2**60}, f"seed is {2**60}, but must be a whole number from 0 to 4294967295."),
        ({"optimizer": "sgd"}, "the optimizer is 'sgd', but must be muon or adamw."),
        (
            {"lr": 0, "adamw_lr": 0.0},
            "all learning rates are 0, so that nothing would be trained.",
        ),
        (
            {"optimizer": "adamw", "adamw_lr": 0},
            "all learning rates are 0, so that nothing would be trained.",
        ),
    ],
)
def test_configurations_that_make_no_sense(config, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TrainConfig(**config)


def test_the_largest_seed_trains(corpus):
    quiet(new_model(), corpus, replace(QUICK, seed=2**32 - 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_every": -1}, "save_every is -1, but must be at least 0 (0 is never)."),
        ({"eval_every": -5}, "eval_every is -5, but must be at least 0 (0 is never)."),
        (
            {"dtype": torch.float64},
            "dtype is torch.float64, but must be float32, bfloat16 or float16.",
        ),
        (
            {"recipe": {"alpha": NAN}},
            "the recipe, {'alpha': nan}, cannot be kept as JSON (Out of range",
        ),
        (
            {"recipe": {"seen": {1}}},
            "the recipe, {'seen': {1}}, cannot be kept as JSON (Object of type set",
        ),
    ],
)
def test_arguments_that_make_no_sense(corpus, options, message):
    model = new_model()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        quiet(model, corpus, QUICK, **options)
    assert same_weights(model, new_model())


def test_models_that_cannot_learn(corpus):
    with pytest.raises(ValueError, match=r"^Linear has no GPT in it that could be trained\.$"):
        quiet(torch.nn.Linear(2, 2), corpus, QUICK)
    with pytest.raises(ValueError, match=r"^no parameter learns; call requires_grad_\(\) on"):
        quiet(new_model().requires_grad_(False), corpus, QUICK)


def slope_is_nan_at(step):
    """A loss whose value is always finite; its slope is not finite at a step."""
    steps = iter(range(1000))

    def loss_fn(model, x, y):
        loss = next_token_loss(model, x, y)
        if next(steps) == step:
            nothing = (0 * next(model.parameters())).sum()
            loss = loss + nothing.sqrt()  # the slope of the root at 0 is infinite, times 0
        return loss

    return loss_fn


@pytest.mark.parametrize("step", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_not_finite_change_nothing(corpus, tmp_path, step, dtype):
    """Neither the weights, nor what is on disk: the run goes on from there, even at its end."""
    state, whole, model = tmp_path / "run.state", new_model(), new_model()
    log = quiet(whole, corpus, QUICK, dtype=dtype)
    message = f"the gradients are not finite at step {step}; a lower learning rate may help."
    options = {"state_path": state, "save_every": 1, "dtype": dtype}
    with pytest.raises(FloatingPointError, match=f"^{re.escape(message)}$"):
        quiet(model, corpus, QUICK, loss_fn=slope_is_nan_at(step), **options)
    tensors, info = read_tensors(state)
    assert len(info["log"]["train_loss"]) == step
    assert all(t.isfinite().all() for t in tensors.values())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[f"model.{name}"])
    assert quiet(model, corpus, QUICK, **options)["train_loss"] == log["train_loss"]
    assert same_weights(model, whole)


def test_gradients_that_float16_can_never_hold_end_the_run(corpus):
    """Their scale is halved from 65536 to 1, a step that is left out each time, and no more."""

    def always_nan(model, x, y):
        return next_token_loss(model, x, y) + (0 * next(model.parameters())).sum().sqrt()

    model, config = new_model(), replace(QUICK, steps=100)
    with pytest.raises(FloatingPointError, match="the gradients are not finite at step 16"):
        quiet(model, corpus, config, dtype=torch.float16, loss_fn=always_nan)
    assert same_weights(model, new_model())


@pytest.mark.parametrize("steps", [2, 3])
def test_an_update_that_kills_the_model_is_not_saved(corpus, tmp_path, monkeypatch, steps):
    """The step itself was still good: its loss and its gradients tell nothing of the update."""
    state = tmp_path / "run.state"
    rates = iter([1.0, 1e30, 1.0])
    monkeypatch.setattr(loop, "lr_factor", lambda step, config: next(rates))
    with pytest.raises(FloatingPointError, match="predictions are not finite at step 2"):
        quiet(new_model(), corpus, replace(QUICK, steps=steps), state_path=state, save_every=1)
    tensors, info = read_tensors(state)
    assert len(info["log"]["train_loss"]) == 1
    assert all(t.isfinite().all() for t in tensors.values())


def test_a_model_that_died_in_the_last_step_is_not_returned_as_trained(corpus, monkeypatch):
    monkeypatch.setattr(loop, "lr_factor", lambda step, config: 1e30)
    with pytest.raises(FloatingPointError, match="predictions are not finite at step 1"):
        quiet(new_model(), corpus, replace(QUICK, steps=1))


def test_a_held_out_loss_that_is_not_finite_ends_the_run(corpus, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", lambda *args: math.nan)
    with pytest.raises(FloatingPointError, match="the held-out loss is not finite at step 2"):
        train(new_model(), corpus, QUICK, eval_every=2)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(corpus, tmp_path):
    state, losses = tmp_path / "run.state", iter([1.0, 1.0, float("nan")])
    with pytest.raises(
        FloatingPointError,
        match=r"the loss is not finite at step 2; a lower learning rate may help\.",
    ):
        quiet(
            new_model(),
            corpus,
            QUICK,
            state_path=state,
            save_every=1,
            loss_fn=lambda model, x, y: next_token_loss(model, x, y) * next(losses),
        )
    tensors, info = read_tensors(state)
    assert len(info["log"]["train_loss"]) == 2
    assert all(t.isfinite().all() for t in tensors.values())


def test_a_text_too_short_to_train_on(corpus):
    short = Corpus("short", corpus.train[:15], corpus.val, corpus.tokenizer)
    with pytest.raises(
        ValueError, match=r"the text has 15 tokens, but training on windows of 8 needs 16\."
    ):
        quiet(new_model(), short, QUICK)


# Several processes


def test_processes_that_do_not_divide_the_batch(corpus, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(ValueError, match=r"batch_size is 4, which 3 processes do not divide\."):
        quiet(new_model(), corpus, QUICK)


def test_each_process_takes_its_own_share(corpus, monkeypatch):
    """Together they see the batch, each row once; and their dropout differs."""
    whole, seen = sample_batch(corpus.train, 8, 4, 0)[0], []
    for rank in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, "is_initialized", lambda: True)
            patch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            patch.setattr(torch.distributed, "get_world_size", lambda: 2)
            patch.setattr(torch.distributed, "all_reduce", lambda loss: loss.mul_(2))
            patch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model: model)
            model = new_model(dropout=0.5)
            quiet(
                model,
                corpus,
                replace(QUICK, steps=1),
                loss_fn=lambda model, x, y: (
                    seen.append((x, torch.rand(3))),
                    next_token_loss(model, x, y),
                )[1],
            )
    assert sorted(torch.cat([x for x, _ in seen]).tolist()) == sorted(whole.tolist())
    assert not torch.equal(seen[0][1], seen[1][1])
