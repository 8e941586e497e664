"use strict";
// What each part of the page shows of which document: the facts at the top, the pools, and the tables behind the tabs.

const orDash = (value) => (value === null || value === undefined || value === "" ? "–" : String(value));
const pool = (row) => `${orDash(row.database)} / ${orDash(row.user)}`;
const clientsOf = (row) => row.clients.active + row.clients.idle + row.clients.waiting;
const labelsOf = (row) => Object.entries(row.labels ?? {}).map(([name, value]) => `${name}=${value}`).join(" ");
const tagsOf = (row) => (row.tags ? (typeof row.tags === "string" ? row.tags : JSON.stringify(row.tags)) : "");

// ---- columns

const text = (id, label, more = {}) => ({id, label, value: (row) => row[id], title: (row) => orDash(row[id]), ...more});
const counter = (id, label, more = {}) => ({id, label, numeric: true, value: (row) => row[id], text: (row) => count(row[id]), ...more});
const lasting = (id, label, more = {}) => ({id, label, numeric: true, value: (row) => row[id], text: (row) => duration(row[id]),
  title: (row) => began(row[id]), ...more});
const inMillis = (id, label, more = {}) => ({id, label, numeric: true, value: (row) => row[id], text: (row) => millis(row[id]),
  title: (row) => `${row[id]} ms`, ...more});
const statement = (id, label, more = {}) => text(id, label, {wide: true, class: "statement", ...more});
const poolColumn = {id: "pool", label: "database / user", value: pool};

function stateCell(td, row) {
  write(td, row.state, began(row.stateSeconds));
  td.dataset.state = row.state;
}

const quantile = (name, at) => ({id: `${name}-${at}`, label: `${name} ${at}`, numeric: true, value: (row) => row[name]?.[at],
  text: (row) => millis(row[name]?.[at]), title: (row) => `${row[name]?.[at]} ms of ${count(row[name]?.count)}`,
  about: `${name === "wait" ? "wait for a server connection" : "query time"} since start, ${at}, in milliseconds`});

const kPoolColumns = [
  {...poolColumn, title: (row) => `${row.mode} mode, ${row.min} to ${row.max} server connections`},
  {id: "use", label: "server connections", numeric: true, class: "servers", value: (row) => row.utilization, cell: drawPool,
    text: (row) => `${row.activeCount} active ${row.idleCount} idle ${row.max}`},
  counter("waitingCount", "waiting", {warns: (row) => row.waitingCount > 0,
    title: (row) => (row.waitingCount > 0 ? `the first for ${time(row.oldestWaitMs)}` : "clients waiting for a server connection")}),
  {id: "clients", label: "clients", numeric: true, value: (row) => clientsOf(row), text: (row) => count(clientsOf(row)),
    title: (row) => `${row.clients.active} active, ${row.clients.idle} idle, ${row.clients.waiting} waiting`},
  counter("pinnedCount", "pinned"),
  ...["p50", "p95", "p99"].map((at) => quantile("wait", at)),
  ...["p50", "p95", "p99"].map((at) => quantile("query", at)),
  text("lastError", "last error", {wide: true, class: "error"}),
];

function drawPool(td, row) {
  const other = row.resettingCount + row.expiredCount;
  drawBar(td, [["active", row.activeCount, "active"], ["idle", row.idleCount, "idle"], ["connecting", row.connectingCount, "connecting"],
    ["closing", other, "resetting or closing"]], row.max, `${row.activeCount} active, ${row.idleCount} idle of ${row.max}`);
}

const kClientColumns = [
  text("id", "client", {numeric: true}),
  text("application", "application"),
  {...poolColumn},
  {id: "state", label: "state", value: (row) => row.state, cell: stateCell},
  lasting("stateSeconds", "for"),
  lasting("transactionSeconds", "transaction"),
  text("server", "server", {numeric: true, title: (row) => (row.serverPid ? `PostgreSQL's pid ${row.serverPid}` : "")}),
  {id: "pinned", label: "pinned by", value: (row) => row.pinned.join(", ")},
  statement("statement", "last statement"),
  text("peer", "from", {title: (row) =>
    `${row.peer}, ${row.tls ? "TLS" : "no TLS"}, ${plural(row.preparedStatements, "prepared statement")}, request ${orDash(row.request)}`}),
  lasting("connectedSeconds", "connected"),
];

