"""Chaos: what breaks is told clearly and at once, nothing hangs, nothing crashes; and then it recovers."""
import os
import random
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import threading
import time

import psycopg
import pytest

import harness
import wire
from gate import Gate
from harness import DATABASE, PASSWORD, USER, raw
from wire import kinds

LOST = {"08006", "08003", "08007", "57P01", "57P02", "57P03", "08001"}


def recovers(proxy, within=20):
    """New and pooled connections work, five in a row."""
    def works():
        try:
            with proxy.connect() as connection:
                for _ in range(5):
                    assert connection.execute("SELECT 1").fetchone() == (1,)
            return True
        except psycopg.Error:
            return False
    harness.poll(works, within, "it recovers", 0.1)


@pytest.fixture
def own():
    """A server of its own for tests that break it."""
    with harness.Postgres(max_connections=40) as server:
        yield server


def kill_backend(pid):
    os.kill(pid, signal.SIGKILL)


def test_kill_9_of_the_backend_in_mid_query(own, proxies):
    proxy = proxies({"pool": {"max": 3}}, server=own)
    with raw(proxy) as idle, raw(proxy) as busy, raw(proxy) as transaction:
        assert idle.value("SELECT 1") == "1"
        transaction.ask(wire.query("BEGIN"))
        transaction.ask(wire.query("SELECT 1"))
        busy.send(wire.query("SELECT pg_sleep(60)"))
        pid = harness.poll(lambda: own.backends("query LIKE '%pg_sleep(60)%' AND state = 'active'"), what="it runs")[0]
        kill_backend(pid)
        messages = busy.until()
        error = [m for m in messages if m.type == "E"][-1].error
        assert error["C"] in LOST and error["S"] == "ERROR", error
        assert messages[-1].body == b"I"  # the client is kept
        # The crash restart took the others' servers too: the open transaction is broken and stays so until it is ended.
        # They are told to quit one after the other, so that its own may answer once more.
        messages = harness.poll(lambda: (lambda m: m if any(x.type == "E" for x in m) else None)(transaction.ask(wire.query("SELECT 1"))), what="it hears of it")
        assert [m.type for m in messages if m.type in "EZ"] == ["E", "Z"]
        if messages[-1].body == b"E":
            assert transaction.ask(wire.query("SELECT 1"))[-1].body == b"E"
        assert transaction.ask(wire.query("ROLLBACK"))[-1].body == b"I"
        own.wait_ready()
        harness.poll(lambda: all(m.type != "E" for m in idle.ask(wire.query("SELECT 1"))), 20, "the idle client works again", 0.1)
        harness.poll(lambda: all(m.type != "E" for m in busy.ask(wire.query("SELECT 1"))), 20, "the busy client works again", 0.1)
    recovers(proxy)


def test_terminated_backends_are_not_noticed_by_idle_clients(own, proxies):
    proxy = proxies({"pool": {"max": 4}}, server=own)
    clients = [raw(proxy) for _ in range(8)]
    for w in clients:
        assert w.value("SELECT 1") == "1"
    harness.poll(lambda: not own.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'"), what="they are gone")
    for w in clients:
        assert w.value("SELECT 2") == "2"
        w.sock.close()


def test_terminated_in_a_transaction(own, proxies):
    proxy = proxies({"pool": {"max": 2}}, server=own)
    with raw(proxy) as w:
        w.ask(wire.query("BEGIN"))
        pid = harness.poll(lambda: own.backends("usename = 'app' AND state = 'idle in transaction'"), what="it is in a transaction")[0]
        own.sql("SELECT pg_terminate_backend(%s)", pid)
        harness.poll(lambda: pid not in own.backends(), what="it is gone")
        messages = w.ask(wire.query("SELECT 1"))
        error = next(m for m in messages if m.type == "E").error
        assert error["C"] in LOST | {"25P02"}, error
        assert messages[-1].body == b"E"
        messages = w.ask(wire.query("SELECT 'never in another transaction'"))
        assert messages[-1].body == b"E" and not [m for m in messages if m.type == "D"]
        # COMMIT of a broken transaction is a ROLLBACK, as in PostgreSQL
        messages = w.ask(wire.query("COMMIT"))
        assert messages[-1].body == b"I"
        assert [m.tag for m in messages if m.type == "C"] in ([], ["ROLLBACK"])
        assert w.value("SELECT 3") == "3"
    recovers(proxy)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
def test_restart_of_postgresql_under_load(own, proxies, how):
    proxy = proxies({"pool": {"max": 5, "connectionTimeoutMillis": 15000}}, server=own)
    stop, errors, done = threading.Event(), [], [0] * 12

    def work(index):
        with raw(proxy, timeout=60) as w:
            while not stop.is_set():
                messages = w.ask(wire.query(f"SELECT {index}"))
                for m in messages:
                    if m.type == "E":
                        errors.append(m.error)
                    elif m.type == "D":
                        assert m.row == [str(index).encode()]
                        done[index] += 1

    def conduct():
        harness.poll(lambda: min(done) > 20, 30, "load runs")
        own.restart(how)
        before = list(done)
        harness.poll(lambda: all(now > then + 20 for now, then in zip(done, before)), 30, "every client works again")

    def both(index):
        if index < 12:
            return work(index)
        try:
            conduct()
        finally:
            stop.set()

    harness.threads(13, both)
    assert {e["C"] for e in errors} <= LOST | {"53300"}, errors[:3]
    recovers(proxy)


def test_server_down_tells_its_own_error_in_time_and_comes_back(own, proxies):
    proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 1000}}, server=own)
    with raw(proxy) as w:
        assert w.value("SELECT 1") == "1"
        own.stop()
        before = time.monotonic()
        messages = w.ask(wire.query("SELECT 1"))
        assert time.monotonic() - before < 5
        error = next(m for m in messages if m.type == "E").error
        assert error["C"] in LOST | {"53300"}, error
        messages = w.ask(wire.query("SELECT 1"))
        error = next(m for m in messages if m.type == "E").error
        assert "refused" in error["M"] + error.get("D", ""), error
        own.start()
        harness.poll(lambda: all(m.type != "E" for m in w.ask(wire.query("SELECT 1"))), 20, "the same client works again", 0.1)
    recovers(proxy)


