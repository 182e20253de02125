# SPDX-License-Identifier: Apache-2.0
"""Two evaluations against each other: pairing, verdicts, what changed, what is refused."""

import json
import re
from pathlib import Path

import pytest

from rapid_jax.evaluate.compare import compare
from rapid_jax.runtime.errors import InputError
from tests.evaluate.synthetic import SETTINGS, folder, grid


def first(count: int):
    return lambda task, length, number: number < count


def pair(path: Path, one: dict, other: dict, **options) -> tuple[Path, Path]:
    return folder(path / "base", one), folder(path / "tuned", other, **options)


def cells(text: str, name: str) -> list[str]:
    """The columns of the line that begins with `name`."""
    found = next(line for line in text.splitlines() if line.startswith(f"{name}  "))
    return re.split(r"\s{2,}", found)[1:]


def test_means_differences_and_verdicts_are_the_known_ones(tmp_path: Path):
    counts = {"up": (4, 16), "down": (18, 6), "even": (10, 11)}

    def runs(which: int, mode: str) -> list[dict]:
        return [one for task, ends in counts.items() for one in grid(mode, first(ends[which]), [task])]

    one, other = pair(tmp_path, {"target": runs(0, "target")}, {"target": runs(1, "target")})
    found = compare(one, other)
    assert found.startswith("tuned against base on qa\n===")
    assert re.search(r"^task +samples +base +tuned +difference +verdict$", found, re.M)
    count, before, after, gained, verdict = cells(found, "up, 4K")
    assert (count, before, after, verdict) == ("20", "20.0", "80.0", "better") and gained.startswith("+60.0 [+")
    assert cells(found, "down, 8K")[1:3] == ["90.0", "30.0"] and cells(found, "down, 8K")[4] == "worse"
    assert cells(found, "even, 4K")[3].startswith("+5.0 [+0.0, ") and cells(found, "even, 4K")[4] == "no difference"
    assert cells(found, "average of 3 tasks, 8K")[0] == "60"
    assert cells(found, "all")[:3] == ["120", "53.3", "55.0"] and cells(found, "all")[4] == "no difference"


def test_changed_answers_are_listed_ten_a_direction(tmp_path: Path):
    one = grid("target", lambda task, length, number: number < 6, lengths=[4096])
    other = grid("target", lambda task, length, number: number >= 6, lengths=[4096])
    other[0]["answer"] = "words " * 60
    found = compare(*pair(tmp_path, {"target": one}, {"target": other}))
    lost, _, gained = found.partition("went from right to wrong:")[2].partition(
        "14 went from wrong to right, of which 10:"
    )
    assert "6 went from right to wrong:" in found
    assert re.findall(r"task/4096/(\d+): expected blue", lost) == [str(number) for number in range(6)]
    assert re.findall(r"task/4096/(\d+): expected blue", gained) == [str(number) for number in range(6, 16)]
    assert "    base 100.0: The word is blue.\n    tuned 0.0: words words" in lost
    assert max(map(len, found.splitlines())) < 130


def test_no_change_lists_nothing(tmp_path: Path):
    lines = grid("target", first(5))
    found = compare(*pair(tmp_path, {"target": lines}, {"target": lines}))
    assert " went " not in found and cells(found, "all")[3:] == ["+0.0 [-16.8, +16.8]", "no difference"]


def test_settings_that_differ_are_listed_with_those_that_everyone_asks_for(tmp_path: Path):
    labels = {"rapid": {}, "rapid-eta=5": {"eta": 5}}
    lines = {label: grid(label, first(5), settings=said) for label, said in labels.items()}
    long = "the same words " * 20
    settings = [
        SETTINGS | {"speculation": {"gamma": 10, "eta": eta}, "prompts": {"target": long + asked}}
        for eta, asked in ((10.0, "once"), (20.0, "twice"))
    ]
    one = folder(tmp_path / "one", lines, settings=settings[0])
    found = compare(one, folder(tmp_path / "two", lines, settings=settings[1]))
    assert cells(found, "models.target") == ["big", "big"] and cells(found, "sampling.temperature") == ["0.0", "0.0"]
    assert cells(found, "speculation.eta") == ["10.0", "20.0"] and cells(found, "lengths") == ["4K, 8K", "4K, 8K"]
    asked = cells(found, "prompts.target")
    assert [value[-5:] for value in asked] == [" once", "twice"] and all(value.startswith("...") for value in asked)
    assert "retrieval.min_tokens" not in found
    told = re.findall(r"In this mode not the same is set: (.*)", found)
    assert len(told) == 1 and told[0].startswith("prompts.target ...") and "eta" not in told[0]


