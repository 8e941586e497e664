"""The SQL console, as PgBouncer's operators, their exporters and drivers use it."""
import asyncio
import os
import re
import socket
import subprocess
import threading
import time

import asyncpg
import psycopg
import psycopg2
import pytest

import harness
import wire
from harness import PASSWORD, USER, poll

SHOWS = ("ACTIVE_SOCKETS CLIENTS CONFIG DATABASES DNS_HOSTS DNS_ZONES FDS LEAKS LISTS MEM PEER_POOLS PEERS PINS POOLS PREPARED_STATEMENTS "
         "SERVERS SOCKETS STATE STATS STATS_AVERAGES STATS_TOTALS TOTALS USERS VERSION").split()
ADMIN = {"admin": {"users": [harness.USER], "statsUsers": [harness.OTHER_USER]},
         "users": {harness.USER: {"password": harness.PASSWORD}, harness.OTHER_USER: {"password": harness.OTHER_PASSWORD}}}


def settings(**more):
    return harness.merge(ADMIN, more)


def console(proxy, user=harness.USER, password=harness.PASSWORD, database="pgbouncer", **keys):
    return proxy.connect(user=user, password=password, database=database, **keys)


def rows(connection, sql, **keys):
    cursor = connection.execute(sql, **keys)
    names = [column.name for column in cursor.description]
    return [dict(zip(names, row)) for row in cursor.fetchall()]


def only(connection, sql, **where):
    [row] = [row for row in rows(connection, sql) if all(row[key] == value for key, value in where.items())]
    return row


def state_of(error):
    return error.value.diag.sqlstate


def background(connection, sql):
    """The thread that runs it; after join(), `.error` has what it failed with and `.seconds` how long it took."""
    def work():
        began = time.monotonic()
        try:
            connection.execute(sql)
        except psycopg.Error as error:
            thread.error = error
        thread.seconds = time.monotonic() - began
    thread = threading.Thread(target=work, daemon=True)
    thread.error, thread.seconds = None, None
    thread.start()
    return thread


@pytest.fixture
def proxy(proxies):
    return proxies(settings(pool={"max": 3}))


# --- who may come in, and how

def psql(proxy, *arguments, user=harness.USER, database="pgbouncer", host="127.0.0.1", **environment):
    return subprocess.run(["psql", "-X", "-w", "-h", str(host), "-p", str(proxy.port), "-U", user, "-d", database, *arguments],
                          env={**proxy.environment(), "PGPASSWORD": harness.PASSWORD, **environment}, capture_output=True, text=True, timeout=30)


def test_psql(proxy):
    answer = psql(proxy, "-c", "SHOW POOLS")
    assert answer.returncode == 0 and "cl_active" in answer.stdout and "(1 row)" in answer.stdout, answer
    answer = psql(proxy, "-At", "-c", "SHOW VERSION", database="pgsidecar")
    assert re.fullmatch(r"PgBouncer 1\.\d+\.\d+ \(the console of pgsidecar \S+\)\n", answer.stdout), answer
    answer = psql(proxy, "-c", "SHOW HELP")
    assert answer.returncode == 0 and "KILL_CLIENT" in answer.stderr and "WAIT_FOR_CLIENTS" in answer.stderr, answer
    answer = psql(proxy, "-c", "SHOW POLS")
    assert answer.returncode == 1 and 'did you mean "pools"?' in answer.stderr, answer
    answer = psql(proxy, "-c", "SELECT 1")
    assert answer.returncode == 1 and "invalid command 'SELECT 1', use SHOW HELP;" in answer.stderr, answer
    # Several in one, from standard input, with comments.
    answer = subprocess.run(["psql", "-X", "-At", "-w", "-h", "127.0.0.1", "-p", str(proxy.port), "-U", harness.USER, "pgbouncer"], text=True, timeout=30,
                            env={**proxy.environment(), "PGPASSWORD": harness.PASSWORD}, input="-- who\nSHOW STATE; /* and */ SHOW STATE;\n", capture_output=True)
    assert answer.stdout.count("active|yes") == 2, answer


