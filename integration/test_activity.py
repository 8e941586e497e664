"""Who is connected and what they do; what statements cost; leaks and limits on clients: as the API tells them."""
import re
import threading
import time

import psycopg
import pytest

import harness
import wire
from gate import Gate
from harness import poll, raw
from wire import kinds


def api(proxy, path):
    status, document = proxy.json("/api/monitoring/" + path)
    assert status == 200, document
    return document


def clients(proxy, **where):
    """The rows of clients that have these values."""
    rows = api(proxy, "clients")["clients"]
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def servers(proxy):
    return api(proxy, "servers")["servers"]


def statement(proxy, text):
    rows = [row for row in api(proxy, "queries?limit=1000")["queries"] if row["statement"] == text]
    return rows[0] if rows else None


def post(proxy, path):
    return proxy.http(path, method="POST")


def failing(connection, sql):
    """Runs it in a thread; after join(), `.error` has what it failed with."""
    def work():
        try:
            connection.execute(sql)
        except psycopg.Error as error:
            thread.error = error
    thread = threading.Thread(target=work, daemon=True)
    thread.error = None
    thread.start()
    return thread


# --- rows

def test_what_each_client_does(proxies, pg):
    proxy = proxies({"pool": {"max": 2}})
    with proxy.connect(application_name="idler") as idler, proxy.connect(application_name="dreamer") as dreamer, \
            proxy.connect(application_name="worker") as worker, proxy.connect(application_name="waiter") as waiter:
        idler.execute("SELECT 1")
        dreamer.execute("BEGIN")
        dreamer.execute("SELECT 'secret'")
        running = failing(worker, "SELECT pg_sleep(30)")
        poll(lambda: clients(proxy, application="worker", state="active"))
        waiting = failing(waiter, "SELECT 2")
        [row] = poll(lambda: clients(proxy, application="waiter", state="waiting"))
        assert row["server"] is None and row["stateSeconds"] < 5
        [row] = clients(proxy, application="idler")
        assert (row["state"], row["server"], row["user"], row["database"]) == ("idle", None, harness.USER, harness.DATABASE)
        assert re.fullmatch(r"127\.0\.0\.1:\d+", row["peer"]) and not row["tls"] and row["request"] > 0
        [row] = clients(proxy, application="dreamer")
        assert (row["state"], row["statement"]) == ("idle in transaction", "SELECT ?")
        assert 0 < row["transactionSeconds"] < 10 and row["serverPid"] == dreamer.execute("SELECT pg_backend_pid()").fetchone()[0]
        by_id = {server["id"]: server for server in servers(proxy)}
        held = by_id[row["server"]]
        assert (held["pid"], held["client"], held["application"], held["state"]) == (row["serverPid"], row["id"], "dreamer", "idle in transaction")
        assert held["tls"] and held["uses"] >= 1 and held["address"] == f"127.0.0.1:{pg.port}"
        assert {server["pid"] for server in by_id.values()} == set(pg.backends())
        [row] = clients(proxy, application="worker")
        assert post(proxy, f"/api/admin/clients/{row['id']}/cancel")[0] == 200
        running.join(10)
        assert running.error.sqlstate == "57014"
        waiting.join(10)
        assert waiting.error is None


def test_pins_show_with_their_client(proxies):
    proxy = proxies()
    with proxy.connect(application_name="locker") as connection:
        connection.execute("SELECT pg_advisory_lock(1)")
        [row] = poll(lambda: [row for row in clients(proxy, application="locker") if row["pinned"]])
        assert row["pinned"] == ["advisory_lock"] and row["server"] and row["state"] == "idle"


def test_closing_a_client_and_a_server(proxies, pg):
    proxy = proxies({"pool": {"max": 1}})
    with proxy.connect(application_name="one") as one, proxy.connect(application_name="two") as two:
        running = failing(one, "SELECT pg_sleep(30)")
        [row] = poll(lambda: clients(proxy, application="one", state="active"))
        assert post(proxy, f"/api/admin/clients/{row['id']}/close")[0] == 200
        running.join(10)
        assert "terminating connection due to administrator command" in str(running.error)
        two.execute("SELECT 1")
        # A server that is closed under a transaction: the client hears of it, and goes on when it has ended that.
        two.execute("BEGIN")
        [server] = servers(proxy)
        assert server["application"] == "two"
        with harness.Watch(pg) as watch:
            assert post(proxy, f"/api/admin/servers/{server['id']}/close")[0] == 200
            with pytest.raises(psycopg.Error) as error:
                two.execute("SELECT 1")
            assert error.value.sqlstate == "57P01"
            two.execute("ROLLBACK")
            assert two.execute("SELECT 1").fetchone() == (1,)
        assert watch.most <= 1
        assert api(proxy, "pool-stats")["activeCount"] == 0


