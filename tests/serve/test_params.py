"""Bounds and defaults of sampling parameters, and the requests that are made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from semipd.core import keys
from semipd.core.errors import ConfigError, Refused
from semipd.serve.generation import RequestMaker, mix
from semipd.serve.messages import EngineInfo, Submit, Unframer, decode_down, frame
from semipd.serve.model_folder import read_model_folder
from semipd.serve.params import Defaults, SamplingParams
from tests.serve.fakes import make_folder

ENGINE = EngineInfo("fake", 2, "core", limit=64, block_size=4)


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> RequestMaker:
    folder = make_folder(
        tmp_path_factory.mktemp("model"), eos_token_id=[0, 3], temperature=0.5, top_k=7, do_sample=True
    )
    return RequestMaker(read_model_folder(folder), seed=1)


def one(maker: RequestMaker, ids: list[int], **params: object) -> Submit:
    (submit,) = maker.plan([ids], SamplingParams(**params), ENGINE).submits  # type: ignore[arg-type]
    return submit


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", float("nan")), ("temperature", True), ("temperature", "1"), ("temperature", 2.5),
        ("top_p", 0.0), ("top_p", 1.5), ("top_k", 1.0), ("top_k", -2), ("min_p", -0.1), ("seed", 2**64),
        ("max_tokens", 0), ("max_tokens", True), ("min_tokens", None), ("min_tokens", 17),
        ("n", 0), ("n", None),
        ("presence_penalty", 2.5), ("presence_penalty", None), ("frequency_penalty", float("nan")),
        ("frequency_penalty", "1"), ("repetition_penalty", 0.0), ("repetition_penalty", 101),
        ("logit_bias", {5: 101.0}), ("logit_bias", {5: None}), ("logit_bias", {True: 1.0}),
        ("logit_bias", {"5": 1.0}), ("logit_bias", {-1: 1.0}), ("logit_bias", [5]), ("logit_bias", ((5,),)),
        ("logit_bias", ((5, 1.0), (5, 2.0))), ("logit_bias", dict.fromkeys(range(301), 0.0)),
        ("logprobs", 21), ("logprobs", True), ("prompt_logprobs", -1),
        ("stop", 5), ("stop", [""]), ("stop", ["é" * 2049]), ("stop_token_ids", [True]),
        ("stop_token_ids", "ab"), ("stop_token_ids", [None]), ("ignore_eos", 1),
    ],
)  # fmt: skip
def test_out_of_bounds(name: str, value: object) -> None:
    with pytest.raises(Refused) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name


def test_what_is_left_out_comes_from_the_model(maker: RequestMaker) -> None:
    sampling = one(maker, [5]).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 7, 1.0)
    sampling = one(maker, [5], temperature=0.0, top_k=-1).sampling
    assert (sampling.temperature, sampling.top_k) == (0.0, 0)
    assert Defaults().fill(SamplingParams()).temperature == 1.0


def test_min_tokens_bans_every_stop_token(maker: RequestMaker) -> None:
    submit = one(maker, [5] * 10, min_tokens=6, stop_token_ids=[9])
    assert submit.sampling.ban_until == 16 and set(submit.sampling.ban_tokens) == {0, 3, 9}
    assert set(submit.stop_tokens) == {0, 3, 9}
    free = one(maker, [5], ignore_eos=True)
    assert free.stop_tokens == () and free.sampling.ban_tokens == ()


def test_penalties_and_wishes_reach_the_slot(maker: RequestMaker) -> None:
    asked = {
        "presence_penalty": 1, "frequency_penalty": -0.5, "repetition_penalty": 1.5, "logprobs": 0,
        "logit_bias": {7: -100, 9: 2.5}, "prompt_logprobs": 3,
    }  # fmt: skip
    submit = one(maker, [5] * 10, n=1, **asked)
    sampling = submit.sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.0, -0.5)
    assert sampling.logit_bias == ((7, -100.0), (9, 2.5)) and sampling.penalises
    assert (sampling.repetition_penalty, sampling.prompt_length) == (1.5, 10)
    assert (sampling.logprobs, sampling.prompt_logprobs) == (0, 3)
    assert submit.keys == b"" and submit.salt is None, "no position of it may come from the prefix cache"
    assert one(maker, [5] * 10, logprobs=3).keys and not one(maker, [5]).sampling.penalises
    assert decode_down(frame(submit)[4:]) == submit
    with pytest.raises(Refused, match="vocabulary"):
        one(maker, [5], logit_bias={400: 1.0})


def test_a_model_may_have_a_repetition_penalty_of_its_own(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, repetition_penalty=1.1)
    maker = RequestMaker(read_model_folder(folder))
    assert one(maker, [5]).sampling.repetition_penalty == 1.1
    assert one(maker, [5], repetition_penalty=1.0).sampling.repetition_penalty == 1.0


def test_a_models_defaults_can_be_left_aside(tmp_path: Path) -> None:
    """But not what ends its sequences."""
    folder = make_folder(tmp_path, repetition_penalty=1.1, eos_token_id=7)
    model = read_model_folder(folder, own_defaults=False)
    assert model.eos == (7,) and one(RequestMaker(model), [5]).sampling.repetition_penalty == 1.0


def test_seeds(maker: RequestMaker) -> None:
    """Given ones are kept; left out, they differ from request to request and from choice to choice."""
    assert one(maker, [5], seed=-9).sampling.seed == -9
    seeds = [
        submit.sampling.seed
        for _ in range(3)
        for submit in maker.plan([[5], [6]], SamplingParams(n=3), ENGINE).submits
    ]
    assert len(set(seeds)) == 18 and all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert mix(2**63 - 1, 5) != mix(2**63 - 1, 6)


def test_block_keys_follow_the_salt(maker: RequestMaker) -> None:
    ids = list(range(5, 15))
    params = SamplingParams()
    plain, salted = (maker.plan([ids], params, ENGINE, salt).submits[0] for salt in (None, "me"))
    assert plain.request(0.0).block_keys == keys.block_keys(ids, 4)
    assert salted.request(0.0).block_keys == keys.block_keys(ids, 4, keys.root("me"))
    assert salted.salt == keys.root("me")


def test_without_a_prefix_cache_there_are_no_keys(tmp_path: Path) -> None:
    maker = RequestMaker(read_model_folder(make_folder(tmp_path)), prefix_cache=False)
    submit = one(maker, list(range(5, 15)))
    assert submit.keys == b"" and submit.salt is None


def test_limits_name_what_to_change(maker: RequestMaker) -> None:
    for ids, params, param in (
        ([5] * 64, {}, "prompt"),
        ([5] * 60, {"max_tokens": 5}, "max_tokens"),
        ([], {}, "prompt"),
        ([400], {}, "prompt"),
        ([5], {"stop_token_ids": [400]}, "stop_token_ids"),
    ):
        with pytest.raises(Refused) as caught:
            one(maker, ids, **params)  # type: ignore[arg-type]
        assert caught.value.param == param
    assert one(maker, [5] * 60, max_tokens=None).max_tokens == 4


def test_a_request_survives_the_wire(maker: RequestMaker) -> None:
    submit = one(maker, list(range(5, 15)), temperature=0.7, seed=3, min_tokens=2, max_tokens=9)
    framed = frame(submit)
    unframer = Unframer()
    bodies = [body for at in range(len(framed)) for body in unframer.feed(framed[at : at + 1])]
    (received,) = map(decode_down, bodies)
    assert received == submit
    request = received.request(100.0)  # type: ignore[union-attr]
    assert list(request.prompt) == list(range(5, 15)) and request.sampling.seed == 3
    assert request.sampling.ban_tokens == submit.sampling.ban_tokens


def test_a_length_that_no_message_has_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes"):
        list(Unframer().feed(b"\xff" * 8))


def test_what_a_folder_names_and_nobody_can_say_is_left_out(tmp_path: Path) -> None:
    """Ids beyond the vocabulary failed whole batches, and half a character the greeting."""
    folder = make_folder(tmp_path, eos_token_id=[0, 400, 3, 2**70, -1])
    (folder / "suggestions.json").write_text('{"suggestions": ["a\\ud800", "b"]}')
    model = read_model_folder(folder)
    assert model.eos == (0, 3) and model.suggestions == ("b",)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"vocab_size": -1}'),
        ("config.json", "{}"),
        ("generation_config.json", '{"temperature": -1}'),
        ("generation_config.json", '{"top_p": "x"}'),
        ("generation_config.json", '{"eos_token_id": [1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]}'),
    ],
)
def test_a_broken_folder_is_one_clear_line(tmp_path: Path, name: str, text: str) -> None:
    folder = make_folder(tmp_path)
    (folder / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_model_folder(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
