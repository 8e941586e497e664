"""Plays a case, a few lines by one client, with several clients at the same time, and writes down what each of them receives.

A line of a case is one step: SQL (a simple query), or protocol messages, each beginning with a slash:
    /parse NAME[:oid,...] SQL   /bind [PORTAL=]STATEMENT value...   /describe S|P NAME   /execute PORTAL [rows]   /close S|P NAME
    /query SQL   /data text   /done   /fail reason   /flush   /sync
`-` is the empty name, NULL a null value, 0xAB a binary one; ">1,0" behind Bind's values are the formats of the columns. A step is over when
all that it asks for has come; one that asks for nothing is over at once.
{me} is the client's letter, {n} its number, {next} another client's letter; {locks} and {statements} are queries of one's own
advisory locks and prepared statements. The first line may be "@user=U key='value' ...", startup parameters, and options: "together"
gives all clients their next step at once, "learned" plays the case by one client first, so that the proxy knows its functions.
"~SQLSTATE step" accepts that error instead of what a direct connection gives.
"""
import random
import re
import select
import shlex
import struct
import time
from typing import NamedTuple

import wire

LETTERS = "abcdef"
LOCKS = ("SELECT classid, objid, objsubid, mode, granted, count(*) FROM pg_locks WHERE locktype = 'advisory' AND (objid = {n} OR classid = {n}) "
         "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4")
STATEMENTS = "SELECT name, statement, parameter_types, from_sql FROM pg_prepared_statements ORDER BY name"
COMMANDS = re.compile(r"(?:^|\s)/(?=(?:parse|bind|describe|execute|close|query|data|done|fail|flush|sync)\b)")
ONE_REPLY = ("parse", "bind", "describe", "execute", "close")


class Step(NamedTuple):
    text: str
    frames: bytes
    readies: int  # ReadyForQuery that it asks for
    flushed: int  # replies that it asks for by Flush; 0 without one
    feeds: bool  # ends a COPY FROM STDIN
    accepts: str  # an SQLSTATE or ""


def read_cases(path):
    """name -> steps of a file where "== name" begins a case and each line is a step."""
    cases = {}
    for text in filter(None, path.read_text().splitlines()):
        if text.startswith("== "):
            assert text[3:] not in cases, text
            steps = cases[text[3:]] = []
        else:
            steps.append(text)
    return cases


def own(text, index):
    text = text.replace("{locks}", LOCKS).replace("{statements}", STATEMENTS).replace("{long}", "{me}" * 5000).replace("{huge}", "{me}" * 100000).replace("{newline}", "\n")
    return text.replace("{me}", LETTERS[index]).replace("{n}", str(index + 1)).replace("{next}", LETTERS[(index + 1) % len(LETTERS)])


def unnamed(name):
    return "" if name == "-" else name


def encode(command):
    """A command of the notation as the protocol's message."""
    verb, _, rest = command.partition(" ")
    if verb == "parse":
        name, _, sql = rest.partition(" ")
        name, _, types = name.partition(":")
        return wire.parse(sql, unnamed(name), [int(t) for t in types.split(",") if t])
    if verb == "bind":
        target, *values = rest.split(" ")
        portal, equals, statement = target.rpartition("=")
        results = [int(form) for form in values.pop()[1:].split(",")] if values and re.fullmatch(r">[\d,]+", values[-1]) else ()
        formats = [int(v.startswith("0x")) for v in values]
        values = [None if v == "NULL" else bytes.fromhex(v[2:]) if v.startswith("0x") else v for v in values]
        return wire.bind(unnamed(statement), values, unnamed(portal) if equals else "", formats if any(formats) else (), results)
    if verb in ("describe", "close"):
        kind, name = rest.split(" ")
        return getattr(wire, verb)(kind, unnamed(name))
    if verb == "execute":
        portal, _, rows = rest.partition(" ")
        return wire.execute(unnamed(portal), int(rows or 0))
    if verb in ("query", "fail"):
        return {"query": wire.query, "fail": wire.copy_fail}[verb](rest)
    if verb == "data":
        return wire.copy_data((rest + "\n").encode())
    return {"done": wire.COPY_DONE, "flush": wire.FLUSH, "sync": wire.SYNC}[verb]


