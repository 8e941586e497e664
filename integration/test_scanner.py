"""The SQL scanner against PostgreSQL's own parser (libpg_query): what a parse tree shows to leave session state, the scanner must report.
The other way round it may report too much.

  test_scanner.py FILE.sql...    compares over the statements of files, e.g. of PostgreSQL's regression tests
"""
import pathlib
import random
import re
import subprocess
import sys

import pglast
import pytest
from pglast import ast, enums, visitors

import harness

HEADER = (harness.ROOT / "protocol/sql_scan.hpp").read_text()
BIT = {name: 1 << int(shift) for name, shift in re.findall(r"\bk(\w+) = 1u << (\d+)", HEADER)}
HARMLESS = set(re.findall(r'"(\w+)"', (harness.ROOT / "protocol/harmless.hpp").read_text()))
HOLD = 0x20  # CURSOR_OPT_HOLD


STATEFUL = {"currval": "SequenceRead", "lastval": "SequenceRead", "setseed": "Seed", "pg_backend_pid": "BackendPid"}


def differs(node):
    """Is this `... <> pg_backend_pid()`, which only leaves the own session out?"""
    return isinstance(node, ast.A_Expr) and node.name[-1].sval == "<>"


class Wanted(visitors.Visitor):
    """The bits that the scanner must report for a tree: `bits`."""

    def __init__(self):
        self.bits = 0

    def want(self, *names):
        for name in names:
            self.bits |= BIT[name]

    def visit_VariableSetStmt(self, ancestors, node):
        if not isinstance(abs(ancestors).node, ast.RawStmt):
            return None  # of ALTER ROLE, ALTER FUNCTION and the like: for later sessions, or as long as the function runs
        kind = enums.VariableSetKind
        if node.kind in (kind.VAR_RESET, kind.VAR_RESET_ALL):
            return self.want("Settings", "Reset")
        if node.is_local or (node.kind == kind.VAR_SET_MULTI and node.name.startswith("TRANSACTION")):
            return None
        self.want("Settings")
        if node.kind == kind.VAR_SET_DEFAULT:
            self.want("Reset")
        if "." in node.name:
            self.want("CustomSetting")

    def visit_PrepareStmt(self, ancestors, node):
        self.want("Prepared")

    visit_ExecuteStmt = visit_DeallocateStmt = visit_PrepareStmt

    def visit_ListenStmt(self, ancestors, node):
        self.want("Listen")

    visit_UnlistenStmt = visit_ListenStmt

    def visit_DeclareCursorStmt(self, ancestors, node):
        if node.options & HOLD and not isinstance(abs(ancestors).node, ast.ExplainStmt):
            self.want("Cursor")

    def visit_DoStmt(self, ancestors, node):
        self.want("Code")

    visit_CallStmt = visit_DoStmt

    def visit_LoadStmt(self, ancestors, node):
        self.want("Library")

    def visit_DiscardStmt(self, ancestors, node):
        self.want("Discard", *(["Reset"] if node.target == enums.DiscardMode.DISCARD_ALL else []))

    def visit_TransactionStmt(self, ancestors, node):
        if node.kind not in (enums.TransactionStmtKind.TRANS_STMT_SAVEPOINT, enums.TransactionStmtKind.TRANS_STMT_RELEASE):
            self.want("Transaction")

    def visit_RangeVar(self, ancestors, node):
        if node.relpersistence == "t" or (node.schemaname or "").startswith("pg_temp"):
            self.want("Temporary")

    def visit_CreateFunctionStmt(self, ancestors, node):
        if node.funcname[0].sval == "pg_temp":
            self.want("Temporary")

    def visit_CreateStatsStmt(self, ancestors, node):
        return visitors.Skip  # runs nothing

    def visit_FuncCall(self, ancestors, node):
        if node.funcformat == enums.CoercionForm.COERCE_SQL_SYNTAX:
            return None
        name = node.funcname[-1].sval
        own = len(node.funcname) > 1 and node.funcname[-2].sval != "pg_catalog"
        if name == "set_config":
            if len(node.args or ()) != 3 or not is_true(node.args[2]):
                self.want("Settings")
        elif name in STATEFUL:
            if name != "pg_backend_pid" or not differs(abs(ancestors).node):
                self.want(STATEFUL[name])
        elif re.match(r"pg_(try_)?advisory_", name):
            if "xact" not in name:
                self.want("AdvisoryLock")
        elif own or name not in HARMLESS:
            self.want("Function")


