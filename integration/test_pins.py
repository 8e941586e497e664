"""What keeps a client on its server connection, by its name, and how it ends; and what needs no pin because it goes with the client."""
import re

import pytest

import harness
import wire
from harness import DATABASE
from test_pooling import SERVER, raw


def errors(messages):
    return [m.error["C"] for m in messages if m.type == "E"]


def pins(proxy):
    status, answer = proxy.json("/api/monitoring/pins")
    assert status == 200
    return answer["pins"]


def reasons(proxy):
    return [r["reason"] for pin in pins(proxy) for r in pin["reasons"]]


def await_reasons(proxy, *expected):
    """The server is asked after the client has its answer."""
    harness.poll(lambda: reasons(proxy) == list(expected), 5, f"pins {expected}")


@pytest.mark.parametrize("begin,end,reason,detail", [
    ("CREATE TEMP TABLE tmp (a int)", "DROP TABLE tmp", "temporary_object", "tmp"),
    ("SELECT pg_advisory_lock(3, 14)", "SELECT pg_advisory_unlock(3, 14)", "advisory_lock", "3,14"),
    ("PREPARE p AS SELECT 1", "DEALLOCATE p", "prepared_statement", "p"),
    ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "CLOSE c", "held_cursor", "c"),
    ("CREATE TEMP VIEW v AS SELECT 1", "DISCARD TEMP", "temporary_object", "v"),
    ("SELECT pg_backend_pid()", None, "backend_pid", ""),
    ("SELECT setseed(0.5)", None, "random_seed", ""),
    ("LOAD 'plpgsql'", None, "library", ""),
])
def test_a_pin_is_named_and_ends(proxies, pg, begin, end, reason, detail):
    proxy = proxies({"pool": {"max": 2, "noticePins": True}})
    with raw(proxy) as a, raw(proxy) as b:
        assert not errors(a.ask(wire.query(begin))) or reason == "library"
        assert b.value("SELECT 1") == "1"
        await_reasons(proxy, reason)
        (pin,) = pins(proxy)
        assert detail in pin["detail"] and pin["client"] == a.pid
        notices = [m.error["M"] for m in a.ask(wire.query("SELECT 2")) if m.type == "N"]
        assert len(notices) <= 1 and all(reason in n for n in notices)
        assert f'reason="{reason}"}} 1' in proxy.http("/metrics")[2]
        assert proxy.log_text().count("pinned to its server connection") == 1
        if end is None:
            assert not errors(a.ask(wire.query("DISCARD ALL"))) and a.value("SELECT 1") == "1" and reasons(proxy) == [reason]
            return
        assert not errors(a.ask(wire.query(end)))
        await_reasons(proxy)


def test_pins_and_statements_are_shown_to_loopback_only(proxies):
    proxy = proxies()
    for path in ("/api/monitoring/pins", "/api/monitoring/transparency"):
        assert proxy.http(path)[0] == 200
        assert proxy.http(path, headers={"Host": "evil.example"})[0] == 403
        assert proxy.http(path, method="POST")[0] == 405


def test_transparency_counts_by_normalised_text(proxies):
    proxy = proxies({"pool": {"max": 2}})
    with raw(proxy) as a:
        for n in range(3):
            a.ask(wire.query(f"SET app.tenant = 'secret{n}'"))
            a.ask(wire.query(f"SELECT pg_advisory_lock({n})"))
        a.value("SELECT 1")  # which waits until the server has been asked
    (pool,) = proxy.json("/api/monitoring/transparency")[1]["pools"]
    rows = {row["statement"]: row for row in pool["statements"]}
    assert rows["SET app.tenant = ?"]["carried"] == 3 and rows["SELECT pg_advisory_lock(?)"]["pinned"] == 3
    assert "secret" not in str(pool) and pool["pinningStatements"] >= 1


