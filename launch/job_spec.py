# SPDX-License-Identifier: Apache-2.0
"""What a job is, whichever engine runs it, and how Google Cloud names the slice it runs on."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout's own topologies, installed or not

from rapid_jax.plan.topologies import chips_of, generation_of, hosts_of  # noqa: E402
from rapid_jax.runtime import strict_yaml  # noqa: E402
from rapid_jax.runtime.errors import InputError  # noqa: E402
from rapid_jax.runtime.settings_file import merged, read_chain, text_of  # noqa: E402
from rapid_jax.runtime.storage import is_local  # noqa: E402

PORT = 8476  # of the coordinator; Google's firewall opens it between TPU hosts
TEMPFAIL = 75  # EX_TEMPFAIL of sysexits.h: the program saved, or lost a peer, and asks to be started again
# Exit statuses after which a start may go better: that one, and abort, bus error, kill, segmentation fault, terminate.
# All others, 2 for a user's mistake among them, end the job.
RESTARTED = (TEMPFAIL, 134, 135, 137, 139, 143)
WRITERS = ("pairs", "reference", "train", "export", "round", "rounds")  # commands of longpo that write to `run`
PLACE = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/[^\s]*)?")
NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")  # pods are called NAME-slice-0-0: Kubernetes has room for 63


@dataclass(frozen=True)
class Offer:
    """A generation as Google Cloud calls it. Of GKE's and Compute Engine's hosts see plan/topologies.py."""

    gke_accelerator: str  # the node label cloud.google.com/gke-tpu-accelerator
    machine_type: str  # of Compute Engine and GKE
    accelerator_type: str | None  # without its number, as the Cloud TPU API has it; None: not offered there
    cores: int = 1  # TensorCores of a chip, which that number counts
    runtime: str = ""  # the Cloud TPU API's runtime version
    largest_host: int = 4  # chips of that API's largest slice of one host; larger slices have four a host


OFFERS: Mapping[str, Offer] = MappingProxyType(
    {
        "v5e": Offer("tpu-v5-lite-podslice", "ct5lp-hightpu-4t", "v5litepod", 1, "v2-alpha-tpuv5-lite", 8),
        "v5p": Offer("tpu-v5p-slice", "ct5p-hightpu-4t", "v5p", 2, "v2-alpha-tpuv5"),
        "v6e": Offer("tpu-v6e-slice", "ct6e-standard-4t", "v6e", 1, "v2-alpha-tpuv6e", 8),
        "tpu7x": Offer("tpu7x", "tpu7x-standard-4t", None),
    }
)


@dataclass(frozen=True)
class Job:
    """A program on every host of one slice."""

    name: str
    topology: str  # v5p:2x2x4
    program: tuple[str, ...]
    config: str | None  # its path in the checkout
    spot: bool
    restarts: int  # at most, of a job that exits with one of RESTARTED
    grace: int  # seconds from SIGTERM to SIGKILL

    @property
    def offer(self) -> Offer:
        """Its slice in Google Cloud's words."""
        return OFFERS[self.topology.partition(":")[0]]

    @property
    def shape(self) -> str:
        """The slice's sides, 2x2x4."""
        return self.topology.partition(":")[2]

    @property
    def hosts(self) -> int:
        """How many processes it has."""
        return hosts_of(self.topology)


def accelerator_type(topology: str) -> str | None:
    """v5p-32 for v5p:2x2x4; None for a generation that the Cloud TPU API does not have."""
    offer = OFFERS[topology.partition(":")[0]]
    return offer.accelerator_type and f"{offer.accelerator_type}-{chips_of(topology) * offer.cores}"


def api_hosts(topology: str) -> int:
    """How many hosts a slice of the Cloud TPU API has: v5e:2x4 and v6e:2x4 are one there."""
    return 1 if chips_of(topology) <= OFFERS[topology.partition(":")[0]].largest_host else hosts_of(topology)


def checked_name(name: str) -> str:
    """The name, if Kubernetes and SkyPilot take it."""
    if not NAME.fullmatch(name):
        raise InputError(f"NAME: expected at most 40 lower-case letters, digits and hyphens, as demo-1, got {name!r}")
    return name


def checked_topology(topology: str) -> str:
    """The name of a slice that the planner knows."""
    generation_of(topology)
    return topology


