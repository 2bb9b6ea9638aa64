"""What is recorded comes back, replaces only its own metric; a broken file is explained."""

import json
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptlite import results
from gptlite.bench import Timing, ratio
from gptlite.results import (
    Measurement,
    Results,
    beside_the_book,
    load,
    machine_title,
    measurement,
    record,
    runs,
)
from gptlite.roofline import Machine

MACHINE = Machine(
    name="Zen (TM) 9",
    device="cpu",
    threads=2,
    read_bandwidth=1e10,
    read_kernel="int64 sum",
    matvec=[[1e6, 2e10]],
    flops={"float32": 1e11},
    overhead=1e-5,
    date="2026-01-01",
    torch="2.6.0",
)
DECODE = measurement(
    "decode",
    Timing.of([0.01, 0.02, 0.03]),
    command="make run NB=kv_cache",
    dtype="float32",
    context=256,
)
SPEEDUP = measurement("speed-up", ratio(Timing.of([6.0, 5.0, 4.0]), Timing.of([1.0, 1.0, 1.0])))
CACHE = measurement("cache", 4_718_592, "bytes")


def test_a_measurement_keeps_the_spread_and_the_context():
    assert (DECODE.value, DECODE.low, DECODE.high, DECODE.unit) == (0.02, 0.015, 0.025, "s")
    assert DECODE.context == {"dtype": "float32", "context": 256}
    assert (SPEEDUP.value, SPEEDUP.unit) == (5.0, "x")
    assert (CACHE.low, CACHE.value, CACHE.high) == (4_718_592,) * 3


def test_what_is_recorded_comes_back(tmp_path):
    path = record(MACHINE, [DECODE, SPEEDUP, CACHE], tmp_path / "new" / "folder")
    assert path.name == "zen-tm-9-2-threads.json"
    loaded = load(path.parent)["zen-tm-9-2-threads"]
    assert loaded.machine == MACHINE
    assert list(loaded.measurements) == ["decode", "speed-up", "cache"]
    again = loaded.measurements["decode"]
    assert replace(again, date="", torch="") == DECODE
    assert again.torch == "2.6.0"
    assert len(again.date) == len("2026-01-01")


def test_a_metric_measured_again_takes_its_own_place(tmp_path):
    record(MACHINE, [DECODE, CACHE], tmp_path)
    newer = replace(MACHINE, torch="2.13.0", overhead=2e-5)
    record(newer, [SPEEDUP, replace(DECODE, value=0.016)], tmp_path)
    loaded = load(tmp_path)["zen-tm-9-2-threads"]
    assert loaded.machine == newer
    assert list(loaded.measurements) == ["decode", "cache", "speed-up"]
    assert loaded.measurements["decode"].value == 0.016
    assert [m.torch for m in loaded.measurements.values()] == ["2.13.0", "2.6.0", "2.13.0"]


def test_another_machine_gets_another_file(tmp_path):
    record(MACHINE, [DECODE], tmp_path)
    record(replace(MACHINE, threads=4), [DECODE], tmp_path)
    record(replace(MACHINE, name="NVIDIA H200", device="cuda"), [DECODE], tmp_path)
    assert list(load(tmp_path)) == ["nvidia-h200", "zen-tm-9-2-threads", "zen-tm-9-4-threads"]


