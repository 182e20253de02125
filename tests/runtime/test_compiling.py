# SPDX-License-Identifier: Apache-2.0
"""How long compiling takes, and that compiled programs do not pile up."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rapid_jax.runtime import compiling
from rapid_jax.runtime.compiling import forget_programs, keep_programs, most_mappings, timed


def mappings() -> int:
    return Path("/proc/self/maps").read_bytes().count(b"\n")


def compiled(size: int) -> jax.Array:
    return jax.block_until_ready(jax.jit(lambda x: jnp.sort(jnp.sin(x)) + size)(jnp.arange(float(size))))


def test_compiling_is_told_from_working():
    with timed() as first:
        compiled(17)
    assert first.compiling > 0 and first.working >= 0
    program = jax.jit(lambda x: x + 1)
    program(1.0)
    with timed() as again:
        program(2.0)
    assert again.compiling == 0 < again.working


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="counts mappings as Linux does")
def test_programs_are_forgotten_once_they_hold_too_many_mappings():
    compiled(5)
    most = mappings() + 60
    forgot = 0
    for size in range(20, 60):
        compiled(size)
        forgot += forget_programs(most)
        assert mappings() <= most
    assert 1 <= forgot < 40


def test_the_bound_is_half_of_what_linux_gives_and_more_where_as_much_is_kept(monkeypatch):
    limit = Path("/proc/sys/vm/max_map_count")
    given = int(limit.read_text()) if limit.is_file() else 65_530
    for kept, most in ((0, given // 2), (given // 3, given // 3 * 2), (given // 2, given * 9 // 10)):
        monkeypatch.setattr(compiling, "_mappings", lambda kept=kept: kept)
        monkeypatch.setattr(compiling, "_left", [0])
        monkeypatch.setattr(compiling, "_MAPS", Path(__file__))
        keep_programs()
        assert most_mappings() == most


def test_mappings_are_counted_only_after_something_was_compiled(monkeypatch):
    counted = []
    monkeypatch.setattr(compiling, "_mappings", lambda: counted.append(1) or 0)
    monkeypatch.setattr(compiling, "_MAPS", Path(__file__))
    forget_programs()
    before = len(counted)
    for _ in range(3):
        assert not forget_programs()
    assert len(counted) == before
    compiled(61)
    forget_programs()
    assert len(counted) == before + 1


def test_a_system_without_such_a_list_forgets_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "_MAPS", tmp_path / "absent")
    assert not forget_programs(0)
