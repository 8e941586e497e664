"""For operators: HTTP routes, metrics, signals, subcommands, configuration mistakes."""
import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import threading
import time

import jsonschema
import psycopg
import pytest
import yaml

import harness
import wire
from harness import DATABASE, PASSWORD, USER


def raw(proxy, **parameters):
    w = wire.Wire(proxy.port)
    failure = w.login(USER, PASSWORD, DATABASE, **parameters)
    assert failure is None, failure.error
    return w


def curl(proxy, path, *arguments):
    """(status, body)"""
    done = subprocess.run(["curl", "-sS", "-m", "10", "-w", "\n%{http_code}", *arguments, f"http://127.0.0.1:{proxy.admin_port}{path}"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


# ---- routes

def test_health_routes(proxy):
    with raw(proxy) as w:
        assert w.value("SELECT 1") == "1"
    for path in ("/health", "/health/live", "/health/ready", "/health/startup"):
        status, body = curl(proxy, path)
        assert status == 200, (path, body)
        json.loads(body)
    health = json.loads(curl(proxy, "/health")[1])
    assert health["status"] == "healthy"
    assert curl(proxy, "/no/such/path")[0] == 404
    assert curl(proxy, "/health", "-X", "DELETE")[0] == 405


def test_startup_needs_no_database(proxies, pg):
    proxy = proxies({"pool": {"connectionTimeoutMillis": 500}}, url=pg.url(port=harness.free_port()))
    assert curl(proxy, "/health/startup")[0] == 200
    assert curl(proxy, "/health/live")[0] == 200
    with wire.Wire(proxy.port) as w:
        w.login(USER, PASSWORD, DATABASE)
    status, body = curl(proxy, "/health/ready")
    assert status == 503 and "refused" in body, body
    assert curl(proxy, "/health/live")[0] == 200


def test_pool_stats(proxies):
    proxy = proxies({"pool": {"max": 3, "min": 0, "connectionTimeoutMillis": 20000}})
    clients = [raw(proxy) for _ in range(4)]
    for w in clients[:3]:
        w.ask(wire.query("BEGIN"))
    clients[3].send(wire.query("SELECT 1"))
    harness.poll(lambda: proxy.stats()["waitingCount"] == 1, what="one waits")
    stats = proxy.stats()
    assert (stats["totalCount"], stats["activeCount"], stats["idleCount"], stats["max"], stats["min"]) == (3, 3, 0, 3, 0)
    assert stats["utilization"] == 1
    for w in clients[:3]:
        w.ask(wire.query("COMMIT"))
    clients[3].until()
    harness.poll(lambda: proxy.stats()["idleCount"] == 3, what="all are idle")
    stats = proxy.stats()
    assert (stats["activeCount"], stats["waitingCount"], stats["utilization"]) == (0, 0, 0)
    for name in ("wait", "query"):
        assert {"p50", "p95", "p99", "max"} <= set(stats[name])
    for w in clients:
        w.sock.close()


def test_compute_health(proxy):
    with raw(proxy) as w:
        w.value("SELECT 1")
        status, body = curl(proxy, "/api/monitoring/compute-health")
    assert status == 200
    assert str(proxy.pid) in body and re.search(r'"uptime', body), body


def test_metrics_pass_promtool(proxy):
    with raw(proxy) as w:
        for _ in range(10):
            w.value("SELECT 1")
        w.ask(wire.query("SELECT 1/0"))
        status, body = curl(proxy, "/metrics")
    assert status == 200
    done = subprocess.run(["promtool", "check", "metrics"], input=body, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stdout + done.stderr
    value = {m[1]: float(m[2]) for m in re.finditer(r"^([a-z_]+(?:\{.*\})?) (\S+)$", body, re.M)}
    assert sum(v for k, v in value.items() if k.startswith("pgsidecar_queries_total")) >= 11
    assert PASSWORD not in body


def test_openmetrics_ends_as_it_must(proxy):
    status, headers, body = proxy.http("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert status == 200 and headers["Content-Type"].startswith("application/openmetrics-text") and body.endswith("# EOF\n")


def test_changes_are_refused_by_get_and_by_strange_hosts(proxy):
    assert curl(proxy, "/api/admin/drain")[0] == 405
    assert curl(proxy, "/api/admin/drain", "-X", "POST", "-H", "Host: evil.example")[0] == 403
    assert curl(proxy, "/api/admin/drain", "-X", "POST", "-H", "Origin: http://evil.example")[0] == 403
    assert curl(proxy, "/quitquitquit", "-X", "POST")[0] in (403, 404)
    assert proxy.running()
    recovers = raw(proxy)
    assert recovers.value("SELECT 1") == "1"
    recovers.sock.close()


def test_slow_and_oversized_requests(proxy):
    big = socket.create_connection(("127.0.0.1", proxy.admin_port), 10)
    try:
        big.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 200000)
        while big.recv(65536):
            pass
    except OSError:
        pass
    big.close()
    slow = [socket.create_connection(("127.0.0.1", proxy.admin_port), 20) for _ in range(20)]
    for sock in slow:
        sock.sendall(b"GET /health HTT")
    assert curl(proxy, "/health/live")[0] == 200
    for sock in slow:  # they are closed by and by
        try:
            while sock.recv(65536):
                pass
        except ConnectionResetError:
            pass
        sock.close()
    assert curl(proxy, "/health/live")[0] == 200


# ---- signals

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_drain_finishes_what_is_active(proxies, pg, number):
    proxy = proxies()
    busy, idle = raw(proxy), raw(proxy)
    busy.ask(wire.query("BEGIN"))
    assert idle.value("SELECT 1") == "1"
    proxy.signal(number)
    told = idle.closed()
    assert [m.error["C"] for m in told if m.type == "E"] == ["57P01"]
    assert curl(proxy, "/health/ready")[0] == 503
    assert curl(proxy, "/health/live")[0] == 200
    try:
        with wire.Wire(proxy.port, timeout=5) as late:
            assert late.login(USER, PASSWORD, DATABASE).error["C"] in ("57P03", "57P01")
    except (OSError, wire.Closed):
        pass
    assert busy.value("SELECT 'still here'") == "still here"
    assert busy.ask(wire.query("COMMIT"))[-1].type == "Z"
    before = time.monotonic()
    assert proxy.wait_exit(10) == 0
    assert time.monotonic() - before < 2
    harness.poll(lambda: pg.count("usename = 'app'") == 0, what="server connections are closed")


def test_without_clients_it_exits_at_once(proxies):
    proxy = proxies()
    with raw(proxy) as w:
        w.value("SELECT 1")
    harness.poll(lambda: "clients" and proxy.stats()["activeCount"] == 0, what="idle")
    before = time.monotonic()
    assert proxy.stop() == 0
    assert time.monotonic() - before < (5 if harness.sanitized() else 1)


def test_second_signal_ends_at_once(proxies):
    proxy = proxies()
    proxy.expect_exit = 3
    with raw(proxy) as busy:
        busy.ask(wire.query("BEGIN"))
        proxy.signal(signal.SIGTERM)
        harness.poll(lambda: curl(proxy, "/health/ready")[0] == 503, what="it drains")
        proxy.signal(signal.SIGTERM)
        assert proxy.wait_exit(5) == 3


def test_end_of_the_drain_is_forced(proxies, pg):
    proxy = proxies({"shutdown": {"timeoutMillis": 700}})
    proxy.expect_exit = 3
    with raw(proxy) as busy:
        busy.send(wire.query("SELECT pg_sleep(60)"))
        harness.poll(lambda: pg.count("query LIKE '%%pg_sleep(60)%%' AND state = 'active'"), what="it runs")
        proxy.signal(signal.SIGTERM)
        assert proxy.wait_exit(10) == 3
        assert [m for m in busy.closed() if m.type == "E"]
    harness.poll(lambda: pg.count("query LIKE '%%pg_sleep(60)%%' AND state = 'active'") == 0, what="the query was cancelled")


def test_post_drain(proxies):
    proxy = proxies()
    assert curl(proxy, "/api/admin/drain", "-X", "POST")[0] == 200
    assert proxy.wait_exit(10) == 0


def test_quitquitquit_and_shutdown(proxies):
    for how in ("curl", "shutdown"):
        proxy = proxies({"admin": {"quitquitquit": True}})
        if how == "curl":
            assert curl(proxy, "/quitquitquit", "-X", "POST")[0] == 200
        else:
            done = proxy.command("shutdown", "--config", str(proxy.config_file))
            assert done.returncode == 0, done.stderr
        assert proxy.wait_exit(10) == 0


def test_reload(proxies, pg):
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 1000}})
    with raw(proxy) as a, raw(proxy) as b:
        a.ask(wire.query("BEGIN"))
        assert b.ask(wire.query("SELECT 1"))[0].type == "E"
        proxy.write_config(harness.merge(proxy.config, {"pool": {"max": 2}}))
        proxy.signal(signal.SIGHUP)
        harness.poll(lambda: proxy.stats()["max"] == 2, what="the new max counts")
        assert b.value("SELECT 2") == "2"
        a.ask(wire.query("ROLLBACK"))
        # A bad file changes nothing.
        good = proxy.config_file.read_text()
        proxy.config_file.write_text("pool: {max: many, nosuchkey: 1}\n")
        proxy.signal(signal.SIGHUP)
        harness.poll(lambda: "nosuchkey" in proxy.log_text(), what="the log names the mistake")
        assert proxy.stats()["max"] == 2
        assert a.value("SELECT 3") == "3"
        proxy.config_file.write_text(good)


