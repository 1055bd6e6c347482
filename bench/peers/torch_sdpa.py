"""Times PyTorch's scaled_dot_product_attention on the CPU, one request at a time.

A worker for the benchmark runner, which starts it once and then lets it and Foveal take turns
(A B A B) in one run, with the same thread count and the same inputs:

    out[b,i,h,:] = softmax_j(q[b,i,h,:]·k[b,j,g,:] / sqrt(head_dim) + mask) v[b,j,g,:],
    g = h / (q_heads / kv_heads)

Requests are lines of JSON on stdin; each gets one line of JSON on stdout, in order. Every answer
has "ok"; when that is false, "error" is a sentence and the worker waits for the next request. At
the start the worker sends one answer of its own accord:
    {"ok": true, "protocol": 1, "torch": "2.15.0", "capability": "AVX512"}

{"cmd": "case", ...} builds the inputs and runs the case twice, untimed. Fields (* required):
    batch* seq_q* seq_k* q_heads* kv_heads* head_dim*   lengths, at least 1
    mask      "full" | "causal" | {"window": w} | {"random": keep}       "full"
    dtype     "f32" | "bf16" | "f16"                                     "f32"
    threads   number of threads                                          2
    op        "forward" | "decode"                                       "forward"
    seed      integer below 2^63                                         0
    layout    "bthd" | "bhtd": axis order of the inputs in memory        "bthd"
    mask_as   "bool" | "additive": form of an explicit mask              "bool"
    backend   "auto" | "flash" | "math": PyTorch's choice, or forced     "auto"
    copies    input sets that executions go through in turn, so that     1
              a decoding step finds its K and V out of cache
  Masks speak of absolute positions: query i sits at p = i + seq_k - seq_q and sees key j when
  j <= p ("causal"), p - w < j <= p (window: w keys, itself included), or bits 56..64 of
  element i*seq_k + j of the generator, seed + 3, are below keep (random: keep/256 of the keys).
  "decode" is "forward" with the limit seq_q <= 64 <= seq_k: the last rows against a filled cache.
  Answer: {"ok": true, "backend": "flash" | "math" | ..., "explicit_mask": bool,
           "checksum": sum of out*w, "scale": sum of |out*w|, "elements": count}
  with w the generator's values, seed + 4, in the output's order, summed in f64. Two results agree
  when |checksum_a - checksum_b| <= tolerance * scale.
{"cmd": "run", "iterations": n, "lead": m}              1, 1
  executes the case m times untimed (to wake threads and fill caches), then n times timed.
  Answer: {"ok": true, "seconds": total of the n}. It is sent SETTLE_SECONDS after the last
  execution: OpenMP's threads spin for a while after their work and must not do so while the other
  side is being timed.
{"cmd": "dump", "path": p} writes the output to p as little-endian f32, [batch, seq, heads, dim].
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

PyTorch's own is_causal is aligned top left, so it serves "causal" only where seq_q = seq_k (and a
single query needs no mask at all); otherwise causal and window become an explicit mask, made
before anything is timed. A bool mask is what users pass; PyTorch converts it in each call.
"""

import json
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

SETTLE_SECONDS = 0.02
WARM_UP = 2
MAX_ELEMENTS = 1 << 29
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


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
    mask_as: str = "bool"
    backend: str = "auto"
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
        check_choice("op", self.op, ("forward", "decode"))
        check_choice("layout", self.layout, ("bthd", "bhtd"))
        check_choice("mask_as", self.mask_as, ("bool", "additive"))
        check_choice("backend", self.backend, ("auto", *BACKENDS))
        check_mask(self.mask)
        if self.q_heads % self.kv_heads:
            raise RequestError(f"{self.q_heads} query heads don't divide into {self.kv_heads} groups")
        if self.op == "decode" and not self.seq_q <= 64 <= self.seq_k:
            raise RequestError("decode expects seq_q <= 64 <= seq_k")
        self.check_sizes()

    def check_sizes(self):
        """Raises RequestError when the tensors would take too much memory."""
        rows_q, rows_k = self.batch * self.seq_q, self.batch * self.seq_k
        elements = (rows_q * self.q_heads + 2 * rows_k * self.kv_heads) * self.head_dim
        if max(elements * self.copies, self.seq_q * self.seq_k) > MAX_ELEMENTS:
            raise RequestError(f"the case is too large: at most {MAX_ELEMENTS} elements")


def check_integer(name, value, least, most):
    if type(value) is not int or not least <= value <= most:
        raise RequestError(f"{name} is {value!r}; expected an integer from {least} to {most}")


def check_choice(name, value, choices):
    if not isinstance(value, str) or value not in choices:
        raise RequestError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def check_mask(mask):
    if mask in ("full", "causal"):
        return
    if not isinstance(mask, dict) or len(mask) != 1 or not mask.keys() <= {"window", "random"}:
        raise RequestError(f'mask is {mask!r}; expected "full", "causal", window or random')
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