def checked_bucket(place: str) -> str:
    """A place in a bucket, without a slash at its end."""
    if not PLACE.fullmatch(place):
        raise InputError(f"--bucket: expected gs://BUCKET/PATH, got {place!r}")
    return place.rstrip("/")


def program_of(config: str | None, bucket: str | None, overrides: Sequence[str], given: Sequence[str]) -> list[str]:
    """The command line of every host: `given`, or longpo's round, or rounds, as the config says; `run` is the bucket.

    Raises InputError where the config or the place would not reach the program, and where longpo would write its run to
    a host's own disk, which goes with the host.
    """
    words = list(given)
    if not words:
        if config is None:
            raise InputError("expected --config FILE, or a program after --, got neither")
        words = ["longpo", "rounds" if _setting(config, "rounds", overrides) else "round", "--config", config]
    writes = words[0] == "longpo" and len(words) > 1 and words[1] in WRITERS
    if bucket is not None and not writes:
        expected = "|".join(WRITERS)
        raise InputError(f"--bucket is the run of longpo {expected}, got the program {' '.join(words[:2])!r}")
    if writes:
        given_too = [word.removeprefix("--set=") for word in (*words, *overrides)]
        if own := [word for word in given_too if re.match(r"run\s*=", word)]:
            raise InputError(f"--set {own[0]}: expected the run as --bucket gs://BUCKET/PATH")
        if bucket is None:
            raise InputError(f"longpo {words[1]}: expected --bucket gs://BUCKET/PATH for its run, got none")
        words += ["--set", f"run={bucket}"]
    for override in overrides:
        words += ["--set", override]
    return words


def read_config(path: Path) -> str:
    """The config's path in the checkout, all of which goes to the hosts. Raises InputError for one outside it."""
    try:
        inside = path.resolve().relative_to(ROOT)
    except ValueError:
        raise InputError(f"--config: expected a file in the checkout, which goes to the hosts, got {path}") from None
    if not isinstance(_settings(path), dict):
        raise InputError(f"--config: expected a YAML file of settings, got {path}")
    return inside.as_posix()


def check_places(config: str, overrides: Sequence[str]) -> None:
    """Raises InputError if the config names a model or documents on this machine: the hosts have no such folders.

    Looks at what the file, its bases and the overrides say. `smollm2`, the default, is a package that they lack too.
    """
    for key, hint in (
        ("model.source", "gs://BUCKET/models/NAME"),
        ("corpus.sources", "[book=gs://BUCKET/corpora/book]"),
    ):
        value = _setting(config, key, overrides)
        if key == "model.source" and value is None:
            value = "smollm2"
        for place in value if isinstance(value, list) else [value]:
            place = str(place).partition("=")[2] if isinstance(value, list) and "=" in str(place) else place
            if place is not None and not PLACE.fullmatch(str(place)):
                raise InputError(f"{key}: expected a place in a bucket, got {place}; mend it by --set '{key}={hint}'")


def check_bases(config: str) -> None:
    """Raises InputError if a base of the config is not where the config finds it on a host, to which the checkout goes.

    A base in a bucket is; one by an absolute name is not, even if it is in the checkout: that lies elsewhere there.
    """
    chain = read_chain(Path(os.path.relpath(ROOT / config)))  # a base that has a relative name keeps one
    for base in (file.source for file in chain[1:]):
        if is_local(base) and (Path(base).is_absolute() or not Path(base).resolve().is_relative_to(ROOT.resolve())):
            raise InputError(f"--config: expected a base beside it, which goes to the hosts with it, got {base}")


def _setting(config: str, key: str, overrides: Sequence[str]) -> Any:
    """A setting as the file and the overrides say; None where neither names it."""
    value: Any = _settings(ROOT / config)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    for override in overrides:
        left, equals, right = override.partition("=")
        try:
            value = yaml.safe_load(right) if left == key else value
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise InputError(f"--set: expected KEY=VALUE, with a value as YAML has it, got {override!r}")
    return value


def _settings(path: Path) -> Any:
    """What the file and its bases say."""
    try:
        return merged(read_chain(path))
    except InputError as error:
        raise InputError(f"--config: expected a YAML file of settings, got {path}: {error}") from None


def whole_text(config: str) -> str:
    """The config's text; of one with a base, all that it and its bases say."""
    chain = read_chain(ROOT / config)
    return text_of(ROOT / config) if len(chain) == 1 else strict_yaml.emit(merged(chain))
