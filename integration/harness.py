"""A private PostgreSQL, pgsidecar in front of it, and what tests ask of both. Also used by demo.py and bench/.

PGSIDECAR names the binary (default: build/release/pgsidecar). For checking the tests themselves HARNESS_PROXY=pgbouncer puts
Debian's PgBouncer in its place where a test doesn't need more, and HARNESS_PROXY=direct the server itself: what a test of the
protocol expects of the proxy must be what PostgreSQL does.
"""
import functools
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request

import psycopg
import yaml

import wire

ROOT = pathlib.Path(__file__).resolve().parent.parent
BINARY = pathlib.Path(os.environ.get("PGSIDECAR", ROOT / "build/release/pgsidecar")).resolve()
KIND = os.environ.get("HARNESS_PROXY", "pgsidecar")
USER, PASSWORD, DATABASE = "app", "app secret/@:%", "app"
OTHER_USER, OTHER_PASSWORD, OTHER_DATABASE = "other", "other-secret", "other"

_ports = set()
WORKER, WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))


def free_port():
    """A free port below the range from which outgoing connections take theirs; no other process of this test run gets the same."""
    while True:
        port = random.randrange(20000 + WORKER, 32000, WORKERS)
        if port in _ports:
            continue
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        _ports.add(port)
        return port


