"""The script that records how shared heads are trained on keeps what it has."""

import json
import sys

import pytest
import uptrain_kv_heads as uptrain
from sums import VOCABULARY

from gptlite.checkpoints import Checkpoint


@pytest.fixture
def tiny(make_model, corpus, monkeypatch, tmp_path):
    """A function that runs the script on a tiny model and returns its record."""
    monkeypatch.setattr(uptrain, "load_corpus", lambda name: corpus)
    model = make_model(vocab_size=VOCABULARY, block_size=16)
    monkeypatch.setattr(
        uptrain, "load_pretrained", lambda name: Checkpoint(model, corpus.tokenizer, {})
    )
    monkeypatch.setattr(uptrain.shutil, "which", lambda name: None)  # nothing is compiled
    monkeypatch.setattr(uptrain, "EVERY", 2)

    def run(steps: int, *more: str) -> dict:
        out = tmp_path / "record.json"
        argv = ["uptrain_kv_heads.py", "--steps", str(steps), "--out", str(out), *more]
        monkeypatch.setattr(sys, "argv", argv)
        uptrain.main()
        return json.loads(out.read_text())

    return run


def test_every_number_of_heads_is_recorded(tiny, capsys):
    record = tiny(5)
    assert list(record["runs"]) == ["4", "2", "1"]
    assert record["command"] == "python scripts/experiments/uptrain_kv_heads.py --steps 5"
    for run in record["runs"].values():
        assert [step for step, _ in run["curve"]] == [0, 2, 4, 5]
        assert run["curve"][-1][1] < run["curve"][0][1]  # it learns
    starts = [run["curve"][0][1] for run in record["runs"].values()]
    assert len(set(starts)) == 3  # each begins from weights of its own
    assert "4 heads: " in capsys.readouterr().out


def test_what_is_recorded_is_not_trained_again(tiny, monkeypatch):
    first = tiny(3)
    monkeypatch.setattr(uptrain, "uptrained", lambda *args: pytest.fail("it was trained again"))
    assert tiny(3) == first
    with pytest.raises(
        ValueError, match=r"recorded with train\.steps 3, but it is 4 now; name"
    ):
        tiny(4)
    assert tiny(3) == first
    monkeypatch.setattr(uptrain, "uptrained", lambda *args: {"val_loss": 1.0})
    fresh = tiny(4, "--fresh")
    assert fresh["runs"] == {heads: {"val_loss": 1.0} for heads in ("4", "2", "1")}
    assert fresh["train"]["steps"] == 4
