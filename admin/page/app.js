"use strict";
// Joins the parts: the stream fills the top and the pools, what is behind the tabs is asked for while it is looked at.

const api = new Api();

// ---- asking back, and telling what came of it

function told(text, failed = false) {
  write(byId("told"), text);
  byId("told").classList.toggle("bad", failed);
  clearTimeout(told.timer);
  told.timer = setTimeout(() => write(byId("told"), ""), 8000);
}

/** Whether the user says yes. */
function confirmed({title, detail, statement, yes}) {
  const dialog = byId("confirm");
  write(byId("confirm-title"), title);
  write(byId("confirm-text"), detail);
  write(byId("confirm-statement"), statement ?? "");
  byId("confirm-statement").hidden = !statement;
  write(byId("confirm-yes"), yes);
  dialog.returnValue = "";
  dialog.showModal();
  byId("confirm-no").focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), {once: true});
  });
}
byId("confirm-yes").addEventListener("click", () => byId("confirm").close("yes"));
byId("confirm-no").addEventListener("click", () => byId("confirm").close());

async function change(path, question, done) {
  if (!(await confirmed(question))) return;
  try {
    await api.post(path);
    told(done);
  } catch (error) {
    told([`${question.yes} failed: ${error.message}`, error.hint].filter(Boolean).join("; "), true);
  }
  tabs.load();
}

const about = (row) => `${orDash(row.application)}, ${pool(row)}, ${row.state} for ${duration(row.stateSeconds)}`;

const cancelClient = {
  label: "Cancel", what: (row) => `the statement of client ${row.id}`, disabled: (row) => row.state !== "active",
  run: (row) => change(`/api/admin/clients/${row.id}/cancel`,
    {title: `Cancel the statement of client ${row.id}?`, detail: about(row), statement: row.statement, yes: "Cancel the statement"},
    `Client ${row.id}: its statement was cancelled.`),
};
const closeClient = {
  label: "Close", what: (row) => `client ${row.id}`,
  run: (row) => change(`/api/admin/clients/${row.id}/close`,
    {title: `Close the connection of client ${row.id}?`, detail: `${about(row)}. An open transaction is rolled back.`, statement: row.statement,
      yes: "Close the client"},
    `Client ${row.id} was closed.`),
};
const closeServer = {
  label: "Close", what: (row) => `server connection ${row.id}`,
  run: (row) => change(`/api/admin/servers/${row.id}/close`,
    {title: `Close server connection ${row.id}?`, statement: row.statement, yes: "Close the server connection",
      detail: `${about(row)}.${row.client ? ` Client ${row.client} holds it and loses its transaction.` : ""}`},
    `Server connection ${row.id} was closed.`),
};
const actions = (...list) => ({id: "actions", label: "actions", class: "actions", actions: list});

// ---- the tabs

/** A tab whose table is filled from a document: rows(document) -> rows. */
class TableTab {
  constructor({id, title, path, rows, table, refresh = 2000, extra = []}) {
    Object.assign(this, {id, title, path, rows, refresh});
    this.table = new Table({label: title, ...table});
    this.table.bar.append(...extra);
    this.content = this.table.node;
  }

  async load() {
    const path = typeof this.path === "function" ? this.path(this.table) : this.path;
    this.table.update(this.rows(await api.get(path)));
  }
}

class ConfigurationTab {
  constructor() {
    Object.assign(this, {id: "configuration", title: "Configuration", refresh: 10000});
    this.content = el("pre", {class: "yaml", tabIndex: 0, aria: {label: "The configuration in force, without secrets"}});
  }

  async load() {
    write(this.content, (await api.get("/api/monitoring/config")).yaml);
  }
}

const kSorts = {totalMs: "total", meanMs: "mean", waitMs: "wait", errorCount: "errors", calls: "calls"};
const statementsPath = () => {
  let sort = "total";
  return (table) => {
    sort = kSorts[table.sort] ?? sort;
    return `/api/monitoring/queries?sort=${sort}&limit=50`;
  };
};

const resetStatements = el("button", {type: "button", class: "action", on: {click: () => change("/api/admin/queries/reset",
  {title: "Forget all statements seen so far?", detail: "Their counts begin anew, for everyone.", yes: "Reset the statements"},
  "The statements were reset.")}}, "Reset");

const kTabs = [
  new TableTab({id: "clients", title: "Clients", path: "/api/monitoring/clients", rows: ({clients}) => clients,
    table: {columns: [...kClientColumns, actions(cancelClient, closeClient)], key: (row) => row.id, sort: "stateSeconds", empty: "No client is connected."}}),
  new TableTab({id: "servers", title: "Servers", path: "/api/monitoring/servers", rows: ({servers}) => servers,
    table: {columns: [...kServerColumns, actions(closeServer)], key: (row) => row.id, sort: "stateSeconds", empty: "No server connection is open."}}),
  new TableTab({id: "statements", title: "Statements", path: statementsPath(), rows: ({queries}) => queries, refresh: 5000, extra: [resetStatements],
    table: {columns: kStatementColumns, key: (row) => row.id, sort: "totalMs", empty: "No statement has been seen yet."}}),
  new TableTab({id: "leaks", title: "Leaks", path: "/api/monitoring/leaks", rows: ({leaks}) => leaks,
    table: {columns: kLeakColumns, key: (row) => row.client, sort: "idleSeconds", empty: "No transaction is idle for longer than pool.idleInTransactionWarnMillis."}}),
  new TableTab({id: "pins", title: "Pins", path: "/api/monitoring/pins", rows: ({pins}) => pins,
    table: {columns: kPinColumns, key: (row) => row.client, sort: "seconds", empty: "No client needs a server connection of its own."}}),
  new TableTab({id: "alerts", title: "Alerts", path: "/api/monitoring/alerts", rows: ({active, recent}) => [...active, ...recent],
    table: {columns: kAlertColumns, key: (row) => `${row.name} ${labelsOf(row)} ${row.since}`, sort: "ended", empty: "No alert is active, nor was any lately."}}),
  new ConfigurationTab(),
];

