"""What the benchmark's peers written in Python share: the protocol, the inputs, the masks.

A peer is a worker for the benchmark runner, which starts it once and then lets it and Foveal take
turns (A B A B) in one run, with the same thread count and the same inputs:

    out[b,i,h,:] = softmax_j(q[b,i,h,:]·k[b,j,g,:] / sqrt(head_dim) + mask) v[b,j,g,:],
    g = h / (q_heads / kv_heads)

Requests are lines of JSON on stdin; each gets one line of JSON on stdout, in order. Every answer
has "ok"; when that is false, "error" is a sentence and the worker waits for the next request. At
the start the worker sends one answer of its own accord:
    {"ok": true, "protocol": 2, "peer": "torch 2.15.0 (AVX512)"}

{"cmd": "case", ...} builds the inputs and runs the case, untimed. Fields (* required):
    batch* seq_q* seq_k* q_heads* kv_heads* head_dim*   lengths, at least 1
    mask      "full" | "causal" | {"window": w} | {"random": keep}       "full"
              | "causal-mask": causal, given as a matrix of bools
    dtype     "f32" | "bf16" | "f16"                                     "f32"
    threads   number of threads                                          2
    op        "forward" | "backward"                                     "forward"
    seed      integer below 2^63                                         0
    layout    "bthd" | "bhtd": axis order of the inputs in memory,       "bthd"
              where the peer takes either
    copies    input sets that executions go through in turn, so that     1
              a decoding step finds its K and V out of cache
  Masks speak of absolute positions: query i sits at p = i + seq_k - seq_q and sees key j when
  j <= p ("causal"), p - w < j <= p (window: w keys, itself included), or bits 56..64 of
  element i*seq_k + j of the generator, seed + 3, are below keep (random: keep/256 of the keys).
  "backward" is the gradients of q, k and v for a gradient of the output drawn with seed + 4; the
  forward pass before it is not timed.
  Answer: {"ok": true, "note": what runs, in words}
{"cmd": "run", "iterations": n, "lead": m}              1, 1
  executes the case m times untimed (to wake threads and fill caches), then n times timed.
  Answer: {"ok": true, "seconds": total of the n}. With several threads it is sent SETTLE_SECONDS
  after the last execution: threads spin for a while after their work and must not do so while the
  other side is being timed.
{"cmd": "dump", "path": p} writes the result of the case's first execution to p as little-endian
  f32, [batch, seq, heads, dim]; of "backward" those of q, k and v one after the other.
  Answer: {"ok": true, "elements": count}
{"cmd": "quit"}, or the end of stdin, ends the worker.

Inputs are the same in every language. Element n (from 0, in row-major [batch, seq, heads, dim]
order) of the tensor with seed s is splitmix64 as a counter, all arithmetic modulo 2^64:
    z = s + (n + 1) * 0x9E3779B97F4A7C15
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9
    z = (z ^ z >> 27) * 0x94D049BB133111EB
    z = z ^ z >> 31
    value = (z >> 40) * 2^-23 - 1          in [-1, 1), exact in f32; then rounded to dtype, to even
with s = seed for q, seed + 1 for k, seed + 2 for v. First values for seed 0 are in
`self_test`, which runs at every start.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, fields

import numpy as np

PROTOCOL = 2
SETTLE_SECONDS = 0.02
# A first execution shorter than this is followed by a second one to warm up.
SHORT_SECONDS = 0.1
MAX_ELEMENTS = 1 << 29
DTYPES = ("f32", "bf16", "f16")
MASKS = ("full", "causal", "causal-mask")


class RequestError(Exception):
    """A request that can't be carried out; the message says why."""


@dataclass(frozen=True)
class Case:
    """One attention call; the fields are those of the "case" request."""

    batch: int
    seq_q: int
    seq_k: int
    q_heads: int
    kv_heads: int
    head_dim: int
    mask: object = "full"
    dtype: str = "f32"
    threads: int = 2
    op: str = "forward"
    seed: int = 0
    layout: str = "bthd"
    copies: int = 1

    @staticmethod
    def from_request(request):
        """Reads a request; raises RequestError on anything unknown, missing or out of range."""
        known = {field.name for field in fields(Case)}
        if unknown := request.keys() - known - {"cmd"}:
            raise RequestError(f"unknown fields {sorted(unknown)}; expected {sorted(known)}")
        try:
            case = Case(**{name: request[name] for name in request.keys() & known})
        except TypeError as error:
            raise RequestError(f"incomplete case: {error}") from error
        case.check()
        return case

    def check(self):
        """Raises RequestError on values that make no case."""
        lengths = ("batch", "seq_q", "seq_k", "q_heads", "kv_heads", "head_dim", "threads", "copies")
        for name in lengths:
            check_integer(name, getattr(self, name), 1, 1 << 24)
        check_integer("seed", self.seed, 0, (1 << 63) - 1)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("op", self.op, ("forward", "backward"))
        check_choice("layout", self.layout, ("bthd", "bhtd"))
        check_mask(self.mask)
        if self.q_heads % self.kv_heads:
            raise RequestError(f"{self.q_heads} query heads don't divide into {self.kv_heads} groups")
        if self.op == "backward" and self.copies != 1:
            raise RequestError("backward has one set of inputs")
        self.check_sizes()

    def check_sizes(self):
        """Raises RequestError when the tensors would take too much memory."""
        rows_q, rows_k = self.batch * self.seq_q, self.batch * self.seq_k
        elements = (rows_q * self.q_heads + 2 * rows_k * self.kv_heads) * self.head_dim
        if max(elements * self.copies, self.seq_q * self.seq_k) > MAX_ELEMENTS:
            raise RequestError(f"the case is too large: at most {MAX_ELEMENTS} elements")

    def shapes(self):
        """Shapes [batch, seq, heads, dim] of q, k and v."""
        q = (self.batch, self.seq_q, self.q_heads, self.head_dim)
        kv = (self.batch, self.seq_k, self.kv_heads, self.head_dim)
        return q, kv, kv

    def inputs(self):
        """q, k and v as f32, not rounded to dtype yet."""
        return tuple(numbers(self.seed + n, shape) for n, shape in enumerate(self.shapes()))

    def needs_f32(self, peer):
        """Raises RequestError for 16-bit cases."""
        if self.dtype != "f32":
            raise RequestError(f"{peer} is compared in f32 only")

    def needs_forward(self, peer):
        """Raises RequestError for gradients."""
        if self.op != "forward":
            raise RequestError(f"{peer} has no gradients")


