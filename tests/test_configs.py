# SPDX-License-Identifier: Apache-2.0
"""The settings files in configs/rapid: complete, strict, and with a command that the command line understands."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from rapid_jax.answer_options import config_of
from rapid_jax.cli import parser
from rapid_jax.config import RapidConfig
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs" / "rapid").glob("*.yaml"))


def settings_of(words: list[str]) -> RapidConfig:
    return config_of(parser().parse_args(words))


def head_of(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines[: lines.index("models:")] if line)


def test_there_are_settings_for_every_use():
    assert {path.stem for path in FILES} >= {
        "quickstart",
        "lossless",
        "llama31_8b_128k_self",
        "llama31_8b_70b_upward_128k",
        "qwen25_7b_128k_self",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_complete_and_reads_back(path: Path, tmp_path: Path):
    config = settings.load(RapidConfig, path)
    written = settings.dump(config)
    assert yaml.safe_load(written).keys() == yaml.safe_load(path.read_text(encoding="utf-8")).keys()
    (tmp_path / "copy.yaml").write_text(written, encoding="utf-8")
    assert settings.load(RapidConfig, tmp_path / "copy.yaml") == config


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_prompts_are_the_defaults_to_the_letter(path: Path):
    assert settings.load(RapidConfig, path).prompts == RapidConfig().prompts


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_head_says_command_hardware_time_and_result(path: Path, monkeypatch):
    head = head_of(path)
    assert all(line.startswith("#") for line in head.splitlines())
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 120
    for word in ("Command:", "Hardware:", "Time:", "Result:"):
        assert len(re.findall(rf"^# {word} +\S", head, re.MULTILINE)) == 1
    command = re.search(r"^# Command: +rapid (.+)$", head, re.MULTILINE)
    assert command
    monkeypatch.chdir(ROOT)
    config = settings_of(shlex.split(command[1]))
    assert config == settings.load(RapidConfig, path)


def test_a_command_may_change_what_the_file_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    given = ["answer", "--config", "configs/rapid/quickstart.yaml", "--document", "-", "--question", "x"]
    config = settings_of([*given, "--set", "sampling.seed=5", "--mode", "target"])
    assert (config.sampling.seed, config.speculation.mode) == (5, "target")


def test_models_that_are_no_package_are_folders_in_the_tree():
    for path in FILES:
        models = settings.load(RapidConfig, path).models
        for name in (models.target, models.drafter, models.encoder):
            assert name in ("smollm2", "same", "minilm") or re.fullmatch(r"models/[\w.-]+", name)


def test_the_quickstart_asks_with_the_quickstarts_settings():
    script = (ROOT / "launch" / "quickstart.sh").read_text()
    line = re.search(r"exec \S+ (answer (?:.|\\\n)*)\n?\Z", script)
    assert line
    words = shlex.split(line[1].replace("\\\n", " ").replace("$ROOT/", f"{ROOT}/").replace('"$@"', ""))
    assert "--compare" in words
    assert settings_of(words) == settings.load(RapidConfig, ROOT / "configs" / "rapid" / "quickstart.yaml")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("temperature=1", "did you mean 'sampling.temperature'?"),
        ("speculation.temperature=1", "did you mean 'sampling.temperature'?"),
        ("generation.topp=1", "did you mean 'sampling.top_p'?"),
        ("samplng.temperature=1", "did you mean 'sampling'?"),
        ("models.drafter_weight=int8", "did you mean 'drafter_weights'?"),
        ("models.drafters=same", "did you mean 'drafter'?"),
        ("kv=int8", "did you mean 'compute.kv'?"),
        ("cache.prefix_gib=1", "did you mean 'disk_gib'?"),
        ("mnt=3", "did you mean 'sampling.max_new_tokens'?"),
        ("context=3", "did you mean 'mesh.context' or 'drafter_mesh.context' or 'compute.context'?"),
        ("foo=1", ""),
        ("mesh.tensor=2", ""),
    ],
)
def test_a_hint_names_what_was_likely_meant_or_nothing(override, hint):
    with pytest.raises(InputError) as caught:
        settings.defaults(RapidConfig, [override])
    assert str(caught.value).endswith(hint) and ("did you mean" in str(caught.value)) == bool(hint)


def test_a_file_has_hints_too(tmp_path: Path):
    text = FILES[0].read_text(encoding="utf-8")
    (tmp_path / "run.yaml").write_text(f"{text}\ngeneration: {{top_p: 0.9}}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"unknown setting 'generation'; did you mean 'sampling\.top_p'\?$"):
        settings.load(RapidConfig, tmp_path / "run.yaml")
