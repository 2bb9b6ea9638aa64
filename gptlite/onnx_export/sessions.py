"""Sessions of ONNX Runtime: a model or a file made ready to run, or optimised to look at."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gptlite.onnx_export.files import check_onnx, check_onnx_file

if TYPE_CHECKING:
    import onnx
    import onnxruntime


def open_session(
    model: "onnx.ModelProto | Path | str",
    threads: int | None = None,
    optimize: bool = True,
    providers: list[str] | None = None,
) -> "onnxruntime.InferenceSession":
    """A session that runs a model or a file, on the CPU or on other `providers`.

    `threads` None means PyTorch's number. A model above 2 GB has to be a file (`save_onnx`).
    """
    return _session(model, _options(threads, optimize), providers)


def optimized(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The graph after ONNX Runtime's optimiser: for looking at, since it suits one machine."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        options = _options(1, True)
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        _session(model, options, None)
        return onnx.load(options.optimized_model_filepath)


def _options(threads: int | None, optimize: bool) -> "onnxruntime.SessionOptions":
    try:
        import onnxruntime
    except ImportError:
        remedy = "pip install onnxruntime"
        raise ImportError(
            f"onnxruntime is not installed, but runs ONNX files: {remedy}"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    options.log_severity_level = 3  # errors alone
    levels = onnxruntime.GraphOptimizationLevel
    level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.graph_optimization_level = level
    return options


def _session(
    model: "onnx.ModelProto | Path | str",
    options: "onnxruntime.SessionOptions",
    providers: list[str] | None,
) -> "onnxruntime.InferenceSession":
    import onnxruntime

    if isinstance(model, (str, Path)):
        check_onnx_file(Path(model))
    else:
        check_onnx(model)
    providers, have = (
        providers or ["CPUExecutionProvider"],
        onnxruntime.get_available_providers(),
    )
    if missing := sorted(set(providers) - set(have)):
        raise ValueError(f"this onnxruntime has no {missing[0]}; it has {', '.join(have)}.")
    source = str(model) if isinstance(model, (str, Path)) else model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(source, options, providers=providers)
    except Exception as error:  # its exceptions have no common parent of their own
        reason = str(error).strip().splitlines()[0]
        version = f"ONNX Runtime {onnxruntime.__version__}"
        raise ValueError(f"{version} cannot run the model ({reason}).") from None
