"""A dense decoder (Llama, Qwen2, Qwen3, Mistral) for a device that runs launches asynchronously.

The same arithmetic as `dense.DenseModel`, laid out for a launching thread: `launch` yields after every
layer, so that the thread can look after the other lane between groups of layers, and every intermediate
lives in `Buffers` that a lane owns, so that a captured graph and a change of stream find it where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from semipd.core.errors import ConfigError
from semipd.model.ops import DeviceStep, Heads, Ops
from semipd.model.rope import rope_frequencies, rope_tables
from semipd.model.spec import ModelSpec, load_spec
from semipd.model.weights import DummyWeights, SafetensorsWeights, Weights

_ROPE_PART = 4096  # positions whose angles are computed together, in float64


@dataclass(frozen=True)
class Linear:
    """x W + b; weight [outputs, inputs], bias [outputs] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def into(self, out: torch.Tensor, x: torch.Tensor) -> None:
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)


@dataclass(frozen=True)
class DeviceLayer:
    """One layer's parameters; gate and up projections as one matrix."""

    qkv: Linear
    output: Linear
    gate_up: Linear
    down: Linear
    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    heads: Heads
    window: int | None


@dataclass(frozen=True)
class Buffers:
    """Everything that one lane's steps write besides KV: [most rows, width], the last three [most samples,
    width]."""

    hidden: torch.Tensor
    normed: torch.Tensor
    qkv: torch.Tensor
    mixed: torch.Tensor
    delta: torch.Tensor
    gate_up: torch.Tensor
    gated: torch.Tensor
    last_hidden: torch.Tensor
    last_mixed: torch.Tensor
    logits: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values())


class DeviceModel:
    """Weights and rotary tables on one device. Nothing in it changes after `load_device_model`."""

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        embedding: torch.Tensor,
        layers: tuple[DeviceLayer, ...],
        norm: torch.Tensor,
        head: Linear,
        positions: int,
    ) -> None:
        """positions: most tokens of one sequence."""
        self.spec = spec
        self.dtype = dtype
        self.device = embedding.device
        self.layers = layers
        self.heads = layers[0].heads
        self._embedding = embedding
        self._norm = norm
        self._head = head
        self._cosine, self._sine = _rotary_tables(spec, positions, dtype, self.device)

    def kv_shape(self, blocks: int, block_size: int) -> tuple[int, ...]:
        """Shape of a KV pool in `dtype`: [layers, 2, blocks, kv_heads, block_size, head_dim]."""
        return (self.spec.layers, 2, blocks, self.spec.kv_heads, block_size, self.spec.head_dim)

    def buffers(self, rows: int, samples: int) -> Buffers:
        """For steps of at most `rows` rows, of which at most `samples` are sampled."""
        spec = self.spec

        def make(height: int, width: int) -> torch.Tensor:
            return torch.zeros((height, width), dtype=self.dtype, device=self.device)

        return Buffers(
            hidden=make(rows, spec.hidden),
            normed=make(rows, spec.hidden),
            qkv=make(rows, spec.qkv_rows),
            mixed=make(rows, spec.heads * spec.head_dim),
            delta=make(rows, spec.hidden),
            gate_up=make(rows, 2 * spec.intermediate),
            gated=make(rows, spec.intermediate),
            last_hidden=make(samples, spec.hidden),
            last_mixed=make(samples, spec.heads * spec.head_dim),
            logits=make(samples, spec.vocabulary),
        )

    def launch(
        self,
        step: DeviceStep,
        buffers: Buffers,
        kv: torch.Tensor,
        ops: Ops,
        units: Callable[[], int],
        head: bool = True,
    ) -> Iterator[None]:
        """Launch the step layer by layer, yielding between two; when it is exhausted, the first rows of
        `buffers.logits` are (or will be) the logits of `step.sample`. units: the SMs of the lane, which may
        change between layers. head: False leaves every row for `logits_of` instead."""
        rows = step.rows
        hidden = buffers.hidden[:rows]
        ops.embed(step, self._embedding, hidden)
        ops.norm(hidden, self.layers[0].attention_norm, self.spec.norm_eps, buffers.normed[:rows])
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            self._attend(layer, kv[index], step, buffers, ops, units())
            mixed = buffers.mixed[:rows]
            if last and head and step.sample is not None:  # from here on only the sampled rows matter
                if (rows := step.sample.shape[0]) == 0:
                    return
                mixed = torch.index_select(mixed, 0, step.sample, out=buffers.last_mixed[:rows])
                hidden = torch.index_select(hidden, 0, step.sample, out=buffers.last_hidden[:rows])
            following = self._norm if last else self.layers[index + 1].attention_norm
            self._feed(layer, mixed, hidden, following, buffers, ops)
            if not last:
                yield
            elif head:
                self._head.into(buffers.logits[:rows], buffers.normed[:rows])

    def logits_of(self, rows: torch.Tensor, buffers: Buffers) -> torch.Tensor:
        """Logits of these rows, int64 [n], of a step that was launched without its head; in `buffers`."""
        count = rows.shape[0]
        normed = torch.index_select(buffers.normed, 0, rows, out=buffers.last_hidden[:count])
        self._head.into(buffers.logits[:count], normed)
        return buffers.logits[:count]

    def _attend(
        self, layer: DeviceLayer, kv: torch.Tensor, step: DeviceStep, buffers: Buffers, ops: Ops, units: int
    ) -> None:
        """From buffers.normed to buffers.mixed."""
        rows = step.rows
        qkv = buffers.qkv[:rows]
        layer.qkv.into(qkv, buffers.normed[:rows])
        ops.rotate_and_store(qkv, kv, step, layer.heads, self._cosine, self._sine)
        ops.attend(qkv, kv, step, layer.heads, layer.window, units, buffers.mixed[:rows])

    def _feed(
        self,
        layer: DeviceLayer,
        mixed: torch.Tensor,
        hidden: torch.Tensor,
        following: torch.Tensor,
        buffers: Buffers,
        ops: Ops,
    ) -> None:
        """From mixed and hidden to hidden (in place) and, normed by `following`, buffers.normed."""
        rows, eps = hidden.shape[0], self.spec.norm_eps
        delta, normed, gated = buffers.delta[:rows], buffers.normed[:rows], buffers.gated[:rows]
        layer.output.into(delta, mixed)
        ops.add_norm(hidden, delta, layer.mlp_norm, eps, normed)
        layer.gate_up.into(buffers.gate_up[:rows], normed)
        ops.gated(buffers.gate_up[:rows], gated)
        layer.down.into(delta, gated)
        ops.add_norm(hidden, delta, following, eps, normed)


