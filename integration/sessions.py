"""What the clients of differ.py do: random texts of differ.txt, one after the other or as transactions, pipelines, COPY and portals, and what
disturbs them: see disturb.py."""
import pathlib

import disturb
import replay

# By topic; a heading is the topic's weight and name.
TEXTS = [(int(name.split(" ")[0]), texts) for name, texts in replay.read_cases(pathlib.Path(__file__).parent / "differ.txt").items()]
TOPICS = [name.split(" ", 1)[1] for name in replay.read_cases(pathlib.Path(__file__).parent / "differ.txt")]
# With values that fit; most clients prepare the same.
PREPARED = [("SELECT $1::text, 'same'", ["{me}"]), ("SELECT $1::int + 1", ["{n}"]), ("SELECT '{me}', $1", ["{n}"]), ("SELECT 1 / $1::int", ["{n}"]),
            ("SELECT 1 / $1::int", ["0"]), ("SELECT * FROM t WHERE id = $1", ["0"]), ("INSERT INTO t (id, v) VALUES ($1, $2)", ["{n}", "{me}"]),
            ("SELECT id, name FROM numbers ORDER BY id", []), ("SELECT set_config('app.x', $1, false)", ["bound-{me}"]),
            ("SELECT set_inside('app.y', $1)", ["bound-{me}"]), ("SELECT $1::date, DATE '2024-02-03'", ["2024-05-06"]), ("SELECT nextval($1)", ["seq"]),
            ("SELECT pg_advisory_lock($1)", ["{n}"]), ("SELECT pg_advisory_unlock($1)", ["{n}"]), ("SELECT count(*) FROM numbers, t", []), ("", []),
            ("SELECT $1::int[], pg_typeof($1)", ["{1,2}"]), ("SELECT pg_notify('ch_{me}', $1)", ["x"]), ("SELECT length($1), '{me}'", ["{huge}"])]
# Binary, and with types of their own.
PREPARED += [("SELECT $1 + 1, '{me}'", ["0x0000000{n}"]), ("SELECT $1::int8, $2::text, $1 IS NULL", ["0x000000000000000{n}", "{me}"]), ("SELECT $1::bool, $1::text", ["0x01"]),
             ("SELECT $1::uuid, $2::date", ["0x0102030405060708090a0b0c0d0e0f1{n}", "0x00000{n}6d"]), ("SELECT $1::timestamptz, now() IS NULL", ["0x0002{n}00000000000"]),
             ("SELECT $1::int", ["0x01"]), ("SELECT $1::text, '{me}'", ["NULL"]), ("SELECT v, id FROM t WHERE id = $1", ["0x00000000"]),
             ("UPDATE t SET v = $2 WHERE id = $1 RETURNING id, v", ["0x00000000", "{me}"]), ("SELECT $1::numeric * 2, $2::jsonb", ["1{n}.5", '{"a":"{me}"}'])]
# set_config, int4div, nextval by text, pg_advisory_lock, pg_notify
CALLS = ["/call 2078 app.x called-{me} f", "/call 2078 work_mem 3{n}MB f", "/call 154 {n} 0", "/call 154 9 {n}", "/call 2880 {n}", "/call 3036 ch_{me} called",
         "/call 999999 {n}", "/call 1574 seq"]
