# FlashInfer's decode attention over the rows that `kvpolicy bench kernels --page-size 16` times: the same lengths from the
# same generator, a page of 16 entries, pages in random places, one sequence per (sequence, KV head), bf16.
#
# hot: one layer's pages again and again; cold: as many layers in turn (400 MB) as leave nothing in the cache. One launch
# each in a CUDA graph, planned before; `plan us` is the host's time for one plan.
import argparse
import importlib.util
import statistics
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np

SHAPES = [  # query heads, KV heads, head size, context, batches
    (32, 8, 64, 8192, (8, 32, 64)), (32, 8, 64, 32768, (8, 64)), (32, 8, 64, 131072, (8, 64)),
    (12, 2, 128, 8192, (8, 64)), (12, 2, 128, 32768, (8, 64)),
    (32, 8, 128, 8192, (8, 64)), (32, 8, 128, 32768, (8, 64)),
]  # fmt: skip
COMPRESSION, SIGMA, PAGE = 8, 0.5, 16


def seed_words(state):
    """The key that rand's `seed_from_u64` makes."""
    words = []
    for _ in range(8):
        state = (state * 6364136223846793005 + 11634580027462260723) % 2**64
        shifted, turn = ((state >> 18) ^ state) >> 27 & 0xFFFFFFFF, state >> 59
        words.append((shifted >> turn | shifted << (32 - turn)) & 0xFFFFFFFF)
    return words


