"""Turn a checkpoint folder (see checkpoint.py) into a GGUF file, under an interpreter that has `gguf`.

    python write_gguf.py FOLDER FILE bf16|q8_0|q4_0

Matrices are rounded to the type, the rest stays float32; of a tied embedding there is one copy, as
llama.cpp's own converter does it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy

_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Names and float32 arrays of a safetensors file that holds bfloat16 only. Raises ValueError."""
    data = numpy.memmap(path, dtype=numpy.uint8, mode="r")
    length = int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8 : 8 + length].tobytes())
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is {entry['dtype']}, not BF16")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        words = data[begin:end].view(numpy.uint16).astype(numpy.uint32) << 16
        yield name, words.view(numpy.float32).reshape(entry["shape"])


def gguf_name(name: str) -> str:
    """ "model.layers.3.mlp.up_proj.weight" -> "blk.3.ffn_up.weight". Raises KeyError."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_PARTS[part]}.{kind}"


def interleaved(matrix: Any, heads: int) -> Any:
    """Rows of q or k in the order that llama.cpp's `llama` rotates: pairs side by side."""
    rows, columns = matrix.shape
    halves = matrix.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def write_facts(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def write_tokenizer(writer: Any, folder: Path) -> None:
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(names))
    writer.add_token_merges([f"{names[0]} {names[1]}"])  # an array may not be empty
    writer.add_add_bos_token(False)


def main(folder: Path, file: Path, kind: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    wanted = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(str(file), config["model_type"])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    write_facts(writer, config)
    write_tokenizer(writer, folder)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, array in tensors(folder / "model.safetensors"):
        part = name.split(".")[-2]
        if config["model_type"] == "llama" and part in heads:
            array = interleaved(array, heads[part])
        if array.ndim == 1:
            writer.add_tensor(gguf_name(name), numpy.ascontiguousarray(array))
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
