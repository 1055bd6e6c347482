// @ts-check
import { answer, isRunning, stop } from "./answer.js";
import { element } from "./api.js";

/** @typedef {{ role: string, content: string }} Message */

/** @type {Message[]} */
let messages = [];

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

/** Answers what was said last. */
async function reply() {
  const message = { role: "assistant", content: "" };
  const asked = messages.slice(), place = add(message);
  messages.push(message);
  await answer("/v1/chat/completions", async () => ({ messages: asked }), (choice) => choice?.delta.content, (text) => {
    message.content += text;
    place.append(text);
    scroll();
  });
}

/** A conversation, by the model's own template. */
export const chat = {
  send() {
    const say = element("say", HTMLTextAreaElement);
    const content = say.value.trim();
    if (!content || isRunning()) return;
    say.value = "";
    const message = { role: "user", content };
    messages.push(message);
    add(message);
    reply();
  },
  clear() {
    stop();
    messages = [];
    element("messages", HTMLElement).replaceChildren();
  },
  /** What there is to look at. */
  said: () => (messages.length ? { messages } : undefined),
};
