# SPDX-License-Identifier: Apache-2.0
"""Documents handed in, listed, pinned, deleted; files of every kind; and whose they are."""

import io

import httpx
import pytest
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from tests.serve.conftest import KEYS, Running, running

TEXT = "The lighthouse stands on the cape.\n\nIts light is seen from far."


@pytest.fixture
def http(served: Running):
    with served.http() as found:
        yield found


def pdf(text: str) -> bytes:
    """A page with the text on it."""
    writer = PdfWriter()
    page = writer.add_blank_page(300, 300)
    names = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    font = DictionaryObject({NameObject(key): NameObject(value) for key, value in names.items()})
    fonts = DictionaryObject({NameObject("/F1"): font})
    page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    stream = DecodedStreamObject()
    stream.set_data(f"BT /F1 12 Tf 10 100 Td ({text}) Tj ET".encode())
    page[NameObject("/Contents")] = writer._add_object(stream)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def test_a_text_is_kept_under_an_id_until_it_is_deleted(served: Running, http: httpx.Client):
    more = {"name": "cape", "pinned": True, "expires_in": 3600}
    made = http.post("/v1/documents", json={"text": TEXT} | more).json()
    assert (made["object"], made["name"], made["pinned"], made["public"]) == ("document", "cape", True, False)
    assert (made["characters"], made["state"]) == (len(TEXT), "uploaded")
    assert 3590 <= made["expires_at"] - made["created_at"] <= 3601
    assert served.engine.documents.get(made["id"]) == TEXT
    assert http.get(f"/v1/documents/{made['id']}").json() == made
    assert made in http.get("/v1/documents").json()["data"]
    let_go = http.patch(f"/v1/documents/{made['id']}", json={"pinned": False}).json()
    assert let_go == made | {"pinned": False}
    gone = http.delete(f"/v1/documents/{made['id']}").json()
    assert gone == {"id": made["id"], "object": "document", "deleted": True}
    for again in (http.get(f"/v1/documents/{made['id']}"), http.delete(f"/v1/documents/{made['id']}")):
        assert (again.status_code, again.json()["error"]["code"]) == (404, "document_not_found")


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("a.txt", TEXT.encode(), TEXT),
        ("a.txt", TEXT.replace("\n", "\r\n").encode("utf-16"), TEXT),
        ("a.pdf", pdf("Light on the cape"), "Light on the cape"),
        ("no ending", pdf("Light on the cape"), "Light on the cape"),
        ("a.html", b"<p>Light</p><script>no</script><p>on the cape</p>", "Light\n\non the cape"),
    ],
)
def test_a_file_is_read_by_its_kind(served: Running, http: httpx.Client, name: str, data: bytes, text: str):
    made = http.post("/v1/documents", files={"file": (name, data)}, data={"public": "true"}).json()
    assert served.engine.documents.get(made["id"]).strip() == text
    assert (made["name"], made["public"]) == (name, True)


def test_a_name_in_the_form_goes_before_the_files(http: httpx.Client):
    made = http.post("/v1/documents", files={"file": ("a.txt", b"text")}, data={"name": "mine", "expires_in": "60"})
    assert (made.json()["name"], made.json()["expires_at"] is None) == ("mine", False)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "C:\\secret\\passwd", "\x1b[31mpasswd"])
def test_a_files_name_leads_nowhere(served: Running, http: httpx.Client, name: str):
    made = http.post("/v1/documents", files={"file": (name, b"harmless")}).json()
    assert served.engine.documents.get(made["id"]) == "harmless"
    assert "/" not in made["name"] and made["name"].endswith("passwd") and "\x1b" not in made["name"]


@pytest.mark.parametrize("place", ["file:///etc/passwd", "/etc/passwd", "../../../../etc/passwd"])
def test_a_place_on_the_servers_disk_is_only_a_text(served: Running, http: httpx.Client, place: str):
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "what"}], "document": place}
    assert http.post("/v1/chat/completions", json=ask).status_code == 200
    assert served.engine.requests[-1].prompt.document == place
    assert http.get(f"/v1/documents/{place}").status_code == 404
    assert http.get(f"/{place}").status_code == 404


