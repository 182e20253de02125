# SPDX-License-Identifier: Apache-2.0
"""The trace page: every token by its origin, nothing unescaped, nothing loaded from elsewhere, whole or not at all."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from rapid_jax.config import RapidConfig
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.runtime.errors import InputError
from rapid_jax.trace import pieces, write_trace
from tests.test_answer import answer, reading
from tests.tiny_models import tokenizer_files

NAMES = ["lookup", "draft", "correction", "bonus"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_files(["the text and the question"]))


class Page(HTMLParser):
    """The spans of the answer as (class, title, text), the texts of the page, and every address in it."""

    def __init__(self, text: str):
        super().__init__()
        self.spans: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._depth = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if self._depth:
            self._depth += 1
        if ("class", "answer") in attrs:
            self._depth = 1
        elif self._depth == 2 and tag == "span":
            given = dict(attrs)
            self.spans.append([given["class"] or "", given["title"] or "", ""])
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._depth = max(self._depth - 1, 0)

    def handle_data(self, data):
        if self._depth >= 2:
            self.spans[-1][2] += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def traced(tmp_path, tokenizer, ids, origins, text, **changed) -> Page:
    path = tmp_path / "trace.html"
    given = answer(token_ids=ids, origins=origins, text=text, **changed)
    write_trace(path, given, tokenizer, "Why <b>&amp;</b>?", RapidConfig())
    return Page(path.read_text(encoding="utf-8"))


def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer):
    text = "the \u65e5\u672c\u8a9e \U0001f600!"
    ids = tokenizer.encode(text)
    found = pieces(ids, tokenizer)
    assert "".join(piece.text for piece in found) == text
    assert [token_id for piece in found for token_id in piece.token_ids] == ids
    assert [piece.first for piece in found] == [0, *(piece.last + 1 for piece in found[:-1])]
    smile = next(piece for piece in found if "\U0001f600" in piece.text)
    assert len(smile.token_ids) == 4 and len(found) < len(ids)


def test_special_tokens_and_a_character_cut_short_have_pieces_too(tokenizer):
    stop = tokenizer.id_of("<|im_end|>")
    first, *_ = tokenizer.encode("\U0001f600")
    assert [piece.text for piece in pieces([*tokenizer.encode("!"), stop], tokenizer)] == ["!", ""]
    assert [piece.text for piece in pieces([stop, first, stop], tokenizer)] == ["", "\N{REPLACEMENT CHARACTER}"]


def test_every_token_is_shown_with_its_origin(tmp_path, tokenizer):
    text = "the text & <script>alert(1)</script> \u65e5"
    ids = tokenizer.encode(text)
    stop = tokenizer.id_of("<|im_end|>")
    origins = [at % 4 for at in range(len(ids) + 1)]
    page = traced(tmp_path, tokenizer, [*ids, stop], origins, text)
    assert "".join(span[2] for span in page.spans[:-1]) == text
    assert page.spans[-1][2] == "<|im_end|>"
    told = [line for span in page.spans for line in span[1].splitlines()]
    assert told == [
        f"token {token_id}, position {at}, {NAMES[origins[at]]}" for at, token_id in enumerate([*ids, stop])
    ]
    for kind, title, _ in page.spans:
        assert title.splitlines()[-1].endswith(kind)
    counts = {row[0]: row[1] for row in page.rows if row[0] in NAMES}
    assert counts == {name: str(origins.count(at)) for at, name in enumerate(NAMES)}
    assert "script" not in [tag for tag, _ in page.tags]


def test_nothing_is_loaded_from_elsewhere(tmp_path, tokenizer):
    page = traced(tmp_path, tokenizer, tokenizer.encode("a"), [0], "a")
    assert not {"link", "img", "iframe", "script", "object"} & {tag for tag, _ in page.tags}
    assert not [attrs for _, attrs in page.tags if {"src", "href"} & attrs.keys()]
    style = re.search(r"<style>(.*?)</style>", (tmp_path / "trace.html").read_text(), re.DOTALL)
    assert style and "url(" not in style[1] and "@import" not in style[1]


def test_what_a_stop_text_cut_off_is_struck_through(tmp_path, tokenizer):
    page = traced(
        tmp_path, tokenizer, tokenizer.encode("the answer"), [3] * len(tokenizer.encode("the answer")), "the a"
    )
    assert "".join(span[2] for span in page.spans) == "the answer"
    cut = re.findall(r'<s class="cut">(.*?)</s>', (tmp_path / "trace.html").read_text())
    assert "".join(cut) == "nswer"


def test_question_chunks_times_and_settings_are_on_the_page(tmp_path, tokenizer):
    traced(tmp_path, tokenizer, tokenizer.encode("a"), [0], "a")
    text = (tmp_path / "trace.html").read_text()
    assert "Why &lt;b&gt;&amp;amp;&lt;/b&gt;?" in text and "<b>" not in text
    assert (
        "1 of 4 chunks" in text and "characters 3&ndash;9" in text and "0.500" in text and "<pre>chunk.</pre>" in text
    )
    assert "75%" in text and "2.0 tokens/s" in text and "1.5 s" in text
    assert "speculation:\n  mode: rapid" in text
    assert "prefers-color-scheme: dark" in text
    traced(tmp_path, tokenizer, tokenizer.encode("a"), [0], "a", reading=reading(None), mode="target")
    assert "mode target reads the document alone" in (tmp_path / "trace.html").read_text()


def contrast(first: str, second: str) -> float:
    """WCAG's ratio of the relative luminances of two colours written #rgb or #rrggbb."""

    def luminance(colour: str) -> float:
        digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted([luminance(first), luminance(second)])
    return (light + 0.05) / (dark + 0.05)


def test_text_is_readable_in_light_and_dark(tmp_path, tokenizer):
    traced(tmp_path, tokenizer, tokenizer.encode("a"), [0], "a")
    themes = re.findall(r":root \{(.*?)\}", (tmp_path / "trace.html").read_text(), re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--([a-z]+): #([0-9a-f]+)", theme))
        for behind in ("page", "box", *NAMES):
            assert contrast(colours["ink"], colours[behind]) >= 7, behind
        assert contrast(colours["faint"], colours["page"]) >= 4.5


def test_an_unwritable_trace_is_one_line_and_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    path = tmp_path / "trace.html"
    path.write_text("the last one")
    monkeypatch.setattr("pathlib.Path.write_text", full)
    given = replace(answer(), token_ids=tokenizer.encode("a"), origins=[0], text="a")
    with pytest.raises(InputError, match=r"trace\.html: the trace cannot be written: No space left on device"):
        write_trace(path, given, tokenizer, "Why?", RapidConfig())
    assert path.read_text() == "the last one" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("reused", [False, True])
def test_compiling_is_a_line_of_its_own_whether_or_not_the_document_was_reused(tmp_path, tokenizer, reused):
    rows = dict(traced(tmp_path, tokenizer, [5], [1], "a", prefix_reused=reused).rows[4:])
    assert rows["compiling programs"] == "79.2 s"
    assert rows["prefill"] == "2.0 s" + " (the document was not prefilled anew)" * reused