# What drivers send: of JDBC with autosave, pgx, asyncpg, psycopg, Npgsql, PostgREST, Rails. {sql} stands for a text, {values} for what fits s.
DRIVERS = [
    ["/parse - BEGIN /bind - /execute - /parse S_2 SAVEPOINT PGJDBC_AUTOSAVE /bind S_2 /execute - /parse - {sql} /bind - /describe P - /execute - /sync",
     "/bind S_2 /execute - /parse - {sql} /bind - /describe P - /execute - /sync", "/parse S_3 ROLLBACK TO SAVEPOINT PGJDBC_AUTOSAVE /bind S_3 /execute - /sync",
     "/bind S_2 /execute - /bind s {values} /describe P - /execute - /sync", "/bind S_3 /execute - /sync", "/parse - COMMIT /bind - /execute - /sync", "/close S S_2 /close S S_3 /sync"],
    ["/parse pgx_1 {sql} /describe S pgx_1 /sync", "/bind pgx_1 {values} >1 /describe P - /execute - /close P - /sync", "/bind pgx_1 >0 /describe P - /execute - /sync", "/close S pgx_1 /sync"],
    ["BEGIN;", "/parse __asyncpg_stmt_1__ {sql} /describe S __asyncpg_stmt_1__ /flush /bind __asyncpg_portal_2__=__asyncpg_stmt_1__ /sync",
     "/execute __asyncpg_portal_2__ 2 /sync", "/execute __asyncpg_portal_2__ 2 /sync", "/close P __asyncpg_portal_2__ /sync", "COMMIT;", "/close S __asyncpg_stmt_1__ /sync",
     "SELECT pg_advisory_unlock_all(); CLOSE ALL; UNLISTEN *; RESET ALL;"],
    ["/parse - BEGIN /bind - /execute - /parse _pg3_0 {sql} /bind _pg3_0 /describe P - /execute - /sync", "/bind _pg3_0 /describe P - /execute - /sync /bind _pg3_0 /describe P - /execute - /sync",
     "/parse - DEALLOCATE _pg3_0 /bind - /describe P - /execute - /sync /parse - COMMIT /bind - /execute - /sync", "/parse - DEALLOCATE ALL /bind - /execute - /sync"],
    ["/query DISCARD ALL /parse - {sql} /bind - /describe P - /execute - /sync", "/query BEGIN ISOLATION LEVEL READ COMMITTED /parse _p1 {sql} /describe S _p1 /sync",
     "/bind _p1 /execute - /close P - /sync", "/query ROLLBACK /bind _p1 /execute - /sync",
     "SET SESSION AUTHORIZATION DEFAULT; RESET ALL; CLOSE ALL; UNLISTEN *; SELECT pg_advisory_unlock_all(); DISCARD SEQUENCES; DISCARD TEMP"],
    ["/parse - BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE /bind - /execute - /sync",
     "/parse 0 select set_config('search_path', $1, true), set_config('role', $2, true), set_config('app.x', $3, true) /bind 0 s_{me},public writer claims-{me} /execute - /sync",
     "/parse 1 {sql} /bind 1 /execute - /sync", "/parse - COMMIT /bind - /execute - /sync", "/bind 1 /execute - /sync"],
    ["SET client_min_messages TO 'warning'; SET standard_conforming_strings = on; SET SESSION timezone TO 'UTC'", "/parse a1 {sql} /describe S a1 /sync", "/bind a1 {values} /execute - /sync",
     "DEALLOCATE a1", "/parse a1 {sql} /describe S a1 /sync", "/bind a1 /execute - /sync", "BEGIN", "SAVEPOINT active_record_1", "/bind a1 /execute - /sync",
     "ROLLBACK TO SAVEPOINT active_record_1", "RELEASE SAVEPOINT active_record_1", "COMMIT"]]
IN_PIECES = "! "
STARTUP = ["", "@search_path=s_{me}", "@search_path=s_{me}", "@search_path=s_{me} application_name={me}", "@search_path=r_{me} datestyle=German",
           "@options='-c work_mem=5MB -c search_path=s_{me}'", "@user=boss search_path=s_{me}", "@user=boss search_path=s_{me} role=app",
           "@search_path=s_{me} client_encoding=LATIN1 timezone=Asia/Tokyo", "@user=other search_path=s_{me}"]


