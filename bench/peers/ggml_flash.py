"""llama.cpp's flash attention on the CPU as a peer; the protocol is protocol.py's.

A graph of one node, ggml_flash_attn_ext, over f32 tensors [batch, seq, heads, dim], which is how
llama.cpp holds queries and its cache; the library is called by its C interface. It knows masks as
f16 matrices only, causal ones too: they are made before anything is timed.
"""

import ctypes
import os
import sys

import numpy as np

import protocol

PEER = "ggml"
LIBRARIES = os.path.join(sys.prefix, "build", "bin")
F32, F16 = 0, 1
# Larger than ggml_threadpool_params of any version, which the library fills.
POOL_PARAMETERS = 1 << 14
ROOM = 1 << 20
Pointer = ctypes.c_void_p


class InitParameters(ctypes.Structure):
    """ggml_init_params"""

    _fields_ = [("size", ctypes.c_size_t), ("buffer", Pointer), ("no_alloc", ctypes.c_bool)]


class Plan(ctypes.Structure):
    """ggml_cplan"""

    _fields_ = [
        ("work_size", ctypes.c_size_t),
        ("work_data", Pointer),
        ("n_threads", ctypes.c_int),
        ("threadpool", Pointer),
        ("abort_callback", Pointer),
        ("abort_callback_data", Pointer),
        ("use_ref", ctypes.c_bool),
    ]


def library(name):
    return ctypes.CDLL(os.path.join(LIBRARIES, name), mode=ctypes.RTLD_GLOBAL)


BASE = library("libggml-base.so")
CPU = library("libggml-cpu.so")


def function(library, name, result, *arguments):
    """A function of the library with its types."""
    found = getattr(library, name)
    found.restype, found.argtypes = result, arguments
    return found


INT, LONG, FLOAT = ctypes.c_int, ctypes.c_int64, ctypes.c_float
version = function(BASE, "ggml_version", ctypes.c_char_p)
init = function(BASE, "ggml_init", Pointer, InitParameters)
free = function(BASE, "ggml_free", None, Pointer)
new_tensor = function(BASE, "ggml_new_tensor_4d", Pointer, Pointer, INT, LONG, LONG, LONG, LONG)
data = function(BASE, "ggml_get_data", Pointer, Pointer)
permute = function(BASE, "ggml_permute", Pointer, Pointer, Pointer, INT, INT, INT, INT)
flash = function(
    BASE, "ggml_flash_attn_ext", Pointer, *[Pointer] * 5, FLOAT, FLOAT, FLOAT
)
new_graph = function(BASE, "ggml_new_graph", Pointer, Pointer)
expand = function(BASE, "ggml_build_forward_expand", None, Pointer, Pointer)
pool_parameters = function(BASE, "ggml_threadpool_params_init", None, Pointer, INT)
new_pool = function(CPU, "ggml_threadpool_new", Pointer, Pointer)
free_pool = function(CPU, "ggml_threadpool_free", None, Pointer)
cpu_init = function(CPU, "ggml_cpu_init", None)
plan_graph = function(CPU, "ggml_graph_plan", Plan, Pointer, INT, Pointer)
compute = function(CPU, "ggml_graph_compute", INT, Pointer, ctypes.POINTER(Plan))


class Graph:
    """One call with its inputs."""

    def __init__(self, case, inputs, pool):
        self.case = case
        sizes = sum(x.nbytes for x in inputs) + inputs[0].nbytes + 2 * case.seq_q * case.seq_k
        self.context = init(InitParameters(sizes + ROOM, None, False))
        nodes = [self.tensor(F32, x) for x in inputs]
        nodes = [permute(self.context, node, 0, 2, 1, 3) for node in nodes]
        seen = protocol.allowed(case)
        nodes.append(None if seen is None else self.mask(seen))
        self.out = flash(self.context, *nodes, case.head_dim**-0.5, 0.0, 0.0)
        self.graph = new_graph(self.context)
        expand(self.graph, self.out)
        self.plan = plan_graph(self.graph, case.threads, pool)
        self.work = ctypes.create_string_buffer(max(self.plan.work_size, 1))
        self.plan.work_data = ctypes.addressof(self.work)

    def tensor(self, kind, array):
        """A tensor with the array's numbers; its sizes go from the last axis to the first."""
        sizes = [*reversed(array.shape), *[1] * (4 - array.ndim)]
        node = new_tensor(self.context, kind, *sizes)
        ctypes.memmove(data(node), array.ctypes.data, array.nbytes)
        return node

    def mask(self, seen):
        return self.tensor(F16, np.where(seen, 0.0, -np.inf).astype(np.float16))

    def run(self):
        status = compute(self.graph, ctypes.byref(self.plan))
        if status != 0:
            raise RuntimeError(f"ggml_graph_compute gave status {status}")

    def output(self):
        shape = self.case.shapes()[0]
        pointer = ctypes.cast(data(self.out), ctypes.POINTER(FLOAT))
        return np.ctypeslib.as_array(pointer, (int(np.prod(shape)),)).reshape(shape)

    def __del__(self):
        free(self.context)


class Forward:
    """A case with its graphs and threads."""

    def __init__(self, case):
        case.needs_forward(PEER)
        case.needs_f32(PEER)
        parameters = ctypes.create_string_buffer(POOL_PARAMETERS)
        pool_parameters(parameters, case.threads)
        self.pool = new_pool(parameters)
        inputs = [np.ascontiguousarray(x) for x in case.inputs()]
        self.graphs = [Graph(case, inputs, self.pool) for _ in range(case.copies)]
        self.turn = 0
        explicit = ", explicit mask" if protocol.allowed(case) is not None else ""
        self.note = f"ggml_flash_attn_ext, f32{explicit}"

    def execute(self):
        """Runs the case once on the next input set."""
        graph = self.graphs[self.turn]
        self.turn = (self.turn + 1) % len(self.graphs)
        graph.run()
        return graph

    def arrays(self, result):
        return [result.output()]

    def __del__(self):
        self.graphs.clear()
        free_pool(self.pool)


if __name__ == "__main__":
    cpu_init()
    protocol.serve(f"{PEER} {version().decode()}", Forward)
