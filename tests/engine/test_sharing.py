# SPDX-License-Identifier: Apache-2.0
"""Which lane a request joins."""

from copy import copy
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rapid_jax.config import RapidConfig
from rapid_jax.engine.engine import Engine
from rapid_jax.engine.job import Job
from rapid_jax.engine.lane import Lane, LaneKey, Prepared
from rapid_jax.engine.sharing import Sharing, fits
from rapid_jax.speculative.config import MOST_DRAFTS, SamplingConfig, SpeculationConfig
from rapid_jax.speculative.initial_state import Sizes, gamma_bucket

SMALL, MIDDLE, LARGE, WIDE = (64, 16, 64, 32), (128, 16, 128, 32), (256, 16, 256, 32), (64, 16, 64, 64)


def key(slots: tuple[int, ...] | None, **settings) -> LaneKey:
    return LaneKey.of(SpeculationConfig(mode="target", **settings), None, slots)


def lanes(*sizes: tuple[int, ...], full: tuple[int, ...] | None = None, documents: tuple = ()) -> Any:
    """Lanes with these slots; one of them may be full."""
    found = {}
    for slots in sizes:
        room = None if slots == full else (2, 1)
        found[key(slots)] = SimpleNamespace(sizes_with=lambda names, room=room: room, documents=list(documents), each=1)
    return cast("Any", found)


def placed(
    sharing: Sharing, there: Any, slots: tuple[int, ...], document: str = "a", *, shared: bool = True
) -> tuple | str | None:
    """The slots of the lane; "new" is one of its own."""
    found = sharing.place(there, key(slots), document, [], shared=shared)
    if found is None:
        return None
    lane, sizes = found
    return "new" if sizes is None else lane.slots


def test_a_row_fits_into_what_is_larger_in_everything():
    assert fits(key(SMALL), key(LARGE)) and fits(key(SMALL), key(SMALL)) and fits(key(SMALL), key(WIDE))
    assert not fits(key(LARGE), key(SMALL)) and not fits(key(LARGE), key(WIDE)) and not fits(key(WIDE), key(LARGE))
    assert not fits(key(SMALL), key((*LARGE, 64, 16))), "that one has a drafter"
    assert not fits(key(SMALL), key(LARGE, rounds_per_read=7)) and not fits(key(None), key(LARGE))


def test_rows_of_a_lane_have_room_for_the_rounds_of_the_others():
    """A round has as many drafts as any row asks for, and is written behind each, also behind one at its limit."""
    for width in (1, 6, 15, 32):
        some = [SpeculationConfig(gamma=gamma, lookup_width=width) for gamma in range(1, MOST_DRAFTS + 1)]
        keys = [LaneKey.of(one, None) for one in some]
        for new in (1, 121, 256):
            room = [Sizes.of(one, SamplingConfig(max_new_tokens=new)) for one in some]
            for at, sizes in enumerate(room):
                written = max(gamma_bucket(int(one.gamma)) for one, k in zip(some, keys, strict=True) if k == keys[at])
                assert new + written + 1 <= sizes.output and new + 2 * (written + 1) <= sizes.reserve
        assert len(set(keys)) <= 3


def test_one_of_no_declared_size_joins_the_largest_unless_it_has_a_lane():
    sharing = Sharing()
    assert placed(sharing, lanes(), SMALL) == "new"
    assert placed(sharing, lanes(MIDDLE, LARGE), SMALL) == LARGE
    assert placed(sharing, lanes(MIDDLE, LARGE), LARGE) == LARGE
    assert placed(sharing, lanes(SMALL, LARGE), SMALL) == SMALL, "that needs no program"
    assert placed(sharing, lanes(SMALL), LARGE) == "new"
    sharing.joined(key(SMALL), key(LARGE))
    assert placed(sharing, lanes(SMALL, LARGE), SMALL) == LARGE, "nor does that now"
    assert placed(sharing, lanes(SMALL, LARGE, full=LARGE), SMALL) == SMALL
    assert placed(sharing, lanes(SMALL, full=SMALL), SMALL) is None, "it waits"


def test_one_of_a_declared_size_joins_where_that_compiles_nothing():
    sharing = Sharing({SMALL: {(1, 1)}, LARGE: {(1, 1)}}, {(SMALL, LARGE)})
    assert placed(sharing, lanes(MIDDLE), SMALL) == "new"
    assert placed(sharing, lanes(MIDDLE, LARGE), SMALL) == LARGE
    assert placed(sharing, lanes(LARGE, full=LARGE), SMALL) == "new"


def test_a_lane_that_has_the_document_comes_first():
    sharing = Sharing({SMALL: {(1, 1)}, LARGE: {(1, 1)}}, {(SMALL, LARGE)})
    there = lanes(SMALL, documents=("a",)) | lanes(LARGE)
    assert placed(sharing, there, SMALL, "a") == SMALL
    assert placed(sharing, there, SMALL, "b") == LARGE


