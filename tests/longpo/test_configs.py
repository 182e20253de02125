# SPDX-License-Identifier: Apache-2.0
"""The settings files in configs/longpo: complete, strict, and with a command that the command line understands."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import yaml

from longpo_jax.cli import config_of, parser
from longpo_jax.config import LongPOConfig
from longpo_jax.round import rounds_of
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "longpo").glob("*.yaml"))


def settings_of(words: list[str]) -> LongPOConfig:
    return config_of(parser().parse_args(words))


def head_of(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("run:"))
    return "\n".join(line for line in lines[:first] if line)


def corpus_of_the_user(config: LongPOConfig) -> LongPOConfig:
    """Where the documents lie is the one thing that a command has to say of itself."""
    return dataclasses.replace(config, corpus=dataclasses.replace(config.corpus, sources=()))


def test_there_are_settings_for_every_machine():
    assert {path.stem for path in FILES} >= {"smollm2_cpu", "smollm2_h200"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_complete_and_reads_back(path: Path, tmp_path: Path):
    config = settings.load(LongPOConfig, path)
    written = settings.dump(config)
    assert yaml.safe_load(written).keys() == yaml.safe_load(path.read_text(encoding="utf-8")).keys()
    (tmp_path / "copy.yaml").write_text(written, encoding="utf-8")
    assert settings.load(LongPOConfig, tmp_path / "copy.yaml") == config


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.rope_theta=0", "model: rope_theta: expected a number > 1 and <= 1e+15, got 0.0"),
        ("model.generation_rope_theta=.inf", "generation_rope_theta: expected a number > 1 and <= 1e+15, got inf"),
        ("corpus.min_tokens=0", "corpus: expected 1 <= min_tokens <= max_tokens, got 0 and 131072"),
        ("corpus.documents=0", "corpus: documents: expected at least 1, got 0"),
        ("excerpts.min_tokens=40000", "excerpts: expected 1 <= min_tokens <= max_tokens, got 40000 and 30000"),
        (f"instruct.begins={'x' * 101}", "instruct: begins: expected at most 100 characters, got 101"),
        ("instruct.at_least=5", "instruct: expected 1 <= at_least <= questions <= 16, got (5, 4)"),
        ("instruct.temperature=-1", "instruct: temperature: expected a number >= 0, 0 or 1e-4 to 1e4, got -1.0"),
        ("instruct.top_p=0", "instruct: top_p: expected above 0 and at most 1, got 0.0"),
        ("instruct.max_new_tokens=0", "instruct: max_new_tokens: expected at least 1, got 0"),
        ("pairs.temperature=.inf", "pairs: temperature: expected a number >= 0, 0 or 1e-4 to 1e4, got inf"),
        ("pairs.repetition_penalty=0", "pairs: repetition_penalty: expected a number > 0, 1e-3 to 1e3, got 0.0"),
        ("pairs.repeats_chosen=-1", "pairs: repeats_chosen: expected 0 to 1, got -1.0"),
        ("pairs.min_words=-1", "pairs: min_words: expected at least 0, got -1"),
        ("pairs.max_context=1024", "pairs: max_context: expected more than max_new_tokens, got 1024 and 1024"),
        ("optimizer.learning_rate=-1", "optimizer: learning_rate: expected a number > 0, got -1.0"),
        ("optimizer.eps=.inf", "optimizer: eps: expected a number > 0, got inf"),
        ("optimizer.clip_norm=0", "optimizer: clip_norm: expected a number > 0, got 0.0"),
        ("optimizer.b2=1", "optimizer: b2: expected 0 to below 1, got 1.0"),
        ("optimizer.weight_decay=.inf", "optimizer: weight_decay: expected a number >= 0, got inf"),
        ("train.lengths=[0, 8]", "train: lengths: expected to rise from at least 1, got [0, 8]"),
        ("train.lengths=[]", "train: lengths: expected to rise from at least 1, got []"),
        ("train.keep_every=0", "train: keep_every: expected at least 1, or null, got 0"),
        ("objective.name=ppo", "objective.name: expected one of 'longpo', 'dpo', 'sft', 'solopo', 'opsd', got 'ppo'"),
        ("objective.top_k=0", "objective: top_k: expected 1 to 1024, got 0"),
        ("objective.distillation_weight=-1", "distillation_weight: expected a number >= 0, got -1.0"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_with_what_was_expected_and_got(setting: str, message: str):
    with pytest.raises(InputError) as raised:
        settings.defaults(LongPOConfig, [setting])
    assert str(raised.value).endswith(message)


@pytest.mark.parametrize(
    ("name", "off", "said"),
    [
        ("sft", "alpha", "sft something, nll_weight above 0, got nll_weight 0.0, preference_weight 0.01, beta 0.1"),
        ("longpo", "beta", "preference_weight and beta, got nll_weight 0.0, preference_weight 0.01, beta 0.0"),
        ("opsd", "distillation_weight", "or distillation_weight, got nll_weight 0.0, distillation_weight 0.0"),
    ],
)
def test_an_objective_that_teaches_nothing_is_refused(name: str, off: str, said: str):
    with pytest.raises(InputError, match=f"expected a loss that teaches .*{said}$"):
        settings.defaults(LongPOConfig, [f"objective.name={name}", "objective.nll_weight=0", f"objective.{off}=0"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_head_says_command_hardware_time_and_result(path: Path, monkeypatch):
    head = head_of(path)
    assert all(line.startswith("#") for line in head.splitlines())
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 120
    for word in ("Command:", "Hardware:", "Time:", "Result:"):
        assert len(re.findall(rf"^# {word} +\S", head, re.MULTILINE)) == 1
    command = re.search(r"^# Command: +longpo (.+)$", head, re.MULTILINE)
    assert command
    monkeypatch.chdir(ROOT)
    words = shlex.split(command[1])
    given, file = settings_of(words), settings.load(LongPOConfig, path)
    assert corpus_of_the_user(given) == corpus_of_the_user(file)
    assert words[0] == ("rounds" if file.rounds else "round")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_pair_of_a_round_fits_into_its_longest_row(path: Path):
    """A document that the prompt holds, its turns and answers; a template adds a few tokens a turn."""
    config = settings.load(LongPOConfig, path)
    for single in rounds_of(config) if config.rounds else [config]:
        turns, answer = single.excerpts.per_document, single.pairs.max_new_tokens
        longest = min(single.corpus.max_tokens, single.pairs.max_context)
        assert single.train.lengths[-1] >= longest + turns * answer
        assert single.train.tail >= turns * answer
        assert single.pairs.max_context >= single.corpus.max_tokens + answer
        assert single.excerpts.max_tokens <= single.corpus.min_tokens


def test_models_that_are_no_package_are_folders_in_the_tree():
    for path in FILES:
        source = settings.load(LongPOConfig, path).model.source
        assert source == "smollm2" or re.fullmatch(r"(models|runs)/[\w./-]+", source)


def test_the_script_for_any_machine_runs_the_small_settings():
    script = (ROOT / "launch" / "longpo_cpu.sh").read_text()
    config = settings.load(LongPOConfig, ROOT / "configs" / "longpo" / "smollm2_cpu.yaml")
    line = re.search(r"^exec \.venv/bin/longpo (.+)\n\Z", script, re.MULTILINE)
    assert line and shlex.split(line[1]) == ["rounds", "--config", "configs/longpo/smollm2_cpu.yaml", "$@"]
    written = re.search(r"^\.venv/bin/python - (\S+) <<", script, re.MULTILINE)
    assert written and config.corpus.sources == (f"python={written[1]}",)
    ending = re.search(r"The trained model is in (\S+),", script)
    assert ending and ending[1] == f"{rounds_of(config)[-1].run}/export"
