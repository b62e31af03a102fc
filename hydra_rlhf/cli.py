"""The ``hydra-rlhf`` command line.

A command is a module with ``ARGUMENTS``, the dataclasses that are its settings, and ``run``, which
takes one instance of each. Settings come from flags, from ``--config file.yaml|json``, or both: a
flag wins. Exit codes: 0 done, 1 an error of ours, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import itertools
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra_rlhf.errors import UserError

PROGRAM = "hydra-rlhf"

# command -> (module with ARGUMENTS and run, one line)
COMMANDS = {
    "demo": ("hydra_rlhf.demo", "the whole pipeline on a small model and bundled data, in minutes"),
    "sft": (
        "hydra_rlhf.commands.sft",
        "train a policy and a reward head on preference pairs (Hydra-SFT)",
    ),
    "ppo": (
        "hydra_rlhf.commands.ppo",
        "align a Hydra-SFT checkpoint with PPO (Hydra-PPO and others)",
    ),
    "evaluate": ("hydra_rlhf.commands.evaluate", "compare policies on the same prompts"),
    "plan": ("hydra_rlhf.commands.plan", "memory of each method for a model, before loading it"),
    "export": ("hydra_rlhf.commands.export", "merge an adapter, or make a classifier of a reward"),
    "data": ("hydra_rlhf.commands.data", "data check FILE: what is in a set, bad rows by number"),
}

# command -> what its help ends with; from the README
EXAMPLES = {
    "sft": "sft --model MODEL --pair-data pairs.jsonl --output-dir runs/sft",
    "ppo": "ppo --sft-model-path runs/sft --prompts prompts.jsonl --output-dir runs/ppo",
    "evaluate": "evaluate sft=runs/sft ppo=runs/ppo --prompts held_out.jsonl",
    "plan": "plan meta-llama/Llama-2-7b-hf --card-gb 80",
    "export": "export runs/ppo merged --merge",
    "data": "data check pairs.jsonl --tokenizer MODEL",
}

EPILOG = f"""\
Start with:  {PROGRAM} demo
Help:        {PROGRAM} COMMAND --help
Every command takes --config FILE (YAML or JSON) with flags over it, and --verbose for tracebacks.
"""


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    verbose = bool(os.environ.get("HYDRA_TRACEBACK"))
    if "--verbose" in argv:
        verbose = True
        argv.remove("--verbose")
    try:
        return _dispatch(argv)
    except UserError as error:
        if verbose:
            raise
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        if verbose:
            raise
        _complain("interrupted", error=False)
        return 130
    except BrokenPipeError:
        # The reader of our output left, as `| head` does; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if verbose:
            raise
        _complain(f"{type(error).__name__}: {error} (--verbose shows where)")
        return 1


def overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [f"usage: {PROGRAM} COMMAND [settings]", "", "RLHF with PPO on one base model.", ""]
        + lines
        + ["", EPILOG]
    )


def parse(
    command: str, summary: str, argument_types: Sequence[type], argv: Sequence[str]
) -> tuple[Any, ...]:
    """One instance of each of ``argument_types`` from flags and ``--config``.

    Raises:
        UserError: an unknown or malformed setting, in the flags or in the file.
    """
    parser = _parser(command, summary, argument_types)
    config_file, flags = _take_config(list(argv))
    known = {action.dest for action in parser._actions} - {"help"}
    from_file = _config_flags(config_file, known) if config_file is not None else []
    for flag in flags:
        name = flag.split("=")[0]
        if name.startswith("--") and name not in parser._option_string_actions:
            raise _unknown(command, name, known)
    if config_file is not None:
        _check_alone(parser, from_file, config_file, command)
    try:
        parsed = parser.parse_args_into_dataclasses(
            [*from_file, *flags], return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError) as error:  # from a dataclass's __post_init__
        raise UserError(f"{command}: {error}") from error
    rest = parsed[-1]
    if rest:
        raise _unknown(command, rest[0], known)
    return parsed[:-1]


def _check_alone(
    parser: argparse.ArgumentParser, flags: Sequence[str], config_file: Path, command: str
) -> None:
    """Raises UserError that names the file where a value of its own cannot be read."""
    needed = [
        f"--{action.dest}={next(iter(action.choices or (1,)))}"  # what the file may leave out
        for action in parser._actions
        if action.required
    ]
    try:
        parser.parse_known_args([*needed, *flags])
    except UserError as error:
        raise UserError(f"{config_file}: {str(error).removeprefix(f'{command}: ')}") from error


def _unknown(command: str, flag: str, known: Any) -> UserError:
    return UserError(f"{command}: unknown setting {flag}{_did_you_mean(flag, known)}")


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0
    if argv[0] in ("-V", "--version"):
        from hydra_rlhf import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        hint = _did_you_mean(command, COMMANDS)
        raise UserError(f"unknown command {command!r}{hint or '; see hydra-rlhf --help'}")
    module_name, summary = COMMANDS[command]
    _quiet_libraries()
    module = importlib.import_module(module_name)
    rest = _named(command, rest, getattr(module, "POSITIONALS", ()))
    settings = parse(command, summary, module.ARGUMENTS, rest)
    module.run(*settings)
    return 0


def _named(command: str, argv: list[str], names: Sequence[str]) -> list[str]:
    """Leading words as the flags that they stand for: ``data check FILE``.

    A name that ends in ``*`` takes all that are left.
    """
    flags: list[str] = []
    for name in names:
        if name.endswith("*"):
            words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
            del argv[: len(words)]
            flags += [f"--{name[:-1]}", *words] if words else []
        elif argv and not argv[0].startswith("-"):
            flags.append(f"--{name}={argv.pop(0)}")
    if names and argv and not argv[0].startswith("-"):
        raise UserError(f"{command}: unexpected {argv[0]!r} after {' '.join(names)}")
    return flags + argv


def _parser(command: str, summary: str, argument_types: Sequence[type]) -> Any:
    from transformers import HfArgumentParser
    from transformers.hf_argparser import string_to_bool

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            # argparse names both spellings of a flag, --output_dir/--output-dir.
            message = re.sub("--[a-z_]+/--", "--", message)
            message = message.replace("invalid int value:", "expected a whole number, got")
            message = message.replace("invalid float value:", "expected a number, got")
            if "arguments are required" in message and command in EXAMPLES:
                message += f" (example: {PROGRAM} {EXAMPLES[command]})"
            raise UserError(f"{command}: {message}")

    parser = Parser(
        list(argument_types),
        prog=f"{PROGRAM} {command}",
        usage=f"{PROGRAM} {command} [--config FILE] [settings]",
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"Example: {PROGRAM} {EXAMPLES[command]}" if command in EXAMPLES else None,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    for action in parser._actions:
        if action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS  # shown beside the setting that it turns off
        if action.type is string_to_bool and action.nargs is None:  # `bool | None`: a switch too
            action.nargs, action.const = "?", True
        if action.required:
            action.help = f"required: {action.help}"
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows ``--batch-size N`` once: the parser also takes ``--batch_size``."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        options = [option for option in action.option_strings if "_" not in option]
        if not options:
            return super()._format_action_invocation(action)
        if action.nargs == "?" and action.default is True:
            return f"{options[0]}, --no-{options[0].removeprefix('--')}"
        if action.nargs in (0, "?"):
            return ", ".join(options)
        if action.choices:
            value = "|".join(map(str, action.choices))
        else:
            value = getattr(action.type, "__name__", "value").upper()
            value = {"STR": "TEXT", "INT": "N", "FLOAT": "X"}.get(value, value)
        return f"{', '.join(options)} {value}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is argparse.SUPPRESS or action.required:
            return action.help
        return super()._get_help_string(action)


def _take_config(argv: list[str]) -> tuple[Path | None, list[str]]:
    taker = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    taker.add_argument("--config", nargs="?", const="")
    taken, rest = taker.parse_known_args(argv)
    if taken.config == "":
        raise UserError("--config needs a file")
    return (Path(taken.config) if taken.config is not None else None), rest


def _config_flags(path: Path, known: set[str]) -> list[str]:
    """The settings in a YAML or JSON file, as the flags that would set them.

    As flags they pass the same checks. Sections, as the config.yaml of a run folder has them, are
    flattened; null means "not set".
    """
    settings = _read_config(path)
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    flags: list[str] = []
    for key, value in flat.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"{path}: unknown setting {key!r}{_did_you_mean(name, known)}")
        if value is None:
            continue
        if isinstance(value, dict):
            raise UserError(f"{path}: setting {key!r} must be a value, got a mapping")
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")
    return flags


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read config file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path} is not UTF-8 text") from error
    try:
        settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "malformed"
        raise UserError(f"{path}{where}: not YAML: {problem}") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply") from error
    except (ValueError, OverflowError) as error:  # a date in month 13, a number of 5000 digits
        raise UserError(f"{path}: holds a value that cannot be read: {error}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected settings (name: value), got {type(settings).__name__}")
    return settings


def _did_you_mean(name: str, known: Any) -> str:
    wanted = name.lstrip("-").split("=")[0].replace("-", "_")
    close = difflib.get_close_matches(wanted, [str(k) for k in known], n=1)
    if not close:
        return ""
    shown = "--" + close[0].replace("_", "-") if name.startswith("-") else close[0]
    return f" (did you mean {shown}?)"


def _quiet_libraries() -> None:
    """Their progress bars and hints would break ours; their errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    import datasets
    import transformers

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _complain(message: str, *, error: bool = True) -> None:
    line = " ".join(str(message).split())
    print(f"{PROGRAM}: {'error: ' if error else ''}{line}", file=sys.stderr)
