# SPDX-License-Identifier: Apache-2.0
"""The pages for people: what they link, name and tell the reader to type is there, in the code as it is now."""

import argparse
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import longpo_jax.cli
import rapid_jax.cli
from longpo_jax.config import LongPOConfig
from rapid_jax.config import RapidConfig
from rapid_jax.runtime import settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [page for page in sorted(ROOT.rglob("*.md")) if not page.relative_to(ROOT).parts[0].startswith(".")]
SOURCES = [ROOT / folder for folder in ("", "rapid_jax", "longpo_jax")]
PARSERS = {"rapid": rapid_jax.cli.parser(), "longpo": longpo_jax.cli.parser()}
SETTINGS = {name for cls in (RapidConfig, LongPOConfig) for name in settings.flat(cls())}
SECTIONS = {name.partition(".")[0] for name in SETTINGS if "." in name}
FILE_NAME = re.compile(r"\w+\.(py|yaml|md|json|jsonl|html|png)\b")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def spans(page: Path) -> list[str]:
    """What stands between backticks, each on one line."""
    prose = re.sub(r"^ *```.*?^ *```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command of this project that the page has."""
    fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text_of(page), re.MULTILINE | re.DOTALL)
    blocks = [block.replace("\\\n", " ") for language, block in fenced if language in ("", "bash")]
    for line in [*(line for block in blocks for line in block.splitlines()), *spans(page)]:
        if found := re.search(r"(?:^|-- )((?:rapid|longpo) \w.*|python -m tests\..*|(?:bash|python) launch/.*)", line):
            yield shlex.split(found[1], comments=True)


def subparser(parser: argparse.ArgumentParser, words: list[str]) -> argparse.ArgumentParser:
    """That of the subcommand that the words begin with; a KeyError if there is none."""
    choices = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return subparser(choices[0].choices[words[0]], words[1:]) if choices and words else parser


@each_page
def test_what_a_page_links_is_there(page: Path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text_of(page))
    assert [link for link in links if not (page.parent / link).exists()] == []


@each_page
def test_a_file_that_a_page_names_is_there_and_has_the_name_behind_it(page: Path):
    missing = []
    for span in spans(page):
        found = re.fullmatch(r"((?:\w[\w.-]*/)*[\w-]+\.(?:py|sh))(?:: (.+))?", span)
        if not found:
            continue
        files = [base / found[1] for base in (page.parent, *SOURCES) if (base / found[1]).is_file()]
        files = files or [file for base in ("rapid_jax", "longpo_jax") for file in (ROOT / base).rglob(found[1])]
        names = re.findall(r"\w+", found[2] or "")
        if not any(all(re.search(rf"\b{name}\b", text_of(file)) for name in names) for file in files):
            missing.append(span)
    assert missing == []


@each_page
def test_a_command_that_a_page_tells_has_its_options_and_files(page: Path):
    wrong = []
    for words in commands(page):
        if words[0] == "python" and words[1] == "-m":
            known = importlib.util.find_spec(words[2]) or words[2].endswith(".NAME")
        elif words[0] in ("python", "bash"):
            known = (ROOT / words[1]).is_file()
        else:
            options = {word.partition("=")[0] for word in words if word.startswith("--")}
            known = options <= set(subparser(PARSERS[words[0]], words[1:])._option_string_actions)
        files = [word for word in words if word.startswith(("configs/", "tests/")) and "NAME" not in word]
        if not known or not all((ROOT / file).exists() for file in files):
            wrong.append(words)
    assert wrong == []


@each_page
def test_a_setting_that_a_page_names_is_one(page: Path):
    given = [word for words in commands(page) for word in words if re.match(r"[a-z_]+\.[a-z_]+=", word)]
    named = [span for span in spans(page) if re.match(r"[a-z_]+\.[a-z_]+\b", span) and not FILE_NAME.match(span)]
    words = [re.split(r"[=: ]", word)[0] for word in [*given, *named]]
    assert [w for w in words if w.partition(".")[0] in SECTIONS and w not in SETTINGS] == []


def test_the_index_has_every_settings_file():
    index = text_of(ROOT / "configs" / "README.md")
    files = [file.relative_to(ROOT / "configs").as_posix() for file in (ROOT / "configs").glob("*/*.yaml")]
    assert [file for file in files if file not in index] == []


def test_the_readme_opens_with_the_two_commands():
    first = re.findall(r"^```\n(.*?)^```", text_of(ROOT / "README.md"), re.MULTILINE | re.DOTALL)[0]
    assert [line.split("#")[0].split() for line in first.splitlines()] == [
        ["bash", "launch/quickstart.sh"],
        ["bash", "launch/test.sh"],
    ]