def self_test():
    """Holds the generator to published values of splitmix64 with seed 0."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(z) for z in splitmix(0, 3)] == expected
    assert uniform(0, 1)[0] == np.float32(0xE220A8 / 2**23 - 1)


def allowed(case):
    """The mask as a bool array [seq_q, seq_k], or None when every key is seen."""
    if case.mask == "full" or (case.mask == "causal" and case.seq_q == 1):
        return None
    if "random" in case.mask:
        bits = splitmix(case.seed + 3, case.seq_q * case.seq_k) >> np.uint64(56)
        return (bits < np.uint64(case.mask["random"])).reshape(case.seq_q, case.seq_k)
    position = np.arange(case.seq_q)[:, None] + (case.seq_k - case.seq_q)
    key = np.arange(case.seq_k)[None, :]
    seen = key <= position
    if isinstance(case.mask, dict):
        seen &= key > position - case.mask["window"]
    return seen


def explicit_mask(case):
    """The mask tensor to pass to PyTorch, or None."""
    if case.mask == "causal" and case.seq_q == case.seq_k:
        return None
    seen = allowed(case)
    if seen is None:
        return None
    seen = torch.from_numpy(seen)
    if case.mask_as == "bool":
        return seen
    additive = torch.zeros(seen.shape, dtype=DTYPES[case.dtype])
    return additive.masked_fill_(~seen, float("-inf"))


def tensor(case, seed, seq, heads):
    """One input as PyTorch takes it, [batch, heads, seq, dim]."""
    shape = (case.batch, seq, heads, case.head_dim)
    values = torch.from_numpy(uniform(seed, int(np.prod(shape))).reshape(shape))
    values = values.to(DTYPES[case.dtype]).transpose(1, 2)
    return values.contiguous() if case.layout == "bhtd" else values


class Prepared:
    """A case with its inputs built, ready to execute."""

    def __init__(self, case):
        torch.set_num_threads(case.threads)
        inputs = (
            tensor(case, case.seed, case.seq_q, case.q_heads),
            tensor(case, case.seed + 1, case.seq_k, case.kv_heads),
            tensor(case, case.seed + 2, case.seq_k, case.kv_heads),
        )
        self.sets = [inputs] + [tuple(t.clone() for t in inputs) for _ in range(case.copies - 1)]
        self.turn = 0
        self.options = {
            "attn_mask": explicit_mask(case),
            "is_causal": case.mask == "causal" and case.seq_q == case.seq_k and case.seq_q > 1,
            "enable_gqa": case.q_heads != case.kv_heads,
        }
        self.forced = BACKENDS.get(case.backend)

    def context(self):
        """The context that executions run in; entered outside the timed part."""
        return sdpa_kernel(self.forced) if self.forced else nullcontext()

    def execute(self):
        """Runs the case once on the next input set; returns [batch, heads, seq, dim]."""
        q, k, v = self.sets[self.turn]
        self.turn = (self.turn + 1) % len(self.sets)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **self.options)

    def backend(self):
        """The name of the kernel that PyTorch picks."""
        q, k, v = self.sets[0]
        with self.context():
            choice = torch._fused_sdp_choice(q, k, v, dropout_p=0.0, **self.options)
        names = {SDPBackend.MATH.value: "math", SDPBackend.FLASH_ATTENTION.value: "flash"}
        return names.get(choice, f"backend {choice}")

    def output(self):
        """One result as a contiguous f32 array, [batch, seq, heads, dim]."""
        with self.context():
            return self.execute().transpose(1, 2).to(torch.float32).contiguous().numpy()


class Worker:
    """Answers requests; holds at most one prepared case."""

    def __init__(self):
        self.prepared = None

    def answer(self, request):
        """Carries out one request and returns the answer without "ok"."""
        commands = {"case": self.case, "run": self.run, "dump": self.dump}
        command = request.get("cmd") if isinstance(request, dict) else None
        if not isinstance(command, str) or command not in commands:
            raise RequestError(f"cmd is {command!r}; expected one of {', '.join(commands)}, quit")
        return commands[command](request)

    def case(self, request):
        self.prepared = None
        case = Case.from_request(request)
        prepared = Prepared(case)
        with prepared.context():
            for _ in range(WARM_UP):
                prepared.execute()
        out = prepared.output().reshape(-1)
        weighted = out.astype(np.float64) * uniform(case.seed + 4, out.size)
        self.prepared = prepared
        return {
            "backend": prepared.backend(),
            "explicit_mask": prepared.options["attn_mask"] is not None,
            "checksum": float(weighted.sum()),
            "scale": float(np.abs(weighted).sum()),
            "elements": out.size,
        }

    def current(self):
        if self.prepared is None:
            raise RequestError("no case is set; send a case first")
        return self.prepared

    def run(self, request):
        prepared = self.current()
        iterations, lead = request.get("iterations", 1), request.get("lead", 1)
        check_integer("iterations", iterations, 1, 1 << 24)
        check_integer("lead", lead, 0, 1 << 24)
        with prepared.context():
            for _ in range(lead):
                prepared.execute()
            start = time.perf_counter()
            for _ in range(iterations):
                prepared.execute()
            seconds = time.perf_counter() - start
        time.sleep(SETTLE_SECONDS)
        return {"seconds": seconds}

    def dump(self, request):
        path = request.get("path")
        if not isinstance(path, str):
            raise RequestError(f"path is {path!r}; expected a string")
        out = self.current().output()
        out.astype("<f4").tofile(path)
        return {"elements": out.size}


def serve(requests, answers):
    """Answers requests until "quit" or the end of the input."""

    def send(answer):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    worker = Worker()
    capability = torch.backends.cpu.get_cpu_capability()
    send({"ok": True, "protocol": 1, "torch": torch.__version__, "capability": capability})
    for line in requests:
        try:
            request = json.loads(line)
            if isinstance(request, dict) and request.get("cmd") == "quit":
                return
            send({"ok": True, **worker.answer(request)})
        except (RequestError, ValueError, OSError, RuntimeError, MemoryError) as error:
            send({"ok": False, "error": f"{error}"})


def main():
    """Keeps stdout for answers: whatever a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    self_test()
    with torch.no_grad():
        serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
