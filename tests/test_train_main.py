"""The command line of training: what it makes, what it records, what it refuses at once."""

import json
import math
import re
import shlex
from dataclasses import replace

import pytest
import torch
from sums import TEXT
from tiny_runs import ROOT, run_python, same_weights

from gptlite.checkpoints import load
from gptlite.corpus import load_corpus
from gptlite.model import GPT, GPTConfig
from gptlite.train import TrainConfig, evaluate, train
from gptlite.train.__main__ import PRESETS, main

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
    assert info["corpus"] == "sums.txt"
    assert len(info["log"]["train_loss"]) == 3
    assert [step for step, _ in info["log"]["val_loss"]] == [2]
    corpus = load_corpus(text_file)
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


@pytest.mark.parametrize("name", ["ma pièce.txt", "it's $HOME.txt", "plays", "plays.txt"])
def test_the_recorded_command_names_the_file(text_file, tmp_path, monkeypatch, capsys, name):
    """With its ending, as a shell takes it, and never as one of the book's: what ran, runs."""
    text_file.rename(tmp_path / name)
    main(command(tmp_path / name, tmp_path / "a.json"))
    record = json.loads((tmp_path / "a.json").read_text())
    python, m, module, *arguments = shlex.split(record["command"])
    assert (python, m, module) == ("python", "-m", "gptlite.train")
    monkeypatch.chdir(tmp_path)
    main([*arguments, "--out", "b.json", "--no-compile"])
    again = json.loads((tmp_path / "b.json").read_text())
    assert again["log"]["train_loss"] == record["log"]["train_loss"]
    assert again["fingerprint"] == record["fingerprint"]
    assert again["corpus"] == record["corpus"] == ("./plays" if name == "plays" else name)


def test_the_recorded_command_says_which_number_format_was_the_fastest(
    text_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("gptlite.train.__main__.fast_dtype", lambda device: torch.bfloat16)
    main([*command(text_file, tmp_path / "a.json"), "--dtype", "auto"])
    record = json.loads((tmp_path / "a.json").read_text())
    assert "--dtype=bfloat16" in record["command"].split()
    assert record["machine"]["dtype"] == "torch.bfloat16"
    with pytest.raises(ValueError, match=r"dtype torch\.bfloat16 -> torch\.float32"):
        main([*command(text_file, tmp_path / "a.json"), "--dtype", "float32", "--steps", "5"])


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(
        "gptlite.train.__main__.train", lambda *args, **options: pytest.fail("it was trained")
    )


def test_places_that_cannot_be_written_to_are_refused_at_once(text_file, tmp_path, no_training):
    folder, out = tmp_path / "folder", tmp_path / "out.json"
    folder.mkdir()
    for more, message in (
        (["--out", str(folder)], f"{folder} is a folder; name a file in it."),
        (["--out", ""], "--out is ., which is a folder; name a file in it."),
        (["--state", str(folder)], f"{folder} is a folder; name a file in it."),
        (["--out", f"{text_file}/a.json"], f"because nothing can be in {text_file};"),
        (["--state", str(out)], f"--out and --state are both {out}; name two files."),
        (["--out", str(tmp_path / "a.state")], "--out and --state are both"),
    ):
        with pytest.raises((OSError, ValueError), match=re.escape(message)):
            main([*command(text_file, out), *more])
    assert sorted(tmp_path.iterdir()) == [folder, text_file]


@pytest.mark.parametrize("weight", ["nan", "-0.1", "inf"])
def test_a_penalty_that_makes_no_sense_is_refused(text_file, tmp_path, no_training, weight):
    asked = command(text_file, tmp_path / "out.json", f"--confidence-penalty={weight}")
    message = rf"--confidence-penalty is {weight}, but must be a number from 0 on\."
    with pytest.raises(ValueError, match=message):
        main(asked)


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_a_model_without_a_loss_is_not_written(text_file, tmp_path, monkeypatch, ending):
    out = tmp_path / f"out.{ending}"
    out.write_text("an older one")
    monkeypatch.setattr("gptlite.train.__main__.evaluate", lambda *args: math.nan)
    message = rf"the held-out loss is nan, so that .*out\.{ending} is not written; a lower"
    with pytest.raises(FloatingPointError, match=message):
        main(command(text_file, out))
    assert out.read_text() == "an older one"


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
    short = load_corpus(text_file)
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
    message = "no corpus at nowhere.txt; use plays, tinyshakespeare or a text file's path."
    assert done.stderr == f"error: {message}\n"


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