def test_an_interrupted_record_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = record(MACHINE, [DECODE], tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        record(MACHINE, [CACHE], tmp_path)
    assert path.read_bytes() == before
    assert list(load(tmp_path)) == [path.stem]  # what was left half done is not read


def test_a_broken_file_is_not_overwritten(tmp_path):
    path = record(MACHINE, [DECODE], tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a results file"):
        record(MACHINE, [CACHE], tmp_path)
    assert path.read_text() == "{"


def test_an_empty_or_missing_folder_holds_nothing(tmp_path):
    assert load(tmp_path) == load(tmp_path / "missing") == {}


def test_what_the_book_has_recorded_is_whole():
    for stem, recorded in load().items():
        assert recorded.measurements, stem
        for m in recorded.measurements.values():
            assert m.date, m
            assert m.torch, m


GOOD = {"metric": "decode", "value": 2.0, "low": 1.0, "high": 3.0, "unit": "s"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"value": "fast"}, "the value of 'decode' is 'fast', but must be a finite number."),
        ({"value": float("nan")}, "the value of 'decode' is nan, but must be a finite number."),
        ({"high": float("inf")}, "the high of 'decode' is inf, but must be a finite number."),
        ({"low": True}, "the low of 'decode' is True, but must be a finite number."),
        ({"low": 2.5}, "'decode' has 2.0 outside its spread, 2.5 to 3.0."),
        ({"metric": ""}, "a measurement has metric '' and unit 's', but both must be names."),
        ({"unit": 3}, "a measurement has metric 'decode' and unit 3, but both must be names."),
    ],
)
def test_a_broken_measurement_is_refused_and_named(tmp_path, change, reason):
    with pytest.raises(ValueError) as error:
        Measurement(**GOOD | change)
    assert str(error.value) == reason
    path = record(MACHINE, [DECODE], tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"measurements": [GOOD | change]}))
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert str(error.value) == f"{path} is not a results file ({reason})."


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b'{"machine"', "Expecting"),
        (b"\xff\xfe", "can't decode"),
        (b"[]", "list indices must be"),
        (b"{}", "it has no 'machine'"),
        (b'{"machine": {}}', "not a machine's calibration"),
        (b'{"machine": {"name": "x"}, "measurements": []}', "not a machine's calibration"),
    ],
)
def test_a_broken_file_is_refused_and_named(tmp_path, content, reason):
    path = tmp_path / "machine.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"machine\.json is not a results file") as error:
        load(tmp_path)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("measurements", "reason"),
    [
        (None, "not iterable"),
        ([3], "argument after ** must be a mapping"),
        ([GOOD, GOOD], "a metric is in it twice"),
    ]
    + [
        ([{"metric": "x"}], "missing 4 required"),
        ([GOOD | {"colour": 1}], "unexpected keyword argument 'colour'"),
    ],
)
def test_broken_measurements_are_refused(tmp_path, measurements, reason):
    path = record(MACHINE, [DECODE], tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"measurements": measurements}))
    with pytest.raises(ValueError, match="is not a results file") as error:
        load(tmp_path)
    assert reason in str(error.value)


@given(st.data())
def test_a_truncated_file_is_never_read_as_whole(tmp_path_factory, data):
    path = record(MACHINE, [DECODE, CACHE], tmp_path_factory.mktemp("results"))
    text = path.read_text().rstrip()
    path.write_text(text[: data.draw(st.integers(0, len(text) - 1))])
    with pytest.raises(ValueError, match="is not a results file"):
        load(path.parent)


def test_the_table_sets_here_beside_there():
    book = Results(
        MACHINE, {m.metric: m for m in (replace(DECODE, value=0.01, low=0.01), CACHE)}
    )
    other = Results(replace(MACHINE, name="GPU", device="cuda"), {SPEEDUP.metric: SPEEDUP})
    unrelated = Results(MACHINE, {})
    here = replace(MACHINE, name="a|b", threads=1)
    text = beside_the_book(
        here, [DECODE, SPEEDUP, CACHE], {"book": book, "other": other, "unrelated": unrelated}
    )
    assert text.splitlines() == [
        r"|  | here: a\|b, 1 thread | Zen (TM) 9, 2 threads | GPU |",
        "| --- | ---: | ---: | ---: |",
        "| decode | 20.0 ms | 10.0 ms (here 2.00x) | not recorded |",
        "| speed-up | 5.00x | not recorded | 5.00x (here 1.00x) |",
        "| cache | 4.72 MB | 4.72 MB (here 1.00x) | not recorded |",
    ]


