"""The online restart: SIGUSR2 and `pgsidecar upgrade` start the binary anew with the same sockets; the old process serves the clients that
it has. Nothing is refused, no transaction breaks, `max` holds, and what doesn't start changes nothing."""
import contextlib
import ctypes
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import psycopg
import pytest

import harness
from gate import Gate
from harness import BINARY, DATABASE, PASSWORD, USER, poll
from test_hanging import hanging_backend, hanging_backends

pytestmark = pytest.mark.skipif(harness.KIND != "pgsidecar", reason="only pgsidecar")

PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture(scope="module", autouse=True)
def subreaper():
    """The new processes, nobody's children, come to this one, which so learns how they end."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    yield
    libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class Successor:
    """A process that has taken over, in place of Proxy.process."""

    def __init__(self, pid):
        self.pid, self.returncode = pid, None

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout):
        try:
            poll(lambda: self.poll() is not None, timeout, f"process {self.pid} ends")
        except AssertionError:
            raise subprocess.TimeoutExpired("pgsidecar", timeout) from None
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Proxy(harness.Proxy):
    """A binary of its own, which can be replaced; `process` is the one that serves, `before` are the others."""

    def __init__(self, pg, config=None, **keys):
        self.before = []
        self.place = pathlib.Path(harness.tempfile.mkdtemp(prefix="pgsidecar-binary-"))
        os.link(BINARY, self.place / "pgsidecar") if os.stat(BINARY).st_dev == os.stat(self.place).st_dev else shutil.copy(BINARY, self.place)
        super().__init__(pg, config, binary=self.place / "pgsidecar", **keys)

    def ask(self):
        return subprocess.run([BINARY, "upgrade"], env={**os.environ, "PGSIDECAR_ADMIN_LISTEN": f"127.0.0.1:{self.admin_port}"}, capture_output=True,
                              text=True, timeout=40)

    def upgrade(self):
        """By the command. The process that was in charge."""
        done = self.ask()
        assert done.returncode == 0, done.stderr + self.log_text()
        return self.follow(json.loads(done.stdout)["pid"])

    def follow(self, pid):
        self.before.append(self.process)
        self.process = Successor(pid)
        return self.before[-1]

    def replace(self, content):
        """The binary is another file now, as a package manager does it."""
        new = self.place / "new"
        if isinstance(content, pathlib.Path):
            shutil.copy(content, new)
        else:
            new.write_bytes(content)
            new.chmod(0o755)
        new.rename(self.binary)

    def in_charge(self):
        """The process that answers at the admin port."""
        return self.json("/api/monitoring/compute-health")[1]["pid"]

    def clients(self):
        """Those of the process that answers at the admin port."""
        return self.json("/api/monitoring/clients")[1]["clients"]

    def close(self):
        try:
            for process in self.before:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    process.send_signal(signal.SIGTERM)
                    process.wait(40)
            super().close()
        finally:
            shutil.rmtree(self.place, ignore_errors=True)


@pytest.fixture
def start(pg):
    started = []

    def run(config=None, **keys):
        started.append(Proxy(pg, config, **keys))
        return started[-1]

    yield run
    for proxy in started:
        proxy.close()


@pytest.fixture(scope="module", autouse=True)
def accounts(_server, subreaper):
    subprocess.run([harness.postgres_bin() / "pgbench", "-i", "-q", "-s", "5", "-h", _server.directory, "-p", str(_server.port), "-U", "postgres", DATABASE],
                   check=True, capture_output=True)
    _server.sql(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {USER}", database=DATABASE)


@contextlib.contextmanager
def pgbench(proxy, *arguments, seconds):
    """Runs beside the block; fails unless all of its transactions succeeded."""
    process = subprocess.Popen([harness.postgres_bin() / "pgbench", "-n", "-j", "2", "-T", str(seconds), *arguments], env=proxy.environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
        out, error = process.communicate(timeout=seconds + 90)
    finally:
        process.kill()
    assert process.returncode == 0, error + out + proxy.log_text()[-3000:]
    assert "number of failed transactions: 0 (0.000%)" in out, out
    assert int(out.split("number of transactions actually processed: ")[1].split()[0]) > 0, out
    assert "error" not in error.lower(), error


def idle_files(proxy):
    """What it keeps open by itself."""
    poll(lambda: not proxy.clients() and proxy.stats()["totalCount"] == 0, 30, "its clients and server connections have gone")
    return harness.open_files(proxy.pid)


def expect_end(process, code=0, timeout=40):
    assert process.wait(timeout) == code


def test_reconnecting_clients_notice_nothing(start, pg):
    """100 clients that connect for each transaction, through five upgrades."""
    proxy = start({"pool": {"idleTimeoutMillis": 500}, "limits": {"maxLoginClients": 1000}})
    first, files = proxy.pid, idle_files(proxy)
    with harness.Watch(pg, f"usename = '{USER}'") as watch, pgbench(proxy, "-S", "-C", "-c", "100", seconds=12) as clients:
        for _ in range(5):
            poll(lambda: proxy.clients(), 10, "clients come to the process in charge")
            old = proxy.upgrade()
            assert proxy.in_charge() == proxy.pid != old.pid
            expect_end(old)
            assert clients.poll() is None, "pgbench was too short"
    assert watch.samples > 100 and 0 < watch.most <= 15, (watch.most, watch.samples)
    assert len({first, proxy.pid, *(process.pid for process in proxy.before)}) == 6
    poll(lambda: idle_files(proxy) <= files, 10, f"no descriptor leaks from one process to the next: {files} before, {harness.open_files(proxy.pid)} now")


def test_clients_that_stay_are_served_to_their_end(start, pg):
    """100 clients with a connection each stay with the old process while others come to the new one; both share `max`."""
    proxy = start({"pool": {"max": 10}})
    with harness.Watch(pg, f"usename = '{USER}'") as watch:
        with pgbench(proxy, "-N", "-c", "100", seconds=8), pgbench(proxy, "-S", "-C", "-c", "20", seconds=8):
            poll(lambda: len(proxy.clients()) >= 100, 20, "all have connected")
            old = proxy.upgrade()
            poll(lambda: proxy.clients(), 20, "others come to the new one")
            assert old.poll() is None
        expect_end(old)
    assert 0 < watch.most <= 10, watch.most


@pytest.mark.parametrize("most", [1, 2])
def test_both_share_a_small_pool(start, most):
    """Neither is starved by the other, though both have clients that always want a connection."""
    proxy = start({"pool": {"max": most}})
    with harness.Watch(proxy.pg, f"usename = '{USER}'") as watch:
        with pgbench(proxy, "-S", "-c", "4", seconds=6) as stays:
            poll(lambda: len(proxy.clients()) == 4, 10, "they have connected")
            old = proxy.upgrade()
            with pgbench(proxy, "-S", "-c", "4", seconds=2):
                pass
            assert old.poll() is None and stays.poll() is None
        expect_end(old)
    assert 0 < watch.most <= most, watch.most


@pytest.mark.parametrize("before,after", [(6, 2), (6, 1), (2, 6)])
def test_another_max_starves_nobody(start, before, after):
    proxy = start({"pool": {"max": before, "connectionTimeoutMillis": 4000}})
    with harness.Watch(proxy.pg, f"usename = '{USER}'") as watch:
        with pgbench(proxy, "-S", "-c", "6", seconds=6) as stays:
            poll(lambda: len(proxy.clients()) == 6, 10, "they have connected")
            proxy.config["pool"]["max"] = after
            proxy.write_config()
            old = proxy.upgrade()
            with pgbench(proxy, "-S", "-c", "4", seconds=2):
                poll(lambda: proxy.pg.count(f"usename = '{USER}'") <= after, 2, "the new one counts for both")
            assert old.poll() is None and stays.poll() is None
        expect_end(old)
    assert 0 < watch.most <= max(before, after), watch.most


@contextlib.contextmanager
def listening_while_upgraded(start, most):
    """(proxy, the old process, its client that listens, a client of the new one), with `most` server connections in all."""
    proxy = start({"pool": {"max": most, "connectionTimeoutMillis": 8000}})
    with harness.Watch(proxy.pg, f"usename = '{USER}'") as watch:
        with proxy.connect() as stays, proxy.connect() as other:
            stays.execute("LISTEN news")
            other.execute("SELECT 1")
            old = proxy.upgrade()
            old.other = other
            with proxy.connect() as new:
                yield proxy, old, stays, new
        expect_end(old)
    assert 0 < watch.most <= most, watch.most


def take_turns(connections):
    for number in range(30):
        for connection in connections:
            assert connection.execute("SELECT %s", (number,)).fetchone() == (number,)


def hears(connection, payload):
    return next(connection.notifies()).payload == payload


def test_both_listen(start):
    """Each process keeps a connection to listen on, and the third is whose who asks."""
    with listening_while_upgraded(start, most=3) as (proxy, _, stays, new):
        new.execute("LISTEN news")
        take_turns((stays, new))
        proxy.pg.sql("SELECT pg_notify('news', 'x')", database=DATABASE)
        assert hears(stays, "x") and hears(new, "x")


def test_one_listens_where_two_are_too_many(start):
    """With two connections in all, the one that isn't listened on is whose who asks."""
    with listening_while_upgraded(start, most=2) as (proxy, old, stays, new):
        for text in (" listen news", "/* heard /* by */ */ LISTEN news", "SELECT 1; LISTEN news", "LISTEN news"):
            with pytest.raises(psycopg.errors.FeatureNotSupported, match="LISTEN needs a second server connection") as refused:
                new.execute(text)
            assert "pool.max to 3" in refused.value.diag.message_hint
        take_turns((stays, new))
        new.execute("UNLISTEN *")
        proxy.pg.sql("SELECT pg_notify('news', 'x')", database=DATABASE)
        assert hears(stays, "x")
        stays.close()
        expect_end(old)
        new.execute("LISTEN news")
        proxy.pg.sql("SELECT pg_notify('news', 'y')", database=DATABASE)
        assert hears(new, "y")
        assert new.execute("SELECT 1").fetchone() == (1,)


