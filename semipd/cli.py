"""The command line: serve, generate, chat, bench, simulate, profile; each loads when used."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from semipd.config import Config, from_mapping, sections, settings
from semipd.core.errors import ConfigError, Refused, SemipdError
from semipd.foreign_flags import HINTS
from semipd.logs import fill_standard_streams, start_logging
from semipd.setting import Setting, check

EXIT_BAD_INPUT = 2
MAX_TOKENS = Setting("most new tokens (default 64)", "size", low=1, high=2**31 - 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 (it failed), or 2 (the input cannot work)."""
    fill_standard_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    options, unknown = _parser(words).parse_known_args(words)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return int(options.run(options) or 0)
    except (ConfigError, Refused) as error:
        print(f"semipd: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except BrokenPipeError:  # whoever read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails when it ends
        return 1
    except SemipdError as error:
        print(f"semipd: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """Suggests the nearest flag for an unknown one."""

    def error(self, message: str) -> NoReturn:
        words = message.split()
        flags = [flag for action in self._actions for flag in action.option_strings]
        if "unrecognized" in words:
            unknown = next((word.partition("=")[0] for word in words if word.startswith("-")), "")
            if "--served-model-name" in flags and unknown in HINTS:
                message += f"; {HINTS[unknown]}"
            elif near := difflib.get_close_matches(unknown, flags, n=1):
                message += f"; did you mean {near[0]}?"
        print(f"{self.prog}: {message}\nTry '{self.prog} --help'.", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="semipd", description="Serve a language model; prefill and decode side by side.")
    parser.add_argument("--version", action="version", version=f"semipd {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve a model over HTTP", description="Serve over HTTP.")
    _add_settings(serve)
    serve.set_defaults(run=_serve, parser=serve)

    generate = commands.add_parser("generate", help="generate offline", description="Generate offline.")
    generate.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    generate.add_argument("--prompts-file", metavar="FILE.jsonl", help="one JSON string or object a line")
    generate.add_argument("--max-tokens", default=64, help=MAX_TOKENS.help)
    generate.add_argument("--temperature", type=float, default=None, help="0 is greedy")
    generate.add_argument("--json", action="store_true", help="one JSON object a line")
    _add_settings(generate, leave_out=("server",))
    generate.set_defaults(run=_generate, parser=generate)

    chat = commands.add_parser("chat", help="talk to a server", description="Talk to a running server.")
    chat.set_defaults(run=_chat, parser=chat)
    bench = commands.add_parser("bench", help="load a server", description="Load tests.")
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="KIND")
    bench_serve = kinds.add_parser("serve", help="load any OpenAI-compatible server")
    bench_serve.set_defaults(run=_bench_serve, parser=bench_serve)
    simulate = commands.add_parser("simulate", help="run the engine on a simulated device")
    simulate.set_defaults(run=_simulate, parser=simulate)
    profile = commands.add_parser("profile", help="measure this machine for simulate and --split auto")
    profile.set_defaults(run=_profile, parser=profile)
    # These commands define their options beside the code that reads them; only they load it.
    if words[:1] == ["simulate"]:
        from semipd.bench.scenario import add_options

        add_options(simulate)
    if words[:1] == ["profile"]:
        from semipd.bench.profile import add_options

        add_options(profile)
    if words[:1] == ["chat"]:
        from semipd.chat import add_options

        add_options(chat)
    if words[:1] == ["bench"]:
        from semipd.bench.client import add_options

        add_options(bench_serve)
    return parser


def _add_settings(parser: argparse.ArgumentParser, leave_out: tuple[str, ...] = ()) -> None:
    """One flag per setting of `config.py`, grouped by its section."""
    parser.add_argument("model", nargs="?", help="local folder or hub id (default: the model in the box)")
    parser.add_argument("--config", metavar="FILE.yaml", help="settings by name; flags win over it")
    kinds = sections()
    groups = {name: parser.add_argument_group(kind.__doc__) for name, kind in kinds.items()}
    for name, (section, setting, default) in settings().items():
        if section in leave_out or name == "model":
            continue
        flag = "--" + name.replace("_", "-")
        shown = "" if default is None or setting.kind == "flag" else f" (default {default})"
        if setting.kind == "flag":
            groups[section].add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=setting.help
            )
        elif setting.kind == "names":
            groups[section].add_argument(
                flag, nargs="+", action="extend", metavar=setting.metavar, help=setting.help
            )
        else:
            groups[section].add_argument(
                flag,
                choices=setting.choices or None,
                metavar=setting.metavar or (None if setting.choices else name.rpartition("_")[2].upper()),
                help=setting.help + shown,
            )


def read_config(options: argparse.Namespace) -> Config:
    """Flags over the --config file over the defaults. Raises ConfigError."""
    return from_mapping(_read_settings(options))


def _read_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What flags and the --config file say, by name."""
    values: dict[str, Any] = {}
    if options.config:
        import yaml

        try:
            loaded = yaml.safe_load(Path(options.config).read_text(encoding="utf-8"))
        # ValueError: broken UTF-8, and what looks like a date and is none.
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(f"--config {options.config}: {' '.join(str(error).split())}") from None
        if not isinstance(loaded, dict | None):
            raise ConfigError(f"--config {options.config}: not a list of settings and values")
        values = {str(key).replace("-", "_"): value for key, value in (loaded or {}).items()}
        if len(values) < len(loaded or {}):
            raise ConfigError(f"--config {options.config}: a setting is given twice, with - and with _")
    values |= {
        name: getattr(options, name) for name in settings() if getattr(options, name, None) is not None
    }
    names: list[str] = getattr(options, "served_model_name", None) or []
    if len(names) > 1 and values.get("model") is None and ("/" in names[-1] or Path(names[-1]).is_dir()):
        message = "give the model first: semipd serve MODEL --served-model-name ..., which takes all words"
        raise ConfigError(f"{message} behind it ({names[-1]} is one)")
    return values


def _serve(options: argparse.Namespace) -> int:
    from semipd.serve.launch import EngineProcess

    config = read_config(options)
    _set_log_level(config.server.log_level)
    with EngineProcess(config.model.device) as engine:  # it imports what it needs while we do
        from semipd.serve.server import run_server

        return run_server(config, engine)


def _generate(options: argparse.Namespace) -> int:
    from semipd.start import build_on, early_resident

    prompts = _read_prompts(options)
    most = check("max_tokens", options.max_tokens, MAX_TOKENS)
    values = _read_settings(options)
    with contextlib.ExitStack() as resources:
        if (resident := early_resident(from_mapping(values).model.device)) is not None:
            resources.callback(resident.close)
        from semipd import LLM, SamplingParams  # while the resident imports what it needs

        params = SamplingParams(max_tokens=most, temperature=options.temperature)
        llm = resources.enter_context(LLM.from_settings(values, build_on(resident)))
        for prompt, result in zip(prompts, llm.generate(prompts, params), strict=True):
            output = result.outputs[0]
            if options.json:
                print(
                    json.dumps(
                        {
                            "prompt": prompt,
                            "text": output.text,
                            "token_ids": list(output.token_ids),
                            "finish_reason": output.finish_reason,
                        }
                    )
                )
            else:
                print(output.text)
    return 0


def _read_prompts(options: argparse.Namespace) -> list[Any]:
    prompts: list[Any] = list(options.prompt or [])
    if options.prompts_file:
        try:
            # Not splitlines(), which also splits at characters that a JSON text may hold (U+2028).
            lines = Path(options.prompts_file).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts-file {options.prompts_file}: {error}") from None
        for number, line in enumerate(lines, start=1):
            if line.strip():
                prompts.append(_read_prompt(line, f"{options.prompts_file}, line {number}"))
    if not prompts:
        raise ConfigError("nothing to generate: give --prompt or --prompts-file")
    return prompts


def _read_prompt(line: str, where: str) -> Any:
    """A JSON string, a list of token ids, or an object with one of them under "prompt"."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}") from None
    value = value.get("prompt") if isinstance(value, dict) else value
    is_ids = isinstance(value, list) and all(type(token) is int for token in value)
    if not isinstance(value, str) and not is_ids:
        raise ConfigError(f"{where}: not a string, a list of token ids, or an object with a prompt")
    return value


def _chat(options: argparse.Namespace) -> int:
    from semipd.chat import run

    return run(options)


def _bench_serve(options: argparse.Namespace) -> int:
    from semipd.bench.client import run_command

    return run_command(options)


def _simulate(options: argparse.Namespace) -> int:
    from semipd.bench.scenario import run_command

    return run_command(options)


def _profile(options: argparse.Namespace) -> int:
    from semipd.bench.profile import run_command

    return run_command(options)


def _set_log_level(level: str) -> None:
    start_logging(level.upper(), "%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("semipd")
    except PackageNotFoundError:
        return "0 (not installed)"


if __name__ == "__main__":
    sys.exit(main())
