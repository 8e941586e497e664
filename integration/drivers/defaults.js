// node-postgres with its defaults: pool, parameters, named statements, transactions, errors, concurrency.
const assert = require('assert');
const { Pool, Client } = require('pg');

async function main() {
  const pool = new Pool({ connectionString: process.env.DATABASE_URL, max: 20 });
  pool.on('error', (error) => { throw error; });
  const results = await Promise.all(Array.from({ length: 200 }, (_, n) => pool.query('SELECT $1::int AS n', [n])));
  results.forEach((result, n) => assert.strictEqual(result.rows[0].n, n));
  for (let n = 0; n < 50; n++) {
    const result = await pool.query({ name: 'add', text: 'SELECT $1::int + $2::int AS sum', values: [n, 1] });
    assert.strictEqual(result.rows[0].sum, n + 1);
  }
  await Promise.all(Array.from({ length: 30 }, async (_, n) => {
    const client = await pool.connect();
    try {
      await client.query('BEGIN');
      await client.query("SELECT set_config('app.me', $1, true)", [String(n)]);
      const { rows } = await client.query("SELECT current_setting('app.me') AS me");
      assert.strictEqual(rows[0].me, String(n));
      await client.query(n % 2 ? 'COMMIT' : 'ROLLBACK');
    } finally {
      client.release();
    }
  }));
  await assert.rejects(pool.query('SELECT 1/0'), { code: '22012' });
  await assert.rejects(pool.query('SELECT $1::int', ['word']), { code: '22P02' });
  const when = await pool.query("SELECT now() AS t, '{1,2}'::int[] AS a, '{\"x\": 1}'::jsonb AS j, NULL AS n");
  assert(when.rows[0].t instanceof Date);
  assert.deepStrictEqual([when.rows[0].a, when.rows[0].j, when.rows[0].n], [[1, 2], { x: 1 }, null]);
  await pool.end();

  const client = new Client({ connectionString: process.env.DATABASE_URL, application_name: 'node', statement_timeout: 4000 });
  await client.connect();
  assert.strictEqual((await client.query('SHOW statement_timeout')).rows[0].statement_timeout, '4s');
  assert.strictEqual((await client.query('SHOW application_name')).rows[0].application_name, 'node');
  await client.end();
  console.log('ok');
}

main().catch((error) => { console.error(error); process.exit(1); });
