"""Training: that it learns, that a killed run goes on exactly, that two processes are as good as one."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sums import TEXT, VOCABULARY

from gptlite import train as training
from gptlite.checkpoints import load, read_tensors, save
from gptlite.corpus import Corpus, sample_batch
from gptlite.model import GPT, GPTConfig
from gptlite.train import (
    PRESETS,
    TrainConfig,
    evaluate,
    lr_factor,
    main,
    make_optimizers,
    next_token_loss,
    penalized_loss,
    train,
)

ROOT = Path(__file__).parent.parent
SHAPE = GPTConfig(
    n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=VOCABULARY, dropout=0.1
)
QUICK = TrainConfig(steps=6, batch_size=4, warmup=2)


def new_model(**config):
    torch.manual_seed(3)
    return GPT(replace(SHAPE, **config))


def quiet(model, corpus, config, **options):
    return train(model, corpus, config, **{"eval_every": 0} | options)


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# It learns


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_loss_goes_down(corpus, optimizer):
    """From knowing nothing to clearly less than the entropy of single characters, on text that was held out too."""
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
    muon, adamw = make_optimizers(model, TrainConfig(lr=0.3, adamw_lr=0.1), torch.float32)
    matrices = {p for p in model.h.parameters() if p.ndim == 2}
    assert type(muon).__name__ == "Muon"
    assert set(muon.param_groups[0]["params"]) == matrices
    assert len(matrices) == 4 * 2
    assert set(adamw.param_groups[0]["params"]) == set(model.parameters()) - matrices
    assert (muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"]) == (0.3, 0.1)
    (alone,) = make_optimizers(
        model, TrainConfig(optimizer="adamw", weight_decay=0.2), torch.float32
    )
    assert {p: g["weight_decay"] for g in alone.param_groups for p in g["params"]} == {
        p: 0.2 if p in matrices else 0.0 for p in model.parameters()
    }


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
    """A rate of zero moves nothing; and a factor is never applied to one that was already scaled."""
    seen = []
    monkeypatch.setattr(training, "lr_factor", lambda step, config: 0.5)
    original = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        seen.append([group["lr"] for group in self.param_groups])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    quiet(new_model(), corpus, replace(QUICK, optimizer="adamw", adamw_lr=0.01))
    assert seen == [[0.005, 0.005]] * 6
    monkeypatch.setattr(training, "lr_factor", lambda step, config: 0.0)
    model = new_model()
    quiet(model, corpus, QUICK)
    assert same_weights(model, new_model())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_are_clipped(corpus, monkeypatch, dtype):
    """What the optimizer sees is of norm `clip` at most, over all parameters together, and not scaled any more."""
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


def test_the_loss_can_be_swapped(corpus):
    """As distillation does: the loop calls the function with the model, the inputs and the targets of a step."""
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


def test_the_penalty_is_the_entropy_of_the_predictions(corpus):
    model = new_model(dropout=0.0)
    x, y = sample_batch(corpus.train, 8, 4, 0)
    p = model(x).softmax(-1)
    entropy = torch.distributions.Categorical(p).entropy().mean()
    plain = next_token_loss(model, x, y)
    torch.testing.assert_close(penalized_loss(model, x, y, 0.0), plain)
    torch.testing.assert_close(penalized_loss(model, x, y, 0.3), plain - 0.3 * entropy)


def test_the_penalty_makes_predictions_softer():
    """Where the text alone teaches a probability of 0.9, it becomes about that of the temperature 1 + weight."""

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


# Going on


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_stopped_run_goes_on_to_the_bit(corpus, tmp_path, optimizer, stop):
    config = replace(QUICK, optimizer=optimizer)
    whole, parts = new_model(), new_model()
    log = train(whole, corpus, config, eval_every=2)
    state = tmp_path / "run.state"
    train(parts, corpus, config, eval_every=2, state_path=state, save_every=1, stop_after=stop)
    torch.rand(7)  # whatever happened in between
    parts = new_model()
    with torch.no_grad():
        parts.wte.weight.fill_(9.0)  # the state brings the weights, too
    resumed = train(parts, corpus, config, eval_every=2, state_path=state, save_every=1)
    assert resumed["train_loss"] == log["train_loss"]
    assert resumed["val_loss"] == log["val_loss"]
    assert same_weights(whole, parts)


def test_what_was_done_after_the_last_save_is_done_again(corpus, tmp_path):
    state = tmp_path / "run.state"
    quiet(new_model(), corpus, QUICK, state_path=state, save_every=2, stop_after=5)
    assert len(read_tensors(state)[1]["log"]["train_loss"]) == 4
    model, whole = new_model(), new_model()
    assert (
        quiet(model, corpus, QUICK, state_path=state)["train_loss"]
        == quiet(whole, corpus, QUICK)["train_loss"]
    )
    assert same_weights(model, whole)


def test_the_time_of_all_parts_adds_up(corpus, tmp_path):
    state = tmp_path / "run.state"
    quiet(new_model(), corpus, QUICK, state_path=state, save_every=1, stop_after=3)
    tensors, info = read_tensors(state)
    info["log"]["seconds"] = 1000.0
    training.checkpoints.write_tensors(state, tensors, info)
    assert quiet(new_model(), corpus, QUICK, state_path=state)["seconds"] > 1000


def test_the_end_is_saved_whatever_the_rhythm(corpus, tmp_path):
    for save_every in (0, 4, 100):
        state = tmp_path / f"{save_every}.state"
        quiet(new_model(), corpus, QUICK, state_path=state, save_every=save_every)
        assert len(read_tensors(state)[1]["log"]["train_loss"]) == 6


def test_a_finished_run_is_not_trained_again(corpus, tmp_path):
    state = tmp_path / "run.state"
    first, again = new_model(), new_model()
    log = quiet(first, corpus, QUICK, state_path=state)
    calls = []
    assert (
        quiet(again, corpus, QUICK, state_path=state, loss_fn=lambda *a: calls.append(a)) == log
    )
    assert same_weights(first, again)
    assert calls == []


def test_a_run_can_be_prolonged(corpus, tmp_path):
    state = tmp_path / "run.state"
    log = quiet(new_model(), corpus, QUICK, state_path=state)
    longer = quiet(new_model(), corpus, replace(QUICK, steps=9), state_path=state)
    assert longer["train_loss"][:6] == log["train_loss"]
    assert len(longer["train_loss"]) == 9
    assert longer["prolonged"] == [[6, 6]]
    with pytest.raises(
        ValueError, match=r"run\.state has been trained for 9 steps, but steps is 6\."
    ):
        quiet(new_model(), corpus, QUICK, state_path=state)


def test_a_state_without_a_corpus_goes_on(corpus, tmp_path):
    """States written before the corpus was part of them, and those of float32 runs, which scale no gradients."""
    state = tmp_path / "run.state"
    quiet(new_model(), corpus, QUICK, state_path=state, save_every=1, stop_after=3)
    tensors, info = read_tensors(state)
    assert {name.split(".")[0] for name in tensors} == {"model", "optimizer"}
    training.checkpoints.write_tensors(
        state, tensors, {k: info[k] for k in ("log", "train", "config")}
    )
    assert quiet(new_model(), corpus, QUICK, state_path=state) | {"seconds": 0} == quiet(
        new_model(), corpus, QUICK
    ) | {"seconds": 0}


@pytest.mark.parametrize(
    ("config", "shape", "difference"),
    [
        ({"lr": 0.5}, {}, "lr 0.02 -> 0.5"),
        ({"batch_size": 8, "seed": 1}, {}, "batch_size 4 -> 8, seed 0 -> 1"),
        ({"optimizer": "adamw"}, {}, "optimizer muon -> adamw"),
        ({}, {"n_layer": 1}, "n_layer 2 -> 1"),
        ({}, {"dropout": 0.0}, "dropout 0.1 -> 0.0"),
    ],
)
def test_the_state_of_another_run_is_refused(corpus, tmp_path, config, shape, difference):
    state = tmp_path / "run.state"
    quiet(new_model(), corpus, QUICK, state_path=state)
    before, model = state.read_bytes(), new_model(**shape)
    with pytest.raises(
        ValueError,
        match=re.escape(f"holds another run ({difference}); delete it to start anew."),
    ):
        quiet(model, corpus, replace(QUICK, **config), state_path=state)
    assert same_weights(model, new_model(**shape))
    assert state.read_bytes() == before


def test_the_state_of_a_run_on_another_text_is_refused(corpus, tmp_path):
    state = tmp_path / "run.state"
    quiet(new_model(), corpus, QUICK, state_path=state)
    other = replace(corpus, train=corpus.train.flip(0))
    message = rf"holds another run \(corpus {corpus.fingerprint} -> {other.fingerprint}\); delete it to start anew\."
    with pytest.raises(ValueError, match=message):
        quiet(new_model(), other, QUICK, state_path=state)


def test_a_file_that_is_no_state(corpus, tmp_path):
    state = tmp_path / "run.state"
    save(state, new_model(), corpus.tokenizer, {"log": {}, "train": {}})
    with pytest.raises(
        ValueError,
        match=r"run\.state is not the state of a training run; delete it to start anew\.",
    ):
        quiet(new_model(), corpus, QUICK, state_path=state)
    quiet(new_model(), corpus, QUICK, state_path=tmp_path / "good.state")
    state.write_bytes((tmp_path / "good.state").read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"run\.state is not a whole checkpoint"):
        quiet(new_model(), corpus, QUICK, state_path=state)


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="forks, since killing needs processes that start quickly"
)
def test_a_killed_run_goes_on_to_the_bit(tmp_path):
    """SIGKILL inside of a step, in the middle of writing, between writing and renaming, and at random moments."""
    done = run_python(ROOT / "tests" / "kill_training.py", tmp_path)
    assert done.returncode == 0, done.stderr
    killed, whole = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("killed", "whole")
    )
    assert killed == whole
    assert len(whole[0]) == 25


def run_python(*args):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *args], env=env, cwd=ROOT, capture_output=True, text=True
    )


# Number formats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_number_formats(corpus, tmp_path, dtype):
    """Products in 16 bits, weights and optimizer in 32; close to float32, and resumed to the bit (with its scale)."""
    seen, state = [], tmp_path / "run.state"

    def watching(model, x, y):
        loss = next_token_loss(model, x, y)
        seen.append(model(x).dtype)
        return loss

    model, whole = new_model(dropout=0.0), new_model(dropout=0.0)
    losses = quiet(whole, corpus, QUICK, dtype=dtype, loss_fn=watching)["train_loss"]
    assert set(seen) == {dtype}
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    assert losses == pytest.approx(
        quiet(new_model(dropout=0.0), corpus, QUICK)["train_loss"], abs=0.05
    )
    quiet(model, corpus, QUICK, dtype=dtype, state_path=state, save_every=1, stop_after=3)
    model = new_model(dropout=0.0)
    assert quiet(model, corpus, QUICK, dtype=dtype, state_path=state)["train_loss"] == losses
    assert same_weights(model, whole)


def test_the_scale_of_float16_gradients_is_part_of_the_state(corpus, tmp_path):
    """An overflow halves it: a run that forgot so would overflow again and skip steps that the other took."""
    state, whole = tmp_path / "run.state", new_model()
    options = {
        "dtype": torch.float16,
        "loss_fn": lambda model, x, y: 10 * next_token_loss(model, x, y),
    }
    quiet(whole, corpus, replace(QUICK, steps=9), **options)
    quiet(
        new_model(),
        corpus,
        replace(QUICK, steps=9),
        state_path=state,
        save_every=1,
        stop_after=6,
        **options,
    )
    tensors, info = read_tensors(state)
    assert info["scaler"]["scale"] < 2**16  # where it starts: some steps overflowed
    assert info["scaler"]["_growth_tracker"] > 0  # and the last one did not
    quiet(model := new_model(), corpus, replace(QUICK, steps=9), state_path=state, **options)
    assert same_weights(model, whole)
    assert not torch.equal(model.wte.weight, tensors["model.wte.weight"])


# What cannot be trained


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"steps": 0}, "steps is 0, but must be at least 1."),
        ({"batch_size": 0}, "batch_size is 0, but must be at least 1."),
        ({"warmup": -1}, "warmup is -1, but must be at least 0."),
        ({"optimizer": "sgd"}, "the optimizer is 'sgd', but must be muon or adamw."),
    ],
)
def test_configurations_that_make_no_sense(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(**config)


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


# The command line


def test_the_presets_are_of_the_stated_size():
    stated = {"teacher": 10.77e6, "student": 0.98e6, "draft": 0.44e6}
    assert PRESETS.keys() == stated.keys()
    for name, (shape, config) in PRESETS.items():
        assert GPT(shape).n_params() == pytest.approx(stated[name], rel=0.02)
        assert config.batch_size % 2 == 0  # for two processes
        assert shape.block_size == 256


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "sums.txt"
    path.write_text(TEXT * 2)
    return path


def command(text_file, out, *more):
    options = [
        "--batch-size",
        "2",
        "--steps",
        "3",
        "--warmup",
        "1",
        "--dtype",
        "float32",
        "--no-compile",
    ]
    return ["draft", "--corpus", str(text_file), "--out", str(out), *options, *more]


def test_the_command_line_from_end_to_end(text_file, tmp_path, capsys):
    out = tmp_path / "new" / "draft.safetensors"
    main(command(text_file, out, "--dropout", "0.1", "--seed", "5", "--eval-every", "2"))
    said = capsys.readouterr()
    assert re.search(
        r"parameters on \w+ in torch\.float32; the run is kept in .*draft\.state", said.err
    )
    assert "tokens/s" in said.err
    model, tokenizer, info = (back := load(out)).model, back.tokenizer, back.info
    assert tokenizer.characters == "".join(sorted(set(TEXT)))
    assert model.config == replace(PRESETS["draft"][0], vocab_size=len(tokenizer), dropout=0.1)
    assert info["train"] == TrainConfig(steps=3, batch_size=2, warmup=1, seed=5).__dict__
    assert info.keys() == {
        "command",
        "val_loss",
        "train",
        "log",
        "machine",
        "corpus",
        "fingerprint",
        "date",
    }
    assert info["corpus"] == "sums"
    assert len(info["log"]["train_loss"]) == 3
    assert [step for step, _ in info["log"]["val_loss"]] == [2]
    corpus = training.load_corpus(text_file)
    assert info["fingerprint"] == corpus.fingerprint
    assert f"held-out loss {info['val_loss']:.4f} nats a character" in said.out
    assert info["val_loss"] == pytest.approx(
        evaluate(model, corpus.val, 256), abs=2e-3
    )  # the file's 16 bits
    assert str(tmp_path) not in info["command"]
    assert re.match(r"\d{4}-\d\d-\d\d$", info["date"])
    main(
        command(text_file, out, "--dropout", "0.1", "--seed", "5")
    )  # finished: nothing is trained again
    assert load(out).info["log"]["train_loss"] == info["log"]["train_loss"]


def test_a_record_says_what_a_checkpoint_says_and_keeps_no_weights(text_file, tmp_path, capsys):
    out = tmp_path / "new" / "experiment.json"
    main(command(text_file, out))
    record = json.loads(out.read_text())
    model = GPT(GPTConfig(**record["config"]))
    main(command(text_file, tmp_path / "weights.safetensors"))
    info = load(tmp_path / "weights.safetensors").info
    assert record["parameters"] == model.n_params()
    assert {k: record[k] for k in info if k != "log"} == {
        k: info[k] for k in info if k != "log"
    }
    assert record["log"]["train_loss"] == info["log"]["train_loss"]
    assert {p.suffix for p in out.parent.iterdir()} == {".json", ".state"}


def test_the_recorded_command_says_all_that_makes_the_weights(text_file, tmp_path, capsys):
    asked = command(
        text_file, tmp_path / "a.safetensors", "--lr", "0.01", "--optimizer", "adamw"
    )
    main(asked)
    recorded = load(tmp_path / "a.safetensors").info["command"].split()
    assert recorded[:4] == ["python", "-m", "gptlite.train", "draft"]
    again = [
        f"--corpus={text_file}" if option.startswith("--corpus=") else option
        for option in recorded[3:]
    ]
    main([*again, "--out", str(tmp_path / "b.safetensors"), "--no-compile"])
    assert same_weights(*(load(tmp_path / f"{name}.safetensors").model for name in "ab"))


def test_a_run_can_begin_with_the_weights_of_another(text_file, tmp_path, capsys):
    first = tmp_path / "first.safetensors"
    main(command(text_file, first))
    trained = load(first)
    for start in (first, tmp_path / "first.state"):
        out = tmp_path / "second.json"
        more = [
            "--start",
            str(start),
            "--confidence-penalty",
            "0.1",
            "--lr",
            "1e-6",
            "--adamw-lr",
            "1e-6",
        ]
        main(
            command(
                text_file, out, *more, "--state", str(tmp_path / f"from{start.suffix}.state")
            )
        )
        record = json.loads(out.read_text())
        assert record["start"] == {"name": "first", "train": trained.info["train"], "steps": 3}
        assert record["confidence_penalty"] == 0.1
        assert (
            "--start=first" in record["command"]
            and "--confidence-penalty=0.1" in record["command"]
        )
        assert record["val_loss"] == pytest.approx(
            trained.info["val_loss"], abs=2e-3
        )  # with such a learning rate
        for other in (
            more[:2],
            [*more[:3], "0.2", *more[4:]],
            more[2:],
        ):  # that state is of this start and this loss
            state = ["--state", str(tmp_path / f"from{start.suffix}.state")]
            again = ["--lr", "1e-6", "--adamw-lr", "1e-6", *other, *state]
            with pytest.raises(ValueError, match=r"holds another run \(.*recipe "):
                main(command(text_file, out, *again))
    other = command(
        text_file, out, "--start", str(ROOT / "assets" / "checkpoints" / "teacher.safetensors")
    )
    with pytest.raises(ValueError, match="is of another architecture"):
        main([*other, "--state", str(tmp_path / "other.state")])


def test_the_record_of_a_prolonged_run_says_how_it_came_about(text_file, tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    main(command(text_file, out))
    main(command(text_file, out, "--steps", "5"))
    info = load(out).info
    assert info["log"]["prolonged"] == [[3, 3]]
    first, second = info["command"].split("\n")
    assert first.replace("--steps=3", "--steps=5") == second
    for line in (first, second):
        options = [
            f"--corpus={text_file}" if o.startswith("--corpus=") else o
            for o in line.split()[3:]
        ]
        main([*options, "--out", str(tmp_path / "b.safetensors"), "--no-compile"])
    assert (
        load(tmp_path / "b.safetensors").info["log"]["train_loss"] == info["log"]["train_loss"]
    )


def test_the_record_of_a_run_prolonged_on_its_way_says_where(text_file, tmp_path, corpus):
    out, state = tmp_path / "a.safetensors", tmp_path / "a.state"
    short = training.load_corpus(text_file)
    shape = replace(PRESETS["draft"][0], vocab_size=len(short.tokenizer))
    torch.manual_seed(0)
    config = TrainConfig(steps=4, batch_size=2, warmup=1)
    train(GPT(shape), short, config, state_path=state, save_every=1, eval_every=0, stop_after=2)
    main(command(text_file, out))
    assert [line.partition("  # ")[2] for line in load(out).info["command"].split("\n")] == [
        "stopped at step 2",
        "",
    ]


def test_the_command_line_says_what_is_wrong(text_file, tmp_path, capsys):
    good = command(text_file, tmp_path / "out.safetensors")
    with pytest.raises(
        ValueError, match=r"the optimizer is 'sgd', but must be muon or adamw\."
    ):
        main([*good, "--optimizer", "sgd"])
    with pytest.raises(FileNotFoundError, match=r"no corpus at nowhere\.txt;"):
        main([*good, "--corpus", "nowhere.txt"])
    for more, message in (
        (["--steps", "none"], "argument --steps: invalid int value: 'none'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ):
        with pytest.raises(SystemExit):
            main([*good, *more])
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [text_file]


def test_the_command_line_shows_no_traceback(text_file, tmp_path):
    done = run_python(
        "-m",
        "gptlite.train",
        *command(text_file, tmp_path / "out.safetensors", "--corpus", "nowhere.txt"),
    )
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: no corpus at nowhere.txt; use plays, tinyshakespeare or a text file's path.\n"
    )


def test_a_text_too_short_to_evaluate_is_refused_by_the_command_line_at_once(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("to be or not to be, " * 60)  # long enough to train on
    with pytest.raises(ValueError, match="one window of 256 and its targets needs 257"):
        main(command(path, tmp_path / "out.safetensors", "--eval-every", "0"))


# Several processes


@pytest.mark.slow
def test_two_processes_at_half_the_batch_train_as_one(text_file, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    main(command(text_file, one))
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "gptlite.train",
    ]
    done = run_python(*torchrun, *command(text_file, two, "--save-every", "2"))
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = load(one), load(two)
    assert b.info["log"]["train_loss"] == pytest.approx(a.info["log"]["train_loss"], abs=2e-5)
    assert b.info["val_loss"] == pytest.approx(a.info["val_loss"], abs=2e-4)
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0)
    assert done.stdout.count("held-out loss") == 1  # one of the two speaks


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
