"""Settings to policies and pools: what cannot work is refused with one line, before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from semipd import sizing
from semipd.build import make_policy
from semipd.cli import _parser, read_config
from semipd.config import (
    CacheConfig,
    Config,
    ModelConfig,
    PolicyConfig,
    Setting,
    from_mapping,
    settings,
)
from semipd.core.auto import Auto
from semipd.core.errors import ConfigError
from semipd.core.policies import Chunked, PrefillFirst, SemiPD
from semipd.core.types import Lane
from semipd.execute.cpu import cpu_device
from semipd.execute.sim import FixedCost
from semipd.model.folder import default_model
from semipd.model.spec import load_spec
from semipd.units import parse_seconds, parse_size


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, SemiPD),
        ({"split": "shared"}, SemiPD),
        ({"split": "static:1,3"}, SemiPD),
        ({"split": "paper", "tpot_slo": 0.04}, SemiPD),
        ({"ttft_slo": 0.3}, Auto),
        ({"split": "auto"}, Auto),
        ({"policy": "chunked", "chunk_tokens": 64}, Chunked),
        ({"policy": "prefill-first"}, PrefillFirst),
    ],
)
def test_settings_name_a_policy(settings: dict[str, Any], kind: type) -> None:
    policy = make_policy(PolicyConfig(**settings), cpu_device(4), FixedCost(4))
    assert type(policy) is kind


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"split": "static:4"}, "not auto, static:P,D, shared or paper"),
        ({"split": "static:0,4"}, "each phase needs 1 to 4"),
        ({"split": "static:2,5"}, "does not fit 4 cores"),
        ({"split": "half"}, "not auto, static"),
        ({"split": "paper"}, "needs --ttft-slo or --tpot-slo"),
        ({"policy": "disaggregated"}, "two pools"),
    ],
)
def test_a_split_that_cannot_be_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_policy(PolicyConfig(**settings), cpu_device(4), FixedCost(4))


def test_an_unstated_pool_is_a_share_of_what_the_container_may_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tenth of a large machine is more than a small container on it has."""
    spec = load_spec(default_model())
    monkeypatch.setattr(sizing, "total_memory", lambda: 200 * 2**20)
    blocks, _ = sizing.pool_size(Config(), spec, "float32")
    assert 19 * 2**20 < blocks * 16 * spec.kv_bytes_per_token(4) <= 20 * 2**20


def test_one_core_is_shared() -> None:
    policy = make_policy(PolicyConfig(), cpu_device(1))
    assert isinstance(policy, SemiPD)
    assert policy._split.of(Lane.PREFILL) == policy._split.of(Lane.DECODE) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"polcy": "chunked"}, "did you mean policy"),
        ({"max-num-seq": 4}, "did you mean max-num-seqs"),
        ({"chunk_tokens": 64}, "--chunk-tokens belongs to the policy chunked"),
        ({"policy": "chunked", "split": "shared"}, "--split belongs to the policy semi-pd"),
        ({"policy": "fastest"}, "not one of semi-pd"),
        ({"kv_memory": "1GiB", "kv_blocks": 5}, "not both"),
        ({"kv_memory": "lots"}, "not a size"),
        ({"port": 70000}, "not between 0 and 65535"),
        ({"port": True}, "not a whole number"),
        ({"port": math.inf}, "not a whole number"),
        ({"port": math.nan}, "not a whole number"),
        ({"kv_blocks": 2.5}, "not a whole number"),
        ({"kv_blocks": "0.5"}, "not a whole number"),
        ({"gpu_memory_share": math.nan}, "not between"),
        ({"api_key": ""}, "--api-key: this is empty"),
        ({"model": " "}, "--model: this is empty"),
        ({"max-num-seqs": 4, "max_num_seqs": 5}, "given twice"),
        ({"classes": [{"name": "a", "ttft": 1}, {"name": "a", "ttft": 2}]}, "same name"),
        ({"max_num_seqs": 1.5}, "not a whole number"),
        ({"ttft_slo": "-1"}, "not a time"),
        ({"dtype": "float16"}, "not one of auto"),
    ],
)
def test_bad_settings_name_themselves(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_mapping(values)


def test_flat_names_reach_their_section() -> None:
    config = from_mapping({"kv-memory": "2GiB", "max_model_len": "32K", "ttft-slo": "300ms", "seed": None})
    assert (config.cache.kv_memory, config.model.max_model_len) == (2 * 2**30, 32768)
    assert config.policy.ttft_slo == pytest.approx(0.3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096),
        ("32K", 32768),
        ("1.5GiB", 3 * 2**29),
        ("2 mb", 2**21),
        (7, 7),
        ("1.1K", 1126),
        ("9007199254740993", 2**53 + 1),  # a float would lose the 1
    ],
)
def test_sizes(text: str | int, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("300ms", 0.3), ("0.3", 0.3), (2, 2.0), ("5m", 300.0), ("40us", 4e-5)]
)
def test_times(text: str | float, value: float) -> None:
    assert parse_seconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["1" * 5000 + "x", "1" + " " * 5000 + "x"])
