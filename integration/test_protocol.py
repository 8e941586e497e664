"""The protocol beyond what a driver does on a good day (PostgreSQL documentation, sections 55.2 and 55.7)."""
import contextlib
import hashlib
import random
import select
import struct
import threading
import time

import psycopg
import pytest

import harness
import wire
from harness import DATABASE, PASSWORD, USER, raw
from wire import healthy, kinds

pytestmark = pytest.mark.filterwarnings("ignore")


# ---- beginnings

@pytest.mark.parametrize("code", [wire.SSL_REQUEST, wire.GSSENC_REQUEST])
def test_encryption_is_declined_and_the_login_goes_on(proxy, code):
    with wire.Wire(proxy.port) as w:
        w.send(wire.request(code))
        assert w.bytes(1) == b"N"
        assert w.login(USER, PASSWORD, DATABASE) is None
        healthy(w)


def test_gss_then_ssl_then_login(proxy):
    with wire.Wire(proxy.port) as w:
        for code in (wire.GSSENC_REQUEST, wire.SSL_REQUEST):
            w.send(wire.request(code))
            assert w.bytes(1) == b"N"
        assert w.login(USER, PASSWORD, DATABASE) is None
        healthy(w)


def test_protocol_3_2(proxy):
    with wire.Wire(proxy.port) as w:
        assert w.login(USER, PASSWORD, DATABASE, version=wire.V3_2) is None
        if w.negotiated is None:
            assert 4 <= len(w.key) <= 256
        healthy(w)


@pytest.mark.parametrize("version,options", [(196608 + 9999, {}), (wire.V3_0, {"_pq_.no_such_option": "on"}), (196608 + 7, {"_pq_.a": "1", "_pq_.b": "2"})])
def test_unknown_versions_and_options_are_negotiated(proxy, version, options):
    with wire.Wire(proxy.port) as w:
        assert w.login(USER, PASSWORD, DATABASE, version=version, **options) is None
        assert w.negotiated is not None
        newest, count = struct.unpack_from("!ii", w.negotiated.body)
        # The documentation says "newest minor version"; servers send the whole version number.
        assert newest & 0xffff in (0, 2) and count == len(options)
        names = [part.decode() for part in w.negotiated.body[8:].split(b"\0") if part]
        assert sorted(names) == sorted(options)
        healthy(w)


def test_protocol_2_is_refused(proxy):
    with wire.Wire(proxy.port) as w:
        w.send(wire.request(131072, b"user\0app\0\0"))
        messages = w.closed()
        assert len(messages) <= 1
        if messages:
            assert messages[0].error["C"] == "0A000"
    with raw(proxy) as w:
        healthy(w)


def test_replication_is_its_own_or_refused(proxy):
    with wire.Wire(proxy.port) as w:
        failure = w.login(USER, PASSWORD, DATABASE, replication="true")
        assert failure is None or failure.error["S"] == "FATAL" and failure.error["C"] in ("0A000", "42501"), failure and failure.error
    with raw(proxy) as w:
        healthy(w)


@pytest.mark.parametrize("value", ["false", "OFF", "n", "f", "0", "", "bogus", "o", "falsely", "TRUE", "y", "1"])
def test_replication_is_read_as_the_server_reads_it(proxy, pg, value):
    def login(port):
        with wire.Wire(port) as w:
            if port == pg.port:
                w.send(wire.request(wire.SSL_REQUEST))
                assert w.bytes(1) == b"S"
                wire.encrypted(w)
            failure = w.login(USER, PASSWORD, DATABASE, replication=value)
            return failure and {key: failure.error[key] for key in "CMH" if key in failure.error}
    through = login(proxy.port)
    assert through["C"] == "0A000" if value in ("TRUE", "y", "1") else through == login(pg.port), through


def test_a_startup_packet_too_short_is_refused_at_once(proxy):
    for length in (0, 4, 7):
        with wire.Wire(proxy.port) as w:
            w.send(length.to_bytes(4, "big"))
            assert [m.error["C"] for m in w.closed()] == ["08P01"]


def test_parameters_and_key_are_those_of_the_server(proxy, pg):
    with raw(proxy) as w:
        assert w.parameters["server_version"].startswith("15.") and w.parameters["client_encoding"] == "UTF8"
        assert {"server_encoding", "integer_datetimes", "standard_conforming_strings", "session_authorization", "is_superuser"} <= set(w.parameters)
        assert w.parameters["session_authorization"] == USER and w.parameters["is_superuser"] == "off"
        assert w.pid and w.key


def test_byte_by_byte(small):
    """Every message split at every byte."""
    with wire.Wire(small.port, timeout=60) as w:
        whole = w.sock.sendall

        def trickle(data):
            for at in range(len(data)):
                whole(data[at:at + 1])
        send, w.send = w.send, lambda *frames: trickle(b"".join(frames))
        assert w.login(USER, PASSWORD, DATABASE) is None
        healthy(w)
        messages = w.ask(wire.parse("SELECT $1::text", "s"), wire.bind("s", ["abc"]), wire.describe("P"), wire.execute(), wire.SYNC)
        assert kinds(messages) == "12TDCZ"


# ---- simple protocol