def test_prompts_may_differ_and_only_common_samples_count(tmp_path: Path):
    one = {"target": grid("target", first(5), count=20), "rapid": grid("rapid", first(5))}
    other = {
        "target": grid("target", first(5), count=30, prompt_hash="other", prompt_tokens=9),
        "lossless": grid("lossless", first(5)),
    }
    found = compare(*pair(tmp_path, one, other, samples=30))
    assert "40 samples compared, 20 that only one of them has left out." in found
    assert "Not the same was asked for: samples - and 30." in found
    assert "no such samples: rapid." in found and "no such samples: lossless." in found
    assert "no such samples: target." not in found


def test_equal_ids_that_ask_something_else_are_not_compared(tmp_path: Path):
    one, other = grid("target", first(5), count=20), grid("target", first(5), count=20)
    for number, line in enumerate(other):
        line |= {"answers": ["green"]} if number < 7 else {"question": "another?"} if number < 10 else {}
    found = compare(*pair(tmp_path, {"target": one}, {"target": other}))
    assert "30 samples compared, 10 whose question or right answers differ left out." in found
    assert cells(found, "task, 4K")[0] == "10" and cells(found, "task, 4K")[4] == "too few questions"
    for line in other:
        line["question"] = "another?"
    with pytest.raises(InputError, match=r"samples in common, got none: asked for were seed 0 and seed 0, text b"):
        compare(*pair(tmp_path, {"target": one}, {"target": other}, text="b"))


def test_what_models_say_does_nothing_to_a_terminal(tmp_path: Path):
    lines = {"target": grid("target", first(5), answer="\x1b]0;owned\x07 \x1b[2J\u202e")}
    other = {"target": grid("target", first(16), ["task"])}
    found = compare(*pair(tmp_path, lines, other))
    assert r"\x1b]0;owned\x07 \x1b[2J\u202e" in found and all(x.isprintable() for x in found.replace("\n", ""))


def test_different_suites_and_modes_are_refused(tmp_path: Path):
    lines = grid("target", first(5))
    one = folder(tmp_path / "one", {"target": lines})
    with pytest.raises(InputError, match=r"expected evaluations of one suite, got qa and needle"):
        compare(one, folder(tmp_path / "two", {"target": lines}, "needle"))
    with pytest.raises(InputError, match=r"expected a mode that both have, got target in .*one and rapid in "):
        compare(one, folder(tmp_path / "three", {"rapid": grid("rapid", first(5))}))
    with pytest.raises(InputError, match=r"suite.json: expected a folder to write to, got a file"):
        compare(one, one, one / "suite.json")


def test_the_page_says_the_same_wherever_the_runs_lie(tmp_path: Path):
    lines = {"target": grid("target", first(5), answer="a|b `x`")}, {"target": grid("target", first(16))}
    pages = []
    for place in ("here", "there"):
        one = folder(tmp_path / place / "base" / "run", lines[0])
        other = folder(tmp_path / place / "tuned" / "run", lines[1])
        said = compare(one, other, tmp_path / f"out {place}")
        pages.append((tmp_path / f"out {place}" / "contrast.md").read_text())
        assert said.startswith("tuned/run against base/run on qa")
    assert pages[0] == pages[1] and str(tmp_path) not in pages[0]
    assert re.search(r"\| task, 4K \| 20 \| 25.0 \| 80.0 \| \+55.0 \[\+.*\] \| \*\*better\*\* \|", pages[0])
    assert [path.name for path in (tmp_path / "out here").iterdir()] == ["contrast.md"]
    assert json.loads((tmp_path / "here" / "base" / "run" / "suite.json").read_text())["suite"] == "qa"
