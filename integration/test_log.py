"""What the log tells, and what nothing tells."""
import contextlib
import fcntl
import json
import os
import re
import select
import signal
import socket
import subprocess
import threading
import time

import psycopg
import pytest

import harness
import wire
from harness import DATABASE, PASSWORD, USER, curl, raw


def test_json_log(proxies):
    proxy = proxies({"log": {"format": "json", "level": "info"}})
    with raw(proxy) as w:
        w.value("SELECT 1")
    nasty = 'x"\\\n{"level":"error"}\x7f\xe9'
    with wire.Wire(proxy.port) as w:
        w.login(nasty, "x", DATABASE)
    assert proxy.stop() == 0
    lines = [json.loads(line) for line in proxy.log_text().splitlines()]
    assert all({"time", "level", "event", "message"} <= set(line) for line in lines)
    told = [line for line in lines if line["event"] == "client_refused"]
    assert len(told) == 1, lines
    assert told[0]["level"] == "warn" and told[0]["user"] == nasty and told[0]["sqlstate"] == "28P01" and told[0]["client"] > 0
    assert 'x"\\\n{"level":"error"}' in told[0]["message"]
    connected = next(line for line in lines if line["event"] == "server_connected")
    assert connected["database"] == DATABASE and connected["user"] == harness.USER and connected["pid"] > 0 and connected["server"] > 0
    assert [line["event"] for line in lines][-2:] == ["draining", "stopped"]


def test_an_event_of_a_client_names_what_it_is_about(proxies):
    proxy = proxies({"log": {"format": "json", "slowQueryMillis": 1}})
    with proxy.connect(application_name="worker") as client:
        client.execute("SELECT pg_sleep(0.02)")
        client.execute("SELECT pg_advisory_lock(1)")
        pid = client.execute("SELECT pid FROM pg_locks WHERE locktype = 'advisory'").fetchone()[0]
        client.execute("SELECT pg_advisory_unlock(1)")
        events = {line["event"]: line for line in map(json.loads, proxy.log_text().splitlines())}
        (row,) = [c for c in proxy.json("/api/monitoring/clients")[1]["clients"] if c["application"] == "worker"]
    for event in ("slow_statement", "pinned"):
        assert events[event]["application"] == "worker" and events[event]["request"] > 0
        assert events[event]["client"] == row["id"]
        assert (events[event]["database"], events[event]["user"], events[event]["pid"]) == (DATABASE, harness.USER, pid)


def test_an_error_of_the_proxys_own_is_an_event(proxies):
    proxy = proxies({"log": {"format": "json"}, "pool": {"max": 1, "connectionTimeoutMillis": 300, "queryTimeoutMillis": 1000, "onUnsupported": "error"}})
    with proxy.connect(application_name="waits") as waiter, proxy.connect() as holder:
        holder.execute("BEGIN")
        for wait in (lambda: waiter.execute("SELECT 1"), lambda: holder.execute("SELECT pg_sleep(5)")):
            with pytest.raises(psycopg.Error):
                wait()
        holder.execute("ROLLBACK")
        with pytest.raises(psycopg.Error):
            waiter.execute("CREATE TEMP TABLE unsupported ()")
        holder.execute("BEGIN")
        timer = threading.Timer(0.1, waiter.cancel)
        timer.start()
        with pytest.raises(psycopg.errors.QueryCanceled):
            waiter.execute("SELECT 1")
        timer.join()
        holder.execute("ROLLBACK")
    told = [line for line in map(json.loads, proxy.log_text().splitlines()) if line["event"] == "client_error"]
    assert [line["sqlstate"] for line in told] == ["53300", "57014", "0A000"]
    assert told[0]["level"] == "warn" and told[0]["application"] == "waits" and "timed out after 300 ms" in told[0]["message"]


def test_the_log_level_changes_at_run_time(proxies):
    proxy = proxies({"log": {"level": "warn"}})
    proxy.connect().close()
    assert proxy.log_text() == ""
    proxy.write_config(harness.merge(proxy.config, {"log": {"level": "debug"}}))
    proxy.signal(signal.SIGHUP)
    harness.poll(lambda: "log.level" in proxy.log_text(), what="the reload")
    proxy.connect().close()
    harness.poll(lambda: "[client_login]" in proxy.log_text(), what="a debug line")


def log_events():
    """The names that the code gives to events."""
    source = "".join(path.read_text() for path in (harness.ROOT / "proxy").glob("*.cpp"))
    return set(re.findall(r'(?:log::(?:debug|info|warn|error)\(|write\(Level::Warn,)\s*"([a-z_]+)"', source))


def test_the_readme_names_every_log_event():
    text = (harness.ROOT / "README.md").read_text()
    section = text.split("## Read its log")[1].split("\n## ")[0]
    named = set(re.findall(r"`([a-z_]+)`", "".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))))
    assert len(named) > 30 and named == log_events()


def test_clients_cannot_flood_the_log_or_write_lines_of_their_own(proxies):
    proxy = proxies()
    for number in range(200):
        with wire.Wire(proxy.port) as w:
            w.login(f"nobody\n2026-01-01T00:00:00.000Z error forged {number}", "x", DATABASE)
    assert proxy.stop() == 0
    lines = proxy.log_text().splitlines()
    assert 1 <= sum("nobody" in line for line in lines) <= 60
    assert not [line for line in lines if line.startswith("2026-01-01T00:00:00")]


