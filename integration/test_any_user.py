"""`users: {"*": {}}`: whoever the server itself lets in, by a password that is passed on, or trusted here."""
import signal
import struct
import threading
import time

import pytest

import harness
import wire
from gate import Gate
from harness import DATABASE, OTHER_DATABASE, OTHER_PASSWORD, OTHER_USER, PASSWORD, raw
from wire import wire_error


def test_any_user_by_its_own_password(proxies, pg):
    """`users: {"*": {}}`: the server is asked whether the password is right, and pools are per user."""
    proxy = proxies({"auth": {"method": "password"}, "users": {"*": {}}, "databases": {"*": {}}, "pool": {"max": 2, "min": 0}})
    for _ in range(3):
        with proxy.connect(OTHER_USER, OTHER_PASSWORD, OTHER_DATABASE) as connection:
            assert connection.execute("SELECT session_user").fetchone() == (OTHER_USER,)
        for password in ("wrong", PASSWORD):
            error = wire_error(proxy.port, False, OTHER_USER, password, OTHER_DATABASE)
            assert (error["S"], error["C"], error["M"]) == ("FATAL", "28P01", f'password authentication failed for user "{OTHER_USER}"')
    # A wrong password costs nobody else anything, and all of this stays within `max`.
    with harness.Watch(pg, f"usename = '{OTHER_USER}'") as watch, proxy.connect(OTHER_USER, OTHER_PASSWORD, OTHER_DATABASE) as one:
        one.execute("BEGIN")
        assert wire_error(proxy.port, False, OTHER_USER, "wrong", OTHER_DATABASE)["C"] == "28P01"
        with proxy.connect(OTHER_USER, OTHER_PASSWORD, OTHER_DATABASE) as two:
            assert two.execute("SELECT 1").fetchone() == (1,)
    assert 0 < watch.most <= 2


def test_any_users_changed_password(proxies, pg):
    pg.sql("CREATE ROLE changing LOGIN PASSWORD 'old'")
    try:
        proxy = proxies({"auth": {"method": "password"}, "users": {"*": {}}, "pool": {"min": 0}})
        with proxy.connect("changing", "old") as connection:
            assert connection.execute("SELECT session_user").fetchone() == ("changing",)
        pg.sql("ALTER ROLE changing PASSWORD 'new'")
        with proxy.connect("changing", "new") as connection:
            assert connection.execute("SELECT session_user").fetchone() == ("changing",)
        assert wire_error(proxy.port, False, "changing", "old", DATABASE)["C"] == "28P01"
        proxy.stop()
    finally:
        pg.sql("DROP ROLE changing")


@pytest.fixture
def known(pg):
    pg.sql("CREATE ROLE known LOGIN PASSWORD 'known'")
    yield {"user": "known", "password": "known"}
    pg.sql("DROP ROLE known")


def end_connections(pg):
    pg.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'known'")


def test_any_user_goes_on_when_the_server_lets_it_in_again(proxies, pg, known):
    proxy = proxies({"auth": {"method": "password"}, "users": {"*": {}}, "pool": {"min": 0}})
    with raw(proxy, **known) as w:
        assert w.value("SELECT 1") == "1"
        pg.sql("ALTER ROLE known NOLOGIN")
        end_connections(pg)
        harness.poll(lambda: w.ask(wire.query("SELECT 1"))[0].type == "E")
        pg.sql("ALTER ROLE known LOGIN")
        harness.poll(lambda: w.ask(wire.query("SELECT 1"))[0].type == "T", what="it is served again")
    proxy.stop()


@pytest.mark.parametrize("why", ["changed", "reload"])
def test_any_user_is_asked_for_a_password_that_is_not_known_any_more(proxies, pg, known, why):
    users = {"known": {"password": "known"}} if why == "reload" else {"*": {}}
    proxy = proxies({"auth": {"method": "password"}, "users": users, "pool": {"min": 0}})
    with raw(proxy, **known) as w:
        assert w.value("SELECT 1") == "1"
        if why == "reload":
            proxy.write_config({**proxy.config, "users": {"*": {}}})
            proxy.signal(signal.SIGHUP)
        else:
            pg.sql("ALTER ROLE known PASSWORD 'new'")
            known["password"] = "new"
            end_connections(pg)

        def fatal():
            w.send(wire.query("SELECT 1"))
            last = w.until("ZE")[-1]
            if last.type == "E" and last.error["S"] == "ERROR":
                w.until()
            return last.type == "E" and last.error["S"] == "FATAL" and last.error
        error = harness.poll(fatal)
        assert error["C"] == "28P01" and "Connect again" in error["H"], error
        with raw(proxy, **known) as again:
            assert again.value("SELECT 2") == "2"
    proxy.stop()


def test_any_user_who_waits_is_told_when_nothing_can_be_had_any_more(proxies, pg, known):
    proxy = proxies({"auth": {"method": "password"}, "users": {"*": {}}, "pool": {"min": 0, "max": 2, "connectionTimeoutMillis": 0}})
    with raw(proxy, **known) as holder, raw(proxy, **known) as w:
        holder.ask(wire.query("BEGIN"))
        pg.sql("ALTER ROLE known PASSWORD 'new'")
        w.send(wire.query("SELECT 1"))
        harness.poll(lambda: "connect_failed" in proxy.log_text() and proxy.stats()["waitingCount"] == 1)
        end_connections(pg)
        assert w.until("E")[-1].error["S"] == "FATAL"
    proxy.stop()


