"""What a long prompt does to running streams: every policy on this engine, one after another, in one run.

8 streams decode at about 512 tokens of context while 1,024-token prompts prefill back to back. For each
setting: the inter-token latency (ITL) of the streams, and the prompt tokens per second that got through.

    python benchmarks/interference.py                    # 0.5B shape, random weights, bf16
    python benchmarks/interference.py --shape 12m --seconds 5
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from rich.console import Console
from rich.table import Table

from benchmarks.machine import deliver, describe
from benchmarks.shapes import SHAPES, write_shape
from semipd.build import build_engine
from semipd.config import from_mapping
from semipd.core.engine import Engine
from semipd.core.types import Event, Finished, Request, Sampling, Tokens

SETTINGS: dict[str, dict[str, Any]] = {
    "semi-pd 1,1": {"policy": "semi-pd", "split": "static:1,1"},
    "semi-pd shared": {"policy": "semi-pd", "split": "shared"},
    **{
        f"chunked {tokens}": {"policy": "chunked", "chunk_tokens": tokens}
        for tokens in (16, 32, 64, 128, 256)
    },
    "prefill-first": {"policy": "prefill-first"},
}


@dataclass
class Recorder:
    """Gaps between the tokens of each stream, and prompts done, while `on`."""

    on: bool = False
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    ttft: list[float] = field(default_factory=list)
    last: dict[str, float] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Tokens):
            for request in event.requests:
                if request.id.startswith("stream"):
                    if self.on and request.id in self.last:
                        self.gaps.append(event.now - self.last[request.id])
                    self.last[request.id] = event.now
        elif isinstance(event, Finished) and self.on and event.request.id.startswith("prompt"):
            self.prompt_tokens += len(event.request.prompt)
            self.ttft.append(event.request.first_token_at - event.request.arrival)


class Load:
    """Streams and prompts of random tokens on one engine."""

    def __init__(self, engine: Engine, options: argparse.Namespace, vocabulary: int) -> None:
        self.engine, self.options = engine, options
        self.rng = random.Random(options.seed)
        self.vocabulary = vocabulary
        self.names = itertools.count()

    def add(self, kind: str, length: int, tokens: int) -> None:
        prompt = [self.rng.randrange(self.vocabulary) for _ in range(length)]
        now = self.engine.clock.now()
        self.engine.add(Request(f"{kind}{next(self.names)}", prompt, tokens, Sampling(), arrival=now))

    def start_streams(self, recorder: Recorder) -> None:
        tokens = self.engine.max_length - self.options.context
        for _ in range(self.options.streams):
            self.add("stream", self.options.context, tokens)
        while len(recorder.last) < self.options.streams:
            self.engine.step()

    def run(self, seconds: float, prompts: bool) -> float:
        """Keep two prompts waiting (or none) for a while; the seconds that it really took."""
        engine, live = self.engine, self.engine.live
        begin = engine.clock.now()
        while engine.clock.now() < begin + seconds:
            if prompts and len(live.waiting) + len(live.prefilling) < 2:
                self.add("prompt", self.options.prompt, 1)
            engine.step(begin + seconds)
        return engine.clock.now() - begin


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One setting on a fresh engine."""
    recorder = Recorder()
    config = from_mapping(
        {
            "model": str(folder),
            "load_format": "dummy",
            "max_num_seqs": options.streams + 8,
            "max_model_len": min(SHAPES[options.shape]["max_position_embeddings"], 8192),
            "kv_memory": "2GiB",
            "prefix_cache": False,
            **SETTINGS[name],
        }
    )
    engine = build_engine(config, [recorder])
    try:
        load = Load(engine, options, SHAPES[options.shape]["vocab_size"])
        load.start_streams(recorder)
        load.run(options.seconds / 5, prompts=True)  # warm up
        recorder.on = True
        elapsed = load.run(options.seconds, prompts=True)
        mixed, recorder.gaps = recorder.gaps, []
        rate = recorder.prompt_tokens / elapsed
        recorder.on = False
        while engine.live.waiting or engine.live.prefilling:
            engine.step()
        recorder.on = True
        load.run(options.seconds / 5, prompts=False)
        return {
            "setting": name,
            "itl_median_ms": 1e3 * quantile(mixed, 0.5),
            "itl_p99_ms": 1e3 * quantile(mixed, 0.99),
            "itl_quiet_ms": 1e3 * quantile(recorder.gaps, 0.5),
            "decode_tokens_per_s": len(mixed) / elapsed,
            "prefill_tokens_per_s": rate,
            "ttft_median_s": quantile(recorder.ttft, 0.5),
        }
    finally:
        engine.executor.close()


def quantile(values: list[float], share: float) -> float:
    """NaN without values: streams that prompts held up all the time."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else math.nan


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it: nothing instead of NaN."""
    return {key: None if value != value else value for key, value in row.items()}


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="8 streams at about 512 tokens beside prompts of 1,024")
    for heading in ("setting", "ITL median", "ITL p99", "no prompts", "decode tok/s", "prefill tok/s"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for row in rows:
        table.add_row(
            row["setting"],
            *(f"{row[key]:.1f} ms" for key in ("itl_median_ms", "itl_p99_ms", "itl_quiet_ms")),
            *(f"{row[key]:.0f}" for key in ("decode_tokens_per_s", "prefill_tokens_per_s")),
        )
    Console().print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """ITL against prefill rate, one point a setting; below and right is better."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for row in rows:
        marker = "o" if row["setting"].startswith("chunked") else "s"
        x, y = row["prefill_tokens_per_s"], row["itl_median_ms"]
        axes.plot(x, y, marker, color="tab:blue" if marker == "o" else "tab:red")
        axes.vlines(x, y, row["itl_p99_ms"], color="lightgray", zorder=0)
        axes.annotate(row["setting"], (x, y), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set(xlabel="prompt tokens per second", ylabel="ITL, ms (median; line up to p99)", yscale="log")
    axes.set_title("Token streams beside back-to-back prompts of 1,024")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=SETTINGS, metavar="NAME")
    parser.add_argument("--seconds", type=float, default=20.0, help="measured time of each setting")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file; the picture goes beside it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_shape(options.shape, Path(folder))
        rows = [measure(name, Path(folder), options) for name in options.settings]
    show(rows)
    result = {
        "benchmark": "interference",
        "shape": options.shape,
        "machine": describe(),
        "rows": [*map(finite, rows)],
    }
    if options.out:
        plot(rows, options.out.with_suffix(".png"))
    deliver(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
