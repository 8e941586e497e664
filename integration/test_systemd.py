"""systemd's side of the process, played: NOTIFY_SOCKET, WATCHDOG_USEC, LISTEN_FDS; systemd-socket-activate for real; and the units in
conf/systemd held against the binary."""
import configparser
import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import psycopg
import pytest

import harness
from harness import BINARY, ROOT, poll
from test_upgrade import Successor, subreaper  # noqa: F401 a fixture

pytestmark = pytest.mark.skipif(harness.KIND != "pgsidecar", reason="only pgsidecar")

UNITS = ROOT / "conf/systemd"


class Manager:
    """Receives what a service says, with the pid that says it, as NotifyAccess=main has it."""

    def __init__(self, address):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.bind(address.replace("@", "\0", 1))
        self.messages = []  # (pid, {name: value})
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self):
        while True:
            try:
                data, ancillary, _, _ = self.socket.recvmsg(4096, 256)
            except OSError:
                return
            if not data:
                return  # closed
            pid = int.from_bytes(ancillary[0][2][:4], sys.byteorder)
            self.messages.append((pid, dict(line.split("=", 1) for line in data.decode().splitlines())))

    def of(self, name, pid=None):
        return [fields[name] for who, fields in self.messages if name in fields and pid in (None, who)]

    def wait(self, name, value="1", pid=None, count=1, timeout=10):
        poll(lambda: self.of(name, pid).count(value) >= count, timeout, f"{count} times {name}={value}; there came {self.messages}")

    def close(self):
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    address = str(tmp_path / "notify") if request.param == "path" else f"@pgsidecar-test-{os.getpid()}-{tmp_path.name}"
    made = Manager(address)
    made.address = address
    yield made
    made.close()


def service(proxies, manager, config=None, **environment):
    return proxies(config, environment={"NOTIFY_SOCKET": manager.address, **environment})


def test_its_life_is_told(proxies, manager):
    proxy = service(proxies, manager)
    manager.wait("READY")
    with proxy.connect() as connection:
        connection.execute("SELECT 1")
        poll(lambda: any(text.startswith("1 clients") for text in manager.of("STATUS")), 10, "the status tells of the client")
        proxy.signal(signal.SIGHUP)
        manager.wait("RELOADING")
        manager.wait("READY", count=2)
        told = [fields for _, fields in manager.messages if "RELOADING" in fields][0]
        assert abs(int(told["MONOTONIC_USEC"]) / 1e6 - time.clock_gettime(time.CLOCK_MONOTONIC)) < 60
        connection.execute("BEGIN")
        proxy.signal(signal.SIGTERM)
        manager.wait("STOPPING")
        connection.execute("COMMIT")
    assert proxy.wait_exit() == 0
    order = [next(name for name in ("READY", "RELOADING", "STOPPING") if name in fields) for _, fields in manager.messages
             if {"READY", "RELOADING", "STOPPING"} & set(fields)]
    assert order == ["READY", "RELOADING", "READY", "STOPPING"]
    assert {who for who, _ in manager.messages} == {proxy.pid}


def test_a_bad_reload_is_over_too(proxies, manager):
    proxy = service(proxies, manager)
    manager.wait("READY")
    proxy.config_file.write_text("pool: {max: many}\n")
    proxy.signal(signal.SIGHUP)
    manager.wait("READY", count=2)
    assert manager.of("RELOADING") == ["1"]


def test_ready_is_not_told_before_it_listens(proxies, manager):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        proxy = proxies({"listen": [f"127.0.0.1:{taken.getsockname()[1]}"]}, environment={"NOTIFY_SOCKET": manager.address}, wait=False)
        proxy.expect_exit = 1
        assert proxy.wait_exit() == 1
    assert not manager.messages


def test_without_a_watchdog_none_is_fed(proxies, manager):
    proxy = service(proxies, manager, WATCHDOG_USEC="200000", WATCHDOG_PID="1")
    manager.wait("READY")
    with proxy.connect() as connection:
        for n in range(10):
            connection.execute("SELECT pg_sleep(0.1)")
    assert manager.of("WATCHDOG") == []