def test_too_many_connections_at_the_server(own, proxies):
    """The server's own 53300 reaches a client only when its wait is over."""
    room = 40 - 3
    proxy = proxies({"pool": {"max": 5, "connectionTimeoutMillis": 1000}}, server=own)
    held = [own.connect() for _ in range(room)]
    with wire.Wire(proxy.port) as w:
        failure = w.login(USER, PASSWORD, DATABASE)
        error = failure.error if failure else next(m for m in w.ask(wire.query("SELECT 1")) if m.type == "E").error
        assert error["C"] == "53300", error
    for connection in held:
        connection.close()
    recovers(proxy)
    woke = re.search(r"answered ([\d.]+) s after the first attempt", proxy.log_text())
    assert not woke or float(woke[1]) < 1, "a server that answers doesn't sleep"


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "zeros": bytes(64),
    "huge length": struct.pack("!i", 0x7fffffff) + b"\0\3\0\0" + b"x" * 100,
    "negative length": struct.pack("!i", -5) + b"\0\3\0\0" + b"x" * 100,
    "short length": struct.pack("!i", 4) + b"\0\3\0\0",
    "no terminator": struct.pack("!ii", 20, 196608) + b"user\0appappa",
    "tls hello": bytes.fromhex("160301007a010000760303") + bytes(111),
    "random": random.Random(7).randbytes(5000),
    "many ssl requests": wire.request(wire.SSL_REQUEST) * 1000,
    "empty user": wire.startup_packet({"user": "", "database": "app"}),
    "no user": wire.startup_packet({"database": "app"}),
    "20 KB startup": wire.startup_packet({"user": "x" * 20000}),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_from_a_client_before_login(proxy, name):
    with raw(proxy) as good, wire.Wire(proxy.port, timeout=20) as bad:
        try:
            bad.send(GARBAGE[name])
            bad.sock.shutdown(1)
            while bad.sock.recv(65536):
                pass
        except OSError:
            pass
        assert good.value("SELECT 1") == "1"
    recovers(proxy)


AFTER = {
    "unknown type": wire.frame("?", b"what"),
    "server's message": wire.frame("Z", b"I"),
    "negative length": b"Q" + struct.pack("!i", -1) + b"x" * 50,
    "length 3": b"Q" + struct.pack("!i", 3),
    "huge sync": b"S" + struct.pack("!i", 0x7ffffff0) + b"x" * 1000,
    "unterminated query": wire.frame("Q", b"SELECT 1"),
    "password after login": wire.frame("p", b"secret\0"),
    "truncated parse": wire.frame("P", b"name"),
    "truncated bind": wire.frame("B", b"a\0"),
    "execute without count": wire.frame("E", b"\0"),
    "describe of x": wire.frame("D", b"x\0"),
    "close without name": wire.frame("C", b""),
    "random": random.Random(8).randbytes(3000),
}


