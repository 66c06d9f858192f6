"""What operators are given to deploy (kernels, YAML, images) holds what Ray, KubeRay, Serve and our commands take."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import socket
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from lltm_ray.cli import app
from lltm_ray.config import FleetConfig, build
from lltm_ray.serve.builder import _nested

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
POD = {"metadata", "spec"}
GROUP = {"rayStartParams", "template", "resources", "labels"}
KUBERAY = {
    "RayCluster": {
        *(
            "suspend",
            "managedBy",
            "autoscalerOptions",
            "headServiceAnnotations",
            "enableInTreeAutoscaling",
            "rayVersion",
        ),
        *("gcsFaultToleranceOptions", "headGroupSpec", "workerGroupSpecs", "authOptions", "upgradeStrategy"),
    },
    "RayService": {
        *("serviceUnhealthySecondThreshold", "deploymentUnhealthySecondThreshold", "serveService", "upgradeStrategy"),
        *("serveConfigV2", "rayClusterConfig", "excludeHeadPodFromServeSvc", "rayClusterDeletionDelaySeconds"),
    },
    "headGroupSpec": GROUP | {"headService", "enableIngress", "serviceType"},
    "workerGroupSpec": GROUP
    | {"suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "scaleStrategy"}
    | {"numOfHosts"},
}
"""Fields of ray.io/v1 as KubeRay's API reference lists them."""


@pytest.fixture(scope="module")
def join() -> dict[str, Any]:
    return runpy.run_path(str(CLUSTER / "kaggle/join.py"))


@pytest.fixture(scope="module")
def kernel() -> dict[str, Any]:
    return runpy.run_path(str(CLUSTER / "kaggle/kernel.py"))


# --- Kaggle


def test_the_kernels_metadata_names_a_file_that_is_there() -> None:
    metadata = json.loads((CLUSTER / "kaggle/kernel-metadata.json").read_text(encoding="utf-8"))
    assert (CLUSTER / "kaggle" / metadata["code_file"]).is_file()
    assert metadata["kernel_type"] == "script"
    assert metadata["title"].lower() == metadata["id"].partition("/")[2]


def test_the_kernel_installs_from_attached_wheels_without_the_network(kernel: dict[str, Any], tmp_path: Path) -> None:
    assert "--no-index" not in kernel["pip_arguments"](tmp_path)
    wheels = tmp_path / "kaggle/input/datasets/me/lltm-ray-wheels"
    wheels.mkdir(parents=True)
    (wheels / "lltm_ray-0.1.0-py3-none-any.whl").touch()
    assert kernel["pip_arguments"](tmp_path)[2:5] == ["--no-index", "--find-links", str(wheels)]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert kernel["PACKAGE"].partition("[")[2].removesuffix("]") in extras


def test_the_kernel_makes_an_attached_server_executable(kernel: dict[str, Any], tmp_path: Path) -> None:
    assert kernel["unpack_server"](tmp_path) is None
    attached = tmp_path / "kaggle/input/llama-cuda/bin"
    attached.mkdir(parents=True)
    (attached / "llama-server").write_text("#!/bin/sh\necho served\n", encoding="utf-8")
    (attached / "libggml-cuda.so").touch()
    server = kernel["unpack_server"](tmp_path)
    assert subprocess.check_output([server], text=True) == "served\n"
    assert server.with_name("libggml-cuda.so").exists()


def test_join_gives_ray_options_that_it_has_and_ports_that_do_not_collide(join: dict[str, Any]) -> None:
    known = {name for option in scripts.start.params for name in option.opts}
    for head in (None, "10.0.0.1:6379"):
        words = join["ray_arguments"]("10.0.0.2", head)
        assert {word for word in words if word.startswith("--")} <= known
    single = [port for name, port in join["PORTS"].items() if "worker" not in name]
    workers = range(join["PORTS"]["--min-worker-port"], join["PORTS"]["--max-worker-port"] + 1)
    taken = [join["PORT"], *single, *workers]
    assert len(set(taken)) == len(taken)
    readme = (CLUSTER / "kaggle/README.md").read_text(encoding="utf-8")
    assert f"{min(single)} to {max(single)}, {workers[0]} to {workers[-1]}" in readme


