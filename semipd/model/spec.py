"""The shape of a model: what a checkpoint's config.json says, and the bytes and FLOPs that follow from it.

No torch here: the simulator and the planner's process read specs too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from semipd.core.errors import ConfigError
from semipd.model.config_json import ConfigReader

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched. `kind`: default, linear, llama3 or yarn; the other fields
    belong to some kinds only and keep their defaults elsewhere.

    attention_factor: what yarn multiplies cos and sin by; None means derive it from `factor`.
    """

    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class MoeSpec:
    """Mixture of experts in every layer after the first `dense_layers`.

    experts: routed experts, of which each token goes to `chosen`; `width`: intermediate size of each;
    shared: experts of that size that every token goes to.
    """

    experts: int
    chosen: int
    width: int
    shared: int = 0
    dense_layers: int = 0

    def read_experts(self, tokens: float) -> float:
        """Distinct routed experts that this many tokens reach, in expectation."""
        return self.experts * float(1.0 - (1.0 - self.chosen / self.experts) ** tokens)


@dataclass(frozen=True)
class MlaSpec:
    """Multi-head latent attention: one compressed key-value row per position, shared by all heads.

    kv_rank: size of the compressed row; rope_dim: its part with positions, kept beside it; nope_dim,
    value_dim: sizes per head after expansion; query_rank: of the query's low-rank form (0: none).
    """

    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    query_rank: int = 0

    @property
    def latent_dim(self) -> int:
        """Values kept per position and layer."""
        return self.kv_rank + self.rope_dim

    @property
    def query_dim(self) -> int:
        """Size of one head's query."""
        return self.nope_dim + self.rope_dim


