"""Kubernetes: manifests against the published schemas, rules that a broken manifest breaks, and the probe against a coordinator."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from parley_coordinator import config

FOLDER = Path(__file__).resolve().parents[3] / "deploy" / "kubernetes"
BASE = FOLDER / "base"
OVERLAYS = sorted(path.name for path in (FOLDER / "overlays").iterdir())
VERSIONS = ("1.29", "1.32")
"""The oldest and newest of Kubernetes that the manifests are checked against."""
PAGES = {"hugepages-2Mi": 2, "hugepages-1Gi": 1024}
ENCLAVES = "aws.ec2.nitro/nitro_enclaves"

Manifest = dict[str, Any]


def read(text: str) -> list[Manifest]:
    return [each for each in YAML(typ="safe").load_all(StringIO(text)) if each is not None]


def base() -> list[Manifest]:
    """The base's manifests, as files, with the configuration that kustomize makes a ConfigMap of."""
    kustomization = read((BASE / "kustomization.yaml").read_text("utf-8"))[0]
    found = [each for name in kustomization["resources"] for each in read((BASE / name).read_text("utf-8"))]
    for made in kustomization["configMapGenerator"]:
        data = {name: (BASE / name).read_text("utf-8") for name in made["files"]}
        metadata = {"name": made["name"]}
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    return found


