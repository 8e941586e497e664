"""Session state that a text doesn't show, because functions make it that hang on what the text names: triggers, defaults, views, rules, policies,
checks, types. It is the client's own, and nothing is paid where there is none."""
import subprocess

import psycopg
import pytest

import harness
import wire
from harness import DATABASE, raw

TENANT = "SELECT coalesce(current_setting('app.tenant', true), '')"
MEMORY = "SHOW work_mem"


def run(w, sql, extended=False):
    done = w.ask(wire.parse(sql), wire.bind(), wire.execute(), wire.SYNC) if extended else w.ask(wire.query(sql))
    assert not [m for m in done if m.type == "E"], [m.error for m in done if m.type == "E"]


def checks(proxy):
    return sum(pool["residueChecks"] for pool in proxy.stats()["perPool"])


@pytest.fixture(scope="module")
def hanging(_server):
    _server.sql("""
        DROP SCHEMA IF EXISTS hanging CASCADE;
        CREATE SCHEMA hanging;
        ALTER ROLE app SET search_path TO hanging, public;
        SET search_path TO hanging;
        GRANT ALL ON SCHEMA hanging TO app;
        ALTER DEFAULT PRIVILEGES IN SCHEMA hanging GRANT ALL ON TABLES TO app;
        CREATE FUNCTION set_tenant() RETURNS text LANGUAGE plpgsql AS $$BEGIN RETURN set_config('app.tenant', 'own', false); END$$;
        CREATE FUNCTION set_memory(a int) RETURNS bool LANGUAGE plpgsql AS $$BEGIN SET work_mem TO '9MB'; RETURN true; END$$;
        CREATE FUNCTION on_tenant() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM hanging.set_tenant(); RETURN NEW; END$$;
        CREATE FUNCTION on_memory() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN SET work_mem TO '9MB'; RETURN OLD; END$$;
        CREATE FUNCTION on_lock() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_advisory_lock(4); RETURN NEW; END$$;
        CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN NEW.updated_at := now(); RETURN NEW; END$$;

        CREATE TABLE triggered (a int);
        CREATE TRIGGER t AFTER INSERT ON triggered FOR EACH ROW EXECUTE FUNCTION on_tenant();
        CREATE TABLE late (a int);
        CREATE CONSTRAINT TRIGGER t AFTER INSERT ON late DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION on_memory();
        CREATE TABLE locking (a int);
        CREATE TRIGGER t AFTER INSERT ON locking FOR EACH ROW EXECUTE FUNCTION on_lock();
        CREATE TABLE "My Table" (a int);
        CREATE TRIGGER t AFTER INSERT ON "My Table" FOR EACH ROW EXECUTE FUNCTION on_tenant();
        CREATE TABLE "größe" (a int);
        CREATE TRIGGER t AFTER INSERT ON "größe" FOR EACH ROW EXECUTE FUNCTION on_tenant();
        CREATE TABLE defaulted (a int, b text DEFAULT set_tenant());
        CREATE TABLE plainly_defaulted (a int, b text DEFAULT set_config('app.tenant', 'own', false));
        CREATE TABLE checked (a int CHECK (set_memory(a)));
        CREATE TABLE viewed (a int);
        INSERT INTO viewed VALUES (1);
        CREATE VIEW view AS SELECT a, set_tenant() FROM viewed;
        CREATE VIEW view_of_view AS SELECT a FROM view WHERE set_tenant IS NOT NULL;
        CREATE VIEW plain_view AS SELECT set_config('app.tenant', 'own', false);
        CREATE VIEW updatable AS SELECT * FROM triggered;
        CREATE TABLE ruled (a int);
        CREATE RULE r AS ON INSERT TO ruled DO ALSO SELECT set_memory(1);
        CREATE TABLE secured (a int);
        INSERT INTO secured VALUES (1);
        ALTER TABLE secured ENABLE ROW LEVEL SECURITY;
        CREATE POLICY p ON secured USING (set_memory(a));
        CREATE TABLE parent (a int PRIMARY KEY);
        CREATE TABLE child (a int REFERENCES parent ON DELETE CASCADE);
        CREATE TABLE grandchild (a int);
        CREATE FUNCTION on_child() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN INSERT INTO grandchild VALUES (OLD.a); RETURN OLD; END$$;
        CREATE TRIGGER t AFTER DELETE ON child FOR EACH ROW EXECUTE FUNCTION on_child();
        CREATE TRIGGER t AFTER INSERT ON grandchild FOR EACH ROW EXECUTE FUNCTION on_tenant();
        CREATE TABLE parted (a int) PARTITION BY LIST (a);
        CREATE TABLE part PARTITION OF parted FOR VALUES IN (1);
        CREATE TRIGGER t AFTER INSERT ON part FOR EACH ROW EXECUTE FUNCTION on_tenant();
        CREATE FUNCTION inserts() RETURNS void LANGUAGE sql AS $$INSERT INTO hanging.triggered VALUES (1)$$;
        CREATE FUNCTION fullname(viewed) RETURNS text LANGUAGE sql AS $$SELECT set_config('app.tenant', 'own', false)$$;
        CREATE FUNCTION log(viewed, int) RETURNS text LANGUAGE sql AS $$SELECT set_config('app.tenant', 'own', false)$$;
    """, database=DATABASE)
    yield
    _server.sql("DROP SCHEMA hanging CASCADE; ALTER ROLE app RESET search_path", database=DATABASE)


