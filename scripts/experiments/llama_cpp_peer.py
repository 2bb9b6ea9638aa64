"""llama.cpp as the other side of race_llama_cpp.py.

It is run by a Python that has llama-cpp-python and gguf. It reads weights from an .npz file,
then answers one request a line: "prefill" and "decode" when they are done, "choose" with the
token that it finds likeliest after the prompt and after each further token.
"""

import json
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

# what llama.cpp calls the formats, and its own numbers for a file of such weights
TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
FILE_TYPES = {"float32": 0, "bfloat16": 32, "int8": 7, "int4": 2}
PARTS = {
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
}
PARTS |= {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}


def gguf_name(name: str) -> str:
    """What llama.cpp calls a parameter of gptlite's GPT."""
    if name.startswith("h."):
        _, layer, part = name.split(".", 2)
        part, kind = part.rsplit(".", 1)
        return f"blk.{layer}.{PARTS[part]}.{kind}"
    names = {
        "wte.weight": "token_embd.weight",
        "wpe.weight": "position_embd.weight",
        "lm_head.weight": "output.weight",
    }
    return names.get(name, name.replace("ln_f", "output_norm"))


def write_gguf(
    path: Path, weights: dict[str, np.ndarray], shape: dict[str, int], dtype: str
) -> None:
    """A GPT-2 in llama.cpp's file format; words are made up, since tokens are numbers here."""
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(shape["n_layer"])
    writer.add_head_count(shape["n_head"])
    writer.add_embedding_length(shape["n_embd"])
    writer.add_feed_forward_length(4 * shape["n_embd"])
    writer.add_context_length(shape["block_size"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"word{i}" for i in range(shape["vocab_size"])])
    writer.add_token_types([1] * shape["vocab_size"])
    writer.add_token_merges(["w o"])
    for token in (writer.add_bos_token_id, writer.add_eos_token_id):
        token(shape["vocab_size"] - 1)
    for name, values in weights.items():
        # vectors and positions stay float32, as in the files of llama.cpp's own converter
        if values.ndim == 2 and name != "wpe.weight" and dtype != "float32":
            kind = gguf.GGMLQuantizationType[TYPES[dtype]]
            codes = gguf.quants.quantize(values, kind)
            writer.add_tensor(gguf_name(name), codes, raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Arguments: the weights' file, the number format, the threads, and the task as JSON.

    The task has prompt, further tokens, and the model's shape.
    """
    source, dtype, threads, tokens = sys.argv[1:]
    task = json.loads(tokens)
    prompt, further, shape = task["prompt"], task["further"], task["shape"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.gguf"
        write_gguf(path, dict(np.load(source)), shape, dtype)
        room = {"n_ctx": len(prompt) + len(further)}
        room |= {"n_threads": int(threads), "n_threads_batch": int(threads)}
        model = llama_cpp.Llama(str(path), **room, verbose=False)

        def likeliest() -> int:
            # after the last token that was read
            logits = llama_cpp.llama_get_logits(model.ctx)
            return int(np.ctypeslib.as_array(logits, (shape["vocab_size"],)).argmax())

        def prefill() -> None:
            model.reset()
            model.eval(prompt)

        def decode() -> None:
            # what came behind the prompt is forgotten by the next call
            model.n_tokens = len(prompt)
            for token in further:
                model.eval([token])

        def choose() -> list[int]:
            prefill()
            chosen = [likeliest()]
            for token in further:
                model.eval([token])
                chosen.append(likeliest())
            return chosen

        print(json.dumps(llama_cpp.__version__), flush=True)
        answers = {"prefill": prefill, "decode": decode, "choose": choose}
        for line in sys.stdin:
            print(json.dumps(answers[line.strip()]()), flush=True)


if __name__ == "__main__":
    main()
