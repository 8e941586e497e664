"""The server restarts, fails over, moves: clients wait and go on, what was in flight fails once and clearly, nothing runs twice."""
import collections
import itertools
import os
import pathlib
import signal
import threading
import time

import pytest

import harness
import replica
import wire
from gate import Gate
from harness import DATABASE, PASSWORD, USER
from test_faults import LOST, kill_backend, own, raw, recovers  # noqa: F401 own is a fixture
from test_hanging import hanging_backend, hanging_backends, processes, slow_logins

LONG = {"connectionTimeoutMillis": 60000}


def errors(messages):
    return [m.error for m in messages if m.type == "E"]


class Writers:
    """Clients that insert rows of their own, each in its way, and keep count of what they were told. None connects twice, unless its COMMIT was lost."""

    KINDS = ("simple", "extended", "prepared", "transaction")

    def __init__(self, proxy, count):
        self.proxy, self.count = proxy, count
        self.done = [[] for _ in range(count)]   # acknowledged
        self.failed = [[] for _ in range(count)]  # (token, error)
        self.stop = threading.Event()

    def insert(self, w, kind, token):
        """The errors that it was answered with."""
        sql = f"INSERT INTO written VALUES ('{token}')"
        if kind == "transaction":
            found = errors(w.ask(wire.query("BEGIN")))
            if not found:
                found = errors(w.ask(wire.query(sql)))
                w.send(wire.query("COMMIT"))
                end = w.until("EZ")
                found += errors(end)
                if found and found[-1]["S"] == "FATAL":  # whether it is committed isn't known
                    return found
                if end[-1].type == "E":
                    end += w.until()
                if not found and [m.tag for m in end if m.type == "C"] != ["COMMIT"]:
                    found = [{"C": "rolled back", "M": "unnoticed"}]
            assert w.ask(wire.query("SELECT 1"))[-1].body == b"I" or w.ask(wire.query("ROLLBACK"))[-1].body == b"I"
            return found
        if kind == "simple":
            return errors(w.ask(wire.query(sql)))
        if kind == "extended":
            return errors(w.ask(wire.parse(sql), wire.bind(), wire.execute(), wire.SYNC))
        return errors(w.ask(wire.bind("s", [token]), wire.execute(), wire.SYNC))

    def work(self, index):
        numbers = itertools.count()
        while not self.stop.is_set():
            self.session(index, self.KINDS[index % len(self.KINDS)], numbers)

    def session(self, index, kind, numbers):
        with raw(self.proxy, timeout=90, application_name=f"writer {index}") as w:
            if kind == "prepared":
                assert not errors(w.ask(wire.parse("INSERT INTO written VALUES ($1)", "s"), wire.SYNC))
            while not self.stop.is_set():
                token = f"{index}:{next(numbers)}"
                found = self.insert(w, kind, token)
                if found:
                    self.failed[index].append((token, found))
                    if found[-1].get("S") == "FATAL":
                        return
                else:
                    self.done[index].append(token)

    def run(self, conduct):
        """conduct() while all work; then they end."""
        def work(index):
            if index < self.count:
                return self.work(index)
            try:
                conduct()
            finally:
                self.stop.set()
        harness.threads(self.count + 1, work)

    def progress(self, within, what):
        before = [len(done) for done in self.done]
        harness.poll(lambda: all(len(done) > then + 2 for done, then in zip(self.done, before)), within, what)

    def codes(self):
        return [error["C"] for failed in self.failed for _, found in failed for error in found[:1]]

    def check(self, server, all_acknowledged=True):
        """Nothing was written twice, and what was acknowledged is there."""
        rows = collections.Counter(token for (token,) in server.sql("SELECT token FROM written", database=DATABASE))
        assert [token for token, times in rows.items() if times > 1] == []
        acknowledged = {token for done in self.done for token in done}
        if all_acknowledged:
            assert acknowledged - set(rows) == set()
        assert len(acknowledged) > 0


def make_table(server):
    server.sql("CREATE TABLE written (token text)", database=DATABASE)
    server.sql(f"ALTER TABLE written OWNER TO {USER}", database=DATABASE)