@pytest.mark.parametrize("name", AFTER)
@pytest.mark.parametrize("state", ["idle", "in transaction"])
def test_garbage_from_a_client_after_login(proxies, name, state):
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 10000}})
    with raw(proxy, timeout=20) as bad:
        if state == "in transaction":
            bad.ask(wire.query("BEGIN"))
        try:
            bad.send(AFTER[name], wire.SYNC)
            bad.sock.shutdown(1)
            while bad.sock.recv(65536):
                pass
        except OSError:
            pass
    recovers(proxy)


@pytest.mark.parametrize("garbage", [b"\0" * 100, random.Random(9).randbytes(2000), wire.frame("Z", b"I") * 3, wire.frame("D", b"\xff\xff"),
                                     b"D" + struct.pack("!i", -2), b"E" + struct.pack("!i", 0x7fffffff) + b"SERROR\0", wire.frame("R", struct.pack("!i", 0))])
def test_garbage_from_the_server(proxies, pg, garbage):
    """Bytes put into the server's stream, in mid-query and while idle: that connection ends, its client is told."""
    with Gate(pg.port) as gate:
        url = pg.url(port=gate.port, sslmode="disable").split("?")[0] + "?sslmode=disable"
        with harness.Postgres(max_connections=20, plain=True) as plain:
            gate.target = ("127.0.0.1", plain.port)
            proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 5000}}, url=url)
            with raw(proxy, timeout=20) as w:
                w.send(wire.query("SELECT pg_sleep(1)"))
                harness.poll(lambda: plain.count("state = 'active' AND query LIKE '%%pg_sleep%%'"), what="it runs")
                gate.inject(garbage)
                try:
                    w.until()
                except wire.Closed:
                    pass
            recovers(proxy)
            gate.inject(garbage)
            recovers(proxy)


def test_cut_connections_to_the_server(pg, proxies):
    with Gate(pg.port) as gate:
        proxy = proxies({"pool": {"max": 3, "connectionTimeoutMillis": 10000}}, url=pg.url(port=gate.port))
        with raw(proxy) as w:
            for reset in (False, True):
                assert w.value("SELECT 1") == "1"
                gate.cut(reset)
                # No byte of this one was sent: another connection takes it, or the loss is found first.
                harness.poll(lambda: all(m.type != "E" for m in w.ask(wire.query("SELECT 1"))), 10, "the client works again", 0.05)
                w.send(wire.query("SELECT pg_sleep(30)"))
                harness.poll(lambda: pg.count("state = 'active' AND query LIKE '%%pg_sleep(30)%%'"), what="it runs")
                gate.cut(reset)
                messages = w.until()
                assert next(m for m in messages if m.type == "E").error["C"] in LOST
                pg.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%%pg_sleep(30)%%' AND pid <> pg_backend_pid()")
        recovers(proxy)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("what", ["described", "listening"])
def test_a_request_that_waits_is_answered_once_if_its_server_is_lost(pg, proxies, what, reset):
    """The proxy has only begun to prepare the way for it: settings, a statement, a look at its columns."""
    with Gate(pg.port) as gate:
        proxy = proxies({"pool": {"max": 2 if what == "described" else 3, "connectionTimeoutMillis": 10000}}, url=pg.url(port=gate.port))
        with raw(proxy, application_name="one") as one, raw(proxy, application_name="other") as other, raw(proxy) as holder:
            if what == "described":
                assert "T" in kinds(one.ask(wire.parse("SELECT 'described'", "s"), wire.describe("S", "s"), wire.SYNC))
            else:
                one.ask(wire.query("LISTEN c"))
            holder.ask(wire.query("BEGIN"))
            other.ask(wire.query("SELECT 'of the other'"))  # leaves the last server with its settings
            gate.stall()
            one.send(*((wire.bind("s"), wire.execute(), wire.SYNC) if what == "described" else (wire.query("LISTEN d"),)))
            time.sleep(0.1)
            gate.cut(reset)
            gate.resume()
            answers = kinds(one.until()).replace("N", "")
            assert answers == "2DCZ" if what == "described" else answers in ("EZ", "CZ"), answers
            for token in "abc":
                messages = [m for m in one.ask(wire.query(f"SELECT '{token}'")) if m.type != "N"]
                if kinds(messages) == "EZ":  # the next connection was cut too
                    assert messages[0].error["C"] in LOST
                else:
                    assert kinds(messages) == "TDCZ" and messages[1].row == [token.encode()]


