"""The image without a Docker engine: conf/image/rootfs.sh's files and the Dockerfile's last stage as an OCI image (an archive that docker,
podman and skopeo load), and a container of it: its user, a read-only root, no capabilities.

    image.py BINARY DIRECTORY    makes DIRECTORY/pgsidecar.oci.tar, prints what it is and costs; image.sh builds the binary first
"""
import contextlib
import ctypes
import dataclasses
import gzip
import hashlib
import io
import json
import os
import pathlib
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading

import harness
import wire

DOCKERFILE = harness.ROOT / "Dockerfile"
NAME = "pgsidecar:latest"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
# The base's own parts of the closure, which any image of Debian has.
BASE_LIBRARIES = re.compile(r"/(ld-linux[^/]*|libc|libm|libssl|libcrypto|libgcc_s)\.so")


def last_stage(text, arguments=None):
    """The image's configuration that the Dockerfile's last stage gives, in the form that OCI and Docker use."""
    arguments = arguments or {}
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    start = max(index for index, line in enumerate(lines) if line.startswith("FROM "))
    config = {"Labels": {}}
    for line in lines[start + 1:]:
        word, rest = line.split(None, 1)
        if word == "LABEL":
            for one in shlex.split(rest):
                name, value = one.split("=", 1)
                config["Labels"][name] = re.sub(r"\$(\w+)", lambda m: arguments.get(m[1], ""), value)
        elif word == "USER":
            config["User"] = rest.strip()
        elif word == "EXPOSE":
            config["ExposedPorts"] = {f"{port}/tcp": {} for port in rest.split()}
        elif word == "STOPSIGNAL":
            config["StopSignal"] = rest.strip()
        elif word == "ENTRYPOINT":
            config["Entrypoint"] = json.loads(rest)
        elif word == "HEALTHCHECK":
            options, command = rest.split("CMD")
            config["Healthcheck"] = {"Test": ["CMD", *json.loads(command)]}
            for name, seconds in re.findall(r"--([a-z-]+)=(\d+)s", options):
                config["Healthcheck"]["".join(part.capitalize() for part in name.split("-"))] = int(seconds) * 10**9
        elif word not in ("ARG", "COPY"):
            raise ValueError(f"the Dockerfile's last stage says {word}, which image.py doesn't know")
    return config


def layer_of(root):
    """A tar of the directory: sorted, root's, without what differs from one build to the next."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(root.rglob("*")):
            entry = tar.gettarinfo(path, str(path.relative_to(root)))
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = 0
            with open(path, "rb") if entry.isreg() else contextlib.nullcontext() as content:
                tar.addfile(entry, content)
    return out.getvalue()


@dataclasses.dataclass
class Image:
    archive: pathlib.Path
    digest: str
    config: dict
    layer: bytes = dataclasses.field(repr=False)

    def files(self):
        with tarfile.open(fileobj=io.BytesIO(self.layer)) as tar:
            return {"/" + entry.name: entry for entry in tar}

    def certificates(self, ca, directory):
        """A file of the image's CA certificates and one more, to stand in their place: as if the tests' CA were one of the system's."""
        file = pathlib.Path(directory) / "ca-certificates.crt"
        with tarfile.open(fileobj=io.BytesIO(self.layer)) as tar:
            file.write_bytes(tar.extractfile(CERTIFICATES.lstrip("/")).read() + pathlib.Path(ca).read_bytes())
        file.chmod(0o644)
        return file

    def size(self):
        return sum(entry.size for entry in self.files().values())

    def size_beside_base(self):
        return sum(entry.size for name, entry in self.files().items() if not BASE_LIBRARIES.search(name))


