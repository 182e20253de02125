# SPDX-License-Identifier: Apache-2.0
"""Dialogues as tokens against transformers' chat templates, and which of the tokens are the answers'."""

import json
from dataclasses import dataclass

import pytest
import transformers
from tokenizers import AddedToken, Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from longpo_jax.dialogue import Dialogue
from longpo_jax.records import Answer
from rapid_jax.model.chat import mark_of
from rapid_jax.model.load import open_checkpoint
from rapid_jax.model.tokenizer import Tokenizer
from rapid_jax.runtime.errors import InputError
from tests.model.test_tokenizer import byte_level_files, saved, sentencepiece_files

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
CONTEXT = "The cat sat on the mat.\n\n  It is 3.14159, na\u00efve \U0001f600; the dog ate 12 bones"
QUESTIONS = ("As the text says, who sat?", "Why did it?", "and where")
ANSWERS = ("The cat sat.", "It was\n\ntired, they say!", "upon a mat")


@dataclass(frozen=True)
class Family:
    ours: Tokenizer
    theirs: transformers.PreTrainedTokenizerBase
    end: str


def files_of(template: str, end: str, *special: str) -> dict[str, bytes]:
    files = byte_level_files(chat_template=template, eos_token=end)
    backend = Backend.from_str(files["tokenizer.json"].decode())
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return files | {"tokenizer.json": backend.to_str().encode()}


@pytest.fixture(scope="module", params=["chatml", "llama3", "mistral"])
def family(request, smollm2_path, tmp_path_factory) -> Family:
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>"}[request.param]
    if request.param == "chatml":
        ours = open_checkpoint(smollm2_path)[1]
    elif request.param == "llama3":
        ours = Tokenizer(files_of(LLAMA3, end, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))
    else:
        ours = Tokenizer(files_of(MISTRAL, end, "[INST]", "[/INST]"))
    folder = saved(ours.files, tmp_path_factory.mktemp(request.param))
    return Family(ours, transformers.AutoTokenizer.from_pretrained(folder), end)


def said(texts, finished: bool = True) -> list[Answer]:
    return [Answer(text, len(text), finished) for text in texts]


def sequence(tokenizer: Tokenizer, context: str, questions, answers) -> tuple[list[int], list[int]]:
    """(tokens of the whole dialogue, of each the turn whose answer it is)."""
    dialogue = Dialogue(tokenizer, questions)
    shared, branch = dialogue.shared(context), dialogue.branch(answers)
    assert len(branch.tokens) == len(branch.turns)
    return shared + branch.tokens, [0] * len(shared) + branch.turns


def labelled(tokenizer: Tokenizer, tokens, turns, turn: int) -> str:
    return tokenizer.decode(
        [token for token, of in zip(tokens, turns, strict=True) if of == turn], skip_special_tokens=False
    )


@pytest.mark.parametrize("turns", [1, 3])
def test_tokens_are_the_template_s(family, turns):
    """What differs by choice: two newlines stay together behind the document, and nothing follows the last end."""
    questions, answers = QUESTIONS[:turns], ANSWERS[:turns]
    messages = []
    for index, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        content = question if index else f"{CONTEXT}\n\n{question}"
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    text = family.theirs.apply_chat_template(messages, tokenize=False)
    until_document, _, behind = text.partition(f"\n\n{questions[0]}")
    expected = []
    for part in (until_document, "\n\n", questions[0] + behind):
        expected += family.theirs(part, add_special_tokens=False).input_ids
    end = family.theirs.convert_tokens_to_ids(family.end)
    while expected[-1] != end:
        expected.pop()
    tokens, _ = sequence(family.ours, CONTEXT, questions, said(answers))
    assert tokens == expected
    assert tokens.count(end) >= turns and family.ours.decode(tokens[-1:], skip_special_tokens=False) == family.end


def test_the_shared_part_is_the_generation_prompt(family):
    """Up to the first answer a dialogue is what the model was given when it answered."""
    prompt = family.theirs.apply_chat_template(
        [{"role": "user", "content": f"{CONTEXT}\n\n{QUESTIONS[0]}"}], tokenize=False, add_generation_prompt=True
    )
    for questions in (QUESTIONS[:1], QUESTIONS):
        assert family.ours.decode(Dialogue(family.ours, questions).shared(CONTEXT), skip_special_tokens=False) == prompt


def test_the_answers_with_their_end_tokens_are_labelled_and_nothing_else(family):
    tokens, turns = sequence(family.ours, CONTEXT, QUESTIONS, said(ANSWERS))
    for turn, answer in enumerate(ANSWERS, start=1):
        assert labelled(family.ours, tokens, turns, turn) == answer + family.end
    rest = labelled(family.ours, tokens, turns, 0)
    assert not any(answer in rest for answer in ANSWERS) and all(question in rest for question in QUESTIONS)


def test_the_end_token_of_an_answer_that_was_cut_short_is_read_and_not_learnt(family):
    whole, _ = sequence(family.ours, CONTEXT, QUESTIONS, said(ANSWERS))
    for cut in range(3):
        answers = [Answer(text, 1, index != cut) for index, text in enumerate(ANSWERS)]
        tokens, turns = sequence(family.ours, CONTEXT, QUESTIONS, answers)
        assert tokens == whole
        assert [token for token, of in zip(tokens, turns, strict=True) if of == -1] == tokens[-1:]
        for turn, answer in enumerate(ANSWERS, start=1):
            expected = answer if turn == cut + 1 else answer + family.end
            assert labelled(family.ours, tokens, turns, turn) == expected


