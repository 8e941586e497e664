"""What comes in the middle of messages, behind them and together with them: answers of the proxy's own, ends, waits, limits."""
import re
import socket
import ssl
import time

import pytest

import harness
import wire
from harness import DATABASE, PASSWORD, USER, poll, raw
from test_cancel import send_cancel
from test_reload import reload, tls_to_clients
from wire import healthy, kinds


@pytest.fixture
def table(pg):
    pg.sql("DROP TABLE IF EXISTS between; CREATE TABLE between (a int); GRANT ALL ON between TO app", database=DATABASE)
    return lambda: pg.sql("SELECT count(*) FROM between", database=DATABASE)[0][0]


# ---- in the middle of a message

@pytest.mark.parametrize("described", ["S", "P"])
def test_a_reply_of_the_proxys_waits_for_the_end_of_a_message(proxies, described):
    proxy = proxies({"pool": {"max": 1}})
    wide = "SELECT " + ", ".join(f'1 AS "c{n:04}{"x" * 55}"' for n in range(1500))  # its description takes several reads
    with raw(proxy) as w:
        w.ask(wire.parse("SELECT 1", "known"), wire.SYNC)
        bound = (wire.bind(),) if described == "P" else ()
        messages = w.ask(wire.parse(wide), *bound, wire.describe(described), wire.close("S", "known"), wire.parse("SELECT 1", "again"), wire.SYNC)
        assert kinds(messages) == ("12T31Z" if bound else "1tT31Z")
        healthy(w)


@pytest.mark.parametrize("before", ["LISTEN a", "UNLISTEN a"])
def test_what_comes_together_with_the_end_of_a_failed_copy(proxies, table, before):
    proxy = proxies({"pool": {"max": 3}})
    with raw(proxy) as w:
        data = wire.copy_data(b"1\n" * 2000)
        w.send(wire.query(before), wire.query("COPY between FROM STDIN"), wire.copy_data(b"bad\n"), data[:2000])
        assert kinds(w.until() + w.until("E")) == "CZGE"
        time.sleep(0.1)  # in which its ReadyForQuery comes, too
        w.send(data[2000:], wire.COPY_DONE, wire.query("SELECT 1"), wire.query("SELECT 2"))
        assert [kinds(w.until()) for _ in range(3)] == ["Z", "TDCZ", "TDCZ"]
        healthy(w)


@pytest.mark.parametrize("what", ["execute", "query"])
def test_half_a_message_is_never_completed(proxies, table, what):
    """Whatever the proxy sends then would be read as its rest."""
    proxy = proxies({"pool": {"max": 2}, "limits": {"maxParseBytes": 65536}})
    with raw(proxy) as w:
        if what == "execute":
            w.send(wire.parse("INSERT INTO between VALUES (1)"), wire.bind(), wire.execute()[:-4])
        else:
            w.send(wire.query(f"/*{'x' * 70000}*/ INSERT INTO between SELECT 1 AS ab")[:-2])
        poll(lambda: proxy.stats()["totalCount"] > 0, 5, "a server connection is open")
        time.sleep(0.2)
    poll(lambda: proxy.stats()["totalCount"] == 0, 10, "the server connection is closed")
    assert table() == 0


def test_half_a_commit_is_none(proxies, table):
    """It isn't sent before it is whole, so that the server connection is kept."""
    proxy = proxies({"pool": {"max": 1}})
    with raw(proxy) as w:
        w.ask(wire.query("BEGIN; INSERT INTO between VALUES (1)"))
        first = proxy.json("/api/monitoring/servers")[1]["servers"][0]["id"]
        w.send(wire.parse("COMMIT"), wire.bind(), wire.execute()[:-4])
        time.sleep(0.2)
    poll(lambda: proxy.stats()["idleCount"] == 1, 10, "the transaction is rolled back")
    assert table() == 0 and proxy.json("/api/monitoring/servers")[1]["servers"][0]["id"] == first


# ---- who reads no more

@pytest.fixture
def without_tls():
    with harness.Postgres(plain=True) as server:
        yield server