def rendered(folder: Path) -> list[Manifest]:
    """What kustomize makes of a folder; skips where it is not installed."""
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("KUBECTL IS NOT ON THIS MACHINE: overlays are not rendered")
    done = subprocess.run([program, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return read(done.stdout)


def one(manifests: list[Manifest], kind: str, name: str = "coordinator") -> Manifest:
    [found] = [each for each in manifests if each["kind"] == kind and each["metadata"]["name"] in (name, "parley")]
    return found


def configured(manifests: list[Manifest]) -> config.Config:
    """The coordinators' configuration."""
    [data] = [each["data"] for each in manifests if each["kind"] == "ConfigMap" and "coordinator.toml" in each["data"]]
    return config.from_tree(tomllib.loads(data["coordinator.toml"]), Path("/var/lib/parley"))


def is_shared(settings: config.Config) -> bool:
    """Whether several coordinators could serve the same sessions."""
    return settings.database.startswith("postgresql") and settings.s3 is not None


def mebibytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 1, "Gi": 1024}[unit]


# Rules


def weaknesses(manifests: list[Manifest]) -> list[str]:
    """What is wrong with the manifests, in words."""
    return [line for rule in (_pod, _enclaves, _rollout, _tables, _network, _namespace) for line in rule(manifests)]


def _pod(manifests: list[Manifest]) -> Iterator[str]:
    spec = one(manifests, "StatefulSet")["spec"]["template"]["spec"]
    [container] = spec["containers"]
    pod, own = spec["securityContext"], container["securityContext"]
    if pod.get("runAsNonRoot") is not True or pod.get("runAsUser", 0) == 0:
        yield "root"
    if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities") != {"drop": ["ALL"]}:
        yield "privileges"
    if own.get("privileged") or any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        yield "the host's namespaces"
    if own.get("readOnlyRootFilesystem") is not True:
        yield "a root file system that can be written"
    if pod.get("seccompProfile", {}).get("type") != "Localhost":
        yield "a profile that refuses vsock, or none"
    if not pod.get("supplementalGroups"):
        yield "no access to the enclaves' device"
    if spec.get("automountServiceAccountToken") is not False or spec.get("enableServiceLinks") is not False:
        yield "a token for the cluster"
    if any("hostPath" in volume for volume in spec["volumes"]):
        yield "a path of the host"
    if not {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys():
        yield "no probe"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    claimed = {each["metadata"]["name"] for each in one(manifests, "StatefulSet")["spec"]["volumeClaimTemplates"]}
    if mounted != {volume["name"] for volume in spec["volumes"]} | claimed:
        yield "volumes and mounts differ"
    for path in ("/run/nitro_enclaves", "/var/log/nitro_enclaves", "/tmp", "/var/lib/parley"):
        if path not in {mount["mountPath"] for mount in container["volumeMounts"]}:
            yield f"{path} cannot be written"


def _enclaves(manifests: list[Manifest]) -> Iterator[str]:
    spec = one(manifests, "StatefulSet")["spec"]["template"]["spec"]
    [container] = spec["containers"]
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    if requests != limits:
        yield "requests are not limits"
    settings = configured(manifests)
    if is_shared(settings) and mebibytes(limits["memory"]) < 2048:
        yield "uploads to the bucket take more memory"
    if settings.launcher != "nitro":
        yield "enclaves that protect nothing"
    if limits.get(ENCLAVES) != str(settings.enclaves):
        yield "the pod has another number of enclaves than the coordinator starts"
    pages = {name: mebibytes(amount) for name, amount in limits.items() if name in PAGES}
    if len(pages) != 1:
        yield "not one size of huge pages"
    for name, amount in pages.items():
        if amount != settings.enclaves * settings.nitro.memory_mib:
            yield "the pod has other memory for enclaves than the coordinator gives them"
        if settings.nitro.memory_mib % PAGES[name]:
            yield "an enclave's memory is not whole pages"
    if spec["nodeSelector"].get("aws-nitro-enclaves-k8s-dp") != "enabled":
        yield "nodes without the device plugin"


def _rollout(manifests: list[Manifest]) -> Iterator[str]:
    spec, settings = one(manifests, "StatefulSet")["spec"], configured(manifests)
    if spec["replicas"] != 1 and not is_shared(settings):
        yield "two coordinators, each with a state of its own"
    [claim] = spec["volumeClaimTemplates"]
    if claim["spec"]["accessModes"] != ["ReadWriteOncePod"] or claim["metadata"]["name"] != "data":
        yield "two coordinators on one volume"
    if spec["replicas"] != 1 and not spec["template"]["spec"].get("topologySpreadConstraints"):
        yield "one node takes all coordinators"
    peers = one(manifests, "Service", spec["serviceName"])["spec"]
    if peers.get("clusterIP") != "None" or spec["template"]["spec"].get("setHostnameAsFQDN") is not True:
        yield "coordinators do not find one another"
    if settings.cluster.address or settings.node:
        yield "all coordinators say that they are the same one"
    if spec["template"]["spec"]["terminationGracePeriodSeconds"] <= config.defaults(Path()).grace_s + 5:
        yield "a stop does not wait for running calls"
    budget = one(manifests, "PodDisruptionBudget")["spec"]
    if budget.get("maxUnavailable") != 0:
        yield "a drain ends a computation"
    labels = spec["template"]["metadata"]["labels"].items()
    for kind, path in (
        ("Service", ("selector",)),
        ("NetworkPolicy", ("podSelector", "matchLabels")),
        ("PodDisruptionBudget", ("selector", "matchLabels")),
        ("StatefulSet", ("selector", "matchLabels")),
    ):
        selected = one(manifests, kind)["spec"]
        for name in path:
            selected = selected[name]
        if not selected or not selected.items() <= labels:
            yield f"{kind} selects other pods"


def _tables(manifests: list[Manifest]) -> Iterator[str]:
    spec = one(manifests, "StatefulSet")["spec"]["template"]["spec"]
    [migrate], [container] = spec["initContainers"], spec["containers"]
    if migrate["args"] != ["migrate", "--dir", "/var/lib/parley"] or migrate["image"] != container["image"]:
        yield "a coordinator may start before its tables are there"
    if migrate["securityContext"] != container["securityContext"]:
        yield "privileges"
    if migrate["resources"]["requests"] != migrate["resources"]["limits"]:
        yield "requests are not limits"
    if migrate.get("env") != container.get("env"):
        yield "tables are made in another database"
    paths = {mount["mountPath"] for mount in migrate["volumeMounts"]}
    if not {"/var/lib/parley", "/var/lib/parley/coordinator.toml"} <= paths:
        yield "tables are made in another database"
    if not configured(manifests).database.startswith("postgresql"):
        return
    named = {each["name"]: each.get("valueFrom", {}) for each in container.get("env", [])}
    if "secretKeyRef" not in named.get("PGPASSWORD", {}):
        yield "the database's password is no secret"
    query = parse_qs(urlsplit(configured(manifests).database).query)
    if query.get("sslmode") != ["verify-full"]:
        yield "the coordinators take any database for theirs"
    elif str(Path(query["sslrootcert"][0]).parent) not in paths:
        yield "the database's authority is not there"


def _network(manifests: list[Manifest]) -> Iterator[str]:
    policy = one(manifests, "NetworkPolicy")["spec"]
    shared = is_shared(configured(manifests))
    if sorted(policy["policyTypes"]) != ["Egress", "Ingress"] or (policy.get("egress") and not shared):
        yield "the coordinator may call out"
    for rule in policy["egress"]:
        open_ports = {port["port"] for port in rule.get("ports", [])}
        wide = any(peer.get("ipBlock", {}).get("cidr", "").endswith("/0") for peer in rule.get("to", []))
        if (
            not rule.get("to")
            or not open_ports
            or open_ports - {"grpc", 53, 443, 5432}
            or (wide and open_ports != {443})
        ):
            yield "the coordinator may call anything"
    own = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "parley-coordinator"}}}
    if shared and not all(
        any(own in rule[side] and {"grpc"} == {port["port"] for port in rule["ports"]} for rule in policy[direction])
        for direction, side in (("ingress", "from"), ("egress", "to"))
    ):
        yield "coordinators do not reach one another"
    for rule in policy["ingress"]:
        ports = [port["port"] for port in rule.get("ports", [])]
        blocks = [peer.get("ipBlock", {}).get("cidr", "/0") for peer in rule.get("from", []) if peer != own]
        if ports == ["metrics"]:
            if rule.get("from") != [
                {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
            ]:
                yield "others than Prometheus read the metrics"
        elif ports not in (["grpc"], [7443]):
            yield "other ports"
        elif not rule.get("from") or any(int(block.rpartition("/")[2]) < 8 for block in blocks):
            yield "everybody reaches the coordinator"
    if any(
        port["targetPort"] != "grpc"
        for each in manifests
        if each["kind"] == "Service"
        for port in each["spec"]["ports"]
    ):
        yield "others than Prometheus read the metrics"
    service = one(manifests, "Service")["spec"]
    if service.get("type", "ClusterIP") != "ClusterIP" and not service.get("loadBalancerSourceRanges"):
        yield "everybody reaches the load balancer"


def _namespace(manifests: list[Manifest]) -> Iterator[str]:
    namespace = one(manifests, "Namespace")["metadata"]
    if namespace["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
        yield "the namespace enforces nothing"


def test_the_base_is_as_it_should_be() -> None:
    assert weaknesses(base()) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_overlays_are_as_they_should_be(name: str) -> None:
    manifests = rendered(FOLDER / "overlays" / name)
    assert weaknesses(manifests) == []
    volumes = one(manifests, "StatefulSet")["spec"]["template"]["spec"]["volumes"]
    named = {volume["configMap"]["name"] for volume in volumes if "configMap" in volume} - {"database-ca"}
    assert named == {each["metadata"]["name"] for each in manifests if each["kind"] == "ConfigMap"}


@pytest.mark.parametrize(
    ("old", "new", "weakness"),
    [
        ("runAsNonRoot: true", "runAsNonRoot: false", "root"),
        ("runAsUser: 10001", "runAsUser: 0", "root"),
        ("allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true", "privileges"),
        ('drop: ["ALL"]', 'add: ["SYS_ADMIN"]', "privileges"),
        ("enableServiceLinks: false", "enableServiceLinks: false\n      hostNetwork: true", "the host's namespaces"),
        ("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "can be written"),
        ("type: Localhost", "type: RuntimeDefault", "refuses vsock"),
        ("supplementalGroups: [992]", "supplementalGroups: []", "no access"),
        ("      automountServiceAccountToken: false", "      automountServiceAccountToken: true", "a token"),
        ("          emptyDir: {}", "          hostPath: {path: /run}", "a path of the host"),
        ("          livenessProbe:", "          lifecycle:", "no probe"),
        ("mountPath: /tmp", "mountPath: /temp", "/tmp cannot be written"),
        ("            limits: *resources", "            limits: {cpu: 2}", "requests are not limits"),
        ('nitro_enclaves: "1"', 'nitro_enclaves: "2"', "another number of enclaves"),
        ("enclaves = 1\n", "enclaves = 2\n", "another number of enclaves"),
        ("hugepages-1Gi: 2Gi", "hugepages-1Gi: 1Gi", "other memory"),
        ("memory_mib = 2048", "memory_mib = 1536", "not whole pages"),
        ("hugepages-1Gi: 2Gi", "hugepages-1Gi: 2Gi\n              hugepages-2Mi: 2Gi", "not one size"),
        ('kind = "nitro"', 'kind = "local"', "protect nothing"),
        ("k8s-dp: enabled", "k8s-dp: disabled", "without the device plugin"),
        ("replicas: 1", "replicas: 2", "a state of its own"),
        ('["ReadWriteOncePod"]', '["ReadWriteMany"]', "on one volume"),
        ("clusterIP: None", "type: ClusterIP", "do not find one another"),
        ("setHostnameAsFQDN: true", "setHostnameAsFQDN: false", "do not find one another"),
        ("[telemetry]", '[cluster]\nnode = "a"\n[telemetry]', "the same one"),
        ('args: ["migrate", ', 'args: ["digest", ', "before its tables"),
        ("limits: *migrating", "limits: {cpu: 1}", "requests are not limits"),
        (
            "              mountPath: /var/lib/parley/coordinator.toml\n",
            "              mountPath: /var/lib/parley.toml\n",
            "in another database",
        ),
        (
            "namespaceSelector:\n            matchLabels:\n              kubernetes.io/metadata.name: monitoring",
            "ipBlock: {cidr: 198.51.100.0/24}",
            "read the metrics",
        ),
        ("targetPort: grpc", "targetPort: metrics", "read the metrics"),
        ("        - port: metrics", "        - port: 22", "other ports"),
        ("terminationGracePeriodSeconds: 60", "terminationGracePeriodSeconds: 5", "does not wait"),
        ("maxUnavailable: 0", "maxUnavailable: 1", "a drain"),
        ("egress: []", "egress: [{}]", "call out"),
        ("cidr: 192.0.2.0/32", "cidr: 0.0.0.0/0", "everybody reaches the coordinator"),
        (
            "  ports:\n    - name: grpc\n      port: 7443",
            "  type: LoadBalancer\n  ports:\n    - name: grpc",
            "load balancer",
        ),
        ("enforce: restricted", "enforce: privileged", "enforces nothing"),
        (
            "  podSelector:\n    matchLabels:\n      app.kubernetes.io/name: parley-coordinator",
            "  podSelector: {matchLabels: {a: b}}",
            "selects other",
        ),
    ],
)
def test_a_weak_manifest_is_seen(
    tmp_path: Path, old: str, new: str, weakness: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    altered = 0
    for path in (tmp_path / "base").iterdir():
        text = path.read_text("utf-8")
        altered += text.count(old)
        path.write_text(text.replace(old, new), "utf-8")
    assert altered, f"{old!r} stands nowhere"
    monkeypatch.setattr(sys.modules[__name__], "BASE", tmp_path / "base")
    assert any(weakness in line for line in weaknesses(base()))


SEVERAL = ("coordinator.toml", "statefulset.yaml", "kustomization.yaml")


@pytest.mark.parametrize(
    ("old", "new", "weakness"),
    [
        ("s3://parley-example/blobs", "blobs", "a state of its own"),
        ("sslmode=verify-full", "sslmode=require", "any database for theirs"),
        ("sslrootcert=/etc/parley/database", "sslrootcert=/etc/ssl", "authority is not there"),
        (
            "valueFrom:\n                secretKeyRef:\n                  name: parley-database\n                  key: password",
            "value: secret",
            "password is no secret",
        ),
        ("          env: *database\n", "", "in another database"),
        ("[{port: grpc, protocol: TCP}]", "[{port: 22, protocol: TCP}]", "do not reach one another"),
        ("10.70.0.128/25", "0.0.0.0/0", "call anything"),
        ("port: 443", "port: 80", "call anything"),
        ("value: 2Gi", "value: 1Gi", "more memory"),
    ],
)
def test_a_weak_overlay_is_seen(tmp_path: Path, old: str, new: str, weakness: str) -> None:
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    altered = 0
    for name in SEVERAL:
        path = tmp_path / "kubernetes/overlays/several" / name
        text = path.read_text("utf-8")
        altered += text.count(old)
        path.write_text(text.replace(old, new), "utf-8")
    assert altered, f"{old!r} stands nowhere"
    found = weaknesses(rendered(tmp_path / "kubernetes/overlays/several"))
    assert any(weakness in line for line in found), found


# Schemas


@pytest.mark.parametrize("version", VERSIONS)
def test_the_manifests_follow_the_schemas(version: str) -> None:
    for manifest in base():
        assert kubernetes_validate.validate(manifest, version, strict=True) == version
    wrong = one(base(), "StatefulSet")
    wrong["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        kubernetes_validate.validate(wrong, version, strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_overlays_follow_the_schemas(name: str) -> None:
    for manifest in rendered(FOLDER / "overlays" / name):
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)


# Beside the manifests


def test_the_system_call_profile_refuses_what_it_should_and_lets_vsock_through() -> None:
    profile = json.loads((FOLDER / "seccomp" / "parley-coordinator.json").read_text("utf-8"))
    localhost = one(base(), "StatefulSet")["spec"]["template"]["spec"]["securityContext"]["seccompProfile"]
    assert localhost["localhostProfile"] == "parley-coordinator.json"
    assert profile["defaultAction"] == "SCMP_ACT_ALLOW"
    refused = {name for rule in profile["syscalls"] for name in rule["names"]}
    assert all(rule["action"] == "SCMP_ACT_ERRNO" for rule in profile["syscalls"])
    assert {"bpf", "mount", "ptrace", "unshare", "setns", "keyctl", "kexec_load", "userfaultfd"} <= refused
    assert not refused & {"socket", "connect", "ioctl", "execve", "mmap"}
    [clone] = [rule for rule in profile["syscalls"] if rule["names"] == ["clone"]]
    assert clone["args"][0]["value"] == clone["args"][0]["valueTwo"] == 0x10000000, "only for a new user namespace"
    [clone3] = [rule for rule in profile["syscalls"] if rule["names"] == ["clone3"]]
    assert clone3["errnoRet"] == 38, "ENOSYS, so that libc takes clone"


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Containerfile, continuation lines joined, comments left out."""
    lines = (FOLDER / "Containerfile").read_text("utf-8").splitlines()
    text = "\n".join(line for line in lines if line and not line.startswith("#"))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.replace("\\\n", " ").splitlines())]


def test_the_container_is_small_and_not_root() -> None:
    steps = instructions()
    assert {name for name, _ in steps} <= {
        "ARG", "FROM", "RUN", "COPY", "USER", "WORKDIR", "ENV", "EXPOSE", "ENTRYPOINT", "CMD",
    }  # fmt: skip
    assert [rest for name, rest in steps if name == "FROM"] == ["${BASE} AS build", "${BASE}"]
    final = steps[max(index for index, (name, _) in enumerate(steps) if name == "FROM") :]
    spec = one(base(), "StatefulSet")["spec"]["template"]["spec"]
    user, group = spec["securityContext"]["runAsUser"], spec["securityContext"]["runAsGroup"]
    assert ("USER", f"{user}:{group}") in final
    assert [rest for name, rest in final if name == "COPY"] == [
        "--from=build /opt/parley /opt/parley",
        "image/parley.eif /opt/parley/parley.eif",
    ]
    entry, command = (json.loads(dict(final)[name]) for name in ("ENTRYPOINT", "CMD"))
    assert entry == ["/opt/parley/bin/parley-coordinator"] and command == spec["containers"][0]["args"]
    for name, rest in steps:
        if name == "RUN":
            assert "pip install" not in rest or "--no-index" in rest
            assert "://" not in rest, "nothing is downloaded but packages of the distribution"
    settings = config.from_tree(tomllib.loads((BASE / "coordinator.toml").read_text("utf-8")), Path("/var/lib/parley"))
    assert settings.nitro.image == Path("/opt/parley/parley.eif")


def test_the_probe_asks_a_real_coordinator(tmp_path: Path) -> None:
    program = str(Path(sys.executable).parent / "parley-coordinator")
    folder = tmp_path / "relay"
    subprocess.run([program, "init", "--dir", str(folder), "--listen", "127.0.0.1:0"], check=True, capture_output=True)
    command = [sys.executable, str(BASE / "probe.py")]
    with subprocess.Popen([program, "run", "--dir", str(folder)], stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stderr is not None
            for line in running.stderr:
                if (folder / "address").exists():
                    break
                assert running.poll() is None, line
            address = (folder / "address").read_text().strip()
            certificate = str(folder / "tls.crt")
            healthy = subprocess.run([*command, address, certificate], capture_output=True, text=True, check=False)
            other = subprocess.run(
                [*command, address, certificate, "other"], capture_output=True, text=True, check=False
            )
        finally:
            running.terminate()
    assert (healthy.returncode, healthy.stdout) == (0, "SERVING\n"), healthy.stderr
    assert other.returncode == 1 and other.stdout.startswith("UNAVAILABLE")
    gone = subprocess.run([*command, address, certificate], capture_output=True, text=True, check=False)
    assert gone.returncode == 1 and gone.stdout.startswith("UNAVAILABLE")
