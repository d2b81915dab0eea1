// The page's frame: tabs, theme, key, dialogs. What happens inside the tabs is chat.js and view.js.

import { getJson, key } from "./api.js";
import * as chat from "./chat.js";
import * as view from "./view.js";

const $ = (id) => document.getElementById(id);
const THEME = "tokenbus.theme";
const THEMES = ["system", "light", "dark"];

// --- theme ---------------------------------------------------------------------------------------

function setTheme(name) {
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  const words = { system: "as the system", light: "light", dark: "dark" };
  $("theme").setAttribute("aria-label", `Colour theme: ${words[name]}`);
  $("theme").title = `Colour theme: ${words[name]}`;
  localStorage.setItem(THEME, name);
}

setTheme(localStorage.getItem(THEME) ?? "system");
$("theme").addEventListener("click", () => {
  const now = localStorage.getItem(THEME) ?? "system";
  setTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
});

// --- tabs ----------------------------------------------------------------------------------------

const TABS = ["chat", "bus"];

function select(name, focus = false) {
  for (const tab of TABS) {
    const chosen = tab === name;
    $(`tab-${tab}`).setAttribute("aria-selected", String(chosen));
    $(`tab-${tab}`).tabIndex = chosen ? 0 : -1;
    $(`panel-${tab}`).hidden = !chosen;
  }
  document.body.dataset.tab = name;
  if (focus) $(`tab-${name}`).focus();
  if (name === "bus") view.open();
  else view.close();
  const hash = name === "chat" ? " " : `#${name}`;
  if ((location.hash || " ") !== hash) history.replaceState(null, "", name === "chat" ? location.pathname : hash);
}

for (const tab of TABS) {
  $(`tab-${tab}`).addEventListener("click", () => select(tab));
  $(`tab-${tab}`).addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) select(TABS[(TABS.indexOf(tab) + step + TABS.length) % TABS.length], true);
  });
}

// --- dialogs -------------------------------------------------------------------------------------

function askKey(problem = "") {
  $("open-key").hidden = false;
  $("key-problem").textContent = problem;
  $("key-problem").hidden = !problem;
  $("key").value = key.get();
  if (!$("key-dialog").open) $("key-dialog").showModal();
  tellUsage();
}

/** What the key has used, where the gateway counts it. */
async function tellUsage() {
  $("key-usage").hidden = true;
  const own = key.get() ? await getJson("/me").catch(() => null) : null;
  if (!own?.tokens) return;
  const number = new Intl.NumberFormat("en");
  const words = ["day", "month"].map((span) => {
    const { used, budget } = own.tokens[span];
    return `${number.format(used)}${budget === null ? "" : ` of ${number.format(budget)}`} tokens this ${span}`;
  });
  $("key-usage").textContent = `${own.name} has used ${words.join(", ")}.`;
  $("key-usage").hidden = false;
}

$("open-key").addEventListener("click", () => askKey());
$("forget-key").addEventListener("click", () => { key.set(""); $("key").value = ""; });
$("key-dialog").addEventListener("close", () => {
  if ($("key-dialog").returnValue === "save") { key.set($("key").value.trim()); connect(); }
});

function confirm(title, text, yes) {
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  $("confirm-yes").textContent = yes;
  $("confirm").returnValue = "no";
  $("confirm").showModal();
  return new Promise((resolve) =>
    $("confirm").addEventListener("close", () => resolve($("confirm").returnValue === "yes"), { once: true }),
  );
}

// --- start ---------------------------------------------------------------------------------------

let retry = 0;

async function connect() {
  clearTimeout(retry);
  try {
    const session = await getJson("/bus/session");
    $("open-key").hidden = !session.keys_required;
    $("tab-bus").hidden = !session.operator;
    $("link-state").textContent = session.models.length ? "" : "No model on the bus yet";
    chat.setModels(session.models, session.reattach_s);
    retry = setTimeout(connect, session.models.some((model) => model.ready) ? 30_000 : 2_000);
  } catch (error) {
    if (error.status === 401) return askKey(key.get() ? error.message : "");
    $("link-state").textContent = error.message;
    retry = setTimeout(connect, 2_000);
  }
}

const onUnauthorized = (message) => askKey(message);
view.prepare({ onUnauthorized, confirm });
await chat.start({ onUnauthorized });
select(location.hash === "#bus" ? "bus" : "chat");
await connect();
if (matchMedia("(pointer: fine)").matches) chat.focus();
document.body.dataset.ready = "true";
