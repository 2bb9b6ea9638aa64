"""C++ kernels are built once for what they are made of, or not at all."""

import pytest
import torch

from gptlite.kernels import load as cpp

KERNEL = """#include <ATen/ATen.h>
#include <torch/library.h>
#include "number.h"
at::Tensor add_number(const at::Tensor& x) { return x + NUMBER; }
TORCH_LIBRARY_FRAGMENT(gptlite_test_cpp, m) { m.def("add_number(Tensor x) -> Tensor"); }
TORCH_LIBRARY_IMPL(gptlite_test_cpp, CPU, m) { m.impl("add_number", add_number); }
"""


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(cpp, "FOLDER", tmp_path)
    monkeypatch.setenv("GPTLITE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "number.h").write_text("#define NUMBER 41\n")
    (tmp_path / "add.cpp").write_text(KERNEL)
    return tmp_path


@pytest.mark.slow
def test_a_kernel_is_built_once_and_kept_under_a_name_that_says_what_it_is_made_of(
    folder, monkeypatch
):
    cpp.load_cpp("add.cpp")
    assert torch.ops.gptlite_test_cpp.add_number(torch.ones(1)) == 42
    [library] = (folder / "cache").iterdir()  # and nothing that building left behind
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    cpp.load_cpp("add.cpp")
    assert loaded == [str(library)]
    built = []
    monkeypatch.setattr(
        cpp, "_build_and_load", lambda sources, folder: built.append(sources) or library
    )
    (folder / "number.h").write_text("#define NUMBER 42\n")
    cpp.load_cpp("add.cpp")
    assert built == [[folder / "add.cpp"]]


def test_without_a_compiler_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(cpp.sysconfig, "get_path", lambda name: "")
    with pytest.raises(OSError, match="install a C\\+\\+ compiler and ninja"):
        cpp.load_cpp("add.cpp")
    assert list((folder / "cache").iterdir()) == []
