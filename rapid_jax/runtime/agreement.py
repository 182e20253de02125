# SPDX-License-Identifier: Apache-2.0
"""What must not differ between the processes of a run, compared before they depend on it.

Processes whose programs differ abort in a collective or wait for each other for ever; those whose weights differ answer
wrongly. So each names what decides its programs and its answers, and where two differ all end with one line that says
in what. What differs rightly (where caches lie, what is told) is left out by name where the fields are made.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rapid_jax
from rapid_jax.runtime.distributed import Disagreement, Late, running
from rapid_jax.runtime.errors import Again, InputError
from rapid_jax.runtime.files import digest, replace_file
from rapid_jax.runtime.json_input import parse_json, parse_object
from rapid_jax.runtime.storage import AnyPlace, bytes_of, full_name

READING_S = 3600.0  # for digests of weights, which one process may have at hand and another has to read
_LOOKING_S = 10.0  # for a file of process 0 to appear where another process looks
_SHOWN = 80  # characters of a value that are compared and told as they are
_CONFIGURED = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def check_agreed(fields: Mapping[str, object], *, patience: float | None = None) -> None:
    """Raises InputError, on every process, unless all have the same fields; it names the first that differs.

    All processes must call it. A value is compared by what `repr` makes of it.
    """
    verdict = _settle(json.dumps({name: _brief(value) for name, value in fields.items()}), _difference, patience)
    if verdict:
        raise Disagreement(verdict)


def leads() -> bool:
    """Whether this is the first process of its run, or one alone."""
    run = running()
    return run.leads if run is not None else not are_several() or _is_first()


def told(value: Any, *, patience: float | None = None) -> Any:
    """The first process's value, on every process; it can be written as JSON. All processes must call it.

    With `patience` others are waited for so many seconds, and one that says nothing ends the run with status 75.
    """
    return value if not are_several() else _heard(value, lambda every: every[0], patience)


def all_told(value: Any, *, patience: float | None = None) -> list[Any]:
    """The values of all processes, in their order, on every process; else as `told`."""
    return [value] if not are_several() else _heard(value, lambda every: f"[{','.join(every)}]", patience)


def check_shared(folder: AnyPlace, what: str) -> None:
    """Raises InputError, on every process, unless `folder`, which process 0 has made, is one folder for all of them."""
    verdict = why_not_shared(folder, what, _LOOKING_S)
    if verdict:
        raise Disagreement(verdict)


def why_not_shared(folder: AnyPlace, what: str, patience: float) -> str:
    """Why `folder`, which process 0 has made, is not one for all processes; the same on each. Empty where it is.

    A file of process 0 must be seen within `patience` seconds.
    """
    if not are_several():
        return ""
    mark = folder / f".shared-{secrets.token_hex(16)}"
    said = mark.name
    try:
        if leads():
            try:
                with replace_file(mark) as temporary:
                    temporary.write_text(mark.name)
            except (OSError, InputError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                said = f"{what}: {folder}: cannot be written: {why}"
        said = _settle(said, lambda every: every[0], None)
        if said.startswith(f"{what}: "):
            return said
        here = json.dumps({"folder": full_name(folder), "seen": _appears(folder / Path(said).name, patience)})
        return _settle(here, lambda every: _why_not_shared(every, what, patience), None)
    finally:
        if leads():
            with contextlib.suppress(OSError, InputError):
                mark.unlink(missing_ok=True)


def code_fields(*packages: str) -> dict[str, str]:
    """Which code runs: versions, and a digest of the source files of `packages`, which are installed."""
    fields = {"version of rapid_jax": rapid_jax.__version__}
    for name in ("jax", "jaxlib"):
        fields[f"version of {name}"] = importlib.metadata.version(name)
    for name in packages:
        spec = importlib.util.find_spec(name)
        folder = Path(next(iter((spec and spec.submodule_search_locations) or [""])))
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
        parts = (part for file in files for part in (file.encode(), (folder / file).read_bytes()))
        fields[f"source files of {name}"] = digest(*parts)[:16]
    return fields


def backend_fields() -> dict[str, object]:
    """What of JAX decides a program: its devices, its numbers, its compiler's flags. The processes have met in JAX."""
    import jax

    fields: dict[str, object] = {
        "platform": jax.default_backend(),
        "devices of a process": jax.local_device_count(),
        "kind of devices": jax.local_devices()[0].device_kind,
    }
    fields |= {name: getattr(jax.config, name) for name in _CONFIGURED}
    for name in _FLAGS:  # where a compiler writes what it did is each process's own
        flags = os.environ.get(name, "").split()
        fields[name] = " ".join(sorted(flag for flag in flags if not flag.startswith("--xla_dump")))
    return fields


