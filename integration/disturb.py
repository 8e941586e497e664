"""What disturbs the sessions of differ.py, and what may differ by it. Steps of a client's own, which don't wait for their turn:

  a: /cancel         cancels what the client has asked for: that, and nobody else's, ends with 57014, or with its answer
  a: /leave          closes its connection, whatever it waits for
  a: /cut STEP       in its turn: sends a part of the step's last message, or less, and closes its connection

and of nobody, which only the proxy knows:

  -: reload          SIGHUP, with something changed
  -: reconnect       all server connections are to be closed when they are free: neither is noticed
  -: kill N          the Nth server connection is terminated: who holds it is told; who doesn't, doesn't notice
"""
import re
import struct
import time

import replay
import wire

NOBODY = -1
CANCEL, LEAVE, CUT = "/cancel", "/leave", "/cut "
AT_ONCE = (CANCEL, LEAVE)
LOST = "C=57P01|C=57P02|C=0800[36]|C=25P02|C=01000 M=notifications may have been lost|C=58000|closed"
# What only one client says of itself.
MARKS = re.compile(r"\b(?:zero|other|local|temporary|by|do|bound|two|both|kept|slept|held|new|undone)[ -]([a-f])\b")
# Of the tables of a client's that a session may have written to.
CONTENTS = """SELECT n.nspname || '.' || c.relname, query_to_xml(format('SELECT * FROM %I.%I AS x ORDER BY x::text', n.nspname, c.relname), true, true, '')::text
    FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE relkind = 'r' AND nspname IN ('s_{me}', 'r_{me}', 's_{me}_old') ORDER BY 1"""
BUSY = "SELECT count(*) FROM pg_stat_activity WHERE client_port > 0 AND datname = current_database() AND state <> 'idle'"


def letter(index):
    return replay.LETTERS[index] if index != NOBODY else "-"


def clients_of(script):
    return sorted({index for index, _ in script if index != NOBODY})


def put_in(rng, script, often):
    """Disturbs the script, `often` times as often as usual. What a client does by itself follows something that it has asked for."""

    def at_random(share, most, step):
        for _ in range(rng.randint(1, most) if rng.random() < share * often else 0):
            at = rng.randrange(len(script))
            script.insert(at + 1, step(script[at][0]))

    at_random(0.12, 1, lambda client: (client, LEAVE))
    at_random(0.2, 4, lambda client: (client, CANCEL))
    at_random(0.25, 4, lambda _: (NOBODY, rng.choice(("reload", "reconnect"))))
    at_random(0.12, 3, lambda _: (NOBODY, f"kill {rng.randrange(4)}"))


def send_cancel(client, port):
    """Until it has been passed on, as PQcancel does."""
    with wire.Wire(port) as canceler:
        canceler.send(wire.request(wire.CANCEL_REQUEST, struct.pack("!I", client.wire.pid) + client.wire.key))
        canceler.closed()


class Operator:
    """Does to a proxy what nobody asks for."""

    def __init__(self, proxy, admin):
        self.proxy, self.admin, self.reloads = proxy, admin, 0

    def __call__(self, what):
        verb, _, number = what.partition(" ")
        getattr(self, verb)(*map(int, number.split()))

    def reload(self):
        self.reloads += 1
        pool = {**self.proxy.config["pool"], "idleTimeoutMillis": 20000 + self.reloads % 2}
        self.proxy.write_config({**self.proxy.config, "pool": pool})
        self.proxy.signal(1)

    def reconnect(self):
        status, _, text = self.proxy.http("/api/admin/reconnect", "POST")
        assert status == 200, text

    def kill(self, number):
        self.admin.execute("RESET ROLE")
        pids = [row[0] for row in self.admin.execute("SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND client_port > 0 ORDER BY 1")]
        if pids:
            self.admin.execute("SELECT pg_terminate_backend(%s)", [pids[number % len(pids)]])
        self.admin.execute("SET ROLE app")


def is_excused(script, index, direct, pooled):
    """What a disturbed client's first line that differs may be."""
    if (index, CANCEL) in script and ("C=57014" in direct or "C=57014" in pooled):
        return True
    if (NOBODY, "reconnect") in script and "C=01000 M=notifications may have been lost" in pooled:
        return True
    return any(text.startswith("kill") for one, text in script if one == NOBODY) and (re.search(LOST, pooled) or pooled == "ready E")


def foreign(index, answers):
    """The first line that tells of another client, whatever has happened before."""
    own = replay.LETTERS[index]
    return next((line for _, seen in answers for line in seen if "used by a " not in line and any(mark != own for mark in MARKS.findall(line[:500]))), None)


def settle(admin):
    """Waits until the sessions of clients that have left are over."""
    deadline = time.monotonic() + 3
    while admin.execute(BUSY).fetchone()[0] and time.monotonic() < deadline:
        time.sleep(0.005)
    roll_back_prepared(admin)


def roll_back_prepared(admin):
    """What is prepared has a name in all databases."""
    admin.execute("RESET ROLE")
    for (gid,) in admin.execute("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()").fetchall():
        admin.execute(f"ROLLBACK PREPARED '{gid}'")
    admin.execute("SET ROLE app")


def contents(admin, index):
    admin.execute("RESET ROLE")
    return dict(admin.execute(replay.own(CONTENTS, index)).fetchall())
