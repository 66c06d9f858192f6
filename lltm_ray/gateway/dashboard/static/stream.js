/**
 * The stream of looks. Read with fetch, not EventSource, since only fetch can send the key as a header: a key in an URL
 * ends in logs and histories.
 */

const KEY = "lltm-key";
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 8000;
/** A connection that is silent for so long is taken for dead; the server speaks each second, or after 5 s of trying. */
const SILENCE_MS = 12_000;

export const hasKey = () => Boolean(sessionStorage.getItem(KEY));
export const keepKey = (key) => sessionStorage.setItem(KEY, key);
export const forgetKey = () => sessionStorage.removeItem(KEY);

/** Ask one of the dashboard's own paths. */
export function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  return fetch(new URL(path, import.meta.url), { ...options, headers, cache: "no-store" });
}

/** What the server says for itself, else the status. */
export async function reason(response) {
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `the gateway answered ${response.status}`;
}

/** `[event, data]` of each server-sent event. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) yield parse(part);
  }
}

function parse(part) {
  const fields = { event: "message", data: "" };
  for (const line of part.split("\n")) {
    const at = line.indexOf(": ");
    if (at > 0) fields[line.slice(0, at)] = line.slice(at + 2);
  }
  return [fields.event, fields.data];
}

export class Stream {
  /**
   * @param {(look: object) => void} onLook
   * @param {(state: string, why: string) => void} onState `connecting`, `live`, `away` (telemetry does not answer the
   *   gateway), `lost` (the gateway does not answer), `locked` (it wants a key), `off` (the fleet has no telemetry)
   */
  constructor(onLook, onState) {
    this.onLook = onLook;
    this.onState = onState;
    this.pause = FIRST_PAUSE_MS;
    this.stop();
  }

  start() {
    this.stop();
    this.run(++this.number);
  }

  stop() {
    this.number = (this.number ?? 0) + 1;
    clearTimeout(this.timer);
    clearTimeout(this.silence);
    this.controller?.abort();
  }

  async run(number) {
    const isOurs = () => number === this.number;
    const controller = (this.controller = new AbortController());
    let why = "the connection ended";
    try {
      const response = await ask("events", { signal: controller.signal });
      if (!isOurs()) return;
      if (response.status === 401) return this.onState("locked", hasKey() ? "the gateway refused this key" : "");
      if (response.status === 501) return this.onState("off", await reason(response));
      if (response.ok) await this.read(response.body, controller, isOurs);
      else why = await reason(response);
    } catch (error) {
      if (error.name !== "AbortError") why = "the gateway does not answer";
    }
    if (isOurs()) this.retry(why);
  }

  async read(body, controller, isOurs) {
    const guard = () => {
      clearTimeout(this.silence);
      this.silence = setTimeout(() => controller.abort(), SILENCE_MS);
    };
    guard();
    for await (const [event, data] of events(body)) {
      if (!isOurs()) return;
      guard();
      this.pause = FIRST_PAUSE_MS;
      if (event === "away") {
        this.onState("away", JSON.parse(data));
      } else if (event === "look") {
        this.onState("live", "");
        this.onLook(JSON.parse(data));
      }
    }
  }

  retry(why) {
    clearTimeout(this.silence);
    // Spread out: all pages of a gateway that restarts would come at once.
    const pause = this.pause * (0.75 + Math.random() / 2);
    this.pause = Math.min(this.pause * 2, LONGEST_PAUSE_MS);
    this.onState("lost", why);
    this.timer = setTimeout(() => this.start(), pause);
  }
}
