#!/usr/bin/python3
"""Random sessions of some clients, played directly and through pgsidecar with fewer server connections: what each client receives
must be the same. Clients have tables, sequences, channels and locks of their own, but texts and names are the same for all as often
as can be, so that what leaks shows. A difference is shrunk and printed as a script that --play takes, a step a line in the notation
of replay.py, with `/call OID value...` besides, "! " before what is sent in pieces, and what disturb.py has:

  a: @tls slow
  a: BEGIN
  b: ! /parse s SELECT $1::text /bind s b /execute - /sync
  a: /leave
  -: reload

The first line of a client may have "tls", and "slow" for one that reads little at a time. The texts are in differ.txt, how they are put together
in sessions.py. What may differ is in is_known(); --ignore KIND counts a kind of difference without shrinking it. Afterwards
the tables must hold the same.

  integration/differ.py [--seconds 120] [--seed N] [--mode transaction|session|statement] [--max N] [--binary PATH] [--play FILE]
"""
import argparse
import collections
import json
import pathlib
import random
import re
import select
import signal
import socket
import sys
import time

import psycopg

import disturb
import harness
import replay
import sessions
import wire
import worlds
from disturb import NOBODY, clients_of, letter
from sessions import IN_PIECES

PATIENCE = 0.1  # of the script with a client that has begun to wait for a server connection
STUCK = 12.0
SESSIONS = 12  # that a proxy serves before the next one

# Of each client, in place before each session. Both schemas have the same names, with other columns behind them.
OWN = """
RESET ROLE; SELECT lo_unlink(oid) FROM pg_largeobject_metadata WHERE oid = 7700{n};
DROP SCHEMA IF EXISTS s_{me}, r_{me}, s_{me}_old CASCADE; SET ROLE app; CREATE SCHEMA s_{me}; CREATE SCHEMA r_{me};
CREATE TABLE s_{me}.t (id int PRIMARY KEY, v text); INSERT INTO s_{me}.t VALUES (0, 'zero {me}');
CREATE TABLE r_{me}.t (v text, id bigint, w date DEFAULT '2024-02-03'); INSERT INTO r_{me}.t VALUES ('other {me}', 7);
CREATE TABLE s_{me}.d (k int UNIQUE DEFERRABLE INITIALLY DEFERRED); CREATE TABLE r_{me}.d (k int CHECK (k < 3));
CREATE SEQUENCE s_{me}.seq; CREATE SEQUENCE r_{me}.seq START {n}00; CREATE TABLE s_{me}.i (id serial, v text)
"""

# By a client of each user's of a new proxy, so that it knows its functions, and that clients ask for the values of sequences.
LEARN = ["SELECT set_inside('app.y', 'l'), set_from('l'), set_and_fail('l'), with_own_setting(), remember('l'), lock_inside(99), temp_inside('l'), cursor_inside('l'), "
         "prepare_inside('l'), say('l')", "SELECT last_inside()", "CALL set_and_commit('l')", "SELECT nextval('s_a.seq')", "SELECT currval('s_a.seq')", "DISCARD ALL"]


