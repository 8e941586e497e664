"""The tools themselves, without a proxy: what they say of a direct connection must be true."""
import time

import pytest

import harness
import wire
from gate import Gate

pytestmark = pytest.mark.generic


def test_raw_login_and_query(pg):
    with wire.Wire(pg.port) as w:
        w.send(wire.request(wire.SSL_REQUEST))
        assert w.bytes(1) == b"S"
    with wire.Wire(pg.port, host=str(pg.directory)) as w:
        assert w.login("postgres", "", "postgres") is None
        assert w.value("SELECT 6 * 7") == "42"


def test_gate(pg):
    with Gate(pg.port) as gate:
        with pg.connect(port=gate.port) as connection:
            gate.slice = 1
            assert connection.execute("SELECT 'sliced'").fetchone() == ("sliced",)
            gate.slice, gate.delay = 0, 0.1
            before = time.monotonic()
            connection.execute("SELECT 1")
            assert time.monotonic() - before >= 0.2
            assert gate.count() == 1
            gate.cut()
            with pytest.raises(harness.psycopg.OperationalError):
                connection.execute("SELECT 1")


def test_watch_sees_every_connection(pg):
    with harness.Watch(pg, "usename = 'app'") as watch:
        connections = [pg.connect() for _ in range(7)]
        harness.poll(lambda: watch.most >= 7, what="seven connections seen")
        for connection in connections:
            connection.close()
    assert watch.most == 7 and watch.without_tls == 0