/** Why a tab can't be filled, and a field for the token if that is why. */
class Obstacle {
  constructor(retry) {
    this.retry = retry;
    this.text = el("p");
    this.field = el("input", {type: "password", autocomplete: "off", placeholder: "the content of admin.tokenFile", aria: {label: "Bearer token"}});
    this.form = el("form", {class: "token", on: {submit: (event) => this.use(event)}}, this.field, el("button", {type: "submit"}, "Use this token"));
    this.node = el("div", {class: "obstacle", role: "status", hidden: true}, this.text);
  }

  use(event) {
    event.preventDefault();
    api.token = this.field.value.trim();
    this.field.value = "";
    this.retry();
  }

  show(error) {
    const names = error.status === 401 || error.status === 403;
    const why = names ? "What names clients and statements is shown to callers on loopback, or with the token, only. " : "";
    write(this.text, `${why}${[error.message, error.hint].filter(Boolean).join("; ")}.`);
    if (error.status !== 401) this.form.remove();
    else if (!this.form.isConnected) this.node.append(this.form);
    this.node.hidden = false;
  }

  hide() {
    this.node.hidden = true;
  }
}

class Tabs {
  constructor() {
    this.obstacle = new Obstacle(() => this.load());
    byId("panels").append(this.obstacle.node);
    this.views = kTabs.map((tab) => this.view(tab));
    byId("tabs").append(...this.views.map(({button}) => button));
    byId("panels").append(...this.views.map(({panel}) => panel));
    byId("tabs").addEventListener("keydown", (event) => this.key(event));
    document.addEventListener("visibilitychange", () => document.hidden || this.load());
    this.current = this.views.find(({tab}) => `#${tab.id}` === location.hash) ?? this.views[0];
  }

  view(tab) {
    const button = el("button", {type: "button", role: "tab", id: `tab-${tab.id}`, aria: {controls: tab.id}}, tab.title);
    const panel = el("div", {role: "tabpanel", id: tab.id, aria: {labelledby: button.id}}, tab.content);
    const view = {tab, button, panel};
    button.addEventListener("click", () => this.select(view));
    if (tab.table) tab.table.onsort = () => this.load();
    return view;
  }

  select(view) {
    this.current = view;
    history.replaceState(null, "", `#${view.tab.id}`);
    this.show();
  }

  show() {
    for (const view of this.views) {
      const chosen = view === this.current;
      view.button.setAttribute("aria-selected", String(chosen));
      view.button.tabIndex = chosen ? 0 : -1;
      view.panel.hidden = !chosen;
    }
    this.load();
  }

  key(event) {
    const at = this.views.indexOf(this.current);
    const to = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: -1}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.select(this.views.at(to % this.views.length));
    this.current.button.focus();
  }

  async load() {
    clearTimeout(this.timer);
    const view = this.current;
    try {
      await view.tab.load();
      if (view === this.current) this.obstacle.hide();
      view.tab.content.hidden = false;
    } catch (error) {
      if (view === this.current) this.obstacle.show(error);
      view.tab.content.hidden = error.status === 401 || error.status === 403;
    }
    if (view !== this.current || document.hidden) return;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.load(), view.tab.refresh);
  }
}

// ---- light and dark

const kThemes = ["auto", "light", "dark"];

function applyTheme(theme) {
  document.documentElement.dataset.theme = theme;
  write(byId("theme"), `Theme: ${theme}`);
  charts.restyle();
}

function nextTheme() {
  const theme = kThemes[(kThemes.indexOf(document.documentElement.dataset.theme) + 1) % kThemes.length];
  localStorage.setItem("pgsidecar-theme", theme);
  applyTheme(theme);
}

// ---- all together

const top_ = new Top();
const pools = new Table({label: "Pools", columns: kPoolColumns, key: pool, sort: "use", small: 8, empty: "No client has connected yet."});
byId("pools").append(pools.node);
const charts = new Charts(api);
const tabs = new Tabs();

const feed = new Feed({
  onsample(sample) {
    top_.show(sample);
    pools.update(sample.stats.perPool);
  },
  onsilent({error}) {
    notice("silent", `pgsidecar's data loop doesn't answer: ${error}. Clients are stuck; what is shown is old.`);
  },
});

function watchFeed() {
  const lost = feed.lost();
  byId("lost").hidden = lost === null;
  document.body.classList.toggle("stale", lost !== null);
  if (lost === null) return;
  write(byId("lost-age"), Number.isFinite(lost) ? `last data ${duration(Math.floor(lost / 1000) || 1)} ago (${moment(feed.last)})` : "no data yet");
}

function refreshCharts() {
  clearTimeout(refreshCharts.timer);
  if (document.hidden) return;
  charts.load().finally(() => {
    clearTimeout(refreshCharts.timer);
    refreshCharts.timer = setTimeout(refreshCharts, charts.window.refresh * 1000);
  });
}

const isTheme = (theme) => kThemes.includes(theme);
applyTheme([localStorage.getItem("pgsidecar-theme")].find(isTheme) ?? "auto");
byId("theme").addEventListener("click", nextTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.restyle());
charts.onchoose = refreshCharts;
document.addEventListener("visibilitychange", refreshCharts);
setInterval(watchFeed, 1000);
tabs.show();
refreshCharts();
