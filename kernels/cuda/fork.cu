// Sequences that begin alike: sharing pages, and copying them where they part.
#include "block.cuh"
#include "give.cuh"
#include "shared.cuh"

struct ForkParams {
    Store store;
    Sharing sharing;
    const uint32_t *share; // [layers]: whether the fork holds the same pages, or copies
    uint32_t *missing;     // out: pages that were not there; nothing has changed then
    uint32_t from, to;     // seats
};

struct UnshareParams {
    Store store;
    Sharing sharing;
    const Span *spans;
    const uint32_t *list; // [listed]: spans
    uint32_t listed;
    uint32_t layer;
};

struct CopyPagesParams {
    Store store;
    Sharing sharing;
    uint32_t vector_bytes; // of a key
};

namespace {

constexpr int THREADS = 1024;

// Row i of all that a seat has.
__device__ uint32_t row_of(const Store &store, uint32_t i, uint32_t seat) {
    return store.row(i / store.heads, seat, i % store.heads);
}

// A warp gives a row what another holds. New pages come from the free stack below `top`.
__device__ void fork_row(const ForkParams &p, uint32_t i, uint32_t top, uint32_t *taken) {
    const Store &store = p.store;
    const uint32_t from = row_of(store, i, p.from), to = row_of(store, i, p.to), pages = store.pages_for(store.len[from]);
    const uint32_t *old = store.table + (size_t)from * store.max_pages;
    uint32_t *table = store.table + (size_t)to * store.max_pages;
    if (p.share[i / store.heads]) {
        for (uint32_t j = lane(); j < pages; j += 32) {
            table[j] = old[j];
            p.sharing.more[old[j]]++;
        }
    } else {
        uint32_t first = lane() == 0 ? atomicAdd(taken, pages) : 0;
        first = __shfl_sync(WARP, first, 0);
        for (uint32_t j = lane(); j < pages; j += 32) {
            table[j] = store.free_pages[top - 1 - first - j];
            p.sharing.copy(old[j], table[j]);
        }
    }
    if (lane() != 0) return;
    store.len[to] = store.len[from];
    store.owned[to] = pages;
    store.newest[to] = store.newest[from];
    store.target[to] = NONE;
    atomicAdd((unsigned long long *)&store.counters->live, (unsigned long long)store.len[from]);
}

// f(page) for every page of a sequence in one layer; f may replace it.
template <typename F> __device__ void each_page(const Store &store, uint32_t layer, uint32_t seat, F f) {
    for (uint32_t head = 0; head < store.heads; head++) {
        const uint32_t row = store.row(layer, seat, head), owned = store.owned[row];
        uint32_t *page = store.table + (size_t)row * store.max_pages;
        for (uint32_t j = threadIdx.x; j < owned; j += blockDim.x) f(page[j]);
    }
}

// A block copies one plane of a page.
__device__ void copy_plane(void *plane, size_t bytes, const PageCopy &copy) {
    const uint4 *from = (const uint4 *)((char *)plane + copy.from * bytes);
    uint4 *to = (uint4 *)((char *)plane + copy.to * bytes);
    for (uint32_t i = threadIdx.x; i < bytes / sizeof(uint4); i += blockDim.x) to[i] = from[i];
}

} // namespace

// One block.
extern "C" __global__ void __launch_bounds__(THREADS) fork(const __grid_constant__ ForkParams p) {
    __shared__ uint32_t taken;
    const Store &store = p.store;
    const uint32_t rows = store.layers * store.heads, available = store.counters->free;
    uint32_t pages = 0, need;
    for (uint32_t i = threadIdx.x; i < rows; i += blockDim.x) {
        if (!p.share[i / store.heads]) pages += store.pages_for(store.len[row_of(store, i, p.from)]);
    }
    block_prefix(pages, need);
    if (threadIdx.x == 0) {
        *p.missing = need > available ? need - available : 0;
        *p.sharing.copy_count = taken = 0;
    }
    __syncthreads();
    if (need > available) return;
    for (uint32_t i = warp(); i < rows; i += warps()) fork_row(p, i, available, &taken);
    if (threadIdx.x != 0) return;
    store.failed[p.to] = store.failed[p.from];
    store.counters->free = available - need;
    store.counters->least_free = min(store.counters->least_free, available - need);
}

// One block. A page that only one sequence still holds stays as it is. A sequence that needs more pages than there are is
// dropped whole.
extern "C" __global__ void __launch_bounds__(THREADS) unshare(const __grid_constant__ UnshareParams p) {
    __shared__ uint32_t available, taken;
    const Store &store = p.store;
    if (threadIdx.x == 0) {
        available = store.counters->free;
        *p.sharing.copy_count = 0;
    }
    for (uint32_t item = 0; item < p.listed; item++) {
        const Span span = p.spans[p.list[item]];
        uint32_t shared = 0, need;
        if (threadIdx.x == 0) taken = 0;
        each_page(store, p.layer, span.seat, [&](uint32_t page) { shared += p.sharing.more[page] > 0; });
        block_prefix(shared, need);
        __syncthreads();
        const uint32_t top = available;
        __syncthreads(); // everyone knows it
        if (need > top) {
            if (threadIdx.x == 0) store.failed[span.seat] = 1ull << 63 | (uint64_t)p.layer << 32 | span.start;
            give_back(store, p.sharing, span.seat, &available);
            __syncthreads();
            continue;
        }
        each_page(store, p.layer, span.seat, [&](uint32_t &page) {
            if (p.sharing.more[page] == 0) return;
            p.sharing.more[page]--; // somebody is left: it needs no `let_go`
            uint32_t copy = store.free_pages[top - 1 - atomicAdd(&taken, 1u)];
            p.sharing.copy(page, copy);
            page = copy;
        });
        __syncthreads();
        if (threadIdx.x == 0) available = top - need;
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        store.counters->free = available;
        store.counters->least_free = min(store.counters->least_free, available);
    }
}

// A block a page and turn.
extern "C" __global__ void __launch_bounds__(256) copy_pages(const __grid_constant__ CopyPagesParams p) {
    const Store &store = p.store;
    const size_t entries = 1u << store.page_shift;
    const uint32_t count = *p.sharing.copy_count;
    for (uint32_t i = blockIdx.x; i < count; i += gridDim.x) {
        const PageCopy copy = p.sharing.copies[i];
        copy_plane(store.k, entries * p.vector_bytes, copy);
        copy_plane(store.v, entries * p.vector_bytes, copy);
        copy_plane(store.tag, entries * sizeof(uint32_t), copy);
        copy_plane(store.score, entries * sizeof(float), copy);
        if (store.factor) copy_plane(store.factor, entries * sizeof(uint16_t), copy);
    }
}