def test_what_functions_leave_is_told(proxies, pg):
    pg.sql("CREATE OR REPLACE FUNCTION told_tenant() RETURNS void LANGUAGE plpgsql AS $$BEGIN PERFORM set_config('app.tenant', 'x', false); END$$", database=DATABASE)
    pg.sql("CREATE OR REPLACE FUNCTION told_nothing() RETURNS int LANGUAGE sql AS 'SELECT 1'", database=DATABASE)
    proxy = proxies({"pool": {"max": 2}})
    with raw(proxy) as a:
        a.ask(wire.query("SELECT told_tenant(), told_nothing()"))
        assert a.value("SHOW app.tenant") == "x"
    (pool,) = proxy.json("/api/monitoring/transparency")[1]["pools"]
    told = {f["function"]: f["leaves"] for f in pool["functions"]}
    assert told["told_tenant"] == ["settings"] and "told_nothing" not in told and pool["everyTransactionCheckedFor"] == []


def test_session_mode_tells_what_transaction_mode_would_do(proxies):
    proxy = proxies({"pool": {"max": 2, "mode": "session"}})
    with raw(proxy) as a:
        a.ask(wire.query("CREATE TEMP TABLE t1 (a int)"))
        a.ask(wire.parse("SELECT pg_try_advisory_lock(1)"), wire.bind(), wire.execute(), wire.SYNC)
        a.ask(wire.query("INSERT INTO t1 VALUES (1)"))
        (pool,) = proxy.json("/api/monitoring/transparency")[1]["pools"]
    assert {r for row in pool["statements"] for r in row["reasons"]} == {"temporary_object", "advisory_lock"}
    assert pool["residueChecks"] == 0


def test_a_role_goes_with_the_client(proxies, pg):
    pg.sql("GRANT pg_monitor TO app")
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 2000}})
    with raw(proxy) as a, raw(proxy) as b:
        a.ask(wire.query("SET ROLE pg_monitor"))
        for _ in range(3):
            assert b.value("SELECT current_user") == "app"
            assert a.value("SELECT current_user") == "pg_monitor"
        a.ask(wire.query("SET work_mem = '5MB'"))
        assert (b.value("SHOW work_mem"), a.value("SELECT current_user || current_setting('work_mem')")) == ("4MB", "pg_monitor5MB")
        a.ask(wire.query("RESET ROLE"))
        assert (b.value("SELECT current_user"), a.value("SELECT current_user")) == ("app", "app")
        await_reasons(proxy)


@pytest.mark.parametrize("use,rows", [
    ("EXECUTE mine(7)", ["a7"]),
    ("CREATE TEMP TABLE made AS EXECUTE mine(7); SELECT * FROM made; DROP TABLE made", ["a7"]),
])
def test_sql_finds_the_protocols_statements(proxies, use, rows):
    proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 5000}})
    with raw(proxy) as a, raw(proxy) as b:
        a.ask(wire.parse("SELECT 'a' || $1", "mine"), wire.SYNC)
        b.ask(wire.parse("SELECT 'b' || $1", "mine"), wire.SYNC)
        for _ in range(3):
            assert [m.row[0].decode() for m in a.ask(wire.query(use)) if m.type == "D"] == rows
            assert [m.row[0] for m in b.ask(wire.bind("mine", ["8"]), wire.execute(), wire.SYNC) if m.type == "D"] == [b"b8"]
            assert [m.row[0] for m in a.ask(wire.bind("mine", ["9"]), wire.execute(), wire.SYNC) if m.type == "D"] == [b"a9"]
            assert a.value("SELECT string_agg(name, ',') FROM pg_prepared_statements") == "mine"
        assert errors(a.ask(wire.query("PREPARE mine AS SELECT 1"))) == ["42P05"]
        assert a.ask(wire.query("DEALLOCATE mine"))[0].tag == "DEALLOCATE"
        assert errors(a.ask(wire.query("EXECUTE mine(1)"))) == ["26000"]
        assert errors(a.ask(wire.bind("mine", ["9"]), wire.execute(), wire.SYNC)) == ["26000"]
        await_reasons(proxy)
        a.ask(wire.query("PREPARE mine AS SELECT 'sql'"))
        assert errors(a.ask(wire.parse("SELECT 2", "mine"), wire.SYNC)) == ["42P05"]
        assert [m.row[0] for m in a.ask(wire.bind("mine"), wire.execute(), wire.SYNC) if m.type == "D"] == [b"sql"]
        a.ask(wire.query("DEALLOCATE mine"))
        assert not errors(a.ask(wire.parse("SELECT 2", "mine"), wire.SYNC))
        await_reasons(proxy)


