"""What the proxy tells of itself: the loops' load and lag, what a transaction costs, who holds the memory, and what its CPU time is
spent in."""
import json
import re
import signal
import socket
import ssl
import struct
import subprocess
import threading
import time

import jsonschema
import pytest

import harness
from harness import poll

PROFILE = "/api/monitoring/profile"
SCHEMA = json.loads((harness.ROOT / "admin/schema/profile.schema.json").read_text())


def profile(proxy, window=10):
    status, document = proxy.json(f"{PROFILE}?window={window}")
    assert status == 200, document
    jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker()).validate(document)
    return document


def pgbench(proxy, *arguments):
    done = subprocess.run(["pgbench", "-n", "-f", "-", *arguments], env=proxy.environment(), capture_output=True, text=True, timeout=120,
                          input="SELECT repeat('x', 1000);\n")
    assert done.returncode == 0, done.stderr
    return int(re.search(r"transactions actually processed: (\d+)", done.stdout)[1])


def test_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("sslmode", ["verify-full", "disable"])
def test_what_a_transaction_costs(proxies, sslmode):
    with harness.Postgres(plain=sslmode == "disable") as server:
        proxy = proxies({"pool": {"max": 5}}, server=server, url=server.url(sslmode=sslmode))
        count = pgbench(proxy, "-c", "8", "-t", "2000")
        seen = profile(proxy, 60)  # since the start
        assert seen["transactions"] == pytest.approx(count, abs=20)  # pgbench looks around first
        each = seen["perTransaction"]
        assert 2 <= each["systemCalls"] <= 20
        assert 1.9 <= each["receives"] <= 6 and 1.9 <= each["sends"] <= 4 and each["waits"] <= 0.2
        assert each["systemCalls"] == pytest.approx(each["receives"] + each["sends"] + each["waits"] + each["wakeups"], abs=0.01)
        # A query of 5 + 27 bytes, a row of 1000.
        assert each["bytesFromClients"] == pytest.approx(each["bytesToServers"], rel=0.1) and 30 <= each["bytesFromClients"] <= 60
        assert each["bytesToClients"] == pytest.approx(each["bytesFromServers"], rel=0.1) and 1000 <= each["bytesToClients"] <= 1200
        assert 1 <= each["cpuMicros"] <= 5000
        # pgbench keeps one turn for each side.
        assert 1.5 <= each["turns"] <= 4
        turns = seen["turns"]
        assert 0 < turns["timed"] <= turns["perSecond"] * seen["seconds"] / 127 + 2  # those that were interrupted are left out
        assert sum(phase["share"] for phase in turns["phases"].values()) == pytest.approx(1, abs=0.01)
        assert all(turns["phases"][name]["share"] > 0 for name in ("receive", "decide", "send", "wait"))
        assert (turns["phases"]["tls"]["share"] > 0) == (sslmode != "disable")
        handshakes = seen["tlsHandshakes"]
        opened = handshakes["servers"]["full"] + handshakes["servers"]["resumed"]
        assert opened == (0 if sslmode == "disable" else proxy.stats()["perPool"][0]["connects"])
        assert handshakes["clients"] == {"full": 0, "resumed": 0, "failed": 0, "msEach": None}


SSL_REQUEST = struct.pack("!II", 8, 80877103)


def encrypted(proxy, context, session=None):
    """Whether a client's handshake has resumed a session, and the session."""
    with socket.create_connection(("127.0.0.1", proxy.port), 10) as sock:
        sock.sendall(SSL_REQUEST)
        assert sock.recv(1) == b"S"
        with context.wrap_socket(sock, session=session) as wrapped:
            return wrapped.session_reused, wrapped.session


def test_tls_handshakes_of_both_sides(proxies, pg):
    proxy = proxies({"tls": {"mode": "allow", "certificate": str(pg.certificates / "server.crt"), "key": str(pg.certificates / "server.key")}})
    for _ in range(3):
        with proxy.connect(sslmode="require") as client:
            client.execute("SELECT 1")
        proxy.http("/api/admin/reconnect", method="POST")
        poll(lambda: proxy.stats()["totalCount"] == 0)
    seen, connects = profile(proxy)["tlsHandshakes"], proxy.stats()["perPool"][0]["connects"]
    assert (seen["clients"]["full"], seen["clients"]["resumed"], seen["clients"]["failed"]) == (3, 0, 0)
    assert (seen["servers"]["full"], seen["servers"]["resumed"], seen["servers"]["failed"]) == (connects, 0, 0)  # PostgreSQL resumes nothing
    assert connects >= 3
    assert 0 < seen["clients"]["msEach"] < 100 and 0 < seen["servers"]["msEach"] < 100

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # whose session is there with the handshake's end
    _, session = encrypted(proxy, context)
    assert encrypted(proxy, context, session)[0], "a client that can resumes"
    with socket.create_connection(("127.0.0.1", proxy.port), 10) as sock:
        sock.sendall(SSL_REQUEST)
        assert sock.recv(1) == b"S"
        sock.sendall(b"this is not TLS\n")
        while sock.recv(100):
            pass
    clients = profile(proxy)["tlsHandshakes"]["clients"]
    assert (clients["full"], clients["resumed"], clients["failed"]) == (4, 1, 1)