def test_join_refuses_an_address_that_is_not_its_own_and_a_head_that_is_not_there(join: dict[str, Any]) -> None:
    join["check_own"](join["own_address"]("127.0.0.1"))
    with pytest.raises(SystemExit, match="not even by itself"):
        join["check_own"]("192.0.2.1")
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        join["check_head"](address)
    with pytest.raises(SystemExit, match="no head answers"):
        join["check_head"](address)


def test_join_does_not_start_a_cluster_without_a_token(join: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(join["TOKEN"], raising=False)
    with pytest.raises(SystemExit, match="RAY_AUTH_TOKEN"):
        join["main"](["--own-ip", "127.0.0.1"])


# --- ray up


def test_ray_up_takes_the_on_premise_cluster() -> None:
    config = yaml.safe_load((CLUSTER / "on-prem/cluster.yaml").read_text(encoding="utf-8"))
    filled = prepare_config(dict(config))
    validate_config(filled)
    assert filled["max_workers"] == len(config["provider"]["worker_ips"])
    known = {name for option in scripts.start.params for name in option.opts}
    for line in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert "RAY_AUTH_MODE=token" in line
        assert set(re.findall(r"(--[a-z-]+)=", line)) <= known


# --- KubeRay


def read_custom(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The resource, and the specification of its Ray cluster."""
    found = yaml.safe_load((CLUSTER / "kuberay" / name).read_text(encoding="utf-8"))
    assert found["apiVersion"] == "ray.io/v1"
    assert set(found["spec"]) <= KUBERAY[found["kind"]]
    return found, found["spec"].get("rayClusterConfig", found["spec"])


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayservice.yaml"])
def test_kuberay_resources_have_only_fields_that_there_are(name: str) -> None:
    _, cluster = read_custom(name)
    assert set(cluster) <= KUBERAY["RayCluster"]
    assert cluster["authOptions"] == {"mode": "token"}, "who reaches Ray's port runs code"
    groups = [(cluster["headGroupSpec"], "headGroupSpec")]
    groups += [(group, "workerGroupSpec") for group in cluster["workerGroupSpecs"]]
    for group, kind in groups:
        assert set(group) <= KUBERAY[kind]
        assert {"rayStartParams", "template"} <= set(group), "KubeRay requires them"
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert set(group["template"]) <= POD
        mounted = {
            mount["name"] for each in group["template"]["spec"]["containers"] for mount in each.get("volumeMounts", [])
        }
        assert mounted == {volume["name"] for volume in group["template"]["spec"].get("volumes", [])}
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert re.search(rf"^ray(\[\w+\])?=={re.escape(cluster['rayVersion'])}\b", lock, re.MULTILINE)


def test_serve_takes_the_services_application_and_we_its_arguments() -> None:
    found, cluster = read_custom("rayservice.yaml")
    served = ServeDeploySchema.model_validate(yaml.safe_load(found["spec"]["serveConfigV2"]))
    (application,) = served.applications
    assert application.import_path == "lltm_ray.serve:app"
    fleet: FleetConfig = build(FleetConfig, _nested(application.args))
    workers = sum(group["replicas"] for group in cluster["workerGroupSpecs"])
    assert fleet.engines * (fleet.gpu_share or 0) == workers, "an engine a GPU"


# --- images


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_images_are_made_of_files_extras_and_commands_that_there_are(name: str) -> None:
    text = (CLUSTER / "docker" / name).read_text(encoding="utf-8").replace("\\\n", " ")
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extra,) = re.findall(r"'\.\[(\w+)\]'", text)
    assert extra in project["optional-dependencies"]
    commands = [json.loads(words) for words in re.findall(r"^CMD (\[.+\])$", text, re.MULTILINE)]
    commands += [shlex.split(words) for words in re.findall(r"^RUN (lltm-ray .+)$", text, re.MULTILINE)]
    assert commands
    for program, *words in commands:
        assert program == "lltm-ray"
        names = words[: next(at for at, word in enumerate(words) if word.startswith("-"))]
        shown = CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": "200"}).output
        assert all(word in shown for word in words if word.startswith("--")), words
