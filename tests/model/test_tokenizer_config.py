# SPDX-License-Identifier: Apache-2.0
"""What the files beside tokenizer.json decide, against transformers' reading of the same folder."""

import json
import logging

import pytest
import transformers

from longpo_jax.dialogue import Dialogue
from rapid_jax.model.tokenizer import Tokenizer, tokenizer_of
from rapid_jax.prompts import frame
from rapid_jax.runtime.errors import InputError
from tests.model.test_tokenizer import byte_level_files, saved, sentencepiece_files
from tests.model.tokenizer_kinds import CHATML, changed

TOP = Tokenizer(byte_level_files()).vocab_size  # ids that only a config states begin here


def with_config(files: dict[str, bytes], **config) -> dict[str, bytes]:
    settings = json.loads(files["tokenizer_config.json"]) | config
    return files | {"tokenizer_config.json": json.dumps(settings).encode()}


def processor(single: str) -> dict:
    """A post-processor of tokenizer.json."""
    special = {token: {"id": token, "ids": [id], "tokens": [token]} for token, id in (("<s>", 0), ("</s>", 1))}
    parts = [
        {"Sequence": {"id": "A", "type_id": 0}} if part == "$A" else {"SpecialToken": {"id": part, "type_id": 0}}
        for part in single.split()
    ]
    return {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": special}


def opening(tokenizer: Tokenizer) -> list[int]:
    """The first ids of a prompt and of a dialogue, which agree."""
    prompt = frame(tokenizer, "Read {document} {question}", "Who?", None).around("the cat").tokens
    dialogue = Dialogue(tokenizer, ["Who?"]).shared("the cat")
    assert prompt[:3] == dialogue[:3]
    return prompt[:3]


def test_only_what_the_post_processor_puts_before_a_text_opens_a_prompt():
    files = changed(byte_level_files(chat_template=CHATML), post_processor=processor("<s> $A </s>"))
    tokenizer = Tokenizer(files)
    begins = [0, tokenizer.id_of("<|im_start|>")]
    assert opening(tokenizer)[:2] == begins and 1 not in opening(tokenizer)
    prompt = frame(tokenizer, "{document} {question}", "Who?", None).around("the cat").tokens
    assert 1 not in prompt
    assert tokenizer.encode_template("") == [] and tokenizer.encode_template("", first=True) == [0]
    none = Tokenizer(changed(files, post_processor=processor("$A </s>")))
    assert opening(none)[0] == begins[1]


@pytest.mark.parametrize("bos", ["<s>", None, ""])
@pytest.mark.parametrize("start", ["<s>", "\n<s>", "  {{ '<s>' }}", "{% if true %}\n<s>{% endif %}"])
def test_a_template_that_writes_bos_itself_has_it_once(bos, start):
    files = with_config(byte_level_files(), bos_token=bos, chat_template=start + CHATML)
    tokenizer = Tokenizer(files)
    text = tokenizer.chat([{"role": "user", "content": "the cat"}])
    whole = tokenizer.encode_template(text, first=True)
    assert whole == tokenizer.encode(text) and whole.count(0) == 1
    del files["tokenizer_config.json"]
    bare = Tokenizer(files | {"chat_template.jinja": (start + CHATML).encode()})
    assert bare.encode_template(text, first=True).count(0) == 1


def test_a_template_that_writes_no_bos_gets_the_post_processor_s():
    tokenizer = Tokenizer(byte_level_files(chat_template=CHATML))
    assert opening(tokenizer)[:2] == [0, tokenizer.id_of("<|im_start|>")]


MARKED = "{% for m in messages %}<|u|>{{ m.content }}<|end|>{% endfor %}<|a|>"


@pytest.mark.parametrize("special", [True, False])
def test_tokens_that_only_tokenizer_config_states_get_their_ids(special, tmp_path):
    tokens = {TOP: "<|u|>", TOP + 1: "<|a|>", TOP + 2: "<|end|>"}
    decoder = {str(id): {"content": token, "special": special, "normalized": False} for id, token in tokens.items()}
    files = byte_level_files(chat_template=MARKED, eos_token="<|end|>", added_tokens_decoder=decoder)
    ours, theirs = Tokenizer(files), transformers.AutoTokenizer.from_pretrained(saved(files, tmp_path))
    assert [ours.id_of(token) for token in tokens.values()] == list(tokens)
    assert TOP + 2 in ours.stop_ids and ours.vocab_size == len(theirs)
    text = ours.chat([{"role": "user", "content": "the cat"}])
    assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert not set(tokens) & set(ours.encode_quoted("the <|end|> cat<|a|>"))


def test_tokens_that_only_added_tokens_json_states_get_their_ids(tmp_path):
    files = byte_level_files(chat_template=MARKED, eos_token="<|end|>")
    files["added_tokens.json"] = json.dumps({"<|a|>": TOP + 1, "<|u|>": TOP, "<|end|>": TOP + 2}).encode()
    ours, theirs = Tokenizer(files), transformers.AutoTokenizer.from_pretrained(saved(files, tmp_path))
    assert [ours.id_of(token) for token in ("<|u|>", "<|a|>", "<|end|>")] == [TOP, TOP + 1, TOP + 2]
    text = ours.chat([{"role": "user", "content": "the cat"}])
    assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert TOP + 2 in ours.stop_ids


@pytest.mark.parametrize("id", [TOP + 3, 7])
def test_a_token_whose_stated_id_cannot_be_given_is_refused(id):
    with pytest.raises(InputError, match=rf"added_tokens_decoder: '<x>' must be the next id .* {TOP}, got id {id}"):
        Tokenizer(byte_level_files(added_tokens_decoder={str(id): {"content": "<x>"}}))
    with pytest.raises(InputError, match=rf"added_tokens.json: '<x>' must be the next id .*, got id {id}"):
        Tokenizer(byte_level_files() | {"added_tokens.json": json.dumps({"<x>": id}).encode()})
    added = json.loads(byte_level_files()["tokenizer.json"])["added_tokens"]
    with pytest.raises(InputError, match=rf"tokenizer.json: added token '<x>' must be the next id, {TOP}, got id {id}"):
        Tokenizer(changed(byte_level_files(), added_tokens=[*added, added[0] | {"content": "<x>", "id": id}]))


def test_special_tokens_that_the_vocabulary_lacks_are_added_as_transformers_does(tmp_path):
    files = byte_level_files(pad_token="[PAD]", extra_special_tokens=["<extra>"], image_token="<image>")
    ours, theirs = Tokenizer(files), transformers.AutoTokenizer.from_pretrained(saved(files, tmp_path))
    for token in ("[PAD]", "<extra>", "<image>"):
        assert ours.id_of(token) == theirs.convert_tokens_to_ids(token)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("decoder", [False, True])
def test_which_file_names_a_special_token_is_as_in_transformers(decoder, tmp_path):
    files = byte_level_files(eos_token="</s>") | {"special_tokens_map.json": b'{"eos_token": "<|im_end|>"}'}
    if decoder:
        files = with_config(files, added_tokens_decoder={"1": {"content": "</s>", "special": True}})
    theirs = transformers.AutoTokenizer.from_pretrained(saved(files, tmp_path))
    assert Tokenizer(files).special_tokens["eos_token"] == theirs.eos_token


def test_an_id_beyond_the_embedding_is_refused_and_an_unused_one_is_not():
    decoder = {str(TOP): {"content": "<|u|>", "special": True}}
    files = byte_level_files(pad_token="[PAD]", chat_template=CHATML)
    assert opening(Tokenizer(files, rows=TOP))
    beyond = Tokenizer(with_config(files, chat_template=MARKED, added_tokens_decoder=decoder), rows=TOP)
    with pytest.raises(InputError, match=rf"'<\|u\|>', id {TOP}: expected ids below {TOP}"):
        opening(beyond)
    low = Tokenizer(byte_level_files(), rows=100)
    for take in (low.encode, low.encode_quoted, low.encode_template):
        with pytest.raises(InputError, match="expected ids below 100"):
            take(" the cat sat on the mat")


def test_no_template_is_warned_of_once(caplog):
    tokenizer = Tokenizer(sentencepiece_files())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            frame(tokenizer, "{document} {question}", "Who?", None)
    assert [record.message for record in caplog.records] == [
        "the checkpoint has no chat template: the prompt is plain text, 'User: ... Assistant:'"
    ]
    caplog.clear()
    frame(Tokenizer(byte_level_files()), "{document} {question}", "Who?", None)
    assert not caplog.records


TEMPLATES = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes {{ messages[0].content }}"}]


@pytest.mark.parametrize("given", [TEMPLATES, {one["name"]: one["template"] for one in TEMPLATES}, TEMPLATES[1:]])
def test_of_several_templates_the_default_is_used(given, tmp_path):
    messages = [{"role": "user", "content": "x"}]
    assert Tokenizer(byte_level_files(chat_template=given)).chat(messages) == "yes x"
    beside = byte_level_files() | {"chat_template.json": json.dumps({"chat_template": given}).encode()}
    assert Tokenizer(beside).chat(messages) == "yes x"


@pytest.mark.parametrize("given", [TEMPLATES[:1], [], {}, {"tool_use": "no"}])
def test_several_templates_without_a_default_are_refused(given):
    with pytest.raises(InputError, match=r"chat_template must have a template named 'default', got ('tool_use'|none)"):
        Tokenizer(byte_level_files(chat_template=given))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (5, "chat_template must be a string, or templates by name, got 5"),
        (True, "chat_template must be"),
        (["x"], "chat_template must be a list of objects"),
        ([{"name": "default"}], r"chat_template\[0\].template must be a string, got no such key"),
        ({"default": 5}, "chat_template.default must be a string, got 5"),
    ],
)
def test_templates_of_another_type_are_refused_by_file_and_key(given, words):
    with pytest.raises(InputError, match=rf"^tokenizer_config.json: {words}"):
        Tokenizer(byte_level_files(chat_template=given))


