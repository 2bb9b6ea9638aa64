"""An experiment goes on where it was, and never in the place of runs with other parameters."""

import json
import re

import pytest
from recorded_runs import RecordedRuns, in_a_sentence, options

from gptlite.results import runs


def test_what_is_recorded_is_not_done_again(tmp_path):
    path = tmp_path / "record.json"
    first = RecordedRuns(path, "a", sizes=(1, 2))
    assert first.run("one", lambda: {"loss": 1.0}) == {"loss": 1.0}
    with pytest.raises(KeyboardInterrupt):
        first.run("two", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    again = RecordedRuns(path, "a", sizes=(1, 2))
    assert again.run("one", lambda: pytest.fail("it was done again")) == {"loss": 1.0}
    again.run("two", lambda: {"loss": 2.0})
    record = runs("record", tmp_path)
    assert record["runs"] == {"one": {"loss": 1.0}, "two": {"loss": 2.0}}
    assert record["sizes"] == [1, 2] and set(record["machine"]) == {"device", "torch"}


def test_another_command_goes_on_with_the_same_parameters(tmp_path):
    """A script that has moved, or that is called with options which change no run."""
    path = tmp_path / "record.json"
    RecordedRuns(path, "python old.py", k=8).run("one", lambda: {"loss": 1.0})
    moved = RecordedRuns(path, "python new.py", k=8)
    moved.run("one", lambda: pytest.fail("it was done again"))
    assert runs("record", tmp_path)["command"] == "python old.py"  # nothing is new
    moved.run("two", lambda: {"loss": 2.0})
    record = runs("record", tmp_path)
    assert record["command"] == "python new.py" and set(record["runs"]) == {"one", "two"}


@pytest.mark.parametrize(
    ("parameters", "difference"),
    [
        ({"train": {"steps": 9, "lr": 0.1}, "k": 8}, "train.steps 5, but it is 9 now"),
        ({"train": {"steps": 5, "lr": 0.1}, "k": [8]}, "k 8, but it is [8] now"),
        ({"train": {"steps": 5, "clip": 1}}, "train.clip not named, but it is 1 now"),
        ({"alpha": None}, "alpha not named, but it is null now"),
    ],
)
def test_other_parameters_are_refused_and_nothing_is_lost(tmp_path, parameters, difference):
    path = tmp_path / "record.json"
    old = RecordedRuns(path, "a", train={"steps": 5, "lr": 0.1}, k=8)
    old.run("one", lambda: {"loss": 1.0})
    before = path.read_bytes()
    message = (
        f"{path} was recorded with {difference}; name another --out, or overwrite the record "
        "with --fresh."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RecordedRuns(path, "a", **parameters)
    assert path.read_bytes() == before


def test_a_fresh_record_takes_the_place_of_another_when_it_has_a_run(tmp_path):
    path = tmp_path / "record.json"
    RecordedRuns(path, "a", k=8).run("one", lambda: {}, device="a GPU", dtype="bfloat16")
    before = path.read_bytes()
    other = RecordedRuns(path, "b", fresh=True, k=9)
    assert path.read_bytes() == before
    other.run("two", lambda: {"loss": 2.0})
    record = runs("record", tmp_path)
    assert (record["command"], record["k"], set(record["runs"])) == ("b", 9, {"two"})


def test_a_broken_record_is_not_overwritten(tmp_path):
    path = tmp_path / "record.json"
    path.write_text('{"runs": {"one"')
    with pytest.raises(ValueError, match=r"record\.json is not a record of runs"):
        RecordedRuns(path, "a")
    assert path.read_text() == '{"runs": {"one"'
    RecordedRuns(path, "a", fresh=True).run("one", lambda: {})
    assert runs("record", tmp_path)["runs"] == {"one": {}}


def test_a_run_on_another_machine_says_so(tmp_path):
    path = tmp_path / "record.json"
    recorded = RecordedRuns(path, "a")
    recorded.run("one", lambda: {"loss": 1.0}, device="a CPU")
    recorded.run("two", lambda: {"loss": 2.0}, device="a GPU", dtype="bfloat16")
    recorded.run("three", lambda: {"loss": 3.0}, device="a CPU")
    record = json.loads(path.read_text())
    assert record["machine"]["device"] == "a CPU"
    assert record["runs"]["two"]["machine"]["device"] == "a GPU"
    assert record["runs"]["two"]["machine"]["dtype"] == "bfloat16"
    assert record["runs"]["one"].keys() == record["runs"]["three"].keys() == {"loss"}


def test_a_place_that_cannot_be_written_to_is_refused_at_once(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        RecordedRuns(tmp_path, "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="because nothing can be in"):
        RecordedRuns(tmp_path / "file" / "record.json", "a")


def test_parameters_that_cannot_be_kept_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the parameters, \{'out': PosixPath.*as JSON"):
        RecordedRuns(tmp_path / "record.json", "a", out=tmp_path)


def test_every_experiment_has_the_same_options():
    args = options("What it does.\nMore.", "pruning/halves", 1200).parse_args([])
    assert (args.steps, args.fresh) == (1200, False)
    assert args.out.parts[-3:] == ("results", "pruning", "halves.json") and args.out.exists()


def test_what_is_refused_ends_in_a_sentence():
    def main():
        raise ValueError("steps is 0.")

    with pytest.raises(SystemExit, match=r"^error: steps is 0\.$"):
        in_a_sentence(main)
