# SPDX-License-Identifier: Apache-2.0
"""Pages as text: what a browser shows, from any markup, in time that grows as the page does."""

import time

import pytest

from rapid_jax.html_text import begins_as_html, html_text

SHAPES = {
    "paragraphs": "<p>Some words of a <b>paragraph</b> that is closed.</p>\n",
    "open paragraphs": "<p>some words\n",
    "nested": "<div><span>x",
    "tables": "<table><tr><td>1<td>2</td></tr></table>",
    "lists": "<ul><li>one<li><a href='x'>two</a>",
    "verbatim": "<pre>  \t x",
    "titles": "<title>a</title>",
    "breaks": "<br> ",
    "spaces": "<pre> " + " " * 30,
    "references": "&amp &#1 &#x1; &x",
    "open tags": "<a ",
    "open end tags": "</a ",
    "open quotes": '<a href="',
    "equals signs": "<a = ",
    "open comments": "<!--",
    "closed comments": "<!-- x -->",
    "declarations": "<![[x",
    "instructions": "<?",
    "scripts": "<script>",
    "closed scripts": "<script>1 < 2</script>x",
    "templates": "<template>x",
    "angles": "<",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_time_grows_as_the_page_does(shape):
    def seconds(count: int) -> float:
        page = SHAPES[shape] * count
        begin = time.thread_time()
        html_text(page)
        return time.thread_time() - begin

    small, large = min(seconds(2_000) for _ in range(3)), seconds(32_000)
    assert seconds(8_000) < 1
    assert large < 16 * 4 * small + 0.1  # quadratic: 256 times


@pytest.mark.parametrize("tag", ["div", "b", "pre", "table", "template", "title"])
def test_tags_nested_without_end_are_read(tag):
    text = html_text(f"<p>before</p>{f'<{tag}>' * 100_000}within{f'</{tag}>' * 100_000}<p>behind</p>")
    assert text.startswith("before") and ("within" in text) == (tag != "template")
    assert text.endswith("behind") or tag == "title"  # its content is text up to the first end tag, then ends


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<![[x", ""),
        ("a<![CDATA[b]]>c", "ac"),
        ("a<!doctype nonsense>b", "ab"),
        ("a<?php echo 1 ?>b", "ab"),
        ("a<!-->b", "ab"),
        ("a<!--->b<!-- c --!>d<!-- e", "abd"),
        ("1 < 2, <3 and a<", "1 < 2, <3 and a<"),
        ("a</>b</ c>d", "abd"),
        ("a<b", "a"),
        ("a<b c='>", "a"),
        ("<a title='1 > 0' x=\">\" y=a'>b>c", "b>c"),
        ("<p don't>a</p>", "a"),
        ("<a href=x?y='>b", "b"),
        ('<b ="x>y">c', "c"),
        ("<P>one<P>two<BR/>three", "one\n\ntwo\nthree"),
        ("<table><tr><th>1<th>2<tr><td>3<td>4</table>", "1 2\n3 4"),
        ("one<b> two </b> three", "one two three"),
        ("<pre>\n a  b\n   c</pre>d", "a  b\n   c\n\nd"),
        ("<script>if (1 < 2) '</p>'</script >a<style>b", "a"),
        ("<SCRIPT>x</script\n>a", "a"),
        ("<title>1 < 2 &amp; <b></title>c", "1 < 2 & <b>\n\nc"),
        ("<textarea> a\n  <p>b</textarea>", "a\n  <p>b"),
        ("<xmp>&amp;<p></xmp>", "&amp;<p>"),
        ("a<plaintext><p>&lt;</plaintext>", "a\n\n<p>&lt;</plaintext>"),
        ("a<template>b<p>c</template>d", "ad"),
        ("</template></pre>a  b", "a b"),
        ("<script src='x'/>a</script>b", "b"),
        ('<html xmlns="http://www.w3.org/1999/xhtml"><script src="x"/><title/>a', "a"),
        ("&lt;p&gt; &eacute; &#233; &#xe9; &#xD800; &#0; &nosuch; &", "<p> é é é \ufffd \ufffd &nosuch; &"),
        (f"&#{'9' * 5000}; &#{'0' * 5000}65; &#x{'f' * 5000};", "\ufffd A \ufffd"),
        ("caf\u00e9<br><br><br>a", "caf\u00e9\n\na"),
        ("", ""),
    ],
)
def test_markup_that_is_malformed_is_read_as_browsers_do(page, text):
    assert html_text(page) == text


@pytest.mark.parametrize(
    "start",
    [
        *("<!DOCTYPE html>", "\n <!doctype HTML PUBLIC 'x'>", "<html>", "<HTML lang=en>", "<head>", "<body class=x>"),
        *("<?xml version='1.0'?>\n<!DOCTYPE html>", "<!-- saved --> <!-- - -> -->\n<html>"),
    ],
)
def test_pages_are_known_by_how_they_begin(start):
    assert begins_as_html(start + "text")


@pytest.mark.parametrize(
    "start",
    [
        *("", "text <html>", "# <html>", "<htmlx>", "<!doctype svg>", "<p align=center>", "<!-- <html> -->"),
        "<?xml ?><x>",
    ],
)
def test_other_texts_are_not_taken_for_pages(start):
    assert not begins_as_html(start + "text")


def test_a_page_of_comments_is_told_apart_at_once():
    begin = time.thread_time()
    assert not begins_as_html("<!-- a -->" * 6_000 + "<x>")
    assert not begins_as_html(" " * 60_000 + "x")
    assert time.thread_time() - begin < 0.5