def is_true(node):
    return isinstance(node, ast.A_Const) and isinstance(node.val, ast.Boolean) and node.val.boolval


def wanted(sql):
    """None: PostgreSQL doesn't read it."""
    try:
        tree = pglast.parse_sql(sql)
    except (pglast.parser.ParseError, UnicodeError, ValueError):
        return None
    visitor = Wanted()
    visitor(tree)
    return visitor.bits


def scan(texts):
    binary = harness.BINARY.parent / "tests/scan_sql"
    done = subprocess.run([binary], input=b"".join(t.encode() + b"\0" for t in texts), capture_output=True, check=True)
    return [int(line) for line in done.stdout.split()]


def names(bits):
    return sorted(name for name, bit in BIT.items() if bits & bit)


def missed(texts):
    """(text, bits) that the scanner should have reported; and how many texts PostgreSQL reads."""
    texts = [t for t in texts if "\0" not in t]
    found, read = [], 0
    for text, got in zip(texts, scan(texts)):
        want = wanted(text)
        if want is None:
            continue
        read += 1
        # What can't be read pins, so that it stands for everything.
        if want & ~got and not got & BIT["Unreadable"]:
            found.append((text, names(want & ~got)))
    return found, read


# `~` is a place for blanks and comments, `^` a newline, `@` an expression.
STATEMENTS = """
SELECT~1
SELECT~@
SELECT~@,~@~FROM~t~WHERE~a~=~@
VALUES~(@)
TABLE~t
INSERT~INTO~t~(a,~b)~VALUES~(@,~@)~ON~CONFLICT~(a)~DO~UPDATE~SET~b~=~@
UPDATE~t~SET~a~=~@~WHERE~b~=~@
DELETE~FROM~t~USING~u~WHERE~@~=~1
MERGE~INTO~t~USING~u~ON~t.a~=~@~WHEN~MATCHED~THEN~UPDATE~SET~a~=~@
WITH~x~(a)~AS~(SELECT~@)~SELECT~*~FROM~x~JOIN~y~ON~f(a)
CREATE~TABLE~t~AS~SELECT~*~FROM~x~JOIN~y~ON~f(a)
CREATE~MATERIALIZED~VIEW~v~AS~SELECT~*~FROM~x~JOIN~y~ON~f(a)
CREATE~TABLE~t~(a~int~DEFAULT~@~CHECK~(a~>~1))
CREATE~TEMP~TABLE~t~(a~int)
CREATE~LOCAL~TEMPORARY~TABLE~t~AS~SELECT~@
CREATE~TABLE~pg_temp.t~()
CREATE~TABLE~"pg_temp"~.~t~()
CREATE~OR~REPLACE~TEMP~VIEW~v~AS~SELECT~1
CREATE~TEMP~SEQUENCE~s
CREATE~FUNCTION~pg_temp.f()~RETURNS~int~LANGUAGE~sql~AS~'SELECT~1'
SELECT~@~INTO~TEMP~t
SELECT~@~INTO~pg_temp.t
CREATE~INDEX~i~ON~t~(f(a))
CREATE~INDEX~ON~t~(a)~WHERE~f(a)
ALTER~TABLE~t~ADD~COLUMN~b~int~DEFAULT~@
ALTER~TABLE~t~ADD~CHECK~(f(a))
SET~x~=~1
SET~SESSION~x~TO~'v'
SET~"x"~TO~v,~w
SET~a.b~=~1
SET~a~.~b~=~1
SET~"a"."b"~TO~'x'
SET~"a.b"~TO~'x'
SET~SESSION~"a.b"~TO~'x'
SET~x~TO~DEFAULT
SET~x~FROM~CURRENT
SET~LOCAL~x~=~1
SET~LOCAL~a.b~=~1
SET~TIME~ZONE~'UTC'
SET~TIME~ZONE~LOCAL
SET~TIME~ZONE~DEFAULT
SET~SESSION~TIME~ZONE~DEFAULT
SET~NAMES~'utf8'
SET~NAMES
SET~ROLE~r
SET~ROLE~NONE
SET~SESSION~AUTHORIZATION~r
SET~SESSION~AUTHORIZATION~DEFAULT
SET~SESSION~CHARACTERISTICS~AS~TRANSACTION~READ~ONLY
SET~TRANSACTION~READ~ONLY
SET~XML~OPTION~DOCUMENT
SET~SCHEMA~'s'
SET~CONSTRAINTS~ALL~DEFERRED
RESET~x
RESET~ALL
RESET~a.b
RESET~TIME~ZONE
RESET~SESSION~AUTHORIZATION
SHOW~x
DISCARD~ALL
DISCARD~TEMP
DISCARD~PLANS
PREPARE~p~(int)~AS~SELECT~@
EXECUTE~p(@)
EXPLAIN~EXECUTE~p
EXPLAIN~(ANALYZE,~COSTS~off)~EXECUTE~p
EXPLAIN~ANALYZE~VERBOSE~EXECUTE~p
CREATE~TABLE~t~AS~EXECUTE~p
CREATE~TABLE~IF~NOT~EXISTS~t~(a,~b)~WITH~(fillfactor~=~70)~AS~EXECUTE~p(1)
EXPLAIN~CREATE~TABLE~t~AS~EXECUTE~p
DEALLOCATE~p
DEALLOCATE~PREPARE~ALL
PREPARE~TRANSACTION~'x'
COMMIT~PREPARED~'x'
BEGIN
START~TRANSACTION~READ~ONLY
COMMIT~AND~CHAIN
END
ABORT
ROLLBACK~TO~SAVEPOINT~s
SAVEPOINT~s
RELEASE~s
LISTEN~c
UNLISTEN~*
NOTIFY~c,~'x'
DECLARE~c~CURSOR~WITH~HOLD~FOR~SELECT~@
DECLARE~c~BINARY~INSENSITIVE~SCROLL~CURSOR~WITH~HOLD~FOR~SELECT~1
DECLARE~c~CURSOR~WITHOUT~HOLD~FOR~SELECT~1
FETCH~ALL~FROM~c
CLOSE~c
DO~'BEGIN~END'
DO~LANGUAGE~plpgsql~$$BEGIN~END$$
CALL~p(@)
CALL~s.p()
LOAD~'x'
COPY~t~(a)~FROM~STDIN
COPY~(SELECT~@)~TO~STDOUT
LOCK~TABLE~t
TRUNCATE~t
VACUUM~ANALYZE~t~(a)
ANALYZE~t~(a)
REFRESH~MATERIALIZED~VIEW~v
CREATE~RULE~r~AS~ON~INSERT~TO~t~DO~ALSO~NOTIFY~c
CREATE~TRIGGER~g~AFTER~INSERT~ON~t~EXECUTE~FUNCTION~f()
CREATE~FUNCTION~f(a~int~DEFAULT~1)~RETURNS~int~LANGUAGE~sql~AS~$$SELECT~1$$
CREATE~SCHEMA~s~CREATE~TEMP~TABLE~t~()
GRANT~ALL~ON~t~TO~r
""".strip().splitlines()