def test_any_user_that_gets_an_entry_of_its_own_while_a_connection_is_opened(proxies, pg, known):
    with Gate(pg.port) as gate:
        proxy = proxies({"auth": {"method": "password"}, "users": {"*": {}}, "pool": {"min": 0}}, url=pg.url(port=gate.port, sslmode="require"))
        with raw(proxy, **known) as w:
            assert w.value("SELECT 1") == "1"
            gate.stall()
            end_connections(pg)
            gate.cut()
            w.send(wire.query("SELECT 2"))
            harness.poll(lambda: gate.count() == 1, what="a connection is being opened")
            proxy.write_config({**proxy.config, "users": {"*": {}, "known": {"password": "known"}}})
            proxy.signal(signal.SIGHUP)
            harness.poll(lambda: "[reload]" in proxy.log_text(), what="it is reloaded")
            gate.resume()
            assert "E" not in wire.kinds(w.until()), proxy.log_text()
        proxy.stop()


@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_any_users_login_beside_an_idle_connection(proxies, mode):
    """What its DateStyle means is asked by a connection of its own; the one that it is given is there already."""
    proxy = proxies({"auth": {"method": "password"}, "users": {"*": {}}, "databases": {"*": {}}, "pool": {"mode": mode, "max": 3}})
    with raw(proxy, OTHER_USER, OTHER_PASSWORD, OTHER_DATABASE) as first:
        first.value("SELECT 1")
    harness.poll(lambda: proxy.stats()["idleCount"] >= 1)
    with wire.Wire(proxy.port) as w:
        w.send(wire.startup_packet({"user": OTHER_USER, "database": OTHER_DATABASE, "DateStyle": "German", "options": "-c statement_timeout=1234"}))
        assert w.recv().body == struct.pack("!i", 3)
        answer = w.ask(wire.frame("p", wire.text(OTHER_PASSWORD)))
        assert answer[0] == wire.Message("R", struct.pack("!i", 0)), answer
        assert w.value("SHOW statement_timeout") == "1234ms"


def test_any_users_login_is_judged_anew(proxies, pg):
    """A password that the server has accepted counts for ten seconds, and while the server can't be asked."""
    pg.sql("CREATE ROLE judged LOGIN PASSWORD 'judged'")
    try:
        proxy = proxies({"auth": {"method": "password"}, "users": {"*": {}}, "pool": {"min": 0, "max": 1, "connectionTimeoutMillis": 1000}})
        with proxy.connect("judged", "judged") as holder:
            pg.sql("ALTER ROLE judged NOLOGIN")
            holder.execute("BEGIN")
            time.sleep(10.5)
            assert wire_error(proxy.port, False, "judged", "judged", DATABASE) is None  # its only place is taken
            holder.execute("COMMIT")
            error = wire_error(proxy.port, False, "judged", "judged", DATABASE)
            assert (error["S"], error["C"], error["M"]) == ("FATAL", "28000", 'role "judged" is not permitted to log in')
        pg.sql("ALTER ROLE judged LOGIN")
        assert wire_error(proxy.port, False, "judged", "judged", DATABASE) is None
        proxy.stop()
    finally:
        pg.sql("DROP ROLE judged")


@pytest.mark.parametrize("most,strangers", [(1, 2), (3, 6)])
def test_wrong_passwords_starve_nobody(proxies, most, strangers):
    proxy = proxies({"auth": {"method": "password"}, "users": {"*": {}}, "databases": {"*": {}}, "pool": {"max": most, "connectionTimeoutMillis": 2000}})
    over, tries = threading.Event(), []

    def stranger(_):
        while not over.is_set():
            tries.append(wire_error(proxy.port, False, OTHER_USER, "wrong", OTHER_DATABASE)["C"])

    def client(_):
        try:
            with proxy.connect(OTHER_USER, OTHER_PASSWORD, OTHER_DATABASE) as connection:
                deadline = time.monotonic() + 5
                while time.monotonic() < deadline:
                    assert connection.execute("SELECT 1").fetchone() == (1,)
                    time.sleep(0.02)
        finally:
            over.set()

    harness.threads(1 + strangers, lambda index: stranger(index) if index else client(index))
    assert "28P01" in tries


def test_a_stranger_who_waits_hears_of_no_other_client(proxies):
    proxy = proxies({"auth": {"method": "password"}, "users": {"*": {}}, "databases": {"*": {}}, "pool": {"max": 1, "connectionTimeoutMillis": 1000}})
    with proxy.connect(OTHER_USER, OTHER_PASSWORD, OTHER_DATABASE, application_name="secret") as holder:
        holder.execute("BEGIN")
        error = wire_error(proxy.port, False, OTHER_USER, "wrong", OTHER_DATABASE)
        assert (error["C"], error["M"]) == ("53300", "timed out after 1000 ms waiting for a server connection: 1 of 1 in use")


def test_any_user_and_database_with_trust(proxies, pg):
    """Errors are the server's own, at once."""
    hba = pg.data / "pg_hba.conf"
    before = hba.read_text()
    hba.write_text("hostssl all all 127.0.0.1/32 trust\n" + before)
    pg.sql("SELECT pg_reload_conf()")
    try:
        proxy = proxies({"databases": {"*": {}}, "users": {"*": {}}, "auth": {"method": "trust"}})
        for user, database in ((OTHER_USER, OTHER_DATABASE), ("nobody_here", DATABASE), (OTHER_USER, "no_such_database")):
            through = wire_error(proxy.port, False, user, "", database)
            direct = wire_error(pg.port, True, user, "", database)
            assert (through and through["M"], through and through["C"]) == (direct and direct["M"], direct and direct["C"])
        with proxy.connect(OTHER_USER, None, OTHER_DATABASE) as connection:
            assert connection.execute("SELECT session_user, current_database()").fetchone() == (OTHER_USER, OTHER_DATABASE)
    finally:
        hba.write_text(before)
        pg.sql("SELECT pg_reload_conf()")
