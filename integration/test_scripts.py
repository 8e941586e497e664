"""A client sees what it would see on a direct connection: scripts of a few clients whose steps follow each other, played as differ.py plays its
own. They are in scripts.txt, the heading being pool.max, ahead of it pool.mode unless that is transaction, and the script's name."""
import argparse
import pathlib

import pytest

import differ
import harness
import replay

SCRIPTS = {}
for heading, lines in replay.read_cases(pathlib.Path(__file__).parent / "scripts.txt").items():
    pool, name = heading.split(": ", 1)
    mode, most = pool.split() if " " in pool else ("transaction", pool)
    SCRIPTS[name] = mode, int(most), [(replay.LETTERS.index(line[0]), line[3:]) for line in lines]
PATIENCE = 0.3  # with a client that waits for a server connection


@pytest.fixture(scope="module")
def worlds():
    with harness.Postgres(plain=True) as server:
        world = differ.World(argparse.Namespace(mode="transaction", binary=harness.BINARY, pool={}, limits={}), server)
        yield world
        world.close()


@pytest.mark.parametrize("name", SCRIPTS)
def test_as_direct(worlds, name):
    mode, most, script = SCRIPTS[name]
    worlds.options.mode = mode
    worlds.renew(most)
    worlds.prepare(script)
    direct = differ.play(script, worlds.server.port, "equal_direct", differ.STUCK)
    worlds.prepare(script)
    pooled = differ.play(script, worlds.proxy.port, "equal_pooled", PATIENCE)
    for index in direct:
        for (step, expected), (_, got) in zip(direct[index], pooled[index], strict=True):
            assert (replay.LETTERS[index], step, got) == (replay.LETTERS[index], step, expected)
