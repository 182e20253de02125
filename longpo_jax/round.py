# SPDX-License-Identifier: Apache-2.0
"""A round from documents to a Hugging Face folder, and rounds on ever longer documents (arXiv 2502.13922, 3.3).

Each round starts from the model that the one before has exported: it makes the pairs, it is their reference, and it is
what is trained. What is done is skipped, so a chain that was interrupted goes on where it stopped.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence

from longpo_jax.config import LongPOConfig
from longpo_jax.stages import STAGES, check_place, has_ended, stage_in
from rapid_jax.runtime import settings
from rapid_jax.runtime.agreement import check_shared
from rapid_jax.runtime.command_line import say
from rapid_jax.runtime.errors import InputError
from rapid_jax.runtime.links import target_of
from rapid_jax.runtime.run_folder import again_when_a_store_fails, is_entered, working_in
from rapid_jax.runtime.share import Share
from rapid_jax.runtime.storage import AnyPlace, working_place

_LOOK_S = 5.0  # between two looks at a folder that another run works in
SETTINGS = "settings.yaml"  # in a round's folder: as they were when a stage last ended well


def folder_of(config: LongPOConfig) -> AnyPlace:
    """What everything is written to."""
    return working_place(config.run, "run")


def rounds_of(config: LongPOConfig) -> list[LongPOConfig]:
    """The settings of each round: those of `config`, its own line of `config.rounds` over them.

    Round r has the folder RUN/round-r and, from the second on, the export of the round before as its model: each is
    complete, and `longpo round` with it does that round alone. Raises InputError, naming the round, for a setting that
    does not fit.
    """
    if not config.rounds:
        raise InputError("rounds: expected the settings of one round or more, got none (`longpo round` does one)")
    found: list[LongPOConfig] = []
    for number, line in enumerate(config.rounds, start=1):
        overrides = line.split()
        for fixed in ("run", "rounds"):
            if any(override.partition("=")[0] == fixed for override in overrides):
                raise InputError(f"rounds: round {number}: {fixed} is the same for all rounds, got {line!r}")
        single = dataclasses.replace(config, run=str(folder_of(config) / f"round-{number}"), rounds=())
        if found:
            model = dataclasses.replace(config.model, source=str(folder_of(found[-1]) / "export"))
            single = dataclasses.replace(single, model=model)
        found.append(settings.changed(single, overrides, f"rounds: round {number}"))
    return found


def run_stage(stage: str, config: LongPOConfig, folder: AnyPlace, *, leads: bool = True, quiet: bool = False) -> None:
    """One of `stages.STAGES` of the round in `folder`; skipped if done. No process returns before it is all there.

    Raises InputError if another run is at work there, too, and if the processes of this one do not share the folder.
    """
    _check_link(folder / stage)
    with working_in(folder, stage) if leads else contextlib.nullcontext():
        _run_alone(stage, config, folder, leads=leads, quiet=quiet)


def _run_alone(stage: str, config: LongPOConfig, folder: AnyPlace, *, leads: bool, quiet: bool) -> None:
    """As `run_stage`, where no other run is at work in the folder."""
    from rapid_jax.runtime.mesh import agreed

    check_shared(folder, "run folder")
    _stage(stage)(config, folder, leads=leads, quiet=quiet)
    if leads:
        settings.save(config, folder / SETTINGS)
    agreed(0)


def run_share(
    stage: str,
    config: LongPOConfig,
    folder: AnyPlace,
    asked: Sequence[Share],
    *,
    leads: bool = True,
    quiet: bool = False,
) -> None:
    """A share of the pairs or the reference of the round in `folder` or, of several, all that no other run makes or has
    made.

    Whoever finds all shares done joins them, as the next `run_stage` does. Where several are asked for they are all
    done and joined when this returns: it waits for other runs, and takes over what those that end leave. Raises
    InputError as `run_stage`, and if another run makes the one share that is asked for.
    """
    from rapid_jax.runtime.mesh import agreed

    if stage == "pairs":
        from longpo_jax.pairs import run_share as make
    else:
        from longpo_jax.reference import run_share as make
    _check_link(folder / stage)
    if leads:
        folder.mkdir(parents=True, exist_ok=True)
    check_shared(folder, "run folder")
    with again_when_a_store_fails():
        all_done = make(config, folder, asked, leads=leads, quiet=quiet)
    if not all_done:
        if not quiet:
            say(f"{stage}: not all {asked[0].count} shares are done: this run has no more to do")
        return
    said = quiet or not leads
    while True:
        with contextlib.ExitStack() as stack:
            if agreed(leads and is_entered(stack, working_in(folder, stage))):
                _run_alone(stage, config, folder, leads=leads, quiet=quiet)
                return
        if not said:
            end = f"the next `longpo {stage}` does" if len(asked) == 1 else "this run waits for that"
            say(f"{folder}: another run is at work there: it joins the shares, or {end}")
        if len(asked) == 1 or agreed(leads and has_ended(stage_in(folder, stage))):
            return
        said = True
        time.sleep(_LOOK_S)


def run_round(config: LongPOConfig, folder: AnyPlace, *, leads: bool = True, quiet: bool = False) -> None:
    """All stages of the round in `folder`, in order; what is done is skipped. All are checked before one starts."""
    for stage in STAGES:
        _check_link(folder / stage)
    _check(config, folder, config.model.source)
    for stage in STAGES:
        run_stage(stage, config, folder, leads=leads, quiet=quiet)


def run_rounds(config: LongPOConfig, *, leads: bool = True, quiet: bool = False) -> None:
    """All rounds, in RUN/round-1, RUN/round-2, ...; all are checked before the first starts."""
    rounds = rounds_of(config)
    exports = {str(folder_of(single) / "export") for single in rounds}
    for single in rounds:
        source = single.model.source  # a model that is yet to be made has the shape of the first
        _check(single, folder_of(single), rounds[0].model.source if source in exports else source)
    for single in rounds:
        run_round(single, folder_of(single), leads=leads, quiet=quiet)


def _check_link(place: AnyPlace) -> None:
    """Raises InputError for a link of a sweep to a stage that is not there yet."""
    if (target := target_of(place)) is not None and not target.exists():
        raise InputError(f"{place}: expected the stage that the sweep shares in {target}, got none there yet")


def _check(config: LongPOConfig, folder: AnyPlace, source: str) -> None:
    """Of a round that is not done."""
    if not has_ended(folder / STAGES[-1]):
        from longpo_jax.checks import check_round

        check_place(folder)
        check_round(config, source)


def _stage(name: str) -> Callable[..., None]:
    """Imported when it runs: reading settings needs no jax, and no stage needs the libraries of another.

    Raises InputError if one of its libraries is not there.
    """
    try:
        if name == "pairs":
            from longpo_jax.pairs import run_pairs as run
        elif name == "reference":
            from longpo_jax.reference import run_reference as run
        elif name == "train":
            from longpo_jax.train import run_train as run
        else:
            from longpo_jax.export import run_export as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in ("longpo_jax", "rapid_jax"):
            raise
        hint = "pip install '.[longpo]' in a checkout"
        raise InputError(f"longpo {name} needs the package {error.name}, which is not installed: {hint}") from error
    return run