def test_a_statement_whose_parse_was_lost_can_be_prepared_again(pg, proxies):
    with Gate(pg.port) as gate:
        proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 10000}}, url=pg.url(port=gate.port))
        with raw(proxy) as w:
            assert kinds(w.ask(wire.parse("SELECT 'kept'", "kept"), wire.SYNC)) == "1Z"
            gate.stall()
            w.send(wire.parse("SELECT 'lost'", "lost"), wire.close("S", "kept"), wire.SYNC)
            time.sleep(0.1)
            gate.cut()
            gate.resume()
            assert kinds(w.until()) == "EZ"
            assert kinds(w.ask(wire.parse("SELECT 'lost'", "lost"), wire.SYNC)) == "1Z"
            for name in ("kept", "lost"):
                messages = w.ask(wire.bind(name), wire.execute(), wire.SYNC)
                assert kinds(messages) == "2DCZ" and messages[1].row == [name.encode()]


@pytest.mark.parametrize("again", [[wire.bind("S_1"), wire.execute()], [wire.describe("S", "S_1")], [wire.parse("ROLLBACK", "S_1")]],
                         ids=["bind", "describe", "parse"])
def test_a_statement_prepared_in_a_lost_transaction(pg, proxies, again):
    """As pgjdbc does: its ROLLBACK is a named statement."""
    proxy = proxies()
    with raw(proxy) as w:
        w.ask(wire.query("BEGIN"))
        harness.poll(lambda: pg.sql("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'app'")[0][0] == 0)
        lost = w.ask(wire.parse("ROLLBACK", "S_1"), wire.bind("S_1"), wire.execute(), wire.SYNC)
        assert lost[-2].tag == "ROLLBACK" and lost[-1].body == b"I"
        messages = w.ask(*again, wire.SYNC)
        assert [m.error["C"] for m in messages if m.type == "E"] == (["42P05"] if again[0][:1] == b"P" else [])
        assert w.value("SELECT 1") == "1"


def test_what_a_lost_server_was_owed_reaches_no_other(pg, proxies):
    """The server ends the connection in the read in which a Sync that was kept back falls due: it is nobody else's."""
    pg.sql("DROP TABLE IF EXISTS owed; CREATE TABLE owed (a int); GRANT ALL ON owed TO app", database=DATABASE)
    proxy = proxies({"pool": {"max": 3}})
    for _ in range(15):
        with raw(proxy) as culprit, raw(proxy) as one, raw(proxy) as other:
            assert one.value("SELECT 1") == other.value("SELECT 1") == "1"
            culprit.send(wire.parse("COPY owed FROM STDIN"), wire.bind(), wire.execute(), wire.SYNC)
            culprit.until("G")
            culprit.send(wire.SYNC, wire.execute())
            culprit.until("E")
            one.send(wire.query("SELECT 'one' FROM pg_sleep(0.1)"))
            time.sleep(0.03)
            assert other.value("SELECT 'other'") == "other"
            assert [m.row[0] for m in one.until() if m.type == "D"] == [b"one"]


@pytest.mark.parametrize("name,value", [("client_encoding", "LATIN1"), ("DateStyle", "German, DMY")])
def test_a_client_hears_that_its_setting_is_lost(pg, proxies, name, value):
    proxy = proxies()
    with raw(proxy) as w:
        before = w.parameters[name]
        w.ask(wire.query(f"BEGIN; SET {name} = {harness.quote(value)}"))
        assert w.parameters[name] == value
        harness.poll(lambda: pg.sql("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'app'")[0][0] == 0)
        w.ask(wire.query("ROLLBACK"))
        w.ask(wire.query("ROLLBACK"))
        assert w.value(f"SHOW {name}") == before == w.parameters[name]


@pytest.mark.parametrize("what", ["COMMIT", "/* a */ end", "PREPARE TRANSACTION 'p'", "INSERT INTO lost VALUES (1); COMMIT", "extended", "flushed", "prepared", "pipeline"])
def test_a_commit_that_was_not_answered_may_have_been_done(pg, proxies, what):
    """As on a connection of its own, which ends: who took the transaction for failed would do it again."""
    last = [wire.bind("c"), wire.execute()]
    frames = {"extended": [wire.parse("COMMIT", "c"), *last, wire.SYNC], "flushed": [wire.parse("COMMIT", "c"), *last, wire.FLUSH],
              "prepared": [*last, wire.SYNC], "pipeline": [wire.query("SELECT 1"), wire.query("COMMIT")]}.get(what, [wire.query(what)])
    with Gate(pg.port) as gate:
        proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 10000}}, url=pg.url(port=gate.port))
        with raw(proxy) as w:
            if what == "prepared":
                assert kinds(w.ask(wire.parse("COMMIT", "c"), wire.SYNC)) == "1Z"
            w.ask(wire.query("BEGIN"))
            assert w.value("SELECT 1") == "1"
            lose(gate, proxy, w, *frames)
            error, = [m.error for m in w.closed() if m.type == "E"]
            assert (error["S"], error["C"]) == ("FATAL", "08007") and "server closed the connection" in error["D"], error
        recovers(proxy)