def test_several_statements_and_empty_queries(small):
    with raw(small) as w:
        assert kinds(w.ask(wire.query("SELECT 1; SELECT 2; SELECT 3"))) == "TDCTDCTDCZ"
        assert kinds(w.ask(wire.query(""))) == "IZ"
        assert kinds(w.ask(wire.query("  -- nothing\n"))) == "IZ"
        assert kinds(w.ask(wire.query("SELECT 1; SELECT 1/0; SELECT 3"))) == "TDCEZ"
        assert kinds(w.ask(wire.query("DO $$ BEGIN RAISE NOTICE 'hear'; END $$"))) == "NCZ"
        healthy(w)


def test_pipelined_simple_queries(small):
    with raw(small) as w:
        w.send(*(wire.query(f"SELECT {n}") for n in range(200)))
        for n in range(200):
            assert [m.row[0] for m in w.until() if m.type == "D"] == [str(n).encode()]


def test_transaction_status(small):
    with raw(small) as w:
        states = [w.ask(wire.query(sql))[-1].body for sql in ("BEGIN", "SELECT 1", "SELECT 1/0", "SELECT 1", "ROLLBACK", "SELECT 1")]
        assert states == [b"T", b"T", b"E", b"E", b"I", b"I"]


def test_begin_and_commit_pipelined_over_clients(small):
    """Whole transactions in one packet from 20 clients: the lease ends at the right ReadyForQuery."""
    def work(index):
        with raw(small) as w:
            for _ in range(20):
                w.send(wire.query("BEGIN"), wire.query(f"SELECT set_config('app.me', '{index}', true)"), wire.query("SELECT current_setting('app.me')"), wire.query("COMMIT"))
                rows = []
                for _ in range(4):
                    rows += [m.row[0] for m in w.until() if m.type == "D"]
                assert rows == [str(index).encode()] * 2
    harness.threads(20, work)


# ---- extended protocol

def test_describe_flush_and_portal_suspended(small):
    with raw(small) as w:
        w.send(wire.parse("SELECT g FROM generate_series(1, 10) g WHERE g > $1", "s", [23]), wire.describe("S", "s"), wire.FLUSH)
        assert kinds([w.recv() for _ in range(3)]) == "1tT"
        w.send(wire.bind("s", ["2"], "p"), wire.execute("p", 3), wire.FLUSH)
        assert kinds([w.recv() for _ in range(5)]) == "2DDDs"
        w.send(wire.execute("p", 3), wire.FLUSH)
        assert kinds([w.recv() for _ in range(4)]) == "DDDs"
        w.send(wire.execute("p", 0), wire.close("P", "p"), wire.SYNC)
        assert kinds(w.until()) == "DDC3Z"
        assert kinds(w.ask(wire.close("S", "s"), wire.SYNC)) == "3Z"
        messages = w.ask(wire.bind("s", ["2"]), wire.SYNC)
        assert kinds(messages) == "EZ" and messages[0].error["C"] == "26000"
        assert kinds(w.ask(wire.close("S", "never was"), wire.SYNC)) == "3Z"
        healthy(w)


def test_no_data_and_empty_query(small):
    with raw(small) as w:
        assert kinds(w.ask(wire.parse(""), wire.bind(), wire.describe("P"), wire.execute(), wire.SYNC)) == "12nIZ"
        assert kinds(w.ask(wire.SYNC)) == "Z"
        assert kinds(w.ask(wire.SYNC, wire.SYNC)) == "Z"
        assert w.recv().type == "Z"


@pytest.mark.parametrize("bad", ["parse", "bind", "execute"])
def test_error_in_a_pipeline(small, bad):
    """All up to the Sync is skipped; what comes behind it counts."""
    with raw(small) as w:
        first = {"parse": wire.parse("SELEC 1"), "bind": wire.parse("SELECT $1::int", "x") + wire.bind("x", ["word"]),
                 "execute": wire.parse("SELECT 1/(random()*0)::int") + wire.bind() + wire.execute()}[bad]
        w.send(first, wire.parse("SELECT 'skipped'", "later"), wire.bind("later"), wire.execute(), wire.SYNC,
               wire.parse("SELECT 'good'", "after"), wire.bind("after"), wire.execute(), wire.SYNC, wire.query("SELECT 'end'"))
        one = w.until()
        assert kinds(one).endswith("EZ") and "D" not in kinds(one)
        two = w.until()
        assert kinds(two) == "12DCZ" and two[2].row == [b"good"]
        assert [m.row for m in w.until() if m.type == "D"] == [[b"end"]]
        # The Parse that was skipped has not made a statement.
        messages = w.ask(wire.bind("later"), wire.SYNC)
        assert kinds(messages) == "EZ" and messages[0].error["C"] == "26000"
        # and its name is free, on any server
        assert kinds(w.ask(wire.parse("SELECT 1", "later"), wire.SYNC)) == "1Z"


def test_statement_names_are_the_clients_own(small):
    """One name, another text for each client, on two servers, over many transactions."""
    def work(index):
        with raw(small, timeout=60) as w:
            assert kinds(w.ask(wire.parse(f"SELECT {index}, $1::int", "same"), wire.SYNC)) == "1Z"
            for n in range(30):
                messages = w.ask(wire.bind("same", [str(n)]), wire.execute(), wire.SYNC)
                assert kinds(messages) == "2DCZ", [m.error for m in messages if m.type == "E"]
                assert messages[1].row == [str(index).encode(), str(n).encode()]
    harness.threads(30, work)