@pytest.mark.parametrize("most", [2, 3])
def test_a_listening_client_starves_nobody(start, most):
    """The new process is under load, and one that stays listens: with three there is a connection for the others, with two the one
    that listens has to listen again."""
    with listening_while_upgraded(start, most=most) as (proxy, old, stays, new):
        with old.other, pgbench(proxy, "-S", "-c", "4", seconds=4):
            poll(lambda: len(proxy.clients()) == 5, 10, "they have connected")
            take_turns((old.other,))
            if most == 3:
                stays.execute("SELECT 1")
            else:
                with pytest.raises(psycopg.OperationalError, match="the only server connection is needed"):
                    stays.execute("SELECT 1")


def test_sessions_go_on(start):
    """In a transaction, with state of every kind; each keeps it, and leaves the old process by itself."""
    proxy = start()
    inside, listener, pinned, settings = (proxy.connect() for _ in range(4))
    inside.execute("BEGIN")
    inside.execute("CREATE TEMP TABLE t (n int) ON COMMIT DROP")
    listener.execute("LISTEN news")
    pinned.execute("SELECT pg_advisory_lock(7)")
    settings.execute("SET application_name = 'kept'")
    old = proxy.upgrade()
    with proxy.connect() as new:
        new.execute("NOTIFY news, 'from the new one'")
        assert new.execute("SELECT pg_try_advisory_lock(7)").fetchone() == (False,)
        assert len(proxy.clients()) == 1
    assert next(listener.notifies()).payload == "from the new one"
    inside.execute("INSERT INTO t VALUES (1)")
    assert inside.execute("SELECT count(*) FROM t").fetchone() == (1,)
    inside.execute("COMMIT")
    assert settings.execute("SHOW application_name").fetchone() == ("kept",)
    assert pinned.execute("SELECT pg_advisory_unlock(7)").fetchone() == (True,)
    for connection in (inside, listener, pinned):
        connection.close()
    assert old.poll() is None
    settings.close()
    expect_end(old)
    assert f"process {old.pid} has stopped, {proxy.pid} goes on" in proxy.log_text()