@pytest.mark.parametrize("extended", ["", "extended", "behind another"])
@pytest.mark.parametrize("sql", ["CALL half()", "DO $$ BEGIN COMMIT; PERFORM pg_sleep(3); END $$"])
def test_what_may_have_committed_by_itself(pg, proxies, sql, extended):
    pg.sql("CREATE OR REPLACE PROCEDURE half() LANGUAGE plpgsql AS $$ BEGIN COMMIT; PERFORM pg_sleep(3); END $$", database=DATABASE)
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 10000}})
    with raw(proxy) as w:
        before = [wire.query("SELECT 1")] if extended == "behind another" else []
        w.send(*before, *((wire.parse(sql), wire.bind(), wire.execute(), wire.SYNC) if extended else (wire.query(sql),)))
        harness.poll(lambda: pg.sql("SELECT 1 FROM pg_stat_activity WHERE usename = 'app' AND wait_event = 'PgSleep'"))
        pg.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'")
        error, = [m.error for m in w.closed() if m.type == "E"]
        assert (error["S"], error["C"]) == ("FATAL", "08007") and "administrator" in error["D"], error
    recovers(proxy)


@pytest.mark.parametrize("sql", ["SELECT 1", "ROLLBACK", "SAVEPOINT a; ROLLBACK TO a", "SELECT $$; COMMIT$$"])
def test_what_does_not_commit_fails_its_transaction(pg, proxies, sql):
    with Gate(pg.port) as gate:
        proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 10000}}, url=pg.url(port=gate.port))
        with raw(proxy) as w:
            w.ask(wire.query("BEGIN"))
            assert w.value("SELECT 1") == "1"
            lose(gate, proxy, w, wire.query(sql))
            messages = w.until()
            assert kinds(messages) == "EZ" and messages[0].error["S"] == "ERROR" and messages[1].body == b"E"
            assert [m.body for m in w.ask(wire.query("ROLLBACK"))] == [b"ROLLBACK\0", b"I"]
            assert w.value("SELECT 2") == "2"


def lose(gate, proxy, w, *frames):
    """Ends the server connection while these are on their way."""
    gate.stall()
    w.send(*frames)
    harness.poll(lambda: [c["state"] for c in proxy.json("/api/monitoring/clients")[1]["clients"]] == ["active"], what="it is on its way")
    gate.cut()
    gate.resume()


def test_pipelined_queries_end_with_their_server(pg, proxies):
    """More than one of them is under way: as on a connection of its own, nothing can be told of the later ones."""
    with Gate(pg.port) as gate:
        proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 10000}}, url=pg.url(port=gate.port))
        for frames in ([wire.query("SELECT 1")] * 3, [wire.parse("SELECT 1"), wire.bind(), wire.execute(), wire.SYNC] * 3):
            with raw(proxy) as w:
                assert w.value("SELECT 1") == "1"
                gate.stall()
                w.send(*frames)
                time.sleep(0.2)
                gate.cut()
                gate.resume()
                messages = [w.recv()]
                assert messages[0].type == "E" and messages[0].error["S"] == "FATAL" and messages[0].error["C"] in LOST
                assert w.closed() == []
        recovers(proxy)


def test_what_a_session_had_is_not_lost_unnoticed(proxies):
    """The answer and the server's farewell are read in one piece, before the session was looked at."""
    with harness.Postgres(max_connections=20, plain=True) as plain:
        proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 5000}}, url=plain.url(sslmode="disable").split("?")[0] + "?sslmode=disable")
        for sql in ("CREATE TEMP TABLE own AS SELECT pg_sleep(0.3) IS NULL AS a", "SELECT pg_advisory_lock(7), pg_sleep(0.3)", "SET work_mem = '7MB'; SELECT pg_sleep(0.3)"):
            with raw(proxy) as w:
                w.send(wire.query(sql))
                pid = harness.poll(lambda: plain.sql("SELECT pid FROM pg_stat_activity WHERE state = 'active' AND query = %s", sql), what="it runs")[0][0]
                proxy.signal(signal.SIGSTOP)
                try:
                    harness.poll(lambda: plain.count(f"pid = {pid} AND state = 'idle'"), what="it is done")
                    plain.sql("SELECT pg_terminate_backend(%s)", pid)
                    harness.poll(lambda: not plain.count(f"pid = {pid}"), what="it is gone")
                finally:
                    proxy.signal(signal.SIGCONT)
                messages = w.closed()
                assert messages[-1].type == "E" and messages[-1].error["S"] == "FATAL" and messages[-1].error["C"] == "57P01", (sql, messages)
        recovers(proxy)


