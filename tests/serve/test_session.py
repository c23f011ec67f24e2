"""The bridge between a loop and an engine: over a thread and over a process, with the same behaviour."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from semipd.config import Config, ModelConfig
from semipd.core.errors import ConfigError, EngineDead, Refused
from semipd.core.ports import ExecutorLost
from semipd.core.types import NO_TOKEN, FinishReason, Sampling, StepResult
from semipd.serve import session as session_module
from semipd.serve.launch import EngineProcess
from semipd.serve.messages import LaneState, Stats, Submit
from semipd.serve.process_link import ProcessLink
from semipd.serve.session import Piece, RequestFailed, Session
from semipd.serve.thread_link import EngineThread, ThreadLink
from tests.execute.fake import reference
from tests.serve.fakes import SPECIAL, LiveFake, make_engine


def submit(prompt: list[int], count: int, seed: int = 0, **changes: Any) -> Submit:
    values: dict[str, Any] = {
        "id": "", "prompt": array("i", prompt).tobytes(), "max_tokens": count,
        "sampling": Sampling(seed=seed), "stop_tokens": (), "min_tokens": 0, "keys": b"",
        "salt": None, "age": 0.0,
    }  # fmt: skip
    return Submit(**{**values, **changes})


def expected(prompt: list[int], count: int, seed: int = 0) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(reference(tokens, seed) % (400 - len(SPECIAL)) + len(SPECIAL))
    return tokens[len(prompt) :]


@asynccontextmanager
async def in_thread(executor: LiveFake) -> AsyncIterator[Session]:
    thread = EngineThread(lambda observers: make_engine(executor, observers))
    session = Session(ThreadLink(thread))
    await session.open()
    try:
        yield session
    finally:
        await session.close()
        thread.close()


@asynccontextmanager
async def in_process(pace: int = 0, config: Config = Config()) -> AsyncIterator[Session]:
    os.environ["FAKE_PACE"] = str(pace)
    session = Session(ProcessLink(config, EngineProcess(module="tests.serve.fake_process")))
    await session.open()
    try:
        yield session
    finally:
        await session.close()


async def collect(session: Session, *requests: Submit) -> list[Piece]:
    """Everything, one piece per request."""
    whole = [Piece(index, []) for index in range(len(requests))]
    with session.submit(requests) as stream:
        async for pieces in stream:
            for piece in pieces:
                whole[piece.index].tokens += piece.tokens
                whole[piece.index].finish = piece.finish
    return whole


async def serves(session: Session) -> None:
    info = await session.info()
    assert (info.limit, info.block_size, info.unit_kind) == (256, 4, "core")
    requests = [submit([5 + i, 6, 7], 10 + i, seed=i) for i in range(5)]
    groups = await asyncio.gather(collect(session, *requests[:3]), collect(session, *requests[3:]))
    for index, piece in enumerate(piece for group in groups for piece in group):
        assert piece.tokens == expected([5 + index, 6, 7], 10 + index, index)
        assert piece.finish is FinishReason.LENGTH
    stats = await session.stats()
    assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0.0)
    assert stats.metrics.generation_tokens == sum(range(10, 15))
    assert await session.health() is None
    with pytest.raises(Refused) as caught:
        await collect(session, submit([5], 10_000))
    assert caught.value.param == "max_tokens"
    assert len((await collect(session, submit([5], 3)))[0].tokens) == 3


def test_a_thread_serves() -> None:
    async def main() -> None:
        async with in_thread(LiveFake()) as session:
            await serves(session)

    asyncio.run(main())


def test_a_process_serves() -> None:
    async def main() -> None:
        async with in_process() as session:
            await serves(session)

    asyncio.run(main())


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.01)


def test_a_consumer_that_leaves_aborts_what_runs() -> None:
    async def main() -> None:
        async with in_thread(LiveFake(pace=0.01)) as session:
            with session.submit([submit([5], 200), submit([6], 200)]) as stream:
                await anext(stream)

            async def idle() -> bool:
                stats = await session.stats()
                return stats.running == 0 and stats.metrics.finished["abort"] == 2

            await until(idle)
            assert not session._streams

    asyncio.run(main())


def test_an_abort_does_not_overtake_its_request() -> None:
    """Both wait for the planner's next turn; handled in the wrong order, the request would run for ever."""

    async def main() -> None:
        async with in_thread(LiveFake(pace=0.01)) as session:
            for _ in range(50):
                with session.submit([submit([5], 250)]):
                    pass

            async def idle() -> bool:
                return (await session.stats()).metrics.finished["abort"] == 50

            await until(idle)

    asyncio.run(main())


def test_a_stopped_sequence_is_a_success_and_the_others_go_on() -> None:
    async def main() -> None:
        async with in_thread(LiveFake(pace=0.005)) as session:
            produced = [0, 0]
            with session.submit([submit([5], 100), submit([6], 20)]) as stream:
                async for pieces in stream:
                    for piece in pieces:
                        produced[piece.index] += len(piece.tokens)
                    if 0 in stream.running:
                        stream.stop(0)
            assert produced[0] < 20 and produced[1] == 20
            finished = (await session.stats()).metrics.finished
            assert (finished["stop"], finished["length"], finished["abort"]) == (1, 1, 0)

    asyncio.run(main())


