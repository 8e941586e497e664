"""A Job's pod: a script beside the sidecar; the pod is complete when both have ended. And what comes before: the start."""
import contextlib
import http.server
import os
import pathlib
import signal
import subprocess
import threading
import time

import psycopg
import pytest

import harness
import wire
from harness import DATABASE, PASSWORD, USER

# What a Job's container runs. $PGSIDECAR is the binary, PG* are psql's.
WAIT = '"$PGSIDECAR" wait --max 30s\n'
MIGRATION = 'psql -Xq -v ON_ERROR_STOP=1 -c "CREATE TABLE IF NOT EXISTS migrated (n int)" -c "INSERT INTO migrated VALUES (1)"\n'
FAILING = 'psql -Xq -v ON_ERROR_STOP=1 -c "SELECT 1/0"\n'


def job(proxy, script, **environment):
    """Runs the script with sh; its exit code."""
    done = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, timeout=60,
                          env={**proxy.environment(), "PGSIDECAR": str(proxy.binary), "PGSIDECAR_CONFIG": str(proxy.config_file),
                               "ADMIN": f"http://127.0.0.1:{proxy.admin_port}", **environment})
    print(done.stdout, done.stderr)
    return done.returncode


@pytest.mark.parametrize("script, code", [(MIGRATION, 0), (FAILING, 1)])
def test_exits_when_the_last_client_has_left(proxies, script, code):
    proxy = proxies({"pool": {"allowExitOnIdle": True, "idleTimeoutMillis": 300}})
    assert job(proxy, WAIT + script) == code
    assert proxy.wait_exit(20) == 0
    assert "pool.allowExitOnIdle" in proxy.log_text()


@pytest.mark.parametrize("script", ["exit 1\n", "psql -Xqc 'SELECT 1' -p 1\n", "PGPASSWORD=wrong psql -Xqc 'SELECT 1'\n"])
def test_exits_though_no_client_has_come(proxies, script):
    """The script fails before it connects, connects elsewhere, or can't log in."""
    proxy = proxies({"pool": {"allowExitOnIdle": True, "idleTimeoutMillis": 300}, "shutdown": {"exitIfUnusedMillis": 2000}})
    assert job(proxy, WAIT + script) != 0
    assert proxy.wait_exit(20) == 0
    assert "shutdown.exitIfUnusedMillis" in proxy.log_text()


def test_whom_the_database_refuses_was_no_client(proxies, pg):
    """Neither does it keep the pod from ending, nor does it end the pod while the database is still coming."""
    dead = {"url": f"postgresql://{USER}:{harness.percent(PASSWORD)}@127.0.0.1:{harness.free_port()}/{DATABASE}"}
    proxy = proxies({"pool": {"connectionTimeoutMillis": 300}, "shutdown": {"exitIfUnusedMillis": 2000}}, **dead)
    assert job(proxy, "psql -Xqc 'SELECT 1'\n") != 0
    assert proxy.wait_exit(20) == 0
    assert "shutdown.exitIfUnusedMillis" in proxy.log_text()
    proxy = proxies({"pool": {"connectionTimeoutMillis": 300, "allowExitOnIdle": True, "idleTimeoutMillis": 200}}, **dead)
    assert job(proxy, "psql -Xqc 'SELECT 1'\n") != 0
    with pytest.raises(subprocess.TimeoutExpired):
        proxy.wait_exit(1)


def test_unused_is_from_the_start_and_never_after_a_client(proxies):
    proxy = proxies({"shutdown": {"exitIfUnusedMillis": 1000}})
    with proxy.connect() as connection:
        connection.execute("SELECT 1")
    with pytest.raises(subprocess.TimeoutExpired):
        proxy.wait_exit(1.5)
    assert proxy.stop() == 0
    proxy = proxies({"shutdown": {"exitIfUnusedMillis": 500}})
    with wire.Wire(proxy.port) as undecided:  # its login is under way when the time is up
        undecided.send(wire.request(wire.SSL_REQUEST))
        assert undecided.sock.recv(1) == b"N"
        with pytest.raises(subprocess.TimeoutExpired):
            proxy.wait_exit(1)
        assert undecided.login(USER, PASSWORD, DATABASE) is None
    with pytest.raises(subprocess.TimeoutExpired):
        proxy.wait_exit(0.5)