def poll(condition, timeout=10.0, what="condition", interval=0.02):
    """Waits until condition() is true and returns its value; fails after timeout seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what}")
        time.sleep(interval)


def quote(value):
    """A value in a libpq keyword string."""
    return "'" + str(value).replace("\\", "\\\\").replace("'", "\\'") + "'"


def conninfo(**keys):
    return " ".join(f"{k}={quote(v)}" for k, v in keys.items() if v is not None)


def percent(value):
    return urllib.request.quote(value, safe="")


def unprivileged():
    """Arguments of Popen for programs that refuse to be root."""
    return {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}


def postgres_bin():
    return pathlib.Path("/usr/lib/postgresql/15/bin")


def make_certificates(directory, names=("DNS:localhost", "IP:127.0.0.1")):
    """ca.crt, server.crt/.key for the names, client.crt/.key for the user `app`."""
    directory = pathlib.Path(directory)

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-days", "30", "-subj", "/CN=private CA")
    for name, subject, extension in (("server", "/CN=server", "subjectAltName=" + ",".join(names)), ("client", f"/CN={USER}", "keyUsage=digitalSignature")):
        (directory / "extensions").write_text(extension + "\n")
        openssl("req", "-new", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", subject)
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-out", f"{name}.crt",
                "-days", "30", "-extfile", "extensions")
    for file in directory.glob("*.key"):
        file.chmod(0o600)


def open_files(pid):
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except PermissionError:
        import pytest  # not there when demo.py and bench.py are
        pytest.skip("root alone sees the files of a process that leaves no core dump")


def certified(tmp_path):
    make_certificates(tmp_path)
    return {"certificate": str(tmp_path / "server.crt"), "key": str(tmp_path / "server.key"), "ca": str(tmp_path / "ca.crt")}


class Postgres:
    """A PostgreSQL 15 of its own: TLS with a CA of its own, SCRAM, a free port, a temporary directory."""

    def __init__(self, max_connections=100, plain=False, settings=None):
        self.max_connections, self.plain = max_connections, plain
        self.port = free_port()
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="pgsidecar-pg-"))
        self.directory.chmod(0o755)
        self.data = self.directory / "data"
        self.log = self.directory / "log"
        self.certificates = self.directory / "tls"
        self.certificates.mkdir()
        make_certificates(self.certificates)
        self.ca = self.certificates / "ca.crt"
        if os.getuid() == 0:
            for path in (self.directory, self.certificates, *self.certificates.iterdir()):
                shutil.chown(path, "postgres", "postgres")
        self.settings = {
            "port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": self.directory,
            "max_connections": max_connections, "fsync": "off", "synchronous_commit": "off", "full_page_writes": "off",
            "ssl": "on", "ssl_cert_file": self.certificates / "server.crt", "ssl_key_file": self.certificates / "server.key",
            "ssl_ca_file": self.ca, "password_encryption": "scram-sha-256", "shared_buffers": "64MB",
            "max_prepared_transactions": 10, "restart_after_crash": "on", "timezone": "UTC", "log_timezone": "UTC",
            **(settings or {})}
        self.process = None
        self._initdb()
        self.start()
        self._create()

    def _initdb(self):
        subprocess.run([postgres_bin() / "initdb", "-D", self.data, "-U", "postgres", "-E", "UTF8", "--locale=C.UTF-8", "-A", "trust", "-N"],
                       check=True, capture_output=True, cwd="/", **unprivileged())
        with open(self.data / "postgresql.conf", "a") as conf:
            for name, value in self.settings.items():
                conf.write(f"{name} = '{value}'\n")
        kind = "host" if self.plain else "hostssl"
        (self.data / "pg_hba.conf").write_text(
            f"local all all trust\n{kind} all all 127.0.0.1/32 scram-sha-256\n{kind} replication all 127.0.0.1/32 scram-sha-256\n")

    def _create(self):
        for user, password, database in ((USER, PASSWORD, DATABASE), (OTHER_USER, OTHER_PASSWORD, OTHER_DATABASE)):
            self.sql(f"CREATE ROLE {user} LOGIN PASSWORD '{password}'")
            self.sql(f"CREATE DATABASE {database} OWNER {user}")

    def start(self):
        log = open(self.log, "ab")
        self.process = subprocess.Popen([postgres_bin() / "postgres", "-D", self.data], stdout=log, stderr=log, cwd="/", **unprivileged())
        log.close()
        self.wait_ready()

    def wait_ready(self, timeout=60):
        def ready():
            if self.process.poll() is not None:
                raise AssertionError(f"postgres ended: {self.log.read_text()[-2000:]}")
            try:
                self.sql("SELECT 1")
                return True
            except psycopg.Error:
                return False
        poll(ready, timeout, "PostgreSQL accepts connections", 0.05)

    def stop(self, how=signal.SIGINT):
        """SIGINT: fast, SIGQUIT: immediate, SIGTERM: smart."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(60)

    def restart(self, how=signal.SIGINT):
        self.stop(how)
        self.start()

    def close(self):
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def admin(self, database="postgres", **keys):
        """A superuser's connection of its own, past the proxy."""
        return psycopg.connect(host=str(self.directory), port=self.port, user="postgres", dbname=database, autocommit=True, connect_timeout=10, **keys)

    def sql(self, statement, *parameters, database="postgres"):
        """Runs one statement as superuser, past the proxy; rows if there are any."""
        with self.admin(database) as connection:
            cursor = connection.execute(statement, parameters or None)
            return cursor.fetchall() if cursor.description else None

    def connect(self, user=USER, password=PASSWORD, database=DATABASE, **keys):
        """Directly, as an application would without the proxy."""
        return psycopg.connect(self.conninfo(user, password, database), autocommit=keys.pop("autocommit", True), **keys)

    def conninfo(self, user=USER, password=PASSWORD, database=DATABASE, sslmode="require", **keys):
        return conninfo(host="127.0.0.1", port=self.port, user=user, password=password, dbname=database, sslmode=sslmode, **keys)

    def url(self, user=USER, password=PASSWORD, database=DATABASE, sslmode="verify-full", host="127.0.0.1", port=None):
        url = f"postgresql://{percent(user)}:{percent(password)}@{host}:{port or self.port}/{database}?sslmode={sslmode}"
        return url + (f"&sslrootcert={self.ca}" if sslmode.startswith("verify") else "")

    BACKENDS = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND client_port > 0"

    def count(self, where="true"):
        """Server connections by TCP, that is, the proxy's."""
        return self.sql(f"{self.BACKENDS} AND ({where})")[0][0]

    def backends(self, where="true"):
        return [row[0] for row in self.sql(f"SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND client_port > 0 AND ({where}) ORDER BY 1")]


