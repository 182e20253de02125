# SPDX-License-Identifier: Apache-2.0
"""The model card of an export, README.md: what the run's stages say of themselves, and no folder of this machine.

Scores are those of evaluations in the run's folder: `rapid evaluate --suite ruler ... --out RUN/ruler`, then
`longpo export` again.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from longpo_jax.config import LongPOConfig
from longpo_jax.objectives import objective_of
from longpo_jax.stages import STAGES, has_ended, inputs_of, made_with, stage_in, summary_of
from rapid_jax.model.gguf_io import GgufCheckpoint
from rapid_jax.model.hf_io import HfCheckpoint
from rapid_jax.runtime import settings, strict_yaml
from rapid_jax.runtime.errors import InputError, legible
from rapid_jax.runtime.files import digest, replace_file
from rapid_jax.runtime.storage import AnyPlace, full_name, place_of
from rapid_jax.runtime.sweep import markdown

CARD: Final = "README.md"
_LICENCE: Final = ("license", "license_name", "license_link")  # keys of a card's head
_HEAD = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
_MARK = re.compile(r"<!-- longpo export ([0-9a-f]{16}) -->\n\Z")


def card_of(config: LongPOConfig, folder: AnyPlace, checkpoint: HfCheckpoint | GgufCheckpoint, step: int) -> str:
    """The card of the model in `folder`/export, which started from `checkpoint`."""
    licence = licence_of(checkpoint)
    base, rounds = base_of(config)
    head = {**licence, "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["longpo"]}
    lines = [
        f"---\n{strict_yaml.emit(head)}---\n",
        f"# {base}, taught long context by itself\n",
        f"- Base model: {base}" + (f", in {rounds} rounds" if rounds > 1 else ""),
        f"- Licence of the base: {licence.get('license_name') or licence.get('license') or 'not stated'}",
        f"- Method: {objective_of(config.objective.name).card}; {step} updates",
        f"- Context: rows of up to {config.train.lengths[-1]:,} tokens\n",
        *_data(config, folder),
        *_scores(folder),
        *_settings(config),
    ]
    body = "\n".join(lines) + "\n"
    return f"{body}<!-- longpo export {digest(body)[:16]} -->\n"


def renew(place: AnyPlace, card: str) -> bool:
    """Writes the card of a finished export anew; False where somebody has edited it, which stays."""
    path = place / CARD
    if path.is_file():
        there = path.read_bytes().decode("utf-8", "replace")
        mark = _MARK.search(there)
        if mark is None or digest(there[: mark.start()])[:16] != mark[1]:
            return False
        if there == card:
            return True
    with replace_file(path) as temporary:
        temporary.write_text(card, encoding="utf-8")
    return True


def licence_of(checkpoint: HfCheckpoint | GgufCheckpoint) -> dict[str, str]:
    """What the checkpoint says of its licence, by the keys of a card's head; nothing where it says nothing."""
    if isinstance(checkpoint, GgufCheckpoint):
        return {"license": checkpoint.licence} if checkpoint.licence else {}
    head = _head_of(checkpoint.folder / CARD)
    return {key: legible(head[key]) for key in _LICENCE if isinstance(head.get(key), str) and head[key]}


def base_of(config: LongPOConfig) -> tuple[str, int]:
    """(the name of the model that the first round started from, how many rounds there were), as far as can be seen."""
    source, rounds, seen = config.model.source, 1, set[str]()
    while (place := place_of(source, "model.source")).name == "export":
        try:
            if not (place.parent / "settings.yaml").is_file():
                break
            seen.add(full_name(place))
            source = settings.load(LongPOConfig, place.parent / "settings.yaml").model.source
            if full_name(place_of(source, "model.source")) in seen:  # somebody has named a run's own export
                break
        except InputError:
            break
        rounds += 1
    return legible(place.name), rounds


def _head_of(card: AnyPlace) -> Mapping[str, Any]:
    """The head of a card, empty where there is none that can be read."""
    try:
        found = _HEAD.match(card.read_bytes().decode("utf-8", "replace")) if card.is_file() else None
        head = strict_yaml.parse(found[1], str(card)) if found else {}
    except (InputError, OSError):
        return {}
    return head if isinstance(head, dict) else {}


def _data(config: LongPOConfig, folder: AnyPlace) -> Iterator[str]:
    domains = ", ".join(dict.fromkeys(source.partition("=")[0] for source in config.corpus.sources))
    lines = [["domains", domains]] if domains else []
    if has_ended(pairs := stage_in(folder, "pairs")):
        made = summary_of(pairs)
        lines += [[name, str(made[name])] for name in ("documents", "pairs", "turns") if name in made]
    if has_ended(folder / "train"):
        inputs = made_with(folder / "train")
        names = {"model.weights": "weights of the base", "pairs": "pairs", "reference": "reference"}
        lines += [[f"SHA-256, {name}", str(inputs[key])] for key, name in names.items() if key in inputs]
    if lines:
        yield f"## Data\n\n{markdown(('what', 'value'), lines, left=True)}"


def _scores(folder: AnyPlace) -> Iterator[str]:
    """The tables of the evaluations on RULER beside the export."""
    for path in sorted(folder.glob("*/suite.json")):
        report = path.parent / "report.md"
        try:
            if json.loads(path.read_bytes()).get("suite") != "ruler" or not report.is_file():
                continue
            found = strict_yaml.parse((path.parent / "settings.yaml").read_bytes().decode(), "settings")
            target = place_of(found["models"]["target"], "models.target")
            scores = report.read_bytes().decode().partition("\n## Scores\n")[2].partition("\n## ")[0].strip()
        except (InputError, OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        of = "this model" if _same(target, folder / "export") else legible(target.name)
        if scores:
            yield f"## RULER, {of} ({legible(path.parent.name)})\n"
            yield f"Scores in %, brackets are 95 % bootstrap intervals.\n\n{scores}\n"


def _same(place: AnyPlace, folder: AnyPlace) -> bool:
    if isinstance(place, Path) and isinstance(folder, Path):
        return place.resolve() == folder.resolve()
    return str(place) == str(folder)


def _settings(config: LongPOConfig) -> Iterator[str]:
    """What decides the result, but for where it lies."""
    found = {key: value for stage in STAGES for key, value in inputs_of(config, stage).items()}
    found.pop("corpus.sources", None)
    lines = [[key, json.dumps(value, ensure_ascii=False)] for key, value in found.items()]
    yield f"## Settings\n\n{markdown(('setting', 'value'), lines, left=True)}"