def test_port_probes_do_not_keep_it_from_ending(proxies):
    """A tcpSocket probe each 100 ms isn't a client, neither at the beginning nor after the last."""
    for config, client in (({"shutdown": {"exitIfUnusedMillis": 700}}, False), ({"pool": {"allowExitOnIdle": True, "idleTimeoutMillis": 700}}, True)):
        proxy = proxies(config)
        if client:
            proxy.connect().close()
        deadline = time.monotonic() + 20
        while proxy.running() and time.monotonic() < deadline:
            try:
                wire.Wire(proxy.port).sock.close()
            except OSError:
                pass
            time.sleep(0.1)
        assert proxy.wait_exit(1) == 0


@pytest.mark.parametrize("config, client", [({"shutdown": {"exitIfUnusedMillis": 300}}, False),
                                            ({"pool": {"allowExitOnIdle": True, "idleTimeoutMillis": 300}}, True)])
def test_who_says_nothing_is_no_client(proxies, config, client):
    proxy = proxies(config)
    with wire.Wire(proxy.port):
        if client:
            proxy.connect().close()
        assert proxy.wait_exit(5) == 0


def test_allow_exit_on_idle_is_of_the_process(proxies):
    proxy = proxies({"pool": {"allowExitOnIdle": True}})

    def mistakes(config):
        proxy.write_config(harness.merge(before, config))
        done = proxy.command("check", "--config", proxy.config_file)
        return done.returncode, done.stderr
    before = proxy.config
    for section in ("databases", "users"):
        code, told = mistakes({section: {"app": {"pool": {"allowExitOnIdle": True}}}})
        assert code == 2 and f"{section}.app.pool.allowExitOnIdle: counts for the whole process: pool.allowExitOnIdle" in told, told
    code, told = mistakes({"pool": {"idleTimeoutMillis": 0}})
    assert code == 2 and "pool.allowExitOnIdle: waits until there was no client for pool.idleTimeoutMillis, and that is 0, never" in told, told
    proxy.write_config(harness.merge(before, {"databases": {"app": {"pool": {"idleTimeoutMillis": 0}}}}))
    shown = proxy.command("check", "--config", proxy.config_file)
    assert shown.returncode == 0 and shown.stdout.count("allowExitOnIdle") == 1


def test_waiting_for_the_end_costs_nothing(proxies):
    """Not a look at the clock each 100 ms."""
    if harness.sanitized():
        pytest.skip("a sanitizer has a thread of its own")
    proxy = proxies({"pool": {"allowExitOnIdle": True, "idleTimeoutMillis": 600000}, "shutdown": {"exitIfUnusedMillis": 600000}})

    def sleeps():
        before = proxy.switches()
        time.sleep(2)
        return proxy.switches() - before <= 2
    harness.poll(sleeps, 20, "it waits for a client asleep")
    proxy.connect().close()
    harness.poll(sleeps, 20, "it waits for its end asleep")


