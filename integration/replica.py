"""A standby that follows a primary by streaming replication, its promotion, and the old primary as a standby of the new one."""
import shutil
import subprocess

import harness
from harness import DATABASE, PASSWORD, USER, Postgres, percent, postgres_bin, unprivileged

REPLICATOR = "replicator"


def copy(server, primary):
    """Makes a server that isn't running a standby of the primary."""
    shutil.rmtree(server.data, ignore_errors=True)
    # Root's own client certificate, if there is one, isn't the server's to read.
    source = primary.conninfo(REPLICATOR, PASSWORD, None, sslcert="/nonexistent")
    subprocess.run([postgres_bin() / "pg_basebackup", "-D", server.data, "-R", "-X", "stream", "-c", "fast", "-d", source], check=True,
                   capture_output=True, cwd="/", **unprivileged())
    with open(server.data / "postgresql.conf", "a") as conf:
        for name, value in server.settings.items():
            conf.write(f"{name} = '{value}'\n")


class Standby(Postgres):
    def __init__(self, primary, **keys):
        self.primary = primary
        primary.sql(f"DO $$ BEGIN CREATE ROLE {REPLICATOR} REPLICATION LOGIN PASSWORD '{PASSWORD}'; EXCEPTION WHEN duplicate_object THEN END $$")
        super().__init__(**keys)

    def _initdb(self):
        copy(self, self.primary)

    def _create(self):
        pass


def promote(server):
    subprocess.run([postgres_bin() / "pg_ctl", "promote", "-D", server.data, "-w", "-s"], check=True, cwd="/", **unprivileged())


def follow(server, primary):
    """The server, which has ended, comes back at its place as a standby."""
    copy(server, primary)
    server.start()


def caught_up(primary, standby):
    """Waits until the standby has all that the primary has now."""
    position = primary.sql("SELECT pg_current_wal_lsn()")[0][0]
    harness.poll(lambda: standby.sql("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", position)[0][0], 30, "the standby has caught up")


def url(*servers, **keywords):
    """One upstream of several hosts."""
    hosts = ",".join(f"127.0.0.1:{server.port}" for server in servers)
    query = "&".join(f"{name}={value}" for name, value in {"sslmode": "require", **keywords}.items())
    return f"postgresql://{USER}:{percent(PASSWORD)}@{hosts}/{DATABASE}?{query}"
