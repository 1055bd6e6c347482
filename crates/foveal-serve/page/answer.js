// @ts-check
import { element, events, notice } from "./api.js";

/** Stops the answer that is being made. @type {AbortController | undefined} */
let running;

/** @param {string} id */
const number = (id) => element(id, HTMLInputElement).valueAsNumber;

/** How many tokens are asked for. */
export const tokens = () => number("max-tokens");

/** How the page's controls choose tokens, as fields of a request. */
function choice() {
  const seed = number("seed");
  return {
    stream: true,
    stream_options: { include_usage: true },
    temperature: number("temperature"),
    top_p: number("top-p"),
    top_k: number("top-k"),
    min_p: number("min-p"),
    max_tokens: tokens(),
    ...(Number.isNaN(seed) ? {} : { seed }),
  };
}

/** @param {boolean} busy */
function busy(busy) {
  element("send", HTMLButtonElement).disabled = busy;
  element("halt", HTMLButtonElement).disabled = !busy;
  if (busy) element("chat-figures", HTMLElement).textContent = "";
}

export const isRunning = () => running !== undefined;
export const stop = () => running?.abort();

/** @param {any} usage */
const read = (usage) => `${usage.prompt_tokens} tokens read, ${usage.prompt_tokens_details.cached_tokens} of them shared; ${usage.completion_tokens} made; `;

/**
 * Asks, and gives each piece of the answer as it comes; the figures below say how fast they do.
 * @param {string} path
 * @param {(signal: AbortSignal) => Promise<object>} request what is asked beside the controls
 * @param {(choice: any) => string | undefined} text of an event's choice
 * @param {(text: string) => void} take
 */
export async function answer(path, request, text, take) {
  notice();
  running = new AbortController();
  const { signal } = running;
  busy(true);
  const figures = element("chat-figures", HTMLElement), start = performance.now();
  let first = 0, pieces = 0, usage = "";
  try {
    const body = { ...choice(), ...(await request(signal)) };
    for await (const event of events(path, body, signal)) {
      if (event.usage) usage = read(event.usage);
      const piece = text(event.choices[0]);
      if (!piece || signal.aborted) continue;
      if (!first) first = performance.now();
      pieces += 1;
      take(piece);
      const seconds = (performance.now() - first) / 1000;
      const speed = seconds > 0 ? `${((pieces - 1) / seconds).toFixed(1)} pieces/s` : "";
      figures.textContent = `first after ${((first - start) / 1000).toFixed(2)} s, ${speed}`;
    }
    figures.textContent = usage + figures.textContent;
  } catch (error) {
    if (!(error instanceof DOMException && error.name === "AbortError")) notice(error);
  }
  running = undefined;
  busy(false);
}