def test_the_watchdog_is_fed_by_both_loops(proxies, manager):
    """A data loop that stands still isn't covered by the control loop that goes on."""
    proxy = service(proxies, manager, WATCHDOG_USEC="400000")
    manager.wait("WATCHDOG", count=3)

    with stopped_thread(proxy.pid):
        before = len(manager.of("WATCHDOG"))
        poll(lambda: proxy.http("/health/live")[0] == 503, 10, "the control loop answers that the data loop doesn't")
        assert len(manager.of("WATCHDOG")) <= before + 1  # one may have been asked for before
    manager.wait("WATCHDOG", count=len(manager.of("WATCHDOG")) + 2)


@contextlib.contextmanager
def stopped_thread(tid):
    """A thread alone stands still, by ptrace."""
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    seize, interrupt, detach = 0x4206, 0x4207, 17
    assert libc.ptrace(seize, tid, None, None) == 0, os.strerror(ctypes.get_errno())
    try:
        assert libc.ptrace(interrupt, tid, None, None) == 0
        os.waitpid(tid, 0x40000000)  # __WALL
        yield
    finally:
        libc.ptrace(detach, tid, None, None)


def test_an_online_restart_moves_the_main_process(proxies, manager, subreaper):  # noqa: F811
    proxy = service(proxies, manager, WATCHDOG_USEC="400000")
    first = proxy.pid
    manager.wait("READY")
    client = proxy.connect()
    done = proxy.command("upgrade", environment={"PGSIDECAR_ADMIN_LISTEN": f"127.0.0.1:{proxy.admin_port}"})
    assert done.returncode == 0, done.stderr
    second = int(re.search(r'"pid":(\d+)', done.stdout)[1])
    manager.wait("MAINPID", str(second))
    manager.wait("READY", pid=second)
    manager.wait("WATCHDOG", pid=second, count=2)
    moved = next(i for i, (_, fields) in enumerate(manager.messages) if "MAINPID" in fields)
    assert {who for who, _ in manager.messages[:moved + 1]} == {first}, "the new one speaks before it is the main process"
    client.close()
    assert proxy.wait_exit() == 0
    assert {who for who, _ in manager.messages[moved + 1:]} == {second}, "the old one speaks still"
    assert "STOPPING" not in {name for _, fields in manager.messages for name in fields}
    proxy.process = Successor(second)


# --- socket activation

LAUNCHER = r"""
import fcntl, os, sys
names, first, *command = sys.argv[1:]
fds = [int(fd) for fd in first.split(",")]
moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, 50) for fd in fds]
for at, fd in enumerate(moved):
    os.dup2(fd, 3 + at, inheritable=True)
os.closerange(3 + len(fds), 100)
os.environ.update(LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=names, LISTEN_PID=os.environ.get("FORCE_PID") or str(os.getpid()))
os.execv(command[0], command)
"""


class Activated(harness.Proxy):
    """Started with sockets that somebody else has opened."""

    def __init__(self, pg, sockets, config=None, **keys):
        self.sockets = sockets  # {name: socket}
        super().__init__(pg, config, **keys)

    def start(self, wait=True):
        fds = [one.fileno() for _, one in self.sockets]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([sys.executable, "-c", LAUNCHER, ":".join(name for name, _ in self.sockets), ",".join(map(str, fds)), self.binary,
                                             "--config", self.config_file], stdout=log, stderr=log, env=self.command_environment(), pass_fds=fds)
        if wait:
            poll(lambda: "admin at" in self.log_text() or not self.running(), 30, "it listens")
            assert self.running(), self.log_text()


def listening(port=0, host="127.0.0.1"):
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((host, port))
    made.listen(64)
    return made


@pytest.fixture
def activate(pg):
    started = []

    def run(sockets, config=None, **keys):
        started.append(Activated(pg, sockets, config, **keys))
        return started[-1]

    yield run
    for proxy in started:
        proxy.close()