def test_unnamed_statement_survives_a_change_of_server(small):
    with raw(small) as w, raw(small) as other:
        server = w.value("SELECT inet_client_port()")
        assert kinds(w.ask(wire.parse("SELECT 'unnamed', inet_client_port()"), wire.SYNC)) == "1Z"
        # Take the server that has it: the last used one.
        other.ask(wire.query("BEGIN"))
        assert other.value("SELECT inet_client_port()") == server
        messages = w.ask(wire.bind(), wire.execute(), wire.SYNC)
        assert kinds(messages) == "2DCZ" and messages[1].row[0] == b"unnamed"
        assert messages[1].row[1] != server.encode()
        other.ask(wire.query("ROLLBACK"))


def test_duplicate_and_redefined_statements(small):
    with raw(small) as w:
        assert kinds(w.ask(wire.parse("SELECT 1", "s"), wire.SYNC)) == "1Z"
        messages = w.ask(wire.parse("SELECT 2", "s"), wire.SYNC)
        assert kinds(messages) == "EZ" and messages[0].error["C"] == "42P05"
        assert kinds(w.ask(wire.close("S", "s"), wire.parse("SELECT 3", "s"), wire.bind("s"), wire.execute(), wire.SYNC)) == "312DCZ"
        for n in range(3):  # the unnamed one may be replaced
            messages = w.ask(wire.parse(f"SELECT {n}"), wire.bind(), wire.execute(), wire.SYNC)
            assert messages[2].row == [str(n).encode()]


def test_many_statements_evict(proxies):
    proxy = proxies({"pool": {"max": 1, "maxPreparedStatements": 10}})
    with raw(proxy) as w:
        for n in range(50):
            assert kinds(w.ask(wire.parse(f"SELECT {n}", f"s{n}"), wire.SYNC)) == "1Z"
        for n in list(range(50)) + random.Random(1).sample(range(50), 50):
            messages = w.ask(wire.bind(f"s{n}"), wire.describe("P"), wire.execute(), wire.SYNC)
            assert kinds(messages) == "2TDCZ" and messages[2].row == [str(n).encode()]
        assert proxy.stats()["perPool"][0]["preparedStatements"] <= 10
        assert w.value("SELECT count(*) FROM pg_prepared_statements") == "50"  # the client's own


def test_too_many_statements_of_a_client(proxies):
    proxy = proxies({"pool": {"max": 1}, "limits": {"maxPreparedStatementsPerClient": 2}})
    with raw(proxy) as w:
        for name in ("s1", "s2"):
            assert kinds(w.ask(wire.parse("SELECT 1", name), wire.SYNC)) == "1Z"
        for behind in ((), (wire.bind("s3"), wire.execute()), (wire.describe("S", "s3"), wire.close("S", "s1"))):
            messages = w.ask(wire.parse("SELECT 3", "s3"), *behind, wire.SYNC)
            assert kinds(messages) == "EZ" and messages[-1].body == b"I"
            error = messages[0].error
            assert (error["S"], error["C"], error["M"]) == ("ERROR", "53000", "too many prepared statements")
            assert "limits.maxPreparedStatementsPerClient" in error["H"]
        assert w.ask(wire.query("BEGIN"))[-1].body == b"T"
        assert w.ask(wire.parse("SELECT 3", "s3"), wire.SYNC)[-1].body == b"E"  # as any error ends a transaction
        w.ask(wire.query("ROLLBACK"))
        assert kinds(w.ask(wire.parse("SELECT 4"), wire.bind(), wire.execute(), wire.SYNC)) == "12DCZ"  # the unnamed one is none of them
        assert [m.error["C"] for m in w.ask(wire.bind("s3"), wire.execute(), wire.SYNC) if m.type == "E"] == ["26000"]
        for name in ("s1", "s2"):
            assert kinds(w.ask(wire.bind(name), wire.execute(), wire.SYNC)) == "2DCZ"
        assert kinds(w.ask(wire.close("S", "s1"), wire.parse("SELECT 3", "s3"), wire.bind("s3"), wire.execute(), wire.SYNC)) == "312DCZ"


def test_an_eviction_that_the_server_skips(proxies):
    """What makes room is behind an error in the pipeline: the server has the old statement still."""
    proxy = proxies({"pool": {"max": 1, "maxPreparedStatements": 2}})
    with raw(proxy) as w:
        for n in (1, 2):
            assert kinds(w.ask(wire.parse(f"SELECT {n}", f"s{n}"), wire.SYNC)) == "1Z"
        for turn in range(3):
            failed = w.ask(wire.parse("SELECT 1/0"), wire.bind(), wire.execute(), wire.parse(f"SELECT {turn + 3}", "s3"), wire.SYNC)
            assert kinds(failed).endswith("EZ")
            for n in (1, 2):
                messages = w.ask(wire.bind(f"s{n}"), wire.execute(), wire.SYNC)
                assert kinds(messages) == "2DCZ", [m.error for m in messages if m.type == "E"]
        assert w.value("SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'pgsidecar%'") == "0"