def test_every_table_in_both_protocols(proxy):
    with proxy.connect(application_name="one") as client, console(proxy) as admin:
        client.execute("SELECT 1")
        for name in SHOWS:
            simple, extended = admin.execute(f"SHOW {name}"), admin.execute(f"SHOW {name}", binary=True)
            assert [c.name for c in simple.description] == [c.name for c in extended.description], name
            assert [c.type_code for c in simple.description] == [c.type_code for c in extended.description], name
            one, two = simple.fetchall(), extended.fetchall()
            assert len(one) == len(two), name
            if name in ("CONFIG", "DATABASES", "USERS", "VERSION", "STATE"):  # nothing there counts
                assert one == two, name


def test_who_may_do_what(proxy):
    with console(proxy, harness.OTHER_USER, harness.OTHER_PASSWORD) as watcher:
        assert rows(watcher, "SHOW LISTS")
        for sql in ("PAUSE", "RELOAD", "KILL", "SHUTDOWN", "SET pool.max=1", "SHOW FDS", "KILL_CLIENT 1", "DISABLE app"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege) as error:
                watcher.execute(sql)
            assert "admin.users" in error.value.diag.message_hint
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        console(proxy, password="wrong")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        console(proxy, user="nobody", password="x")


def test_without_admin_users_nobody_comes_in(proxies):
    proxy = proxies()
    with pytest.raises(psycopg.OperationalError, match='user "app" is not allowed to use the console'):
        console(proxy)


def test_the_own_user_comes_in_by_the_unix_socket(proxies, tmp_path):
    proxy = proxies(settings(admin={"users": []}, tls={"mode": "disable"}))
    config = proxy.config
    proxy.write_config(harness.merge(config, {"listen": [f"127.0.0.1:{proxy.port}", f"unix:{tmp_path}:{proxy.port}"]}))
    proxy.stop()
    proxy.start()
    answer = psql(proxy, "-At", "-c", "SHOW STATE", "-c", "RELOAD", host=tmp_path, user="whoever", PGPASSWORD="")
    assert answer.returncode == 0 and "active|yes" in answer.stdout, answer
    # A database of the application isn't open to it without its password.
    answer = psql(proxy, "-c", "SELECT 1", host=tmp_path, database=harness.DATABASE, PGPASSWORD="")
    assert answer.returncode == 2 and "no password supplied" in answer.stderr, answer
    if os.geteuid() == 0:
        other = harness.unprivileged()
        os.chmod(tmp_path, 0o755)
        for parent in tmp_path.parents:
            if str(parent) not in ("/", "/tmp"):
                os.chmod(parent, 0o755)
        os.chmod(tmp_path / f".s.PGSQL.{proxy.port}", 0o777)
        answer = subprocess.run(["psql", "-X", "-w", "-h", str(tmp_path), "-p", str(proxy.port), "-U", "whoever", "-c", "SHOW STATE", "pgbouncer"],
                                env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=30, cwd="/", **other)
        assert answer.returncode == 2 and ("no password supplied" in answer.stderr or "not allowed" in answer.stderr), answer


def test_what_drivers_say_of_their_own_accord(proxy):
    # lib/pq and pgx send these at startup; exporters ping with an empty query.
    connection = wire.Wire(proxy.port)
    connection.login(harness.USER, harness.PASSWORD, "pgbouncer", extra_float_digits="2", DateStyle="ISO, MDY", client_encoding="UTF8", application_name="x")
    assert [m.type for m in connection.ask(wire.query(";"))] == ["I", "Z"]
    connection.sock.close()
    with psycopg2.connect(proxy.conninfo(database="pgbouncer")) as old:  # BEGIN of its own
        with old.cursor() as cursor:
            cursor.execute("SHOW VERSION")
            assert cursor.fetchone()[0].startswith("PgBouncer")
    old.close()

    async def driver():
        connection = await asyncpg.connect(host="127.0.0.1", port=proxy.port, user=harness.USER, password=harness.PASSWORD, database="pgbouncer", ssl=False)
        records = await connection.fetch("SHOW STATS")
        assert records[0]["database"] == "pgbouncer" and records[0]["total_xact_count"] == 0
        assert (await connection.fetchrow("SHOW LISTS"))["list"] == "databases"
        await connection.close()
    asyncio.run(driver())


