"use strict";
// What the page asks of its own admin port: documents, changes, and the stream of samples.

class ApiError extends Error {
  constructor(status, message, hint) {
    super(message);
    Object.assign(this, {status, hint});
  }
}

class Api {
  static kToken = "pgsidecar-token";

  get token() {
    return sessionStorage.getItem(Api.kToken) ?? "";
  }

  set token(value) {
    sessionStorage.setItem(Api.kToken, value);
  }

  get(path) {
    return this.ask("GET", path);
  }

  post(path) {
    return this.ask("POST", path);
  }

  async ask(method, path) {
    const headers = this.token ? {Authorization: `Bearer ${this.token}`} : {};
    const answer = await fetch(path, {method, headers, cache: "no-store", signal: AbortSignal.timeout(10000)}).catch(() => {
      throw new ApiError(0, "no answer from pgsidecar");
    });
    const document = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new ApiError(answer.status, document.error ?? `HTTP ${answer.status}`, document.hint);
    return document;
  }
}

/** The stream, for as long as somebody looks at the page; it comes back by itself. */
class Feed {
  static kPath = "/api/monitoring/stream";
  static kLate = 3500;
  static kRetry = 2000;

  constructor({onsample, onsilent}) {
    Object.assign(this, {onsample, onsilent});
    this.last = null;  // when the last sample came
    this.broken = false;
    document.addEventListener("visibilitychange", () => (document.hidden ? this.close() : this.open()));
    this.open();
  }

  open() {
    if (this.source) return;
    this.opened = Date.now();
    this.source = new EventSource(Feed.kPath);
    this.source.addEventListener("sample", (event) => this.heard(() => this.onsample(JSON.parse(event.data))));
    this.source.addEventListener("silent", (event) => this.heard(() => this.onsilent(JSON.parse(event.data))));
    this.source.addEventListener("error", () => this.failed());
  }

  close() {
    clearTimeout(this.again);
    this.source?.close();
    this.source = null;
  }

  heard(handle) {
    this.last = Date.now();
    this.broken = false;
    handle();
  }

  failed() {
    this.broken = true;
    if (this.source.readyState !== EventSource.CLOSED) return;  // it tries again by itself
    this.close();
    this.again = setTimeout(() => this.open(), Feed.kRetry);
  }

  /** Milliseconds without a sign, if that is longer than it should be; else null. */
  lost() {
    const since = Date.now() - Math.max(this.last ?? 0, this.opened);
    if (document.hidden || (!this.broken && since < Feed.kLate)) return null;
    return this.last === null ? Infinity : Date.now() - this.last;
  }
}