def test_deallocate_and_discard(small):
    with raw(small) as w:
        for sql in ("DEALLOCATE ALL", "DISCARD ALL", "DEALLOCATE s"):
            assert kinds(w.ask(wire.parse("SELECT 1", "s"), wire.SYNC)) == "1Z", sql
            done = w.ask(wire.query(sql))
            assert kinds(done) == "CZ", [m.error for m in done if m.type == "E"]
            messages = w.ask(wire.bind("s"), wire.SYNC)
            assert kinds(messages) == "EZ" and messages[0].error["C"] == "26000", sql


@pytest.mark.parametrize("extended", [False, True], ids=["simple", "extended"])
def test_a_long_text_behind_another_request(small, extended):
    """Its first half has come when the client gives its server connection back."""
    text = "/*" + "x" * 300_000 + "*/ SELECT 77"
    data = wire.parse(text) + wire.bind() + wire.execute() + wire.SYNC if extended else wire.query(text)
    with raw(small) as w:
        for cut in (60_000, 70_000, 200_000):
            w.send(wire.query("SELECT 1"), data[:cut])
            assert kinds(w.until()) == "TDCZ"
            time.sleep(0.1)
            w.send(data[cut:])
            assert w.until()[-3].row == [b"77"]


def test_texts_too_long_to_be_kept(proxies, pg):
    proxy = proxies({"limits": {"maxParseBytes": 65536}, "pool": {"max": 2}})
    plain = harness.Postgres(plain=True)
    long = f"SELECT 'long', length('{'x' * 100000}')"
    steps = [[wire.parse("SELECT 'short'"), wire.bind(), wire.execute()], [wire.parse(long), wire.bind(), wire.execute()], [wire.parse(long)],
             [wire.bind(), wire.execute()], [wire.describe("S")], [wire.parse("SELECT 'short'")], [wire.bind(), wire.execute()],
             [wire.parse("SELECT 'kept'", "n")], [wire.parse(long, "n")], [wire.bind("n"), wire.execute()], [wire.close("S", "n")],
             [wire.parse(long, "n"), wire.bind("n"), wire.execute()], [wire.parse("SELECT 'kept'", "n")], [wire.bind("n"), wire.execute()],
             [wire.close("S", "n"), wire.parse("SELECT 'kept'", "n"), wire.bind("n"), wire.execute()], [wire.parse("SELEC" + long), wire.bind()],
             [wire.bind()], [wire.bind("none"), wire.parse(long), wire.parse(long, "m")], [wire.bind("m")], [wire.bind()]]
    with plain, raw(plain) as direct, raw(proxy) as w, raw(proxy) as other:
        for number, step in enumerate(steps):
            answers = [[(m.type, m.error["C"] if m.type == "E" else m.body) for m in one.ask(*step, wire.SYNC)] for one in (direct, w)]
            assert answers[0] == answers[1], number
            assert kinds(other.ask(wire.bind(), wire.execute(), wire.SYNC)) == "EZ"
        w.send(wire.parse("bogus"), wire.SYNC, wire.parse(long), wire.bind(), wire.execute(), wire.SYNC)
        assert kinds(w.until()) + kinds(w.until()) == "EZ12DCZ"
        w.ask(wire.bind("none"), wire.parse("SELECT 'skipped'"), wire.close("S"), wire.SYNC)
        assert w.ask(wire.bind(), wire.execute(), wire.SYNC)[1].row == [b"long", b"100000"]


def test_function_call(small, pg):
    oid = pg.sql("SELECT 'int4pl'::regproc::oid")[0][0]
    with raw(small) as w:
        messages = w.ask(wire.function_call(oid, b"40", b"2"))
        assert kinds(messages) == "VZ" and messages[0].body[4:] == b"42"
        messages = w.ask(wire.function_call(oid, b"no", b"2"))
        assert kinds(messages) == "EZ"
        healthy(w)


# ---- COPY

@pytest.fixture
def table(pg):
    pg.sql("DROP TABLE IF EXISTS copied; CREATE TABLE copied (a int, b text); GRANT ALL ON copied TO app", database=DATABASE)
    return "copied"


def test_copy_in_and_out(small, table):
    with small.connect() as connection:
        with connection.cursor() as cursor:
            with cursor.copy("COPY copied FROM STDIN") as copy:
                for n in range(100000):
                    copy.write_row((n, f"row {n}"))
            assert cursor.execute("SELECT count(*), sum(a) FROM copied").fetchone() == (100000, 4999950000)
            with cursor.copy("COPY (SELECT a FROM copied ORDER BY a) TO STDOUT") as copy:
                assert b"".join(copy).count(b"\n") == 100000