def test_node_postgres(proxy):
    script = """
const {Client} = require('pg');
(async () => {
  const client = new Client({connectionString: process.env.DATABASE_URL});
  await client.connect();
  const simple = await client.query('SHOW POOLS');
  const named = await client.query({name: 'pools', text: 'SHOW POOLS'});
  const again = await client.query({name: 'pools', text: 'SHOW POOLS'});
  console.log(simple.rows.length, named.rows.length, again.rows.length, again.rows[0].cl_active);
  await client.query('RELOAD');
  await client.query('NONSENSE').catch(error => console.log(error.code));
  await client.end();
})();
"""
    answer = subprocess.run(["node", "-e", script], env={**os.environ, "DATABASE_URL": proxy.url(database="pgbouncer")}, capture_output=True, text=True, timeout=30)
    assert answer.stdout == "1 1 1 1\n42601\n", answer


def test_console_sessions_are_bounded_and_no_clients(proxies):
    proxy = proxies(settings(limits={"maxClients": 2}))
    with proxy.connect(), proxy.connect():
        with pytest.raises(psycopg.OperationalError, match="too many clients"):
            proxy.connect()
        with console(proxy) as admin:  # when all is full it is needed most
            assert only(admin, "SHOW LISTS", list="used_clients")["items"] == 3
            assert len(proxy.json("/api/monitoring/clients")[1]["clients"]) == 3
    sessions = []
    with pytest.raises(psycopg.OperationalError, match="too many sessions of the console"):
        for _ in range(200):
            sessions.append(console(proxy))
    for session in sessions:
        session.close()
    with poll(lambda: _try(lambda: console(proxy))) as admin:
        assert rows(admin, "SHOW STATE")


def _try(work):
    try:
        return work()
    except psycopg.OperationalError:
        return None


def test_a_configured_database_of_that_name_is_no_console(proxies, pg):
    proxy = proxies({"databases": {"pgbouncer": {"upstream": {"dbname": harness.DATABASE}}, harness.DATABASE: {}}, "admin": {"users": [harness.USER]}})
    with console(proxy) as client:
        assert client.execute("SELECT current_database()").fetchone() == (harness.DATABASE,)
    with console(proxy, database="pgsidecar") as admin:
        assert only(admin, "SHOW DATABASES", name="pgbouncer", database=harness.DATABASE)


# --- what it shows

def test_columns_are_pgbouncers(proxy, pg):
    """What Debian's PgBouncer shows, this shows under the same names, in the same order and with the same types."""
    bouncer = harness.PgBouncer(pg)
    try:
        with console(bouncer) as theirs, console(proxy) as ours, proxy.connect() as client:
            client.execute("SELECT 1")
            for name in ("ACTIVE_SOCKETS CLIENTS CONFIG DATABASES DNS_HOSTS DNS_ZONES FDS LISTS MEM POOLS SERVERS SOCKETS STATS STATS_AVERAGES "
                         "STATS_TOTALS TOTALS USERS VERSION").split():
                their = {c.name: c.type_code for c in theirs.execute(f"SHOW {name}").description}
                our = {c.name: c.type_code for c in ours.execute(f"SHOW {name}").description}
                missing = set(their) - set(our)
                assert not missing, (name, missing)
                assert [c for c in our if c in their] == list(their), name
                different = {c: (their[c], our[c]) for c in their if their[c] != our[c]}
                assert not different, (name, different)
            lists = {row["list"] for row in rows(theirs, "SHOW LISTS")}
            assert lists <= {row["list"] for row in rows(ours, "SHOW LISTS")}
            totals = {row["name"] for row in rows(theirs, "SHOW TOTALS")}
            assert totals <= {row["name"] for row in rows(ours, "SHOW TOTALS")}
    finally:
        bouncer.close()


