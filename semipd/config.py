"""Every setting, once: its name, default, bounds and help. The CLI, `--config` files and `LLM(...)` all
read these dataclasses. Nothing here is changed after it is built; resolving is pure.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from semipd.core.errors import ConfigError
from semipd.setting import ServiceClass, Setting, check

POLICIES = ("semi-pd", "prefill-first", "chunked", "disaggregated")
PROMPT_ORDERS = ("fcfs", "shortest", "deadline")
ADMISSIONS = ("aggressive", "conservative", "past-future")
DTYPES = ("auto", "bfloat16", "float32")
ATTENTION_BACKENDS = ("triton", "flashinfer")
DEVICES = ("auto", "cpu", "cuda")
LOAD_FORMATS = ("auto", "dummy")
QUANTIZATIONS = ("none", "int8", "int4")
LOG_LEVELS = ("debug", "info", "warning", "error")
TOOL_CALL_PARSERS = ("auto", "hermes", "llama3", "mistral", "qwen3_coder", "none")
REASONING_PARSERS = ("auto", "qwen3", "deepseek_r1", "none")


def _setting(default: Any, help: str, kind: str = "text", **rest: Any) -> Any:
    return field(default=default, metadata={"setting": Setting(help, kind, **rest)})


@dataclass(frozen=True)
class ModelConfig:
    """Model"""

    model: str | None = _setting(None, "local folder or hub id; without it, the model in the box")
    dtype: str = _setting("auto", "arithmetic and KV cache", "choice", choices=DTYPES)
    device: str = _setting(
        "auto", "where to run (auto: the GPU where there is one)", "choice", choices=DEVICES
    )
    attention_backend: str = _setting(
        "triton",
        "attention kernels on a GPU (flashinfer: 0.7, installed by you)",
        "choice",
        choices=ATTENTION_BACKENDS,
    )
    load_format: str = _setting(
        "auto", "dummy: random weights in the model's shape", "choice", choices=LOAD_FORMATS
    )
    quantization: str = _setting(
        "none",
        "round the linear layers to 8 or 4 bits when loading (CPU)",
        "choice",
        choices=QUANTIZATIONS,
    )
    quantize_head: bool = _setting(False, "round the output layer too", "flag")
    max_model_len: int | None = _setting(
        None,
        "most tokens of one sequence (default: the model's own limit)",
        "size",
        low=2,
        high=2**24,
    )
    generation_config: str = _setting(
        "auto",
        "sampling defaults (auto: the model's generation_config.json; none: temperature 1, no filters)",
        "choice",
        choices=("auto", "none"),
    )
    seed: int = _setting(
        0, "of dummy weights and of requests without a seed", "integer", low=0, high=2**63 - 1
    )


@dataclass(frozen=True)
class CacheConfig:
    """KV cache"""

    kv_memory: int | None = _setting(
        None,
        "bytes for the KV pool, such as 2GiB (default: on CPUs a tenth of the memory, 2GiB at most)",
        "size",
        low=1,
        high=2**50,
    )
    kv_blocks: int | None = _setting(
        None, "blocks in the KV pool, instead of --kv-memory", "size", low=1, high=2**31 - 1
    )
    gpu_memory_share: float = _setting(
        0.9,
        "share of a GPU's memory to use in all; what is left is the KV pool",
        "number",
        low=0.05,
        high=0.98,
    )
    block_size: int = _setting(16, "tokens per KV block", "integer", low=1, high=1024)
    prefix_cache: bool = _setting(True, "reuse the KV blocks of known prefixes", "flag")


@dataclass(frozen=True)
class PolicyConfig:
    """Scheduling"""

    policy: str = _setting("semi-pd", "what runs when", "choice", choices=POLICIES)
    split: str | None = _setting(
        None,
        "semi-pd only: static:P,D units for prefill and decode, shared, paper (Algorithm 1), or auto "
        "(default with a target; else half and half)",
        metavar="SPLIT",
    )
    device_file: str | None = _setting(
        None,
        "auto only: device file to predict with, from semipd profile (default on CPUs: a generic one)",
        metavar="FILE",
    )
    ttft_slo: float | None = _setting(
        None, "target from arrival to first token, such as 300ms", "seconds", low=1e-6, high=1e6
    )
    tpot_slo: float | None = _setting(
        None, "target per further token, such as 40ms", "seconds", low=1e-6, high=1e6
    )
    slo_attainment: float | None = _setting(
        None,
        "auto only: share of requests that should keep their targets; what is above it is traded for lower "
        "latency (default 0.93)",
        "number",
        low=0.5,
        high=0.999,
    )
    classes: tuple[ServiceClass, ...] | None = _setting(
        None,
        'targets of service classes by name: {"batch": {"ttft": "10s", "tpot": "200ms", "priority": 1}}; '
        "requests name theirs by service_tier or priority",
        "classes",
        metavar="JSON",
    )
    chunk_tokens: int | None = _setting(
        None, "chunked only: token budget of a mixed batch (default 256)", "size", low=1, high=2**20
    )
    long_prompt_threshold: int | None = _setting(
        None, "chunked only: most tokens of one prompt in a mixed batch", "size", low=1, high=2**20
    )
    transfer_bandwidth: int | None = _setting(
        None, "disaggregated only: bytes per second between the pools", "size", low=1, high=2**50
    )
    prompt_order: str | None = _setting(
        None,
        "which prompt runs next: fcfs (as they come), shortest (the least work left), or deadline (as many "
        "within --ttft-slo as can be, the quickest such order; default with --split auto, else fcfs)",
        "choice",
        choices=PROMPT_ORDERS,
    )
    admission: str = _setting(
        "aggressive", "how many sequences may enter the pool", "choice", choices=ADMISSIONS
    )
    max_num_seqs: int = _setting(
        64, "sequences that may hold KV blocks at once", "integer", low=1, high=4096
    )


@dataclass(frozen=True)
class ServerConfig:
    """Server"""

    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(8000, "port to listen on (0: any free one)", "integer", low=0, high=65535)
    served_model_name: tuple[str, ...] | None = _setting(
        None, "names in the API (default: the model as it was given)", "names", metavar="NAME"
    )
    api_key: str | None = _setting(None, "clients must send it as a bearer token")
    shutdown_timeout: float = _setting(
        30.0, "how long SIGTERM waits for requests under way", "seconds", low=0, high=86400
    )
    max_queued_requests: int = _setting(
        1024, "requests without a first token; more are refused (429)", "size", low=1, high=2**20
    )
    max_queued_tokens: int = _setting(
        2**20, "their prompt tokens; more are refused (429)", "size", low=1, high=2**40
    )
    chat_template: str | None = _setting(
        None, "Jinja file to render conversations with, instead of the model's own", metavar="FILE"
    )
    tool_call_parser: str = _setting(
        "auto",
        "how the model writes calls of tools (auto: as its chat template does; none: not looked for)",
        "choice",
        choices=TOOL_CALL_PARSERS,
    )
    reasoning_parser: str = _setting(
        "auto",
        "how the model thinks before it answers (auto: as its chat template shows; none: not told apart)",
        "choice",
        choices=REASONING_PARSERS,
    )
    skip_hosted_tools: bool = _setting(
        False, "leave out tools that are no functions (/v1/responses)", "flag"
    )
    record_trace: str | None = _setting(
        None, "append times and lengths of requests to this file, for semipd simulate", metavar="FILE"
    )
    metrics_alias: str | None = _setting(
        None, "repeat the common metrics under this prefix", "choice", choices=("vllm",)
    )
    log_level: str = _setting("info", "least severe message to log", "choice", choices=LOG_LEVELS)


_OWNED = {  # settings that mean something to one policy only
    "split": "semi-pd",
    "device_file": "semi-pd",
    "slo_attainment": "semi-pd",
    "chunk_tokens": "chunked",
    "long_prompt_threshold": "chunked",
    "transfer_bandwidth": "disaggregated",
}


@dataclass(frozen=True)
class Config:
    """All settings of an engine and its server, by composition.

    Raises ConfigError for a value out of bounds, or one still to be converted (as `from_mapping` does)."""

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    policy: PolicyConfig = PolicyConfig()
    server: ServerConfig = ServerConfig()

    def __post_init__(self) -> None:
        for name, (section, setting, _) in settings().items():
            value = getattr(getattr(self, section), name)
            if value is not None and check(name, value, setting) != value:
                raise ConfigError(f"{value!r} for {name} is to be converted; see config.from_mapping")
        chosen = self.policy.policy
        for name, owner in _OWNED.items():
            if getattr(self.policy, name) is not None and owner != chosen:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} belongs to the policy {owner}, not to {chosen}")
        if self.cache.kv_memory is not None and self.cache.kv_blocks is not None:
            raise ConfigError("give --kv-memory or --kv-blocks, not both")


def sections() -> dict[str, type]:
    """The parts of `Config`, by field name."""
    return {part.name: type(part.default) for part in dataclasses.fields(Config)}


def settings() -> dict[str, tuple[str, Setting, Any]]:
    """Every setting by name: (section, what it may be, default)."""
    return {
        entry.name: (section, entry.metadata["setting"], entry.default)
        for section, kind in sections().items()
        for entry in dataclasses.fields(kind)
    }


def from_mapping(values: Mapping[str, Any]) -> Config:
    """Build a Config from flat names ("max-num-seqs" or "max_num_seqs"). None means the default.

    Raises ConfigError for an unknown name (suggesting the nearest) or a value out of bounds."""
    known = settings()
    parts: dict[str, dict[str, Any]] = {section: {} for section in sections()}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise unknown_setting(str(key), known)
        section, setting, _ = known[name]
        if name in parts[section]:
            raise ConfigError(f"{key} is given twice")
        if value is not None:
            parts[section][name] = check(name, value, setting)
    return Config(**{section: kind(**parts[section]) for section, kind in sections().items()})


def unknown_setting(name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is none of `known`, with the nearest of them."""
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    hint = f"; did you mean {near[0].replace('_', '-')}?" if near else ""
    return ConfigError(f"unknown setting {name!r}{hint}")