def test_clients_that_stay_too_long_are_drained(start):
    """After shutdown.timeoutMillis idle ones get 57P01; a transaction is finished first."""
    proxy = start({"shutdown": {"timeoutMillis": 1500}})
    idle, inside = proxy.connect(), proxy.connect()
    inside.execute("BEGIN")
    old = proxy.upgrade()
    assert idle.execute("SELECT 1").fetchone() == (1,)
    poll(lambda: "draining" in proxy.log_text(), 10, "the old one drains")
    assert inside.execute("SELECT 2").fetchone() == (2,)
    inside.execute("COMMIT")
    with pytest.raises(psycopg.OperationalError, match="due to administrator command"):
        idle.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError):  # libpq may have read the reason together with the answer to COMMIT
        inside.execute("SELECT 1")
    expect_end(old)


def test_cancel_reaches_the_old_process(start):
    """A cancel request comes to the new one, which hands it on; it stops what it was meant for and nothing else."""
    proxy = start()
    old_client = proxy.connect()

    def sleep(connection):
        with pytest.raises(psycopg.errors.QueryCanceled):
            connection.execute("SELECT pg_sleep(60)")

    old = proxy.upgrade()
    new_client = proxy.connect()
    assert len(proxy.clients()) == 1
    for connection in (old_client, new_client):
        def cancel(index, target=connection):
            if index == 0:
                return sleep(target)
            poll(lambda: proxy.pg.sql("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active'")[0][0], 10, "it runs")
            target.cancel()
        harness.threads(2, cancel)
        assert connection.execute("SELECT 1").fetchone() == (1,)
    old_client.close()
    new_client.close()
    expect_end(old)


