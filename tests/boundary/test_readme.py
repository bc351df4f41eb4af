"""What the pages tell a reader to type exists, and what they say is printed is printed."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = (
    "README.md",
    "parties/README.md",
    "enclave/README.md",
    "coordinator/README.md",
    "deploy/README.md",
    "deploy/RUNBOOK.md",
    "deploy/image/README.md",
)
MORE = ("protos/SPEC.md", "protos/THREATS.md", ".github/SECURITY.md", ".github/CONTRIBUTING.md")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PROMPT = re.compile(r"^[\w-]*\$ (.*)$")
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Lines that a reader is to type, continuation lines joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language in ("console", "shell"):
            return [match[1] for line in lines if (match := _PROMPT.match(line))]
        if self.language in ("", "sh", "bash"):
            return [line for line in lines if re.match(r"(parley|parley-coordinator|make|python3?) ", line)]
        return []


BLOCKS = [
    Block(page, language, text)
    for page in PAGES
    if (ROOT / page).exists()
    for language, text in _FENCE.findall((ROOT / page).read_text("utf-8"))
]
COMMANDS = sorted({(block.page, command) for block in BLOCKS for command in block.commands})


def _simple_commands(line: str) -> list[list[str]]:
    """The words of each command of a line, without comments, assignments, redirections and what follows them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("&|;"):
            found.append([])
        elif not (not found[-1] and re.match(r"[A-Z_]+=", word)):
            found[-1].append(word)
    return [
        words[: next((i for i, w in enumerate(words) if set(w) <= set("<>")), len(words))] for words in found if words
    ]


def _check_parley(words: list[str]) -> None:
    """Walks the command tree; each sub-command and each option must exist, and arguments must not be too many."""
    from parley.cli.app import build

    command: Any = typer.main.get_command(build())
    path = "parley"
    options = {option for parameter in command.params for option in parameter.opts}
    while words and hasattr(command, "resolve_command"):
        if words[0].startswith("-"):
            assert words[0].partition("=")[0] in options | {"--help", "-h"}, f"{path} has no option {words[0]}"
            words = words[1:]
            continue
        context = command.context_class(command, info_name=path)
        name, command, words = command.resolve_command(context, words)
        path = f"{path} {name}"
    known = {"--help", "-h"} | {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    for word in words:
        if word.startswith("-") and word != "-":
            assert word.partition("=")[0] in known, f"{path} has no option {word}"


def _check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for word in words:
        assert "=" in word or word in targets, f"make has no target {word}"


def _check_python(words: list[str]) -> None:
    if words[:1] == ["-m"]:
        if words[1] in ("venv", "pip", "pytest"):
            return
        assert importlib.util.find_spec(f"{words[1]}.__main__" if _is_package(words[1]) else words[1]), words[1]
    else:
        assert (ROOT / words[0]).exists(), words[0]


def _is_package(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.submodule_search_locations is not None


@pytest.mark.parametrize("page", PAGES)
def test_each_role_has_a_page(page: str) -> None:
    assert (ROOT / page).is_file()


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_exist(page: str, line: str) -> None:
    checked = 0
    for words in _simple_commands(line):
        program, *rest = words
        check = {"parley": _check_parley, "make": _check_make, "python": _check_python, "python3": _check_python}
        if program in check:
            check[program](rest)
            checked += 1
        elif program == "parley-coordinator":
            checked += 1
            _check_coordinator(rest)
    assert checked or words[0] in ("git", "cd", "pip", "ssh", "systemctl", "curl", "cat", "openssl"), f"{page}: {line}"


def _check_coordinator(words: list[str]) -> None:
    page, path = _output("parley-coordinator", "--help"), words[:0]
    for word in words:
        if word.startswith("-"):
            assert word.partition("=")[0] in page, f"parley-coordinator {' '.join(path)} has no option {word}"
        elif re.search(rf"^    {re.escape(word)}\b|[{{,]{re.escape(word)}[,}}]", page, re.MULTILINE):
            path = [*path, word]
            page += _output("parley-coordinator", *path, "--help")
    assert path or all(word.startswith("-") for word in words), f"parley-coordinator has no command {words[0]}"


def _output(program: str, *arguments: str) -> str:
    executable = Path(sys.executable).parent / program
    environment = {"PATH": "/usr/bin:/bin", "COLUMNS": "110", "TERM": "dumb", "NO_COLOR": "1"}
    run = subprocess.run([str(executable), *arguments], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


HELP = [
    (block.page, command.split(), block.text)
    for block in BLOCKS
    for command in block.commands
    if command.split()[-1] in ("--help", "-h") and command.split()[0] in ("parley", "parley-coordinator")
]


@pytest.mark.parametrize(("page", "words", "text"), HELP, ids=[" ".join(words) for _, words, _ in HELP])
def test_help_on_the_page_is_the_real_help(page: str, words: list[str], text: str) -> None:
    shown = text.split("$ " + " ".join(words) + "\n", 1)[1]
    shown = re.split(r"^[\w-]*\$ ", shown, maxsplit=1, flags=re.MULTILINE)[0]
    assert _lines(shown) == _lines(_output(*words)), page


def test_some_page_shows_the_help() -> None:
    assert ["parley", "--help"] in [words for _, words, _ in HELP]


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


PYTHON = [block for block in BLOCKS if block.language in ("python", "py")]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.page)
def test_python_on_the_page_uses_names_that_exist(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("parley"):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module} has no {name.name}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "parley":
            assert hasattr(importlib.import_module("parley"), node.attr), f"parley has no {node.attr}"


DATA = [block for block in BLOCKS if block.language in ("toml", "json")]


def test_data_on_the_pages_parses() -> None:
    for block in DATA:
        assert tomllib.loads(block.text) if block.language == "toml" else json.loads(block.text), block.page


@pytest.mark.parametrize("page", [*PAGES, *MORE])
def test_links_lead_somewhere(page: str) -> None:
    for target in _LINK.findall((ROOT / page).read_text("utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_the_pages_show_both_commands() -> None:
    lines = {line for page, line in COMMANDS if page == "README.md"}
    assert {"make demo", "make test"} <= lines
