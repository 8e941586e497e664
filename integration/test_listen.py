"""LISTEN, UNLISTEN and NOTIFY in transaction mode: as on a connection of its own, from one connection that listens for all."""
import asyncio
import random
import select
import signal
import struct
import threading
import time

import pytest

import harness
import wire
from harness import DATABASE, PASSWORD, USER, raw

CHANNELS = "SELECT coalesce(string_agg(c, ',' ORDER BY c), '') FROM pg_listening_channels() AS c"

# The last that the listener was asked is what sets it up.
KILL_LISTENER = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query ~ '^SELECT pg_catalog.set_config.*LISTEN pgsidecar_'"


def notified(messages):
    """(channel, payload) of the notifications among these."""
    return [tuple(part.decode() for part in m.body[4:].split(b"\0")[:2]) for m in messages if m.type == "A"]


def pids(messages):
    return [struct.unpack_from("!I", m.body)[0] for m in messages if m.type == "A"]


def do(w, sql):
    """A simple query that must succeed; all messages."""
    messages = w.ask(wire.query(sql))
    errors = [m.error for m in messages if m.type == "E"]
    assert not errors, (sql, errors)
    return messages


def extended(w, sql):
    messages = w.ask(wire.parse(sql), wire.bind(), wire.describe("P"), wire.execute(), wire.SYNC)
    errors = [m.error for m in messages if m.type == "E"]
    assert not errors, (sql, errors)
    return messages


def pending(w, timeout=0.0):
    """What has come without being asked for."""
    messages = []
    while w.buffer or select.select([w.sock], [], [], timeout)[0]:
        messages.append(w.recv())
    return messages


def settled(pg, w, sender="SELECT pg_notify('fence_of_the_test', %s)"):
    """All notifications that were sent before now, for a client that listens to the fence too."""
    token = str(random.random())
    pg.sql(sender, token, database=DATABASE)
    messages = []
    while ("fence_of_the_test", token) not in notified(messages):
        messages.append(w.recv())
    return notified(messages)[:-1]


def listening(proxy):
    return proxy.stats()["perPool"][0]["listening"]


def notify(pg, channel, payload=""):
    pg.sql("SELECT pg_notify(%s, %s)", channel, payload, database=DATABASE)


@pytest.fixture
def pool(proxies):
    return proxies({"pool": {"max": 3, "connectionTimeoutMillis": 20000}})


@pytest.mark.parametrize("say", [do, extended], ids=["simple", "extended"])
def test_listen_and_unlisten(pool, pg, say):
    with raw(pool) as w, raw(pool) as other:
        say(w, "LISTEN a")
        notify(pg, "a", "1")
        assert notified([w.recv()]) == [("a", "1")]
        say(w, "LISTEN b")
        say(w, 'LISTEN "Mixed ""case"""')
        notify(pg, 'Mixed "case"', "2")
        assert notified([w.recv()]) == [('Mixed "case"', "2")]
        notify(pg, "b", "3")
        notify(pg, "nobody", "4")
        notify(pg, "a", "5")
        assert notified([w.recv(), w.recv()]) == [("b", "3"), ("a", "5")]
        assert w.value(CHANNELS) == 'Mixed "case",a,b'
        assert other.value(CHANNELS) == ""
        assert listening(pool)["channels"] == 3
        say(w, "LISTEN fence_of_the_test")
        say(w, "UNLISTEN a")
        assert w.value(CHANNELS) == 'Mixed "case",b,fence_of_the_test'
        notify(pg, "a", "6")
        notify(pg, "b", "7")
        assert settled(pg, w) == [("b", "7")]
        say(w, "UNLISTEN *")
        assert w.value(CHANNELS) == ""
        notify(pg, "b", "8")
        assert w.value("SELECT 1") == "1"
        assert not pending(w, 0.1)
    assert listening(pool)["clients"] == 0


