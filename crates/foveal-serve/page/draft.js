// @ts-check
import { answer, isRunning, stop, tokens } from "./answer.js";
import { element, json } from "./api.js";

/** What the text was before the model went on, newest last. @type {string[]} */
let before = [];
/** How many tokens the model can see. */
let context = Infinity;

const box = () => element("draft", HTMLTextAreaElement);

/** @param {string} text */
function write(text) {
  const place = box();
  // Whoever reads further up is left there.
  const follow = place.scrollTop + place.clientHeight > place.scrollHeight - 40;
  place.value = text;
  if (follow) place.scrollTop = place.scrollHeight;
}

function back() {
  element("back", HTMLButtonElement).disabled = before.length === 0;
}

/**
 * A text as what the model reads of it: its end, where all of it and what is asked for don't fit.
 * @param {string} text
 * @param {AbortSignal} signal
 */
async function prompt(text, signal) {
  const found = await json("/tokenize", { content: text }, signal);
  const room = context - Math.min(tokens() || 1, Math.ceil(context / 2));
  if (found.count <= room) return { prompt: text };
  return { prompt: found.tokens.slice(-room) };
}

/** A text that the model goes on with: for models that know no conversations. */
export const draft = {
  /** @param {number} length of the model's context */
  begin(length) {
    context = length;
    element("talk", HTMLElement).hidden = true;
    element("write", HTMLElement).hidden = false;
    element("back", HTMLElement).hidden = false;
    element("send", HTMLButtonElement).textContent = "Go on";
  },
  send() {
    const old = box().value;
    let text = old;
    if (!old.trim() || isRunning()) return;
    before.push(old);
    box().readOnly = true;
    const done = answer("/v1/completions", (signal) => prompt(text, signal), (choice) => choice?.text, (piece) => write((text += piece)));
    done.finally(() => {
      box().readOnly = false;
      if (text === old && before.at(-1) === old) before.pop();
      back();
    });
  },
  clear() {
    stop();
    before = [];
    back();
    write("");
    box().focus();
  },
  /** Takes back what the model wrote last. */
  back() {
    if (isRunning()) return;
    write(before.pop() ?? box().value);
    back();
  },
  said: () => (box().value.trim() ? { text: box().value } : undefined),
};