@pytest.mark.parametrize("reset", [False, True])
def test_a_servers_end_that_comes_with_its_answer(pg, proxies, reset):
    """Both are there before either is read, as under load."""
    with Gate(pg.port) as gate:
        proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 10000}}, url=pg.url(port=gate.port))
        with raw(proxy) as w:
            for ask_at_once in (False, reset):
                assert w.value("SELECT 'before'") == "before"
                proxy.signal(signal.SIGSTOP)
                try:
                    w.send(wire.query("SELECT 'last'"))
                    gate.stall()
                    proxy.signal(signal.SIGCONT)
                    time.sleep(0.2)  # the question is at the gate
                    proxy.signal(signal.SIGSTOP)
                    gate.resume()
                    time.sleep(0.3)  # the answer is at the proxy
                    gate.cut(reset)
                    time.sleep(0.1)
                finally:
                    proxy.signal(signal.SIGCONT)
                assert [m.row for m in w.until() if m.type == "D"] == [[b"last"]]
                if not ask_at_once:
                    harness.poll(lambda: proxy.stats()["totalCount"] == 0, 5, "the end is noticed")
                assert w.value("SELECT 'after'") == "after"


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("last", ["a query", "half a message", "no Sync", "in a transaction", "of COPY"])
def test_a_clients_end_that_comes_with_its_last_bytes(proxies, last, reset):
    frames = {"a query": [wire.query("SELECT 1")], "half a message": [wire.query("SELECT 1")[:-3]], "no Sync": [wire.parse("SELECT 1"), wire.bind()],
              "in a transaction": [wire.parse("SELECT 1"), wire.bind()], "of COPY": [wire.copy_data(b"1\n")]}[last]
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 5000}})
    with raw(proxy) as w:
        for _ in range(2):
            assert w.value("SELECT 1") == "1"
        if last == "in a transaction":
            w.ask(wire.query("BEGIN"))
        if last == "of COPY":
            assert kinds(w.ask(wire.query("CREATE TABLE IF NOT EXISTS dropped (a int)"))) in ("CZ", "NCZ")
            w.send(wire.query("COPY dropped FROM STDIN"))
            assert w.recv().type == "G"
        proxy.signal(signal.SIGSTOP)
        try:
            w.send(*frames)
            if reset:
                w.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            w.sock.close()
            time.sleep(0.1)
        finally:
            proxy.signal(signal.SIGCONT)
    harness.poll(lambda: proxy.stats()["activeCount"] == 0 and proxy.json("/api/monitoring/clients")[1]["clients"] == [], 5, "the client is gone")
    recovers(proxy)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("extended", [False, True])
def test_what_a_client_said_before_its_goodbye_is_done(proxies, pg, reset, extended):
    """Though it waits for a server connection, and its own has ended, by RST or not, before it had one."""
    pg.sql("DROP TABLE IF EXISTS goodbyes; CREATE TABLE goodbyes (a text); GRANT ALL ON goodbyes TO app", database=DATABASE)
    sql = "INSERT INTO goodbyes VALUES ('done')"
    frames = [wire.parse(sql, "s"), wire.SYNC, wire.bind("s"), wire.execute(), wire.SYNC] if extended else [wire.query("SELECT 1"), wire.query(sql)]
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 20000}})
    with raw(proxy) as holder:
        holder.ask(wire.query("BEGIN"))
        with raw(proxy) as w:
            w.send(*frames, wire.TERMINATE)
            harness.poll(lambda: proxy.stats()["waitingCount"] == 1, what="it waits")
            if reset:
                w.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            w.sock.close()
        time.sleep(0.7)  # its end is noticed, and nothing comes of that
        holder.ask(wire.query("COMMIT"))
        harness.poll(lambda: pg.sql("SELECT count(*) FROM goodbyes", database=DATABASE) == [(1,)], what="it is done")
    harness.poll(lambda: proxy.json("/api/monitoring/clients")[1]["clients"] == [], what="the client is gone")
    recovers(proxy)


