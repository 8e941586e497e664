"""What a prepared statement looks like: a client relies on what it was told of its own, whatever others were told, and gets 0A000 where a direct
connection would say so (PostgreSQL documentation, PREPARE)."""
import pytest

import harness
import wire
from harness import DATABASE, poll, raw
from wire import kinds

TEXT = "SELECT * FROM seen"
PARSE, RUN = wire.parse(TEXT, "s"), (wire.bind("s"), wire.execute())


@pytest.fixture
def seen(pg):
    pg.sql("DROP TABLE IF EXISTS seen; CREATE TABLE seen (a int); INSERT INTO seen VALUES (1); GRANT ALL ON seen TO app", database=DATABASE)


def parses(proxy):
    text = harness.curl(proxy, "/metrics")[1]
    return sum(float(line.split(" ")[-1]) for line in text.splitlines() if line.startswith("pgsidecar_server_parses_total"))


def test_a_known_text_is_not_prepared_again(proxies):
    """Nor where the server connection gets the client's settings first."""
    proxy = proxies({"pool": {"max": 1}})
    with raw(proxy, application_name="one") as one, raw(proxy, application_name="two") as two:
        for n in range(10):
            for w in (one, two):
                assert kinds(w.ask(wire.parse("SELECT 1", "s"), wire.bind("s"), wire.execute(), wire.close("S", "s"), wire.SYNC)) == "12DC3Z"
        assert parses(proxy) == 1


def test_temporary_objects_concern_nobody_else(proxies):
    proxy = proxies({"pool": {"max": 2}})
    with raw(proxy) as own, raw(proxy) as w:
        for n in range(5):
            own.ask(wire.query("BEGIN"))
            own.ask(wire.query(f"CREATE TEMP TABLE t{n} AS SELECT {n} AS a"))
            own.ask(wire.query("COMMIT"))  # its connection is its own from now on
            assert kinds(w.ask(wire.parse("SELECT 1", "s"), wire.bind("s"), wire.execute(), wire.close("S", "s"), wire.SYNC)) == "12DC3Z"
        assert parses(proxy) == 1


def test_a_text_that_ends_a_failed_transaction_lists_no_statements(proxies):
    """Nothing can be prepared, nor taken away, ahead of its ROLLBACK."""
    proxy = proxies({"pool": {"max": 1}})
    with raw(proxy) as other, raw(proxy) as w:
        other.ask(wire.parse("SELECT 'another client'", "s"), wire.SYNC)
        w.ask(wire.query("BEGIN"))
        w.ask(wire.query("SELECT 1/0"))
        refused = w.ask(wire.query("ROLLBACK; SELECT name, statement FROM pg_prepared_statements"))
        assert kinds(refused) == "EZ" and refused[0].error["C"] == "25P02"
        w.ask(wire.query("ROLLBACK"))
        assert kinds(w.ask(wire.query("SELECT name, statement FROM pg_prepared_statements"))) == "TCZ"


def test_settings_of_a_transaction_concern_what_has_constants(proxies):
    """Others are neither prepared again nor a reason to keep the server connection."""
    proxy = proxies({"pool": {"max": 1}})
    with raw(proxy) as w:
        texts = ["SELECT $1::int + 1", "SELECT count(*) FROM pg_class WHERE relname = $1", "SELECT 2"]
        for n, text in enumerate(texts):
            w.ask(wire.parse(text, f"s{n}"), wire.SYNC)
        for round in range(10, 15):
            w.ask(wire.query("BEGIN; SET LOCAL timezone = 'UTC'"))
            w.ask(wire.parse(f"SELECT $1::int + {round}", f"own{round}"), wire.SYNC)
            for n in range(len(texts)):
                assert kinds(w.ask(wire.bind(f"s{n}", "1") if n < 2 else wire.bind(f"s{n}"), wire.execute(), wire.SYNC)) == "2DCZ"
            w.ask(wire.query("COMMIT"))
        assert parses(proxy) == len(texts) + 5
        assert proxy.json("/api/monitoring/pins")[1]["pins"] == []


def at_rest(proxy):
    """None of its server connections is asked anything: the one that was used last is the next."""
    poll(lambda: proxy.stats()["idleCount"] == proxy.stats()["totalCount"], 5, "all are idle")


@pytest.fixture
def add_column(pg):
    """A migration that the proxy doesn't see."""
    return lambda: pg.sql("ALTER TABLE seen ADD b int DEFAULT 2", database=DATABASE)


def changed(messages):
    return kinds(messages) == "EZ" and (messages[0].error["C"], messages[0].error["M"]) == ("0A000", "cached plan must not change result type")


