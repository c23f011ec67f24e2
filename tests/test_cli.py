"""The command line as a user meets it: one clear line and exit code 2 for what cannot work."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from semipd.cli import _read_prompts, main
from semipd.config import Config
from semipd.foreign_flags import HINTS
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama")


def refusal(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a bad command prints."""
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    error = capfd.readouterr().err
    assert code == 2 and "Traceback" not in error
    return error.strip()


def test_folders_that_cannot_be_served(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(name: str) -> Path:
        shutil.copytree(checkpoint, tmp_path / name)
        return tmp_path / name

    no_weights = broken("no-weights")
    (no_weights / "model.safetensors").unlink()
    truncated = broken("truncated")
    whole = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    foreign = broken("foreign")
    (foreign / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    garbled = broken("garbled")
    (garbled / "config.json").write_text("{")
    for folder, words in (
        (no_weights, "no weights"),
        (truncated, "truncated"),
        (foreign, "GPT2LMHeadModel"),
        (garbled, "config.json"),
        (tmp_path / "absent", "no model folder"),
    ):
        line = refusal(capfd, "generate", str(folder), "--prompt", "hi")
        assert words in line and "\n" not in line


def test_a_pool_below_one_sequence(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = refusal(capfd, "serve", str(checkpoint), "--kv-blocks", "2")
    assert "less than one sequence of 512" in line and "32 blocks" in line


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["serve", "x", "--polcy", "chunked"], "did you mean --policy?"),
        (["serve", "x", "--kv-memroy", "1GiB"], "did you mean --kv-memory?"),
        (["serve", "x", "--port", "http"], "--port"),
        (["bench", "serve", "--concurency", "3"], "did you mean --concurrency?"),
        (["fly"], "invalid choice"),
        (["serve", "x", "--enable-prefix-caching"], "unless you say --no-prefix-cache"),
        (["serve", "x", "--tensor-parallel-size=2"], "one device"),
        (["serve", "-m", "x"], "semipd serve MODEL"),
    ],
)
def test_typing_mistakes_get_a_hint(words: list[str], hint: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert hint in refusal(capfd, *words)


def test_hints_name_flags_that_exist(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    ours = set(re.findall(r"(?<!\S)--?[a-z-]+", capfd.readouterr().out.replace(",", " ")))
    assert not ours & set(HINTS)
    for hint in HINTS.values():
        assert ours.issuperset(re.findall(r"--[a-z-]+", hint)), hint


def test_a_hub_that_cannot_be_reached_is_not_a_model_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("Got: ConnectError: no network\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    line = refusal(capfd, "generate", "some/model", "--prompt", "hi")
    assert "the hub cannot be reached" in line and line.endswith("ConnectError: no network")


def test_a_config_file_gives_defaults_that_flags_override(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("policy: chunked\nchunk-tokens: 1K\nport: 9000\n")
    seen: list[Config] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("semipd.serve.server.run_server", lambda config, engine: seen.append(config) or 0)
        assert main(["serve", "x", "--config", str(file), "--port", "9001"]) == 0
    (config,) = seen
    assert (config.policy.chunk_tokens, config.server.port, config.model.model) == (1024, 9001, "x")
    file.write_text("polic: chunked\n")
    assert "did you mean policy?" in refusal(capfd, "serve", "x", "--config", str(file))
    file.write_text("[1, 2")
    assert "--config" in refusal(capfd, "serve", "x", "--config", str(file))


def test_generate_prints_one_answer_a_prompt(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"hello world"\n{"prompt": "one two"}\n[7, 8, 9]\n')
    words = ["generate", str(checkpoint), "--prompts-file", str(prompts), "--max-tokens", "4", "--json"]
    assert main([*words, "--temperature", "0", "--max-model-len", "64"]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["hello world", "one two", [7, 8, 9]]
    assert all(1 <= len(row["token_ids"]) <= 4 for row in rows)
    prompts.write_text('"fine"\nnot json\n')
    assert "line 2" in refusal(capfd, *words)


def test_input_files_that_are_broken_in_other_ways(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each of these was a traceback."""
    file = tmp_path / "input"
    for content in ("a: 2024-13-45\n", "[" * 5000):
        file.write_text(content)
        assert "--config" in refusal(capfd, "serve", "x", "--config", str(file))
    for content in ("[" * 5000, "[" + "1" * 5000 + "]"):
        file.write_text(content)
        assert "line 1" in refusal(capfd, "generate", "x", "--prompts-file", str(file))


def test_what_generate_cannot_do_is_said_before_loading(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("semipd.LLM.from_settings", lambda *given: pytest.fail("it was loaded"))
        for words in (["--max-tokens", "0"], ["--max-tokens", "x"], ["--temperature", "nan"]):
            line = refusal(capfd, "generate", "--prompt", "x", *words)
            assert words[0].strip("-").replace("-", "_") in line.replace("-", "_")


def test_a_prompt_may_hold_any_line_separator_but_the_newline(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"one\u2028two\x85three"\r\n\n"four"\n', encoding="utf-8")
    options = argparse.Namespace(prompt=None, prompts_file=str(file))
    assert _read_prompts(options) == ["one\u2028two\x85three", "four"]


def test_whoever_reads_the_output_may_leave() -> None:
    code = (
        "import semipd.cli as cli\n"
        "cli._chat = lambda options: [print('x' * 1000) for _ in range(1000)]\n"
        "raise SystemExit(cli.main(['chat']))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (1, b"")
