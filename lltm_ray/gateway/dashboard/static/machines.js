/** Engines with their slots, machines with their GPUs. */

import { byId, keyed, make, say, setWidth, show } from "./dom.js";
import * as units from "./units.js";

/** A sample that is older than this, when its look was made, is told with its age; they come each second. */
const OLD_SAMPLE_S = 4;

const refs = (element) => (element.refs ??= Object.fromEntries(
  [...element.querySelectorAll("[data-ref]")].map((each) => [each.dataset.ref, each]),
));

const pair = (name, ref) => make("div", {}, make("dt", { text: name }), make("dd", { text: units.NOTHING, "data-ref": ref }));

function meter(name, ref) {
  const bar = make("div", { className: "bar", "aria-hidden": "true" }, make("i", { "data-ref": `${ref}-bar` }));
  return make("div", { className: "meter" }, make("span", { text: name }), bar, make("b", { "data-ref": ref }));
}

function setMeter(parts, ref, text, ratio, isHigh = false) {
  say(parts[ref], text);
  setWidth(parts[`${ref}-bar`], ratio);
  parts[`${ref}-bar`].classList.toggle("high", isHigh);
}

function sampleAge(row, look) {
  const age = (look.at_unix_nano - row.at_unix_nano) / 1e9;
  return age > OLD_SAMPLE_S ? `seen ${units.seconds(age)} ago` : "";
}

// --- engines

export function drawEngines(look, open) {
  show(byId("no-engines"), look.engines.length === 0);
  const energy = new Map((look.energy?.engines ?? []).map((each) => [`${each.engine} ${each.model}`, each]));
  const gpus = new Map(look.gpus.map((gpu) => [gpu.uuid, `GPU ${gpu.gpu}`]));
  const update = (card, engine) => updateEngine(card, engine, { look, energy, gpus, open });
  keyed(byId("engines"), look.engines, (engine) => engine.engine, createEngine, update);
}

function createEngine() {
  const head = make("header", {}, make("h3", { "data-ref": "name" }), make("span", { className: "model", "data-ref": "model" }),
    make("span", { className: "busy", "data-ref": "busy" }));
  const facts = make("dl", { className: "facts" }, pair("generates", "wrote"), pair("reads", "read"), pair("CPU", "cpu"),
    pair("memory", "memory"), pair("GPU memory", "gpu"), pair("energy", "energy"));
  return make("article", { className: "panel card engine" }, head, make("p", { className: "note", "data-ref": "where" }),
    make("ol", { className: "slots", "data-ref": "slots" }), facts);
}

function updateEngine(card, engine, { look, energy, gpus, open }) {
  const parts = refs(card);
  const used = energy.get(`${engine.engine} ${engine.model}`);
  say(parts.name, engine.engine);
  say(parts.model, engine.model);
  say(parts.busy, `${engine.slots_busy} of ${engine.slots_total} slots busy`);
  say(parts.where, where(engine, gpus, sampleAge(engine, look)));
  say(parts.wrote, withUnit(engine.predicted_tokens_s, "tok/s"));
  say(parts.read, withUnit(engine.prompt_tokens_s, "tok/s"));
  say(parts.cpu, units.cores(engine.cpu_ratio));
  say(parts.memory, units.bytes(engine.memory_bytes));
  say(parts.gpu, units.bytes(engine.gpu_memory_bytes));
  say(parts.energy, used?.joules ? `${units.joules(used.joules / used.tokens)}/tok` : units.NOTHING);
  const update = (row, slot) => updateSlot(row, slot);
  keyed(parts.slots, engine.slots, (slot) => slot.slot, () => createSlot(open), update);
}

const withUnit = (value, unit) => (value === null ? units.NOTHING : `${units.rate(value)} ${unit}`);

function where(engine, gpus, age) {
  const devices = engine.gpu_uuids.split(",").filter(Boolean).map((uuid) => gpus.get(uuid) ?? uuid.slice(0, 12));
  const share = engine.share > 0 && engine.share < 1 ? ` (share ${engine.share.toFixed(2)})` : "";
  const parts = [
    engine.node,
    devices.length ? devices.join(", ") + share : "CPU only",
    `pid ${engine.server_pid}`,
    engine.restarts ? `${engine.restarts} restarts` : "",
    engine.deferred ? `${units.count(engine.deferred)} deferred` : "",
    age,
  ];
  return parts.filter(Boolean).join(" · ");
}

function createSlot(open) {
  const bar = make("div", { className: "bar slot-bar", "aria-hidden": "true" }, make("i", { className: "prompt", "data-ref": "prompt" }),
    make("i", { className: "wrote", "data-ref": "decoded" }));
  const holder = make("button", { type: "button", className: "plain id", "data-ref": "holder" });
  holder.addEventListener("click", () => open(holder.textContent));
  return make("li", { className: "slot" }, make("span", { className: "number", "data-ref": "number" }),
    make("span", { className: "what", "data-ref": "what" }), bar, make("span", { className: "tokens", "data-ref": "tokens" }), holder);
}

