# SPDX-License-Identifier: Apache-2.0
"""What `longpo check` finds: the lines of a table, and what would fail."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rapid_jax.runtime.errors import InputError


@dataclass
class Findings:
    """The lines of the table, and what would fail; `here` where this machine is the one that is meant."""

    here: bool
    lines: list[tuple[str, str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, what: str, needed: str, there: str = "", fault: str = "") -> None:
        """A line; `fault` says what would fail because of it."""
        self.lines.append((what, needed, there))
        if fault:
            self.faults.append(fault)

    def add_of_here(self, what: str, needed: str, there: str, fault: str = "") -> None:
        """A line about this machine's own disk or packages, which is no fault where another machine is meant."""
        self.add(what, needed, there if self.here else f"on this machine: {there}", fault if self.here else "")

    def try_(self, what: str, check: Callable[[], Any]) -> Any:
        """What `check` gives; where it raises InputError, that is a fault."""
        try:
            return check()
        except InputError as error:
            self.add(what, "", "would fail", str(error))
            return None
