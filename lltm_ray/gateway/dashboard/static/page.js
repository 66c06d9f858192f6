/** The live page: takes looks from the stream and hands each part to who draws it. */

import { Chart } from "./chart.js";
import { byId, keyed, make, say, setWidth, show } from "./dom.js";
import { drawEngines, drawMachines } from "./machines.js";
import { RequestTable } from "./requests.js";
import { Stream, forgetKey, hasKey, keepKey } from "./stream.js";
import { openTimeline } from "./timeline.js";
import * as units from "./units.js";

/** Figures older than this are marked: a look comes each second. */
const STALE_S = 3;
const THEMES = ["auto", "light", "dark"];

const chart = new Chart(byId("chart"));
const table = new RequestTable(openTimeline);
const figures = [...document.querySelectorAll("[data-figure]")];
const widths = [...document.querySelectorAll("[data-width]")];
let latest = null;
let arrivedAt = 0;
let isDrawing = false;
let state = "connecting";

const pick = (look, path) => path.split(".").reduce((part, name) => part?.[name], look);
const sum = (rows, name) => rows.reduce((total, row) => total + row[name], 0);

/** What follows from a look and is shown as a figure; counters that nothing has moved yet are 0. */
function complete(look) {
  const { rates, energy, queues } = look;
  const none = { requests: 0, errors: 0, rejected: 0, failovers: 0, input_tokens: 0, cached_tokens: 0, output_tokens: 0 };
  const tokens = sum(energy?.engines ?? [], "tokens");
  return {
    ...look,
    totals: { ...none, ...look.totals },
    computed_tokens_s: rates.input_tokens_s - rates.cached_tokens_s,
    waiting: queues.length ? sum(queues, "waiting") : null,
    running: queues.length ? sum(queues, "running") : null,
    error_count: Object.values(look.errors).reduce((total, each) => total + each, 0),
    joules_per_token: tokens ? sum(energy.engines, "joules") / tokens : null,
  };
}

function draw() {
  isDrawing = false;
  const look = complete(latest);
  for (const element of figures) say(element, units[element.dataset.as](pick(look, element.dataset.figure)));
  for (const element of widths) setWidth(element, pick(look, element.dataset.width));
  drawErrors(look.errors);
  drawEngines(look, openTimeline);
  drawMachines(look);
  table.draw(look.recent);
  chart.draw(look.history);
  drawHealth(look.telemetry);
  // For tests: which look is on the page.
  document.body.dataset.look = String(look.at_unix_nano);
}

function drawErrors(errors) {
  const kinds = Object.entries(errors).sort((one, other) => other[1] - one[1]);
  byId("errors-tile").classList.toggle("has-errors", kinds.length > 0);
  const create = () => make("li", {}, make("b"), make("span"));
  keyed(byId("errors"), kinds, ([kind]) => kind, create, (item, [kind, number]) => {
    say(item.firstChild, units.count(number));
    say(item.lastChild, kind);
    item.title = kind;
  });
}

function drawHealth(telemetry) {
  if (!telemetry) return;
  const lost = Object.values(telemetry.lost ?? {}).reduce((total, each) => total + each, 0);
  const exporters = Object.entries(telemetry.exporters ?? {}).map(
    ([name, counts]) => `${name}: ${Object.entries(counts).map(([what, number]) => `${units.count(number)} ${what}`).join(", ")}`,
  );
  const parts = [
    `rows come ${units.seconds(telemetry.lag_s)} late`,
    `${units.count(lost)} rows lost`,
    `${units.count(telemetry.faults)} faults`,
    ...exporters,
  ];
  say(byId("health"), `Telemetry: ${parts.join(" · ")}`);
}

function takeLook(look) {
  latest = look;
  arrivedAt = performance.now();
  // A look that comes while one waits to be drawn replaces it.
  if (!isDrawing) requestAnimationFrame(draw);
  isDrawing = true;
  drawAge();
}

const WORDS = {
  connecting: "connecting",
  live: "live",
  stale: "late",
  away: "telemetry away",
  lost: "connection lost, trying again",
  locked: "API key needed",
  off: "no telemetry",
};

function takeState(name, why) {
  byId("state").title = why;
  show(byId("key-form"), name === "locked");
  show(byId("forget-key"), hasKey());
  if (name === "locked") askKey(why);
  const isNew = name !== state;
  state = name;
  // Said once: a screen reader must not hear each second.
  if (isNew) say(byId("said"), [WORDS[name], why].filter(Boolean).join(": "));
  drawAge(why);
}

/** How old the figures are, which is not the same as whether the connection stands. */
function drawAge(why = byId("state").title) {
  const age = latest ? (performance.now() - arrivedAt) / 1000 : null;
  const shown = state === "live" && age > STALE_S ? "stale" : state;
  byId("state").dataset.state = shown;
  say(byId("state-text"), why && shown !== "locked" ? `${WORDS[shown]}: ${why}` : WORDS[shown]);
  say(byId("age"), age === null || shown === "live" ? "" : `figures are ${Math.round(age)} s old`);
  document.body.classList.toggle("is-old", age !== null && shown !== "live");
}

function askKey(why) {
  if (why) say(byId("key-note"), `${why}; give another one.`);
  byId("key").focus();
}

function applyTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  say(byId("theme"), `Theme: ${name}`);
  chart.repaint();
}

function nextTheme() {
  const at = THEMES.indexOf(localStorage.getItem("lltm-theme") ?? "auto");
  const name = THEMES[(at + 1) % THEMES.length];
  localStorage.setItem("lltm-theme", name);
  applyTheme(name);
}

const stream = new Stream(takeLook, takeState);

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepKey(byId("key").value.trim());
  byId("key").value = "";
  stream.start();
});
byId("forget-key").addEventListener("click", () => {
  forgetKey();
  stream.start();
});
byId("theme").addEventListener("click", nextTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => chart.repaint());
// Nobody watches a hidden page, and an unwatched fleet is asked for nothing.
document.addEventListener("visibilitychange", () => (document.hidden ? stream.stop() : stream.start()));
addEventListener("load", () => chart.draw(latest?.history));
setInterval(drawAge, 1000);

applyTheme(localStorage.getItem("lltm-theme") ?? "auto");
stream.start();
