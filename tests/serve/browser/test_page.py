# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser, headless: a document is handed in, asked about, and the answer streams in colours."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.serve.browser import CHROMIUM
from tests.serve.conftest import KEYS, Running, running
from tests.serve.engine import Engine

DOCUMENT = "The lighthouse stands on the cape.\n\n" + "Its light is seen from far away by all ships. " * 8
SCRIPT = "<img src=x onerror=\"document.title='taken over'\"><b>bold</b>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Whoever runs the tests may be root, whom Chromium's sandbox does not take.
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(Engine(round_seconds=0.01)) as found:
        yield found


@pytest.fixture
def faults() -> list[str]:
    return []


@pytest.fixture
def page(browser: Browser, server: Running, faults: list[str]) -> Iterator[Page]:
    """The page, which asks no other server for anything."""
    context = browser.new_context()
    found = context.new_page()
    found.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    found.on("pageerror", lambda error: faults.append(str(error)))
    found.on("request", lambda sent: None if sent.url.startswith((server.url, "data:")) else faults.append(sent.url))
    found.goto(server.url)
    yield found
    context.close()


def hand_in(page: Page, text: str) -> None:
    page.get_by_label("A text", exact=True).fill(text)
    page.get_by_role("button", name="Hand in the text").click()
    expect(page.locator("#about")).to_contain_text("characters")
    expect(page.get_by_label("One that is here")).not_to_have_value("")


def ask(page: Page, question: str) -> None:
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask").click()


def test_an_answer_streams_in_the_colours_of_its_origins_beside_what_was_retrieved(page: Page, faults: list[str]):
    hand_in(page, DOCUMENT)
    ask(page, "where is the lighthouse that the document is about")
    expect(page.locator("#status")).to_contain_text("ended by stop, 80% of drafts accepted")
    assert page.locator("#answer").inner_text().startswith("where is the lighthouse that the document is about seed")
    colours = set()
    for origin in ("lookup", "draft", "correction", "bonus"):
        spans = page.locator(f"#answer span.{origin}")
        assert spans.count() >= 1
        assert page.locator(f"#of-{origin}").inner_text() == str(spans.count())
        colours.add(spans.first.evaluate("span => getComputedStyle(span).backgroundColor"))
    assert len(colours) == 4
    assert page.locator("#retrieved").inner_text() == "Retrieved: 2 chunks"
    chunk = page.locator("#chunks details").first
    assert "characters 0\u2013100" in chunk.locator("summary").inner_text()
    chunk.locator("summary").click()
    assert chunk.locator("pre").inner_text().startswith("The lighthouse stands on the cape.")
    assert faults == []


def test_the_answer_grows_and_can_be_stopped(page: Page, server: Running, faults: list[str]):
    page.get_by_label("Tokens").fill("3000")
    ask(page, "forever")
    spans = page.locator("#answer span")
    expect(spans.nth(5)).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#status")).to_have_text("stopped")
    assert server.engine.idle()
    assert spans.count() < 3000 and server.engine.cancelled >= 1
    ask(page, "what")
    expect(page.locator("#status")).to_contain_text("ended by stop")
    assert faults == []


def test_a_file_is_uploaded_and_deleted(page: Page, faults: list[str]):
    data = {"name": "cape.html", "mimeType": "text/html", "buffer": b"<p>The cape</p><script>no</script>"}
    page.get_by_label("A file").set_input_files(data)
    chosen = page.locator("#document option:checked")
    expect(chosen).to_contain_text("cape.html")
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#about")).to_have_text("deleted")
    expect(chosen).to_have_text("none")
    assert page.locator("#document").inner_text().count("cape.html") == 0
    assert faults == []


def test_what_documents_and_answers_say_is_shown_and_not_obeyed(page: Page, faults: list[str]):
    hand_in(page, f"{SCRIPT} {DOCUMENT}")
    ask(page, SCRIPT)
    expect(page.locator("#status")).to_contain_text("ended by")
    assert page.locator("#answer").inner_text().startswith(SCRIPT)
    assert page.locator("#answer img, #answer b, #chunks img, #chunks b, #document img").count() == 0
    assert page.title() == "RAPID" and faults == []


def test_an_error_is_told(page: Page):
    page.get_by_label("Mode").select_option("lossless")
    ask(page, "refused")
    expect(page.locator("#status")).to_have_text("expected another question, got a refused one")
    ask(page, "a broken answer is wanted here please")
    expect(page.locator("#status")).to_have_text("expected a whole answer, got a broken one")
    page.get_by_role("button", name="Hand in the text").click()
    expect(page.locator("#about")).to_have_text("there is no text yet")


def test_a_key_is_asked_for_and_used(browser: Browser):
    with running(keys=KEYS) as found:
        page = browser.new_page()
        page.goto(found.url)
        expect(page.locator("#about")).to_contain_text("API key")
        page.get_by_label("Stays in this page").fill(KEYS[0])
        page.get_by_label("Stays in this page").blur()
        hand_in(page, DOCUMENT)
        ask(page, "what")
        expect(page.locator("#status")).to_contain_text("ended by stop")
        assert page.evaluate("() => localStorage.length + sessionStorage.length + document.cookie.length") == 0
        page.close()


def test_the_page_fits_a_narrow_screen_and_every_field_has_a_name(browser: Browser, server: Running):
    page = browser.new_page(viewport={"width": 360, "height": 640})
    page.goto(server.url)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    fields = page.locator("input, select, textarea")
    assert fields.count() == 8
    assert fields.evaluate_all("found => found.filter(one => !one.labels.length).map(one => one.id)") == []
    page.close()