class Watch:
    """Counts server connections as fast as it can while the block runs: `most`, and `without_tls`."""

    def __init__(self, pg, where="true"):
        self.sql = ("SELECT count(*), count(*) FILTER (WHERE NOT coalesce(ssl, false)) FROM pg_stat_activity LEFT JOIN pg_stat_ssl USING (pid) "
                    f"WHERE backend_type = 'client backend' AND client_port > 0 AND ({where})")
        self.connection = pg.admin()
        self.most = self.without_tls = self.samples = 0

    def __enter__(self):
        self.running = True
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        return self

    def _run(self):
        while self.running:
            try:
                count, plain = self.connection.execute(self.sql).fetchone()
            except psycopg.Error:
                return
            self.most, self.without_tls = max(self.most, count), max(self.without_tls, plain)
            self.samples += 1
            time.sleep(0.003)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()
        self.connection.close()


def threads(count, work):
    """Runs work(index) in that many threads; raises the first exception; returns the results by index."""
    results, errors = [None] * count, []

    def run(index):
        try:
            results[index] = work(index)
        except BaseException as error:  # noqa: B902 a failed assertion too
            errors.append(error)

    running = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(count)]
    for thread in running:
        thread.start()
    deadline = time.monotonic() + 120
    for thread in running:
        thread.join(max(0.1, deadline - time.monotonic()))
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in running), "a client hangs"
    return results