class Maker:
    """What one client does. Knows what it has probably prepared, so that most of what it sends is valid."""

    def __init__(self, rng, topics, mode):
        self.rng, self.topics, self.mode, self.values = rng, topics, mode, {}

    def sql(self):
        return self.rng.choice(self.rng.choices([texts for _, texts in self.topics], [weight for weight, _ in self.topics])[0])

    def several(self):
        texts = [self.sql() for _ in range(self.rng.randint(2, 4))]
        return ["; ".join(text for text in texts if not text.startswith("COPY"))]

    def transaction(self):
        between = [step for _ in range(self.rng.randint(1, 4)) for step in self.steps(nested=True)]
        return ["BEGIN", *between, self.rng.choice(("COMMIT", "COMMIT", "ROLLBACK"))]

    def segment(self):
        """Up to its Sync."""
        rng, parts = self.rng, []
        for _ in range(rng.choice((1, 1, 1, 2))):
            name, portal = rng.choice("--sstu"), rng.choice("---p")
            if name not in self.values or rng.random() < 0.35:
                if name != "-" and rng.random() < 0.8:
                    parts.append(f"/close S {name}")
                sql, values = rng.choice(PREPARED) if rng.random() < 0.6 else (self.sql(), [])
                if "EXECUTE" in sql and name != "-":
                    continue  # one that executes itself has PostgreSQL 15 crash
                if not sql.startswith("COPY"):
                    self.values[name] = values
                parts.append(f"/parse {name} {sql}")
            if rng.random() < 0.3:
                parts.append(f"/describe S {name}")
            values = self.values.get(name, []) + ["1"] * (rng.random() < 0.04) + rng.choice(([], [], [], [], [">1"], [">0"], [">1,0"]))
            parts.append(" ".join([f"/bind {'' if portal == '-' else portal + '='}{name}", *values]))
            if rng.random() < 0.3:
                parts.append(f"/describe P {portal}")
            parts += [f"/execute {portal} {rng.choice((0, 0, 0, 1, 2))}" for _ in range(rng.choice((1, 1, 1, 2)))]
            parts += rng.choice(([], [], [], [f"/close P {portal}"], [f"/close S {name}"], [f"/describe S {name}"], [f"/execute {rng.choice('pc')} 1"]))
        return " ".join(parts)

    def pipeline(self):
        parts = [f"{self.segment()} /sync".strip() if self.rng.random() < 0.85 else f"/query {self.sql()}" for _ in range(self.rng.choice((1, 1, 1, 2, 3, 4)))]
        return [" ".join(parts)] if not any("COPY" in part and "STDIN" in part for part in parts) else []

    def flushed(self):
        return [f"{self.segment()} /flush".strip(), self.rng.choice(("/sync", f"{self.segment()} /sync".strip()))]

    def copy(self):
        data, end = self.rng.choice(("/data 3{n}\t{me}", "/data 3{n}\t{me} /data 4{n}\t{me}", "/data wrong\t{me}")), self.rng.choice(("/done", "/done", "/fail no"))
        sql = f"COPY {self.rng.choice(('t', 't', 'tmp', 'nope'))} FROM STDIN"
        return self.rng.choice(([sql, f"{data} {end}"], [f"SELECT 1; {sql}; {self.sql()}", f"{data} {end}"], [f"/query {sql} {data} {end} /query SELECT '{{me}}'"],
                                [f"/parse - {sql} /bind - /execute - /flush", f"{data} {end} /sync"], [f"/parse - {sql} /bind - /execute - {data} {end} /sync"]))

    def portal(self):
        """One that is read by and by, in a transaction, with something else in between."""
        rng, sql = self.rng, self.rng.choice(("SELECT id, '{me}' FROM numbers ORDER BY id", "SELECT 6 / (id - 5) FROM numbers ORDER BY id", self.sql()))
        if "COPY" in sql or "EXECUTE" in sql:
            return []
        reads = ["/execute p 2", "/execute p 3 /execute p 1", "/describe P p /execute p 1", "/parse - SELECT 1 /bind - /execute -", "/execute p 0", "/close P p",
                 "/flush /execute p 1"]
        steps = [f"{rng.choice(reads)} /sync" if rng.random() < 0.7 else rng.choice((self.sql(), "FETCH 1 FROM p", "MOVE 1 IN p", "CLOSE p", "SAVEPOINT x", "ROLLBACK TO x"))
                 for _ in range(rng.randint(2, 6))]
        return ["BEGIN", f"/parse - {sql} /bind p=- /execute p {rng.choice((0, 1, 2))} /sync", *steps, rng.choice(("COMMIT", "/execute p 1 /parse - COMMIT /bind - /execute - /sync", "ROLLBACK"))]

    def driver(self):
        """The beginning of what a driver does, with something in between."""
        rng, steps = self.rng, self.rng.choice(DRIVERS)
        sql = self.sql() if rng.random() < 0.5 else rng.choice(PREPARED)[0]
        if any(word in sql for word in ("COPY", "EXECUTE", "BEGIN", "START")):
            return []
        steps = [step.replace("{sql}", sql).replace("{values}", " ".join(self.values.get("s", []))) for step in steps[:rng.randint(2, len(steps))]]
        for _ in range(rng.choice((0, 0, 1, 2))):
            steps.insert(rng.randrange(1, len(steps) + 1), rng.choice((self.sql(), "COMMIT", "SELECT 1/0")))
        return [step for step in steps if "COPY" not in step]

    def mixture(self):
        """Of messages in any order, two portals and Flush among them."""
        rng, parts = self.rng, []
        names, portals = "sstu-", "pq-"
        for _ in range(rng.randint(2, 9)):
            name, portal = rng.choice(names), rng.choice(portals)
            bound = " ".join([f"/bind {'' if portal == '-' else portal + '='}{name}", *self.values.get(name, [])])
            sql, values = rng.choice(PREPARED) if rng.random() < 0.7 else (self.sql(), [])
            choice = rng.choices(("parse", "bind", "execute", "describe", "close", "flush", "query"), (20, 30, 30, 10, 6, 5, 2))[0]
            if choice == "parse" and ("COPY" in sql or "EXECUTE" in sql) or choice == "query" and "COPY" in sql:
                continue
            if choice == "parse":
                self.values[name] = values
            parts.append({"parse": f"/parse {name} {sql}", "bind": bound, "execute": f"/execute {portal} {rng.choice((0, 0, 1, 2))}",
                          "describe": rng.choice((f"/describe S {name}", f"/describe P {portal}")), "close": rng.choice((f"/close S {name}", f"/close P {portal}")),
                          "flush": "/flush", "query": f"/sync /query {sql}"}[choice])
        text = " ".join([*parts, rng.choice(("/sync", "/sync", "/sync", "/sync /sync"))])
        return [text] if rng.random() < 0.7 else ["BEGIN", text, rng.choice((f"{bound} /execute {portal} 1 /sync", "/execute p 1 /execute q 1 /sync", self.sql())), rng.choice(("COMMIT", "ROLLBACK"))]

    def end(self):
        """Of one that leaves in the middle of something that can't be committed then."""
        step = self.rng.choice((self.sql(), f"{self.segment()} /sync".strip(), "/parse - INSERT INTO i (v) VALUES ('cut {me}') /bind - /execute - /sync"))
        steps = self.rng.choice(([step], ["BEGIN", "INSERT INTO i (v) VALUES ('cut {me}')", step], ["COPY i (v) FROM STDIN", "/data {me} /data {me} /done"]))
        return [*steps[:-1], disturb.CUT + steps[-1]] if not any(word in step for word in ("COPY", "CALL", "COMMIT", "DO ")) else []

    def steps(self, nested=False):
        kinds = {lambda: [self.sql()]: 30, self.several: 10, self.pipeline: 36, self.flushed: 5, self.copy: 5, lambda: [self.rng.choice(CALLS)]: 3, self.mixture: 14,
                 self.transaction: 0 if nested or self.mode == "statement" else 12, self.portal: 0 if nested or self.mode == "statement" else 4,
                 self.driver: 0 if nested or self.mode == "statement" else 10}
        return self.rng.choices(list(kinds), kinds.values())[0]()


