"use strict";
// How things are written, and the few ways in which the page's elements are made. Everything that comes from outside (SQL texts, names)
// goes in as text, never as markup.

/** An element with properties and children; `dataset`, `aria` and `on` are objects, `class` a string. */
function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") node.className = value;
    else if (name === "dataset") Object.assign(node.dataset, value);
    else if (name === "aria") for (const [key, text] of Object.entries(value)) node.setAttribute(`aria-${key}`, text);
    else if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const byId = (id) => document.getElementById(id);

/** Sets text and title only if they differ, so that a selection and a screen reader are left alone. */
function write(node, text, title) {
  if (node.textContent !== text) node.textContent = text;
  if (title !== undefined && node.title !== title) node.title = title;
}

const grouped = new Intl.NumberFormat(undefined, {maximumFractionDigits: 0});
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

const count = (value) => (isNumber(value) ? grouped.format(value) : "–");

/** As many digits as are worth reading: 0.042, 4.21, 42.1, 421. */
function significant(value) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  const digits = size === 0 || size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3;
  return value.toLocaleString(undefined, {minimumFractionDigits: digits, maximumFractionDigits: digits});
}

/** Milliseconds in the same unit throughout a column. */
const millis = (value) =>
  isNumber(value) ? value.toLocaleString(undefined, {minimumFractionDigits: 2, maximumFractionDigits: 2}) : "–";

/** Milliseconds in the unit that suits them. */
function time(ms) {
  if (!isNumber(ms)) return "–";
  return ms < 1000 ? `${significant(ms)} ms` : duration(ms / 1000);
}

function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  const s = Math.max(0, seconds);
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 60) return `${Math.floor(s)} s`;
  const two = (value) => String(Math.floor(value)).padStart(2, "0");
  if (s < 3600) return `${Math.floor(s / 60)} min ${two(s % 60)} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${two((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${two((s % 86400) / 3600)} h`;
}

function bytes(value) {
  if (!isNumber(value)) return "–";
  const units = ["B", "KB", "MB", "GB", "TB"];
  let unit = 0;
  for (; value >= 1024 && unit < units.length - 1; ++unit) value /= 1024;
  return `${unit === 0 ? value : significant(value)} ${units[unit]}`;
}

const clock = new Intl.DateTimeFormat(undefined, {hour: "2-digit", minute: "2-digit", second: "2-digit"});
const clockShort = new Intl.DateTimeFormat(undefined, {hour: "2-digit", minute: "2-digit"});
const calendar = new Intl.DateTimeFormat(undefined, {dateStyle: "short", timeStyle: "medium"});

/** A moment in the viewer's locale: the clock alone if it is today. */
function moment(date) {
  const value = new Date(date);
  if (Number.isNaN(value.getTime())) return "–";
  return value.toDateString() === new Date().toDateString() ? clock.format(value) : calendar.format(value);
}

/** When something began that has lasted for `seconds`, exactly. */
const began = (seconds) => (isNumber(seconds) ? `since ${new Date(Date.now() - seconds * 1000).toISOString()} (${seconds} s)` : "");

const plural = (n, one, many = `${one}s`) => `${count(n)} ${n === 1 ? one : many}`;