def test_closing_a_server_in_the_middle_of_a_query(proxies, pg):
    proxy = proxies({"pool": {"max": 1}})
    with proxy.connect() as connection, harness.Watch(pg) as watch:
        running = failing(connection, "SELECT pg_sleep(30)")
        [server] = poll(lambda: [s for s in servers(proxy) if s["state"] == "active"])
        assert post(proxy, f"/api/admin/servers/{server['id']}/close")[0] == 200
        running.join(10)
        assert running.error.sqlstate == "57P01"
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert watch.most <= 1


def test_closing_a_server_whose_query_is_still_on_its_way(proxies, pg):
    """The cancel request comes first, and is lost."""
    with Gate(pg.port) as gate:
        proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 15000}}, url=pg.url(port=gate.port))
        with proxy.connect() as connection, harness.Watch(pg) as watch:
            connection.execute("SELECT 1")
            gate.delay = 1.0
            running = failing(connection, "SELECT pg_sleep(30)")
            [server] = poll(lambda: [s for s in servers(proxy) if s["state"] == "active"])
            time.sleep(0.1)
            gate.delay = 0.0
            assert post(proxy, f"/api/admin/servers/{server['id']}/close")[0] == 200
            running.join(10)
            begun = time.monotonic()
            assert connection.execute("SELECT 1").fetchone() == (1,)
            assert time.monotonic() - begun < 4.5
        assert watch.most <= 1


@pytest.mark.parametrize("path", ["/api/admin/clients/1/cancel", "/api/admin/clients/99999999999/close", "/api/admin/servers/77/close"])
def test_an_id_that_nobody_has(proxy, path):
    status, _, body = post(proxy, path)
    assert status == 404 and "has the id" in body


@pytest.mark.parametrize("path", ["clients", "servers", "queries", "leaks", "pins", "transparency", "config"])
def test_names_are_for_loopback_or_token_only(proxy, path):
    assert proxy.http("/api/monitoring/" + path)[0] == 200
    assert proxy.http("/api/monitoring/" + path, headers={"Host": "evil.example"})[0] == 403
    assert proxy.http("/api/monitoring/" + path, method="POST")[0] == 405


def test_the_configuration_is_shown_without_secrets(proxy):
    text = api(proxy, "config")["yaml"]
    assert "idleInTransactionWarnMillis: 30000" in text
    assert harness.PASSWORD not in text and harness.percent(harness.PASSWORD) not in text


# --- statements

def test_statements_are_counted_by_their_normalised_text(proxies):
    proxy = proxies()
    with proxy.connect() as connection:
        connection.execute("CREATE TABLE measured (id int PRIMARY KEY, v text)")
        try:
            for i in range(8):
                connection.execute(f"INSERT INTO measured VALUES ({i}, 'value {i}'), ({i + 100}, 'x')")
            for i in range(9):
                connection.execute("SELECT v FROM measured WHERE id = %s", (i,), prepare=i % 2 == 0)
            for n in range(1, 5):
                connection.execute("SELECT v FROM measured WHERE id IN (%s)" % ",".join(str(i) for i in range(n)))
            for _ in range(3):
                with pytest.raises(psycopg.errors.UniqueViolation):
                    connection.execute("INSERT INTO measured VALUES (1, 'again')")
            for sql in ("SELECT nothing", "SELECT %s::int / 0"):
                with pytest.raises(psycopg.Error):
                    connection.execute(sql, (5,) if "%s" in sql else None)
        finally:
            connection.execute("DROP TABLE measured")
    row = statement(proxy, "INSERT INTO measured VALUES (?, ...), ...")
    assert (row["calls"], row["rows"], row["errorCount"]) == (8, 16, 0)
    row = statement(proxy, "SELECT v FROM measured WHERE id = $1")
    assert (row["calls"], row["rows"]) == (9, 8) and row["bytes"] > 9 * 10
    assert row["user"] == harness.USER and row["database"] == harness.DATABASE
    assert [statement(proxy, "SELECT v FROM measured WHERE id IN (?)")["calls"], statement(proxy, "SELECT v FROM measured WHERE id IN (?, ...)")["calls"]] == [1, 3]
    row = statement(proxy, "INSERT INTO measured VALUES (?, ...)")
    assert row["errors"] == {"23505": 3} and row["errorCount"] == row["calls"] == 3
    assert statement(proxy, "SELECT nothing")["errors"] == {"42703": 1}
    assert statement(proxy, "SELECT $1::int / ?")["errors"] == {"22012": 1}
    assert row["maxMs"] >= row["p99Ms"] >= row["p50Ms"] > 0 and abs(row["totalMs"] - row["waitMs"] - row["serverMs"] - row["clientMs"]) < 0.01
    assert row["firstSeen"] <= row["lastSeen"]
    most = api(proxy, "queries?sort=errors&limit=1")["queries"]
    assert [one["statement"] for one in most] == ["INSERT INTO measured VALUES (?, ...)"]
    assert post(proxy, "/api/admin/queries/reset")[0] == 200
    assert api(proxy, "queries")["tracked"] == 0


