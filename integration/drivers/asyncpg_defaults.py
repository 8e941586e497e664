"""asyncpg with its defaults: named statements with a cache, its pool's reset after each use."""
import asyncio
import os

import asyncpg


async def main():
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=2, max_size=20) as pool:
        async def work(me):
            for n in range(20):
                assert await pool.fetchval("SELECT $1::int + $2::int", n, me) == n + me
            async with pool.acquire() as connection:
                async with connection.transaction():
                    await connection.execute("CREATE TEMP TABLE t (a int, b text) ON COMMIT DROP")
                    await connection.executemany("INSERT INTO t VALUES ($1, $2)", [(n, str(n)) for n in range(50)])
                    await connection.copy_records_to_table("t", records=[(n, "copied") for n in range(50)])
                    assert await connection.fetchval("SELECT count(*) FROM t") == 100
                    seen = [row["a"] async for row in connection.cursor("SELECT a FROM t WHERE b <> 'copied' ORDER BY a")]
                    assert seen == list(range(50))
                try:
                    await connection.fetch("SELECT 1/0")
                    raise AssertionError("no error")
                except asyncpg.DivisionByZeroError:
                    pass
                try:
                    await connection.fetchval("SELECT pg_sleep(30)", timeout=0.2)  # cancels
                    raise AssertionError("no timeout")
                except asyncio.TimeoutError:
                    pass
                assert await connection.fetchval("SELECT 'after'") == "after"

        await asyncio.gather(*(work(me) for me in range(40)))
    print("ok")


asyncio.run(asyncio.wait_for(main(), 100))
