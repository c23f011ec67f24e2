"""Write the model in the box as a standard Hugging Face folder: sizes, weights, tokenizer and template."""

import json
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from semipd.box import format as box_format


class Sizes(Protocol):
    """What the folder says about the architecture."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    theta: float
    epsilon: float
    positions: int


def byte_symbols() -> list[str]:
    """How a byte-level vocabulary spells the 256 bytes: one that prints stands for itself."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return [chr(byte) if byte in printing else chr(0x100 + others.index(byte)) for byte in range(256)]


def write(folder: Path, weights: dict[str, Tensor], sizes: Sizes) -> None:
    """Write all files but the model card."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner alone
    build_tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", config(sizes))
    write_json(folder / "tokenizer_config.json", tokenizer_config(sizes))
    write_json(
        folder / "generation_config.json",
        {
            "eos_token_id": box_format.END,
            "pad_token_id": box_format.END,
            "do_sample": False,
            "temperature": 0.0,
        },
    )


def build_tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges: id = byte, then the special tokens."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in box_format.SPECIAL_TOKENS]
    )
    return tokenizer


def config(sizes: Sizes) -> dict[str, Any]:
    """The ``config.json`` of a Llama model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_size,
        "intermediate_size": sizes.intermediate,
        "hidden_act": "silu",
        "rms_norm_eps": sizes.epsilon,
        "rope_theta": sizes.theta,
        "max_position_embeddings": sizes.positions,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": box_format.END,
        "pad_token_id": box_format.END,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def tokenizer_config(sizes: Sizes) -> dict[str, Any]:
    """The ``tokenizer_config.json``, with the chat template."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": sizes.positions,
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
        "additional_special_tokens": list(box_format.SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "chat_template": box_format.CHAT_TEMPLATE,
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
