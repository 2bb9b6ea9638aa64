"""GPTlite: the package behind the book on making a GPT small and fast.

Where to begin reading, each line resting on the ones above it:

    model.py        the GPT: one class, its attention a function, its cache an argument
    kv_cache.py     the keys and values of the past, and what a compiler wants of them
    generate.py     prefill, decode, and the loop around them
    corpus.py       the plays
    checkpoints.py  the trained weights, in tensor_files.py's form
    train/          how they came about, with muon.py

A technique swaps a part of that model, and knows no other technique:

    compilation/    fewer, faster operators         distillation/     a smaller model, taught
    quantization/   fewer bits a weight             flash_attention/  no square of scores
    pruning/        fewer weights                   smaller_caches/   fewer heads, tokens, bits
    onnx_export/    no Python                       kernels/          the C++ under some of them

What a technique gains is counted in costs.py, timed by bench.py, predicted by roofline.py from
what calibration.py has measured, kept by results.py and put on the page by show.py (figures.py
and pictures.py draw). The rules of imports in pyproject.toml are this map.
"""

__version__ = "0.1.0"