ENDS = {
    "shutdown": '"$PGSIDECAR" shutdown\n',
    "quitquitquit": 'curl -fsS -X POST "$ADMIN/quitquitquit"\n',
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("script, code", [(MIGRATION, 0), (FAILING, 1)])
def test_the_script_ends_it(proxies, end, script, code):
    """trap: also where the migration fails."""
    proxy = proxies({"admin": {"quitquitquit": True}})
    assert job(proxy, f"trap '{ENDS[end].strip()}' EXIT\n{WAIT}{script}") == code
    assert proxy.wait_exit(20) == 0


def test_wait_for_the_start_alone(proxies):
    """What a container's postStart asks for: in an outage it would keep the application from starting."""
    proxy = proxies(url=f"postgresql://{USER}:x@127.0.0.1:{harness.free_port()}/{DATABASE}")
    proxy.json("/api/monitoring/compute-health?probe=1")  # it knows by now that the database is down
    assert proxy.command("wait", "--max", "300ms", "--config", str(proxy.config_file)).returncode == 1
    assert proxy.command("wait", "--started", "--max", "300ms", "--config", str(proxy.config_file)).returncode == 0
    proxy.stop()
    done = proxy.command("wait", "--started", "--max", "300ms", "--config", str(proxy.config_file))
    assert done.returncode == 1 and "not started within 300 ms" in done.stderr


def test_wait_and_shutdown_tell_what_is_wrong(proxies):
    proxy = proxies()
    assert proxy.stop() == 0
    done = proxy.command("wait", "--max", "300ms", "--config", str(proxy.config_file))
    assert done.returncode == 1 and "not ready within 300 ms" in done.stderr and "PGSIDECAR_ADMIN_LISTEN" in done.stderr
    done = proxy.command("shutdown", "--config", str(proxy.config_file))
    assert done.returncode == 1 and "is it running" in done.stderr


def test_another_server_on_the_port_is_not_taken_for_it(proxies):
    """The application itself, say, that answers everything by a page."""
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "6")
            self.end_headers()
            self.wfile.write(b"<html>")
        do_POST = do_GET

        def log_message(self, *_):
            pass
    proxy = proxies()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as page:
        threading.Thread(target=page.serve_forever, daemon=True).start()
        environment = {"PGSIDECAR_ADMIN_LISTEN": f"127.0.0.1:{page.server_port}"}
        for command in (["healthcheck"], ["wait", "--max", "300ms"], ["shutdown"], ["upgrade"]):
            done = proxy.command(*command, "--config", proxy.config_file, environment=environment)
            assert done.returncode == 1, command
            assert f"something else answers at http://127.0.0.1:{page.server_port}, not pgsidecar" in done.stderr, done.stderr
        page.shutdown()


# ---- start

def test_listens_before_anything_else(pg, proxies):
    """Of the time from exec to listening the processor's part, the least of some starts: it is the same on a busy machine."""
    if harness.sanitized():
        pytest.skip("a sanitizer's start is its own")
    spent = []
    for _ in range(5):
        proxy = proxies({"pool": {"min": 2}}, url=pg.url(port=harness.free_port()))
        spent.append(proxy.cpu_seconds())
        assert proxy.http("/health/startup")[0] == 200 and proxy.http("/health/ready")[0] == 200
        proxy.stop()
    print(f"{min(spent) * 1000:.1f} ms of CPU until it listens")
    assert min(spent) < 0.020


def test_clients_come_before_the_database(proxies):
    """They wait as long as connectionTimeoutMillis says, then get the database's own error; who waits when it comes up is served."""
    with harness.Postgres() as late:
        late.stop()
        proxy = proxies({"pool": {"connectionTimeoutMillis": 1000}}, server=late)
        began = time.monotonic()
        with wire.Wire(proxy.port) as early:
            error = early.login(USER, PASSWORD, DATABASE).error
        assert time.monotonic() - began >= 0.9
        assert error["C"] == "08006" and "Connection refused" in error["M"]
        status, ready = proxy.json("/health/ready")
        assert status == 503 and "Connection refused" in ready["reason"]
        assert proxy.http("/health/startup")[0] == proxy.http("/health/live")[0] == 200
        proxy.write_config(harness.merge(proxy.config, {"pool": {"connectionTimeoutMillis": 60000}}))
        proxy.signal(signal.SIGHUP)
        harness.poll(lambda: "connectionTimeoutMillis changed" in proxy.log_text(), what="it reloads")

        def work(index):
            if index == 0:
                harness.poll(lambda: proxy.stats()["waitingCount"] == 5, what="they wait")
                return late.start()
            with proxy.connect(connect_timeout=60) as connection:
                return connection.execute("SELECT 1").fetchone()
        assert harness.threads(6, work)[1:] == [(1,)] * 5
        harness.poll(lambda: proxy.http("/health/ready")[0] == 200, what="it is ready again")


def test_what_it_is_told_before_it_listens_is_not_lost(tmp_path):
    """As process 1 it would never hear of it, as another one it would be killed by it."""
    secret = tmp_path / "secret"
    os.mkfifo(secret)
    process = subprocess.Popen([harness.BINARY], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={"PGSIDECAR_LISTEN": f"127.0.0.1:{harness.free_port()}", "PGSIDECAR_ADMIN_LISTEN": "off",
                                    "PGSIDECAR_UPSTREAM_URL": f"postgresql://{USER}:${{file:{secret}}}@127.0.0.1:{harness.free_port()}/{DATABASE}"})

    def feed():
        while process.poll() is None:
            with contextlib.suppress(BrokenPipeError), open(secret, "w") as pipe:  # it reads its configuration now, or ends
                process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
                pipe.write("x")
    threading.Thread(target=feed, daemon=True).start()
    # In order, or by the second at once (3): it is told twice where it reads the file more than once.
    assert process.wait(20) in (0, 3)