def pauses(proxy, count):
    """Seconds between so many connects that fail."""
    def failures():
        return proxy.stats()["perPool"][0]["connectFailures"]
    times, last = [], failures()

    def one_more():
        nonlocal last
        before, last = last, failures()
        if last != before:
            times.append(time.monotonic())
        return len(times) > count
    harness.poll(one_more, 60, "it keeps trying")
    return [b - a for a, b in zip(times, times[1:])]


# ---- a restart

def test_restart_under_fifty_clients(own, proxies):
    make_table(own)
    proxy = proxies({"pool": {"max": 8, **LONG}}, server=own)
    writers, seen = Writers(proxy, 50), []

    def conduct():
        writers.progress(60, "load runs")
        own.stop(signal.SIGINT)
        seen.extend(pauses(proxy, 9))
        own.start()
        writers.progress(60, "every client works again, on the connection it had")

    writers.run(conduct)
    # In flight was at most one statement for each server connection.
    assert set(writers.codes()) <= {"57P01", "08006", "08007"} and len(writers.codes()) <= 8, writers.codes()
    writers.check(own)
    assert sorted(seen)[len(seen) // 2] < 1, f"while clients wait it is tried again within a second: {seen}"
    recovers(proxy)


def test_an_immediate_shutdown_and_a_crash_have_their_own_sqlstates(own, proxies):
    proxy = proxies({"pool": {"max": 4, **LONG}}, server=own)
    with raw(proxy) as busy, raw(proxy) as victim:
        for how, code in (("crash", "57P02"), ("immediate", "57P01")):
            assert (busy.value("SELECT 1"), victim.value("SELECT 1")) == ("1", "1")
            busy.send(wire.query("SELECT pg_sleep(60), 'busy'"))
            victim.send(wire.query("SELECT pg_sleep(60), 'victim'"))
            harness.poll(lambda: len(own.backends("state = 'active' AND query LIKE '%pg_sleep(60)%'")) == 2, what="both run")
            if how == "crash":
                kill_backend(own.backends("query LIKE '%''victim''%' AND state = 'active'")[0])
            else:
                own.stop(signal.SIGQUIT)
            (error,) = errors(busy.until())
            assert (error["S"], error["C"]) == ("ERROR", code), error
            assert errors(victim.until())[0]["C"] in LOST
            if how == "crash":
                own.wait_ready()
            else:
                own.start()
    recovers(proxy)


def test_copy_in_the_middle_of_a_restart(own, proxies):
    """Its error comes while the client is sending; what it sends then is no statement."""
    proxy = proxies({"pool": {"max": 2, **LONG}}, server=own)
    with raw(proxy, timeout=60) as w:
        w.ask(wire.query("CREATE TABLE copied (a text)"))
        for ahead in (None, wire.FLUSH, wire.SYNC):  # none: a simple query
            if ahead:
                w.send(wire.parse("COPY copied FROM STDIN"), wire.bind(), wire.execute(), ahead)
            else:
                w.send(wire.query("COPY copied FROM STDIN"))
            w.until("G")
            row = wire.copy_data(b"x" * 1_000_000 + b"\n")
            w.send(row, row[:500_000])
            own.stop(signal.SIGINT)
            w.send(row[500_000:], row, wire.COPY_DONE, *([wire.SYNC] if ahead else []))
            messages = w.until()
            assert [e["C"] for e in errors(messages)] in (["57P01"], ["08006"]) and messages[-1].body == b"I", messages
            own.start()
            assert w.value("SELECT count(*) FROM copied") == "0"
    recovers(proxy)


def test_a_client_that_logs_in_meanwhile_is_kept(own, proxies):
    """It waits for what the server says of its settings, when that is lost, and when there is none."""
    with Gate(own.port) as gate:
        proxy = proxies({"pool": {"max": 2, **LONG}}, url=own.url(port=gate.port))
        with raw(proxy) as first, wire.Wire(proxy.port, timeout=60) as w:
            assert first.value("SELECT 1") == "1"
            gate.stall()
            w.send(wire.startup_packet({"user": USER, "database": DATABASE, "DateStyle": "German, DMY"}))
            scram = wire.Scram(PASSWORD)
            w.until("R")
            w.send(wire.frame("p", wire.text("SCRAM-SHA-256") + len(scram.first()).to_bytes(4, "big") + scram.first()))
            w.send(wire.frame("p", scram.final(w.until("R")[-1].body[4:])))
            harness.poll(lambda: proxy.stats()["activeCount"] == 1, what="the server is asked")
            gate.refusing = True
            gate.cut()
            gate.resume()
            harness.poll(lambda: proxy.stats()["waitingCount"] == 1, what="it waits")
            gate.refusing = False
            assert not errors(w.until())
            assert w.value("SELECT date '2026-11-25'") == "25.11.2026"
    recovers(proxy)


def test_what_was_sent_behind_a_lost_begin_does_not_run_alone(pg, proxies):
    make_table(pg)
    try:
        with Gate(pg.port) as gate:
            proxy = proxies({"pool": {"max": 1, **LONG}}, url=pg.url(port=gate.port))
            for attempt in range(6):
                with raw(proxy) as w:
                    assert w.value("SELECT 1") == "1"
                    gate.stall()
                    w.send(wire.query("BEGIN"))
                    harness.poll(lambda: proxy.stats()["activeCount"] == 1, what="it is on its way")
                    proxy.signal(signal.SIGSTOP)
                    harness.poll(lambda: "T (stopped)" in pathlib.Path(f"/proc/{proxy.pid}/status").read_text(), what="it stands still")
                    insert = wire.query(f"INSERT INTO written VALUES ('{attempt}')")
                    # What happened first is seen first.
                    for step in (gate.cut, lambda: w.send(insert)) if attempt % 2 else (lambda: w.send(insert), gate.cut):
                        step()
                    gate.resume()
                    proxy.signal(signal.SIGCONT)
                    assert [e["S"] for e in errors(w.closed())] == ["FATAL"]
            recovers(proxy)
        assert pg.sql("SELECT count(*) FROM written", database=DATABASE) == [(0,)]
    finally:
        pg.sql("DROP TABLE written", database=DATABASE)


# ---- holding

def test_hold_millis_holds_longer_than_the_connection_timeout(own, proxies):
    proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 500, "holdMillis": 60000}}, server=own)
    with raw(proxy, timeout=60) as w, wire.Wire(proxy.port, timeout=60) as late:
        assert w.value("SELECT 1") == "1"
        own.stop()
        w.send(wire.query("SELECT 'held'"))
        logging_in = threading.Thread(target=lambda: late.login(USER, PASSWORD, DATABASE, DateStyle="German"), daemon=True)
        logging_in.start()
        pool = lambda: proxy.stats()["perPool"][0]  # noqa: E731
        harness.poll(lambda: pool()["waitingCount"] == 2 and pool()["oldestWaitMs"] > 1500, 20, "they wait")
        own.start()
        assert [m.row for m in w.until() if m.type == "D"] == [[b"held"]]
        logging_in.join(60)
        assert late.value("SELECT date '2026-11-25'") == "25.11.2026"
        # With a server that is there connectionTimeoutMillis counts.
        with raw(proxy) as a, raw(proxy) as b:
            a.ask(wire.query("BEGIN")), b.ask(wire.query("BEGIN"))
            (error,) = errors(w.ask(wire.query("SELECT 1")))
            assert error["C"] == "53300" and "timed out after 500 ms" in error["M"], error
    recovers(proxy)


