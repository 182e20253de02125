# SPDX-License-Identifier: Apache-2.0
"""Fuzzers of a tokenizer's files: whatever stands in one, what comes is what transformers reads, or one line."""

import copy
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import transformers

from rapid_jax.model import chat
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.prompts import frame
from rapid_jax.runtime.errors import InputError
from tests.model.test_tokenizer import byte_level_files, saved, sentencepiece_files
from tests.model.tokenizer_kinds import CHATML, unigram, word_level

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 7, 0.5, 2.0, 10**12, 10**30, "", "x", "</s>", "\n", [], {}, ["x"], [None], [2, None]),
    *({"content": "x"}, {"default": "x"}, [["x", "y"]], "x" * 1000, [[[[[[]]]]]]),
)
TEXT = "the cat</s> na\u00efve 12\n<|im_end|>"
SECONDS = 10.0  # for one case, on a busy machine


def everything(name: str = "") -> dict[str, bytes]:
    """Files in which every part that is read has a value; some are read only where tokenizer_config.json says less."""
    files = byte_level_files(
        chat_template=[{"name": "default", "template": CHATML}],
        pad_token={"content": "</s>", "special": True, "__type": "AddedToken"},
        added_tokens_decoder={"1": {"content": "</s>", "special": True, "normalized": False, "lstrip": False}},
        extra_special_tokens=["<s>"],
    )
    if name in ("special_tokens_map.json", "added_tokens.json"):
        settings = json.loads(files["tokenizer_config.json"])
        del settings["added_tokens_decoder"]
        files["tokenizer_config.json"] = json.dumps(settings).encode()
    return files | {
        "special_tokens_map.json": b'{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}}',
        "added_tokens.json": b'{"<s>": 0, "</s>": 1}',
        "generation_config.json": b'{"eos_token_id": [1, 3], "bos_token_id": 0, "temperature": 0.5}',
        "chat_template.json": b'{"chat_template": null}',
    }


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where a value stands in JSON; of long lists and objects the first few."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for _, (key, inner) in zip(range(8), items, strict=False):
        yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple, new: Any) -> Any:
    value = copy.deepcopy(value)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = new
    return value


def used(files: dict[str, bytes]) -> tuple[list[int], list[int]]:
    """What a tokenizer is for: (a text's ids, a prompt's); all else that is done with it must not fail either."""
    begun = time.monotonic()
    try:
        tokenizer = Tokenizer(files, 1)
        ids = tokenizer.encode(TEXT)
        prompt = frame(tokenizer, "Read {document} {question}", TEXT, None).around(TEXT)
        quoted = tokenizer.encode_quoted(TEXT)
        assert not set(tokenizer.stop_ids) & set(quoted)
        assert tokenizer.counts([TEXT]) == [len(quoted)] == [len(tokenizer.spans(TEXT))]
        stream = tokenizer.stream()
        assert stream.push(quoted) + stream.finish() == tokenizer.decode(quoted)
        assert tokenizer.fingerprint and tokenizer.vocab_size
        return ids, prompt.tokens
    finally:
        assert time.monotonic() - begun < SECONDS


def refused(files: dict[str, bytes]) -> bool:
    """Whether the files are refused; anything but an answer or one line fails."""
    try:
        used(files)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, error
        return True
    return False


def agrees(files: dict[str, bytes], folder) -> bool:
    """Whether transformers reads the same folder so: a text's ids, and a prompt's but for the first token."""
    folder.mkdir()
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(saved(files, folder))
        expected = theirs(TEXT, add_special_tokens=False, truncation=False).input_ids
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return True  # it refuses what is read here
    return Tokenizer(files, 1).encode(TEXT) == list(expected)


NAMES = sorted(everything())