def chacha12(key, blocks):
    """u32 [blocks, 16]: what rand's StdRng draws."""
    counter = np.arange(blocks, dtype=np.uint32)
    start = [np.full(blocks, word, np.uint32) for word in (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574, *key)]
    start += [counter, *(np.zeros(blocks, np.uint32) for _ in range(3))]
    x = [word.copy() for word in start]

    def turn(word, by):
        return word << np.uint32(by) | word >> np.uint32(32 - by)

    def quarter(a, b, c, d):
        for to, add, on, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[to] += x[add]
            x[on] = turn(x[on] ^ x[to], by)

    for _ in range(6):
        for i in range(4):
            quarter(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return np.stack([a + b for a, b in zip(x, start)], axis=1)


def lengths(n, mean):
    """Lognormal with this mean: `lengths` of cli/src/bench/ragged.rs with its seed."""
    words = chacha12(seed_words(1), -(-4 * n // 16)).reshape(-1, 2).astype(np.uint64)
    uniform = ((words[:, 0] | words[:, 1] << np.uint64(32)) >> np.uint64(11)) * 2.0**-53
    u, v = 1.0 - uniform[: 2 * n : 2], uniform[1 : 2 * n : 2]
    draws = np.exp(SIGMA * np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * np.pi * v))
    return np.maximum((draws * (mean * n / draws.sum())).astype(np.int64), 1)


def decode_wrapper():
    """The wrapper's class, without the package's `__init__`, which imports every other kernel's dependencies."""
    package = types.ModuleType("flashinfer")
    package.__path__ = list(importlib.util.find_spec("flashinfer").submodule_search_locations)
    sys.modules["flashinfer"] = package
    return importlib.import_module("flashinfer.decode").BatchDecodeWithPagedKVCacheWrapper


class Layer:
    """One layer's rows in the pages that all layers share."""

    def __init__(self, lens, pages):
        self.count = -(-lens // PAGE)
        self.tokens = int(lens.sum())
        indptr = np.concatenate([[0], np.cumsum(self.count)])
        self.indptr = torch.from_numpy(indptr.astype(np.int32))
        self.last = torch.from_numpy((lens - (self.count - 1) * PAGE).astype(np.int32))
        self.pages = pages

    def plan(self, wrapper, group, dim):
        start = time.perf_counter()
        types = dict(q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
        wrapper.plan(self.indptr, self.pages, self.last, group, 1, dim, PAGE, **types)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e6


class Kind:
    """A way FlashInfer has of decoding: on CUDA cores (`cuda`), or on tensor cores (`fa2`, `fa3`)."""

    def __init__(self, name):
        self.name = name
        self.scratch = torch.zeros(512 << 20, dtype=torch.uint8, device="cuda")
        self.wrappers = []

    def new(self):
        cores = self.name != "cuda"
        return Wrapper(self.scratch, "NHD", use_tensor_cores=cores, backend=self.name if cores else "fa2")

    def wrapper(self, i):
        while len(self.wrappers) <= i:
            self.wrappers.append(self.new())
        return self.wrappers[i]

    def compile(self, dim):
        """Plans and runs something small."""
        wrapper = self.new()
        layer = Layer(np.array([40]), torch.arange(3, dtype=torch.int32, device="cuda"))
        layer.plan(wrapper, 4, dim)
        k, v = (torch.zeros(3, PAGE, 1, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        wrapper.run(torch.zeros(1, 4, dim, dtype=torch.bfloat16, device="cuda"), (k, v))


def graph_us(launches, work, repetitions=30):
    """Median and quartiles of one of `launches` launches that are recorded as a graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for i in range(3 + repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) * 1e3 / launches for start, end in times[3:]]
    return statistics.quantiles(times, n=4)


def reference(q, k, v, layer, row):
    """Attention of one row in f32."""
    first, end = layer.indptr[row : row + 2].tolist()
    held = (end - first - 1) * PAGE + int(layer.last[row])
    keys, values = (x[layer.pages[first:end].long()].reshape(-1, x.shape[-1])[:held].float() for x in (k, v))
    scores = q[row].float() @ keys.T / q.shape[-1] ** 0.5
    return scores.softmax(-1) @ values


def measure(kinds, heads, kv, dim, context, batch):
    mean, rows, group = context / COMPRESSION, batch * kv, heads // kv
    layers = min(max(int(np.ceil(400e6 / (rows * mean * 4 * dim))), 2), 64)
    lens = lengths(layers * rows, mean).reshape(layers, rows)
    counts = (-(-lens // PAGE)).sum(1)
    ids = torch.randperm(int(counts.sum()), generator=torch.Generator().manual_seed(1)).to(torch.int32).cuda()
    cache = [torch.empty(len(ids), PAGE, 1, dim, dtype=torch.bfloat16, device="cuda").uniform_(-1, 1) for _ in range(2)]
    layers_of = [Layer(*of) for of in zip(lens, torch.split(ids, counts.tolist()))]
    q = torch.empty(rows, group, dim, dtype=torch.bfloat16, device="cuda").uniform_(-1, 1)
    out = torch.empty_like(q)
    launches = max(layers, 16)
    for kind in kinds:
        name = f"{heads}x{kv}x{dim} | {context} | {batch}"
        try:
            plans = [layer.plan(kind.wrapper(i), group, dim) for i, layer in enumerate(layers_of)]
            kind.wrapper(0).run(q, tuple(cache), out=out)
            error = max(float((out[row].float() - reference(q, *cache, layers_of[0], row)).abs().max()) for row in (0, rows - 1))
            cell = {}
            for how, period, tokens in (("hot", 1, layers_of[0].tokens), ("cold", layers, lens.sum() / layers)):
                def work():
                    for i in range(launches):
                        kind.wrapper(i % period).run(q, tuple(cache), out=out)

                low, median, high = graph_us(launches, work)
                megabytes = tokens * 4 * dim / 1e6
                cell[how] = f"{megabytes:.1f} | {median:.1f} ({low:.1f}-{high:.1f}) | {megabytes / median * 1e3:.0f}"
            print(f"| {name} | {kind.name} | {cell['hot']} | {cell['cold']} | {statistics.median(plans):.0f} | {error:.4f} |", flush=True)
        except Exception as error:  # a row that one kind cannot do leaves the others
            print(f"| {name} | {kind.name} | {type(error).__name__}: {str(error)[:200]} |", flush=True)
            torch.cuda.synchronize()


def main():
    global torch, Wrapper
    parser = argparse.ArgumentParser()
    parser.add_argument("--kinds", default="cuda,fa2", help="cuda, fa2, fa3")
    parser.add_argument("--lengths", action="store_true", help="print some lengths and stop: needs no GPU")
    args = parser.parse_args()
    if args.lengths:
        lens = lengths(1000, 1024.0)
        print(lens[:8], lens.sum(), lens[995:])
        return
    import torch

    Wrapper = decode_wrapper()
    from flashinfer.version import __version__ as version

    print(f"FlashInfer {version}, torch {torch.__version__}, {torch.cuda.get_device_name()}", flush=True)
    start = time.perf_counter()
    kinds = [Kind(name) for name in args.kinds.split(",")]
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(kind.compile, dim) for kind in kinds for dim in (64, 128)]
        [future.result() for future in done]
    torch.cuda.synchronize()
    print(f"compiled in {time.perf_counter() - start:.0f} s\n", flush=True)
    print("| heads | context | batch | kind | hot MB | hot us | GB/s | cold MB | cold us | GB/s | plan us | error |")
    print("|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for heads, kv, dim, context, batches in SHAPES:
        for batch in batches:
            measure(kinds, heads, kv, dim, context, batch)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