def test_hold_millis_is_a_bound(own, proxies):
    proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 60000, "holdMillis": 700}}, server=own)
    with raw(proxy, timeout=30) as w:
        assert w.value("SELECT 1") == "1"
        own.stop()
        harness.poll(lambda: proxy.stats()["totalCount"] == 0, what="the loss is noticed")
        (error,) = errors(w.ask(wire.query("SELECT 1")))
        assert error["C"] in LOST and "refused" in error["M"], error
        own.start()
    recovers(proxy)


def test_pause_holds(proxies, pg):
    proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 300, "holdMillis": 60000}})
    with raw(proxy, timeout=60) as w:
        assert w.value("SELECT 1") == "1"
        assert proxy.http("/api/admin/pause", method="POST")[0] == 200
        w.send(wire.query("SELECT 'held'"))
        harness.poll(lambda: proxy.stats()["perPool"][0]["oldestWaitMs"] > 1000, 20, "it waits")
        assert proxy.http("/api/admin/resume", method="POST")[0] == 200
        assert [m.row for m in w.until() if m.type == "D"] == [[b"held"]]
    recovers(proxy)


# ---- failover

@pytest.fixture
def pair():
    """A primary and its standby."""
    with harness.Postgres(max_connections=60) as primary:
        make_table(primary)
        with replica.Standby(primary, max_connections=60) as standby:
            replica.caught_up(primary, standby)
            yield primary, standby


