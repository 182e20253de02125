# SPDX-License-Identifier: Apache-2.0
"""An evaluation in a bucket leaves what one on a disk does, byte for byte, whatever stops it or shares it."""

import gzip
import itertools
import json
import signal
import sys
import threading
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import pytest

from rapid_jax.cli import main
from rapid_jax.evaluate import infinitebench, longbench, ruler_qa
from rapid_jax.evaluate.data_files import records
from rapid_jax.evaluate.folder import open_answers
from rapid_jax.evaluate.haystack import running_text
from rapid_jax.evaluate.report import report
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.share import Share
from rapid_jax.runtime.storage import files_below, place_of, working_place
from tests.bucket_server import BUCKET, Killed, killed_at
from tests.evaluate.test_command import tiny  # noqa: F401 - a fixture
from tests.evaluate.test_run import begun, run
from tests.longpo.tiny_round import KillAt, ended
from tests.test_processes import ROOT, environment

pytestmark = pytest.mark.usefixtures("no_waits")
_COUNT = itertools.count()


@pytest.fixture
def folder(bucket):
    return working_place(f"gs://{BUCKET}/evaluation {next(_COUNT)}", "--out")


def files_in(place) -> dict[str, bytes]:
    return {name: (place / name).read_bytes() for name in files_below(place)}


def test_what_lies_in_a_bucket_has_the_bytes_of_what_lies_on_a_disk(folder, s3_bucket, tmp_path):
    in_s3 = working_place("s3://models/an evaluation", "--out")
    for place in (tmp_path, folder, in_s3):
        run(place)
        _, scores = report(place)
        assert "Samples finished of 10: target (10), rapid-eta=5 (10)." in scores
    here = files_in(tmp_path)
    assert files_in(folder) == files_in(in_s3) == here and {"answers-target.jsonl", "report.html", "suite.json"} < set(
        here
    )


