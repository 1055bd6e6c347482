// Clicks through the page and compares what is drawn with the numbers of the server.
import assert from "node:assert/strict";
import { chromium } from "playwright-core";

// Arguments: a server, one whose model has the layers of MIXERS below, and a folder for pictures.
const [base, mixed, pictures] = process.argv.slice(2);
const { layers, heads, chat, context_length } = (await (await fetch(`${base}/v1/models`)).json()).data[0];
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"] });
const context = await browser.newContext({ viewport: { width: 1180, height: 860 } });
const page = await context.newPage();
// A busy machine may take long; nothing here depends on how long.
const patient = { timeout: 120000 };
page.setDefaultTimeout(patient.timeout);
const wrong = [];
page.on("console", (message) => message.type() === "error" && wrong.push(message.text()));
page.on("pageerror", (error) => wrong.push(String(error)));
page.on("request", (request) => [base, mixed].some((own) => request.url().startsWith(own)) || request.url().startsWith("data:") || wrong.push(`asks ${request.url()}`));

/** @param {RegExp} pattern */
const figures = (pattern) => page.waitForFunction((source) => new RegExp(source).test(document.getElementById("chat-figures").textContent), pattern.source, patient);
const idle = () => page.waitForFunction(() => !document.getElementById("send").disabled && document.getElementById("halt").disabled, null, patient);
/** What the server answers when it is asked without the page. */
const direct = async (path, body) => (await (await fetch(`${base}${path}`, {
  method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
})).json()).choices[0];

// Chat: an answer comes piece by piece, and can be stopped. A model that was not made for chats goes on with a text.
await page.goto(base);
await page.waitForFunction(() => document.getElementById("gauge-model").textContent !== "…", null, patient);
const paint = await page.evaluate(() => performance.getEntriesByType("paint").find(({ name }) => name === "first-contentful-paint")?.startTime ?? NaN);
const bytes = await page.evaluate(() => performance.getEntriesByType("resource").reduce((sum, entry) => sum + (entry.decodedBodySize ?? 0), 0));
console.log(`first paint after ${paint.toFixed(0)} ms, ${bytes} bytes beside the document`);
assert.ok(bytes > 10000 && bytes < 200 * 1024);
await page.fill("#temperature", "0");
await page.fill("#max-tokens", "40");
if (chat) {
  const question = "What is the capital of France?";
  await page.fill("#say", question);
  await page.keyboard.press("Enter");
  await figures(/tokens read/);
  await idle();
  const said = await page.textContent("article:nth-of-type(2) div");
  assert.ok(said.length > 2, said);
  const answer = await direct("/v1/chat/completions", { messages: [{ role: "user", content: question }], temperature: 0, max_tokens: 40 });
  assert.equal(said, answer.message.content);
  await page.screenshot({ path: `${pictures}/serve-chat.png` });
  await page.fill("#max-tokens", "2000");
  await page.fill("#say", "Tell me a long story.");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => (document.querySelectorAll("article div")[3]?.textContent.length ?? 0) > 20, null, patient);
} else {
  const beginning = "Once upon a time";
  assert.equal(await page.inputValue("#draft"), beginning);
  assert.ok(await page.isHidden("#say") && await page.isVisible("#draft"));
  await page.click("#send");
  await figures(/tokens read/);
  await idle();
  const text = await page.inputValue("#draft");
  const answer = await direct("/v1/completions", { prompt: beginning, temperature: 0, max_tokens: 40 });
  assert.equal(text, beginning + answer.text);
  assert.ok(answer.text.length > 20, answer.text);
  // Once more, by the keyboard, from where it stands; then back, and back again.
  await page.focus("#draft");
  await page.keyboard.press("Control+Enter");
  await page.waitForFunction((length) => document.getElementById("draft").value.length > length, text.length, patient);
  await figures(/tokens read/);
  await idle();
  assert.ok((await page.inputValue("#draft")).startsWith(text));
  await page.click("#back");
  assert.equal(await page.inputValue("#draft"), text);
  await page.click("#back");
  assert.equal(await page.inputValue("#draft"), beginning);
  assert.ok(await page.isDisabled("#back"));
  // A text that is longer than the model's context is gone on with from its end.
  await page.fill("#draft", "The cat sat on the mat. ".repeat(context_length));
  await page.click("#send");
  await figures(/tokens read/);
  await idle();
  assert.equal(Number((await page.textContent("#chat-figures")).split(" ")[0]), context_length - Math.min(40, context_length / 2));
  await page.click("#back");
  await page.fill("#draft", beginning);
  await page.click("#send");
  await figures(/tokens read/);
  await idle();
  await page.screenshot({ path: `${pictures}/serve-draft.png` });
  await page.fill("#max-tokens", "2000");
  await page.click("#send");
}
// It may have come to its own end already.
await page.evaluate(() => document.getElementById("halt").click());
await idle();
await page.waitForFunction(() => document.getElementById("gauge-texts").textContent.startsWith("0 of"), null, patient);

