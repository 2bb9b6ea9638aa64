"""Files are read whole or refused, whatever their size, and a flipped bit is noticed."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptlite.onnx_export import files
from gptlite.onnx_export.files import check_onnx, load_onnx, save_onnx
from gptlite.onnx_export.sessions import open_session

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def doubled(opset: int = 20, values: int = 4) -> "onnx.ModelProto":
    """y = x + w."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [values]) for name in "xy")
    weight = numpy_helper.from_array(np.arange(values, dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], "sum", [x], [y], [weight]
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8
    )


def test_a_file_is_read_whole_with_its_weights_beside_it(tmp_path):
    onnx.save(
        doubled(values=400),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
    )
    session = open_session(tmp_path / "m.onnx", threads=1)
    assert (session.run(None, {"x": np.ones(400, np.float32)})[0] == 1 + np.arange(400)).all()


def test_weights_that_are_gone_are_named(tmp_path):
    onnx.save(
        doubled(values=400),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
    )
    (tmp_path / "w.bin").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"^m\.onnx keeps its weights in w\.bin, which must lie beside it",
    ):
        load_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_refused(tmp_path, keep):
    content = doubled(values=400).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=r"^m\.onnx "):
        load_onnx(tmp_path / "m.onnx")


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"\xff" * 200)
    with pytest.raises(
        ValueError, match=r"^m\.onnx is no ONNX model, or was cut short; export it again\.$"
    ):
        load_onnx(tmp_path / "m.onnx")


def test_no_file_is_said(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no ONNX file at .*m\.onnx; export the model first\.$"
    ):
        open_session(tmp_path / "m.onnx")


@pytest.mark.parametrize("opset", [6, 99])
def test_an_opset_that_cannot_be_run_is_refused(opset):
    with pytest.raises(
        ValueError, match=rf"^it is written in opset {opset}, but opsets 7 to \d+ can be read"
    ):
        check_onnx(doubled(opset), "it")


def test_a_graph_that_breaks_a_rule_is_refused():
    model = doubled()
    model.graph.node[0].input[1] = "nowhere"
    with pytest.raises(ValueError, match=r"^the model breaks a rule of ONNX \(.*\)\.$"):
        open_session(model)


def test_a_provider_that_is_not_there_is_named():
    with pytest.raises(
        ValueError, match=r"^this onnxruntime has no TensorrtExecutionProvider; it has .*CPU"
    ):
        open_session(doubled(), providers=["TensorrtExecutionProvider", "CPUExecutionProvider"])


def test_without_onnx_runtime_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        open_session(doubled())


def test_what_the_runtime_cannot_run_is_a_sentence():
    model = doubled()
    model.graph.node[0].op_type, model.graph.node[0].domain = "Nothing", "nobody"
    model.opset_import.append(helper.make_opsetid("nobody", 1))
    with pytest.raises(
        ValueError, match=r"^ONNX Runtime [\d.]+ cannot run the model \(.*Nothing.*\)\.$"
    ):
        open_session(model)


# --- files that the project writes ---


def answers(path) -> np.ndarray:
    return open_session(path, threads=1).run(None, {"x": np.ones(400, np.float32)})[0]


@pytest.mark.parametrize("beside", [False, True])
def test_what_was_saved_is_loaded_and_the_model_is_left_alone(tmp_path, beside):
    model, path = doubled(values=400), tmp_path / "deep" / "m.onnx"
    before = model.SerializeToString()
    save_onnx(model, path, beside)
    assert model.SerializeToString() == before
    names = ["m.onnx", "m.onnx.data"] if beside else ["m.onnx"]
    assert sorted(file.name for file in path.parent.iterdir()) == names
    loaded = load_onnx(path)
    loaded.graph.initializer[0].ClearField("data_location")  # said, though it is the default
    assert loaded.SerializeToString() == before
    assert (answers(path) == 1 + np.arange(400)).all()
    # as whoever knows nothing of the digest reads it
    assert (numpy_helper.to_array(onnx.load(path).graph.initializer[0]) == range(400)).all()


def test_the_digest_is_that_of_the_weights_by_hand(tmp_path):
    from hashlib import sha256

    save_onnx(doubled(values=400), tmp_path / "m.onnx")
    [entry] = onnx.load(tmp_path / "m.onnx").metadata_props
    content = b"w 1 [400]" + np.arange(400, dtype="<f4").tobytes()
    assert (entry.key, entry.value) == ("gptlite.sha256", sha256(content).hexdigest())


