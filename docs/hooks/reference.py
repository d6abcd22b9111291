"""A MkDocs hook: the pages that are made from the code and from files beside docs/.

- index, contributing, changelog: README.md, CONTRIBUTING.md and CHANGELOG.md
- settings: the dataclasses of ``engine/*settings.py`` with the docstrings of their fields
- commands: the parsers of the ``ssast`` command

They are made anew by each build, so none can go stale.
"""

import argparse
import ast
import dataclasses
import html
import inspect
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from ssast.engine import config, finetune_settings, objective_settings, settings
from ssast.engine.cli import main as cli

ROOT = Path(__file__).parents[2]
FROM_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
FROM_ROOT["CHANGELOG.md"] = "changelog.md"
MODULES = (settings, objective_settings, finetune_settings)
LINK = re.compile(r"(?<=\]\()(?:docs/)?([^)#:\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those that are in docs/."""
    pages = {page: from_root(name) for name, page in FROM_ROOT.items()}
    pages |= {"settings.md": settings_page(), "commands.md": commands_page()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def from_root(name: str) -> str:
    """Return a page of the root, with its links as they are from within docs/."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return LINK.sub(lambda m: FROM_ROOT.get(m[1], m[1]), text)


# Settings.

SETTINGS_INTRO = """# Settings

Every key of a configuration, with its default. A key is set in a YAML file or as an argument of the
form `section.key=value`; arguments take precedence over the file. An unknown key, a wrong type
and a value out of range are errors that name the key and what is allowed.

This page is generated from `engine/settings.py`, `engine/objective_settings.py` and
`engine/finetune_settings.py`.
"""


def settings_page() -> str:
    """Return the reference of all settings, section by section."""
    docs: dict[tuple[str, str], str] = {}
    for module in MODULES:
        docs |= field_docs(inspect.getsource(module))
    sections = config.sections().items()
    return "\n".join([SETTINGS_INTRO, *(_section(name, cls, docs) for name, cls in sections)])


def field_docs(source: str) -> dict[tuple[str, str], str]:
    """Return the docstrings below the fields of a module's classes, by class and field."""
    docs = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            for field, after in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and isinstance(after, ast.Expr)
                    and isinstance(after.value, ast.Constant)
                ):
                    docs[node.name, field.target.id] = inspect.cleandoc(str(after.value.value))
    return docs


def _section(name: str, cls: Any, docs: Mapping[tuple[str, str], str]) -> str:
    hints = typing.get_type_hints(cls)
    lines = [f"## {name}", inspect.getdoc(cls) or ""]
    for field in dataclasses.fields(cls):
        key = f"{name}.{field.name}"
        doc = docs.get((cls.__name__, field.name), "")
        facts = f"{_kind(hints[field.name])}{_range(field)}, default {_default(field)}"
        meaning = f"  \n    {' '.join(doc.split())}" if doc else ""
        lines.append(f"`{key}`{{ #{key} }}\n:   *{facts}*{meaning}")
    return "\n\n".join(lines) + "\n"


def _kind(hint: Any) -> str:
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    args = typing.get_args(hint)
    if hint in names:
        return names[hint]
    if typing.get_origin(hint) is Literal:
        return " or ".join(f"`{str(a).lower() if isinstance(a, bool) else a}`" for a in args)
    if isinstance(hint, types.UnionType):
        return " or ".join(_kind(a) for a in args if a is not type(None)) + " or null"
    if typing.get_origin(hint) is tuple and args[-1] is Ellipsis:
        return f"list of {_kind(args[0])}"
    if typing.get_origin(hint) is tuple:
        return f"list of {len(args)} {_kind(args[0])}s"
    if typing.get_origin(hint) is Mapping:
        return f"mapping of names to {_kind(args[1])}s"
    raise TypeError(f"no words for the type {hint}")


def _range(field: "dataclasses.Field[Any]") -> str:
    low, high = (field.metadata.get(key, math.nan) for key in ("low", "high"))
    bounds = [f"at least {low:g}"] if math.isfinite(low) else []
    bounds += [f"at most {high:g}"] if math.isfinite(high) else []
    return ", " + " and ".join(bounds) if bounds else ""


def _default(field: "dataclasses.Field[Any]") -> str:
    value = field.default
    if isinstance(value, tuple):
        value = list(value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`".replace("None", "null")


# Commands.

COMMANDS_INTRO = """# Commands

What `ssast --help` and `ssast COMMAND --help` print, for every command. This page is generated from
the parsers.
"""
PLAIN_GROUPS = ("positional arguments", "options")


def commands_page() -> str:
    """Return the reference of all commands."""
    parser = cli.build_parser()
    parts = [COMMANDS_INTRO]
    for command, helped in subcommands(parser):
        parts.append(_command(command, helped))
    parts.append(f"## Exit status\n\n```text\n{_epilog(cli.EXIT_STATUS)}\n```\n")
    return "\n".join(parts)


def subcommands(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """Yield each command below a parser, depth first, with its one line of help."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, command in action.choices.items():
                yield command, helps.get(name, "")
                yield from subcommands(command)


def _command(parser: argparse.ArgumentParser, helped: str) -> str:
    level = "##" if parser.prog.count(" ") == 1 else "###"
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split()).replace(" [-h]", "")
    text = _plain(inspect.cleandoc(parser.description or helped))
    lines = [f"{level} {parser.prog}", text[:1].upper() + text[1:].rstrip(".") + "."]
    if not any(isinstance(a, argparse._SubParsersAction) for a in parser._actions):
        lines.append(f"```{{ .text .usage }}\n{usage}\n```")
    for group in parser._action_groups:
        shown = [_argument(a) for a in group._group_actions if _is_shown(a)]
        if shown and group.title not in PLAIN_GROUPS:
            lines.append(f"*{_plain(group.title or '')}*")
        lines += shown
    if parser.prog == "ssast bench":
        lines += [f"`{n}`\n:   {_bench_help(module)}" for n, module in cli.BENCHMARKS.items()]
    if parser.epilog:
        lines.append(f"```text\n{_epilog(parser.epilog)}\n```")
    return "\n\n".join(lines) + "\n"


def _is_shown(action: argparse.Action) -> bool:
    hidden = (argparse._HelpAction, argparse._SubParsersAction)
    return action.help != argparse.SUPPRESS and not isinstance(action, hidden)


def _argument(action: argparse.Action) -> str:
    values = action.metavar or (action.choices and "{" + ",".join(map(str, action.choices)) + "}")
    values = " ".join(values) if isinstance(values, tuple) else str(values or action.dest.upper())
    takes = "" if action.nargs == 0 else f" {values}"
    names = ", ".join(f"{o}{takes}" for o in action.option_strings) or values
    return f"`{names}`\n:   {_plain(action.help or '') or '&nbsp;'}"


def _plain(text: str) -> str:
    """Return a help text so that Markdown shows it as it is."""
    return re.sub(r"([\\`*_\[\]])", r"\\\1", html.escape(text.replace("%%", "%"), quote=False))


def _epilog(text: str) -> str:
    return inspect.cleandoc(text).strip()


def _bench_help(module: str) -> str:
    """Return the first line of a benchmark's docstring, without importing its libraries."""
    path = ROOT / "benchmarks" / (module.replace(".", "/") + ".py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