def test_a_server_connection_is_read_after_a_client_that_took_nothing(proxies, without_tls):
    """Its answer came in whole, while half a message of the client's was still to come."""
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 3000}}, server=without_tls, url=without_tls.url(sslmode="disable"))

    def received():
        return int(sum(float(n) for n in re.findall(r'^pgsidecar_received_bytes_total\S*side=.server.}\s(\S+)', harness.curl(proxy, "/metrics")[1], re.M)))

    def ask(last):
        return wire.query(f"SELECT repeat('x', 1000) FROM generate_series(1, 387) UNION ALL SELECT repeat('y', {last})")

    with raw(proxy) as w:
        w.ask(wire.query("SELECT 1"))
        poll(lambda: received() == received(), 5, "nothing comes any more")
        before = received()
        w.ask(ask(500))
        poll(lambda: received() - before > 380000, 5, "the answer is counted")
        last = 500 + 6 * 65536 - (received() - before)  # so that the proxy's reads are all full
    for size in (6000, 8192, 10000, 12000) * 2:
        with socket.socket() as s:
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
            s.settimeout(10)
            s.connect(("127.0.0.1", proxy.port))
            w = wire.Wire.__new__(wire.Wire)
            w.sock, w.buffer, w.parameters = s, b"", {}
            assert w.login(USER, PASSWORD, DATABASE) is None
            data = wire.copy_data(b"x" * 2000)  # as the rest of a COPY that has failed
            w.send(ask(last), data[:1000])
            time.sleep(0.1)
            got = len(w.buffer)
            while got < 60000:
                got += len(s.recv(4096))
            time.sleep(0.05)
            w.send(data[1000:])
            with raw(proxy, timeout=8) as other:
                assert kinds(other.ask(wire.query("SELECT 1")))[-1] == "Z"


class TlsInOneWrite:
    """A socket whose records of one call leave in one write to the kernel."""

    def __init__(self, sock, context):
        self.sock, self.incoming, self.outgoing = sock, ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing)
        while True:
            try:
                self.tls.do_handshake()
                return self.flush()
            except ssl.SSLWantReadError:
                self.flush()
                self.incoming.write(self.sock.recv(65536))

    def flush(self):
        self.sock.sendall(self.outgoing.read())

    def sendall(self, data):
        self.tls.write(data[:100])  # records that end elsewhere than at 16 KB
        for at in range(100, len(data), 16000):
            self.tls.write(data[at:at + 16000])
        self.flush()

    def recv(self, size):
        while True:
            try:
                return self.tls.read(size)
            except ssl.SSLWantReadError:
                self.incoming.write(self.sock.recv(65536))

    def close(self):
        self.sock.close()


def test_a_client_over_tls_that_sends_much_while_it_waits(proxies, pg):
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 20000}, **tls_to_clients(pg.certificates)})
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for n in range(8):
        with raw(proxy) as holder, wire.Wire(proxy.port, timeout=10) as w:
            holder.ask(wire.query("BEGIN"))
            w.send(wire.request(wire.SSL_REQUEST))
            assert w.bytes(1) == b"S"
            w.sock = TlsInOneWrite(w.sock, context)
            assert w.login(USER, PASSWORD, DATABASE) is None
            w.send(wire.query("SELECT 1"))
            time.sleep(0.05)
            w.send(wire.query(f"SELECT length('{'x' * 65000}')"), wire.query(f"SELECT length('{'y' * (500 + 137 * n)}')"))
            time.sleep(0.05)
            holder.ask(wire.query("COMMIT"))
            assert [kinds(w.until()) for _ in range(3)] == ["TDCZ"] * 3


# ---- who waits for what

def test_a_simple_query_ends_what_was_sent_without_a_sync(proxies, pg):
    proxy = proxies({"pool": {"max": 2, "connectionTimeoutMillis": 3000}})
    with raw(proxy) as w, raw(proxy) as other:
        w.send(wire.parse("SELECT 1", "a"), wire.FLUSH)
        assert kinds(w.until("1")) == "1"
        w.value("SELECT 2")
        poll(lambda: proxy.stats()["activeCount"] == 0, 5, "its server connection is given back")
        w.ask(wire.query("LISTEN between"))
        w.send(wire.parse("SELECT 1", "b"), wire.FLUSH)
        w.until("1")
        w.value("SELECT 3")
        other.ask(wire.query("NOTIFY between, 'heard'"))
        assert b"heard" in w.until("A")[-1].body
        w.send(wire.parse("SELEC", "c"), wire.query("SELECT 4"))  # the server skips it
        assert kinds(w.until("E")) == "E"
        assert kinds(w.ask(wire.SYNC)) == "Z"
        healthy(w)