@pytest.mark.parametrize("stays", [False, True])
def test_places_that_hang_are_not_the_new_processes(start, stays):
    """They count at the server, whoever has opened them, and whether or not a client stays until it is told to go."""
    with harness.Postgres() as own:
        proxy = start({"pool": {"max": 1, "connectionTimeoutMillis": 1500}, "shutdown": {"timeoutMillis": 500}}, url=own.url())
        client = proxy.connect()
        client.execute("SELECT 1")
        if not stays:
            client.close()
        with hanging_backend(own) as pid:
            old = proxy.upgrade()
            with pytest.raises(psycopg.OperationalError, match="1 by the other process of an online restart"):
                proxy.connect()
            assert own.backends(f"usename = '{USER}'") == [pid]
        expect_end(old, timeout=5)
        proxy.connect().close()


@pytest.mark.parametrize("most", [1, 2])
def test_what_hangs_counts_at_its_own_server_in_the_new_process_too(start, pg, most):
    with harness.Postgres() as own:
        url = own.url(sslmode="require", host=f"127.0.0.1:{own.port},127.0.0.1", port=pg.port)
        proxy = start({"pool": {"max": most, "connectionTimeoutMillis": 9000}, "shutdown": {"timeoutMillis": 500}}, url=url)
        with proxy.connect() as one, proxy.connect() as two:
            for client in (one, two)[:most]:
                client.execute("BEGIN")
        with hanging_backends(own):
            assert proxy.http("/api/admin/reconnect", "POST")[0] == 200
            poll(lambda: proxy.log_text().count("the server doesn't end it") == most, 20, "it is told of")
            old = proxy.upgrade()
            with proxy.connect() as client:
                assert client.execute("SHOW port").fetchone() == (str(pg.port),)
            assert own.count(f"usename = '{USER}'") == most
        expect_end(old, timeout=5)
        with proxy.connect() as client:
            client.execute("SELECT 1")


def test_a_process_that_waits_for_what_hangs_can_be_ended(start):
    with harness.Postgres() as own:
        proxy = start({"pool": {"max": 1, "connectionTimeoutMillis": 5000}, "shutdown": {"timeoutMillis": 500}}, url=own.url())
        with proxy.connect() as client:
            client.execute("SELECT 1")
        with hanging_backend(own):
            old = proxy.upgrade()
            with pytest.raises(subprocess.TimeoutExpired):
                old.wait(1.5)
            old.send_signal(signal.SIGTERM)
            expect_end(old, timeout=2)
            proxy.connect().close()


