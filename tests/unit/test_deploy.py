"""The image and the Kubernetes manifests say the same as the package: its version, Ray's, and what a recipe asks for.

With KubeRay's published CRDs at hand (`helm pull kuberay/kuberay-operator --untar`) the manifests are held against
them, too: GLANN_KUBERAY_CRDS=kuberay-operator/crds.
"""

from __future__ import annotations

import os
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import glann
import pytest
import yaml
from glann.cli import main as cli
from glann.config.run import load
from glann.tracking.runs import PAGE_VARIABLE
from glann.tracking.server import END_TIMEOUT_S

ROOT = Path(glann.__file__).parent
KUBERAY = ROOT / "deploy" / "kuberay"
CRDS = os.environ.get("GLANN_KUBERAY_CRDS")


def documents(file: str) -> dict[str, dict]:
    return {document["kind"]: document for document in yaml.safe_load_all((KUBERAY / file).read_text())}


@pytest.fixture(scope="module")
def spec() -> dict:
    return documents("raycluster.yaml")["RayCluster"]["spec"]


def pods(spec: dict) -> list[dict]:
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def test_a_job_of_its_own_gets_the_cluster_that_stands(spec: dict):
    assert documents("rayjob.yaml")["RayJob"]["spec"]["rayClusterSpec"] == spec


def test_the_cluster_wants_a_token_and_runs_as_nobody_special(spec: dict):
    assert spec["authOptions"] == {"mode": "token"}
    for pod in pods(spec):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    assert "useradd --uid 1000" in dockerfile
    assert dockerfile.index("\nUSER 1000") > dockerfile.index("\nRUN pip install")


def test_versions_are_those_of_the_pins(spec: dict):
    pins = (ROOT / "constraints.txt").read_text()
    ray = re.search(r"^ray==(.*)$", pins, re.M)[1]
    assert spec["rayVersion"] == ray
    assert spec["autoscalerOptions"]["image"] == f"rayproject/ray:{ray}"
    images = {container["image"] for pod in pods(spec) for container in pod["containers"]}
    assert images == {f"REGISTRY/glann:{glann.__version__}"}
    assert f"REGISTRY/glann:{glann.__version__}" in (ROOT / "deploy" / "Dockerfile").read_text()


def test_gpu_pods_come_when_asked_for_and_hold_a_worker(spec: dict):
    group = spec["workerGroupSpecs"][0]
    recipe = load("celebahq-1024").cluster
    assert spec["enableInTreeAutoscaling"] is True
    assert (group["minReplicas"], group["maxReplicas"]) == (0, 8)
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["cpu"]) >= recipe.cpus_per_worker
    assert limits["nvidia.com/gpu"] == recipe.gpus_per_worker
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "workers belong on GPU nodes"


def test_a_stopped_pod_or_job_has_the_time_to_save(spec: dict):
    needed = load("celebahq-1024").checkpoint.timeout_s
    job = yaml.safe_load(documents("rayjob.yaml")["RayJob"]["spec"]["runtimeEnvYAML"])
    assert int(job["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > needed
    assert all(pod["terminationGracePeriodSeconds"] > needed for pod in pods(spec))


def test_a_pod_that_goes_is_left_first(spec: dict):
    """Kubernetes runs the hook before SIGTERM, and its time counts against the grace period."""
    needed = load("celebahq-1024").checkpoint.timeout_s
    for pod in pods(spec):
        glann_, *words = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert (glann_, *words[:2]) == ("glann", "drain", "--within")
        assert needed < int(words[2]) < pod["terminationGracePeriodSeconds"]


def test_the_job_runs_a_command_that_glann_understands(capsys: pytest.CaptureFixture[str]):
    shell = shlex.split(documents("rayjob.yaml")["RayJob"]["spec"]["entrypoint"])
    assert shell[:2] == ["sh", "-c"]
    command = shell[2].partition("exec glann train ")[2].split()
    assert command, shell
    with pytest.raises(SystemExit) as caught:
        cli.main(["config", *command])
    assert not caught.value.code
    assert "s3://BUCKET/runs" in capsys.readouterr().out


def test_mlflow_outlives_the_head_and_every_cluster(spec: dict):
    """A pod of its own, whose files and database are in S3; jobs find it by themselves, people by the port-forward."""
    found = documents("raycluster.yaml")
    pod = found["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["image"] == spec["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
    assert container["command"][:3] == ["glann", "mlflow", "s3://BUCKET/mlflow"]
    assert pod["spec"]["serviceAccountName"] == "glann", "the role that reaches the bucket"
    assert found["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}, "two servers at a time are refused"
    assert pod["spec"]["terminationGracePeriodSeconds"] > END_TIMEOUT_S + 30, "it saves its database"
    service, policy = found["Service"], found["NetworkPolicy"]["spec"]
    assert service["spec"]["selector"] == pod["metadata"]["labels"] == policy["podSelector"]["matchLabels"]
    env = {each["name"]: each["value"] for each in spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]}
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert env["MLFLOW_TRACKING_URI"] == f"http://{name}:{port}"
    assert env[PAGE_VARIABLE] == f"http://127.0.0.1:{port}"
    hosts = container["command"][container["command"].index("--allowed-hosts") + 1].split(",")
    for host in (f"{name}:{port}", f"127.0.0.1:{port}"):
        assert any(fnmatch(host, allowed) for allowed in hosts), f"MLflow would refuse requests to {host}"


def test_the_command_of_mlflow_is_one_that_glann_understands(monkeypatch: pytest.MonkeyPatch):
    served: list[Any] = []
    monkeypatch.setattr("glann.tracking.server.serve", lambda server, say: served.append(server))
    command = documents("raycluster.yaml")["Deployment"]["spec"]["template"]["spec"]["containers"][0]["command"]
    with pytest.raises(SystemExit) as caught:
        cli.main([word.replace("BUCKET", "bucket") for word in command[1:]])
    assert not caught.value.code
    assert (served[0].store, served[0].host, served[0].port) == ("s3://bucket/mlflow", "0.0.0.0", 5000)


@pytest.mark.skipif(CRDS is None, reason="GLANN_KUBERAY_CRDS names no folder with KubeRay's CRDs")
@pytest.mark.parametrize(("file", "kind"), [("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob")])
def test_manifests_are_what_kuberay_takes(file: str, kind: str):
    import jsonschema

    path = next(Path(str(CRDS)).glob(f"ray.io_{kind.lower()}s.yaml"))
    versions = yaml.safe_load(path.read_text())["spec"]["versions"]
    schema = next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.Draft202012Validator(strict(schema)).validate(documents(file)[kind])


def strict(node: Any) -> Any:
    """The schema, refusing fields that it does not know: Kubernetes would drop them without a word."""
    if isinstance(node, dict):
        if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            node.setdefault("additionalProperties", False)
        if node.get("x-kubernetes-int-or-string"):
            node.pop("type", None)
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        strict(value)
    return node