def test_a_record_does_not_stand_beside_itself():
    """As on the book's pages, whose measurements have just been recorded: no "here 1.00x"."""
    own = Results(MACHINE, {m.metric: m for m in (DECODE, CACHE)})
    gpu = replace(MACHINE, name="GPU", device="cuda")
    other = Results(gpu, {"decode": replace(DECODE, value=0.02, low=0.0, high=1.0)})
    text = beside_the_book(MACHINE, [DECODE, CACHE], {"own": own, "other": other})
    assert text.splitlines() == [
        "|  | the book's: Zen (TM) 9, 2 threads | GPU |",
        "| --- | ---: | ---: |",
        "| decode | 20.0 ms | 20.0 ms |",
        "| cache | 4.72 MB | not recorded |",
    ]
    again = replace(DECODE, value=0.021)  # the same machine, on another day
    text = beside_the_book(MACHINE, [again, CACHE], {"own": own})
    assert text.splitlines()[0] == "|  | here: Zen (TM) 9, 2 threads | Zen (TM) 9, 2 threads |"
    assert text.splitlines()[2] == "| decode | 21.0 ms | 20.0 ms (here 1.05x) |"


def test_the_table_stands_without_any_record():
    assert beside_the_book(MACHINE, [CACHE], {}).splitlines()[-1] == "| cache | 4.72 MB |"
    assert len(beside_the_book(MACHINE, [], {}).splitlines()) == 2


def test_the_table_does_not_compare_seconds_with_bytes():
    book = {"book": Results(MACHINE, {"cache": replace(CACHE, unit="s")})}
    with pytest.raises(
        ValueError, match=r"^'cache' is in bytes here, but was recorded in s\.$"
    ):
        beside_the_book(MACHINE, [CACHE], book)


def test_a_record_of_zero_has_no_ratio():
    nothing = measurement("difference", 0, "logits")
    book = {"m": Results(replace(MACHINE, threads=4), {"difference": nothing})}
    assert beside_the_book(MACHINE, [nothing], book).endswith("| 0 logits | 0 logits |")


def test_the_machine_s_title():
    assert machine_title(MACHINE) == "Zen (TM) 9, 2 threads"
    assert machine_title(replace(MACHINE, device="cuda")) == "Zen (TM) 9"


RUNS = {"command": "python a.py", "runs": {"one": {"val_loss": 1.5}}, "machine": {}, "date": ""}


def test_the_records_of_runs_are_read_by_name(tmp_path):
    (tmp_path / "pruning").mkdir()
    (tmp_path / "pruning" / "halves.json").write_text(json.dumps(RUNS), encoding="utf-8")
    assert runs("pruning/halves", tmp_path) == RUNS
    with pytest.raises(FileNotFoundError) as error:
        runs("pruning/halfs", tmp_path)
    missing = tmp_path / "pruning" / "halfs.json"
    assert str(error.value) == f"there is no record {missing}; known are pruning/halves."
    with pytest.raises(FileNotFoundError, match=r"known are none\.$"):
        runs("pruning/halves", tmp_path / "pruning")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (json.dumps(RUNS).encode()[:-9], "Unterminated string"),
        (b"\xff\xfe", "can't decode byte"),
        (b"[]", "it has no runs"),
        (b'{"command": "", "machine": {}, "date": ""}', "it has no runs"),
        (b'{"runs": [], "command": "", "machine": {}, "date": ""}', "it has no runs"),
        (b'{"runs": {}, "machine": {}, "date": ""}', "it has no command"),
        (b'{"runs": {}, "command": "", "date": ""}', "it has no machine"),
    ],
)
def test_a_record_of_runs_that_is_not_whole_is_refused(tmp_path, content, reason):
    (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.json is not a record of runs \(") as error:
        runs("broken", tmp_path)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_the_book_s_records_of_runs_are_whole():
    names = ("distillation/students", "pruning/halves", "pruning/search", "pruning/weights")
    names += ("quantization/teacher", "uptraining/kv_heads")
    for name in names:
        assert all("tried" in run or "val_loss" in run for run in runs(name)["runs"].values())


def test_the_record_s_folder_is_the_book_s():
    assert results.FOLDER.parts[-2:] == ("assets", "results")
