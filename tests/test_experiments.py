"""The experiments that take hours, on a tiny model: all runs are recorded and kept."""

import json
import sys

import distill_students
import halve_teacher
import prune_teacher
import pytest
import quantize_teacher
import recorded_runs
import search_architecture
import teaching
import torch
import uptrain_kv_heads
from sums import VOCABULARY

from gptlite.checkpoints import Checkpoint
from gptlite.distillation.losses import forward_kl, reverse_kl
from gptlite.pruning import shape_search
from gptlite.train import loop


@pytest.fixture
def experiment(make_model, corpus, monkeypatch, tmp_path):
    """A function that runs a script's experiment on a tiny teacher and returns its record."""
    teacher = make_model(
        vocab_size=VOCABULARY, block_size=8, n_layer=4, n_head=4, n_embd=16, dropout=0.1
    )
    monkeypatch.setattr(teaching, "load_corpus", lambda name: corpus)
    monkeypatch.setattr(
        teaching, "load_pretrained", lambda name: Checkpoint(teacher, corpus.tokenizer, {})
    )
    monkeypatch.setattr(teaching, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(teaching.shutil, "which", lambda name: None)  # nothing is compiled
    monkeypatch.setattr(teaching, "EVERY", 2)
    monkeypatch.setattr(halve_teacher, "SEEDS", (0, 1))
    monkeypatch.setattr(
        distill_students,
        "SIZES",
        {"small": (1, 2, 8), "middle": (1, 2, 12), "large": (2, 2, 16)},
    )
    monkeypatch.setattr(distill_students, "SEEDS", (0, 1, 2))
    monkeypatch.setattr(distill_students, "HIDDEN", (0, 2))
    sweep = {
        "KL, T 1, alpha 0.9": (1, 0.9, forward_kl),
        "reverse KL, T 1, alpha 0.9": (1, 0.9, reverse_kl),
    }
    monkeypatch.setattr(distill_students, "SWEEP", sweep)

    def run(script, *arguments, steps=5) -> dict:
        out = tmp_path / f"{script.__name__}.json"
        monkeypatch.setattr(
            sys, "argv", [script.__name__, "--steps", str(steps), "--out", str(out), *arguments]
        )
        script.main()
        return json.loads(out.read_text())

    return run


def test_the_students(experiment, monkeypatch):
    record = experiment(distill_students)
    runs = record["runs"]
    assert record["best"] == "KL, T 1, alpha 0.9"
    for size in ("small", "middle", "large"):
        for seed in range(3):
            pair = [runs[f"{size}, {kind}, seed {seed}"] for kind in ("baseline", "distilled")]
            assert (
                pair[0]["parameters"] == pair[1]["parameters"]
                and pair[0]["val_loss"] != pair[1]["val_loss"]
            )
            assert [step for step, _ in pair[0]["curve"]] == [2, 4] and pair[0][
                "steps"
            ] == pair[1]["steps"] == 5
            assert runs[f"{size}, distilled in 3/4 of the steps, seed {seed}"]["steps"] == 3
    assert (
        runs["small, distilled, seed 0"]["val_loss"]
        == runs["sweep, KL, T 1, alpha 0.9"]["val_loss"]
    )
    assert (
        len(
            {
                runs[n]["val_loss"]
                for n in runs
                if n.startswith("small, baseline") and n.endswith("seed 0")
            }
        )
        == 4
    )
    longer = [
        runs[f"small, {kind} in 4 times the steps, seed 0"]
        for kind in ("baseline", "distilled")
    ]
    assert [r["steps"] for r in longer] == [20, 20] and longer[0]["val_loss"] != longer[1][
        "val_loss"
    ]
    assert {n for n in runs if "iterated" in n} == {
        "middle, iterated, seed 0",
        "small, iterated, seed 0",
    }
    taught = [
        runs[f"small, {n}, seed 0"]["val_loss"]
        for n in ("one teacher of large", "three teachers of large")
    ]
    taught += [
        runs[f"small, {n}, seed 0"]["val_loss"]
        for n in ("two that learn together", "hidden states")
    ]
    assert (
        len(
            {
                *taught,
                runs["small, iterated, seed 0"]["val_loss"],
                runs["small, top 8, seed 0"]["val_loss"],
            }
        )
        == 6
    )
    monkeypatch.setattr(
        recorded_runs, "write_atomically", lambda *_: pytest.fail("something was run again")
    )
    assert experiment(distill_students) == record


def test_the_halves(experiment, monkeypatch):
    record = experiment(halve_teacher)
    for seed in (0, 1):
        runs = {
            n.rpartition(",")[0]: r
            for n, r in record["runs"].items()
            if n.endswith(f"seed {seed}")
        }
        once = {"cut, taught at the full rate", "wide, distilled"}
        once |= {"wide, cut, taught", "wide, cut, taught at the full rate"}
        thrice = {"text alone", "distilled", "distilled at a third of the rate"}
        thrice |= {"in steps", "cut, taught", "cut, text alone"}
        assert set(runs) == (thrice | once if seed == 0 else thrice)
        shapes = {
            n: (r["n_layer"], r["n_head"], r["n_embd"], r["hidden"]) for n, r in runs.items()
        }
        assert all(
            shape == ((2, 2, 16, 32) if "wide" in n else (2, 2, 8, 32))
            for n, shape in shapes.items()
        )
        assert [stage["scale"] for stage in runs["in steps"]["stages"]] == list(
            halve_teacher.SCALES
        )
        assert (
            runs["cut, taught"]["before_training"] == runs["cut, text alone"]["before_training"]
        )
        assert len({r["val_loss"] for r in runs.values()}) == len(runs)
    monkeypatch.setattr(
        recorded_runs, "write_atomically", lambda *_: pytest.fail("something was run again")
    )
    assert experiment(halve_teacher) == record


def test_the_weights(experiment, monkeypatch):
    runs = experiment(prune_teacher, steps=6)["runs"]
    assert runs["none"]["zeros"] < 0.01 and runs["2 of 4, at once"]["zeros"] == pytest.approx(
        0.5, abs=0.01
    )
    for share in prune_teacher.SPARSITIES:
        rates, *both = (
            runs[f"{share:.0%}, {way}"] for way in ("rates", "at once", "gradually")
        )
        best = min(rates["tried"], key=lambda pair: pair[1])[0]
        assert [rate for rate, _ in rates["tried"]] == list(prune_teacher.RATES)
        assert all(
            run["rate"] == best and run["zeros"] == pytest.approx(share, abs=0.01)
            for run in both
        )
        at_once, gradually = both
        assert gradually["curve"][0] == runs["none"]["curve"][0] != at_once["curve"][0]
        assert at_once["val_loss"] != gradually["val_loss"]
    monkeypatch.setattr(
        recorded_runs, "write_atomically", lambda *_: pytest.fail("something was run again")
    )
    assert experiment(prune_teacher, steps=6)["runs"] == runs


@pytest.mark.parametrize("budget", ["1e9", "1e-9"])
def test_the_search(experiment, monkeypatch, budget):
    choices = {
        "layers": (1, 2),
        "heads": (1, 2),
        "head size": (4,),
        "queries of a KV head": (1, 2),
        "MLP ratio": (2,),
    }
    monkeypatch.setattr(shape_search, "CHOICES", choices)
    monkeypatch.setattr(search_architecture, "SIZES", {"small": (1, 2, 8), "large": (2, 2, 16)})
    monkeypatch.setattr(search_architecture, "CONTEXT", 3)
    monkeypatch.setattr(search_architecture, "NEW", 2)
    options = "--budget", budget, "--long", "3", "--trials"
    record = experiment(search_architecture, *options, "4")
    runs = record["runs"]
    assert record["machine"]["threads"] == str(torch.get_num_threads())
    tried = ["by hand, small", "by hand, large", *(f"trial {i}" for i in range(4))]
    assert list(runs)[:6] == tried
    for run in (runs[name] for name in tried):
        assert (
            run["latency"][1] <= run["latency"][0] <= run["latency"][2]
            and run["parameters"] > 0
        )
        assert (run["val_loss"] is None) == (budget == "1e-9")
    long = {name: run for name, run in runs.items() if ", 3 steps, seed " in name}
    assert len(runs) == 6 + len(long) and len(long) == (3 if budget == "1e9" else 0)
    if long:  # the best of what was found, not of what was made by hand
        best = min((runs[name] for name in tried[2:]), key=lambda run: run["val_loss"])
        assert all(run["config"] == best["config"] for run in long.values())
        assert len({run["val_loss"] for run in long.values()}) == 3
    more = experiment(search_architecture, *options, "6")["runs"]  # goes on where it was
    assert {n for n in more if n.startswith("trial")} == {f"trial {i}" for i in range(6)}
    assert {n: more[n] for n in runs} == runs


def test_a_finished_student_is_read_from_where_it_was_kept(experiment, monkeypatch):
    record = experiment(distill_students)
    students = distill_students.Students(5, teaching.cache_folder() / "again.json")
    monkeypatch.setattr(loop.Run, "step", lambda self: pytest.fail("it was trained again"))
    model, log = students.trained(
        "small, baseline, seed 0", "small", 0, distill_students.Distillation(alpha=0)
    )
    assert students.loss(model) == record["runs"]["small, baseline, seed 0"]["val_loss"]
    assert len(log["train_loss"]) == 5


STOPPED = "the parameters are those of the record"


@pytest.mark.parametrize(
    "script",
    [distill_students, halve_teacher, prune_teacher, search_architecture, quantize_teacher]
    + [uptrain_kv_heads],
)
def test_the_book_s_record_has_the_parameters_of_its_script(script, monkeypatch):
    """So that a script goes on with what the book has; all that takes time comes after that."""

    def stop(*args):
        raise InterruptedError(STOPPED)

    for name in ("load_corpus", "load_pretrained"):
        monkeypatch.setattr(script, name, stop, raising=False)
        monkeypatch.setattr(teaching, name, stop)
    monkeypatch.setattr(sys, "argv", [script.__name__])
    with pytest.raises(InterruptedError, match=STOPPED):
        script.main()
    monkeypatch.setattr(sys, "argv", [script.__name__, "--steps", "7"])
    with pytest.raises(ValueError, match=r"was recorded with (train\.)?steps \d+, but it is 7"):
        script.main()
