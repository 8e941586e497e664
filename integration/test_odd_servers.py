"""Servers that answer a login as few do: one that is about to fail, a pooler whose own server is down, something else altogether."""
import contextlib
import re
import socket
import struct
import subprocess
import threading
import time

import pytest

import harness
import wire
from gate import Listening
from harness import DATABASE, PASSWORD, USER

WELCOME = wire.frame("R", struct.pack("!i", 0)) + wire.frame("K", struct.pack("!ii", 1, 2)) + wire.frame("Z", b"I")


def failure(sqlstate="", text=""):
    fields = b"".join(code + value.encode() + b"\0" for code, value in ((b"S", "FATAL"), (b"C", sqlstate), (b"M", text)) if value)
    return wire.frame("E", fields + b"\0")


class Server(Listening):
    """Accepts; after the StartupMessage it sends `answer` and closes. Without an answer nothing is read."""

    def __init__(self, answer=None):
        self.answer, self.accepted, self.received = answer, 0, []
        super().__init__()

    def serve(self, client):
        self.accepted += 1
        threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client):
        with client, contextlib.suppress(OSError):
            client.settimeout(10)
            if self.answer is None:
                return
            client.recv(4096)
            client.sendall(self.answer)
            self.received.append(client.recv(4096))


def url(*ports, query="sslmode=disable", password=PASSWORD):
    secret = "" if password is None else ":" + harness.percent(password)
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    return f"postgresql://{USER}{secret}@{hosts}/{DATABASE}?{query}"


def login_error(proxy):
    with wire.Wire(proxy.port) as w:
        refused = w.login(USER, PASSWORD, DATABASE)
        return refused and refused.error


@pytest.mark.parametrize("answer,sqlstate,says", [
    (failure("28000"), "28000", "didn't say why"),
    (failure(), "XX000", "didn't say why"),
    (b"Ecould not fork new process for connection: Resource temporarily unavailable\n\0", "08006",
     "could not fork new process for connection: Resource temporarily unavailable"),
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "08P01", "invalid message"),
], ids=["no text", "nothing", "before there were lengths", "another protocol"])
def test_a_refusal_is_told(proxies, pg, answer, sqlstate, says):
    with Server(answer) as server:
        proxy = proxies({"pool": {"connectionTimeoutMillis": 1000}}, url=url(server.port))
        error = login_error(proxy)
        assert (error["C"], says in error["M"]) == (sqlstate, True), error
        assert proxy.http("/health/live")[0] == 200


@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_connections_that_end_at_once_are_not_made_over_and_over(proxies, mode):
    """A pooler in front of a server that is down accepts logins and then says what is wrong."""
    with Server(WELCOME + failure("08P01", "server login has been failing, try again later")) as server:
        proxy = proxies({"pool": {"mode": mode, "connectionTimeoutMillis": 3000}}, url=url(server.port))
        error = login_error(proxy)
        assert error is None or "server login has been failing" in error["M"], error
        assert server.accepted < 30
        before = server.accepted
        time.sleep(1)
        assert server.accepted - before < 5


class Dying(Server):
    """Says that it ends when it is asked something, and takes a while to do so."""

    def __init__(self):
        self.open, self.most = 0, 0
        super().__init__()

    def _answer(self, client):
        self.open += 1
        self.most = max(self.most, self.open)
        with contextlib.suppress(OSError):
            client.settimeout(10)
            client.recv(4096)
            client.sendall(WELCOME)
            client.recv(4096)
            client.sendall(failure("57P01", "terminating connection due to administrator command"))
            time.sleep(0.5)
        self.open -= 1
        client.close()


def test_a_connection_counts_until_its_server_has_ended(proxies):
    with Dying() as server:
        proxy = proxies({"pool": {"max": 1, "min": 0, "residueCheck": "never"}}, url=url(server.port))
        end = time.monotonic() + 4

        def client(_):
            while time.monotonic() < end:
                with wire.Wire(proxy.port) as w:
                    if w.login(USER, PASSWORD, DATABASE) is None:
                        w.send(wire.query("SELECT 1"))
                        with contextlib.suppress(wire.Closed):
                            w.until("E")

        harness.threads(3, client)
        assert server.accepted > 2 and server.most == 1