@pytest.mark.parametrize("what", ["asked", "restored", "synced", "queued"])
def test_a_copy_that_fails_in_the_middle_of_a_message(proxies, pg, table, what):
    """What the proxy has to say to the server then waits until the message has been sent, or the client's data would be read as messages."""
    pg.sql("CREATE OR REPLACE FUNCTION slow_copy() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM pg_sleep(0.7); RAISE EXCEPTION 'no'; END$$",
           database=DATABASE)
    pg.sql("CREATE TRIGGER slow BEFORE INSERT ON copied FOR EACH ROW EXECUTE FUNCTION slow_copy()", database=DATABASE)
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 4000, **({"residueCheck": "never"} if what == "restored" else {})}})
    with raw(proxy, timeout=20, **({"options": "-c work_mem=3MB"} if what == "restored" else {})) as w, raw(proxy) as other:
        before = {"asked": "SET work_mem = '5MB'; ", "restored": "RESET work_mem; "}.get(what, "") + "COPY copied (b) FROM STDIN"
        w.send(*((wire.parse(before), wire.bind(), wire.execute(), wire.FLUSH) if what == "synced" else (wire.query(before),)))
        w.until("G")
        if what == "synced":
            w.send(wire.copy_data(b"x\n"), wire.SYNC)
        piece = [wire.copy_data(b"x" * 10 + b"\n")] * 4096 if what == "queued" else [wire.copy_data((b"x" * 1000 + b"\n") * 64)]

        def feed():
            for _ in range(400 if what != "queued" else 100):
                w.send(*piece)
            w.send(wire.COPY_DONE, *([wire.SYNC] if what == "synced" else []))

        feeding = threading.Thread(target=feed, daemon=True)
        feeding.start()
        answer = w.until()
        assert [m.error["C"] for m in answer if m.type == "E"] == ["P0001"] and answer[-1].type == "Z"
        feeding.join(20)
        assert not feeding.is_alive()
        if what == "synced":
            w.until()
        assert other.value("SELECT 'other'") == "other"
        assert w.value("SHOW work_mem") == {"asked": "4MB", "restored": "3MB"}.get(what, "4MB")
    assert "08P01" not in proxy.log_text()


def test_a_parse_that_the_proxy_answers_before_a_bind_that_waits(proxies):
    proxy = proxies({"pool": {"max": 1}})
    with raw(proxy) as one, raw(proxy, timeout=8) as other:
        assert kinds(one.ask(wire.parse("DISCARD PLANS", "x"), wire.SYNC)) == "1Z"
        other.value("SELECT 1")
        assert kinds(other.ask(wire.parse("DISCARD PLANS", "y"), wire.bind("y"), wire.execute(), wire.SYNC)) == "12CZ"
        healthy(one)


def test_a_sync_in_the_second_copy_of_a_query(small, table):
    with raw(small) as w:
        w.send(wire.query("COPY copied FROM STDIN; COPY copied FROM STDIN"))
        w.until("G")
        w.send(wire.copy_data(b"1\ta\n"), wire.COPY_DONE)
        w.until("G")
        w.send(wire.SYNC, wire.copy_data(b"2\tb\n"), wire.COPY_DONE)
        assert kinds(w.until()) == "CZ"
        assert w.value("SELECT count(*) FROM copied") == "2"


def test_a_copy_that_fails_before_it_reads(small, pg, table):
    """The server answers the Sync then that it ignores in COPY mode."""
    pg.sql("CREATE OR REPLACE FUNCTION no_copy() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'no'; END$$", database=DATABASE)
    pg.sql("CREATE TRIGGER no BEFORE INSERT ON copied FOR EACH STATEMENT EXECUTE FUNCTION no_copy()", database=DATABASE)
    copy = (wire.parse("COPY copied FROM STDIN"), wire.bind(), wire.describe("P"), wire.execute(), wire.SYNC)
    with raw(small) as w:
        assert kinds(w.ask(*copy)) == "12nGEZ"
        assert kinds(w.ask(wire.parse("COPY (SELECT 1) TO STDOUT"), wire.bind(), wire.execute(), wire.SYNC)) == "12HdcCZ"
        healthy(w)
    assert "08P01" not in small.log_text()


def test_copy_failed_by_the_client(small, table):
    with raw(small) as w:
        w.send(wire.query("COPY copied FROM STDIN"))
        assert w.recv().type == "G"
        w.send(wire.copy_data(b"1\tone\n"), wire.copy_fail("changed my mind"))
        messages = w.until()
        assert kinds(messages) == "EZ" and messages[0].error["C"] == "57014" and "changed my mind" in messages[0].error["M"]
        assert w.value("SELECT count(*) FROM copied") == "0"


def test_copy_failed_by_the_server_while_the_client_sends(small, table):
    """A bad row early in much data: the error comes, the rest is discarded, the next query is answered."""
    with raw(small, timeout=60) as w:
        w.send(wire.query("COPY copied FROM STDIN"))
        assert w.recv().type == "G"
        w.send(wire.copy_data(b"not a number\tx\n"))
        block = wire.copy_data(b"1\t" + b"y" * 8000 + b"\n")
        for _ in range(500):
            w.send(block)
        w.send(wire.COPY_DONE)
        messages = w.until()
        assert kinds(messages) == "EZ" and messages[0].error["C"] == "22P02"
        assert w.value("SELECT count(*) FROM copied") == "0"


@pytest.mark.parametrize("ahead", [True, False])
def test_copy_ignores_a_sync(small, table, ahead):
    with raw(small) as w:
        w.send(wire.query("COPY copied FROM STDIN"), *[wire.SYNC] * ahead)
        assert w.recv().type == "G"
        w.send(wire.copy_data(b"1\ta\n"), wire.SYNC, wire.copy_data(b"2\tb\n"), wire.COPY_DONE)
        assert kinds(w.until()) == "CZ"
        assert w.value("SELECT count(*) FROM copied") == "2"
        healthy(w)