def test_failover_and_the_old_primary_as_a_standby(pair, proxies):
    old, new = pair
    config = {"pool": {"max": 4, **LONG},
              "databases": {DATABASE: {}, "reads": {"upstream": {"dbname": DATABASE, "target_session_attrs": "prefer-standby"}}}}
    proxy = proxies(config, url=replica.url(old, new, target_session_attrs="read-write"))
    writers = Writers(proxy, 12)
    port = "SELECT current_setting('port')"

    def conduct():
        writers.progress(60, "load runs")
        with proxy.connect(database="reads") as reader:
            assert reader.execute(port).fetchone() == (str(new.port),)
        assert new.count(f"application_name LIKE 'writer%' AND datname = '{DATABASE}'") == 0
        old.stop(signal.SIGKILL)
        harness.poll(lambda: proxy.stats()["waitingCount"] > 0, 30, "clients wait")
        replica.promote(new)
        writers.progress(60, "writes go on where the standby was")
        replica.follow(old, new)
        replica.caught_up(new, old)
        failed = writers.codes()
        assert proxy.http("/api/admin/reconnect", method="POST")[0] == 200
        writers.progress(60, "new connections pass the old primary by")
        assert writers.codes() == failed
        assert old.count("application_name LIKE 'writer%'") == 0
        with proxy.connect(database="reads") as reader:
            harness.poll(lambda: reader.execute(port).fetchone() == (str(old.port),), 30, "reads go to the standby that there is now")

    writers.run(conduct)
    assert set(writers.codes()) <= LOST and len(writers.codes()) <= 4, writers.codes()
    writers.check(new, all_acknowledged=False)  # replication isn't synchronous
    recovers(proxy)


def test_a_promoted_standby_is_left_by_those_who_want_one(pair, proxies):
    primary, standby = pair
    proxy = proxies({"pool": {"max": 2, **LONG}}, url=replica.url(standby, target_session_attrs="standby"))
    with raw(proxy, timeout=60) as w:
        assert w.value("SELECT pg_is_in_recovery()") == "t"
        primary.stop(signal.SIGQUIT)
        replica.promote(standby)
        harness.poll(lambda: (w.value("SELECT 1"), "[server_role_changed]" in proxy.log_text())[1], 20, "it is noticed")
        w.send(wire.query("SELECT pg_is_in_recovery()"))
        harness.poll(lambda: "target_session_attrs" in (proxy.stats()["perPool"][0]["lastError"] or ""), 20, "none is found")
        replica.follow(primary, standby)
        proxy.write_config(harness.merge(proxy.config, {"upstream": {"url": replica.url(standby, primary, target_session_attrs="standby")}}))
        assert proxy.http("/api/admin/reload", method="POST")[0] == 200
        assert [m.row for m in w.until() if m.type == "D"] == [[b"t"]]
    recovers(proxy)


def test_a_write_that_a_standby_refuses(pair, proxies):
    """With any server allowed it is the first; once it has refused a write the others come first."""
    primary, standby = pair
    proxy = proxies({"pool": {"max": 2, **LONG}}, url=replica.url(standby, primary))
    insert = wire.query("INSERT INTO written VALUES ('here')")
    with raw(proxy) as w:
        (error,) = errors(w.ask(insert))
        assert error["C"] == "25006"
        harness.poll(lambda: not errors(w.ask(insert)), 20, "the primary is found")
        assert w.value("SELECT pg_is_in_recovery()") == "f"
        # A transaction that a client wanted read-only says nothing of the server.
        before = proxy.stats()["perPool"][0]["connects"]
        for sql in ("BEGIN READ ONLY", "INSERT INTO written VALUES ('not here')", "ROLLBACK"):
            w.ask(wire.query(sql))
        assert w.value("SELECT pg_is_in_recovery()") == "f"
        assert proxy.stats()["perPool"][0]["connects"] == before
        assert proxy.log_text().count("[write_refused]") == 1
    recovers(proxy)


