"""Settings to policies and pools: what cannot work is refused with one line, before anything is loaded."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from semipd.build import make_policy
from semipd.config import PolicyConfig, from_mapping, parse_seconds, parse_size
from semipd.core.auto import Auto
from semipd.core.errors import ConfigError
from semipd.core.policies import Chunked, PrefillFirst, SemiPD
from semipd.core.types import Lane
from semipd.execute.cpu import cpu_device
from semipd.execute.sim import FixedCost


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
    ("text", "value"), [("4096", 4096), ("32K", 32768), ("1.5GiB", 3 * 2**29), ("2 mb", 2**21), (7, 7)]
)
def test_sizes(text: str | int, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("300ms", 0.3), ("0.3", 0.3), (2, 2.0), ("5m", 300.0), ("40us", 4e-5)]
)
def test_times(text: str | float, value: float) -> None:
    assert parse_seconds(text) == pytest.approx(value)
