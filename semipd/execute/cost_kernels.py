"""Which kernels a step of a model is made of, and what each computes and moves."""

from __future__ import annotations

from semipd.core.errors import ConfigError
from semipd.execute import cost_operators as operators
from semipd.execute.cost_curves import Attention, Item
from semipd.execute.cost_surface import Demand
from semipd.execute.device_file import DeviceFile
from semipd.model.spec import ModelSpec

_SMALL_KERNELS = 5  # per layer: two norms, rotary embedding with the KV write, activation, residual


def dtypes_of(spec: ModelSpec, dtype: str | None, kv_dtype: str | None) -> tuple[str, str]:
    """(of the weights, of the KV cache), from what was asked for. Raises ConfigError for an unknown one."""
    weights = dtype or spec.dtype or "bfloat16"
    weights = "bfloat16" if weights == "float16" else weights
    cache = kv_dtype or ("float32" if weights == "float32" else "bfloat16")
    for name in (weights, cache):
        if name not in operators.BYTES:
            raise ConfigError(f"no cost is known for {name} (known: {', '.join(operators.BYTES)})")
    return weights, cache


class StepKernels:
    """The kernels of a step on one rank. Arguments as of `cost.StepCost`."""

    def __init__(
        self,
        spec: ModelSpec,
        device: DeviceFile,
        ranks: int,
        stages: int,
        dtype: str | None,
        kv_dtype: str | None,
        routing: str,
    ) -> None:
        if ranks < 1 or stages < 1 or spec.heads % ranks or stages > spec.layers:
            raise ConfigError(
                f"{spec.heads} heads and {spec.layers} layers do not divide into {ranks} tensor ranks and "
                f"{stages} pipeline stages"
            )
        self.spec, self.device, self.ranks, self.stages = spec, device, ranks, stages
        self.dtype, self.kv_dtype = dtypes_of(spec, dtype, kv_dtype)
        self.wide = "float32" if self.dtype == "float32" else "bfloat16"
        self.heads = spec.heads // ranks
        self.kv_heads = max(spec.kv_heads // ranks, 1)
        self.routing = routing

    def token_items(self) -> list[Item]:
        """Everything whose work follows from the number of tokens."""
        spec = self.spec
        moe_layers = 0 if spec.moe is None else spec.layers - spec.moe.dense_layers
        dense_layers = spec.layers - moe_layers
        items = self._projections()
        if dense_layers:
            items += self._gated(spec.intermediate, dense_layers)
        if moe_layers:
            items += self._experts(moe_layers)
        items.append(self._small_kernels())
        return items + self._collectives()

    def head_items(self) -> list[Item]:
        """The logits of the sampled rows, and reading them once more to sample."""
        spec = self.spec
        rows = spec.vocabulary // self.ranks
        wide = max(operators.BYTES[self.wide], 4.0)
        kernel = self.device.kernel("gemm", self.wide)
        return [
            Item("head", 1, lambda m: operators.gemm(m, rows, spec.hidden, self.wide), kernel),
            Item(
                "sampler",
                1,
                lambda m: Demand(0.0, 3.0 * m * spec.vocabulary * wide, 0.0, ()),
                overhead=_SMALL_KERNELS * self.device.small_kernel_seconds,
            ),
        ]

    def attention(self) -> tuple[Attention, Attention]:
        """(of prompts, of single positions)."""
        if self.spec.mla is not None:
            return self._latent_attention()
        device, layers = self.device, self.spec.layers
        heads, kv_heads, dim = self.heads, self.kv_heads, self.spec.head_dim
        wide, narrow = operators.BYTES[self.wide], operators.BYTES[self.kv_dtype]
        precision = f"{self.wide}/{self.kv_dtype}"

        def prompts(tokens: float, pairs: float, context: float) -> Demand:
            return operators.context_attention(tokens, pairs, context, heads, kv_heads, dim, narrow, wide)

        def singles(tokens: float, pairs: float, context: float) -> Demand:
            return operators.generation_attention(tokens, context, heads, kv_heads, dim, narrow, wide)

        first = device.kernel("context_attention", precision)
        second = device.kernel("generation_attention", precision)
        return (
            Attention(device, first, layers, prompts, heads, False),
            Attention(device, second, layers, singles, kv_heads, True),
        )

    def _latent_attention(self) -> tuple[Attention, Attention]:
        spec, device, heads = self.spec, self.device, self.heads
        assert spec.mla is not None
        mla, narrow = spec.mla, operators.BYTES[self.kv_dtype]
        first = device.kernel("mla_context", self._latent_precision("mla_context"))
        second = device.kernel("mla_generation", self._latent_precision("mla_generation"))
        module = (spec.hidden, self.dtype)

        def prompts(tokens: float, pairs: float, context: float) -> Demand:
            around = module if first.scope == "module" else None
            return operators.mla_context(tokens, pairs, context, heads, mla, narrow, around)

        def singles(tokens: float, pairs: float, context: float) -> Demand:
            around = module if second.scope == "module" else None
            return operators.mla_generation(tokens, context, heads, mla, narrow, around)

        return (
            Attention(device, first, spec.layers, prompts, 1.0, False),
            Attention(device, second, spec.layers, singles, 1.0, True),
        )

    def _latent_precision(self, operator: str) -> str:
        """The fit for these weights and cache, or else for the cache alone (a bare kernel)."""
        whole, bare = f"bfloat16/{self.kv_dtype}/{self.dtype}", f"bfloat16/{self.kv_dtype}"
        return bare if bare in self.device.kernels.get(operator, {}) else whole

    def _gemm(self, rows: float, columns: float, count: float, dtype: str | None = None) -> Item:
        precision = dtype or self.dtype
        kernel = self.device.kernel("gemm", precision)
        return Item("linears", count, lambda m: operators.gemm(m, rows, columns, precision), kernel)

    def _projections(self) -> list[Item]:
        spec, layers = self.spec, self.spec.layers
        if spec.mla is None:
            query = self.heads * spec.head_dim
            return [
                self._gemm(query + 2 * self.kv_heads * spec.head_dim, spec.hidden, layers),
                self._gemm(spec.hidden, query, layers),
            ]
        mla = spec.mla
        kernels = self.device.kernels.get("mla_context", {}).get(self._latent_precision("mla_context"))
        if kernels is not None and kernels.scope == "module":
            return []  # measured together with attention
        query = self.heads * mla.query_dim
        out = self._gemm(spec.hidden, self.heads * mla.value_dim, layers)
        if mla.query_rank == 0:
            return [self._gemm(query + mla.latent_dim, spec.hidden, layers), out]
        down = self._gemm(mla.query_rank + mla.latent_dim, spec.hidden, layers)
        return [down, self._gemm(query, mla.query_rank, layers), out]

    def _gated(self, width: float, count: float) -> list[Item]:
        share = width / self.ranks
        hidden = self.spec.hidden
        return [self._gemm(2 * share, hidden, count), self._gemm(hidden, share, count)]

    def _experts(self, count: float) -> list[Item]:
        spec, ranks = self.spec, self.ranks
        assert spec.moe is not None
        moe = spec.moe
        fitted = self.device.kernels.get("moe", {})
        names = [name for name in sorted(fitted) if name.split("/")[0] == self.dtype]
        wanted = f"{self.dtype}/{self.routing}"
        precision = wanted if wanted in names or not names else names[0]
        kernel = self.device.kernel("moe", precision)

        def routed(tokens: float) -> Demand:
            return operators.moe(
                tokens, spec.hidden, moe.width, moe.chosen, moe.experts, ranks, 1, self.dtype
            )

        items = [Item("experts", count, routed, kernel)]
        items.append(self._gemm(moe.experts, spec.hidden, count, self.wide))
        if moe.shared:
            items += self._gated(moe.shared * moe.width, count)
        return items

    def _small_kernels(self) -> Item:
        """Norms with residuals, rotary embedding, KV write and activation: memory traffic and starts."""
        spec = self.spec
        wide = operators.BYTES[self.wide]
        query = self.heads * spec.head_dim + 2 * self.kv_heads * spec.head_dim
        width = (
            spec.intermediate if spec.moe is None else spec.moe.width * (spec.moe.shared + spec.moe.chosen)
        )
        per_token = (8 * spec.hidden + 2 * query + 3 * width / self.ranks) * wide
        return Item(
            "small kernels",
            spec.layers,
            lambda m: Demand(0.0, m * per_token, 0.0, ()),
            overhead=_SMALL_KERNELS * self.device.small_kernel_seconds,
        )

    def _collectives(self) -> list[Item]:
        """Two sums per layer over tensor ranks; a stage hands on its rows at the price of a sum of two."""
        items = []
        hidden, ranks, kernel_of = self.spec.hidden, self.ranks, self.device.kernel
        if ranks > 1:
            kernel = kernel_of("allreduce", "bfloat16")
            demand = lambda m: operators.allreduce(m * hidden, ranks)  # noqa: E731
            items.append(Item("collectives", 2 * self.spec.layers, demand, kernel, fixed=True))
        if self.stages > 1:
            kernel = kernel_of("allreduce", "bfloat16")
            demand = lambda m: operators.allreduce(m * hidden, 2)  # noqa: E731
            items.append(Item("collectives", self.stages, demand, kernel, fixed=True))
        return items