@pytest.mark.parametrize("prepare,leave,look,expected,clean", [
    ("", "INSERT INTO triggered VALUES (1)", TENANT, "own", ""),
    ("", 'INSERT INTO "triggered" VALUES (1)', TENANT, "own", ""),
    ("", "INSERT/**/INTO hanging.TRIGGERED VALUES (1)", TENANT, "own", ""),
    ("", 'INSERT INTO "My Table" VALUES (1)', TENANT, "own", ""),
    ("", "INSERT INTO größe VALUES (1)", TENANT, "own", ""),
    ("", "DO $$BEGIN INSERT INTO triggered VALUES (1); END$$", TENANT, "own", ""),
    ("", "COPY triggered FROM PROGRAM 'echo 1'", TENANT, "own", ""),
    ("", "INSERT INTO late VALUES (1)", MEMORY, "9MB", "4MB"),
    ("", "INSERT INTO defaulted (a) VALUES (1)", TENANT, "own", ""),
    ("", "INSERT INTO plainly_defaulted (a) VALUES (1)", TENANT, "own", ""),
    ("", "INSERT INTO checked VALUES (1)", MEMORY, "9MB", "4MB"),
    ("", "SELECT * FROM view", TENANT, "own", ""),
    ("", "SELECT * FROM view_of_view", TENANT, "own", ""),
    ("", "TABLE plain_view", TENANT, "own", ""),
    ("", "INSERT INTO updatable VALUES (1)", TENANT, "own", ""),
    ("", "INSERT INTO ruled VALUES (1)", MEMORY, "9MB", "4MB"),
    ("", "SELECT * FROM secured", MEMORY, "9MB", "4MB"),
    ("INSERT INTO parent VALUES (1) ON CONFLICT DO NOTHING; INSERT INTO child VALUES (1)", "DELETE FROM parent", TENANT, "own", ""),
    ("", "INSERT INTO parted VALUES (1)", TENANT, "own", ""),
    ("", "SELECT inserts()", TENANT, "own", ""),
    ("", "SELECT viewed.fullname FROM viewed", TENANT, "own", ""),
    ("", "SELECT log(viewed, 1) FROM viewed", TENANT, "own", ""),
])
@pytest.mark.parametrize("extended", [False, True], ids=["simple", "extended"])
def test_it_is_the_clients_own(proxies, pg, hanging, prepare, leave, look, expected, clean, extended):
    if "PROGRAM" in leave:
        pg.sql("GRANT pg_execute_server_program TO app")
    if prepare:
        pg.sql("SET search_path TO hanging; " + prepare, database=DATABASE)
    proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 10000}})
    with raw(proxy) as a, raw(proxy) as b, raw(proxy) as c:
        run(a, leave, extended)
        for _ in range(2):
            assert (b.value(look), c.value(look)) == (clean, clean)
            assert a.value(look) == expected
    with raw(proxy) as after:
        assert after.value(look) == clean