def make_step(text):
    accepts = ""
    if text.startswith("~"):
        accepts, _, text = text[1:].partition(" ")
    if not text.startswith("/"):
        return Step(text, wire.query(text), 1, 0, False, accepts)
    commands = [c.strip() for c in COMMANDS.split(text) if c.strip()]
    verbs = [c.split(" ")[0] for c in commands]
    flushed = sum(v in ONE_REPLY for v in verbs) if verbs[-1] == "flush" else 0
    return Step(text, b"".join(map(encode, commands)), verbs.count("query") + verbs.count("sync"), flushed, "done" in verbs or "fail" in verbs, accepts)


def startup(lines, index=0):
    """The startup parameters of a case, its options and its steps."""
    if not lines[0].startswith("@"):
        return {}, set(), lines
    words = shlex.split(own(lines[0][1:], index))
    return dict(word.split("=", 1) for word in words if "=" in word), {word for word in words if "=" not in word}, lines[1:]


def neutral(text):
    """Without what may differ between two runs that are equal: process ids, temporary schemas, the database's name."""
    text = re.sub(r"\bpg_(toast_)?temp_\d+", r"pg_\1temp_N", text)
    text = re.sub(r"\bprocess \d+", "process N", text, flags=re.IGNORECASE)
    text = re.sub(r"\bfor type \d+", "for type N", text)
    return re.sub(r"\bequal_(direct|pooled)\b", "equal", text)


def describe_columns(body):
    """RowDescription without object ids of tables and own types."""
    count, at, columns = struct.unpack_from("!h", body)[0], 2, []
    for _ in range(count):
        end = body.index(b"\0", at)
        table, number, kind, size, modifier, form = struct.unpack_from("!IhIhih", body, end + 1)
        columns.append(f"{body[at:end].decode()}({'own' if kind >= 16384 else kind},{size},{modifier},{form}{',%d' % number if table else ''})")
        at = end + 19
    return " ".join(columns)


PLAIN = {"1": "parsed", "2": "bound", "3": "closed", "I": "empty", "n": "no data", "s": "suspended", "c": "copied"}


def line(message):
    """A message as a line that can be compared and read."""
    kind, body = message
    if kind in PLAIN:
        return PLAIN[kind]
    if kind == "D":
        return "row " + neutral(" | ".join("NULL" if v is None else v.decode(errors="replace") for v in message.row))
    if kind == "T":
        return "columns " + describe_columns(body)
    if kind == "t":
        return "parameters " + " ".join("own" if t >= 16384 else str(t) for t in struct.unpack_from(f"!{struct.unpack_from('!h', body)[0]}I", body, 2))
    if kind in "EN":
        # By its routine drivers know "cached plan must not change result type".
        keys = "SCMDHPpqWstcdn" + "R" * (message.error.get("C") == "0A000")
        return neutral(" ".join(f"{k}={message.error[k]}" for k in keys if k in message.error))
    if kind == "A":
        channel, payload = body[4:].split(b"\0")[:2]
        return f"notification {channel.decode()} {payload.decode()}"
    if kind == "S":
        return "status " + body.replace(b"\0", b" ").decode().strip()
    return f"{ {'C': 'done', 'Z': 'ready', 'd': 'data', 'G': 'copy in', 'H': 'copy out'}.get(kind, kind)} {body.rstrip(chr(0).encode()).decode(errors='replace')}"


