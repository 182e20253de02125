# SPDX-License-Identifier: Apache-2.0
"""RULER's prompts from files as the published generators write them: made by hand, with other words."""

import gzip
import json

import pytest

from rapid_jax.evaluate import ruler
from rapid_jax.evaluate.ruler_files import samples
from rapid_jax.evaluate.samples import SuiteOptions
from rapid_jax.evaluate.scoring import score
from rapid_jax.runtime.errors import InputError

FIRST = "Keep in mind what follows.\n\nHay. {\nThe word is 12.\n{document} hay.\nQuestion: What is the word? "


def line(number, length=64, **changes):
    found = {"index": number, "input": f"{number} {FIRST}", "outputs": ["12", "7"], "max_length": length}
    return found | {"length": 60, "gen_prefix": "Answer: The word is"} | changes


def write(folder, **files):
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def unmeasured(sample):
    raise AssertionError("its lengths are what they are")


def made(folder, **options):
    return samples(SuiteOptions(data=folder, **options), unmeasured)


def test_the_prompt_is_the_file_s_to_the_letter(tmp_path):
    write(tmp_path, vt=[line(0), line(1, gen_prefix="")], qa_1=[line(0, outputs="Rome")])
    found = {sample.id: sample for sample in made(tmp_path)}
    assert list(found) == ["vt/64/0", "vt/64/1", "qa_1/64/0"]
    for sample in found.values():
        before, between, after = (sample.template or "").replace("{question}", "{document}").split("{document}")
        text = before + sample.document + between + sample.question + after
        assert text.removeprefix(sample.id[-1]) == f" {FIRST}"
        assert sample.question == "Question: What is the word? " and sample.length == 64
    assert [sample.begins for sample in found.values()] == ["Answer: The word is", "", "Answer: The word is"]
    assert [found[id].max_new_tokens for id in found] == [ruler.NEW_TOKENS[id.partition("/")[0]] for id in found]
    assert score(found["vt/64/0"].metric, " 7.", found["vt/64/0"].answers) == 0.5  # all that are asked for
    assert score(found["qa_1/64/0"].metric, "ROME", found["qa_1/64/0"].answers) == 1


def test_lengths_are_picked_from_apart(tmp_path):
    rows = [line(number, length) for number in range(8) for length in (128, 64)]
    (tmp_path / "fwe.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    few, more, other = (made(tmp_path, samples=count, seed=seed) for count, seed in ((3, 0), (5, 0), (3, 1)))
    assert [sample.length for sample in few] == [64] * 3 + [128] * 3
    assert {sample.id for sample in few} < {sample.id for sample in more}
    assert [sample.id for sample in few] != [sample.id for sample in other]
    by_id = {sample.id: sample.document for sample in made(tmp_path)}
    assert len(by_id) == 16 and all(by_id[f"fwe/{length}/5"].startswith("5 ") for length in (64, 128))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input": "no line of its own"}, "the question in its last line, got 'no line of its own'"),
        ({"input": "Text.\n  \n"}, "the question in its last line"),
        ({"max_length": "4096"}, "'max_length' to be tokens, 1 or more, got '4096'"),
        ({"outputs": []}, "'outputs' to be a text or a list of texts"),
        ({"gen_prefix": 3}, "'gen_prefix' to be a text"),
    ],
)
def test_other_lines_are_refused_with_their_place(tmp_path, changes, said):
    write(tmp_path, cwe=[line(0), line(1, **changes)])
    with pytest.raises(InputError) as caught:
        made(tmp_path)
    assert said in str(caught.value) and "cwe.jsonl: line 2: " in str(caught.value)


def test_folders_without_the_tasks_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"expected niah_single_1\.jsonl there, or the file of another task, found"):
        made(tmp_path)
    write(tmp_path, vt=[line(0)], other=[line(0)])
    with pytest.raises(InputError, match=r"expected cwe\.jsonl there"):
        made(tmp_path, tasks=("vt", "cwe"))
    with pytest.raises(InputError, match="expected --data, a folder with"):
        samples(SuiteOptions(), unmeasured)