@pytest.mark.parametrize("sort", ["total", "mean", "wait", "errors", "calls"])
def test_statements_are_sorted(proxy, sort):
    with proxy.connect() as connection:
        for n in range(1, 6):
            connection.execute(f"SELECT {', '.join('a' * (i + 1) for i in range(n))} FROM (SELECT 1 a, 2 aa, 3 aaa, 4 aaaa, 5 aaaaa) t, pg_sleep({n / 200})")
            for _ in range(n):
                connection.execute("SELECT %s" % " + ".join(["1"] * n))
    rows = api(proxy, f"queries?sort={sort}")["queries"]
    key = {"total": "totalMs", "mean": "meanMs", "wait": "waitMs", "errors": "errorCount", "calls": "calls"}[sort]
    values = [row[key] for row in rows]
    assert len(values) == 10 and values == sorted(values, reverse=True)


@pytest.mark.parametrize("query", ["sort=size", "limit=0", "limit=x", "limit=99999"])
def test_a_wrong_question_about_statements(proxy, query):
    assert proxy.http("/api/monitoring/queries?" + query)[0] == 400


def test_time_is_split_into_waiting_server_and_client(proxies):
    proxy = proxies({"pool": {"max": 1}, "log": {"slowQueryMillis": 200}})
    with proxy.connect() as holder, proxy.connect() as waiter:
        holder.execute("BEGIN")
        holder.execute("SELECT 1")
        thread = failing(waiter, "SELECT 7 AS waited")
        poll(lambda: clients(proxy, state="waiting"))
        time.sleep(0.3)
        holder.execute("COMMIT")
        thread.join(10)
        row = statement(proxy, "SELECT ? AS waited")
        assert row["waitMs"] >= 290 and row["serverMs"] < 200 and row["totalMs"] >= row["waitMs"]
        waiter.execute("SELECT pg_sleep(0.3)")
        row = statement(proxy, "SELECT pg_sleep(?)")
        assert row["serverMs"] >= 300 and row["waitMs"] < 200
    # A client that doesn't read 64 MB for a while.
    stalled = raw(proxy)
    stalled.send(wire.query("SELECT repeat('x', 1000000) AS big FROM generate_series(1, 64) g"))
    time.sleep(0.6)
    stalled.until()
    row = statement(proxy, "SELECT repeat(?, ...) AS big FROM generate_series(?, ...) g")
    assert row["clientMs"] >= 300 and row["rows"] == 64 and row["bytes"] > 64_000_000
    log = proxy.log_text()
    [line] = [one for one in log.splitlines() if "slow statement" in one and "pg_sleep" in one]
    found = re.search(r"request (\d+): ([\d.]+) ms \(waiting ([\d.]+), server ([\d.]+), client reading ([\d.]+)\), 1 rows", line)
    assert found and float(found[2]) >= 300 and float(found[4]) >= 300 and float(found[3]) < 200
    [line] = [one for one in log.splitlines() if "slow statement" in one and "waited" in one]
    assert float(re.search(r"waiting ([\d.]+)", line)[1]) >= 290


