"""YAML and command line in, the typed tree or a one-line error out."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import yaml

from roadwork.config import Config, validate
from roadwork.config_checks import check_tracker_packages
from roadwork.errors import UserError

Tool = TypeVar("Tool")


def parser(stage: str) -> Any:
    """The command line of one stage: every option of the tree, `--config`, `--print_config`, `--dry_run`."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    made = jsonargparse.ArgumentParser(
        prog=f"launch/{stage}.py", description=_DESCRIPTIONS[stage], exit_on_error=False, parser_mode="yaml"
    )
    made.add_argument("--config", action="config", help="YAML file of options; the command line wins over it")
    made.add_argument("--dry_run", action="store_true", help="check and describe the run, then stop")
    if stage == "predict":
        made.add_argument("--challenge", action="store_true", help="short for --predict.challenge true")
    made.add_class_arguments(Config)
    return made


_DESCRIPTIONS = {
    "pretrain": "Pre-training on ZeRO-2; resumes by itself where the run folder holds a COMPLETE checkpoint.",
    "find_lr": "Learning-rate range test on the run's engine and optimizer.",
    "dora_folds": "DoRA fine-tuning of folds from the pre-trained model.",
    "predict": "FOODS test-time augmentation, ensemble, calibration, predictions.",
    "evaluate": "Scores, error analysis and report of a run, or of a saved model on any labelled shards.",
    "pseudo_masks": "Pseudo-masks of six roadwork classes.",
    "pipeline": "All stages in order, each resumable.",
}


_TRAINING = ("pretrain", "find_lr", "pipeline")
"""Stages that make a run, or its options; those behind them read its own."""


@dataclass
class Invocation:
    """What the command line asked for."""

    config: Config
    dry_run: bool = False


def parse(stage: str, argv: list[str] | None = None) -> Invocation:
    """Read the command line of a stage.

    Raises:
        UserError: an unknown option (with the nearest known one), a wrong type, a missing file, an impossible combination.
        SystemExit: after `--help` or `--print_config`.
    """
    arguments = _switched_on(_with_saved_config(stage, list(sys.argv[1:] if argv is None else argv)))
    for file in _given_files(arguments):
        _refuse_doubled_keys(file)
    cli = parser(stage)
    known = [name for action in cli._actions for name in action.option_strings]
    _refuse_unknown_flags(arguments, known)
    try:
        namespace = cli.parse_args(arguments)
        made = cli.instantiate_classes(namespace)
    except SystemExit:
        raise
    except Exception as error:  # jsonargparse raises several kinds; all of them mean the same to the user
        raise UserError(_one_line(error, known)) from None
    names = {f.name for f in dataclasses.fields(Config)}
    config = Config(**{k: v for k, v in vars(made).items() if k in names})
    config.predict.challenge |= bool(getattr(made, "challenge", False))
    validate(config)
    if stage in _TRAINING:
        check_tracker_packages(config.monitoring.trackers)
    return Invocation(config, bool(made.dry_run))


def tool_parser(tool: str, kind: type) -> Any:
    """The command line of a tool outside a run: the fields of one dataclass as flat options."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    made = jsonargparse.ArgumentParser(prog=f"launch/{tool}.py", description=kind.__doc__, exit_on_error=False)
    made.add_argument("--config", action="config", help="YAML file of options; the command line wins over it")
    made.add_class_arguments(kind)
    return made


def parse_tool(tool: str, kind: type[Tool], argv: list[str] | None = None) -> Tool:
    """Read the command line of a tool. As `parse`, it raises UserError where the line does not fit."""
    cli = tool_parser(tool, kind)
    arguments = list(sys.argv[1:] if argv is None else argv)
    known = [name for action in cli._actions for name in action.option_strings]
    _refuse_unknown_flags(arguments, known)
    try:
        namespace = cli.parse_args(arguments)
    except SystemExit:
        raise
    except Exception as error:  # as in parse
        raise UserError(_one_line(error, known)) from None
    return kind(**{f.name: namespace[f.name] for f in dataclasses.fields(cast(Any, kind))})


def _with_saved_config(stage: str, arguments: list[str]) -> list[str]:
    """Stages behind pre-training read the run's own config.yaml unless a file is given, so `--run.dir` is enough."""
    joined = _apart(arguments)
    if stage in _TRAINING or "--config" in joined or "--run.dir" not in joined[:-1]:
        return arguments
    saved = Path(joined[joined.index("--run.dir") + 1], "config.yaml")
    return ["--config", str(saved), *arguments] if saved.is_file() else arguments


def _given_files(arguments: list[str]) -> list[Path]:
    """Files behind `--config`, as far as they are there."""
    given = [Path(value) for word, value in pairwise(_apart(arguments)) if word == "--config"]
    return [path for path in given if path.is_file()]


def _apart(arguments: list[str]) -> list[str]:
    """`--name=value` as two words."""
    return [part for argument in arguments for part in argument.split("=", 1)]


def _refuse_doubled_keys(path: Path) -> None:
    """UserError for a key that stands twice in one place of a YAML file: the parser would take the last and say nothing."""
    try:
        root = yaml.compose(path.read_text(), yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return  # the parser says what is wrong
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value]
            for key, value in node.value:
                if names.count(key.value) > 1:
                    raise UserError(f"{path} gives {key.value} twice; write it once, with all that belongs to it")
                nodes.append(value)


def _switched_on(arguments: list[str]) -> list[str]:
    """`--masks.tiles` without a value means true, as for any option that is true or false."""
    switches = {f"--{name}" for name in switch_names(Config)}
    following = [*arguments[1:], "--"]
    return [
        f"{argument}=true" if argument in switches and after.startswith("--") else argument
        for argument, after in zip(arguments, following, strict=False)
    ]


def switch_names(kind: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of the options that are true or false."""
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from switch_names(cast(type, hint), f"{prefix}{name}.")
        elif hint is bool:
            yield f"{prefix}{name}"


def _refuse_unknown_flags(arguments: list[str], known: list[str]) -> None:
    for argument in arguments:
        flag = argument.split("=", 1)[0]
        if flag.startswith("--") and flag not in known and not flag.endswith("+"):
            near = difflib.get_close_matches(flag, known, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"unknown option {flag}{hint} (--help lists every option)")


def _one_line(error: Exception, known: list[str]) -> str:
    text = " ".join(str(error).split()).replace("Parser key", "option").replace("typing.Literal", "one of ")
    unknown = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'|Key '([\w.]+)' is not expected", text)
    if unknown:
        name = ".".join(part for part in unknown.groups() if part)
        near = difflib.get_close_matches(f"--{name}", known, 1, 0.4)
        return f"unknown option {name}" + (f"; did you mean {near[0][2:]}?" if near else "")
    return f"{text[:400]} (--help lists every option)"
