"""In transaction mode a client sees what it would see on its own connection: six clients on three server connections, compared with direct ones.

The notation of the cases is equality.py's."""
import os

import pytest

import equality
import harness

USERS = {harness.USER: harness.PASSWORD, harness.OTHER_USER: harness.OTHER_PASSWORD, "boss": "boss-secret"}

SETUP = """
GRANT ALL ON SCHEMA public TO public;
SET ROLE app;
CREATE TABLE numbers AS SELECT i AS id, 'row ' || i AS name FROM generate_series(1, 20) AS i;
CREATE FUNCTION set_inside(name text, value text) RETURNS text LANGUAGE plpgsql AS
    $$ BEGIN EXECUTE format('SET %s = %L', name, value); RETURN current_setting(name); END $$;
CREATE PROCEDURE set_and_commit(value text) LANGUAGE plpgsql AS
    $$ BEGIN PERFORM set_config('app.inside', value, false); COMMIT; PERFORM set_config('app.lost', value, false); ROLLBACK; END $$;
GRANT ALL ON numbers TO public;
"""

CASES = {
    # ---- 1: settings
    "SET and SHOW": ["SET work_mem = '{n}MB'", "SHOW work_mem", "SELECT current_setting('work_mem')", "RESET work_mem", "SHOW work_mem"],
    "SET LOCAL": ["SET work_mem = '{n}MB'", "BEGIN", "SET LOCAL work_mem = '{n}1MB'", "SHOW work_mem", "COMMIT", "SHOW work_mem"],

    # ---- 2: the protocol's prepared statements
    "same name, other text": ["/parse s SELECT '{me}', $1::int /sync", "/bind s {n} /describe P - /execute - /sync", "/describe S s /sync", "/close S s /sync",
                              "/bind s {n} /execute - /sync"],
}

KNOWN_GAPS = {}


@pytest.fixture(scope="module")
def server():
    with harness.Postgres(plain=True) as server:
        server.sql(f"CREATE ROLE boss SUPERUSER LOGIN PASSWORD '{USERS['boss']}'")
        server.sql("CREATE DATABASE equal_direct")
        server.sql(SETUP, database="equal_direct")
        server.sql("CREATE DATABASE equal_pooled TEMPLATE equal_direct")
        yield server


@pytest.fixture(scope="module")
def pooler(server):
    users = {name: {"password": password} for name, password in USERS.items() if name != harness.USER}
    proxy = harness.make_proxy(server, {"pool": {"max": 3, "connectionTimeoutMillis": 30000}, "databases": {"*": {}}, "users": {harness.USER: {}, **users}})
    yield proxy
    proxy.close()


@pytest.mark.generic
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.xfail(reason=KNOWN_GAPS[n], strict=True)] if n in KNOWN_GAPS else []) for n in CASES])
def test_as_direct(server, pooler, name):
    lines, seed = CASES[name], f"{os.environ.get('EQUALITY_SEED', 1)} {name}"
    direct = equality.play(lines, server.port, "equal_direct", USERS, seed)
    pooled = equality.play(lines, pooler.port, "equal_pooled", USERS, seed)
    found = equality.differences(lines, direct, pooled)
    assert not found, "\n" + found


def test_every_gap_has_a_case():
    assert KNOWN_GAPS.keys() <= CASES.keys()
