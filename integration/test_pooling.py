"""The pool: its bound as the server counts it, recycling, waiting, and that nothing of one client reaches another."""
import concurrent.futures
import contextlib
import random
import re
import resource
import secrets
import signal
import threading
import time

import psycopg
import pytest

import harness
import wire
from gate import Gate
from harness import DATABASE, PASSWORD, USER, raw


# Tells server connections apart without pinning, as pg_backend_pid() would.
SERVER = "SELECT inet_client_port()"


@pytest.mark.generic
def test_max_is_never_exceeded_under_churn(proxies, pg):
    proxy = proxies({"pool": {"max": 5, "maxUses": 7, "idleTimeoutMillis": 50, "connectionTimeoutMillis": 30000}})
    with harness.Watch(pg, "usename = 'app'") as watch:
        def work(index):
            rng = random.Random(index)
            for _ in range(8):
                with proxy.connect(prepare_threshold=None) as connection:
                    for _ in range(rng.randrange(1, 6)):
                        kind = rng.random()
                        if kind < 0.6:
                            assert connection.execute("SELECT %s::int", (index,)).fetchone() == (index,)
                        elif kind < 0.8:
                            with connection.transaction():
                                connection.execute("SELECT pg_sleep(0.002)")
                                assert connection.execute("SELECT %s::int", (index,)).fetchone() == (index,)
                        elif kind < 0.9:
                            with pytest.raises(psycopg.errors.DivisionByZero):
                                connection.execute("SELECT 1 / 0")
                        else:
                            connection.execute("BEGIN")
                            connection.execute("SELECT 1")
                            connection.pgconn.finish()  # gone in the middle of a transaction
                            break
        harness.threads(60, work)
    assert watch.samples > 50
    assert watch.most == 5 or (harness.sanitized() and watch.most <= 5), watch.most
    if proxy.kind == "pgsidecar":
        assert watch.without_tls == 0


def test_recycled_after_max_uses(proxies, pg):
    proxy = proxies({"pool": {"max": 1, "maxUses": 10}})
    seen = []
    with raw(proxy) as w:
        for _ in range(100):
            seen.append(w.value(SERVER))
    uses = [seen.count(pid) for pid in dict.fromkeys(seen)]
    assert max(uses) <= 10, uses
    assert len(uses) >= 10 and len(uses) <= 25, uses  # jitter shortens, never to nothing


def test_a_worn_out_connection_is_replaced_before_it_is_missed(proxies, pg):
    proxy = proxies({"pool": {"max": 3, "min": 0, "maxUses": 1}})
    with raw(proxy) as w:
        harness.poll(lambda: pg.count("usename = 'app'") == 1, what="a connection is there again after the login used one up")
        for _ in range(3):
            before = pg.backends("usename = 'app'")
            w.value("SELECT 1")
            harness.poll(lambda: (there := set(pg.backends("usename = 'app'"))) and not there & set(before), what="another has taken its place")


def test_max_lifetime(proxies, pg):
    proxy = proxies({"pool": {"max": 1, "maxLifetimeSeconds": 1}})
    with raw(proxy) as w:
        first = w.value(SERVER)
        harness.poll(lambda: w.value(SERVER) != first, 10, "another server connection", 0.1)


def test_idle_connections_go_down_to_min(proxies, pg):
    proxy = proxies({"pool": {"max": 6, "min": 2, "idleTimeoutMillis": 300}})
    clients = [raw(proxy) for _ in range(6)]
    for w in clients:
        w.ask(wire.query("BEGIN"))
    assert pg.count("usename = 'app'") == 6
    for w in clients:
        w.ask(wire.query("COMMIT"))
    counts = []
    harness.poll(lambda: counts.append(pg.count("usename = 'app'")) or counts[-1] == 2, 10, "two connections left", 0)
    assert min(counts) == 2, counts
    until = time.monotonic() + 1
    while time.monotonic() < until:
        assert pg.count("usename = 'app'") == 2
        time.sleep(0.1)
    for w in clients:
        w.sock.close()