@pytest.mark.parametrize("query", ["EXECUTE n", "DEALLOCATE n", "RESET work_mem"])
def test_a_simple_query_behind_what_has_failed(proxies, table, query):
    """The server skips all of it up to the client's Sync."""
    proxy = proxies({"pool": {"max": 2}})
    with raw(proxy, options="-c work_mem=5MB") as w:
        w.ask(wire.parse("SELECT 'n'", "n"), wire.SYNC)
        w.send(wire.parse("SELECT 1/0"), wire.bind(), wire.execute(), wire.query(query),
               wire.parse("INSERT INTO between VALUES (1)"), wire.bind(), wire.execute(), wire.SYNC)
        assert kinds(w.until()) == "1EZ"
        assert kinds(w.ask(wire.bind("n"), wire.execute(), wire.SYNC)) == "2DCZ"
        assert w.value("SHOW work_mem") == "5MB" and table() == 0


def test_a_cancel_while_the_rest_of_a_copy_is_kept(proxies, pg):
    proxy = proxies({"pool": {"max": 2}})
    with raw(proxy) as w:
        w.value("SELECT set_config('work_mem', '2MB', false)")
        with pg.admin(DATABASE) as admin, admin.transaction():
            admin.execute("LOCK pg_catalog.pg_class IN ACCESS EXCLUSIVE MODE")  # what the proxy asks takes its time
            w.ask(wire.query("SET work_mem = '3MB'"))
            w.send(wire.copy_data(b"1\n"), wire.COPY_DONE)
            time.sleep(0.2)
            send_cancel(proxy, w)
        assert kinds(w.ask(wire.query("SELECT 42"))) == "TDCZ"


SLEEP = wire.query("SELECT pg_sleep(20)")


@pytest.mark.parametrize("frames,before", [
    ([wire.query("SELECT 1"), SLEEP], 1),
    ([wire.parse("SELECT 1"), wire.bind(), wire.execute(), wire.SYNC, wire.parse("SELECT pg_sleep(20)"), wire.bind(), wire.execute(), wire.SYNC], 1),
    ([wire.query("BEGIN"), SLEEP], 1),
    ([wire.query("SET work_mem = '5MB'"), SLEEP], 1),
    ([wire.parse("SELECT pg_sleep(20)", "named"), wire.SYNC, wire.query("EXECUTE named")], 1)], ids=["simple", "extended", "transaction", "set", "execute"])
def test_the_query_timeout_counts_behind_other_answers(proxies, frames, before):
    proxy = proxies({"pool": {"max": 2, "queryTimeoutMillis": 1000}})
    with raw(proxy, timeout=10) as w:
        w.send(*frames)
        for _ in range(before):
            w.until()
        error = next(m.error for m in w.until() if m.type == "E")
        assert (error["C"], error["M"]) == ("57014", "canceling statement due to query timeout")


@pytest.mark.parametrize("waits", ["for a look at its session", "for a server connection"])
def test_what_was_sent_before_a_goodbye_is_executed(proxies, table, waits):
    proxy = proxies({"pool": {"max": 1}})
    count = 20 if waits == "for a look at its session" else 1
    for _ in range(count):
        with raw(proxy) as w, raw(proxy) as holder:
            if count > 1:
                w.ask(wire.query("SET work_mem = '3MB'"))
            else:
                holder.ask(wire.query("BEGIN"))
            w.send(wire.query("INSERT INTO between VALUES (1)"), wire.TERMINATE)
            w.sock.shutdown(socket.SHUT_WR)
            if count == 1:
                time.sleep(0.2)
                holder.ask(wire.query("COMMIT"))
            w.closed()
    poll(lambda: table() == count, 10, "all rows are there")