def test_pools_clients_and_servers(proxies, pg):
    proxy = proxies(settings(pool={"max": 1}))
    with console(proxy) as admin, proxy.connect(application_name="holder") as holder, proxy.connect(application_name="waiter") as waiter:
        holder.execute("BEGIN")
        holder.execute("SELECT 1")
        [pid] = pg.backends("usename = 'app'")
        waiting = background(waiter, "SELECT 1")
        pool = poll(lambda: [row for row in rows(admin, "SHOW POOLS") if row["cl_waiting"] == 1])[0]
        assert (pool["database"], pool["user"], pool["cl_active"], pool["sv_active"], pool["sv_idle"], pool["pool_mode"]) == \
            (harness.DATABASE, harness.USER, 1, 1, 0, "transaction")
        mine = only(admin, "SHOW CLIENTS", application_name="holder")
        assert (mine["type"], mine["state"], mine["addr"], mine["port"]) == ("C", "active", "127.0.0.1", socket.socket(fileno=os.dup(holder.fileno())).getsockname()[1])
        server = only(admin, "SHOW SERVERS")
        assert (server["type"], server["state"], server["remote_pid"], server["link"], server["ptr"]) == ("S", "active", pid, mine["ptr"], mine["link"])
        assert server["tls"].startswith("TLSv1.3/") and mine["tls"] == "" and server["port"] == pg.port
        assert only(admin, "SHOW CLIENTS", application_name="waiter")["state"] == "waiting"
        sockets = {row["state"] for row in rows(admin, "SHOW SOCKETS")}
        assert {"cl_active", "cl_waiting", "sv_active"} <= sockets
        assert {row["state"] for row in rows(admin, "SHOW ACTIVE_SOCKETS")} == {"cl_active", "sv_active"}
        tasks = {row["task"] for row in rows(admin, "SHOW FDS")}
        assert {"client", "server"} <= tasks
        database = only(admin, "SHOW DATABASES", name=harness.DATABASE)
        assert (database["pool_size"], database["current_connections"], database["current_client_connections"], database["paused"]) == (1, 1, 2, 0)
        holder.execute("COMMIT")
        waiting.join(10)
        assert waiting.error is None
        user = only(admin, "SHOW USERS", name=harness.USER)
        assert user["current_connections"] == 1 and user["current_client_connections"] == 2


def test_statistics(proxy):
    with console(proxy) as admin, proxy.connect(prepare_threshold=None) as client:
        for _ in range(20):
            client.execute("SELECT 1")
        with client.transaction():
            client.execute("SELECT 2")
            client.execute("SELECT 3")
        after = only(admin, "SHOW STATS_TOTALS", database=harness.DATABASE)
        assert (after["xact_count"], after["query_count"]) == (21, 24)
        assert after["bytes_received"] > 0 and after["bytes_sent"] > 0 and after["query_time"] > 0
        assert only(admin, "SHOW STATS", database=harness.DATABASE)["total_xact_count"] == after["xact_count"]
        totals = {row["name"]: row["value"] for row in rows(admin, "SHOW TOTALS")}
        assert totals["total_xact_count"] == after["xact_count"]


def test_pins_and_leaks(proxies):
    proxy = proxies(settings(pool={"idleInTransactionWarnMillis": 200}))
    with console(proxy) as admin, proxy.connect(application_name="keeper") as keeper, proxy.connect(application_name="leaker") as leaker:
        keeper.execute("SELECT pg_advisory_lock(7)")
        [pin] = poll(lambda: rows(admin, "SHOW PINS"))
        assert pin["application_name"] == "keeper" and "advisory" in pin["reasons"] and "unlock" in pin["ends"]
        leaker.execute("BEGIN")
        leaker.execute("SELECT 'secret'")
        leak = poll(lambda: rows(admin, "SHOW LEAKS"))[0]
        assert (leak["application_name"], leak["first_statement"], leak["last_statement"]) == ("leaker", "SELECT ?", "SELECT ?"), leak
        leaker.execute("ROLLBACK")
        assert rows(admin, "SHOW LEAKS") == []


