# SPDX-License-Identifier: Apache-2.0
"""The report: known means, averages and differences, warnings, samples, figures, and pages that hold nothing live."""

import base64
import csv
import re
import struct
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rapid_jax.evaluate import ablation, figures, ruler
from rapid_jax.evaluate.page import Bold, Heading, Table, Verbatim, markdown, page, plain, text
from rapid_jax.evaluate.report import report
from rapid_jax.evaluate.results import read
from rapid_jax.evaluate.summary import percent
from rapid_jax.runtime import figure_files
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.templates import style
from tests.evaluate.synthetic import folder, grid, line


def some(count: int):
    """Right are the first `count` of each cell."""
    return lambda task, length, number: number < count


def written(run: Path, name: str = "report.md") -> str:
    return (run / name).read_text(encoding="utf-8")


def row(page: str, first: str, which: int = 0) -> list[str]:
    """The cells behind `first` in the `which`-th row that begins with it."""
    lines = [line for line in page.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in lines[which].strip("|").split("|")][1:]


def width(shown: str) -> float:
    _, low, high = map(float, re.findall(r"\d+\.\d", shown))
    return high - low


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) > 5000
    return struct.unpack(">II", png[16:24])


def test_scores_and_differences_are_the_known_ones(tmp_path: Path):
    run = folder(
        tmp_path, {mode: grid(mode, some(count)) for mode, count in (("target", 10), ("lossless", 11), ("rapid", 16))}
    )
    place, printed = report(run)
    assert place == run / "report.html"
    found = written(run)
    target, lossless, rapid = row(found, "4K")
    assert target.startswith("50.0 [") and lossless.startswith("55.0 [") and rapid.startswith("80.0 [")
    lines = printed.splitlines()
    assert lines[:2] == ["qa, scores in %", "==============="]
    assert [re.split(r"\s{2,}", line) for line in lines if line.startswith(("length", "4K"))] == [
        ["length", "target", "lossless", "rapid"],
        ["4K", target, lossless, rapid],
    ]
    low, high = map(float, re.findall(r"\d+\.\d", target)[1:])
    assert 25 <= low < 50 < high <= 75
    assert row(found, "all")[0].startswith("50.0 [")
    lossless, rapid = row(found, "4K", 1)
    assert lossless.startswith("no difference +5.0 [+0.0, ")
    assert re.fullmatch(r"\*\*better \+30\.0 \[\+\d+\.\d, \+\d+\.\d\]\*\*", rapid)
    assert "Warning" not in found


def test_rulers_averages_weigh_tasks_and_groups(tmp_path: Path):
    def right(task: str, length: int, number: int) -> bool:
        return task in ruler.GROUPS["NIAH"] or (task == "vt" and number < 10)

    run = folder(tmp_path, {"target": grid("target", right, ruler.TASKS, [4096])}, "ruler")
    report(run)
    found = written(run)
    assert row(found, "average of 13 tasks")[0].startswith(f"{100 * 8.5 / 13:.1f} [")
    assert row(found, "average of NIAH, VT, QA")[0].startswith("50.0 [")
    assert row(found, "cwe")[0] == "0.0 [0.0, 16.8]"
    for group in (*ruler.GROUPS, "Aggregation"):
        assert f"\n### {group}\n" in found
    part = folder(tmp_path / "part", {"target": grid("target", right, ruler.TASKS[:11], [4096])}, "ruler")
    report(part)
    assert "average of 11 tasks" in written(part) and "NIAH, VT, QA" not in written(part)


def test_splits_are_by_tag(tmp_path: Path):
    tags = [{"difficulty": ("easy", "hard")[n >= 20], "id": str(n)} for n in range(40)]
    lines = [line("longbench-v2", None, n, "target", float(n < 10), tags=tags[n]) for n in range(40)]
    run = folder(tmp_path, {"target": lines}, "longbench-v2")
    report(run)
    found = written(run)
    assert row(found, "difficulty: easy")[0].startswith("50.0 [") and row(found, "difficulty: hard") == [
        "0.0 [0.0, 16.8]"
    ]
    assert "id: " not in found and "Length own" in found


