# SPDX-License-Identifier: Apache-2.0
"""A job as a JobSet of Google Kubernetes Engine: what XPK submits for one slice, with this project's exit statuses.

Fields: jobset.x-k8s.io/v1alpha2 as of JobSet 0.10 (kubernetes-sigs/jobset), batch/v1, core/v1; labels and the injected
TPU_WORKER_ID and TPU_WORKER_HOSTNAMES: cloud.google.com/kubernetes-engine/docs/how-to/tpus.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from job_spec import PORT, RESTARTED, Job, whole_text

from rapid_jax.plan.topologies import CHIPS_PER_HOST

FOLDER = "/rapid_jax"  # the checkout in the image (launch/Dockerfile)
# The same for all pods of an attempt, new for the next, and known to whoever may read pods: batch/v1 sets it.
ATTEMPT = "metadata.labels['batch.kubernetes.io/controller-uid']"


@dataclass(frozen=True)
class Cluster:
    """What a manifest needs beside the job."""

    image: str
    namespace: str = "default"
    service_account: str | None = None  # of Kubernetes, which may read and write the bucket
    queue: str | None = None  # Kueue's LocalQueue


def manifest(job: Job, cluster: Cluster) -> list[dict[str, Any]]:
    """The objects to create: the config, where there is one, and the JobSet that mounts it."""
    objects = [_config_map(job, cluster)] if job.config else []
    return [*objects, _jobset(job, cluster)]


def _metadata(name: str, cluster: Cluster) -> dict[str, Any]:
    return {"name": name, "namespace": cluster.namespace, "labels": {"app.kubernetes.io/part-of": "rapid-jax"}}


def _config_map(job: Job, cluster: Cluster) -> dict[str, Any]:
    text = whole_text(str(job.config))
    metadata = _metadata(f"{job.name}-config", cluster)
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"config.yaml": text}}


def _jobset(job: Job, cluster: Cluster) -> dict[str, Any]:
    metadata = _metadata(job.name, cluster)
    # All pods of the slice go to one node pool, which is one slice, and no other job's pods join them there.
    metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    if cluster.queue:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = cluster.queue
    # A preempted or killed host fails its Job, and every failed Job makes the set anew; a Job that failed by its pod
    # failure policy, below, ends it.
    mistake = {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": job.restarts, "rules": [mistake]},
            "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": _batch_job(job, cluster)}}],
        },
    }


def _batch_job(job: Job, cluster: Cluster) -> dict[str, Any]:
    exits = {"containerName": "program", "operator": "NotIn", "values": list(RESTARTED)}
    return {
        "completions": job.hosts,
        "parallelism": job.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # a pod is never replaced alone: its peers have lost it
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": exits}]},
        "template": {"spec": _pod(job, cluster)},
    }


def _pod(job: Job, cluster: Cluster) -> dict[str, Any]:
    nodes = {
        "cloud.google.com/gke-tpu-accelerator": job.offer.gke_accelerator,
        "cloud.google.com/gke-tpu-topology": job.shape,
    }
    tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
    if job.spot:
        spot = "cloud.google.com/gke-spot"
        nodes[spot] = "true"
        tolerations.append({"key": spot, "operator": "Equal", "value": "true", "effect": "NoSchedule"})
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace,
        "shareProcessNamespace": True,  # process 1 ignores a SIGTERM that it does not handle; the program is not it
        "nodeSelector": nodes,
        "tolerations": tolerations,
        "containers": [_container(job, cluster)],
    }
    if cluster.service_account:
        pod["serviceAccountName"] = cluster.service_account
    if job.config:
        pod["volumes"] = [{"name": "config", "configMap": {"name": f"{job.name}-config"}}]
    return pod


def _container(job: Job, cluster: Cluster) -> dict[str, Any]:
    chips = {"google.com/tpu": str(CHIPS_PER_HOST)}
    container: dict[str, Any] = {
        "name": "program",
        "image": cluster.image,
        "workingDir": FOLDER,
        "command": [word.replace("$(", "$$(") for word in worker_command(job.program)],  # no variables of Kubernetes
        "env": [
            {"name": "RAPID_JOB_HOSTS", "value": str(job.hosts)},
            {"name": "RAPID_RUN_TOKEN", "valueFrom": {"fieldRef": {"fieldPath": ATTEMPT}}},
        ],
        "ports": [{"name": "coordinator", "containerPort": PORT}],
        "resources": {"requests": dict(chips), "limits": dict(chips)},
        "securityContext": {"privileged": True},  # as XPK: the chips' devices and locked memory
    }
    if job.config:
        path = f"{FOLDER}/{job.config}"  # where the checkout has it, so that what it names beside itself is found
        container["volumeMounts"] = [{"name": "config", "mountPath": path, "subPath": "config.yaml", "readOnly": True}]
    return container


def worker_command(program: Sequence[str]) -> list[str]:
    """The program as one process of the job."""
    return ["bash", "launch/job_worker.sh", *program]