def test_load_is_seen_and_rest_too(proxy):
    with proxy.connect() as client:
        client.execute("SELECT 1")
        poll(lambda: profile(proxy, 1)["loops"]["data"]["utilization"] < 0.02, 30, "it rests", 0.2)
        load = subprocess.Popen(["pgbench", "-n", "-f", "-", "-c", "8", "-T", "60"], env=proxy.environment(), stdin=subprocess.PIPE,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        load.stdin.write(b"SELECT 1;\n")
        load.stdin.close()
        try:
            poll(lambda: (seen := profile(proxy, 1))["loops"]["data"]["utilization"] > 0.03 and seen["turns"]["perSecond"] > 100, 30,
                 "the load is seen", 0.2)
        finally:
            load.kill()
            load.wait()
        rest = poll(lambda: (seen := profile(proxy, 1))["loops"]["data"]["utilization"] < 0.02 and seen, 30, "it rests again", 0.2)
        assert rest["loops"]["control"]["utilization"] < 0.5  # it answers this test


def test_a_loop_that_was_stopped_was_late(proxies):
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 30000}})
    with proxy.connect() as holder, proxy.connect() as waiter:
        holder.execute("BEGIN")
        holder.execute("SELECT 1")
        waiting = threading.Thread(target=lambda: waiter.execute("SELECT 1"), daemon=True)
        waiting.start()
        poll(lambda: proxy.stats()["waitingCount"] == 1)  # so that the timer runs ten times a second
        poll(lambda: profile(proxy)["timers"]["microsPerRun"] is not None)
        proxy.signal(signal.SIGSTOP)
        time.sleep(2)  # that is what it is late by
        proxy.signal(signal.SIGCONT)
        late = poll(lambda: (lag := profile(proxy)["loops"]["data"]["lagMs"])["worst"] >= 1800 and lag, 10, "the lag shows")
        assert late["worstSinceStart"] >= late["worst"] > late["mean"]
        holder.execute("COMMIT")
        waiting.join(10)
        assert not waiting.is_alive()


@pytest.mark.skipif(harness.sanitized(), reason="a sanitizer's malloc tells nothing of the heap")
def test_who_holds_the_memory(proxies):
    proxy = proxies({"limits": {"maxClients": 500}})

    def memory():
        seen = profile(proxy)["memory"]
        assert sum(seen["owners"].values()) == seen["heapBytes"] <= seen["rssBytes"] * 1.5
        return seen
    with proxy.connect() as first:
        first.execute("SELECT 1")
        before = memory()
        assert before["owners"]["history"] > 100_000 and before["owners"]["servers"] > 50_000
        assert before["owners"]["other"] < 0.5 * before["heapBytes"], before
        held = [proxy.connect() for _ in range(300)]
        after = memory()
        grown = {name: after["owners"][name] - before["owners"][name] for name in before["owners"]}
        assert 300 * 700 <= grown["clients"] <= 300 * 4000, grown
        assert abs(grown["other"]) < 0.5 * grown["clients"], grown
        for index, client in enumerate(held[:100]):
            client.execute(f"SELECT {index}, '{'x' * 10_000}'", prepare=True)
        texts = memory()
        assert texts["owners"]["statements"] - after["owners"]["statements"] > 100 * 10_000
        for client in held:
            client.close()
        poll(lambda: proxy.stats()["clients"]["total"] == 1)
        assert memory()["owners"]["clients"] < before["owners"]["clients"] + 100_000


def test_stacks(proxies):
    proxy = proxies()
    load = threading.Thread(target=pgbench, args=(proxy, "-c", "8", "-T", "5"), daemon=True)
    load.start()
    poll(lambda: proxy.stats()["totalCount"] > 0)
    status, headers, body = proxy.http(f"{PROFILE}/stacks?seconds=2", timeout=30)
    assert status == 200 and headers["Content-Type"].startswith("text/plain"), body
    lines = [re.fullmatch(r"(data|control)((?:;[^;]+)*) (\d+)", line) for line in body.splitlines()]
    assert lines and all(lines), body
    assert 1 <= sum(int(line[3]) for line in lines) <= 2 * (2 * 97 + 1)
    if not harness.sanitized():
        relaying = sum(int(line[3]) for line in lines if line[1] == "data" and "pgsidecar::proxy::" in line[2])
        assert relaying > 0, body
    load.join(60)
    assert not load.is_alive()
    # No query has suffered from the signals, and at rest there is nothing to sample.
    assert proxy.stats()["perPool"][0]["connectFailures"] == 0
    status, _, body = proxy.http(f"{PROFILE}/stacks?seconds=1", timeout=30)
    assert status == 200 and sum(int(line.rsplit(" ", 1)[1]) for line in body.splitlines()) < 50


def test_stacks_one_at_a_time(proxy):
    answers = harness.threads(2, lambda _: proxy.http(f"{PROFILE}/stacks?seconds=5", timeout=30))
    assert sorted(answer[0] for answer in answers) == [200, 409]
    assert "already" in next(json.loads(answer[2])["error"] for answer in answers if answer[0] == 409)
    assert proxy.http(f"{PROFILE}/stacks?seconds=1", timeout=30)[0] == 200