def test_configuration(proxy):
    with console(proxy) as admin:
        config = {row["key"]: row for row in rows(admin, "SHOW CONFIG")}
        assert config["pool.max"] == {"key": "pool.max", "value": "3", "default": "15", "changeable": "yes"}
        assert config["default_pool_size"]["value"] == "3" and config["query_wait_timeout"]["changeable"] == "yes"
        assert config["listen"]["changeable"] == "no"
        assert harness.PASSWORD not in str(config)


# --- deeds

def test_pause_and_resume(proxies, pg):
    proxy = proxies(settings(pool={"max": 4, "connectionTimeoutMillis": 20000}))
    with console(proxy) as admin, console(proxy) as second, proxy.connect() as busy, proxy.connect() as other:
        other.execute("SELECT 1")
        busy.execute("BEGIN")
        busy.execute("SELECT 1")
        pausing = background(admin, f"PAUSE {harness.DATABASE}")
        poll(lambda: only(second, "SHOW DATABASES", name=harness.DATABASE)["paused"] == 1)
        held = background(other, "SELECT 2")
        time.sleep(0.3)
        assert pausing.is_alive() and held.is_alive()  # the transaction isn't over
        busy.execute("COMMIT")
        pausing.join(10)
        assert pausing.error is None and held.is_alive()
        assert pg.count("usename = 'app'") == 0
        with pytest.raises(psycopg.Error, match="already suspended/paused"):
            admin.execute(f"PAUSE {harness.DATABASE}")
        metrics = proxy.json("/api/monitoring/pools")[1]["pools"]
        assert [p["paused"] for p in metrics] == [True]
        admin.execute(f"RESUME {harness.DATABASE}")
        held.join(10)
        assert held.error is None
        with pytest.raises(psycopg.Error, match="not paused"):
            admin.execute(f"RESUME {harness.DATABASE}")
        with pytest.raises(psycopg.Error) as error:
            admin.execute("PAUSE nowhere")
        assert state_of(error) == "3D000" or "paused" not in str(error.value)
        with pytest.raises(psycopg.Error, match="a database is required"):
            admin.execute("PAUSE ''")
        assert only(admin, "SHOW DATABASES", name=harness.DATABASE)["paused"] == 0


def test_an_interrupted_pause_is_taken_back(proxy):
    with console(proxy) as admin, proxy.connect() as busy:
        busy.execute("BEGIN")
        busy.execute("SELECT 1")
        pausing = background(admin, "PAUSE")
        time.sleep(0.2)
        admin.cancel()
        pausing.join(10)
        assert pausing.error.diag.sqlstate == "57014"
        busy.execute("COMMIT")
        busy.execute("SELECT 1")
        admin.execute("PAUSE")
        busy_waits = background(busy, "SELECT 1")
        time.sleep(0.2)
        assert busy_waits.is_alive()
        admin.execute("RESUME")
        busy_waits.join(10)
        assert busy_waits.error is None


def test_a_pauser_that_leaves_takes_it_back(proxy):
    with proxy.connect() as busy:
        busy.execute("BEGIN")
        busy.execute("SELECT 1")
        admin = console(proxy)
        pausing = background(admin, "PAUSE")
        time.sleep(0.2)
        admin.pgconn.finish()
        pausing.join(10)
        busy.execute("COMMIT")
        busy.execute("SELECT 1")


@pytest.mark.parametrize("command", ["KILL_CLIENT {id}", "KILL {database}", "RECONNECT"])
@pytest.mark.parametrize("extended", [False, True], ids=["simple", "extended"])
def test_what_reaches_other_clients_stays_out_of_the_answer(proxy, command, extended):
    with harness.raw(proxy) as victim, wire.Wire(proxy.port) as w:
        victim.value("SELECT 1")
        assert w.login(USER, PASSWORD, "pgsidecar") is None
        text = command.format(id=victim.pid, database=harness.DATABASE)
        messages = w.ask(wire.parse(text), wire.bind(), wire.describe("P"), wire.execute(), wire.SYNC) if extended else w.ask(wire.query("SHOW VERSION; " + text))
        assert "".join(m.type for m in messages) in (("12nCZ",) if extended else ("TDCCZ", "NTDCCZ", "TNDCCZ")), messages
        if command == "RECONNECT":
            assert victim.value("SELECT 2") == "2"
        else:
            assert [m.type for m in victim.closed()] == ["E"]
        if command.startswith("KILL {"):
            w.ask(wire.query(f"RESUME {harness.DATABASE}"))
        assert w.ask(wire.query("SHOW VERSION"))[-1].type == "Z"


