// Speaks to a running `foveal serve` with Vercel's AI SDK, a client that shares nothing with the `openai` package, and checks
// what comes back: the SDK refuses answers that are not of OpenAI's form.
//
// npm install ai @ai-sdk/openai-compatible; node scripts/serve/client.mjs http://127.0.0.1:8080 [KEY]
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// From where it is started, so that nothing need be installed beside this file.
const here = createRequire(`${process.cwd()}/`);
const load = (name) => import(pathToFileURL(here.resolve(name)).href);
const { generateText, streamText } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");

const [base, apiKey = "none"] = process.argv.slice(2);
const foveal = createOpenAICompatible({ name: "foveal", baseURL: `${base}/v1`, apiKey, includeUsage: true });
const [{ id, chat }] = (await (await fetch(`${base}/v1/models`, { headers: { authorization: `Bearer ${apiKey}` } })).json()).data;
const options = { temperature: 0, maxOutputTokens: 24, maxRetries: 0 };

/** Twice the same question: whole, and streamed. */
async function both(model, question) {
  const whole = await generateText({ model, ...question, ...options });
  const stream = streamText({ model, ...question, ...options });
  const pieces = [];
  for await (const piece of stream.textStream) pieces.push(piece);
  assert.equal(pieces.join(""), whole.text);
  assert.ok(whole.text && pieces.length > 1);
  assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
  assert.ok(whole.usage.inputTokens > 0 && ["stop", "length"].includes(whole.finishReason));
  assert.equal(await stream.finishReason, whole.finishReason);
  return whole.text;
}

console.log("completion:", JSON.stringify(await both(foveal.completionModel(id), { prompt: "Once upon a time" })));
if (chat) {
  const messages = [{ role: "user", content: "What is the capital of France?" }];
  console.log("chat:", JSON.stringify(await both(foveal.chatModel(id), { system: "Answer briefly.", messages })));
}
const stopped = await generateText({ model: foveal.completionModel(id), prompt: "Once upon a time", ...options, stopSequences: ["e"] });
assert.ok(!stopped.text.includes("e"));
assert.equal(stopped.finishReason, "stop");
const wrong = await generateText({ model: foveal.completionModel("no-such-model"), prompt: "a", ...options }).catch((error) => error);
assert.equal(wrong.statusCode, 404);
assert.match(wrong.message, /no-such-model/);
// Who aborts is heard: the text does not go on.
const leaving = new AbortController();
const long = streamText({ model: foveal.completionModel(id), prompt: "Once", ...options, maxOutputTokens: 2000, abortSignal: leaving.signal });
for await (const piece of long.textStream) if (piece) break;
leaving.abort();
console.log("the AI SDK gets what it expects");
