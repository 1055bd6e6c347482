// @ts-check
import { element, json, key, notice } from "./api.js";
import * as talk from "./talk.js";
import { start as startLook } from "./look.js";
import { start as startMechanisms } from "./mechanisms.js";

const VIEWS = ["chat", "look", "mechanisms"];
const tabs = VIEWS.map((view) => element(`tab-${view}`, HTMLButtonElement));
/** Begins a view when it is seen first. @type {Record<string, (() => void) | undefined>} */
const begin = { mechanisms: startMechanisms };

/** @param {string} view */
function show(view) {
  VIEWS.forEach((name, n) => {
    const chosen = name === view;
    element(name, HTMLElement).hidden = !chosen;
    tabs[n].setAttribute("aria-selected", String(chosen));
    tabs[n].tabIndex = chosen ? 0 : -1;
  });
  if (location.hash !== `#${view}`) history.replaceState(null, "", `#${view}`);
  begin[view]?.();
  begin[view] = undefined;
}

tabs.forEach((tab, n) => {
  tab.addEventListener("click", () => show(VIEWS[n]));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = (n + step + VIEWS.length) % VIEWS.length;
    tabs[next].focus();
    show(VIEWS[next]);
  });
});

/** Tokens made and when, as they were last seen. */
let last = { made: 0, time: 0 };

async function gauges() {
  if (document.hidden) return;
  const { id, chat, context_length, status } = await json("/page/status");
  talk.know(chat, context_length);
  const time = performance.now();
  const speed = last.time ? (1000 * (status.made_tokens - last.made)) / (time - last.time) : 0;
  last = { made: status.made_tokens, time };
  element("gauge-model", HTMLElement).textContent = id;
  element("gauge-texts", HTMLElement).textContent = `${status.running + status.reading} of ${status.parallel}`;
  element("gauge-waiting", HTMLElement).textContent = status.waiting;
  const meter = element("gauge-pages", HTMLMeterElement);
  meter.max = Math.max(status.pages, 1);
  meter.value = status.pages - status.free_pages;
  element("gauge-kv", HTMLElement).textContent = `${(status.kv_bytes / 1048576).toFixed(1)} MiB`;
  element("gauge-speed", HTMLElement).textContent = `${speed.toFixed(0)} tok/s`;
}

async function watch() {
  try { await gauges(); } catch (error) { notice(error); }
  setTimeout(watch, 1000);
}

element("key-form", HTMLFormElement).addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(element("key", HTMLInputElement).value);
  element("key-form", HTMLFormElement).hidden = true;
  notice();
});

const look = startLook();
talk.start((what) => {
  show("look");
  look(what);
});
show(VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat");
watch();
