"""Tiny checkpoints with random weights, written by transformers itself, and a tokenizer to go with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCABULARY = 320
EOS = "<|end|>"
BOS = "<|begin|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = (EOS, BOS, "<|system|>", "<|user|>", "<|assistant|>")

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_checkpoint(
    folder: str | Path,
    family: str,
    *,
    tied: bool = False,
    seed: int = 0,
    dtype: str = "float32",
    shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a model folder: config, safetensors, tokenizer, chat template, generation config.

    family: llama, qwen2, qwen3 or mistral. overrides: fields of that family's config class. The same
    arguments give the same bytes. Weights are large enough that greedy tokens vary."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}[family]
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, "tie_word_embeddings": tied, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        with torch.no_grad():  # transformers starts biases at 0 and norms at 1, which would hide mistakes
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.normal_(0.0, 0.3)
                elif "norm" in key:
                    parameter.normal_(1.0, 0.2)
    folder = Path(folder)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: str | Path) -> None:
    """A byte-level BPE of 320 entries (5 special tokens first), with a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = Path(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = (
        "the quick brown fox jumps over the lazy dog",
        "hello world",
        "one two three four five",
        "a b c d",
    )
    tokenizer.train_from_iterator([*words] * 8, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    generation = {"bos_token_id": 1, "eos_token_id": [0]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
