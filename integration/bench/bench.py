#!/usr/bin/python3
"""pgsidecar beside Debian's PgBouncer (transaction mode, the same pool of 15), or with --against beside another build of pgsidecar, in one
run; prints Markdown tables. With one client each, both run at the same time, so that what disturbs one disturbs the other: 1 % shows. With
50, which would compete for the CPU, they take turns of 0.1 s within one run, for the same reason: 3 % shows.

CPU is the proxy process's own, from the kernel's scheduler statistics, divided by pgbench's count of transactions, logins left out. The
proxy has a CPU to itself, the server and pgbench have the rest: where the scheduler puts a wake-up decides 15 % otherwise. Each round has
processes of its own: where their memory lies decides some percent. Absolute times say little on a shared machine; the ratio of the two
within one run does, and the table gives its spread over the rounds.

  integration/bench/bench.py [--seconds 4] [--rounds 3] [--only cpu,login,memory,start,idle] [--against OTHER/pgsidecar]
"""
import argparse
import contextlib
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import harness  # noqa: E402
import wire  # noqa: E402
from harness import DATABASE, PASSWORD, USER  # noqa: E402

CPUS = sorted(os.sched_getaffinity(0))
POOL = {"pool": {"max": 15, "min": 0, "maxUses": 0, "idleTimeoutMillis": 600000, "connectionTimeoutMillis": 60000}, "limits": {"maxClients": 2000}}
TRUST = {**POOL, "auth": {"method": "trust"}}  # else the logins are a third of what PgBouncer uses in a run of seconds with fifty clients
CASES = [("select-only, simple", ["-S", "-M", "simple"], 1), ("select-only, simple", ["-S", "-M", "simple"], 50),
         ("select-only, extended", ["-S", "-M", "extended"], 1), ("select-only, extended", ["-S", "-M", "extended"], 50),
         ("TPC-B, simple", ["-M", "simple"], 1), ("TPC-B, simple", ["-M", "simple"], 50),
         ("1000 rows, simple", ["-M", "simple", "-f", str(pathlib.Path(__file__).with_name("rows.sql"))], 1)]
TURN = 0.1  # seconds


@contextlib.contextmanager
def running(proxy):
    try:
        yield proxy
    finally:
        proxy.close()


def alone(proxy):
    """Gives the proxy the first CPU to itself; main() has kept everything else off it."""
    for thread in os.listdir(f"/proc/{proxy.pid}/task"):
        os.sched_setaffinity(int(thread), {CPUS[0]})
    return proxy


def ours(pg, tls, config=POOL, binary=harness.BINARY):
    return harness.Proxy(pg, config, url=pg.url(sslmode="verify-full" if tls else "disable"), binary=binary)


def theirs(pg, tls, config=POOL):
    return harness.PgBouncer(pg, config, tls=tls)


def other_build(binary):
    def make(pg, tls, config=POOL):
        proxy = ours(pg, tls, config, binary)
        proxy.kind = "the other build"
        return proxy
    return make