def test_the_pool_is_free(proxies, pg):
    proxy = proxies({"pool": {"max": 3, "connectionTimeoutMillis": 20000}})
    clients = [raw(proxy) for _ in range(200)]
    for index, w in enumerate(clients):
        do(w, f"LISTEN everyone; LISTEN c{index % 7}")
    assert pg.count() <= 3
    with raw(proxy) as a, raw(proxy) as b:
        do(a, "BEGIN")
        do(b, "BEGIN")
        assert b.value("SELECT 1") == "1"
        do(a, "COMMIT")
        do(b, "COMMIT")
    notify(pg, "c3", "some")
    notify(pg, "everyone", "all")
    for index, w in enumerate(clients):
        expected = [("everyone", "all")] if index % 7 != 3 else [("c3", "some"), ("everyone", "all")]
        assert notified([w.recv() for _ in expected]) == expected
    stats = listening(proxy)
    assert (stats["clients"], stats["channels"]) == (200, 8)
    assert "pgsidecar_listening_clients" in proxy.http("/metrics")[2]
    for w in clients:
        w.sock.close()
    harness.poll(lambda: listening(proxy)["clients"] == 0 and listening(proxy)["channels"] == 0, what="all are unsubscribed")


@pytest.mark.parametrize("statements,expected", [
    (["BEGIN", "LISTEN b", "COMMIT"], "a,b"),
    (["BEGIN", "LISTEN b", "ROLLBACK"], "a"),
    (["BEGIN", "UNLISTEN a", "COMMIT"], ""),
    (["BEGIN", "UNLISTEN a", "ROLLBACK"], "a"),
    (["BEGIN", "UNLISTEN *", "LISTEN a", "LISTEN c", "COMMIT"], "a,c"),
    (["BEGIN", "UNLISTEN *", "LISTEN c", "ROLLBACK"], "a"),
    (["BEGIN", "UNLISTEN *", "COMMIT"], ""),
    (["BEGIN", "SAVEPOINT s", "LISTEN b", "ROLLBACK TO s", "COMMIT"], "a"),
    (["BEGIN", "LISTEN b", "SAVEPOINT s", "UNLISTEN a", "ROLLBACK TO s", "COMMIT"], "a,b"),
    (["BEGIN", "LISTEN b", "SAVEPOINT s", "UNLISTEN a", "RELEASE s", "COMMIT"], "b"),
    (["BEGIN; LISTEN b; COMMIT"], "a,b"),
    (["BEGIN; UNLISTEN a; ROLLBACK; LISTEN c"], "a,c"),
    (["LISTEN b; LISTEN c"], "a,b,c"),
    (["DO $$BEGIN LISTEN b; UNLISTEN a; END$$"], "b"),
    (["DISCARD ALL"], ""),
])
@pytest.mark.parametrize("say", [do, extended], ids=["simple", "extended"])
def test_listen_is_transactional(pool, pg, say, statements, expected):
    with raw(pool) as w:
        do(w, "LISTEN a")
        for sql in statements:
            (do if ";" in sql and not sql.startswith("DO") else say)(w, sql)
        assert w.value(CHANNELS) == expected
        do(w, "LISTEN fence_of_the_test")
        for channel in "abc":
            notify(pg, channel, channel)
        assert settled(pg, w) == [(c, c) for c in "abc" if c in expected.split(",")]


def test_an_error_undoes_listen(pool, pg):
    with raw(pool) as w:
        do(w, "LISTEN a")
        assert "E" in [m.type for m in w.ask(wire.query("UNLISTEN a; LISTEN b; SELECT 1/0"))]
        assert w.value(CHANNELS) == "a"
        assert "E" in [m.type for m in w.ask(wire.parse("LISTEN b"), wire.bind(), wire.execute(), wire.parse("SELECT 1/0"), wire.bind(), wire.execute(), wire.SYNC)]
        assert w.value(CHANNELS) == "a"
        w.send(*(wire.parse(sql) + wire.bind() + wire.execute() for sql in ("SELECT 1", "UNLISTEN a", "LISTEN b")), wire.SYNC)
        assert "E" not in [m.type for m in w.until()]
        assert w.value(CHANNELS) == "b"
        w.send(*(wire.query(sql) for sql in ("BEGIN", "LISTEN c", "COMMIT", "UNLISTEN b", "BEGIN", "UNLISTEN c", "ROLLBACK")))
        for _ in range(7):
            assert "E" not in [m.type for m in w.until()]
        assert w.value(CHANNELS) == "c"


