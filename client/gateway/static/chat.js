// The chat: conversations, images, streaming, stopping, editing, asking again.

import { ApiError, chat as ask, getPicture } from "./api.js";
import { further, PICTURE, welcome } from "./ideas.js";
import { h, render } from "./markdown.js";
import * as store from "./store.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "max_tokens", "top_k", "min_p", "repetition_penalty", "seed"];
const LAST = "tokenbus.last";
const MAX_PICTURES = 16;
const MAX_PICTURE_CHARACTERS = 6_000_000;

let talks = [];
let talk = null;
let models = [];
let pictures = []; // data URLs that wait to be sent
let running = null; // {controller, talk, message}
let reattachS = 30;
let follow = true; // the end of the conversation stays in sight
let onUnauthorized = () => {};

// `crypto.randomUUID` and the clipboard are kept from pages that come over plain http from afar.
const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

const fresh = () => {
  const last = JSON.parse(localStorage.getItem(LAST) ?? "{}");
  return { id: newId(), title: "", updated: Date.now(), model: last.model ?? "", settings: last.settings ?? {}, messages: [] };
};

// --- start ---------------------------------------------------------------------------------------

export async function start(options) {
  onUnauthorized = options.onUnauthorized;
  talks = await store.all();
  // A link to a new conversation is that once: a reload shows it as it went on.
  const anew = location.hash === "#new";
  if (anew) history.replaceState(null, "", location.pathname);
  show((anew ? null : talks[0]) ?? fresh());
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); submitField(); });
  $("stop").addEventListener("click", stop);
  $("new-talk").addEventListener("click", () => { show(fresh()); closeTalks(); $("prompt").focus(); });
  $("model").addEventListener("change", () => { talk.model = $("model").value; offer(); remember(); });
  prepareField();
  preparePictures();
  prepareSettings();
  prepareTalks();
  let top = 0;
  $("messages").addEventListener("scroll", () => {
    // Whoever scrolls up reads; the stream follows again from the end on.
    const now = $("messages").scrollTop;
    follow = atEnd() || (follow && now >= top);
    top = now;
    $("to-end").hidden = follow;
  }, { passive: true });
  $("to-end").addEventListener("click", () => scrollToEnd());
}

export function setModels(found, seconds) {
  models = found.filter((model) => !model.kinds || model.kinds.includes("chat"));
  reattachS = Math.min(30, seconds);
  chooseModel();
}

function chooseModel() {
  const select = $("model");
  select.replaceChildren(
    ...models.map((model) => {
      const state = model.ready ? "" : " (loading)";
      return h("option", { value: model.name }, model.name + state);
    }),
  );
  if (!models.length) select.append(h("option", { value: "" }, "no model on the bus"));
  if (models.some((model) => model.name === talk.model)) select.value = talk.model;
  else talk.model = select.value;
  if (!talk.messages.length) offer();
}

const chosen = () => models.find((model) => model.name === talk.model);

export const focus = () => $("prompt").focus();

// --- conversations -------------------------------------------------------------------------------

function show(next) {
  talk = next;
  chooseModel();
  fillSettings();
  draw();
  drawTalks();
  scrollToEnd(false);
}

function drawTalks() {
  const rows = talks.map((item) => {
    const current = item.id === talk.id;
    const open = h("button", { class: "talk", "aria-current": current ? "true" : null, onclick: () => { show(item); closeTalks(); } }, item.title || "New conversation");
    const remove = h("button", { class: "icon-button small", "aria-label": `Delete “${item.title}”`, onclick: () => forget(item) }, icon("m5.5 5.5 9 9m0-9-9 9"));
    return h("li", { class: current ? "current" : "" }, open, remove);
  });
  $("talk-list").replaceChildren(...rows);
}

async function forget(item) {
  if (running?.talk === item) stop();
  talks = talks.filter((other) => other !== item);
  await store.remove(item.id);
  if (talk === item) show(talks[0] ?? fresh());
  else drawTalks();
}

async function remember() {
  localStorage.setItem(LAST, JSON.stringify({ model: talk.model, settings: { ...talk.settings, system: "" } }));
  if (talk.messages.length) await keep(talk);
}