@pytest.mark.parametrize(
    "file",
    [
        ("a.txt", b""),
        ("a.txt", b"  \n "),
        ("a.txt", b"a\0b"),
        ("a.pdf", b"%PDF-1.7 broken"),
        ("a.pdf", b"no pdf"),
        ("a.html", b"<p></p>"),
    ],
)
def test_a_file_without_text_is_refused(http: httpx.Client, file: tuple[str, bytes]):
    got = http.post("/v1/documents", files={"file": file})
    assert (got.status_code, got.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"json": {}}, 400),
        ({"json": {"text": ""}}, 400),
        ({"json": {"text": " \n"}}, 400),
        ({"json": {"text": "a\0b"}}, 400),
        ({"json": {"text": "x", "expires_in": -1}}, 400),
        ({"json": {"text": "x", "path": "/etc/passwd"}}, 400),
        ({"files": {"other": ("a.txt", b"x")}}, 400),
        ({"files": [("file", ("a.txt", b"x")), ("file", ("b.txt", b"y"))]}, 400),
        ({"files": {"file": ("a.txt", b"x")}, "data": {"pinned": "perhaps"}}, 400),
        ({"files": {"file": ("a.txt", b"x")}, "data": {"expires_in": "nan"}}, 400),
        ({"files": {"file": ("a.txt", b"x")}, "data": {"name": "x" * 70_000}}, 400),
        ({"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}}, 400),
        ({"json": {"text": "x" * (3 << 20)}}, 413),
        ({"content": b"text", "headers": {"Content-Type": "text/plain"}}, 415),
    ],
)
def test_a_document_that_cannot_be_used_is_refused(http: httpx.Client, more: dict, status: int):
    got = http.post("/v1/documents", **more)
    assert got.status_code == status, got.text
    assert got.json()["error"]["message"]


def test_what_is_over_the_limit_is_refused_and_the_server_goes_on():
    with running(upload_mib=1, body_mib=1) as found, found.http() as http:
        large = b"x" * (3 << 20)
        for more in ({"files": {"file": ("a.txt", large)}}, {"json": {"text": large.decode()}}):
            got = http.post("/v1/documents", **more)
            assert (got.status_code, got.json()["error"]["code"][-9:]) == (413, "too_large")

        def unannounced():
            for _ in range(3):
                yield large

        headers = {"Content-Type": "application/json"}
        assert http.post("/v1/documents", content=unannounced(), headers=headers).status_code == 413
        assert http.post("/v1/chat/completions", content=unannounced(), headers=headers).status_code == 413
        assert http.get("/v1/documents").json()["data"] == []
        fits = http.post("/v1/documents", files={"file": ("a.txt", b"x" * (1 << 20))})
        assert (fits.status_code, fits.json()["bytes"]) == (200, 1 << 20)


def test_another_keys_document_is_unknown(locked: Running):
    with locked.http(KEYS[0]) as mine, locked.http(KEYS[1]) as theirs:
        id = mine.post("/v1/documents", json={"text": TEXT}).json()["id"]
        ask = {"model": "tiny", "messages": [{"role": "user", "content": "what"}], "document": id}
        assert mine.post("/v1/chat/completions", json=ask).status_code == 200
        unknown = theirs.get("/v1/documents/doc-000000000000000000000000").json()["error"]
        for got in (
            theirs.get(f"/v1/documents/{id}"),
            theirs.delete(f"/v1/documents/{id}"),
            theirs.patch(f"/v1/documents/{id}", json={"pinned": True}),
            theirs.post("/v1/chat/completions", json=ask),
            theirs.post("/v1/chat/completions", json=ask | {"document": [id]}),
        ):
            assert (got.status_code, got.json()["error"]["code"]) == (404, unknown["code"])
        assert theirs.get("/v1/documents").json()["data"] == []
        assert mine.get(f"/v1/documents/{id}").status_code == 200
        owners = {request.owner for request in locked.engine.requests}
        assert len(owners) == 1 and not any(KEYS[0] in owner for owner in owners)


def test_a_public_document_is_everyones_to_read(locked: Running):
    with locked.http(KEYS[0]) as mine, locked.http(KEYS[1]) as theirs:
        id = mine.post("/v1/documents", json={"text": "for all", "public": True}).json()["id"]
        own = mine.post("/v1/documents", json={"text": "for me"}).json()["id"]
        ask = {"model": "tiny", "messages": [{"role": "user", "content": "what"}], "document": id}
        assert theirs.post("/v1/chat/completions", json=ask).status_code == 200
        assert locked.engine.requests[-1].public
        assert mine.post("/v1/chat/completions", json=ask | {"document": [id, own]}).status_code == 200
        assert not locked.engine.requests[-1].public  # its keys and values would tell of the other document
        assert theirs.delete(f"/v1/documents/{id}").status_code == 404