def test_what_cannot_be_had_fails_clearly(pool, pg):
    with raw(pool) as w:
        do(w, "LISTEN a")
        for frames in ([wire.query(CHANNELS)], [wire.parse(CHANNELS), wire.bind(), wire.execute(), wire.SYNC]):
            do(w, "BEGIN")
            messages = w.ask(*frames)
            assert [m.error["C"] for m in messages if m.type == "E"] == ["0A000"]
            assert messages[-1].body == b"E"  # as after any error
            do(w, "ROLLBACK")
        do(w, "BEGIN")
        do(w, "SAVEPOINT s")
        do(w, "UNLISTEN a")
        do(w, "ROLLBACK TO s")
        assert [m.error["C"] for m in w.ask(wire.query("UNLISTEN a")) if m.type == "E"] == ["0A000"]
        do(w, "ROLLBACK")
        assert w.value(CHANNELS) == "a"


@pytest.mark.parametrize("say", [do, extended], ids=["simple", "extended"])
def test_own_notifications_come_before_ready(pool, pg, say):
    with raw(pool) as w, raw(pool) as other:
        do(other, "LISTEN a")
        messages = do(w, "LISTEN a; NOTIFY a, '0'")
        assert notified(messages) == [("a", "0")] and pids(messages) == [w.pid]
        for number, sql in enumerate(["NOTIFY a, '%d'", "SELECT pg_notify('a', '%d')", "SELECT 1; NOTIFY a, '%d'" if say is do else "NOTIFY a, '%d'"]):
            messages = say(w, sql % number)
            assert notified(messages) == [("a", str(number))]
            assert pids(messages) == [w.pid]
        do(w, "BEGIN")
        assert not notified(do(w, "NOTIFY a, 'in'"))
        assert not notified(do(w, "SELECT 1"))
        assert notified(do(w, "COMMIT")) == [("a", "in")]
        do(w, "BEGIN")
        do(w, "NOTIFY a, 'undone'")
        assert not notified(do(w, "ROLLBACK"))
        messages = do(w, "LISTEN b; NOTIFY a, 'x'; NOTIFY b, 'y'; NOTIFY a, 'z'")
        assert notified(messages) == [("a", "x"), ("b", "y"), ("a", "z")]
        do(w, "BEGIN")
        do(w, "NOTIFY a, '1'")
        do(w, "UNLISTEN b")
        do(w, "NOTIFY a, '2'")
        do(w, "NOTIFY b, '3'")
        messages = do(w, "COMMIT")
        assert notified(messages) == [("a", "1"), ("a", "2")]
        seen = [other.recv() for _ in range(9)]
        assert [p for _, p in notified(seen)] == ["0", "0", "1", "2" if say is do else "2", "in", "x", "z", "1", "2"]
        assert other.pid not in pids(seen)


def test_own_notification_of_a_trigger(pool, pg):
    pg.sql("""DROP TABLE IF EXISTS noticed; CREATE TABLE noticed (a int); GRANT ALL ON noticed TO app;
              CREATE OR REPLACE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_notify('a', NEW.a::text); RETURN NEW; END$$;
              CREATE TRIGGER tell AFTER INSERT ON noticed FOR EACH ROW EXECUTE FUNCTION tell()""", database=DATABASE)
    with raw(pool) as w:
        do(w, "LISTEN a")
        assert notified(do(w, "INSERT INTO noticed VALUES (1), (2)")) == [("a", "1"), ("a", "2")]
        assert notified(extended(w, "INSERT INTO noticed VALUES (3)")) == [("a", "3")]


