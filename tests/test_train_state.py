"""What a run keeps: a killed one goes on exactly; nothing dead or foreign is taken for it."""

import json
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import QUICK, ROOT, new_model, quiet, run_python, same_weights

from gptlite.checkpoints import save
from gptlite.tensor_files import read_tensors, write_tensors
from gptlite.train import next_token_loss, train

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
    write_tensors(state, tensors, info)
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
    """States written before it was part of them; and float32 runs, which scale no gradients."""
    state = tmp_path / "run.state"
    quiet(new_model(), corpus, QUICK, state_path=state, save_every=1, stop_after=3)
    tensors, info = read_tensors(state)
    assert {name.split(".")[0] for name in tensors} == {"model", "optimizer"}
    write_tensors(state, tensors, {k: info[k] for k in ("log", "train", "config")})
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
    change = f"corpus {corpus.fingerprint} -> {other.fingerprint}"
    message = rf"holds another run \({change}\); delete it to start anew\."
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_run_goes_on_in_the_number_format_that_it_began_in(corpus, tmp_path, dtype):
    """The record of a run names one format: it must have been that of all its steps."""
    state = tmp_path / "run.state"
    quiet(new_model(), corpus, QUICK, state_path=state, dtype=dtype, stop_after=3, save_every=1)
    before, longer = state.read_bytes(), replace(QUICK, steps=9)
    for other in {torch.float32, torch.bfloat16, torch.float16} - {dtype}:
        model = new_model()
        message = rf"holds another run \(dtype {dtype} -> {other}\); delete it to start anew\."
        with pytest.raises(ValueError, match=message):
            quiet(model, corpus, longer, state_path=state, dtype=other)
        assert same_weights(model, new_model())
        assert state.read_bytes() == before


RECIPE = {"size": (2, 3), "rates": {1: 0.5}, "teacher": None, "text": "é"}


def test_a_recipe_is_kept_as_it_is_read_back(corpus, tmp_path):
    """Tuples come back as lists, and keys as words: that is no other recipe."""
    state = tmp_path / "run.state"
    options = {"state_path": state, "recipe": RECIPE}
    quiet(new_model(), corpus, QUICK, **options, save_every=1, stop_after=2)
    losses = quiet(new_model(), corpus, QUICK, **options)["train_loss"]
    assert losses == quiet(new_model(), corpus, QUICK)["train_loss"]
    other = {**RECIPE, "size": (2, 4)}
    with pytest.raises(ValueError, match="holds another run"):
        quiet(new_model(), corpus, QUICK, state_path=state, recipe=other)


def test_a_recipe_that_cannot_be_kept_is_refused_before_the_first_step(corpus, tmp_path):
    def no_step(*batch):
        pytest.fail("it was trained")

    message = "the recipe, {'data': PosixPath('a')}, cannot be kept as JSON (Object of type"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        quiet(new_model(), corpus, QUICK, recipe={"data": Path("a")}, loss_fn=no_step)


def test_a_place_that_no_state_can_be_written_to_is_refused_at_once(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path, f"{tmp_path} is a folder; name a file in it."),
        (
            tmp_path / "file" / "a" / "b.state",
            f"because nothing can be in {tmp_path / 'file'};",
        ),
    ):
        with pytest.raises(OSError, match=re.escape(message)):
            quiet(new_model(), corpus, QUICK, state_path=path)


def test_a_dead_state_is_named(corpus, tmp_path):
    state = tmp_path / "run.state"
    quiet(new_model(), corpus, QUICK, state_path=state, stop_after=2, save_every=1)
    tensors, info = read_tensors(state)
    tensors["model.wpe.weight"][0, 0] = float("nan")
    write_tensors(state, tensors, info)
    model, name = new_model(), r"model\.wpe\.weight"
    with pytest.raises(ValueError, match=f"a run that failed: {name} is not finite; delete it"):
        quiet(model, corpus, QUICK, state_path=state)
    assert same_weights(model, new_model())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("optimizer.0.0.momentum_buffer", "optimizer.0.0.momentum"),
        ("optimizer.0.0.momentum_buffer", "optimizer.7.0.momentum_buffer"),
        ("optimizer.0.0.momentum_buffer", "optimizer.0.99.momentum_buffer"),
        ("optimizer.0.0.momentum_buffer", "optimizer.0.momentum_buffer"),
        ("optimizer.1.0.exp_avg", "optimizer.1.1.exp_avg_sq"),
        ("optimizer.1.0.exp_avg", "optimizer.1.0.step"),
        ("optimizer.1.0.step", "optimizer.1.0.exp"),
    ],
)
def test_a_state_of_other_optimizers_is_refused(corpus, tmp_path, old, new):
    state = tmp_path / "run.state"
    quiet(new_model(), corpus, QUICK, state_path=state, stop_after=2, save_every=1)
    tensors, info = read_tensors(state)
    tensors[new] = tensors.pop(old)
    write_tensors(state, tensors, info)
    model = new_model()
    with pytest.raises(ValueError, match="holds a run with other optimizers; delete it to"):
        quiet(model, corpus, QUICK, state_path=state)
    assert same_weights(model, new_model())