def test_a_failed_batch_and_a_lost_engine_are_told_apart() -> None:
    async def main() -> None:
        executor = LiveFake(pace=0.005)
        async with in_thread(executor) as session:
            executor.fail_next = True
            with pytest.raises(RequestFailed, match="made to fail"):
                await collect(session, submit([5], 5))
            pending = asyncio.gather(
                *(collect(session, submit([i + 5], 200)) for i in range(3)), return_exceptions=True
            )
            await asyncio.sleep(0.05)
            executor.kill_all("gone")
            outcomes = await asyncio.wait_for(pending, 60.0)
            assert all(isinstance(outcome, EngineDead) for outcome in outcomes)
            with pytest.raises(EngineDead, match="gone"):
                session.submit([submit([5], 5)])
            with pytest.raises(EngineDead):
                await session.stats()
            assert await session.health() == "gone"

    asyncio.run(main())


def test_a_request_that_rules_out_every_token_is_the_clients_mistake() -> None:
    """An error of the server's own, it woke its operators."""

    async def main() -> None:
        async with in_thread(LiveFake(script=[7, NO_TOKEN])) as session:
            with pytest.raises(Refused, match="no token can follow"):
                await collect(session, submit([5], 5))

    asyncio.run(main())


def test_a_killed_process_fails_everything_at_once(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with in_process(pace=20) as session:
            await session.info()
            pending = asyncio.create_task(collect(session, submit([5], 200)))
            await asyncio.sleep(0.1)
            os.kill(session._link.pid, signal.SIGKILL)  # type: ignore[attr-defined]
            with pytest.raises(EngineDead, match="signal 9"):
                await asyncio.wait_for(pending, 60.0)

    asyncio.run(main())
    assert [record.message for record in caplog.records] == [
        "the engine is lost: the engine process ended with signal 9"
    ]


def test_an_engine_that_cannot_be_built() -> None:
    def refuse(observers: object) -> Any:
        raise ConfigError("no such thing")

    def fail(observers: object) -> Any:
        raise OSError("no memory")

    with pytest.raises(ConfigError, match="no such thing"):
        EngineThread(refuse)

    def lose(observers: object) -> Any:
        raise ExecutorLost("the resident died")

    with pytest.raises(EngineDead, match="no memory"):
        EngineThread(fail)
    with pytest.raises(EngineDead, match=r"^the resident died$"):
        EngineThread(lose)

    async def main() -> None:
        async with in_process(config=Config(ModelConfig(max_model_len=7))) as session:
            with pytest.raises(EngineDead, match="seven"):
                await session.info()
            assert session.lost is not None and session.lost.refused

    asyncio.run(main())


def test_health_is_progress_not_presence(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        executor = LiveFake()
        async with in_thread(executor) as session:
            stats = await session.stats()

            def with_lane(waited: float, longest: float) -> str | None:
                lanes = {"prefill": LaneState(0, 0.0, 1.0), "decode": LaneState(1, waited, longest)}
                return session_module._stalled(Stats(1, 0, 0.0, 0, 0, lanes, stats.metrics))

            assert with_lane(59.0, 1.0) is None
            assert "decode" in (with_lane(61.0, 1.0) or "")
            assert with_lane(61.0, 30.0) is None, "steps of 30 s are known here"
            assert with_lane(61.0, 0.0) is None, "the first step may take long"
            # A planner that hangs in a step: nothing answers, and health must not hang with it.
            monkeypatch.setattr(session_module, "ANSWER_SECONDS", 3.0)
            goes_on = threading.Event()
            wait = executor.wait

            def hang(until: float | None) -> list[StepResult]:
                goes_on.wait(60.0)
                return wait(until)

            monkeypatch.setattr(executor, "wait", hang)
            with session.submit([submit([5], 2)]):
                try:
                    await asyncio.sleep(0.6)  # or the health of just now would still do
                    assert await session.health() is None, "a second without an answer is no proof"
                    for _ in range(30):
                        if (why := await session.health()) is not None:
                            break
                    assert why is not None and "not answered" in why
                finally:
                    goes_on.set()

    asyncio.run(main())


def test_two_loops_share_a_thread() -> None:
    thread = EngineThread(lambda observers: make_engine(LiveFake(), observers))

    async def main() -> list[Piece]:
        session = Session(ThreadLink(thread))
        await session.open()
        try:
            return await collect(session, submit([5], 5))
        finally:
            await session.close()

    async def leaves_without_closing() -> None:
        session = Session(ThreadLink(thread))
        await session.open()
        with session.submit([submit([5], 100)]) as stream:
            await anext(stream)

    try:
        asyncio.run(leaves_without_closing())
        assert asyncio.run(main())[0].tokens == asyncio.run(main())[0].tokens == expected([5], 5)
        assert len(thread.planner._listeners) <= 1, "closed loops are still listening"
    finally:
        thread.close()