def test_a_write_refused_behind_the_only_address(pair, proxies):
    """Behind it there may be another server by now, as behind a Kubernetes Service: connections are made anew."""
    primary, standby = pair
    with Gate(standby.port) as service:
        url = f"postgresql://{USER}:{harness.percent(PASSWORD)}@127.0.0.1:{service.port}/{DATABASE}?sslmode=require"
        proxy = proxies({"pool": {"max": 2, **LONG}}, url=url)
        insert = wire.query("INSERT INTO written VALUES ('behind it')")
        with raw(proxy) as w:
            assert w.value("SELECT pg_is_in_recovery()") == "t"
            service.target = ("127.0.0.1", primary.port)
            (error,) = errors(w.ask(insert))
            assert error["C"] == "25006"
            harness.poll(lambda: not errors(w.ask(insert)), 20, "the primary is found")
            # Who writes where there is no primary doesn't make it connect for each write.
            service.target = ("127.0.0.1", standby.port)
            service.cut()
            harness.poll(lambda: w.value("SELECT pg_is_in_recovery()") == "t", 20, "it is at the standby again")
            before = proxy.stats()["perPool"][0]["connects"]
            assert [error["C"] for _ in range(50) for error in errors(w.ask(insert))] == ["25006"] * 50
            assert proxy.stats()["perPool"][0]["connects"] - before <= 2
        recovers(proxy)


# ---- DNS

class Names:
    """A hosts file that pgsidecar alone believes in: nss_wrapper in place of the system's resolver."""

    def __init__(self, directory):
        self.file, self.time = directory / "hosts", 1_000_000_000
        (library,) = pathlib.Path("/usr/lib").glob("*/libnss_wrapper.so")
        self.environment = {"LD_PRELOAD": str(library), "NSS_WRAPPER_HOSTS": str(self.file)}

    def set(self, *addresses):
        new = self.file.with_suffix(".new")
        new.write_text("".join(f"{address} db.test\n" for address in addresses))
        self.time += 2  # it looks at whole seconds
        os.utime(new, (self.time, self.time))
        new.rename(self.file)


@pytest.mark.skipif(harness.sanitized(), reason="a sanitizer wants to be the first library")
def test_dns_that_changes_is_followed(own, pg, proxies, tmp_path):
    names = Names(tmp_path)
    names.set("127.0.0.1")
    config = {"pool": {"max": 3, "dnsCheckSeconds": 1, **LONG}}
    port = "SELECT current_setting('port')"
    with Gate(own.port, listen=("127.0.0.2", pg.port)):  # the same port at another address
        proxy = proxies(config, url=pg.url(host="db.test", sslmode="require"), environment=names.environment)
        with raw(proxy, timeout=60) as a, raw(proxy, timeout=60) as b:
            # One is held by a transaction: it stays where it is until that is over.
            b.ask(wire.query("BEGIN"))
            assert (a.value(port), b.value(port)) == (str(pg.port), str(pg.port))
            names.set("127.0.0.2")
            harness.poll(lambda: a.value(port) == str(own.port), 20, "the new address is used")
            assert b.value(port) == str(pg.port)
            assert not errors(b.ask(wire.query("COMMIT")))
            harness.poll(lambda: (a.value("SELECT 1"), pg.count(f"usename = '{USER}'"))[1] == 0, 20, "the old server is left")
            assert b.value(port) == str(own.port)
            # Where nobody answers: what there is stays.
            names.set("127.0.0.3")
            harness.poll(lambda: (a.value(port), proxy.log_text().count("[address_changed]") >= 3)[1], 20, "it is looked at several times")
            assert a.value(port) == str(own.port)
            names.set("127.0.0.1", "127.0.0.2")
            assert a.value(port) in (str(pg.port), str(own.port))
        recovers(proxy)
    recovers(proxy)


