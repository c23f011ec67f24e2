"""A dense decoder (Llama, Qwen2, Qwen3, Mistral): weights and one forward pass over ragged slices."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as functional

from semipd.core.errors import ConfigError
from semipd.model.attention import AttentionPlan, Pool, Ragged, attend, plan_attention
from semipd.model.compiled import compiled_kind
from semipd.model.kernels import Kernels, can_attend, load_kernels
from semipd.model.layers import PLAIN, Compute, Kind, Layer, choose_kind, pad_rows, padded_rows
from semipd.model.quantize import METHODS, Matrix, quantized_kind, stack
from semipd.model.quantized_weights import QuantizedWeights, read_format
from semipd.model.rope import rope_frequencies
from semipd.model.row_ops import CompiledRowOps, Heads, PlainRowOps, Rotations, RowOps
from semipd.model.spec import ModelSpec, load_spec
from semipd.model.step import Boundary, FusedStep, Parts, Slots, can_step
from semipd.model.weights import DummyWeights, SafetensorsWeights, Weights

MOST_LOADERS = 4  # threads that pack weights: more would wait for the memory
T = TypeVar("T")


@dataclass(frozen=True)
class StepInputs:
    """What one step reads besides weights and KV.

    tokens, positions: int64 [T], the rows of all slices, one slice after another. ragged: the slices and
    their block tables. kv_rows: where the T rows' keys and values go (`Pool.rows`). sample: int64
    [n], the rows whose logits are wanted.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    ragged: Ragged
    kv_rows: torch.Tensor
    sample: torch.Tensor


