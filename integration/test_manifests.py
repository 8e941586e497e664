"""conf/kubernetes and conf/compose.yaml as they stand, against what the binary offers: each pgsidecar in them runs in a container of the image
(image.py), with its environment, files, user and limits, in a network of its own with a PostgreSQL that answers to db.example.com:5432."""
import ctypes
import fcntl
import functools
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import urllib.error
import urllib.request

import psycopg
import pytest
import yaml

import harness
import image as image_module
from harness import ROOT

pytestmark = pytest.mark.skipif(harness.sanitized(), reason="the image is of the release build")
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root makes a container here")

KUBERNETES = ROOT / "conf/kubernetes"
POD_IP = "10.1.2.3"
HOST, PASSWORD = "db.example.com", "change-me"
NAMES = ["native-sidecar", "classic-sidecar", "job", "job-classic", "cronjob"]
manifests = pytest.mark.parametrize("name", NAMES)


def documents(name, with_probes=False):
    text = (KUBERNETES / f"{name}.yaml").read_text()
    if with_probes:  # what is commented out for those who want it
        text = re.sub(r"^( *)# (readinessProbe:|  \w+:)", r"\1\2", text, flags=re.M)
    return list(yaml.safe_load_all(text))


def pod_spec(document):
    if document["kind"] == "CronJob":
        document = document["spec"]["jobTemplate"]
    return document["spec"]["template"]["spec"]


def sidecar_of(pod):
    return next(c for c in pod.get("initContainers", []) + pod["containers"] if c["name"] == "pgsidecar")


CONFIG_MAP, SECRET = documents("common")
SOURCES = {("configMap", CONFIG_MAP["metadata"]["name"]): CONFIG_MAP["data"], ("secret", SECRET["metadata"]["name"]): SECRET["stringData"]}


def files_of(pod, container, directory):
    """[(file here, path in the container)] as the volumes give them."""
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    found = []
    for mounted in container["volumeMounts"]:
        volume = volumes[mounted["name"]]
        data = (SOURCES[("configMap", volume["configMap"]["name"])] if "configMap" in volume
                else SOURCES[("secret", volume["secret"]["secretName"])])
        items = (volume.get("configMap") or volume["secret"]).get("items") or [{"key": key, "path": key} for key in data]
        for item in items:
            file = directory / f"{mounted['name']}-{item['path']}"
            file.write_text(data[item["key"]])
            file.chmod(0o644)
            found.append((file, f"{mounted['mountPath']}/{item['path']}"))
    return found


def environment_of(container):
    return {variable["name"]: variable["value"] for variable in container["env"]}