async function keep(item) {
  item.updated = Date.now();
  if (!talks.includes(item)) talks.unshift(item);
  else talks = [item, ...talks.filter((other) => other !== item)];
  drawTalks();
  await store.put(item);
}

function prepareTalks() {
  $("open-talks").addEventListener("click", () => {
    const open = document.body.classList.toggle("talks-open");
    $("scrim").hidden = !open;
    $("open-talks").setAttribute("aria-expanded", String(open));
    if (open) $("new-talk").focus();
  });
  $("scrim").addEventListener("click", closeTalks);
}

export function closeTalks() {
  document.body.classList.remove("talks-open");
  $("scrim").hidden = true;
  $("open-talks").setAttribute("aria-expanded", "false");
}

// --- messages ------------------------------------------------------------------------------------

function icon(path, filled = false) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("aria-hidden", "true");
  const shape = document.createElementNS("http://www.w3.org/2000/svg", "path");
  shape.setAttribute("d", path);
  if (filled) shape.setAttribute("class", "filled");
  svg.append(shape);
  return svg;
}

const ICONS = {
  copy: "M7.5 7.5v-3h8v8h-3m-8-5h8v8h-8z",
  edit: "m4 16 .8-3.2L13.2 4.4l2.4 2.4-8.4 8.4z",
  again: "M15.5 8.5A6 6 0 1 0 16 11m-.2-6v3.6h-3.6",
};

const action = (name, label, run) =>
  h("button", { class: "icon-button small", type: "button", "aria-label": label, title: label, onclick: run }, icon(ICONS[name]));

function draw() {
  $("message-column").replaceChildren(...talk.messages.map(messageNode));
  offer();
}

/** Things to say: at the start, and about the sample image as long as a question is left. */
function offer() {
  const column = $("message-column");
  const shown = column.querySelector(".empty, .further");
  const model = chosen();
  // Drawn anew only when it says something else, so that a focused button stays focused.
  const now = JSON.stringify([talk.id, talk.messages.length, running?.talk === talk, model?.name, model?.images]);
  if (shown?.dataset.of === now) return;
  shown?.remove();
  let node = null;
  if (!talk.messages.length) node = welcome(model, { say: choose, show: showSample });
  else if (talk.sample && running?.talk !== talk) node = further(model, new Set(talk.messages.map((message) => message.text)), choose);
  if (!node) return;
  node.dataset.of = now;
  column.append(node);
}

async function showSample(text) {
  const picture = await pictureUrl(await getPicture(PICTURE));
  talk.sample = true;
  choose(text, [picture]);
}

function choose(text, taken = []) {
  submit(text, taken);
  // The button is gone; on a phone the keyboard would cover the answer.
  if (matchMedia("(pointer: fine)").matches) focus();
}

function messageNode(message, index) {
  const node = h("article", { class: `message ${message.role}`, "aria-label": message.role === "user" ? "You" : "Answer" });
  fill(node, message, index);
  return node;
}

function fill(node, message, index) {
  const busy = running?.message === message;
  // A screen reader waits for the whole answer instead of reading every token.
  node.setAttribute("aria-busy", String(busy));
  const children = [];
  const thought = message.thought ? thoughtNode(node.querySelector(".thought"), message, busy) : null;
  if (thought) children.push(thought);
  if (message.pictures?.length) {
    children.push(h("div", { class: "sent-pictures" }, ...message.pictures.map((url, i) => h("img", { src: url, alt: `Image ${i + 1}` }))));
  }
  if (message.role === "user") {
    if (message.text) children.push(h("div", { class: "bubble" }, message.text));
  } else {
    const body = h("div", { class: "body" }, ...render(message.text));
    if (busy && !message.text && (message.state || !message.thinking)) body.append(h("p", { class: "waiting" }, h("span", { class: "pulse", "aria-hidden": "true" }), message.state ?? "Waiting for the first token"));
    children.push(body);
    if (busy && message.text && message.state) children.push(h("p", { class: "waiting" }, h("span", { class: "pulse", "aria-hidden": "true" }), message.state));
    if (message.problem) children.push(h("div", { class: "problem", role: "alert" }, h("strong", {}, message.problem.title), h("span", {}, message.problem.text)));
  }
  if (!busy) {
    const copy = message.text && navigator.clipboard ? action("copy", "Copy", () => navigator.clipboard.writeText(message.text)) : null;
    const edit = message.role === "user" ? action("edit", "Edit and ask again", () => editMessage(node, message, index)) : null;
    const again = message.role === "assistant" && index === talk.messages.length - 1 ? action("again", "Answer again", () => regenerate(index)) : null;
    const facts = message.facts ? h("span", { class: "facts" }, message.facts) : null;
    children.push(h("div", { class: "actions" }, facts, copy, edit, again));
  }
  replaceAround(node, thought, children);
}

