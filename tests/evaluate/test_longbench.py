# SPDX-License-Identifier: Apache-2.0
"""LongBench v2 from files made by hand: samples, messages by either templates, what is refused."""

import json

import pytest

from rapid_jax.evaluate import longbench
from rapid_jax.evaluate.longbench import OURS, samples, templates_of
from rapid_jax.evaluate.samples import SuiteOptions
from rapid_jax.runtime.errors import InputError


def row(number, **changes):
    choices = {f"choice_{letter}": f" choice {letter}{number} " for letter in "ABCD"}
    return {
        "_id": f"id{number}",
        "domain": "Single-Document QA",
        "sub_domain": "Academic",
        "difficulty": ("easy", "hard")[number % 2],
        "length": ("short", "medium", "long")[number % 3],
        "question": f" Which {number}? ",
        **choices,
        "answer": "ABCD"[number % 4],
        "context": f"\nText {number}, {{document}} $Q$.\n",
        **changes,
    }


ROWS = [row(number) for number in range(6)]
THEIRS = {
    "0shot.txt": "Read.\n<t>\n$DOC$\n</t>\nQ: $Q$\n(A) $C_A$\n(B) $C_B$\n(C) $C_C$\n(D) $C_D$\nForm: X",
    "0shot_cot.txt": "Read.\n<t>\n$DOC$\n</t>\nQ: $Q$\n(A) $C_A$\n(B) $C_B$\n(C) $C_C$\n(D) $C_D$\nThink:",
    "0shot_cot_ans.txt": "No text. Q: $Q$\n(A) $C_A$\n(B) $C_B$\n(C) $C_C$\n(D) $C_D$\nThoughts: $COT$\nForm: X",
}


def unmeasured(sample):
    raise AssertionError("its lengths are what they are")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(ROWS))
    return tmp_path


def write_templates(folder, **changes):
    (folder / "prompts").mkdir(exist_ok=True)
    for name, text in (THEIRS | changes).items():
        (folder / "prompts" / name).write_text(text)


def message(sample):
    """What the user's message is: the question is put in first, so that the document's words are left alone."""
    return sample.template.replace("{question}", sample.question).replace("{document}", sample.document, 1)


def test_questions_with_the_projects_templates_are_its_messages(folder):
    write_templates(folder)
    assert templates_of(folder)[1] is True
    found = samples(SuiteOptions(data=folder / "data.json", tasks=("longbench-v2",)), unmeasured)
    assert [sample.id for sample in found] == [f"longbench-v2/id{number}" for number in range(6)]
    sample = found[3]
    assert message(sample) == (
        "Read.\n<t>\nText 3, {document} $Q$.\n</t>\n"
        "Q: Which 3?\n(A) choice A3\n(B) choice B3\n(C) choice C3\n(D) choice D3\nForm: X"
    )
    assert sample.question.startswith("Which 3?\n(A)") and sample.question.endswith("choice D3")
    assert sample.answers == ("D",) and sample.metric == "choice" and sample.max_new_tokens == 128
    assert sample.tags == {"difficulty": "hard", "length": "short", "domain": "Single-Document QA"}
    assert sample.suite == sample.task == "longbench-v2" and sample.then is None and sample.length is None


def test_reasoning_has_a_second_message_without_the_text(folder):
    write_templates(folder)
    found = samples(SuiteOptions(data=folder, tasks=("longbench-v2-cot",)), unmeasured)
    sample = found[0]
    assert sample.id == "longbench-v2-cot/id0" and sample.max_new_tokens == 1024
    assert message(sample).endswith("(D) choice D0\nThink:")
    assert sample.then == (
        "No text. Q: Which 0?\n(A) choice A0\n(B) choice B0\n(C) choice C0\n(D) choice D0\nThoughts: {answer}\nForm: X"
    )


def test_our_templates_ask_for_what_the_scorer_reads(folder):
    assert templates_of(folder) == (OURS, False)
    direct, reasoned = (
        samples(SuiteOptions(data=folder, tasks=(task,)), unmeasured)[1]
        for task in ("longbench-v2", "longbench-v2-cot")
    )
    assert direct.template is not None and reasoned.template is not None and reasoned.then is not None
    for sample in (direct, reasoned):
        assert sample.template is not None
        assert sample.template.count("{document}") == sample.template.count("{question}") == 1
        assert sample.template.index("{document}") < sample.template.index("{question}")
        assert "$" not in sample.template + sample.question
        assert all(f"({letter}) choice {letter}1" in sample.question for letter in "ABCD")
    for text in (direct.template, reasoned.then):
        assert '"The correct answer is (letter)"' in text
    assert reasoned.then.count("{answer}") == 1 and "Text 1" not in reasoned.then
    assert "correct answer is" not in reasoned.template  # the first message asks for thoughts


