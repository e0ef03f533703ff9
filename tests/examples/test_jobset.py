"""The JobSet of examples/, held against the fields of Kubernetes that it uses, and dry-run."""

import re
import shlex
import subprocess

import pytest
import yaml

from configs.run import check
from sharding.cluster import join
from tests.examples.test_commands import EXAMPLES, parsed

NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # of a host, RFC 1123
TEXT, COUNT, ANY = str, int, object
# What jobset.x-k8s.io/v1alpha2, batch/v1 and core/v1 call the fields: {} is an object, [] a list.
FIELDS = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": NAME},
    "spec": {
        "failurePolicy": {
            "maxRestarts": COUNT,
            "restartStrategy": ("Recreate", "BlockingRecreate"),
            "rules": [
                {
                    "name": NAME,
                    "action": (
                        "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts",
                    ),
                    "onJobFailureReasons": [
                        ("BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy")
                    ],
                }
            ],
        },
        "replicatedJobs": [
            {
                "name": NAME,
                "replicas": COUNT,
                "template": {
                    "spec": {
                        "parallelism": COUNT,
                        "completions": COUNT,
                        "completionMode": ("Indexed",),
                        "backoffLimit": COUNT,
                        "podFailurePolicy": {
                            "rules": [
                                {
                                    "action": ("FailJob", "Ignore", "Count"),
                                    "onExitCodes": {
                                        "containerName": NAME,
                                        "operator": ("In", "NotIn"),
                                        "values": [COUNT],
                                    },
                                }
                            ]
                        },
                        "template": {
                            "spec": {
                                "restartPolicy": ("Never",),  # which podFailurePolicy asks for
                                "terminationGracePeriodSeconds": COUNT,
                                "containers": [
                                    {
                                        "name": NAME,
                                        "image": TEXT,
                                        "workingDir": TEXT,
                                        "command": [TEXT],
                                        "ports": [{"containerPort": COUNT}],
                                        "env": [{"name": TEXT, "value": TEXT}],
                                        "resources": {"limits": {"nvidia.com/gpu": COUNT}},
                                        "volumeMounts": [{"name": NAME, "mountPath": TEXT}],
                                    }
                                ],
                                "volumes": [
                                    {
                                        "name": NAME,
                                        "persistentVolumeClaim": {"claimName": NAME},
                                        "emptyDir": {"medium": TEXT},
                                    }
                                ],
                            }
                        },
                    }
                },
            }
        ],
    },
}  # fmt: skip


def wrong(found, fields, path=""):
    """The places where a manifest is not as the fields say."""
    if isinstance(fields, dict):
        if not isinstance(found, dict):
            return [f"{path}: {found!r} is no object"]
        unknown = [f"{path}.{key}: no such field" for key in found.keys() - fields.keys()]
        known = found.keys() & fields.keys()
        return unknown + [
            e for key in known for e in wrong(found[key], fields[key], f"{path}.{key}")
        ]
    if isinstance(fields, list):
        if not isinstance(found, list) or not found:
            return [f"{path}: {found!r} is no list"]
        return [e for i, one in enumerate(found) for e in wrong(one, fields[0], f"{path}[{i}]")]
    if isinstance(fields, re.Pattern):
        good = isinstance(found, str) and fields.fullmatch(found)
    elif isinstance(fields, type):
        good = isinstance(found, fields) and not isinstance(found, bool)
    else:
        good = found in fields if isinstance(fields, tuple) else found == fields
    return [] if good else [f"{path}: {found!r} is not one of {fields}"]


@pytest.fixture(scope="module")
def manifest():
    return yaml.safe_load((EXAMPLES / "jobset.yaml").read_text())


@pytest.fixture(scope="module")
def job(manifest):
    (workers,) = manifest["spec"]["replicatedJobs"]
    return workers["template"]["spec"]


@pytest.fixture(scope="module")
def container(job):
    (found,) = job["template"]["spec"]["containers"]
    return found


def test_every_field_is_one_of_kubernetes_and_of_its_type(manifest):
    assert wrong(manifest, FIELDS) == []


def test_the_test_of_the_fields_finds_what_is_wrong():
    spec = {"replicatedJobs": [{"name": "Workers", "replica": 1, "replicas": "1"}]}
    assert sorted(wrong({"kind": "Job", "spec": spec}, FIELDS)) == [
        ".kind: 'Job' is not one of JobSet",
        f".spec.replicatedJobs[0].name: 'Workers' is not one of {NAME}",
        ".spec.replicatedJobs[0].replica: no such field",
        ".spec.replicatedJobs[0].replicas: '1' is not one of <class 'int'>",
    ]


def test_every_pod_of_the_set_finds_its_place(manifest, job, container, tmp_path):
    """The command runs as the container does, with a Python that tells its arguments."""
    (tmp_path / "python").write_text("#!/usr/bin/env bash\nprintf '%q ' \"$@\"\n")
    (tmp_path / "python").chmod(0o755)
    name, (workers,) = manifest["metadata"]["name"], manifest["spec"]["replicatedJobs"]
    assert job["parallelism"] == job["completions"]  # all at once
    for index in range(job["completions"]):
        env = {"PATH": f"{tmp_path}:/bin:/usr/bin", "JOB_COMPLETION_INDEX": str(index)}
        out = subprocess.run(
            container["command"], env=env, capture_output=True, text=True, check=True
        ).stdout
        run, given = parsed(shlex.split(out))
        place = join.place(given["coordinator"], given["processes"], given["process"])
        # JobSet names a pod SET-JOB-REPLICA-INDEX, below a service with the name of the set.
        first = f"{name}-{workers['name']}-0-0.{name}"
        port = container["ports"][0]["containerPort"]
        assert place == join.Place(f"{first}:{port}", job["completions"], index)
        check(run, job["completions"] * container["resources"]["limits"]["nvidia.com/gpu"])


def test_what_the_pods_mount_is_there_and_the_run_is_on_it(job, container):
    volumes = {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == volumes
    assert re.search(rf"--workdir={mounts['shared']}/", container["command"][-1])


def test_stopped_pods_come_again_and_wrong_inputs_do_not(manifest, job, container):
    first, second = job["podFailurePolicy"]["rules"]
    assert {first["onExitCodes"]["containerName"], second["onExitCodes"]["containerName"]} == {
        container["name"]
    }
    assert first["action"] == "Ignore" and first["onExitCodes"]["values"] == [130, 143]
    # Any other failure fails the job at once, and restarts the set.
    assert second["action"] == "FailJob" and second["onExitCodes"]["values"] == [2, 3]
    assert job["backoffLimit"] == 0 and manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