class DenseModel:
    """Weights in compute form. Nothing in it changes after `load_model`. kernels: what it computes with, or
    None where torch alone does."""

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        embedding: torch.Tensor,
        layers: tuple[Layer, ...],
        norm: torch.Tensor,
        head: Compute,
        kernels: Kernels | None = None,
    ) -> None:
        self.spec = spec
        self.kernels = kernels
        self.dtype = dtype
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._frequencies, self._rope_factor = rope_frequencies(spec)
        turns = self._frequencies, self._rope_factor
        self._parts = Parts(spec, dtype, embedding, layers, norm, head, *turns)
        self._compiled = can_step(kernels, self._parts)
        self._heads = Heads(spec.heads, spec.kv_heads, spec.head_dim, spec.norm_eps)
        self._ops: RowOps = CompiledRowOps(kernels, dtype) if kernels else PlainRowOps(dtype)

    def kv_shape(self, blocks: int, block_size: int) -> tuple[int, ...]:
        """Shape of a KV pool in `dtype`: [layers, 2, blocks, kv_heads, block_size, head_dim]."""
        spec = self.spec
        return (spec.layers, 2, blocks, spec.kv_heads, block_size, spec.head_dim)

    def fused_step(self, kv: torch.Tensor, table: Slots) -> FusedStep | None:
        """What computes steps in a few calls (see `FusedStep`), with the same bits as `forward`; None where
        some layer has no compiled form."""
        if self.kernels is None or not self._compiled:
            return None
        return FusedStep(self.kernels, self._parts, kv, table)

    def forward(self, inputs: StepInputs, kv: torch.Tensor, boundary: Boundary) -> torch.Tensor:
        """Compute the rows of `inputs`, write their keys and values into kv, and return the logits of the
        rows to sample, float32 [n, vocabulary]. `boundary` is called before every large operation."""
        normed = self.hidden(inputs, kv, boundary)
        boundary()
        return self.logits_of(normed)

    def logits_of(self, normed: torch.Tensor) -> torch.Tensor:
        """Logits of rows of `hidden`, float32 [n, vocabulary]."""
        with torch.inference_mode():
            if not (rows := normed.shape[0]):
                return torch.empty((0, self.spec.vocabulary), dtype=torch.float32)
            return self._head(self._padded(normed))[:rows].float()

    def hidden(self, inputs: StepInputs, kv: torch.Tensor, boundary: Boundary) -> torch.Tensor:
        """As `forward`, but returns what the head reads of the rows to sample, in the model's type [n,
        hidden]."""
        with torch.inference_mode():
            ops, eps = self._ops, self.spec.norm_eps
            hidden = functional.embedding(inputs.tokens, self._embedding)
            hidden = self._padded(hidden)
            turns = ops.rotations(inputs.positions, self._frequencies, self._rope_factor, inputs.kv_rows)
            plans = {
                window: plan_attention(inputs.ragged, Pool.of(kv), window, self.kernels)
                for window in {layer.window for layer in self._layers}
            }
            normed = ops.norm(hidden, self._layers[0].attention_norm, eps)
            for index, layer in enumerate(self._layers):
                last = index == len(self._layers) - 1
                mixed = self._attention(layer, normed, kv[index], turns, plans[layer.window], boundary)
                if last:  # from here on only the sampled rows matter
                    if not inputs.sample.shape[0]:
                        return hidden[:0]
                    hidden = self._sampled(hidden, inputs.sample)
                    mixed = self._sampled(mixed, inputs.sample)
                boundary()
                normed = ops.add_norm(hidden, layer.output(mixed), layer.mlp_norm, eps)
                boundary()
                activated = layer.gate_up(normed)
                boundary()
                following = self._norm if last else self._layers[index + 1].attention_norm
                normed = ops.add_norm(hidden, layer.down(activated), following, eps)
            return normed[: inputs.sample.shape[0]]

    def _attention(
        self,
        layer: Layer,
        normed: torch.Tensor,
        kv: torch.Tensor,
        turns: Rotations,
        plan: AttentionPlan,
        boundary: Boundary,
    ) -> torch.Tensor:
        """Projected, rotated, stored and attended: [padded rows, heads * head_dim]."""
        rows = turns.cosine.shape[0]
        boundary()
        qkv = layer.qkv(normed)[:rows].view(rows, -1, self.spec.head_dim)
        self._ops.rotate_and_store(qkv, kv, turns, self._heads, layer.query_norm, layer.key_norm)
        boundary()
        return pad_rows(attend(qkv[:, : self.spec.heads], kv, plan), normed.shape[0])

    def _sampled(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self._padded(x.index_select(0, rows))

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """x with the rows that oneDNN's linears need; the compiled ones take any number."""
        return x if self._compiled else pad_rows(x, padded_rows(x.shape[0], self.dtype))


def load_model(
    folder: str | Path,
    *,
    dtype: str = "auto",
    load_format: str = "auto",
    seed: int = 0,
    pack: bool = True,
    kernels: bool = True,
    quantization: str = "none",
    quantize_head: bool = False,
) -> DenseModel:
    """Load a checkpoint folder, or make random weights in its shape (`load_format="dummy"`, which needs
    only a config.json). dtype: auto, bfloat16 or float32. pack: use oneDNN's packed linears if they work
    here. kernels: use the compiled kernels if they were built. quantization: int8 or int4 to round the
    linear layers to, or none; quantize_head: the head's too.

    Raises ConfigError, one line, when the folder cannot be served."""
    spec = load_spec(folder)
    if quantization not in METHODS:
        raise ConfigError(f"quantization {quantization!r} is not one of {', '.join(METHODS)}")
    weights: Weights
    stored = read_format(spec.quantization) if spec.quantization else None
    if load_format == "dummy":
        weights = DummyWeights(dtype, spec.dtype, seed)
    elif load_format == "auto":
        tensors = SafetensorsWeights(folder, dtype, spec.dtype)
        weights = QuantizedWeights(tensors, stored) if stored else tensors
        if stored and quantization != "none":
            raise ConfigError(f"{folder} is quantised already: leave out --quantization {quantization}")
    else:
        raise ConfigError(f"load format {load_format!r} is not one of auto, dummy")
    with torch.inference_mode():
        kind, compiled = choose_kind(weights.dtype) if pack else PLAIN, load_kernels() if kernels else None
        kind = head = compiled_kind(compiled, weights.dtype, kind)
        if stored or quantization != "none":
            kind = quantized_kind(compiled, weights.dtype, quantization, kind)
        return _build(spec, weights, kind, kind if quantize_head else head, compiled)


def _build(
    spec: ModelSpec, weights: Weights, kind: Kind, head_kind: Kind, kernels: Kernels | None
) -> DenseModel:
    def build_head() -> tuple[torch.Tensor, Compute]:
        table = (spec.vocabulary, spec.hidden)
        embedding = weights.take("model.embed_tokens.weight", table)
        return embedding, head_kind.linear(
            embedding if spec.tied else weights.take("lm_head.weight", table), None
        )

    # Packing is copying: torch holds no lock meanwhile. These threads have ended when this returns.
    with ThreadPoolExecutor(min(MOST_LOADERS, os.cpu_count() or 1)) as pool:
        last = pool.submit(_inferring, build_head)
        each = [
            pool.submit(_inferring, partial(_build_layer, spec, weights, kind, index))
            for index in range(spec.layers)
        ]
        try:
            embedding, head = last.result()
            layers = tuple(layer.result() for layer in each)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    norm = weights.take("model.norm.weight", (spec.hidden,))
    weights.finish(["lm_head.weight"] if spec.tied else [])
    if not can_attend(kernels, spec.heads, spec.kv_heads, spec.head_dim, weights.dtype):
        kernels = None
    return DenseModel(spec, weights.dtype, embedding, layers, norm, head, kernels)


def _inferring(build: Callable[[], T]) -> T:
    """torch keeps that mode for each thread by itself."""
    with torch.inference_mode():
        return build()


def _build_layer(spec: ModelSpec, weights: Weights, kind: Kind, index: int) -> Layer:
    prefix = f"model.layers.{index}."
    query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    sizes = (("q", query), ("k", key), ("v", key))

    def pair(name: str, outputs: int, inputs: int, biased: bool) -> tuple[Matrix, torch.Tensor | None]:
        weight = weights.matrix(f"{prefix}{name}_proj.weight", (outputs, inputs))
        return weight, weights.take(f"{prefix}{name}_proj.bias", (outputs,)) if biased else None

    def qkv() -> Compute:
        pairs = [pair(f"self_attn.{c}", size, spec.hidden, spec.qkv_bias) for c, size in sizes]
        biases = [bias for _, bias in pairs if bias is not None]
        weight = stack([weight for weight, _ in pairs], weights.dtype)
        return kind.linear(weight, torch.cat(biases) if biases else None)

    def gate_up() -> Compute:
        gate, up = (pair(f"mlp.{c}", spec.intermediate, spec.hidden, spec.mlp_bias) for c in ("gate", "up"))
        return kind.gated(*gate, *up)

    def norm(name: str, size: int) -> torch.Tensor:
        return weights.take(f"{prefix}{name}.weight", (size,))

    return Layer(
        qkv=qkv(),
        output=kind.linear(*pair("self_attn.o", spec.hidden, query, spec.o_bias)),
        gate_up=gate_up(),
        down=kind.linear(*pair("mlp.down", spec.hidden, spec.intermediate, spec.mlp_bias)),
        attention_norm=norm("input_layernorm", spec.hidden),
        mlp_norm=norm("post_attention_layernorm", spec.hidden),
        query_norm=norm("self_attn.q_norm", spec.head_dim) if spec.qk_norm else None,
        key_norm=norm("self_attn.k_norm", spec.head_dim) if spec.qk_norm else None,
        window=spec.window(index),
    )