def refusals(server, since):
    return server.log.read_text()[since:].count("password authentication failed")


def test_wrong_credentials_are_told_at_once_and_do_not_hammer_the_server(proxies, pg, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("wrong")
    proxy = proxies({"pool": {"connectionTimeoutMillis": 20000}, "users": {USER: {"password": PASSWORD}}},
                    url=pg.url(password="PASSWORD").replace("PASSWORD", f"${{file:{secret}}}"))
    since = len(pg.log.read_text())
    refused, until = 0, time.monotonic() + 4

    def insist(_):
        nonlocal refused
        while time.monotonic() < until:
            began = time.monotonic()
            with wire.Wire(proxy.port, timeout=30) as client:
                error = client.login(USER, PASSWORD, DATABASE).error
            assert error["C"] == "28P01" and error["M"] == f'password authentication failed for user "{USER}"'
            assert time.monotonic() - began < 10  # half of connectionTimeoutMillis
            refused += 1
    harness.threads(4, insist)
    tries = refusals(pg, since)
    print(f"{refused} clients were refused, {tries} times the server was asked")
    assert refused > 40 and tries <= 20
    status, ready = proxy.json("/health/ready")
    assert status == 503 and f'password authentication failed for user "{USER}"' in ready["reason"]
    assert proxy.http("/health/live")[0] == proxy.http("/health/startup")[0] == 200
    # The probes alone find out that the secret has been put right.
    secret.write_text(PASSWORD)
    harness.poll(lambda: proxy.http("/health/ready")[0] == 200, 20, "it is ready", 0.2)
    with proxy.connect() as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_refused_credentials_do_not_disconnect_clients(proxies, pg):
    """Between a password's change on the server and here: an error to each request, and everything goes on by itself."""
    proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 20000}})
    with proxy.connect(prepare_threshold=None) as client, wire.Wire(proxy.port) as pipelining:
        client.execute("SET application_name = 'kept'")
        harness.poll(lambda: proxy.stats()["activeCount"] == 0, what="its session has been looked at")
        assert pipelining.login(USER, PASSWORD, DATABASE) is None
        pg.sql(f"ALTER ROLE {USER} PASSWORD 'changed'")
        try:
            pg.sql(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = '{USER}'")
            harness.poll(lambda: proxy.stats()["idleCount"] == 0, what="the loss is noticed")
            for _ in range(3):
                with pytest.raises(psycopg.errors.InvalidPassword) as refused:
                    client.execute("SELECT 1")
                assert refused.value.diag.severity == "ERROR"
            many = 2000
            pipelining.send(*[wire.query("SELECT 1")] * many)
            answers = [m.type for _ in range(many) for m in pipelining.until()]
            assert answers == ["E", "Z"] * many
        finally:
            pg.sql(f"ALTER ROLE {USER} PASSWORD '{PASSWORD}'")

        def works():
            try:
                return client.execute("SHOW application_name").fetchone() == ("kept",)
            except psycopg.errors.InvalidPassword:
                return False
        harness.poll(works, 20, "it goes on")
        assert pipelining.value("SELECT 1") == "1"


def test_a_changed_password_does_not_fail_clients_of_open_connections(proxies, pg):
    """The pool can't grow any more, but it has a connection, which whoever waits gets in turn."""
    proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 30000}})
    with proxy.connect() as one, proxy.connect() as two:
        one.execute("BEGIN")
        pg.sql(f"ALTER ROLE {USER} PASSWORD 'changed'")
        try:
            since = len(pg.log.read_text())

            def work(index):
                if index:
                    return two.execute("SELECT 2").fetchone()
                harness.poll(lambda: refusals(pg, since), what="a second connection was tried")
                assert proxy.http("/health/ready")[0] == 200
                one.execute("COMMIT")
            assert harness.threads(2, work)[1] == (2,)
        finally:
            pg.sql(f"ALTER ROLE {USER} PASSWORD '{PASSWORD}'")
