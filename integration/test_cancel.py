"""Cancel requests: they hit what their client has asked for, whatever it waits for, and nobody else (PostgreSQL documentation, section 55.2.8)."""
import socket
import struct
import threading
import time

import psycopg
import pytest

import cloud
import harness
import wire
from gate import Gate
from harness import DATABASE, raw
from wire import healthy, kinds


def send_cancel(proxy, w):
    with wire.Wire(proxy.port) as c:
        c.send(wire.request(wire.CANCEL_REQUEST, struct.pack("!I", w.pid) + w.key))
        assert c.closed() == []


def test_cancel(small, pg):
    with small.connect() as connection:
        failure = []

        def run():
            try:
                connection.execute("SELECT pg_sleep(60)")
            except psycopg.Error as error:
                failure.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        harness.poll(lambda: pg.count("usename = 'app' AND query LIKE '%%pg_sleep(60)%%' AND state = 'active'"), what="it runs")
        connection.cancel()
        thread.join(20)
        assert not thread.is_alive()
        assert failure[0].sqlstate == "57014"
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_cancel_is_encrypted_as_its_connection_is(proxies, pg):
    """A server that takes TLS only, or a network that others read, sees no cancel key in clear text."""
    with Gate(pg.port) as gate:
        proxy = proxies(url=pg.url(port=gate.port))
        with proxy.connect() as connection:
            connection.execute("SELECT 1")
            before = len(gate.seen)
            timer = threading.Timer(0.3, connection.cancel)
            timer.start()
            with pytest.raises(psycopg.errors.QueryCanceled):
                connection.execute("SELECT pg_sleep(30)")
            opened = [bytes(seen[:9]) for seen in gate.seen[before:]]
        assert wire.request(wire.SSL_REQUEST) + b"\x16" in opened, opened
        assert not [seen for seen in opened if seen.startswith(wire.request(wire.CANCEL_REQUEST)[4:8], 4)]


def test_a_cancel_request_is_over_when_the_server_has_it(proxies, pg):
    """PQcancel waits until its connection is closed: what the client sends then isn't hit."""
    with Gate(pg.port) as gate:
        proxy = proxies(url=pg.url(port=gate.port))
        with raw(proxy) as w:
            w.ask(wire.query("BEGIN"))
            w.send(wire.query("SELECT pg_sleep(0.2)"))
            harness.poll(lambda: pg.count("usename = 'app' AND state = 'active'") == 1)
            gate.delay = 0.3
            begun = time.monotonic()
            with socket.create_connection(("127.0.0.1", proxy.port), 10) as canceler:
                canceler.sendall(wire.request(wire.CANCEL_REQUEST, struct.pack("!I", w.pid) + w.key))
                assert canceler.recv(1) == b"" and time.monotonic() - begun > 0.3
            w.until()
            gate.delay = 0
            assert kinds(w.ask(wire.query("SELECT pg_sleep(0.5)"))) in ("TDCZ", "EZ")
            w.ask(wire.query("ROLLBACK"))
            healthy(w)


class Late(Gate):
    """New connections are slow from when `late` is set."""
    late = 0

    def _relay(self, source, *rest):
        time.sleep(self.late)
        super()._relay(source, *rest)


def test_a_cancel_that_gets_no_answer_says_so(proxies, pg):
    with Gate(pg.port) as gate:
        proxy = proxies({"pool": {"max": 1}}, url=pg.url(port=gate.port))
        with raw(proxy) as w:
            w.send(wire.query("SELECT pg_sleep(60)"))
            harness.poll(lambda: pg.count("query = 'SELECT pg_sleep(60)' AND state = 'active'"), what="it runs")
            gate.silent = True
            send_cancel(proxy, w)
            assert "cannot send a cancel request: timeout expired after 5000 ms" in proxy.log_text()
            gate.silent = False
            send_cancel(proxy, w)
            assert [m.error["C"] for m in w.until() if m.type == "E"] == ["57014"]


