// A web application of node-postgres in a pod: requests of several kinds without a pause until it is told to end, then those that have begun,
// and for AFTER_MILLIS more that still come in. Prints {"done": {kind: n}, "failed": [...]} and exits 0; it gives up nothing.
const { Pool, Client } = require('pg');

const connectionString = process.env.DATABASE_URL;
const after = Number(process.env.AFTER_MILLIS || 0);
const ignore = () => {};  // of a connection that is lost: the request on it fails, or the pool opens another
const pool = new Pool({ connectionString, max: 8, application_name: 'web', idleTimeoutMillis: 100 });
pool.on('error', ignore);
pool.on('connect', (client) => client.on('error', ignore));
const done = { short: 0, long: 0, fresh: 0 };
const failed = [];
let ending = Infinity;

async function transaction(client) {
  await client.query('BEGIN');
  await client.query('INSERT INTO orders VALUES ($1)', [process.pid]);
  await client.query('SELECT pg_sleep(0.3)');
  await client.query('COMMIT');
}

const requests = {
  short: () => pool.query('SELECT $1::int AS n', [1]),
  async long() {
    const client = await pool.connect();
    try {
      await transaction(client);
      client.release();
    } catch (error) {
      client.release(error);
      throw error;
    }
  },
  async fresh() {
    const client = new Client({ connectionString, application_name: 'fresh' });
    client.on('error', ignore);
    await client.connect();
    await client.query('SELECT 1');
    await client.end();
  },
};

async function work(kind) {
  while (Date.now() < ending) {
    try {
      await requests[kind]();
      done[kind]++;
    } catch (error) {
      failed.push(`${kind}: ${error.code} ${error.message}`);
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

process.on('SIGTERM', () => { ending = Math.min(ending, Date.now() + after); });
Promise.all(['short', 'short', 'long', 'long', 'long', 'fresh'].map(work)).then(async () => {
  await pool.end();
  process.stdout.write(JSON.stringify({ done, failed }) + '\n');
  process.exit(0);
});
