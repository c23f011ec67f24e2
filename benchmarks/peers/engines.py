"""How each engine is started, offline and as a server: interpreters, settings, environment.

An engine's name is "semipd", "semipd-int8" or "semipd-int4" (whose output layer stays in bfloat16),
"semipd-int8-head" or "semipd-int4-head" (which round it, too, as llama.cpp's files do), "vllm",
"vllm-eager", "transformers", "transformers-cb" (continuous batching), "llama-bf16", "llama-q8_0" or
"llama-q4_0", and "@1" after it means one thread instead of one per core.
"""

from __future__ import annotations

import ctypes.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.checkpoint import write_checkpoint
from benchmarks.peers.worker import HERE, ROOT, Launch, PeerFailed

NAMES = (
    *("semipd", "semipd-int8", "semipd-int4", "semipd-int8-head", "semipd-int4-head", "vllm", "vllm-eager"),
    *("transformers", "transformers-cb", "llama-bf16", "llama-q8_0", "llama-q4_0"),
)
PEERS = ("vllm", "llama", "transformers")  # those that need an interpreter of their own
LENGTH = 2048  # longest sequence
SEQUENCES = 64  # most at once
LLAMA_SEQUENCES = 16
KV_TOKENS = 64 * 1024
_QUANTIZED: dict[str, dict[str, Any]] = {
    "semipd": {},
    "semipd-int8": {"quantization": "int8"},
    "semipd-int4": {"quantization": "int4"},
    "semipd-int8-head": {"quantization": "int8", "quantize_head": True},
    "semipd-int4-head": {"quantization": "int4", "quantize_head": True},
}


@dataclass(frozen=True)
class Engines:
    """peers: interpreter of each peer. folder: where checkpoints and GGUF files are made and kept."""

    peers: dict[str, str]
    folder: Path
    cores: Sequence[int]

    def family(self, name: str) -> str:
        return name.partition("@")[0].partition("-")[0]

    def python(self, name: str) -> str:
        """Raises PeerFailed when the engine has no interpreter."""
        family = self.family(name)
        if family == "semipd":
            return sys.executable
        if family not in self.peers:
            raise PeerFailed(f"no --peer {family}=PYTHON was given")
        return self.peers[family]

    def cores_of(self, name: str) -> Sequence[int]:
        return self.cores[:1] if name.endswith("@1") else self.cores

    def checkpoint(self, shape: str) -> Path:
        return write_checkpoint(shape, self.folder / shape)

    def gguf(self, name: str, shape: str) -> Path:
        """The model file of a llama.cpp engine, made on first use. Raises PeerFailed."""
        kind = name.partition("@")[0].removeprefix("llama-")
        file = self.folder / f"{shape}-{kind}.gguf"
        if not file.exists():
            partial = file.with_suffix(".partial")
            command = [self.python(name), str(HERE / "write_gguf.py"), str(self.checkpoint(shape))]
            done = subprocess.run(
                [*command, str(partial), kind], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise PeerFailed((done.stderr.strip().splitlines() or ["no GGUF file"])[-1])
            partial.rename(file)
        return file

    def offline(self, name: str, shape: str) -> Launch:
        """A driver of this engine. Raises PeerFailed."""
        python, family, base = self.python(name), self.family(name), name.partition("@")[0]
        threads = len(self.cores_of(name))
        settings: dict[str, Any]
        if family == "semipd":
            settings = {"folder": str(self.checkpoint(shape)), "llm": self.own(base)}
        elif family == "vllm":
            settings = {
                "folder": str(self.checkpoint(shape)),
                "dtype": "bfloat16",
                "eager": base == "vllm-eager",
                "sequences": SEQUENCES,
                "length": LENGTH,
            }
        elif family == "transformers":
            settings = {
                "folder": str(self.checkpoint(shape)),
                "dtype": "bfloat16",
                "threads": threads,
                "continuous": base == "transformers-cb",
                "tokens": KV_TOKENS // 2,
            }
        else:
            settings = self.llama(name, shape, 2048, unified=False)
        command = [python, str(HERE / f"drive_{family}.py"), json.dumps(settings)]
        return Launch(command, self.environment(name))

    def own(self, base: str) -> dict[str, Any]:
        """Settings of this engine. Dummy weights are not used: it loads what the others load."""
        return {
            "dtype": "bfloat16",
            "max_model_len": LENGTH,
            "max_num_seqs": SEQUENCES,
            "kv_blocks": KV_TOKENS // 16,
            **_QUANTIZED[base],
        }

    def llama(self, name: str, shape: str, batch: int, unified: bool) -> dict[str, Any]:
        """unified: mixed batches run in one pass; otherwise attention reads each sequence's part alone."""
        return {
            "file": str(self.gguf(name, shape)),
            "threads": len(self.cores_of(name)),
            "sequences": LLAMA_SEQUENCES,
            "length": LENGTH,
            "batch": batch,
            "unified": unified,
            "quantized": not name.startswith("llama-bf16"),
        }

    def environment(self, name: str) -> dict[str, str | None]:
        """What each engine's documentation asks for."""
        cores, family = self.cores_of(name), self.family(name)
        if family == "semipd":
            return {"PYTHONPATH": str(ROOT)}
        found: dict[str, str | None] = {"PYTHONPATH": None, "OMP_NUM_THREADS": str(len(cores))}
        if family == "vllm":
            found |= {
                "OMP_NUM_THREADS": None,
                "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_NO_USAGE_STATS": "1",
                "LD_PRELOAD": ":".join(preloads(Path(self.python(name)))) or None,
            }
        return found


def preloads(python: Path) -> list[str]:
    """The libraries that vLLM's CPU build is faster with, where there are any: tcmalloc of the system or
    beside the interpreter, Intel's OpenMP beside the interpreter."""
    folder = python.parent.parent / "lib"
    found = sorted(folder.glob("libtcmalloc*.so*"))[:1]
    if not found and (name := ctypes.util.find_library("tcmalloc_minimal")):
        found = [Path(name)]
    return [str(path) for path in (*found, *sorted(folder.glob("libiomp5.so"))[:1])]