def test_slow_statements_are_logged_with_their_tags_and_without_their_values(proxies):
    proxy = proxies({"log": {"slowQueryMillis": 50}})
    trace = "traceparent='00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01',route='%2Fpolls'"
    with proxy.connect(application_name="tagged") as connection:
        connection.execute(f"SELECT pg_sleep(0.1), 'top secret' /*{trace}*/")
        connection.execute("SELECT pg_sleep(%s), %s::text /*route='two'*/", (0.1, "hidden"), prepare=True)
        connection.execute("SELECT pg_sleep(0.1) /* 'top secret', hidden=here */")
        connection.execute("SELECT 'quick'")
    lines = [line for line in proxy.log_text().splitlines() if "slow statement" in line]
    assert len(lines) == 3
    assert trace in lines[0] and 'application "tagged"' in lines[0] and "SELECT pg_sleep(?), ?" in lines[0]
    assert "route='two'" in lines[1]
    assert "secret" not in proxy.log_text() and "hidden" not in proxy.log_text()
    assert statement(proxy, "SELECT pg_sleep(?), ?")["tags"] == trace


def test_statements_in_session_mode(proxies):
    proxy = proxies({"pool": {"mode": "session"}})
    with proxy.connect() as connection:
        for i in range(6):
            connection.execute("SELECT %s::int + 1 AS one", (i,), prepare=True)
            connection.execute(f"SELECT {i} AS two")
    assert statement(proxy, "SELECT $1::int + ? AS one")["calls"] == 6
    assert statement(proxy, "SELECT ? AS two")["calls"] == 6
    assert api(proxy, "pool-stats")["perPool"][0]["transactions"] == 13  # the first Parse has a Sync of its own


def test_named_portals_and_parts_of_their_rows(proxy):
    connection = raw(proxy)
    connection.send(wire.query("BEGIN"))
    connection.until()
    connection.send(wire.parse("SELECT g AS portal FROM generate_series(1, 10) g"), wire.bind(portal="cursor"), wire.SYNC)
    connection.until()
    for _ in range(2):
        connection.send(wire.execute("cursor", 4), wire.SYNC)
        connection.until()
    connection.send(wire.execute("cursor"), wire.SYNC)
    connection.until()
    connection.send(wire.query("COMMIT"))
    connection.until()
    row = statement(proxy, "SELECT g AS portal FROM generate_series(?, ...) g")
    assert row["calls"] == 3


def test_statements_are_bounded_and_the_heavy_ones_stay(proxy):
    with proxy.connect() as connection:
        connection.execute("SELECT pg_sleep(0.2)")
        before = proxy.rss_kb()
        for i in range(3000):
            connection.execute(f"SELECT 1 AS column_{i}")
    found = api(proxy, "queries?limit=1000")
    assert found["tracked"] == found["limit"] == 1000 and found["evicted"] >= 2000
    assert statement(proxy, "SELECT pg_sleep(?)")["calls"] == 1
    assert harness.sanitized() or proxy.rss_kb() - before < 8192


# --- leaks

def test_a_leak_is_logged_listed_counted_and_told(proxies):
    proxy = proxies({"pool": {"idleInTransactionWarnMillis": 300, "noticeLeaks": True}})
    notices = []
    with proxy.connect(application_name="leaker", autocommit=True) as connection:
        connection.add_notice_handler(lambda notice: notices.append(notice.message_primary))
        connection.execute("BEGIN")
        connection.execute("SELECT 'a', 1 AS opened")
        connection.execute("SELECT 2 AS last")
        assert api(proxy, "leaks")["leaks"] == []
        [leak] = poll(lambda: api(proxy, "leaks")["leaks"])
        assert (leak["application"], leak["firstStatement"], leak["lastStatement"]) == ("leaker", "SELECT ?, ... AS opened", "SELECT ? AS last")
        assert leak["idleSeconds"] >= 0.3 and leak["ageSeconds"] >= leak["idleSeconds"] and re.search(r":\d+$", leak["peer"])
        port = leak["peer"].rsplit(":", 1)[1]
        line = poll(lambda: [one for one in proxy.log_text().splitlines() if "[leak]" in one])
        assert len(line) == 1 and f":{port})" in line[0] and "SELECT ? AS last" in line[0] and 'application "leaker"' in line[0]
        connection.execute("SELECT 3")
        assert len(notices) == 1 and "idleInTransactionWarnMillis" in notices[0]
        assert api(proxy, "leaks")["leaks"] == []
        connection.execute("COMMIT")
    assert api(proxy, "leaks")["total"] == 1
    assert statement(proxy, "SELECT ?, ... AS opened")["leftIdle"] == 1