# ---- subcommands

def test_version_and_help(proxy):
    done = proxy.command("--version")
    assert done.returncode == 0 and re.fullmatch(r"pgsidecar \d+\.\d+\.\d+\n", done.stdout)
    done = proxy.command("--help")
    assert done.returncode == 0
    for word in ("check", "healthcheck", "wait", "shutdown", "--config"):
        assert word in done.stdout
    for arguments in (("shutdown", "--max", "1s"), ("check", "--started")):
        done = proxy.command(*arguments)
        assert done.returncode == 2 and "are for wait" in done.stderr


def test_closed_standard_streams_are_no_sockets(pg):
    environment = {"PATH": os.environ["PATH"], "DATABASE_URL": pg.url(), "PGSIDECAR_LISTEN": f"127.0.0.1:{harness.free_port()}", "PGSIDECAR_ADMIN_LISTEN": "off"}
    process = subprocess.Popen(["sh", "-c", "exec 0>&- 1>&- 2>&-; exec \"$0\"", harness.BINARY], env=environment)
    try:
        harness.poll(lambda: len(os.listdir(f"/proc/{process.pid}/fd")) > 5, what="it runs")
        assert {os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}
    finally:
        process.terminate()
        assert process.wait(10) == 0


def test_check_prints_the_configuration_without_secrets(proxy):
    done = proxy.command("check", "--config", str(proxy.config_file))
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)
    assert shown["pool"]["max"] == 15 and shown["limits"]["maxClients"] == 1000
    for secret in (PASSWORD, harness.percent(PASSWORD)):
        assert secret not in done.stdout + done.stderr + proxy.log_text()


