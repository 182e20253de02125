# SPDX-License-Identifier: Apache-2.0
"""configs/SETTINGS.md: every setting of both commands is there, with what it means, as the dataclasses have it now."""

import pytest

from longpo_jax.config import LongPOConfig
from rapid_jax.config import RapidConfig
from rapid_jax.runtime import settings
from tests.settings_page import PAGE, page


def rows(text: str) -> dict[str, str]:
    """What a chapter's tables say of each setting, by its name."""
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    return {name.strip().strip("`"): meaning.strip() for name, _, _, meaning in cells}


def test_the_page_is_that_of_the_dataclasses_now():
    assert PAGE.read_text(encoding="utf-8") == page(), "make it again: python -m tests.settings_page"


@pytest.mark.parametrize(("cls", "chapter"), [(RapidConfig, 1), (LongPOConfig, 2)], ids=["rapid", "longpo"])
def test_every_setting_is_there_and_says_what_it_means(cls, chapter):
    text = page().split("\n## ")[chapter]
    found = rows(text)
    wanted = {name: value for name, value in settings.flat(cls()).items() if name != "drafter_mesh"}
    assert found.keys() == wanted.keys()
    assert [name for name, meaning in found.items() if not meaning] == []
    assert ("### drafter_mesh" in text) == (cls is RapidConfig)
