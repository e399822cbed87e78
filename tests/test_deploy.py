"""The files of examples/deploy say what the server understands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parent.parent / "examples" / "deploy"


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def test_the_manifest_serves_what_the_serve_config_does() -> None:
    config, manifest = read("serve.yaml"), read("kuberay.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    served = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    assert served == {key: value for key, value in config.items() if key != "http_options"}
    cluster = manifest["spec"]["rayClusterConfig"]
    (worker,) = cluster["workerGroupSpecs"]
    (deployment,) = served["applications"][0]["deployments"]
    assert worker["maxReplicas"] >= deployment["autoscaling_config"]["max_replicas"]
    for template in (cluster["headGroupSpec"]["template"], worker["template"]):
        (container,) = template["spec"]["containers"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in template["spec"]["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
    arguments, limits = served["applications"][0]["args"], container["resources"]["limits"]
    assert int(limits["cpu"]) >= arguments["cpus"] and int(limits["nvidia.com/gpu"]) == arguments["gpus"]
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    paths = [arguments[key] for key in ("policy", "base", "embedder", "api_keys", "history")]
    assert all(any(path.startswith(mount) for mount in mounted) for path in paths)


def test_ray_and_the_server_understand_the_fields() -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ray.serve.schema import ServeDeploySchema

    from fssa_fast.serving.ray import Arguments, Held, app

    config = ServeDeploySchema(**read("serve.yaml"))
    (one,) = config.applications
    assert one.import_path == f"{app.__module__}:{app.__name__}"
    arguments, (deployment,) = Arguments(**one.args), one.deployments
    held = Held(**deployment.user_config)
    assert next(iter(held.versions.values())).policy == arguments.policy and len(held.versions) == 2
    assert arguments.api_keys and config.http_options.host == "0.0.0.0"  # which without keys it must not be
    assert deployment.autoscaling_config["target_ongoing_requests"] <= arguments.rows
    assert app(one.args) is not None


def test_the_container_installs_extras_that_there_are() -> None:
    text = (FOLDER / "Containerfile").read_text()
    extras = re.search(r"whl\)\[([a-z,]+)\]", text)
    assert extras is not None
    project = (FOLDER.parents[1] / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in extras[1].split(","))
    assert "USER ray" in text and len(re.findall("^FROM ", text, re.M)) == 2