def test_many_begin_to_listen_at_once(pool, pg):
    """Each with settings of its own, so that each lease begins with giving the session those; who is first makes the listener."""
    for round in range(4):
        def client(index):
            with raw(pool, application_name=f"client{index}") as w:
                for turn in range(3):
                    do(w, f"LISTEN all_of_them; LISTEN own_{index}")
                    for token in range(3):
                        heard = notified(do(w, f"NOTIFY own_{index}, '{turn} {token}'; NOTIFY all_of_them, '{index}'"))
                        assert (f"own_{index}", f"{turn} {token}") in heard and ("all_of_them", str(index)) in heard
                    do(w, "UNLISTEN *")

        harness.threads(12, client)
    harness.poll(lambda: listening(pool)["clients"] == 0, what="nobody listens")


def test_own_notifications_while_the_listener_begins(pool, pg):
    """The first client's connection becomes the listener's: what it does next finds that still being set up."""
    pg.sql("CREATE TABLE IF NOT EXISTS told(a int); GRANT ALL ON told TO PUBLIC; "
           "CREATE OR REPLACE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_notify('c', NEW.a::text); RETURN NEW; END$$; "
           "CREATE OR REPLACE TRIGGER tell AFTER INSERT ON told FOR EACH ROW EXECUTE FUNCTION tell()", database=DATABASE)
    with raw(pool) as w:
        for notifies in ("NOTIFY c, '1'; NOTIFY other", "INSERT INTO told VALUES (1)", "SELECT pg_notify('c', '1')", "BEGIN; NOTIFY c, '1'; COMMIT") * 20:
            do(w, "LISTEN c; LISTEN d")
            assert notified(do(w, notifies)) == [("c", "1")], notifies
            do(w, "UNLISTEN *")


def test_only_between_transactions(pool, pg):
    with raw(pool) as w:
        do(w, "LISTEN a")
        do(w, "BEGIN")
        notify(pg, "a", "1")
        assert not notified(do(w, "SELECT pg_sleep(0.1)"))
        assert not pending(w, 0.1)
        notify(pg, "a", "2")
        time.sleep(0.1)
        messages = do(w, "COMMIT")
        assert notified(messages) == [("a", "1"), ("a", "2")]
        assert [m.type for m in messages] == ["C", "A", "A", "Z"]


def test_with_every_transaction_examined(proxies, pg):
    proxy = proxies({"pool": {"max": 3, "residueCheck": "always"}})
    with raw(proxy) as w:
        do(w, "LISTEN a")
        assert notified(do(w, "NOTIFY a, '1'")) == [("a", "1")]
        assert w.value(CHANNELS) == "a"
        do(w, "UNLISTEN a")
        harness.poll(lambda: proxy.stats()["activeCount"] == 0, what="its connections are free")


def test_payload_of_any_length(pool, pg):
    with raw(pool) as w:
        do(w, "LISTEN a")
        for payload in ("", "é" * 3999, "x" * 7999):
            notify(pg, "a", payload)
            assert notified([w.recv()]) == [("a", payload)]
            assert notified(do(w, f"NOTIFY a, '{payload}'")) == [("a", payload)]


