// @ts-check
import { isRunning, stop } from "./answer.js";
import { element } from "./api.js";
import { chat } from "./chat.js";
import { draft } from "./draft.js";

/** Conversations, or a text, by what the model was made for; nothing before that is known. @type {typeof chat | typeof draft | undefined} */
let way;

/**
 * What the server says of its model, each time that it is asked.
 * @param {boolean} template whether the model knows conversations
 * @param {number} context
 */
export function know(template, context) {
  if (way) return;
  way = template ? chat : draft;
  if (!template) draft.begin(context);
}

/** @param {(what: object) => void} look */
export function start(look) {
  const form = element("chat-form", HTMLFormElement);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    way?.send();
  });
  element("say", HTMLTextAreaElement).addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  element("draft", HTMLTextAreaElement).addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || isRunning()) return;
    event.preventDefault();
    form.requestSubmit();
  });
  element("halt", HTMLButtonElement).addEventListener("click", stop);
  element("back", HTMLButtonElement).addEventListener("click", draft.back);
  element("clear", HTMLButtonElement).addEventListener("click", () => {
    way?.clear();
    element("chat-figures", HTMLElement).textContent = "";
  });
  element("to-look", HTMLButtonElement).addEventListener("click", () => {
    const what = way?.said();
    if (what) look(what);
  });
}
