"""For operators: HTTP routes, health, metrics, documents."""
import json
import re
import socket
import subprocess
import threading
import time

import jsonschema
import psycopg
import pytest

import gate
import harness
import wire
from harness import DATABASE, PASSWORD, USER, certified, curl, raw


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


def test_pool_stats_after_max_was_lowered(proxies):
    proxy = proxies({"pool": {"max": 3}})
    clients = [raw(proxy) for _ in range(3)]
    for w in clients:
        w.ask(wire.query("BEGIN"))
    proxy.write_config(harness.merge(proxy.config, {"pool": {"max": 1}}))
    assert curl(proxy, "/api/admin/reload", "-X", "POST")[0] == 200
    harness.poll(lambda: proxy.stats()["max"] == 1, what="it is lowered")
    stats = proxy.stats()
    assert (stats["activeCount"], stats["utilization"]) == (3, 1)
    assert stats["totalCount"] == sum(stats[part + "Count"] for part in ("idle", "active", "connecting", "resetting", "expired"))
    for w in clients:
        w.sock.close()


@pytest.mark.parametrize("limit, sqlstate", [("connectionTimeoutMillis", "53300"), ("queryTimeoutMillis", "57014")])
def test_waits_in_vain_count_as_waits(proxies, limit, sqlstate):
    proxy = proxies({"pool": {"max": 1, limit: 300}})
    with raw(proxy) as holder, raw(proxy) as waiter:
        holder.ask(wire.query("BEGIN"))
        before = proxy.stats()["wait"]["count"]
        assert [m.error["C"] for m in waiter.ask(wire.query("SELECT 1")) if m.type == "E"] == [sqlstate]
        wait = proxy.stats()["wait"]
        assert wait["count"] == before + 1 and wait["max"] >= 290


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


def test_ready_again_without_any_traffic(proxies, pg):
    """Whoever asks an unready proxy makes it look for the server: no client would come to do so."""
    port = harness.free_port()
    proxy = proxies({"pool": {"connectionTimeoutMillis": 500}}, url=pg.url(port=port))
    with wire.Wire(proxy.port) as w:
        assert w.login(USER, PASSWORD, DATABASE).error["C"] == "08006"
    assert curl(proxy, "/health/ready")[0] == 503
    with gate.Gate(pg.port, listen=("127.0.0.1", port)):
        harness.poll(lambda: curl(proxy, "/health/ready")[0] == 200, what="it is seen to be back")


class StartingUp(gate.Listening):
    """A server that lets nobody in yet."""

    def serve(self, client):
        with client:
            client.recv(1000)
            body = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0"
            client.sendall(b"E" + (len(body) + 4).to_bytes(4, "big") + body)


@pytest.mark.parametrize("why", ["silent", "starting up", "another CA", "no standby"])
def test_where_nobody_can_log_in_it_is_not_ready(proxies, pg, tmp_path, why):
    """However often it is asked: that something takes connections is no database yet."""
    with gate.Gate(pg.port) as between, StartingUp() as starting:
        between.silent = why == "silent"
        url = {"silent": pg.url(port=between.port), "no standby": pg.url(port=between.port) + "&target_session_attrs=standby",
               "starting up": pg.url(port=starting.port, sslmode="disable"),
               "another CA": pg.url(sslmode="require") + "&sslmode=verify-full&sslrootcert=" + certified(tmp_path)["ca"]}[why]
        proxy = proxies({"pool": {"connectionTimeoutMillis": 300}}, url=url)
        with wire.Wire(proxy.port) as client:
            assert client.login(USER, PASSWORD, DATABASE).error["C"] in ("08006", "57P03")
        answers = set()
        for _ in range(20):
            answers.add((curl(proxy, "/health/ready")[0], json.loads(curl(proxy, "/health")[1])["status"]))
            time.sleep(0.1)
        assert answers == {(503, "unhealthy")}
        assert re.search(r"^pgsidecar_health_up.* 0$", curl(proxy, "/metrics")[1], re.M)
        assert proxy.json("/api/monitoring/compute-health?probe=1")[1]["database"]["status"] == "down"
        assert proxy.command("wait", "--max", "1s", "--config", proxy.config_file).returncode == 1
        if why == "silent":
            between.silent = False
            assert proxy.command("wait", "--max", "10s", "--config", proxy.config_file).returncode == 0
            assert pg.count() <= 1 and raw(proxy).value("SELECT 1") == "1"


