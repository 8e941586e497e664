"""Settings that pg_settings doesn't show, or not to everybody; what a client brought at its login after a RESET; texts that aren't ASCII."""
import contextlib

import psycopg
import pytest

import wire
from harness import DATABASE, PASSWORD, USER, raw
from wire import kinds

ROLE = "settings_role"
TWO = {"pool": {"max": 2}}


@pytest.fixture(autouse=True)
def roles(pg):
    """What is set for the user is gone with the test."""
    pg.sql(f"DO $$BEGIN CREATE ROLE {ROLE}; GRANT {ROLE} TO {USER}; EXCEPTION WHEN duplicate_object THEN NULL; END$$")
    yield
    pg.sql(f"ALTER ROLE {USER} RESET ALL")
    pg.sql(f"ALTER ROLE {USER} IN DATABASE {DATABASE} RESET ALL")


@contextlib.contextmanager
def superuser(pg):
    pg.sql("CREATE ROLE settings_super SUPERUSER LOGIN PASSWORD 'spw'")
    try:
        yield "settings_super", "spw"
    finally:
        pg.sql("DROP ROLE settings_super")


@pytest.mark.parametrize("options, says", [("-c foo", "-c foo requires a value"), ("--foo", "--foo requires a value"),
                                           ("-z", "invalid command-line argument for server process: -z"),
                                           ("foo", "invalid command-line argument for server process: foo")])
def test_wrong_options_are_told_as_the_server_does(proxies, pg, options, says):
    with pytest.raises(psycopg.OperationalError, match=f"FATAL:  {says}"):
        pg.connect(options=options)
    with wire.Wire(proxies().port) as w:
        error = w.login(USER, PASSWORD, DATABASE, options=options).error
    assert (error["S"], error["C"], error["M"]) == ("FATAL", "42601", says)


def everywhere(w, holder, sql):
    """What the client gets on both server connections, by turns."""
    values = []
    for turn in range(6):
        holder.ask(wire.query(("BEGIN; SELECT 1", "ROLLBACK")[turn % 2]))
        values.append(w.value(sql))
    return values


def frames(how, sql):
    return (wire.query(sql),) if how == "simple" else (wire.parse(sql), wire.bind(), wire.execute(), wire.SYNC)


# ---- set to what it would be without a login's or a role's

@pytest.mark.parametrize("brought, statement, show, value", [
    ({"options": "-c app.brought=1"}, "SET app.brought = ''", "SHOW app.brought", ""),
    ({"app.brought": "1"}, "SELECT set_config('app.brought', '', false)", "SHOW app.brought", ""),
    ({"app.brought": "1"}, "DO $$BEGIN EXECUTE 'RESET app.brought'; END$$", "SHOW app.brought", "1"),
    ({"app.brought": "1"}, "SELECT settings_reset()", "SHOW app.brought", "1"),
    ({"role": ROLE}, "SET ROLE NONE", "SELECT current_user", USER),
    ({"role": ROLE}, "DO $$BEGIN EXECUTE 'SET ROLE NONE'; END$$", "SELECT current_user", USER)])
def test_nothing_instead_of_what_came_with_the_login(proxies, pg, brought, statement, show, value):
    pg.sql("CREATE OR REPLACE FUNCTION settings_reset() RETURNS void LANGUAGE plpgsql AS $$BEGIN RESET app.brought; END$$", database=DATABASE)
    proxy = proxies(TWO)
    with raw(proxy, **brought) as w, raw(proxy) as other, raw(proxy, **brought) as same:
        as_brought = same.value(show)
        w.ask(wire.query(statement))
        assert everywhere(w, other, show) == [value] * 6
        assert everywhere(same, other, show) == [as_brought] * 6


@pytest.mark.parametrize("default, statement, show, values", [
    ("app.usual = 'usual'", "SET app.usual = ''", "SHOW app.usual", ("", "usual")),
    (f"role = '{ROLE}'", "SET ROLE NONE", "SELECT current_user", (USER, ROLE))])
def test_nothing_instead_of_the_roles_default(proxies, pg, default, statement, show, values):
    pg.sql(f"ALTER ROLE {USER} SET {default}")
    proxy = proxies(TWO)
    with raw(proxy) as w, raw(proxy) as other:
        assert other.value(show) == values[1]
        w.ask(wire.query(statement))
        assert everywhere(w, other, show) == [values[0]] * 6
        assert everywhere(other, w, show) == [values[1]] * 6
    with raw(proxy) as later, raw(proxy) as holder:
        assert everywhere(later, holder, show) == [values[1]] * 6


# ---- RESET

