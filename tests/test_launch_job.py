# SPDX-License-Identifier: Apache-2.0
"""launch/job.py: what it makes for GKE and SkyPilot, what it refuses, and jobs that are preempted and end done.

Nothing here talks to an engine. What JobSet, batch/v1 and SkyPilot take is written down below in this file's own words,
from their published schemas; tests/fake_engines.py stands for the engines.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from rapid_jax.plan.topologies import CHIPS_PER_HOST, GENERATIONS, chips_of, hosts_of

ROOT = Path(__file__).resolve().parents[1]
LAUNCH, GOLDEN = ROOT / "launch", ROOT / "tests" / "golden"
CONFIG = "configs/longpo/mistral_7b_128k_v5p_2x2x4.yaml"
MODEL = ["--set", "model.source=gs://mine/models/Mistral-7B-Instruct-v0.2"]
CORPUS = ["--set", "corpus.sources=[book=gs://mine/corpora/book]"]
RUN = ["--config", str(ROOT / CONFIG), "--bucket", "gs://mine/runs/demo", *MODEL, *CORPUS]
SLICE = ["demo", "--topology", "v5p:2x2x4", "--spot"]
IMAGE = ["--image", "us-docker.pkg.dev/mine/rapid/rapid_jax:1"]
SHORT = ["demo", "--topology", "v5p:2x2x1"]


@pytest.fixture(scope="module")
def job() -> Iterator[ModuleType]:
    sys.path.insert(0, str(LAUNCH))
    try:
        yield importlib.import_module("job")
    finally:
        sys.path.remove(str(LAUNCH))


@pytest.fixture
def printed(job: ModuleType, capsys: pytest.CaptureFixture[str]):
    def call(*arguments: str) -> str:
        assert job.main(arguments) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return call


# ---- golden dry runs


def test_the_jobset_of_a_spot_slice(printed):
    text = printed("gke", *SLICE, *IMAGE, "--service-account", "rapid", *RUN, "--dry-run")
    head, _, jobset = text.partition("---\n")
    config = yaml.safe_load(head)
    assert head.startswith("# kubectl create --filename=-\n")
    assert (config["kind"], config["metadata"]["name"]) == ("ConfigMap", "demo-config")
    assert config["data"] == {"config.yaml": (ROOT / CONFIG).read_text()}
    assert jobset == (GOLDEN / "jobset_v5p_2x2x4_spot.yaml").read_text()


def test_the_managed_job_of_a_spot_slice(printed):
    text = printed("sky", *SLICE, "--infra", "gcp/us-east5", *RUN, "--dry-run")
    assert text == (GOLDEN / "sky_v5p_2x2x4_spot.yaml").read_text()
    assert text == printed("sky", *SLICE, "--infra", "gcp/us-east5", *RUN)  # printing is what is done anyway


def test_a_share_of_the_pairs_is_a_program_of_its_own(printed):
    """Whichever slice takes it: no number of a worker is in it."""
    words = ["longpo", "pairs", "--config", CONFIG, "--share", "any/3"]
    run = yaml.safe_load(printed("sky", *SHORT, *RUN, "--", *words))["run"]
    expected = ["bash", "launch/job_worker.sh", *words, "--set", "run=gs://mine/runs/demo", *MODEL, *CORPUS]
    assert shlex.split(run.removeprefix("exec ")) == expected
    jobset = list(yaml.safe_load_all(printed("gke", *SHORT, *IMAGE, *RUN, "--", *words)))[-1]
    batch = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert batch["completions"] == 1
    assert batch["template"]["spec"]["containers"][0]["command"] == expected


def test_the_command_runs_as_a_program():
    """From another folder too."""
    command = [sys.executable, LAUNCH / "job.py", "sky", *SHORT, "--", "rapid", "bench"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env={})
    assert done.returncode == 0, done.stderr
    assert "exec bash launch/job_worker.sh rapid bench\n" in done.stdout


def test_a_python_without_pyyaml_is_told_in_one_line(tmp_path: Path):
    (tmp_path / "yaml.py").write_text("raise ImportError('none')\n")
    command = [sys.executable, LAUNCH / "job.py", "sky", *SHORT]
    environment = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "job: expected PyYAML in this Python, got none: pip install pyyaml\n"


# ---- what the engines take


ANY = object()
# Fields of jobset.x-k8s.io/v1alpha2, batch/v1 and core/v1, as far as they are used; a list stands for its items.
POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "shareProcessNamespace": bool,
    "nodeSelector": {ANY: str},
    "tolerations": [{"key": str, "operator": str, "value": str, "effect": str}],
    "serviceAccountName": str,
    "volumes": [{"name": str, "configMap": {"name": str}}],
    "containers": [
        {
            "name": str,
            "image": str,
            "workingDir": str,
            "command": [str],
            "env": [{"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}],
            "ports": [{"name": str, "containerPort": int}],
            "resources": {"requests": {ANY: str}, "limits": {ANY: str}},
            "securityContext": {"privileged": bool},
            "volumeMounts": [{"name": str, "mountPath": str, "subPath": str, "readOnly": bool}],
        }
    ],
}
BATCH_JOB = {
    "completions": int,
    "parallelism": int,
    "completionMode": str,
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [{"action": str, "onExitCodes": {"containerName": str, "operator": str, "values": [int]}}]
    },
    "template": {"spec": POD},
}
METADATA = {"name": str, "namespace": str, "labels": {ANY: str}, "annotations": {ANY: str}}
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": METADATA,
    "spec": {
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": BATCH_JOB}}],
    },
}
SKY = {
    "name": str,
    "workdir": str,
    "num_nodes": int,
    "resources": {
        "infra": str,
        "accelerators": str,
        "accelerator_args": {"runtime_version": str},
        "use_spot": bool,
        "job_recovery": {"max_restarts_on_errors": int, "recover_on_exit_codes": [int]},
    },
    "envs": {ANY: str},
    "secrets": {ANY: type(None)},
    "setup": str,
    "run": str,
}


def faults(value: Any, schema: Any, path: str = "") -> Iterator[str]:
    """Fields that the schema has not, and values of another type."""
    if isinstance(schema, dict) and isinstance(value, dict):
        for key, inner in value.items():
            if key in schema or ANY in schema:
                yield from faults(inner, schema.get(key, schema.get(ANY)), f"{path}.{key}")
            else:
                yield f"{path}.{key}: no such field"
    elif isinstance(schema, list) and isinstance(value, list):
        for number, inner in enumerate(value):
            yield from faults(inner, schema[0], f"{path}[{number}]")
    elif not isinstance(schema, type) or type(value) is not schema:
        yield f"{path}: {value!r}"


ALL_TOPOLOGIES = [f"{family}:{shape}" for family, generation in GENERATIONS.items() for shape in generation.shapes]


@pytest.mark.parametrize("topology", ALL_TOPOLOGIES)
def test_every_slice_has_a_jobset_of_its_hosts(printed, topology: str):
    text = printed("gke", "demo", "--topology", topology, *IMAGE, *RUN, "--queue", "ours", "--grace", "60")
    config, jobset = yaml.safe_load_all(text)
    assert not list(faults(jobset, JOBSET))
    assert not list(faults(config, {"apiVersion": str, "kind": str, "metadata": METADATA, "data": {ANY: str}}))
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "ours"
    (replicated,) = jobset["spec"]["replicatedJobs"]
    batch = replicated["template"]["spec"]
    pod = batch["template"]["spec"]
    (container,) = pod["containers"]
    hosts = chips_of(topology) // CHIPS_PER_HOST
    assert batch["completions"] == batch["parallelism"] == hosts == hosts_of(topology)
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": "4"}
    selector = pod["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-topology"] == topology.partition(":")[2]
    assert "cloud.google.com/gke-spot" not in selector and len(pod["tolerations"]) == 1  # no --spot
    assert pod["terminationGracePeriodSeconds"] == 60
    # The exit codes of a pod failure policy are ordered, and 0 is none; its Job does not replace pods.
    codes = batch["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    assert codes == sorted(set(codes)) and 0 not in codes and 2 not in codes and 75 in codes
    assert pod["restartPolicy"] == "Never" and batch["completionMode"] == "Indexed"
    assert {name["name"] for name in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("topology", [name for name in ALL_TOPOLOGIES if not name.startswith("tpu7x")])
def test_every_slice_of_the_cloud_tpu_api_is_the_one_that_tpu_sh_makes(printed, topology: str):
    task = yaml.safe_load(printed("sky", "demo", "--topology", topology, *RUN))
    assert not list(faults(task, SKY)) and task["resources"]["use_spot"] is False
    hosts = {"v5e:2x4": 1, "v6e:2x4": 1}.get(topology, hosts_of(topology))  # v5litepod-8 and v6e-8 are one VM each
    assert task["envs"] == {"RAPID_JOB_HOSTS": str(hosts)}
    command = ["bash", LAUNCH / "tpu.sh", "create", "demo", "--dry-run", "--topology", topology]
    create = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    accelerator = task["resources"]["accelerators"].removeprefix("tpu-")
    runtime = task["resources"]["accelerator_args"]["runtime_version"]
    assert f" --accelerator-type={accelerator} --version={runtime}\n" in create


def test_words_reach_the_program_as_they_are(printed):
    words = ["echo", "two words", "it's", "$HOME $(RAPID_RUN_TOKEN) `x`", "", "--set"]
    task = yaml.safe_load(printed("sky", *SHORT, "--", *words))
    probe = task["run"].replace("exec bash launch/job_worker.sh echo", "printf '<%s>'")
    done = subprocess.run(["bash", "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "".join(f"<{word}>" for word in words[1:])
    jobset = yaml.safe_load(printed("gke", *SHORT, *IMAGE, "--", *words))
    command = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert [word.replace("$$(", "$(") for word in command[2:]] == words and "$$(RAPID" in command[5]
    assert "volumes" not in str(jobset)  # no config, nothing to mount


def test_a_config_of_several_rounds_gets_them_all(printed):
    rounds = ["--set", "rounds=[train.epochs=1, train.epochs=2]"]
    assert "job_worker.sh longpo rounds --config" in printed("sky", *SHORT, *RUN, *rounds)
    assert "job_worker.sh longpo round --config" in printed("sky", *SHORT, *RUN)


def test_a_config_with_a_base_brings_all_of_it(printed, job, monkeypatch, tmp_path, capsys):
    text = (ROOT / CONFIG).read_text(encoding="utf-8")
    (tmp_path / "base.yaml").write_text(text, encoding="utf-8")
    own = "base: base.yaml\nseed: 7\nrounds: [train.epochs=1, train.epochs=2]\n"
    (tmp_path / "own.yaml").write_text(own, encoding="utf-8")
    monkeypatch.setattr(sys.modules["job_spec"], "ROOT", tmp_path)
    given = ["--config", str(tmp_path / "own.yaml"), *RUN[2:]]
    config_map, jobset = yaml.safe_load_all(printed("gke", *SHORT, *IMAGE, *given))
    made, base = yaml.safe_load(config_map["data"]["config.yaml"]), yaml.safe_load(text)
    assert made == base | {"seed": 7, "rounds": ["train.epochs=1", "train.epochs=2"]}
    command = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert "rounds" in command
    assert job.main(["sky", *SHORT, *given[:4], *CORPUS]) == 2
    assert "model.source: expected a place in a bucket, got models/Mistral" in capsys.readouterr().err


def test_a_base_that_the_hosts_would_not_find_is_refused(printed, job, monkeypatch, tmp_path, capsys):
    """SkyPilot copies the checkout and nothing else; GKE's ConfigMap has what the bases say."""
    checkout = tmp_path / "checkout"
    (checkout / "configs").mkdir(parents=True)
    for place in (checkout / "base.yaml", tmp_path / "base.yaml"):
        place.write_text((ROOT / CONFIG).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(sys.modules["job_spec"], "ROOT", checkout)
    own = checkout / "configs" / "own.yaml"
    given = [*SHORT, "--config", str(own), *RUN[2:]]
    for base in ("../../base.yaml", str(tmp_path / "base.yaml"), str(checkout / "base.yaml")):
        own.write_text(f"base: {base}\nseed: 7\n", encoding="utf-8")
        assert job.main(["sky", *given]) == 2
        said = capsys.readouterr().err
        assert "--config: expected a base beside it, which goes to the hosts" in said and len(said.splitlines()) == 1
        assert "seed: 7" in printed("gke", *given, *IMAGE)
    own.write_text("base: ../base.yaml\nseed: 7\n", encoding="utf-8")
    assert "--config configs/own.yaml" in printed("sky", *given)


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gke", "Demo", *SHORT[1:], *IMAGE, *RUN], "NAME: expected at most 40 lower-case letters, digits and hyphens"),
        (["sky", "demo", "--topology", "v5p-32", *RUN], "--topology v5p-32: expected GENERATION:SHAPE with one of v5e"),
        (["sky", "demo", "--topology", "v5p:2x2x16", *RUN], "--topology v5p:2x2x16: v5p comes as v5p:2x2x1, "),
        (["sky", "demo", "--topology", "tpu7x:2x2x1", *RUN], "expected a topology of v5e, v5p, v6e, got tpu7x:2x2x1"),
        (["sky", *SHORT], "expected --config FILE, or a program after --, got neither"),
        (["sky", *SHORT, *RUN, "--bucket", "s3://b"], "--bucket: expected gs://BUCKET/PATH, got 's3://b'"),
        (["sky", *SHORT, *RUN, "--bucket", "runs/x"], "--bucket: expected gs://BUCKET/PATH, got 'runs/x'"),
        (["sky", *SHORT, "--bucket", "gs://mine/x", "--", "rapid", "answer"], "--bucket is the run of longpo pairs|"),
        (
            ["sky", *SHORT, *RUN[:2], *MODEL, *CORPUS],
            "longpo round: expected --bucket gs://BUCKET/PATH for its run, got",
        ),
        (["sky", *SHORT, "--", "longpo", "train", "--config", "x"], "longpo train: expected --bucket gs://BUCKET/PATH"),
        (["gke", *SHORT, *IMAGE, *RUN, "--set", "run=runs/x"], "--set run=runs/x: expected the run as --bucket gs://"),
        (
            ["sky", *SHORT, "--bucket", "gs://mine/x", "--", "longpo", "round", "--set=run=gs://mine/y"],
            "--set run=gs://mine/y: expected the run as --bucket gs://",
        ),
        (
            ["sky", *SHORT, "--", "longpo", "round", "--set", "run=gs://mine/y"],
            "--set run=gs://mine/y: expected the run as --bucket gs://",
        ),
        (
            ["sky", *SHORT, *RUN, "--set", "model.source=smollm2"],
            "got smollm2; mend it by --set 'model.source=gs://BUCKET/models/NAME'",
        ),
        (
            ["sky", *SHORT, *RUN, "--set", "model.source=null"],
            "model.source: expected a place in a bucket, got smollm2",
        ),
        (["sky", *SHORT, *RUN, "--config", "/absent.yaml"], "--config: expected a file in the checkout, which goes"),
        (["sky", *SHORT, *RUN, "--config", str(ROOT / "absent.yaml")], "--config: expected a YAML file of settings"),
        (["sky", *SHORT, *RUN, "--config", str(ROOT / "LICENSE")], "--config: expected a YAML file of settings"),
        (["sky", *SHORT, *RUN[:4], *CORPUS], "model.source: expected a place in a bucket, got models/Mistral-7B"),
        (["sky", *SHORT, *RUN[:4], *MODEL], "corpus.sources: expected a place in a bucket, got corpora/book; mend it"),
        (["sky", *SHORT, *RUN, "--set", "model.source: x"], "--set: expected KEY=VALUE, with a value as YAML has it"),
        (["sky", *SHORT, *RUN, "--set", "rounds=[a"], "--set: expected KEY=VALUE, with a value as YAML has it, got"),
        (["sky", *SHORT, *RUN, "--submit", "--dry-run"], "expected --dry-run or --submit, got both"),
        (["gke", *SHORT, *IMAGE, *RUN, "--grace", "-1"], "--grace: expected 0 or more, got -1"),
        (["gke", *SHORT, *IMAGE, *RUN, "--restarts", "many"], "argument --restarts: invalid int value: 'many'"),
        (["gke", *SHORT, *RUN], "the following arguments are required: --image"),
        (["sky", *SHORT, *RUN, "--image", "x"], "unrecognized arguments: --image x"),
        (["slurm"], "argument gke|sky: invalid choice: 'slurm'"),
        ([], "the following arguments are required: gke|sky"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    job: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    try:
        status = job.main(arguments)
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert (status, out, len(err.splitlines())) == (2, "", 1), err
    assert err.startswith("job: ") and message in err


# ---- jobs that are preempted


# A program that resumes: the first process writes the journal, the others go along; SIGTERM saves and ends with 75.
LONGPO = r"""#!/usr/bin/env bash
for argument in "$@"; do [[ $argument != run=gs://* ]] || run=$FAKE/bucket/${argument#run=gs://}; done
mkdir -p "$run/processes"
trap 'exit 75' TERM
[[ ! -e $FAKE/mistake ]] || { echo "longpo: expected something else" >&2; exit 2; }
words=("$JAX_PROCESS_ID" "$JAX_NUM_PROCESSES" "$JAX_COORDINATOR_ADDRESS" "$JAX_PLATFORMS" "$RAPID_RUN_TOKEN")
echo "${words[*]}" >"$run/processes/$RANDOM$$"
[[ ! -e $HOME/state ]] || echo "a disk outlived its host" >&2
touch "$HOME/state" "$run/journal"
read -r preemptions <"$FAKE/preemptions"
while true; do
    read -r preempted <"$FAKE/preempted" || preempted=0
    mapfile -t lines <"$run/journal"
    ((${#lines[@]} < 6)) || exit 0
    started=("$run/processes"/*) # those of this attempt are all there before anything is done
    may=$((${#started[@]} == JAX_NUM_PROCESSES * (preempted + 1)))
    ((preempted == preemptions || ${#lines[@]} < 2 * (preempted + 1))) || may=0
    if ((JAX_PROCESS_ID == 0 && may)); then
        echo "step $((${#lines[@]} + 1))" >>"$run/journal"
    fi
    read -r -t 0.03 <> <(:) || true
done
"""
# The metadata server of a Cloud TPU VM.
CURL = r"""#!/usr/bin/env bash
[[ -n ${HOST:-} ]] || exit 6
case "${!#}" in
    */worker-id) [[ -n ${MIG:-} ]] && printf '%s' "$HOST" ;;
    */agent-worker-number) [[ -z ${MIG:-} ]] && printf '%s' "$HOST" ;;
    */worker-network-endpoints)
        for ((i = 0; i < HOSTS; i++)); do words+=("${MIG:-unknown:unknown:10.0.0.}$i"); done
        IFS=,
        printf '%s' "${words[*]}"
        ;;
esac
"""


class Cloud:
    """A folder with the stand-ins on PATH, a bucket, and a checkout whose host_setup.sh only notes its extras."""

    def __init__(self, root: Path):
        self.root, self.bin = root, root / "bin"
        self.bin.mkdir()
        (root / "bucket").mkdir()
        for engine in ("kubectl", "sky"):
            fake = f"exec {sys.executable} {ROOT}/tests/fake_engines.py {engine}"
            self.program(self.bin / engine, f'#!/usr/bin/env bash\n{fake} "$@"\n')
        self.program(self.bin / "longpo", LONGPO)
        self.program(self.bin / "curl", CURL)
        (root / "checkout" / "launch").mkdir(parents=True)
        shutil.copy(LAUNCH / "job_worker.sh", root / "checkout" / "launch")
        self.program(root / "checkout" / "launch" / "host_setup.sh", 'echo "$*" >>"$FAKE/extras"\n')
        (root / "preempted").write_text("0\n")

    @staticmethod
    def program(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def submit(self, *arguments: str, preemptions: int = 2) -> subprocess.CompletedProcess[str]:
        (self.root / "preemptions").write_text(f"{preemptions}\n")
        command = [sys.executable, str(LAUNCH / "job.py"), arguments[0], "--submit", *arguments[1:]]
        environment = {"PATH": f"{self.bin}:{os.environ['PATH']}", "FAKE": str(self.root), "HOME": str(self.root)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    def text(self, name: str) -> str:
        path = self.root / name
        return path.read_text() if path.exists() else ""

    def processes(self) -> list[list[str]]:
        folder = self.root / "bucket" / "mine" / "runs" / "demo" / "processes"
        return [path.read_text().split() for path in folder.iterdir()]


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path)


def test_a_jobset_that_is_preempted_twice_ends_done(cloud: Cloud):
    done = cloud.submit("gke", *SLICE, *IMAGE, *RUN)
    assert done.returncode == 0, done.stderr
    assert cloud.text("calls") == "kubectl create --filename=-\n"
    assert cloud.text("status") == "Completed" and cloud.text("preempted") == "2\n", cloud.text("log")
    assert cloud.text("bucket/mine/runs/demo/journal").splitlines() == [f"step {step}" for step in range(1, 7)]
    assert cloud.text("statuses").splitlines() == ["[75, 75, 75, 75]", "[137, 137, 137, 137]", "[0, 0, 0, 0]"]
    assert cloud.text("log") == ""
    started = cloud.processes()
    assert sorted(words[0] for words in started) == sorted("0123" * 3)
    assert {tuple(words[1:4]) for words in started} == {("4", "demo-slice-0-0.demo:8476", "tpu,cpu")}
    assert {words[4] for words in started} == {"uid-0", "uid-1", "uid-2"}  # an attempt's processes know each other


def test_a_managed_job_that_is_preempted_twice_ends_done(cloud: Cloud):
    done = cloud.submit("sky", *SLICE, *RUN)
    assert done.returncode == 0, done.stderr
    flags = "--yes --detach-run --name=demo --secret=RAPID_RUN_TOKEN"
    assert re.fullmatch(rf"sky jobs launch {flags} \S+\.yaml\n", cloud.text("calls"))
    assert cloud.text("status") == "SUCCEEDED" and cloud.text("preempted") == "2\n", cloud.text("log")
    assert cloud.text("bucket/mine/runs/demo/journal").splitlines() == [f"step {step}" for step in range(1, 7)]
    assert cloud.text("extras").splitlines() == ["tpu cloud longpo"] * 12
    started = cloud.processes()
    assert sorted(words[0] for words in started) == sorted("0123" * 3)
    assert {tuple(words[1:3]) for words in started} == {("4", "10.0.0.0:8476")}
    (token,) = {words[4] for words in started}
    assert re.fullmatch("[0-9a-f]{32}", token)


@pytest.mark.parametrize(("engine", "status"), [("gke", "Failed by FailJobSet"), ("sky", "FAILED")])
def test_a_users_mistake_is_not_tried_again(cloud: Cloud, engine: str, status: str):
    (cloud.root / "mistake").touch()
    done = cloud.submit(engine, *SLICE, *(IMAGE if engine == "gke" else []), *RUN)
    assert done.returncode == 0 and cloud.text("status") == status
    (statuses,) = cloud.text("statuses").splitlines()
    assert "2" in statuses and cloud.text("bucket/mine/runs/demo/journal") == ""


def test_a_jobset_has_a_bound(cloud: Cloud):
    cloud.submit("gke", *SLICE, *IMAGE, *RUN, "--restarts", "1")
    assert cloud.text("status") == "Failed: no restarts left"
    assert len(cloud.text("statuses").splitlines()) == 2


def test_an_engine_that_refuses_or_is_absent_is_reported(cloud: Cloud):
    (cloud.root / "refuse").touch()
    done = cloud.submit("gke", *SHORT, *IMAGE, "--", "true")
    assert (done.returncode, done.stderr) == (1, "kubectl: forbidden\n")
    (cloud.bin / "sky").unlink()
    environment = {"PATH": str(cloud.bin), "FAKE": str(cloud.root)}
    command = [sys.executable, LAUNCH / "job.py", "sky", *SHORT, "--submit", "--", "true"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "job: --submit: expected sky on PATH, got none\n")


# ---- one process of a job


def worker(cloud: Cloud, *program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{cloud.bin}:{os.environ['PATH']}", "HOME": str(cloud.root)} | variables
    command = ["bash", str(LAUNCH / "job_worker.sh"), *program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


PROBE = ("bash", "-c", 'echo "$JAX_COORDINATOR_ADDRESS,$JAX_NUM_PROCESSES,$JAX_PROCESS_ID,$MEGASCALE_NUM_SLICES,$PWD"')


def test_a_process_knows_its_peers_as_libtpu_does(cloud: Cloud):
    pods = {"TPU_WORKER_HOSTNAMES": "a-0.a,a-1.a", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "3"}
    assert worker(cloud, *PROBE, RAPID_JOB_HOSTS="2", **pods).stdout == f"a-0.a:8476,2,1,,{ROOT}\n"
    assert worker(cloud, *PROBE, HOST="2", HOSTS="3").stdout == f"10.0.0.0:8476,3,2,,{ROOT}\n"
    assert worker(cloud, *PROBE, HOST="2", HOSTS="3", MIG="vm-").stdout == f"vm-0:8476,3,2,,{ROOT}\n"
    left_over = {"JAX_COORDINATOR_ADDRESS": "old:1", "JAX_NUM_PROCESSES": "9", "JAX_PROCESS_ID": "8"}
    assert worker(cloud, *PROBE, RAPID_JOB_HOSTS="1", **left_over).stdout == f",,,,{ROOT}\n"
    assert worker(cloud, "exit 7").returncode == 2  # no metadata, no pods
    assert worker(cloud, "bash", "-c", "exit 75", RAPID_JOB_HOSTS="1").returncode == 75


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RAPID_JOB_HOSTS": "4", "TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, "expected 4 hosts, got 2: a,b"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "2"}, "expected this host's number below 2, got '2'"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "expected this host's number below 2, got ''"),
        ({}, "expected a program, got none"),
    ],
)
def test_a_process_that_would_wait_for_ever_is_refused(cloud: Cloud, variables: dict[str, str], message: str):
    done = worker(cloud, *(("true",) if variables else ()), **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("job_worker: ") and message in done.stderr and len(done.stderr.splitlines()) == 1