def test_markers_in_a_question_stay_as_they_are(tmp_path):
    rows = [row(0, question="Is $C_A$ $COT$?", choice_A="$Q$ \\1", choice_B="$DOC$")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    direct, reasoned = samples(SuiteOptions(data=tmp_path / "data.jsonl"), unmeasured)
    assert "Is $C_A$ $COT$?" in direct.question and "(A) $Q$ \\1\n(B) $DOC$\n" in direct.question
    assert reasoned.then is not None and "Is $C_A$ $COT$?" in reasoned.then


def test_a_number_of_samples_is_picked_by_the_seed_for_both_tasks(folder):
    options = SuiteOptions(data=folder, samples=3, seed=5)
    found = samples(options, unmeasured)
    ids = [sample.id.split("/") for sample in found]
    assert [task for task, _ in ids] == ["longbench-v2"] * 3 + ["longbench-v2-cot"] * 3
    assert ids[0][1] < ids[1][1] < ids[2][1] and [id for _, id in ids[:3]] == [id for _, id in ids[3:]]
    assert found == samples(options, unmeasured)
    picks = {tuple(s.id for s in samples(SuiteOptions(data=folder, samples=3, seed=n), unmeasured)) for n in range(8)}
    assert len(picks) > 1
    assert len(samples(SuiteOptions(data=folder), unmeasured)) == 12


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"answer": "E"}, "item 2: expected 'answer' of A, B, C, D, got 'E'"),
        ({"difficulty": "mild"}, "item 2: expected 'difficulty' of easy, hard, got 'mild'"),
        ({"length": 5}, "item 2: expected 'length' to be a text"),
        ({"context": " "}, "item 2: expected 'context' to be a text that is not empty"),
        ({"choice_C": None}, "item 2: expected 'choice_C' to be a text"),
        ({"_id": "id0"}, "item 2: expected ids to differ, got 'id0' again"),
    ],
)
def test_a_row_that_is_not_the_benchmarks_is_named(tmp_path, changes, message):
    (tmp_path / "data.json").write_text(json.dumps([row(0), row(1, **changes)]))
    with pytest.raises(InputError, match=message):
        samples(SuiteOptions(data=tmp_path), unmeasured)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("0shot.txt", THEIRS["0shot.txt"].replace("$DOC$", ""), r"expected \$DOC\$ once, got it 0 times"),
        ("0shot.txt", THEIRS["0shot.txt"] + "$Q$", r"expected \$Q\$ once, got it 2 times"),
        ("0shot_cot.txt", THEIRS["0shot_cot.txt"].replace("$DOC$", "") + "$DOC$", "before the question"),
        ("0shot_cot_ans.txt", THEIRS["0shot_cot_ans.txt"].replace("$COT$", ""), r"expected \$COT\$ once"),
        ("0shot_cot_ans.txt", "$COT$" + THEIRS["0shot_cot_ans.txt"].replace("$COT$", ""), "behind the question"),
        ("0shot_cot_ans.txt", THEIRS["0shot_cot_ans.txt"] + "$DOC$", r"expected no \$DOC\$"),
    ],
)
def test_templates_without_their_markers_are_refused(folder, name, text, message):
    write_templates(folder, **{name: text})
    with pytest.raises(InputError, match=f"{name}: .*{message}"):
        samples(SuiteOptions(data=folder), unmeasured)


def test_templates_are_theirs_whole_or_ours_whole(folder):
    write_templates(folder)
    (folder / "prompts" / "0shot_cot.txt").unlink()
    with pytest.raises(InputError, match=r"0shot_cot\.txt is missing"):
        templates_of(folder)


def test_what_is_asked_for_must_be_there(folder):
    with pytest.raises(InputError, match=r"expected --data, the benchmark's data\.json"):
        samples(SuiteOptions(), unmeasured)
    with pytest.raises(InputError, match="expected tasks of longbench-v2, longbench-v2-cot, got 'cot'"):
        samples(SuiteOptions(data=folder, tasks=("cot",)), unmeasured)
    (folder / "data.json").unlink()
    with pytest.raises(InputError, match=r"data\.json: cannot be read"):
        samples(SuiteOptions(data=folder), unmeasured)
    assert longbench.ANSWER_TOKENS == 128