def left_out(fields: Mapping[str, object], names: Iterable[str]) -> dict[str, object]:
    """The fields without those of these names; "section.*" is a whole section."""
    names = set(names)
    return {name: value for name, value in fields.items() if not {name, f"{name.partition('.')[0]}.*"} & names}


def _brief(value: object) -> str:
    text = repr(value)
    if len(text) <= _SHOWN:
        return text
    return f"{text[:40]}... ({len(text)} characters, SHA-256 {digest(text.encode(errors='surrogatepass'))[:16]})"


def _difference(every: Sequence[str]) -> str:
    """What two processes differ in first, in words; empty if all have the same."""
    found = [parse_object(text, f"process {index}") for index, text in enumerate(every)]
    names = list(dict.fromkeys(name for fields in found for name in fields))
    differing = [name for name in names if len({_value(fields, name) for fields in found}) > 1]
    if not differing:
        return ""
    name, first = differing[0], _value(found[0], differing[0])
    index = next(index for index, fields in enumerate(found) if _value(fields, name) != first)
    more = differing[1:5] + (["..."] if len(differing) > 5 else [])
    return (
        f"expected the same {name} on all {len(found)} processes, got {first} on process 0 and "
        f"{_value(found[index], name)} on process {index}" + (f"; also: {', '.join(more)}" if more else "")
    )


def _value(fields: Mapping[str, object], name: str) -> str:
    value = fields.get(name, "nothing")
    return value if isinstance(value, str) else repr(value)


def _appears(path: AnyPlace, patience: float) -> bool:
    """Whether the file is there soon: a network's file system may need a moment."""
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(OSError, InputError):
            if bytes_of(path) == path.name.encode():
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _why_not_shared(every: Sequence[str], what: str, patience: float) -> str:
    found = [parse_object(text, f"process {index}") for index, text in enumerate(every)]
    for index, fields in enumerate(found):
        if not fields.truth("seen"):
            return (
                f"{what}: expected one folder that all {len(found)} processes share, got {found[0].text('folder')} of "
                f"process 0 and {fields.text('folder')} of process {index}, where a file of process 0 did not appear "
                f"within {patience:.0f} s"
            )
    return ""


def are_several() -> bool:
    """Whether this process is one of several of a run: of `meet`'s, or of those that the user's program had JAX join.

    JAX is not woken in a process alone.
    """
    run = running()
    if run is not None:
        return run.count > 1
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized() and _count() > 1


def _count() -> int:
    import jax

    return jax.process_count()


def _is_first() -> bool:
    import jax

    return jax.process_index() == 0


def _heard(value: Any, judge: Callable[[Sequence[str]], str], patience: float | None) -> Any:
    try:
        return parse_json(_settle(json.dumps(value), judge, patience), "process 0")
    except Late as error:
        if patience is None:
            raise
        raise Again(str(error)) from error


def _settle(mine: str, judge: Callable[[Sequence[str]], str], patience: float | None) -> str:
    """What `judge` makes of the texts of all processes, in their order."""
    run = running()
    if not are_several():
        return judge([mine])
    return judge(_gather(mine)) if run is None else run.settle(mine, judge, patience=patience)


def _gather(mine: str) -> list[str]:
    """The texts of all processes through JAX, which a program of the user's has started."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    counts = {process: len(jax.local_devices(process)) for process in range(jax.process_count())}
    if len(set(counts.values())) > 1:
        raise InputError(f"expected the same number of devices on every process, got {counts}")
    data = np.frombuffer(mine.encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.int32(data.size))))
    every = multihost_utils.process_allgather(np.pad(data, (0, longest - data.size)))
    return [bytes(row).rstrip(b"\0").decode() for row in every]