def test_wait_times_out_with_the_reason(proxies, pg):
    proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 500}})
    raw(proxy).sock.close()  # a login with known parameters needs no server
    holders = [raw(proxy, application_name="worker") for _ in range(2)]
    for w in holders:
        w.ask(wire.query("BEGIN"))
    with raw(proxy) as waiter:
        before = time.monotonic()
        messages = waiter.ask(wire.query("SELECT 1"))
        waited = time.monotonic() - before
        assert [m.type for m in messages] == ["E", "Z"]
        error = messages[0].error
        assert (error["S"], error["C"]) == ("ERROR", "53300")
        assert re.search(r"timed out after 500 ms waiting for a server connection: 2 of 2 in use", error["M"]), error
        everything = " ".join(error.values())
        assert "worker" in everything and "idle in transaction" in everything, error
        assert 0.4 < waited < 3
        # the extended protocol too, and the client goes on
        messages = waiter.ask(wire.parse("SELECT 1"), wire.bind(), wire.execute(), wire.SYNC)
        assert [m.type for m in messages] == ["E", "Z"]
        holders[0].ask(wire.query("COMMIT"))
        assert waiter.value("SELECT 2") == "2"
    for w in holders:
        w.sock.close()


def test_waiters_are_served_first_come_first_served(proxies, pg):
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 20000}})
    holder = raw(proxy)
    holder.ask(wire.query("BEGIN"))
    waiters = [raw(proxy) for _ in range(8)]
    for position, w in enumerate(waiters):
        w.send(wire.query("SELECT clock_timestamp()"))
        harness.poll(lambda: proxy.stats()["waitingCount"] == position + 1, what=f"{position + 1} waiting")
    holder.ask(wire.query("COMMIT"))
    times = [next(m.row[0] for m in w.until() if m.type == "D") for w in waiters]
    assert times == sorted(times)
    for w in [holder, *waiters]:
        w.sock.close()


def test_idle_servers_are_leased_last_used_first(proxies, pg):
    proxy = proxies({"pool": {"max": 4}})
    clients = [raw(proxy) for _ in range(4)]
    for w in clients:
        w.ask(wire.query("BEGIN"))
    for w in clients:
        w.ask(wire.query("COMMIT"))
    assert len({clients[n % 4].value(SERVER) for n in range(12)}) == 1
    for w in clients:
        w.sock.close()


def test_client_gone_in_a_transaction_is_rolled_back_and_the_connection_kept(proxies, pg):
    pg.sql("DROP TABLE IF EXISTS gone", database=DATABASE)
    pg.sql("CREATE TABLE gone (a int); GRANT ALL ON gone TO app", database=DATABASE)
    proxy = proxies({"pool": {"max": 1}})
    w = raw(proxy)
    w.ask(wire.query("BEGIN"))
    w.ask(wire.query("INSERT INTO gone VALUES (1)"))
    pid = w.value(SERVER)
    w.sock.close()
    with raw(proxy) as after:
        assert after.value(SERVER) == pid
        assert after.value("SELECT count(*) FROM gone") == "0"
        assert after.ask(wire.query("SELECT 1"))[-1].body == b"I"


@pytest.mark.parametrize("goodbye", [b"", wire.frame("X")], ids=["gone", "Terminate"])
@pytest.mark.parametrize("flushed", [True, False])
@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_what_no_sync_has_committed_is_rolled_back(proxies, pg, goodbye, flushed, mode):
    pg.sql("DROP TABLE IF EXISTS unsynced; CREATE TABLE unsynced (a int); GRANT ALL ON unsynced TO app", database=DATABASE)
    proxy = proxies({"pool": {"max": 1, "mode": mode}})
    with raw(proxy) as w:
        w.send(wire.parse("INSERT INTO unsynced VALUES (1)"), wire.bind(), wire.execute(), *[wire.frame("H")] * flushed, goodbye)
        if flushed and not goodbye:
            w.until("C")
    with raw(proxy) as after:
        assert after.value("SELECT count(*) FROM unsynced") == "0"


def test_who_says_goodbye_has_its_statement_done(proxies, pg):
    pg.sql("DROP TABLE IF EXISTS done; CREATE TABLE done (a text); GRANT ALL ON done TO app", database=DATABASE)
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 20000}})
    with raw(proxy) as w:
        w.send(wire.query("INSERT INTO done SELECT 'all of it' FROM pg_sleep(3)"), wire.frame("X"))
    with raw(proxy) as w:
        w.send(wire.query("BEGIN; INSERT INTO done SELECT 'uncommitted' FROM pg_sleep(0.1)"), wire.frame("X"))
    with raw(proxy) as after:
        assert after.value("SELECT string_agg(a, ',') FROM done") == "all of it"


