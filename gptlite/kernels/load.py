"""C++ for PyTorch, built where it runs: for its processor, once, and kept in the user's cache."""

import os
import shutil
import sys
import sysconfig
import tempfile
import warnings
from hashlib import sha256
from pathlib import Path

import torch

from gptlite.device import processor_name
from gptlite.files import cache_folder

FOLDER = Path(__file__).parent


def load_cpp(*names: str) -> None:
    """Load the operators of C++ files that lie beside this one, building them first if none has for this processor.

    An OSError says what is missing to build them.
    """
    sources, headers = [FOLDER / name for name in names], sorted(FOLDER.glob("*.h"))
    made_of = [torch.__version__, processor_name(torch.device("cpu")), _instructions()]
    made_of += [
        path.read_text(encoding="utf-8") for path in [*sources, *headers, Path(__file__)]
    ]
    library = (
        cache_folder()
        / f"{sources[0].stem}-{sha256(' '.join(made_of).encode()).hexdigest()[:12]}.so"
    )
    if library.exists():
        torch.ops.load_library(str(library))
    else:  # it appears there whole or not at all, whoever else builds it
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            _build_and_load(sources, folder).replace(library)


def load_cpp_or_warn(name: str, otherwise: str) -> bool:
    """Whether a C++ file is loaded, as by `load_cpp`; if it cannot be built, a warning says what is done otherwise."""
    try:
        load_cpp(name)
    except OSError as missing:
        warnings.warn(f"{otherwise}: {missing}", stacklevel=3)
        return False
    return True


def _instructions() -> str:
    """What the processor can do, where the system says so: a virtual one's name often does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build_and_load(sources: list[Path], folder: str) -> Path:
    """The shared library of C++ files, built in `folder` for this processor."""
    from torch.utils import cpp_extension

    os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # where pip puts ninja
    if not (
        shutil.which(cpp_extension.get_cxx_compiler().split()[0]) and shutil.which("ninja")
    ):
        raise OSError(
            "the kernels are built where they run: install a C++ compiler and ninja (pip install ninja)."
        )
    openmp = (
        [] if sys.platform == "darwin" else ["-fopenmp"]
    )  # Apple's compiler lacks it: one thread then
    flags = {"extra_cflags": ["-O3", "-march=native", *openmp], "extra_ldflags": openmp}
    name, files = f"gptlite_{sources[0].stem}", [str(source) for source in sources]
    return Path(
        cpp_extension.load(name, files, build_directory=folder, is_python_module=False, **flags)
    )
