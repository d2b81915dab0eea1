// The operator's view: the bus as it is now, redrawn every second from one stream.

import { ApiError, getJson, live, postJson } from "./api.js";
import { h } from "./markdown.js";

const SVG = "http://www.w3.org/2000/svg";
const HISTORY = 90; // looks kept for the small charts, one a second
const SPAN_MS = 60_000; // of the timeline
const USAGE_MS = 15_000; // between two looks at what keys have used

const history = { running: [], queued: [], rate: [], first: [] };
let controller = null;
let latest = null;
let lastTokens = null;
let usageAt = -Infinity;
let onUnauthorized = () => {};
let confirmDrain = async () => false;

function svg(tag, props = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(props)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export function prepare(options) {
  onUnauthorized = options.onUnauthorized;
  confirmDrain = options.confirm;
}

/** Begin to watch; nothing is asked of the bus while the tab is closed. */
export async function open() {
  if (controller) return;
  const own = (controller = new AbortController());
  skeleton();
  while (!own.signal.aborted) {
    try {
      for await (const look of live(own.signal)) take(look);
      throw new ApiError("The gateway ended the view.");
    } catch (error) {
      if (own.signal.aborted) return;
      if (error.status === 401) onUnauthorized(error.message);
      trouble(error.status === 403 ? "This key is not an operator's: the view of the bus is closed to it." : error.message);
      if (error.status === 403 || error.status === 401) { controller = null; return; }
    }
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

export function close() {
  controller?.abort();
  controller = null;
}

const $ = (id) => document.getElementById(id);

function skeleton() {
  if ($("cards")) return;
  const section = (id, title, note, ...rest) => h("section", { class: "block", "aria-labelledby": `${id}-title` }, h("div", { class: "block-head" }, h("h2", { id: `${id}-title` }, title), h("p", { class: "fine", id: `${id}-note` }, note)), h("div", { id, class: "scroll-x" }), ...rest);
  usageAt = -Infinity;
  $("panel-bus").replaceChildren(
    h("div", { class: "bus-column" },
      h("p", { id: "trouble", class: "problem", role: "alert", hidden: true }),
      h("div", { id: "cards", class: "cards" }),
      section("workers", "Workers", ""),
      section("timeline", "Requests", "the last minute", h("details", { class: "block-more" }, h("summary", {}, "As a table"), h("div", { id: "requests", class: "scroll-x" }))),
      h("div", { class: "two" }, section("models", "Models and queues", ""), section("clients", "Clients", "")),
      section("usage", "Tokens by key", ""),
      section("errors", "Recent errors", "of the bus, and of this gateway"),
    ),
  );
}

/** What every key has used, where the gateway counts it. */
async function usage(look) {
  const now = look.at_ms;
  $("usage").closest("section").hidden = !look.gateway.counts_tokens;
  if (!look.gateway.counts_tokens || now - usageAt < USAGE_MS) return;
  usageAt = now;
  const told = await getJson("/v1/usage?key=*").catch(() => null);
  if (!told || !$("usage")) return; // the next look asks again
  const today = new Date(now).toISOString().slice(0, 10);
  const keys = new Map();
  for (const row of told.data) {
    const own = keys.get(row.key) ?? { requests: 0, in: 0, out: 0, today: 0 };
    own.requests += row.requests;
    own.in += row.prompt_tokens;
    own.out += row.completion_tokens;
    if (row.day === today) own.today += row.prompt_tokens + row.completion_tokens;
    keys.set(row.key, own);
  }
  const rows = [...keys].toSorted((a, b) => b[1].today - a[1].today);
  table("usage", ["Key", "Today", "Requests", "In", "Out"], rows.map(([name, own]) => [name || "no key", whole.format(own.today), whole.format(own.requests), whole.format(own.in), whole.format(own.out)]), "Nothing was asked yet.");
  $("usage-note").textContent = `today, and since ${told.since} (UTC)`;
}

function trouble(text) {
  $("trouble").textContent = text;
  $("trouble").hidden = !text;
}

// --- numbers -------------------------------------------------------------------------------------

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const one = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });

function duration(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 1000) return `${whole.format(ms)} ms`;
  if (ms < 60_000) return `${one.format(ms / 1000)} s`;
  return `${Math.floor(ms / 60_000)} min ${Math.round((ms % 60_000) / 1000)} s`;
}