def test_what_makes_scores_meaningless_is_told(tmp_path: Path):
    lines = grid("target", some(10), count=20)
    for one in lines:
        number = int(one["id"].rpartition("/")[2])
        if one["length"] == 8192:
            one |= {
                "truncated": number < 2,
                "answer": "" if number < 1 else "x",
                "finish_reason": "length" if number < 5 else "stop",
            }
    run = folder(tmp_path, {"target": lines, "rapid": grid("rapid", some(10), count=19)})
    path = run / "answers-rapid.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    report(run)
    found = written(run)
    faults = [line for line in found.splitlines() if line.startswith("| target |")]
    assert faults[:2] == ["| target | 4K | 20 | 0.0 | 0.0 | 0.0 |", "| target | 8K | 20 | **10.0** | 5.0 | **25.0** |"]
    warnings = [line for line in found.splitlines() if line.startswith("**Warning:**")]
    assert warnings[0] == "**Warning:** documents did not fit and were cut: 10.0 % at 8K (target)."
    assert warnings[1] == "**Warning:** answers end at their limit of tokens: 25.0 % at 8K (target)."
    assert "last line was not whole and is left out: rapid" in warnings[2]
    assert "37 are common to all" in warnings[3]
    assert "2 of 4 scores" in warnings[4] and "fewer than 20 questions" in warnings[4]
    assert len(warnings) == 5


def test_the_head_names_settings_and_few_samples_make_nothing_bold(tmp_path: Path):
    by_label = {mode: grid(mode, some(count), count=19) for mode, count in (("target", 2), ("rapid", 17))}
    report(folder(tmp_path, by_label))
    found = written(tmp_path)
    assert "Samples finished of 40: target (38), rapid (38).\n\nLengths: 4K, 8K." in found
    named = "models.target big, models.drafter small, models.encoder minilm, models.max_context null, "
    named += "models.too_long error, sampling.temperature 0.0, speculation.gamma 10, speculation.eta 10.0."
    assert named in found
    assert "Intervals and verdicts need 20 different questions, and 5 of every task in an average" in found
    # The same 19 questions at both lengths are 19 in all, too.
    for name in ("4K", "all"):
        assert row(found, name) == ["10.5", "89.5"] and row(found, name, 1) == ["too few questions +78.9"]


def test_one_question_in_many_samples_has_no_interval(tmp_path: Path):
    by_label = {
        mode: [line("task", 4096, n, mode, score, question="The one?") for n in range(30)]
        for mode, score in (("target", 0.0), ("rapid", 1.0))
    }
    printed = report(folder(tmp_path, by_label))[1]
    assert row(written(tmp_path), "task", 1) == ["0.0", "100.0"]
    assert row(written(tmp_path), "task", 3) == ["too few questions +100.0"]
    assert re.search(r"^task +0.0 +100.0$", printed, re.M)


def test_the_same_questions_at_more_lengths_do_not_narrow_an_interval(tmp_path: Path):
    by_label = {"target": grid("target", some(10), lengths=[4096, 8192, 16384, 32768])}
    same = folder(tmp_path / "same", by_label)
    report(same)
    assert row(written(same), "all") == row(written(same), "4K") == row(written(same), "32K")
    for one in by_label["target"]:
        one["question"] += f" At {one['length']}."
    other = folder(tmp_path / "other", by_label)
    report(other)
    assert width(row(written(other), "all")[0]) < 0.6 * width(row(written(other), "4K")[0])


def test_prompts_and_thoughts_are_shown_once(tmp_path: Path):
    modes = ("target", "rapid", "retrieval")
    by_label = {mode: grid(mode, some(5), lengths=[4096], count=1) for mode in modes}
    by_label["rapid"][0]["thoughts"] = "Let me see."
    by_label["retrieval"][0]["prompt_ends"] = ["<s>short", "end"]
    report(folder(tmp_path, by_label))
    found = written(tmp_path)
    assert "The thoughts of rapid, which it answered by:\n\n```text\nLet me see.\n```" in found
    assert "The prompt begins (target, rapid):\n\n```text\n<s>user\n```" in found
    assert "The prompt ends (retrieval):\n\n```text\nend\n```" in found
    assert found.count("drafter's prompt begins (rapid):") == 1 and found.count("The thoughts of") == 1