def test_check_tells_every_mistake_with_its_line(proxy, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("upstream: {url: postgresql://u:hidden@h/d}\npool:\n  max: -3\n  idleTimeoutMilis: 5\nlog: {level: loud}\n")
    done = proxy.command("check", "--config", str(file))
    assert done.returncode == 2
    assert re.search(r"bad\.yaml:3\b", done.stderr), done.stderr
    assert re.search(r"bad\.yaml:4\b.*idleTimeoutMillis", done.stderr), done.stderr
    assert re.search(r"bad\.yaml:5\b", done.stderr), done.stderr
    assert "hidden" not in done.stderr + done.stdout


def test_no_configuration_at_all(proxy):
    done = subprocess.run([proxy.binary], capture_output=True, text=True, timeout=20, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 2 and "DATABASE_URL" in done.stderr


def test_environment_alone(pg, proxies):
    port, admin = harness.free_port(), harness.free_port()
    environment = {"DATABASE_URL": pg.url(), "PGSIDECAR_LISTEN": f"127.0.0.1:{port}", "PGSIDECAR_ADMIN_LISTEN": f"127.0.0.1:{admin}", "PGSIDECAR_POOL_MAX": "4"}
    process = subprocess.Popen([harness.BINARY], env={"PATH": os.environ["PATH"], **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        def works():
            assert process.poll() is None
            try:
                with wire.Wire(port) as w:
                    return w.login(USER, PASSWORD, DATABASE) is None and w.value("SELECT 1") == "1"
            except (OSError, wire.Closed):
                return False
        harness.poll(works, what="it serves")
    finally:
        process.terminate()
        assert process.wait(20) == 0


def test_healthcheck_and_wait(proxies, pg):
    proxy = proxies()
    file = ("--config", str(proxy.config_file))
    assert proxy.command("healthcheck", *file).returncode == 0
    assert proxy.command("wait", "--max", "5s", *file).returncode == 0
    assert proxy.stop() == 0
    assert proxy.command("healthcheck", *file).returncode == 1
    assert proxy.command("wait", "--max", "300ms", *file).returncode == 1


@pytest.mark.parametrize("what", ["listen", "admin"])
def test_port_in_use_names_the_key(proxies, pg, what):
    proxy = proxies()
    config = harness.merge(proxy.config, {"listen": [f"127.0.0.1:{proxy.port if what == 'listen' else harness.free_port()}"],
                                          "admin": {"listen": f"127.0.0.1:{proxy.admin_port if what == 'admin' else harness.free_port()}"}})
    other = proxy.directory / "other.yaml"
    other.write_text(yaml.safe_dump(config))
    done = proxy.command("run", "--config", str(other))
    assert done.returncode == 1
    assert ("admin.listen" if what == "admin" else "listen") in done.stderr + done.stdout


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
    source = "".join(path.read_text() for path in (harness.ROOT / "proxy").glob("*.cpp")) + (harness.ROOT / "proxy/log.hpp").read_text()
    return set(re.findall(r'log::(?:debug|info|warn|error)\(\s*"([a-z_]+)"', source)) | set(re.findall(r'_events\.warn\(\s*\S+?, "([a-z_]+)"', source))


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


def test_secrets_are_nowhere(proxies, pg):
    proxy = proxies({"log": {"level": "trace"}})
    with raw(proxy) as w:
        w.value("SELECT 'in a query'")
    everything = proxy.log_text() + curl(proxy, "/metrics")[1] + curl(proxy, "/health")[1] + curl(proxy, "/api/monitoring/pool-stats")[1]
    for secret in (PASSWORD, harness.percent(PASSWORD)):
        assert secret not in everything
    with open(f"/proc/{proxy.pid}/cmdline") as f:
        assert harness.percent(PASSWORD) not in f.read()


def test_idle_costs_nothing(proxies, pg):
    if harness.sanitized():
        pytest.skip("a sanitizer has a thread of its own")
    proxy = proxies()
    clients = [raw(proxy) for _ in range(20)]
    for w in clients:
        w.value("SELECT 1")
    time.sleep(2.5)  # the last sample has been taken
    before, cpu = proxy.switches(), proxy.cpu_seconds()
    threading.Event().wait(3)
    assert proxy.switches() - before <= 1
    assert proxy.cpu_seconds() - cpu < 0.001
    for w in clients:
        w.sock.close()


# ---- health follows the server, not a client's mistake

def test_ready_again_without_any_traffic(proxies, pg):
    """Whoever asks an unready proxy makes it look for the server: no client would come to do so."""
    port = harness.free_port()
    proxy = proxies({"pool": {"connectionTimeoutMillis": 500}}, url=pg.url(port=port))
    with wire.Wire(proxy.port) as w:
        assert w.login(USER, PASSWORD, DATABASE).error["C"] == "08006"
    assert curl(proxy, "/health/ready")[0] == 503
    with socket.create_server(("127.0.0.1", port)):
        harness.poll(lambda: curl(proxy, "/health/ready")[0] == 200, what="it is seen to be back")


def test_a_wrong_database_does_not_make_the_server_down(proxies):
    proxy = proxies({"databases": {"*": {}}})
    with raw(proxy) as w, wire.Wire(proxy.port) as other:
        assert w.value("SELECT 1") == "1"
        assert other.login(USER, PASSWORD, "no_such_database").error["C"] == "3D000"
        assert curl(proxy, "/health/ready")[0] == 200 and w.value("SELECT 1") == "1"


def test_the_databases_latency(proxy):
    with raw(proxy) as w:
        assert w.value("SELECT 1") == "1"
        passive = json.loads(curl(proxy, "/api/monitoring/compute-health")[1])["database"]
        probed = json.loads(curl(proxy, "/api/monitoring/compute-health?probe=1")[1])["database"]
    assert (probed["source"], passive["source"]) == ("probe", "passive")
    assert probed["latencyMs"] > 0 and passive["latencyMs"] > 0


# ---- HTTP

def http(proxy, request, timeout=10):
    """All bytes of the answer to raw ones."""
    with socket.create_connection(("127.0.0.1", proxy.admin_port), timeout) as sock:
        sock.sendall(request)
        answer = b""
        while data := sock.recv(65536):
            answer += data
        return answer


def test_http_methods_and_pipelines(proxy):
    get = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"
    answer = http(proxy, get * 3 + b"GET /no HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert (answer.count(b"HTTP/1.1 200"), answer.count(b"HTTP/1.1 404")) == (3, 1)
    for path in ("/health", "/metrics", "/api/monitoring/pool-stats"):
        head, _, body = http(proxy, f"HEAD {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200") and body == b"" and re.search(rb"Content-Length: [1-9]", head)
        assert b"Cache-Control: no-store" in head
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "BREW"):
            assert http(proxy, f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()).startswith(b"HTTP/1.1 405")


@pytest.mark.parametrize("request_,status", [
    (b"\x16\x03\x01\x02\x00\r\n\r\n", 400), (b"GET /health HTTP/2.0\r\n\r\n", 400), (b"GET / HTTP/1.1\r\nX: " + b"x" * 9000 + b"\r\n\r\n", 431),
    (b"POST /api/admin/reload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n", 413),
    (b"POST /api/admin/reload HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n", 413),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\nPOST /api/admin/pause HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"POST /api/admin/drain HTTP/1.1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", 403),
    (b"POST /api/admin/drain HTTP/1.1\r\nHost: 127.0.0.1.evil.example\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", 403),
    (b"POST /api/admin/drain HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", 400),
    (b"POST /api/admin/drain HTTP/1.1\r\nHost: localhost\r\nSec-Fetch-Site: cross-site\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", 403)])
def test_what_http_refuses(proxy, request_, status):
    assert http(proxy, request_).startswith(b"HTTP/1.1 %d" % status)
    assert curl(proxy, "/health/ready")[0] == 200


def test_clients_that_take_no_answer_keep_no_probe_out(proxy):
    stalled = []
    for _ in range(32):
        sock = socket.create_connection(("127.0.0.1", proxy.admin_port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        stalled.append(sock)
        try:
            sock.send(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 400)
        except BlockingIOError:
            pass
    harness.poll(lambda: curl(proxy, "/health/live")[0] == 200, 3, "a probe is answered")
    for sock in stalled:
        sock.close()


# ---- log

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


# ---- life

def test_exit_on_idle_waits_for_a_client_and_its_end(proxies):
    proxy = proxies({"pool": {"allowExitOnIdle": True, "idleTimeoutMillis": 300}})
    with socket.create_connection(("127.0.0.1", proxy.port)):  # a port probe isn't a client
        pass
    with pytest.raises(subprocess.TimeoutExpired):
        proxy.wait_exit(0.7)
    with raw(proxy) as w:
        assert w.value("SELECT 1") == "1"
        with pytest.raises(subprocess.TimeoutExpired):
            proxy.wait_exit(0.7)
    assert proxy.wait_exit(5) == 0


def test_accepts_while_draining_if_told_to(proxies):
    proxy = proxies({"shutdown": {"acceptWhileDraining": True}})
    with raw(proxy) as w:
        proxy.signal(signal.SIGTERM)
        harness.poll(lambda: curl(proxy, "/health/ready")[0] == 503, what="it drains")
        with raw(proxy) as late:
            assert (late.value("SELECT 1"), w.value("SELECT 2")) == ("1", "2")
    assert proxy.wait_exit(10) == 0


def test_reload_while_draining(proxies):
    proxy = proxies()
    with raw(proxy) as w:
        w.ask(wire.query("BEGIN"))
        proxy.signal(signal.SIGINT)
        harness.poll(lambda: curl(proxy, "/health/ready")[0] == 503, what="it drains")
        proxy.signal(signal.SIGHUP)
        harness.poll(lambda: "reload" in proxy.log_text(), what="it reloads")
        assert w.value("SELECT 1") == "1"
        w.ask(wire.query("COMMIT"))
    assert proxy.wait_exit(10) == 0


def test_reload_names_what_needs_a_restart(proxies):
    proxy = proxies()
    proxy.write_config(harness.merge(proxy.config, {"listen": ["127.0.0.1:1"], "admin": {"listen": "127.0.0.1:2"}, "limits": {"maxClients": 7}}))
    assert curl(proxy, "/api/admin/reload", "-X", "POST")[0] == 200
    harness.poll(lambda: "limits.maxClients changed" in proxy.log_text(), what="it is told")
    for key in ("listen", "admin.listen"):
        harness.poll(lambda: f"reload: {key} changed, which needs a restart" in proxy.log_text(), what=key)
    proxy.config_file.write_text("pool: {max: many}\n")
    status, body = curl(proxy, "/api/admin/reload", "-X", "POST")
    assert status == 409 and "pool.max" in json.loads(body)["error"]


def test_reload_turns_tls_off(proxies, tmp_path):
    harness.make_certificates(tmp_path)
    proxy = proxies({"tls": {"mode": "allow", "certificate": str(tmp_path / "server.crt"), "key": str(tmp_path / "server.key")}})
    proxy.write_config(dict(proxy.config, tls={"mode": "disable"}))
    assert curl(proxy, "/api/admin/reload", "-X", "POST")[0] == 200
    with raw(proxy) as w:  # the data loop has it by now
        assert w.value("SELECT 1") == "1"
    with wire.Wire(proxy.port) as w:
        w.send(wire.request(wire.SSL_REQUEST))
        assert w.bytes(1) == b"N"


# ---- commands and configuration

def test_exit_codes_of_commands(proxies):
    off = proxies({"admin": {"listen": "off"}}, wait=False)
    harness.poll(lambda: "listening" in off.log_text(), what="it listens")
    file = ("--config", str(off.config_file))
    for arguments, code, says in ((("frob",), 2, "frob"), (("run", "extra"), 2, "extra"), (("--config",), 2, "--config"), (("wait", "--max", "x"), 2, "--max"),
                                  (("check", "--config", "/no/such"), 2, "/no/such"), (("check", "--config", "/tmp"), 2, "/tmp"),
                                  (("healthcheck", *file), 1, "admin.listen"), (("shutdown", *file), 1, "admin.listen"), (("wait", "--max=0", *file), 1, "off")):
        done = off.command(*arguments)
        assert done.returncode == code and says in done.stderr, (arguments, done)


def test_every_key_is_a_variable(proxy):
    """Each key of the example, given another value by its variable, is that in what check prints."""
    example = yaml.safe_load((harness.ROOT / "conf/pgsidecar.yaml").read_text())
    given = {"listen": "127.0.0.1:7001", "pool.mode": "session", "pool.residueCheck": "always", "pool.onUnsupported": "error", "auth.method": "md5", "admin.listen": "127.0.0.1:7002",
             "admin.tokenFile": "/dev/null", "admin.hosts": "a,b", "admin.users": "a,b", "admin.statsUsers": "c", "log.level": "debug", "log.format": "json", "pool.min": "1"}
    for section in ("pool", "limits", "admin", "metrics", "alerts", "shutdown"):
        for key, default in example[section].items():
            if f"{section}.{key}" not in given:
                given[f"{section}.{key}"] = str(not default).lower() if isinstance(default, bool) else str(default + 1)
    given |= {f"upstream.{key}": str(default + 1) for key, default in example["upstream"].items() if key != "url"}
    assert len(given) > 24

    def variable(path):
        return "PGSIDECAR_" + re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", path.replace(".", "_")).upper()

    done = proxy.command("check", environment={"DATABASE_URL": "postgresql://u@h/d", **{variable(path): value for path, value in given.items()}})
    assert done.returncode == 0, done.stderr
    shown = yaml.load(done.stdout, Loader=yaml.BaseLoader)
    for path, value in given.items():
        section, _, key = path.partition(".")
        assert (shown[section][key] if key else shown[section]) == value, path


@pytest.mark.parametrize("url", ["postgresql+asyncpg://app:hidden@h/d?ssl=require", "postgresql://app:hidden/x@h/d", "//app:hidden@h/d?x=1", "host=h password=a hidden=b"])
def test_no_mistake_tells_a_secret(proxy, url):
    for command in ("check", "run"):
        done = proxy.command(command, environment={"DATABASE_URL": url})
        assert done.returncode == 2 and done.stderr and "hidden" not in done.stderr + done.stdout, done.stderr


def test_query_time_of_a_client_with_settings(proxy):
    with raw(proxy, application_name="pgbench") as a, raw(proxy, application_name="other") as b:
        for _ in range(3):  # each has the connection's settings changed
            a.value("SELECT 1"), b.value("SELECT 1")
        assert 0 < proxy.stats()["query"]["max"] < 10000


def test_healthcheck_needs_no_secret(proxies, pg, tmp_path):
    """A liveness probe while a secret is being replaced must not end the pod."""
    secret = tmp_path / "password"
    secret.write_text(PASSWORD)
    proxy = proxies({"upstream": {"url": pg.url(), "password": "${file:%s}" % secret}})
    secret.unlink()
    done = proxy.command("healthcheck", "--config", str(proxy.config_file))
    assert done.returncode == 0, done.stderr


def schema(name):
    document = json.loads((harness.ROOT / f"admin/schema/{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(document)
    return jsonschema.Draft202012Validator(document, format_checker=jsonschema.FormatChecker())


def test_documents_are_as_their_schemas_say(proxies):
    """At rest, at work, with an alert, while the database is away, while draining."""
    stats, health = schema("pool-stats"), schema("compute-health")
    with harness.Postgres() as server:
        proxy = proxies({"pool": {"max": 2, "idleInTransactionWarnMillis": 100}}, server=server)

        def check():
            shown = proxy.stats(), proxy.json("/api/monitoring/compute-health")[1]
            stats.validate(shown[0])
            health.validate(shown[1])
            return shown
        _, compute = check()
        assert compute["maxConnections"] is None and compute["upstreams"] == [] and server.count() == 0  # nothing was woken up
        proxy.json("/api/monitoring/compute-health?probe=1")
        assert check()[1]["database"]["source"] == "probe"
        with proxy.connect() as one, server.connect() as other:
            one.execute("SELECT 1")
            one.execute("BEGIN")
            one.execute("SELECT 1")
            harness.poll(lambda: check()[0]["alerts"])
            _, compute = check()
            assert (compute["maxConnections"], compute["reserved"], compute["usedByUs"]) == (100, 3, 1) and compute["usedByOthers"] <= 1
            assert [upstream["name"] for upstream in compute["upstreams"]] == [f"127.0.0.1:{server.port}"]
            other.execute("SELECT 1")
        server.stop()
        with pytest.raises(psycopg.Error), proxy.connect() as client:
            client.execute("SELECT 1")
        assert check()[1]["status"] == "unhealthy"
        server.start()
        with proxy.connect() as client:
            client.execute("BEGIN")
            client.execute("SELECT 1")
            proxy.http("/api/admin/drain", method="POST")
            harness.poll(lambda: check()[1]["draining"])


def test_a_cold_start_is_counted(proxies, pg):
    """A server that takes a second to answer the first connection."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        over = threading.Event()

        def sleepy():
            first = True
            while not over.is_set():
                client, _ = listener.accept()
                if first:
                    time.sleep(1)
                first = False
                upstream = socket.create_connection(("127.0.0.1", pg.port))
                for source, sink in ((client, upstream), (upstream, client)):
                    threading.Thread(target=pump, args=(source, sink), daemon=True).start()

        def pump(source, sink):
            try:
                while data := source.recv(65536):
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_WR)
            except OSError:
                pass
        thread = threading.Thread(target=sleepy, daemon=True)
        thread.start()
        proxy = proxies(url=pg.url(port=listener.getsockname()[1]))
        with proxy.connect() as one, proxy.connect() as two:
            one.execute("BEGIN")
            one.execute("SELECT 1")
            two.execute("SELECT 1")  # a second connection, which is no cold start
            assert proxy.json("/api/monitoring/compute-health")[1]["coldStarts"] == 1
        over.set()
        try:
            socket.create_connection(listener.getsockname(), 1).close()
        except OSError:
            pass
        thread.join(5)