class Process:
    """A proxy process and what is known of it from outside."""

    port = None
    host = "127.0.0.1"

    @property
    def pid(self):
        return self.process.pid

    def status(self, field):
        """A number from /proc/PID/status: VmRSS and VmHWM in KB, Threads."""
        for line in pathlib.Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1])
        raise KeyError(field)

    def rss_kb(self):
        try:
            rollup = pathlib.Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        except PermissionError:  # as of any process that leaves no core dump
            return self.status("VmRSS")
        return int(re.search(r"^Rss:\s+(\d+)", rollup, re.M)[1])

    def cpu_seconds(self):
        """User and system time of all threads that live, in nanosecond steps."""
        total = 0
        for task in pathlib.Path(f"/proc/{self.pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9

    def switches(self):
        """How often its threads went to sleep."""
        total = 0
        for task in pathlib.Path(f"/proc/{self.pid}/task").iterdir():
            for line in (task / "status").read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    total += int(line.split()[1])
        return total

    def open_files(self):
        return open_files(self.pid)

    def signal(self, number):
        self.process.send_signal(number)

    def running(self):
        return self.process.poll() is None

    def conninfo(self, user=USER, password=PASSWORD, database=DATABASE, **keys):
        keys = {"sslmode": "disable", "connect_timeout": 20, **keys}
        return conninfo(host=keys.pop("host", self.host), port=keys.pop("port", self.port), user=user, password=password, dbname=database, **keys)

    def connect(self, user=USER, password=PASSWORD, database=DATABASE, autocommit=True, prepare_threshold=5, **keys):
        return psycopg.connect(self.conninfo(user, password, database, **keys), autocommit=autocommit, prepare_threshold=prepare_threshold)

    def url(self, user=USER, password=PASSWORD, database=DATABASE, host=None):
        return f"postgresql://{percent(user)}:{percent(password)}@{host or self.host}:{self.port}/{database}?sslmode=disable"

    def environment(self, user=USER, password=PASSWORD, database=DATABASE):
        """PG* variables for psql and pgbench."""
        return {**os.environ, "PGHOST": self.host, "PGPORT": str(self.port), "PGUSER": user, "PGPASSWORD": password, "PGDATABASE": database,
                "PGSSLMODE": "disable", "PGCONNECT_TIMEOUT": "20"}


def psql(environment, *arguments):
    return subprocess.run(["psql", "-XAtq", "-v", "ON_ERROR_STOP=1", *arguments], env=environment, capture_output=True, text=True, timeout=60)


def raw(proxy, user=USER, password=PASSWORD, database=DATABASE, timeout=30, **parameters):
    """A raw connection that has logged in."""
    w = wire.Wire(proxy.port, timeout=timeout)
    failure = w.login(user, password, database, **parameters)
    assert failure is None, failure.error
    return w


def curl(proxy, path, *arguments):
    """(status, body)"""
    done = subprocess.run(["curl", "-sS", "-m", "10", "-w", "\n%{http_code}", *arguments, f"http://127.0.0.1:{proxy.admin_port}{path}"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


SANITIZER = re.compile(r"ERROR: AddressSanitizer|WARNING: ThreadSanitizer|runtime error:|LeakSanitizer|Assertion .* failed|terminate called")


class Proxy(Process):
    """pgsidecar. `config` is laid over a default that is in front of `pg`; a key set to None is left out."""

    kind = "pgsidecar"

    def __init__(self, pg=None, config=None, environment=None, url=None, wait=True, binary=BINARY, arguments=(), user=None):
        self.pg, self.binary = pg, pathlib.Path(binary)
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="pgsidecar-"))
        self.port, self.admin_port = free_port(), free_port()
        self.log = self.directory / "log"
        self.config_file = self.directory / "pgsidecar.yaml"
        base = {"listen": [f"127.0.0.1:{self.port}"],
                "upstream": {"url": url or pg.url()},
                "admin": {"listen": f"127.0.0.1:{self.admin_port}"},
                "pool": {"min": 0}}
        if sanitized(binary):
            base["alerts"] = {"memoryMb": 100000}
        self.config = merge(base, config or {})
        self.write_config()
        self.extra, self.arguments = environment or {}, list(arguments)
        self.expect_exit = 0
        self.start(wait)

    def write_config(self, config=None):
        self.config = config or self.config
        self.config_file.write_text(yaml.safe_dump(self.config))

    def command_environment(self):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "DATABASE_URL", "NOTIFY_SOCKET"))}
        return {**clean, **self.extra}

    def start(self, wait=True):
        log = open(self.log, "ab")
        self.started_at = time.monotonic()
        self.process = subprocess.Popen([self.binary, "run", "--config", self.config_file, *self.arguments], stdout=log, stderr=log,
                                        stdin=subprocess.DEVNULL, env=self.command_environment(), cwd=self.directory)
        log.close()
        if wait:
            self.wait_listening()

    def wait_listening(self, timeout=30):
        def listening():
            if self.process.poll() is not None:
                raise AssertionError(f"pgsidecar ended with {self.process.returncode}:\n{self.log_text()[-4000:]}")
            for port in (self.port, self.admin_port):
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                except OSError:
                    return False
            return True
        poll(listening, timeout, "pgsidecar listens", 0.001)
        self.listening_at = time.monotonic()

    def log_text(self):
        """What is in the log once nothing is added to it any more: a thread of its own writes it."""
        size = -1
        for _ in range(50):
            if not self.log.exists() or size == (size := self.log.stat().st_size):
                break
            time.sleep(0.02)
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def command(self, *arguments, environment=None, timeout=30):
        """Runs a subcommand of the binary with the same configuration."""
        return subprocess.run([self.binary, *arguments], env={**self.command_environment(), **(environment or {})}, capture_output=True, text=True,
                              timeout=timeout, cwd=self.directory)

    def http(self, path, method="GET", headers=None, timeout=10):
        """(status, headers, text)"""
        request = urllib.request.Request(f"http://127.0.0.1:{self.admin_port}{path}", method=method, headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, response.headers, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read().decode()

    def json(self, path):
        status, _, body = self.http(path)
        return status, json.loads(body)

    def stats(self):
        return self.json("/api/monitoring/pool-stats")[1]

    def wait_exit(self, timeout=40):
        return self.process.wait(timeout)

    def stop(self, number=signal.SIGTERM, timeout=40):
        """Ends it and returns the exit code (negative: the signal that killed it)."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise AssertionError(f"pgsidecar didn't stop within {timeout} s:\n{self.log_text()[-3000:]}")
        return self.process.returncode

    def close(self):
        """Stops it and fails if it hadn't survived or a sanitizer has spoken."""
        was_running = self.running()
        try:
            if was_running:
                self.signal(signal.SIGTERM)
                try:
                    self.process.wait(2)
                except subprocess.TimeoutExpired:
                    self.signal(signal.SIGTERM)  # a test's clients may still be there: the second one ends it
                    self.stop()
            text = self.log_text()
            found = SANITIZER.search(text)
            assert not found, text[max(0, found.start() - 200):found.start() + 6000]
            assert self.process.returncode in (0, 3, self.expect_exit), f"pgsidecar ended with {self.process.returncode}:\n{text[-4000:]}"
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)


