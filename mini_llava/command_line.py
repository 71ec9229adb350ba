"""Flags made of dataclasses: the field's name, type and default, and the text under it as `--help`."""

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import os
import shutil
import textwrap
import time
import types
import typing
from collections.abc import Callable, Collection, Sequence

from .elsewhere import ELSEWHERE

TOOL = "python -m mini_llava.tools."  # in front of a tool's name, with which its errors begin


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one sentence.

    Attributes:
        of_tool: flags that a tool has taken from the line before; one that is mistyped is named, too.
    """

    of_tool: Collection[str] = ()

    def error(self, message: str) -> typing.NoReturn:
        """End the program with one sentence, which the usage of a hundred flags would hide."""
        if os.environ.get("RANK", "0").strip("0"):
            time.sleep(5)  # rank 0 says the same, and the launcher then ends this process
        self.exit(2, f"{self.prog.removeprefix(TOOL)}: error: {message}\n")

    def parse_args(self, args=None, namespace=None):
        required = [action for action in self._actions if action.required]
        for action in required:
            action.required = False  # for now: a mistyped flag comes before the required one that it was to be
        _, unknown = self.parse_known_args(args)
        if unknown:
            flags = {flag.lstrip("-") for action in self._actions for flag in action.option_strings}
            name = unknown[0].split("=")[0]
            if not name.startswith("-"):
                self.error(f"{name!r} belongs to no flag.")
            shown_by = "--help_all" if "help_all" in flags else "--help"
            self.error(unknown_flag(name.lstrip("-"), flags.union(self.of_tool), shown_by))
        for action in required:
            action.required = True
        return self.parse_known_args(args, namespace)[0]


class HelpFormatter(argparse.HelpFormatter):
    """argparse's, with room for long flags, and lines that one can read on a wide terminal."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=min(shutil.get_terminal_size().columns, 120) - 2)


class ShowHelp(argparse.Action):
    """Print the help of a parser, which is built when it is asked for, and end the program."""

    def __init__(self, option_strings, dest, build: Callable[[], argparse.ArgumentParser], help=None):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)
        self.build = build

    def __call__(self, parser, namespace, values, option_string=None) -> typing.NoReturn:
        self.build().print_help()
        parser.exit()


def add_flags(parser: argparse.ArgumentParser, part: type, presets: tuple[dict, dict] = ({}, {})) -> None:
    """Add a flag for each field of a dataclass to a parser, in a group of their own; one not given is not set.

    presets: of the two stages, flag name to value, which are shown as defaults.
    """
    group, texts, hints = parser.add_argument_group(part.__doc__), field_texts(part), typing.get_type_hints(part)
    for f in dataclasses.fields(part):
        _add_flag(group, f, hints[f.name], texts[f.name], presets)


def add_common_flags(
    parser: argparse.ArgumentParser, parts: Sequence[type], presets: tuple[dict, dict], groups: dict[str, Sequence[str]]
) -> None:
    """Add flags in groups, title to names, each with the first sentence of its text, for a short help.

    parts: the dataclasses whose fields they are.
    """
    fields = {f.name: (f, part) for part in parts for f in dataclasses.fields(part)}
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        for f, part in map(fields.get, names):
            text, stop, _ = field_texts(part)[f.name].partition(". ")
            _add_flag(group, f, typing.get_type_hints(part)[f.name], text + stop.rstrip(), presets)


def _add_flag(group, f: dataclasses.Field, hint, text: str, presets: tuple[dict, dict]) -> None:
    first, second = (preset.get(f.name, f.default) for preset in presets)
    default = f" [stage 1: {first}, stage 2: {second}]" if first != second else f" [{first}]"
    if not {first, second} - {None, ""}:
        default = ""
    kind = _argparse_kind(hint)
    kind["metavar"] = f.metadata.get("metavar", kind["metavar"])
    help_text = (text + default).replace("%", "%%")
    group.add_argument(f"--{f.name}", **kind, default=argparse.SUPPRESS, help=help_text)


def _argparse_kind(hint) -> dict:
    kind = plain(hint)
    if kind is bool:
        return {"type": boolean, "nargs": "?", "const": True, "metavar": "True|False"}
    if typing.get_origin(kind) is list:
        return {"type": typing.get_args(kind)[0], "nargs": "+", "metavar": "PATH"}
    return {"type": kind, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}


def boolean(text: str) -> bool:
    """Return what a flag's value says; for argparse."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not True or False")


def plain(hint):
    """Return the type of a field that may be None: `int` of `int | None`."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def convert(kind, value):
    """Return a YAML value as the field's type, or raise ValueError.

    A number written as text counts as a number: `1e-3` is text in YAML.
    """
    if value is None:
        return None
    if typing.get_origin(kind) is list:
        items = value if isinstance(value, list) else [value]
        if None in items:
            raise ValueError
        return [convert(typing.get_args(kind)[0], item) for item in items]
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError
        return value
    if kind is str:
        if isinstance(value, bool):  # YAML reads a bare `no` as False
            return "no" if value is False else "yes"
        return str(value)
    if isinstance(value, bool):
        raise ValueError
    if kind is int and float(value) != int(float(value)):
        raise ValueError
    return kind(float(value))


def describe(kind) -> str:
    """Return what a value of this type is, for a sentence."""
    known = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
    return known.get(kind, "a list of numbers" if kind == list[float] else "a list of texts")


def unknown_flag(name: str, known, shown_by: str = "--help_all") -> str:
    """Return what is done instead of a flag that is none of the known ones, or which of these is like it.

    shown_by: the flag that shows the known ones.
    """
    if name in ELSEWHERE:
        return f"--{name} is not a flag here: {ELSEWHERE[name]}"
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown flag --{name}" + (f", did you mean --{close[0]}?" if close else f"; see {shown_by}.")


@functools.cache
def field_texts(kind) -> dict[str, str]:
    """Return the text under each field of a dataclass, read from the source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    body = tree.body[0].body
    return {
        statement.target.id: " ".join(following.value.value.split())
        for statement, following in itertools.pairwise(body)
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr)
    }