def test_sliced_and_delayed(pg, proxies):
    """One byte a segment both ways, TLS upstream."""
    with Gate(pg.port) as upstream:
        proxy = proxies({"pool": {"max": 2}}, url=pg.url(port=upstream.port))
        with Gate(proxy.port) as client:
            upstream.slice, client.slice = 1, 1
            with proxy.connect(port=client.port) as connection:
                assert connection.execute("SELECT repeat('ab', 5000)").fetchone()[0] == "ab" * 5000
                for n in range(20):
                    assert connection.execute("SELECT %s::int", (n,)).fetchone() == (n,)
            upstream.slice, client.slice, upstream.delay = 3, 7, 0.001
            with proxy.connect(port=client.port) as connection:
                with connection.transaction():
                    assert connection.execute("SELECT %s::text", ("x" * 500,)).fetchone() == ("x" * 500,)
        upstream.slice, upstream.delay = 0, 0
        recovers(proxy)


def test_stalled_server_in_login_and_in_query(pg, proxies):
    with Gate(pg.port) as gate:
        proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 1000}}, url=pg.url(port=gate.port))
        gate.silent = True
        before = time.monotonic()
        with wire.Wire(proxy.port) as w:
            failure = w.login(USER, PASSWORD, DATABASE)
            assert failure is not None and failure.error["C"] in LOST | {"53300"}, failure
        assert time.monotonic() - before < 6
        gate.silent = False
        gate.cut()
        recovers(proxy)
        with raw(proxy, timeout=30) as stuck:
            assert stuck.value("SELECT 1") == "1"
            gate.stall()
            stuck.send(wire.query("SELECT 1"))
            # The client waits, as on a direct connection; the proxy goes on answering others.
            assert proxy.http("/health/live")[0] == 200
            gate.resume()
            assert [m.row for m in stuck.until() if m.type == "D"] == [[b"1"]]
        recovers(proxy)


def test_stalled_client_holds_up_nobody(proxies, pg):
    proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 10000}})
    with Gate(proxy.port) as gate:
        with wire.Wire(gate.port) as stuck:
            assert stuck.login(USER, PASSWORD, DATABASE) is None
            gate.stall()
            stuck.send(wire.query("SELECT 1"))
            for _ in range(100):
                with raw(proxy) as w:
                    assert w.value("SELECT 2") == "2"
            gate.resume()
            assert stuck.until()[-1].type == "Z"
    recovers(proxy)


def test_clients_that_drop_leave_nothing_behind(proxies, pg):
    """Hundreds dropped in every state: no descriptor, no server connection, no memory is lost."""
    proxy = proxies({"pool": {"max": 4, "connectionTimeoutMillis": 20000}})
    recovers(proxy)
    rng = random.Random(3)

    def drop(_):
        for _ in range(25):
            kind = rng.randrange(7)
            w = wire.Wire(proxy.port)
            if kind == 0:
                w.send(wire.startup_packet({"user": USER, "database": DATABASE})[:rng.randrange(1, 20)])
            elif kind == 1:
                w.send(wire.startup_packet({"user": USER, "database": DATABASE}))
            else:
                assert w.login(USER, PASSWORD, DATABASE) is None
                w.send(*[(wire.query("BEGIN"), wire.query("SELECT 1")), (wire.query("SELECT pg_sleep(0.05)"),), (wire.parse("SELECT 1"), wire.bind()),
                         (wire.query("SELECT repeat('x', 100) FROM generate_series(1, 5000)"),), (b"Q\0\0",)][kind - 2])
            if rng.random() < 0.5:
                w.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            w.sock.close()

    harness.threads(8, drop)
    recovers(proxy)
    first_files, first_rss = None, proxy.rss_kb()

    def settled():
        stats = proxy.stats()
        return stats["activeCount"] == 0 and stats["waitingCount"] == 0
    harness.poll(settled, 20, "nothing is in use")
    first_files = proxy.open_files()
    harness.threads(8, drop)
    recovers(proxy)
    harness.poll(lambda: settled() and proxy.open_files() <= first_files + 4, 20, "descriptors are given back")
    if not harness.sanitized():
        assert proxy.rss_kb() < first_rss + 4096
    assert pg.count("usename = 'app'") <= 4


