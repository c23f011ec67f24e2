"""What rounding the weights costs: the same texts through the model in bfloat16 and rounded.

    python -m benchmarks.quantization_quality [MODEL_FOLDER] [--text FILE] [--tokens 512]

For each way of rounding, over every position: the mean Kullback-Leibler divergence of the next token's
distribution from the unrounded model's, how often the best token is the same, and perplexity. Without a
text, the model writes its own (sampled at temperature 1, so that the positions are those it meets).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from benchmarks.cpu_kernels import BLOCK_SIZE
from benchmarks.machine import describe
from semipd.model.attention import Pool, Ragged
from semipd.model.dense import DenseModel, StepInputs, load_model
from semipd.model.folder import default_model
from semipd.model.sampler import draw, filtered_weights, uniform

WAYS = {
    "bfloat16": {"quantization": "none"},
    "int8": {"quantization": "int8"},
    "int8 and head": {"quantization": "int8", "quantize_head": True},
    "int4": {"quantization": "int4"},
    "int4 and head": {"quantization": "int4", "quantize_head": True},
}


def logits_of(model: DenseModel, tokens: list[int]) -> torch.Tensor:
    """float32 [tokens, vocabulary], of one forward pass over all."""
    count = len(tokens)
    blocks = -(-count // BLOCK_SIZE)
    kv = torch.zeros(model.kv_shape(blocks, BLOCK_SIZE), dtype=model.dtype)
    positions, table = np.arange(count), np.arange(blocks, dtype=np.int32)
    inputs = StepInputs(
        tokens=torch.tensor(tokens),
        positions=torch.from_numpy(positions),
        ragged=Ragged(np.array([0]), np.array([count]), table[None]),
        kv_rows=Pool.of(kv).rows(table[positions // BLOCK_SIZE], positions % BLOCK_SIZE),
        sample=torch.from_numpy(positions),
    )
    return model.forward(inputs, kv, lambda: None).clone()


def own_text(model: DenseModel, count: int) -> list[int]:
    """Tokens that the model samples, from its first token on."""
    tokens = [model.spec.bos_token_id or 0]
    while len(tokens) < count:
        row = logits_of(model, tokens)[-1].numpy()
        tokens.append(draw(filtered_weights(row, 1.0, 0, 1.0, 0.0), uniform(0, len(tokens))))
    return tokens


def compare(exact: torch.Tensor, rounded: torch.Tensor, tokens: list[int]) -> dict[str, float]:
    truth, guess = exact.double().log_softmax(-1), rounded.double().log_softmax(-1)
    following = torch.tensor(tokens[1:])[:, None]
    return {
        "kl": float((truth.exp() * (truth - guess)).sum(-1).mean()),
        "same_best": float((exact.argmax(-1) == rounded.argmax(-1)).double().mean()),
        "perplexity": float((-guess[:-1].gather(1, following)).mean().exp()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="default: the model in the box")
    parser.add_argument("--text", type=Path, help="a text file; its first tokens are used")
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    folder = options.model or default_model()
    reference = load_model(folder, dtype="bfloat16")
    if options.text:
        text = options.text.read_text(encoding="utf-8")
        tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[: options.tokens]
    else:
        tokens = own_text(reference, options.tokens)
    exact = logits_of(load_model(folder, dtype="float32"), tokens)
    table = Table("weights", "KL from float32", "same best token", "perplexity")
    results = {}
    for name, settings in WAYS.items():
        model = load_model(folder, dtype="bfloat16", **settings)  # type: ignore[arg-type]
        found = results[name] = compare(exact, logits_of(model, tokens), tokens)
        table.add_row(name, f"{found['kl']:.5f}", f"{found['same_best']:.1%}", f"{found['perplexity']:.3f}")
    Console().print(table)
    facts = {"benchmark": "quantization_quality", "tokens": len(tokens), "ran_on": describe()}
    print(json.dumps({**facts, "results": results}))


if __name__ == "__main__":
    main()