def test_the_file_is_looked_up_anew(start):
    """A replaced binary is what is started, with the arguments and the configuration as they are now."""
    proxy = start()
    marker = proxy.place / "was-started"
    proxy.replace(f"#!/bin/sh\necho \"$@\" > {marker}\nexec {BINARY} \"$@\"\n".encode())
    proxy.config["pool"]["max"] = 3
    proxy.config["log"] = {"format": "json"}  # takes a restart
    proxy.write_config()
    expect_end(proxy.upgrade())
    assert marker.read_text().split() == ["run", "--config", str(proxy.config_file)]
    assert "max: 3" in proxy.json("/api/monitoring/config")[1]["yaml"]
    assert '"event":"took_over"' in proxy.log_text()


def test_addresses_that_change(start):
    """Those that stay are handed over, new ones are opened, old ones closed."""
    proxy = start()
    gone, stays, new = proxy.port, harness.free_port(), harness.free_port()
    for addresses in ([f"127.0.0.1:{gone}", f"127.0.0.1:{stays}"], [f"127.0.0.1:{stays}", f"127.0.0.1:{new}"]):
        proxy.config["listen"] = addresses
        proxy.write_config()
        expect_end(proxy.upgrade())
    for port in (stays, new):
        proxy.connect(port=port).close()
    with pytest.raises(psycopg.OperationalError, match="refused"):
        proxy.connect(port=gone)


