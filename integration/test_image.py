"""The image: what is in it, that it is the same each time, and a container of it before a real server, as its user, on a read-only root,
without capabilities."""
import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import tarfile
import threading

import pytest

import harness
import image as image_module
import wire
from harness import DATABASE, USER, percent

pytestmark = pytest.mark.skipif(harness.sanitized(), reason="the image is of the release build")
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root makes a container here")


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return image_module.build(harness.BINARY, tmp_path_factory.mktemp("image"), "0123456789ab")


@pytest.fixture
def container(image, pg, tmp_path):
    password = tmp_path / "password"
    password.write_text(harness.PASSWORD)
    password.chmod(0o444)
    port, admin = harness.free_port(), harness.free_port()
    environment = {
        "PGSIDECAR_UPSTREAM_URL": f"postgresql://{percent(USER)}:${{file:/run/secrets/password}}@localhost:{pg.port}/{DATABASE}?sslmode=verify-full",
        "PGSIDECAR_LISTEN": f"127.0.0.1:{port}", "PGSIDECAR_ADMIN_LISTEN": f"127.0.0.1:{admin}", "PGSIDECAR_POOL_MIN": "0"}
    mounts = [(password, "/run/secrets/password"), (image.certificates(pg.ca, tmp_path), image_module.CERTIFICATES), ("/etc/hosts", "/etc/hosts")]
    running = image_module.Container(image, environment, mounts)
    running.port, running.admin_port = port, admin
    yield running
    running.close()


def waits(container):
    harness.poll(lambda: not container.running() or container.exec("/usr/local/bin/pgsidecar", "healthcheck").returncode == 0, what="it lives")
    assert container.running(), container.log_text()


def test_holds_the_binary_its_libraries_certificates_and_nothing_else(image):
    files = {name: entry for name, entry in image.files().items() if not entry.isdir()}
    loaded = subprocess.run(["ldd", harness.BINARY], check=True, capture_output=True, text=True).stdout
    assert set(files) == {"/usr/local/bin/pgsidecar", "/etc/ssl/certs/ca-certificates.crt", "/usr/lib/ssl/cert.pem", "/usr/lib/ssl/certs",
                          "/etc/passwd", "/etc/group", "/etc/nsswitch.conf", *re.findall(r"(?<=\s)/\S+", loaded)}
    assert all(entry.uid == entry.gid == 0 for entry in image.files().values())
    assert not any(entry.mode & 0o7022 for entry in image.files().values() if not entry.issym())  # no setuid; only root writes


def test_is_small(image):
    assert image.size_beside_base() < 20e6
    assert image.archive.stat().st_size < 10e6


def test_is_the_same_each_time(image, tmp_path):
    before = os.umask(0o077)
    try:
        again = image_module.build(harness.BINARY, tmp_path / "again", "0123456789ab")
    finally:
        os.umask(before)
    assert again.digest == image.digest
    assert image_module.build(harness.BINARY, tmp_path / "other", "ba9876543210").digest != image.digest


def test_loads_by_its_name(image):
    """A docker without containerd's image store reads manifest.json, others index.json."""
    with tarfile.open(image.archive) as tar:
        (docker,) = json.load(tar.extractfile("manifest.json"))
        (index,) = json.load(tar.extractfile("index.json"))["manifests"]
        manifest = json.load(tar.extractfile("blobs/" + index["digest"].replace(":", "/")))
        assert docker["RepoTags"] == [index["annotations"]["org.opencontainers.image.ref.name"]] == ["pgsidecar:latest"]
        assert [docker["Config"], *docker["Layers"]] == ["blobs/" + part["digest"].replace(":", "/") for part in (manifest["config"], *manifest["layers"])]
        described = json.load(tar.extractfile(docker["Config"]))
        layers = [gzip.decompress(tar.extractfile(layer).read()) for layer in docker["Layers"]]
        assert described["rootfs"]["diff_ids"] == ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]


