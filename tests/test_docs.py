"""The README and the pages of the site: what they show is what the program understands."""

import argparse
import ast
import dataclasses
import importlib
import inspect
import re
import shlex

import pytest
import reference
import roles
from paths import ROOT

from ssast.benchmarks.faults.plan import KINDS
from ssast.engine import settings
from ssast.engine.cli import main as cli
from ssast.engine.config import CONFIGS, load_config, sections
from ssast.engine.errors import ConfigError
from ssast.engine.monitoring import monitor

README = ROOT / "README.md"
FAULTS = ROOT / "docs/faults.md"
WRITTEN = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*WRITTEN, *sorted((ROOT / "checkpoints").glob("*/README.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))

BLOCK = re.compile(r"^```(\w*)\n((?:.*\n)*?)```$|((?:^(?: {4}.*)?\n)+)", re.M)
CODE = re.compile(r"`([^`\n]+)`")
STARTS = ("ssast ", ".venv/bin/ssast ", "torchrun ", "make ", "pip install ")
SECTIONS = "|".join(sections())
KEY = re.compile(rf"^({SECTIONS})\.([a-z_]+)(?:=(.*))?$")
ENDINGS = ("json", "csv", "py", "yaml")  # of files that are named like a section
PATTERN = re.compile(r"\b(?:COMMAND|CONFIG|WHAT|CKPT)\b")  # in place of what a user names
FOLDERS = "engine|kernels|pipelines|benchmarks|configs|examples|tests"
PATH = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)`|\b((?:{FOLDERS})/[\w/-]+\.(?:py|yaml|sh))\b")


def blocks(text):
    """(language, code) of the fenced blocks of a page and of its indented ones."""
    for match in BLOCK.finditer(text):
        if match[3] is None:
            yield match[1], match[2]
        elif match[3].strip():
            yield "", re.sub("^ {4}", "", match[3], flags=re.M)


def commands(text):
    """The command lines in the blocks of a page."""
    lines = [line for language, code in blocks(text) if not language for line in code.splitlines()]
    return [line for line in lines if line.startswith(STARTS)]


def mentions(text):
    """Commands in running text, which may be without their arguments."""
    return [code for code in CODE.findall(BLOCK.sub("\n", text)) if code.startswith(STARTS)]


class Parsed(Exception):
    """A benchmark has read its arguments."""


def check_ssast(words, monkeypatch):
    """Read the words after ``ssast`` as the program does; its configuration must exist."""
    options, rest = cli.build_parser().parse_known_args(words)
    assert all("=" in word for word in rest), f"not understood: {rest}"
    if hasattr(options, "config"):
        known = (CONFIGS / f"{options.config}.yaml").is_file()
        assert known or re.search(r"[./]", options.config), f"no recipe {options.config}"
        named = options.config if known else "base_patch"
        config = load_config(named, [*options.overrides, *rest])
        if known and words[0] in ("pretrain", "finetune"):
            assert (config.finetune is None) == (words[0] == "pretrain"), "a recipe of another kind"
    if hasattr(options, "what"):
        parse = argparse.ArgumentParser.parse_args

        def parse_only(*arguments):
            parse(*arguments)
            raise Parsed

        module = importlib.import_module(f"ssast.benchmarks.{cli.BENCHMARKS[options.what]}")
        with monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
            module.main(options.arguments)


def check_command(line, monkeypatch):
    """A command line of a page: ``ssast``, a launcher of it, ``make`` or ``pip install``."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), f"no target {words[1]}"
    elif words[0] == "pip":
        named = re.findall(r"(?:\.|ssast-engine)\[(\w+)\]", " ".join(words))
        setup = (ROOT / "setup.py").read_text()
        assert all(f'"{extra}": [' in setup for extra in named)
    else:
        first = words.index("-m") + 1 if words[0] == "torchrun" else 0
        assert words[first] in ("ssast", ".venv/bin/ssast", "ssast.engine.cli")
        check_ssast(words[first + 1 :], monkeypatch)


def check_mention(line, monkeypatch):
    """As :func:`check_command`, but arguments may be missing: options must still exist."""
    messages = []

    def error(parser, message):
        messages.append(message)
        options = [word for word in shlex.split(line) if word.startswith("-")]
        assert set(options) <= set(parser._option_string_actions), f"{parser.prog} {options}"
        raise SystemExit(2)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "error", error)
        try:
            check_command(line, monkeypatch)
        except SystemExit:
            assert re.search("arguments are required|expected one argument", messages[-1]), messages


def test_the_readme_is_short():
    assert len(README.read_bytes()) < 8 * 1024


def test_the_readme_names_the_two_commands():
    named = [line.split("#")[0].split() for line in commands(README.read_text())]
    assert ["make", "demo"] in named and ["make", "test"] in named


@every_page
def test_commands_are_understood(page, monkeypatch):
    text = page.read_text(encoding="utf-8")
    for check, lines in ((check_command, commands(text)), (check_mention, mentions(text))):
        for line in lines:
            if not PATTERN.search(line):
                try:
                    check(line, monkeypatch)
                except (SystemExit, ConfigError, AssertionError) as error:
                    pytest.fail(f"{line}\n{error}")


@pytest.mark.parametrize("check", [check_command, check_mention])
@pytest.mark.parametrize(
    "line",
    [
        "ssast pretrian demo",
        "ssast pretrain no_such_recipe",
        "ssast finetune base_patch data.train=train.json",
        "ssast pretrain demo train.stepz=5",
        "ssast plan base_patch --gqus 4",
        "ssast bench step --no-such-option",
        "ssast evaluate --no-such-option",
        "make coffee",
        'pip install ".[nothing]"',
    ],
)
def test_wrong_commands_are_found(check, line, monkeypatch):
    with pytest.raises((SystemExit, ConfigError, AssertionError)):
        check(line, monkeypatch)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_blocks_import_what_there_is(page):
    for language, code in blocks(page.read_text(encoding="utf-8")):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), code


@pytest.mark.parametrize("page", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_settings_and_files_exist(page):
    text = page.read_text(encoding="utf-8")
    keys = known_keys()
    for code in CODE.findall(text):
        if match := KEY.match(code):
            assert f"{match[1]}.{match[2]}" in keys or match[2] in ENDINGS, code
    for paths in PATH.findall(text):
        assert (ROOT / (paths[0] or paths[1])).exists(), paths


def known_keys():
    """Every key of a configuration, those of fine-tuning among them."""
    return {f"{name}.{f.name}" for name, cls in sections().items() for f in dataclasses.fields(cls)}


@pytest.mark.parametrize("page", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_metrics_are_those_that_are_logged(page):
    known = set(re.findall(r"\b(?:train|valid|perf)/\w+", monitor.__doc__))
    assert len(known) > 10
    named = re.findall(r"`((?:train|valid|perf)/\w+)`", page.read_text(encoding="utf-8"))
    assert set(named) <= known


def test_every_recipe_is_in_a_table():
    pages = [(ROOT / "docs" / f"{name}.md").read_text() for name in ("pretraining", "finetuning")]
    tables = re.findall(r"^\| Recipe \|.*\n((?:\|.*\n)+)", "\n".join(pages), re.M)
    rows = "".join(tables).splitlines()
    named = {code for row in rows if "`" in row for code in CODE.findall(row.split("|")[1])}
    recipes = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert named <= recipes
    # Of a published data set, the patch model stands for both.
    assert {name for name in recipes if not name.endswith("_frame")} <= named


def test_files_in_the_picture_exist():
    picture = (ROOT / "docs" / "architecture" / "step.svg").read_text(encoding="utf-8")
    paths = [plain for _, plain in PATH.findall(picture)]
    assert len(paths) > 5 and all((ROOT / path).exists() for path in paths)


def test_every_setting_is_on_the_settings_page():
    page = reference.settings_page()
    assert set(re.findall(r"\{ #(\S+) \}", page)) == known_keys()
    assert "`1`, default" not in page
    assert "*integer, at least 1, default `800000`*  \n    Total number of optimizer steps;" in page


@pytest.mark.parametrize("module", reference.MODULES, ids=lambda module: module.__name__)
def test_every_setting_is_described(module):
    docs = reference.field_docs(inspect.getsource(module))
    named = {cls for cls in vars(module).values() if dataclasses.is_dataclass(cls)}
    named.discard(settings.Size)  # not a section
    for cls in named:
        missing = [f.name for f in dataclasses.fields(cls) if (cls.__name__, f.name) not in docs]
        assert not missing, cls


def test_every_command_and_option_is_on_the_commands_page():
    page = reference.commands_page()
    found = list(reference.subcommands(cli.build_parser()))
    assert len(found) > 15
    for parser, _ in found:
        assert re.search(rf"^##+ {parser.prog}$", page, re.M)
        for action in parser._actions:
            for option in action.option_strings:
                if option not in ("-h", "--help"):
                    assert f"`{option}" in page, f"{parser.prog} {option}"


def test_help_is_shown_as_it_is():
    assert "&lt;task&gt;\\_{train,eval}.json" in reference.commands_page()


def test_links_of_the_root_are_those_of_the_site():
    text = reference.from_root("README.md")
    assert "](data.md)" in text and "](contributing.md)" in text and "](docs/" not in text


def test_roles_become_code():
    text = "See :class:`~a.b.C` and :func:`d.e`, :meth:`f`; ``x``."
    assert roles.plain(text) == "See `C` and `d.e`, `f`; ``x``."


def test_each_fault_was_tried():
    """The last cell of a row names kinds of ``ssast bench faults``, or files of tests."""
    rows = [line.split(" | ") for line in FAULTS.read_text().splitlines() if line.startswith("|")]
    tried = [row[-1] for row in rows if len(row) == 6 and "Tried by" not in row[-1]]
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    named = [CODE.findall(cell) for cell in tried if not cell.startswith(":--")]
    assert len(named) >= 25
    assert all(names and set(names) <= KINDS.keys() | tests for names in named)
    assert {name for names in named for name in names} >= KINDS.keys()
