"""A pool's places where the server's processes hang: they count until the server has ended them, as it counts, and for no longer."""
import contextlib
import os
import signal
import subprocess

import pytest

import harness
import wire
from gate import Gate
from harness import DATABASE, PASSWORD, USER, raw
from test_faults import own, recovers  # noqa: F401 own is a fixture


@contextlib.contextmanager
def hanging_backends(server, pids=None):
    """The pids of the pool's, or these, which are stopped for as long."""
    pids = server.backends("usename = 'app'") if pids is None else pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield pids
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def hanging_backend(server):
    """The pid of the only one."""
    pid, = server.backends("usename = 'app'")
    with hanging_backends(server, [pid]):
        yield pid


def test_a_backend_that_hangs_counts_for_max_until_it_ends(own, proxies):
    """As the server counts: what it hasn't closed is there."""
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 8000}}, server=own)
    with raw(proxy) as w:
        assert w.value("SELECT 1") == "1"
        with hanging_backend(own) as pid:
            assert proxy.http("/api/admin/reconnect", "POST")[0] == 200
            error = next(m for m in w.ask(wire.query("SELECT 2")) if m.type == "E").error
            assert error["C"] == "53300" and "1 of 1 in use, of which 1 doesn't end" in error["M"], error
            assert own.backends("usename = 'app'") == [pid] and proxy.stats()["totalCount"] == 1
            assert proxy.log_text().count("the server doesn't end it") == 1
        harness.poll(lambda: own.backends("usename = 'app'") == [] and proxy.stats()["totalCount"] == 0, what="it has ended, and its place is free")
        assert w.value("SELECT 3") == "3"
    recovers(proxy)


def test_a_backend_that_hangs_leaves_a_listening_client_and_another_one_place(own, proxies):
    proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 9000}}, server=own)
    with raw(proxy) as listener, raw(proxy) as w:
        listener.ask(wire.query("LISTEN news"))
        assert w.value("SELECT 'served'") == "served"
        pids = [pid for (pid,) in own.sql("SELECT pid FROM pg_stat_activity WHERE query = $$SELECT 'served'$$")]
        with hanging_backends(own, pids):
            assert proxy.http("/api/admin/reconnect", "POST")[0] == 200
            harness.poll(lambda: "the server doesn't end it" in proxy.log_text(), what="it is told of")
            assert w.value("SELECT 2") == "2"
            assert own.count("usename = 'app'") <= 2
            assert [m.error["C"] for m in listener.closed() if m.type == "E"] == ["57P01"]
            with raw(proxy) as again:  # which would take it anew
                assert again.ask(wire.query("LISTEN news"))[0].error["C"] == "0A000"
                assert again.value("SELECT 3") == "3"


def test_what_an_operator_closes_of_a_backend_that_hangs_is_let_go(own, proxies):
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 20000}}, server=own)
    with raw(proxy) as w:
        assert w.value("SELECT 1") == "1"
        with hanging_backend(own) as pid:
            proxy.http("/api/admin/reconnect", "POST")
            harness.poll(lambda: "the server doesn't end it" in proxy.log_text(), what="it is told of")
            server, = proxy.json("/api/monitoring/servers")[1]["servers"]
            assert server["state"] == "closing" and server["pid"] == pid
            assert proxy.http(f"/api/admin/servers/{server['id']}/close", "POST")[0] == 200
            assert w.value("SELECT 2") == "2"


def test_what_an_operator_closes_of_a_backend_that_hangs_is_let_go_soon(own, proxies):
    """Closed before anybody knew that it hangs."""
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 9000}}, server=own)
    with raw(proxy) as w:
        assert w.value("SELECT 1") == "1"
        with hanging_backend(own):
            server, = proxy.json("/api/monitoring/servers")[1]["servers"]
            assert proxy.http(f"/api/admin/servers/{server['id']}/close", "POST")[0] == 200
            assert w.value("SELECT 2") == "2"


def processes(server):
    """The server's for the pool's user, those that are logging in included."""
    out = subprocess.run(["ps", "-o", "args=", "--ppid", str(server.process.pid)], capture_output=True, text=True).stdout
    return out.count(f": {USER} {DATABASE} ")


@contextlib.contextmanager
def slow_logins(server, seconds):
    with server.admin() as admin:
        def delay(value):
            admin.execute(f"ALTER SYSTEM SET post_auth_delay = {value}")
            admin.execute("SELECT pg_reload_conf()")
        delay(seconds)
        yield
        delay(0)


def test_logins_that_hang_count_for_max_until_they_end(own, proxies):
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 500}}, server=own)

    def error():
        assert processes(own) <= 1
        return wire.wire_error(proxy.port, False, USER, PASSWORD, DATABASE)

    with slow_logins(own, 9):
        for _ in range(4):  # each is told in time why
            failure = error()
            assert failure["C"] == "08006" and "timeout expired after 500 ms" in failure["M"], failure
        hangs = harness.poll(lambda: (failure := error())["C"] == "53300" and failure["M"], what="what keeps the place is told")
        assert "1 of 1 in use, of which 1 doesn't end" in hangs, hangs
        assert proxy.http("/health/ready")[0] == 503
        harness.poll(lambda: "1 of 1 in use, of which 1 doesn't end" in proxy.http("/health/ready")[2], what="and why it isn't ready")
        assert processes(own) == 1
    recovers(proxy)


@pytest.mark.parametrize("sslmode", ["require", "disable"])
def test_logins_that_nobody_answers_keep_no_places(proxies, sslmode):
    """As with a load balancer whose server is gone: when there is one again, what was tried before is in nobody's way."""
    with harness.Postgres(plain=True) as server, Gate(server.port) as gate:
        proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 300}}, url=server.url(port=gate.port, sslmode=sslmode))
        gate.silent = True
        for _ in range(10):
            failure = wire.wire_error(proxy.port, False, USER, PASSWORD, DATABASE)
            assert failure["C"] == "08006", failure
        gate.silent = False
        recovers(proxy, 7)
