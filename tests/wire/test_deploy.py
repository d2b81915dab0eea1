"""The deployment examples are valid: our programs accept their commands, and the metrics exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

import broker.config
import client.__main__
import client.gateway.config
import worker.config
from client.gateway.metrics import Metrics
from tests.core.broker_facts import Bus as CoreBus
from tests.harness import PATIENCE_S, ROOT

DEPLOY = ROOT / "broker" / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
EXECUTABLE = "/opt/tokenbus/bin/python"


def check(words: list[str]) -> Any:
    """Let a program of ours parse this command line; fails if the program refuses it."""
    program, *arguments = words
    match program:
        case "broker":
            return broker.config.read(arguments, {}, program="broker")
        case "worker":
            return worker.config.parse(arguments, {})
        case "client.gateway":
            return client.gateway.config.parse_args(arguments, {})
        case "client":
            return client.__main__._parser().parse_args(arguments)
    raise AssertionError(f"{program} is not one of our programs")


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def deployments() -> Iterator[tuple[str, dict[str, Any]]]:
    for document in documents("kubernetes.yaml"):
        if document["kind"] == "Deployment":
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]


def seconds(text: str | int) -> float:
    return float(str(text).rstrip("s"))


# --- containers -----------------------------------------------------------------------------------


def test_the_container_file_copies_what_exists_and_installs_extras_that_exist() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for names in re.findall(r"\[([a-z,]+)\]'", text):
        assert set(names.split(",")) <= set(extras)
    assert re.findall(r" AS (\w+)", text) == ["bus", "worker"]


def test_the_compose_file_starts_one_broker_two_workers_and_a_gateway() -> None:
    [compose] = documents("compose.yaml")
    services = compose["services"]
    commands = {name: check(service["command"]) for name, service in services.items()}
    assert [name for name, _ in sorted(commands.items())] == [
        "broker",
        "gateway",
        "worker-1",
        "worker-2",
    ]
    for name, service in services.items():
        assert service["build"]["target"] in ("bus", "worker")
        assert (DEPLOY / service["build"]["context"]).resolve() == ROOT, name
    for name in ("worker-1", "worker-2"):
        assert seconds(services[name]["stop_grace_period"]) > commands[name].drain_s
    assert seconds(services["broker"]["stop_grace_period"]) > commands["broker"].shutdown_grace_s
    # Only this machine can reach the bus.
    assert "ports" not in services["broker"] and compose["networks"]["bus"]["internal"]
    assert all(port.startswith("127.0.0.1:") for port in services["gateway"]["ports"])
    health = services["broker"]["healthcheck"]["test"]
    assert health[:3] == ["CMD", "python", "-m"] and check(health[3:])


def test_the_kubernetes_manifest_drains_before_it_kills() -> None:
    found = dict(deployments())
    assert set(found) == {"tokenbus-broker", "tokenbus-worker", "tokenbus-gateway"}
    commands = {name: check(pod["containers"][0]["args"]) for name, pod in found.items()}
    grace = {name: pod["terminationGracePeriodSeconds"] for name, pod in found.items()}
    assert grace["tokenbus-worker"] > commands["tokenbus-worker"].drain_s
    assert grace["tokenbus-broker"] > commands["tokenbus-broker"].shutdown_grace_s
    assert grace["tokenbus-gateway"] > commands["tokenbus-gateway"].shutdown_s
    for pod in found.values():
        assert pod["securityContext"]["runAsNonRoot"]


def test_the_kubernetes_probes_use_paths_that_our_programs_answer() -> None:
    found = dict(deployments())
    [broker_container] = found["tokenbus-broker"]["containers"]
    for probe in ("readinessProbe", "livenessProbe"):
        words = broker_container[probe]["exec"]["command"]
        assert words[:2] == ["python", "-m"] and check(words[2:])
    [gateway] = found["tokenbus-gateway"]["containers"]
    assert gateway["livenessProbe"]["httpGet"]["path"] == "/health"
    assert gateway["readinessProbe"]["httpGet"]["path"] == "/ready"


def test_the_kubernetes_services_lead_to_ports_and_pods_that_exist() -> None:
    labels = {
        document["spec"]["selector"]["app"]: document["spec"]["ports"]
        for document in documents("kubernetes.yaml")
        if document["kind"] == "Service"
    }
    pods = dict(deployments())
    for app, ports in labels.items():
        [container] = pods[app]["containers"]
        named = {port["name"]: port["containerPort"] for port in container["ports"]}
        for port in ports:
            assert port.get("targetPort", port["port"]) in (*named, *named.values())
    # Gateways find each other by one name, which resolves to all of them.
    [container] = pods["tokenbus-gateway"]["containers"]
    [peers] = check(container["args"]).peers
    services = {
        document["metadata"]["name"]: document["spec"]
        for document in documents("kubernetes.yaml")
        if document["kind"] == "Service"
    }
    named = services[urlsplit(peers).hostname]
    assert named["clusterIP"] == "None" and named["selector"] == {"app": "tokenbus-gateway"}
    mounted = {
        mount["name"]
        for pod in pods.values()
        for c in pod["containers"]
        for mount in c["volumeMounts"]
    }
    declared = {volume["name"] for pod in pods.values() for volume in pod["volumes"]}
    assert mounted <= declared


# --- systemd --------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_our_program_accepts_a_units_command(unit: Path) -> None:
    text = unit.read_text()
    [command] = re.findall(r"^ExecStart=(.+)$", text, re.MULTILINE)
    words = command.split()
    assert words[:2] == [EXECUTABLE, "-m"]
    read = check(words[2:])
    [stop_s] = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    limits = [getattr(read, name, 0) for name in ("drain_s", "shutdown_grace_s", "shutdown_s")]
    assert float(stop_s) > max(limits)


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_accepts_a_unit(unit: Path, tmp_path: Path) -> None:
    name = unit.name.replace("@.", "@0.")
    copy = tmp_path / name
    text = unit.read_text().replace(EXECUTABLE, sys.executable)
    copy.write_text(text.replace("User=tokenbus", "User=root"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    ours = [line for line in done.stderr.splitlines() if name in line]
    assert not ours, done.stderr


# --- metrics --------------------------------------------------------------------------------------


def existing_metrics() -> set[str]:
    """The names of all metrics of the bus and of a gateway."""
    bus = CoreBus()
    worker_peer, client_peer = bus.worker("w"), bus.client()
    names = "ttft_ms tokens_per_s batch kv_used_tokens kv_total_tokens memory_used_bytes"
    worker_peer.beat(metrics=dict.fromkeys(names.split(), 1.0))
    client_peer.request()
    (assign,) = worker_peer.assigned()
    worker_peer.finish(assign, tokens=2)
    text = client_peer.query("bus.metrics")["text"] + Metrics().text().decode()
    names = set(re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE))
    return names | {f"{name}_bucket" for name in names}


def test_the_dashboard_shows_only_existing_metrics() -> None:
    board = json.loads((DEPLOY / "grafana.json").read_text())
    shown = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"tokenbus_\w+", target["expr"])
    }
    assert len(shown) > 20
    assert shown <= existing_metrics(), shown - existing_metrics()
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in board["panels"]]
    assert all(x + w <= 24 for x, _, w, _ in places) and len(set(places)) == len(places)


def test_the_alerts_use_only_existing_metrics() -> None:
    [rules] = documents("alerts.yaml")
    alerts = [rule for group in rules["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in alerts}) == len(alerts) >= 8
    for rule in alerts:
        names = set(re.findall(r"tokenbus_\w+", rule["expr"]))
        assert names and names <= existing_metrics(), rule["alert"]
        assert rule["annotations"]["summary"] and rule["labels"]["severity"] in ("page", "ticket")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_accepts_the_rules() -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", str(DEPLOY / "alerts.yaml")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _has_compose() -> bool:
    docker = shutil.which("docker")
    return (
        docker is not None
        and not subprocess.run([docker, "compose", "version"], capture_output=True).returncode
    )


@pytest.mark.skipif(not _has_compose(), reason="`docker compose` is not installed")
@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]])
def test_compose_accepts_the_files(files: list[str]) -> None:
    named = [word for file in files for word in ("-f", str(DEPLOY / file))]
    done = subprocess.run(["docker", "compose", *named, "config"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # Our programs still accept the commands of the merged file.
    merged = yaml.safe_load(done.stdout)["services"]
    for service in merged.values():
        check(service["command"])


def test_every_image_has_the_tag_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = [
        image
        for name in ("compose.yaml", "kubernetes.yaml", "Containerfile")
        for image in re.findall(r"(?:image: |-t )(tokenbus\S*)", (DEPLOY / name).read_text())
    ]
    assert len(images) >= 8
    assert {image.partition(":")[2] for image in images} == {version}


def test_the_gateway_is_scraped_only_for_its_own_metrics() -> None:
    [prometheus] = documents("prometheus.yaml")
    jobs = prometheus["scrape_configs"]
    assert [job.get("params", {}).get("scope") for job in jobs] == [None, ["gateway"]]


def test_the_commands_in_the_guide_for_fastchat_users_are_valid() -> None:
    text = (ROOT / "client" / "gateway" / "FROM_FASTCHAT.md").read_text()
    commands = re.findall(r"`python -m ((?:broker|worker|client)[^`]*)`", text)
    whole = [line.split() for line in commands if " keys " not in line and "--" in line]
    assert len(whole) >= 2
    for words in whole:
        if "--help" not in words and "vllm" not in words:
            check(words)