def buffer_bytes(spec: ModelSpec, itemsize: int, rows: int, samples: int) -> int:
    """What `DeviceModel.buffers` will take, with values of so many bytes."""
    mixed = spec.heads * spec.head_dim
    wide = 3 * spec.hidden + spec.qkv_rows + mixed + 3 * spec.intermediate
    last = spec.hidden + mixed + spec.vocabulary
    return itemsize * (rows * wide + samples * last)


def load_device_model(
    folder: str | Path,
    device: str,
    *,
    positions: int,
    dtype: str = "auto",
    load_format: str = "auto",
    seed: int = 0,
) -> DeviceModel:
    """Load a checkpoint folder to a torch device, or make random weights there (`load_format="dummy"`).
    positions: most tokens of one sequence. Raises ConfigError when the folder cannot be served."""
    spec = load_spec(folder)
    if spec.quantization and load_format != "dummy":
        raise ConfigError("quantised checkpoints are served on the CPU only (quantization_config)")
    if spec.quantization or spec.moe is not None or spec.mla is not None:
        kind = "quantised" if spec.quantization else "mixture-of-experts or latent-attention"
        raise ConfigError(f"{folder}: {kind} models do not run on a GPU yet; use --device cpu")
    weights: Weights
    if load_format == "dummy":
        weights = DummyWeights(dtype, spec.dtype, seed, device)
    elif load_format == "auto":
        weights = SafetensorsWeights(folder, dtype, spec.dtype, device)
    else:
        raise ConfigError(f"load format {load_format!r} is not one of auto, dummy")
    with torch.inference_mode():
        table = (spec.vocabulary, spec.hidden)
        embedding = weights.take("model.embed_tokens.weight", table)
        layers = tuple(_layer(spec, weights, index) for index in range(spec.layers))
        norm = weights.take("model.norm.weight", (spec.hidden,))
        head = embedding if spec.tied else weights.take("lm_head.weight", table)
        weights.finish(["lm_head.weight"] if spec.tied else [])
        return DeviceModel(spec, weights.dtype, embedding, layers, norm, Linear(head, None), positions)


def _layer(spec: ModelSpec, weights: Weights, index: int) -> DeviceLayer:
    prefix = f"model.layers.{index}."
    query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim

    def joined(parts: list[tuple[str, int]], inputs: int, biased: bool) -> Linear:
        """Several projections of one input as one."""
        matrices = [weights.take(f"{prefix}{name}_proj.weight", (size, inputs)) for name, size in parts]
        biases = [weights.take(f"{prefix}{name}_proj.bias", (size,)) for name, size in parts if biased]
        return Linear(_joined(matrices), _joined(biases) if biases else None)

    def norm(name: str, size: int) -> torch.Tensor:
        return weights.take(f"{prefix}{name}.weight", (size,))

    heads = Heads(
        spec.heads,
        spec.kv_heads,
        spec.head_dim,
        spec.norm_eps,
        norm("self_attn.q_norm", spec.head_dim) if spec.qk_norm else None,
        norm("self_attn.k_norm", spec.head_dim) if spec.qk_norm else None,
    )
    names = [("self_attn.q", query), ("self_attn.k", key), ("self_attn.v", key)]
    wide = [("mlp.gate", spec.intermediate), ("mlp.up", spec.intermediate)]
    return DeviceLayer(
        qkv=joined(names, spec.hidden, spec.qkv_bias),
        output=joined([("self_attn.o", spec.hidden)], query, spec.o_bias),
        gate_up=joined(wide, spec.hidden, spec.mlp_bias),
        down=joined([("mlp.down", spec.hidden)], spec.intermediate, spec.mlp_bias),
        attention_norm=norm("input_layernorm", spec.hidden),
        mlp_norm=norm("post_attention_layernorm", spec.hidden),
        heads=heads,
        window=spec.window(index),
    )


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _rotary_tables(
    spec: ModelSpec, positions: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) [positions + 1, head_dim / 2], rounded to `dtype` as the field's implementations do."""
    frequencies, factor = rope_frequencies(spec)
    half = spec.head_dim // 2
    cosine, sine = (torch.empty((positions + 1, half), dtype=dtype, device=device) for _ in range(2))
    for start in range(0, positions + 1, _ROPE_PART):
        part = torch.arange(start, min(start + _ROPE_PART, positions + 1))
        cosines, sines = rope_tables(part, frequencies, factor, dtype)
        cosine[part[0] : part[-1] + 1].copy_(cosines[:, 0, :half])
        sine[part[0] : part[-1] + 1].copy_(sines[:, 0, half:])
    return cosine, sine
