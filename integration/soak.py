#!/usr/bin/python3
"""Chaos for minutes: many clients of all kinds through pgsidecar while backends are killed, PostgreSQL restarts and the network stalls.
Each client checks that what it reads is its own. Errors of a lost server are fine; wrong data, hangs, other errors, more server
connections than `max`, or anything left behind at the end are not.

  integration/soak.py [--seconds 120] [--clients 30] [--seed N] [--kinds simple,listen,...] [--chaos kill,...] [--binary PATH]
"""
import argparse
import collections
import pathlib
import random
import re
import secrets
import signal
import sys
import threading
import time

import psycopg

import harness
import wire
from gate import Gate
from harness import DATABASE, PASSWORD, USER

MAX = 6
# Lost connections, cancelled queries, a wait that was too long, a transaction that was lost, a stale plan.
EXPECTED = re.compile("0800.|57P0.|57014|53300|25P02|25001|XX000|55P03")
STUCK = 60.0


class Soak:
    def __init__(self, options):
        self.options = options
        self.running = True
        self.done, self.errors, self.failures = collections.Counter(), collections.Counter(), []
        self.progress = {}
        self.cut_at = 0.0

    def fail(self, what):
        self.failures.append(what)
        self.running = False

    # ---- what clients do; `w` is a raw connection, `mark` is the client's own token

    def simple(self, rng, w, mark):
        token = secrets.token_hex(rng.choice((4, 200, 20000)))
        self.expect(w.ask(wire.query(f"SELECT '{mark}', '{token}' FROM generate_series(1, {rng.randrange(1, 20)})")), [mark, token])

    def pipeline(self, rng, w, mark):
        tokens = [secrets.token_hex(8) for _ in range(rng.randrange(1, 8))]
        w.send(*[part for token in tokens for part in (wire.parse("SELECT $1::text, $2::text"), wire.bind("", [mark.encode(), token.encode()]),
                                                       wire.execute())], wire.SYNC)
        rows = [m.row for m in self.until_ready(w) if m.type == "D"]
        if rows is not None and rows != [[mark.encode(), token.encode()] for token in tokens][:len(rows)]:
            self.fail(f"pipeline of {mark}: {rows}")

    def prepared(self, rng, w, mark):
        number, token = rng.randrange(5), secrets.token_hex(8)
        name = f"s{number}"
        w.ask(wire.close("S", name), wire.SYNC)
        if self.failed(w.ask(wire.parse(f"SELECT $1::text, {number}", name), wire.SYNC)):
            return
        self.expect(w.ask(wire.bind(name, [token.encode()]), wire.execute(), wire.SYNC), [token, str(number)])

    def transaction(self, rng, w, mark):
        messages = self.note(w.ask(wire.query("BEGIN")))
        if messages[-1].body != b"T":
            return
        for _ in range(rng.randrange(1, 4)):
            self.expect(w.ask(wire.query(f"SELECT '{mark}', txid_current() IS NOT NULL")), [mark, "t"])
        if rng.random() < 0.3:
            self.note(w.ask(wire.query("SELECT 1/0")), "22012", "25P02")
        self.note(w.ask(wire.query(rng.choice(("COMMIT", "ROLLBACK")))))

    def settings(self, rng, w, mark):
        name, value = rng.choice((("app.mark", mark), ("work_mem", f"{rng.randrange(64, 1000)}kB"), ("application_name", mark)))
        if self.failed(w.ask(wire.query(f"SET {name} TO '{value}'"))):
            return
        for _ in range(3):
            self.expect(w.ask(wire.query(f"SELECT current_setting('{name}') = '{value}'")), ["t"], pinned=True)
        self.note(w.ask(wire.query(f"RESET {name}")))

    def copy(self, rng, w, mark):
        rows = rng.randrange(1, 3000)
        messages = self.note(w.ask(wire.query(f"COPY (SELECT '{mark}', g FROM generate_series(1, {rows}) g) TO STDOUT")))
        data = [m.body for m in messages if m.type == "d"]
        if any(not line.startswith(mark.encode() + b"\t") for line in data):
            self.fail(f"COPY of {mark} holds another's row")
        w.send(wire.query("BEGIN; CREATE TEMP TABLE soak (a text) ON COMMIT DROP; COPY soak FROM STDIN; SELECT count(*), min(a), max(a) FROM soak; COMMIT"))
        message = w.recv()
        while message.type not in "GEZ":
            message = w.recv()
        if message.type == "G":
            w.send(*[wire.copy_data(f"{mark}\n".encode()) for _ in range(50)], wire.COPY_DONE)
        elif message.type == "E":
            self.note([message])
        if message.type != "Z":
            self.expect(self.until_ready(w), ["50", mark, mark])

    def lock(self, rng, w, mark):
        key = int(mark, 16) % 1000000
        self.note(w.ask(wire.query(f"SELECT pg_advisory_lock({key})")))
        self.note(w.ask(wire.query("SELECT 1")))
        self.note(w.ask(wire.query(f"SELECT pg_advisory_unlock({key})")))

    def function(self, rng, w, mark):
        if self.failed(w.ask(wire.query(f"SELECT soak_set('{mark}')"))):
            return
        for _ in range(2):
            self.expect(w.ask(wire.query("SELECT current_setting('app.inside')")), [mark])

    def temporary(self, rng, w, mark):
        if self.failed(w.ask(wire.query(f"CREATE TEMP TABLE soak_own AS SELECT '{mark}' AS a"))):
            return
        for _ in range(2):
            self.expect(w.ask(wire.query("SELECT a FROM soak_own")), [mark])
        self.note(w.ask(wire.query("DROP TABLE soak_own")))

    def listen(self, rng, w, mark):
        if self.failed(w.ask(wire.query(f"LISTEN soak_all; LISTEN soak_{mark}"))):
            return
        heard = []
        for token in range(3):
            messages = self.note(w.ask(wire.query(f"NOTIFY soak_{mark}, '{mark} {token}'; NOTIFY soak_all, '{mark}'")))
            if any(m.type == "E" for m in messages):
                return
            heard += [m.body[4:].split(b"\0")[:2] for m in messages if m.type == "A"]
            until = time.monotonic() + 15
            while [f"soak_{mark}".encode(), f"{mark} {token}".encode()] not in heard and not any(b"may have been lost" in m.body for m in messages):
                if time.monotonic() > until:
                    self.fail(f"{mark} didn't hear its own notification {token}, nor that it may have been lost: {messages}")
                    return
                messages += self.note(w.ask(wire.query("SELECT pg_sleep(0.1)")))
        own = [payload for channel, payload in heard if channel == b"soak_" + mark.encode()]
        if any(not payload.startswith(mark.encode()) for payload in own) or len(set(own)) != len(own):
            self.fail(f"{mark} heard {own}")
        self.note(w.ask(wire.query("UNLISTEN *")))

    def described(self, rng, w, mark):
        """What a client was told of a statement's columns holds, whoever alters the table meanwhile."""
        if rng.random() < 0.2:
            self.note(w.ask(wire.query(f"SET lock_timeout = '1s'; ALTER TABLE soak_altered ALTER a TYPE {rng.choice(('int', 'bigint', 'text'))} USING 1; RESET lock_timeout")))
        w.ask(wire.close("S", "d"), wire.SYNC)
        messages = self.note(w.ask(wire.parse("SELECT a FROM soak_altered", "d"), wire.describe("S", "d"), wire.SYNC), "0A000")
        if any(m.type == "E" for m in messages):
            return
        told = [m.body for m in messages if m.type == "T"]
        for _ in range(3):
            messages = self.note(w.ask(wire.bind("d"), wire.describe("P"), wire.execute(), wire.SYNC), "0A000")
            got = [m.body for m in messages if m.type == "T"]
            if got and told != got:
                self.fail(f"described as {told}, got {got}")

    def executed(self, rng, w, mark):
        """SQL's PREPARE and EXECUTE, and EXECUTE of what the protocol prepared."""
        if self.failed(w.ask(wire.query(f"PREPARE by_sql (text) AS SELECT '{mark}', $1"))):
            return
        for token in "ab":
            self.expect(w.ask(wire.query(f"EXECUTE by_sql('{token}')")), [mark, token])
        if self.failed(w.ask(wire.query("DEALLOCATE by_sql"))) or self.failed(w.ask(wire.close("S", "p"), wire.parse(f"SELECT '{mark}', 'p'", "p"), wire.SYNC)):
            return
        self.expect(w.ask(wire.query("EXECUTE p")), [mark, "p"])
        self.expect(w.ask(wire.bind("p"), wire.execute(), wire.SYNC), [mark, "p"])

    def cursor(self, rng, w, mark):
        if self.failed(w.ask(wire.query(f"DECLARE held CURSOR WITH HOLD FOR SELECT '{mark}', g::text FROM generate_series(1, 5) g"))):
            return
        for number in "123":
            self.expect(w.ask(wire.query("FETCH held")), [mark, number])
        self.note(w.ask(wire.query("CLOSE held")))

    def sequence(self, rng, w, mark):
        messages = self.note(w.ask(wire.query("SELECT nextval('soak_sequence')")))
        rows = [m.row for m in messages if m.type == "D"]
        for question in ("SELECT currval('soak_sequence')", "SELECT lastval()"):
            messages = self.note(w.ask(wire.query(question)), "55000")
            if rows and [m.row for m in messages if m.type == "D"] not in (rows, []):
                self.fail(f"{mark} took {rows}, then {messages}")

    def discard(self, rng, w, mark):
        if self.failed(w.ask(wire.query(f"SET app.mark TO '{mark}'; SET work_mem = '1234kB'; LISTEN soak_all"))):
            return
        self.note(w.ask(wire.query("SAVEPOINT none; ROLLBACK TO none" if rng.random() < 0.2 else "SELECT 1")), "25P01", "3B001")
        if self.failed(w.ask(wire.query("DISCARD ALL"))):
            return
        self.expect(w.ask(wire.query("SELECT coalesce(current_setting('app.mark', true), ''), current_setting('work_mem'), count(c)::text FROM pg_listening_channels() c")),
                    ["", "4MB", "0"])

    def savepoint(self, rng, w, mark):
        """What is rolled back to a savepoint doesn't count, what is committed does."""
        sql = f"BEGIN; SET app.mark TO '{mark} 1'; SAVEPOINT s; SET app.mark TO '{mark} 2'; {rng.choice(('ROLLBACK TO', 'RELEASE'))} s"
        kept = "1" if "ROLLBACK" in sql else "2"
        if self.failed(w.ask(wire.query(sql))):
            self.note(w.ask(wire.query("ROLLBACK")))
            return
        self.expect(w.ask(wire.parse("SELECT current_setting('app.mark')"), wire.bind(), wire.execute(), wire.SYNC), [f"{mark} {kept}"])
        if not any(m.type == "C" and m.tag == "COMMIT" for m in self.note(w.ask(wire.query("COMMIT")))):
            return  # it was lost, or cancelled
        self.expect(w.ask(wire.query("SELECT current_setting('app.mark')")), [f"{mark} {kept}"])
        self.note(w.ask(wire.query("RESET app.mark")))

    def cancel(self, rng, w, mark):
        timer = threading.Timer(rng.random() * 0.3, self.send_cancel, (w.pid, w.key))
        timer.start()
        self.note(w.ask(wire.query(f"SELECT pg_sleep({rng.random() * 0.3:.3f})")))
        timer.join()
        self.note(w.ask(wire.query("SELECT 1")))  # the cancel may come late

    def send_cancel(self, pid, key):
        try:
            with wire.Wire(self.proxy.port, timeout=5) as w:
                w.send(wire.request(wire.CANCEL_REQUEST, pid.to_bytes(4, "big") + key))
        except OSError:
            pass

    def leave(self, rng, w, mark):
        """In the middle of a transaction, a message, a result; or with garbage."""
        rng.choice((lambda: w.send(wire.query("BEGIN; SELECT pg_advisory_xact_lock(1)")), lambda: w.send(wire.query("SELECT 1")[:7]),
                    lambda: w.send(wire.query("SELECT repeat('x', 3000000)")), lambda: w.send(secrets.token_bytes(40)),
                    lambda: w.send(wire.query("CREATE TEMP TABLE soak_left (a int)")), lambda: w.send(wire.parse("SELECT 1"))))()
        time.sleep(rng.random() * 0.05)
        raise OSError("left")

    # ---- what is checked

    def note(self, messages, *also):
        for message in messages:
            if message.type == "E":
                error = message.error
                self.errors[error["C"]] += 1
                if not EXPECTED.fullmatch(error["C"]) and error["C"] not in also:
                    self.fail(f"unexpected in {sys._getframe(1).f_code.co_name} ({''.join(m.type for m in messages)}): {error}")
        return messages

    def failed(self, messages):
        return any(m.type == "E" for m in self.note(messages))

    def until_ready(self, w):
        return self.note(w.until())

    def expect(self, messages, row, pinned=False):
        """Every row is this one. `pinned`: what the session held may be gone with its server, but then an error came first."""
        rows = [m.row for m in self.note(messages) if m.type == "D"]
        wrong = [r for r in rows if r != [value.encode() for value in row]]
        if wrong:
            self.fail(f"expected {row}, got {wrong[:3]}")

    # ---- the threads

    def client(self, number):
        rng = random.Random(self.options.seed * 1000 + number)
        kinds = {self.simple: 10, self.pipeline: 10, self.prepared: 10, self.transaction: 10, self.settings: 6, self.copy: 4, self.lock: 2, self.cancel: 2,
                 self.leave: 1, self.function: 4, self.temporary: 2, self.listen: 2, self.described: 3, self.executed: 2,
                 self.cursor: 1, self.sequence: 2, self.discard: 2, self.savepoint: 3}
        kinds = {kind: weight for kind, weight in kinds.items() if not self.options.kinds or kind.__name__ in self.options.kinds.split(",")}
        while self.running:
            mark = secrets.token_hex(6)
            try:
                with wire.Wire(self.proxy.port, timeout=STUCK) as w:
                    failure = w.login(USER, PASSWORD, DATABASE, application_name=mark)
                    if failure:
                        self.note([failure])
                        time.sleep(0.05)
                        continue
                    for _ in range(rng.randrange(1, 60)):
                        if not self.running:
                            break
                        kind = rng.choices(list(kinds), kinds.values())[0]
                        self.progress[number] = (time.monotonic(), kind.__name__)
                        kind(rng, w, mark)
                        self.done[kind.__name__] += 1
            except TimeoutError:
                self.fail(f"client {number} hung for {STUCK} s in {self.progress[number][1]}")
            except (wire.Closed, OSError):
                self.errors["closed"] += 1
            except Exception as error:  # noqa: BLE001: a soak tells what it met
                self.fail(f"client {number}: {type(error).__name__}: {error}")

    def chaos(self, pg, gate):
        rng = random.Random(self.options.seed)
        kinds = {"kill": 6, "stall": 2, "cut": 2, "slice": 2, "reload": 2, "restart": 1}
        if self.options.chaos != "all":
            kinds = {kind: weight for kind, weight in kinds.items() if kind in self.options.chaos.split(",")}
        while self.running and kinds:
            time.sleep(rng.uniform(0.3, 2))
            kind = rng.choices(list(kinds), kinds.values())[0]
            self.done["chaos " + kind] += 1
            try:
                if kind == "kill":
                    pg.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s ORDER BY random() LIMIT 2", USER)
                elif kind == "stall":
                    gate.stall()
                    time.sleep(rng.random() * 2)
                    gate.resume()
                elif kind == "cut":
                    self.cut_at = time.monotonic() + 3
                    gate.cut(reset=rng.random() < 0.5)
                    self.cut_at = time.monotonic()
                elif kind == "slice":
                    gate.slice = rng.choice((0, 0, 1, 7, 1000))
                elif kind == "reload":
                    self.proxy.signal(signal.SIGHUP)
                else:
                    pg.restart(rng.choice((signal.SIGINT, signal.SIGQUIT)))
            except psycopg.Error:
                pass

    def run(self):
        with harness.Postgres(max_connections=60) as pg, Gate(pg.port) as gate:
            pg.sql("CREATE FUNCTION soak_set(mark text) RETURNS void LANGUAGE plpgsql AS $$BEGIN PERFORM set_config('app.inside', mark, false); END$$", database=DATABASE)
            pg.sql("CREATE SEQUENCE soak_sequence; GRANT ALL ON SEQUENCE soak_sequence TO PUBLIC", database=DATABASE)
            pg.sql(f"CREATE TABLE soak_altered AS SELECT 1 AS a; ALTER TABLE soak_altered OWNER TO {USER}", database=DATABASE)
            self.proxy = harness.Proxy(pg, {"pool": {"max": MAX, "min": 1, "maxUses": 500, "connectionTimeoutMillis": 20000}},
                                       url=pg.url(port=gate.port), binary=self.options.binary)
            try:
                self.drive(pg, gate)
            finally:
                self.log = self.proxy.log_text()
                self.proxy.close()
        if self.failures:
            raise SystemExit("\n".join(["FAILED:", *map(str, self.failures[:10]), "the last of its log:", *self.log.splitlines()[-20:]]))
        print("passed")

    def drive(self, pg, gate):
        most, rss, began = 0, [], time.monotonic()
        files = self.proxy.open_files()
        threads = [threading.Thread(target=self.client, args=(n,), daemon=True) for n in range(self.options.clients)]
        threads.append(threading.Thread(target=self.chaos, args=(pg, gate), daemon=True))
        for thread in threads:
            thread.start()
        while self.running and time.monotonic() - began < self.options.seconds:
            time.sleep(0.2)
            try:
                count = pg.count(f"usename = '{USER}'")
            except psycopg.Error:
                continue  # it restarts
            rss.append(self.proxy.rss_kb())
            # A server whose network was cut finds out when it next reads or writes; nobody else can know.
            if time.monotonic() - self.cut_at > 3:
                most = max(most, count)
            if most > MAX:
                self.fail(f"{most} server connections, {MAX} allowed")
            if not self.proxy.running():
                self.fail(f"pgsidecar ended with {self.proxy.process.returncode}: {self.proxy.log_text()[-3000:]}")
        self.running = False
        for thread in threads:
            thread.join(STUCK + 30)
        gate.resume()
        gate.slice = 0
        if not self.failures:
            harness.poll(lambda: self.proxy.stats()["activeCount"] == 0 and self.proxy.stats()["waitingCount"] == 0, 30, "everything is given back")
            with self.proxy.connect() as connection:
                assert connection.execute("SELECT 1").fetchone() == (1,)
            harness.poll(lambda: self.proxy.open_files() <= files + MAX + 2, 30, "descriptors are given back")
        third = max(1, len(rss) // 3)
        print(f"{sum(self.done.values())} operations {dict(self.done)}\nerrors {dict(self.errors)}\nat most {most} server connections, "
              f"RSS {max(rss[:third], default=0)} KB in the first third, {max(rss[-third:], default=0)} KB in the last")
        if not harness.sanitized(self.options.binary) and rss and max(rss[-third:]) > 1.5 * max(rss[:third]) + 4096:
            self.fail("memory grows")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default="", help="of what clients do, only these: simple,pipeline,...")
    parser.add_argument("--chaos", default="all", help="of what happens meanwhile, only these: kill,stall,cut,slice,reload,restart, or none")
    parser.add_argument("--binary", default=harness.BINARY, type=lambda path: pathlib.Path(path).resolve())
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    Soak(options).run()


if __name__ == "__main__":
    main()