def test_client_gone_in_the_middle_of_a_query_and_a_result(proxies, pg):
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 20000}})
    for sql in ("SELECT pg_sleep(30)", "SELECT repeat('x', 1000) FROM generate_series(1, 300000)", "BEGIN; SELECT pg_sleep(30)"):
        w = raw(proxy)
        w.send(wire.query(sql))
        harness.poll(lambda: pg.count("usename = 'app' AND state = 'active'") == 1 or "repeat" in sql, what="it runs")
        w.sock.close()
        with raw(proxy) as after:
            before = time.monotonic()
            assert after.value("SELECT 'free'") == "free"
            assert time.monotonic() - before < 15, sql


def test_client_gone_that_has_not_read_its_result(proxies, pg):
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 20000}})
    w = raw(proxy)
    w.send(wire.query("SELECT repeat('x', 1000) FROM generate_series(1, 200000)"))
    [pid] = harness.poll(lambda: pg.backends("usename = 'app' AND wait_event = 'ClientWrite'"), what="nobody reads it")
    w.sock.close()
    with raw(proxy) as after:
        before = time.monotonic()
        assert after.value("SELECT pg_backend_pid()") == str(pid)
        assert time.monotonic() - before < 5


def test_a_reset_that_fails_counts_as_none(proxies, pg):
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 20000}})
    with raw(proxy) as w, raw(proxy, timeout=30) as other, pg.admin(DATABASE) as admin:
        w.ask(wire.query("CREATE TEMP TABLE secret AS SELECT 'of one' AS a"))
        w.ask(wire.query("SET work_mem = '7MB'; SET lock_timeout = 300"))
        w.value("SELECT 1")
        [[table]] = admin.execute("SELECT oid::regclass::text FROM pg_class WHERE relname = 'secret'").fetchall()
        admin.execute("BEGIN")
        admin.execute(f"LOCK TABLE {table} IN ACCESS SHARE MODE")  # so that DISCARD ALL can't drop it
        w.sock.close()
        release = threading.Timer(1.5, admin.execute, ["ROLLBACK"])
        release.start()
        assert other.value("SHOW work_mem") == "4MB"
        assert other.ask(wire.query("SELECT a FROM secret"))[0].error["C"] == "42P01"
        release.join()


def test_pools_that_nobody_uses_are_forgotten(proxies):
    proxy = proxies({"users": {"*": {}, "other": {"password": harness.OTHER_PASSWORD}}, "databases": {"*": {}}, "auth": {"method": "password"},
                     "admin": {"users": [USER]}})

    def pools():
        return {(row["database"], row["user"]) for row in proxy.json("/api/monitoring/pools")[1]["pools"]}

    with raw(proxy) as stays:
        stays.value("SELECT 1")
        for number in range(20):
            with wire.Wire(proxy.port) as w:
                assert w.login(f"nobody{number}", "x", DATABASE).error["C"] == "28P01"
            with wire.Wire(proxy.port) as w:
                assert w.login(USER, PASSWORD, f"nowhere{number}").error["C"] == "3D000"
        harness.poll(lambda: pools() == {(DATABASE, USER)}, what="the others are forgotten")
        assert stays.value("SELECT 1") == "1"
    with raw(proxy, user=harness.OTHER_USER, password=harness.OTHER_PASSWORD, database="postgres") as w:
        w.value("SELECT 1")
    time.sleep(1.5)
    with proxy.connect(database="pgsidecar", prepare_threshold=None) as console:
        assert not [row for row in console.execute("SHOW DATABASES") if row[0].startswith("nowhere")]
    assert pools() == {(DATABASE, USER), ("postgres", harness.OTHER_USER)}


SETTINGS = [("TimeZone", ["Asia/Tokyo", "Europe/Rome", "UTC"]), ("work_mem", ["1MB", "2MB", "3MB"]), ("search_path", ["a", "b", "c"]),
            ("application_name", ["eins", "zwei", "drei"]), ("statement_timeout", ["11s", "12s", "13s"]), ("app.tenant", ["x", "y", "z"])]


def test_settings_of_one_client_are_never_seen_by_another(proxies, pg):
    """Each client sets, and sees its own value or, having set none, the default: never another's."""
    proxy = proxies({"pool": {"max": 3, "connectionTimeoutMillis": 60000}})
    with pg.connect() as direct:
        default = {name: direct.execute("SELECT current_setting(%s, true)", (name,)).fetchone()[0] or "" for name, _ in SETTINGS}

    def work(index):
        rng = random.Random(index)
        own = dict(default)
        with raw(proxy) as w:
            for _ in range(40):
                name, values = rng.choice(SETTINGS)
                if index % 3 and rng.random() < 0.3:
                    value = rng.choice(values)
                    w.ask(wire.query(f"SET {name} TO '{value}'"))
                    own[name] = value
                seen = w.value(f"SELECT coalesce(current_setting('{name}', true), '') || ''")
                if own[name] != default[name] or name != "application_name":
                    assert seen == own[name], (index, name)
                else:
                    assert seen not in values, (index, name, seen)

    harness.threads(20, work)