def test_copy_by_extended_protocol(small, table):
    with raw(small) as w:
        w.send(wire.parse("COPY copied FROM STDIN"), wire.bind(), wire.execute(), wire.SYNC)
        assert kinds(w.until("G")) == "12G"
        w.send(wire.copy_data(b"1\ta\n"), wire.copy_data(b"2\tb\n"), wire.COPY_DONE, wire.SYNC)
        assert kinds(w.until()) == "CZ"
        assert w.value("SELECT count(*) FROM copied") == "2"
        w.send(wire.parse("COPY copied FROM STDIN"), wire.bind(), wire.execute(), wire.SYNC)
        w.until("G")
        w.send(wire.copy_data(b"bad\n"), wire.COPY_DONE, wire.SYNC)
        assert kinds(w.until()) == "EZ"
        healthy(w)


def soon(w):
    """What comes without being asked for."""
    found = ""
    while w.buffer or select.select([w.sock], [], [], 0.3)[0]:
        found += w.recv().type
    return found


@pytest.fixture(scope="module")
def plain():
    """A server that may be asked without TLS, and so directly."""
    with harness.Postgres(plain=True) as server:
        server.sql("CREATE TABLE copied (a int, b text); GRANT ALL ON copied TO app", database=DATABASE)
        yield server


@pytest.mark.parametrize("mode", ["directly", "transaction", "session"])
def test_a_sync_ahead_of_a_copys_data_is_ignored(proxies, plain, mode):
    """As libpq sends it with the COPY itself; the one behind the end is answered, whatever becomes of the data."""
    copy = (wire.parse("COPY copied FROM STDIN"), wire.bind(), wire.execute(), wire.SYNC)
    bad, good = wire.copy_data(b"bad\n"), wire.copy_data(b"1\ta\n")
    with raw(plain if mode == "directly" else proxies({"pool": {"mode": mode}}, server=plain)) as w:
        for data, said, end in ((bad, "E", "Z"), (good, "", "CZ")):
            w.send(*copy)
            assert soon(w) == "12G"
            w.send(data)
            assert soon(w) == said
            w.send(wire.COPY_DONE, wire.SYNC)
            assert soon(w) == end
        w.send(*copy, bad, wire.COPY_DONE, wire.SYNC)
        assert soon(w) == "12GEZ"
        w.send(*copy[:-1], bad, wire.SYNC)
        assert soon(w) == "12GEZ", "it stands behind what fails"
        healthy(w)


@pytest.mark.parametrize("mode", ["directly", "transaction", "session"])
def test_who_breaks_copys_protocol_is_disconnected(proxies, plain, mode):
    with raw(plain if mode == "directly" else proxies({"pool": {"mode": mode}}, server=plain)) as w:
        w.send(wire.parse("COPY copied FROM STDIN"), wire.bind(), wire.execute(), wire.query("SELECT 1"), wire.SYNC)
        assert [m.error["S"] for m in w.closed() if m.type == "E"][-1] == "FATAL"


def test_libpqs_query_behind_a_copy_that_fails(small, table):
    from psycopg import pq
    connection = pq.PGconn.connect(small.conninfo().encode())
    for n in (b"1", b"2", b"3"):
        connection.send_query_params(b"COPY copied FROM STDIN", None)
        assert connection.get_result().status == pq.ExecStatus.COPY_IN
        connection.put_copy_data(b"bad\n")
        connection.flush()
        select.select([connection.socket], [], [], 5)
        connection.put_copy_end()
        assert connection.get_result().status == pq.ExecStatus.FATAL_ERROR and connection.get_result() is None
        connection.send_query(b"SELECT " + n)
        assert connection.get_result().get_value(0, 0) == n and connection.get_result() is None
    connection.finish()


@pytest.mark.parametrize("mode", ["transaction", "session"])
@pytest.mark.parametrize("ends", [wire.COPY_DONE, wire.copy_fail("no more")], ids=["done", "fail"])
@pytest.mark.parametrize("beside", ["RESET ALL", "RESET work_mem", "DISCARD TEMP", "DISCARD PLANS", "DEALLOCATE ALL", "DEALLOCATE PREPARE ALL"])
def test_copy_beside_what_the_proxy_looks_after(proxies, table, mode, ends, beside):
    """Neither is anything put into the COPY's data, nor are they held back."""
    proxy = proxies({"pool": {"max": 1, "mode": mode}})
    data = wire.copy_data(b"1\ta\n")
    with raw(proxy, TimeZone="Asia/Tokyo") as w:
        for blindly in (False, True):
            w.send(wire.query(f"{beside}; COPY copied FROM STDIN"), *[data, ends] * blindly)
            if not blindly:
                assert kinds(w.until("G")) == "CG"
                w.send(data, ends)
            assert kinds(w.until()).replace("S", "")[-2:] in ("CZ", "EZ")
            assert w.value("SHOW TimeZone") == "Asia/Tokyo"
            w.send(wire.parse(beside), wire.bind(), wire.execute(), wire.parse("COPY copied FROM STDIN"), wire.bind(), wire.execute(), wire.SYNC,
                   *[data, ends, wire.SYNC] * blindly)
            if not blindly:
                assert kinds(w.until("G")) == "12C12G"
                w.send(data, ends, wire.SYNC)
            assert kinds(w.until()).replace("S", "")[-2:] in ("CZ", "EZ")
            assert w.value("SHOW TimeZone") == "Asia/Tokyo"
        assert w.value("SELECT count(*) FROM copied") == ("4" if ends == wire.COPY_DONE else "0")
        healthy(w)