@pytest.mark.skipif(harness.sanitized(), reason="a sanitizer wants to be the first library")
def test_max_holds_where_a_name_has_several_addresses(own, proxies, tmp_path):
    """What a login that hangs has taken isn't free for the next address."""
    names = Names(tmp_path)
    names.set("127.0.0.1", "127.0.0.2")
    with Gate(own.port, listen=("127.0.0.2", own.port)):
        proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 1000}}, url=own.url(host="db.test", sslmode="require"), environment=names.environment)
        with slow_logins(own, 6):
            until, most = time.monotonic() + 5, 0

            def work(_):
                while time.monotonic() < until:
                    assert wire.wire_error(proxy.port, False, USER, PASSWORD, DATABASE)["C"] in LOST | {"53300"}
            workers = threading.Thread(target=harness.threads, args=(4, work))
            workers.start()
            while workers.is_alive():
                most = max(most, processes(own))
                time.sleep(0.01)
            workers.join()
            assert most == 2
        recovers(proxy)


def test_a_server_that_does_not_fit_gives_its_place_to_the_next(pair, proxies):
    primary, standby = pair
    for servers, attrs in (((standby, primary), "read-write"), ((primary, standby), "standby")):
        proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 5000}}, url=replica.url(*servers, target_session_attrs=attrs))
        with raw(proxy) as w:
            assert w.value("SHOW port") == str(servers[1].port)
        assert "connect_failed" not in proxy.log_text()
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 5000}}, url=replica.url(primary, target_session_attrs="prefer-standby"))
    assert raw(proxy).value("SHOW port") == str(primary.port)


def test_another_host_serves_while_the_first_hangs(own, pg, proxies):
    """What hangs counts at its own server, which gets no more meanwhile."""
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 9000}}, url=replica.url(own, pg))
    with raw(proxy) as w:
        assert w.value("SHOW port") == str(own.port)
        with hanging_backend(own) as pid:
            assert proxy.http("/api/admin/reconnect", "POST")[0] == 200
            assert w.value("SHOW port") == str(pg.port)
            assert own.backends(f"usename = '{USER}'") == [pid] and pg.count(f"usename = '{USER}'") == 1
            assert proxy.http("/api/admin/reconnect", "POST")[0] == 200
            assert w.value("SHOW port") == str(pg.port)
            assert own.backends(f"usename = '{USER}'") == [pid]
        harness.poll(lambda: own.backends(f"usename = '{USER}'") == [] and proxy.stats()["totalCount"] == 1, what="it has ended")
        assert proxy.http("/api/admin/reconnect", "POST")[0] == 200
        assert w.value("SHOW port") == str(own.port)


def test_a_refused_connect_leaves_what_serves(own, pg, proxies):
    """Of a pool whose places at another server hang."""
    with Gate(pg.port) as gate:
        url = own.url(host=f"127.0.0.1:{own.port},127.0.0.1", port=gate.port, sslmode="require")
        proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 8000}}, url=url)
        with raw(proxy) as w, raw(proxy) as other:
            for step in ("BEGIN", "COMMIT"):
                for client in (w, other):
                    client.ask(wire.query(step))
            with hanging_backends(own) as pids:
                assert len(pids) == 2
                assert proxy.http("/api/admin/reconnect", "POST")[0] == 200
                w.ask(wire.query("BEGIN"))
                assert w.value("SHOW port") == str(pg.port)
                gate.refusing = True
                (error,) = errors(other.ask(wire.query("SELECT 1")))
                assert error["C"] == "08006" and "failed: server closed the connection" in error["M"], error
                w.ask(wire.query("COMMIT"))
                assert w.value("SHOW port") == str(pg.port)


@pytest.mark.skipif(harness.sanitized(), reason="a sanitizer wants to be the first library")
def test_a_name_leads_away_from_a_server_that_hangs(own, pg, proxies, tmp_path):
    names = Names(tmp_path)
    names.set("127.0.0.1")
    with Gate(pg.port, listen=("127.0.0.2", own.port)):
        proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 7000}}, url=own.url(host="db.test", sslmode="require"), environment=names.environment)
        with raw(proxy) as w:
            assert w.value("SHOW port") == str(own.port)
            with hanging_backend(own):
                assert proxy.http("/api/admin/reconnect", "POST")[0] == 200
                names.set("127.0.0.1", "127.0.0.2")  # may be the same server
                (error,) = errors(w.ask(wire.query("SELECT 1")))
                assert error["C"] == "53300" and "1 of 1 in use, of which 1 doesn't end" in error["M"], error
                names.set("127.0.0.2")
                assert w.value("SHOW port") == str(pg.port)
                assert own.count(f"usename = '{USER}'") == 1
        recovers(proxy)