def test_special_tokens_spelt_out_stay_text(family):
    trick = f"a{family.end}\n<|im_start|>user[INST]<|start_header_id|></s><s> b"
    plain, _ = sequence(family.ours, "a", ("a", "a"), said(("a", "a")))
    tokens, turns = sequence(family.ours, trick, (trick, trick), said((trick, trick)))
    special = family.ours.special_ids
    assert [token for token in tokens if token in special] == [token for token in plain if token in special]
    assert labelled(family.ours, tokens, turns, 1) == trick + family.end


def test_marks_like_ours_in_the_text_are_text(family):
    text = mark_of("answer0") + mark_of("context")
    tokens, turns = sequence(family.ours, text, (text, text), said((text, text)))
    assert labelled(family.ours, tokens, turns, 1) == labelled(family.ours, tokens, turns, 2) == text + family.end
    assert family.ours.decode(tokens, skip_special_tokens=False).count(text) == 5


def test_the_branches_of_a_pair_part_at_the_first_answer(family):
    dialogue = Dialogue(family.ours, QUESTIONS)
    chosen, rejected = dialogue.branch(said(ANSWERS)), dialogue.branch(said(reversed(ANSWERS)))
    assert sorted(chosen.turns) != [] and chosen.tokens != rejected.tokens
    between = [[t for t, turn in zip(b.tokens, b.turns, strict=True) if not turn] for b in (chosen, rejected)]
    assert between[0] == between[1]


def test_without_a_template_there_is_no_end_token_to_learn():
    tokenizer = Tokenizer(sentencepiece_files())
    tokens, turns = sequence(tokenizer, "the cat", ("the", "cat"), said(("cat the", "the")))
    assert [tokenizer.decode([t for t, of in zip(tokens, turns, strict=True) if of == i]) for i in (1, 2)] == [
        "cat the",
        "the",
    ]
    assert turns[-1] == 2 and not set(tokenizer.stop_ids) & set(tokens)


SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("turns", [1, 3])
def test_a_tokenizer_that_adds_spaces_adds_them_as_in_joined_text(turns: int, tmp_path):
    """Mistral's of version 0.2 and Llama 2's."""
    files = sentencepiece_files()
    settings = json.loads(files["tokenizer_config.json"]) | {"chat_template": SPACED}
    ours = Tokenizer(files | {"tokenizer_config.json": json.dumps(settings).encode()})
    theirs = transformers.AutoTokenizer.from_pretrained(saved(ours.files, tmp_path))
    questions, answers = (
        ("what? 'the cat'", "Why the cat, the", "and")[:turns],
        ("the cat.", "It was", "a cat the")[:turns],
    )
    messages = []
    for index, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        content = question if index else f"the  cat sat.\nA dog\n\n{question}"
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    text = theirs.apply_chat_template(messages, tokenize=False)
    tokens, labels = sequence(ours, "the  cat sat.\nA dog", questions, said(answers))
    assert tokens == theirs(text, add_special_tokens=False).input_ids
    assert [labelled(ours, tokens, labels, turn) for turn in range(1, turns + 1)] == [f"{a}</s>" for a in answers]


def test_a_template_that_writes_the_date_has_the_same_tokens_on_any_day():
    dated = "{{ strftime_now('%d %b %Y') }}" + MISTRAL
    tokenizer = Tokenizer(byte_level_files(chat_template=dated, eos_token="</s>"))
    assert tokenizer.decode(Dialogue(tokenizer, ("Why?",)).before).startswith("01 Jan 2025")


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content }}", "{{ messages[-1].content }}", "{{ messages[0].role }}"]
)
def test_a_template_that_drops_a_message_is_an_input_error(template):
    with pytest.raises(InputError, match="dropped or changed a message"):
        Dialogue(Tokenizer(byte_level_files(chat_template=template)), QUESTIONS)


def test_the_answers_must_be_as_many_as_the_questions(family):
    with pytest.raises(ValueError):
        Dialogue(family.ours, QUESTIONS).branch(said(ANSWERS[:2]))


def test_labels_by_hand():
    """A toy of words: user marker 90 91 92, assistant marker 90 93 91 92, which share pieces as Mistral's do."""
    words = {"<s>": 1, "</s>": 2, "[": 90, "INST": 91, "]": 92, "/": 93} | {
        f"w{i}": i for i in (*range(10, 14), 20, 21, 22)
    }
    backend = Backend(models.WordLevel(words, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    backend.add_special_tokens(["<s>", "</s>"])
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": MISTRAL}
    tokenizer = Tokenizer(
        {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()}
    )
    tokens, turns = sequence(tokenizer, "w10 w11", ("w12", "w13"), said(("w20 w21", "w22")))
    assert tokens == [1, 90, 91, 92, 10, 11, 12, 90, 93, 91, 92, 20, 21, 2, 90, 91, 92, 13, 90, 93, 91, 92, 22, 2]
    assert turns == [0] * 11 + [1] * 3 + [0] * 8 + [2] * 2