def test_functions_that_listen(pool, pg):
    pg.sql("""CREATE OR REPLACE FUNCTION hear(c text) RETURNS void LANGUAGE plpgsql AS $$BEGIN EXECUTE format('LISTEN %I', c); END$$;
              CREATE OR REPLACE FUNCTION ignore(c text) RETURNS void LANGUAGE plpgsql AS $$BEGIN EXECUTE format('UNLISTEN %I', c); END$$;
              CREATE OR REPLACE FUNCTION tell(c text) RETURNS void LANGUAGE plpgsql AS $$BEGIN EXECUTE format('NOTIFY %I', c); END$$""", database=DATABASE)
    with raw(pool) as w:
        for _ in range(2):
            do(w, "SELECT hear('a')")
            do(w, "SELECT hear('b')")
            assert w.value(CHANNELS) == "a,b"
            assert notified(do(w, "SELECT tell('a')")) == [("a", "")]
            do(w, "SELECT ignore('a')")
            assert w.value(CHANNELS) == "b"
            do(w, "SELECT ignore('b')")
            assert w.value(CHANNELS) == ""


def test_pinned_clients_listen_too(pool, pg):
    with raw(pool) as w, raw(pool) as other:
        do(w, "CREATE TEMP TABLE mine (a int)")
        do(w, "LISTEN a")
        notify(pg, "a", "1")
        assert notified([w.recv()]) == [("a", "1")]
        do(other, "LISTEN a")
        do(w, "LISTEN b")
        notify(pg, "b", "2")
        notify(pg, "a", "3")
        assert notified([w.recv(), w.recv()]) == [("b", "2"), ("a", "3")]
        assert w.value(CHANNELS) == "a,b"
        assert notified(do(w, "NOTIFY b, '4'")) == [("b", "4")]
        do(w, "DROP TABLE mine")
        notify(pg, "a", "5")
        assert notified([w.recv()]) == [("a", "5")]
        assert w.value(CHANNELS) == "a,b"


def test_pool_of_one_connection_pins(proxies, pg):
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 500}})
    with raw(proxy) as w, raw(proxy) as other:
        do(w, "LISTEN a")
        notify(pg, "a", "1")
        assert notified([w.recv()]) == [("a", "1")]
        assert w.value(CHANNELS) == "a"
        assert [m.error["C"] for m in other.ask(wire.query("SELECT 1")) if m.type == "E"] == ["53300"]
        do(w, "UNLISTEN a")
        assert other.value(CHANNELS) == ""


def test_a_pool_that_becomes_one_connection(proxies, pg):
    """It has none to spare any more: who listens hears of it, and can listen again."""
    proxy = proxies({"pool": {"max": 3, "connectionTimeoutMillis": 10000}})
    with raw(proxy) as w, raw(proxy) as other:
        do(w, "LISTEN a")
        harness.poll(lambda: listening(proxy)["clients"] == 1)
        proxy.write_config(harness.merge(proxy.config, {"pool": {"max": 1}}))
        proxy.signal(signal.SIGHUP)
        assert other.value("SELECT 1") == "1"
        harness.poll(lambda: pg.count("usename = 'app'") <= 1)
        assert other.value("SELECT 1") == "1"
        assert w.until("E")[-1].error["C"] == "57P01"
        w.closed()
    with raw(proxy) as w:
        do(w, "LISTEN a")
        notify(pg, "a", "1")
        assert notified([w.recv()]) == [("a", "1")]


def test_lost_listener_comes_back_and_says_so(pool, pg):
    with raw(pool) as w, raw(pool) as quiet:
        do(w, "LISTEN a")
        for losses in range(1, 4):
            harness.poll(lambda: pg.sql(KILL_LISTENER), what="the listening backend is there")
            message = w.recv()
            assert message.type == "N" and message.error["S"] == "WARNING" and "notifications may have been lost" in message.error["M"]
            notify(pg, "a", str(losses))
            assert notified([w.recv()]) == [("a", str(losses))]
            assert listening(pool)["losses"] == losses
            assert w.value(CHANNELS) == "a"
        assert quiet.value("SELECT 1") == "1"
        assert not pending(quiet)
    assert "pgsidecar_listener_losses_total" in pool.http("/metrics")[2]


