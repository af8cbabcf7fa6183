"""Every file under clusters/ is what the program that reads it expects."""

import copy
import json
import re
import subprocess
import sys
import typing
import warnings
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

CLUSTERS = Path(__file__).parents[2] / "clusters"
SCHEMA = json.loads((Path(__file__).parents[1] / "data" / "kuberay.schema.json").read_text())
MANIFESTS = ["raycluster.yaml", "rayjob.yaml", "rayservice.yaml"]
CLUSTER_FIELD = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / name).read_text())


def load_manifest(name: str) -> dict[str, Any]:
    return load(f"kuberay/{name}")


def at(tree: Any, path: str) -> Any:
    for step in path.split("/") if path else []:
        tree = tree[int(step) if step.isdigit() else step]
    return tree


def ray_cluster(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return spec[CLUSTER_FIELD[manifest["kind"]]] if manifest["kind"] in CLUSTER_FIELD else spec


def pod_templates(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = ray_cluster(manifest)
    return [group["template"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]


# --- local.py -------------------------------------------------------------------------------------


def test_local_cluster_explains_itself():
    asked = [sys.executable, str(CLUSTERS / "local.py"), "--help"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert all(word in answer for word in ("start", "stop", "env", "status"))


def test_stopping_a_cluster_that_is_not_there_is_no_error(tmp_path):
    asked = [sys.executable, str(CLUSTERS / "local.py"), "stop", "--dir", str(tmp_path)]
    assert "no cluster" in subprocess.run(asked, capture_output=True, text=True, check=True).stdout


# --- launcher.yaml --------------------------------------------------------------------------------


def validate_launcher(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))


def test_launcher_fits_rays_schema():
    validate_launcher(load("launcher.yaml"))


@pytest.mark.parametrize("parent", ["", "docker", "available_node_types/gpu"])
def test_launcher_with_a_typo_does_not(parent):
    config = load("launcher.yaml")
    at(config, parent)["max_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_launcher(config)


def test_launcher_installs_lepton_and_starts_every_node_with_the_token():
    config = load("launcher.yaml")
    assert config["file_mounts"]["/home/ray/lepton"] == "."
    assert any("pip install" in line and "lepton" in line for line in config["setup_commands"])
    assert set(config["available_node_types"]) == {"head", "cpu", "gpu"}
    for role in ("head", "worker"):
        start = config[f"{role}_start_ray_commands"][-1]
        assert re.search(r"RAY_AUTH_MODE=token .*ray start ", start), start
        assert "--dashboard-host=0.0.0.0" not in start


# --- kuberay/ -------------------------------------------------------------------------------------


def pod_problems(template: dict[str, Any]) -> list[str]:
    """What Kubernetes would refuse, or a person would regret, in a pod template of ours."""
    spec = template["spec"]
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    known = {"containers", "volumes", "securityContext", "tolerations"}
    problems = [f"pod: {key}" for key in set(spec) - known - {"terminationGracePeriodSeconds"}]
    for container in spec["containers"]:
        problems += container_problems(container, volumes)
    return problems


def container_problems(container: dict[str, Any], volumes: set[str]) -> list[str]:
    known = {"name", "image", "ports", "env", "resources", "volumeMounts"}
    probes = {key for key in container if key.endswith("Probe")}
    problems = [f"container: {key}" for key in set(container) - known - probes]
    problems += [f"missing: {key}" for key in known - {"ports"} - set(container)]
    if ":" not in container["image"] or container["image"].endswith(":latest"):
        problems.append(f"image without a version: {container['image']}")
    for mount in container["volumeMounts"]:
        if mount["name"] not in volumes or not mount["mountPath"].startswith("/"):
            problems.append(f"mount: {mount}")
    for variable in container["env"]:
        if set(variable) != {"name", "value"} or not isinstance(variable["value"], str):
            problems.append(f"env: {variable}")
    for port in container.get("ports", []):
        if set(port) != {"name", "containerPort"} or not isinstance(port["containerPort"], int):
            problems.append(f"port: {port}")
    if container["resources"]["limits"] != container["resources"]["requests"]:
        problems.append("Ray sizes itself by the limits: requests must be the same")
    for probe in probes:
        problems += probe_problems(probe, container[probe])
    return problems


def probe_problems(name: str, probe: dict[str, Any]) -> list[str]:
    timings = {"initialDelaySeconds", "periodSeconds", "timeoutSeconds", "failureThreshold"}
    problems = [f"{name}: {key}" for key in set(probe) ^ (timings | {"httpGet"})]
    if name not in {"livenessProbe", "readinessProbe", "startupProbe"}:
        problems.append(f"no such probe: {name}")
    if set(probe.get("httpGet", {})) != {"path", "port"}:
        problems.append(f"{name}: httpGet")
    return problems


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_fits_the_schema(name):
    jsonschema.validate(load_manifest(name), SCHEMA, jsonschema.Draft202012Validator)


TYPOS = [
    ("raycluster.yaml", "spec/workerGroupSpecs/0", "minReplicas", "minReplica"),
    ("rayjob.yaml", "spec/rayClusterSpec/workerGroupSpecs/1", "maxReplicas", "maxReplica"),
    ("rayservice.yaml", "spec/rayClusterConfig/workerGroupSpecs/0", "groupName", "group"),
    ("raycluster.yaml", "spec", "enableInTreeAutoscaling", "enableAutoscaling"),
    ("raycluster.yaml", "spec/authOptions", "mode", "modes"),
    ("raycluster.yaml", "spec/autoscalerOptions", "idleTimeoutSeconds", "idleTimeout"),
    ("rayjob.yaml", "spec", "entrypoint", "entryPoint"),
    ("rayjob.yaml", "spec", "rayClusterSpec", "rayClusterConfig"),
    ("rayservice.yaml", "spec", "serveConfigV2", "serveConfig"),
    ("rayservice.yaml", "spec/rayClusterConfig/headGroupSpec", "template", "templates"),
    ("rayjob.yaml", "", "metadata", "metaData"),
]


@pytest.mark.parametrize(("name", "parent", "right", "wrong"), TYPOS)
def test_manifest_with_a_typo_does_not(name, parent, right, wrong):
    manifest = copy.deepcopy(load_manifest(name))
    place = at(manifest, parent)
    place[wrong] = place.pop(right)
    with pytest.raises(jsonschema.ValidationError, match=f"{wrong}|{right}"):
        jsonschema.validate(manifest, SCHEMA, jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec/workerGroupSpecs/0/minReplicas", "1"),
        ("spec/autoscalerOptions/version", "v3"),
        ("spec/authOptions/mode", "tokens"),
        ("spec/headGroupSpec/rayStartParams/num-cpus", 0),
        ("apiVersion", "ray.io/v1alpha1"),
    ],
)
def test_manifest_with_a_wrong_value_does_not(path, value):
    manifest = copy.deepcopy(load_manifest("raycluster.yaml"))
    parent, _, key = path.rpartition("/")
    at(manifest, parent)[key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_are_sound(name):
    for template in pod_templates(load_manifest(name)):
        assert pod_problems(template) == []


def test_an_unsound_pod_is_noticed():
    template = copy.deepcopy(pod_templates(load_manifest("raycluster.yaml"))[0])
    container = template["spec"]["containers"][0]
    container["livenessProb"] = container.pop("livenessProbe")
    container["volumeMounts"] = [{"name": "elsewhere", "mountPath": "/mnt/lepton"}]
    container["env"] = [{"name": "PORT", "value": 1}]
    assert len(pod_problems(template)) == 3


@pytest.mark.parametrize("name", MANIFESTS)
def test_cluster_is_authenticated_elastic_traced_and_keeps_its_home(name):
    cluster = ray_cluster(load_manifest(name))
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    claim = load_manifest("storage.yaml")["metadata"]["name"]
    for template in pod_templates(load_manifest(name)):
        (container,) = template["spec"]["containers"]
        names = {variable["name"]: variable["value"] for variable in container["env"]}
        assert names["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://otel-collector:4318"
        assert names["LEPTON_HOME"] == container["volumeMounts"][0]["mountPath"]
        assert template["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": claim}
    gpus = [
        template["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        for template in pod_templates(load_manifest(name))
    ]
    assert gpus == [None, None, "1"]


def test_images_and_versions_agree():
    clusters = [ray_cluster(load_manifest(name)) for name in MANIFESTS]
    assert {cluster["rayVersion"] for cluster in clusters} == {"2.60.0"}
    assert ":2.60.0-" in load("launcher.yaml")["docker"]["image"]


def test_job_runs_the_quickstart():
    spec = load_manifest("rayjob.yaml")["spec"]
    assert spec["entrypoint"].endswith("/notebooks/quickstart.py")
    assert set(yaml.safe_load(spec["runtimeEnvYAML"])) == {"env_vars"}


# --- serveConfigV2 --------------------------------------------------------------------------------


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def unknown_keys(model: type[BaseModel], value: dict[str, Any], path: str = "") -> list[str]:
    """Keys that no field of Serve's models has: the models themselves let them pass."""
    unknown = [f"{path}{key}" for key in value if key not in model.model_fields]
    for key in value.keys() & model.model_fields.keys():
        nested = models_in(model.model_fields[key].annotation)
        for part in value[key] if isinstance(value[key], list) else [value[key]]:
            if nested and isinstance(part, dict):
                unknown += unknown_keys(nested[0], part, f"{path}{key}.")
    return unknown


def serve_config() -> dict[str, Any]:
    return yaml.safe_load(load_manifest("rayservice.yaml")["spec"]["serveConfigV2"])


def serve_schema() -> type[BaseModel]:
    with warnings.catch_warnings():
        # Ray 2.60 declares its models in a way that pydantic deprecates.
        warnings.simplefilter("ignore", DeprecationWarning)
        from ray.serve.schema import ServeDeploySchema
    return ServeDeploySchema


def test_serve_config_fits_serves_schema():
    schema = serve_schema()
    config = serve_config()
    parsed = schema.model_validate(config)
    assert unknown_keys(schema, config) == []
    (application,) = parsed.applications
    assert application.import_path == "lepton.serving.app:build"
    assert application.args == {"model": "digits", "home": "/mnt/lepton"}


def test_serve_config_with_a_typo_is_noticed():
    schema = serve_schema()
    config = serve_config()
    config["applications"][0]["deployments"] = [{"name": "Replica", "num_replica": 3}]
    config["http_options"]["ports"] = 8000
    schema.model_validate(config)  # lets both pass
    found = unknown_keys(schema, config)
    assert sorted(found) == ["applications.deployments.num_replica", "http_options.ports"]


# --- otel-collector.yaml and prometheus.yaml ------------------------------------------------------


KEYS = {
    "receivers/otlp": {"protocols"},
    "processors/memory_limiter": {"check_interval", "limit_mib", "spike_limit_mib"},
    "processors/batch": {"timeout", "send_batch_size", "send_batch_max_size"},
    "exporters/debug": {"verbosity", "sampling_initial", "sampling_thereafter"},
    "exporters/file": {"path", "rotation", "format", "append", "compression", "flush_interval"},
    "exporters/otlphttp": {"endpoint", "headers", "tls", "compression", "timeout"},
    "exporters/prometheus": {"endpoint", "enable_open_metrics", "metric_expiration", "namespace"},
}
"""Of what the collector's components may be told, by their documentation."""


def collector_problems(config: dict[str, Any]) -> list[str]:
    kinds = ("receivers", "processors", "exporters")
    problems = [f"unknown: {key}" for key in set(config) - {*kinds, "service"}]
    used: set[tuple[str, str]] = set()
    for name, pipeline in config["service"]["pipelines"].items():
        if name.partition("/")[0] not in {"traces", "metrics", "logs"}:
            problems.append(f"no such signal: {name}")
        problems += [f"{name}: {key}" for key in set(pipeline) ^ set(kinds)]
        used |= {(kind, part) for kind in kinds for part in pipeline.get(kind, [])}
    defined = {(kind, part) for kind in kinds for part in config[kind]}
    for kind, part in sorted(defined):
        known = KEYS.get(f"{kind}/{part.partition('/')[0]}", set[str]())
        problems += [f"{part}: {key}" for key in set(config[kind][part]) - known]
    return problems + [f"not both defined and used: {part}" for part in sorted(defined ^ used)]


def test_collector_pipelines_name_what_is_defined():
    config = load("otel-collector.yaml")
    assert collector_problems(config) == []
    assert set(config["receivers"]["otlp"]["protocols"]) == {"http", "grpc"}
    known = {"debug", "file", "otlphttp", "prometheus"}
    assert {name.partition("/")[0] for name in config["exporters"]} == known


def test_collector_with_a_typo_is_noticed():
    config = load("otel-collector.yaml")
    config["service"]["pipelines"]["traces"]["exporters"].append("otlphtp/backend")
    config["service"]["pipelines"]["metrics"]["exporter"] = []
    config["exporters"]["prometheus"]["enable_openmetrics"] = True
    assert len(collector_problems(config)) == 3


def test_exemplars_and_instances_come_through_the_collector():
    assert load("otel-collector.yaml")["exporters"]["prometheus"]["enable_open_metrics"] is True
    assert load("prometheus.yaml")["scrape_configs"][1]["honor_labels"] is True


def scrape_problems(config: dict[str, Any]) -> list[str]:
    known = {"global", "rule_files", "scrape_configs"}
    problems = [f"unknown: {key}" for key in set(config) - known]
    for value in config["global"].values():
        if not re.fullmatch(r"[0-9]+(ms|s|m|h)", value):
            problems.append(f"not a duration: {value}")
    names = [job.get("job_name") for job in config["scrape_configs"]]
    if None in names or len(set(names)) < len(names):
        problems.append(f"job names: {names}")
    for job in config["scrape_configs"]:
        discovery = {"file_sd_configs": "files", "static_configs": "targets"}
        problems += [f"unknown: {key}" for key in set(job) - {*discovery, *_OF_A_JOB}]
        for kind, wanted in discovery.items():
            problems += [f"{kind}: no {wanted}" for part in job.get(kind, []) if wanted not in part]
    return problems


_OF_A_JOB = {"job_name", "honor_labels"}


def test_prometheus_scrapes_rays_discovery_file():
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    config = load("prometheus.yaml")
    assert scrape_problems(config) == []
    (files,) = config["scrape_configs"][0]["file_sd_configs"]
    assert files["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
    metrics = load("otel-collector.yaml")["exporters"]["prometheus"]["endpoint"]
    assert config["scrape_configs"][1]["static_configs"] == [{"targets": [metrics]}]


def test_prometheus_with_a_typo_is_noticed():
    config = load("prometheus.yaml")
    config["scrape_configs"][0]["file_sd_config"] = []
    config["global"]["scrape_interval"] = "10"
    assert len(scrape_problems(config)) == 2
