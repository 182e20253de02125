# SPDX-License-Identifier: Apache-2.0
"""A job as the task of a SkyPilot managed job: docs.skypilot.co, reference/yaml-spec and examples/managed-jobs.

A slice of the Cloud TPU API is one node to SkyPilot; setup and run go to all of its hosts.
"""

import shlex
from typing import Any

from job_spec import OFFERS, TEMPFAIL, Job, accelerator_type, api_hosts
from jobset import worker_command

from rapid_jax.runtime.errors import InputError


def task(job: Job, infra: str) -> dict[str, Any]:
    """The task; `infra` is gcp, gcp/REGION or gcp/REGION/ZONE. Raises InputError for a slice that SkyPilot has not."""
    kind = accelerator_type(job.topology)
    if kind is None:
        offered = ", ".join(name for name, offer in OFFERS.items() if offer.accelerator_type)
        raise InputError(f"sky: expected a topology of {offered}, got {job.topology}: gke has it")
    resources: dict[str, Any] = {
        "infra": infra,
        "accelerators": f"tpu-{kind}",
        "accelerator_args": {"runtime_version": job.offer.runtime},
        "use_spot": job.spot,
        # A preempted slice is made anew whatever the exit status. No status of a signal is among these: when one host
        # fails, with 2 for a user's mistake, SkyPilot kills the others and counts 137 for each.
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [TEMPFAIL]},
    }
    return {
        "name": job.name,
        "workdir": ".",
        "num_nodes": 1,
        "resources": resources,
        "envs": {"RAPID_JOB_HOSTS": str(api_hosts(job.topology))},
        "secrets": {"RAPID_RUN_TOKEN": None},  # given by --secret
        "setup": "bash launch/host_setup.sh tpu cloud longpo\n",
        "run": f"exec {shlex.join(worker_command(job.program))}\n",
    }