def test_passed_sockets_are_used(activate, tmp_path):
    """For clients, a unix socket too; the one named admin for the admin port; what `listen` has besides is bound."""
    clients, admin, local = listening(), listening(), socket.socket(socket.AF_UNIX)
    path = tmp_path / ".s.PGSQL.5432"
    local.bind(str(path))
    local.listen()
    own = harness.free_port()
    port, admin_port = (one.getsockname()[1] for one in (clients, admin))
    proxy = activate([("clients", clients), ("admin", admin), ("", local)],
                     {"listen": [f"127.0.0.1:{port}", f"127.0.0.1:{own}"], "admin": {"listen": f"127.0.0.1:{admin_port}"}})
    proxy.admin_port = admin_port
    for where in ({"port": port}, {"port": own}, {"host": str(tmp_path), "port": 5432}):
        with proxy.connect(**where) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    assert proxy.http("/health/live")[0] == 200
    for text in (f"listening on 127.0.0.1:{port}, a socket that was passed on (LISTEN_FDS)", f"listening on {path}, a socket that was passed on (LISTEN_FDS)",
                 f"listening on 127.0.0.1:{own}\n"):
        assert text in proxy.log_text()
    assert proxy.stop() == 0
    assert path.exists(), "it is systemd's"
    with socket.create_connection(("127.0.0.1", port)):
        pass  # waits in the socket, which is there


def test_a_passed_wildcard_covers_what_is_configured(activate):
    anywhere = listening(host="0.0.0.0")
    port = anywhere.getsockname()[1]
    proxy = activate([("clients", anywhere)], {"listen": [f"127.0.0.1:{port}"]})
    proxy.connect(port=port).close()


def test_clients_wait_while_it_is_not_there(activate, proxies):
    """systemd's socket takes them before the start and between two."""
    clients = listening()
    port = clients.getsockname()[1]
    early = threading.Thread(target=lambda: results.append(psycopg.connect(
        harness.conninfo(host="127.0.0.1", port=port, user=harness.USER, password=harness.PASSWORD, dbname=harness.DATABASE, sslmode="disable"))))
    results = []
    early.start()
    proxy = activate([("clients", clients)], {"listen": [f"127.0.0.1:{port}"]})
    early.join(20)
    assert results and results[0].execute("SELECT 1").fetchone() == (1,)
    results[0].close()
    assert proxy.stop() == 0
    early = threading.Thread(target=lambda: results.append(proxy.connect(port=port)))
    early.start()
    proxy.start()
    early.join(20)
    assert len(results) == 2
    results[1].close()


def test_passed_sockets_outlive_an_online_restart(activate, subreaper):  # noqa: F811
    """Those that `listen` doesn't have, too."""
    clients, admin = listening(), listening()
    port, admin_port = (one.getsockname()[1] for one in (clients, admin))
    proxy = activate([("clients", clients), ("admin", admin)], {"admin": {"listen": f"127.0.0.1:{admin_port}"}})
    for _ in range(2):
        done = proxy.command("upgrade", environment={"PGSIDECAR_ADMIN_LISTEN": f"127.0.0.1:{admin_port}"})
        assert done.returncode == 0, done.stderr + proxy.log_text()
        assert proxy.wait_exit() == 0
        proxy.process = Successor(int(re.search(r'"pid":(\d+)', done.stdout)[1]))
        for where in (port, proxy.port):
            proxy.connect(port=where).close()
    assert proxy.log_text().count(f"listening on 127.0.0.1:{port}, a socket that was passed on") == 3


def test_sockets_of_another_process_are_not_taken(activate):
    """LISTEN_PID is a parent's: the variables came by inheritance."""
    clients = listening()
    proxy = activate([("clients", clients)], environment={"FORCE_PID": "1"})
    assert "passed on" not in proxy.log_text()
    proxy.connect().close()


def test_what_is_no_listening_socket_is_a_clear_error(activate):
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    proxy = activate([("clients", connected)], wait=False)
    proxy.expect_exit = 1
    assert proxy.wait_exit() == 1
    assert 'descriptor 3 ("clients") is no stream socket that listens: the .socket unit takes ListenStream= and Accept=no' in proxy.log_text()