class Client:
    """One client that goes through a case; `seen` has a list of lines for each step."""

    def __init__(self, index, lines, port, database, users):
        parameters, options, lines = startup(lines, index)
        user = parameters.pop("user", "app")
        self.index, self.steps = index, [make_step(own(text, index)) for text in lines]
        self.seen, self.owed, self.replies, self.waits = [], 0, 0, False
        self.failed = False  # in the extended protocol, so that all is ignored until a Sync
        self.wire = self.connect(port, options)
        failure = self.wire.login(user, users[user], database, **parameters)
        assert failure is None, failure.error

    def connect(self, port, _options):
        return wire.Wire(port)

    @property
    def step(self):
        return self.steps[len(self.seen) - 1]

    @property
    def finished(self):
        return not self.waits and len(self.seen) == len(self.steps)

    def begin(self):
        self.seen.append([])
        self.owed += self.step.readies
        self.replies, self.status = 0, []
        self.waits = self.step.readies > 0 or self.step.flushed > 0 and not self.failed or self.step.feeds and self.owed > 0
        self.wire.send(self.step.frames)

    def read(self):
        """Takes what has come; called when something has."""
        try:
            while self.waits and self.wire.ready():
                self.take(self.wire.recv())
        except (wire.Closed, ConnectionResetError):
            self.seen[-1].append("closed")
            self.waits, self.steps = False, self.steps[:len(self.seen)]

    def take(self, message):
        if message.type == "S":  # in no order that means anything
            self.status.append(line(message))
            return
        if message.type in "ZG":
            self.seen[-1] += sorted(self.status)
            self.status = []
        self.seen[-1].append(line(message))
        step = self.step
        self.replies += message.type in "123TnCsIE"
        if message.type == "Z":
            self.owed, self.failed = self.owed - 1, False
        elif message.type == "E":
            self.failed = True
        if message.type == "G":
            self.waits = step.feeds
        elif step.readies or step.feeds:
            self.waits = self.owed > 0
        else:
            self.waits = self.replies < step.flushed and not self.failed

    def leave(self):
        try:
            self.wire.send(wire.TERMINATE)
        except OSError:
            pass
        self.wire.sock.close()


def play(lines, port, database, users, seed, count=len(LETTERS)):
    """What each client received, step by step. Up to three at a time are given their next step, in a random order; one that has to
    wait for a server connection waits while the others go on."""
    rng = random.Random(seed)
    together = "together" in startup(lines)[1]
    clients = []
    try:
        for index in range(count):
            clients.append(Client(index, lines, port, database, users))
        running, deadline = list(clients), time.monotonic() + 15
        while running:
            assert time.monotonic() < deadline, f"no answer to {[(c.index, c.step.text) for c in running if c.waits]}"
            free = [c for c in running if not c.waits]
            for client in rng.sample(free, len(free) if together else min(len(free), rng.randint(1, 3))):
                client.begin()
            until = time.monotonic() + 0.02
            while waiting := [c for c in running if c.waits]:
                for sock in select.select([c.wire.sock for c in waiting], [], [], max(0.0, until - time.monotonic()))[0]:
                    next(c for c in waiting if c.wire.sock is sock).read()
                if time.monotonic() >= until:
                    break
            for client in [c for c in running if c.finished]:
                running.remove(client)
                client.leave()
    finally:
        for client in clients:
            client.leave()
    return [client.seen for client in clients]


def differences(lines, direct, pooled):
    """What is told of a case that fails: the first step that differs, as two of the clients saw it."""
    texts = [text for text in lines if not text.startswith("@")]
    found = []
    for index, (expected, got) in enumerate(zip(direct, pooled)):
        for text, a, b in zip(texts, expected, got):
            accepted = make_step(own(text, index)).accepts
            if a != b and not (accepted and any(f" C={accepted} " in seen for seen in b)):
                short = ["\n    ".join(line[:300] for line in one if line not in other) or "(other order or number)" for one, other in ((a, b), (b, a))]
                found.append(f"client {LETTERS[index]}: {own(text, index)[:300]}\n  direct\n    {short[0]}\n  proxy\n    {short[1]}")
                break
    return "\n".join([f"{len(found)} of {len(direct)} clients", *found[:2]]) if found else ""
