"""Two databases alike, for what is played directly and for what is played through the proxy, with roles and functions of every kind."""
import harness

USERS = {harness.USER: harness.PASSWORD, harness.OTHER_USER: harness.OTHER_PASSWORD, "boss": "boss-secret"}
CONFIG = {"databases": {"*": {}}, "users": {name: {"password": password} for name, password in USERS.items()}}

ROLES = """
CREATE ROLE boss SUPERUSER LOGIN PASSWORD 'boss-secret';
CREATE ROLE reader; CREATE ROLE writer; GRANT reader, writer TO app;
ALTER ROLE other SET work_mem = '7MB'; ALTER ROLE other SET app.of_role = 'role'; ALTER ROLE other SET datestyle = 'German';
"""

SETUP = """
GRANT ALL ON SCHEMA public TO public;
SET ROLE app;
CREATE TABLE numbers AS SELECT i AS id, 'row ' || i AS name FROM generate_series(1, 20) AS i;
CREATE TABLE log (who text, what text);
CREATE FUNCTION set_inside(name text, value text) RETURNS text LANGUAGE plpgsql AS
    $$ BEGIN EXECUTE format('SET %s = %L', name, value); RETURN current_setting(name); END $$;
CREATE FUNCTION set_from(value text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RETURN set_config('app.from', value, false); END $$;
CREATE FUNCTION set_prepared(value text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RETURN set_config('app.prepared', value, false); END $$;
CREATE FUNCTION set_deeper(value text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RETURN set_config('app.deep', value, false); END $$;
CREATE FUNCTION set_deep(value text) RETURNS int LANGUAGE plpgsql AS $$ BEGIN PERFORM set_deeper(value); RETURN 1; END $$;
CREATE FUNCTION set_and_fail(value text) RETURNS text LANGUAGE plpgsql AS
    $$ BEGIN PERFORM set_config('app.caught', value, false); RAISE EXCEPTION 'no'; EXCEPTION WHEN raise_exception THEN RETURN 'caught'; END $$;
CREATE FUNCTION with_own_setting() RETURNS text LANGUAGE sql SET work_mem = '77MB' AS $$ SELECT current_setting('work_mem') $$;
CREATE FUNCTION remember(value text) RETURNS boolean LANGUAGE plpgsql AS
    $$ BEGIN PERFORM set_config('app.remembered', value, false); RETURN true; END $$;
CREATE FUNCTION lock_inside(key bigint) RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_advisory_lock(key); END $$;
CREATE FUNCTION temp_inside(value text) RETURNS void LANGUAGE plpgsql AS
    $$ BEGIN EXECUTE 'CREATE TEMP TABLE inside AS SELECT ' || quote_literal(value) || '::text AS v'; END $$;
CREATE FUNCTION cursor_inside(name refcursor) RETURNS refcursor LANGUAGE plpgsql AS
    $$ BEGIN OPEN name FOR SELECT id FROM numbers ORDER BY id; RETURN name; END $$;
CREATE FUNCTION prepare_inside(value text) RETURNS void LANGUAGE plpgsql AS
    $$ BEGIN EXECUTE 'PREPARE inside AS SELECT ' || quote_literal(value) || '::text'; END $$;
CREATE FUNCTION seed_inside() RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM setseed(0.25); END $$;
CREATE FUNCTION seed_first() RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM setseed(0.25); END $$;
CREATE FUNCTION set_first(value text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RETURN set_config('app.first', value, false); END $$;
CREATE FUNCTION last_inside() RETURNS bigint LANGUAGE plpgsql AS $$ BEGIN RETURN lastval(); END $$;
CREATE FUNCTION say(what text) RETURNS void LANGUAGE plpgsql AS
    $$ BEGIN RAISE NOTICE 'notice %', what; RAISE WARNING 'warning %', what USING DETAIL = 'd', HINT = 'h', ERRCODE = '01ABC'; RAISE INFO 'info'; RAISE DEBUG 'debug'; END $$;
CREATE FUNCTION fail(what text) RETURNS void LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'failed %', what USING DETAIL = 'd', HINT = 'h', ERRCODE = 'ABCDE', COLUMN = 'c', CONSTRAINT = 'k', DATATYPE = 'y', TABLE = 't', SCHEMA = 's'; END $$;
CREATE PROCEDURE set_and_commit(value text) LANGUAGE plpgsql AS
    $$ BEGIN PERFORM set_config('app.inside', value, false); COMMIT; PERFORM set_config('app.inside', 'lost', false); ROLLBACK; END $$;
GRANT ALL ON ALL TABLES IN SCHEMA public TO public;
"""


def make_database(server, name):
    server.sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    server.sql(f"CREATE DATABASE {name} OWNER app TEMPLATE equal_template")
    server.sql(f"ALTER DATABASE {name} SET app.of_database = 'database'")


def make(server):
    server.sql(ROLES)
    server.sql("CREATE DATABASE equal_template")
    server.sql(SETUP, database="equal_template")
    for name in ("equal_direct", "equal_pooled"):
        make_database(server, name)