def test_a_lock_taken_in_a_trigger_is_held_by_its_client(proxies, hanging):
    proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 10000}})
    free = "SELECT pg_try_advisory_xact_lock(4)"
    with raw(proxy) as b, raw(proxy) as c:
        with raw(proxy) as a:
            run(a, "INSERT INTO locking VALUES (1)")
            assert [w.value(free) for w in (b, c, b, a)] == ["f", "f", "f", "t"]
            assert proxy.stats()["pinnedCount"] == 1
        harness.poll(lambda: b.value(free) == "t", what="it is free again")


@pytest.mark.parametrize("make,drop,leave,look,expected,clean", [
    ("CREATE DOMAIN positive AS int CHECK (set_memory(VALUE))", "DOMAIN positive", "SELECT 1::positive", MEMORY, "9MB", "4MB"),
    ("CREATE OPERATOR ## (FUNCTION = set_memory, RIGHTARG = int)", "OPERATOR ## (NONE, int)", "SELECT ## 1", MEMORY, "9MB", "4MB"),
    ("CREATE TYPE pair AS (a int, b int); CREATE FUNCTION pair_to_text(pair) RETURNS text LANGUAGE sql AS $$SELECT hanging.set_tenant()$$;"
     " CREATE CAST (pair AS text) WITH FUNCTION pair_to_text(pair)", "TYPE pair CASCADE", "SELECT (1, 2)::pair::text", TENANT, "own", ""),
    ("CREATE FUNCTION on_ddl() RETURNS event_trigger LANGUAGE plpgsql AS $$BEGIN PERFORM hanging.set_tenant(); END$$;"
     " CREATE EVENT TRIGGER t ON ddl_command_end EXECUTE FUNCTION on_ddl()", "FUNCTION on_ddl CASCADE", "COMMENT ON TABLE viewed IS ''", TENANT, "own", ""),
])
def test_what_operators_and_types_run_counts_everywhere(proxies, pg, hanging, make, drop, leave, look, expected, clean):
    pg.sql("SET search_path TO hanging; ALTER TABLE viewed OWNER TO app; " + make, database=DATABASE)
    try:
        proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 10000}})
        with raw(proxy) as a, raw(proxy) as b:
            run(a, leave)
            assert (b.value(look), a.value(look)) == (clean, expected)
    finally:
        pg.sql("SET search_path TO hanging; DROP " + drop, database=DATABASE)


def test_a_function_called_by_its_number_pins_unless_it_is_of_large_objects(proxies, pg):
    oid = {name: pg.sql("SELECT %s::regproc::oid", name)[0][0] for name in ("set_config", "lo_creat")}
    proxy = proxies({"pool": {"max": 2}})
    with raw(proxy) as a, raw(proxy) as b:
        assert [m.type for m in a.ask(wire.function_call(oid["lo_creat"], b"-1"))] == ["V", "Z"]
        assert proxy.stats()["pinnedCount"] == 0
        assert [m.type for m in a.ask(wire.function_call(oid["set_config"], b"work_mem", b"9MB", b"f"))] == ["V", "Z"]
        assert (b.value(MEMORY), a.value(MEMORY)) == ("4MB", "9MB")
        assert proxy.stats()["pinnedCount"] == 1


def test_a_table_is_temporary_because_of_the_search_path(proxies, pg):
    proxy = proxies({"pool": {"max": 2}})
    with raw(proxy) as a, raw(proxy) as b:
        run(a, "SET search_path TO pg_temp")
        assert proxy.stats()["pinnedCount"] == 0
        run(a, "CREATE TABLE unsaid (a int)")
        harness.poll(lambda: proxy.stats()["pinnedCount"] == 1, what="its session has been looked at")
        with pytest.raises(RuntimeError, match="does not exist"):
            b.value("SELECT count(*) FROM unsaid")
        assert a.value("SELECT count(*) FROM unsaid") == "0"


def test_many_clients_see_their_own_alone(proxies, hanging):
    proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 60000}})

    def work(index):
        with raw(proxy) as w:
            for turn in range(20):
                assert w.value(TENANT) == ("own" if turn and index % 2 else "")
                if index % 2:
                    run(w, "INSERT INTO triggered VALUES (1)", turn % 4 == 0)

    harness.threads(8, work)