/** The newest row asked for is shown. */
const drawn = () => page.waitForSelector("#tokens[aria-busy=false]");

// Look: every head has a map; a token's weights are those of the server.
await page.keyboard.press("Tab");
await page.click("#tab-look");
await page.click("#see");
await page.waitForSelector(`#map-${layers - 1}-${heads - 1}`, patient);
assert.equal(await page.locator("#maps > div").count(), layers * heads);
const words = await page.locator("#tokens span").count();
const [chosenLayer, chosenHead] = [Math.min(5, layers - 1), Math.min(3, heads - 1)];
await page.click(`#map-${chosenLayer}-${chosenHead}`);
await page.waitForFunction((head) => document.querySelector("#head").value === String(head) && document.querySelectorAll("#best li").length > 3, chosenHead);
await drawn();
await page.focus("#tokens");
await page.keyboard.press("ArrowLeft");
await page.waitForFunction((n) => document.querySelector(`#token-${n}`).getAttribute("aria-selected") === "true", words - 2);
await page.keyboard.press("ArrowRight");
const response = page.waitForResponse((found) => found.url().endsWith("/row") && found.request().postDataJSON().position === words - 2);
await page.keyboard.press("ArrowLeft");
const last = await (await response).json();
await drawn();
assert.equal(last.position, words - 2);
const weight = Number((await page.textContent("#best li")).split(" ")[0]);
const raw = Buffer.from(last.weights, "base64");
const row = Array.from({ length: raw.length / 2 }, (_, n) => (last.scale * raw.readInt16LE(2 * n)) / 32767);
assert.ok(Math.abs(Math.max(...row) - weight) < 1e-4, `${Math.max(...row)} and ${weight}`);
assert.ok(Math.abs(row.reduce((a, b) => a + b) - 1) < 0.01);
const background = await page.evaluate((n) => getComputedStyle(document.getElementById(`token-${n}`)).backgroundColor, row.indexOf(Math.max(...row)));
const brightest = await page.evaluate(async (w) => { const { css, level } = await import("/page/colour.js"); const probe = document.createElement("i"); probe.style.color = css(level(w)); document.body.append(probe); const found = getComputedStyle(probe).color; probe.remove(); return found; }, Math.max(...row));
assert.equal(background, brightest);
await page.selectOption("#order", "previous");
await page.waitForTimeout(200);
await page.evaluate(() => scrollTo(0, 0));
await page.screenshot({ path: `${pictures}/serve-look.png` });
await page.click("#more");
await page.waitForFunction((n) => document.querySelectorAll("#tokens span").length > n + 3 || document.getElementById("more").textContent === "Go on", words, patient);
await page.evaluate(() => document.getElementById("more").textContent === "Stop" && document.getElementById("more").click());

// A long text stays smooth: SmolLM2's 30 layers of 9 heads, some 2,000 tokens.
const long = Array.from({ length: layers < 30 ? 400 : 1900 }, (_, n) => ["time", "people", "way", "water"][(n * n + (n >> 3)) % 4]).join(" ");
await page.waitForFunction(() => document.getElementById("more").textContent === "Go on");
await page.fill("#text", long);
await page.click("#see");
await page.waitForFunction(() => /\d{3,} tokens read/.test(document.getElementById("look-figures").textContent), null, patient);
console.log(await page.textContent("#look-figures"));
const slow = await page.evaluate(async () => {
  let longest = 0;
  new PerformanceObserver((list) => { for (const entry of list.getEntries()) longest = Math.max(longest, entry.duration); }).observe({ entryTypes: ["longtask"] });
  const maps = document.getElementById("maps");
  for (let n = 0; n < 30; n++) { maps.scrollTop = n * 100; await new Promise(requestAnimationFrame); }
  return longest;
});
console.log(`longest task while scrolling: ${slow} ms`);

