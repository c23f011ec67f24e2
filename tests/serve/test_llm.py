"""LLM over the fake engine: shapes of prompts, order of results, streaming, and its end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from semipd.build import Resolved
from semipd.config import Config
from semipd.core.engine import Engine
from semipd.core.errors import ConfigError, EngineDead, Refused
from semipd.core.ports import Observer
from semipd.llm import LLM
from semipd.serve.model_folder import read_model_folder
from semipd.serve.params import SamplingParams
from tests.serve.fakes import LiveFake, make_engine, make_folder, make_tokenizer


def over(folder: Path, executor: LiveFake) -> LLM:
    return LLM.from_builder(
        Config(), read_model_folder(folder), lambda observers: make_engine(executor, observers)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with over(folder, LiveFake()) as llm:
        yield llm


def test_prompts_in_all_forms(llm: LLM) -> None:
    ids = make_tokenizer().encode("hello world").ids
    params = SamplingParams(seed=1, max_tokens=9)
    (text,) = llm.generate("hello world", params)
    (single,) = llm.generate(ids, params)
    several = llm.generate(["hello world", "hello", "world"], params)
    mixed = llm.generate([ids, [7, 8]], params)
    assert text.prompt == "hello world" and single.prompt is None
    assert text.prompt_token_ids == single.prompt_token_ids == ids
    outputs = [result.outputs[0] for result in (text, single, several[0], mixed[0])]
    assert len({(output.text, tuple(output.token_ids)) for output in outputs}) == 1
    assert outputs[0].finish_reason == "length" and len(outputs[0].token_ids) == 9
    assert outputs[0].text == llm.tokenizer.decode(outputs[0].token_ids)  # type: ignore[union-attr]
    assert llm.generate([]) == []


def test_conversations(llm: LLM) -> None:
    """Rendered by the template, whose special tokens count, as over HTTP."""
    user = {"role": "user", "content": "hello <|end|>"}
    parts = {"role": "user", "content": [{"type": "text", "text": "hello <|end|>"}]}
    params = SamplingParams(seed=1, max_tokens=5)
    (one,) = llm.chat([user], params)
    several = llm.chat([[user], [parts], [user, {"role": "assistant", "content": "x"}, user]], params)
    assert [result.prompt_token_ids for result in several[:2]] == [one.prompt_token_ids] * 2
    assert several[0].outputs[0].text == one.outputs[0].text and one.prompt is None
    raw = make_tokenizer().decode(one.prompt_token_ids, skip_special_tokens=False)
    assert "<|user|>" in raw and raw.endswith("<|assistant|>")
    assert one.prompt_token_ids.count(make_tokenizer().token_to_id("<|end|>")) == 1
    assert len(several[2].prompt_token_ids) > len(one.prompt_token_ids)
    for bad in ([{"role": "nobody", "content": "x"}], [{"role": "user"}], [{"content": 5}], [5], [[]], []):
        with pytest.raises(Refused):
            llm.chat(bad, params)  # type: ignore[arg-type]


def test_results_keep_the_order_of_prompts_and_choices(llm: LLM) -> None:
    prompts = [[10 + i] * (i % 5 + 1) for i in range(40)]
    results = llm.generate(prompts, SamplingParams(seed=4, max_tokens=7, n=2))
    assert [result.prompt_token_ids for result in results] == prompts
    assert all([output.index for output in result.outputs] == [0, 1] for result in results)
    for place in (0, 17, 39):
        (alone,) = llm.generate(prompts[place], SamplingParams(seed=4, max_tokens=7))
        assert alone.outputs[0].token_ids == results[place].outputs[0].token_ids


def test_params_for_each_prompt(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=count) for count in (3, 5)]
    results = llm.generate(["hello", "world"], params)
    assert [len(result.outputs[0].token_ids) for result in results] == [3, 5]
    with pytest.raises(Refused, match="1 params for 2 prompts"):
        llm.generate(["hello", "world"], params[:1])


def test_streaming_gives_the_same(llm: LLM) -> None:
    params = SamplingParams(seed=2, max_tokens=30)
    (whole,) = llm.generate("hello", params)

    async def main() -> tuple[str, list[int], str | None]:
        text, tokens, finish = "", list[int](), None
        async for delta in llm.stream("hello", params):
            text, tokens, finish = text + delta.text, tokens + delta.tokens, delta.finish
        return text, tokens, finish

    output = whole.outputs[0]
    assert asyncio.run(main()) == (output.text, output.token_ids, output.finish_reason)


def test_generate_works_inside_a_running_loop(llm: LLM) -> None:
    async def main() -> int:
        return len(llm.generate("hello", SamplingParams(max_tokens=3))[0].outputs[0].token_ids)

    assert asyncio.run(main()) == 3


def test_nothing_runs_when_one_prompt_is_refused(folder: Path) -> None:
    executor = LiveFake()
    with over(folder, executor) as llm:
        for bad, param in (
            ([[5], []], "prompt"), ([[5], [400]], "prompt"), (["a", ""], "prompt"), ([True], "prompt"),
            ([1.5], "prompt"), ([["a"]], "prompt"), (["a\ud800"], "prompt"), ([[5] * 256], "prompt"),
        ):  # fmt: skip
            with pytest.raises(Refused) as caught:
                llm.generate(bad)  # type: ignore[arg-type]
            assert caught.value.param == param
        assert executor.clock.now() == 0.0, "a step ran"


def test_a_folder_without_a_tokenizer_takes_ids(tmp_path: Path) -> None:
    with over(make_folder(tmp_path, tokenizer=False), LiveFake()) as llm:
        output = llm.generate([5, 6], SamplingParams(max_tokens=4))[0].outputs[0]
        assert output.text == "" and len(output.token_ids) == 4
        with pytest.raises(Refused, match=r"tokenizer\.json"):
            llm.generate("hello")


def test_closing(folder: Path) -> None:
    llm = over(folder, LiveFake())
    llm.close()
    llm.close()
    with pytest.raises(EngineDead, match="closed"):
        llm.generate("hello")


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean max-num-seqs"):
        LLM("folder", max_num_seq=3)
    with pytest.raises(ConfigError, match="server"):
        LLM("folder", port=80)


def test_it_runs_for_throughput_where_no_schedule_is_asked_for(folder: Path) -> None:
    def policy_of(**settings: object) -> str:
        seen: list[str] = []

        def build(resolved: Resolved, observers: Sequence[Observer]) -> Engine:
            seen.append(resolved.config.policy.policy)
            return make_engine(LiveFake(), observers)

        LLM.from_settings({"model": str(folder), "device": "cpu", **settings}, build).close()
        return seen[0]

    assert policy_of(max_num_seqs=3, split=None) == "chunked"
    assert policy_of(**{"tpot-slo": "1s"}) == policy_of(split="shared") == policy_of(policy="semi-pd")
    assert policy_of(policy="prefill-first") == "prefill-first"


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, semipd; assert 'semipd.llm' not in sys.modules; semipd.SamplingParams(); "
        "from semipd import LLM; "
        "print([name for name in ('torch', 'transformers', 'fastapi') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
