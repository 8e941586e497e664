"""What a prepared statement looks like: a client relies on what it was told of its own, whatever others were told, and gets 0A000 where a direct
connection would say so (PostgreSQL documentation, PREPARE)."""
import pytest

import wire
from harness import DATABASE, raw
from test_protocol import kinds

TEXT = "SELECT * FROM seen"
PARSE, RUN = wire.parse(TEXT, "s"), (wire.bind("s"), wire.execute())


@pytest.fixture
def seen(pg):
    pg.sql("DROP TABLE IF EXISTS seen; CREATE TABLE seen (a int); INSERT INTO seen VALUES (1); GRANT ALL ON seen TO app", database=DATABASE)


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
