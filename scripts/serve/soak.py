"""Many requests of all kinds at once: whole, streamed, cancelled, malformed, too large, read slowly, cut off.

python3 scripts/serve/soak.py FOVEAL [--requests 10000] [--model MODEL] [--clients 24]       needs nothing but Python

Every whole answer must be the text that its request gives alone; the server's memory must not grow after the first fifth.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys

parser = argparse.ArgumentParser()
parser.add_argument("foveal")
parser.add_argument("--model")
parser.add_argument("--requests", type=int, default=10_000)
parser.add_argument("--clients", type=int, default=24)
parser.add_argument("--port", type=int, default=18070)
arguments = parser.parse_args()
PROMPTS = ["Once upon a time", "The sun", "A cat and a dog", "It was a dark night and", "She said that " * 12, "One two three"]


def body_of(n):
    """The n-th of the known requests."""
    rng = random.Random(n)
    return {"prompt": rng.choice(PROMPTS), "max_tokens": rng.randrange(1, 60), "seed": n, "temperature": rng.choice([0, 0.7, 1]),
            "top_k": rng.choice([0, 20]), "stop": rng.choice([None, ["."], ["the"]])}


def head(path, length, more=""):
    return f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {length}\r\n{more}\r\n".encode()


async def connect():
    return await asyncio.open_connection("127.0.0.1", arguments.port, limit=1 << 22)


async def send(data, slow=False):
    """Status and body of a raw request."""
    reader, writer = await connect()
    answer = b""
    try:
        writer.write(data)
        await writer.drain()
        while True:
            part = await reader.read(64 if slow else 1 << 16)
            if not part:
                break
            answer += part
            if slow:
                await asyncio.sleep(0.002)
    except (ConnectionError, BrokenPipeError):
        pass
    finally:
        writer.close()
    top, _, rest = answer.partition(b"\r\n\r\n")
    status = int(top.split()[1]) if top else 0
    if b"transfer-encoding: chunked" in top:
        whole = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            whole, rest = whole + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        rest = whole
    return status, rest


async def ask(n, stream=False, slow=False):
    """The text of a known request; tries again while the queue is full."""
    body = json.dumps(dict(body_of(n), stream=stream)).encode()
    while True:
        status, answer = await send(head("/v1/completions", len(body)) + body, slow)
        if status != 429:
            break
        await asyncio.sleep(0.05)
    assert status == 200, (status, answer)
    if not stream:
        return json.loads(answer)["choices"][0]["text"]
    data = [line[6:] for line in answer.decode().split("\n") if line.startswith("data: ")]
    assert data[-1] == "[DONE]", data[-1]
    return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in data[:-1])


async def cancel(rng):
    """Leaves after a while, at whatever point."""
    body = json.dumps({"prompt": rng.choice(PROMPTS), "max_tokens": 2000, "stream": rng.random() < 0.5}).encode()
    reader, writer = await connect()
    data = head("/v1/completions", len(body)) + body
    # Most leave while their text is made, some before the request is whole.
    writer.write(data if rng.random() < 0.8 else data[: rng.randrange(1, len(data))])
    await asyncio.sleep(rng.random() * 0.1)
    writer.transport.abort() if rng.random() < 0.5 else writer.close()


async def malformed(rng):
    kind = rng.randrange(5)
    if kind == 0:
        body = bytes(rng.randrange(256) for _ in range(rng.randrange(200)))
        status, _ = await send(head("/v1/completions", len(body)) + body)
        assert status in (400, 200), status
    elif kind == 1:
        status, _ = await send(head("/v1/completions", 1 << 40))
        assert status == 413, status
    elif kind == 2:
        body = b'{"prompt": "' + b"x" * (3 << 20) + b'"}'
        status, _ = await send(head("/v1/completions", len(body)) + body)
        assert status in (413, 0), status
    elif kind == 3:
        status, _ = await send(bytes(rng.randrange(256) for _ in range(rng.randrange(1, 400))) + b"\r\n\r\n")
        assert status == 0 or status >= 400, status
    else:
        body = json.dumps({"prompt": "a", "temperature": rng.choice([-1, "x", None, 1e300, []]), "n": rng.choice([0, -1, 1000])}).encode()
        status, _ = await send(head("/v1/completions", len(body)) + body)
        assert 400 <= status < 500, status


def resident(process):
    with open(f"/proc/{process.pid}/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


async def main(process):
    for _ in range(200):
        try:
            (await connect())[1].close()
            break
        except OSError:
            await asyncio.sleep(0.1)
    known = 64
    expected = [await ask(n) for n in range(known)]
    counts, left, memory = {"whole": 0, "stream": 0, "slow": 0, "cancel": 0, "malformed": 0}, arguments.requests, []

    async def client(seed):
        nonlocal left
        rng = random.Random(seed)
        while left > 0:
            left -= 1
            if left % max(arguments.requests // 20, 1) == 0:
                memory.append(resident(process))
            kind, n = rng.choices(list(counts), [30, 30, 5, 20, 15])[0], rng.randrange(known)
            counts[kind] += 1
            if kind == "cancel":
                await cancel(rng)
            elif kind == "malformed":
                await malformed(rng)
            else:
                found = await ask(n, kind != "whole", kind == "slow")
                assert found == expected[n], (n, found, expected[n])

    await asyncio.gather(*(client(seed) for seed in range(arguments.clients)))
    for _ in range(100):
        reader, writer = await connect()
        writer.write(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        metrics = (await reader.read()).decode()
        writer.close()
        numbers = dict(line.split(" ") for line in metrics.split("\n") if line.startswith("foveal_"))
        if numbers["foveal_running"] == numbers["foveal_waiting"] == "0":
            break
        await asyncio.sleep(0.1)
    assert process.poll() is None, "the server has ended"
    assert numbers["foveal_kv_bytes"] == "0", numbers
    warm = memory[len(memory) // 5 :]
    print(counts, "requests; MiB resident after the first fifth:", *(f"{m:.0f}" for m in warm))
    print("abandoned", numbers["foveal_abandoned_total"], "finished", numbers["foveal_finished_total"], "refused", numbers["foveal_requests_refused_total"])
    assert max(warm) - warm[0] < 0.05 * warm[0] + 8, "memory grows"


command = [arguments.foveal, "serve", "--name", "soak", "--port", str(arguments.port), "--context", "4000"]
server = subprocess.Popen(command + (["--model", arguments.model] if arguments.model else []), stderr=subprocess.PIPE)
try:
    asyncio.run(main(server))
finally:
    server.terminate()
    errors = server.communicate(timeout=60)[1].decode()
    print(errors.strip())
assert server.returncode == 0 and "panicked" not in errors and "internal error" not in errors, (server.returncode, errors)
print("no answer was lost or mixed, and nothing grew")
sys.exit(0)