def test_a_cancel_that_comes_too_late_hits_nobody(proxies):
    """Its connection is given up after 5 s; the request comes later all the same."""
    with harness.Postgres(plain=True) as own, Late(own.port) as gate:
        proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 20000}}, url=own.url(port=gate.port, sslmode="disable"))
        with raw(proxy, timeout=30) as one, raw(proxy, timeout=30) as other:
            one.send(wire.query("SELECT pg_sleep(1)"))
            harness.poll(lambda: own.count("usename = 'app' AND state = 'active'") == 1)
            gate.late = 6.5
            with socket.create_connection(("127.0.0.1", proxy.port), 10) as canceler:
                canceler.sendall(wire.request(wire.CANCEL_REQUEST, struct.pack("!I", one.pid) + one.key))
                assert kinds(one.until()) == "TDCZ"
                gate.late = 0
                assert kinds(other.ask(wire.query("SELECT pg_sleep(3)"))) == "TDCZ"
        proxy.stop()


def test_a_cancel_that_takes_long_hits_nobody_else(proxies):
    """A server that sends TLS session tickets has said something before it has the request."""
    with harness.Postgres(plain=True) as own, cloud.Router(own, own.certificates) as router:
        router.cancel_takes = 1.0
        proxy = proxies({"pool": {"max": 1}}, url=own.url(port=router.port, sslmode="require"))
        with raw(proxy) as one, raw(proxy) as other:
            one.send(wire.query("SELECT pg_sleep(0.6)"))
            harness.poll(lambda: own.count("usename = 'app' AND state = 'active'") == 1)
            with socket.create_connection(("127.0.0.1", proxy.port), 10) as canceler:
                canceler.sendall(wire.request(wire.CANCEL_REQUEST, struct.pack("!I", one.pid) + one.key))
                other.send(wire.query("SELECT pg_sleep(1.5)"))
                assert kinds(one.until()) == "TDCZ"
                assert kinds(other.until()) == "TDCZ"
        proxy.stop()


def test_cancel_requests_in_masses(proxies, pg):
    with Gate(pg.port) as gate:
        proxy = proxies(url=pg.url(port=gate.port))
        with raw(proxy) as w:
            w.send(wire.query("SELECT pg_sleep(2)"))
            harness.poll(lambda: pg.count("usename = 'app' AND state = 'active'") == 1)
            before = proxy.open_files()
            gate.silent = True
            sent = [socket.create_connection(("127.0.0.1", proxy.port), 10) for _ in range(100)]
            for one in sent:
                one.sendall(wire.request(wire.CANCEL_REQUEST, struct.pack("!I", w.pid) + w.key))
            harness.poll(lambda: proxy.open_files() <= before + 10, timeout=2, what="few wait for the server")
            w.until()
            for one in sent:
                one.close()
            gate.cut()
            gate.silent = False
            healthy(w)


def test_cancel_hits_nobody_else(proxies, pg):
    """One client cancels while idle, again and again; the others on the same servers never feel it."""
    proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 60000}})
    stop = threading.Event()

    def work(index):
        if index == 0:
            with raw(proxy) as w:
                for _ in range(150):
                    healthy(w)
                    with wire.Wire(proxy.port) as c:
                        c.send(wire.request(wire.CANCEL_REQUEST, struct.pack("!I", w.pid) + w.key))
                        c.closed()
            stop.set()
        else:
            with raw(proxy) as w:
                while not stop.is_set():
                    assert w.value("SELECT pg_sleep(0.001)::text || 'ok'") == "ok"

    harness.threads(5, work)


def test_cancel_with_a_wrong_key(small, pg):
    with raw(small) as w:
        w.send(wire.query("SELECT pg_sleep(1), 'done'"))
        for pid, key in ((w.pid, bytes(len(w.key))), (w.pid + 1, w.key), (0, b"\0" * 4)):
            with wire.Wire(small.port) as c:
                c.send(wire.request(wire.CANCEL_REQUEST, struct.pack("!I", pid) + key))
                assert c.closed() == []
        assert [m.row[1] for m in w.until() if m.type == "D"] == [b"done"]