BROKEN = {
    "garbage": (b"\x7fELF and nothing", "Exec format error"),
    "exits": (b"#!/bin/sh\necho cannot work here >&2\nexit 7\n", "it ended before it was ready"),
    "missing": (None, "No such file or directory"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_binary_changes_nothing(start, what):
    proxy = start()
    content, reason = BROKEN[what]
    with proxy.connect() as connection:
        connection.execute("BEGIN")
        files = harness.open_files(proxy.pid)
        proxy.replace(content) if content else proxy.binary.unlink()
        done = proxy.ask()
        assert done.returncode == 1 and reason in done.stderr, done.stderr
        poll(lambda: reason in proxy.log_text() and "nothing has changed" in proxy.log_text(), 10, "the log says why")
        assert connection.execute("SELECT 1").fetchone() == (1,)
        poll(lambda: harness.open_files(proxy.pid) <= files, 10, "no descriptor is left open")
    proxy.connect().close()
    proxy.binary.unlink(missing_ok=True)
    shutil.copy(BINARY, proxy.binary)
    expect_end(proxy.upgrade())  # and then it works


@pytest.mark.parametrize("change, reason", [
    ({"pool": {"max": "many"}}, "pool.max"),
    ({"listen": ["192.0.2.1:6432"]}, "cannot listen on 192.0.2.1:6432"),
    ({"admin": {"listen": "192.0.2.1:5000"}}, "admin.listen: 192.0.2.1:5000"),
    ({"upstream": {"url": "postgresql://app:x@127.0.0.1:1/app?sslmode=disable"}}, "cannot use the database"),
    ({"upstream": {"password": "wrong"}, "users": {USER: {"password": PASSWORD}}}, "cannot use the database, which this process can: password authentication failed"),
    ({"upstream": {"sslrootcert": "system"}}, "cannot use the database, which this process can: connection to server"),
    ({"tls": {"mode": "require", "certificate": "/nowhere.crt", "key": "/nowhere.key"}}, "nowhere"),
])
def test_a_bad_configuration_changes_nothing(start, change, reason):
    proxy = start()
    before = dict(proxy.config)
    with proxy.connect() as connection:
        connection.execute("BEGIN")
        proxy.write_config(harness.merge(before, change))
        done = proxy.ask()
        assert done.returncode == 1 and reason in done.stderr, done.stderr
        poll(lambda: f"[upgrade_failed] upgrade: nothing has changed" in proxy.log_text() and reason in proxy.log_text(), 10, "the log says why")
        assert connection.execute("SELECT 1").fetchone() == (1,)
        assert proxy.in_charge() == proxy.pid
    proxy.write_config(before)
    expect_end(proxy.upgrade())
    proxy.connect().close()


SLOW = b"#!/bin/sh\ntrap '' TERM\nwhile :; do sleep 0.1; done\n"


def started_process(proxy):
    text = poll(lambda: "to take over" in proxy.log_text() and proxy.log_text(), 10, "one is started")
    return int(text.split(" is started as process ")[-1].split(",")[0])


def test_a_second_signal_while_one_is_starting(start):
    proxy = start()
    proxy.replace(SLOW)
    proxy.signal(signal.SIGUSR2)
    hangs = Successor(started_process(proxy))
    proxy.signal(signal.SIGUSR2)
    poll(lambda: "upgrade: one is under way" in proxy.log_text(), 10, "the second is told so")
    done = proxy.ask()
    assert done.returncode == 1 and "an upgrade is under way" in done.stderr
    poll(lambda: "was not ready within 10 s" in proxy.log_text(), 20, "its time is up")
    assert hangs.wait(10) == -signal.SIGKILL
    proxy.connect().close()
    proxy.replace(pathlib.Path(BINARY))
    expect_end(proxy.upgrade())


@pytest.mark.parametrize("how,code", [(signal.SIGTERM, 0), (signal.SIGQUIT, 3)])
def test_it_is_ended_while_one_is_starting(start, how, code):
    """It ends as ever, and what it had started ends too."""
    proxy = start()
    proxy.replace(SLOW)
    proxy.signal(signal.SIGUSR2)
    hangs = Successor(started_process(proxy))
    proxy.signal(how)
    assert proxy.wait_exit(10) == code
    assert hangs.wait(10) == -signal.SIGKILL
    assert how == signal.SIGQUIT or "it is shutting down" in proxy.log_text()


def test_the_old_process_dies_while_one_is_starting(start, pg):
    """Nobody else is there to serve."""
    with Gate(pg.port) as gate:
        proxy = start({"pool": {"connectionTimeoutMillis": 5000}}, url=pg.url(port=gate.port))
        gate.silent = True  # it isn't ready yet
        proxy.signal(signal.SIGUSR2)
        old = proxy.follow(started_process(proxy))
        old.kill()
        old.wait(10)
        waiting = socket.create_connection(("127.0.0.1", proxy.port))
        poll(lambda: "took_over" in proxy.log_text(), 10, "it takes over")
        gate.silent = False
        with waiting, proxy.connect() as client:
            assert client.execute("SELECT 1").fetchone() == (1,)
        assert proxy.in_charge() == proxy.pid
        expect_end(proxy.upgrade())
        assert proxy.stop() == 0


@pytest.mark.parametrize("at_once", [False, True], ids=["while it starts", "at once"])
def test_sigterm_with_a_delay_ends_the_restart_too(start, at_once):
    """Until the delay is over all is served, by the process that is to end and no other."""
    proxy = start({"shutdown": {"delayMillis": 60000}})
    proxy.expect_exit = 3
    proxy.replace(SLOW)
    if at_once:
        proxy.signal(signal.SIGSTOP)
    proxy.signal(signal.SIGUSR2)
    if not at_once:
        started_process(proxy)
    proxy.signal(signal.SIGTERM)
    proxy.signal(signal.SIGCONT)
    poll(lambda: "leaving" in proxy.log_text() and "nothing has changed: it is shutting down" in proxy.log_text(), 5, "the restart is given up")
    if "to take over" in proxy.log_text():
        assert Successor(started_process(proxy)).wait(5) == -signal.SIGKILL
    proxy.connect().close()
    proxy.signal(signal.SIGTERM)
    assert proxy.wait_exit(10) == 3


def test_not_while_the_one_before_still_serves(start):
    proxy = start()
    client = proxy.connect()
    old = proxy.upgrade()
    done = proxy.ask()
    assert done.returncode == 1 and f"process {old.pid}, from which this one took over, still has clients" in done.stderr
    old.send_signal(signal.SIGUSR2)
    poll(lambda: f"process {proxy.pid} has taken over already" in proxy.log_text(), 10, "the old one refuses")
    old.send_signal(signal.SIGTERM)
    expect_end(old)
    with pytest.raises(psycopg.OperationalError, match="due to administrator command"):
        client.execute("SELECT 1")
    expect_end(proxy.upgrade())


def test_not_while_databases_are_paused(start):
    proxy = start()
    assert proxy.http("/api/admin/pause", "POST")[0] == 200
    done = proxy.ask()
    assert done.returncode == 1 and "paused" in done.stderr
    assert proxy.http("/api/admin/resume", "POST")[0] == 200
    expect_end(proxy.upgrade())


def test_who_may_ask(start):
    proxy = start()
    assert proxy.http("/api/admin/upgrade")[0] == 405
    assert proxy.http("/api/admin/upgrade", "POST", {"Host": "evil.example"})[0] == 403
    assert proxy.in_charge() == proxy.pid


def test_unix_sockets_stay(start, tmp_path):
    proxy = start({"listen": [f"unix:{tmp_path}"], "admin": {}}, wait=False)
    proxy.host, proxy.port = str(tmp_path), 6432
    path = tmp_path / ".s.PGSQL.6432"
    poll(path.exists, 10, "it listens")
    with proxy.connect() as client:
        inode = path.stat().st_ino
        old = proxy.upgrade()
        assert client.execute("SELECT 1").fetchone() == (1,)
    expect_end(old)
    assert path.stat().st_ino == inode
    proxy.connect().close()
    assert proxy.stop() == 0
    assert not path.exists()


def test_a_new_process_that_is_ended_leaves_unix_sockets(start, pg, tmp_path):
    with Gate(pg.port) as gate:
        proxy = start({"listen": [f"unix:{tmp_path}"], "admin": {}}, wait=False, url=pg.url(port=gate.port))
        proxy.host, proxy.port = str(tmp_path), 6432
        poll((tmp_path / ".s.PGSQL.6432").exists, 10, "it listens")
        gate.silent = True
        proxy.signal(signal.SIGUSR2)
        new = Successor(started_process(proxy))
        poll(lambda: gate.count() == 1, 10, "it asks for the database")
        new.send_signal(signal.SIGTERM)
        new.wait(10)
        poll(lambda: "it ended before it was ready" in proxy.log_text(), 10, "it is told of")
        gate.silent = False
        proxy.connect().close()


def test_a_new_process_that_dies_later_is_told_of(start):
    proxy = start()
    client = proxy.connect()
    old = proxy.upgrade()
    proxy.process.kill()
    assert proxy.process.wait(10) == -signal.SIGKILL
    poll(lambda: f"process {proxy.pid}, which took over, has ended" in proxy.log_text(), 10, "the old one tells")
    assert client.execute("SELECT 1").fetchone() == (1,)
    client.close()
    expect_end(old)
    proxy.process, proxy.before = old, [proxy.process]


def test_metrics_begin_anew_as_after_a_restart(start):
    proxy = start()

    def series(name):
        lines = proxy.http("/metrics")[2].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    with proxy.connect() as client:
        client.execute("SELECT 1")
    poll(lambda: series("pgsidecar_queries_total") == 1, 10, "it is counted")
    begun = series("process_start_time_seconds")
    expect_end(proxy.upgrade())
    assert series("process_start_time_seconds") > begun
    assert series("pgsidecar_queries_total") == 0


def test_process_1_is_not_replaced(pg, tmp_path):
    """In a container its end is the container's."""
    (tmp_path / "pgsidecar.yaml").write_text(json.dumps({"listen": [f"127.0.0.1:{harness.free_port()}"], "upstream": {"url": pg.url()},
                                                         "admin": {"listen": "127.0.0.1:0"}}))
    with open(tmp_path / "log", "wb") as log:
        outer = subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", BINARY, "--config", tmp_path / "pgsidecar.yaml"], stdout=log, stderr=log)
    try:
        text = poll(lambda: "admin at" in (tmp_path / "log").read_text() and (tmp_path / "log").read_text(), 20, "it runs")
        port = text.split("admin at http://127.0.0.1:")[1].split()[0]
        done = subprocess.run([BINARY, "upgrade"], env={"PGSIDECAR_ADMIN_LISTEN": f"127.0.0.1:{port}"}, capture_output=True, text=True, timeout=30)
        assert done.returncode == 1 and "process 1 cannot be replaced" in done.stderr, done.stderr
        assert subprocess.run([BINARY, "shutdown"], env={"PGSIDECAR_ADMIN_LISTEN": f"127.0.0.1:{port}"}, timeout=30).returncode == 0
        assert outer.wait(20) == 0
    finally:
        outer.kill()
        outer.wait()
