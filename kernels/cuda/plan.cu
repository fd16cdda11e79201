// Once per step, before anything is written: where each row's new tokens go, which pages they need, and who walks which
// part of the rows in decode attention. The host knows none of the lengths.
#include "block.cuh"
#include "give.cuh"
#include "shared.cuh"
#include "work.cuh"

// What a plan must know of a layer beside the store.
struct LayerPlan {
    Ring ring;
    uint32_t sinks;
    uint32_t reuse_age; // a marked entry this old is dead and its slot is free for the next token; 0 if none was marked
};

struct PlanParams {
    Store store;
    Sharing sharing;
    const Span *spans;
    const LayerPlan *layers; // [layers]
    uint32_t span_count;
    uint32_t first_layer, layer_count;
};

namespace {

constexpr int THREADS = 1024;

// The part of a plan that the block shares. One of each per span.
struct Shared {
    unsigned long long *need; // pages
    uint32_t *base;           // index on the free stack above the span's pages
    uint32_t *taken;          // how many of them were handed out
};

struct Grower {
    const PlanParams &p;
    uint32_t rows_per_span, rows;

    __device__ explicit Grower(const PlanParams &p)
        : p(p), rows_per_span(p.layer_count * p.store.heads), rows(p.span_count * rows_per_span) {}