def check(environment, cwd):
    """The effective configuration, by path."""
    done = subprocess.run([harness.BINARY, "check"], env=environment, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr

    def flat(value, path=""):
        if not isinstance(value, dict):
            return {path: value}
        return {p: v for key, inner in value.items() for p, v in flat(inner, f"{path}.{key}" if path else key).items()}
    return flat(yaml.safe_load(done.stdout))


def variable(path):
    return "PGSIDECAR_" + re.sub(r"(?<=[a-z])(?=[A-Z])", "_", path).replace(".", "_").upper()


def configuration(pod, container, directory):
    """Of a container, checked on this machine: its files under paths of this machine."""
    files = files_of(pod, container, directory)
    for file, inside in files:
        text = file.read_text()
        for other, there in files:
            text = text.replace(there, str(other))
        file.write_text(text)
    places = {inside: str(file) for file, inside in files}
    return check({name: places.get(value, value) for name, value in environment_of(container).items()}, directory)


def in_a_network_of_its_own(test):
    """All that the test does: sockets, processes that it starts. 127.0.0.1 and the pod's address are there."""
    def own_network():
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(0x40000000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWNET, of this thread
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            fcntl.ioctl(sock, 0x8914, struct.pack("16sH14x", b"lo", 0x49))  # SIOCSIFFLAGS: up
            fcntl.ioctl(sock, 0x8916, struct.pack("16sHH4s8x", b"lo:pod", socket.AF_INET, 0, socket.inet_aton(POD_IP)))  # SIOCSIFADDR

    @functools.wraps(test)
    def run(*arguments, **keys):
        def work(_):
            own_network()
            test(*arguments, **keys)
        harness.threads(1, work)
    return run


class Database(harness.Postgres):
    """PostgreSQL as the manifests name it: db.example.com:5432, database and user app, certificate of a CA that the system trusts."""

    def __init__(self, monkeypatch):
        with monkeypatch.context() as here:
            here.setattr(harness, "free_port", lambda: 5432)
            super().__init__()
        harness.make_certificates(self.certificates, names=(f"DNS:{HOST}",))
        for file in self.certificates.iterdir():
            shutil.chown(file, "postgres", "postgres")
        self.sql("SELECT pg_reload_conf()")
        self.sql(f"ALTER ROLE app PASSWORD '{PASSWORD}'")
        self.hosts = self.directory / "hosts"
        self.hosts.write_text(f"127.0.0.1 localhost {HOST}\n")
        self.hosts.chmod(0o644)

    def mounts(self):
        return [(self.hosts, "/etc/hosts"), (self.ca, "/etc/ssl/certs/ca-certificates.crt")]


def ask(host, port, path, method="GET"):
    request = urllib.request.Request(f"http://{host}:{port}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def listens(container, host, port):
    try:
        socket.create_connection((host, port), 1).close()
        return True
    except OSError:
        assert container.running(), container.log_text()
        return False


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return image_module.build(harness.BINARY, tmp_path_factory.mktemp("image"))


def megabytes(quantity):
    assert quantity.endswith("Mi")
    return int(quantity[:-2])


@manifests
def test_keys_and_variables_are_known(name, tmp_path):
    (document,) = documents(name)
    container = sidecar_of(pod_spec(document))
    effective = configuration(pod_spec(document), container, tmp_path)
    known = {variable(path): path for path in effective}
    for variable_name, value in environment_of(container).items():
        if variable_name != "PGSIDECAR_CONFIG":
            assert str(effective[known[variable_name]]).lower() == value
    given = yaml.safe_load(CONFIG_MAP["data"]["pgsidecar.yaml"])
    assert effective["pool.max"] == given["pool"]["max"] and effective["admin.listen"] == given["admin"]["listen"] == "0.0.0.0:9801"


@manifests
def test_grace_period_is_long_enough(name, tmp_path):
    (document,) = documents(name)
    pod = pod_spec(document)
    effective = configuration(pod, sidecar_of(pod), tmp_path)
    needed = (effective["shutdown.timeoutMillis"] + effective["shutdown.delayMillis"]) / 1000
    if document["kind"] == "Deployment":
        assert pod["terminationGracePeriodSeconds"] >= needed + 2


@manifests
def test_security_and_hooks(name, image):
    (document,) = documents(name)
    pod = pod_spec(document)
    container = sidecar_of(pod)
    uid, gid = image.config["User"].split(":")
    assert container["securityContext"] == {
        "runAsNonRoot": True, "runAsUser": int(uid), "runAsGroup": int(gid), "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"}}
    assert "preStop" not in container.get("lifecycle", {}) and "cpu" not in container["resources"]["limits"]
    assert not any(PASSWORD in str(value) for value in environment_of(container).values())
    native = container in pod.get("initContainers", [])
    assert native == ("classic" not in name) == (container.get("restartPolicy") == "Always")
    assert container["image"].endswith(":" + image.config["Labels"]["org.opencontainers.image.version"])


@manifests
def test_is_what_kubernetes_knows(name):
    """Read by Kubernetes' own client and written again nothing is lost: no key is misspelt or in the wrong place."""
    client = pytest.importorskip("kubernetes.client")
    for document in documents(name, with_probes=True) + [CONFIG_MAP, SECRET]:
        for container in (pod_spec(document).get("initContainers", []) if "template" in str(document) else []):
            assert container.pop("restartPolicy") == "Always"  # newer than this client

        class Response:
            data = json.dumps(document)
        api = client.ApiClient()
        assert api.sanitize_for_serialization(api.deserialize(Response, "V1" + document["kind"])) == document


@needs_root
@manifests
@in_a_network_of_its_own
def test_runs_as_it_stands(name, image, tmp_path, monkeypatch):
    (document,) = documents(name, with_probes=True)
    pod = pod_spec(document)
    spec = sidecar_of(pod)
    (port,) = (port["containerPort"] for port in spec["ports"])
    with Database(monkeypatch) as database:
        container = image_module.Container(image, environment_of(spec), [*files_of(pod, spec, tmp_path), *database.mounts()])
        try:
            # Kubelet's probes come to the pod's address.
            harness.poll(lambda: listens(container, POD_IP, port), what="it listens")
            probes = {kind: spec[kind]["httpGet"] for kind in ("startupProbe", "livenessProbe", "readinessProbe") if kind in spec}
            assert "livenessProbe" in probes and ("startupProbe" in probes) == ("restartPolicy" in spec)
            assert all(probe["port"] == "health" for probe in probes.values())
            assert {kind: ask(POD_IP, port, probe["path"]) for kind, probe in probes.items()} == {kind: 200 for kind in probes}
            for hook in spec.get("lifecycle", {}).values():
                assert container.exec(*hook["exec"]["command"]).returncode == 0
                assert "--started" in hook["exec"]["command"]  # a database that is away mustn't keep the container from starting
            assert container.exec("/usr/local/bin/pgsidecar", "healthcheck").returncode == 0
            # The application's URL, from the same pod; nobody else reaches the database through it.
            (application,) = (c for c in pod["containers"] if c["name"] != "pgsidecar")
            (reference,) = (variable["valueFrom"]["secretKeyRef"] for variable in application["env"])
            url = SOURCES[("secret", reference["name"])][reference["key"]]
            clients = [psycopg.connect(url, autocommit=True) for _ in range(100)]
            for _ in range(20):
                assert all(client.execute("SELECT 1").fetchone() == (1,) for client in clients)
            assert not listens(container, POD_IP, 6432)
            # The memory that the manifest asks for, while it works for a hundred clients.
            assert container.status("VmHWM") / 1024 < megabytes(spec["resources"]["requests"]["memory"]) < megabytes(spec["resources"]["limits"]["memory"])
            assert ask(POD_IP, port, "/metrics") == 200
            for path in ("/api/admin/drain", "/api/admin/reload", "/api/admin/pause"):
                assert ask(POD_IP, port, path, "POST") == 403
            assert ask(POD_IP, port, "/api/monitoring/clients") == 403
            for client in clients:
                client.close()
            assert ask("127.0.0.1", port, "/api/admin/drain", "POST") == 200
            assert container.wait_exit() == 0, container.log_text()
        finally:
            container.close()


# ---- compose

def compose():
    done = subprocess.run(["docker-compose", "-f", ROOT / "conf/compose.yaml", "config"], capture_output=True, text=True,
                          env={**os.environ, "DATABASE_PASSWORD": PASSWORD})
    assert done.returncode == 0, done.stderr  # every key is one that Compose knows
    return yaml.safe_load(done.stdout.replace("$$", "$"))


def test_compose_is_as_strict_as_the_manifests(image, tmp_path):
    services = compose()["services"]
    service = services["pgsidecar"]
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert image.config["Healthcheck"] and services["app"]["depends_on"]["pgsidecar"]["condition"] == "service_healthy"
    assert PASSWORD not in json.dumps(service)
    (secret,) = service["secrets"]
    (tmp_path / "password").write_text(PASSWORD)
    effective = check({name: value.replace(f"/run/secrets/{secret['source']}", str(tmp_path / "password")) for name, value in service["environment"].items()},
                      tmp_path)
    known = {variable(path): path for path in effective}
    assert str(effective[known["PGSIDECAR_POOL_MAX"]]) == service["environment"]["PGSIDECAR_POOL_MAX"]
    assert float(service["stop_grace_period"].rstrip("s")) * 1000 > effective["shutdown.timeoutMillis"] + 2000


@needs_root
@in_a_network_of_its_own
def test_compose_runs_as_it_stands(image, tmp_path, monkeypatch):
    services = compose()["services"]
    service = services["pgsidecar"]
    (secret,) = service["secrets"]
    password = tmp_path / "password"
    password.write_text(PASSWORD)
    password.chmod(0o644)
    with Database(monkeypatch) as database:
        container = image_module.Container(image, service["environment"], [(password, f"/run/secrets/{secret['source']}"), *database.mounts()])
        try:
            harness.poll(lambda: listens(container, "127.0.0.1", 6432), what="it listens")
            assert container.exec(*image.config["Healthcheck"]["Test"][1:]).returncode == 0
            with psycopg.connect(services["app"]["environment"]["DATABASE_URL"]) as client:
                assert client.execute("SELECT 1").fetchone() == (1,)
            container.signal(signal.SIGTERM)
            assert container.wait_exit() == 0
        finally:
            container.close()