def test_settings_obey_the_transaction(proxies, pg):
    proxy = proxies({"pool": {"max": 1}})
    with raw(proxy) as a, raw(proxy) as b:
        a.ask(wire.query("SET work_mem TO '7MB'"))
        a.ask(wire.query("BEGIN"))
        a.ask(wire.query("SET work_mem TO '9MB'"))
        assert a.value("SHOW work_mem") == "9MB"
        a.ask(wire.query("ROLLBACK"))
        assert b.value("SHOW work_mem") == "4MB"
        assert a.value("SHOW work_mem") == "7MB"
        a.ask(wire.query("SET LOCAL work_mem TO '11MB'"))
        assert a.value("SHOW work_mem") == "7MB"
        b.ask(wire.query("SET work_mem TO '13MB'"))
        assert a.value("SHOW work_mem") == "7MB"
        a.ask(wire.query("RESET work_mem"))
        assert (a.value("SHOW work_mem"), b.value("SHOW work_mem")) == ("4MB", "13MB")


@pytest.mark.parametrize("name,value", [("app.tenant", "z"), ("work_mem", "9MB"), ("search_path", "pg_temp"), ("DateStyle", "German")])
def test_a_setting_does_not_hold_the_server(proxies, pg, name, value):
    """It is carried, not pinned: with one server another client is served meanwhile."""
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 2000}})
    with raw(proxy) as a, raw(proxy) as b:
        look = f"SELECT coalesce(current_setting('{name}', true), '')"
        before = b.value(look)
        assert a.ask(wire.query(f"SET {name} TO '{value}'"))[-1].body == b"I"
        for _ in range(3):
            assert b.value(look) == before
            assert value in a.value(look)


@pytest.mark.parametrize("leave,look", [
    ("CREATE TEMP TABLE leftover (a int)", "SELECT count(*) FROM pg_class WHERE relname = 'leftover' AND pg_table_is_visible(oid)"),
    ("SELECT pg_advisory_lock(4711)", "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"),
    ("LISTEN leftover", "SELECT count(*) FROM pg_listening_channels()"),
    ("PREPARE leftover AS SELECT 1", "SELECT count(*) FROM pg_prepared_statements WHERE from_sql"),
    ("DECLARE leftover CURSOR WITH HOLD FOR SELECT 1", "SELECT count(*) FROM pg_cursors WHERE is_holdable"),
    ("SET ROLE pg_monitor", "SELECT count(*) WHERE current_user <> 'app'"),
    ("DO $$ BEGIN PERFORM set_config('work_mem', '17MB', false); END $$", "SELECT count(*) WHERE current_setting('work_mem') <> '4MB'"),
])
def test_what_a_client_left_behind_is_gone_for_the_next(proxies, pg, leave, look):
    pg.sql("GRANT pg_monitor TO app")
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 10000}})
    with raw(proxy) as w:
        messages = w.ask(wire.query(leave))
        assert not [m for m in messages if m.type == "E"], [m.error for m in messages if m.type == "E"]
    with raw(proxy) as after:
        assert after.value(look) == "0"


