"""One served model: bodies in, plans and token lists out. Tokenising and templating run off the loop."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from semipd.core.errors import EngineDead, Refused
from semipd.serve.chat import ChatTemplate
from semipd.serve.constraint import Lark, schema_of
from semipd.serve.conversation import ChatMessage, messages_of, texts_of, tools_of, without_developer
from semipd.serve.errors import ApiError
from semipd.serve.gate import Gate, Limits
from semipd.serve.generation import Plan, RequestMaker
from semipd.serve.grammar_check import Unchecked, WaitingRoom
from semipd.serve.messages import EngineInfo
from semipd.serve.model_folder import ModelFolder
from semipd.serve.params import MAX_TOKEN_ID, SamplingParams
from semipd.serve.reasoning import Reasoning, ReasoningRule
from semipd.serve.responses_input import Translation
from semipd.serve.responses_schema import ResponsesBody
from semipd.serve.schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
    biases_of,
    logprobs_of,
    prompts_of,
)
from semipd.serve.session import Session
from semipd.serve.structured import Structure
from semipd.serve.text import Echo
from semipd.serve.tokenizer import Tokenizer
from semipd.serve.tool_use import Tools, ToolUse

MAX_SALT = 256
MAX_TEXT = 2**21  # characters for /tokenize
MAX_USER = 1024
DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as in OpenAI's API
REQUEST_ID = re.compile(r"[!-~]{1,128}")
TOKENIZER_THREADS = 2
MAX_PROMPT_NUMBERS = 2**20  # log probabilities of one answer: they come at once
MAX_NUMBERS = 2**22  # of produced tokens: they come one by one

Result = TypeVar("Result")
Planned = Plan | Callable[[], Plan]


class Service:
    """Everything that the routes need. names: of the model in the API; any of them will do."""

    def __init__(
        self,
        names: Sequence[str],
        model: ModelFolder,
        tokenizer: Tokenizer,
        chat: ChatTemplate | None,
        maker: RequestMaker,
        session: Session,
        limits: Limits,
        tool_call_parser: str = "auto",
        reasoning_parser: str = "auto",
        skip_hosted_tools: bool = False,
    ) -> None:
        """skip_hosted_tools: leave out tools of /v1/responses that are no functions."""
        self.names = tuple(names)
        self.model = model
        self.tokenizer = tokenizer
        self.session = session
        self.gate = Gate(limits)
        self._chat = chat
        self._tool_use = ToolUse(chat, tokenizer, tool_call_parser)
        self._reasoning = Reasoning(chat, tokenizer, reasoning_parser)
        self._skip_hosted_tools = skip_hosted_tools
        self._maker = maker
        self._pool = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenizer")
        self._side = ThreadPoolExecutor(1, thread_name_prefix="tokenize")  # of its routes: no request waits
        self._grammars = WaitingRoom()

    @property
    def name(self) -> str:
        """The first name, by which the model goes where nobody asked for another."""
        return self.names[0]

    def close(self) -> None:
        for pool in (self._pool, self._side):
            pool.shutdown(wait=False, cancel_futures=True)
        self._grammars.close()
        self._maker.close()

    def engine(self) -> EngineInfo:
        """The engine's description. Raises EngineDead, or ApiError (503) while it is loading."""
        if self.session.lost is not None:
            raise EngineDead(self.session.lost.why)
        if not self.session.ready:
            raise ApiError(503, "the model is still loading", "server_error", "loading")
        return self.session.loaded()

    def check_model(self, name: str | None) -> None:
        """Raise ApiError (404) for a model that is not served here."""
        if name is not None and name not in self.names:
            known = ", ".join(map(repr, self.names))
            message = f"the model {name[:200]!r} does not exist; this server has {known}"
            raise ApiError(404, message, "invalid_request_error", "model_not_found", "model")

    async def plan_completion(self, body: CompletionBody, arrived: float) -> Plan:
        alone = bool(body.echo) and body.max_tokens == 0
        engine, salt = self.engine(), _salt(body)

        def work() -> Planned:
            structure = Structure(body)
            params = params_of(body, structure, 1 if alone else body.max_tokens, DEFAULT_MAX_TOKENS)
            prompts = prompts_of(body)
            whole = body.truncate_prompt_tokens is None
            ids = [self._ids(prompt, engine.limit, body) for prompt in prompts]

            def planned(wait: bool) -> Plan:
                with structure.own_words():
                    plan = self._maker.plan(ids, params, engine, salt, arrived, structure.grammar, wait)
                echoes = self._echoes(prompts, ids, params.n, alone, whole) if body.echo else []
                return replace(_bounded(plan), echoes=echoes, told=True)

            return _now_or_later(planned)

        return await self._planned(work)

    async def plan_chat(self, body: ChatBody, arrived: float) -> Plan:
        """Refusals name the parameters of the chat API."""
        chat = self._template()
        names = {"prompt": "messages"}
        asked = body.max_tokens
        if body.max_completion_tokens is not None:
            if asked not in (None, body.max_completion_tokens):
                raise Refused("max_tokens and max_completion_tokens disagree", "max_completion_tokens")
            asked = body.max_completion_tokens
            names["max_tokens"] = "max_completion_tokens"
        engine, salt = self.engine(), _salt(body)

        def work() -> Planned:
            structure = Structure(body)
            tools = self._tool_use.of(body, structure)
            cut = body.truncate_prompt_tokens is not None
            messages = self._messages(body.messages, tools.told, None if cut else engine.limit)
            params = params_of(body, structure, asked, None)
            ids = _last(_rendered(chat, messages, tools.told, body), body, asked, engine.limit)
            repeated = bool(body.echo) and messages[-1]["role"] == "assistant"
            said = messages[-1]["content"] if body.continue_final_message else None
            rule = self._reasoning.of(ids, said, repeated)
            echoes = [Echo(messages[-1]["content"], ())] * params.n if repeated else []

            def planned(wait: bool) -> Plan:
                with structure.own_words():
                    rest, grammar = self._followed(params, structure, tools, rule, wait)
                    plan = self._maker.plan([ids], rest, engine, salt, arrived, grammar, wait)
                return replace(_bounded(plan), told=True, calls=tools.calls, echoes=echoes, reasoning=rule)

            return _now_or_later(planned)

        try:
            return await self._planned(work)
        except Refused as refused:
            param = refused.param or ""
            raise Refused(
                str(refused).replace("max_tokens", names.get("max_tokens", "max_tokens")),
                names.get(param, refused.param),
            ) from None

    def _followed(
        self,
        params: SamplingParams,
        structure: Structure,
        tools: Tools,
        rule: ReasoningRule | None,
        wait: bool,
    ) -> tuple[SamplingParams, Lark | None]:
        """The parameters without what is said by the grammar beside them, if there is one."""
        grammar = tools.grammar
        if rule is not None:
            if structure.grammar is not None:
                self._maker.check(params, structure.grammar, wait)
            grammar = self._reasoning.before(rule, tools, schema_of(params.response_format))
        return (params if grammar is None else replace(params, response_format=None)), grammar

    async def plan_responses(self, body: ResponsesBody, arrived: float) -> Plan:
        """As of a chat. Refusals name the parameters of the responses API."""
        translation = await self._off_loop(lambda: Translation(body, self._skip_hosted_tools))
        try:
            return await self.plan_chat(translation.chat, arrived)
        except Refused as refused:
            raise translation.refusal(refused) from None

    async def tokenize(self, body: TokenizeBody) -> dict[str, Any]:
        """The answer: ids of a prompt or of messages, as the model would get them."""
        limit = self.engine().limit
        if (body.prompt is None) == (body.messages is None):
            raise Refused("give either prompt or messages", "prompt")
        chat = self._template() if body.prompt is None else None

        def work() -> dict[str, Any]:
            if chat is not None:
                tools = tools_of(body.tools)
                if tools:
                    self._tool_use.check()
                messages = self._messages(body.messages or (), tools, limit)
                ids = chat.encode(messages, body.add_generation_prompt, tools)
            else:
                ids = self._encode_any(body.prompt or "", body.add_special_tokens)
            answer = {"count": len(ids), "max_model_len": limit, "tokens": ids}
            if body.return_token_strs:
                answer["token_strs"] = [self.tokenizer.token_string(index) for index in ids]
            return answer

        return await self._off_loop(work, self._side)

    async def detokenize(self, body: DetokenizeBody) -> str:
        tokens = body.tokens
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.model.vocabulary:
            raise Refused(f"token ids run from 0 to {self.model.vocabulary - 1}", "tokens")
        return await self._off_loop(lambda: self.tokenizer.decode(tokens), self._side)

    def _ids(self, prompt: str | list[int], limit: int, body: CompletionBody) -> list[int]:
        if isinstance(prompt, list):
            ids = prompt
        elif body.truncate_prompt_tokens is not None:
            ids = self._encode_any(prompt)
        else:
            self.tokenizer.check_size(prompt, limit, "prompt")
            ids = self.tokenizer.encode(prompt)
        return _last(ids, body, DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens, limit)

    def _echoes(
        self,
        prompts: Sequence[str | list[int]],
        ids: Sequence[list[int]],
        choices: int,
        alone: bool,
        whole: bool,
    ) -> list[Echo]:
        """Each prompt, as often as it has choices. whole: as it was given, for nothing was cut off."""
        echoes = [
            Echo(
                prompt if isinstance(prompt, str) and whole else self.tokenizer.decode(tokens),
                tokens,
                alone,
            )
            for prompt, tokens in zip(prompts, ids, strict=True)
        ]
        return [echo for echo in echoes for _ in range(choices)]

    def _template(self) -> ChatTemplate:
        if self._chat is None:
            raise Refused("this model has no chat template; use /v1/completions", "messages")
        return self._chat

    def _messages(
        self, messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]], limit: int | None
    ) -> list[dict[str, Any]]:
        """As a template takes them, unless their texts and those of the tools cannot fit together."""
        plain = messages_of(messages)
        texts = "".join(message["content"] + message.get("reasoning_content", "") for message in plain)
        texts += "".join(
            texts_of([message.get("tool_calls", ()) for message in plain]) + texts_of(list(tools))
        )
        if limit is not None:
            self.tokenizer.check_size(texts, limit, "messages")
        elif len(texts) > MAX_TEXT:
            raise Refused(f"messages of {len(texts)} characters; at most {MAX_TEXT}", "messages")
        return plain if self._template().mentions("developer") else without_developer(plain)

    def _encode_any(self, text: str, add_special: bool = True) -> list[int]:
        """Of any text, also one that is too long for the model."""
        if len(text) > MAX_TEXT:
            raise Refused(f"a text of {len(text)} characters; at most {MAX_TEXT} are tokenised", "prompt")
        return self.tokenizer.encode(text, add_special)

    async def _planned(self, work: Callable[[], Planned]) -> Plan:
        plan = await self._off_loop(work)
        return plan if isinstance(plan, Plan) else await self._grammars.run(plan)

    async def _off_loop(self, work: Callable[[], Result], pool: ThreadPoolExecutor | None = None) -> Result:
        return await asyncio.get_running_loop().run_in_executor(pool or self._pool, work)


