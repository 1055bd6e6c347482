// @ts-check
import { element, events, notice } from "./api.js";

/** @typedef {{ role: string, content: string }} Message */

/** @type {Message[]} */
const messages = [];
/** Stops the answer that is being made. @type {AbortController | undefined} */
let running;

/** @param {string} id */
const number = (id) => element(id, HTMLInputElement).valueAsNumber;

/** @param {Message} message */
function add(message) {
  const article = document.createElement("article");
  article.className = message.role;
  const title = document.createElement("h3");
  title.textContent = message.role === "user" ? "You" : "Model";
  const text = document.createElement("div");
  text.textContent = message.content;
  article.append(title, text);
  element("messages", HTMLElement).append(article);
  scroll();
  return text;
}

function scroll() {
  const list = element("messages", HTMLElement);
  list.scrollTop = list.scrollHeight;
}

/** @param {boolean} busy */
function busy(busy) {
  element("send", HTMLButtonElement).disabled = busy;
  element("halt", HTMLButtonElement).disabled = !busy;
}

async function answer() {
  const message = { role: "assistant", content: "" };
  const place = add(message);
  const seed = number("seed");
  const request = {
    messages: messages.slice(),
    stream: true,
    stream_options: { include_usage: true },
    temperature: number("temperature"),
    top_p: number("top-p"),
    top_k: number("top-k"),
    min_p: number("min-p"),
    max_tokens: number("max-tokens"),
    ...(Number.isNaN(seed) ? {} : { seed }),
  };
  running = new AbortController();
  busy(true);
  const start = performance.now();
  let first = 0, pieces = 0, read = "";
  try {
    for await (const event of events("/v1/chat/completions", request, running.signal)) {
      const text = event.choices[0]?.delta.content ?? "";
      if (event.usage) read = `${event.usage.prompt_tokens} tokens read, ${event.usage.prompt_tokens_details.cached_tokens} of them shared; `;
      if (!text) continue;
      if (!first) first = performance.now();
      pieces += 1;
      message.content += text;
      place.append(text);
      scroll();
      const seconds = (performance.now() - first) / 1000;
      const speed = seconds > 0 ? `${((pieces - 1) / seconds).toFixed(1)} pieces/s` : "";
      element("chat-figures", HTMLElement).textContent = `first after ${((first - start) / 1000).toFixed(2)} s, ${speed}`;
    }
    const figures = element("chat-figures", HTMLElement);
    figures.textContent = read + figures.textContent;
  } catch (error) {
    if (!(error instanceof DOMException && error.name === "AbortError")) notice(error);
  }
  running = undefined;
  busy(false);
  messages.push(message);
}

/** @param {(messages: Message[]) => void} look */
export function start(look) {
  const say = element("say", HTMLTextAreaElement);
  element("chat-form", HTMLFormElement).addEventListener("submit", (event) => {
    event.preventDefault();
    const content = say.value.trim();
    if (!content || running) return;
    notice();
    say.value = "";
    const message = { role: "user", content };
    messages.push(message);
    add(message);
    answer();
  });
  say.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    element("chat-form", HTMLFormElement).requestSubmit();
  });
  element("halt", HTMLButtonElement).addEventListener("click", () => running?.abort());
  element("clear", HTMLButtonElement).addEventListener("click", () => {
    running?.abort();
    messages.length = 0;
    element("messages", HTMLElement).replaceChildren();
    element("chat-figures", HTMLElement).textContent = "";
  });
  element("to-look", HTMLButtonElement).addEventListener("click", () => {
    if (messages.length) look(messages);
  });
}