def build(binary, directory, commit=""):
    directory = pathlib.Path(directory)
    root = directory / "root"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    subprocess.run([harness.ROOT / "conf/image/rootfs.sh", binary, root], check=True)
    layer = layer_of(root)
    packed = gzip.compress(layer, 9, mtime=0)
    config = last_stage(DOCKERFILE.read_text(), {"COMMIT": commit})
    blobs = {}

    def add(content, media):
        content = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
        digest = hashlib.sha256(content).hexdigest()
        blobs[digest] = content
        return {"mediaType": f"application/vnd.oci.image.{media}", "digest": "sha256:" + digest, "size": len(content)}

    architecture = subprocess.run(["dpkg", "--print-architecture"], check=True, capture_output=True, text=True).stdout.strip()
    described = {"architecture": architecture, "os": "linux", "created": "1970-01-01T00:00:00Z", "config": config,
                 "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest()]}}
    parts = {"config": add(described, "config.v1+json"), "layers": [add(packed, "layer.v1.tar+gzip")]}
    manifest = add({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", **parts}, "manifest.v1+json")
    names = {"org.opencontainers.image.ref.name": NAME, "io.containerd.image.name": "docker.io/library/" + NAME}
    index = {"schemaVersion": 2, "manifests": [{**manifest, "annotations": names}]}

    def place(part):
        return "blobs/" + part["digest"].replace(":", "/")

    # What a docker without containerd's image store loads.
    docker = [{"Config": place(parts["config"]), "RepoTags": [NAME], "Layers": [place(layer) for layer in parts["layers"]]}]
    archive = directory / "pgsidecar.oci.tar"
    with tarfile.open(archive, "w", format=tarfile.USTAR_FORMAT) as tar:
        files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": json.dumps(index, sort_keys=True).encode(),
                 "manifest.json": json.dumps(docker, sort_keys=True).encode(),
                 **{"blobs/sha256/" + digest: blobs[digest] for digest in sorted(blobs)}}
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    shutil.rmtree(root)
    return Image(archive, manifest["digest"], config, layer)


LIBC = ctypes.CDLL(None, use_errno=True)
MS_RDONLY, MS_REMOUNT, MS_BIND = 1, 32, 4096
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38


def mount(source, target, kind="", flags=0):
    if LIBC.mount(str(source).encode(), str(target).encode(), kind.encode(), flags, None) != 0:
        raise OSError(ctypes.get_errno(), f"mount {source} on {target}")


def become(spec):
    """Of a process that is root within the container's root: what a runtime does before it starts the image's program."""
    for capability in range(64):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    os.setgroups([])
    os.setgid(spec["gid"])
    os.setuid(spec["uid"])
    LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.execve(spec["command"][0], spec["command"], spec["environment"])


def enter(spec):
    """In namespaces of its own (unshare): mounts, changes root and becomes the program."""
    root = spec["root"]
    mount(root, root, flags=MS_BIND)
    mount("proc", root + "/proc", "proc")
    for outside, inside in spec["mounts"]:
        mount(outside, root + inside, flags=MS_BIND)
        mount("none", root + inside, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)
    mount("none", root, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)
    os.chroot(root)
    os.chdir("/")
    become(spec)


class Container(harness.Process):
    """A container of the image as the manifests of conf/kubernetes have it: its user, no capabilities, a read-only root, process 1 of
    its own namespace. The network is this machine's, where the tests' server is. A runtime proper wants control groups as it likes
    them, which a container of a CI has not."""

    def __init__(self, image, environment, mounts=(), arguments=()):
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="pgsidecar-container-"))
        self.directory.chmod(0o755)
        root = self.directory / "rootfs"
        with tarfile.open(fileobj=io.BytesIO(image.layer)) as tar:
            tar.extractall(root, numeric_owner=True)
        root.chmod(0o755)
        (root / "proc").mkdir()
        for _, inside in mounts:  # a runtime makes the mount points
            place = root / str(inside).lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        uid, gid = (int(n) for n in image.config["User"].split(":"))
        self.spec = {"root": str(root), "mounts": [(str(outside), str(inside)) for outside, inside in mounts], "uid": uid, "gid": gid,
                     "command": [*image.config["Entrypoint"], *arguments], "environment": environment}
        self.log = self.directory / "log"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", sys.executable, __file__, "--enter", json.dumps(self.spec)],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    @property
    def pid(self):
        """As it is seen from outside; unshare's only child."""
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(harness.poll(children.read_text, what="the container starts"))

    def log_text(self):
        return self.log.read_text(errors="replace")

    def exec(self, *command):
        """Runs a command in it, as an exec probe and HEALTHCHECK do."""
        spec = {**self.spec, "root": f"/proc/{self.pid}/root", "command": list(command)}
        return subprocess.run([sys.executable, __file__, "--exec", json.dumps(spec)], capture_output=True, text=True, timeout=30)

    def signal(self, number):
        os.kill(self.pid, number)

    def wait_exit(self, timeout=40):
        return self.process.wait(timeout)

    def close(self):
        if self.running():
            self.signal(signal.SIGKILL)
            self.process.wait(20)
        shutil.rmtree(self.directory, ignore_errors=True)


