"""C++ kernels are built once for what they are made of, or not at all, in a sentence."""

import itertools
import sys
import warnings

import pytest
import torch

from gptlite.kernels import load as cpp

KERNEL = """#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/full_like.h>
#include <torch/library.h>
#include "number.h"
at::Tensor add_number(const at::Tensor& x) { return at::add(x, at::full_like(x, NUMBER)); }
TORCH_LIBRARY_FRAGMENT(gptlite_test_cpp, m) { m.def("NAME(Tensor x) -> Tensor"); }
TORCH_LIBRARY_IMPL(gptlite_test_cpp, CPU, m) { m.impl("NAME", add_number); }
"""
names = (f"add_{i}" for i in itertools.count())  # an operator can be defined only once


@pytest.fixture
def name(monkeypatch, tmp_path) -> str:
    """The name of an operator that adds 41, whose file is add.cpp in a folder of its own."""
    monkeypatch.setattr(cpp, "FOLDER", tmp_path)
    monkeypatch.setenv("GPTLITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", cpp.os.environ["PATH"])  # building appends to it
    monkeypatch.delenv("CXX", raising=False)
    (tmp_path / "number.h").write_text("#define NUMBER 41\n")
    name = next(names)
    (tmp_path / "add.cpp").write_text(KERNEL.replace("NAME", name))
    return name


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A function that puts a shell script before the compiler; `$words` are its arguments."""

    def put(script: str) -> str:
        path = tmp_path / "c++-of-a-test"
        path.write_text(f'#!/bin/sh\nwords=" $* "\n{script}\nexec c++ "$@"\n')
        path.chmod(0o755)
        monkeypatch.setenv("CXX", str(path))
        return str(path)

    return put


def refusing(*flags: str) -> str:
    """A script that refuses flags, in the words of Apple's compiler."""
    error = "echo \"clang: error: the clang compiler does not support '{0}'\" >&2"
    cases = [f'case "$words" in *" {{0}} "*) {error}; exit 1;; esac'.format(f) for f in flags]
    return "\n".join(cases)


def adds(name: str) -> float:
    return getattr(torch.ops.gptlite_test_cpp, name)(torch.ones(1)).item()


@pytest.mark.slow
def test_a_kernel_is_built_once_and_kept_under_a_name_that_says_what_it_is_made_of(
    name, tmp_path, monkeypatch
):
    cpp.load_cpp("add.cpp")
    assert adds(name) == 42
    [library] = (tmp_path / "cache").iterdir()  # and nothing that building left behind
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    cpp.load_cpp("add.cpp")
    assert loaded == [str(library)]
    built = []
    monkeypatch.setattr(
        cpp, "_build_and_load", lambda sources, folder: built.append(sources) or library
    )
    (tmp_path / "number.h").write_text("#define NUMBER 42\n")
    cpp.load_cpp("add.cpp")
    assert built == [[tmp_path / "add.cpp"]]


@pytest.mark.parametrize(
    ("refused", "flags"),
    [
        ([], ["-O3", "-march=native", "-fopenmp"]),
        (["-march=native"], ["-O3", "-mcpu=native", "-fopenmp"]),
        (["-march=native", "-mcpu=native", "-fopenmp"], ["-O3"]),
    ],
)
def test_the_flags_are_those_that_the_compiler_knows(
    name, compiler, monkeypatch, tmp_path, refused, flags
):
    given = {}

    def load(name, sources, **options):
        given.update(options)
        return tmp_path / "add.so"

    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    taken = 'case "$words" in *" -shared "*) exec true;; esac'  # whatever the processor
    compiler(f"{refusing(*refused)}\n{taken}")
    assert cpp._build_and_load([tmp_path / "add.cpp"], str(tmp_path)) == tmp_path / "add.so"
    assert given["extra_cflags"] == flags
    assert given["extra_ldflags"] == [flag for flag in flags if flag == "-fopenmp"]


@pytest.mark.slow
def test_a_compiler_that_knows_no_fast_flag_builds_without(name, compiler):
    compiler(refusing("-march=native", "-mcpu=native", "-fopenmp"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpp.load_cpp_or_warn("add.cpp", "Slowly")
    assert adds(name) == 42


@pytest.mark.slow
def test_what_the_compiler_says_is_in_the_sentence(name, compiler, tmp_path):
    (tmp_path / "number.h").unlink()
    with pytest.raises(
        OSError, match=r"^the kernels are built where they run, but c\+\+ could "
    ) as e:
        cpp.load_cpp("add.cpp")
    assert "number.h: No such file" in str(e.value) and "\n" not in str(e.value)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"CXX": "/bin/false"}, "the compiler, /bin/false, compiles nothing; set CXX."),
        ({"CXX": "/etc/passwd"}, "install a C++ compiler and ninja (pip install ninja)."),
        ({"CXX": "nowhere --at-all"}, "install a C++ compiler and ninja (pip install ninja)."),
        ({"CXX": ""}, "install a C++ compiler and ninja (pip install ninja)."),
        ({"PATH": None}, "install a C++ compiler and ninja (pip install ninja)."),
        ({"GPTLITE_CACHE": __file__}, "where nothing can be written"),
    ],
)
def test_what_cannot_be_built_is_one_warning_and_the_slower_path(
    name, monkeypatch, setting, reason
):
    monkeypatch.setattr(cpp.sysconfig, "get_path", lambda name: "")
    for variable, value in setting.items():
        if value is None:
            monkeypatch.delenv(variable)
        else:
            monkeypatch.setenv(variable, value)
    with pytest.warns(UserWarning, match="^It is done slowly: ") as warned:
        assert cpp.load_cpp_or_warn("add.cpp", "It is done slowly") is False
    [warning] = warned
    assert reason in str(warning.message) and "\n" not in str(warning.message)


def test_a_compiler_that_fails_on_torch_s_files_alone_is_a_warning(name, compiler):
    compiler('case "$words" in *add.cpp*) echo "add.cpp:1: error: too hard" >&2; exit 1;; esac')
    with pytest.warns(UserWarning, match=r"could not: add\.cpp:1: error: too hard$"):
        assert not cpp.load_cpp_or_warn("add.cpp", "Slowly")


def test_without_setuptools_it_says_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    with pytest.warns(UserWarning, match="install setuptools"):
        assert not cpp.load_cpp_or_warn("add.cpp", "Slowly")


@pytest.mark.slow
def test_a_user_without_a_home_has_kernels_none_the_less(name, monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cpp.Path, "home", no_home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for variable in ("GPTLITE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert cpp.load_cpp_or_warn("add.cpp", "Slowly")
    assert adds(name) == 42