/** What was thought, folded: in the node that shows it already, so that it stays open and focused. */
function thoughtNode(shown, message, busy) {
  const node = shown ?? h("details", { class: "thought" }, h("summary", {}), h("div", { class: "thought-text" }));
  const [summary, text] = node.children;
  const thinks = busy && Boolean(message.thinking);
  const ms = message.thoughtMs + (thinks ? performance.now() - message.thinking : 0);
  const tokens = message.thoughtTokens ? ` · ${message.thoughtTokens} token${message.thoughtTokens === 1 ? "" : "s"}` : "";
  summary.textContent = thinks ? `Thinking, ${Math.floor(ms / 1000)} s` : `Thought for ${lasting(ms)}${tokens}`;
  summary.classList.toggle("going-on", thinks);
  text.textContent = message.thought;
  return node;
}

const lasting = (ms) => (ms < 59_950 ? `${(ms / 1000).toFixed(1)} s` : `${Math.floor(Math.round(ms / 1000) / 60)} min ${Math.round(ms / 1000) % 60} s`);

/** Like `replaceChildren`, without moving the one that is kept. */
function replaceAround(node, kept, children) {
  if (kept?.parentNode !== node) return node.replaceChildren(...children);
  for (const child of [...node.childNodes]) if (child !== kept) child.remove();
  const at = children.indexOf(kept);
  kept.before(...children.slice(0, at));
  kept.after(...children.slice(at + 1));
}

function editMessage(node, message, index) {
  if (running) return;
  const field = h("textarea", { class: "edit", rows: "3", "aria-label": "Edit the message" });
  field.value = message.text;
  const cancel = () => fill(node, message, index);
  const save = () => {
    const text = field.value.trim();
    if (!text && !message.pictures?.length) return;
    talk.messages = talk.messages.slice(0, index);
    talk.messages.push({ ...message, text });
    draw();
    answer();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); cancel(); }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
  });
  node.replaceChildren(field, h("div", { class: "edit-row" }, h("button", { class: "button", type: "button", onclick: cancel }, "Cancel"), h("button", { class: "button primary", type: "button", onclick: save }, "Ask again")));
  field.focus();
}

function regenerate(index) {
  if (running) return;
  talk.messages = talk.messages.slice(0, index);
  draw();
  answer();
}

const atEnd = () => {
  const box = $("messages");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 60;
};

function scrollToEnd(smooth = true) {
  follow = true;
  const box = $("messages");
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  box.scrollTo({ top: box.scrollHeight, behavior: smooth && !calm ? "smooth" : "instant" });
}

// --- asking --------------------------------------------------------------------------------------

function submitField() {
  const field = $("prompt");
  const text = field.value.trim();
  if (running || (!text && !pictures.length)) return;
  const taken = pictures;
  field.value = "";
  pictures = [];
  drawPictures();
  grow();
  submit(text, taken);
}

function submit(text, taken = []) {
  if (running) return;
  talk.messages.push({ role: "user", text, pictures: taken });
  if (!talk.title) talk.title = text.split("\n")[0].slice(0, 60) || "An image";
  draw();
  answer();
}

function requestBody(item) {
  const messages = item.messages.filter((message) => message.role === "user" || message.text).map((message) => ({
    role: message.role,
    content: message.pictures?.length
      ? [...message.pictures.map((url) => ({ type: "image_url", image_url: { url } })), ...(message.text ? [{ type: "text", text: message.text }] : [])]
      : message.text,
    ...(message.thought ? { reasoning_content: message.thought } : {}),
  }));
  const { system, stop: stops, ...numbers } = item.settings;
  if (system) messages.unshift({ role: "system", content: system });
  const body = { model: item.model, messages, ...numbers };
  const lines = (stops ?? "").split("\n").filter(Boolean);
  if (lines.length) body.stop = lines;
  return body;
}