def test_descriptors_are_kept_for_servers_and_for_who_asks_how_it_is(pg, proxies):
    """Where the system allows fewer than limits.maxClients needs, clients are refused while there are some left."""
    if harness.sanitized():
        pytest.skip("UBSan opens a pipe to see whether memory can be read, and takes its failure for a wild pointer")
    proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 5000}})
    resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE, (64, 64))
    proxy.signal(signal.SIGHUP)
    harness.poll(lambda: "open files" in proxy.log_text(), what="it has looked at the limit")
    held, refused = [], None
    while not refused and len(held) < 64:
        w = wire.Wire(proxy.port, timeout=10)
        refused = w.login(USER, PASSWORD, DATABASE)
        if not refused:
            held.append(w)
    assert refused.error["C"] == "53300" and f"at most {len(held)} clients" in refused.error["H"], refused.error
    assert f"64 open files that the system allows are enough for {len(held)} clients" in proxy.log_text()
    silent = [socket.create_connection(("127.0.0.1", proxy.port)) for _ in range(40)]  # some of them are accepted
    pg.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'")
    harness.poll(lambda: ": lost: " in proxy.log_text() and pg.count("usename = 'app'") == 0, what="its server connection is lost")
    assert held[0].value("SELECT 1") == "1"
    assert proxy.http("/health/live")[0] == 200
    assert proxy.http("/health/ready")[0] == 200
    assert "accept_failed" not in proxy.log_text() and "accept: " not in proxy.log_text()
    for other in silent + [w.sock for w in held]:
        other.close()
    recovers(proxy)


def own_address():
    """Of this machine, beside loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but loopback's")
        return sock.getsockname()[0]


@pytest.mark.parametrize("remote", [True, False])
def test_keepalive_of_clients(proxies, remote):
    """One whose machine is gone is noticed as a server is; on loopback none is gone."""
    host, port = own_address() if remote else "127.0.0.1", harness.free_port()
    proxy = proxies({"listen": [f"{host}:{port}"], "pool": {"keepAliveInitialDelayMillis": 8000}}, wait=False)
    proxy.host, proxy.port = host, port
    harness.poll(lambda: "listening on " + host in proxy.log_text(), what="it listens")
    with proxy.connect() as client:
        own = client.pgconn.socket
        with socket.socket(fileno=os.dup(own)) as sock:
            mine = sock.getsockname()[1]
        shown = subprocess.run(["ss", "-tnoH", "sport", f"= :{port}", "and", "dport", f"= :{mine}"], capture_output=True, text=True, check=True).stdout
    timer = re.search(r"timer:\(keepalive,([\d.]+)(ms|sec|min)", shown)
    assert timer and (timer[2] in ("ms", "sec") and float(timer[1]) <= (1000 if timer[2] == "ms" else 8)) == remote, shown


def test_out_of_memory_ends_the_session_that_wants_it(pg, proxies):
    if harness.sanitized():
        pytest.skip("a sanitizer's allocator ends the process itself")
    proxy = proxies({"pool": {"max": 2}})
    with raw(proxy) as neighbour, raw(proxy) as idle:
        neighbour.ask(wire.query("BEGIN"))
        limit = (proxy.status("VmSize") << 10) + (12 << 20)
        resource.prlimit(proxy.pid, resource.RLIMIT_AS, (limit, limit))
        hold, ended = [], []
        while not ended:  # what the allocator has reserved for its threads is used up first
            assert len(hold) < 40 and proxy.running(), proxy.log_text()
            hold.append(raw(proxy))
            try:
                hold[-1].send(wire.query("SELECT 1 /*" + 15_000_000 * "x" + "*/")[:-1])
            except ConnectionError:
                pass
            ended = select.select([w.sock for w in hold], [], [], 0.1)[0]
        try:
            error = next(w for w in hold if w.sock in ended).recv().error
            assert (error["S"], error["C"], error["M"]) == ("FATAL", "53200", "out of memory")
        except (ConnectionError, wire.Closed):
            pass  # where there is more to read, the end may overtake what was told
        harness.poll(lambda: "[session_failed]" in proxy.log_text(), what="it is told of")
        assert (neighbour.value("SELECT 1"), idle.value("SELECT 2")) == ("1", "2")
        for w in hold:
            w.sock.close()
    recovers(proxy)


def test_out_of_descriptors(pg, proxies):
    """At the process's limit new clients wait or are refused; those that are there go on; and then it recovers."""
    if harness.sanitized():
        pytest.skip("UBSan opens a pipe to see whether memory can be read, and takes its failure for a wild pointer")
    proxy = proxies({"pool": {"max": 2}})
    recovers(proxy)
    with raw(proxy) as good:
        limit = proxy.open_files() + 20
        resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE, (limit, limit))
        held = []
        for _ in range(60):
            try:
                held.append(wire.Wire(proxy.port, timeout=1))
            except OSError:
                break
        assert good.value("SELECT 1") == "1"
        cpu = proxy.cpu_seconds()
        before = time.monotonic()
        time.sleep(1)
        assert (proxy.cpu_seconds() - cpu) / (time.monotonic() - before) < 0.5, "it spins on accept"
        for w in held:
            w.sock.close()
    recovers(proxy)
