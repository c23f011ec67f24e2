"""Offline use: an engine in a thread of the caller, and its answers as plain objects."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Integral
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from semipd.build import Resolved, build_engine, resolve, targets_of
from semipd.config import Config, PolicyConfig, ServerConfig, from_mapping
from semipd.core.engine import Engine
from semipd.core.errors import ConfigError, EngineDead, Refused
from semipd.core.ports import Observer
from semipd.core.types import Score
from semipd.serve.chat import load_chat_template
from semipd.serve.conversation import ChatMessage, messages_of
from semipd.serve.generation import Plan, RequestMaker, generate
from semipd.serve.messages import Stats
from semipd.serve.model_folder import ModelFolder, read_model_folder
from semipd.serve.params import SamplingParams
from semipd.serve.planner import Build
from semipd.serve.session import Session
from semipd.serve.text import Delta
from semipd.serve.thread_link import EngineThread, ThreadLink
from semipd.serve.tokenizer import Tokenizer

LONG_BATCH = 8  # prompts; from here on, a terminal is shown a progress bar
THROUGHPUT_CHUNK = 2048
# What says how to schedule; the rest of that section holds for every policy.
SCHEDULING = {entry.name for entry in dataclasses.fields(PolicyConfig)} - {
    *("max_num_seqs", "admission", "prompt_order")
}

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, Any]]
BuildOn = Callable[[Resolved, Sequence[Observer]], Engine]
Result = TypeVar("Result")


@dataclass
class CompletionOutput:
    """One continuation. finish_reason: "stop" or "length".

    logprobs: of each token, where `SamplingParams.logprobs` asks for them."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[Score] | None = None