@pytest.mark.parametrize("value", ["</s>", [2, None], 2.0, True, -1, [2.0], ["2"], {"id": 2}, 2**31, [[2]]])
def test_ids_that_end_an_answer_are_whole_numbers(value):
    with pytest.raises(InputError, match=r"^config.json: eos_token_id must be a "):
        Tokenizer(byte_level_files(), value)
    generation = json.dumps({"eos_token_id": value}).encode()
    with pytest.raises(InputError, match=r"^generation_config.json: eos_token_id must be a "):
        Tokenizer(byte_level_files() | {"generation_config.json": generation})


@pytest.mark.parametrize("value", [None, []])
def test_no_ids_that_end_an_answer_are_none(value):
    assert Tokenizer(sentencepiece_files(), value).stop_ids == (2,)


def test_an_error_names_the_folder(tmp_path):
    folder = saved(byte_level_files(bos_token=5), tmp_path)
    with pytest.raises(InputError, match=rf"^{folder}/tokenizer_config.json: bos_token must be a token's text.*got 5"):
        tokenizer_of(folder)


def test_files_that_are_too_large_or_unreadable_are_one_line(tmp_path, monkeypatch):
    folder = saved(byte_level_files(), tmp_path)
    with (folder / "merges.txt").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match=r"merges\.txt: expected a file of at most \d+ bytes, got 1099511627776"):
        tokenizer_of(folder)
    (folder / "merges.txt").unlink()

    def fail(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(folder), "read_bytes", fail)
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read: Permission denied"):
        tokenizer_of(folder)
