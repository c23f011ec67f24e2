"""This engine beside others on the same CPU, each in an environment of its own, in turns.

    python -m benchmarks.cpu_peers --threads 2 [--rounds 3] [--ways bf16,int8,int4]
        [--transformers PYTHON] [--llama PYTHON --gguf FILE] [--vllm PYTHON]

PYTHON is the interpreter of an environment that has the peer; nothing is installed. A peer that is not
given, or fails, is named and left out. All run random weights in the shape of a 0.5B model (llama.cpp: the
given file). Per engine: tokens a second of one stream, milliseconds of a decode step of 8 streams, both
from 128 tokens of context on, and prompt tokens a second of a prompt of 512.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.shapes import write_shape

# Every program defines `run(prompts, new)`, which generates exactly `new` tokens for each prompt.
_MEASURE = """
import json, random, time
rng = random.Random(0)
def prompts(count, length):
    return [[rng.randrange(1000, 100000) for _ in range(length)] for _ in range(count)]
def timed(count, length, new):
    batch = prompts(count, length)
    begin = time.perf_counter(); run(batch, new)
    return time.perf_counter() - begin
run(prompts(1, 16), 4); run(prompts(8, 128), 4)
first = min(timed(1, 512, 1) for _ in range(3))
one = [(timed(1, 128, 33) - timed(1, 128, 1)) / 32 for _ in range(2)]
eight = [(timed(8, 128, 33) - timed(8, 128, 1)) / 32 for _ in range(2)]
print(json.dumps({"prompt_tokens_per_s": 512 / first, "tokens_per_s": 1 / min(one),
                  "step_of_8_ms": min(eight) * 1e3}))
"""
_OURS = """
from semipd import LLM, SamplingParams
llm = LLM(FOLDER, load_format="dummy", device="cpu", kv_blocks=1024, max_model_len=2048, prefix_cache=False,
          **SETTINGS)
def run(batch, new):
    llm.generate(batch, SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True))
"""
_TRANSFORMERS = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.set_num_threads(THREADS)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER), dtype=torch.bfloat16).eval()
def run(batch, new):
    ids = torch.tensor(batch)
    with torch.inference_mode():
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
                       min_new_tokens=new, eos_token_id=None, pad_token_id=0)
"""
_LLAMA = """
from llama_cpp import Llama
llm = Llama(GGUF, n_ctx=4096, n_batch=1024, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)
def run(batch, new):
    for prompt in batch:  # the Python binding has one sequence: streams follow one another
        llm.reset()
        for count, _ in enumerate(llm.generate([t % llm.n_vocab() for t in prompt], temp=0.0), 1):
            if count == new:
                break
"""
_VLLM = """
from vllm import LLM, SamplingParams
llm = LLM(FOLDER, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=2048,
          enable_prefix_caching=False)
def run(batch, new):
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": p} for p in batch], params, use_tqdm=False)
"""
_WAYS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4", "quantize_head": True},
}


def engines(options: argparse.Namespace, folder: Path) -> dict[str, tuple[str, str]]:
    """Name -> (interpreter, program)."""
    start = f"FOLDER, THREADS, GGUF = {str(folder)!r}, {options.threads}, {str(options.gguf)!r}\n"
    found = {
        f"semipd {way}": (sys.executable, f"{start}SETTINGS = {_WAYS[way]!r}\n{_OURS}")
        for way in options.ways.split(",")
    }
    for name, python, program in (
        ("transformers", options.transformers, _TRANSFORMERS),
        ("llama.cpp", options.llama, _LLAMA),
        ("vllm", options.vllm, _VLLM),
    ):
        if python:
            found[name] = (python, start + program)
    return found


def measure(python: str, program: str, threads: int, seconds: float) -> dict[str, float] | str:
    """What the program found, or why it did not."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    try:
        done = subprocess.run(
            [python, "-c", program + _MEASURE],
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"[:200]
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
    found: dict[str, float] = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", default="bf16,int8,int4")
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="most that one engine may take a round"
    )
    for peer in ("transformers", "llama", "vllm"):
        parser.add_argument(f"--{peer}", metavar="PYTHON")
    parser.add_argument("--gguf", type=Path, help="for llama.cpp")
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {}
    missing = {
        peer: "not given" for peer in ("transformers", "llama", "vllm") if not getattr(options, peer)
    }
    with tempfile.TemporaryDirectory() as folder:
        chosen = engines(options, write_shape("0.5b", Path(folder)))
        for _ in range(options.rounds):
            for name, (python, program) in chosen.items():
                found = measure(python, program, options.threads, options.seconds)
                if isinstance(found, str):
                    missing[name] = found
                else:
                    results.setdefault(name, []).append(found)
    columns = ("tokens_per_s", "step_of_8_ms", "prompt_tokens_per_s")
    table = Table("engine", *columns)
    middle = {
        name: {key: statistics.median(round_[key] for round_ in rounds) for key in columns}
        for name, rounds in results.items()
    }
    for name, row in middle.items():
        table.add_row(name, *(f"{row[key]:.1f}" for key in columns))
    console = Console(width=120)
    console.print(table)
    for name, why in missing.items():
        console.print(f"left out: {name} ({why})", markup=False)
    facts = {"benchmark": "cpu_peers", "threads": options.threads, "ran_on": describe()}
    print(json.dumps({**facts, "results": middle, "rounds": results, "left_out": missing}))


if __name__ == "__main__":
    main()