@pytest.mark.parametrize("name", NAMES)
def test_any_value_anywhere_is_an_answer_or_one_line(name, request, tmp_path):
    files, rng = everything(name), random.Random(name)
    plain = used(files)
    value = json.loads(files[name])
    cases = [(path, new) for path in places(value) for new in VALUES]
    rng.shuffle(cases)
    outcomes = {"refused": 0, "the same": 0, "as transformers": 0}
    for number, (path, new) in enumerate(cases[: 120 * request.config.getoption("--fuzz")]):
        changed = files | {name: json.dumps(replaced(value, path, new)).encode()}
        if refused(changed):
            outcomes["refused"] += 1
        elif used(changed) == plain:
            outcomes["the same"] += 1
        else:
            assert agrees(changed, tmp_path / str(number)), (path, new)
            outcomes["as transformers"] += 1
    assert outcomes["refused"] and outcomes["the same"], (name, outcomes)


@pytest.mark.parametrize("files", [sentencepiece_files(), unigram(), word_level()], ids=["bpe", "unigram", "words"])
def test_any_value_in_other_kinds_of_tokenizer_json_is_an_answer_or_one_line(files, request):
    value = json.loads(files["tokenizer.json"])
    cases = [(path, new) for path in places(value) for new in VALUES]
    random.Random(0).shuffle(cases)
    for path, new in cases[: 120 * request.config.getoption("--fuzz")]:
        refused(files | {"tokenizer.json": json.dumps(replaced(value, path, new)).encode()})


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_one_line(name, request):
    files, rng = everything(name), random.Random(name)
    deep = b"[" * 100_000
    whole = [b"", b"null", b"[]", b'"x"', b"{", deep, b'{"a":' * 200 + b"1" + b"}" * 200, b"\xff\xfe", b"1" * 5000]
    for data in whole:
        assert refused(files | {name: data}), data[:20]
    for _ in range(30 * request.config.getoption("--fuzz")):
        data = bytearray(files[name])
        data[rng.randrange(len(data))] = rng.randrange(256)
        refused(files | {name: bytes(data)})


@pytest.mark.parametrize("steps", [1, 40])
def test_replacements_that_swell_a_text_are_one_line(steps):
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * (5000 if steps == 1 else 2)}
    settings = json.loads(sentencepiece_files()["tokenizer.json"])
    swelling = {"type": "Sequence", "normalizers": [step] * steps}
    for part in ({"normalizer": swelling}, {"decoder": {"type": "Sequence", "decoders": [step] * steps}}):
        with pytest.raises(InputError, match="its replacements may make a text"):
            Tokenizer({"tokenizer.json": json.dumps(settings | part).encode()})


@pytest.mark.parametrize("pattern", ["(a+)+$", "(?:1|1?)+x", "( +)+$", "(a*)*b|(a+)+c$"])
def test_a_pattern_that_tries_without_end_is_one_line(pattern):
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    settings = json.loads(byte_level_files()["tokenizer.json"]) | {"pre_tokenizer": cut}
    files = {"tokenizer.json": json.dumps(settings).encode()}
    begun = time.monotonic()
    if not refused(files):
        Tokenizer(files).encode_quoted("a" * 5000 + "1" * 5000 + " " * 5000)
    assert time.monotonic() - begun < SECONDS


