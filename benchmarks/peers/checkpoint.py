"""A checkpoint of random bfloat16 weights in one of the benchmarks' shapes, and a tokenizer for it.

Every engine loads this one folder, so that what loading takes and holds is compared too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.shapes import SHAPES, write_shape

SCALE = 0.02  # standard deviation of the weights


def write_checkpoint(name: str, folder: Path) -> Path:
    """Write config.json, model.safetensors and tokenizer.json of a shape, unless they are there."""
    if not (folder / "model.safetensors").exists():
        write_shape(name, folder)
        shape = SHAPES[name]
        (folder / "config.json").write_text(json.dumps({**shape, "torch_dtype": "bfloat16"}, indent=2))
        generator = torch.Generator().manual_seed(0)
        tensors = {key: _random(key, size, generator) for key, size in tensor_sizes(shape).items()}
        _write_tokenizer(shape["vocab_size"], folder)
        partial = folder / "partial"  # a run that was ended must not leave half a checkpoint
        save_file(tensors, partial, {"format": "pt"})
        partial.rename(folder / "model.safetensors")
    return folder


def tensor_sizes(shape: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and sizes of a llama's or a qwen2's weights."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    head = hidden // shape["num_attention_heads"]
    outputs = {"q": hidden, "k": head * shape["num_key_value_heads"]}
    outputs["v"] = outputs["k"]
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape["vocab_size"], hidden)}
    for layer in range(shape["num_hidden_layers"]):
        base = f"model.layers.{layer}."
        for letter, size in outputs.items():
            sizes[f"{base}self_attn.{letter}_proj.weight"] = (size, hidden)
            if shape["model_type"] == "qwen2":
                sizes[f"{base}self_attn.{letter}_proj.bias"] = (size,)
        sizes[f"{base}self_attn.o_proj.weight"] = (hidden, hidden)
        sizes[f"{base}mlp.gate_proj.weight"] = sizes[f"{base}mlp.up_proj.weight"] = (inner, hidden)
        sizes[f"{base}mlp.down_proj.weight"] = (hidden, inner)
        sizes[f"{base}input_layernorm.weight"] = (hidden,)
        sizes[f"{base}post_attention_layernorm.weight"] = (hidden,)
    sizes["model.norm.weight"] = (hidden,)
    if not shape["tie_word_embeddings"]:
        sizes["lm_head.weight"] = (shape["vocab_size"], hidden)
    return sizes


def _random(name: str, size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(size, dtype=torch.bfloat16)
    return (torch.randn(size, generator=generator) * SCALE).to(torch.bfloat16)


def _write_tokenizer(vocabulary: int, folder: Path) -> None:
    """Bytes first, then names that no text holds; no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = alphabet + [f"<{number}>" for number in range(len(alphabet), vocabulary)]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2**20}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