def test_three_samples_of_a_task_are_shown_in_full(tmp_path: Path):
    answers = {"target": "red\n```\nfence ``` inside", "rapid": "blue"}
    by_label = {mode: grid(mode, some(5), ["one"], answer=said) for mode, said in answers.items()}
    for lines in by_label.values():
        lines[7]["prompt_tokens"], lines[3]["prompt_tokens"] = 50, 9000  # whatever length they were made for
    run = folder(tmp_path, by_label)
    report(run)
    found = written(run)
    assert re.findall(r"^#### (.*)$", found, re.M) == ["one/4096/7", "one/8192/1", "one/4096/3"]
    assert "````text\nred\n```\nfence ``` inside\n````" in found
    assert found.count("```text\nblue\n```") == 6  # what is right, and what rapid says, three times each
    assert "**target: 100.0** (9,000 prompt tokens, 6 new ones, ended by stop)" in found
    assert "What is word 7 of one?" in found


def test_speed_is_by_length_and_mode(tmp_path: Path):
    by_label = {mode: grid(mode, some(5)) for mode in ("target", "rapid")}
    for number, one in enumerate(by_label["rapid"]):
        if one["length"] == 4096 or number % 2:  # all of the shorter ones, some of the longer
            one |= {"prefix_reused": True, "seconds": one["seconds"] | {"prefill": 0.001}}
    run = folder(tmp_path, by_label)
    report(run)
    speed = written(run).partition("## Speed")[2]
    assert "| target | 4K | - | 1.00 | 30.0 | 1.00 | 0.50 |" in speed
    assert "| rapid | 4K | 75.0 | 3.50 | 60.0 | reused | 0.50 |" in speed
    assert "| rapid | 8K | 75.0 | 3.50 | 30.0 | 2.00 | 0.50 |" in speed


def everything(run: Path) -> Path:
    """A run that there is a figure of every kind for."""
    changes = {
        "target": {},
        "retrieval": {},
        "rapid": {},
        "rapid-eta=5": {"eta": 5},
        "rapid-eta=20": {"eta": 20},
        "rapid-min_tokens=2048": {"retrieval.min_tokens": 2048},
    }
    depths = [0.0, 0.5, 1.0]
    by_label = {}
    for index, (label, settings) in enumerate(changes.items()):
        lines = grid(label, some(5 + 2 * index), ["one", "two"], count=21, settings=settings)
        for number, one in enumerate(lines):
            one["depth"] = depths[number % 3]
        by_label[label] = lines
    return folder(run, by_label)


APART = {"unrelated": {}, "unrelated-eta=40": {"eta": 40}}


def test_all_figures_render_and_equal_results_give_equal_files(tmp_path: Path):
    run = everything(tmp_path / "run")
    out, again = tmp_path / "out", tmp_path / "again"
    report(run, out)
    report(run, again)
    names = {"depths", "eta", "min_tokens", "scores", "speed", "tasks"}
    figures = {f"{name}.{kind}" for name in names for kind in ("png", "svg", "csv")}
    assert {path.name for path in out.iterdir()} == {*figures, "report.html", "report.md"}
    for path in out.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    for name in names:
        width, height = size((out / f"{name}.png").read_bytes())
        assert width > 500 and height > 250
        assert f"]({name}.png)" in written(out)
    assert written(out, "report.html").count('src="data:image/svg+xml;base64,') == len(names)
    assert not list(run.glob("*.png"))