@dataclass(frozen=True)
class ModelSpec:
    """A decoder's shape; dense with grouped-query attention unless `moe` or `mla` says otherwise.

    sliding_layers: layers that see only the last `sliding_window` positions, themselves included.
    dtype: what the checkpoint is stored in; empty when its config does not say. quantization: the config's
    quantization_config, for those who load the weights.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    max_positions: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float = 1e-6
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: frozenset[int] = frozenset()
    dtype: str = ""
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    moe: MoeSpec | None = None
    mla: MlaSpec | None = None
    quantization: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> ModelSpec:
        """Read a Hugging Face config.json, of transformers 4 or 5. Raises ConfigError for an architecture
        or a feature that the model room does not implement."""
        read = ConfigReader(config)
        family = _family(read)
        read.refuse_unless("hidden_act", "silu")
        hidden, heads = read.count("hidden_size"), read.count("num_attention_heads")
        head_dim = read.count("head_dim", 128 if family == "qwen3" else hidden // heads)
        kv_heads = read.count("num_key_value_heads", {"llama": heads, "mistral": 8}.get(family, 32))
        layers, max_positions = read.count("num_hidden_layers"), read.count("max_position_embeddings")
        bias = family == "qwen2" or (family != "mistral" and read.flag("attention_bias"))
        window, window_layers = _window(read, family, layers)
        theta, scaling = _rope(read, max_positions)
        spec = ModelSpec(
            family=family,
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=read.count("intermediate_size"),
            vocabulary=read.count("vocab_size"),
            max_positions=max_positions,
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=read.number("rms_norm_eps", 1e-6),
            tied=read.flag("tie_word_embeddings"),
            qkv_bias=bias,
            o_bias=bias and family != "qwen2",
            mlp_bias=family == "llama" and read.flag("mlp_bias"),
            qk_norm=family == "qwen3",
            sliding_window=window,
            sliding_layers=window_layers,
            dtype=_dtype(config),
            eos_token_ids=read.token_ids("eos_token_id"),
            bos_token_id=next(iter(read.token_ids("bos_token_id")), None),
            quantization=read.mapping("quantization_config"),
        )
        spec.check()
        return spec

    def check(self) -> None:
        """Raise ConfigError when the sizes do not fit each other."""
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} attention heads cannot share {self.kv_heads} KV heads")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary embeddings need pairs")
        if self.rope_theta <= 1:
            raise ConfigError(f"rope_theta {self.rope_theta} is not above 1")
        if self.rope_scaling.high_freq_factor <= self.rope_scaling.low_freq_factor:
            raise ConfigError("high_freq_factor is not above low_freq_factor")

    def window(self, layer: int) -> int | None:
        """How many positions this layer sees, or None for all."""
        return self.sliding_window if layer in self.sliding_layers else None

    @property
    def qkv_rows(self) -> int:
        """Outputs of the fused query, key and value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def attention_parameters(self) -> int:
        """Weights (without biases) of the linears around one layer's attention."""
        if self.mla is None:
            return self.hidden * (self.qkv_rows + self.heads * self.head_dim)
        query = self.heads * self.mla.query_dim
        rank = self.mla.query_rank
        query_in = (self.hidden + query) * rank if rank else self.hidden * query
        expand = self.mla.kv_rank * self.heads * (self.mla.nope_dim + self.mla.value_dim)
        out = self.heads * self.mla.value_dim * self.hidden
        return query_in + self.hidden * self.mla.latent_dim + expand + out

    def feed_forward_parameters(self, layer: int, experts: float | None = None) -> float:
        """Weights of one layer's feed-forward block; of an expert layer, those of its router, its shared
        experts and `experts` routed ones (all without a number)."""
        moe = self.moe
        if moe is None or layer < moe.dense_layers:
            return self.hidden * 3 * self.intermediate
        routed = moe.experts if experts is None else experts
        return self.hidden * (moe.experts + 3 * moe.width * (moe.shared + routed))

    @property
    def parameters(self) -> int:
        """Distinct parameters; a tied head counts once."""
        return int(self._linear_parameters(None)) + self._other_parameters()

    def _linear_parameters(self, experts: float | None) -> float:
        feed = sum(self.feed_forward_parameters(layer, experts) for layer in range(self.layers))
        return self.layers * self.attention_parameters + feed

    def _other_parameters(self) -> int:
        layer = 2 * self.hidden
        layer += self.qkv_bias * self.qkv_rows + self.o_bias * self.hidden
        layer += self.mlp_bias * (2 * self.intermediate + self.hidden)
        layer += self.qk_norm * 2 * self.head_dim
        if self.mla is not None:
            layer += self.mla.query_rank + self.mla.kv_rank
        tables = 1 if self.tied else 2
        return self.layers * layer + tables * self.vocabulary * self.hidden + self.hidden

    def weight_bytes(self, bytes_per_parameter: float = 2) -> int:
        """Bytes of all parameters."""
        return int(self.parameters * bytes_per_parameter)

    def read_bytes(self, tokens: float, bytes_per_parameter: float = 2) -> float:
        """Bytes of the weights that a step of this many tokens must read: linears, head and the experts
        that these tokens reach."""
        experts = None if self.moe is None else self.moe.read_experts(tokens)
        linears = self._linear_parameters(experts)
        return (linears + self.vocabulary * self.hidden) * bytes_per_parameter

    def kv_bytes_per_token(self, bytes_per_value: float = 2) -> int:
        """Bytes of what one position leaves in the KV cache, all layers."""
        row = 2 * self.kv_heads * self.head_dim if self.mla is None else self.mla.latent_dim
        return int(self.layers * row * bytes_per_value)

    @property
    def linear_flops_per_token(self) -> int:
        """FLOPs of the layers' linears for one position; the head is counted per sampled row."""
        chosen = None if self.moe is None else self.moe.chosen
        return 2 * int(self._linear_parameters(chosen))

    @property
    def head_flops_per_row(self) -> int:
        """FLOPs of the logits of one sampled row."""
        return 2 * self.hidden * self.vocabulary

    def attention_flops(self, tokens_new: int, context: int) -> int:
        """FLOPs of attention for the last `tokens_new` of `context` positions, all layers."""
        per_head = 2 * self.head_dim if self.mla is None else self.mla.query_dim + self.mla.value_dim
        per_pair = 2 * self.heads * per_head
        sliding = len(self.sliding_layers)
        pairs = (self.layers - sliding) * _attended(tokens_new, context, None)
        pairs += sliding * _attended(tokens_new, context, self.sliding_window)
        return per_pair * pairs