@pytest.fixture(scope="module")
def functions(_server):
    """Functions that leave something behind, or don't."""
    _server.sql("""
        DROP SCHEMA IF EXISTS fn CASCADE;
        CREATE SCHEMA fn;
        GRANT USAGE ON SCHEMA fn TO PUBLIC;
        CREATE FUNCTION fn.set_mem(v text) RETURNS void LANGUAGE plpgsql AS $$BEGIN PERFORM set_config('work_mem', v, false); END$$;
        CREATE FUNCTION fn.set_tenant(v text) RETURNS void LANGUAGE plpgsql AS $$BEGIN PERFORM set_config('app.tenant', v, false); END$$;
        CREATE FUNCTION fn.outer_tenant(v text) RETURNS void LANGUAGE sql AS $$SELECT fn.set_tenant(v)$$;
        CREATE FUNCTION fn.dynamic_tenant(v text) RETURNS void LANGUAGE plpgsql AS $$BEGIN EXECUTE format('SET app.tenant = %L', v); END$$;
        CREATE FUNCTION fn.any_setting(n text, v text) RETURNS void LANGUAGE plpgsql AS $$BEGIN PERFORM set_config(n, v, false); END$$;
        CREATE FUNCTION fn.run(sql text) RETURNS void LANGUAGE plpgsql AS $$BEGIN EXECUTE sql; END$$;
        CREATE FUNCTION fn.lock() RETURNS void LANGUAGE plpgsql AS $$BEGIN PERFORM pg_advisory_lock(99); END$$;
        CREATE FUNCTION fn.temp() RETURNS void LANGUAGE plpgsql AS $$BEGIN CREATE TEMP TABLE from_function (a int); END$$;
        CREATE FUNCTION fn.plus(a int) RETURNS int LANGUAGE sql AS $$SELECT a + 1$$;
        CREATE PROCEDURE fn.proc_tenant(v text) LANGUAGE plpgsql AS $$BEGIN PERFORM set_config('app.tenant', v, false); END$$;
    """, database=DATABASE)
    yield
    _server.sql("DROP SCHEMA fn CASCADE", database=DATABASE)


@pytest.mark.parametrize("leave,look,expected,clean", [
    ("SELECT fn.set_mem('9MB')", "SHOW work_mem", "9MB", "4MB"),
    ("SELECT fn.set_tenant('z')", "SELECT coalesce(current_setting('app.tenant', true), '')", "z", ""),
    ("SELECT fn.outer_tenant('z')", "SELECT coalesce(current_setting('app.tenant', true), '')", "z", ""),
    ("SELECT fn.dynamic_tenant('z')", "SELECT coalesce(current_setting('app.tenant', true), '')", "z", ""),
    ("SELECT fn.any_setting('app.tenant', 'z')", "SELECT coalesce(current_setting('app.tenant', true), '')", "z", ""),
    ("SELECT fn.run('SET app.run = ''z''')", "SELECT coalesce(current_setting('app.run', true), '')", "z", ""),
    ("CALL fn.proc_tenant('z')", "SELECT coalesce(current_setting('app.tenant', true), '')", "z", ""),
    ("DO $$BEGIN PERFORM fn.set_tenant('z'); END$$", "SELECT coalesce(current_setting('app.tenant', true), '')", "z", ""),
    ("DO $$BEGIN IF true THEN SET app.tenant = 'z'; END IF; END$$", "SELECT coalesce(current_setting('app.tenant', true), '')", "z", ""),
    ("SELECT fn.lock()", "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()", "1", "0"),
    ("SELECT fn.temp()", "SELECT count(*) FROM pg_class WHERE relname = 'from_function' AND pg_table_is_visible(oid)", "1", "0"),
])
@pytest.mark.parametrize("extended", [False, True], ids=["simple", "extended"])
def test_what_functions_leave_behind_is_their_callers_alone(proxies, functions, leave, look, expected, clean, extended):
    proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 10000}})
    with raw(proxy) as a, raw(proxy) as b:
        for _ in range(2):
            done = a.ask(wire.parse(leave), wire.bind(), wire.execute(), wire.SYNC) if extended else a.ask(wire.query(leave))
            assert not [m for m in done if m.type == "E"] or "already exists" in [m.error["M"] for m in done if m.type == "E"][0]
            for _ in range(2):
                assert b.value(look) == clean
                assert a.value(look) in (expected, "2")  # the second advisory lock counts
    with raw(proxy) as after:
        assert after.value(look) == clean


def test_a_harmless_function_is_asked_about_once(proxies, pg, functions):
    proxy = proxies({"pool": {"max": 1}})
    with raw(proxy) as a:
        for _ in range(5):
            assert a.value("SELECT fn.plus(1)") == "2"
        last = pg.sql("SELECT query FROM pg_stat_activity WHERE usename = 'app' AND client_port > 0")[0][0]
        assert last == "SELECT fn.plus(1)"  # no look at the session after it


