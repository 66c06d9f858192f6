/** The table of recent requests. It stands still while somebody reads it. */

import { byId, keyed, make, say, show } from "./dom.js";
import * as units from "./units.js";

const COLUMNS = [
  { name: "Time", text: (row) => units.clock(row.arrived_unix_nano) },
  { name: "Request", text: (row) => row.request_id, kind: "id" },
  { name: "Status", text: status, kind: "status" },
  { name: "Model", text: (row) => row.model || units.NOTHING, kind: "cut" },
  { name: "Engine / slot", text: place, kind: "cut" },
  { name: "Tries", text: (row) => units.count(row.attempts), kind: "n" },
  { name: "Prompt tok", text: (row) => units.count(row.input_tokens), kind: "n" },
  { name: "Cached tok", text: (row) => units.count(row.cached_tokens), kind: "n" },
  { name: "Out tok", text: (row) => units.count(row.output_tokens), kind: "n" },
  { name: "Wait", text: (row) => units.seconds(row.queue_s), kind: "n" },
  { name: "First token", text: (row) => units.seconds(row.ttft_s), kind: "n" },
  { name: "Total", text: (row) => units.seconds(row.total_s), kind: "n" },
  { name: "Why there", text: (row) => row.why || units.NOTHING, kind: "why" },
];

function status(row) {
  const code = row.status === 0 ? "left" : String(row.status);
  return row.error_type && row.error_type !== code ? `${code} ${row.error_type.replaceAll("_", " ")}` : code;
}

function place(row) {
  return row.engine ? `${row.engine} / ${row.slot < 0 ? units.NOTHING : row.slot}` : "none";
}

export class RequestTable {
  /** @param {(id: string) => void} open called with the request that was chosen */
  constructor(open) {
    this.open = open;
    this.body = byId("recent");
    this.area = byId("scroll");
    this.rows = [];
    this.newest = "";
    this.canHover = matchMedia("(hover: hover)");
    this.body.addEventListener("keydown", (event) => this.onKey(event));
    this.body.addEventListener("focusin", (event) => this.setEntry(event.target.closest("tr")));
    for (const id of ["errors-only", "filter"]) byId(id).addEventListener("input", () => this.redraw());
  }

  draw(rows) {
    if (this.isHeld && this.rows.length) {
      this.sayHeld(rows);
      return;
    }
    this.rows = rows;
    this.redraw();
    say(byId("held"), "");
  }

  /** Rows that run away under a finger or a pointer cannot be chosen. */
  get isHeld() {
    const isOver = this.canHover.matches && this.body.matches(":hover");
    return isOver || this.body.contains(document.activeElement) || byId("timeline").open;
  }

  sayHeld(rows) {
    const at = rows.findIndex((row) => row.request_id === this.rows[0].request_id);
    const newer = at < 0 ? `${rows.length} or more` : String(at);
    say(byId("held"), at === 0 ? "" : `held while you read; ${newer} newer`);
  }

  redraw() {
    const wanted = this.rows.filter(filter());
    keyed(this.body, wanted, (row) => row.request_id, (row) => this.create(row), update);
    if (!this.body.querySelector('tr[tabindex="0"]')) this.setEntry(this.body.firstElementChild);
    show(byId("no-requests"), wanted.length === 0);
    say(byId("no-requests"), this.rows.length ? "No recent request is like that." : "No request has ended yet.");
  }

  create(row) {
    const cells = COLUMNS.map(({ name, kind = "" }) => make("td", { role: "gridcell", className: kind, "data-name": name }));
    const element = make("tr", { role: "row", tabindex: "-1", "aria-haspopup": "dialog" }, ...cells);
    element.addEventListener("click", () => this.choose(element, row.request_id));
    element.requestId = row.request_id;
    return element;
  }

  choose(element, id) {
    element.focus();
    this.open(id);
  }

  /** One row is reached by Tab, the others from it by arrows. */
  setEntry(element) {
    for (const row of this.body.querySelectorAll('tr[tabindex="0"]')) row.tabIndex = -1;
    if (element) element.tabIndex = 0;
  }

  onKey(event) {
    const row = event.target.closest("tr");
    const rows = [...this.body.children];
    const at = rows.indexOf(row);
    const goals = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + 10, PageUp: at - 10, Home: 0, End: rows.length - 1 };
    if (event.key === "Enter" || event.key === " ") this.open(row.requestId);
    else if (event.key === "Escape") row.blur();
    else if (event.key in goals) rows[Math.min(Math.max(goals[event.key], 0), rows.length - 1)].focus();
    else return;
    event.preventDefault();
  }
}

function filter() {
  const word = byId("filter").value.trim().toLowerCase();
  const needsError = byId("errors-only").checked;
  return (row) =>
    (!needsError || row.error_type) &&
    (!word || [row.request_id, row.model, row.engine, status(row), row.why].some((text) => text.toLowerCase().includes(word)));
}

function update(element, row) {
  element.classList.toggle("is-error", Boolean(row.error_type));
  COLUMNS.forEach(({ text, kind = "" }, at) => {
    const shown = text(row);
    say(element.children[at], shown);
    if (kind && kind !== "n") element.children[at].title = shown;
  });
}
