// @ts-check
import { element, events, json, notice, weights } from "./api.js";
import { css, ink, level, paint } from "./colour.js";
import * as maps from "./maps.js";

/** @type {{ id: string, tokens: string[], cells: number, layers: any[] } | undefined} */
let look;
let token = 0;
/** @type {number | null} */
let layer = null;
/** @type {number | null} */
let head = null;
/** Goes on with the text. @type {AbortController | undefined} */
let running;
/** The newest question; answers to older ones come too late. */
let asked = 0;

const words = () => /** @type {HTMLElement[]} */ ([...element("tokens", HTMLElement).children]);
const heads = () => ({ ...(layer === null ? {} : { layer }), ...(head === null ? {} : { head }) });
const shown = (/** @type {string} */ text) => (text === "" ? "∅" : text.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥"));

/**
 * @param {string} text
 * @param {number} n
 */
function word(text, n) {
  const span = document.createElement("span");
  span.setAttribute("role", "option");
  span.id = `token-${n}`;
  span.textContent = shown(text);
  return span;
}

/** @typedef {{ weights: string, scale: number, seen: [number, number][], recalled: { gate: number, segment: number, entries: number[] } | null }} Row */

/** @param {number} n */
const name = (n) => `“${shown(look?.tokens[n] ?? "").trim() || "␣"}” at ${n}`;

/**
 * The background of every token that is seen, and the greatest weights in words.
 * @param {Row} answer
 */
function colour(answer) {
  const row = weights(answer.weights, answer.scale);
  const seen = new Set(answer.seen.flatMap(([first, end]) => Array.from({ length: end - first }, (_, n) => first + n)));
  words().forEach((span, n) => {
    const value = level(Math.abs(row[n] ?? 0));
    span.style.background = seen.has(n) ? css(value) : "";
    span.style.color = seen.has(n) ? ink(value) : "";
    span.classList.toggle("minus", row[n] < 0);
  });
  const best = Array.from(row, (w, n) => ({ w, n })).sort((a, b) => Math.abs(b.w) - Math.abs(a.w) || a.n - b.n).slice(0, 8);
  element("best", HTMLElement).replaceChildren(...best.filter(({ n }) => seen.has(n)).map(({ w, n }) => {
    const item = document.createElement("li"), code = document.createElement("code");
    code.textContent = shown(look?.tokens[n] ?? "").trimEnd() || "␣";
    item.append(w.toFixed(4), " ", code, ` at ${n}`);
    return item;
  }));
  element("mixer", HTMLElement).textContent = about(answer.recalled);
}

/**
 * What is shown of heads whose mechanism the model's configuration names.
 * @param {Row["recalled"]} recalled
 */
function about(recalled) {
  const all = look?.layers ?? [];
  if (layer === null || head === null) {
    const names = [...new Set((layer === null ? all : [all[layer]]).flatMap(({ sections }) => sections.map((/** @type {maps.Section} */ { name }) => name)))];
    return names.length ? `${names.join(", ")}: means of magnitudes. Choose a head for its own weights.` : "";
  }
  const section = maps.section(all[layer].sections, head);
  if (!section) return "";
  if (section.recurrent) return `${section.name} has no softmax: shown is how much of each token's value is left in what this token reads of the state, as a share of all such magnitudes; dashed where it counts negative.`;
  if (!recalled) return `${section.name}: tokens without a colour are not seen.`;
  const share = `${section.name}: gate ${(100 * recalled.gate).toFixed(0)} % for the memory of what lies before token ${recalled.segment}`;
  if (recalled.segment === 0) return `${share}: nothing yet.`;
  if (!recalled.entries.length) return `${share}, one matrix.`;
  const first = recalled.entries.slice(0, 6).map(name).join(", ");
  return `${share}; retrieved ${first}${recalled.entries.length > 6 ? ` and ${recalled.entries.length - 6} more` : ""}.`;
}

/** @param {number} n */
function mark(n) {
  token = n;
  words().forEach((span, at) => span.setAttribute("aria-selected", String(at === n)));
  const list = element("tokens", HTMLElement);
  list.setAttribute("aria-activedescendant", `token-${n}`);
  const span = words()[n];
  if (!span) return;
  const low = span.offsetTop - list.offsetTop;
  if (low < list.scrollTop || low + span.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = low - 40;
}

async function row() {
  if (!look) return;
  const mine = ++asked, list = element("tokens", HTMLElement);
  list.setAttribute("aria-busy", "true");
  try {
    const answer = await json(`/page/look/${look.id}/row`, { position: token, ...heads() });
    if (mine === asked) colour(answer);
  } catch (error) {
    if (mine === asked) notice(error);
  }
  if (mine === asked) list.setAttribute("aria-busy", "false");
}

/** @param {number} n */
function choose(n) {
  if (!look || running) return;
  mark(Math.min(Math.max(n, 0), look.tokens.length - 1));
  row();
}

/**
 * @param {HTMLSelectElement} select
 * @param {number} count
 */
function fill(select, count) {
  select.replaceChildren(new Option("all", ""), ...Array.from({ length: count }, (_, n) => new Option(String(n), String(n))));
}

/**
 * @param {number | null} l
 * @param {number | null} h
 */
function take(l, h) {
  [layer, head] = [l, l === null ? null : h];
  element("layer", HTMLSelectElement).value = l === null ? "" : String(l);
  const select = element("head", HTMLSelectElement);
  select.value = head === null ? "" : String(head);
  select.disabled = l === null;
  maps.mark(layer, head);
  row();
}

/** @param {object} what a text or messages */
async function begin(what) {
  notice();
  running?.abort();
  const see = element("see", HTMLButtonElement), figures = element("look-figures", HTMLElement);
  see.disabled = true;
  figures.textContent = "reading …";
  const start = performance.now();
  try {
    const found = await json("/page/look", what);
    const read = performance.now();
    look = found;
    element("tokens", HTMLElement).replaceChildren(...found.tokens.map(word));
    maps.draw(found);
    fill(element("layer", HTMLSelectElement), found.layers.length);
    fill(element("head", HTMLSelectElement), found.layers[0]?.habits.length ?? 0);
    const drawn = performance.now() - read;
    figures.textContent = `${found.tokens.length} tokens read in ${((read - start) / 1000).toFixed(2)} s, drawn in ${drawn.toFixed(0)} ms`;
    element("more", HTMLButtonElement).disabled = false;
    mark(found.tokens.length - 1);
    take(null, null);
  } catch (error) {
    figures.textContent = "";
    notice(error);
  }
  see.disabled = false;
}

/** Goes on with the text; the newest token's row moves as it is made. */
async function more() {
  if (!look) return;
  const button = element("more", HTMLButtonElement);
  if (running) return running.abort();
  running = new AbortController();
  button.textContent = "Stop";
  try {
    for await (const answer of events(`/page/look/${look.id}/continue`, { tokens: 64, ...heads() }, running.signal)) {
      look.tokens.push(answer.token);
      element("tokens", HTMLElement).append(word(answer.token, answer.position));
      mark(answer.position);
      colour(answer);
    }
  } catch (error) {
    if (!(error instanceof DOMException && error.name === "AbortError")) notice(error);
  }
  running = undefined;
  button.textContent = "Go on";
}

export function start() {
  const scale = Uint8Array.from({ length: 128 }, (_, n) => level(n / 127));
  paint(element("scale", HTMLCanvasElement), scale, 128);
  element("look-form", HTMLFormElement).addEventListener("submit", (event) => {
    event.preventDefault();
    begin({ text: element("text", HTMLTextAreaElement).value });
  });
  element("more", HTMLButtonElement).addEventListener("click", more);
  const tokens = element("tokens", HTMLElement);
  tokens.addEventListener("click", (event) => {
    const n = words().findIndex((span) => span === event.target);
    if (n >= 0) choose(n);
  });
  tokens.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    choose(token + step);
  });
  const value = (/** @type {string} */ id) => {
    const text = element(id, HTMLSelectElement).value;
    return text === "" ? null : Number(text);
  };
  element("layer", HTMLSelectElement).addEventListener("change", () => take(value("layer"), null));
  element("head", HTMLSelectElement).addEventListener("change", () => take(value("layer"), value("head")));
  element("order", HTMLSelectElement).addEventListener("change", (event) => {
    if (event.target instanceof HTMLSelectElement) maps.order(event.target.value);
  });
  maps.start(take);
  return begin;
}