@given(bit=st.integers(0, 400 * 32 - 1))
def test_no_flipped_bit_of_weights_beside_a_model_is_loaded(tmp_path_factory, bit):
    folder = tmp_path_factory.mktemp("flips")
    save_onnx(doubled(values=400), folder / "m.onnx", beside=True)
    content = bytearray((folder / "m.onnx.data").read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    (folder / "m.onnx.data").write_bytes(content)
    for read in (load_onnx, open_session):
        with pytest.raises(ValueError, match=r"^m\.onnx was written with other weights; "):
            read(folder / "m.onnx")


@given(data=st.data())
def test_a_flipped_bit_of_a_file_with_its_weights_changes_none_of_them(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flips") / "m.onnx"
    save_onnx(doubled(values=400), path)
    content = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        [weight] = load_onnx(path).graph.initializer
        assert (weight.name, list(weight.dims)) == ("w", [400])
        assert (numpy_helper.to_array(weight) == np.arange(400, dtype=np.float32)).all()


def test_weights_of_another_export_are_refused(tmp_path):
    save_onnx(doubled(values=400), tmp_path / "m.onnx", beside=True)
    other = doubled(values=400)
    other.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones(400, np.float32), "w"))
    save_onnx(other, tmp_path / "other.onnx", beside=True)
    (tmp_path / "other.onnx.data").replace(tmp_path / "m.onnx.data")
    with pytest.raises(ValueError, match=r"^m\.onnx was written with other weights; "):
        load_onnx(tmp_path / "m.onnx")


def test_weights_beside_a_model_that_were_cut_short_are_refused(tmp_path):
    save_onnx(doubled(values=400), tmp_path / "m.onnx", beside=True)
    content = (tmp_path / "m.onnx.data").read_bytes()
    (tmp_path / "m.onnx.data").write_bytes(content[:-1])
    with pytest.raises(
        ValueError, match=r"^m\.onnx\.data, with weights of m\.onnx, was cut short"
    ):
        open_session(tmp_path / "m.onnx")


def test_a_loaded_model_may_be_changed_and_saved_by_anybody(tmp_path):
    """A digest that went with it would refuse the file that the reader's own code wrote."""
    save_onnx(doubled(values=400), tmp_path / "m.onnx")
    model = load_onnx(tmp_path / "m.onnx")
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones(400, np.float32), "w"))
    onnx.save(model, tmp_path / "m.onnx")
    assert (answers(tmp_path / "m.onnx") == 2).all()


def test_what_is_broken_is_not_written_over_what_was_whole(tmp_path):
    save_onnx(doubled(values=400), tmp_path / "m.onnx", beside=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = doubled(values=400)
    broken.graph.node[0].input[1] = "nothing"
    with pytest.raises(ValueError, match=r"^m\.onnx breaks a rule of ONNX "):
        save_onnx(broken, tmp_path / "m.onnx", beside=True)
    elsewhere = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    with pytest.raises(ValueError, match=r"lie in m\.onnx\.data; read it with load_onnx\.$"):
        save_onnx(elsewhere, tmp_path / "m.onnx")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- models above 2 GB ---


def test_a_model_too_large_for_one_file_gets_two(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 1599)
    save_onnx(doubled(values=400), tmp_path / "m.onnx")  # 1,600 bytes
    assert (tmp_path / "m.onnx.data").stat().st_size == 1600
    assert (answers(tmp_path / "m.onnx") == 1 + np.arange(400)).all()
    monkeypatch.setattr(files, "LARGEST", 1600)
    save_onnx(doubled(values=400), tmp_path / "one.onnx")
    assert not (tmp_path / "one.onnx.data").exists()


def test_a_model_too_large_for_one_message_is_said_to_need_a_file(monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 1599)
    for use in (check_onnx, open_session):
        with pytest.raises(ValueError) as error:
            use(doubled(values=400))
        remedy = "write it with save_onnx, which checks it, and open the file"
        many = "1,600 bytes of weights, too many for one message"
        assert str(error.value) == f"the model has {many}; {remedy}."


@pytest.mark.slow
def test_a_file_with_more_than_two_gigabytes_beside_it_runs(tmp_path):
    """A row of a table of 2.2 GB, of which the file system keeps the holes as holes."""
    rows, columns = 550_000, 1000
    table = TensorProto(name="w", dims=[rows, columns], data_type=TensorProto.FLOAT)
    table.data_location = TensorProto.EXTERNAL
    table.external_data.add(key="location", value="w.bin")
    table.external_data.add(key="length", value=str(4 * rows * columns))
    x = helper.make_tensor_value_info("x", TensorProto.INT64, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, columns])
    gather = helper.make_node("Gather", ["w", "x"], ["y"])
    graph = helper.make_graph([gather], "look up", [x], [y], [table])
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with (tmp_path / "w.bin").open("wb") as file:
        file.seek(4 * (rows - 1) * columns)
        file.write(np.arange(columns, dtype="<f4").tobytes())
    session = open_session(tmp_path / "m.onnx", threads=1)
    [found] = session.run(None, {"x": np.array([rows - 1])})
    assert (found == np.arange(columns)).all()