class Client(replay.Client):
    """One that sends in pieces, and that the script tells when to go on."""

    def __init__(self, index, texts, port, database):
        self.startup = texts.pop(0) if texts[0].startswith("@") else "@"
        super().__init__(index, [self.startup], port, database, worlds.USERS)
        self.steps, self.told = [make_step(replay.own(text, index)) for text in texts], 0
        self.parameters = dict(self.wire.parameters)  # as it was told when it was last ready
        self.wire.send = self.send

    def connect(self, port, options):
        w = wire.Wire(port)
        if "tls" in options:
            w.send(wire.request(wire.SSL_REQUEST))
            assert w.bytes(1) == b"S"
            wire.encrypted(w)
        if "slow" in options:
            w.most = 2000
            w.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        return w

    def send(self, frames):
        rng, cuts = random.Random(frames), []
        leaves = self.seen and self.step.text.startswith(disturb.CUT)
        if leaves:
            frames = frames[:rng.randrange(1, len(frames))]
        if leaves or self.seen and self.step.text.startswith(IN_PIECES):
            cuts = sorted(rng.randrange(len(frames) + 1) for _ in range(rng.choice((3, 3, 20))))
        try:
            for begin, end in zip([0, *cuts], [*cuts, len(frames)]):
                self.wire.sock.sendall(frames[begin:end])
                time.sleep(0.001 if end < len(frames) else 0)
        except OSError:
            pass  # it is read that the connection is closed
        if leaves:
            self.wire.sock.close()

    def give_up(self):
        """Leaves at once; what it was waiting for isn't known."""
        self.wire.sock.close()
        if self.waits:
            self.seen.pop()
        self.waits, self.steps = False, self.steps[:len(self.seen)]

    def take(self, message):
        # How often a parameter changes on the way doesn't matter: a RESET tells the server's default first, then what it was at the login.
        if message.type in "ZG":
            now = self.wire.parameters
            self.status = [f"status {name} {now[name]}" for name in now if now[name] != self.parameters.get(name)]
            self.parameters = dict(now)
        super().take(message)

    @property
    def busy(self):
        return self.waits or len(self.seen) < min(self.told, len(self.steps))


def make_step(text):
    plain = text.removeprefix(IN_PIECES)
    if plain.startswith(disturb.CUT):  # it asks for nothing that it could wait for
        return make_step(plain.removeprefix(disturb.CUT))._replace(text=text, readies=0, flushed=0, feeds=False)
    if not plain.startswith("/call "):
        return replay.make_step(plain)._replace(text=text)
    _, oid, *values = plain.split(" ")
    return replay.Step(text, wire.function_call(int(oid), *[value.encode() for value in values]), 1, 0, False, "")


def play(script, port, database, patience, operator=lambda what: None):
    """What each client received, step by step. The script goes on past a client that has to wait for a server connection."""
    clients = {}

    def until(condition, seconds):
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            for client in running:
                if client.busy and not client.waits:
                    client.begin()
                    client.read()  # what has come already
            waiting = [client for client in running if client.waits]
            for sock in select.select([client.wire.sock for client in waiting], [], [], 0.02)[0] if waiting else []:
                next(client for client in waiting if client.wire.sock is sock).read()
            for client in [client for client in running if client.finished]:
                running.remove(client)
                client.leave()

    try:
        for index in clients_of(script):
            clients[index] = Client(index, [text for one, text in script if one == index and text not in disturb.AT_ONCE], port, database)
        running = list(clients.values())
        for (index, text), (_, then) in zip(script, [*script[1:], (NOBODY, "")]):
            if index == NOBODY:
                operator(text)
                continue
            client = clients[index]
            if text == disturb.CANCEL:
                disturb.send_cancel(client, port)
                continue
            if text == disturb.LEAVE:
                client.give_up()
                continue
            behind, client.told = client.busy, client.told + (not text.startswith("@"))
            if then in disturb.AT_ONCE or then.startswith("kill"):
                seconds = random.Random(text + then).random() * 0.02
            else:
                seconds = 0.002 if behind else patience
            until(lambda client=client: not client.busy, seconds)
        until(lambda: not running, STUCK)
        for client in running:
            client.seen[-1].append("no answer")
    finally:
        for client in clients.values():
            client.leave()
    return {index: [(client.startup, []), *((step.text, in_order(step, seen)) for step, seen in zip(client.steps, client.seen))]
            for index, client in clients.items()}


def in_order(step, seen):
    """A notification of a pipeline's transaction may come with the pipeline's last one."""
    told = [line for line in seen if line.startswith("notification")]
    return [line for line in seen if line not in told] + told if step.readies > 1 else seen


