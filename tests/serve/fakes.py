"""An engine without arithmetic that runs in real time, and model folders without weights."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from semipd.core.engine import Engine
from semipd.core.kv import BlockPool
from semipd.core.partition import Static
from semipd.core.policies import Limits, SemiPD
from semipd.core.ports import ExecutorLost, Observer
from semipd.core.types import Batch, Lane, Sampling, Score, Slice, StepResult
from tests.execute.fake import FakeExecutor, reference

BLOCK_SIZE = 4
MAX_LENGTH = 256
TEXTS = (
    "the quick brown fox jumps over the lazy dog",
    "hello world, how are you today?",
    "grüße aus köln 😀😃🎉 日本語のテキスト",
    "один два три 👩‍👩‍👧 naïve café",
)
SPECIAL = ("<|end|>", "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message.role }}|>{{ message.content | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": MAX_LENGTH,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 400,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}


def make_tokenizer(vocabulary: int = 400, bos: bool = False) -> Tokenizer:
    """Byte-level, so that most characters beyond ASCII are several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS] * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
        )
    return tokenizer


def make_folder(folder: Path, *, bos: bool = False, tokenizer: bool = True, **generation: Any) -> Path:
    """A model folder without weights. generation: fields of generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer:
        make_tokenizer(bos=bos).save(str(folder / "tokenizer.json"))
        settings = {
            "bos_token": "<|begin|>",
            "eos_token": {"content": "<|end|>"},
            "chat_template": TEMPLATE,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


class LiveFake(FakeExecutor):
    """FakeExecutor that waits for real. Its tokens lie below `vocabulary`.

    pace: seconds that each step takes. script: the output of every sequence, instead of hashes."""

    def __init__(
        self,
        pace: float = 0.0,
        vocabulary: int = 400,
        script: Sequence[int] = (),
        blocks: int = 512,
    ) -> None:
        super().__init__(blocks, BLOCK_SIZE)
        self.pace = pace
        self.script = script
        self._vocabulary = vocabulary
        self._bell = threading.Event()
        self._prompts: dict[int, int] = {}
        self._scores: dict[int, tuple[Score, ...]] = {}  # by step
        self.killed: str | None = None
        self.fail_next = False

    def open(self, slot: int, tokens: Sequence[int], sampling: Sampling) -> None:
        super().open(slot, tokens, sampling)
        self._prompts[slot] = len(tokens)

    def wait(self, until: float | None) -> list[StepResult]:
        if self.killed is not None:
            raise ExecutorLost(self.killed)
        if not self._running:
            self._bell.wait()
            self._bell.clear()
            self._woken = False
            return []
        if self.pace:
            time.sleep(self.pace)
        results = [
            replace(result, scores=self._scores.pop(result.step, ())) for result in super().wait(until)
        ]
        if results and self.fail_next:
            self.fail_next = False
            lost = results[0]
            results[0] = StepResult(lost.lane, lost.step, (), lost.started, lost.finished, "made to fail")
        return results

    def wake(self) -> None:
        super().wake()
        self._bell.set()

    def kill_all(self, why: str) -> None:
        """No later step can succeed."""
        self.killed = why
        self._bell.set()

    def _run(self, batch: Batch) -> tuple[int, ...]:
        super()._run(batch)
        produced = []
        scores: list[Score] = []
        for row, (slot, start, count, sample) in enumerate(batch.slices):
            if sample:
                end = start + count
                known = [self.tokens[slot][position] for position in range(end)]
                place = end - self._prompts[slot]
                banned = self.sampling[slot].ban_tokens if end < self.sampling[slot].ban_until else ()
                token = self.script[place] if place < len(self.script) else self._hash(known, slot)
                while token in banned:
                    token = (token + 1) % self._vocabulary
                self.tokens[slot][end] = token
                produced.append(token)
            scores += self._score(row, batch.slices[row])
        self._scores[batch.step] = tuple(scores)
        return tuple(produced)

    def _score(self, row: int, piece: Slice) -> Iterator[Score]:
        """Made-up scores of the tokens after these positions, where asked for."""
        slot, start, count, sample = piece
        rule, tokens = self.sampling[slot], self.tokens[slot]
        for position in range(start + 1, start + count + sample):
            produced = position == start + count and sample
            best = rule.logprobs if produced else rule.prompt_logprobs
            if best is not None and (produced or position < rule.prompt_length):
                yield Score(row, position, *made_up_score(tokens[position], best, self._vocabulary))

    def _hash(self, known: list[int], slot: int) -> int:
        """Any token but the special ones."""
        token = reference(known, self.sampling[slot].seed) % (self._vocabulary - len(SPECIAL))
        return token + len(SPECIAL)


def made_up_score(
    token: int, best: int, vocabulary: int
) -> tuple[float, tuple[int, ...], tuple[float, ...]]:
    """Every third token is not the likeliest."""
    first = token if token % 3 else token + 1
    ids = tuple((first + place) % vocabulary for place in range(best))
    numbers = tuple(-0.1 * (place + 1) - token / 1000 for place in range(best))
    return -0.1 * (1 if token % 3 else 2) - token / 1000, ids, numbers


def make_engine(
    executor: LiveFake, observers: Sequence[Observer] = (), *, sequences: int = 16, length: int = MAX_LENGTH
) -> Engine:
    pool = BlockPool(len(executor.cache), BLOCK_SIZE)
    policy = SemiPD(Limits(2), Static(1, 1, 2))
    return Engine(
        executor,
        policy,
        {Lane.PREFILL: pool, Lane.DECODE: pool},
        executor.clock,
        max_sequences=sequences,
        max_length=length,
        observers=observers,
    )


@contextmanager
def eventually(seconds: float = 60.0) -> Iterator[Any]:
    """Gives a function that waits until a condition holds, and fails after `seconds` in all."""
    deadline = time.monotonic() + seconds

    def wait_for(condition: Any) -> None:
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.01)

    yield wait_for