@pytest.mark.skipif(not shutil.which("systemd-socket-activate"), reason="no systemd-socket-activate")
def test_by_systemds_own_launcher(pg):
    """systemd-socket-activate opens the sockets and starts it at the first connection."""
    port, admin_port = harness.free_port(), harness.free_port()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(["systemd-socket-activate", "-l", f"127.0.0.1:{port}", "-l", f"127.0.0.1:{admin_port}", "--fdname=clients:admin",
                                    "-E", f"DATABASE_URL={pg.url()}", "-E", f"PGSIDECAR_ADMIN_LISTEN=127.0.0.1:{admin_port}",
                                    "-E", f"PGSIDECAR_LISTEN=127.0.0.1:{port}", BINARY], stdout=log, stderr=log)
        try:
            def connect():
                try:
                    return psycopg.connect(pg.conninfo(sslmode="disable").replace(str(pg.port), str(port)), autocommit=True)
                except psycopg.OperationalError as error:
                    assert "refused" in str(error), error  # not opened yet
            with poll(connect, 20, "it is started by the first client") as connection:
                assert connection.execute("SELECT 1").fetchone() == (1,)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()


# --- the units

def unit(name):
    parser = configparser.ConfigParser(strict=False, interpolation=None, comment_prefixes=("#", ";"), delimiters=("=",))
    parser.optionxform = str
    parser.read(UNITS / name)
    return parser


def default(key):
    """Of conf/pgsidecar.yaml."""
    section, name = key.split(".")
    return harness.yaml.safe_load((ROOT / "conf/pgsidecar.yaml").read_text())[section][name]


def test_the_service_fits_the_binary(tmp_path):
    service_unit = unit("pgsidecar.service")["Service"]
    assert service_unit["Type"] == "notify" and service_unit["NotifyAccess"] == "main"
    program, *arguments = service_unit["ExecStart"].split()
    assert pathlib.Path(program).name == "pgsidecar"
    password = tmp_path / "password"
    password.write_text("from a credential\n")
    config = tmp_path / "pgsidecar.yaml"
    config.write_text("upstream: {url: 'postgresql://app@db.example.com/app', password: '${file:" + str(password) + "}'}\n")
    assert arguments[0] == "--config"
    checked = subprocess.run([BINARY, "check", *[str(config) if argument == "/etc/pgsidecar/pgsidecar.yaml" else argument for argument in arguments]],
                             capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert checked.returncode == 0, checked.stderr
    assert service_unit["ExecReload"].split() == ["/bin/kill", "-HUP", "$MAINPID"]
    assert float(service_unit["TimeoutStopSec"]) * 1000 > default("shutdown.timeoutMillis") + 5000
    mistaken = subprocess.run([BINARY, "check", "--config", "/nowhere"], capture_output=True)
    assert service_unit["Restart"] == "on-failure" and service_unit["RestartPreventExitStatus"] == str(mistaken.returncode) == "2"
    assert float(service_unit["WatchdogSec"]) >= 10
    for name, value in (("DynamicUser", "yes"), ("ProtectSystem", "strict"), ("NoNewPrivileges", "yes"), ("CapabilityBoundingSet", "")):
        assert service_unit[name] == value
    name = service_unit["LoadCredential"].split(":")[0]
    assert f"${{file:/run/credentials/pgsidecar.service/{name}}}" in (UNITS / "pgsidecar.service").read_text()


def test_the_socket_fits_the_defaults():
    socket_unit = unit("pgsidecar.socket")["Socket"]
    assert [socket_unit["ListenStream"]] == harness.yaml.safe_load((ROOT / "conf/pgsidecar.yaml").read_text())["listen"]
    assert socket_unit["FileDescriptorName"] != "admin"
    assert "Accept" not in socket_unit


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
def test_systemd_understands_the_units(tmp_path):
    for file in UNITS.iterdir():
        text = file.read_text().replace("/usr/local/bin/pgsidecar", str(BINARY))
        (tmp_path / file.name).write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *tmp_path.glob("pgsidecar.*")], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    (tmp_path / "pgsidecar.service").write_text((tmp_path / "pgsidecar.service").read_text() + "\n[Service]\nNoSuchKey=1\n")
    again = subprocess.run(["systemd-analyze", "verify", "--man=no", tmp_path / "pgsidecar.service"], capture_output=True, text=True)
    assert "NoSuchKey" in again.stderr  # it does look