def begin(proxy, *arguments):
    return subprocess.Popen(["pgbench", "-n", "-j", "1", *arguments], env=proxy.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(proxy, run):
    """How many transactions it made."""
    out, errors = run.communicate(timeout=300)
    if run.returncode:
        raise SystemExit(f"pgbench failed with {proxy.kind}:\n{errors}")
    return int(re.search(r"transactions actually processed: (\d+)", out)[1])


def pgbench(proxy, *arguments):
    """(transactions, CPU seconds of the proxy)"""
    before = proxy.cpu_seconds()
    count = end(proxy, begin(proxy, *arguments))
    return count, proxy.cpu_seconds() - before


def take_turns(runs, seconds):
    """Lets one of two runs of pgbench go on at a time."""
    going, waiting = runs
    until = time.monotonic() + seconds
    waiting.send_signal(signal.SIGSTOP)
    try:
        while time.monotonic() < until:
            time.sleep(TURN)
            going.send_signal(signal.SIGSTOP)
            time.sleep(TURN / 20)  # what is on its way is answered
            waiting.send_signal(signal.SIGCONT)
            going, waiting = waiting, going
    finally:
        waiting.send_signal(signal.SIGCONT)


def compare(proxies, arguments, clients, seconds):
    """For each of two proxies (transactions, CPU seconds), without the logins: what a run of one transaction a client costs is taken off."""
    logins = [pgbench(proxy, "-c", str(clients), "-t", "1", *arguments) for proxy in proxies]
    before = [proxy.cpu_seconds() for proxy in proxies]
    turns = clients > 1
    runs = [begin(proxy, "-c", str(clients), "-T", str(seconds * (2 if turns else 1)), *arguments) for proxy in proxies]
    if turns:
        time.sleep(0.5)
        take_turns(runs, 2 * seconds - 1)
    counts = [end(proxy, run) for proxy, run in zip(proxies, runs)]
    return [(count - n, proxy.cpu_seconds() - used - login)
            for proxy, count, used, (n, login) in zip(proxies, counts, before, logins)]


def cpu(pg, seconds, rounds, theirs, name):
    print("\n### CPU of the proxy per transaction\n")
    print(f"| upstream | load | clients | pgsidecar, µs | {name}, µs | ratio | spread |")
    print("|---|---|--:|--:|--:|--:|---|")
    worst = 0
    for tls in (False, True):
        for load, arguments, clients in CASES:
            micros = []  # of both, in each round
            for number in range(rounds):
                with running(alone(ours(pg, tls, TRUST))) as a, running(alone(theirs(pg, tls, TRUST))) as b:
                    compare((a, b), arguments, clients, 1)  # connections are opened
                    order = (a, b) if number % 2 == 0 else (b, a)
                    spent = {proxy: used / count * 1e6 for proxy, (count, used) in zip(order, compare(order, arguments, clients, seconds))}
                    micros.append((spent[a], spent[b]))
            ratios = [one / other for one, other in micros]
            ratio = statistics.median(ratios)
            worst = max(worst, ratio)
            one, other = (statistics.median(column) for column in zip(*micros))
            print(f"| {'TLS' if tls else 'plain'} | {load} | {clients} | {one:.1f} | {other:.1f} "
                  f"| **{ratio:.2f}** | {min(ratios):.2f} to {max(ratios):.2f} |", flush=True)
    return worst


def login(pg, theirs, rounds=5, clients=50):
    print("\n### CPU of the proxy for a login by SCRAM and one query\n")
    print("| | median, µs |")
    print("|---|--:|")
    for make in (ours, theirs):
        with running(make(pg, True)) as proxy:
            pgbench(proxy, "-S", "-c", str(clients), "-t", "1")  # connections are opened
            micros = []
            for _ in range(rounds):
                count, used = pgbench(proxy, "-S", "-c", str(clients), "-t", "1")
                micros.append(used / count * 1e6)
        print(f"| {proxy.kind} | {statistics.median(micros):.0f} |", flush=True)


def memory(pg, theirs, clients=1000):
    print(f"\n### Memory of an idle client ({clients} logged in, each has run a query)\n")
    print("| | Rss before, KB | Rss after, KB | bytes a client |")
    print("|---|--:|--:|--:|")
    for make in (ours, theirs):
        with running(make(pg, True)) as proxy:
            held = []

            def add(count):
                for _ in range(count):
                    w = wire.Wire(proxy.port, timeout=60)
                    failure = w.login(USER, PASSWORD, DATABASE)
                    if failure:
                        raise SystemExit(failure.error)
                    w.value("SELECT 1")
                    held.append(w)

            add(50)  # what is set up once is not the clients'
            time.sleep(0.5)
            before = proxy.rss_kb()
            add(clients)
            time.sleep(0.5)
            after = proxy.rss_kb()
            print(f"| {proxy.kind} | {before} | {after} | {(after - before) * 1024 / clients:.0f} |", flush=True)
            for w in held:
                w.sock.close()


def start(pg, theirs, rounds=15):
    print("\n### From exec to listening\n")
    print("| | median, ms | least, ms |")
    print("|---|--:|--:|")
    for make in (ours, theirs):
        times = []
        for _ in range(rounds):
            with running(make(pg, True)) as proxy:
                times.append(proxy.listening_at - proxy.started_at)
        print(f"| {proxy.kind} | {statistics.median(times) * 1000:.0f} | {min(times) * 1000:.0f} |", flush=True)


def idle(pg, theirs, seconds=10):
    print(f"\n### Idle, 20 clients connected, over {seconds} s\n")
    print("| | wake-ups a second | system calls a second | CPU, µs a second |")
    print("|---|--:|--:|--:|")
    for make in (ours, theirs):
        with running(make(pg, True)) as proxy:
            held = [proxy.connect(prepare_threshold=None) for _ in range(20)]
            for connection in held:
                connection.execute("SELECT 1")
            time.sleep(2)
            switches, used, begin = proxy.switches(), proxy.cpu_seconds(), time.monotonic()
            time.sleep(seconds)
            elapsed = time.monotonic() - begin
            woken, used = (proxy.switches() - switches) / elapsed, (proxy.cpu_seconds() - used) / elapsed
            print(f"| {proxy.kind} | {woken:.1f} | {system_calls(proxy.pid, seconds)} | {used * 1e6:.0f} |", flush=True)
            for connection in held:
                connection.close()


def system_calls(pid, seconds):
    """Counted by strace; `-` where it may not trace."""
    try:
        done = subprocess.run(["timeout", "-s", "INT", str(seconds), "strace", "-f", "-c", "-p", str(pid)], capture_output=True, text=True)
    except FileNotFoundError:
        return "-"
    if "attach" in done.stderr and "Operation not permitted" in done.stderr:
        return "-"
    total = re.search(r"^\s*100\.00\s+\S+\s+(?:\d+\s+)?(\d+)\s+(?:\d+\s+)?total", done.stderr, re.M)
    return f"{int(total[1]) / seconds:.1f}" if total else "0.0"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=4, help="length of each pgbench run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="cpu,login,memory,start,idle")
    parser.add_argument("--against", metavar="BINARY", help="another build of pgsidecar instead of PgBouncer")
    parser.add_argument("--assert-ratio", type=float, help="exit 1 if a CPU ratio's median is above this")
    options = parser.parse_args()
    wanted = options.only.split(",")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # stops what it has started
    worst = 0
    other, name = (other_build(options.against), "the other build") if options.against else (theirs, "PgBouncer")
    os.sched_setaffinity(0, CPUS[1:] or CPUS)
    with harness.Postgres(plain=True) as pg:
        environment = {**os.environ, "PGPASSWORD": PASSWORD}
        subprocess.run(["pgbench", "-i", "-q", "-s", "50" if "cpu" in wanted else "1", "-h", "127.0.0.1", "-p", str(pg.port), "-U", USER, DATABASE], env=environment, check=True, capture_output=True)
        if "cpu" in wanted:
            worst = cpu(pg, options.seconds, options.rounds, other, name)
        if "login" in wanted:
            login(pg, other)
        if "memory" in wanted:
            memory(pg, other)
        if "start" in wanted:
            start(pg, other)
        if "idle" in wanted:
            idle(pg, other)
    return 1 if options.assert_ratio and worst > options.assert_ratio else 0


if __name__ == "__main__":
    sys.exit(main())
