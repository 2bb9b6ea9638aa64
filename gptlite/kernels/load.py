"""C++ for PyTorch, built where it runs: for its processor, once, and kept in a cache."""

import os
import shutil
import subprocess
import sysconfig
import tempfile
import warnings
from hashlib import sha256
from pathlib import Path

import torch

from gptlite.device import processor_name
from gptlite.files import cache_folder

FOLDER = Path(__file__).parent
HERE = "the kernels are built where they run"


def load_cpp(*names: str) -> None:
    """Load the operators of C++ files in this folder, building them first if need be.

    An OSError says what is missing to build them.
    """
    sources, headers = [FOLDER / name for name in names], sorted(FOLDER.glob("*.h"))
    made_of = [torch.__version__, processor_name(torch.device("cpu")), _instructions()]
    files = [*sources, *headers, Path(__file__)]
    made_of += [path.read_text(encoding="utf-8") for path in files]
    digest = sha256(" ".join(made_of).encode()).hexdigest()[:12]
    library = cache_folder() / f"{sources[0].stem}-{digest}.so"
    if library.exists():
        torch.ops.load_library(str(library))
    else:  # it appears there whole or not at all, whoever else builds it
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            _build_and_load(sources, folder).replace(library)


def load_cpp_or_warn(name: str, otherwise: str) -> bool:
    """Whether a C++ file is loaded, as by `load_cpp`; if not, a warning says why.

    It begins with what is done `otherwise`.
    """
    try:
        load_cpp(name)
    except OSError as missing:
        warnings.warn(f"{otherwise}: {missing}", stacklevel=3)
        return False
    return True


def _instructions() -> str:
    """The instructions that the processor has, if the system says: the name often does not."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build_and_load(sources: list[Path], folder: str) -> Path:
    """The shared library of C++ files, built in `folder` for this processor, and loaded.

    An OSError says why it cannot be.
    """
    scripts = sysconfig.get_path("scripts")  # where pip puts ninja
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), scripts])
    try:
        import torch.utils.cpp_extension as cpp_extension
    except ImportError as missing:
        remedy = "install setuptools (pip install setuptools)"
        raise OSError(f"{HERE}: {remedy}, since {missing}.") from missing
    compiler = cpp_extension.get_cxx_compiler()
    if not (shutil.which(compiler.partition(" ")[0]) and shutil.which("ninja")):
        raise OSError(f"{HERE}: install a C++ compiler and ninja (pip install ninja).")
    if not _compiles(compiler, folder):
        raise OSError(f"{HERE}, but the compiler, {compiler}, compiles nothing; set CXX.")
    # not every compiler knows these, Apple's least of all; without OpenMP there is one thread
    natives = [f for f in ("-march=native", "-mcpu=native") if _compiles(compiler, folder, f)]
    openmp = ["-fopenmp"] if _compiles(compiler, folder, "-fopenmp", "omp.h") else []
    try:
        library = cpp_extension.load(
            f"gptlite_{sources[0].stem}",
            [str(source) for source in sources],
            extra_cflags=["-O3", *natives[:1], *openmp],
            extra_ldflags=openmp,
            build_directory=folder,
            is_python_module=False,
        )
    except (RuntimeError, subprocess.SubprocessError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "error:" in line]
        reason = (lines or [str(error).partition("\n")[0]])[0]
        raise OSError(f"{HERE}, but {compiler} could not: {reason}") from error
    return Path(library)


def _compiles(compiler: str, folder: str, flag: str = "-O3", header: str = "cstdint") -> bool:
    """Whether a compiler takes a flag, and makes a library of a file that needs one header."""
    made = ["-shared", "-fPIC", "-x", "c++", "-", "-o", str(Path(folder) / "empty.so")]
    code = f"#include <{header}>\n".encode()
    command = [*compiler.split(), flag, *made]
    try:
        return not subprocess.run(command, input=code, capture_output=True).returncode
    except OSError:  # a file that is no program
        return False