def test_a_pauser_that_says_goodbye_takes_it_back(proxy):
    with proxy.connect() as busy, wire.Wire(proxy.port) as w:
        busy.execute("BEGIN")
        busy.execute("SELECT 1")
        assert w.login(USER, PASSWORD, "pgsidecar") is None
        w.send(wire.query("PAUSE"), wire.frame("X"))
        w.closed()
        busy.execute("COMMIT")
        busy.execute("SELECT 1")


def test_reconnect_and_wait_close(proxy, pg):
    with console(proxy) as admin, console(proxy) as second, proxy.connect() as idle, proxy.connect() as busy:
        busy.execute("BEGIN")
        busy.execute("SELECT 1")
        [first] = pg.backends("usename = 'app' AND state = 'idle in transaction'")
        idle.execute("SELECT 1")
        before = set(pg.backends("usename = 'app'"))
        assert len(before) >= 2
        admin.execute("RECONNECT")
        waiting = background(admin, "WAIT_CLOSE")
        idle.execute("SELECT 1")
        busy.execute("SELECT 1")
        poll(lambda: set(pg.backends("usename = 'app'")) & before == {first})
        assert only(second, "SHOW SERVERS", remote_pid=first)["close_needed"] == 1
        assert waiting.is_alive()
        busy.execute("COMMIT")
        waiting.join(10)
        assert waiting.error is None
        poll(lambda: first not in pg.backends("usename = 'app'"))


def test_disable_and_enable(proxy):
    with console(proxy) as admin, proxy.connect() as there:
        admin.execute(f"DISABLE {harness.DATABASE}")
        with pytest.raises(psycopg.OperationalError, match="database does not allow connections: "):
            proxy.connect()
        assert there.execute("SELECT 1").fetchone() == (1,)  # who is there stays
        assert only(admin, "SHOW DATABASES", name=harness.DATABASE)["disabled"] == 1
        admin.execute(f"ENABLE {harness.DATABASE}")
        proxy.connect().close()
        with pytest.raises(psycopg.Error, match="a database is required"):
            admin.execute("DISABLE")


def test_kill(proxies, pg):
    proxy = proxies(settings(pool={"connectionTimeoutMillis": 20000}))
    with console(proxy) as admin:
        victim = proxy.connect()
        running = background(victim, "SELECT pg_sleep(60)")
        poll(lambda: pg.count("query LIKE '%pg_sleep(60)%' AND state = 'active' AND usename = 'app'"))
        admin.execute(f"KILL {harness.DATABASE}")
        running.join(10)
        assert "terminating connection due to administrator command" in str(running.error)
        poll(lambda: pg.count("usename = 'app'") == 0)
        with proxy.connect() as client:  # it waits: KILL pauses
            held = background(client, "SELECT 1")
            time.sleep(0.2)
            assert held.is_alive()
            admin.execute(f"RESUME {harness.DATABASE}")
            held.join(10)
            assert held.error is None
        victim.close()


def test_kill_client(proxy):
    with console(proxy) as admin, proxy.connect(application_name="stays") as stays:
        victim = proxy.connect(application_name="goes")
        admin.execute("KILL_CLIENT " + str(only(admin, "SHOW CLIENTS", application_name="goes")["id"]))
        with pytest.raises(psycopg.OperationalError, match="terminating connection due to administrator command"):
            victim.execute("SELECT 1")
        assert stays.execute("SELECT 1").fetchone() == (1,)
        for sql in ("KILL_CLIENT 999999", "KILL_CLIENT x"):
            with pytest.raises(psycopg.Error):
                admin.execute(sql)


