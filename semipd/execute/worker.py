"""A worker: runs the batches of one lane, one after another, on that lane's cores."""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from semipd.execute.cores import Share
from semipd.execute.linux import keep_freed_memory
from semipd.execute.runner import Runner
from semipd.execute.shared import SharedMemory
from semipd.execute.wire import Channel, Done, Job, cut_scores
from semipd.model.dense import DenseModel
from semipd.model.grammar import GrammarTokenizer
from semipd.model.kernels import Kernels, tie_threads

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Storage:
    """What workers share and outlives them. folder: the model's. cores: system numbers of the device's
    units. grammar: for slots under one; None: each worker makes its own when it needs it. renewal: an
    eventfd, readable once workers could be forked that have it; -1: there will be none."""

    folder: str
    model: DenseModel
    shared: SharedMemory
    pool: torch.Tensor
    cores: tuple[int, ...]
    grammar: GrammarTokenizer | None = None
    renewal: int = -1


def work(lane: int, jobs: Channel[Job], storage: Storage) -> None:
    """Run jobs until the other end closes (EOFError), or until there are none and a new worker would know
    more. A failed job is answered with its error."""
    keep_freed_memory()
    shared = storage.shared
    tie = partial(_tie, storage.model.kernels)
    share = Share(shared.words, lane, storage.cores, shared.descriptor, torch.set_num_threads, tie)
    folder, grammar = storage.folder, storage.grammar
    runner = Runner(storage.model, shared.table, storage.pool, folder=folder, grammar=grammar)
    with torch.inference_mode():
        while True:
            job = jobs.poll()
            if job is None:
                share.give_back()
                if _outdated(jobs, storage):
                    return
                job = jobs.receive()
            share.take()
            shared.words.run(lane, job.step)
            for answer in _run(job, runner, share):
                jobs.send(answer)


def _tie(kernels: Kernels | None, cores: Sequence[int]) -> None:
    if kernels is not None:
        tie_threads(kernels, cores)


def _outdated(jobs: Channel[Job], storage: Storage) -> bool:
    """Wait for a job; whether, before one came, the resident had made what this worker lacks."""
    if storage.grammar is not None or storage.renewal < 0:
        return False
    events = select.poll()
    for descriptor in (jobs.fileno(), storage.renewal):
        events.register(descriptor, select.POLLIN)
    return all(descriptor != jobs.fileno() for descriptor, _ in events.poll())


def _run(job: Job, runner: Runner, share: Share) -> list[Done]:
    """What to answer; several messages where scores are many."""
    started = time.monotonic()
    try:
        tokens, scores = runner.run(job.slices, share.boundary)
    except (ValueError, FloatingPointError) as error:  # what the runner says of the batch itself
        return [Done(job.step, (), started, time.monotonic(), str(error))]
    except Exception as error:
        log.exception("step %d failed", job.step)
        return [Done(job.step, (), started, time.monotonic(), f"{type(error).__name__}: {error}")]
    finished = time.monotonic()
    if not scores:
        return [Done(job.step, tuple(tokens), started, finished)]
    *parts, last = cut_scores(scores)
    some = [Done(job.step, (), started, finished, None, part, more=True) for part in parts]
    return [*some, Done(job.step, tuple(tokens), started, finished, None, last)]