@pytest.mark.parametrize("mode", ["transaction", "session"])
@pytest.mark.parametrize("how", ["gone", "closed", "timed out"])
def test_a_leaking_client_that_is_gone_leaks_no_more(proxies, mode, how):
    limits = {"idleInTransactionTimeoutMillis": 700} if how == "timed out" else {}
    proxy = proxies({"pool": {"idleInTransactionWarnMillis": 200, "mode": mode, **limits}})
    w = wire.Wire(proxy.port)
    assert w.login(harness.USER, harness.PASSWORD, harness.DATABASE) is None
    w.ask(wire.query("BEGIN"))
    [leak] = poll(lambda: api(proxy, "leaks")["leaks"])
    if how == "closed":
        assert post(proxy, f"/api/admin/clients/{leak['client']}/close")[0] == 200
    elif how == "gone":
        w.sock.close()
    poll(lambda: proxy.stats()["activeCount"] == 0, what="it is gone")
    time.sleep(1.5)  # what is told once a second is told
    assert api(proxy, "leaks")["leaks"] == []


# --- limits

def test_an_idle_transaction_is_ended(proxies, pg):
    proxy = proxies({"pool": {"max": 1, "idleInTransactionTimeoutMillis": 300}})
    with proxy.connect() as one, proxy.connect() as two:
        one.execute("BEGIN")
        one.execute("CREATE TABLE never (a int)")
        assert two.execute("SELECT 1").fetchone() == (1,)  # waits until the first has been ended
        with pytest.raises(psycopg.Error) as error:
            one.execute("SELECT 1")
        assert "idle-in-transaction timeout" in str(error.value) and "pool.idleInTransactionTimeoutMillis is 300 ms" in str(error.value)
        assert two.execute("SELECT to_regclass('never')").fetchone() == (None,)


def test_who_waits_behind_a_flush_is_no_query(proxies):
    """As asyncpg's prepare() leaves it: what was asked for is answered."""
    proxy = proxies({"pool": {"max": 1, "queryTimeoutMillis": 500, "idleInTransactionWarnMillis": 300}})
    with raw(proxy) as w:
        w.send(wire.parse("SELECT pg_sleep($1)", "s"), wire.describe("S", "s"), wire.FLUSH)
        assert kinds([w.recv() for _ in range(3)]) == "1tT"
        poll(lambda: api(proxy, "leaks")["leaks"], what="it holds a server connection")
        time.sleep(6)
        for _ in range(2):  # longer than the limit, together
            w.send(wire.bind("s", ["0.4"]), wire.execute(), wire.FLUSH)
            assert kinds([w.recv() for _ in range(3)]) == "2DC"
        w.send(wire.SYNC)
        assert kinds(w.until()) == "Z"
        assert kinds(w.ask(wire.bind("s", ["20"]), wire.execute(), wire.SYNC)) == "2EZ"
        assert api(proxy, "leaks")["leaks"] == []


def test_who_idles_behind_a_flush_is_ended_as_in_a_transaction(proxies):
    proxy = proxies({"pool": {"max": 1, "idleInTransactionTimeoutMillis": 500}})
    with raw(proxy) as w, raw(proxy) as other:
        w.send(wire.parse("SELECT pg_sleep(1)"), wire.bind(), wire.execute(), wire.FLUSH)
        assert kinds([w.recv() for _ in range(4)]) == "12DC"
        assert [m.error["C"] for m in w.closed()] == ["25P03"]
        assert other.value("SELECT 1") == "1"


def test_a_query_that_takes_too_long(proxies):
    proxy = proxies({"pool": {"max": 1, "queryTimeoutMillis": 400}})
    with proxy.connect() as one, proxy.connect() as two:
        one.execute("SELECT pg_sleep(0.1)")
        began = time.monotonic()
        with pytest.raises(psycopg.errors.QueryCanceled) as error:
            one.execute("SELECT pg_sleep(20)")
        assert 0.3 < time.monotonic() - began < 5
        assert "query timeout" in str(error.value) and "pool.queryTimeoutMillis is 400 ms" in error.value.diag.message_detail
        assert one.execute("SELECT 1").fetchone() == (1,)
        # In a transaction it fails as on the server, and the wait for a connection counts.
        one.execute("BEGIN")
        with pytest.raises(psycopg.errors.QueryCanceled) as error:
            two.execute("SELECT 1")
        assert "waiting for a server connection" in str(error.value)
        with pytest.raises(psycopg.errors.QueryCanceled):
            one.execute("SELECT pg_sleep(20)")
        with pytest.raises(psycopg.errors.InFailedSqlTransaction):
            one.execute("SELECT 1")
        one.execute("ROLLBACK")
        assert two.execute("SELECT 2").fetchone() == (2,)