def is_known(before, step, expected, direct, pooled):
    """What may differ from one line of the answer on; see README and CONTRIBUTING."""
    # A text that the client hasn't had described may have other columns after DDL, where a direct connection says 0A000.
    named = re.findall(r"(?:/bind (?:[^ =]+=)?|/describe S )(\S+)", step)
    if "C=0A000 M=cached plan" in " ".join(expected) and not any(f"/describe S {name} " in text for name in named for text in before):
        return True
    # Constants behind a SET of the same segment.
    if "C=0A000 M=a statement can't be prepared again" in pooled:
        return True
    # In a failed transaction a server connection that hasn't prepared the statement refuses it with its Bind or Describe.
    if "C=25P02" in pooled and re.match("bound|parameters|columns|no data|.* C=08P01", direct):
        return True
    # Behind a RESET in the same text or up to the same Sync the server's defaults count instead of what came at the login.
    if before[0] != "@" and re.search("RESET.*(;|/)", step):
        return True
    # A FATAL error of the server's says besides that the session is lost.
    if direct.startswith("S=FATAL") and pooled.startswith(direct):
        return True
    # Behind the end of a failed transaction in the same text, the client's statements aren't there by their names.
    if re.search("C=26000|C=25P02", pooled) and re.search("(COMMIT|ROLLBACK).*;.*(EXECUTE|DEALLOCATE|prepared_statements)", step):
        return True
    # A message in a COPY that isn't its data ends the connection, with other words.
    if "C=08P01 M=unexpected message type" in direct and pooled.startswith("S=FATAL C=08P01") or "C=08P01 M=terminating connection" in direct:
        return True
    # The list of the client's statements fails while one of them can't be parsed any more.
    if "prepared_statements" in step and re.search("C=42P01|C=42703|C=42883|C=0A000 M=cached plan", pooled):
        return True
    # What a client listens to isn't told in a transaction.
    if "C=0A000 M=pg_listening_channels" in pooled:
        return True
    # Nor are there transactions in statement mode.
    if "C=0A000 M=transaction blocks are not allowed" in pooled:
        return True
    # setval alone doesn't keep the client where it is.
    if "C=55000 M=currval" in pooled and any("setval" in text for text in before):
        return True
    # An error names another of the client's names for the same text.
    return re.sub(r'statement "[^"]*"', "", direct) == re.sub(r'statement "[^"]*"', "", pooled)


def first_line(expected, got):
    at = next((i for i, (a, b) in enumerate(zip(expected, got)) if a != b), min(len(expected), len(got)))
    return [(seen[at:] or ["nothing more"])[0] for seen in (expected, got)]


def tell(index, step, expected, got):
    return "\n  ".join([f"client {letter(index)}: {step[:500]}\n  direct", *(f"  {line[:300]}" for line in expected), "proxy", *(f"  {line[:300]}" for line in got)])


def difference(script, direct, pooled):
    """The first difference of the first client that has one that isn't known, as (its kind, the text to print), or None; and the
    clients that have none at all."""
    same = []
    for index, answers in pooled.items():
        if "no answer" in answers[-1][1] and "no answer" not in direct[index][-1][1]:
            return ("hang", tell(index, answers[-1][0], [], answers[-1][1])), []
        if line := disturb.foreign(index, answers):
            return ("foreign", tell(index, "", [], [line])), []
    for index in direct:
        before = []
        for (step, expected), (_, got) in zip(direct[index], pooled[index]):
            if expected != got:
                lines = first_line(expected, got)
                if is_known(before, step, expected, *lines) or disturb.is_excused(script, index, *lines):
                    break  # from here on its session is another
                kind = " / ".join((re.search(r"C=(\S+)", line) or re.match(r"(\S+)", line)).group(1) for line in lines)
                return (kind, tell(index, step, expected, got)), []
            before.append(step)
        else:
            same += [index] * (len(direct[index]) == len(pooled[index]) and (index, disturb.LEAVE) not in script)
    return None, same


