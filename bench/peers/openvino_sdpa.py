"""OpenVINO's ScaledDotProductAttention on the CPU as a peer; the protocol is protocol.py's.

Inputs are contiguous [batch, heads, seq, dim], as its operator has them. The operator has no
grouped heads: keys and values are repeated inside the graph, in the pattern that the CPU plugin
looks for. Its causal is aligned top left, so it serves square cases only. Precision is held to
f32, which the plugin would otherwise lower where the processor has bf16.
"""

import numpy as np
import openvino
from openvino import opset13 as ops

import protocol

PEER = "openvino"
CORE = openvino.Core()


def repeated(node, group, shape):
    """[batch, kv_heads, seq, dim] with every head `group` times."""
    if group == 1:
        return node
    batch, heads, seq, dim = shape
    spread = ops.constant(np.array([batch, heads, group, seq, dim]))
    joined = ops.constant(np.array([batch, heads * group, seq, dim]))
    wide = ops.broadcast(ops.unsqueeze(node, ops.constant(2)), spread)
    return ops.reshape(wide, joined, False)


def compiled(case, arrays, seen, causal):
    """The operator on the case's threads."""
    inputs = [ops.parameter(list(array.shape), openvino.Type.f32) for array in arrays]
    group = case.q_heads // case.kv_heads
    q, k, v = inputs[0], *(repeated(inputs[n], group, arrays[n].shape) for n in (1, 2))
    nodes = [q, k, v]
    if seen is not None:
        inputs.append(ops.parameter(list(seen.shape), openvino.Type.boolean))
        nodes.append(inputs[-1])
    out = ops.scaled_dot_product_attention(*nodes, causal=causal)
    options = {
        "INFERENCE_NUM_THREADS": case.threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": 1,
    }
    return CORE.compile_model(openvino.Model([out], inputs), "CPU", options)


class Forward:
    """A compiled case with its inputs."""

    def __init__(self, case):
        case.needs_forward(PEER)
        case.needs_f32(PEER)
        arrays = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in case.inputs()]
        causal = case.mask == "causal" and case.seq_q == case.seq_k and case.seq_q > 1
        seen = None if causal else protocol.allowed(case)
        self.model = compiled(case, arrays, seen, causal)
        inputs = arrays if seen is None else [*arrays, seen]
        # Requests point into these arrays and do not keep them.
        self.sets = [inputs] + [[a.copy() for a in inputs] for _ in range(case.copies - 1)]
        self.requests = [self.request(inputs) for inputs in self.sets]
        self.turn = 0
        self.note = "ScaledDotProductAttention, [batch, heads, seq, dim]"
        if case.q_heads != case.kv_heads:
            self.note += ", keys and values repeated in the graph"

    def request(self, arrays):
        request = self.model.create_infer_request()
        for n, array in enumerate(arrays):
            request.set_input_tensor(n, openvino.Tensor(array, shared_memory=True))
        return request

    def execute(self):
        """Runs the case once on the next input set."""
        request = self.requests[self.turn]
        self.turn = (self.turn + 1) % len(self.requests)
        request.infer()
        return request

    def arrays(self, result):
        return [result.get_output_tensor(0).data.transpose(0, 2, 1, 3)]


if __name__ == "__main__":
    protocol.serve(f"{PEER} {openvino.__version__.split('-')[0]}", Forward)