@pytest.mark.parametrize("how", ["simple", "extended"])
@pytest.mark.parametrize("reset", ["RESET app.usual", "RESET ALL", "DISCARD ALL", "SET app.usual TO DEFAULT", "SET SESSION app . usual = DEFAULT;"])
def test_what_came_with_the_login_outlives_the_roles_default(proxies, pg, how, reset):
    pg.sql(f"ALTER ROLE {USER} IN DATABASE {DATABASE} SET app.usual = 'usual'")
    proxy = proxies(TWO)
    with raw(proxy, options="-c app.usual=mine") as w, raw(proxy) as other:
        for before in ("SELECT 1", "SET app.usual = 'set'"):
            w.ask(wire.query(before))
            assert "E" not in kinds(w.ask(*frames(how, reset)))
            assert everywhere(w, other, "SHOW app.usual") == ["mine"] * 6
        assert other.value("SHOW app.usual") == "usual"


@pytest.mark.parametrize("how", ["simple", "extended"])
@pytest.mark.parametrize("reset", ["RESET search_path", "RESET TimeZone", "RESET ALL", "SET search_path TO DEFAULT", "SET TIME ZONE LOCAL"])
def test_reset_takes_no_snapshot(proxies, pg, how, reset):
    pg.sql("CREATE TABLE IF NOT EXISTS settings_seen (a int); TRUNCATE settings_seen; GRANT ALL ON settings_seen TO app", database=DATABASE)
    proxy = proxies(TWO)
    with raw(proxy, search_path='public , "Two, ""x", $user', TimeZone="Asia/Tokyo") as w:
        w.ask(wire.query("BEGIN"))
        w.ask(*frames(how, reset))
        assert kinds(w.ask(*frames(how, "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")))[-2:] == "CZ"
        assert w.value("SELECT array_to_string(current_schemas(false), ',')") == "public"
        w.ask(wire.query("COMMIT"))
        w.ask(wire.query("BEGIN ISOLATION LEVEL REPEATABLE READ"))
        w.ask(*frames(how, reset))
        pg.sql("INSERT INTO settings_seen VALUES (1)", database=DATABASE)
        assert w.value("SELECT count(*) FROM settings_seen") == "1"
        assert w.value("SHOW TimeZone") == "Asia/Tokyo"
        w.ask(wire.query("COMMIT"))
        w.ask(wire.query("BEGIN; RESET ALL"))
        assert kinds(w.ask(wire.query("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"))) == "CZ"


def test_reset_in_a_transaction_that_is_rolled_back(proxies):
    proxy = proxies(TWO)
    with raw(proxy, options="-c search_path=brought -c app.brought=1") as w, raw(proxy) as other:
        for how in ("simple", "extended"):
            w.ask(wire.query("SET search_path = mine"))
            w.ask(wire.query("BEGIN"))
            w.ask(*frames(how, "RESET search_path"))
            assert w.value("SHOW search_path") == "brought"
            w.ask(wire.query("ROLLBACK"))
            assert everywhere(w, other, "SHOW search_path") == ["mine"] * 6
            w.ask(wire.query("BEGIN"))
            w.ask(*frames(how, "SET LOCAL search_path TO DEFAULT"))
            assert w.value("SHOW search_path") == "brought"
            w.ask(wire.query("COMMIT"))
            assert everywhere(w, other, "SHOW search_path") == ["mine"] * 6


def test_a_reset_that_is_not_executed(proxies):
    """Parsed, described and bound, or skipped behind an error."""
    proxy = proxies(TWO)
    with raw(proxy, search_path="brought") as w, raw(proxy) as other:
        w.ask(wire.query("SET search_path = mine"))
        reset = (wire.parse("RESET search_path", "r"), wire.describe("S", "r"))
        w.ask(*reset, wire.SYNC)
        assert w.value("SHOW search_path") == "mine"
        assert kinds(w.ask(wire.parse("SELECT 1/0"), wire.bind(), wire.execute(), wire.bind("r"), wire.execute(), wire.SYNC))[-2:] == "EZ"
        assert everywhere(w, other, "SHOW search_path") == ["mine"] * 6
        assert w.ask(wire.bind("r"), wire.execute(), wire.parse("SHOW search_path"), wire.bind(), wire.execute(), wire.SYNC)[4].row == [b"brought"]
        assert everywhere(w, other, "SHOW search_path") == ["brought"] * 6