@pytest.mark.parametrize("parse", [parse_size, parse_seconds])
def test_a_long_text_is_refused_unread(parse: Callable[[str], object], text: str) -> None:
    """A header of 60 KiB kept the event loop, and with it every stream, for minutes."""
    with pytest.raises(ConfigError) as refused:
        parse(text)
    assert len(str(refused.value)) < 200


NUMBERS = ("size", "integer", "number", "seconds")
ALL = {name: setting for name, (_, setting, _) in settings().items()}


@pytest.mark.parametrize("name", [name for name, setting in ALL.items() if setting.kind in NUMBERS])
def test_every_number_has_two_bounds_and_a_default_within(name: str) -> None:
    setting = ALL[name]
    default = settings()[name][2]
    assert math.isfinite(setting.low) and math.isfinite(setting.high)
    assert default is None or setting.low <= default <= setting.high
    for beyond in (setting.high * 2 + 1, setting.low - 1, math.inf, -math.inf, math.nan, "much"):
        with pytest.raises(ConfigError, match="--" + name.replace("_", "-")):
            from_mapping({name: beyond})


def example(setting: Setting) -> tuple[str, Any]:
    """A value that is not the default, as a flag's text and as YAML would give it."""
    if setting.kind in NUMBERS:
        number = setting.high if setting.kind == "number" else int(setting.high)
        return str(number), number
    if setting.kind == "choice":
        return setting.choices[-1], setting.choices[-1]
    if setting.kind == "classes":
        return '{"batch": {"ttft": 10}}', {"batch": {"ttft": "10s"}}
    return "some", "some"


@pytest.mark.parametrize("name", sorted(ALL))
def test_flags_and_files_mean_the_same(name: str, tmp_path: Path) -> None:
    """Every setting, by its flag, by its line of a --config file with - or _, and by name."""
    setting = ALL[name]
    flag = "--" + name.replace("_", "-")
    text, value = ("", False) if setting.kind == "flag" else example(setting)
    words = {"flag": [flag.replace("--", "--no-", 1)], "text": [f"{flag}={text}"]}
    given = words["flag" if setting.kind == "flag" else "text"] if name != "model" else [text]
    with_policy = {"chunk_tokens": "chunked", "long_prompt_threshold": "chunked"}
    policy = {"transfer_bandwidth": "disaggregated", **with_policy}.get(name)
    fixed = {"policy": policy} if policy else {}
    expected = from_mapping({name: value, **fixed})
    assert settings()[name][2] is False or expected != Config()
    parser = _parser(["serve"])
    more = [f"--policy={policy}"] if policy else []
    assert read_config(parser.parse_args(["serve", *given, *more])) == expected
    for spelled in (name, name.replace("_", "-")):
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps({spelled: value, **fixed}))  # JSON is YAML
        assert read_config(parser.parse_args(["serve", "--config", str(file)])) == expected


def test_a_model_may_have_several_names(tmp_path: Path) -> None:
    """A model behind the names would be one more of them: that is refused, not served by the wrong name."""
    parser = _parser(["serve"])

    def names(*words: str) -> tuple[str, ...] | None:
        return read_config(parser.parse_args(["serve", *words])).server.served_model_name

    flag = "--served-model-name"
    assert names(flag, "a", "b") == names(flag, "a", flag, "b", flag, "a") == ("a", "b")
    assert names(str(tmp_path), flag, "a", "org/b") == ("a", "org/b")
    for model in (str(tmp_path), "org/model"):
        with pytest.raises(ConfigError, match="give the model first"):
            names(flag, "a", model)
    for value in ([], [""], ["x"] * 65, 7, [7], {"a": 1}):
        with pytest.raises(ConfigError, match="--served-model-name"):
            from_mapping({"served_model_name": value})


def test_a_config_of_ones_own_making_is_checked_too() -> None:
    """`build_engine` takes one that never went through `from_mapping`."""
    with pytest.raises(ConfigError, match="--seed"):
        Config(model=ModelConfig(seed=-1))
    with pytest.raises(ConfigError, match="converted"):
        Config(cache=CacheConfig(kv_memory="2GiB"))  # type: ignore[arg-type]


def test_a_setting_given_in_both_spellings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("max-num-seqs: 4\nmax_num_seqs: 5\n")
    with pytest.raises(ConfigError, match="given twice"):
        read_config(_parser(["serve"]).parse_args(["serve", "--config", str(file)]))
