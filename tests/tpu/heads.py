# SPDX-License-Identifier: Apache-2.0
"""What the heads of the settings files say of their plans."""

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def slices_in(folder: Path) -> list[Path]:
    """The settings that have a plan."""
    return [path for path in sorted(folder.glob("*.yaml")) if "\n# Plan: " in path.read_text(encoding="utf-8")]


def programs_of(path: Path) -> dict[str, float]:
    """Program -> GiB a chip, in order."""
    said = re.findall(r"^# +([a-z ]+): ([\d.]+) GiB", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert len({name for name, _ in said}) == len(said)
    return {name: float(size) for name, size in said}


def options_of(path: Path, command: str, add_arguments: Callable[[argparse.ArgumentParser], None]):
    """The options of the one plan command, as the command reads them."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    (words,) = re.findall(rf"^# Plan: +{command} plan (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return parser.parse_args(shlex.split(words))