def measure(image):
    """What the README says of memory and rest."""
    with harness.Postgres() as pg:
        port, admin = harness.free_port(), harness.free_port()
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
        clients = min(10000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 300)
        environment = {"DATABASE_URL": pg.url(host="localhost").partition("?")[0] + "?sslmode=verify-full", "PGSIDECAR_POOL_MIN": "0",
                       "PGSIDECAR_LISTEN": f"127.0.0.1:{port}", "PGSIDECAR_ADMIN_LISTEN": f"127.0.0.1:{admin}",
                       "PGSIDECAR_LIMITS_MAX_CLIENTS": str(clients + 100), "PGSIDECAR_AUTH_METHOD": "trust"}
        container = Container(image, environment, [(image.certificates(pg.ca, pg.directory), CERTIFICATES), ("/etc/hosts", "/etc/hosts")])
        try:
            harness.poll(lambda: container.exec("/usr/local/bin/pgsidecar", "healthcheck").returncode == 0, what=container.log_text())
            print(f"at rest {container.rss_kb() * 1024 / 1e6:.1f} MB")
            idle = []
            for n in range(clients):
                idle.append(wire.Wire(port, timeout=60))
                assert idle[-1].login(harness.USER, "", harness.DATABASE) is None
                if n == 0:
                    idle[0].value("SELECT 1")
                    print(f"once it has served somebody {container.rss_kb() * 1024 / 1e6:.1f} MB")
            print(f"with {clients} idle clients {container.rss_kb() * 1024 / 1e6:.1f} MB")
            threading.Event().wait(3)  # the last sample of what has happened
            before = container.switches()
            threading.Event().wait(10)
            print(f"{(container.switches() - before) / 10:.1f} wake-ups a second with them")
            for client in idle:
                client.sock.close()
            container.signal(signal.SIGTERM)
            assert container.wait_exit() == 0, container.log_text()
        finally:
            container.close()


def main():
    if sys.argv[1] == "--enter":
        enter(json.loads(sys.argv[2]))
    if sys.argv[1] == "--exec":
        spec = json.loads(sys.argv[2])
        os.chroot(spec["root"])
        os.chdir("/")
        become(spec)
    binary, directory = sys.argv[1:]
    commit = os.environ.get("COMMIT", "")
    image = build(binary, directory, commit)
    with tempfile.TemporaryDirectory() as other:
        assert build(binary, other, commit).digest == image.digest, "made again it is another one"
    print(f"{image.archive}: {image.digest}")
    print(f"unpacked {image.size() / 1e6:.1f} MB, of which beside libc and libssl {image.size_beside_base() / 1e6:.1f} MB; "
          f"packed {image.archive.stat().st_size / 1e6:.1f} MB")
    if os.getuid() == 0:
        measure(image)


if __name__ == "__main__":
    main()