def test_too_many_connections_is_no_reason_to_go_elsewhere(proxies, pg):
    pg.sql("CREATE ROLE limited LOGIN PASSWORD 'limited' CONNECTION LIMIT 0")
    try:
        with Server() as other:
            proxy = proxies({"pool": {"connectionTimeoutMillis": 1000}},
                            url=f"postgresql://limited:limited@127.0.0.1:{pg.port},127.0.0.1:{other.port}/{DATABASE}?sslmode=require")
            with wire.Wire(proxy.port) as w:
                assert w.login("limited", "limited", DATABASE).error["C"] == "53300"
            assert other.accepted == 0
            proxy.stop()
    finally:
        pg.sql("DROP ROLE limited")


def test_a_host_gets_no_other_hosts_password(proxies, tmp_path):
    with Server(wire.frame("R", struct.pack("!i", 3))) as server:
        dead, file = harness.free_port(), tmp_path / "passfile"
        file.write_text(f"127.0.0.1:{dead}:*:*:{PASSWORD}\n")
        file.chmod(0o600)
        proxy = proxies({"pool": {"connectionTimeoutMillis": 1000}},
                        url=url(dead, server.port, password=None, query=f"sslmode=disable&require_auth=password&passfile={file}"))
        assert login_error(proxy)
        assert server.accepted > 0 and not any(PASSWORD.encode() in data for data in server.received)


def test_the_first_of_two_refusals_is_told(proxies, pg):
    """sslmode prefer, the default on loopback, tries a refused login without TLS too."""
    proxy = proxies({"pool": {"connectionTimeoutMillis": 1000}}, url=f"postgresql://{USER}:wrong@127.0.0.1:{pg.port}/{DATABASE}")
    with wire.Wire(proxy.port) as w:
        error = w.login(USER, "wrong", DATABASE).error
    assert error["C"] == "28P01" and f'password authentication failed for user "{USER}"' in error["M"], error


def test_a_socket_path_that_is_too_long(proxies, pg):
    path = "/tmp/" + "x" * 110
    keys = {"user": USER, "password": PASSWORD, "dbname": DATABASE, "sslmode": "require"}
    proxy = proxies({"upstream": {"url": None, "host": path, **keys}, "pool": {"max": 1, "connectionTimeoutMillis": 1000}})
    assert "too long" in login_error(proxy)["M"]
    proxy.write_config({**proxy.config, "upstream": {"host": f"{path},127.0.0.1", "port": str(pg.port), **keys}})
    proxy.signal(1)
    harness.poll(lambda: login_error(proxy) is None, what="the other host is reached")


def test_a_silent_name_server_holds_up_its_own_name_alone(proxies, pg, tmp_path):
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a mount namespace")
    names, switch, binary = tmp_path / "resolv.conf", tmp_path / "nsswitch.conf", tmp_path / "pgsidecar"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.77", 53))
        names.write_text("nameserver 127.0.0.77\noptions timeout:30 attempts:2\n")
        switch.write_text("hosts: files dns\n")
        binary.write_text(f"#!/bin/sh\nexec unshare -m sh -c 'mount --bind {names} /etc/resolv.conf && mount --bind {switch} /etc/nsswitch.conf && "
                          f"exec {harness.BINARY} \"$@\"' sh \"$@\"\n")
        binary.chmod(0o755)
        bad = {"upstream": {"host": "silent.example.com"}}
        proxy = proxies({"databases": {DATABASE: {}, **{f"bad{i}": bad for i in range(6)}}, "pool": {"max": 2, "connectionTimeoutMillis": 1000}},
                        binary=binary)
        waiting = [threading.Thread(target=lambda i=i: refused(proxy, f"bad{i}"), daemon=True) for i in range(6)]
        for thread in waiting:
            thread.start()
        time.sleep(0.3)
        begun = time.monotonic()
        assert login_error(proxy) is None
        assert time.monotonic() - begun < 0.9
        # A host that has an address is tried before the others' names are known.
        proxy.write_config({**proxy.config, "databases": {DATABASE: {"upstream": {"host": "127.0.0.1,silent.example.com", "port": str(pg.port)}}},
                            "pool": {"max": 2, "connectionTimeoutMillis": 4000}})
        proxy.signal(1)
        pg.sql("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = 'app'")
        harness.poll(lambda: login_error(proxy) is None, what="the host with an address is reached")
        for thread in waiting:
            thread.join(10)


def refused(proxy, database):
    with wire.Wire(proxy.port) as w:
        return re.search("timed out|address", w.login(USER, PASSWORD, database).error["M"])