def test_an_ablation_holds_the_configured_value_and_modes_apart(tmp_path: Path):
    found = ablation._series(read(everything(tmp_path)), "speculation.eta")
    assert found == {"rapid": {5.0: "rapid-eta=5", 10.0: "rapid", 20.0: "rapid-eta=20"}}
    found = ablation._series(read(tmp_path), "retrieval.min_tokens")
    assert found == {"rapid": {2048.0: "rapid-min_tokens=2048", 4096.0: "rapid"}}
    lines = {f"rapid-{name}": grid(f"rapid-{name}", some(5), settings=said) for name, said in APART.items()}
    found = ablation._series(read(folder(tmp_path, lines)), "speculation.eta")
    assert found["rapid-unrelated"] == {10.0: "rapid-unrelated", 40.0: "rapid-unrelated-eta=40"}
    assert "rapid-unrelated" not in found["rapid"].values()


def test_depths_are_drawn_of_samples_with_one_needle_alone(tmp_path: Path):
    tasks = {"niah_single_1": True, "niah_multivalue": False, "vt": False, "qa_1": False}
    for task, one in tasks.items():
        lines = grid("target", some(5), [task])
        for number, sample in enumerate(lines):
            sample["depth"] = number % 2 / 2
        run = folder(tmp_path / task, {"target": lines}, "ruler")
        assert (figures._depths(read(run)) is not None) == one


def test_there_are_no_figures_without_data(tmp_path: Path):
    run = folder(tmp_path / "one", {"target": grid("target", some(5), lengths=[4096])})
    report(run)
    assert not list(run.glob("*.png"))
    flat = folder(tmp_path / "flat", {mode: grid(mode, some(5), lengths=[None]) for mode in ("target", "rapid")})
    report(flat)
    assert [path.name for path in flat.glob("*.png")] == ["scores.png"]
    size((flat / "scores.png").read_bytes())
    # Values of eta that belong to different modes are no series; nor are scores that are all 0 drawn wrongly.
    lines = {"rapid-eta=5": {"eta": 5}, "phat-eta=20": {"eta": 20}}
    by_label = {label: grid(label, some(0), settings=said) for label, said in lines.items()}
    apart = folder(tmp_path / "apart", by_label, settings={"stop": []})
    report(apart)
    assert sorted(path.name for path in apart.glob("*.png")) == ["scores.png", "speed.png"]


def test_what_models_say_is_never_live(tmp_path: Path):
    said = '<script>alert(1)</script><img src="http://x.invalid/a.png" onerror="x">\ud800'
    lines = grid("target", some(5), ["<b>task</b>"], answer=said, question="<i>?</i> & [a](http://x.invalid)")
    run = folder(tmp_path, {"target": lines})
    report(run)
    found = written(run, "report.html")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in found and "&lt;b&gt;task&lt;/b&gt;" in found
    assert not re.search(r"<script|<img src=\"(?!data:)|<img [^>]*src=\"(?!data:)|<i>|<b>|href=|@import", found)
    assert r"\<b\>task\</b\>" in written(run)


def test_names_of_any_letters_are_drawn_and_printed(tmp_path: Path):
    """Dollars begin no formula, what the font lacks is no warning, and a terminal obeys nothing."""
    tasks = ["$\\frac$", "\x1b]0;owned\x07\x1b[2J", "答え\n| a", "\u202egnp.exe", "\ud800", "<b>_"]
    by_label = {mode: grid(mode, some(5), tasks) for mode in ("target", "$x_\x1b[31m")}
    printed = report(folder(tmp_path, by_label))[1]
    assert {path.name for path in tmp_path.glob("*.png")} == {"scores.png", "tasks.png", "speed.png"}
    assert all(letter.isprintable() for letter in printed.replace("\n", ""))
    table = [line for line in printed.splitlines() if "25.0 [" in line]
    assert any(line.startswith(r"\x1b]0;owned\x07\x1b[2J  ") for line in table)
    assert any(line.startswith(r"答え\n| a  ") for line in table)


def test_a_table_is_aligned_by_the_columns_of_a_terminal():
    found = plain([Table(["task", "n"], [["答え", "1.0"], ["abcdef", "10.0"], ["e\u0301", "2.0"]])])
    assert found.splitlines() == ["task       n", "答え     1.0", "abcdef  10.0", "e\u0301        2.0"]