@pytest.mark.generic
def test_no_client_sees_another_ones_bytes(proxies, pg):
    """Random tokens from 60 clients on 4 servers, in all forms: each gets its own, whole and in order."""
    proxy = proxies({"pool": {"max": 4, "connectionTimeoutMillis": 60000}})
    rounds = 10

    def work(index):
        rng = random.Random(index)
        with wire.Wire(proxy.port, timeout=60) as w:
            assert w.login(USER, PASSWORD, DATABASE) is None
            for _ in range(rounds):
                tokens = [secrets.token_hex(rng.choice((4, 100, 5000))) for _ in range(rng.randrange(1, 6))]
                kind = rng.randrange(4)
                if kind == 0:
                    for token in tokens:
                        assert w.value(f"SELECT '{token}'") == token
                elif kind == 1:  # pipelined, a Sync each
                    w.send(*(wire.parse("SELECT $1::text") + wire.bind("", [t]) + wire.describe("P") + wire.execute() + wire.SYNC for t in tokens))
                    for token in tokens:
                        assert [m.row[0].decode() for m in w.until() if m.type == "D"] == [token]
                elif kind == 2:  # one Sync for all
                    w.send(*(wire.parse("SELECT $1::text") + wire.bind("", [t]) + wire.execute() for t in tokens), wire.SYNC)
                    assert [m.row[0].decode() for m in w.until() if m.type == "D"] == tokens
                else:  # a simple query of several statements in a transaction
                    w.ask(wire.query("BEGIN"))
                    messages = w.ask(wire.query("; ".join(f"SELECT '{t}'" for t in tokens)))
                    assert [m.row[0].decode() for m in messages if m.type == "D"] == tokens
                    w.ask(wire.query(rng.choice(("COMMIT", "ROLLBACK"))))

    harness.threads(60, work)


def test_one_client_has_one_connection(proxies, pg):
    """Also while that, not being the client's yet, is asked what the catalogs have, unless it takes 0.1 s: it does at times, on a busy machine."""
    counts = []
    with Gate(pg.port) as gate:
        for _ in range(5):
            proxy = proxies({"pool": {"max": 5}}, url=pg.url(port=gate.port))
            gate.delay = 0.005
            with raw(proxy) as w:
                for _ in range(5):
                    assert w.value("SELECT 1") == "1"
                time.sleep(0.5)
                counts.append(proxy.stats()["totalCount"])
    assert counts.count(1) >= 3, counts


def test_session_mode(proxies, pg):
    proxy = proxies({"pool": {"mode": "session", "max": 2, "connectionTimeoutMillis": 700}})
    with raw(proxy) as a, raw(proxy) as b:
        a.ask(wire.query("CREATE TEMP TABLE mine (a int)"))
        pid = a.value(SERVER)
        assert b.value(SERVER) != pid
        assert [a.value(SERVER) for _ in range(5)] == [pid] * 5
        assert a.value("SELECT count(*) FROM mine") == "0"
        with wire.Wire(proxy.port) as third:
            failure = third.login(USER, PASSWORD, DATABASE)
            if failure is None:
                failure = third.ask(wire.query("SELECT 1"))[0]
            assert failure.error["C"] == "53300", failure.error
    with raw(proxy) as after:
        assert after.value("SELECT count(*) FROM pg_class WHERE relname = 'mine' AND pg_table_is_visible(oid)") == "0"


@pytest.mark.parametrize("mode,before", [
    ("session", [wire.query("CREATE TEMP TABLE other (i int)")]), ("transaction", [wire.query("CREATE TEMP TABLE other (i int)")]),
    ("session", [wire.query("SELECT makes()")]),
    ("session", [wire.parse("CREATE TEMP TABLE other (i int)", "s") + wire.SYNC, wire.bind("s") + wire.execute() + wire.SYNC]),
])
def test_temporary_tables_hide_others_where_there_were_some_before(proxies, pg, mode, before):
    pg.sql("CREATE TABLE IF NOT EXISTS hidden AS SELECT 1 AS i; GRANT ALL ON hidden TO app;"
           "CREATE OR REPLACE FUNCTION makes() RETURNS void LANGUAGE plpgsql AS $$ BEGIN CREATE TEMP TABLE other (i int); END $$;"
           "CREATE OR REPLACE FUNCTION rows() RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN RETURN (SELECT count(*) FROM hidden); END $$",
           database=DATABASE)
    proxy = proxies({"pool": {"mode": mode, "max": 1}})
    with raw(proxy) as w:
        for frame in before:
            assert not [m.error for m in w.ask(frame) if m.type == "E"]
    with raw(proxy) as w:
        assert w.value("SELECT rows()") == "1"
        w.ask(wire.parse("SELECT count(*) FROM hidden", "s"), wire.bind("s"), wire.execute(), wire.SYNC)
        w.ask(wire.query("CREATE TEMP TABLE hidden (i int)"))
        assert w.value("SELECT rows()") == "0"
        assert [m.row for m in w.ask(wire.bind("s"), wire.execute(), wire.SYNC) if m.type == "D"] == [[b"0"]]