@pytest.mark.parametrize("adopt", [[wire.parse("EXECUTE a", "c")], [wire.query("PREPARE x AS SELECT 1"), wire.parse("SELECT 1", "a"), wire.query("DEALLOCATE x")]],
                         ids=["named by SQL", "parsed where SQL had prepared"])
def test_a_closed_statement_is_gone_where_the_server_knew_its_name(proxies, adopt):
    """The client stays pinned, so that the session isn't cleared between; a Close that the server skips closes nothing."""
    proxy = proxies({"pool": {"max": 1}})
    with raw(proxy) as a:
        a.ask(wire.query("CREATE TEMP TABLE pins (a int)"))
        if len(adopt) == 1:
            a.ask(wire.parse("SELECT 1", "a"), wire.SYNC)
        for message in adopt:
            a.ask(message, *([] if message[:1] == b"Q" else [wire.SYNC]))
        assert errors(a.ask(wire.bind("none"), wire.close("S", "a"), wire.SYNC)) == ["26000"]
        assert not errors(a.ask(wire.bind("a"), wire.execute(), wire.SYNC))
        a.ask(wire.close("S", "a"), wire.SYNC)
        assert errors(a.ask(wire.bind("a"), wire.execute(), wire.SYNC)) == ["26000"]
        assert not errors(a.ask(wire.parse("SELECT count(*) FROM pg_prepared_statements WHERE name = 'a'", "a"), wire.SYNC))
        assert [m.row[0] for m in a.ask(wire.bind("a"), wire.execute(), wire.SYNC) if m.type == "D"] == [b"1"]
    with raw(proxy) as b:
        assert errors(b.ask(wire.bind("a"), wire.execute(), wire.SYNC)) == ["26000"]
        assert b.value("SELECT count(*) FROM pg_prepared_statements") == "0"


def test_constants_mean_what_they_meant_at_parse(proxies):
    """A statement's constants are read when it is prepared: under the DateStyle and TimeZone of the client that did."""
    proxy = proxies({"pool": {"max": 1}})
    text = "SELECT '01/02/2003'::date - '2003-01-01'::date"
    with raw(proxy) as a, raw(proxy, DateStyle="ISO, DMY") as b:
        run = lambda w: [m.row[0] for m in w.ask(wire.bind("s"), wire.execute(), wire.SYNC) if m.type == "D"]  # noqa: E731
        for w in (a, b):
            w.ask(wire.parse(text, "s"), wire.SYNC)
        assert (run(a), run(b)) == ([b"1"], [b"31"])
        a.ask(wire.query("SET datestyle = 'ISO, DMY'"))
        assert (run(a), run(b)) == ([b"1"], [b"31"])
    with raw(proxy) as a, raw(proxy) as b:
        a.ask(wire.query("BEGIN"), wire.parse("SET LOCAL datestyle = 'ISO, DMY'"), wire.bind(), wire.execute(), wire.SYNC)
        a.until()
        a.ask(wire.parse(text, "s"), wire.SYNC)
        a.ask(wire.query("COMMIT"))
        await_reasons(proxy, "statement_settings")
        assert run(a) == [b"31"]
        a.ask(wire.query("DEALLOCATE ALL"))
    with raw(proxy) as b:
        b.ask(wire.parse(text, "s"), wire.SYNC)
        assert run(b) == [b"1"]


