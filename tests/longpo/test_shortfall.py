# SPDX-License-Identifier: Apache-2.0
"""A run with next to nothing to learn from says so, with what was lost, why, and which setting decides it."""

import pytest

from longpo_jax.config import LongPOConfig, TrainConfig
from longpo_jax.shortfall import lost, warning

SUMMARY = {
    "documents": 12,
    "pairs": 1,
    "excerpts": 24,
    "turns": 2,
    "turns_dropped": {"too few questions": 3, "too few questions, cut off": 17, "refusal": 2},
    "documents_dropped": {"no turn left": 10, "no excerpt": 1},
    "corpus_dropped": {"document too short": 4},
}


def config(**train) -> LongPOConfig:
    return LongPOConfig(train=TrainConfig(**train))


def test_one_pair_is_told_with_what_was_lost_and_the_settings_that_decide_it():
    said = warning(config(rows_per_step=1), 1, SUMMARY)
    assert said == (
        "warning: 1 row in all, with train.rows_per_step = 1 and train.epochs = 1, give 1 update: too few to "
        "learn much. Of 12 documents 1 gave a pair; of 24 questions asked for 22 were lost: 17 x too few questions, "
        "cut off (instruct.max_new_tokens), 3 x too few questions (instruct.at_least, instruct.temperature), 2 x "
        "refusal. Left out besides: 4 x document too short (corpus.min_tokens), 1 x no excerpt (excerpts.min_tokens, "
        "excerpts.max_tokens)"
    )


@pytest.mark.parametrize(
    ("train", "rows", "said"),
    [
        ({"rows_per_step": 8}, 80, None),
        ({"rows_per_step": 8}, 79, "79 rows in all, with train.rows_per_step = 8 and train.epochs = 1, give 9 updates"),
        ({"rows_per_step": 8}, 7, "give 0 updates"),
        ({"rows_per_step": 8, "max_steps": 2}, 800, "train.max_steps = 2 stops after 2 updates: too few to learn much"),
        ({"rows_per_step": 8, "max_steps": 200}, 800, None),
        ({"rows_per_step": 8, "max_steps": 2}, 24, "give 3 updates, of which train.max_steps makes 2: too few"),
    ],
)
def test_fewer_than_ten_updates_are_few(train, rows, said):
    found = warning(config(**train), rows, SUMMARY)
    assert found is None if said is None else (found is not None and said in found)


def test_rows_that_are_too_long_are_told_and_a_summary_that_says_nothing_is_no_error():
    assert "1 x longer than a row (train.lengths, train.tail)" in lost(SUMMARY, 1)
    assert lost({}).startswith("Of 0 documents 0 gave a pair; of 0 questions asked for 0 were lost: none")