const kServerColumns = [
  text("id", "server", {numeric: true}),
  text("pid", "pid", {numeric: true}),
  {...poolColumn},
  {id: "state", label: "state", value: (row) => row.state, cell: stateCell},
  lasting("stateSeconds", "for"),
  text("client", "client", {numeric: true}),
  text("application", "application"),
  statement("statement", "last statement"),
  {id: "uses", label: "uses", numeric: true, value: (row) => row.uses, text: (row) => count(row.uses),
    title: (row) => (row.maxUses ? `closed and replaced after ${row.maxUses}` : "no limit")},
  lasting("connectedSeconds", "connected"),
  text("address", "address", {title: (row) =>
    `${row.address}, ${row.tls ? "TLS" : "no TLS"}, ${plural(row.preparedStatements, "prepared statement")}`}),
];

const kStatementColumns = [
  statement("statement", "statement", {title: (row) => `${row.statement}${row.tags ? `\n${tagsOf(row)}` : ""}`, search: tagsOf}),
  {...poolColumn},
  counter("calls", "calls"),
  inMillis("totalMs", "total ms"),
  inMillis("meanMs", "mean ms"),
  {id: "split", label: "wait, server, client", class: "split", cell: drawSplit},
  inMillis("waitMs", "wait ms"),
  inMillis("p50Ms", "p50"),
  inMillis("p95Ms", "p95"),
  inMillis("p99Ms", "p99", {title: (row) => `${row.p99Ms} ms, at most ${row.maxMs} ms`}),
  {id: "errorCount", label: "errors", numeric: true, value: (row) => row.errorCount, text: (row) => count(row.errorCount),
    title: (row) => Object.entries(row.errors ?? {}).map(([state, n]) => `${state}: ${n}`).join(", "), warns: (row) => row.errorCount > 0},
  counter("rows", "rows", {title: (row) => `${bytes(row.bytes)} (${row.bytes} bytes)`}),
  counter("leftIdle", "left idle", {about: "transactions that it opened and left idle"}),
  {id: "lastSeen", label: "last seen", numeric: true, value: (row) => Date.parse(row.lastSeen), text: (row) => moment(row.lastSeen),
    title: (row) => `${row.firstSeen} to ${row.lastSeen}`},
];

function drawSplit(td, row) {
  drawBar(td, [["waiting", row.waitMs, "waiting ms"], ["server", row.serverMs, "server ms"], ["client", row.clientMs, "client ms"]],
    row.waitMs + row.serverMs + row.clientMs, "");
}

const kLeakColumns = [
  text("client", "client", {numeric: true}),
  text("application", "application"),
  {...poolColumn},
  text("peer", "from"),
  lasting("ageSeconds", "transaction"),
  lasting("idleSeconds", "idle"),
  text("serverPid", "pid", {numeric: true}),
  statement("firstStatement", "first statement"),
  statement("lastStatement", "last statement"),
  text("request", "request", {numeric: true}),
];

const kPinColumns = [
  text("client", "client", {numeric: true}),
  text("application", "application"),
  {...poolColumn},
  {id: "reasons", label: "pinned by", value: (row) => row.reasons.map(({reason}) => reason).join(", ")},
  lasting("seconds", "for"),
  {id: "ends", label: "ends", value: (row) => row.reasons.map(({ends}) => ends).join("; ")},
  text("serverPid", "pid", {numeric: true}),
  statement("statement", "after"),
  text("detail", "detail"),
];

const kAlertColumns = [
  {id: "severity", label: "severity", value: (row) => row.severity, cell: (td, row) => { write(td, row.severity); td.dataset.severity = row.severity; }},
  text("name", "alert"),
  statement("summary", "what", {class: "", title: (row) => labelsOf(row), search: labelsOf}),
  {id: "value", label: "value", numeric: true, value: (row) => row.value, text: (row) => significant(row.value),
    title: (row) => `threshold ${orDash(row.threshold)}`},
  {id: "since", label: "since", numeric: true, value: (row) => Date.parse(row.since), text: (row) => moment(row.since), title: (row) => row.since},
  {id: "ended", label: "ended", numeric: true, value: (row) => (row.ended ? Date.parse(row.ended) : Infinity),
    text: (row) => (row.ended ? moment(row.ended) : "active"), title: (row) => row.ended ?? ""},
];