def test_a_prepared_statement_is_judged_anew_when_a_trigger_comes(proxies, pg, hanging):
    pg.sql("CREATE TABLE hanging.later (a int)", database=DATABASE)
    proxy = proxies({"pool": {"max": 1}})
    with proxy.connect(prepare_threshold=0) as a, raw(proxy) as b:
        a.execute("INSERT INTO later VALUES (1)")
        pg.sql("CREATE TRIGGER t AFTER INSERT ON hanging.later FOR EACH ROW EXECUTE FUNCTION hanging.on_tenant()", database=DATABASE)
        proxy.http("/api/admin/reload", "POST")  # which asks anew
        a.execute("INSERT INTO later VALUES (1)")
        assert b.value(TENANT) == ""
        assert a.execute(TENANT).fetchone() == ("own",)
    pg.sql("DROP TABLE hanging.later", database=DATABASE)


@pytest.mark.parametrize("together", [False, True], ids=["apart", "in a transaction"])
def test_a_trigger_made_through_the_proxy_counts_at_once(proxies, hanging, together):
    proxy = proxies({"pool": {"max": 2}})
    with raw(proxy) as a, raw(proxy) as b, raw(proxy) as c:
        run(a, "CREATE TABLE new (a int)")
        run(b, "INSERT INTO new VALUES (1)")
        if together:
            run(a, "BEGIN")
        run(a, "CREATE FUNCTION on_new() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM set_config('app.new', 'own', false); RETURN NEW; END$$")
        run(a, "CREATE TRIGGER t AFTER INSERT ON new FOR EACH ROW EXECUTE FUNCTION on_new()")
        run(a, "INSERT INTO new VALUES (1)")
        if together:
            run(a, "COMMIT")
        look = "SELECT coalesce(current_setting('app.new', true), '')"
        assert (b.value(look), c.value(look), a.value(look)) == ("", "", "own")
        run(b, "INSERT INTO new VALUES (1)")
        assert (c.value(look), b.value(look)) == ("", "own")
        run(a, "DROP TABLE new; DROP FUNCTION on_new()")


def test_nothing_is_paid_for_what_leaves_nothing(proxies, pg, hanging):
    """Not in a database that has stateful triggers elsewhere, either."""
    pg.sql("""CREATE TABLE hanging.touched (a int, updated_at timestamptz);
              CREATE TRIGGER t BEFORE INSERT OR UPDATE ON hanging.touched FOR EACH ROW EXECUTE FUNCTION hanging.touch()""", database=DATABASE)
    proxy = proxies({"pool": {"max": 2}})
    with raw(proxy) as w:
        for _ in range(3):
            run(w, "INSERT INTO touched VALUES (1)")
            run(w, "UPDATE touched SET a = 2", extended=True)
            run(w, "SELECT * FROM viewed")
        assert checks(proxy) == 0
        run(w, "INSERT INTO triggered VALUES (1)")
        assert checks(proxy) == 1
    pg.sql("DROP TABLE hanging.touched", database=DATABASE)