@pytest.mark.parametrize("change", ["UNLISTEN *", "LISTEN b"])
@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_changes_in_a_transaction_with_a_lost_listener(pool, pg, change, end, when):
    """Whether they were committed may not be known then. The client is told so at the latest at the end of the transaction."""
    with raw(pool) as w:
        do(w, "LISTEN a")
        do(w, "BEGIN")
        if when == "after":
            do(w, change)
        harness.poll(lambda: pg.sql(KILL_LISTENER), what="the listening backend is there")
        harness.poll(lambda: listening(pool)["losses"] == 1, what="its loss is known")
        if when == "before":
            do(w, change)
        w.send(wire.query(end))
        messages = w.until("EZ")
        if messages[-1].type == "E":
            assert (messages[-1].error["S"], messages[-1].error["C"]) == ("FATAL", "58000")
            assert (change, end) != ("LISTEN b", "COMMIT"), "the connection itself listens to b then"
        else:
            committed = "a,b" if change == "LISTEN b" else ""
            assert w.value(CHANNELS) == (committed if end == "COMMIT" else "a")
    harness.poll(lambda: listening(pool)["clients"] == 0 and listening(pool)["channels"] == 0, what="all are unsubscribed")


def test_all_connections_lost_under_listening_clients(pool, pg):
    clients = [raw(pool) for _ in range(20)]
    for w in clients:
        do(w, "LISTEN a")
    for _ in range(3):
        pg.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE client_port > 0")
        for w in clients:
            assert w.recv().error["S"] == "WARNING"
        # It may have been one that was on its way out too; then they are told again.
        time.sleep(0.3)
        for w in clients:
            assert {m.type for m in pending(w)} <= {"N"}
        notify(pg, "a", "x")
        for w in clients:
            assert notified([w.recv()]) == [("a", "x")]
            assert w.value(CHANNELS) == "a"
    for w in clients:
        w.sock.close()


def test_changes_while_the_listener_is_lost(proxies, pg):
    """Nobody holds on to what the listener needs to come back."""
    proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 20000}})
    running = threading.Event()
    running.set()

    def kill():
        with pg.admin() as admin:
            while running.is_set():
                admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query ~ 'LISTEN' AND client_port > 0")
                time.sleep(0.05)

    def work(index):
        rng = random.Random(index)
        for _ in range(5):
            try:
                with raw(proxy) as w:
                    for _ in range(20):
                        w.ask(wire.query(rng.choice(["LISTEN a", "LISTEN b", "UNLISTEN a", "UNLISTEN *", "BEGIN", "COMMIT", CHANNELS, "NOTIFY b"])))
            except (wire.Closed, ConnectionError):
                pass  # its own connection was the one

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        harness.threads(8, work)
    finally:
        running.clear()
        killer.join()
    with raw(proxy) as w:
        do(w, "LISTEN a")
        notify(pg, "a", "1")
        assert ("a", "1") in notified(w.until("A"))
    harness.poll(lambda: listening(proxy)["clients"] == 0 and listening(proxy)["channels"] == 0, what="all are unsubscribed")


def test_server_restart(proxies, pg):
    proxy = proxies({"pool": {"max": 3, "connectionTimeoutMillis": 30000}})
    with raw(proxy) as w:
        w.sock.settimeout(60)
        do(w, "LISTEN a")
        pg.restart()
        assert w.recv().error["S"] == "WARNING"
        notify(pg, "a", "1")
        assert notified([w.recv()]) == [("a", "1")]


def test_a_client_that_leaves_is_forgotten(pool, pg):
    with raw(pool) as stays:
        do(stays, "LISTEN b")
        for how in range(4):
            w = raw(pool)
            do(w, "LISTEN a")
            if how == 1:
                w.send(wire.TERMINATE)
            if how == 2:
                w.send(wire.query("UNLISTEN a"))
            if how == 3:
                do(w, "BEGIN")
                do(w, "UNLISTEN a")
            w.sock.close()
            harness.poll(lambda: listening(pool)["clients"] == 1 and listening(pool)["channels"] == 1, what="it is forgotten")
        notify(pg, "a", "1")
        notify(pg, "b", "2")
        assert notified([stays.recv()]) == [("b", "2")]
        assert stays.value(CHANNELS) == "b"
        for _ in range(4):
            with raw(pool) as other:
                assert other.value(CHANNELS) == ""