def test_without_matplotlib_there_is_a_report_without_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = folder(tmp_path / "run", {"target": grid("target", some(5))})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"file: expected a folder to write to, got a file"):
        report(run, tmp_path / "file")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "25.0" in report(run)[1]
    names = ["answers-target.jsonl", "report.html", "report.md", "suite.json"]
    assert sorted(path.name for path in run.iterdir()) == names
    assert "There are no figures, which need matplotlib: pip install matplotlib." in written(run)


def test_texts_mean_nothing_in_markdown_and_html():
    blocks = [
        Heading("a *b*", 1),
        text("1 | 2 ", Bold("x_"), " a_b [c](d)"),
        Table(["n", "v"], [["a|b", "<1>"]]),
        Verbatim("\n<x>"),
    ]
    assert markdown(blocks) == (
        "# a \\*b\\*\n\n1 \\| 2 **x\\_** a_b [c\\](d)\n\n| n | v |\n| --- | ---: |\n| a\\|b | \\<1\\> |\n\n"
        "```text\n\n<x>\n```\n"
    )
    found = page(blocks, {})
    assert "<title>a *b*</title>" in found and "<pre>\n\n&lt;x&gt;</pre>" in found and "<td>&lt;1&gt;</td>" in found
    assert "<strong>x_</strong>" in found


def test_no_minus_stands_before_a_zero():
    assert [percent(share) for share in (-1e-17, 0.0, -0.0004, 0.125, 1.0)] == ["0.0", "0.0", "0.0", "12.5", "100.0"]


def numbers(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_numbers_of_every_figure_lie_beside_it(tmp_path: Path):
    report(everything(tmp_path))
    scores = {(row["mode"], row["length"]): row for row in numbers(tmp_path / "scores.csv")}
    shown = row(written(tmp_path), "4K")[0]  # of the first mode, target: mean and ends
    ends = [f"{float(scores['target', '4096'][name]):.1f}" for name in ("score", "low", "high")]
    assert "{} [{}, {}]".format(*ends) == shown and len(scores) == 12
    assert {row["task"] for row in numbers(tmp_path / "tasks.csv")} == {"one", "two"}
    depths = [row for row in numbers(tmp_path / "depths.csv") if row["mode"] == "target" and row["length"] == "8192"]
    # Of 21 samples the first 5 are right, and the depths go round: 2, 2 and 1 of 7.
    assert {row["depth"]: row["score"] for row in depths} == {"0": "28.5714", "50": "28.5714", "100": "14.2857"}
    eta = [row for row in numbers(tmp_path / "eta.csv") if row["panel"] == "rapid" and row["score"]]
    assert sorted({float(row["eta"]) for row in eta}) == [5.0, 10.0, 20.0]
    speed = {(row["what"], row["mode"], row["length"]): row["value"] for row in numbers(tmp_path / "speed.csv")}
    assert speed["tokens/s, median", "target", "4096"] == "30" and speed["accepted drafts, %", "rapid", "8192"] == "75"


def test_figures_are_vectors_that_are_legible_in_light_and_dark(tmp_path: Path):
    report(everything(tmp_path))
    page = written(tmp_path, "report.html")
    inside = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert len(inside) == 6 and "prefers-color-scheme: dark" in page
    for data in inside:
        svg = base64.b64decode(data).decode()
        root = ElementTree.fromstring(svg)
        assert root.tag.endswith("svg") and root.get("fill") == "currentColor"
        assert "prefers-color-scheme: dark" in svg and "stroke: #000000" not in svg and "stroke: currentColor" in svg
    for name in ("scores", "depths"):
        alone = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")  # for papers: black on nothing
        assert "currentColor" not in alone and "stroke: #000000" in alone
        ElementTree.fromstring(alone)


def test_a_figures_ink_in_the_dark_is_the_pages():
    dark = re.findall(r"--ink: (#\w+)", style("rapid_jax", "theme.css"))[1]
    assert dark == figure_files.DARK_INK