def test_set(proxy, pg):
    with console(proxy) as admin, proxy.connect() as one, proxy.connect() as two:
        for client in (one, two):
            client.execute("BEGIN")
            client.execute("SELECT 1")
        admin.execute("SET pool.max=1")
        two.execute("COMMIT")
        poll(lambda: len(pg.backends("usename = 'app'")) == 1, what="what is more than max is closed as it comes back")
        one.execute("COMMIT")
        assert only(admin, "SHOW CONFIG", key="pool.max")["value"] == "1"
        one.execute("BEGIN")
        one.execute("SELECT 1")
        waiting = background(two, "SELECT 1")
        time.sleep(0.3)
        assert waiting.is_alive()
        admin.execute("SET default_pool_size = '2'")  # PgBouncer's name
        waiting.join(10)
        assert waiting.error is None
        admin.execute("SET query_wait_timeout = 1.5")
        assert only(admin, "SHOW CONFIG", key="pool.connectionTimeoutMillis")["value"] == "1500"
        admin.execute("SET server_idle_timeout = 0.0001")
        assert only(admin, "SHOW CONFIG", key="pool.idleTimeoutMillis")["value"] == "1"  # 0 is never
        with pytest.raises(psycopg.Error, match="SET takes: SET key = value"):
            admin.execute("SET pool.max = 3 0")
        for sql, what in (("SET pool.max=none", "pool.max"), ("SET pool.maxx=1", 'did you mean "pool.max"'), ("SET listen='x'", "can't be set here"),
                          ("SET pool.min=9", "pool.min would be more"), ("SET auth.method=trust", "can't be set here")):
            with pytest.raises(psycopg.Error, match=re.escape(what)) as error:
                admin.execute(sql)
            assert state_of(error) == "22023"
        one.execute("COMMIT")
        admin.execute("RELOAD")
        assert only(admin, "SHOW CONFIG", key="pool.max")["value"] == "3"  # the file's again


def test_reload(proxy):
    with console(proxy) as admin:
        good = proxy.config
        proxy.write_config(harness.merge(good, {"pool": {"max": 7}}))
        admin.execute("RELOAD")
        assert only(admin, "SHOW CONFIG", key="pool.max")["value"] == "7"
        proxy.config_file.write_text("pool: {mx: 1}\n")
        with pytest.raises(psycopg.Error, match="RELOAD failed: .*mx"):
            admin.execute("RELOAD")
        assert only(admin, "SHOW CONFIG", key="pool.max")["value"] == "7"
        proxy.write_config(good)


@pytest.mark.parametrize("how", ["SHUTDOWN", "SHUTDOWN WAIT_FOR_SERVERS", "SHUTDOWN WAIT_FOR_CLIENTS"])
def test_shutdown(proxies, how):
    proxy = proxies(settings())
    admin, client, idle = console(proxy), proxy.connect(), proxy.connect()
    client.execute("BEGIN")
    client.execute("SELECT 1")
    try:
        admin.execute(how)
    except psycopg.OperationalError:
        assert how == "SHUTDOWN"  # at once: also this session
    if how == "SHUTDOWN":
        assert proxy.wait_exit(5) in (0, 3)
        proxy.expect_exit = proxy.process.returncode
        with pytest.raises(psycopg.OperationalError):
            client.execute("SELECT 1")
        return
    time.sleep(0.3)
    assert proxy.running()
    client.execute("COMMIT")
    if how.endswith("CLIENTS"):
        time.sleep(0.3)
        assert proxy.running() and idle.execute("SELECT 1").fetchone() == (1,)
        with pytest.raises(psycopg.OperationalError, match="shutting down"):
            proxy.connect()
        idle.close()
        client.close()
    assert proxy.wait_exit(10) == 0


def test_suspend_is_told_to_be_missing(proxy):
    with console(proxy) as admin:
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="SUSPEND"):
            admin.execute("SUSPEND")