def test_a_prepared_statement_moves_to_a_server_with_other_settings(proxies, pg):
    """Prepared under one DateStyle, used under another on a server connection that doesn't have it yet."""
    proxy = proxies({"pool": {"max": 2}})
    text = "SELECT '01/02/2003'::date - '2003-01-01'::date, current_setting('datestyle')"
    with raw(proxy) as a, raw(proxy) as b:
        a.ask(wire.parse(text, "s"), wire.SYNC)
        a.ask(wire.query("SET datestyle = 'ISO, DMY'"))
        b.ask(wire.query("BEGIN"))  # holds the server connection that was used last
        for _ in range(2):
            messages = a.ask(wire.parse("SELECT 1"), wire.bind(), wire.execute(), wire.bind("s"), wire.execute(), wire.SYNC)
            assert not errors(messages)
            assert [m.row for m in messages if m.type == "D"] == [[b"1"], [b"1", b"ISO, DMY"]]
        b.ask(wire.query("COMMIT"))


@pytest.mark.parametrize("verb", ["EXECUTE", "DEALLOCATE"])
@pytest.mark.parametrize("name,code", [("pgsidecar_{}", "42939"), ('"pgsidecar_{}"', "42939"), ('U&"pgsidecar\\005f{}"', "0A000")])
def test_nobody_names_what_others_have_prepared(proxies, verb, name, code):
    proxy = proxies({"pool": {"max": 1}})
    with raw(proxy) as a, raw(proxy) as b:
        a.ask(wire.parse("SELECT 'of a'", "s"), wire.SYNC)
        for number in range(8):
            text = f"{verb} {name.format(number)}"
            assert errors(b.ask(wire.query(text))) == [code]
            assert errors(b.ask(wire.parse(text), wire.bind(), wire.execute(), wire.SYNC)) == [code]
        assert not errors(a.ask(wire.bind("s"), wire.execute(), wire.SYNC))


def test_currval_is_ones_own_or_an_error(proxies, pg):
    pg.sql("CREATE SEQUENCE IF NOT EXISTS counted; GRANT ALL ON counted TO app;"
           "CREATE TABLE IF NOT EXISTS numbered (id serial, t text); GRANT ALL ON numbered, numbered_id_seq TO app", database=DATABASE)
    proxy = proxies({"pool": {"max": 3}})
    with raw(proxy) as a, raw(proxy) as b:
        for w in (a, b, a):
            w.value("SELECT nextval('counted')")
        assert errors(a.ask(wire.query("SELECT currval('counted')"))) == ["55000"]  # not another's; from now on it is known
        mine, other = a.value("SELECT nextval('counted')"), b.value("SELECT nextval('counted')")
        assert mine != other
        assert (a.value("SELECT currval('counted')"), b.value("SELECT currval('counted')")) == (mine, other)
        assert (a.value("SELECT lastval()"), b.value("SELECT lastval()")) == (mine, other)
        await_reasons(proxy, "sequence", "sequence")
        assert {pin["statement"] for pin in pins(proxy)} == {"SELECT nextval(?)"}
        for w in (a, b):
            assert not errors(w.ask(wire.query("DISCARD SEQUENCES")))
        await_reasons(proxy)
        assert errors(b.ask(wire.query("SELECT lastval()"))) == ["55000"]
        row = a.ask(wire.query("BEGIN; INSERT INTO numbered (t) VALUES ('x') RETURNING id"))
        (mine,) = [m.row[0].decode() for m in row if m.type == "D"]
        assert a.value("SELECT currval('numbered_id_seq')") == mine
        a.ask(wire.query("COMMIT"))