@pytest.mark.parametrize("before,frames,rows", [
    ("SELECT 1", (wire.parse("INSERT INTO between VALUES (1)", "b"), wire.bind("b"), wire.execute(), wire.SYNC,
                  wire.query("INSERT INTO between SELECT 2 FROM pg_sleep(7)")), 2),
    ("BEGIN", (wire.close("S", "a"), wire.SYNC), 0),
])
def test_a_goodbye_behind_what_the_proxy_answers_itself(proxies, table, before, frames, rows):
    proxy = proxies({"pool": {"max": 1}})
    with raw(proxy) as w:
        w.ask(wire.parse("INSERT INTO between VALUES (1)", "a"), wire.SYNC)
        w.ask(wire.query(before))
        w.send(*frames, wire.TERMINATE)
        w.closed()
    poll(lambda: table() == rows, 15, "all rows are there")
    with raw(proxy) as w:
        healthy(w)
    assert "server_lost" not in proxy.log_text()


@pytest.mark.parametrize("message", [wire.query("SELECT 1"), wire.parse("SELECT 1"), wire.close("S", "a"), wire.SYNC])
def test_who_is_still_sending_holds_no_server_connection(proxies, message):
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 2000}})
    with raw(proxy) as slow, raw(proxy) as w:
        slow.send(message[:-1])
        time.sleep(0.1)
        healthy(w)
        slow.send(message[-1:], wire.SYNC)
        assert kinds(slow.until())[-1] == "Z"


# ---- the mode of a pool that changes

@pytest.mark.parametrize("how", ["reload", "console"])
def test_a_client_keeps_the_mode_that_it_logged_in_with(proxies, pg, how):
    def change(mode):
        if how == "reload":
            return reload(proxy, {"pool": {"mode": mode}})
        with harness.raw(proxy, user="boss", password="boss", database="pgbouncer") as console:
            assert "E" not in kinds(console.ask(wire.query(f"SET pool_mode = '{mode}'")))

    proxy = proxies({"pool": {"mode": "session", "max": 4}, "users": {USER: {"password": PASSWORD}, "boss": {"password": "boss"}},
                     "admin": {"users": ["boss"]}})
    with raw(proxy) as session, raw(proxy) as other:
        session.ask(wire.query("CREATE TEMP TABLE own (a int); INSERT INTO own VALUES (42); SET search_path = pg_temp; SELECT pg_advisory_lock(7)"))
        session.ask(wire.parse("SELECT 'kept'", "k"), wire.SYNC)
        pid = session.value("SELECT pg_backend_pid()")
        change("transaction")
        session.ask(wire.close("S", "k"), wire.parse("SELECT 'anew'", "k"), wire.SYNC)
        for _ in range(2):
            assert session.value("SELECT 1 FROM own") == "1"
            with raw(proxy) as new:
                new.value("SELECT 1")
                assert new.value("SELECT pg_backend_pid()") != pid and new.value("SHOW search_path") == '"$user", public'
        assert session.ask(wire.bind("k"), wire.execute(), wire.SYNC)[1].row == [b"anew"]
    with raw(proxy) as shared:
        shared.ask(wire.parse("SELECT 'secret'", "s"), wire.SYNC)
        assert shared.ask(wire.bind("s"), wire.execute(), wire.SYNC)[1].row == [b"secret"]
        shared.ask(wire.query("LISTEN own"))
        change("session")
        assert shared.ask(wire.bind("s"), wire.execute(), wire.SYNC)[1].row == [b"secret"]
        assert kinds(shared.ask(wire.query("UNLISTEN *"))).replace("N", "") == "CZ"  # its listener was connected anew
        with raw(proxy) as new:
            assert new.value("SELECT count(*) FROM pg_prepared_statements") == "0"
        assert shared.ask(wire.bind("s"), wire.execute(), wire.SYNC)[1].row == [b"secret"]


def test_session_mode_forgets_closed_statements(proxies):
    proxy = proxies({"pool": {"mode": "session"}, "limits": {"maxPreparedStatementsPerClient": 50}})
    with raw(proxy) as w:
        for n in range(100):
            w.ask(wire.parse(f"SELECT {n}", f"s{n}"), wire.SYNC)
        assert proxy.json("/api/monitoring/clients")[1]["clients"][0]["preparedStatements"] == 50
        for n in range(100):
            w.ask(wire.close("S", f"s{n}"), wire.SYNC)
        assert proxy.json("/api/monitoring/clients")[1]["clients"][0]["preparedStatements"] == 0
