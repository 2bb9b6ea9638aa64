"""An experiment goes on where it was, and starts over when its facts have changed."""

import json

import pytest
from recorded_runs import RecordedRuns


def test_what_is_recorded_is_not_done_again(tmp_path):
    path = tmp_path / "record.json"
    first = RecordedRuns(path, command="a", sizes=(1, 2))
    assert first.run("one", lambda: {"loss": 1.0}) == {"loss": 1.0}
    with pytest.raises(KeyboardInterrupt):
        first.run("two", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    again = RecordedRuns(path, command="a", sizes=(1, 2))
    assert again.run("one", lambda: pytest.fail("it was done again")) == {"loss": 1.0}
    again.run("two", lambda: {"loss": 2.0})
    record = json.loads(path.read_text())
    assert record["runs"] == {"one": {"loss": 1.0}, "two": {"loss": 2.0}}
    assert record["sizes"] == [1, 2] and set(record["machine"]) == {"device", "torch"}


def test_other_facts_begin_anew(tmp_path):
    path = tmp_path / "record.json"
    RecordedRuns(path, command="a").run("one", lambda: {}, device="a GPU", dtype="bfloat16")
    assert json.loads(path.read_text())["machine"]["device"] == "a GPU"
    other = RecordedRuns(path, command="b")
    assert other.record == {"command": "b", "runs": {}}
    assert "one" in json.loads(path.read_text())["runs"]  # until there is something to write
