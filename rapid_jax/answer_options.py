# SPDX-License-Identifier: Apache-2.0
"""What `rapid answer`, `chat` and `serve` share: options that are settings, and the files that a run writes."""

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rapid_jax.config import RapidConfig
from rapid_jax.documents import STDIN
from rapid_jax.runtime import settings
from rapid_jax.runtime.command_line import Place
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.storage import is_local

# Option -> the setting that it stands for, its value's name, its help. `_TEXTS` are never numbers.
_OPTIONS = {
    "model": ("models.target", "DIR|FILE.gguf|smollm2", "the long-context target"),
    "drafter": (
        "models.drafter",
        "same|attended|DIR|FILE.gguf",
        "reads the retrieved text; same: the target; attended: the target, on what it attends to",
    ),
    "mode": ("speculation.mode", "rapid|lossless|phat|target|retrieval", "how the answer is made"),
    "temperature": ("sampling.temperature", "T", "0 is greedy"),
    "eta": ("speculation.eta", "E", "how strongly the drafter's distribution pulls the target's"),
    "gamma": ("speculation.gamma", "N|auto", "tokens drafted a round"),
    "max_new_tokens": ("sampling.max_new_tokens", "N", "most tokens of the answer"),
    "seed": ("sampling.seed", "S", "of what is drawn"),
}
_PLACES = ("model", "drafter")
_TEXTS = (*_PLACES, "mode")
TEXT: dict[str, Any] = {"action": Place, "as_path": False}  # of an option that is a file or folder
READ: dict[str, Any] = TEXT | {"reads": True}  # of one that is only read, maybe in a bucket
SETTINGS = "What no option says is as --config has it, else as is shown here."
SAMPLING = (
    "Sampling (temperature, top_k, top_p, min_p, repetition_penalty; --set sampling.KEY=VALUE) is by default the "
    "checkpoint's own: generation_config.json by transformers' rules, temperature 0 where that does not say do_sample. "
    "Without the file: temperature 0; top_k, min_p 0 and top_p, repetition_penalty 1, which are off. The summary and "
    "--json say what ran, and where each value is from."
)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options that make the settings, and --save-config and --quiet."""
    parser.add_argument("--config", **READ, metavar="FILE", help="settings to start from, as configs/rapid/*.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, section.key=value"
    )
    for name, (key, value, said) in _OPTIONS.items():
        place = READ if name in _PLACES else {}
        parser.add_argument(
            f"--{name.replace('_', '-')}", **place, metavar=value, help=f"{said} (default: {_default(key)})"
        )
    parser.add_argument("--save-config", **TEXT, metavar="FILE", help="write the settings that ran")
    parser.add_argument("--quiet", action="store_true", help="print answers alone; warnings still show")


def config_of(options: argparse.Namespace) -> RapidConfig:
    """The settings file or the defaults, --set over it, and the named options over that."""
    named = {key: getattr(options, name, None) for name, (key, _, _) in _OPTIONS.items()}  # serve has some of them
    texts = {_OPTIONS[name][0] for name in _TEXTS}
    overrides = [
        f"{key}={json.dumps(value, ensure_ascii=False) if key in texts else value}"
        for key, value in named.items()
        if value is not None
    ]
    overrides = [*options.set, *overrides]
    if options.config is None:
        return settings.defaults(RapidConfig, overrides)
    return settings.load(RapidConfig, options.config, overrides)


def trace_paths(name: str, source: str) -> tuple[Path, Path]:
    """(page, settings beside it). Raises InputError, naming `source`, for a name that is no page's."""
    page = Path(name)
    if page.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{source}: expected a name that ends in .html, got {name}")
    return page, page.with_suffix(".yaml")


def check_output(source: str, path: Path, read: Iterable[str | None]) -> None:
    """Raises InputError, naming `source`, for a file that cannot be written, or that is among those that are `read`."""
    others = [Path(name) for name in read if name and name != STDIN and is_local(name)]
    if path.resolve() in [other.resolve() for other in others]:
        raise InputError(f"{source}: would write over {path}, which this run reads")
    if not path.parent.is_dir():
        raise InputError(f"{path}: cannot be written: no folder {path.parent}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: cannot be written: {'it is a folder' if path.is_dir() else 'no permission'}")


def save_config(config: RapidConfig, path: Path) -> None:
    """Writes the settings, whole or not at all. Raises InputError where that fails."""
    try:
        settings.save(config, path)
    except OSError as error:
        raise InputError(f"{path}: the settings cannot be written: {error.strerror}") from error


def _default(name: str) -> str:
    """What holds where neither an option nor a file says it."""
    value: object = RapidConfig()
    for key in name.split("."):
        value = getattr(value, key)
    return "the checkpoint's own, else 0" if value is None else str(value)
