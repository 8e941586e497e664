"""For operators: HTTP routes, metrics, signals, subcommands, configuration mistakes."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest

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


def test_check_prints_the_configuration_without_secrets(proxy):
    done = proxy.command("check", "--config", str(proxy.config_file))
    assert done.returncode == 0, done.stderr
    import yaml
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
    import yaml
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
    assert all({"time", "level", "message"} == set(line) for line in lines)
    told = [line["message"] for line in lines if "password authentication failed" in line["message"]]
    assert len(told) == 1 and 'x"\\\n{"level":"error"}' in told[0], lines


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
    time.sleep(0.5)
    before, cpu = proxy.switches(), proxy.cpu_seconds()
    threading.Event().wait(3)
    assert proxy.switches() - before <= 1
    assert proxy.cpu_seconds() - cpu < 0.001
    for w in clients:
        w.sock.close()