class World:
    def __init__(self, options, server):
        self.options, self.server, self.proxy, self.served = options, server, None, []
        self.admins, self.tls = [], {"certificate": str(server.certificates / "server.crt"), "key": str(server.certificates / "server.key")}
        worlds.make(server)
        for name in ("equal_direct", "equal_pooled"):
            self.admins.append(server.admin(name))
            self.admins[-1].execute(f"ALTER DATABASE {name} SET lock_timeout = '1s'; SET client_min_messages = error; SET ROLE app")

    def renew(self, most):
        self.close()
        pool = {"max": most, "mode": self.options.mode, "connectionTimeoutMillis": 30000, **self.options.pool}
        config = {"pool": pool, "tls": {"mode": "allow", **self.tls}, "limits": self.options.limits, **worlds.CONFIG}
        self.proxy, self.served = harness.Proxy(self.server, config, binary=self.options.binary), []
        self.operator = disturb.Operator(self.proxy, self.admins[1])
        self.prepare([(0, "")])
        for user in worlds.USERS:
            play([(0, text) for text in [f"@user={user}", *LEARN]], self.proxy.port, "equal_pooled", STUCK)

    def close(self):
        if self.proxy:
            proxy, self.proxy = self.proxy, None
            proxy.close()

    def prepare(self, script):
        for admin in self.admins:
            disturb.roll_back_prepared(admin)
            for index in clients_of(script):
                try:
                    admin.execute("SET lock_timeout = '5s';" + replay.own(OWN, index))
                except psycopg.errors.LockNotAvailable:
                    raise AssertionError("a client's session has outlived it: " + self.proxy.log_text()[-2000:]) from None

    def compare(self, script):
        self.served.append(script)
        self.prepare(script)
        direct = play(script, self.server.port, "equal_direct", STUCK)
        disturb.settle(self.admins[0])
        pooled = play(script, self.proxy.port, "equal_pooled", PATIENCE, self.operator)
        disturb.settle(self.admins[1])
        found, same = difference(script, direct, pooled)
        for index in same if not found else []:
            tables = [disturb.contents(admin, index) for admin in self.admins]
            if tables[0] != tables[1]:
                name = next(name for name in [*tables[0], *tables[1]] if tables[0].get(name) != tables[1].get(name))
                return "contents", tell(index, name, *(tables[at].get(name, "none").splitlines() for at in (0, 1)))
        return found

    def anew(self, scripts, most):
        """The last of them on a new proxy, behind the others."""
        self.renew(most)
        for script in scripts[:-1]:
            self.compare(script)
        return self.compare(scripts[-1])


def fewer(items):
    """The list without a part of it, large parts first."""
    size = len(items)
    while size := size // 2:
        for at in range(0, len(items), size):
            yield items[:at] + items[at + size:]


def without_client(script):
    for client in [*clients_of(script), NOBODY]:
        yield [(index, text) for index, text in script if index != client]


def simpler(script):
    """With a message, or a statement, less in a step, or sent as a whole."""
    for at, (index, text) in enumerate(script):
        if index == NOBODY or text in disturb.AT_ONCE or text.startswith(disturb.CUT):
            continue
        if text.startswith(IN_PIECES):
            text = text.removeprefix(IN_PIECES)
            yield [*script[:at], (index, text), *script[at + 1:]]
        extended = text.startswith("/")
        parts = ["/" + part for part in replay.COMMANDS.split(text) if part.strip()] if extended else text.split("; ")
        for drop in range(len(parts) - extended if len(parts) > 1 else 0):  # what it ends with asks for the answer
            yield [*script[:at], (index, (" " if extended else "; ").join(parts[:drop] + parts[drop + 1:])), *script[at + 1:]]


def shrink(items, ways, fails, deadline):
    """The least that still fails, as far as time goes."""
    tries = (less for way in ways for less in way(items))
    while time.monotonic() < deadline:
        less = next(tries, None)
        if less is None:
            break
        if less and fails(less):
            items, tries = less, (less for way in ways for less in way(items))
    return items


def read_scripts(path):
    """Played one after the other; "--" is between them."""
    scripts = [[]]
    for line in path.read_text().splitlines():
        if line == "--":
            scripts.append([])
        elif re.match("[a-f-]: ", line):
            scripts[-1].append((replay.LETTERS.find(line[0]), line[3:]))  # of "-" NOBODY's
    return scripts