def _now_or_later(planned: Callable[[bool], Plan]) -> Planned:
    """The plan, or where it has to wait for a grammar what makes it then. planned: told whether to wait."""
    try:
        return planned(False)
    except Unchecked:
        return lambda: planned(True)


def params_of(
    body: GenerationBody, structure: Structure, max_tokens: int | None, default: int | None
) -> SamplingParams:
    """The body's parameters, complete with the API's defaults. Raises Refused."""
    if body.user is not None and len(body.user) > MAX_USER:
        raise Refused(f"user is longer than {MAX_USER} characters", "user")
    if body.stream_options is not None and not body.stream:
        raise Refused("stream_options need stream: true", "stream_options")
    if body.request_id is not None and not REQUEST_ID.fullmatch(body.request_id):
        raise Refused("request_id must have 1 to 128 characters, of ASCII without blanks", "request_id")
    if body.best_of not in (None, body.n or 1):
        raise Refused("best_of must be n: every continuation is part of the answer", "best_of")
    logprobs, of_prompt = logprobs_of(body), body.prompt_logprobs
    if isinstance(body, CompletionBody) and body.echo and logprobs is not None:
        of_prompt = max(logprobs, of_prompt or 0)
    return SamplingParams(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        seed=body.seed,
        stop=() if body.stop is None else body.stop,
        stop_token_ids=() if body.stop_token_ids is None else body.stop_token_ids,
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        max_tokens=default if max_tokens is None else max_tokens,
        n=1 if body.n is None else body.n,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty,
        logit_bias=biases_of(body),
        logprobs=logprobs,
        prompt_logprobs=of_prompt,
        response_format=structure.response_format,
        allowed_token_ids=body.allowed_token_ids,
        bad_words=body.bad_words or (),
        service_tier=body.service_tier,
        priority=body.priority,
    )


