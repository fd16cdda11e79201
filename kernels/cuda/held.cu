// A policy's view of held entries: dense, oldest first. `order` says which slot each place of that view shows; the rest
// gathers by it, or scatters what a policy made of it back to slots.
#include "block.cuh"
#include "codes.cuh"

// Rows of one layer, listed spans outermost.
struct ListedRows {
    Store store;
    const Span *spans;
    const uint32_t *list; // [listed]
    uint32_t *order;      // [listed, heads, max_len]: slots, oldest entry first, then NONE
    uint32_t layer;
    uint32_t max_len; // no row is longer

    __device__ Span span(uint32_t listed_row) const { return spans[list[listed_row / store.heads]]; }
    __device__ uint32_t row(uint32_t listed_row) const {
        return store.row(layer, span(listed_row).seat, listed_row % store.heads);
    }
};

struct OrderParams {
    ListedRows rows;
    uint32_t *lens; // [listed, heads]: entries of each row
    uint32_t seen;  // no sequence has seen more tokens
};

struct GatherParams {
    ListedRows rows;
    const void *plane; // the store's keys or values
    float *out;        // [listed, heads, max_len, head_dim]
    const float *key_factors; // [heads, head_dim] that stored components are multiplied by; null for none
    uint32_t values;   // the plane is the values'
};

// Each [listed, heads, max_len]; null where it is not wanted.
struct LanesParams {
    ListedRows rows;
    float *positions;
    float *scores;
    float *valid;
};

struct ScatterParams {
    const uint32_t *order;
    const float *dense; // [rows, max_len], oldest entry first
    float *out;         // [rows, max_len], in slot order
    uint32_t max_len;
};

struct PositionsParams {
    Store store;
    uint32_t *out; // in slot order
    uint32_t row;
    uint32_t len; // of the row
};

namespace {

constexpr uint32_t BATCH = 4; // elements a thread has in flight

// Which positions a row holds.
struct Positions {
    uint64_t *word;   // a bit each
    uint32_t *before; // how many there are before each word
    uint32_t words;

    __device__ void clear() const {
        for (uint32_t w = threadIdx.x; w < words; w += blockDim.x) word[w] = 0;
    }

    // Adds one position a lane. Neighbours mostly share a word, and are then added at once.
    __device__ void add(uint32_t pos, bool takes_part) const {
        uint32_t *half = (uint32_t *)word;
        uint32_t bit = 1u << pos % 32;
        for (int turn = 0; turn < 2; turn++) {
            uint32_t active = __ballot_sync(WARP, takes_part);
            if (active == 0) return;
            uint32_t leader = __ffs(active) - 1, common = __shfl_sync(WARP, pos / 32, leader);
            bool same = takes_part && pos / 32 == common;
            uint32_t bits = __reduce_or_sync(WARP, same ? bit : 0);
            if (lane() == leader) atomicOr(&half[common], bits);
            takes_part = takes_part && !same;
        }
        if (takes_part) atomicOr(&half[pos / 32], bit);
    }

    // How many are older.
    __device__ uint32_t rank(uint32_t pos) const {
        return before[pos / 64] + __popcll(word[pos / 64] & ((1ull << pos % 64) - 1));
    }
};

// W elements of T as floats.
template <typename T, int W> struct alignas(sizeof(T) * W) Piece { T x[W]; };

// A thread a piece of W elements of the output.
template <typename E, int W> __device__ void gather(const GatherParams &p) {
    const ListedRows &rows = p.rows;
    const uint32_t listed = blockIdx.y, row = rows.row(listed);
    const uint32_t pieces = rows.store.head_dim / W, all = rows.max_len * pieces;
    const uint32_t *order = rows.order + (size_t)listed * rows.max_len;
    auto *plane = (const Piece<E, W> *)p.plane;
    auto *out = (Piece<float, W> *)p.out + (size_t)listed * all;
    const uint32_t first = blockIdx.x * blockDim.x * BATCH + threadIdx.x;
    uint32_t slot[BATCH];
    size_t entry[BATCH]; // any where there is none: it is read and not used
    Piece<E, W> held[BATCH];
#pragma unroll
    for (uint32_t j = 0; j < BATCH; j++) slot[j] = order[min(first + j * blockDim.x, all - 1) / pieces];
#pragma unroll
    for (uint32_t j = 0; j < BATCH; j++) {
        entry[j] = rows.store.entry(row, slot[j] == NONE ? 0 : slot[j]);
        if (slot[j] == NONE) entry[j] = 0;
    }
#pragma unroll
    for (uint32_t j = 0; j < BATCH; j++) held[j] = plane[entry[j] * pieces + (first + j * blockDim.x) % pieces];
#pragma unroll
    for (uint32_t j = 0; j < BATCH; j++) {
        uint32_t i = first + j * blockDim.x;
        if (i >= all) return;
        float factor = p.values ? value_factor<E>(rows.store, entry[j]) : key_factor<E>(rows.store, entry[j]);
        Piece<float, W> wide;
#pragma unroll
        for (int e = 0; e < W; e++) wide.x[e] = slot[j] == NONE ? 0.0f : to_float(held[j].x[e]) * factor;
        if (p.key_factors) {
            const float *own = p.key_factors + listed % rows.store.heads * rows.store.head_dim + i % pieces * W;
#pragma unroll
            for (int e = 0; e < W; e++) wide.x[e] *= own[e];
        }
        out[i] = wide;
    }
}

template <typename E> __device__ void gather_any(const GatherParams &p) {
    if (p.rows.store.head_dim % 4 == 0) gather<E, 4>(p);
    else gather<E, 1>(p);
}

} // namespace