@pytest.mark.parametrize("own", [(), (wire.describe("S", "s"),)])
def test_what_others_were_told_counts_for_nobody_else(proxies, seen, own):
    proxy = proxies({"pool": {"max": 2}})
    with raw(proxy) as holder, raw(proxy) as other, raw(proxy) as w:
        holder.value("BEGIN; SELECT 1")
        other.ask(wire.query("CREATE TEMP TABLE seen (other text)"))  # hides the table from this session alone
        assert kinds(other.ask(PARSE, wire.describe("S", "s"), *RUN, wire.SYNC)) == "1tT2CZ"
        holder.ask(wire.query("ROLLBACK"))
        for _ in range(2):
            assert kinds(w.ask(PARSE, *own, *RUN, wire.SYNC)) == ("1tT2DCZ" if own else "12DCZ")
            assert kinds(w.ask(*RUN, wire.SYNC)) == "2DCZ"
            w.ask(wire.close("S", "s"), wire.SYNC)
        assert kinds(other.ask(*RUN, wire.SYNC)) == "2CZ"


@pytest.mark.parametrize("told", [(wire.parse(TEXT, "s"), wire.describe("S", "s")), (wire.parse(TEXT, "s"), wire.bind("s"), wire.describe("P"))])
def test_who_was_told_hears_of_a_change(proxies, seen, add_column, told):
    """By the statement's description, or by a portal's, as pgjdbc: it decodes rows by what it was told once."""
    proxy = proxies({"pool": {"max": 2}})
    with raw(proxy) as w, raw(proxy) as holder:
        w.ask(*told, wire.SYNC)
        assert kinds(w.ask(*RUN, wire.SYNC)) == "2DCZ"
        at_rest(proxy)
        holder.value("BEGIN; SELECT 1")  # on the connection that knows the statement
        add_column()
        for _ in range(2):
            assert changed(w.ask(*RUN, wire.SYNC))
        w.ask(wire.close("S", "s"), PARSE, wire.SYNC)
        answer = w.ask(*RUN, wire.SYNC)
        assert kinds(answer) == "2DCZ" and answer[1].row == [b"1", b"2"]
        assert kinds(w.ask(wire.describe("S", "s"), *RUN, wire.SYNC)) == "tT2DCZ"


def test_a_plan_that_has_changed_fails_once_for_who_was_told_nothing(proxies, seen, add_column):
    proxy = proxies({"pool": {"max": 1}})
    with raw(proxy) as before, raw(proxy) as w:
        assert kinds(before.ask(PARSE, *RUN, wire.SYNC)) == "12DCZ"
        add_column()
        w.ask(PARSE, wire.SYNC)
        assert changed(w.ask(*RUN, wire.SYNC))
        for _ in range(2):
            assert w.ask(*RUN, wire.SYNC)[1].row == [b"1", b"2"]


@pytest.mark.parametrize("told", [(), (wire.describe("S", "s"),)])
@pytest.mark.parametrize("gone", ["DROP TABLE pg_temp.seen", "COMMIT"])
def test_anothers_temporary_table_leaves_no_plan_behind(proxies, seen, told, gone):
    proxy = proxies({"pool": {"max": 1}})
    with raw(proxy) as w, raw(proxy) as other:
        w.ask(PARSE, *told, *RUN, wire.SYNC)
        if gone == "COMMIT":
            other.ask(wire.query("BEGIN"))
        other.ask(wire.query("CREATE TEMP TABLE seen (other text)" + (" ON COMMIT DROP" if gone == "COMMIT" else "")))
        assert kinds(other.ask(PARSE, *RUN, wire.SYNC)) == "12CZ"
        other.ask(wire.query(gone))
        for _ in range(2):
            assert kinds(w.ask(*RUN, wire.SYNC)) == "2DCZ"


def test_described_columns_hold_on_a_server_that_prepared_before(small, pg):
    """One server has prepared it while a column was an int; the client was told bigint by another; it is an int again."""
    def alter(to):
        pg.sql(f"DROP TABLE IF EXISTS turned; CREATE TABLE turned AS SELECT 1::{to} AS a; GRANT ALL ON turned TO PUBLIC", database=DATABASE)

    alter("int")
    with raw(small) as one, raw(small) as two, raw(small) as holder:
        holder.ask(wire.query("BEGIN"))
        assert kinds(one.ask(wire.parse("SELECT a FROM turned", "s"), wire.SYNC)) == "1Z"
        pg.sql("ALTER TABLE turned ALTER a TYPE bigint", database=DATABASE)
        one.ask(wire.query("BEGIN"))
        holder.ask(wire.query("COMMIT"))
        told = two.ask(wire.parse("SELECT a FROM turned", "s"), wire.describe("S", "s"), wire.SYNC)
        assert kinds(told) == "1tTZ"
        pg.sql("ALTER TABLE turned ALTER a TYPE int", database=DATABASE)
        holder.ask(wire.query("BEGIN"))
        one.ask(wire.query("COMMIT"))
        for _ in range(2):
            messages = two.ask(wire.bind("s"), wire.execute(), wire.SYNC)
            assert kinds(messages) == "EZ" and messages[0].error["C"] == "0A000"
        again = two.ask(wire.close("S", "s"), wire.parse("SELECT a FROM turned", "s"), wire.describe("S", "s"), wire.bind("s"), wire.execute(), wire.SYNC)
        assert kinds(again) == "31tT2DCZ", [m.error for m in again if m.type == "E"]
        assert again[3].body != told[2].body
        holder.ask(wire.query("COMMIT"))