def test_functions_write_numbers_as_their_caller_does(proxies, pg):
    """As its role does by default, and as it has asked for at its login."""
    pg.sql("CREATE OR REPLACE FUNCTION sum_text() RETURNS text LANGUAGE plpgsql AS $$ BEGIN RETURN (0.1::float8 + 0.2::float8)::text; END $$",
           database=DATABASE)
    pg.sql(f"ALTER ROLE {USER} SET extra_float_digits = 0")
    try:
        proxy = proxies({"pool": {"max": 1}})
        with raw(proxy) as plain, raw(proxy, extra_float_digits="3") as jdbc, raw(proxy, extra_float_digits="1") as other:
            for _ in range(2):
                assert plain.value("SELECT sum_text()") == "0.3"
                assert jdbc.value("SELECT sum_text()") == other.value("SELECT sum_text()") == "0.30000000000000004"
    finally:
        pg.sql(f"ALTER ROLE {USER} RESET extra_float_digits")


def test_many_log_in_while_the_first_connection_is_opened(proxies, pg):
    """Each is done with its server connection at once: no stack is deep enough for all of them."""
    with Gate(pg.port) as gate:
        proxy = proxies({"pool": {"max": 1, "maxUses": 0, "connectionTimeoutMillis": 60000}, "auth": {"method": "trust"},
                         "limits": {"maxLoginClients": 2000, "loginTimeoutMillis": 60000}}, url=pg.url(port=gate.port))
        if not harness.sanitized():
            resource.prlimit(proxy.process.pid, resource.RLIMIT_STACK, (256 * 1024, resource.RLIM_INFINITY))
        gate.stall()
        with contextlib.ExitStack() as clients:
            waiting = [clients.enter_context(wire.Wire(proxy.port, timeout=60)) for _ in range(800)]
            for w in waiting:
                w.send(wire.startup_packet({"user": USER, "database": DATABASE}))
            harness.poll(lambda: proxy.stats()["waitingCount"] == len(waiting))
            gate.resume()
            for w in waiting:
                assert w.until()[0].type == "R"


def test_session_mode_ends_who_is_idle_for_too_long(proxies):
    proxy = proxies({"pool": {"mode": "session", "clientIdleTimeoutMillis": 1500}})
    with raw(proxy) as w:
        time.sleep(0.8)
        assert w.value("SELECT 1") == "1"  # not from the login on
        begun = time.monotonic()
        assert [m.error["C"] for m in w.closed()] == ["57P05"]
        assert time.monotonic() - begun > 1.4


def test_session_mode_tells_the_parameters_of_the_session(proxies, pg):
    proxy = proxies({"pool": {"mode": "session", "max": 2}})
    with raw(proxy) as before:
        pg.sql(f"ALTER ROLE {USER} SET timezone = 'Asia/Tokyo'")
        try:
            with raw(proxy) as after:
                before.sock.close()
                assert after.parameters["TimeZone"] == after.value("SHOW timezone") == "Asia/Tokyo"
                with raw(proxy) as again:
                    assert again.parameters["TimeZone"] == again.value("SHOW timezone")
        finally:
            pg.sql(f"ALTER ROLE {USER} RESET timezone")


def test_statement_mode_refuses_transactions(proxies, pg):
    proxy = proxies({"pool": {"mode": "statement", "max": 1}})
    with raw(proxy) as w:
        assert w.value("SELECT 1") == "1"
        w.send(wire.query("BEGIN"))
        messages = w.until("E")
        assert wire.kinds(messages) == "CE", "a driver that has got ReadyForQuery doesn't read the error"
        assert "transaction" in messages[-1].error["M"].lower(), messages[-1].error
    with raw(proxy) as after:
        assert after.value("SELECT 2") == "2"


@pytest.mark.parametrize("extended", [False, True])
def test_what_is_sent_behind_a_transaction_that_is_refused_is_not_executed(proxies, pg, extended):
    pg.sql("CREATE TABLE IF NOT EXISTS behind (i int); TRUNCATE behind; GRANT ALL ON behind TO app", database=DATABASE)
    proxy = proxies({"pool": {"mode": "statement", "max": 1}})
    with raw(proxy) as w:
        for text in ("SELECT pg_sleep(0.2)", "BEGIN", "INSERT INTO behind VALUES (1)", "COMMIT"):
            w.send(*((wire.parse(text), wire.bind(), wire.execute(), wire.SYNC) if extended else (wire.query(text),)))
        assert w.until("E")[-1].error["C"] == "0A000"
    for _ in range(3):
        with raw(proxy) as after:
            assert after.value("SELECT count(*) FROM behind") == "0"
    assert proxy.stats()["totalCount"] == 1