HANG = "{% for a in range(99999) %}{% for b in range(99999) %}X{% endfor %}{% endfor %}"
GROW = "{% set n = namespace(x=START) %}{% for i in range(99) %}{% set n.x = NEXT %}{% endfor %}{{ n.x }}"
GROWING = [
    ("'ab'", "n.x + n.x"),
    ("'ab'", "n.x ~ n.x"),
    ("'ab'", "n.x * 9"),
    ("[1]", "n.x + n.x"),
    ("[1]", "[n.x, n.x]"),
    ("9", "n.x * n.x"),
    ("'ab'", "n.x.replace('a', 'aaaaaaaaa')"),
    ("'ab'", "n.x.join([n.x, n.x, n.x])"),
    ("'ab'", "[n.x, n.x] | join(n.x)"),
    ("'ab'", "n.x | indent(99999, true)"),
    ("{}", "{'a': n.x, 'b': n.x}"),
]
ALONE = """
'a' * 10**9 | [0] * 10**9 | 10 ** 10 ** 9 | 9 ** 9 ** 9 | '%999999999d' % 1 | '{:>999999999}'.format(1)
'a'.center(10**9) | 'a'.ljust(10**9) | 'a'.zfill(10**9) | '\\t'.expandtabs(10**9)
('a' * 10**8).replace('a', 'bb' * 99) | 'a'|center(10**9) | 'a'|indent(10**9) | 'a'|wordwrap(0)
messages|tojson(indent=10**9) | lipsum(10**9) | range(10**9) | range(99999)|batch(10**9, 'x')|list
range(99999)|slice(10**9)|list | 1|round(10**9) | 'a'.join(range(99999)|map('string')) | x.y | x + 1 | x[0]
messages[9].role | messages|sum | tools|length | tools.x.y | 1 // 0 | 1 % 0 | 'a' + 1 | -'a' | none()
messages() | messages|first|attr('pop') | messages.append(1) | messages.__class__.__mro__ | ''.__class__
cycler.__init__.__globals__ | self._TemplateReference__context | raise_exception(messages) | raise_exception()
strftime_now('%' * 9999) | strftime_now(none) | messages|map('nothing')|list | 'a'|nothing | 'a' is nothing
undefined_function() | '(a+)+b'|urlize | ('a ' * 10**6)|urlize | ('<' * 10**6)|striptags | dict(**messages)
namespace(messages) | joiner(1)(2) | range(99999)|map('string')|map('center', 9999)|join
range(99999)|map('center', 9999)|list|string
"""
BLOCKS = [
    HANG,
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for a in [[1]] recursive %}{{ loop([a]) }}{% endfor %}",
    "{% for a in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "{% set a %}{{ 'a' * 10**7 }}{% endset %}{{ a * 99 }}",
    "{% call nothing() %}x{% endcall %}",
    "{% filter nothing %}x{% endfilter %}",
    "{% include 'x' %}",
    "{% include messages[0].content %}",
    "{% extends 'x' %}",
    "{% import 'x' as x %}",
    "{% from 'x' import y %}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% block a %}{% endblock %}{% block a %}{% endblock %}",
    "{% break %}",
    "{% continue %}",
    "{% for a in 5 %}{% endfor %}",
    "{% for a, b in messages[0].content %}{% endfor %}",
    "{% set loop = 1 %}{% for a in [1] %}{% set loop = 2 %}{% endfor %}",
    "{% set messages.x = 1 %}",
    "{% autoescape true %}{{ messages }}{% endautoescape %}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% if %}",
    "{{",
    "{%",
    "{#",
    "{{ " + "(" * 20000,
    "{{ " + "[" * 500 + "]" * 500 + " }}",
    "{{ " + "-" * 5000 + "1 }}",
    "{{ " + "1 + " * 5000 + "1 }}",
    "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "{{ 1" + "0" * 5000 + " }}",
    "{{ '\ud7ff\U0010ffff\0' }}",
]
TEMPLATES = [
    *(f"{{{{ {one.strip()} }}}}" for line in ALONE.strip().splitlines() for one in line.split(" | ")),
    *(GROW.replace("START", start).replace("NEXT", step) for start, step in GROWING),
    *BLOCKS,
]


def test_a_hostile_template_is_rendered_or_one_line_in_time(monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.1)
    files, outcomes = everything(), {"refused": 0, "rendered": 0}
    del files["chat_template.json"]
    for source in TEMPLATES:
        begun = time.monotonic()
        tokenizer = Tokenizer(files | {"chat_template.jinja": source.encode()})
        try:
            assert len(tokenizer.chat([{"role": "user", "content": "the cat"}])) <= 2**24
            outcomes["rendered"] += 1
        except InputError as error:
            assert str(error).isprintable() and len(str(error)) < 1000, source
            outcomes["refused"] += 1
        assert time.monotonic() - begun < SECONDS, source[:100]
    assert min(outcomes.values()) >= 10, outcomes
