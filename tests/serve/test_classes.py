"""Service classes: how they are written, how requests name them, and what is counted of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from semipd.build import make_policy, targets_of
from semipd.config import Config, PolicyConfig, from_mapping
from semipd.core.auto import Auto
from semipd.core.errors import ConfigError
from semipd.core.partition import Targets
from semipd.execute.cpu import cpu_device
from semipd.execute.sim import FixedCost
from semipd.setting import MAX_CLASSES, ServiceClass
from tests.serve.fakes import LiveFake, make_folder
from tests.serve.serving import serving

WRITTEN: dict[str, Any] = {
    "interactive": {"ttft": "300ms", "tpot": 0.04, "priority": 0},
    "batch": {"tpot": "20s", "priority": 5},
    "best-effort": None,
}
CLASSES = (
    ServiceClass("interactive", 0.3, 0.04, 0),
    ServiceClass("batch", None, 20.0, 5),
    ServiceClass("best-effort"),
)


def config(classes: Any) -> Config:
    return from_mapping({"classes": classes})


def test_classes_are_written_in_a_file_or_as_json_and_travel() -> None:
    built = config(WRITTEN)
    assert built.policy.classes == CLASSES and hash(built)
    assert config(msgspec.json.encode(WRITTEN).decode()) == built
    moved = msgspec.msgpack.decode(msgspec.msgpack.encode(dataclasses.asdict(built.policy)))
    assert from_mapping(moved) == built


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ({"a": {"ttft": "soon"}}, "a.ttft: 'soon' is not a time"),
        ({"a": {"ttft": 0}}, "a.ttft: 0.0 is not between"),
        ({"a": {"ttft": float("nan")}}, "a.ttft"),
        ({"a": {"tbt": 1}}, "'tbt' is not one of ttft, tpot, priority"),
        ({"a": {"priority": 1.5}}, "a.priority"),
        ({"a": {"priority": 2**40}}, "a.priority"),
        ({"a": 3}, "a: write ttft"),
        ({"default": {}}, "cannot name"),
        ({"a b": {}}, "cannot name"),
        ({7: {}}, "cannot name"),
        ({"a": {"priority": 1}, "b": {"priority": 1}}, "same priority"),
        ({f"c{number}": {} for number in range(MAX_CLASSES + 1)}, "at most 16"),
        ("{", "not JSON"),
        ("[1]", "--classes"),
        (5, "service classes are written as"),
    ],
)
def test_classes_that_cannot_be(classes: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        config(classes)


def test_auto_gets_the_targets_of_every_class() -> None:
    settings = PolicyConfig(ttft_slo=1.0, classes=CLASSES)
    assert targets_of(settings) == {
        "default": Targets(ttft=1.0),
        "interactive": Targets(0.3, 0.04),
        "batch": Targets(tpot=20.0),
        "best-effort": Targets(),
    }
    policy = make_policy(PolicyConfig(classes=CLASSES), cpu_device(4), FixedCost(4))
    assert isinstance(policy, Auto)  # targets of classes alone are targets
    without = make_policy(PolicyConfig(classes=CLASSES[2:]), cpu_device(4), FixedCost(4))
    assert not isinstance(without, Auto)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = make_folder(tmp_path_factory.mktemp("model"))
    hard = ServiceClass("interactive", 1e-6, 1e-6, 0)  # no request can meet it, and any meets `batch`
    policy = PolicyConfig(classes=(hard, *CLASSES[1:]))
    serve = serving(folder, LiveFake(), policy=policy, metrics_alias="vllm")
    with serve as running, running.client() as client:
        yield client


def ask(client: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"prompt": [9, 8, 7], "max_tokens": 3, "ignore_eos": True, **fields}
    return client.post("/v1/completions", json=body)


def counted(page: str, name: str, prefix: str = "semipd") -> dict[str, float]:
    """Samples of a metric by class."""
    rows = re.findall(rf'^{prefix}:{name}{{.*class="([^"]*)"}} (.*)$', page, re.MULTILINE)
    return {name: float(value) for name, value in rows}


def test_attainment_is_counted_by_class(client: httpx.Client) -> None:
    for fields in (
        {"service_tier": "batch"},
        {"priority": 5},
        {"service_tier": "batch", "priority": 5},
        {"priority": 0},
        {"service_tier": "best-effort"},
        {"service_tier": "auto"},
        {"service_tier": "default", "priority": None},
    ):
        answer = ask(client, **fields)
        assert answer.status_code == 200, answer.text
    with client.stream(
        "POST",
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "hello"}], "service_tier": "batch", "stream": True},
    ) as stream:
        assert stream.status_code == 200 and "[DONE]" in stream.read().decode()
    page = client.get("/metrics").text
    assert counted(page, "slo_requests_total") == {"interactive": 1, "batch": 4}
    assert counted(page, "slo_met_total") == {"interactive": 0, "batch": 4}
    assert counted(page, "slo_attainment") == {"interactive": 0, "batch": 1}


def test_the_alias_repeats_what_others_have(client: httpx.Client) -> None:
    page = client.get("/metrics").text
    own = {line for line in page.splitlines() if line.startswith("semipd:")}
    other = {line for line in page.splitlines() if line.startswith("vllm:")}
    assert other < {line.replace("semipd:", "vllm:") for line in own}
    for name in ("num_requests_running", "time_to_first_token_seconds_bucket", "kv_cache_usage_perc"):
        assert f"\nvllm:{name}{{" in page and f"# TYPE vllm:{name.removesuffix('_bucket')} " in page
    assert "vllm:partition" not in page and "vllm:slo" not in page
    families = re.findall(r"^# TYPE (\S+)", page, re.MULTILINE)
    assert len(families) == len(set(families))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"service_tier": "flex"}, "service_tier"),
        ({"service_tier": 5}, "service_tier"),
        ({"service_tier": ""}, "service_tier"),
        ({"priority": 3}, "priority"),
        ({"priority": "high"}, "priority"),
        ({"priority": 2**60}, "priority"),
        ({"priority": 5, "service_tier": "interactive"}, "priority"),
    ],
)
def test_unknown_classes_are_refused_by_name(client: httpx.Client, fields: Any, param: str) -> None:
    answer = ask(client, **fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_without_classes_only_the_neutral_values_pass(tmp_path: Path) -> None:
    with serving(make_folder(tmp_path), LiveFake()) as running, running.client() as client:
        assert ask(client, service_tier="auto", priority=0).status_code == 200
        assert ask(client, service_tier="batch").json()["error"]["param"] == "service_tier"
        assert ask(client, priority=1).json()["error"]["param"] == "priority"
        assert "slo_" not in client.get("/metrics").text