EXPRESSIONS = r"""
1 | 1.5e3 | .5 | 1. | -1 | $1 | NULL | a | t.a | t."a" | "a""b" | "select" | a$b | größe | "größe"
'x' | '' | 'it''s' | 'a\' | 'SET x = 1; --' | E'it\'s' | e'\\' | E'\\''' | E'a'^'b\'' | 'a'^'b' | U&'a'^'\0041' | N'x' | B'01' | X'1F' | U&'\0041' | U&'d!0061' UESCAPE '!' | U&"d\0061" | $$;'"$$ | $a$ $$ ' $b$ $a$ | $ä1$'$ä1$
f(1) | s.f(1) | "F"(1) | f~(~) | pg_catalog.now() | now() | s.now() | lower('x') | count(*) | coalesce(a, f(1)) | f(VARIADIC a) | f(a => 1)
set_config('a', 'b', false) | set_config('a.b', $1, true) | set_config('a', 'b', $1) | pg_catalog.set_config('a', 'b', f(true)) | "set_config"('a','b',false)
set_config('a', 'b', NOT true) | set_config('a', 'b', (true)) | set_config('a', 'b', false OR true)
pg_advisory_lock(1) | pg_try_advisory_lock_shared(1,~2) | pg_advisory_xact_lock(1) | pg_advisory_unlock_all() | "pg_advisory_lock"(1)
currval('s') | lastval() | setseed(0.5) | pg_backend_pid() | nextval('s') | random()
1 + 2 | 1 @- 2 | 1 @/* c */ 2 | 1 */**/ 2 | 2 --1^ | 1 <> ~2 | a -> 'b' ->> 'c' | a ? 'b' | a OPERATOR(pg_catalog.+) b | a[1] | a[f(1):2] | (a).b | (f(1)).* | a::int | a::numeric(3,~1) | CAST(a AS varchar(3))
CASE WHEN f(1) THEN 2 ELSE 3 END | EXISTS (SELECT 1) | a IN (1, 2) | a = ANY (ARRAY[1]) | ROW(1,~f(2)) | ARRAY(SELECT f(1)) | a BETWEEN 1 AND f(2)
EXTRACT(year FROM a) | a AT TIME ZONE 'UTC' | POSITION('a' IN 'b') | SUBSTRING('a' FROM 1) | a SIMILAR TO 'b' | a IS NORMALIZED | OVERLAY(a PLACING b FROM 1)
sum(a) FILTER (WHERE f(a)) OVER (PARTITION BY f(b)) | string_agg(a, ',' ORDER BY f(a)) | percentile_cont(0.5) WITHIN GROUP (ORDER BY a) | GROUPING(a)
int '1' | date '2000-01-01' | interval '1' day | s.ty 'x' | point(1,~2) | XMLELEMENT(NAME x, f(1)) | (SELECT f(1)) | current_user | localtime(1)
""".replace("\n", " | ").replace("| |", "|")