def test_a_probe_wants_an_answer(proxies, pg):
    """Of the server, not of what stands before it; and it is no connect, whose time is shown elsewhere."""
    def probe():
        return proxy.json("/api/monitoring/compute-health?probe=1")[1]["database"]

    def latency():
        return re.search("^pgsidecar_backend_latency_seconds.*", curl(proxy, "/metrics")[1], re.M)[0]
    with gate.Gate(pg.port) as between:
        proxy = proxies({"pool": {"connectionTimeoutMillis": 500}}, url=pg.url(port=between.port))
        with raw(proxy) as w:
            assert w.value("SELECT 1") == "1"
            told, took = len(pg.log.read_text()), latency()
            assert probe()["status"] == "up" and latency() == took
            between.silent = True
            silent = probe()
            assert silent["status"] == "down" and "timeout expired" in silent["error"]
            assert curl(proxy, "/health/ready")[0] == 503
            between.silent = False
            harness.poll(lambda: curl(proxy, "/health/ready")[0] == 200, what="it is seen to be back")
            assert w.value("SELECT 1") == "1" and pg.count() == 1
            assert "SSL" not in pg.log.read_text()[told:], "the server has nothing to complain of"


@pytest.mark.parametrize("dead", ["main", "other"])
def test_readiness_is_of_the_main_database(proxies, pg, dead):
    nowhere = pg.url(port=harness.free_port())
    urls = {"main": pg.url(), "other": pg.url(host="localhost")}
    urls[dead] = nowhere
    proxy = proxies({"databases": {DATABASE: {}, "other": {"upstream": {"url": urls["other"]}}}, "pool": {"connectionTimeoutMillis": 300}}, url=urls["main"])
    for _ in range(2):  # in turn: the last to be heard of decides nothing
        for name, database in (("main", DATABASE), ("other", "other")):
            with wire.Wire(proxy.port) as client:
                failure = client.login(USER, PASSWORD, database)
                assert failure.error["C"] == "08006" if name == dead else failure is None and client.value("SELECT 1") == "1"
        status, health = proxy.json("/health")
        error = health["checks"]["database"]["error"]
        if dead == "main":
            assert (status, health["status"], curl(proxy, "/health/ready")[0]) == (503, "unhealthy", 503) and "refused" in error
        else:
            assert (status, health["status"], curl(proxy, "/health/ready")[0], error) == (200, "degraded", 200, None)
    upstreams = proxy.json("/api/monitoring/compute-health")[1]["upstreams"]
    assert sorted(upstream["status"] for upstream in upstreams) == ["down", "up"]
    assert all(("refused" in (upstream["error"] or "")) == (upstream["status"] == "down") for upstream in upstreams)


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


def test_http_of_proxies_and_of_careful_clients(proxy):
    """A target with its scheme and host, which count before the Host header; a client that asks before it sends its body."""
    def absolute(target, host="a"):
        return http(proxy, f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    for target in ("http://127.0.0.1/health/live", "HTTP://a:5000/health/live?x=1", "http://a", "http://a?x"):
        assert absolute(target).startswith(b"HTTP/1.1 200"), target
    assert absolute("http://localhost/api/monitoring/clients", "evil.example").startswith(b"HTTP/1.1 200")
    assert absolute("http://evil.example/api/monitoring/clients", "localhost").startswith(b"HTTP/1.1 403")
    with socket.create_connection(("127.0.0.1", proxy.admin_port), 10) as sock:
        sock.sendall(b"POST /api/admin/reload HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 2\r\nConnection: close\r\n\r\n")
        assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"{}")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


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


def test_query_time_of_a_client_with_settings(proxy):
    with raw(proxy, application_name="pgbench") as a, raw(proxy, application_name="other") as b:
        for _ in range(3):  # each has the connection's settings changed
            a.value("SELECT 1"), b.value("SELECT 1")
        assert 0 < proxy.stats()["query"]["max"] < 10000


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
        assert compute["endpoint"] == f"127.0.0.1:{server.port}"
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
