/** One request's timeline: what it was, why it went where it went, its spans as a flame chart, its attempts. */

import { byId, make, say } from "./dom.js";
import { ask, reason } from "./stream.js";
import * as units from "./units.js";

const dialog = byId("timeline");
const body = byId("timeline-body");
const tip = byId("tip");
const LEVEL_PX = 26;
let number = 0;

body.addEventListener("scroll", () => closeTip());
dialog.addEventListener("close", () => closeTip());
byId("timeline-close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());

/** Open the dialog; the browser keeps focus in it, closes it on Escape, and gives focus back to where it was. */
export async function openTimeline(id) {
  const mine = ++number;
  say(byId("timeline-head"), id);
  body.replaceChildren(make("p", { className: "note", text: "asking …" }));
  if (!dialog.open) dialog.showModal();
  const content = await fetchTimeline(id);
  if (mine === number) body.replaceChildren(...content);
}

async function fetchTimeline(id) {
  const problem = (text) => [make("p", { className: "problem", text })];
  const response = await ask(`requests/${encodeURIComponent(id)}`).catch(() => null);
  if (!response) return problem("the gateway does not answer");
  return response.ok ? draw(await response.json()) : problem(await reason(response));
}

function draw({ request, joules, spans }) {
  const content = [facts(request, joules), ...reasons(request)];
  if (!spans.length) return [...content, make("p", { className: "note", text: "This route asks no model: it has no spans." })];
  return [...content, flame(spans), legend(), ...attempts(spans), spanList(spans)];
}

// --- facts

function facts(request, joules) {
  const told = [
    ["status", request.status === 0 ? "client left" : String(request.status)],
    ["route", request.route, "long"],
    ["model", request.model || units.NOTHING],
    ["total", units.seconds(request.total_s)],
    ["first token", units.seconds(request.ttft_s)],
    ["delivered", `${units.count(request.delivered_tokens)} tok`],
    ["energy", joules === null ? "not known" : units.joules(joules)],
    ["finished by", request.finish_reasons || units.NOTHING],
    ["tenant", request.tenant],
    ["trace", request.trace_id, "long"],
  ];
  const shown = told.filter(([, value]) => value);
  return make("dl", { className: "facts" },
    ...shown.map(([name, value, className]) => make("div", { className }, make("dt", { text: name }), make("dd", { text: value }))));
}

function reasons(request) {
  const found = [];
  if (request.why) {
    const policy = request.policy ? ` (${request.policy})` : "";
    found.push(make("p", { className: "why" }, make("b", { text: "Routed so because " }), `${request.why}${policy}`));
  }
  if (request.error_type) found.push(make("p", { className: "problem", text: `${request.error_type}: ${request.error}` }));
  return found;
}

// --- flame chart

/** What a span's time went into; gives it its colour. */
export function kindOf(span) {
  if (span.kind === "server" || span.kind === "client") return span.kind;
  const name = span.name.replace(/^lltm\./, "");
  return ["route", "queue", "prefill", "decode"].includes(name) ? name : "other";
}

/** Level of each span: below its parent, and below what is in its way there. */
export function levels(spans) {
  const byId_ = new Map(spans.map((span) => [span.span_id, span]));
  const found = new Map();
  const taken = [];
  const isFree = (level, span) => (taken[level] ?? []).every((each) => each.end_s <= span.start_s || each.start_s >= span.end_s);
  const placeOf = (span) => {
    if (found.has(span)) return found.get(span);
    found.set(span, 0); // a span that is its own ancestor must not hang the page
    const parent = byId_.get(span.parent_span_id);
    let level = parent && parent !== span ? placeOf(parent) + 1 : 0;
    while (!isFree(level, span)) level += 1;
    found.set(span, level);
    (taken[level] ??= []).push(span);
    return level;
  };
  [...spans].sort((one, other) => one.start_s - other.start_s).forEach(placeOf);
  return found;
}

function extent(spans) {
  const start = Math.min(0, ...spans.map((span) => span.start_s));
  const end = Math.max(...spans.map((span) => span.end_s), start + 1e-6);
  return { start, length: end - start };
}

function flame(spans) {
  const { start, length } = extent(spans);
  const found = levels(spans);
  const bars = make("div", { className: "bars" });
  bars.style.height = `${(Math.max(...found.values()) + 1) * LEVEL_PX}px`;
  const ordered = [...spans].sort((one, other) => found.get(one) - found.get(other) || one.start_s - other.start_s);
  for (const span of ordered) bars.append(bar(span, found.get(span), { start, length }));
  return make("div", { className: "flame", role: "group", "aria-label": "Spans; Tab goes through them" }, ticks(start, length), bars);
}

function bar(span, level, { start, length }) {
  const took = units.seconds(span.end_s - span.start_s);
  const label = `${labelOf(span)}, ${took}, from ${units.seconds(span.start_s)}`;
  const element = make("button", { type: "button", className: `span ${kindOf(span)}`, "aria-label": label, "aria-describedby": "tip" },
    make("span", { text: `${labelOf(span)} ` }), make("b", { text: took }));
  element.classList.toggle("is-error", Boolean(span.error_type));
  element.style.left = `${((span.start_s - start) / length) * 100}%`;
  element.style.width = `${((span.end_s - span.start_s) / length) * 100}%`;
  element.style.top = `${level * LEVEL_PX}px`;
  for (const name of ["pointerenter", "focus", "click"]) element.addEventListener(name, () => openTip(element, span));
  for (const name of ["pointerleave", "blur"]) element.addEventListener(name, closeTip);
  return element;
}

function labelOf(span) {
  const engine = span.attributes["lltm.engine"];
  return span.kind === "client" && engine ? engine : span.name.replace(/^lltm\./, "");
}

const closeTip = () => (tip.hidden = true);

function openTip(element, span) {
  const times = `${units.seconds(span.start_s)} to ${units.seconds(span.end_s)}, ${span.kind}`;
  const told = Object.entries(span.attributes).map(([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: shown(value) })));
  const error = span.error_type ? [make("p", { className: "problem", text: `${span.error_type}: ${span.status_error}` })] : [];
  tip.replaceChildren(make("b", { text: span.name }), make("p", { text: times }), ...error, make("dl", {}, ...told));
  tip.hidden = false;
  const at = element.getBoundingClientRect();
  const fits = at.bottom + 4 + tip.offsetHeight <= innerHeight;
  tip.style.left = `${Math.max(Math.min(at.left, innerWidth - tip.offsetWidth - 8), 8)}px`;
  tip.style.top = `${fits ? at.bottom + 4 : Math.max(at.top - tip.offsetHeight - 4, 8)}px`;
}

