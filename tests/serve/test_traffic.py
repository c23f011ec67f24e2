"""The log line: what happened in the last seconds, and silence when nothing did."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from semipd.serve.gate import Limits
from semipd.serve.generation import RequestMaker
from semipd.serve.model_folder import read_model_folder
from semipd.serve.params import SamplingParams
from semipd.serve.service import Service
from semipd.serve.session import Session
from semipd.serve.thread_link import EngineThread, ThreadLink
from semipd.serve.tokenizer import Tokenizer
from semipd.serve.traffic import log_traffic
from tests.serve.fakes import LiveFake, make_engine, make_folder


def test_a_line_only_while_there_is_traffic(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "semipd")
    model = read_model_folder(make_folder(tmp_path))
    thread = EngineThread(lambda observers: make_engine(LiveFake(), observers))

    async def main() -> None:
        session = Session(ThreadLink(thread))
        await session.open()
        maker = RequestMaker(model)
        service = Service(("tiny",), model, Tokenizer(tmp_path), None, maker, session, Limits())
        logging_traffic = asyncio.create_task(log_traffic(service, every=0.05))
        await asyncio.sleep(0.2)
        assert not caplog.messages
        logging_traffic.cancel()
        plan = maker.plan([[5] * 40, [5] * 40], SamplingParams(max_tokens=20), await session.info())
        for submit in plan.submits:  # one after the other, so that the second finds the first's prefix
            with session.submit([submit]) as stream:
                async for _ in stream:
                    pass
        logging_traffic = asyncio.create_task(log_traffic(service, every=0.05))
        async with asyncio.timeout(20):
            while not caplog.messages:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        logging_traffic.cancel()
        service.close()
        await session.close()

    asyncio.run(main())
    thread.close()
    (line,) = caplog.messages
    assert all(
        word in line for word in ("prompt", "generation", "running 0", "waiting 0", "KV 0%", "split ")
    )
    assert "tok/s" in line and "prefix hits" in line and "prefix hits 0%" not in line
