"""The same as application.js with psycopg: a connection for each worker, and one that opens a new one for each request."""
import json
import os
import signal
import threading
import time

import psycopg

URL = os.environ["DATABASE_URL"]
AFTER = float(os.environ.get("AFTER_MILLIS", "0")) / 1000
done, failed = {"short": 0, "long": 0, "fresh": 0}, []
ending = float("inf")


def work(kind):
    connection = None
    while time.monotonic() < ending:
        try:
            if connection is None:
                connection = psycopg.connect(URL, application_name=kind)
            with connection.transaction():
                connection.execute("SELECT 1" if kind != "long" else "INSERT INTO orders VALUES (1)")
                if kind == "long":
                    connection.execute("SELECT pg_sleep(0.3)")
            done[kind] += 1
        except psycopg.Error as error:
            failed.append(f"{kind}: {error.sqlstate} {error}")
            connection = None
            time.sleep(0.02)
        if kind == "fresh" and connection:
            connection.close()
            connection = None
        time.sleep(0.005)
    if connection:
        connection.close()


def end(*_):
    global ending
    ending = min(ending, time.monotonic() + AFTER)


signal.signal(signal.SIGTERM, end)
workers = [threading.Thread(target=work, args=(kind,)) for kind in ("short", "short", "long", "long", "long", "fresh")]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
print(json.dumps({"done": done, "failed": failed}))