// One block a row. Positions of a row differ, so an entry's place is the number of older positions.
extern "C" __global__ void __launch_bounds__(1024) order(const __grid_constant__ OrderParams p) {
    extern __shared__ uint64_t memory[]; // bits of the positions, then counts before each word
    const ListedRows &rows = p.rows;
    const uint32_t listed = blockIdx.x, row = rows.row(listed), len = rows.store.len[row];
    const Span span = rows.span(listed);
    const Positions held{memory, (uint32_t *)(memory + (p.seen + 63) / 64), (span.start + span.len + 63) / 64};
    uint32_t *out = rows.order + (size_t)listed * rows.max_len;
    held.clear();
    __syncthreads();
    for (uint32_t first = threadIdx.x - lane(); first < len; first += blockDim.x) {
        uint32_t slot = first + lane();
        uint32_t tag = slot < len ? rows.store.tag[rows.store.entry(row, slot)] : 0;
        held.add(tag & ~MARK, slot < len);
    }
    __syncthreads();
    count_bits(held.word, held.before, held.words);
    __syncthreads();
    for (uint32_t slot = threadIdx.x; slot < len; slot += blockDim.x) {
        out[held.rank(rows.store.tag[rows.store.entry(row, slot)] & ~MARK)] = slot;
    }
    for (uint32_t place = len + threadIdx.x; place < rows.max_len; place += blockDim.x) out[place] = NONE;
    if (threadIdx.x == 0) p.lens[listed] = len;
}

extern "C" __global__ void __launch_bounds__(256) gather_f32(const __grid_constant__ GatherParams p) {
    gather_any<float>(p);
}
extern "C" __global__ void __launch_bounds__(256) gather_f16(const __grid_constant__ GatherParams p) {
    gather_any<__half>(p);
}
extern "C" __global__ void __launch_bounds__(256) gather_bf16(const __grid_constant__ GatherParams p) {
    gather_any<__nv_bfloat16>(p);
}
extern "C" __global__ void __launch_bounds__(256) gather_fp8(const __grid_constant__ GatherParams p) {
    gather_any<Fp8>(p);
}
extern "C" __global__ void __launch_bounds__(256) gather_int8(const __grid_constant__ GatherParams p) {
    gather_any<Int8>(p);
}

// A thread an entry.
extern "C" __global__ void lanes(const __grid_constant__ LanesParams p) {
    const ListedRows &rows = p.rows;
    const uint32_t place = blockIdx.x * blockDim.x + threadIdx.x, listed = blockIdx.y;
    if (place >= rows.max_len) return;
    const size_t at = (size_t)listed * rows.max_len + place;
    const uint32_t slot = rows.order[at];
    const bool held = slot != NONE;
    const size_t entry = held ? rows.store.entry(rows.row(listed), slot) : 0;
    if (p.positions) p.positions[at] = held ? (float)(rows.store.tag[entry] & ~MARK) : 0.0f;
    if (p.scores) p.scores[at] = held ? rows.store.score[entry] : 0.0f;
    if (p.valid) p.valid[at] = held ? 1.0f : 0.0f;
}

// A thread an entry. Places that show no entry are passed over.
extern "C" __global__ void scatter(const __grid_constant__ ScatterParams p) {
    const uint32_t place = blockIdx.x * blockDim.x + threadIdx.x;
    if (place >= p.max_len) return;
    const size_t row = (size_t)blockIdx.y * p.max_len;
    const uint32_t slot = p.order[row + place];
    if (slot != NONE) p.out[row + slot] = p.dense[row + place];
}

// A thread an entry of one row.
extern "C" __global__ void positions(const __grid_constant__ PositionsParams p) {
    const uint32_t slot = blockIdx.x * blockDim.x + threadIdx.x;
    if (slot < p.len) p.out[slot] = p.store.tag[p.store.entry(p.row, slot)] & ~MARK;
}
