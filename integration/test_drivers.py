"""Drivers and programs with their default settings, 50 clients on few server connections."""
import os
import pathlib
import re
import subprocess

import psycopg
import psycopg2
import pytest

import harness
from harness import DATABASE, PASSWORD, ROOT, USER

HERE = pathlib.Path(__file__).parent


@pytest.fixture
def pooled(proxies):
    return proxies({"pool": {"max": 15, "connectionTimeoutMillis": 30000}})


def run(command, **environment):
    done = subprocess.run([str(part) for part in command], env={**os.environ, **environment}, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_psycopg2(pooled):
    def work(index):
        connection = psycopg2.connect(pooled.conninfo())
        with connection, connection.cursor() as cursor:
            for n in range(20):
                cursor.execute("SELECT %s + %s", (n, index))
                assert cursor.fetchone() == (n + index,)
            with pytest.raises(psycopg2.errors.DivisionByZero):
                cursor.execute("SELECT 1/0")
            connection.rollback()
            cursor.execute("CREATE TEMP TABLE t (a int) ON COMMIT DROP")
            cursor.executemany("INSERT INTO t VALUES (%s)", [(n,) for n in range(20)])
            cursor.execute("SELECT sum(a) FROM t")
            assert cursor.fetchone() == (190,)
        connection.set_session(isolation_level="SERIALIZABLE", readonly=True)
        with connection, connection.cursor() as cursor:
            cursor.execute("SHOW transaction_isolation")
            assert cursor.fetchone() == ("serializable",)
        connection.close()
    harness.threads(20, work)


def test_psycopg(pooled):
    """Prepares by itself at the fifth execution."""
    def work(index):
        with psycopg.connect(pooled.conninfo()) as connection:
            for n in range(20):
                assert connection.execute("SELECT %s::int + %s::int", (n, index)).fetchone() == (n + index,)
                connection.commit()
            with pytest.raises(psycopg.errors.DivisionByZero):
                connection.execute("SELECT 1/0")
            connection.rollback()
            with connection.pipeline():
                cursors = [connection.execute("SELECT %s::int", (n,)) for n in range(20)]
            assert [cursor.fetchone()[0] for cursor in cursors] == list(range(20))
            with connection.cursor(name="server_side") as cursor:
                cursor.execute("SELECT generate_series(1, 500)")
                assert sum(row[0] for row in cursor) == 125250
    harness.threads(20, work)


def test_asyncpg(pooled):
    url = pooled.url().replace("?sslmode=disable", "")
    assert run(["/usr/bin/python3", HERE / "drivers/asyncpg_defaults.py"], DATABASE_URL=url) == "ok\n"


def test_node_postgres(pooled):
    url = pooled.url().replace("?sslmode=disable", "")
    node_path = os.environ.get("NODE_PATH") or str(ROOT / "build/node/usr/share/nodejs")
    assert run(["node", HERE / "drivers/defaults.js"], DATABASE_URL=url, NODE_PATH=node_path) == "ok\n"


def test_jdbc(pooled, tmp_path):
    url = f"jdbc:postgresql://127.0.0.1:{pooled.port}/{DATABASE}?user={USER}&password={harness.percent(PASSWORD)}"
    output = run(["java", "-cp", "/usr/share/java/postgresql.jar", HERE / "drivers/Defaults.java"], JDBC_URL=url)
    assert output == "ok\n"


@pytest.fixture(scope="module")
def accounts(_server):
    environment = {**os.environ, "PGPASSWORD": PASSWORD, "PGSSLMODE": "require"}
    subprocess.run(["pgbench", "-i", "-q", "-s", "5", "-h", "127.0.0.1", "-p", str(_server.port), "-U", USER, DATABASE], env=environment, check=True, capture_output=True)


@pytest.mark.parametrize("mode", ["simple", pytest.param("extended"), "prepared"])
@pytest.mark.parametrize("arguments", [["-S", "-c", "1"], ["-S", "-c", "50"], ["-c", "50"], ["-S", "-C", "-c", "20"]], ids=["1", "50", "tpc-b", "reconnect"])
@pytest.mark.generic
def test_pgbench(proxies, pg, accounts, mode, arguments):
    if harness.KIND == "pgbouncer" and mode == "prepared":
        pytest.skip("PgBouncer 1.18 has no prepared statements in transaction mode")
    proxy = proxies({"pool": {"max": 15, "connectionTimeoutMillis": 30000}})
    with harness.Watch(pg, "usename = 'app'") as watch:
        # One thread: it prepares blockingly, so that its clients that hold transactions stand still behind one that waits for a server.
        done = subprocess.run(["pgbench", "-n", "-M", mode, "-T", "2", *arguments], env=proxy.environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search("aborted|ERROR", done.stderr), done.stderr
    assert re.search(r"number of failed transactions: 0 ", done.stdout), done.stdout
    assert int(re.search(r"transactions actually processed: (\d+)", done.stdout)[1]) > 10
    assert 1 <= watch.most <= 15 and (proxy.kind == "pgbouncer" or watch.without_tls == 0)


@pytest.mark.generic
def test_pgbench_with_500_clients(proxies, pg, accounts):
    proxy = proxies({"pool": {"max": 15, "connectionTimeoutMillis": 60000}})
    with harness.Watch(pg, "usename = 'app'") as watch:
        done = subprocess.run(["pgbench", "-n", "-S", "-c", "500", "-j", "2", "-T", "3"], env=proxy.environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and not re.search("aborted|ERROR", done.stderr), done.stdout + done.stderr
    assert watch.most <= 15


def test_pg_dump_and_restore_in_session_mode(proxies, pg, accounts, tmp_path):
    pg.sql("DROP DATABASE IF EXISTS restored")
    pg.sql(f"CREATE DATABASE restored OWNER {USER}")
    proxy = proxies({"pool": {"mode": "session", "max": 4}, "databases": {"*": {}}})
    run(["pg_dump", "-Fc", "-t", "pgbench_*", "-f", tmp_path / "dump", DATABASE], **proxy.environment())
    run(["pg_restore", "-j", "3", "--exit-on-error", "-d", "restored", tmp_path / "dump"], **proxy.environment())
    with proxy.connect(database="restored") as connection:
        assert connection.execute("SELECT count(*) FROM pgbench_accounts").fetchone() == (500000,)
    harness.poll(lambda: pg.count("datname = 'restored'") >= 0, what="counted")
