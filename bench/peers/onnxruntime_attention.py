"""ONNX Runtime's attention on the CPU as a peer; the protocol is protocol.py's.

It has several operators for the same thing: Attention of ONNX (opset 23), and MultiHeadAttention
and GroupQueryAttention of its own domain. Every one that can do the case is built and tried, and
the fastest takes part. Inputs are [batch, seq, heads · dim]; outputs stay in bound memory.
"""

import time

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

import protocol

PEER = "onnxruntime"
OPSETS = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
TRIALS = 3
TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "bool": TensorProto.BOOL}


class Form:
    """An operator with its inputs, in a session of its own."""

    def __init__(self, case, operator, feeds, **attributes):
        self.name = operator
        own = operator != "Attention"
        names = [name if name in feeds else "" for name in self.order(operator)]
        while not names[-1]:
            names.pop()
        outputs = ["out"]
        if operator == "GroupQueryAttention":
            outputs += ["present_k", "present_v"]
        domain = "com.microsoft" if own else ""
        node = helper.make_node(operator, names, outputs, domain=domain, **attributes)
        self.session = session(case, node, feeds)
        # The binding points into these arrays.
        self.feeds = feeds
        self.binding = self.session.io_binding()
        for name, array in feeds.items():
            self.binding.bind_cpu_input(name, array)
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy(np.empty_like(feeds["q"]))
        self.binding.bind_ortvalue_output("out", self.value)
        for name in outputs[1:]:
            self.binding.bind_output(name, "cpu")

    @staticmethod
    def order(operator):
        """The operator's inputs as they follow each other."""
        if operator == "GroupQueryAttention":
            return ["q", "k", "v", "past_k", "past_v", "last", "total"]
        return ["q", "k", "v", "mask"]

    def run(self):
        self.session.run_with_iobinding(self.binding)
        return self.value


def session(case, node, feeds):
    """A session of one node, on the case's threads."""
    inputs = [
        helper.make_tensor_value_info(name, TYPES[array.dtype.name], array.shape)
        for name, array in feeds.items()
    ]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, feeds["q"].shape)]
    outputs += [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output[1:]
    ]
    graph = helper.make_graph([node], "attention", inputs, outputs)
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)


def forms(case):
    """All operators that can do the case."""
    q, k, v = (x.reshape(*x.shape[:2], -1) for x in case.inputs())
    feeds = {"q": q, "k": k, "v": v}
    heads = {"q_num_heads": case.q_heads, "kv_num_heads": case.kv_heads}
    square = case.seq_q == case.seq_k
    causal = case.mask == "causal" and case.seq_q > 1
    if causal and square or case.mask == "full" or case.mask == "causal" and case.seq_q == 1:
        yield Form(case, "Attention", feeds, is_causal=int(causal), **heads)
        if case.q_heads == case.kv_heads:
            unidirectional = {"num_heads": case.q_heads, "unidirectional": int(causal)}
            yield Form(case, "MultiHeadAttention", feeds, **unidirectional)
    else:
        yield Form(case, "Attention", {**feeds, "mask": protocol.allowed(case)}, **heads)
    window = case.mask.get("window", 0) if isinstance(case.mask, dict) else 0
    if square and (causal or window):
        lengths = {
            "last": np.full(case.batch, case.seq_k - 1, dtype=np.int32),
            "total": np.array(case.seq_k, dtype=np.int32),
        }
        options = {
            "num_heads": case.q_heads,
            "kv_num_heads": case.kv_heads,
            "local_window_size": window or -1,
        }
        yield Form(case, "GroupQueryAttention", {**feeds, **lengths}, **options)


def seconds(form):
    """The shortest of some executions, or of one if that is long."""
    best = float("inf")
    for _ in range(TRIALS):
        start = time.perf_counter()
        form.run()
        best = min(best, time.perf_counter() - start)
        if best > protocol.SHORT_SECONDS:
            break
    return best


class Forward:
    """The fastest form of a case."""

    def __init__(self, case):
        case.needs_forward(PEER)
        case.needs_f32(PEER)
        if case.copies != 1:
            raise protocol.RequestError("one set of inputs is bound")
        self.shape = case.shapes()[0]
        self.form = min(forms(case), key=seconds)
        self.execute = self.form.run
        self.note = f"{self.form.name}, the fastest of its operators here"

    def arrays(self, result):
        return [result.numpy().reshape(self.shape)]


if __name__ == "__main__":
    protocol.serve(f"{PEER} {onnxruntime.__version__}", Forward)