const shown = (value) => (Array.isArray(value) ? value.join(", ") : String(value));

/** Round steps, about five. */
function ticks(start, length) {
  const rough = length / 5;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * size).find((each) => each >= rough);
  const marks = make("div", { className: "ticks", "aria-hidden": "true" });
  for (let at = Math.ceil(start / step) * step; at <= start + length; at += step) {
    const mark = make("span", { text: at === 0 ? "0" : units.seconds(at) });
    mark.style.left = `${((at - start) / length) * 100}%`;
    marks.append(mark);
  }
  return marks;
}

const LEGEND = [["server", "request"], ["client", "one engine"], ["route", "waits"], ["prefill", "reads the prompt"], ["decode", "generates"], ["other", "other"]];

function legend() {
  return make("p", { className: "keys" }, ...LEGEND.map(([kind, text]) => make("span", {}, make("i", { className: `swatch span-${kind}` }), text)));
}

// --- tables

function tableOf(caption, heads, rows) {
  const head = make("tr", {}, ...heads.map(([text, kind = ""]) => make("th", { scope: "col", text, className: kind })));
  const lines = rows.map((row) => make("tr", {}, ...row.map((text, at) => make("td", { text, className: heads[at][1] ?? "" }))));
  const table = make("table", {}, make("caption", { text: caption }), make("thead", {}, head), make("tbody", {}, ...lines));
  return make("div", { className: "scroll" }, table);
}

function attempts(spans) {
  const tries = spans.filter((span) => "lltm.attempt.outcome" in span.attributes);
  if (!tries.length) return [make("p", { className: "note", text: "It was sent to no engine." })];
  const expected = new Map(spans.filter((span) => span.name === "route")
    .map((span) => [span.attributes["lltm.attempt.number"], span.attributes["lltm.tokens.predicted_cached"]]));
  const rows = tries.map(({ attributes: told, start_s, end_s }) => [
    units.count(told["lltm.attempt.number"]),
    told["lltm.engine"] ?? units.NOTHING,
    units.count(told["lltm.slot.id"]),
    told["lltm.attempt.outcome"],
    units.count(told["gen_ai.usage.input_tokens"]),
    units.count(expected.get(told["lltm.attempt.number"])),
    units.count(told["gen_ai.usage.cache_read.input_tokens"] ?? (told["gen_ai.usage.input_tokens"] ? 0 : null)),
    units.count(told["gen_ai.usage.output_tokens"]),
    units.seconds(end_s - start_s),
  ]);
  const heads = [["try", "n"], ["engine"], ["slot", "n"], ["outcome"], ["prompt tok", "n"], ["cached, expected", "n"], ["cached, found", "n"], ["generated tok", "n"], ["took", "n"]];
  return [tableOf("Attempts", heads, rows)];
}

function spanList(spans) {
  const rows = spans.map((span) => [labelOf(span), span.kind, units.seconds(span.start_s), units.seconds(span.end_s - span.start_s), span.error_type || units.NOTHING]);
  const heads = [["span"], ["kind"], ["from", "n"], ["took", "n"], ["error"]];
  return make("details", {}, make("summary", { text: `All ${spans.length} spans as a table` }), tableOf("Spans", heads, rows));
}