def merge(base, over):
    result = dict(base)
    for key, value in over.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merge(result[key], value)
        else:
            result[key] = value
    return result


@functools.cache
def sanitized(binary=BINARY):
    """True for a build with a sanitizer, whose memory and speed mean nothing."""
    linked = subprocess.run(["ldd", binary], capture_output=True, text=True).stdout
    return "libasan" in linked or "libtsan" in linked or "libclang_rt" in linked


class PgBouncer(Process):
    """Debian's PgBouncer in transaction mode with the same pool, for comparison."""

    kind = "pgbouncer"

    def __init__(self, pg, config=None, tls=True, **_):
        pool = (config or {}).get("pool", {})
        self.pg = pg
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="pgsidecar-bouncer-"))
        self.directory.chmod(0o755)
        self.port = free_port()
        self.log = self.directory / "log"
        ini = self.directory / "pgbouncer.ini"
        limits = (config or {}).get("limits", {})
        ini.write_text(f"""[databases]
* = host=127.0.0.1 port={pg.port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {self.port}
unix_socket_dir =
auth_type = {(config or {}).get("auth", {}).get("method", "scram-sha-256")}
auth_file = {self.directory}/users
admin_users = {USER}
pool_mode = {pool.get("mode", "transaction")}
default_pool_size = {pool.get("max", 15)}
max_client_conn = {limits.get("maxClients", 2000)}
ignore_startup_parameters = extra_float_digits,search_path,statement_timeout
server_tls_sslmode = {"verify-full" if tls else "disable"}
server_tls_ca_file = {pg.ca}
server_idle_timeout = 600
log_connections = 0
log_disconnections = 0
""")
        (self.directory / "users").write_text(f'"{USER}" "{PASSWORD}"\n"{OTHER_USER}" "{OTHER_PASSWORD}"\n')
        log = open(self.log, "ab")
        self.started_at = time.monotonic()
        self.process = subprocess.Popen(["/usr/sbin/pgbouncer", ini], stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd="/", **unprivileged())
        log.close()
        self.wait_listening()

    def wait_listening(self, timeout=30):
        def listening():
            assert self.process.poll() is None, self.log_text()
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return True
            except OSError:
                return False
        poll(listening, timeout, "pgbouncer listens", 0.001)
        self.listening_at = time.monotonic()

    def log_text(self):
        return self.log.read_text(errors="replace")

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(10)

    def close(self):
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)


class Direct(Process):
    """No proxy at all."""

    kind = "direct"

    def __init__(self, pg):
        self.pg, self.port, self.process = pg, pg.port, pg.process

    def close(self):
        pass


def make_proxy(pg, config=None, **keys):
    """What HARNESS_PROXY says."""
    if KIND == "direct":
        return Direct(pg)
    if KIND == "pgbouncer":
        return PgBouncer(pg, config)
    return Proxy(pg, config, **keys)
