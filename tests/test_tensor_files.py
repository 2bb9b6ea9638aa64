"""Files of tensors: what goes in comes out, or a sentence, and never something else."""

import json
import math
import os
import re
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from gptlite.tensor_files import digest, read_tensors, write_tensors


def test_tensors_of_any_kind_come_back(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "half": torch.arange(3).half(),
        "numbers": torch.arange(3),
    }
    write_tensors(tmp_path / "t", tensors, {"umlaut": "ä", "none": None})
    back, info = read_tensors(tmp_path / "t")
    assert info == {"umlaut": "ä", "none": None}
    assert back.keys() == tensors.keys()
    for name, t in tensors.items():
        assert torch.equal(back[name], t)
        assert back[name].dtype == t.dtype


def test_a_file_appears_only_when_it_is_whole(tmp_path, monkeypatch):
    """Interrupted at the worst moments, a write leaves the file before it as it was."""
    path = tmp_path / "t"
    write_tensors(path, {"a": torch.zeros(3)}, {"n": 1})

    def killed(*args):
        raise KeyboardInterrupt

    def half(part, content):
        with part.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    for owner, name, interruption in ((os, "replace", killed), (Path, "write_bytes", half)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interruption)
            with pytest.raises(KeyboardInterrupt):
                write_tensors(path, {"a": torch.ones(3)}, {"n": 2})
        tensors, info = read_tensors(path)
        assert info == {"n": 1}
        assert torch.equal(tensors["a"], torch.zeros(3))
    write_tensors(
        path, {"a": torch.ones(3)}, {"n": 3}
    )  # what was left behind is in nobody's way
    assert read_tensors(path)[1] == {"n": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_others_may_read_a_checkpoint(tmp_path):
    before = os.umask(0o022)
    write_tensors(tmp_path / "t", {"a": torch.zeros(3)}, {})
    os.umask(before)
    assert stat.S_IMODE((tmp_path / "t").stat().st_mode) == 0o644


# Damage

TENSORS = {
    "half": torch.arange(6).half().view(2, 3),
    "n": torch.tensor(7),
    "b": torch.ones(2) > 0,
}
INFO = {"loss": 1.4471, "steps": [1, 2, None, True], "name": "ä"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a good file."""
    path = tmp_path_factory.mktemp("whole") / "whole"
    write_tensors(path, TENSORS, INFO)
    return path.read_bytes()


@given(st.data())
def test_a_flipped_bit_is_noticed_wherever_it_is(whole, tmp_path_factory, data):
    """Or it changes nothing, as in the word that announces the digest."""
    path = tmp_path_factory.mktemp("flip") / "flip"
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    said = str(path)
    try:
        tensors, info = read_tensors(path)
    except ValueError as error:
        said = str(error)
    else:
        assert info == INFO
        assert tensors.keys() == TENSORS.keys()
        for name, t in tensors.items():
            assert t.dtype == TENSORS[name].dtype and torch.equal(t, TENSORS[name])
    assert str(path) in said


@pytest.mark.parametrize("where", ["tensor", "info"])
def test_each_bit_of_the_tensors_and_the_info_is_watched(whole, tmp_path, where):
    end = 8 + int.from_bytes(whole[:8], "little")
    number = whole.index(b"1.4471")
    for at in range(end, len(whole)) if where == "tensor" else range(number, number + 6):
        for bit in range(8) if where == "tensor" else range(1):  # another digit
            if whole[at] != ord("."):
                flipped = whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
                (tmp_path / "flip").write_bytes(flipped)
                with pytest.raises(
                    ValueError, match=r"flip is damaged: its SHA-256 is [0-9a-f]{64};"
                ):
                    read_tensors(tmp_path / "flip")


def test_a_file_from_before_there_were_digests_is_read(tmp_path):
    (tmp_path / "old").write_bytes(save(TENSORS, {"info": json.dumps(INFO)}))
    tensors, info = read_tensors(tmp_path / "old")
    assert info == INFO and torch.equal(tensors["half"], TENSORS["half"])


def test_a_digest_knows_names_formats_and_shapes_from_each_other():
    ones = torch.ones(2, 2)
    others = [
        ({"a": ones}, "{}"),
        ({"b": ones}, "{}"),
        ({"a": ones.view(4)}, "{}"),
        ({"a": ones.view(torch.int32)}, "{}"),
        ({"a": ones[:1], "b": ones[1:]}, "{}"),
        ({"a": ones}, "[]"),
    ]
    assert len({digest(*other) for other in others}) == len(others)
    assert digest({"a": ones, "b": ones}, "") == digest({"b": ones, "a": ones}, "")


# What JSON would change


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (
            {"train": {"betas": (0.9, 0.99)}},
            "info['train']['betas'] is (0.9, 0.99), which JSON",
        ),
        (
            {"log": {"at": [1, {2: 3}]}},
            "info['log']['at'][1] has the key 2, but JSON's are all",
        ),
        ({"val_loss": math.nan}, "info['val_loss'] is nan, which JSON does not give back"),
        ({"out": Path("a")}, "info['out'] is "),
        ({"dtype": torch.float16}, "info['dtype'] is torch.float16, which JSON does not"),
    ],
)
def test_an_info_that_would_be_read_as_another_is_refused(tmp_path, info, message):
    write_tensors(tmp_path / "t", TENSORS, INFO)
    with pytest.raises(ValueError, match=re.escape(message)):
        write_tensors(tmp_path / "t", TENSORS, info)
    assert read_tensors(tmp_path / "t")[1] == INFO


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_any_other_info_comes_back_as_it_was(tmp_path_factory, info):
    path = tmp_path_factory.mktemp("info") / "t"
    write_tensors(path, TENSORS, info)
    assert read_tensors(path)[1] == info
