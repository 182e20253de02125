# SPDX-License-Identifier: Apache-2.0
"""The card of an export: what it says of base, data, settings and scores, what it keeps to itself, and whose it is."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longpo_jax.card import CARD, base_of, card_of, licence_of, renew
from longpo_jax.config import CorpusConfig, LongPOConfig, PolicyConfig
from longpo_jax.stages import mark_done
from rapid_jax.model.load import open_checkpoint
from rapid_jax.runtime import settings, strict_yaml

REPORT = """\
# Evaluation on ruler

About it.

## Scores

### At 4K

| task | target |
| --- | --- |
| average | 40.8 [33.6, 48.3] |

## Differences from target

None.
"""


@pytest.fixture
def run(tmp_path) -> LongPOConfig:
    """A round that is trained, on a base that names its licence."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / CARD).write_text("---\nlicense: other\nlicense_name: community\ntags: [x]\n---\n# Base\n")
    config = LongPOConfig(
        run=str(tmp_path / "run"),
        model=PolicyConfig(source=str(tmp_path / "base")),
        corpus=CorpusConfig(sources=(f"book={tmp_path}/books", f"law={tmp_path}/laws")),
    )
    mark_done(tmp_path / "run/pairs", {}, {"documents": 9, "pairs": 7, "turns": 11})
    mark_done(tmp_path / "run/train", {"model.weights": "aa11", "pairs": "bb22", "reference": "cc33"}, {"steps": 5})
    return config


def card(config: LongPOConfig) -> str:
    checkpoint: Any = SimpleNamespace(folder=Path(config.model.source))
    return card_of(config, Path(config.run), checkpoint, 5)


def evaluated(folder: Path, target: Path, suite: str = "ruler") -> None:
    folder.mkdir()
    (folder / "suite.json").write_text(json.dumps({"suite": suite}))
    (folder / "settings.yaml").write_text(f"models: {{target: '{target}'}}\n")
    (folder / "report.md").write_text(REPORT)


def test_it_says_what_made_the_model(run, tmp_path):
    text = card(run)
    head = strict_yaml.parse(text.split("---\n")[1], "head")
    assert head["license"] == "other" and head["license_name"] == "community" and head["tags"] == ["longpo"]
    for said in (
        "Base model: base",
        "Licence of the base: community",
        "arXiv:2502.13922",
        "5 updates",
        "book, law",
        "| pairs ",
        "aa11",
        "bb22",
        "cc33",
        "| optimizer.learning_rate ",
        "5e-07",
    ):
        assert said in text, said
    assert str(tmp_path) not in text and "corpus.sources" not in text and "RULER" not in text


def test_scores_of_evaluations_in_the_run_come_with_their_intervals(run, tmp_path):
    (tmp_path / "run/export").mkdir()
    evaluated(tmp_path / "run/ruler", tmp_path / "run/export")
    evaluated(tmp_path / "run/before", tmp_path / "base")
    evaluated(tmp_path / "run/needle", tmp_path / "run/export", "needle")
    text = card(run)
    assert "## RULER, this model (ruler)" in text and "## RULER, base (before)" in text
    assert text.count("| average | 40.8 [33.6, 48.3] |") == 2 and "Differences" not in text
    (tmp_path / "run/ruler/settings.yaml").write_text("models: 3\n")
    (tmp_path / "run/before/suite.json").write_text("{")
    assert "RULER" not in card(run)


def test_a_later_round_names_the_first_ones_base_and_carries_its_licence(run, tmp_path):
    settings.save(run, tmp_path / "run/settings.yaml")
    (tmp_path / "run/export").mkdir()
    (tmp_path / "run/export" / CARD).write_text(card(run))
    later = dataclasses.replace(run, model=PolicyConfig(source=str(tmp_path / "run/export")))
    assert base_of(later) == ("base", 2)
    assert "Base model: base, in 2 rounds" in card(later) and "Licence of the base: community" in card(later)


def test_a_run_that_names_its_own_export_has_an_end(run, tmp_path):
    itself = dataclasses.replace(run, model=PolicyConfig(source=str(tmp_path / "run/export")))
    settings.save(itself, tmp_path / "run/settings.yaml")
    assert base_of(itself) == ("export", 1)


def test_without_a_licence_it_is_not_stated(run, tmp_path):
    for text in ("", "# no head\n", "---\n- a list\n---\n", "---\nlicense: [1\n---\n", "---\nlicense: 3\n---\n"):
        (tmp_path / "base" / CARD).write_text(text)
        made = card(run)
        assert "Licence of the base: not stated" in made and "license" not in made.split("---\n")[1]


def test_a_gguf_file_names_its_own(smollm2_path):
    checkpoint: Any = open_checkpoint(str(smollm2_path))[0]
    assert licence_of(checkpoint) == {"license": "apache-2.0"}


def test_a_card_is_renewed_unless_somebody_has_edited_it(run, tmp_path):
    place, first = tmp_path / "export", card(run)
    place.mkdir()
    assert renew(place, first) and (place / CARD).read_text() == first
    evaluated(tmp_path / "run/ruler", tmp_path / "run/export")
    second = card(run)
    assert second != first and renew(place, second) and (place / CARD).read_text() == second
    mine = second.replace("# base", "# My model")
    for text in (mine, "mine\n"):
        (place / CARD).write_text(text)
        assert not renew(place, second) and (place / CARD).read_text() == text
