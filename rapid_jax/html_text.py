# SPDX-License-Identifier: Apache-2.0
"""The text of an HTML page in one pass over it, whatever its markup is like.

Python's html.parser, and what stands on it, scans to the end of the page anew for every tag that is not
closed (16,000 times `<a `, 48 KB: 20 s), and a tree of 100,000 nested tags cannot be walked recursively. This follows
the tokenisation of the HTML standard (html.spec.whatwg.org, 13.2.5) and counts what it must know of the tree.
"""

import html
import re
from typing import Final

# Elements that stand on lines of their own; others run on in the line.
_BLOCKS: Final = frozenset(
    (
        *("address", "article", "aside", "blockquote", "body", "caption", "dd", "details", "div", "dl", "dt"),
        *("fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr"),
        *("li", "main", "nav", "ol", "p", "plaintext", "pre", "section", "summary", "table", "title", "ul", "xmp"),
    )
)
# Elements whose content is no markup: it ends at the first end tag of the same name, or with the page.
_UNREAD: Final = frozenset(("script", "style", "noscript", "iframe", "noembed", "noframes"))
_VERBATIM: Final = {
    "title": False,
    "textarea": False,
    "xmp": True,
    "plaintext": True,
}  # whether "&amp;" is five letters
_ENDS: Final = {name: re.compile(rf"</{name}(?=[\s/>])", re.IGNORECASE) for name in (*_UNREAD, *_VERBATIM)}
_MARKUP: Final = re.compile(
    r"<(?:(?P<comment>!--)|(?P<end>/?)(?P<name>[a-zA-Z][^\s/>]*)|(?P<bogus>[!?]|/(?=.)))", re.DOTALL
)
_COMMENT_END: Final = re.compile(r"--!?>")
# What may follow a tag's name: its end, or a value, in which a ">" is no end if the value is quoted.
_ATTRIBUTE: Final = re.compile(r">|=\s*(?:(?P<quote>[\"'])|[^\s>\"'][^\s>]*)")
# Possessive: a page of many comments would otherwise be divided into comments in every way there is.
_BEGINNING: Final = re.compile(
    r"\s*+(?:<\?xml[^>]*+>\s*+)?+(?:<!--(?:(?!-->).)*+-->\s*+)*+<(?:!doctype\s+html|html|head|body)[\s/>]",
    re.IGNORECASE | re.DOTALL,
)


def begins_as_html(text: str) -> bool:
    """Whether a text starts as pages do: with a doctype of HTML, or with html, head or body."""
    return _BEGINNING.match(text) is not None


def html_text(markup: str) -> str:
    """The text that a browser shows, blocks apart by blank lines, and the title.

    Takes time linear in the page's length. What an open quote, tag, comment or script swallows up to the page's end
    is not shown, as in a browser.
    """
    page = _Page()
    head = markup[:4096]
    closes_itself = "<?xml" in head or "www.w3.org/1999/xhtml" in head  # <script src="x"/> is whole in XHTML alone
    at = 0
    while found := _MARKUP.search(markup, at):
        page.text(_unescape(markup[at : found.start()]))
        name = (found["name"] or "").lower()
        if found["comment"]:
            close = _COMMENT_END.search(markup, found.start() + 2)
            at = close.end() if close else len(markup)
        elif not name:
            at = markup.find(">", found.end()) + 1 or len(markup)
        elif not (at := _tag_end(markup, found.end())):
            return page.finish()
        elif found["end"]:
            page.end(name)
        else:
            page.start(name)
            if name in _ENDS and not (closes_itself and markup[at - 2] == "/"):
                begin, at = at, _content_end(markup, at, name)
                page.content(name, markup[begin:at])
    page.text(_unescape(markup[at:]))
    return page.finish()


def _tag_end(markup: str, at: int) -> int:
    """Where the text behind the tag begins; 0 if the tag does not end."""
    while found := _ATTRIBUTE.search(markup, at):
        if found["quote"]:
            at = markup.find(found["quote"], found.end()) + 1
            if not at:
                return 0
        elif found[0] == ">":
            return found.end()
        else:
            at = found.end()
    return 0


def _content_end(markup: str, at: int, name: str) -> int:
    close = _ENDS[name].search(markup, at) if name != "plaintext" else None
    return close.start() if close else len(markup)


def _unescape(text: str) -> str:
    if "&" not in text:
        return text
    # html.unescape reads numbers of any length, and Python refuses decimal ones beyond 4,300 digits.
    text = re.sub("&#0+", "&#0", text)
    return html.unescape(re.sub("&#0?[1-9][0-9]{7,};?", "\N{REPLACEMENT CHARACTER}", text))


class _Page:
    """Text as it is laid out in lines, from tags and text in the page's order."""

    def __init__(self):
        self._parts: list[str] = []
        self._newlines = 2  # that the text so far ends with; as many at the beginning are as good as there
        self._spaced = True  # whether the text so far ends with a space or a newline
        self._verbatim = self._templates = 0  # elements that are open: pre, template

    def start(self, name: str) -> None:
        if name == "pre":
            self._verbatim += 1
        elif name == "template":
            self._templates += 1
        elif name == "br":
            self._break(self._newlines + 1)
        self._separate(name)

    def end(self, name: str) -> None:
        if name == "pre":
            self._verbatim = max(0, self._verbatim - 1)
        elif name == "template":
            self._templates = max(0, self._templates - 1)
        self._separate(name)

    def content(self, name: str, raw: str) -> None:
        """What is between the tags of an element whose content is no markup."""
        if name in _UNREAD:
            return
        self._verbatim += name != "title"
        self.text(raw if _VERBATIM[name] else _unescape(raw))
        self._verbatim -= name != "title"

    def text(self, text: str) -> None:
        if self._templates or not text:
            return
        if not self._verbatim:
            words = " ".join(text.split())
            text = " " * (text[0].isspace() and not self._spaced) + words + " " * (words != "" and text[-1].isspace())
        if text:
            self._parts.append(text)
            self._newlines = len(text) - len(text.rstrip("\n"))
            self._spaced = text[-1].isspace()

    def finish(self) -> str:
        text = "\n".join(line.rstrip() for line in "".join(self._parts).split("\n"))
        return re.sub(r"\n{3,}", "\n\n", text).strip()

    def _separate(self, name: str) -> None:
        if name in _BLOCKS:
            self._break(2)
        elif name == "tr":
            self._break(1)
        elif name in ("td", "th") and not self._spaced:
            self.text(" ")

    def _break(self, newlines: int) -> None:
        if self._newlines < newlines and not self._templates:
            self._parts.append("\n" * (newlines - self._newlines))
            self._newlines, self._spaced = newlines, True
