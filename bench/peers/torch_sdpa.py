"""PyTorch's scaled_dot_product_attention on the CPU as a peer; the protocol is protocol.py's.

PyTorch's own is_causal is aligned top left, so it serves "causal" only where seq_q = seq_k (and a
single query needs no mask at all); otherwise causal and window become an explicit mask, made
before anything is timed. A bool mask is what users pass; PyTorch converts it in each call.
Forward runs without gradients; backward times autograd's pass alone, on a graph that is kept.
"""

import torch
from torch.nn.attention import SDPBackend

import protocol

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
KERNELS = {SDPBackend.MATH.value: "math", SDPBackend.FLASH_ATTENTION.value: "flash"}


def tensor(case, values):
    """An array [batch, seq, heads, dim] as PyTorch takes it, [batch, heads, seq, dim]."""
    values = torch.from_numpy(values).to(DTYPES[case.dtype]).transpose(1, 2)
    return values.contiguous() if case.layout == "bhtd" else values


def array(result):
    """PyTorch's [batch, heads, seq, dim] as an f32 array [batch, seq, heads, dim]."""
    return result.detach().transpose(1, 2).to(torch.float32).numpy()


class Forward:
    """Calls with their inputs."""

    def __init__(self, case):
        torch.set_num_threads(case.threads)
        inputs = tuple(tensor(case, values) for values in case.inputs())
        self.sets = [inputs] + [tuple(t.clone() for t in inputs) for _ in range(case.copies - 1)]
        self.turn = 0
        own = case.mask == "causal" and case.seq_q == case.seq_k
        seen = None if own else protocol.allowed(case)
        self.options = {
            "attn_mask": None if seen is None else torch.from_numpy(seen),
            "is_causal": own and case.seq_q > 1,
            "enable_gqa": case.q_heads != case.kv_heads,
        }
        choice = torch._fused_sdp_choice(*inputs, dropout_p=0.0, **self.options)
        mask = "" if seen is None else ", explicit mask"
        self.note = KERNELS.get(choice, f"backend {choice}") + mask

    def execute(self):
        """Runs the case once on the next input set."""
        q, k, v = self.sets[self.turn]
        self.turn = (self.turn + 1) % len(self.sets)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **self.options)

    def arrays(self, result):
        return [array(result)]


class Backward:
    """Gradients of one call."""

    def __init__(self, case):
        forward = Forward(case)
        with torch.enable_grad():
            self.inputs = tuple(t.detach().requires_grad_() for t in forward.sets[0])
            forward.sets = [self.inputs]
            self.out = forward.execute()
        self.d_out = tensor(case, protocol.numbers(case.seed + 4, case.shapes()[0]))
        self.note = f"autograd of {self.out.grad_fn.name()}"

    def execute(self):
        """Runs the backward pass once."""
        return torch.autograd.grad(self.out, self.inputs, self.d_out, retain_graph=True)

    def arrays(self, result):
        return [array(gradient) for gradient in result]


def prepare(case):
    """Builds a case."""
    return Forward(case) if case.op == "forward" else Backward(case)


if __name__ == "__main__":
    capability = torch.backends.cpu.get_cpu_capability()
    with torch.no_grad():
        protocol.serve(f"torch {torch.__version__} ({capability})", prepare)