def test_cancel_of_a_waiting_client(proxies):
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 30000}})
    with raw(proxy) as holder, raw(proxy) as waiter:
        holder.ask(wire.query("BEGIN"))
        waiter.send(wire.query("SELECT 1"))
        harness.poll(lambda: proxy.stats()["waitingCount"] == 1, what="it waits")
        with wire.Wire(proxy.port) as c:
            c.send(wire.request(wire.CANCEL_REQUEST, struct.pack("!I", waiter.pid) + waiter.key))
            assert c.closed() == []
        messages = waiter.until()
        assert kinds(messages) == "EZ" and messages[0].error["C"] == "57014"
        holder.ask(wire.query("COMMIT"))
        healthy(waiter)


@pytest.mark.parametrize("request_bytes", [wire.query("SELECT pg_sleep(30)"), wire.parse("SELECT pg_sleep(30)") + wire.bind() + wire.execute() + wire.SYNC], ids=["simple", "extended"])
def test_cancel_while_the_session_is_looked_at(proxies, pg, request_bytes):
    """What is kept back until the server has said what the session holds can be cancelled like what waits for a server."""
    proxy = proxies({"pool": {"max": 1}})
    with raw(proxy) as w, pg.admin(DATABASE) as admin:
        w.ask(wire.query("SELECT 1"))
        with admin.transaction():
            admin.execute("LOCK TABLE pg_catalog.pg_prepared_statements IN ACCESS EXCLUSIVE MODE")
            w.ask(wire.query("SET work_mem = '5MB'"))
            w.send(request_bytes)
            time.sleep(0.3)
            send_cancel(proxy, w)
            messages = w.until()
            assert kinds(messages) == "EZ" and messages[0].error["C"] == "57014"
        assert w.value("SHOW work_mem") == "5MB"


def test_cancel_while_settings_are_carried(proxies, pg):
    proxy = proxies({"pool": {"max": 1}})
    with raw(proxy) as w, pg.admin(DATABASE) as admin:
        w.ask(wire.query("SET default_text_search_config = 'simple'"))
        harness.poll(lambda: proxy.stats()["activeCount"] == 0, what="its session has been looked at")
        pg.sql("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = 'app'")
        harness.poll(lambda: proxy.stats()["totalCount"] == 0, what="the loss is noticed")
        with admin.transaction():
            admin.execute("LOCK TABLE pg_ts_config IN ACCESS EXCLUSIVE MODE")
            w.send(wire.query("SELECT pg_sleep(30)"))
            harness.poll(lambda: pg.count("wait_event_type = 'Lock' AND usename = 'app'") == 1, what="the setting waits")
            send_cancel(proxy, w)
        messages = w.until()
        assert kinds(messages)[-2:] == "EZ" and messages[-2].error["C"] == "57014"
        assert w.value("SHOW default_text_search_config") == "pg_catalog.simple"


def test_a_late_cancel_reaches_no_later_statement(proxies, pg):
    """It comes when the client has its answer and the proxy asks about the session."""
    proxy = proxies({"pool": {"max": 1}})
    with raw(proxy) as w, pg.admin(DATABASE) as admin:
        w.ask(wire.query("CREATE TEMP TABLE pins (a int)"))
        w.value("SELECT 1")  # it waits until the session was looked at after that
        with admin.transaction():
            admin.execute("LOCK TABLE pg_catalog.pg_prepared_statements IN ACCESS EXCLUSIVE MODE")
            assert kinds(w.ask(wire.query("SET work_mem = '5MB'"))) == "CZ"
            harness.poll(lambda: pg.count("wait_event_type = 'Lock' AND usename = 'app'") == 1, what="the session is looked at")
            send_cancel(proxy, w)
            time.sleep(0.3)
        assert kinds(w.ask(wire.query("SELECT pg_sleep(0.5)"))) == "TDCZ"
