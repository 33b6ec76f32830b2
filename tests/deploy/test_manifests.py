"""What `deploy/` holds parses, has the form that its readers ask for, and speaks of flags, ports, paths and secrets
that there are."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from manta.cluster.cli.flags import parse_serve_config
from manta.configs.memory_plan import plan_memory
from manta.configs.public_models import public_id, public_spec
from manta.configs.schema import ServeConfig
from tests.support.manifest_schemas import schema_of
from tests.support.server import ROOT

DEPLOY = ROOT / "deploy"
FILES = sorted((*DEPLOY.glob("kub*/*.yaml"), *DEPLOY.glob("monitoring/*.yaml")))
IMAGE_FOLDER = "/opt/manta"  # the WORKDIR of the Dockerfile
Manifest = dict[str, Any]


def _manifests(file: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def _pods(value: Any) -> list[Manifest]:
    """Every pod template inside."""
    if isinstance(value, list):
        return [pod for each in value for pod in _pods(each)]
    if not isinstance(value, dict):
        return []
    found = [value] if "containers" in value.get("spec", {}) else []
    return found + [pod for each in value.values() for pod in _pods(each)]


def _all_pods() -> list[Manifest]:
    return [pod for file in FILES for pod in _pods(_manifests(file))]


def _commands() -> dict[str, list[str]]:
    """The words of `manta serve` by where they stand."""
    found = {}
    for file in FILES:
        for manifest in _manifests(file):
            if manifest["kind"] == "RayJob":
                words = shlex.split(manifest["spec"]["entrypoint"])
                assert words[0] == "manta"
                found[file.name] = words[1:]
            elif manifest["kind"] == "Deployment":
                found[file.name] = manifest["spec"]["template"]["spec"]["containers"][0]["args"]
        for words in re.findall(r"^# +manta (serve .*)$", file.read_text(encoding="utf-8"), re.MULTILINE):
            found[f"a comment of {file.name}"] = shlex.split(words)
    return found


def _config(words: list[str]) -> ServeConfig:
    """As the command would read it in the image."""
    assert words[0] == "serve"
    return parse_serve_config([word.replace(IMAGE_FOLDER, str(ROOT)) for word in words[1:]])


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_form(file: Path) -> None:
    manifests = _manifests(file)
    assert manifests
    for manifest in manifests:
        jsonschema.validate(manifest, schema_of(manifest))


def test_a_mistake_is_found() -> None:
    """The schemas refuse what is misspelt, and numbers where Ray wants strings."""
    for path, value in ((("spec", "replica"), 2), (("spec", "workerGroupSpecs", 0, "rayStartParams"), {"num-gpus": 8})):
        manifest = _manifests(DEPLOY / "kuberay" / "raycluster.yaml")[0]
        place: Any = manifest
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(manifest, schema_of(manifest))


def test_the_file_of_ray_up_is_what_ray_takes() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    config = yaml.safe_load((DEPLOY / "ray" / "cluster.yaml").read_text(encoding="utf-8"))
    util.validate_config(util.prepare_config(config))
    head = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host 127.0.0.1" in head
    for commands in (head, " ".join(config["worker_start_ray_commands"])):
        assert "RAY_AUTH_MODE=token" in commands


def test_commands_are_there() -> None:
    assert set(_commands()) == {"manta.yaml", "rayjob.yaml", "a comment of raycluster.yaml"}


@pytest.mark.parametrize(("place", "words"), _commands().items(), ids=_commands())
def test_flags_exist_and_the_deployment_fits(place: str, words: list[str]) -> None:
    config = _config(words)
    known = public_id(config.model)
    assert known is not None
    assert plan_memory(config, public_spec(known), 80 * 2**30).fits
    if "comment" not in place:
        assert config.api_key_file is not None
        assert config.api_key_file.startswith("/etc/manta/keys/")


def _gpus(manifest: Manifest) -> int:
    limits = [c["resources"]["limits"] for pod in _pods(manifest) for c in pod["spec"]["containers"]]
    return sum(int(each.get("nvidia.com/gpu", 0)) for each in limits)


def test_there_are_as_many_gpus_as_workers() -> None:
    config = _config(_commands()["manta.yaml"])
    assert config.distributed_executor_backend == "local"
    assert _gpus(_manifests(DEPLOY / "kubernetes" / "manta.yaml")[0]) == config.num_ranks
    for file, command in (("rayjob", "rayjob.yaml"), ("raycluster", "a comment of raycluster.yaml")):
        config, manifest = _config(_commands()[command]), _manifests(DEPLOY / "kuberay" / f"{file}.yaml")[0]
        cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
        assert not _gpus(cluster["headGroupSpec"])
        (group,) = cluster["workerGroupSpecs"]
        assert _gpus(group) * group["maxReplicas"] == config.num_ranks * config.max_num_replicas
        assert _gpus(group) * group["replicas"] >= config.num_ranks * config.num_replicas_at_start
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_ray_is_the_one_that_is_installed_and_asks_for_a_token() -> None:
    (version,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    for file in ("rayjob", "raycluster"):
        spec = _manifests(DEPLOY / "kuberay" / f"{file}.yaml")[0]["spec"]
        cluster = spec.get("rayClusterSpec", spec)
        assert cluster["rayVersion"] == version
        assert cluster["authOptions"]["mode"] == "token"


def test_secrets_and_claims_are_made_somewhere() -> None:
    text = "".join(json.dumps(_manifests(file)) for file in FILES)
    claims = {m["metadata"]["name"] for f in FILES for m in _manifests(f) if m["kind"] == "PersistentVolumeClaim"}
    assert set(re.findall(r'"claimName": "([^"]+)"', text)) <= claims
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    made = set(re.findall(r"kubectl create secret generic (\S+)", page))
    named = set(re.findall(r'"secretName": "([^"]+)"', text))
    named |= set(re.findall(r'"(?:secretKeyRef|credentials)": {"name": "([^"]+)"', text))
    assert named <= made
    assert "manta-keys" in named


def test_ports_and_volumes_are_those_of_the_pods() -> None:
    defaults = {
        name: ServeConfig.model_fields[field].default for name, field in (("http", "port"), ("grpc", "grpc_port"))
    }
    for pod in _all_pods():
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        for container in pod["spec"]["containers"]:
            ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
            if "http" in ports:
                assert {name: ports[name] for name in defaults} == defaults
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                if probe in container:
                    assert container[probe]["httpGet"]["port"] in ports


def test_selectors_select_pods_and_services() -> None:
    labels = [pod["metadata"]["labels"] for pod in _all_pods()]
    services = [m for file in FILES for m in _manifests(file) if m["kind"] == "Service"]
    for file in FILES:
        for manifest in _manifests(file):
            spec, kind = manifest["spec"], manifest["kind"]
            wanted = spec.get("selector", spec.get("podSelector"))
            if wanted is None:
                continue
            wanted = wanted.get("matchLabels", wanted)
            found = [s["metadata"]["labels"] for s in services] if kind == "ServiceMonitor" else labels
            assert any(wanted.items() <= each.items() for each in found), f"{file.name}: {kind} selects nothing"
            if kind == "ServiceMonitor":
                ports = {port["name"] for service in services for port in service["spec"]["ports"]}
                assert {endpoint["port"] for endpoint in spec["endpoints"]} <= ports


def test_the_image_holds_what_the_package_is_built_from() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert f"WORKDIR {IMAGE_FOLDER}" in text
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()}
    for name in copied:
        assert (ROOT / name).exists(), name
    folders = {folder.name for folder in ROOT.iterdir() if folder.is_dir() and any(folder.glob("*.py"))}
    assert folders - {"bench", "tests", "build"} | {"cluster", "protos"} <= copied
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= copied


def test_panels_of_the_dashboard_stand_side_by_side() -> None:
    dashboard = json.loads((DEPLOY / "monitoring" / "dashboard.json").read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells
        assert panel["type"] == "row" or panel["targets"]