def check_integer(name, value, least, most):
    if type(value) is not int or not least <= value <= most:
        raise RequestError(f"{name} is {value!r}; expected an integer from {least} to {most}")


def check_choice(name, value, choices):
    if not isinstance(value, str) or value not in choices:
        raise RequestError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def check_mask(mask):
    if isinstance(mask, str) and mask in MASKS:
        return
    if not isinstance(mask, dict) or len(mask) != 1 or not mask.keys() <= {"window", "random"}:
        raise RequestError(f"mask is {mask!r}; expected {', '.join(MASKS)}, window or random")
    for name, value in mask.items():
        check_integer(name, value, 1, 256 if name == "random" else 1 << 24)


def splitmix(seed, count):
    """Elements 0..count of the generator with this seed, as uint64."""
    z = np.arange(1, count + 1, dtype=np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(seed)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def uniform(seed, count):
    """Elements 0..count of the generator with this seed, as f32 in [-1, 1)."""
    high = (splitmix(seed, count) >> np.uint64(40)).astype(np.float32)
    return high * np.float32(2.0**-23) - np.float32(1.0)


def numbers(seed, shape):
    """A tensor of the generator's numbers."""
    return uniform(seed, int(np.prod(shape))).reshape(shape)


def self_test():
    """Holds the generator to published values of splitmix64 with seed 0."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(z) for z in splitmix(0, 3)] == expected
    assert uniform(0, 1)[0] == np.float32(0xE220A8 / 2**23 - 1)


def allowed(case):
    """The mask as a bool array [seq_q, seq_k], or None when every key is seen."""
    if case.mask == "full" or (case.mask == "causal" and case.seq_q == 1):
        return None
    if isinstance(case.mask, dict) and "random" in case.mask:
        bits = splitmix(case.seed + 3, case.seq_q * case.seq_k) >> np.uint64(56)
        return (bits < np.uint64(case.mask["random"])).reshape(case.seq_q, case.seq_k)
    position = np.arange(case.seq_q)[:, None] + (case.seq_k - case.seq_q)
    key = np.arange(case.seq_k)[None, :]
    seen = key <= position
    if isinstance(case.mask, dict):
        seen &= key > position - case.mask["window"]
    return seen


class Worker:
    """Answers requests; holds at most one prepared case.

    `prepare(case)` gives an object with `execute()`, which runs the case once and returns its raw
    result, `arrays(result)`, the result as a list of f32 arrays in the order of "dump", and `note`.
    """

    def __init__(self, prepare):
        self.prepare = prepare
        self.prepared = self.threads = self.first = None

    def answer(self, request):
        """Carries out one request and returns the answer without "ok"."""
        commands = {"case": self.case, "run": self.run, "dump": self.dump}
        command = request.get("cmd") if isinstance(request, dict) else None
        if not isinstance(command, str) or command not in commands:
            raise RequestError(f"cmd is {command!r}; expected one of {', '.join(commands)}, quit")
        return commands[command](request)

    def case(self, request):
        self.prepared = self.first = None
        case = Case.from_request(request)
        prepared = self.prepare(case)
        start = time.perf_counter()
        result = prepared.execute()
        short = time.perf_counter() - start < SHORT_SECONDS
        # A copy, since a peer may use the memory of its result again.
        self.first = [np.array(array, dtype="<f4", order="C") for array in prepared.arrays(result)]
        if short:
            prepared.execute()
        self.prepared, self.threads = prepared, case.threads
        return {"note": prepared.note}

    def current(self):
        if self.prepared is None:
            raise RequestError("no case is set; send a case first")
        return self.prepared

    def run(self, request):
        execute = self.current().execute
        iterations, lead = request.get("iterations", 1), request.get("lead", 1)
        check_integer("iterations", iterations, 1, 1 << 24)
        check_integer("lead", lead, 0, 1 << 24)
        for _ in range(lead):
            execute()
        start = time.perf_counter()
        for _ in range(iterations):
            execute()
        seconds = time.perf_counter() - start
        if self.threads > 1:
            time.sleep(SETTLE_SECONDS)
        return {"seconds": seconds}

    def dump(self, request):
        path = request.get("path")
        if not isinstance(path, str):
            raise RequestError(f"path is {path!r}; expected a string")
        self.current()
        with open(path, "wb") as file:
            for array in self.first:
                array.tofile(file)
        return {"elements": sum(array.size for array in self.first)}


def serve(peer, prepare):
    """Answers requests until "quit" or the end of the input.

    Keeps stdout for answers: whatever a library prints goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    self_test()

    def send(answer):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    worker = Worker(prepare)
    send({"ok": True, "protocol": PROTOCOL, "peer": peer})
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if isinstance(request, dict) and request.get("cmd") == "quit":
                return
            send({"ok": True, **worker.answer(request)})
        except (RequestError, ValueError, OSError, RuntimeError, MemoryError) as error:
            send({"ok": False, "error": f"{error}"})