// Mechanisms: two side by side, measured here.
await page.click("#tab-mechanisms");
await page.waitForSelector("#measure-1");
const measure = async (n) => {
  await page.click(`#measure-${n}`);
  await page.waitForFunction((n) => !document.getElementById(`measure-${n}`).disabled, n, patient);
};
const names = await page.evaluate(() => [...document.querySelectorAll("#side-0 option")].map(({ value }) => value));
for (const name of names) {
  await page.selectOption("#side-0", name);
  await measure(0);
  assert.match(await page.textContent("#curve-text"), new RegExp(`${name}: 256 tokens [0-9.e-]+ ms.*4096 tokens`));
  const levels = await page.evaluate(() => { const canvas = document.querySelector("#sides canvas"); return new Set(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data).size; });
  assert.ok(name === "linformer" || levels > 3, `${name} has no picture`);
}
console.log(`${names.length} mechanisms have a picture and a curve`);
await page.selectOption("#side-0", "full");
await measure(1);
assert.match(await page.textContent("#curve-text"), /full: 256 tokens .*gated_delta: 256 tokens/);
await page.screenshot({ path: `${pictures}/serve-mechanisms.png`, fullPage: true });

// Keyboard, narrow and dark.
await page.focus("#tab-mechanisms");
await page.keyboard.press("ArrowRight");
assert.equal(await page.getAttribute("#tab-chat", "aria-selected"), "true");
await page.setViewportSize({ width: 320, height: 700 });
await page.emulateMedia({ colorScheme: "dark" });
for (const view of ["chat", "look", "mechanisms"]) {
  await page.click(`#tab-${view}`);
  await page.waitForTimeout(100);
  const wide = await page.evaluate(() => document.documentElement.scrollWidth);
  assert.ok(wide <= 320, `${view} is ${wide} px wide`);
}
await page.click("#tab-chat");
const shift = await page.evaluate(() => new Promise((done) => { let sum = 0; new PerformanceObserver((list) => { for (const entry of list.getEntries()) if (!entry.hadRecentInput) sum += entry.value; }).observe({ type: "layout-shift", buffered: true }); setTimeout(() => done(sum), 300); }));
console.log(`layout shifts: ${shift.toFixed(4)}`);

// Layers whose mixers the configuration names: what they show, and in which words.
await page.setViewportSize({ width: 1180, height: 860 });
await page.emulateMedia({ colorScheme: "light" });
await page.goto(`${mixed}#look`);
await page.click("#see");
await page.waitForSelector("#map-3-3", patient);
for (const [map, words] of [
  ["0-0", /^window: tokens without a colour are not seen/],
  ["0-3", /^sparse_transformer: tokens without/],
  ["2-1", /^infini: gate \d+ % for the memory of what lies before token 32, one matrix/],
  ["3-2", /^linear has no softmax/],
  ["1-1", /^memorizing: gate \d+ % for the memory of what lies before token 32; retrieved “.” at \d+/],
]) {
  await page.click(`#map-${map}`);
  await page.waitForFunction((words) => new RegExp(words).test(document.getElementById("mixer").textContent), words.source, patient);
  await drawn();
  const shown = await page.evaluate(() => [...document.querySelectorAll("#tokens span")].filter((span) => span.style.background).length);
  const of = await page.locator("#tokens span").count();
  if (map === "0-0") assert.equal(shown, 16);
  if (map === "3-2") assert.equal(shown, of);
}
assert.match(await page.getAttribute("#map-0-0", "title"), /window$/);
await page.evaluate(() => scrollTo(0, 0));
await page.screenshot({ path: `${pictures}/serve-look-memory.png` });
await page.click("#more");
await page.waitForFunction(() => document.querySelectorAll("#tokens span").length > 45, null, patient);
await page.evaluate(() => document.getElementById("more").textContent === "Stop" && document.getElementById("more").click());
assert.deepEqual(wrong, []);
await browser.close();
console.log("chat, look and mechanisms do what they say");