def load_spec(folder: str | Path) -> ModelSpec:
    """Read the spec of a checkpoint folder; end-of-sequence ids of its generation_config.json are added.

    Raises ConfigError, one line."""
    folder = Path(folder)
    spec = ModelSpec.from_config(_read_json(folder / "config.json"))
    generation = folder / "generation_config.json"
    if not generation.exists():
        return spec
    extra = ConfigReader(_read_json(generation)).token_ids("eos_token_id")
    return replace(spec, eos_token_ids=tuple(dict.fromkeys(spec.eos_token_ids + extra)))


def _attended(new: int, context: int, window: int | None) -> int:
    """Pairs (query, visible key) for the last `new` of `context` positions."""
    if window is None:
        return new * context - new * (new - 1) // 2
    growing = max(0, min(context, window) - (context - new))  # positions that still see all before them
    first = context - new
    return growing * first + growing * (growing + 1) // 2 + (new - growing) * window


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} is not a model folder: it has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return value


def _family(read: ConfigReader) -> str:
    name = next(iter(read.items("architectures")), None)
    model_type = read.config.get("model_type")
    for architecture, family in FAMILIES.items():
        if name == architecture or (name is None and model_type == family):
            return family
    raise ConfigError(f"architecture {name or model_type!r} is not supported (only {', '.join(FAMILIES)})")


def _dtype(config: Mapping[str, Any]) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    if name and name not in DTYPES:
        raise ConfigError(f"weights of dtype {name} are not supported (only {', '.join(DTYPES)})")
    return name


def _window(read: ConfigReader, family: str, layers: int) -> tuple[int | None, frozenset[int]]:
    """(window, layers that use it), by the rules of each family's own config class."""
    if family == "llama":
        return None, frozenset()
    if family == "mistral":
        window = read.optional_count("sliding_window", 4096)
        return window, frozenset(range(layers)) if window else frozenset()
    window = read.optional_count("sliding_window", 4096) if read.flag("use_sliding_window") else None
    kinds = read.items("layer_types")
    if not kinds:
        first = read.whole("max_window_layers", 28)
        kinds = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    if len(kinds) != layers or any(kind not in ("sliding_attention", "full_attention") for kind in kinds):
        raise ConfigError("layer_types must name full_attention or sliding_attention for every layer")
    sliding = frozenset(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    return (window, sliding) if window else (None, frozenset())


def _rope(read: ConfigReader, max_positions: int) -> tuple[float, RopeScaling]:
    """(theta, scaling) from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`
    (before)."""
    values = {**read.mapping("rope_scaling"), **read.mapping("rope_parameters")}
    rope = ConfigReader(values)
    theta = rope.number("rope_theta", read.number("rope_theta", 10000.0))
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ConfigError(f"rope type {kind!r} is not supported (only default, linear, llama3, yarn)")
    if rope.number("partial_rotary_factor", read.number("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError("partial rotary embeddings are not supported (partial_rotary_factor)")
    if kind == "default":
        return theta, RopeScaling()
    original = read.config.get("original_max_position_embeddings") or max_positions
    return theta, RopeScaling(
        kind=kind,
        factor=rope.number("factor"),
        original_positions=rope.count("original_max_position_embeddings", original),
        low_freq_factor=rope.number("low_freq_factor", 1.0),
        high_freq_factor=rope.number("high_freq_factor", 4.0),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=bool(values.get("truncate", True)),
        attention_factor=rope.number("attention_factor") if values.get("attention_factor") else None,
        mscale=rope.number("mscale") if values.get("mscale") else 0.0,
        mscale_all_dim=rope.number("mscale_all_dim") if values.get("mscale_all_dim") else 0.0,
    )
