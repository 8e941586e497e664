#!/usr/bin/python3
"""PostgreSQL's own test suites directly and through pgsidecar: the same tests must pass. Called by regress.sh, which builds them.

  integration/regress.py SOURCE OUTPUT [--only regress,libpq_pipeline,isolation]

Prints a table and, of each test that passes directly and not through the proxy, its name; the differences stay in OUTPUT. Exit 0 if those
are the ones that `regress-expected` names, each with its reason.
"""
import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys

import harness

HERE = pathlib.Path(__file__).resolve().parent
EXPECTED = HERE / "regress-expected"
RESULT = re.compile(r"^\s*(?:test )?(\S+)\s+\.\.\. (ok|FAILED)\b", re.M)
PIPELINE = ("simple_pipeline", "multi_pipelines", "prepared", "singlerow", "disallowed_in_pipeline", "nosync", "pipeline_abort",
            "pipeline_idle", "transaction", "uniqviol")
# What initdb and pg_regress set for a server of their own.
SETTINGS = {"timezone": "PST8PDT", "max_prepared_transactions": 20, "max_connections": 200, "log_statement": "none"}


def server():
    pg = harness.Postgres(max_connections=200, plain=True, settings=SETTINGS)
    hba = pg.data / "pg_hba.conf"
    hba.write_text("local all all trust\nhost all all 127.0.0.1/32 trust\n")
    pg.sql("SELECT pg_reload_conf()")
    return pg


def proxy(pg, mode):
    return harness.Proxy(pg, {"auth": {"method": "trust"}, "databases": {"*": {}}, "users": {"*": {}},
                              "pool": {"mode": mode, "max": 40, "min": 0, "connectionTimeoutMillis": 20000}},
                         url=f"postgresql://postgres@127.0.0.1:{pg.port}/postgres?sslmode=prefer")


def prepare_database(pg, name):
    pg.sql(f"CREATE DATABASE {name} TEMPLATE template0")
    for setting, value in (("lc_messages", "C"), ("lc_monetary", "C"), ("lc_numeric", "C"), ("lc_time", "C"), ("bytea_output", "hex"),
                           ("timezone_abbreviations", "Default")):
        pg.sql(f"ALTER DATABASE {name} SET {setting} TO '{value}'")


def pg_regress(source, folder, program, schedule, database, port, output, patience=60):
    """Runs a suite by its schedule; {test: passed}. `patience`: seconds that a step of an isolation test may wait."""
    shutil.rmtree(output, ignore_errors=True)
    for part in ("", "results", "testtablespace", "sql", "expected"):
        (output / part).mkdir(parents=True, exist_ok=True)
        (output / part).chmod(0o777)  # the server writes there too
    done = subprocess.run([f"./{program}", "--use-existing", "--dlpath=.", "--inputdir=.", f"--outputdir={output}",
                           f"--bindir={source / 'src/bin/psql'}", f"--schedule={schedule}", "--host=127.0.0.1", f"--port={port}",
                           "--user=postgres", f"--dbname={database}"],
                          cwd=source / folder, env={**os.environ, "LD_LIBRARY_PATH": str(source / "src/interfaces/libpq"), "PGISOLATIONTIMEOUT": str(patience)}, capture_output=True,
                          text=True, timeout=5000)
    (output / "output").write_text(done.stdout + done.stderr)
    return {name: word == "ok" for name, word in RESULT.findall(done.stdout)}


def regress(source, pg, port, output):
    prepare_database(pg, "regression")
    return pg_regress(source, "src/test/regress", "pg_regress", "parallel_schedule", "regression", port, output)


def isolation(source, pg, port, output, patience=60):
    prepare_database(pg, "isolation_regression")
    return pg_regress(source, "src/test/isolation", "pg_isolation_regress", "isolation_schedule", "isolation_regression", port, output, patience)


def impatient_isolation(source, pg, port, output):
    return isolation(source, pg, port, output, 2)


def libpq_pipeline(source, pg, port, output):
    output.mkdir(parents=True, exist_ok=True)
    passed = {}
    for name in PIPELINE:
        done = subprocess.run([source / "src/test/modules/libpq_pipeline/libpq_pipeline", name, f"host=127.0.0.1 port={port} user=postgres dbname=postgres"],
                              capture_output=True, text=True, timeout=120)
        passed[name] = done.returncode == 0
        (output / f"{name}.out").write_text(done.stdout + done.stderr)
    return passed


SUITES = {"regress": (regress, ("transaction",)), "libpq_pipeline": (libpq_pipeline, ("transaction",)),
          "isolation": (isolation, ("session",)), "isolation-transaction": (impatient_isolation, ("transaction",))}


def expected():
    """{(suite, mode): {test: reason}}"""
    named = {}
    for line in EXPECTED.read_text().splitlines() if EXPECTED.exists() else []:
        if line and not line.startswith("#"):
            suite, mode, test, reason = line.split(None, 3)
            named.setdefault((suite, mode), {})[test] = reason
    return named


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--only", default="regress,libpq_pipeline,isolation",
                        help="isolation-transaction takes half an hour: who waits for whom is asked by the pids of BackendKeyData")
    arguments = parser.parse_args()
    wrong = False
    print("| suite | mode | tests | pass directly | pass through pgsidecar |\n|---|---|--:|--:|--:|")
    for suite in arguments.only.split(","):
        run, modes = SUITES[suite]
        with server() as pg:
            directly = run(arguments.source, pg, pg.port, arguments.output / f"{suite}-direct")
        for mode in modes:
            with server() as pg:
                through = proxy(pg, mode)
                try:
                    passed = run(arguments.source, pg, through.port, arguments.output / f"{suite}-{mode}")
                finally:
                    through.close()
            failed = {test for test, good in directly.items() if good and not passed.get(test)}
            print(f"| {suite} | {mode} | {len(directly)} | {sum(directly.values())} | {sum(passed.values())} |", flush=True)
            named = expected().get((suite, mode), {})
            for test in sorted(failed - named.keys()):
                print(f"  fails only through pgsidecar: {suite} {mode} {test}")
            passing = {test for test, reason in named.items() if test not in failed and not reason.startswith("at times:")}
            for test in sorted(passing):
                print(f"  passes, though regress-expected says otherwise: {suite} {mode} {test}")
            wrong |= bool(failed - named.keys() or passing) or not directly
    return wrong


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