def test_over_http(proxies, pg):
    proxy = proxies(settings(pool={"connectionTimeoutMillis": 20000}))
    with proxy.connect() as client:
        client.execute("SELECT 1")
        before = pg.backends("usename = 'app'")
        assert proxy.http("/api/admin/reconnect", method="POST")[0] == 200
        client.execute("SELECT 1")
        poll(lambda: not set(before) & set(pg.backends("usename = 'app'")))
        status, _, body = proxy.http(f"/api/admin/pause?database={harness.DATABASE}", method="POST")
        assert (status, body) == (200, '{"ok":true,"action":"pause"}\n')
        assert proxy.http("/api/admin/pause?database=" + harness.DATABASE, method="POST")[0] == 409
        assert proxy.http("/api/admin/pause?database=", method="POST")[0] == 400
        assert proxy.http("/api/admin/pause?data=x", method="POST")[0] == 400
        held = background(client, "SELECT 1")
        time.sleep(0.2)
        assert held.is_alive() and pg.count("usename = 'app'") == 0
        assert proxy.http("/api/admin/resume?database=" + harness.DATABASE, method="POST")[0] == 200
        held.join(10)
        assert held.error is None


# --- PgBouncer's exporter

def test_what_exporters_ask_for(proxy):
    """The queries of prometheus-community/pgbouncer_exporter and the columns that it takes."""
    wants = {"SHOW STATS_TOTALS": {"database", "query_count", "query_time", "bytes_received", "bytes_sent", "wait_time", "xact_count", "xact_time"},
             "SHOW POOLS": {"database", "user", "cl_active", "cl_waiting", "cl_active_cancel_req", "cl_waiting_cancel_req", "sv_active", "sv_active_cancel",
                            "sv_being_canceled", "sv_idle", "sv_used", "sv_tested", "sv_login", "maxwait", "maxwait_us", "pool_mode"},
             "SHOW DATABASES": {"name", "host", "port", "database", "force_user", "pool_size", "reserve_pool", "pool_mode", "max_connections",
                                "current_connections", "paused", "disabled"},
             "SHOW LISTS": {"list", "items"}, "SHOW CONFIG": {"key", "value", "default", "changeable"}, "SHOW VERSION": {"version"}}
    with console(proxy, application_name="exporter") as admin, proxy.connect() as client:
        client.execute("SELECT 1")
        for sql, columns in wants.items():
            table = rows(admin, sql)
            assert table and columns <= set(table[0]), sql
        config = {row["key"]: row["value"] for row in rows(admin, "SHOW CONFIG")}
        assert config["max_client_conn"].isdigit() and config["max_user_connections"].isdigit()
        assert re.match(r"PgBouncer \d+\.\d+\.\d+", rows(admin, "SHOW VERSION")[0]["version"])


# --- bad input

def test_garbage_ends_only_that_session(proxy):
    for garbage in (wire.frame("y", b"x"), b"Q\xff\xff\xff\xff", b"Q\0\0\0\0", wire.frame("Q", b"no end"), wire.frame("B", b"\0"), wire.frame("E", b"")):
        connection = wire.Wire(proxy.port)
        connection.login(harness.USER, harness.PASSWORD, "pgbouncer")
        connection.send(garbage)
        answer = connection.recv()
        assert answer.type == "E" and answer.error["C"] == "08P01", answer
        connection.sock.close()
    with console(proxy) as admin:
        assert rows(admin, "SHOW STATE")


def test_a_reader_that_takes_nothing_is_bounded(proxy):
    connection = wire.Wire(proxy.port)
    connection.login(harness.USER, harness.PASSWORD, "pgbouncer")
    connection.sock.settimeout(2)
    before = proxy.rss_kb()
    try:
        for _ in range(20000):
            connection.sock.sendall(wire.query("SHOW CONFIG") * 10)
    except OSError:
        pass  # it isn't read any more: that is the point
    if not harness.sanitized():
        assert proxy.rss_kb() - before < 8 * 1024
    with console(proxy) as admin:
        assert rows(admin, "SHOW STATE")
    connection.sock.close()