def test_what_cannot_come_back_is_told_in_a_transaction(proxies, pg):
    with superuser(pg) as (user, password):
        proxy = proxies({**TWO, "users": {user: {"password": password}}})
        with raw(proxy, user, password, options="-c log_min_duration_statement=0 -c app.brought=1") as w:
            for how in ("simple", "extended"):
                w.ask(wire.query(f"BEGIN; SET LOCAL ROLE {ROLE}"))
                messages = w.ask(*frames(how, "RESET ALL"))
                assert [m.error["C"] for m in messages if m.type == "E"] == ["42501"] and messages[-1].body == b"E"
                w.ask(wire.query("ROLLBACK"))
                assert w.value("SHOW app.brought") == "1" and w.value("SHOW log_min_duration_statement") == "0"
            w.ask(wire.query(f"SET ROLE {ROLE}"))
            w.ask(wire.query("RESET ALL"))
            assert w.value("SHOW app.brought") == "1" and w.value("SELECT current_user") == ROLE
            w.ask(wire.query("RESET ROLE"))
            assert w.value("SHOW log_min_duration_statement") == "0"


# ---- what isn't ASCII

@pytest.mark.parametrize("encoding, text", [("LATIN1", b"\xc3\xa9"), ("LATIN1", b"caf\xe9 \\'x"), ("SJIS", b"\x83\x5cn"), ("SJIS", b"\x83\x5c"), ("UTF8", "é\\n".encode())])
def test_a_text_is_the_same_on_every_server_connection(proxies, encoding, text):
    proxy = proxies(TWO)
    show = "SELECT encode(convert_to(current_setting('app.text'), 'UTF8'), 'hex')"
    expected = text.decode(encoding).encode().hex()
    with raw(proxy, client_encoding=encoding) as w, raw(proxy) as other:
        other.ask(wire.query("SET application_name = 'x'"))
        w.ask(wire.parse("SELECT set_config('app.text', $1, false)"), wire.bind("", (text,)), wire.execute(), wire.SYNC)
        assert everywhere(w, other, show) == [expected] * 6
        other.ask(wire.query("SET app.text = 'other'"))
        assert everywhere(w, other, show) == [expected] * 6


def test_a_text_that_came_with_the_login(proxies):
    proxy = proxies(TWO)
    length = "SELECT length(current_setting('app.text'))"
    with raw(proxy, client_encoding="LATIN1", **{"app.text": "é"}) as w, raw(proxy) as other:
        assert everywhere(w, other, length) == ["1"] * 6
        for how in ("simple", "extended"):
            w.ask(*frames(how, "RESET app.text"))
            assert everywhere(w, other, length) == ["1"] * 6


# ---- what only superusers may see

@pytest.mark.parametrize("becomes", [f"SET ROLE {ROLE}", f"SET SESSION AUTHORIZATION {USER}"])
def test_what_a_superuser_has_set_before_it_became_another(proxies, pg, becomes):
    with superuser(pg) as (user, password):
        proxy = proxies({"pool": {"max": 1}, "users": {user: {"password": password}}})
        with raw(proxy, user, password) as w, raw(proxy, user, password) as other:
            usual = other.value("SHOW dynamic_library_path")
            w.ask(wire.query(f"BEGIN; SET dynamic_library_path = '/of/one'; {becomes}; COMMIT"))
            assert other.value("SHOW dynamic_library_path") == usual
            assert w.value("SELECT current_user") == becomes.split()[-1]
            assert other.value("SHOW dynamic_library_path") == usual
            if "ROLE" in becomes:
                w.ask(wire.query("RESET ROLE"))
                assert w.value("SHOW dynamic_library_path") == "/of/one"


@pytest.mark.parametrize("sets", ["SET LOCAL timezone = 'America/New_York'", "SET timezone = 'America/New_York'", "SELECT set_config('timezone', 'America/New_York', true)"])
@pytest.mark.parametrize("name", ["s", ""])
def test_constants_are_read_as_when_they_were_prepared(proxies, sets, name):
    """Also on a server connection that hasn't the statement, in a transaction with settings of its own; and nobody else's are read so."""
    proxy = proxies(TWO)
    parse = wire.parse("SELECT extract(epoch FROM TIMESTAMPTZ '2024-01-01 00:00:00')::bigint", name)
    run = (wire.bind(name), wire.execute(), wire.SYNC)
    with raw(proxy, TimeZone="UTC") as w, raw(proxy) as holder, raw(proxy, TimeZone="UTC") as other:
        w.ask(parse, wire.SYNC)
        holder.ask(wire.query("BEGIN"))  # on the server connection that has it
        for n, sql in enumerate(("BEGIN", sets)):
            w.ask(wire.parse(sql, f"before{n}"), wire.bind(f"before{n}"), wire.execute(), wire.SYNC)
        assert [m.row for m in w.ask(*run) if m.type == "D"] == [[b"1704067200"]]
        assert w.value("SELECT current_setting('timezone')") == "America/New_York"
        w.ask(wire.query("COMMIT"))
        assert [m.row for m in other.ask(parse, *run) if m.type == "D"] == [[b"1704067200"]]
        holder.ask(wire.query("COMMIT"))