def test_no_event_floods_the_log(proxies):
    proxy = proxies({"admin": {"users": [USER]}})
    with proxy.connect() as connection:
        for _ in range(60):
            connection.execute("CREATE TEMP TABLE t ()")
            connection.execute("DROP TABLE t")
        for _ in range(60):
            with contextlib.suppress(psycopg.Error):
                connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    with proxy.connect(database="pgsidecar", prepare_threshold=None) as console:
        for number in range(40):
            console.execute(f"SET log.slowQueryMillis={number + 1}")
    lines = proxy.log_text()
    for event in ("pinned", "unpinned", "server_lost", "server_connected"):
        assert lines.count(f"[{event}]") == 20, event
    harness.poll(lambda: proxy.log_text().count("[setting]") == 40, what="what operators do is a record")
    time.sleep(10.5)
    with proxy.connect() as connection:
        connection.execute("CREATE TEMP TABLE t ()")
        harness.poll(lambda: "[events_left_out] 40 more lines pinned were not shown" in proxy.log_text(), what="how many were left out")


def test_secrets_are_nowhere(proxies, pg):
    proxy = proxies({"log": {"level": "trace"}})
    with raw(proxy) as w:
        w.value("SELECT 'in a query'")
    everything = proxy.log_text() + curl(proxy, "/metrics")[1] + curl(proxy, "/health")[1] + curl(proxy, "/api/monitoring/pool-stats")[1]
    for secret in (PASSWORD, harness.percent(PASSWORD)):
        assert secret not in everything
    with open(f"/proc/{proxy.pid}/cmdline") as f:
        assert harness.percent(PASSWORD) not in f.read()


NAMES = ['a"b\\c', "new\nline: forged", "escape\x1b[31m", "tab\t", "umlaut \u00e4"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_names_cannot_break_log_json_or_metrics(proxies, form):
    proxy = proxies({"log": {"format": form, "level": "debug"}, "databases": {"*": {}}, "auth": {"method": "password"}})
    for name in NAMES:
        for user, database in ((name, DATABASE), (USER, name)):
            with wire.Wire(proxy.port) as w:
                assert w.login(user, PASSWORD if user == USER else "wrong", database) is not None
    with wire.Wire(proxy.port) as w:  # not UTF-8
        body = wire.V3_0.to_bytes(4, "big") + b"user\0bad\xff\xfe\0database\0app\0\0"
        w.send((len(body) + 4).to_bytes(4, "big") + body)
        w.recv()
        w.send(wire.frame("p", b"x\0"))
        w.closed()
    json.loads(curl(proxy, "/api/monitoring/pool-stats")[1])
    done = subprocess.run(["promtool", "check", "metrics"], input=curl(proxy, "/metrics")[1], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stdout + done.stderr
    assert proxy.stop() == 0
    lines = proxy.log.read_bytes().decode().splitlines()  # is UTF-8
    assert len(lines) > 5
    for line in lines:
        if form == "json":
            assert set(json.loads(line)) >= {"time", "level", "event", "message"}
        else:
            assert re.match(r"\d{4}-\d\d-\d\dT[\d:.]+Z (trace|debug|info|warn|error) \[[a-z_]+\] [^\x00-\x1f]*$", line), line


def test_a_stalled_log_does_not_stall_clients(pg):
    with stalled_log(pg) as (process, port, _):
        for i in range(200):
            with wire.Wire(port) as w:
                w.login(USER, "wrong" if i % 2 else PASSWORD, DATABASE)
        with wire.Wire(port) as w:
            assert w.login(USER, PASSWORD, DATABASE) is None and w.value("SELECT 1") == "1"


def test_a_stalled_log_does_not_stall_the_end(pg):
    with stalled_log(pg) as (process, port, _):
        for _ in range(300):
            with wire.Wire(port) as w:
                w.login(USER, PASSWORD, DATABASE)
        process.terminate()
        assert process.wait(3) == 0


def test_lines_that_had_no_room_are_counted(pg):
    with stalled_log(pg) as (process, port, pipe):
        for _ in range(1500):
            with wire.Wire(port) as w:
                w.login(USER, PASSWORD, DATABASE)
        text = b""
        while select.select([pipe], [], [], 1)[0]:
            text += os.read(pipe, 65536)
        with wire.Wire(port) as w:
            w.login(USER, PASSWORD, DATABASE)
        while b"events_left_out" not in text and select.select([pipe], [], [], 3)[0]:
            text += os.read(pipe, 65536)
        assert re.search(rb"\[events_left_out\] \d+ lines were not shown, since nobody read the log", text)


@contextlib.contextmanager
def stalled_log(pg):
    """(process, port, the pipe) of a pgsidecar whose standard output nobody reads."""
    port = harness.free_port()
    environment = {"PATH": os.environ["PATH"], "DATABASE_URL": pg.url(), "PGSIDECAR_LISTEN": f"127.0.0.1:{port}", "PGSIDECAR_ADMIN_LISTEN": "off",
                   "PGSIDECAR_LOG_LEVEL": "trace"}
    nobody, out = os.pipe()
    fcntl.fcntl(out, fcntl.F_SETPIPE_SZ, 4096)
    process = subprocess.Popen([harness.BINARY], env=environment, stdout=out, stderr=out)
    os.close(out)

    def listens():
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return True
    try:
        harness.poll(listens, what="it listens")
        yield process, port, nobody
    finally:
        process.kill()
        process.wait()
        os.close(nobody)
