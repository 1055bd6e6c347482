"""Speaks to a running `foveal serve` with the real `openai` package and with `httpx`, and checks what comes back.

pip install openai httpx; python3 scripts/serve/clients.py http://127.0.0.1:8080 [KEY]
"""

import json
import sys

import httpx
import openai

base = sys.argv[1].rstrip("/")
key = sys.argv[2] if len(sys.argv) > 2 else "none"
client = openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0)
model = client.models.list().data[0].id
assert client.models.retrieve(model).id == model
messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "What is the capital of France?"}]

answer = client.chat.completions.create(model=model, messages=messages, max_tokens=24, temperature=0, logprobs=True, top_logprobs=3)
said = answer.choices[0].message.content
assert said and answer.choices[0].finish_reason in ("stop", "length")
assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
assert all(len(token.top_logprobs) == 3 for token in answer.choices[0].logprobs.content)
print("chat:", repr(said))

stream = client.chat.completions.create(
    model=model, messages=messages, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
)
pieces, usage = [], None
for chunk in stream:
    usage = chunk.usage or usage
    pieces += [choice.delta.content or "" for choice in chunk.choices]
assert "".join(pieces) == said, (pieces, said)
assert usage.completion_tokens == answer.usage.completion_tokens
print("chat, streamed:", len(pieces), "chunks, the same text")

several = client.chat.completions.create(model=model, messages=messages, max_tokens=12, temperature=1.0, seed=5, n=3)
again = client.chat.completions.create(model=model, messages=messages, max_tokens=12, temperature=1.0, seed=5, n=3)
texts = [choice.message.content for choice in several.choices]
assert len(texts) == 3 and texts == [choice.message.content for choice in again.choices]
print("three answers, twice the same:", texts)

text = client.completions.create(model=model, prompt=["The capital of France is", "One, two, three,"], max_tokens=8, temperature=0, logprobs=2)
assert len(text.choices) == 2 and len(text.choices[1].logprobs.tokens) > 0
print("completions:", [choice.text for choice in text.choices])
streamed = client.completions.create(model=model, prompt="The capital of France is", max_tokens=8, temperature=0, stream=True)
assert "".join(chunk.choices[0].text for chunk in streamed) == text.choices[0].text
stopped = client.completions.create(model=model, prompt="One, two, three,", max_tokens=40, temperature=0, stop=["five"])
assert "five" not in stopped.choices[0].text

for wrong, kind in [
    (dict(model="no-such-model", messages=messages), openai.NotFoundError),
    (dict(model=model, messages=messages, temperature=-1), openai.BadRequestError),
    (dict(model=model, messages=messages, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]), openai.BadRequestError),
]:
    try:
        client.chat.completions.create(**wrong)
        raise SystemExit(f"{wrong} was not refused")
    except kind as error:
        print("refused:", error.message[:100])
try:
    client.embeddings.create(model=model, input="x")
    raise SystemExit("embeddings were not refused")
except openai.BadRequestError as error:
    print("refused:", error.message[:100])

# The same by plain HTTP.
headers = {"authorization": f"Bearer {key}"}
with httpx.Client(base_url=base, headers=headers, timeout=60) as plain:
    tokens = plain.post("/tokenize", json={"content": "The capital of France is"}).raise_for_status().json()
    assert plain.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["content"] == "The capital of France is"
    by_tokens = plain.post("/v1/completions", json={"prompt": tokens["tokens"], "max_tokens": 8, "temperature": 0})
    assert by_tokens.json()["choices"][0]["text"] == text.choices[0].text
    body = {"messages": messages, "max_tokens": 24, "temperature": 0, "stream": True}
    with plain.stream("POST", "/v1/chat/completions", json=body) as response:
        data = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    chunks = [json.loads(chunk) for chunk in data[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == said
    assert plain.get("/health").json() == {"status": "ok"}
    assert "foveal_made_tokens_total" in plain.get("/metrics").text
    assert plain.get("/openapi.json").json()["openapi"].startswith("3.")
print("openai", openai.__version__, "and httpx", httpx.__version__, "get what they expect")