def test_whoever_describes_is_told_the_columns_of_now(small, pg):
    """The same text was described to another client before the table was altered past the proxy."""
    pg.sql("DROP TABLE IF EXISTS turned; CREATE TABLE turned AS SELECT 1 AS a; GRANT ALL ON turned TO PUBLIC", database=DATABASE)
    with raw(small) as one, raw(small) as two:
        first = one.ask(wire.parse("SELECT a FROM turned", "s"), wire.describe("S", "s"), wire.SYNC)
        pg.sql("ALTER TABLE turned ALTER a TYPE text", database=DATABASE)
        at_rest(small)
        one.ask(wire.query("BEGIN"))  # on the server that has it
        second = two.ask(wire.parse("SELECT a FROM turned", "s"), wire.describe("S", "s"), wire.SYNC)
        assert kinds(second) == "1tTZ" and first[2].body != second[2].body
        one.ask(wire.query("COMMIT"))
        for _ in range(4):
            messages = two.ask(wire.bind("s"), wire.describe("P"), wire.execute(), wire.SYNC)
            assert kinds(messages) == "2TDCZ" or messages[0].error["C"] == "0A000"
            messages = one.ask(wire.bind("s"), wire.execute(), wire.SYNC)
            assert kinds(messages) == "EZ" and messages[0].error["C"] == "0A000"


def test_cached_plan_must_not_change_result_type(small, pg):
    pg.sql("DROP TABLE IF EXISTS shape; CREATE TABLE shape (a int); INSERT INTO shape VALUES (1); GRANT ALL ON shape TO app", database=DATABASE)
    with raw(small) as w:
        assert kinds(w.ask(wire.parse("SELECT * FROM shape", "s"), wire.bind("s"), wire.execute(), wire.SYNC)) == "12DCZ"
        pg.sql("ALTER TABLE shape ADD b int", database=DATABASE)
        messages = w.ask(wire.bind("s"), wire.execute(), wire.SYNC)
        # As directly: 0A000; a server that has not prepared it yet gives the new shape.
        assert kinds(messages) in ("EZ", "2DCZ")
        if messages[0].type == "E":
            assert messages[0].error["C"] == "0A000"
        w.ask(wire.close("S", "s"), wire.SYNC)
        assert kinds(w.ask(wire.parse("SELECT * FROM shape", "s"), wire.bind("s"), wire.execute(), wire.SYNC)) == "12DCZ"


def test_a_text_prepared_before_the_commit_of_what_it_names(small):
    """Whoever prepares it afterwards gets what is there now."""
    path = {"options": "-c search_path=shapes,public"}
    with raw(small, **path) as one, raw(small, **path) as two, raw(small, **path) as three:
        one.ask(wire.query("CREATE SCHEMA shapes; CREATE FUNCTION shapes.pick(bigint) RETURNS text LANGUAGE sql AS 'SELECT ''big'''"))
        parse = (wire.parse("SELECT pick(1)", "s"), wire.bind("s"), wire.execute(), wire.SYNC)
        one.ask(wire.query("BEGIN; CREATE FUNCTION shapes.pick(int) RETURNS text LANGUAGE sql AS 'SELECT ''int'''"))
        assert two.ask(*parse)[2].row == [b"big"]
        one.ask(wire.query("COMMIT"))
        one.ask(wire.query("BEGIN; SELECT 1"))  # on its connection, so that the other is the next client's
        assert three.ask(*parse)[2].row == [b"int"]
        one.ask(wire.query("ROLLBACK; DROP SCHEMA shapes CASCADE"))


def test_plans_that_do_not_fit_any_more_are_closed(proxies, pg, seen):
    pg.sql("CREATE OR REPLACE FUNCTION held() RETURNS bigint LANGUAGE sql AS 'SELECT count(*) FROM pg_prepared_statements'", database=DATABASE)
    proxy = proxies({"pool": {"max": 1}})
    with raw(proxy) as w:
        for n in range(5):
            w.ask(PARSE, *RUN, wire.SYNC)
            pg.sql(f"ALTER TABLE seen ADD c{n} int", database=DATABASE)
            assert changed(w.ask(*RUN, wire.SYNC))
            w.ask(wire.close("S", "s"), wire.SYNC)
        w.ask(wire.parse("SELECT 1", "s"), wire.SYNC)
        assert w.value("SELECT held()") == "1"