def test_a_client_that_does_not_take_its_notifications_is_ended(pool, pg):
    with raw(pool) as slow, raw(pool) as busy, raw(pool) as good:
        for w in (slow, busy, good):
            do(w, "LISTEN a")
        do(busy, "BEGIN")
        with pg.admin(DATABASE) as sender:
            received = 0
            for _ in range(4000):
                sender.execute("SELECT pg_notify('a', repeat('x', 7000) || %s)", (str(received),))
                good.recv()
                received += 1
                if listening(pool)["overflows"] == 2:
                    break
        assert listening(pool)["overflows"] == 2
        for w in (slow, busy):
            assert [m.error["C"] for m in w.closed() if m.type == "E"][-1:] in (["53400"], [])
        assert good.value("SELECT 1") == "1"


def test_reload_and_drain_with_listening_clients(proxies, pg):
    proxy = proxies({"pool": {"max": 3}})
    w, idle = raw(proxy), raw(proxy)
    do(w, "LISTEN a")
    do(idle, "LISTEN b")
    proxy.write_config(harness.merge(proxy.config, {"upstream": {"options": "-c work_mem=9MB"}}))
    proxy.signal(1)
    assert w.recv().error["S"] == "WARNING"  # another server it may be
    notify(pg, "a", "1")
    assert notified([w.recv()]) == [("a", "1")]
    started = time.monotonic()
    assert proxy.stop() == 0
    assert time.monotonic() - started < 5
    assert [m.error["C"] for m in w.closed() if m.type == "E"] == ["57P01"]


def test_exactly_once_and_in_order_while_clients_come_and_go(proxies, pg):
    """Each client follows a steady stream of numbers. From the moment that LISTEN is acknowledged it misses none, sees none twice."""
    proxy = proxies({"pool": {"max": 4, "connectionTimeoutMillis": 60000}})
    running = threading.Event()
    running.set()
    sent = [0]

    def send():
        with pg.admin(DATABASE) as sender:
            while running.is_set():
                sent[0] += 1
                sender.execute("SELECT pg_notify(%s, %s)", ("even" if sent[0] % 2 == 0 else "odd", str(sent[0])))

    def follow(index):
        rng = random.Random(index)
        seen, errors = [], []
        with raw(proxy) as w:
            w.sock.settimeout(30)

            def say(sql):
                messages = do(w, sql)
                seen.extend(int(p) for _, p in notified(messages))

            for _ in range(15):
                first, second = rng.choice([("odd", "even"), ("even", "odd")])
                seen.clear()
                say(f"LISTEN {first}")
                after_first = sent[0] + 2  # sent after the acknowledgement for sure
                for _ in range(rng.randrange(3)):
                    say(rng.choice(["SELECT 1", "SELECT pg_sleep(0.01)", "SET work_mem = '5MB'", "SELECT count(*) FROM pg_listening_channels()"]))
                if rng.random() < 0.5:
                    say("BEGIN")
                    say(f"LISTEN {second}")
                    say("COMMIT")
                else:
                    say(f"LISTEN {second}")
                after_second = sent[0] + 2
                for _ in range(rng.randrange(3)):
                    say(rng.choice(["SELECT 1", "BEGIN; SELECT pg_sleep(0.02); COMMIT", "NOTIFY elsewhere", "LISTEN odd", "BEGIN; LISTEN odd; ROLLBACK"]))
                until = sent[0] + 20
                while not seen or seen[-1] < until:
                    seen.extend(int(p) for _, p in notified([w.recv()]))
                if rng.random() < 0.5:
                    say(f"UNLISTEN {first}")
                    last = len(seen)
                    for _ in range(20):
                        seen.extend(int(p) for _, p in notified([w.recv()]))
                    parity = 1 if first == "odd" else 0
                    if any(n % 2 == parity for n in seen[last:]):
                        errors.append(("after UNLISTEN", first, seen[last:]))
                    checked = [n for n in seen if n <= until]
                    rest = [n for n in seen if n > until and n % 2 != parity]
                    if rest != list(range(rest[0], rest[-1] + 1, 2)):
                        errors.append(("the other channel", rest))
                else:
                    checked = seen
                if seen != sorted(set(seen)):
                    errors.append(("order or twice", list(seen)))
                parity = 1 if first == "odd" else 0
                own = [n for n in checked if n % 2 == parity]
                if own and (own != list(range(own[0], own[-1] + 1, 2)) or own[0] > after_first + 1):
                    errors.append(("first", after_first, own))
                both = [n for n in checked if n >= after_second]
                if both and (both != list(range(both[0], both[-1] + 1)) or both[0] > after_second + 1):
                    errors.append(("both", after_second, both))
                say("UNLISTEN *")
                before = len(seen)
                say("SELECT 1")
                if len(seen) != before or pending(w):
                    errors.append(("after UNLISTEN *", seen[before:]))
        return errors

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        assert [e for errors in harness.threads(12, follow) for e in errors] == []
    finally:
        running.clear()
        sender.join()
    assert listening(proxy)["clients"] == 0


