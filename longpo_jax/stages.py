# SPDX-License-Identifier: Apache-2.0
"""When a stage of a run is done, and with what: `done.json` in its folder, written last. Imports no jax.

A stage that is done with the same inputs is skipped; one that is done with others is refused, never written over.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longpo_jax.config import LongPOConfig
from longpo_jax.objectives import OBJECTIVES, objective_of
from rapid_jax.runtime import settings
from rapid_jax.runtime.agreement import READING_S, check_agreed, left_out
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.files import digest, replace_file
from rapid_jax.runtime.links import follow_link
from rapid_jax.runtime.sealed import sealed, unsealed
from rapid_jax.runtime.storage import AnyPlace, bytes_of

SCHEMA = 2
STAGES = ("pairs", "reference", "train", "export")  # in the order in which they run; each is a folder of a round
_FILE = "done.json"
# Settings that decide what a stage makes, "section.key" or a whole section "section.*". What changes speed, memory or
# what is told on the way (meshes, kernels, chunk sizes, log_every ...) is not among them.
_MATTERS = {
    "pairs": ("seed", "model.*", "corpus.*", "excerpts.*", "instruct.*", "pairs.*"),
    "reference": ("model.dtype", "model.reference_rope_theta", "objective.name", "objective.top_k"),
    "train": (
        "seed",
        "model.dtype",
        "model.rope_theta",
        "corpus.weights",
        "objective.*",
        "optimizer.*",
        "train.lengths",
        "train.tail",
        "train.rows_per_step",
        "train.epochs",
        "train.max_steps",
    ),
    "export": ("model.rope_theta", "train.lengths"),
}
# The source is known by what is in it, which each stage adds.
# Settings that came later, with the value that was in force before: it is not among the inputs, so what was made stays.
_LATER: dict[str, Any] = {"instruct.begins": ""}
_EXCEPT = {"pairs": ("model.source", "model.reference_rope_theta", "corpus.weights", "pairs.batch")}


def check_place(folder: AnyPlace) -> None:
    """Raises InputError where Orbax (0.12) writes no checkpoints: in a bucket of S3."""
    if not isinstance(folder, Path) and folder.scheme == "s3":
        raise InputError(
            f"run: expected a folder here or in gs:// to train in, got {folder}: Orbax writes no checkpoints to S3 "
            "(pairs and reference are written there)"
        )


def inputs_of(config: LongPOConfig, stage: str) -> dict[str, Any]:
    """The settings that decide what `stage` makes, "section.key" -> value, in the order of the settings file.

    Not among them: model.source, for which a stage adds a digest of the model it has loaded, and what an earlier stage
    has made, for which it adds `identity_of` that stage's folder.
    """
    flat = settings.flat(config)
    flat["corpus.weights"] = sorted(config.corpus.weight_of.items())
    matters = {key for key in flat if key in _MATTERS[stage] or f"{key.partition('.')[0]}.*" in _MATTERS[stage]}
    used = objective_of(config.objective.name).own
    others = {f"objective.{key}" for record in OBJECTIVES.values() for key in record.own if key not in used}
    without = {*_EXCEPT.get(stage, ()), *others, *(key for key, value in _LATER.items() if flat[key] == value)}
    return {key: value for key, value in flat.items() if key in matters and key not in without}


def stage_in(folder: AnyPlace, stage: str) -> AnyPlace:
    """Where `stage` of the round in `folder` is: in a folder of that name, or where a sweep has made it for several."""
    return follow_link(folder / stage)


def is_done(folder: AnyPlace, inputs: Mapping[str, Any]) -> bool:
    """Whether the stage of `folder` is done with these inputs (plain JSON values; a tuple counts as a list).

    Raises InputError, naming the first input that differs, if it is done with others.
    """
    done = _read(folder)
    if done is None:
        return False
    check_inputs(folder, inputs, done["inputs"])
    return True


def check_inputs(folder: AnyPlace, inputs: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Raises InputError, naming the first input that differs, if `folder` was made with others than `inputs`."""
    expected = json.loads(json.dumps(dict(inputs)))
    for key in (*expected, *made):
        if key not in expected or key not in made or expected[key] != made[key]:
            raise InputError(
                f"{folder} was made with {_said(made, key)}, expected {_said(expected, key)}: "
                f"choose another run folder, or delete {folder} to make it again"
            )


def is_to_skip(folder: AnyPlace, inputs: Mapping[str, Any], *, leads: bool) -> bool:
    """Whether the stage of `folder` is done with these inputs, which all processes of a run must have.

    The one that `leads` looks. Raises InputError as `is_done`, and where the processes have not the same inputs.
    """
    check_agreed(left_out(inputs, ("corpus.sources",)), patience=READING_S)  # each process has its own place for them
    from rapid_jax.runtime.mesh import agreed

    return bool(agreed(leads and is_done(folder, inputs)))


def check_same_model(place: AnyPlace, made: Mapping[str, Any], model: Mapping[str, str], source: str) -> None:
    """Raises InputError if the stage of `place` was made with another model than `source`, known by `model`."""
    for key in ("model.weights", "model.tokenizer", "model.template"):
        if made.get(key, model[key]) != model[key]:
            raise InputError(
                f"{place} was made with another model, with {key} = {str(made[key])[:60]}, expected {model[key]} as "
                f"{source} has: choose another run folder or model.source"
            )


def has_ended(folder: AnyPlace) -> bool:
    """Whether the stage of `folder` is done, whatever with."""
    return (folder / _FILE).is_file()


def mark_done(folder: AnyPlace, inputs: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Says that the stage of `folder` is done, with what, and what came of it (plain JSON values). One host does it."""
    with replace_file(folder / _FILE) as temporary:
        written = {"schema": SCHEMA, "inputs": dict(inputs), "summary": dict(summary)}
        temporary.write_bytes(sealed(written, _FILE, indent=1))


def made_with(folder: AnyPlace) -> dict[str, Any]:
    """The inputs of a stage. Raises InputError if it is not done."""
    return _done(folder)["inputs"]


def summary_of(folder: AnyPlace) -> dict[str, Any]:
    """What came of a stage. Raises InputError if it is not done."""
    return _done(folder)["summary"]


def identity_of(folder: AnyPlace) -> str:
    """Digest of what a done stage was made with and what came of it. Raises InputError if it is not done."""
    done = _done(folder)
    return digest(json.dumps([done["inputs"], done["summary"]], sort_keys=True))


def _done(folder: AnyPlace) -> dict[str, Any]:
    done = _read(folder)
    if done is None:
        raise InputError(f"{folder}: expected a stage that is done, got none: run `longpo {folder.name}` first")
    return done


def _read(folder: AnyPlace) -> dict[str, Any] | None:
    path = folder / _FILE
    data = bytes_of(path)
    if data is None:
        return None
    try:
        done = unsealed(data, _FILE, str(path))
    except InputError as error:
        raise InputError(f"{error}: delete it, and `longpo {folder.name}` checks what is there") from error
    if done.whole("schema", 0) != SCHEMA:
        raise done.error("schema", f"{SCHEMA}, that of this version")
    return {part: dict(done.fields(part)) for part in ("inputs", "summary")}


def _said(inputs: Mapping[str, Any], key: str) -> str:
    text = json.dumps(inputs[key], ensure_ascii=False) if key in inputs else "none"
    return f"{key} = {text if len(text) <= 60 else text[:57] + '...'}"
