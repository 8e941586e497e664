"use strict";
// The charts of what has happened. Colours are the style sheet's variables, so that light and dark are decided there alone.

const kWindows = [
  {label: "5 minutes", seconds: 300, step: 1, tick: 60, refresh: 2},
  {label: "1 hour", seconds: 3600, step: 10, tick: 600, refresh: 10},
  {label: "1 day", seconds: 86400, step: 60, tick: 14400, refresh: 60},
];

const quantiles = (name) => [
  {key: `${name}P50Ms`, label: "p50", color: "--series-1"},
  {key: `${name}P95Ms`, label: "p95", color: "--series-2"},
  {key: `${name}P99Ms`, label: "p99", color: "--series-3"},
];

// area: lines of the same chart are stacked; scale: from the API's unit to the shown one.
const kCharts = [
  {id: "throughput", title: "Throughput", unit: "/s", lines: [
    {key: "transactions", label: "transactions", color: "--series-1"},
    {key: "queries", label: "queries", color: "--series-2"},
    {key: "errors", label: "errors", color: "--bad"}]},
  {id: "wait", title: "Wait for a connection", unit: "ms", lines: quantiles("wait")},
  {id: "query", title: "Query time", unit: "ms", lines: quantiles("query")},
  {id: "connections", title: "Connections", unit: "", whole: true, lines: [
    {key: "serversActive", label: "active", color: "--active", area: true},
    {key: "serversIdle", label: "idle", color: "--idle", area: true},
    {key: "serversLogin", label: "connecting", color: "--connecting", area: true},
    {key: "serversOther", label: "other", color: "--closing", area: true},
    {key: "max", label: "max", color: "--muted", dashed: true},
    {key: "clientsWaiting", label: "clients waiting", color: "--bad"}]},
  {id: "cpu", title: "CPU", unit: "% of a core", lines: [{key: "cpu", label: "pgsidecar", color: "--series-1", scale: 100}]},
  {id: "memory", title: "Memory", unit: "MB", lines: [{key: "memoryMb", label: "resident", color: "--series-1"}]},
];

// A variable may have two values, light and dark; only an element's own colour tells which.
const palette = new Map();
function color(name) {
  if (!palette.has(name)) {
    const probe = byId("charts");
    probe.style.color = `var(${name})`;
    palette.set(name, getComputedStyle(probe).color);
    probe.style.color = "";
  }
  return palette.get(name);
}

const kAxisFont = {size: 11};

class HistoryChart {
  constructor(spec) {
    this.spec = spec;
    this.canvas = el("canvas", {role: "img"});
    this.latest = spec.lines.map(() => el("span", {class: "value"}));
    const legend = spec.lines.map((line, index) => this.legendItem(line, index));
    const title = el("h3", {}, spec.title, spec.unit ? el("span", {class: "muted"}, ` ${spec.unit}`) : null);
    this.node = el("figure", {class: "chart", id: `chart-${spec.id}`},
      el("figcaption", {}, title, el("div", {class: "legend"}, ...legend)), el("div", {class: "canvas"}, this.canvas));
  }

  /** Once its element is in the document. */
  start() {
    this.chart = new Chart(this.canvas, {
      type: "line",
      data: {datasets: this.spec.lines.map(dataset)},
      options: chartOptions(this.spec),
    });
  }

  legendItem(line, index) {
    const swatch = el("span", {class: `swatch${line.dashed ? " dashed" : ""}`});
    swatch.style.setProperty("--swatch", `var(${line.color})`);
    const button = el("button", {type: "button", aria: {pressed: "true"}, on: {click: () => this.toggle(button, index)}},
      swatch, line.label, " ", this.latest[index]);
    return button;
  }

  toggle(button, index) {
    const visible = !this.chart.isDatasetVisible(index);
    this.chart.setDatasetVisibility(index, visible);
    button.setAttribute("aria-pressed", String(visible));
    this.chart.update("none");
  }