def test_a_transaction_that_takes_too_long(proxies):
    proxy = proxies({"pool": {"max": 1, "maxTransactionMillis": 500}})
    with proxy.connect() as one, proxy.connect() as two:
        one.execute("BEGIN")
        with pytest.raises(psycopg.Error) as error:
            for _ in range(100):
                one.execute("SELECT pg_sleep(0.05)")
        assert "due to transaction timeout" in str(error.value) and "pool.maxTransactionMillis is 500 ms" in str(error.value)
        for _ in range(10):  # no transaction of its own takes so long
            two.execute("SELECT pg_sleep(0.08)")


def test_a_limit_in_the_middle_of_a_row(proxies):
    """An error there would be read as the rest of the row."""
    proxy = proxies({"pool": {"maxTransactionMillis": 1500}})
    with raw(proxy) as w:
        w.send(wire.query("BEGIN"), wire.query("SELECT repeat('x', 60) FROM generate_series(1, 100000) WHERE pg_sleep(0.005) IS NOT NULL"))
        with pytest.raises((wire.Closed, OSError)):
            while True:
                message = w.recv()
                assert message.type != "D" or message.row == [b"x" * 60]
                if message.type == "E":  # between two rows
                    assert message.error["C"] == "25P04"


def test_a_client_that_is_idle_for_too_long(proxies):
    proxy = proxies({"pool": {"clientIdleTimeoutMillis": 400}})
    with proxy.connect() as idle, proxy.connect() as pinned, proxy.connect() as busy:
        idle.execute("SELECT 1")
        pinned.execute("SELECT pg_advisory_lock(5)")
        busy.execute("BEGIN")
        deadline = time.monotonic() + 0.8
        while time.monotonic() < deadline:
            busy.execute("SELECT pg_sleep(0.05)")
        for one in (idle, pinned):
            with pytest.raises(psycopg.Error) as error:
                one.execute("SELECT 1")
            assert "idle-session timeout" in str(error.value) and "pool.clientIdleTimeoutMillis is 400 ms" in str(error.value)
        busy.execute("COMMIT")
    with proxy.connect() as silent:  # one that never asks for anything
        poll(lambda: clients(proxy) == [], what="the client is closed")
        with pytest.raises(psycopg.Error):
            silent.execute("SELECT 1")


def test_limits_are_off_by_default_and_reload_sets_them(proxies):
    proxy = proxies()
    with proxy.connect() as connection:
        connection.execute("BEGIN")
        proxy.write_config({**proxy.config, "pool": {"idleInTransactionTimeoutMillis": 200}})
        assert post(proxy, "/api/admin/reload")[0] == 200
        poll(lambda: clients(proxy) == [], what="the client is closed")
        with pytest.raises(psycopg.Error, match="idle-in-transaction timeout"):
            connection.execute("SELECT 1")


@pytest.mark.parametrize("key, sqlstate, sql", [("idleInTransactionTimeoutMillis", "25P03", "BEGIN"), ("maxTransactionMillis", "25P04", "BEGIN"),
                                                ("clientIdleTimeoutMillis", "57P05", "SELECT 1")])
def test_a_client_that_is_closed_by_a_limit_gets_the_servers_sqlstate(proxies, key, sqlstate, sql):
    proxy = proxies({"pool": {key: 200}})
    with raw(proxy) as connection:
        connection.ask(wire.query(sql))
        error = connection.recv().error
        assert (error["S"], error["C"]) == ("FATAL", sqlstate) and f"pool.{key} is 200 ms" in error["D"]
        assert connection.closed() == []


# --- history

def test_history_has_the_traffic_and_the_rest_after_it(proxies):
    proxy = proxies()
    with proxy.connect() as connection:
        deadline = time.monotonic() + 1.5
        count = 0
        while time.monotonic() < deadline:
            connection.execute("SELECT 1")
            count += 1
        def counted():
            series = api(proxy, "history?window=60&step=1")["series"]
            return series if sum(n or 0 for n in series["transactions"]) >= count * 0.9 else None
        series = poll(counted)
        assert sum(n or 0 for n in series["transactions"]) <= count * 1.2
        assert max(p or 0 for p in series["queryP50Ms"]) > 0 and max(series["serversIdle"][-5:], key=lambda n: n or 0) >= 1
        at_rest = poll(lambda: [s for s in [api(proxy, "history?window=3&step=1")["series"]] if s["transactions"][:2] == [0, 0]])
        assert at_rest[0]["clients"][:2] == [1, 1]
