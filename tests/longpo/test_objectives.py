# SPDX-License-Identifier: Apache-2.0
"""Objectives are records: every name has one, no other file asks for a name, and a new record needs no other file."""

import ast
from dataclasses import replace
from pathlib import Path
from typing import get_args

import jax.numpy as jnp
import pytest

import longpo_jax
from longpo_jax import objectives
from longpo_jax.config import LongPOConfig
from longpo_jax.loss import WEIGHTS, objective
from longpo_jax.objectives import OBJECTIVES, Name, Sums, objective_of
from longpo_jax.reference import check_references, sums_of
from longpo_jax.stages import STAGES, inputs_of
from rapid_jax.runtime import settings
from rapid_jax.runtime.errors import InputError

FOLDER = Path(longpo_jax.__file__).parent
SETTINGS = {f"objective.{name}" for name in vars(LongPOConfig().objective)}


def names_in(text: str) -> list[str]:
    """Objectives' names in comparisons, in keys of a dict, and in what is looked up by a constant."""
    found = []
    for node in ast.walk(ast.parse(text)):
        some = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        some += [key for key in node.keys if key] if isinstance(node, ast.Dict) else []
        some += (
            [case.pattern.value for case in node.cases if isinstance(case.pattern, ast.MatchValue)]
            if isinstance(node, ast.Match)
            else []
        )
        for part in some:
            found += [one.value for one in ast.walk(part) if isinstance(one, ast.Constant) and one.value in OBJECTIVES]
    return found


def test_every_name_has_a_record_and_every_record_a_name():
    assert tuple(OBJECTIVES) == get_args(Name)
    with pytest.raises(ValueError, match="unknown objective 'ppo'"):
        objective_of("ppo")


def test_no_other_file_asks_for_a_name():
    asked = {}
    for path in FOLDER.rglob("*.py"):
        if path.name != "objectives.py" and (found := names_in(path.read_text(encoding="utf-8"))):
            asked[path.name] = found
    assert asked == {}


@pytest.mark.parametrize(
    "text",
    ['x = name == "sft"', 'x = name in ("dpo", y)', 'x = {"opsd": 1}[name]', 'match x:\n  case "dpo":\n    y = 1'],
)
def test_a_question_for_a_name_is_found(text: str):
    assert len(names_in(text)) == 1


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_record_is_of_one_piece(name: str):
    record = OBJECTIVES[name]
    assert not (record.forked and record.short) and not (record.sums and record.teacher)
    assert {*record.weights, *record.own} <= {key.partition(".")[2] for key in SETTINGS}
    assert (record.loss is None) == (record.weights == ()) == (not record.needs_reference)
    assert len(set(record.of_reference)) == len(record.of_reference)
    assert record.row == "turn" or not record.short  # a short row is about one turn


def test_settings_of_one_objective_decide_nothing_of_another():
    for name in OBJECTIVES:
        config = settings.defaults(LongPOConfig, [f"objective.name={name}"])
        keys = {stage: set(inputs_of(config, stage)) for stage in STAGES}
        mine = {f"objective.{key}" for key in OBJECTIVES[name].own}
        every = {f"objective.{key}" for record in OBJECTIVES.values() for key in record.own}
        assert keys["train"] & every == mine and keys["reference"] & every <= mine


def test_a_new_objective_is_one_record(monkeypatch: pytest.MonkeyPatch):
    """IPO's loss on LongPO's rows: (margin - 1 / 2)^2, with references of all turns behind the document."""

    def squared(policy, reference, weights):
        del weights
        margin_B = (policy["chosen_B"] - reference["chosen_B"]) - (policy["rejected_B"] - reference["rejected_B"])
        return (margin_B - 0.5) ** 2, {"margin": margin_B}

    sums = (Sums(("chosen", "rejected"), behind="document", together=True),)
    new = replace(OBJECTIVES["longpo"], card="IPO", loss=squared, sums=sums, own=("alpha",))
    monkeypatch.setattr(objectives, "OBJECTIVES", {**OBJECTIVES, "ipo": new})
    policy = {name: jnp.array([value]) for name, value in (("nll_B", 2.0), ("chosen_B", -3.0), ("rejected_B", -5.0))}
    reference = {"chosen_B": jnp.array([-4.0]), "rejected_B": jnp.array([-4.0])}
    loss_B, metrics = objective("ipo", policy, reference, **dict.fromkeys(WEIGHTS, 1.0))
    assert float(loss_B[0]) == 2.0 + 1.5**2 and float(metrics["margin"][0]) == 2.0 and next(iter(metrics)) == "nll"
    check_references({"a": {"chosen": [1.0], "rejected": [2.0]}}, {"a": 3}, "ipo")
    with pytest.raises(InputError, match="expected 1 log-probabilities of the rejected answers of 'a', got 2"):
        check_references({"a": {"chosen": [1.0], "rejected": [2.0, 3.0]}}, {"a": 3}, "ipo")
    assert sums_of({"chosen": [1.0, 2.0]}, "ipo", 0) == {"chosen": 3.0}