@pytest.mark.parametrize("moment", [1, 2, 3, 9, 10, 11, 14, 17])
def test_one_that_was_killed_at_any_write_goes_on_to_the_same_bytes(moment, folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(moment, patch, "write", "delete", "upload")
        run(folder)
        raise Killed
    run(folder)
    run(tmp_path)
    assert files_in(folder) == files_in(tmp_path)


PROGRAM = """
import sys
from rapid_jax.runtime.storage import working_place
from tests.evaluate.test_run import run
run(working_place(sys.argv[1], "--out"))
"""


def test_a_process_that_is_killed_leaves_a_folder_to_go_on_with(folder, bucket, tmp_path):
    names = environment(1) | {"PYTHONPATH": str(ROOT)}
    process = Popen([sys.executable, "-c", PROGRAM, str(folder)], env=names, text=True, stdout=DEVNULL, stderr=PIPE)

    class KillAtPart(KillAt):
        def __call__(self, asked: str) -> str | None:
            return super().__call__(asked) if asked.startswith("POST") and ".parts" in asked else None

    bucket.fault = killed = KillAtPart(4, [process], signal.SIGKILL, "lost")
    codes, said = ended([process])
    assert killed.at and codes == [-signal.SIGKILL], said
    bucket.heal()
    left = [name.removeprefix(f"{folder.key}/") for name in bucket.names(f"{folder.key}/")]
    assert "lease.json" in left and sum(".parts/" in name for name in left) == 4
    run(folder)
    run(tmp_path)
    assert files_in(folder) == files_in(tmp_path)


def test_shares_at_once_are_the_whole(folder, tmp_path):
    errors = []

    def one(index: int) -> None:
        try:
            run(folder, share=Share(index, 2), batch=1)
        except BaseException as error:
            errors.append(error)

    begun(folder)
    threads = [threading.Thread(target=one, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        run(tmp_path, share=Share(index, 2), batch=1)
    assert not errors and files_in(folder) == files_in(tmp_path)
    assert len([name for name in files_in(folder) if name.startswith("answers-")]) == 4


def test_a_share_that_another_run_has_is_refused(folder):
    begun(folder)
    with open_answers(folder, ["target"], Share(1, 2), leads=True):
        run(folder, share=Share(0, 2))
        with pytest.raises(InputError, match=rf"^{folder}: expected no other run there, got that of process"):
            run(folder, share=Share(1, 2))
    run(folder, share=Share(1, 2))


def test_a_line_that_was_torn_on_a_disk_is_cut_away_in_a_bucket(folder, bucket, tmp_path):
    run(tmp_path)
    path = tmp_path / "answers-target.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    bucket.put_folder(tmp_path, folder.key)
    path.write_bytes(whole)
    run(folder, batch=1)
    assert files_in(folder) == files_in(tmp_path)


def test_the_command_reads_and_writes_a_bucket_and_goes_on_when_its_store_failed(
    tiny,  # noqa: F811
    folder,
    bucket,
    tmp_path,
    capfd,
):
    data = Path(tiny[tiny.index("--data") + 1])
    there = bucket.put(f"{folder.key}-data/q.jsonl.gz", gzip.compress(data.read_bytes()))
    given = [word if word != str(data) else there for word in tiny]
    command = ["evaluate", *given, "--modes", "target", "--quiet", "--resume", "--out", str(folder)]
    writes = itertools.count()
    bucket.fault = lambda asked: "503" if asked.startswith("POST") and ".parts" in asked and next(writes) else None
    assert main(command) == 75
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"rapid: gs://{BUCKET}/{folder.key}/answers-target.jsonl.parts/"), err
    assert err.endswith(": nothing is lost, the run can be started again\n") and err.count("\n") == 1
    bucket.heal()
    assert main(command) == 0
    assert capfd.readouterr().out.endswith(f"\n\nreport: {folder}/report.md, report.html\n")
    assert main(["evaluate", *tiny, "--modes", "target", "--quiet", "--out", str(tmp_path / "here")]) == 0
    timed = ("tokens_per_second", "seconds", "prefix_reused")
    lines = [
        [
            {key: value for key, value in json.loads(line).items() if key not in timed}
            for line in (place / "answers-target.jsonl").read_bytes().splitlines()
        ]
        for place in (folder, tmp_path / "here")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 3
    assert main(["compare", str(folder), str(tmp_path / "here"), "--out", str(folder / "compared")]) == 0
    assert main(["report", str(folder), "--out", str(tmp_path / "there")]) == 0
    assert (tmp_path / "there/report.md").exists() and (folder / "compared/contrast.md").is_file()
    assert main([*command[:-3], *command[-2:]]) == 2  # without --resume
    assert f"{folder}: expected a folder without an evaluation, got one" in capfd.readouterr().err


def test_data_in_a_bucket_is_that_on_a_disk(folder, bucket, tmp_path):
    choices = " ".join(f"$C_{letter}$" for letter in "ABCD")
    squad = [{"question": "?", "id": "1", "answers": [{"text": "b", "answer_start": 2}], "is_impossible": False}]
    articles = [{"title": "t", "paragraphs": [{"context": text, "qas": squad} for text in ("a b", "c b")]}]
    files = {
        "lines.jsonl": '{"a": 1}\r\n\n{"a": 2}\n',
        "texts/b.txt": "\ufeffLast of all.\r\rAnother one here.\r\n",
        "texts/a.txt": "First of all.\n",
        "prompts/0shot.txt": f"$DOC$ $Q$ {choices}\r\n",
        "prompts/0shot_cot.txt": f"$DOC$ $Q$ {choices}",
        "prompts/0shot_cot_ans.txt": f"$Q$ {choices} $COT$",
        "squad.json": json.dumps({"data": articles}),
        "longbook_qa_eng.jsonl.gz": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n')[:-4])
    there = place_of(bucket.put_folder(tmp_path, folder.key), "--data")
    for name in ("lines.jsonl", "lines.jsonl.gz"):
        assert [item for _, item in records(there / name)] == [{"a": 1}, {"a": 2}]
    assert running_text(there / "texts") == running_text(tmp_path / "texts") != ""
    assert longbench.templates_of(there) == longbench.templates_of(tmp_path)
    assert ruler_qa.read(there) == ruler_qa.read(tmp_path) and ruler_qa.read(there)
    assert infinitebench._path(there, "En.QA").name == infinitebench._path(tmp_path, "En.QA").name
    for name, said in (("cut.jsonl.gz", "cannot be read: Compressed file ended"), ("no.jsonl", "no such file")):
        with pytest.raises(InputError, match=rf"^gs://.*{name}: .*{said}"):
            list(records(there / name))