def test_a_server_that_goes_before_a_transaction_is_refused(proxies, pg):
    proxy = proxies({"pool": {"mode": "statement", "max": 1}})
    with raw(proxy, timeout=8) as w:
        w.send(wire.query("SELECT pg_sleep(0.3)"), wire.query("BEGIN"))
        time.sleep(0.1)
        proxy.signal(signal.SIGSTOP)  # so that all comes at once
        harness.poll(lambda: pg.count("usename = 'app' AND state = 'idle in transaction'") == 1)
        pg.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'")
        harness.poll(lambda: pg.count("usename = 'app'") == 0)
        proxy.signal(signal.SIGCONT)
        assert w.until("E")[-1].error["S"] == "FATAL"
        w.closed()


def test_pool_of_a_section_has_its_own_max(proxies, pg):
    proxy = proxies({"databases": {DATABASE: {"pool": {"max": 2}}}, "pool": {"max": 9, "connectionTimeoutMillis": 20000}})
    with harness.Watch(pg, "usename = 'app'") as watch:
        with concurrent.futures.ThreadPoolExecutor(10) as executor:
            def work(_):
                with raw(proxy) as w:
                    w.ask(wire.query("SELECT pg_sleep(0.05)"))
            list(executor.map(work, range(20)))
    assert watch.most == 2


def test_idle_proxy_lets_the_server_sleep(proxies, pg):
    """Without clients no connection is opened and no query is sent."""
    proxy = proxies({"pool": {"min": 2, "idleTimeoutMillis": 200}})
    before = pg.sql("SELECT sum(sessions) FROM pg_stat_database WHERE datname = %s", DATABASE)[0][0]
    for _ in range(5):
        proxy.http("/health/ready")
        proxy.http("/metrics")
        time.sleep(0.1)
    assert pg.sql("SELECT sum(sessions) FROM pg_stat_database WHERE datname = %s", DATABASE)[0][0] == before
    assert pg.count("usename = 'app'") == 0


def test_exit_on_idle(proxies, pg):
    proxy = proxies({"pool": {"allowExitOnIdle": True, "idleTimeoutMillis": 300}})
    time.sleep(0.6)
    assert proxy.running()  # there has been no client yet
    with raw(proxy) as w:
        assert w.value("SELECT 1") == "1"
        stop = threading.Event()
        assert not stop.wait(0.6)
        assert proxy.running()
    assert proxy.wait_exit(10) == 0


def test_session_mode_tells_the_servers_own_pid(proxies, pg):
    proxy = proxies({"pool": {"max": 2, "mode": "session"}})
    for _ in range(2):  # also once the server's greeting is known
        with raw(proxy) as a, raw(proxy) as b:
            assert a.value("SELECT pg_backend_pid()") == str(a.pid) != str(b.pid)
            a.send(wire.query("SELECT pg_sleep(20)"))
            harness.poll(lambda: pg.count(f"state = 'active' AND query LIKE '%pg_sleep(20)' AND pid = {a.pid}") == 1, what="it runs")
            with wire.Wire(proxy.port) as c:
                c.send(wire.request(wire.CANCEL_REQUEST, a.pid.to_bytes(4, "big") + a.key))
            assert [m.error["C"] for m in a.until() if m.type == "E"] == ["57014"]


@pytest.mark.parametrize("how", ["DROP DATABASE unused", 'DROP DATABASE IF EXISTS "unused"', "ALTER DATABASE unused RENAME TO renamed", "CREATE DATABASE copied TEMPLATE unused"])
def test_a_database_that_no_client_uses_is_in_nobodys_way(proxies, pg, how):
    """PostgreSQL waits five seconds for others' sessions to end."""
    for name in ("unused", "renamed", "copied"):
        pg.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    pg.sql("CREATE DATABASE unused OWNER app")
    pg.sql("ALTER ROLE app CREATEDB")
    proxy = proxies({"databases": {"*": {}}, "pool": {"max": 4}})
    with raw(proxy, database="unused") as w, raw(proxy, database="unused") as other:
        w.value("BEGIN; SELECT 1")
        other.value("SELECT 1")
        w.ask(wire.query("COMMIT"))
    with raw(proxy) as w:
        assert wire.kinds(w.ask(wire.query(how))) == "CZ"
    pg.sql("ALTER ROLE app NOCREATEDB")