@pytest.mark.parametrize(
    "change",
    [
        {"log": []},
        {"log": {"train_loss": []}},
        {"log": {"train_loss": [], "val_loss": [], "seconds": "1"}},
        {"train": None},
        {"config": 3},
        {"scaler": [1]},
    ],
)
def test_a_state_that_is_not_described_as_one_is_refused(corpus, tmp_path, change):
    state = tmp_path / "run.state"
    quiet(new_model(), corpus, QUICK, state_path=state, stop_after=2, save_every=1)
    tensors, info = read_tensors(state)
    write_tensors(state, tensors, info | change)
    with pytest.raises(ValueError, match="is not the state of a training run; delete it"):
        quiet(new_model(), corpus, QUICK, state_path=state)


def test_a_flipped_bit_is_noticed_wherever_it_is(corpus, tmp_path):
    """In a weight, in what an optimizer remembers, or in the log."""
    state, flipped = tmp_path / "run.state", tmp_path / "flipped.state"
    whole = new_model()
    log = quiet(whole, corpus, QUICK, state_path=state)
    content, refused = state.read_bytes(), 0
    header = 8 + int.from_bytes(content[:8], "little")
    dice = random.Random(5)
    places = [dice.randrange(header) for _ in range(100)]
    places += [dice.randrange(header, len(content)) for _ in range(100)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << dice.randrange(8)
        flipped.write_bytes(damaged)
        model, said = new_model(), ""
        try:
            found = quiet(model, corpus, QUICK, state_path=flipped)
        except ValueError as error:
            said = str(error)
        if said:
            refused += 1
            assert "flipped.state" in said and "\n" not in said
            assert same_weights(model, new_model())
        else:  # in a name that only the file itself has
            assert place < header and found == log and same_weights(model, whole)
    assert refused > 190


@pytest.mark.parametrize("where", ["model.wpe.weight", "optimizer.0.3.momentum_buffer", "log"])
def test_a_state_that_was_changed_is_refused(corpus, tmp_path, where):
    state = tmp_path / "run.state"
    quiet(new_model(), corpus, QUICK, state_path=state, stop_after=2, save_every=1)
    tensors, info = read_tensors(state)
    content = state.read_bytes()
    if where == "log":
        loss = str(info["log"]["train_loss"][0]).encode()
        assert content.count(loss) == 1
        changed = content.replace(loss, loss[:-1] + bytes([loss[-1] ^ 1]))
    else:
        old = tensors[where].numpy().tobytes()
        assert content.count(old) == 1
        changed = content.replace(old, old[:7] + bytes([old[7] ^ 1]) + old[8:])
    state.write_bytes(changed)
    with pytest.raises(ValueError, match=r"run\.state is damaged: its SHA-256 is"):
        quiet(new_model(), corpus, QUICK, state_path=state)


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="forks, since killing needs processes that start quickly"
)
def test_a_killed_run_goes_on_to_the_bit(tmp_path):
    """SIGKILL in a step, while writing, between writing and renaming, and at random moments."""
    done = run_python(ROOT / "tests" / "kill_training.py", tmp_path)
    assert done.returncode == 0, done.stderr
    killed, whole = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("killed", "whole")
    )
    assert killed == whole
    assert len(whole[0]) == 25


# Number formats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_number_formats(corpus, tmp_path, dtype):
    """Products in 16 bits, weights in 32; close to float32, and resumed to the bit."""
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
    """An overflow halves it: a run that forgot so would leave out steps that the other took."""
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