function bytes(count) {
  if (!count) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const step = Math.min(units.length - 1, Math.floor(Math.log2(count) / 10));
  return `${one.format(count / 1024 ** step)} ${units[step]}`;
}

const sum = (rows, name) => rows.reduce((total, row) => total + (row[name] ?? 0), 0);

function push(list, value) {
  list.push(value);
  if (list.length > HISTORY) list.shift();
}

function take(look) {
  latest = look;
  if (look.problem) {
    trouble(look.problem);
    return;
  }
  const keys = look.gateway.key_file_problem;
  trouble(keys ? `The key file cannot be used, the keys before still hold: ${keys}` : "");
  const now = look.at_ms;
  const total = look.stats.completion_tokens_total ?? 0;
  const running = sum(look.workers, "running");
  // Workers report their own speed while they run; the broker counts tokens when answers end.
  const reported = look.workers.reduce((all, worker) => all + (worker.metrics?.tokens_per_s ?? 0), 0);
  const counted = lastTokens && now > lastTokens.at ? Math.max(0, ((total - lastTokens.total) / (now - lastTokens.at)) * 1000) : 0;
  lastTokens = { at: now, total };
  const first = look.workers.map((worker) => worker.metrics?.ttft_ms).filter((value) => value > 0);
  usage(look);
  push(history.running, running);
  push(history.queued, look.stats.queued ?? 0);
  push(history.rate, reported || counted);
  push(history.first, first.length ? first.reduce((a, b) => a + b) / first.length : look.gateway.first_token_ms);
  draw();
}

// --- drawing -------------------------------------------------------------------------------------