@dataclass
class RequestOutput:
    """One prompt and its continuations, `n` of them. prompt: None when it came as token ids.

    prompt_logprobs: of each token of the prompt, None for the first, where asked for."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[Score | None] | None = None


class LLM:
    """A model, ready to generate. Use it in a `with` block, or `close` it.

        with LLM("path/to/model", max_model_len=4096) as llm:
            print(llm.generate("Once upon a time")[0].outputs[0].text)

    Settings are those of `semipd.config`, by name; an unknown one raises ConfigError, as does a model
    folder that cannot work. A folder without a tokenizer takes prompts as token ids, and texts are empty.
    On a CPU, where they say nothing of a policy, a split or a target, `for_throughput` chooses the policy.
    """

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        for name in settings:
            if name in {entry.name for entry in dataclasses.fields(ServerConfig)}:
                raise ConfigError(f"{name} is a setting of the server, not of LLM")
        self._open({**settings, "model": None if model is None else str(model)}, build_engine)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], build: BuildOn = build_engine) -> LLM:
        """The same, the model among the settings; build: makes the engine (`start.build_on` is another)."""
        llm = cls.__new__(cls)
        llm._open(settings, build)
        return llm

    @classmethod
    def from_builder(cls, config: Config, model: ModelFolder, build: Build) -> LLM:
        """The same, with an engine of another making."""
        llm = cls.__new__(cls)
        llm._start(config, model, build)
        return llm

    def _open(self, settings: Mapping[str, Any], build: BuildOn) -> None:
        resolved = resolve(from_mapping(settings))
        stated = {name.replace("-", "_") for name, value in settings.items() if value is not None}
        if not stated & SCHEDULING and resolved.device == "cpu":
            resolved = for_throughput(resolved)
        model = read_model_folder(resolved.folder, resolved.config.model.generation_config == "auto")
        self._start(resolved.config, model, lambda observers: build(resolved, observers))

    def _start(self, config: Config, model: ModelFolder, build: Build) -> None:
        self.tokenizer = Tokenizer(model.path) if (model.path / "tokenizer.json").is_file() else None
        self._template = load_chat_template(model.path, self.tokenizer) if self.tokenizer else None
        classes = config.policy.classes or ()
        self._maker = RequestMaker(
            model, config.model.seed, config.cache.prefix_cache, classes, self.tokenizer
        )
        self._sessions: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Session] = (
            weakref.WeakKeyDictionary()
        )
        self._thread: EngineThread | None = EngineThread(build, targets_of(config.policy))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt (text, or token ids); results come in the order of the prompts.

        params: for all prompts, or one for each. Raises Refused when any prompt can never be served,
        before anything runs; EngineDead when the engine is lost.
        """
        batch = _as_list(prompts)
        plan, ids = self._plan(batch, SamplingParams() if params is None else params)
        return _complete(self._run(plan, _empty_results(batch, ids, plan)))

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several, rendered by the model's chat template.

        messages: with `role` and `content`, as in the HTTP API. The answers are the text as it came, with
        calls of tools and reasoning in it. As `generate` otherwise."""
        if self._template is None:
            raise Refused("this model has no chat template; use generate", "messages")
        several = bool(messages) and not isinstance(messages[0], Mapping)
        prompts = [
            self._template.encode(_messages(one), add_generation_prompt, variables=chat_template_kwargs)
            for one in (messages if several else [messages])
        ]
        return self.generate(prompts, params)

    def stats(self) -> Stats:
        """The engine's state and its metrics since the start."""
        return _complete(self._stats())

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncIterator[Delta]:
        """Continue one prompt; yields what each choice gains as it comes."""
        plan, _ = self._plan([prompt], params or SamplingParams())
        session = await self._session()
        async with contextlib.aclosing(generate(session, plan, self.tokenizer)) as groups:
            async for deltas in groups:
                for delta in deltas:
                    yield delta

    def close(self) -> None:
        """End the engine and its processes. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.close()
            self._maker.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _run(self, plan: Plan, results: list[RequestOutput]) -> list[RequestOutput]:
        outputs = [output for result in results for output in result.outputs]
        owners = [result for result in results for _ in result.outputs]
        session = Session(ThreadLink(self._running()))
        await session.open()
        groups = generate(session, plan, self.tokenizer)
        try:
            with _progress(len(outputs)) as ended:
                async for deltas in groups:
                    for delta in deltas:
                        output = outputs[delta.index]
                        output.text += delta.text
                        output.token_ids += delta.tokens
                        output.finish_reason = delta.finish
                        if output.logprobs is not None:
                            output.logprobs += delta.scores
                        if delta.prompt_scores and output.index == 0:
                            owners[delta.index].prompt_logprobs = [None, *delta.prompt_scores]
                    ended(sum(delta.finish is not None for delta in deltas))
        finally:
            await groups.aclose()
            await session.close()
        return results

    async def _stats(self) -> Stats:
        session = Session(ThreadLink(self._running()))
        await session.open()
        try:
            return await session.stats()
        finally:
            await session.close()

    def _plan(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> tuple[Plan, list[list[int]]]:
        if not isinstance(params, SamplingParams) and len(params) != len(prompts):
            raise Refused(f"{len(params)} params for {len(prompts)} prompts", "params")
        info = self._running().info
        assert info is not None
        ids = [self._encode(prompt) for prompt in prompts]
        return self._maker.plan(ids, params, info), ids

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise Refused("the model folder has no tokenizer.json; give prompts as token ids", "prompt")
        if not prompt:
            raise Refused("the prompt is empty", "prompt")
        return self.tokenizer.encode(prompt)

    async def _session(self) -> Session:
        """The session of the running loop."""
        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None:
            session = self._sessions[loop] = Session(ThreadLink(self._running()))
            await session.open()
        return session

    def _running(self) -> EngineThread:
        if self._thread is None:
            raise EngineDead("this LLM was closed")
        return self._thread


def for_throughput(resolved: Resolved) -> Resolved:
    """With the policy that brings most tokens where nobody waits for single ones: whole prompts and every
    decode in one batch. On two cores 16 mixed requests took 0.8 of the time that they took with one core
    for each phase; 64 took the same."""
    policy = dataclasses.replace(resolved.config.policy, policy="chunked", chunk_tokens=THROUGHPUT_CHUNK)
    return dataclasses.replace(resolved, config=dataclasses.replace(resolved.config, policy=policy))


def _complete(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end, from anywhere."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    # Inside somebody's event loop (a notebook), which cannot be entered twice.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A batch of prompts; one prompt, text or ids, is a batch of one."""
    if isinstance(prompts, str):
        return [prompts]
    batch: list[Any] = list(prompts)
    if batch and all(_is_token(item) for item in batch):
        return [batch]
    for prompt in batch:
        if not isinstance(prompt, str) and not (_is_sequence(prompt) and all(map(_is_token, prompt))):
            raise Refused("a prompt is text or a list of token ids", "prompt")
    return batch


def _messages(conversation: Any) -> list[dict[str, Any]]:
    """As a chat template takes them. Raises Refused."""
    try:
        return messages_of(msgspec.convert(conversation, list[ChatMessage]))
    except msgspec.ValidationError as error:
        raise Refused(f"messages: {error}", "messages") from None


def _is_token(item: object) -> bool:
    return isinstance(item, Integral) and not isinstance(item, bool)


def _is_sequence(item: object) -> bool:
    return hasattr(item, "__len__") and hasattr(item, "__getitem__")


def _empty_results(prompts: Sequence[Prompt], ids: Sequence[list[int]], plan: Plan) -> list[RequestOutput]:
    results = []
    first = 0
    for prompt, tokens in zip(prompts, ids, strict=True):
        choices, asked = plan.params[first].n, plan.params[first].logprobs is not None
        outputs = [CompletionOutput(index, logprobs=[] if asked else None) for index in range(choices)]
        results.append(RequestOutput(prompt if isinstance(prompt, str) else None, tokens, outputs))
        first += choices
    return results


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], object]]:
    """A bar on the terminal for a long batch; gives a function that counts what has ended."""
    if total < LONG_BATCH or not sys.stderr.isatty():
        yield lambda count: None
        return
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("generating", total=total)
        yield lambda count: progress.advance(task, count)