@pytest.mark.parametrize("full", [False, True])
def test_lanes_whose_rows_may_grow_are_one_for_all_sizes(full: bool):
    there = {key(None): SimpleNamespace(sizes_with=lambda names: None if full else (1, 2), documents=[], each=1)}
    found = Sharing().place(cast("Any", there), key(None), "a", [])
    assert found == (None if full else (key(None), (1, 2)))


@pytest.mark.parametrize(
    ("declared", "there", "wanted", "waits"),
    [
        ({(1, 1)}, (1, 1), (1, 2), False),  # nothing but the smallest was compiled for: it is compiled when it comes
        ({(1, 1), (1, 4)}, (1, 4), (1, 4), False),
        ({(1, 1), (1, 4)}, (1, 4), (1, 8), True),
        ({(1, 1), (1, 4)}, (1, 4), (2, 4), False),  # of another document, which must not wait for the first one's
        ({(1, 1), (1, 4)}, (1, 8), (1, 8), False),  # a free row of a lane that has so many
        ({(1, 1), (1, 4), (2, 1), (4, 1)}, (1, 4), (2, 4), False),
        ({(1, 1), (1, 4), (2, 1), (4, 1)}, (2, 1), (2, 2), True),
        ({(1, 1), (1, 2), (2, 1), (2, 2)}, (1, 2), (2, 4), True),  # several about another document at once
        ({(1, 1), (1, 2), (2, 1), (2, 2)}, (1, 1), (2, 2), False),
    ],
)
def test_a_question_waits_rather_than_for_a_program_of_more_rows(declared, there, wanted, waits):
    lane = SimpleNamespace(sizes_with=lambda names: wanted, documents=[None] * there[0], each=there[1])
    found = placed(Sharing({SMALL: declared}), cast("Any", {key(SMALL): lane}), SMALL)
    assert (found is None) == waits


def test_of_several_questions_about_another_document_one_does_not_wait():
    """Rows for all of them would be a program that is not there."""
    sizes = {1: (2, 2), 3: (2, 4)}
    lane = SimpleNamespace(sizes_with=lambda names: sizes[len(names)], documents=["a"], each=2)
    sharing, lanes = Sharing({SMALL: {(1, 1), (1, 2), (2, 1), (2, 2)}}), cast("Any", {key(SMALL): lane})
    assert sharing.place(lanes, key(SMALL), "b", ["b", "b"]) == (key(SMALL), (2, 2))


@pytest.mark.parametrize(
    ("declared", "there", "wanted", "waits"),
    [
        ({(1, 1)}, (1, 1), (2, 1), False),  # nothing but the smallest was compiled for
        ({(1, 1), (2, 1)}, (1, 1), (2, 1), False),
        ({(1, 1), (2, 1)}, (2, 1), (4, 1), True),
        ({(1, 1), (2, 1)}, (4, 1), (4, 1), False),  # a free row of a lane that has so many
        ({(1, 1), (1, 4)}, (1, 1), (2, 1), True),
        ({(1, 1), (1, 4), (2, 1)}, (1, 4), (2, 4), False),  # rows of a document, which might never all end
    ],
)
def test_a_chat_waits_rather_than_for_a_program_of_more_rows(declared, there, wanted, waits):
    lane = SimpleNamespace(sizes_with=lambda names: wanted, documents=[None] * there[0], each=there[1])
    sharing, lanes = Sharing({SMALL: declared}), cast("Any", {key(SMALL): lane})
    assert (placed(sharing, lanes, SMALL, shared=False) is None) == waits
    assert placed(sharing, lanes, SMALL) == SMALL, "a question about another document goes on"


def test_rows_are_given_up_without_a_copy_of_documents_that_stay(monkeypatch):
    """Of four documents with two rows each, one of which answers nothing any more, four have one row."""
    monkeypatch.setattr(Lane, "_repace", lambda lane: None)
    asked: list[tuple[list[int], Any]] = []
    rounds = SimpleNamespace(arrange=lambda order, documents: asked.append((order, documents)))
    jobs = [None, "job a", None, None, "job c", None, None, "job d"]
    lane = Lane(*cast("Any", (key(SMALL), rounds, [*"abcd"], jobs, None)))
    lane._shrink()
    assert asked == [([1, 2, 4, 7], None)]
    assert lane.documents == ["a", None, "c", "d"] and lane.jobs == ["job a", None, "job c", "job d"]


def test_of_two_requests_alike_the_one_that_gets_a_row_waits_no_more(monkeypatch):
    """There is a row for the second alone, and every field of the two is equal."""
    asked = cast("Any", "the question")
    first = Job(asked, RapidConfig(), lambda event: None, *[asked] * 2, streams=False)
    second, row = copy(first), Prepared(key(SMALL), asked, "a", None)
    assert first == second
    engine = Engine(RapidConfig(), asked)
    engine._ready += [(first, row), (second, row)]
    places = iter([None, (row.key, None)])
    monkeypatch.setattr(engine.sharing, "place", lambda *args, **named: next(places))
    monkeypatch.setattr(Lane, "of", lambda key, job, *rest: job)
    engine._place()
    assert [job is first for job, _ in engine._ready] == [True]
    assert engine._lanes[row.key] is cast("Any", second) and list(engine._held) == [id(second)]
