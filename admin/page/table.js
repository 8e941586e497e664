"use strict";
// A table that is sorted by its headers' buttons and filtered by words. Rows are kept by their key while the data change under them, so that
// focus and selection stay where they are.
//
// A column: id, label, and value(row) to sort by; text(row) is what is shown (default: the value), title(row) the exact value behind it,
// cell(td, row, previous) draws instead of text; numeric columns are aligned right and sorted downwards first. wide: may take the room that
// is left. actions(row): buttons, as {label, run, disabled}.

const kMostRows = 300;

class Table {
  constructor({label, columns, key, sort, down = true, placeholder = "Filter", empty, small = 0}) {
    Object.assign(this, {columns, key, sort, down, empty, small});
    this.rows = [];
    this.shown = new Map();
    this.filter = el("input", {type: "search", placeholder, aria: {label: `Filter ${label}`}, on: {input: () => this.render()}});
    this.note = el("span", {class: "muted", role: "status"});
    this.bar = el("div", {class: "toolbar"}, this.filter, this.note);
    this.heads = new Map();
    this.body = el("tbody", {role: "rowgroup"});
    const head = el("tr", {role: "row"}, ...columns.map((column) => this.header(column)));
    const table = el("table", {role: "table", aria: {label}}, el("thead", {role: "rowgroup"}, head), this.body);
    this.scroll = el("div", {class: "scroll", tabIndex: 0, role: "region", aria: {label}}, table);
    this.node = el("div", {class: "table"}, this.bar, this.scroll);
    this.render();
  }

  header(column) {
    const th = el("th", {role: "columnheader", scope: "col", class: this.classOf(column)});
    if (column.value) {
      th.append(el("button", {type: "button", title: column.about ?? "", on: {click: () => this.sortBy(column)}}, column.label));
      this.heads.set(column.id, th);
    } else {
      th.append(el("span", {class: column.actions ? "hidden" : ""}, column.label));
    }
    return th;
  }

  classOf(column) {
    return [column.numeric ? "number" : "", column.wide ? "wide" : "", column.class ?? ""].join(" ").trim();
  }

  sortBy(column) {
    this.down = this.sort === column.id ? !this.down : Boolean(column.numeric);
    this.sort = column.id;
    this.onsort?.(column.id);
    this.render();
  }

  update(rows) {
    this.rows = rows;
    this.render();
  }

  /** The rows to show, in order. */
  selected() {
    const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = (row) => this.columns.map((column) => `${this.textOf(column, row)} ${column.search?.(row) ?? ""}`).join(" ").toLowerCase();
    const rows = words.length === 0 ? [...this.rows] : this.rows.filter((row) => words.every((word) => text(row).includes(word)));
    const column = this.columns.find(({id}) => id === this.sort);
    const sign = this.down ? -1 : 1;
    return rows.sort((a, b) => compare(column.value(a), column.value(b), sign) || compare(this.key(a), this.key(b), 1));
  }

  textOf(column, row) {
    if (column.text) return column.text(row);
    const value = column.value?.(row);
    return value === null || value === undefined || value === "" ? "–" : String(value);
  }

  render() {
    for (const [id, th] of this.heads) th.setAttribute("aria-sort", id !== this.sort ? "none" : this.down ? "descending" : "ascending");
    const all = this.selected();
    const rows = all.slice(0, kMostRows);
    const focused = document.activeElement;
    const keys = new Set(rows.map((row) => String(this.key(row))));
    for (const [key, shown] of this.shown) {
      if (keys.has(key)) continue;
      shown.node.remove();
      this.shown.delete(key);
    }
    rows.forEach((row, index) => {
      const shown = this.shown.get(String(this.key(row))) ?? this.create(row);
      if (this.body.children[index] !== shown.node) this.body.insertBefore(shown.node, this.body.children[index] ?? null);
      this.fill(shown, row);
    });
    if (focused !== document.activeElement && focused?.isConnected) focused.focus({preventScroll: true});
    this.summarize(all.length, rows.length);
  }

  summarize(found, shown) {
    const total = this.rows.length;
    this.bar.hidden = total <= this.small && this.filter.value === "";
    const filtered = found === total ? count(total) : `${count(found)} of ${count(total)}`;
    write(this.note, total === 0 ? this.empty : shown < found ? `the first ${shown} of ${filtered}` : filtered);
    this.scroll.hidden = total === 0;
    if (total === 0) this.bar.hidden = false;
    this.filter.hidden = total <= this.small && this.filter.value === "";
  }

  create(row) {
    const shown = {node: el("tr", {role: "row"}), cells: [], row};
    for (const column of this.columns) {
      const td = el("td", {role: "cell", class: this.classOf(column), dataset: {label: column.label}});
      if (column.actions) td.append(...column.actions.map((action) => this.button(action, shown)));
      shown.cells.push(td);
    }
    shown.node.append(...shown.cells);
    this.shown.set(String(this.key(row)), shown);
    return shown;
  }

  button(action, shown) {
    return el("button", {type: "button", class: "action", on: {click: () => action.run(shown.row)}}, action.label);
  }

  fill(shown, row) {
    shown.row = row;
    this.columns.forEach((column, index) => {
      const td = shown.cells[index];
      if (column.actions) column.actions.forEach((action, at) => this.enable(td.children[at], action, row));
      else if (column.cell) column.cell(td, row);
      else write(td, this.textOf(column, row), column.title?.(row) ?? "");
      td.classList.toggle("none", td.textContent === "–");
      if (column.warns) td.classList.toggle("warns", Boolean(column.warns(row)));
    });
  }

  enable(button, action, row) {
    button.disabled = action.disabled?.(row) ?? false;
    button.setAttribute("aria-label", `${action.label} ${action.what(row)}`);
  }
}

/** Values before nothing at all; numbers by size, the rest by the locale's order. */
function compare(a, b, sign) {
  const none = (value) => value === null || value === undefined || value === "";
  if (none(a) || none(b)) return Number(none(a)) - Number(none(b));
  if (isNumber(a) && isNumber(b)) return sign * (a - b);
  return sign * String(a).localeCompare(String(b), undefined, {numeric: true});
}

/** Draws shares of a whole: parts are [class, value, label]. */
function drawBar(td, parts, whole, text) {
  let bar = td.querySelector(".bar");
  if (!bar) {
    bar = el("div", {class: "bar", role: "img"}, ...parts.map(([name]) => el("span", {class: `part ${name}`})));
    td.replaceChildren(bar, el("span", {class: "bar-text"}));
  }
  parts.forEach(([, value], index) => {
    bar.children[index].style.width = `${whole > 0 ? Math.min(100, (100 * value) / whole) : 0}%`;
  });
  const exact = parts.map(([, value, label]) => `${label} ${significant(value)}`).join(", ");
  bar.setAttribute("aria-label", exact);
  bar.title = exact;
  write(td.lastChild, text);
}