def make_startup(rng):
    text = rng.choice(STARTUP)
    options = " ".join(option for option, share in (("tls", 0.25), ("slow", 0.1)) if rng.random() < share)
    return f"{text or '@'} {options}".strip() if options else text


def in_pieces(rng, text):
    return IN_PIECES * (not text.startswith(("@", disturb.CUT)) and rng.random() < 0.4) + text


def make_script(rng, mode, often, wanted=None):
    """A list of (client, step)."""
    texts = [topic for name, topic in zip(TOPICS, TEXTS) if not wanted or name in wanted]
    left, topics = {}, rng.sample(texts, min(len(texts), rng.randint(2, 7)))  # few, so that not everyone is pinned for other reasons
    for client in range(rng.choice((2, 2, 3, 3) if wanted else (2, 3, 3, 4, 4, 5, 6))):
        maker = Maker(rng, topics, mode)
        steps = [step for _ in range(rng.randint(2, 7 if wanted else 12)) for step in maker.steps()]
        left[client] = [text for text in [make_startup(rng)] if text] + steps + (maker.end() if rng.random() < 0.1 * often else [])
    order = [client for client, steps in left.items() for _ in steps]
    rng.shuffle(order)
    script = [(client, in_pieces(rng, text)) for client in order for text in [left[client].pop(0)]]
    disturb.put_in(rng, script, often)
    return script
