"""What demo.sh shows once everything is built."""
import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import psycopg

import harness
from harness import DATABASE, PASSWORD, USER, percent

CLIENTS, SECONDS = 50, 5


class Failed(Exception):
    pass


class ForeignServer:
    """The server of DATABASE_URL, looked at past the proxy."""

    def __init__(self, url):
        self.connection = psycopg.connect(url, autocommit=True)
        info = self.connection.info
        self.user, self.password, self.database = info.user, info.password, info.dbname

    def count(self):
        return self.connection.execute("SELECT count(*) FROM pg_stat_activity WHERE usename = current_user AND datname = current_database() "
                                       "AND pid <> pg_backend_pid()").fetchone()[0]

    def close(self):
        self.connection.close()


class OwnServer:
    def __init__(self):
        self.pg = harness.Postgres()
        self.user, self.password, self.database = USER, PASSWORD, DATABASE
        self.connection = self.pg.admin()

    def count(self):
        return self.connection.execute(harness.Postgres.BACKENDS).fetchone()[0]

    def close(self):
        self.connection.close()
        self.pg.close()


def show(text=""):
    print(text, flush=True)


def expect(condition, what):
    if not condition:
        raise Failed(what)


def demonstrate(server, proxy, before):
    environment = proxy.environment(server.user, server.password, server.database)
    url = f"postgresql://{percent(server.user)}:{percent(server.password)}@127.0.0.1:{proxy.port}/{percent(server.database)}"
    show("\npgsidecar listens. The URL for an application:\n")
    show(f"  DATABASE_URL={url}\n")

    sql = "SELECT version() ~ 'PostgreSQL' AS postgresql, ssl AS tls_upstream, s.version AS tls_version, cipher FROM pg_stat_ssl s WHERE pid = pg_backend_pid()"
    done = subprocess.run(["psql", "-X", "-c", sql], env=environment, capture_output=True, text=True, timeout=60)
    show("A query through it:\n")
    show("  " + (done.stdout + done.stderr).strip().replace("\n", "\n  "))
    expect(done.returncode == 0, "psql failed")
    expect(isinstance(server, ForeignServer) or re.search(r"\|\s+t\s+\|", done.stdout), "the server sees no TLS")

    show(f"\npgbench, {CLIENTS} clients, {SECONDS} s:\n")
    most, running = 0, True

    def watch():
        nonlocal most
        while running:
            most = max(most, server.count() - before)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write("\\set n random(1, 1000000)\nSELECT :n + 1;\n")
        script.flush()
        done = subprocess.run(["pgbench", "-n", "-M", "prepared", "-f", script.name, "-c", str(CLIENTS), "-j", "2", "-T", str(SECONDS)],
                              env=environment, capture_output=True, text=True, timeout=120)
    running = False
    watcher.join()
    expect(done.returncode == 0, "pgbench failed:\n" + done.stderr)
    for line in done.stdout.splitlines():
        if re.match(r"number of (clients|transactions actually|failed)|latency average|tps", line):
            show("  " + line)
    stats = proxy.stats()
    show(f"\n  server connections at most, as the server counts: {most} (max: {stats['max']})")
    expect(re.search(r"number of failed transactions: 0 ", done.stdout), "transactions failed")
    expect(1 <= most <= stats["max"], f"{most} server connections, at most {stats['max']} were allowed")

    show(f"\nPool statistics, from http://127.0.0.1:{proxy.admin_port}/api/monitoring/pool-stats:\n")
    keys = ("totalCount", "activeCount", "idleCount", "waitingCount", "max", "min", "utilization", "wait", "query")
    for key in keys:
        expect(key in stats, f"pool-stats has no {key}")
        show(f"  {key}: {stats[key]}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    url = os.environ.get("DATABASE_URL")
    server = proxy = None
    code = 0
    try:
        server = ForeignServer(url) if url else OwnServer()
        before = server.count()  # of others
        proxy = harness.Proxy(config={"pool": {"min": 2}, "admin": {"users": [server.user]}}, url=url or server.pg.url())
        demonstrate(server, proxy, before)
        if not check:
            show(f"\nThe page:  http://127.0.0.1:{proxy.admin_port}/\nBy SQL:    psql '{proxy.url(server.user, server.password, 'pgbouncer')}' -c 'SHOW POOLS'\n"
                 f"The log:   {proxy.log}\nRunning until Ctrl-C.")
            while proxy.running():
                time.sleep(0.2)
            raise Failed(f"pgsidecar ended with {proxy.process.returncode}:\n{proxy.log_text()[-3000:]}")
    except KeyboardInterrupt:
        show("\nstopping")
    except (Failed, AssertionError, psycopg.Error, OSError, subprocess.SubprocessError) as error:
        print(f"\nFAILED: {error}", file=sys.stderr)
        code = 1
    finally:
        for party in (proxy, server):
            try:
                if party:
                    party.close()
            except AssertionError as error:
                print(f"FAILED: {error}", file=sys.stderr)
                code = 1
    if check and code == 0:
        show("\nOK")
    return code


if __name__ == "__main__":
    sys.exit(main())