def test_psycopg(pool, pg):
    with pool.connect() as listener, pool.connect(autocommit=False) as sender:
        listener.execute("LISTEN a")
        seen = []
        listener.add_notify_handler(lambda n: seen.append((n.channel, n.payload)))
        for number in range(20):
            sender.execute("SELECT pg_notify('a', %s)", (str(number),))
            sender.commit()
            listener.execute("SELECT 1")
        harness.poll(lambda: listener.execute("SELECT 1") and len(seen) == 20, what="all have come")
        assert seen == [("a", str(n)) for n in range(20)]
        for _ in range(8):  # prepared by then
            assert listener.execute(CHANNELS).fetchone() == ("a",)
        with listener.transaction():
            listener.execute("UNLISTEN a")
        sender.execute("NOTIFY a")
        sender.commit()
        listener.execute("SELECT 1")
        assert len(seen) == 20


def test_asyncpg(pool, pg):
    asyncpg = pytest.importorskip("asyncpg")

    async def run():
        connection = await asyncpg.connect(host="127.0.0.1", port=pool.port, user=USER, password=PASSWORD, database=DATABASE, ssl=False)
        seen = asyncio.Queue()
        await connection.add_listener("a", lambda _, pid, channel, payload: seen.put_nowait((pid, channel, payload)))
        for number in range(20):
            await connection.execute("SELECT pg_notify('a', $1)", str(number))
            assert await asyncio.wait_for(seen.get(), 5) == (connection.get_server_pid(), "a", str(number))
        await connection.reset()
        await connection.execute("NOTIFY a")
        assert seen.empty()
        await connection.close()

    asyncio.run(run())


@pytest.mark.parametrize("text", [f"ALTER DATABASE {DATABASE} SET work_mem = '4MB'", f"CREATE DATABASE {DATABASE}_copy TEMPLATE {DATABASE}"])
def test_what_is_done_with_databases_loses_no_notification(proxies, pg, text):
    proxy = proxies({"pool": {"max": 4}})
    with raw(proxy) as w, raw(proxy) as other:
        do(w, "LISTEN kept")
        other.ask(wire.query(text))  # fails, if nothing else
        do(other, "NOTIFY kept, 'it'")
        harness.poll(lambda: w.ready(), 5, "a notification")
        messages = pending(w, 0.2)
        assert notified(messages) == [("kept", "it")] and not [m for m in messages if m.type == "N"]
