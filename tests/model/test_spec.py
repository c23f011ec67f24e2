from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from semipd.core.errors import ConfigError
from semipd.model.spec import ModelSpec, RopeScaling, load_spec
from tests.checkpoints import SHAPE

QWEN25_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **SHAPE, **changes}


def test_an_older_config() -> None:
    """As the hub has them: torch_dtype, rope_theta at the top, a window that is switched off."""
    spec = ModelSpec.from_config(QWEN25_05B)
    assert (spec.family, spec.dtype, spec.rope_theta, spec.head_dim) == ("qwen2", "bfloat16", 1e6, 64)
    assert (spec.qkv_bias, spec.o_bias, spec.tied, spec.sliding_window) == (True, False, True, None)
    assert spec.eos_token_ids == (151645,)
    assert spec.parameters == 494_032_768
    assert spec.weight_bytes(2) == 988_065_536
    assert spec.kv_bytes_per_token(2) == 24 * 2 * 2 * 64 * 2
    assert spec.linear_flops_per_token == pytest.approx(2 * 357.9e6, rel=1e-3)
    assert spec.head_flops_per_row == 2 * 896 * 151936


def test_old_and_new_rope_settings_mean_the_same() -> None:
    values = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    values["original_max_position_embeddings"] = 64
    old = config(rope_theta=5e5, rope_scaling={"type": "llama3", **values})
    new = config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **values})
    assert ModelSpec.from_config(old) == ModelSpec.from_config(new)
    scaling = ModelSpec.from_config(new).rope_scaling
    assert scaling == RopeScaling("llama3", 8.0, 64, 1.0, 4.0)


def test_eos_ids_of_the_generation_config_count_too(tmp_path: Path) -> None:
    """Chat models often end a turn with an id that only generation_config.json names."""
    (tmp_path / "config.json").write_text(json.dumps(config(eos_token_id=2)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2]}))
    assert load_spec(tmp_path).eos_token_ids == (2, 9)


@pytest.mark.parametrize(
    ("architecture", "changes", "window", "sliding"),
    [
        ("MistralForCausalLM", {"sliding_window": 40}, 40, {0, 1, 2}),
        ("MistralForCausalLM", {"sliding_window": None}, None, set()),
        ("MistralForCausalLM", {}, 4096, {0, 1, 2}),
        ("LlamaForCausalLM", {"sliding_window": 40}, None, set()),
        ("Qwen2ForCausalLM", {"sliding_window": 40}, None, set()),
        ("Qwen2ForCausalLM", {"sliding_window": 40, "use_sliding_window": True}, 40, set()),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 40, "use_sliding_window": True, "max_window_layers": 1},
            40,
            {1, 2},
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 40,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
            40,
            {0},
        ),
    ],
)
def test_each_family_has_its_own_rule_for_windows(
    architecture: str, changes: dict[str, Any], window: int | None, sliding: set[int]
) -> None:
    spec = ModelSpec.from_config(config(architecture, **changes))
    assert (spec.sliding_window, spec.sliding_layers) == (window, sliding)
    assert [spec.window(i) for i in range(3)] == [window if i in sliding else None for i in range(3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "architecture"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": "awq"}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 48.0}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_attention_heads": 5}, "KV heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"mlp_bias": 1}, "mlp_bias"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ModelSpec.from_config({**config(), **changes})
    assert "\n" not in str(caught.value)


def test_a_broken_window_is_refused() -> None:
    broken = config("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=8, max_window_layers="a")
    with pytest.raises(ConfigError, match="max_window_layers"):
        ModelSpec.from_config(broken)


@pytest.mark.parametrize("layer_types", ["full_attention", ["full_attention"], [1, 2, {}], ["linear"] * 3])
def test_unknown_layer_types_are_refused(layer_types: Any) -> None:
    with pytest.raises(ConfigError, match="layer_types"):
        ModelSpec.from_config(config("Qwen3ForCausalLM", layer_types=layer_types))


@pytest.mark.parametrize("content", [None, "{", "[]", b"\xff\xfe\x00", "[" * 100_000])
def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        load_spec(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("window", [None, 1, 7, 30, 100])
def test_attention_flops_count_every_attended_pair_once(window: int | None) -> None:
    changes = {"sliding_window": window, "use_sliding_window": window is not None, "max_window_layers": 1}
    spec = ModelSpec.from_config(config("Qwen2ForCausalLM", **changes))
    for new, context in ((1, 1), (1, 50), (13, 13), (20, 50), (50, 50)):
        pairs = sum(
            min(position + 1, spec.window(layer) or context)
            for layer in range(spec.layers)
            for position in range(context - new, context)
        )
        assert spec.attention_flops(new, context) == pairs * 4 * spec.heads * spec.head_dim


def test_reading_a_spec_needs_no_torch() -> None:
    """The simulator and the planner's process read specs."""
    code = "import sys, semipd.model.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