def _rendered(
    chat: ChatTemplate, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]], body: ChatBody
) -> list[int]:
    """The conversation as the body wants it rendered. Raises Refused."""
    open_end = bool(body.continue_final_message)
    prompted = not open_end if body.add_generation_prompt is None else body.add_generation_prompt
    if open_end and prompted:
        message = "continue_final_message needs add_generation_prompt: false"
        raise Refused(message, "continue_final_message")
    if open_end and messages[-1].get("tool_calls"):
        message = "the last message has calls of tools and cannot go on"
        raise Refused(message, "continue_final_message")
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        if not chat.looks_at("reasoning_effort"):
            message = "reasoning_effort: this model's chat template has no such variable"
            raise Refused(message, "reasoning_effort")
        variables["reasoning_effort"] = body.reasoning_effort
    return chat.encode(messages, prompted, tools, variables, open_end)


def _last(ids: list[int], body: GenerationBody, max_tokens: int | None, limit: int) -> list[int]:
    """As many of a prompt's last tokens as the body wants. limit: most tokens of prompt and output."""
    most = body.truncate_prompt_tokens
    if most is None:
        return ids
    if most == -1:
        most = max(limit - (max_tokens or 1), 1)
    if not 1 <= most <= MAX_TOKEN_ID:
        raise Refused(
            f"truncate_prompt_tokens must be -1, or 1 to {MAX_TOKEN_ID}", "truncate_prompt_tokens"
        )
    return ids[-most:]


def _bounded(plan: Plan) -> Plan:
    """The plan, unless it asks for more numbers than one answer may hold."""
    rules = [(submit, submit.sampling) for submit in plan.submits]
    of_prompts = sum(
        s.prompt_tokens * (r.prompt_logprobs + 1) for s, r in rules if r.prompt_logprobs is not None
    )
    if of_prompts > MAX_PROMPT_NUMBERS:
        message = f"{of_prompts} log probabilities of prompts in one answer; at most {MAX_PROMPT_NUMBERS}"
        raise Refused(message, "prompt_logprobs")
    numbers = sum(s.max_tokens * (r.logprobs + 1) for s, r in rules if r.logprobs is not None)
    if numbers > MAX_NUMBERS:
        message = f"max_tokens allow {numbers} log probabilities in one answer; at most {MAX_NUMBERS}"
        raise Refused(message, "logprobs")
    return plan


def _salt(body: GenerationBody) -> str | None:
    if body.cache_salt is not None and not 1 <= len(body.cache_salt) <= MAX_SALT:
        raise Refused(f"cache_salt must have 1 to {MAX_SALT} characters", "cache_salt")
    return body.cache_salt