@pytest.mark.parametrize("mode", ["simple", "extended", "prepared"])
@pytest.mark.parametrize("script", ["tpcb-like", "select-only"])
def test_pgbench_has_no_session_looked_at(proxies, pg, mode, script):
    with pg.admin(DATABASE) as admin:
        if not admin.execute("SELECT to_regclass('pgbench_accounts')").fetchone()[0]:
            subprocess.run([harness.postgres_bin() / "pgbench", "-i", "-q", "-s", "1", "-h", pg.directory, "-p", str(pg.port), "-U", "postgres", DATABASE],
                           check=True, capture_output=True)
            admin.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO app")
    proxy = proxies({"pool": {"max": 3, "connectionTimeoutMillis": 30000}})
    done = subprocess.run([harness.postgres_bin() / "pgbench", "-n", "-M", mode, "-b", script, "-c", "6", "-t", "20"],
                          env=proxy.environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert checks(proxy) == 0


def test_never_asks_nothing(proxies, pg, hanging):
    proxy = proxies({"pool": {"max": 1, "residueCheck": "never"}})
    with raw(proxy) as w:
        run(w, "SELECT 1")
        last = pg.sql("SELECT query FROM pg_stat_activity WHERE usename = 'app' AND client_port > 0")[0][0]
        assert last == "SELECT 1"
        run(w, "INSERT INTO triggered VALUES (1)")
    assert checks(proxy) == 0


def test_what_cannot_be_asked_has_every_session_looked_at(proxies, pg, hanging):
    """Logins go on, and nothing leaks."""
    pg.sql("REVOKE SELECT ON pg_catalog.pg_trigger FROM PUBLIC", database=DATABASE)
    try:
        proxy = proxies({"pool": {"max": 1}})
        with raw(proxy) as a, raw(proxy) as b:
            run(a, "INSERT INTO checked VALUES (1)")
            assert (b.value(MEMORY), a.value(MEMORY)) == ("4MB", "9MB")
            assert checks(proxy) == 3
        assert proxy.log_text().count("every transaction is looked at") == 1
    finally:
        pg.sql("GRANT SELECT ON pg_catalog.pg_trigger TO PUBLIC", database=DATABASE)


def test_an_idle_proxy_asks_nothing(proxies, pg, hanging):
    """What is asked is asked on connections that clients use."""
    proxy = proxies({"pool": {"max": 2}})
    with raw(proxy) as w:
        run(w, "SELECT 1")
        harness.poll(lambda: proxy.stats()["idleCount"] == proxy.stats()["totalCount"], what="all are idle")
        when = "SELECT max(query_start) FROM pg_stat_activity WHERE usename = 'app' AND client_port > 0"
        before = pg.sql(when)
        with pytest.raises(psycopg.errors.QueryCanceled):
            with pg.admin() as admin:
                admin.execute("SET statement_timeout TO 1500; SELECT pg_sleep(10)")
        assert pg.sql(when) == before


@pytest.mark.parametrize("paused", [True, False], ids=["paused", "lost"])
def test_another_database_under_the_same_name(paused):
    """Restored, or switched to: its functions do what they do, and what was prepared for the types of the old one is told to be outdated."""
    common = "CREATE TYPE mood AS ENUM ('a', 'b'); CREATE TABLE moods (x mood, n int); INSERT INTO moods VALUES ('a', 1); GRANT ALL ON moods TO app;"
    with harness.Postgres() as pg:
        pg.sql(common + "CREATE FUNCTION f() RETURNS text LANGUAGE sql AS $$SELECT 'nothing'$$", database=DATABASE)
        pg.sql("CREATE DATABASE restored OWNER app")
        pg.sql("CREATE TYPE earlier AS ENUM ('a');" + common +
               "CREATE FUNCTION f() RETURNS text LANGUAGE sql AS $$SELECT set_config('app.tenant', 'own', false)$$", database="restored")
        proxy = harness.Proxy(pg, {"pool": {"max": 3}})
        try:
            with raw(proxy) as a, raw(proxy) as b:
                prepare = (wire.parse("SELECT n FROM moods WHERE x = $1", "s"), wire.describe("S", "s"), wire.SYNC)
                use = (wire.bind("s", ["a"]), wire.execute(), wire.SYNC)
                a.ask(*prepare)
                assert [m.row for m in a.ask(*use) if m.type == "D"] == [[b"1"]]
                assert a.value("SELECT f()") == "nothing"
                if paused:
                    assert proxy.http("/api/admin/pause", method="POST")[0] == 200
                pg.sql(f"ALTER DATABASE {DATABASE} ALLOW_CONNECTIONS false")
                pg.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{DATABASE}'")
                harness.poll(lambda: pg.count(f"datname = '{DATABASE}'") == 0, what="nobody is connected")
                pg.sql(f"ALTER DATABASE {DATABASE} RENAME TO old")
                pg.sql(f"ALTER DATABASE restored RENAME TO {DATABASE}")
                if paused:
                    assert proxy.http("/api/admin/resume", method="POST")[0] == 200
                assert a.value("SELECT f()") == "own"
                assert b.value(TENANT) == ""
                assert a.value(TENANT) == "own"
                assert [m.error["C"] for m in a.ask(*use) if m.type == "E"] == ["0A000"]
                a.ask(wire.close("S", "s"), *prepare)
                assert [m.row for m in a.ask(*use) if m.type == "D"] == [[b"1"]]
        finally:
            proxy.close()