function updateSlot(row, slot) {
  const parts = refs(row);
  row.classList.toggle("is-busy", slot.is_processing);
  say(parts.number, `slot ${slot.slot}`);
  say(parts.what, slot.is_processing ? "busy" : "idle");
  setWidth(parts.prompt, slot.prompt_tokens / slot.n_ctx);
  setWidth(parts.decoded, slot.decoded_tokens / slot.n_ctx);
  say(parts.tokens, `${units.count(slot.prompt_tokens)} + ${units.count(slot.decoded_tokens)} of ${units.count(slot.n_ctx)} tok`);
  say(parts.holder, slot.request_id);
  parts.holder.title = `${slot.is_processing ? "before this one" : "holds"}: ${slot.request_id}`;
  parts.holder.disabled = !slot.request_id;
}

// --- machines

export function drawMachines(look) {
  show(byId("no-machines"), look.nodes.length + look.gpus.length === 0);
  const names = new Set([...look.nodes, ...look.gpus].map((row) => row.node));
  const machines = [...names].sort().map((name) => ({
    name,
    node: look.nodes.find((row) => row.node === name),
    gpus: look.gpus.filter((row) => row.node === name),
  }));
  keyed(byId("machines"), machines, (machine) => machine.name, createMachine, (card, machine) => updateMachine(card, machine, look));
}

function createMachine() {
  return make("article", { className: "panel card machine" },
    make("header", {}, make("h3", { "data-ref": "name" }), make("span", { className: "model", "data-ref": "address" })),
    meter("CPU", "cpu"), meter("memory", "memory"),
    make("p", { className: "note", "data-ref": "reason" }), make("div", { className: "gpus", "data-ref": "gpus" }));
}

function updateMachine(card, { name, node, gpus }, look) {
  const parts = refs(card);
  say(parts.name, name);
  say(parts.address, node ? [node.address, sampleAge(node, look)].filter(Boolean).join(" · ") : "no sample of this machine");
  setMeter(parts, "cpu", node ? `${units.percent(node.cpu_ratio)} of ${node.cpus} CPUs` : units.NOTHING, node?.cpu_ratio);
  const memory = node ? `${units.bytes(node.memory_used_bytes)} of ${units.bytes(node.memory_total_bytes)}` : units.NOTHING;
  setMeter(parts, "memory", memory, node ? node.memory_used_bytes / node.memory_total_bytes : 0);
  show(parts.reason, gpus.length === 0);
  say(parts.reason, gpus.length ? "" : `No GPU: ${node?.gpu_reason || "none was told of"}`);
  const balances = look.energy?.gpus ?? {};
  keyed(parts.gpus, gpus, (gpu) => gpu.uuid, createGpu, (element, gpu) => updateGpu(element, gpu, balances[gpu.uuid]));
}

function createGpu() {
  return make("section", { className: "gpu" },
    make("header", {}, make("h4", { "data-ref": "name" }), make("span", { className: "throttle", "data-ref": "throttle" })),
    meter("utilization", "utilization"), meter("memory", "memory"), meter("power", "power"), meter("temperature", "temperature"),
    make("p", { className: "note", "data-ref": "energy" }));
}

function updateGpu(element, gpu, balance) {
  const parts = refs(element);
  say(parts.name, `GPU ${gpu.gpu} · ${gpu.name}`);
  element.title = `${gpu.uuid}, driver ${gpu.driver}`;
  say(parts.throttle, gpu.throttle.length ? `slowed: ${gpu.throttle.join(", ").replaceAll("_", " ")}` : "not slowed");
  parts.throttle.classList.toggle("is-bad", gpu.throttle.length > 0);
  setMeter(parts, "utilization", units.percent(gpu.utilization_ratio), gpu.utilization_ratio);
  const memory = `${units.bytes(gpu.memory_used_bytes)} of ${units.bytes(gpu.memory_total_bytes)}`;
  setMeter(parts, "memory", memory, gpu.memory_used_bytes / gpu.memory_total_bytes);
  const power = gpu.power_limit_w === null ? units.watts(gpu.power_w) : `${units.watts(gpu.power_w)} of ${units.watts(gpu.power_limit_w)}`;
  setMeter(parts, "power", power, gpu.power_w / gpu.power_limit_w, gpu.throttle.includes("power_cap"));
  setMeter(parts, "temperature", units.celsius(gpu.temperature_c), gpu.temperature_c / 100, gpu.temperature_c >= 85);
  say(parts.energy, energyOf(balance));
}

function energyOf(balance) {
  const all = balance ? balance.attributed_j + balance.idle_j + balance.unattributed_j : 0;
  if (!all) return "energy: not known yet";
  const told = [[balance.attributed_j, "requests"], [balance.idle_j, "idle"], [balance.unattributed_j, "unknown"]];
  const parts = told.filter(([joules]) => joules > 0).map(([joules, what]) => `${units.percent(joules / all)} ${what}`);
  return `energy ${units.joules(all)}: ${parts.join(", ")}`;
}