def test_client_gone_in_the_middle_of_a_copy(proxies, pg, table):
    proxy = proxies({"pool": {"max": 1, "connectionTimeoutMillis": 20000}})
    w = raw(proxy)
    w.send(wire.query("COPY copied FROM STDIN"))
    assert w.recv().type == "G"
    w.send(wire.copy_data(b"1\tone\n"))
    w.sock.close()
    with raw(proxy) as after:
        assert after.value("SELECT count(*) FROM copied") == "0"
    out = raw(proxy)
    out.send(wire.query("COPY (SELECT repeat('x', 1000) FROM generate_series(1, 200000)) TO STDOUT"))
    assert out.recv().type == "H"
    out.sock.close()
    with raw(proxy) as after:
        healthy(after)


def test_both_buffers_full(small, table):
    """The client sends queries with large answers and reads only at the end: both kernels' buffers fill, nothing deadlocks."""
    with raw(small, timeout=90) as w:
        count, size = 60, 400000
        sender = threading.Thread(target=lambda: [w.send(wire.query(f"SELECT repeat('{chr(97 + n % 26)}', {size}), '{'z' * 20000}'")) for n in range(count)], daemon=True)
        sender.start()
        time.sleep(0.3)  # let them fill; correctness doesn't depend on it
        for n in range(count):
            row = next(m for m in w.until() if m.type == "D").row
            assert row[0] == chr(97 + n % 26).encode() * size
        sender.join(10)


# ---- sizes

def test_large_values_both_ways_in_little_memory(proxies, pg):
    proxy = proxies({"pool": {"max": 2}})
    size = 200 << 20
    with raw(proxy, timeout=120) as w:
        w.send(wire.query(f"SELECT repeat('x', {size})"))
        assert w.recv().type == "T"
        head = w.bytes(5)
        left = struct.unpack("!i", head[1:])[0] - 4
        assert head[:1] == b"D" and left > size
        while left:
            left -= len(w.bytes(min(left, max(len(w.buffer), 1))))
        assert kinds(w.until()) == "CZ"
        # and towards the server, as a parameter
        w.send(wire.parse("SELECT length($1), md5($1)"))
        block = b"y" * (1 << 20)
        inner = b"\0\0" + struct.pack("!hhi", 0, 1, size)
        w.send(b"B" + struct.pack("!i", 4 + len(inner) + size + 2) + inner)
        digest = hashlib.md5()
        for _ in range(size >> 20):
            w.send(block)
            digest.update(block)
        w.send(struct.pack("!h", 0), wire.execute(), wire.SYNC)
        row = next(m for m in w.until() if m.type == "D").row
        assert row == [str(size).encode(), digest.hexdigest().encode()]
        healthy(w)
    if not harness.sanitized():
        assert proxy.status("VmHWM") < 64 * 1024, proxy.status("VmHWM")


def test_a_bind_whose_error_is_longer_than_a_megabyte(small):
    with small.connect() as connection:
        for _ in range(2):
            with pytest.raises(psycopg.errors.InvalidTextRepresentation):
                connection.execute("SELECT %s::int", ["x" * 1_100_000], prepare=True)
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_large_query_text(small):
    with raw(small, timeout=60) as w:
        value = "q" * (20 << 20)
        assert w.value(f"SELECT length('{value}')") == str(len(value))
        value = value[:10 << 20]
        messages = w.ask(wire.parse(f"SELECT length('{value}')", "large"), wire.bind("large"), wire.execute(), wire.SYNC)
        assert kinds(messages) == "12DCZ" and messages[2].row == [str(len(value)).encode()]


@contextlib.contextmanager
def gate(pg):
    """Shut until what it gives is called."""
    with pg.admin(database=DATABASE) as holder:
        holder.execute("SELECT pg_advisory_lock(4711)")
        yield lambda: holder.execute("SELECT pg_advisory_unlock(4711)")


BEHIND_THE_GATE = wire.parse("SELECT pg_advisory_xact_lock(4711)") + wire.bind() + wire.execute()


PARSED, BOUND, CLOSED, ONE, SELECTED = b"1\0\0\0\4", b"2\0\0\0\4", b"3\0\0\0\4", b"D\0\0\0\x0b\0\1\0\0\0\x011", b"C\0\0\0\x0dSELECT 1\0"


@pytest.mark.parametrize("message, reply, count", [
    (wire.close("S", "x"), CLOSED, 1_000_000),
    (wire.close("S", "x") + wire.parse("SELECT 1", "x"), CLOSED + PARSED, 400_000)], ids=["close", "close and parse"])