function spark(values, ceiling) {
  const known = values.map((value) => value ?? 0);
  const top = Math.max(ceiling ?? 0, ...known, 1e-9);
  // A chart that began a moment ago is as wide as one of half a minute.
  const span = Math.max(30, known.length);
  const x = (i) => ((i + span - known.length) / (span - 1)) * 120;
  const y = (value) => 30 - (value / top) * 27;
  const line = known.map((value, i) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`);
  const area = known.length ? `M${x(0).toFixed(1)},31 L${line.join(" L")} L120,31 Z` : "";
  return svg("svg", { class: "spark", viewBox: "0 0 120 32", preserveAspectRatio: "none", "aria-hidden": "true" }, svg("path", { class: "area", d: area }), svg("polyline", { points: line.join(" ") }));
}

function card(title, value, unit, note, chart) {
  return h("div", { class: "card" }, h("h3", {}, title), h("p", { class: "figure" }, value, unit ? h("small", {}, ` ${unit}`) : null), h("p", { class: "fine" }, note), chart);
}

const last = (list) => list[list.length - 1];

function draw() {
  const { workers, models, clients, stats, requests } = latest;
  const capacity = sum(workers, "capacity");
  const ready = workers.filter((worker) => worker.state === "ready").length;
  const oldest = Math.max(0, ...requests.filter((row) => row.state === "queued").map((row) => row.age_ms));
  $("cards").replaceChildren(
    card("Slots used", whole.format(last(history.running)), `of ${whole.format(capacity)}`, `${ready} of ${workers.length} workers ready`, spark(history.running, capacity)),
    card("Waiting", whole.format(stats.queued ?? 0), "", oldest ? `longest for ${duration(oldest)}` : "nothing waits", spark(history.queued, 4)),
    card("Tokens a second", one.format(last(history.rate)), "", `${whole.format(stats.completion_tokens_total ?? 0)} since the start`, spark(history.rate)),
    card("First token", last(history.first) === null ? "–" : duration(last(history.first)), "", last(history.first) === null ? "no answer in the last minute" : "mean, lately", spark(history.first)),
  );
  table("workers", ["Worker", "State", "Slots", "Tokens/s", "First token", "Heartbeat", "Memory", ""], workers.toSorted((a, b) => a.name.localeCompare(b.name)).map(workerRow), "No worker has joined yet: python -m worker --broker BACK");
  $("workers-note").textContent = `${workers.length} on this broker`;
  table("models", ["Model", "Workers", "Running", "Waiting", "Context"], models.map((model) => [strong(model.name, (model.images ? "text, images" : "text") + (waitsForLoad(model, workers) ? ", not loaded" : "")), `${model.ready} of ${model.workers}`, whole.format(model.running ?? 0), whole.format(model.queued ?? 0), model.context_tokens ? whole.format(model.context_tokens) : "–"]), "No model is served.");
  table("clients", ["Client", "In flight", "Waiting", "Silent for"], clients.map((client) => [client.name, whole.format(client.inflight), whole.format(client.queued), duration(client.silent_ms)]), "No client is connected.");
  table("requests", ["Request", "Model", "Worker", "State", "Waited", "Took"], requests.slice(0, 40).map((row) => [h("code", {}, row.id), row.model, row.worker || "–", outcome(row), row.state === "queued" && row.position !== null && row.position !== undefined ? `${duration(row.queued_ms)}, ${whole.format(row.position)} ahead${typeof row.starts_in_ms === "number" ? `, starts in ${duration(row.starts_in_ms)}` : ""}` : duration(row.queued_ms), duration(row.took_ms)]), "No request yet.");
  timeline(requests);
  errors(failures(requests, latest.gateway.errors));
}

const strong = (title, note) => h("span", { class: "two-line" }, h("strong", {}, title), note ? h("small", {}, note) : null);

function table(id, heads, rows, none) {
  const box = $(id);
  if (!rows.length) { box.replaceChildren(h("p", { class: "none" }, none)); return; }
  // Rows are kept where they are, so that a focused button stays focused.
  let body = box.querySelector("tbody");
  if (!body) {
    body = h("tbody");
    box.replaceChildren(h("table", {}, h("thead", {}, h("tr", {}, ...heads.map((head) => h("th", { scope: "col" }, head)))), body));
  }
  while (body.rows.length > rows.length) body.lastElementChild.remove();
  rows.forEach((cells, r) => {
    const row = body.rows[r] ?? body.appendChild(h("tr", {}, ...heads.map(() => h("td"))));
    cells.forEach((cell, c) => {
      const held = row.cells[c];
      const label = typeof cell === "string" ? cell : cell.outerHTML;
      if (held.dataset.was === label) return;
      held.dataset.was = label;
      held.dataset.head = heads[c];
      held.replaceChildren(cell);
    });
  });
}

/** Whether a model is to be loaded on demand, and is nowhere. */
const waitsForLoad = (model, workers) => model.ready > 0 && !workers.some((worker) => (worker.loaded ?? [model.name]).includes(model.name));

const STATES = { ready: "ok", loading: "wait", draining: "wait", ending: "wait" };
const chip = (text, kind) => h("span", { class: `chip ${kind}` }, text);

function workerRow(worker) {
  const share = worker.capacity ? worker.running / worker.capacity : 0;
  const bar = svg("svg", { class: "meter", viewBox: "0 0 60 6", "aria-hidden": "true" }, svg("rect", { class: "back", width: 60, height: 6, rx: 3 }), svg("rect", { class: "front", width: 60 * Math.min(1, share), height: 6, rx: 3 }));
  const metrics = worker.metrics ?? {};
  const speed = metrics.tokens_per_s;
  const state = worker.state === "loading" && worker.progress !== null ? `loading ${whole.format(worker.progress * 100)} %` : worker.swap && worker.progress !== null ? `loading ${worker.swap} ${whole.format(worker.progress * 100)} %` : worker.state;
  const button = worker.state === "draining" ? "" : h("button", { class: "button small", type: "button", "data-worker": worker.name, onclick: () => drain(worker.name) }, "Drain");
  return [
    strong(worker.name, `${worker.models.join(", ")} · ${[worker.engine, worker.device, ...new Set(Object.values(worker.numbers ?? {}))].join(", ")}`),
    h("span", { class: "two-line" }, chip(state, STATES[worker.state] ?? "bad"), worker.note ? h("small", {}, worker.note) : null, typeof worker.ends_in_ms === "number" ? h("small", { title: worker.ends_why ?? "" }, `ends in ${duration(worker.ends_in_ms)}${worker.ends_why ? ` (${worker.ends_why})` : ""}`) : null, ...Object.entries(worker.serial ?? {}).map(([model, why]) => h("small", { class: "slow" }, `${model} runs one request at a time: ${why}`))),
    h("span", { class: "slots" }, `${worker.running} / ${worker.capacity}`, bar),
    speed === undefined ? "–" : one.format(speed),
    metrics.ttft_ms ? duration(metrics.ttft_ms) : "–",
    `${duration(worker.silent_ms)} ago`,
    bytes(metrics.memory_used_bytes),
    button,
  ];
}

async function drain(name) {
  if (!(await confirmDrain(`Drain ${name}?`, "It takes nothing new, finishes what runs within 30 seconds, and leaves. What is left then goes on at another worker.", "Drain"))) return;
  try {
    await postJson("/bus/drain", { worker: name });
  } catch (error) {
    trouble(error.message);
  }
}

const FINE = new Set(["stop", "length"]);
const kindOf = (row) => (row.state !== "ended" ? (row.state === "queued" ? "wait" : "run") : FINE.has(row.outcome) ? "ok" : row.outcome === "cancelled" ? "off" : "bad");
const outcome = (row) => chip(row.state === "ended" ? row.outcome : row.state, kindOf(row));

/** Each request a bar from when it came until it ended, packed into as few lanes as fit. */
function timeline(requests) {
  const box = $("timeline");
  const width = Math.max(box.clientWidth, 300);
  const x = (agoMs) => width - (Math.min(agoMs, SPAN_MS) / SPAN_MS) * width;
  const lanes = [];
  const bars = [];
  const shown = requests.filter((row) => row.age_ms - row.took_ms < SPAN_MS).toSorted((a, b) => b.age_ms - a.age_ms);
  for (const row of shown) {
    const from = x(row.age_ms);
    const to = Math.max(x(Math.max(0, row.age_ms - row.took_ms)), from + 4);
    let lane = lanes.findIndex((end) => end + 2 <= from);
    if (lane < 0) lane = lanes.push(0) - 1;
    lanes[lane] = to;
    if (lane > 15) continue;
    const began = Math.min(to, x(Math.max(0, row.age_ms - row.queued_ms)));
    const top = 22 + lane * 12;
    const words = `${row.id} · ${row.model} · ${row.worker || "no worker"} · ${row.state === "ended" ? row.outcome : row.state} · waited ${duration(row.queued_ms)}, took ${duration(row.took_ms)}${row.cause ? ` · ${row.cause}` : ""}`;
    const group = svg("g", {}, svg("title", {}, words), svg("rect", { class: "bar-wait", x: from, y: top, width: Math.max(0, began - from), height: 8, rx: 2 }), svg("rect", { class: `bar-${kindOf(row)}`, x: began, y: top, width: Math.max(4, to - began), height: 8, rx: 2 }));
    bars.push(group);
  }
  const height = 30 + Math.max(3, Math.min(16, lanes.length)) * 12;
  const ticks = [60, 45, 30, 15, 0].map((seconds) => {
    const at = x(seconds * 1000);
    const anchor = seconds === 60 ? "start" : seconds === 0 ? "end" : "middle";
    return svg("g", { class: "tick" }, svg("line", { x1: at, x2: at, y1: 16, y2: height }), svg("text", { x: at, y: 11, "text-anchor": anchor }, seconds ? `${seconds} s ago` : "now"));
  });
  const failed = shown.filter((row) => kindOf(row) === "bad").length;
  const label = `${shown.length} requests in the last minute, ${failed} failed; the table below lists them`;
  box.replaceChildren(svg("svg", { class: "lanes", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label }, ...ticks, ...bars));
  $("timeline-note").textContent = `${shown.length} in the last minute${failed ? `, ${failed} failed` : ""}`;
}

/** What this gateway told its callers, and what failed for other clients of the bus; latest first. */
function failures(requests, told) {
  const known = new Set(told.flatMap((row) => row.bus));
  const others = requests
    .filter((row) => kindOf(row) === "bad" && !known.has(row.id))
    .map((row) => ({ at_ms: latest.at_ms - row.age_ms + row.took_ms, request: row.id, model: row.model, code: row.outcome, worker: row.worker, message: row.cause || "Its caller was told why." }));
  return [...told, ...others].sort((a, b) => b.at_ms - a.at_ms);
}

function errors(rows) {
  const box = $("errors");
  if (!rows.length) { box.replaceChildren(h("p", { class: "none" }, "None lately.")); return; }
  box.replaceChildren(
    h("ul", { class: "error-list" }, ...rows.slice(0, 12).map((row) => h("li", {}, h("div", {}, chip(row.code, "bad"), h("span", { class: "fine" }, ` ${duration(latest.at_ms - row.at_ms)} ago · ${row.model || row.path}${row.key ? ` · ${row.key}` : ""}${row.worker ? ` · at ${row.worker}` : ""} · `, h("code", {}, row.request))), h("p", {}, row.message)))),
  );
}