async function answer() {
  const item = talk;
  const message = { role: "assistant", text: "" };
  const body = requestBody(item);
  item.messages.push(message);
  const controller = new AbortController();
  running = { controller, talk: item, message };
  setBusy(true);
  draw();
  scrollToEnd(false);
  keep(item);
  const begun = performance.now();
  let first = null;
  let usage = null;
  let reason = null;
  let frame = 0;
  const index = item.messages.length - 1;
  const redraw = () => {
    frame = 0;
    if (talk !== item) return;
    const node = $("message-column").children[index];
    if (node) fill(node, message, index);
    if (follow) scrollToEnd(false);
  };
  const later = () => (frame ||= requestAnimationFrame(redraw));
  const onState = (state, why) => {
    message.state = state === "reconnecting" ? "Connection lost, trying again" : why ? `Waiting: ${why}` : null;
    later();
  };
  try {
    for await (const chunk of ask(body, { signal: controller.signal, reattachS, onState })) {
      usage = chunk.usage ?? usage;
      for (const choice of chunk.choices) {
        reason = choice.finish_reason ?? reason;
        const thought = choice.delta.reasoning_content ?? choice.delta.reasoning;
        if (thought) {
          first ??= performance.now();
          think(message, thought);
          later();
        }
        if (choice.delta.content) {
          first ??= performance.now();
          endThought(message);
          message.text += choice.delta.content;
          later();
        }
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || controller.signal.aborted) reason = "stopped";
    else tell(message, error);
  }
  cancelAnimationFrame(frame);
  running = null;
  endThought(message);
  if (message.thought) message.thoughtTokens = usage?.completion_tokens_details?.reasoning_tokens;
  delete message.state;
  message.facts = facts(usage, reason, begun, first);
  setBusy(false);
  redraw();
  if (talk === item) offer();
  if (follow) scrollToEnd(false);
  await keep(item);
}

function think(message, text) {
  if (!message.thinking) {
    message.thinking = performance.now();
    message.thoughtMs ??= 0;
    message.thought = message.thought ? `${message.thought}\n\n` : "";
  }
  message.thought += text;
}

function endThought(message) {
  if (!message.thinking) return;
  message.thoughtMs += performance.now() - message.thinking;
  delete message.thinking;
}

function facts(usage, reason, begun, first) {
  const found = [];
  if (usage) found.push(`${usage.completion_tokens} token${usage.completion_tokens === 1 ? "" : "s"}`);
  const seconds = first === null ? 0 : (performance.now() - first) / 1000;
  if (usage && seconds > 0.05 && usage.completion_tokens > 1) found.push(`${((usage.completion_tokens - 1) / seconds).toFixed(seconds > 1 ? 0 : 1)} a second`);
  if (first !== null) found.push(`first after ${((first - begun) / 1000).toFixed(2)} s`);
  if (reason === "length") found.push("cut at the longest answer");
  if (reason === "stopped") found.push("stopped");
  return found.join(" · ");
}

const TITLES = {
  model_not_found: "No worker serves this model",
  overloaded: "The bus is full",
  rate_limit_exceeded: "Too many requests",
  context_length_exceeded: "The conversation is too long for this model",
  connection_lost: "No connection",
  invalid_api_key: "A key is needed",
};

function tell(message, error) {
  message.problem = { title: TITLES[error.code] ?? "It did not work", text: error.message };
  if (error instanceof ApiError && error.status === 401) onUnauthorized(error.message);
  if (!(error instanceof ApiError)) throw error;
}

export function stop() {
  running?.controller.abort();
}

function setBusy(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  document.body.classList.toggle("busy", busy);
}

// --- the field -----------------------------------------------------------------------------------

function grow() {
  const field = $("prompt");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, innerHeight * 0.4)}px`;
}

function prepareField() {
  const field = $("prompt");
  const touch = matchMedia("(pointer: coarse)");
  // On a phone the Enter key is the only way to a new line; the button sends.
  const labelEnter = () => { field.enterKeyHint = touch.matches ? "enter" : "send"; };
  touch.addEventListener("change", labelEnter);
  labelEnter();
  field.addEventListener("input", grow);
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    if (touch.matches && !event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    submitField();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
      if (document.body.classList.contains("talks-open")) closeTalks();
      else stop();
    }
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName ?? "");
    if (event.key === "/" && !typing && !$("panel-chat").hidden) { event.preventDefault(); focus(); }
  });
}

// --- images ------------------------------------------------------------------------------------

function preparePictures() {
  $("file").addEventListener("change", async () => { await addPictures([...$("file").files]); $("file").value = ""; focus(); });
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])].filter((file) => file.type.startsWith("image/"));
    if (files.length) { event.preventDefault(); addPictures(files); }
  });
  let depth = 0;
  const carries = (event) => !$("panel-chat").hidden && [...(event.dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragenter", (event) => { if (carries(event)) { depth += 1; $("drop").hidden = false; } });
  document.addEventListener("dragleave", (event) => { if (carries(event) && --depth <= 0) { depth = 0; $("drop").hidden = true; } });
  document.addEventListener("dragover", (event) => { if (carries(event)) event.preventDefault(); });
  document.addEventListener("drop", (event) => {
    depth = 0;
    $("drop").hidden = true;
    if (!carries(event)) return;
    event.preventDefault();
    addPictures([...event.dataTransfer.files].filter((file) => file.type.startsWith("image/")));
  });
}

const readAsUrl = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});

/** An image as a data URL; one that is very large or of an unusual format is drawn anew. */
async function pictureUrl(file) {
  const url = await readAsUrl(file);
  if (/^image\/(png|jpeg|webp|gif)$/.test(file.type) && url.length <= MAX_PICTURE_CHARACTERS) return url;
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, 2048 / Math.max(bitmap.width, bitmap.height));
  const canvas = h("canvas", { width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.9);
}

async function addPictures(files) {
  for (const file of files.slice(0, MAX_PICTURES - pictures.length)) {
    try {
      pictures.push(await pictureUrl(file));
    } catch {
      $("link-state").textContent = `${file.name} is not an image that this browser can read`;
    }
  }
  drawPictures();
}

function drawPictures() {
  $("pictures").replaceChildren(
    ...pictures.map((url, i) => h("li", {}, h("img", { src: url, alt: `Image ${i + 1}` }), h("button", { class: "icon-button small", type: "button", "aria-label": `Remove image ${i + 1}`, onclick: () => { pictures.splice(i, 1); drawPictures(); focus(); } }, icon("m5.5 5.5 9 9m0-9-9 9")))),
  );
}

// --- settings ------------------------------------------------------------------------------------

function fillSettings() {
  $("s-system").value = talk.settings.system ?? "";
  $("s-stop").value = talk.settings.stop ?? "";
  for (const name of NUMBERS) {
    $(`s-${name}`).value = talk.settings[name] ?? "";
    const range = $(`s-${name}-range`);
    if (range) range.value = talk.settings[name] ?? 1;
  }
  $("open-settings").classList.toggle("set", Object.values(talk.settings).some((value) => value !== "" && value !== undefined));
}

function readSettings() {
  const settings = {};
  for (const name of NUMBERS) {
    const field = $(`s-${name}`);
    if (field.value !== "" && field.validity.valid) settings[name] = Number(field.value);
  }
  if ($("s-system").value.trim()) settings.system = $("s-system").value.trim();
  if ($("s-stop").value.trim()) settings.stop = $("s-stop").value;
  talk.settings = settings;
  remember();
}

function prepareSettings() {
  const dialog = $("settings");
  $("open-settings").addEventListener("click", () => { fillSettings(); dialog.showModal(); });
  dialog.addEventListener("close", () => { readSettings(); fillSettings(); });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  $("reset-settings").addEventListener("click", () => { talk.settings = {}; fillSettings(); });
  for (const name of NUMBERS) {
    const range = $(`s-${name}-range`);
    range?.addEventListener("input", () => ($(`s-${name}`).value = range.value));
    if (range) $(`s-${name}`).addEventListener("input", () => (range.value = $(`s-${name}`).value || 1));
  }
}