def test_leaving_out_the_own_backend_does_not_pin(proxies):
    proxy = proxies({"pool": {"max": 2}})
    with raw(proxy) as a:
        a.value("SELECT count(*) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        await_reasons(proxy)


def test_a_pin_names_each_thing_once(proxies):
    proxy = proxies()
    with raw(proxy) as a:
        a.ask(wire.query("CREATE TEMP TABLE once (a int)"))
        harness.poll(lambda: pins(proxy), what="it is pinned")
        assert [pin["detail"] for pin in pins(proxy)] == ["temporary object once"]


def test_what_cannot_be_undone_ends_the_server_connection(proxies):
    proxy = proxies({"pool": {"max": 1}})
    with raw(proxy) as a:
        before = a.value(SERVER)
        a.value("SELECT setseed(0.5)")
        first = a.value("SELECT random()")
    with raw(proxy) as b:
        b.value("SELECT setseed(0.5)")
        assert b.value("SELECT random()") == first
        assert b.value(SERVER) != before


@pytest.mark.parametrize("mode", ["transaction", "session"])
@pytest.mark.parametrize("goodbye", [False, True])
@pytest.mark.parametrize("sql", ["SELECT setseed(0.5)", "LOAD 'plpgsql'"])
def test_what_cannot_be_undone_reaches_no_other_client(proxies, mode, goodbye, sql):
    proxy = proxies({"pool": {"mode": mode, "max": 1}})
    with raw(proxy) as a:
        before = a.value(SERVER)
        if goodbye:
            a.send(wire.query(sql), wire.TERMINATE)
        else:
            a.ask(wire.query(sql))
    with raw(proxy) as b:
        assert b.value(SERVER) != before


@pytest.mark.parametrize("sql", ["CREATE TEMP TABLE t (a int)", "SELECT pg_advisory_lock(1)", "PREPARE p AS SELECT 1", "SELECT currval('s')",
                                 "DECLARE c CURSOR WITH HOLD FOR SELECT 1", "SELECT pg_backend_pid()", "SELECT setseed(0)", "LOAD 'x'"])
def test_on_unsupported_error_refuses_by_name(proxies, sql):
    proxy = proxies({"pool": {"max": 1, "onUnsupported": "error"}})
    with raw(proxy) as a, raw(proxy) as b:
        for frames in ([wire.query(sql)], [wire.parse(sql), wire.bind(), wire.describe("P"), wire.execute(), wire.SYNC],
                       [wire.parse(sql, "named"), wire.SYNC]):
            messages = a.ask(*frames)
            (error,) = [m.error for m in messages if m.type == "E"]
            assert error["C"] == "0A000" and "pool.onUnsupported" in error["M"] and error["H"]
            assert re.search(r"s\b| and ", error["M"].split(" need ")[0]), error["M"]
            assert [m.type for m in messages] == ["E", "Z"] and messages[-1].body == b"I"
            assert b.value("SELECT 1") == "1"
            assert a.ask(wire.query("BEGIN"))[-1].body == b"T"
            assert a.ask(*frames)[-1].body == b"E"  # as any error ends a transaction
            assert errors(a.ask(wire.query("SELECT 1"))) == ["25P02"]
            assert a.ask(wire.query("ROLLBACK"))[-1].body == b"I"
        assert errors(a.ask(wire.bind("named"), wire.execute(), wire.SYNC)) == ["26000"]
        assert pins(proxy) == []
        assert a.value("SELECT count(temp) FROM (SELECT 1 AS temp) AS x") == "1"


def test_reset_is_over_when_the_client_hears_of_it(proxies):
    """What it brought at its login has come back by then, and its next transaction begins with a known session."""
    proxy = proxies({"pool": {"max": 2}})
    with raw(proxy, application_name="mine", options="-c work_mem=3MB") as w:
        for turn in range(20):
            messages = w.ask(wire.query("RESET ALL"))
            assert not errors(messages) and messages[-1].type == "Z" and w.parameters["application_name"] == "mine"
            assert not errors(w.ask(wire.query("BEGIN")))
            assert not errors(w.ask(wire.parse(f"SELECT 'constant {turn}'", f"s{turn}"), wire.SYNC))
            assert w.value("SHOW work_mem") == "3MB"
            assert not errors(w.ask(wire.query("COMMIT")))
            assert not pins(proxy)