// ---- the top

class Top {
  constructor() {
    this.facts = new Map();
    this.before = null;
  }

  fact(name, text, title, warns = false) {
    if (!this.facts.has(name)) {
      const value = el("dd");
      byId("facts").append(el("div", {}, el("dt", {}, name), value));
      this.facts.set(name, value);
    }
    const value = this.facts.get(name);
    write(value, text, title);
    value.classList.toggle("warns", warns);
  }

  show({health, stats}) {
    const {database, memory} = health.checks;
    const state = health.draining ? `${health.status}, draining` : health.status;
    write(byId("version"), health.version);
    write(byId("state"), state, `at ${health.timestamp}`);
    byId("state").dataset.state = health.status;
    document.title = health.status === "healthy" ? "pgsidecar" : `${state}: pgsidecar`;
    this.fact("database", [database.status, database.version?.split(" ")[0]].filter(Boolean).join(", PostgreSQL "),
      `PostgreSQL ${orDash(database.version)}, last answer ${orDash(database.lastOk)}`,
      database.status === "down");
    this.fact("latency", time(database.latencyMs), `${orDash(database.latencyMs)} ms, ${database.source}`);
    this.fact("transactions", `${this.rate(stats)}/s`, "in the last second");
    this.fact("servers", `${count(stats.totalCount)} of ${count(stats.max)}`, `${stats.activeCount} active, ${stats.idleCount} idle`);
    this.fact("waiting", count(stats.waitingCount), "clients waiting for a server connection", stats.waitingCount > 0);
    this.fact("clients", `${count(stats.clients.total)} of ${count(stats.clients.max)}`, `${stats.clients.login} logging in`);
    this.fact("memory", `${significant(memory.rssMb)} MB`, memory.limitMb ? `of ${memory.limitMb} MB` : "no limit");
    this.fact("up", duration(health.uptime), began(health.uptime));
    this.notices(health, stats);
    showAlerts(stats.alerts);
  }

  rate(stats) {
    const at = Date.parse(stats.timestamp);
    const total = stats.perPool.reduce((sum, {transactions}) => sum + transactions, 0);
    const {before} = this;
    this.before = {at, total};
    return before && at > before.at && total >= before.total ? significant((1000 * (total - before.total)) / (at - before.at)) : "–";
  }

  notices(health, stats) {
    const {database} = health.checks;
    notice("silent", null);
    notice("draining", health.draining &&
      `Draining: new clients are refused, ${plural(stats.clients.total, "client")} left, ${stats.activeCount} of them in a transaction.`);
    notice("database-down", database.status === "down" &&
      `The database can't be reached${database.lastOk ? ` (last answer ${moment(database.lastOk)})` : ""}: ${orDash(database.error)}`);
  }
}

function notice(id, text) {
  byId(id).hidden = !text;
  write(byId(id), text || "");
}

const shownAlerts = new Map();

function showAlerts(alerts) {
  const keyOf = (alert) => `${alert.name} ${labelsOf(alert)}`;
  const keys = new Set(alerts.map(keyOf));
  for (const [key, node] of shownAlerts) {
    if (keys.has(key)) continue;
    node.remove();
    shownAlerts.delete(key);
  }
  for (const alert of alerts) {
    const key = keyOf(alert);
    if (!shownAlerts.has(key)) {
      shownAlerts.set(key, el("li", {class: "notice"}, el("strong"), " ", el("span"), " ", el("span", {class: "since"})));
      byId("alerts").append(shownAlerts.get(key));
    }
    const node = shownAlerts.get(key);
    node.dataset.severity = alert.severity;
    write(node.children[0], alert.name, alert.severity);
    write(node.children[1], alert.summary, labelsOf(alert));
    write(node.children[2], `since ${moment(alert.since)}`, alert.since);
  }
}
