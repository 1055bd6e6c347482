"""What a running server does under load: tokens a second of N clients, and the first token of a short prompt beside a long one.

pip install httpx; python3 scripts/serve/load.py http://127.0.0.1:8080 [--clients 16] [--tokens 128] [--rounds 3] [--long 4000] [--key KEY]

Works with any server of OpenAI's interface. Prompts differ, so that nothing of them is shared.
"""

import argparse
import asyncio
import json
import time

import httpx

parser = argparse.ArgumentParser()
parser.add_argument("base")
parser.add_argument("--clients", type=int, default=16)
parser.add_argument("--tokens", type=int, default=128)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--long", type=int, default=0, help="words of a long prompt that is read meanwhile")
parser.add_argument("--key", default="none")
arguments = parser.parse_args()
WORDS = "time people way water words man work part place things years number day house world line".split()


def words(seed, count):
    """A text of so many words that no other seed gives."""
    out = []
    for _ in range(count):
        seed = (seed * 1103515245 + 12345) % 2**31
        out.append(WORDS[seed >> 16 & 15])
    return " ".join(out)


async def text(client, prompt, tokens):
    """Seconds to the first piece and to the last, and how many tokens were made."""
    start, first, made = time.perf_counter(), None, 0
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - start
                made = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", made)
    return first, time.perf_counter() - start, made


async def main():
    headers = {"authorization": f"Bearer {arguments.key}"}
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=arguments.base, headers=headers, timeout=600, limits=limits) as client:
        await text(client, "Once", 4)
        for turn in range(arguments.rounds):
            if arguments.long:
                long = asyncio.create_task(text(client, words(1000 + turn, arguments.long), 1))
                await asyncio.sleep(0.5)
                first, _, _ = await text(client, words(2000 + turn, 12), 2)
                still = not long.done()
                long_first, _, _ = await long
                print(f"round {turn}: first token of a short prompt after {first:.3f} s, of the long one after {long_first:.2f} s"
                      + ("" if still else " (only once the long prompt had been read)"))
                continue
            start = time.perf_counter()
            prompts = [words(100 * turn + n, 20) for n in range(arguments.clients)]
            done = await asyncio.gather(*(text(client, prompt, arguments.tokens) for prompt in prompts))
            seconds = time.perf_counter() - start
            made = sum(count for _, _, count in done)
            slowest = max(first for first, _, _ in done)
            print(f"round {turn}: {arguments.clients} clients, {made} tokens in {seconds:.2f} s, "
                  f"{made / seconds:.1f} tok/s; first token after {slowest:.2f} s at most")


asyncio.run(main())