  show(history, {seconds, tick}) {
    const times = history.t.map((text) => Date.parse(text));
    const end = Date.parse(history.timestamp);
    const told = [];
    this.spec.lines.forEach((line, index) => {
      const values = history.series[line.key] ?? [];
      const scale = line.scale ?? 1;
      this.chart.data.datasets[index].data = times.map((x, at) => ({x, y: isNumber(values[at]) ? values[at] * scale : NaN}));
      const last = values.findLast(isNumber);
      const text = isNumber(last) ? (this.spec.whole ? count(last) : significant(last * scale)) : "–";
      write(this.latest[index], text);
      told.push(`${line.label} ${text}`);
    });
    this.canvas.setAttribute("aria-label", `${this.spec.title}: ${told.join(", ")} ${this.spec.unit}`);
    Object.assign(this.chart.options.scales.x, {min: end - seconds * 1000, max: end, tick});
    this.chart.update("none");
  }

  restyle() {
    this.chart.update("none");
  }
}

function dataset(line, index) {
  return {
    label: line.label,
    data: [],
    borderColor: () => color(line.color),
    backgroundColor: () => color(line.color),
    fill: line.area ? (index === 0 ? "origin" : "-1") : false,
    stack: line.area ? "area" : line.key,
    borderWidth: line.area ? 0 : 1.5,
    borderDash: line.dashed ? [4, 3] : [],
    pointRadius: 0,
    pointHitRadius: 0,
    order: line.area ? 1 : 0,
  };
}

function chartOptions(spec) {
  const text = () => color("--muted");
  const grid = {color: () => color("--grid"), drawTicks: false, borderColor: () => color("--grid")};
  return {
    animation: false, parsing: false, normalized: true, responsive: true, maintainAspectRatio: false,
    interaction: {mode: "index", intersect: false},
    layout: {padding: {top: 4}},
    plugins: {
      legend: {display: false},
      tooltip: {
        animation: false, usePointStyle: true, boxWidth: 6, boxHeight: 6,
        callbacks: {
          title: ([item]) => (item ? moment(item.parsed.x) : ""),
          label: (item) => `${item.dataset.label} ${significant(item.parsed.y)} ${spec.unit}`,
        },
      },
    },
    scales: {
      x: {
        type: "linear", grid, afterBuildTicks: wholeMinutes,
        ticks: {color: text, font: kAxisFont, maxRotation: 0, padding: 4, callback: (value) => clockShort.format(value)},
      },
      y: {
        type: "linear", beginAtZero: true, stacked: spec.lines.some(({area}) => area), grid, suggestedMax: spec.whole ? 4 : undefined,
        ticks: {color: text, font: kAxisFont, maxTicksLimit: 5, padding: 4, precision: spec.whole ? 0 : undefined},
      },
    },
  };
}

/** Ticks at whole minutes and hours of the viewer's clock. */
function wholeMinutes(scale) {
  const {min, max, tick} = scale.options;
  if (!tick) return;
  const every = tick * 1000;
  const zone = new Date(max).getTimezoneOffset() * 60000;
  scale.ticks = [];
  for (let at = Math.ceil((min - zone) / every) * every + zone; at <= max; at += every) scale.ticks.push({value: at});
}

class Charts {
  constructor(api) {
    this.api = api;
    this.window = kWindows[0];
    this.charts = kCharts.map((spec) => new HistoryChart(spec));
    byId("charts").append(...this.charts.map(({node}) => node));
    for (const chart of this.charts) chart.start();
    this.buttons = kWindows.map((choice) => el("button", {type: "button", on: {click: () => this.choose(choice)}}, choice.label));
    byId("windows").append(...this.buttons);
    this.mark();
  }

  mark() {
    this.buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(kWindows[index] === this.window)));
  }

  choose(choice) {
    this.window = choice;
    this.mark();
    this.onchoose?.();
  }

  async load() {
    const wanted = this.window;
    try {
      const history = await this.api.get(`/api/monitoring/history?window=${wanted.seconds}&step=${wanted.step}`);
      if (wanted !== this.window) return;
      for (const chart of this.charts) chart.show(history, wanted);
      write(byId("charts-note"), "");
    } catch (error) {
      write(byId("charts-note"), error.message);
    }
  }

  restyle() {
    palette.clear();
    for (const chart of this.charts) chart.restyle();
  }
}