BLANKS = [" ", " ", " ", "\n", "\t", "\r\n", "\f", "/**/", "/* ' */", "/* /* nested ' */ \" */", "/*/**/*/", "--\n", "-- '\n", " --\"$$\r", "/* -- */", "\n/***/"]
ENDS = ["", ";", ";;", " ;\n", "; -- end", ";/* */"]


def corpus(count, seed):
    rng = random.Random(seed)
    expressions = [e.strip() for e in re.split(r" \| ", EXPRESSIONS) if e.strip()]

    def blanks(text, plain):
        return re.sub("~", lambda _: " " if plain else rng.choice(BLANKS), text).replace("^", "\n")

    def statement():
        text = rng.choice(STATEMENTS)
        plain = rng.random() < 0.3
        text = re.sub("@", lambda _: rng.choice(expressions), text)
        if rng.random() < 0.3:
            text = "".join(c.upper() if rng.random() < 0.5 else c for c in text) if "'" not in text and '"' not in text and "$" not in text else text
        return blanks(text, plain)

    for text in STATEMENTS:
        yield blanks(text.replace("@", "f(1)"), True)
    for expression in expressions:
        yield "SELECT " + blanks(expression, True)
    for _ in range(count):
        yield rng.choice(["", " ", "\n", "/**/", ";"]) + rng.choice([";", "; ", ";--'\n"]).join(statement() for _ in range(rng.choice((1, 1, 2, 3)))) + rng.choice(ENDS)


@pytest.mark.skipif(harness.KIND != "pgsidecar", reason="of pgsidecar's own")
def test_no_statement_is_missed():
    texts = list(corpus(20000, 1))
    found, read = missed(texts)
    assert not found, (len(found), sorted(found, key=lambda f: len(f[0]))[:20])
    assert read > len(texts) // 2


def statements_of(text):
    """The statements of a psql script: without its own commands, and what can't be split whole."""
    lines, copying = [], False
    for line in text.splitlines():
        if copying:
            copying = line != "\\."
            continue
        if re.match(r"\s*\\", line):
            continue
        line = re.sub(r"\\g\w*\b.*$|\\crosstabview.*$", ";", line)
        line = re.sub(r":'(\w+)'", r"'\1'", re.sub(r':"(\w+)"', r'"\1"', line))
        lines.append(line)
        copying = bool(re.search(r"\bcopy\b.*\bfrom\s+stdin\b", line, re.I)) and line.rstrip().endswith(";")
    try:
        return pglast.split("\n".join(lines), with_parser=False)
    except (pglast.parser.ParseError, UnicodeError):
        return [s + ";" for s in "\n".join(lines).split(";\n")]


def main(files):
    failed = total = 0
    for file in files:
        found, read = missed(list(statements_of(pathlib.Path(file).read_text(errors="replace"))))
        total += read
        failed += len(found)
        for text, bits in found:
            print(f"{file}: {', '.join(bits)}: {text.strip()[:300]}")
    print(f"{total} statements read, {failed} missed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
