"""ggml, the library that llama.cpp multiplies with, in an interpreter of its own, run by `bench.peers.PeerWorker`.

The libraries are those of a llama-cpp-python that was built here; they are called through ctypes. Weights can lie in
several ways ("layouts"): as in the file, or as the buffer types that llama.cpp offers for this CPU change them (REPACK
interleaves rows, AMX makes tiles). llama.cpp takes the first of those that supports a weight; here each can be timed.
"""

import ctypes
import importlib.util
import pathlib

import numpy as np

KINDS = {"q4_0": 2, "q4_k": 12}  # enum ggml_type
WEIGHTS = 1  # enum ggml_backend_buffer_usage
OVERHEAD = 16 << 20  # bytes of a context that holds the descriptions of tensors and a graph, not their data
HEADER = 512  # bytes of one description, at least
state = {}


class Params(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class Library:
    """Functions of the three libraries by name, with pointers for results unless said otherwise."""

    RESULTS = {
        "ggml_backend_buft_name": ctypes.c_char_p,
        "ggml_backend_graph_compute": ctypes.c_int,
        "ggml_row_size": ctypes.c_size_t,
        "ggml_quantize_chunk": ctypes.c_size_t,
        "ggml_backend_supports_op": ctypes.c_bool,
    }

    def __init__(self):
        folder = pathlib.Path(importlib.util.find_spec("llama_cpp").origin).parent / "lib"
        names = ("ggml-base", "ggml-cpu", "ggml")
        self.parts = [ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL) for name in names]

    def __getattr__(self, name):
        for part in self.parts:
            if hasattr(part, name):
                function = getattr(part, name)
                function.restype = self.RESULTS.get(name, ctypes.c_void_p)
                setattr(self, name, function)
                return function
        raise AttributeError(f"ggml has no {name}")


def pointer(value):
    return ctypes.c_void_p(value)


def number(value):
    return ctypes.c_int64(value)


def start(threads):
    """Loads the libraries; names the layouts of this CPU."""
    g = state["g"] = Library()
    backend = state["backend"] = pointer(g.ggml_backend_cpu_init())
    g.ggml_backend_cpu_set_n_threads(backend, threads)
    registry = pointer(g.ggml_backend_cpu_reg())
    device = pointer(g.ggml_backend_reg_dev_get(registry, ctypes.c_size_t(0)))
    found = {"CPU": g.ggml_backend_cpu_buffer_type()}
    address = g.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if address:
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
        index = 0
        while extra[index]:
            found[g.ggml_backend_buft_name(pointer(extra[index])).decode()] = extra[index]
            index += 1
    state["layouts"] = found
    return list(found)


def bytes_of(kind, file, rows, columns):
    """The weight in ggml's own format, uint8 [rows, bytes]: read as it is (q4_0), or made from fp32 (q4_k)."""
    g = state["g"]
    width = g.ggml_row_size(KINDS[kind], number(columns))
    if kind == "q4_0":
        return np.fromfile(file, dtype=np.uint8).reshape(rows, width)
    dense, made = np.fromfile(file, dtype=np.float32), np.empty((rows, width), dtype=np.uint8)
    g.ggml_quantize_chunk(KINDS[kind], pointer(dense.ctypes.data), pointer(made.ctypes.data), number(0), number(rows),
                          number(columns), None)  # fmt: skip
    return made


def context(tensors):
    return pointer(state["g"].ggml_init(Params(OVERHEAD + HEADER * tensors, None, True)))


def load(kind, layout, file, x, rows, columns, count, shift):
    """`count` matrices in memory of their own, the rows of matrix i rolled by i * shift, and the graph of products.

    Returns:
        Bytes of the weights; None where the layout is not for this kind.
    """
    unload()
    g = state["g"]
    weights = context(count)
    tensors = [pointer(g.ggml_new_tensor_2d(weights, KINDS[kind], number(columns), number(rows))) for _ in range(count)]
    data = context(2 * count + 8)
    given = pointer(g.ggml_new_tensor_2d(data, 0, number(columns), number(1)))
    held = pointer(g.ggml_backend_alloc_ctx_tensors_from_buft(weights, pointer(state["layouts"][layout])))
    g.ggml_backend_buffer_set_usage(held, WEIGHTS)
    products = [pointer(g.ggml_mul_mat(data, tensor, given)) for tensor in tensors]
    state["held"] = [held]
    state["contexts"] = [weights, data]
    moved = pointer(g.ggml_backend_alloc_ctx_tensors_from_buft(data, pointer(state["layouts"]["CPU"])))
    state["held"].append(moved)
    if not g.ggml_backend_supports_op(state["backend"], products[0]):
        unload()
        return None
    graph = pointer(g.ggml_new_graph_custom(data, ctypes.c_size_t(4 * count + 16), False))
    for product in products:
        g.ggml_build_forward_expand(graph, product)
    first = bytes_of(kind, file, rows, columns)
    for index, tensor in enumerate(tensors):
        rolled = np.ascontiguousarray(np.roll(first, index * shift, axis=0))
        g.ggml_backend_tensor_set(
            tensor, pointer(rolled.ctypes.data), ctypes.c_size_t(0), ctypes.c_size_t(rolled.nbytes)
        )
    vector = np.fromfile(x, dtype=np.float32)
    g.ggml_backend_tensor_set(given, pointer(vector.ctypes.data), ctypes.c_size_t(0), ctypes.c_size_t(vector.nbytes))
    state.update(graph=graph, products=products, rows=rows)
    return first.nbytes * count


def unload():
    g = state["g"]
    for held in state.pop("held", []):
        g.ggml_backend_buffer_free(held)
    for one in state.pop("contexts", []):
        g.ggml_free(one)


def multiply():
    """All products, one graph."""
    status = state["g"].ggml_backend_graph_compute(state["backend"], state["graph"])
    assert status == 0, f"ggml_backend_graph_compute gave {status}"


def output(index):
    """The product with one of the matrices, fp32 [rows]."""
    made = np.empty(state["rows"], dtype=np.float32)
    size = ctypes.c_size_t(made.nbytes)
    state["g"].ggml_backend_tensor_get(state["products"][index], pointer(made.ctypes.data), ctypes.c_size_t(0), size)
    return made.tolist()