class Differ:
    def __init__(self, options, world):
        self.options, self.world, self.kinds = options, world, collections.Counter()

    def explain(self, kind, text, seed, most):
        """Shrinks and prints the difference that the last script has shown."""
        world, scripts, deadline = self.world, self.world.served, time.monotonic() + self.options.shrink

        def fails(scripts):  # some only with luck
            return any((found := world.anew(scripts, most)) and found[0] == kind for _ in range(2))

        if fails(scripts[-1:]):
            scripts = scripts[-1:]
        elif fails(scripts):
            earlier = shrink(scripts[:-1], [fewer], lambda less: fails([*less, scripts[-1]]), deadline)
            scripts = [*earlier, scripts[-1]]
        else:
            print(f"== seed {seed}, max {most}: {kind}, once", text, sep="\n", flush=True)
            return
        least = shrink(scripts[-1], [without_client, fewer, simpler], lambda less: any(not text.startswith("@") for _, text in less) and fails([*scripts[:-1], less]), deadline)
        _, text = world.anew([*scripts[:-1], least], most) or (kind, f"not each time; at first\n{text}")
        print(f"== seed {seed}, max {most}: {kind}" + (f", behind {len(scripts) - 1} other sessions" if scripts[1:] else ""))
        for script in scripts[:-1]:
            print(*(f"{letter(index)}: {step}" for index, step in script), "--", sep="\n")
        print(*(f"{letter(index)}: {step}" for index, step in least), text, sep="\n", flush=True)

    def run(self):
        options, world, seed, began = self.options, self.world, self.options.seed, time.monotonic()
        while time.monotonic() - began < options.seconds:
            most = options.max or 2 + seed // SESSIONS % 2
            if not world.proxy or len(world.served) >= SESSIONS:
                world.renew(most)
            if found := world.compare(sessions.make_script(random.Random(seed), options.mode, options.disturb, options.topics)):
                self.kinds[found[0]] += 1
                if self.kinds[found[0]] <= options.each and found[0] not in options.ignore:
                    self.explain(*found, seed, most)
                world.renew(most)
            seed += 1
        print(f"{seed - options.seed} sessions, differences {dict(self.kinds)}")

    def play(self):
        found = self.world.anew(read_scripts(self.options.play), self.options.max or 2)
        self.kinds.update([found[0]] if found else [])
        print(found[1] if found else "no difference")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=1, help="of the first session; the next one has the next")
    parser.add_argument("--mode", default="transaction", choices=("transaction", "session", "statement"))
    parser.add_argument("--max", type=int, default=0, help="server connections (default: 2 and 3 in turn, in session mode 6)")
    parser.add_argument("--disturb", type=float, default=1.0, help="so many times as often as usual; 0: not")
    parser.add_argument("--binary", default=harness.BINARY, type=lambda path: pathlib.Path(path).resolve())
    parser.add_argument("--each", type=int, default=1, help="of each kind of difference, shrink and print so many")
    parser.add_argument("--ignore", action="append", default=[], help="a kind of difference that is only counted")
    parser.add_argument("--shrink", type=float, default=60, help="seconds to shrink one")
    parser.add_argument("--topics", type=lambda text: text.split(","), help="of differ.txt, in short sessions; default: some, in longer ones")
    parser.add_argument("--pool", type=json.loads, default={}, help="more of the proxy's pool, as JSON, and of its --limits")
    parser.add_argument("--limits", type=json.loads, default={})
    parser.add_argument("--play", type=lambda path: pathlib.Path(path).resolve(), help="a script instead")
    options = parser.parse_args()
    if options.mode == "session":
        options.max = options.max or len(replay.LETTERS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with harness.Postgres(plain=True) as server:
        world = World(options, server)
        differ = Differ(options, world)
        try:
            differ.play() if options.play else differ.run()
        finally:
            world.close()
    sys.exit(bool(differ.kinds))


if __name__ == "__main__":
    main()