    __device__ uint32_t span_of(uint32_t i) const { return i / rows_per_span; }
    __device__ uint32_t layer_of(uint32_t i) const { return p.first_layer + i % rows_per_span / p.store.heads; }
    __device__ uint32_t row_of(uint32_t i) const {
        return p.store.row(layer_of(i), p.spans[span_of(i)].seat, i % p.store.heads);
    }
    // The slot of an entry that this step's token may overwrite.
    __device__ uint32_t reusable(uint32_t i, uint32_t row, uint32_t len) const {
        const Span span = p.spans[span_of(i)];
        const LayerPlan layer = p.layers[layer_of(i)];
        if (span.len != 1 || layer.reuse_age == 0 || span.start < layer.reuse_age) return NONE;
        uint32_t pos = span.start - layer.reuse_age;
        if (pos < layer.sinks) return NONE;
        uint32_t slot = layer.ring.of(p.store, span.seat, i % p.store.heads)[pos % layer.ring.size];
        bool found = slot < len && p.store.tag[p.store.entry(row, slot)] == (pos | MARK);
        return found ? slot : NONE;
    }
    // Tokens that make the row longer.
    __device__ uint32_t growth(uint32_t i, uint32_t row, uint32_t len) const {
        return p.store.target[row] < len ? 0 : p.spans[span_of(i)].len;
    }
};

// The shared page that a slot is in, other than `but`; NONE if it is the row's alone or there is no such page yet.
__device__ uint32_t shared_page(const PlanParams &p, uint32_t row, uint32_t slot, uint32_t but) {
    uint32_t index = slot >> p.store.page_shift;
    if (slot == NONE || index >= p.store.owned[row]) return NONE;
    uint32_t page = p.store.table[(size_t)row * p.store.max_pages + index];
    return page != but && p.sharing.more[page] > 0 ? page : NONE;
}

// Finds the shared pages that this step writes to: that of the first new token, since those after it are new, and that of
// the newest entry, which this step may mark. Returns how many there are.
__device__ uint32_t choose_copies(const PlanParams &p, uint32_t row) {
    uint32_t *own = p.sharing.own + 2 * row;
    own[0] = shared_page(p, row, p.store.target[row], NONE);
    own[1] = shared_page(p, row, p.store.newest[row], own[0]);
    return (own[0] != NONE) + (own[1] != NONE);
}

// Chooses the target of every row and adds up the pages each span needs.
__device__ void choose_targets(const Grower &g, const Shared &shared) {
    for (uint32_t i = threadIdx.x; i < g.rows; i += THREADS) {
        uint32_t s = g.span_of(i), row = g.row_of(i), len = g.p.store.len[row];
        uint32_t reuse = g.reusable(i, row, len);
        g.p.store.target[row] = reuse != NONE ? reuse : len;
        uint32_t copies = g.p.sharing.more ? choose_copies(g.p, row) : 0;
        if (copies > 0) atomicAdd(&shared.need[s], (unsigned long long)copies);
        if (reuse != NONE) continue;
        uint32_t pages = g.p.store.pages_for(len + g.p.spans[s].len), owned = g.p.store.owned[row];
        if (pages > g.p.store.max_pages) atomicAdd(&shared.need[s], 1ull << 40); // no pool is that large
        else if (pages > owned) atomicAdd(&shared.need[s], (unsigned long long)(pages - owned));
    }
}

__device__ uint32_t sum_over_warp(uint32_t x) { return __reduce_add_sync(WARP, x); }

// Hands out the pages of the spans first..until and counts what is written.
__device__ void grant(const Grower &g, const Shared &shared, uint32_t first, uint32_t until) {
    const Store &store = g.p.store;
    uint32_t grown = 0, written = 0;
    uint32_t begin = first * g.rows_per_span, end = until * g.rows_per_span;
    for (uint32_t from = begin; from < end; from += THREADS) {
        uint32_t i = from + threadIdx.x;
        uint32_t row = 0, owned = 0, need = 0, offset = 0;
        if (i < end && shared.base[g.span_of(i)] != NONE) {
            uint32_t s = g.span_of(i);
            row = g.row_of(i);
            uint32_t len = store.len[row], growth = g.growth(i, row, len);
            owned = store.owned[row];
            uint32_t pages = g.p.store.pages_for(len + growth);
            need = pages > owned ? pages - owned : 0;
            if (need > 0) offset = shared.base[s] - atomicAdd(&shared.taken[s], need);
            store.len[row] = len + growth;
            store.owned[row] = owned + need;
            grown += growth;
            written += g.p.spans[s].len;
        }
        // A long prefill takes many pages a row: the warp copies their ids together.
        for (uint32_t waiting = __ballot_sync(0xffffffffu, need > 0); waiting; waiting &= waiting - 1) {
            int lane = __ffs(waiting) - 1;
            uint32_t n = __shfl_sync(0xffffffffu, need, lane), top = __shfl_sync(0xffffffffu, offset, lane);
            size_t at = (size_t)__shfl_sync(0xffffffffu, row, lane) * store.max_pages +
                        __shfl_sync(0xffffffffu, owned, lane);
            for (uint32_t j = threadIdx.x % 32; j < n; j += 32) store.table[at + j] = store.free_pages[top - 1 - j];
        }
    }
    grown = sum_over_warp(grown);
    written = sum_over_warp(written);
    if (threadIdx.x % 32 == 0 && written > 0) {
        atomicAdd((unsigned long long *)&store.counters->live, (unsigned long long)grown);
        atomicAdd((unsigned long long *)&store.counters->written, (unsigned long long)written);
        atomicAdd((unsigned long long *)&store.counters->evicted, (unsigned long long)(written - grown));
    }
}

// Puts new pages in the place of the shared ones, in the rows of spans that have room.
__device__ void claim_copies(const Grower &g, const Shared &shared) {
    const Store &store = g.p.store;
    for (uint32_t i = threadIdx.x; i < 2 * g.rows; i += THREADS) {
        uint32_t s = g.span_of(i / 2), row = g.row_of(i / 2);
        uint32_t old = g.p.sharing.own[2 * row + i % 2];
        if (shared.base[s] == NONE || old == NONE) continue;
        uint32_t slot = i % 2 ? store.newest[row] : store.target[row];
        uint32_t page = store.free_pages[shared.base[s] - 1 - atomicAdd(&shared.taken[s], 1u)];
        store.table[(size_t)row * store.max_pages + (slot >> store.page_shift)] = page;
        g.p.sharing.copy(old, page);
    }
}

// Lets go of what `claim_copies` replaced, once every new page is known: both use the top of the free stack.
__device__ void let_go_of_copied(const Grower &g, uint32_t *top) {
    const Sharing &sharing = g.p.sharing;
    for (uint32_t i = threadIdx.x; i < *sharing.copy_count; i += THREADS) {
        let_go(g.p.store, sharing, sharing.copies[i].from, top);
    }
}

// Where a span ran out: the first of its tokens that finds no page if its heads share what is there evenly.
__device__ uint64_t where_it_ended(const Grower &g, uint32_t s, uint32_t available) {
    const Span span = g.p.spans[s];
    uint32_t row = g.row_of(s * g.rows_per_span), len = g.p.store.len[row];
    uint32_t pages = min(g.p.store.owned[row] + available / g.p.store.heads, g.p.store.max_pages);
    uint32_t room = pages << g.p.store.page_shift, fit = room > len ? room - len : 0;
    uint32_t position = span.start + min(fit, span.len - 1);
    return 1ull << 63 | (uint64_t)g.p.first_layer << 32 | position;
}

} // namespace