def test_configuration_is_the_dockerfiles(image):
    version = subprocess.run([harness.BINARY, "--version"], capture_output=True, text=True).stdout.split()[1]
    config = image.config
    labels = {name.rsplit(".", 1)[1]: value for name, value in config["Labels"].items()}
    assert labels["version"] == version and labels["revision"] == "0123456789ab" and labels["title"] == "pgsidecar"
    assert config["User"] == "65532:65532" and config["StopSignal"] == "SIGTERM" and config["Entrypoint"] == ["/usr/local/bin/pgsidecar"]
    assert config["Healthcheck"]["Test"] == ["CMD", "/usr/local/bin/pgsidecar", "healthcheck"]
    assert set(config["ExposedPorts"]) == {"6432/tcp", "5000/tcp"}


def test_dockerfile_makes_it_of_the_same_files():
    text = image_module.DOCKERFILE.read_text()
    assert "RUN conf/image/rootfs.sh /build/pgsidecar /root-fs" in text
    assert re.search(r"^FROM scratch$(?!.*^RUN)(?=.*^COPY --from=build /root-fs/ /$)", text, re.M | re.S)


@needs_root
def test_runs_as_nobody_on_a_read_only_root_without_capabilities(container, pg):
    waits(container)
    status = pathlib.Path(f"/proc/{container.pid}/status").read_text()
    assert re.search(r"^Uid:\t65532\t65532\t65532\t65532$", status, re.M) and re.search(r"^Groups:\s*$", status, re.M)
    assert set(re.findall(r"^Cap\w+:\t(\w+)$", status, re.M)) == {"0" * 16} and "NoNewPrivs:\t1" in status
    root = next(line for line in pathlib.Path(f"/proc/{container.pid}/mountinfo").read_text().splitlines() if line.split()[4] == "/")
    assert "ro" in root.split()[5].split(",")
    with container.connect() as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
        assert pg.sql("SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE client_port > 0")[0][0]
    for shell in ("/bin/sh", "/usr/bin/env"):
        assert container.exec(shell).returncode != 0
    assert container.exec("/usr/local/bin/pgsidecar", "wait", "--max", "5s").returncode == 0
    assert container.exec("/usr/local/bin/pgsidecar", "shutdown").returncode == 0
    assert container.wait_exit() == 0, container.log_text()


@needs_root
def test_runs_as_any_user(image, pg):
    """As OpenShift has it: a number that no file names, and the group 0."""
    anyone = dataclasses.replace(image, config={**image.config, "User": "1000660000:0"})
    admin = harness.free_port()
    running = image_module.Container(anyone, {"DATABASE_URL": pg.url(sslmode="require"), "PGSIDECAR_LISTEN": f"127.0.0.1:{harness.free_port()}",
                                              "PGSIDECAR_ADMIN_LISTEN": f"127.0.0.1:{admin}"})
    try:
        waits(running)
    finally:
        running.close()


@needs_root
def test_stops_at_sigterm(container):
    waits(container)
    container.signal(signal.SIGTERM)
    assert container.wait_exit() == 0 and "draining" in container.log_text()


@needs_root
def test_costs_next_to_nothing_at_rest(container):
    waits(container)
    resting = container.rss_kb() * 1024
    with container.connect() as connection:
        connection.execute("SELECT 1")
        harness.poll(lambda: sleeps(container), 30, "it goes to sleep")
        worked = container.rss_kb() * 1024
    print(f"{resting / 1e6:.1f} MB at rest, {worked / 1e6:.1f} MB after work")
    assert resting < 12e6 and worked < 14e6


def test_ten_thousand_idle_clients(proxies):
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(10000, files[1] - 500)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files[1], files[1]))
    try:
        proxy = proxies({"auth": {"method": "trust"}, "limits": {"maxClients": count + 10}})
        clients = []
        for _ in range(count):
            clients.append(wire.Wire(proxy.port, timeout=60))
            assert clients[-1].login(USER, "", DATABASE) is None
        assert clients[0].value("SELECT 1") == "1" == clients[-1].value("SELECT 1")
        print(f"{proxy.rss_kb() * 1024 / 1e6:.1f} MB with {count} idle clients")
        assert proxy.rss_kb() * 1024 < 64e6
        assert harness.poll(lambda: sleeps(proxy), 30, "it goes to sleep")
        for client in clients:
            client.sock.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)


def sleeps(container, seconds=2):
    """At most one wake-up a second."""
    before = container.switches()
    threading.Event().wait(seconds)
    return container.switches() - before <= seconds
