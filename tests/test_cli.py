# SPDX-License-Identifier: Apache-2.0
"""The command line on tiny models: answers, streams, JSON, comparison, trace, and one line for every bad input."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rapid_jax import __version__
from rapid_jax.cli import main
from rapid_jax.config import RapidConfig
from rapid_jax.runtime import settings
from rapid_jax.summary import tell_summary
from tests.retrieval import encoders
from tests.test_answer import answer, reading
from tests.tiny_models import MAX_POSITIONS, save_decoder, words

QUESTION = "w12 w34 w56?"
MODES = ("rapid", "lossless", "phat", "target", "retrieval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, an encoder, a document, and settings that use them."""
    folder = tmp_path_factory.mktemp("tiny")
    save_decoder(folder / "model")
    encoders.save(folder / "encoder", "bert")
    (folder / "document.txt").write_text(words(300))
    overrides = [
        f"models.target={folder / 'model'}",
        f"models.encoder={folder / 'encoder'}",
        "retrieval.chunk_tokens=64",
        "retrieval.min_tokens=128",
        "sampling.max_new_tokens=24",
        "speculation.gamma=3",
        "compute.prefill_chunk=128",
        f"cache.folder={folder / 'cache'}",
    ]
    settings.save(settings.defaults(RapidConfig, overrides), folder / "run.yaml")
    return folder


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    """What main sets for jax where the user has not is undone after the test."""
    for name in ("TF_CPP_MIN_LOG_LEVEL", "TPU_MIN_LOG_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, "2"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))


@pytest.fixture
def rapid(folder, capfd):
    """`rapid(*arguments)`: (status, stdout, stderr) of `rapid answer` with the tiny models, questions and documents."""

    def run(*arguments: str | Path, document: str | Path | None = None, question: str = QUESTION):
        capfd.readouterr()
        given = ["--config", folder / "run.yaml", "--document", document or folder / "document.txt"]
        status = main(["answer", *map(str, given), "--question", question, *map(str, arguments)])
        return status, *capfd.readouterr()

    return run


def result(rapid, *arguments: str | Path, **given) -> dict:
    """The JSON object of a run that must end well."""
    status, out, err = rapid("--json", *arguments, **given)
    assert (status, len(out.splitlines())) == (0, 1), err
    return json.loads(out)


def refused(outcome, *expected: str) -> None:
    """The outcome is status 2, nothing on stdout and one line on stderr that says all of `expected`."""
    status, out, err = outcome
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.startswith("rapid: ")
    for text in expected:
        assert text in err


def test_json_is_one_object_with_every_key(rapid, folder):
    given = result(rapid)
    assert given.keys() == {
        "answer",
        "thoughts",
        "lossy",
        "token_ids",
        "finish_reason",
        "mode",
        "eta",
        "gamma",
        "drafted",
        "accepted",
        "acceptance_rate",
        "rounds",
        "tokens_per_round",
        "target_tokens",
        "draft_tokens",
        "retrieval",
        "copied",
        "copied_accepted",
        "draft_steps",
        "rounds_by_gamma",
        "document_tokens",
        "truncated",
        "sampling",
        "prefix_reused",
        "seconds",
        "tokens_per_second",
    }
    assert given["mode"] == "rapid" and (given["eta"], given["gamma"]) == (10.0, 3)
    assert 0 < len(given["token_ids"]) <= 24 and given["drafted"] > 0
    assert given["seconds"].keys() == {"load", "retrieval", "prefill", "compile", "first_token", "decode"}
    document = (folder / "document.txt").read_text()
    retrieved = given["retrieval"]
    assert retrieved["kept"] == len(retrieved["chunks"]) == len(retrieved["scores"]) >= 1
    assert all(document[chunk["start"] : chunk["end"]].strip() for chunk in retrieved["chunks"])
    assert given["draft_tokens"] < given["target_tokens"]


def test_the_streamed_answer_alone_is_on_stdout_and_the_rest_on_stderr(rapid):
    for mode in ("rapid", "target"):
        status, out, err = rapid("--mode", mode)
        assert (status, out) == (0, result(rapid, "--mode", mode)["answer"] + "\n")
        assert ("retrieved " in err) == (mode == "rapid")
        assert f"{mode}, eta " in err and "tokens/s" in err and "seconds: load " in err
        assert rapid("--mode", mode, "--quiet") == (0, out, "")


def test_what_was_retrieved_is_told_with_scores_and_offsets(rapid):
    given = result(rapid)["retrieval"]
    _, _, err = rapid()
    lines = [line.split() for line in err.splitlines() if line.startswith("  0.")]
    chunks = zip(given["chunks"], given["scores"], strict=True)
    assert [line[:2] for line in lines] == [
        [f"{score:.3f}", f"[{chunk['start']}:{chunk['end']}]"] for chunk, score in chunks
    ]


PLAIN = ("--temperature", "0", "--set", "speculation.transfer_temperature=null")  # greedy is the target's alone


def test_at_temperature_zero_without_transfer_all_modes_but_retrieval_say_the_same(rapid):
    answers = {mode: result(rapid, "--mode", mode, *PLAIN) for mode in MODES}
    assert all(answers[mode]["mode"] == mode for mode in MODES)
    target = answers["target"]["token_ids"]
    assert len(target) > 4
    for mode in ("rapid", "lossless", "phat"):
        assert answers[mode]["token_ids"] == target
        assert answers[mode]["drafted"] > 0
    assert answers["retrieval"]["target_tokens"] < answers["target"]["target_tokens"]
    assert answers["target"]["retrieval"] is None
    assert result(rapid, *PLAIN, "--gamma", "auto")["token_ids"] == target
    moved = [result(rapid, "--mode", mode, "--temperature", "0")["token_ids"] for mode in ("rapid", "phat")]
    assert moved[0] == moved[1] != target


def test_the_seed_decides_the_answer(rapid):
    first, again, other = (result(rapid, "--seed", seed, "--temperature", "1")["token_ids"] for seed in ("1", "1", "2"))
    assert first == again != other


def test_named_options_stand_over_set_over_the_file(rapid, tmp_path):
    given = ("--set", "sampling.max_new_tokens=5", "--set", "sampling.seed=7", "--max-new-tokens", "3")
    assert len(result(rapid, *given, "--save-config", tmp_path / "ran.yaml")["token_ids"]) <= 3
    ran = settings.load(RapidConfig, tmp_path / "ran.yaml")
    assert (ran.sampling.max_new_tokens, ran.sampling.seed, ran.speculation.gamma) == (3, 7, 3)


def test_without_a_config_the_defaults_are_overridden(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("RAPID_JAX_CACHE", str(tmp_path / "cache"))
    named = ["--model", folder / "model", "--mode", "target", "--temperature", "0", "--max-new-tokens", "4", "--json"]
    given = ["--document", folder / "document.txt", "--question", QUESTION, *named]
    assert main(["answer", *map(str, given)]) == 0
    assert json.loads(capfd.readouterr().out)["mode"] == "target"
    assert list((tmp_path / "cache" / "prefixes").iterdir())


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(rapid):
    whole = result(rapid, "--temperature", "0")["answer"]
    stop = whole[len(whole) // 2 :][:3]
    expected = whole[: whole.index(stop)]
    given = ("--temperature", "0", "--set", f"stop=[{json.dumps(stop)}]")
    cut = result(rapid, *given)
    assert (cut["answer"], cut["finish_reason"]) == (expected, "stop")
    assert rapid(*given)[1] == expected + "\n"


def test_a_second_run_reuses_the_documents_prefill(rapid, tmp_path):
    cache = ("--set", f"cache.folder={tmp_path / 'cache'}", "--temperature", "0")
    first = result(rapid, *cache)
    second = result(rapid, *cache, question="w7 and w8?")
    third = result(rapid, *cache)
    assert [run["prefix_reused"] for run in (first, second, third)] == [False, True, True]
    assert first["token_ids"] == third["token_ids"] != second["token_ids"]
    assert "prefill (document reused)" in rapid(*cache)[2]
    off = result(rapid, "--set", "cache.disk_gib=0", *cache)
    assert (off["prefix_reused"], off["token_ids"]) == (False, first["token_ids"])


@pytest.mark.parametrize(
    ("truncated", "mode", "said"),
    [
        (False, "retrieval", ""),
        (False, "rapid", ""),
        (True, "retrieval", "the document has 900 tokens and was cut (models.too_long = error)\n"),
        (True, "rapid", "the document has 900 tokens and was cut (models.too_long = error) to fit a prompt of 100\n"),
    ],
)
def test_the_summary_says_cut_of_a_document_that_was(capsys, truncated, mode, said):
    """In mode retrieval the target's prompt is shorter than the document, which is whole all the same."""
    given = answer(mode=mode, reading=reading(document_tokens=900, truncated=truncated))
    tell_summary(given, RapidConfig())
    told = capsys.readouterr().err
    assert said in told and ("cut" in told) == truncated


def test_a_long_document_is_cut_where_that_is_asked_for(rapid, tmp_path):
    (tmp_path / "long.txt").write_text(words(1500, seed=1))
    refused(rapid(document=tmp_path / "long.txt"), "the document is too long", "models.too_long=middle or head")
    for cut in ("head", "middle"):
        given = ("--set", f"models.too_long={cut}", "--mode", "target", "--temperature", "0")
        run = result(rapid, *given, document=tmp_path / "long.txt")
        assert run["document_tokens"] > MAX_POSITIONS > run["target_tokens"] > MAX_POSITIONS * 0.9
        assert f"(models.too_long = {cut})" in rapid(*given, document=tmp_path / "long.txt")[2]
        other = result(rapid, *given, document=tmp_path / "long.txt", question="w1 w2 w3 w4 w5 w6?")
        assert other["prefix_reused"]
        long = result(rapid, *given, document=tmp_path / "long.txt", question=words(200))
        assert not long["prefix_reused"] and long["target_tokens"] < MAX_POSITIONS


def test_the_document_may_come_from_standard_input(rapid, folder, monkeypatch):
    data = (folder / "document.txt").read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert result(rapid, document="-")["token_ids"] == result(rapid)["token_ids"]


def test_another_drafter_of_the_same_vocabulary_drafts(rapid, tmp_path):
    save_decoder(tmp_path / "drafter", seed=1)
    same, other = (
        result(rapid, "--mode", "lossless", "--temperature", "0", "--drafter", drafter)
        for drafter in ("same", tmp_path / "drafter")
    )
    assert other["token_ids"] == same["token_ids"]
    assert other["acceptance_rate"] != same["acceptance_rate"]


def test_compare_ends_with_an_aligned_table_of_the_three_ways(rapid):
    status, out, err = rapid("--compare", "--temperature", "0")
    assert (status, out) == (0, result(rapid, "--temperature", "0")["answer"] + "\n")
    lines = err.splitlines()
    start = next(number for number, line in enumerate(lines) if "prefilled once" in line)
    note, heading, *rows = lines[start : start + 5]
    assert heading.split() == [
        "mode",
        "tokens/s",
        "acceptance",
        "tokens/round",
        "prefill",
        "s",
        "compile",
        "s",
        "decode",
        "s",
    ]
    assert [row.split()[0] for row in rows] == ["rapid", "target", "retrieval"]
    assert "prefilled once" in note
    assert "reused + " in rows[1] and "reused" not in rows[2]
    for name in ("tokens/s", "acceptance", "tokens/round", "prefill s", "compile s"):
        end = heading.index(name) + len(name)
        assert all(row[end - 1] != " " and row[end : end + 2] == "  " for row in rows)
    assert max(len(line) for line in (heading, *rows)) <= 120


def test_compare_is_part_of_the_json(rapid):
    given = result(rapid, "--compare", *PLAIN)
    assert [row["mode"] for row in given["compare"]] == ["rapid", "target", "retrieval"]
    assert given["compare"][0]["answer"] == given["compare"][1]["answer"] == given["answer"]
    assert given["compare"][1]["prefix_reused"] and not given["compare"][2]["prefix_reused"]
    two = result(rapid, "--compare", "--mode", "target")["compare"]
    assert [row["mode"] for row in two] == ["target", "retrieval"]


def test_a_trace_is_written_with_its_settings_beside_it(rapid, tmp_path, folder):
    assert rapid("--trace", tmp_path / "answer.html", "--seed", "3")[0] == 0
    page = (tmp_path / "answer.html").read_text(encoding="utf-8")
    assert QUESTION in page and 'class="answer"' in page
    assert settings.load(RapidConfig, tmp_path / "answer.yaml").sampling.seed == 3


def test_conversion_writes_a_folder_that_answers_the_same(rapid, folder, tmp_path, capfd):
    assert main(["convert", str(folder / "model"), str(tmp_path / "copy"), "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")
    given = ("--temperature", "0", "--mode", "target")
    assert result(rapid, *given, "--model", tmp_path / "copy")["answer"] == result(rapid, *given)["answer"]
    refused((main(["convert", str(folder / "model"), str(tmp_path / "copy")]), *capfd.readouterr()), "it exists")
    absent = [str(tmp_path / "absent"), str(tmp_path / "new")]
    refused((main(["convert", *absent]), *capfd.readouterr()), "absent: expected a checkpoint folder")
    wrong = [str(folder / "model"), str(tmp_path / "new"), "--dtype", "int4"]
    refused((main(["convert", *wrong]), *capfd.readouterr()), "dtype must be auto, float32 or bfloat16, got 'int4'")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "sampling.temprature=1"], ["unknown setting 'temprature'", "did you mean 'temperature'"]),
        (["--set", "garbage"], ["--set garbage: expected section.key=value"]),
        (["--set", "sampling=1"], ["is a section"]),
        (["--mode", "fast"], ["expected one of 'rapid', 'lossless', 'phat', 'target', 'retrieval'", "'fast'"]),
        (["--temperature", "hot"], ["sampling.temperature: expected a number or null, got 'hot'"]),
        (["--temperature", "nan"], ["expected a number or null, got 'nan'"]),
        (["--temperature", ".inf"], ["temperature must be a number >= 0, 0 or 1e-4 to 1e4, got inf"]),
        (["--temperature", "-1"], ["temperature must be a number >= 0"]),
        (["--eta", "-1"], ["eta must be a number from 0"]),
        (["--gamma", "65"], ["gamma must be auto or 0 to 64"]),
        (["--gamma", "often"], ["a whole number or 'auto', got 'often'"]),
        (["--max-new-tokens", "0"], ["max_new_tokens must be >= 1"]),
        (["--seed", "-1"], ["seed must be in [0, 2^32)"]),
        (["--model", "absent"], ["absent: expected a checkpoint folder, a .gguf file or the name 'smollm2'"]),
        (["--model", "12"], ["12: expected a checkpoint folder"]),
        (["--drafter", "absent"], ["absent: expected a checkpoint folder"]),
        (["--set", "models.encoder=absent"], ["encoder: expected 'minilm' or a Hugging Face folder, got 'absent'"]),
        (["--set", "models.max_context=40"], ["no room for a document"]),
        (["--set", "cache.disk_gib=.inf"], ["cache.disk_gib"]),
        (["--config", "absent.yaml"], ["absent.yaml: cannot be read"]),
        (["--trace", "answer.txt"], ["--trace: expected a name that ends in .html"]),
        (["--trace", "absent/answer.html"], ["cannot be written: no folder absent"]),
        (["--save-config", "absent/run.yaml"], ["cannot be written: no folder absent"]),
        (["--save-config", "."], ["cannot be written: it is a folder"]),
        (["--question", " "], ["expected a question, got an empty one"]),
        (["--document", "absent.txt"], ["document absent.txt: cannot be read: No such file or directory"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, expected, rapid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(rapid(*arguments), *expected)
    assert not list(tmp_path.iterdir())


def test_an_unknown_key_in_the_file_is_named_with_the_nearest(rapid, folder, tmp_path):
    text = (folder / "run.yaml").read_text().replace("  gamma: 3", "  gama: 3")
    (tmp_path / "run.yaml").write_text(text)
    refused(rapid("--config", tmp_path / "run.yaml"), "run.yaml", "unknown setting 'gama'", "did you mean 'gamma'")


def test_bad_documents_are_refused_before_a_model_is_loaded(rapid, tmp_path, monkeypatch):
    monkeypatch.setattr("rapid_jax.rapid.Rapid.__init__", None)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary").write_bytes(b"a\0b")
    refused(rapid(document=tmp_path / "empty.txt"), "empty.txt: expected a document with text in it")
    refused(rapid(document=tmp_path / "binary"), "binary: expected text, got a binary file")
    refused(rapid(document=tmp_path), "Is a directory")


def test_a_truncated_checkpoint_is_refused(rapid, folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(rapid("--model", tmp_path / "model"), "model.safetensors")


def test_a_drafter_of_another_vocabulary_is_refused_before_weights_are_read(rapid, tmp_path, monkeypatch):
    monkeypatch.setattr("rapid_jax.engine.models.load_model", None)
    save_decoder(tmp_path / "drafter", corpus=["quite another text about other things"])
    outcome = rapid("--drafter", tmp_path / "drafter")
    refused(outcome, "the drafter must have the target's vocabulary: expected token ", str(tmp_path / "drafter"))


def test_a_trace_never_replaces_what_the_run_reads(rapid, folder, tmp_path):
    shutil.copy(folder / "run.yaml", tmp_path / "run.yaml")
    (tmp_path / "page.html").write_text("<p>w1 w2 w3")
    before = (tmp_path / "run.yaml").read_text()
    outcome = rapid("--config", tmp_path / "run.yaml", "--trace", tmp_path / "run.html")
    refused(outcome, "would write over", "run.yaml")
    page = tmp_path / "page.html"
    refused(rapid("--trace", page, document=page), "would write over", "page.html")
    refused(rapid("--save-config", page, document=page), "would write over", "page.html")
    assert (tmp_path / "run.yaml").read_text() == before and page.read_text() == "<p>w1 w2 w3"


def test_a_full_disk_is_one_line_and_leaves_nothing(rapid, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    outcome = rapid("--save-config", tmp_path / "run.yaml")
    refused(outcome, "run.yaml: the settings cannot be written: No space left on device")
    status, out, err = rapid("--trace", tmp_path / "answer.html", "--quiet")
    assert status == 2 and out.strip()
    assert err == f"rapid: {tmp_path / 'answer.html'}: the trace cannot be written: No space left on device\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")])
def test_too_little_memory_is_one_line_and_status_2(rapid, monkeypatch, error):
    def starve(*args, **kwargs):
        raise error

    monkeypatch.setattr("rapid_jax.rapid.Rapid.answer", starve)
    refused(rapid(), "out of memory")


def test_an_interrupt_is_one_line_and_status_130(rapid, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("rapid_jax.questions.read_document", interrupted)
    assert rapid() == (130, "", "rapid: interrupted\n")


def test_wrong_usage_leaves_with_status_2_and_version_with_0(capfd):
    for arguments in ([], ["answer", "--docu", "x"], ["chat"], ["unknown"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capfd.readouterr().out == f"rapid {__version__}\n"


def in_process(*arguments: str | Path, **options) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    environment |= {"JAX_ENABLE_COMPILATION_CACHE": "true"}
    command = [sys.executable, "-m", "rapid_jax", "answer", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, **options)


def test_a_reader_that_goes_away_is_no_traceback(folder):
    given = ["--config", folder / "run.yaml", "--document", folder / "document.txt", "--question", QUESTION]
    with in_process(*given, "--quiet") as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_help_and_bad_settings_need_no_jax(folder):
    program = "import sys; from rapid_jax.cli import main; sys.exit(main(sys.argv[1:]) + 10 * ('jax' in sys.modules))"
    given = ["answer", "--document", str(folder / "document.txt"), "--question", "x", "--mode", "fast"]
    assert subprocess.run([sys.executable, "-c", program, *given], capture_output=True, check=False).returncode == 2


def test_smollm2_answers_from_a_short_document(smollm2_path, tmp_path):
    (tmp_path / "document.txt").write_text(
        "The lighthouse of Varn stands on a rock in the northern sea. It was built in 1874 by Ida Holm.\n\n"
        "The keeper of the lighthouse keeps seven goats. They eat the grass between the stones.\n"
    )
    options = ["temperature=0", "max_new_tokens=24", "seed=0"]
    sampling = [part for option in options for part in ("--set", f"sampling.{option}")]
    cache = ["--set", f"cache.folder={tmp_path / 'cache'}", "--set", "models.layout=stacked", "--gamma", "3"]
    question = "In which year was the lighthouse of Varn built?"
    given = ["--document", tmp_path / "document.txt", "--question", question, *sampling, *cache]
    out, err = in_process(*given, "--json").communicate(timeout=300)
    answer = json.loads(out)
    assert "1874" in answer["answer"]
    assert answer["retrieval"]["kept"] >= 1 and answer["drafted"] > 0
    assert "Traceback" not in err and answer["answer"] not in err
    assert list((tmp_path / "cache" / "programs").iterdir())
    assert list((tmp_path / "cache" / "embeddings").iterdir())
