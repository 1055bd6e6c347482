// @ts-check
import { element, json, notice } from "./api.js";
import { css, paint } from "./colour.js";

/** @typedef {{ name: string, group: string, summary: string, paper: string, forward: boolean, backward: boolean, decode: boolean, equation: string, cost: string, picture: string[] }} Mechanism */

/** @type {Mechanism[]} */
let all = [];
/** Milliseconds by mechanism. @type {Map<string, number[]>} */
const curves = new Map();
/** Lengths of prompts. @type {number[]} */
let lengths = [];
/** Two sides. @type {{ show: (name: string) => void, name: () => string }[]} */
let sides = [];

/**
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {string} [kind]
 */
function make(tag, kind) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  return made;
}

/** @param {number} n */
function side(n) {
  const box = make("div"), select = make("select"), canvas = make("canvas");
  const equation = make("code"), words = make("p", "words soft"), measure = make("button");
  select.id = `side-${n}`;
  select.setAttribute("aria-label", `Mechanism ${n + 1}`);
  for (const { name, group } of all) select.append(new Option(`${name} (${group})`, name));
  measure.type = "button";
  measure.id = `measure-${n}`;
  measure.textContent = "Measure here";
  canvas.setAttribute("role", "img");
  box.append(select, canvas, equation, words, measure);
  element("sides", HTMLElement).append(box);
  const show = (/** @type {string} */ name) => {
    const found = all.find((mechanism) => mechanism.name === name);
    if (!found) return;
    select.value = name;
    const levels = Uint8Array.from(found.picture.join(""), (digit) => Math.round((Number(digit) * 255) / 9));
    paint(canvas, levels, found.picture[0].length);
    canvas.setAttribute("aria-label", `Who sees whom in ${name}: rows look at columns`);
    equation.textContent = found.equation;
    const forms = ["forward", "backward", "decode"].filter((form) => found[/** @type {"forward"} */ (form)]);
    words.textContent = `${found.summary}. Cost of a prompt and head: ${found.cost}. ${forms.join(", ")}. ${found.paper}`;
    plot();
  };
  select.addEventListener("change", () => show(select.value));
  measure.addEventListener("click", async () => {
    measure.disabled = true;
    notice();
    try {
      const { tokens, milliseconds } = await json("/page/measure", { name: select.value });
      lengths = tokens;
      curves.set(select.value, milliseconds);
      plot();
    } catch (error) { notice(error); }
    measure.disabled = false;
  });
  return { show, name: () => select.value };
}

/** Both sides' curves, both axes by powers. */
function plot() {
  const canvas = element("curve", HTMLCanvasElement), context = canvas.getContext("2d");
  const chosen = sides.map(({ name }) => name()).filter((name, n, names) => curves.has(name) && names.indexOf(name) === n);
  if (!context) return;
  context.clearRect(0, 0, canvas.width, canvas.height);
  const text = element("curve-text", HTMLElement);
  if (!chosen.length) {
    text.textContent = "Nothing measured yet.";
    return;
  }
  const values = chosen.flatMap((name) => curves.get(name) ?? []);
  const [low, high] = [Math.log10(Math.min(...values)) - 0.1, Math.log10(Math.max(...values)) + 0.1];
  const x = (/** @type {number} */ n) => 60 + (n / (lengths.length - 1)) * (canvas.width - 80);
  const y = (/** @type {number} */ ms) => canvas.height - 40 - ((Math.log10(ms) - low) / (high - low)) * (canvas.height - 60);
  const style = getComputedStyle(document.body);
  context.font = "13px system-ui, sans-serif";
  context.fillStyle = context.strokeStyle = style.color;
  lengths.forEach((n, at) => context.fillText(String(n), x(at) - 14, canvas.height - 18));
  for (let power = Math.ceil(low); power <= high; power++) {
    const at = y(10 ** power);
    context.fillText(`${10 ** power} ms`, 2, at + 4);
    context.fillRect(60, at, canvas.width - 80, 0.5);
  }
  chosen.forEach((name, which) => {
    const curve = curves.get(name) ?? [];
    // Told apart by dashes and marks as well as by colour.
    context.setLineDash(which ? [7, 5] : []);
    context.strokeStyle = context.fillStyle = which ? css(170) : style.getPropertyValue("--mark");
    context.lineWidth = 2.5;
    context.beginPath();
    curve.forEach((ms, n) => (n ? context.lineTo(x(n), y(ms)) : context.moveTo(x(n), y(ms))));
    context.stroke();
    context.setLineDash([]);
    curve.forEach((ms, n) => {
      if (which) context.fillRect(x(n) - 4, y(ms) - 4, 8, 8);
      else { context.beginPath(); context.arc(x(n), y(ms), 4, 0, 7); context.fill(); }
    });
    context.fillStyle = style.color;
    context.fillText(name, Math.min(x(curve.length - 1), canvas.width - 110), y(curve[curve.length - 1]) - 8);
  });
  text.textContent = chosen.map((name) => `${name}: ` + (curves.get(name) ?? []).map((ms, n) => `${lengths[n]} tokens ${ms.toPrecision(3)} ms`).join(", ")).join(". ");
}

export async function start() {
  try {
    all = (await json("/page/mechanisms")).mechanisms;
    sides = [side(0), side(1)];
    sides[0].show("full");
    sides[1].show("gated_delta");
  } catch (error) { notice(error); }
}