// One block. A sequence that needs more pages than there are is dropped whole and its pages serve those after it.
extern "C" __global__ void __launch_bounds__(THREADS) plan(const PlanParams p) {
    extern __shared__ unsigned long long memory[];
    Shared shared{memory, (uint32_t *)(memory + p.span_count), (uint32_t *)(memory + p.span_count) + p.span_count};
    __shared__ uint32_t available, until;
    Grower g(p);
    for (uint32_t s = threadIdx.x; s < p.span_count; s += THREADS) shared.need[s] = shared.taken[s] = 0;
    if (threadIdx.x == 0) available = p.store.counters->free;
    __syncthreads();
    choose_targets(g, shared);
    __syncthreads();
    for (uint32_t next = 0; next < p.span_count; next = until + 1) {
        __syncthreads(); // everyone has read `until`
        if (threadIdx.x == 0) {
            uint32_t s = next;
            for (; s < p.span_count; s++) {
                bool dropped = p.store.failed[p.spans[s].seat] != 0;
                if (!dropped && shared.need[s] > available) break;
                shared.base[s] = dropped ? NONE : available;
                if (!dropped) available -= (uint32_t)shared.need[s];
            }
            until = s;
        }
        __syncthreads();
        grant(g, shared, next, until);
        __syncthreads();
        if (until < p.span_count) { // this one finds no room
            if (threadIdx.x == 0) {
                p.store.failed[p.spans[until].seat] = where_it_ended(g, until, available);
                shared.base[until] = NONE;
            }
            __syncthreads();
            give_back(p.store, p.sharing, p.spans[until].seat, &available);
            __syncthreads();
        }
    }
    if (p.sharing.more) {
        if (threadIdx.x == 0) *p.sharing.copy_count = 0;
        __syncthreads();
        claim_copies(g, shared);
        __syncthreads();
        let_go_of_copied(g, &available);
        __syncthreads();
    }
    // Rows of a dropped sequence take nothing.
    for (uint32_t i = threadIdx.x; i < g.rows; i += THREADS) {
        if (shared.base[g.span_of(i)] == NONE) p.store.target[g.row_of(i)] = NONE;
    }
    if (threadIdx.x == 0) {
        p.store.counters->free = available;
        p.store.counters->least_free = min(p.store.counters->least_free, available);
    }
}

struct ClearParams {
    Store store;
};

// A new store: every page is free, every row empty.
extern "C" __global__ void clear(const ClearParams p) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, all = gridDim.x * blockDim.x;
    uint32_t rows = p.store.layers * p.store.seats * p.store.heads;
    for (uint32_t row = i; row < rows; row += all) {
        p.store.len[row] = p.store.owned[row] = 0;
        p.store.newest[row] = p.store.target[row] = NONE;
    }
    // From the top of the stack pages come in order.
    for (uint32_t page = i; page < p.store.pages; page += all) p.store.free_pages[page] = p.store.pages - 1 - page;
    for (uint32_t seat = i; seat < p.store.seats; seat += all) p.store.failed[seat] = 0;
    if (i == 0) *p.store.counters = Counters{0, 0, 0, p.store.pages, p.store.pages};
}

struct ScheduleParams {
    Store store;
    const Span *spans;
    const uint32_t *singles; // spans of one token
    RowWork *rows;           // [layers, max_rows]
    BlockWork *blocks;       // [layers, block_count]
    uint32_t single_count, max_rows, block_count;
    uint32_t first_layer;
    uint32_t tile_shift;  // log2 of the entries of a tile
    uint32_t least_tiles; // of a block that has any: fewer cost more to merge than they save
};

// One block a layer: cuts the tiles of its rows into equal runs, one for each block of the attention kernel.
extern "C" __global__ void __launch_bounds__(THREADS) schedule(const ScheduleParams p) {
    uint32_t layer = p.first_layer + blockIdx.x, rows = p.single_count * p.store.heads, all = 0;
    RowWork *out = p.rows + (size_t)layer * p.max_rows;
    for (uint32_t from = 0; from < rows; from += THREADS) {
        uint32_t i = from + threadIdx.x, tiles = 0;
        RowWork work{};
        if (i < rows) {
            Span span = p.spans[p.singles[i / p.store.heads]];
            work.row = p.store.row(layer, span.seat, i % p.store.heads);
            work.len = p.store.len[work.row];
            work.token = span.first;
            // An empty row is a tile as well: its output has to be written.
            tiles = (max(work.len, 1u) + (1u << p.tile_shift) - 1) >> p.tile_shift;
        }
        uint32_t total;
        work.first_tile = all + block_prefix(tiles, total);
        if (i < rows) out[i] = work;
        all += total;
    }
    __syncthreads(); // every row is there
    BlockWork *blocks = p.blocks + (size_t)layer * p.block_count;
    // Every block that has work has a tile at least, so that the blocks of a row are consecutive.
    uint32_t busy = min(p.block_count, (all + p.least_tiles - 1) / p.least_tiles);
    for (uint32_t b = threadIdx.x; b < p.block_count; b += THREADS) {
        if (b >= busy) {
            blocks[b] = BlockWork{};
            continue;
        }
        uint32_t first = run_start(b, all, busy), tiles = run_start(b + 1, all, busy) - first;
        uint32_t low = 0, high = rows; // the last row that begins at or before `first`
        while (high - low > 1) {
            uint32_t middle = (low + high) / 2;
            if (out[middle].first_tile <= first) low = middle;
            else high = middle;
        }
        blocks[b] = BlockWork{low, first - out[low].first_tile, tiles, all, busy, out[low]};
    }
}