def test_what_the_proxy_answers_itself_waits_in_little_memory(proxies, pg, message, reply, count):
    proxy = proxies({"pool": {"max": 2}})
    with gate(pg) as release, raw(proxy, timeout=300) as w, raw(proxy, timeout=300) as other:
        before, sent = proxy.rss_kb(), []
        w.send(BEHIND_THE_GATE)

        def send():
            for part in range(100):
                w.send(message * (count // 100))
                sent.append(part)
            w.send(wire.SYNC)
        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        seen = -1
        while sender.is_alive() and len(sent) != seen:  # until it isn't read any more, though others are
            seen = len(sent)
            for _ in range(20):
                time.sleep(0.05)
                healthy(other)
        if not harness.sanitized():
            assert proxy.rss_kb() - before < 32 * 1024
        release()
        assert kinds(w.recv() for _ in range(4)) == "12DC"
        assert w.bytes(count * len(reply)) == reply * count
        assert kinds(w.until()) == "Z"
        sender.join(60)
        healthy(w)


def test_a_long_pipeline_costs_what_its_statements_cost(proxies, pg):
    """Not the square of their number."""
    proxy = proxies({"pool": {"max": 2}})
    statement = wire.parse("SELECT $1::int", types=[23]) + wire.bind("", ["1"]) + wire.execute()
    reply = PARSED + BOUND + ONE + SELECTED
    costs = []
    for count in (15_000, 60_000):
        with gate(pg) as release, raw(proxy, timeout=300) as w:
            before = proxy.cpu_seconds()
            sender = threading.Thread(target=lambda n: w.send(BEHIND_THE_GATE, statement * n, wire.SYNC), args=(count,), daemon=True)
            sender.start()
            time.sleep(1)  # let it fill; correctness doesn't depend on it
            release()
            assert kinds(w.recv() for _ in range(4)) == "12DC"
            assert w.bytes(count * len(reply)) == reply * count
            assert kinds(w.until()) == "Z"
            costs.append(proxy.cpu_seconds() - before)
            sender.join(60)
            healthy(w)
    assert costs[1] < 8 * costs[0] + 0.5, costs


def long_text(n, size=1_000_000):
    return f"SELECT {n} /*{'x' * size}*/"


def texts_held(proxy):
    return proxy.json("/api/monitoring/profile")[1]["memory"]["owners"]["statements"]


def test_long_texts_of_idle_clients_are_few(proxies):
    proxy = proxies({"pool": {"max": 2}})
    clients = [raw(proxy) for _ in range(30)]
    for n, w in enumerate(clients):
        assert kinds(w.ask(wire.parse(long_text(n)), wire.bind(), wire.execute(), wire.SYNC)) == "12DCZ"
    assert texts_held(proxy) < 12 << 20
    # Who prepares in one request what it executes in the next isn't concerned.
    assert kinds(clients[-1].ask(wire.describe("S"), wire.SYNC)) == "tTZ"
    assert clients[-1].ask(wire.bind(), wire.execute(), wire.SYNC)[1].row == [b"29"]
    for asked in (wire.bind() + wire.execute(), wire.describe("S")):
        messages = clients[0].ask(asked, wire.SYNC)
        assert kinds(messages) == "EZ" and messages[0].error["C"] == "0A000" and "too long to be kept" in messages[0].error["M"]
    assert kinds(clients[0].ask(wire.parse(long_text(0)), wire.bind(), wire.execute(), wire.SYNC)) == "12DCZ"
    for w in clients:
        healthy(w)
        w.sock.close()


def test_long_texts_on_a_server_connection_are_few(proxies):
    proxy = proxies({"pool": {"max": 1}})
    with raw(proxy) as w:
        for n in range(30):
            assert kinds(w.ask(wire.parse(long_text(n), f"n{n}"), wire.SYNC)) == "1Z"
        for n in (29, 0, 15, 0):
            assert w.ask(wire.bind(f"n{n}"), wire.execute(), wire.SYNC)[1].row == [str(n).encode()]
    harness.poll(lambda: texts_held(proxy) < 12 << 20, what="the texts of a client that has left are few")


def test_slow_reader_holds_no_memory(proxies):
    proxy = proxies({"pool": {"max": 2}})
    with raw(proxy, timeout=60) as slow:
        slow.send(wire.query("SELECT repeat('x', 1000) FROM generate_series(1, 200000)"))
        slow.recv()
        with raw(proxy) as other:
            for _ in range(50):
                healthy(other)
        if not harness.sanitized():
            assert proxy.status("VmHWM") < 64 * 1024
        assert kinds(slow.until())[-2:] == "CZ"
        healthy(slow)


# ---- notices, parameters

def test_parameter_status_is_told(small):
    with raw(small) as w, raw(small) as other:
        messages = w.ask(wire.query("SET TimeZone TO 'Asia/Tokyo'"))
        assert (b"TimeZone\0Asia/Tokyo\0") in [m.body for m in messages if m.type == "S"]
        told = [m.body for _ in range(4) for m in other.ask(wire.query("SELECT 1")) if m.type == "S"]
        assert not [body for body in told if b"Tokyo" in body]
        messages = w.ask(wire.query("RESET TimeZone"))
        assert w.value("SHOW TimeZone") == "UTC"
