// Attention of spans of several tokens over their rows: flash attention on pages.
//
// A thread block takes a tile of queries, consecutive tokens times the query heads of one KV head, so that the group
// shares every key and value it reads: tile row r is query head r % group of token r / group. It walks the row by tiles
// of KEYS entries with an online softmax. The next tile is copied to shared memory while this one is computed.
//
// A kernel before it notes for each tile of entries which queries see some of it and which see all (`Sight`), so that
// tiles that no query sees cost nothing and tiles that every query sees need no mask, in whatever order entries lie.
//
// A tile of a store of 8 bits is copied as it is and widened to bf16 before it is multiplied, so that one stage of each is
// enough.
#include "codes.cuh"
#include "mma.cuh"
#include "prefill.cuh"
#include <cuda_pipeline_primitives.h>

struct PrefillParams {
    Store store;
    const void *q;      // element (token, head, i) at token * q_stride + head * head_dim + i; heads 16-byte aligned
    void *y;            // [tokens, q_heads, head_dim]
    float *lse;         // [tokens, q_heads]: natural log of the sum, infinity for a query that sees nothing; or null
    const Span *spans;
    const uint2 *tiles; // [tile_count]: span, and the tile's first token within it; started in this order
    Sight *sights;      // [span_count, heads, max_tiles]: scratch
    uint32_t layer, q_heads, q_stride, tile_count, span_count;
    uint32_t max_tiles; // of entries in a row
    float scale;
    Protect protect;
};

namespace {

// Weights are taken against a maximum that may be too small by this power of two; it is renewed only when it falls
// further behind, because the accumulators must then be scaled.
constexpr float SLACK = 8.0f;

// What is compiled in. Each warp has BLOCKS times 16 of the tile's rows; with HOLD it keeps its queries in registers.
template <typename E_, int DIM_, int WARPS_, int BLOCKS_, int KEYS_, bool HOLD_> struct Shape {
    using E = E_;
    using T = typename Beside<E>::T;
    using L = Lines<DIM_>;
    static constexpr int DIM = DIM_, WARPS = WARPS_, BLOCKS = BLOCKS_, KEYS = KEYS_;
    static constexpr bool HOLD = HOLD_;
    static constexpr int THREADS = WARPS * 32, ROWS = WARPS * BLOCKS * 16, CHUNKS = DIM / 8, PAGES = KEYS / 16;
    static constexpr bool SCALED = Beside<E>::SCALED;
    // Shared memory. Tags and page ids have two stages, and keys and values unless they are widened from codes.
    static constexpr uint32_t STAGE = KEYS * L::BYTES, STAGES = SCALED ? 1 : 2;
    static constexpr uint32_t K = ROWS * L::BYTES, V = K + STAGES * STAGE, CODES = V + STAGES * STAGE;
    static constexpr uint32_t PLANE = SCALED ? KEYS * DIM : 0; // codes of keys, then of values, then factors
    static constexpr uint32_t FACTORS = CODES + 2 * PLANE, TAGS = FACTORS + (SCALED ? KEYS * 2 : 0);
    static constexpr uint32_t IDS = TAGS + 2 * KEYS * 4, TOKENS = IDS + 2 * PAGES * 4, BYTES = TOKENS + ROWS;
};

// A tile of queries and the row it attends to.
struct Work {
    uint32_t span, head, row, len;
    uint32_t token;       // of the step: the tile's first
    uint32_t rows;        // tokens times group
    uint32_t first, last; // positions

    __device__ Work(const PrefillParams &p, uint32_t tile_rows) {
        uint2 tile = p.tiles[blockIdx.x / p.store.heads];
        span = tile.x, head = blockIdx.x % p.store.heads;
        const Span s = p.spans[span];
        uint32_t group = p.q_heads / p.store.heads, tokens = min(tile_rows / group, s.len - tile.y);
        row = p.store.row(p.layer, s.seat, head), len = p.store.len[row];
        token = s.first + tile.y, rows = tokens * group;
        first = s.start + tile.y, last = first + tokens - 1;
    }
};

// The tiles of a row's entries that some query of a tile sees, in order. All lanes of a warp step together.
struct Walk {
    const Sight *sights;
    uint32_t count, first, last;
    uint32_t from = 0, some = 0, whole = 0; // of the 32 tiles before `from`: a bit for each

    // Tile << 1 | whether all see it whole; NONE at the end.
    __device__ uint32_t next() {
        while (some == 0) {
            if (from >= count) return NONE;
            look();
        }
        uint32_t bit = __ffs(some) - 1;
        some &= some - 1;
        return (from - 32 + bit) << 1 | (whole >> bit & 1);
    }
    __device__ void look() {
        uint32_t tile = from + threadIdx.x % 32;
        Sight s{NONE, 0, NONE, 0};
        if (tile < count) s = sights[tile];
        some = __ballot_sync(~0u, last >= s.begin && first < s.end);
        whole = __ballot_sync(~0u, first >= s.whole && last < s.partial);
        from += 32;
    }
};

// Page ids of a tile of entries, one for 16: asynchronous.
template <class S> __device__ inline void copy_ids(const PrefillParams &p, const Work &work, uint32_t tile, uint32_t *ids) {
    if (threadIdx.x >= S::PAGES) return;
    uint32_t slot = tile * S::KEYS + threadIdx.x * 16;
    const uint32_t *table = p.store.table + (size_t)work.row * p.store.max_pages;
    bool exists = slot < work.len;
    __pipeline_memcpy_async(ids + threadIdx.x, table + (exists ? slot >> p.store.page_shift : 0), 4, exists ? 0 : 4);
}

// Keys, values, factors and tags of a tile of entries, zeros past the row's end: asynchronous.
template <class S>
__device__ inline void copy_entries(const PrefillParams &p, uint32_t len, uint32_t tile, const uint32_t *ids, uint32_t k,
                                    uint32_t v, uint32_t factors, uint32_t tags) {
    constexpr int CHUNKS = S::DIM * sizeof(typename S::E) / 16; // as they are stored
    constexpr int COUNT = (S::KEYS * CHUNKS + S::THREADS - 1) / S::THREADS;
    constexpr bool EVEN = S::THREADS % CHUNKS == 0; // then a thread has the same chunk of every line
    constexpr bool EXACT = S::KEYS * CHUNKS % S::THREADS == 0;
    const uint32_t shift = p.store.page_shift, low = (1u << shift) - 1, from = tile * S::KEYS, left = len - from;
    const uint32_t thread = threadIdx.x;
    // Fits: 2^32 entries would be more than any GPU's memory.
    auto entry = [&](uint32_t i) { return (ids[i / 16] << shift) + ((from + i) & low); };
    auto line = [&](int j) {
        return EVEN ? j * (S::THREADS / CHUNKS) + thread / CHUNKS : (j * S::THREADS + thread) / CHUNKS;
    };
    uint32_t entries[COUNT]; // all looked up before the first copy: the two do not mix well
#pragma unroll
    for (int j = 0; j < COUNT; j++) entries[j] = entry(EXACT ? line(j) : min(line(j), S::KEYS - 1));
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
        uint32_t i = line(j), chunk = EVEN ? thread % CHUNKS : (j * S::THREADS + thread) % CHUNKS;
        if (!EXACT && i >= S::KEYS) break;
        uint64_t at = (uint64_t)entries[j] * (CHUNKS * 16);
        uint32_t to = S::SCALED ? (i * CHUNKS + chunk) * 16 : S::L::at(i, chunk);
        copy_async(k + to, (const unsigned char *)p.store.k + chunk * 16 + at, i < left);
        copy_async(v + to, (const unsigned char *)p.store.v + chunk * 16 + at, i < left);
    }
    if constexpr (S::SCALED) {
        if (thread < S::KEYS / 8) {
            copy_async(factors + thread * 16, p.store.factor + entry(thread * 8), thread * 8 < left);
        }
    }
    if (thread < S::KEYS / 4) copy_async(tags + thread * 16, p.store.tag + entry(thread * 4), thread * 4 < left);
}

// A vector's power of two in both halves of a pair; 0 for an entry past the row's end.
__device__ inline __nv_bfloat162 pair_of(uint32_t biased) {
    uint32_t bits = biased << 7 | biased << 23;
    return *(__nv_bfloat162 *)&bits;
}

// 16 codes of a vector as bf16, in two chunks.
template <class S> __device__ inline void widen_codes(uint4 codes, uint32_t biased, unsigned char *line, uint32_t row, uint32_t chunk) {
    const __nv_bfloat162 factor = pair_of(biased);
    auto scaled = [&](uint32_t pair) {
        __nv_bfloat162 x = __hmul2(*(__nv_bfloat162 *)&pair, factor);
        return *(uint32_t *)&x;
    };
    const uint32_t four[4] = {codes.x, codes.y, codes.z, codes.w};
    uint32_t wide[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint2 pairs = bf16_four<typename S::E>(four[i]);
        wide[2 * i] = scaled(pairs.x), wide[2 * i + 1] = scaled(pairs.y);
    }
    *(uint4 *)(line + S::L::at(row, 2 * chunk)) = make_uint4(wide[0], wide[1], wide[2], wide[3]);
    *(uint4 *)(line + S::L::at(row, 2 * chunk + 1)) = make_uint4(wide[4], wide[5], wide[6], wide[7]);
}

// The tile of codes as keys and values.
template <class S> __device__ inline void widen_tile(unsigned char *memory) {
    constexpr int CHUNKS = S::DIM / 16, PIECES = S::KEYS * CHUNKS;
    const uint16_t *factors = (const uint16_t *)(memory + S::FACTORS);
    for (uint32_t j = threadIdx.x; j < PIECES; j += S::THREADS) {
        uint32_t row = j / CHUNKS, chunk = j % CHUNKS, factor = factors[row];
        const uint4 *codes = (const uint4 *)(memory + S::CODES) + j;
        widen_codes<S>(codes[0], factor & 0xff, memory + S::K, row, chunk);
        widen_codes<S>(codes[PIECES], factor >> 8, memory + S::V, row, chunk);
    }
}

// Index of tile row r in [tokens, q_heads].
__device__ inline size_t place(const PrefillParams &p, const Work &work, const uint8_t *tokens, uint32_t r, uint32_t width) {
    uint32_t group = p.q_heads / p.store.heads, token = tokens[r];
    return (size_t)(work.token + token) * width + (work.head * group + r - token * group) * p.store.head_dim;
}

template <class S>
__device__ inline void copy_queries(const PrefillParams &p, const Work &work, const uint8_t *tokens, uint32_t q) {
    for (uint32_t j = threadIdx.x; j < S::ROWS * S::CHUNKS; j += S::THREADS) {
        uint32_t r = j / S::CHUNKS, chunk = j % S::CHUNKS;
        bool exists = r < work.rows;
        size_t at = exists ? place(p, work, tokens, r, p.q_stride) + chunk * 8 : 0;
        copy_async(q + S::L::at(r, chunk), (const typename S::T *)p.q + at, exists);
    }
}

// One warp's part of the output, and the online softmax. Of each block of 16 rows a lane has rows lane / 4 + {0, 8}.
template <class S> struct Rows {
    float y[S::BLOCKS][S::DIM / 8][4];
    float top[S::BLOCKS][2]; // maximum that weights are taken against, in powers of two
    float sum[S::BLOCKS][2]; // this lane's part

    __device__ void clear() {
        for (int m = 0; m < S::BLOCKS; m++) {
            for (int n = 0; n < S::DIM / 8; n++) {
                for (int i = 0; i < 4; i++) y[m][n][i] = 0.0f;
            }
            for (int h = 0; h < 2; h++) top[m][h] = -INFINITY, sum[m][h] = 0.0f;
        }
    }
};

// A warp's queries; `address` is this lane's.
template <class S> struct Queries {
    uint32_t address, held[S::HOLD ? S::DIM / 16 : 1][S::BLOCKS][4];

    __device__ void load(uint32_t (&to)[S::BLOCKS][4], int step) const {
#pragma unroll
        for (int m = 0; m < S::BLOCKS; m++) {
            load_matrices(to[m], S::L::step(address, 2 * step) + m * 16 * S::L::BYTES);
        }
    }
    __device__ void hold() {
#pragma unroll
        for (int i = 0; i < (S::HOLD ? S::DIM / 16 : 0); i++) load(held[i], i);
    }
};

template <class S> using Scores = float[S::BLOCKS][S::KEYS / 8][4];

// Scores of a tile, not scaled; k is this lane's address.
template <class S> __device__ inline void score(Scores<S> &s, const Queries<S> &q, uint32_t k) {
#pragma unroll
    for (int m = 0; m < S::BLOCKS; m++) {
#pragma unroll
        for (int n = 0; n < S::KEYS / 8; n++) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < S::DIM / 16; i++) {
        uint32_t loaded[S::BLOCKS][4];
        if (!S::HOLD) q.load(loaded, i);
        const auto &a = S::HOLD ? q.held[S::HOLD ? i : 0] : loaded;
#pragma unroll
        for (int n = 0; n < S::KEYS / 16; n++) {
            uint32_t b[4];
            load_matrices(b, S::L::step(k, 2 * i) + n * 16 * S::L::BYTES);
#pragma unroll
            for (int m = 0; m < S::BLOCKS; m++) {
                mma<typename S::T>(s[m][2 * n], a[m], b[0], b[1]);
                mma<typename S::T>(s[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Minus infinity where a query does not see an entry; `left` entries exist from the tile's first on.
template <class S>
__device__ inline void hide(Scores<S> &s, const uint32_t *tags, uint32_t left, const uint8_t *tokens, uint32_t first,
                            const Protect &protect) {
    uint32_t lane = threadIdx.x % 32, now[S::BLOCKS][2];
#pragma unroll
    for (int i = 0; i < S::BLOCKS * 2; i++) now[i / 2][i % 2] = first + tokens[lane / 4 + i * 8];
#pragma unroll
    for (int n = 0; n < S::KEYS / 8; n++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            uint32_t i = n * 8 + lane % 4 * 2 + c, tag = tags[i], pos = tag & ~MARK;
            uint32_t end = i < left ? end_of(tag, protect) : 0;
#pragma unroll
            for (int m = 0; m < S::BLOCKS; m++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    bool seen = now[m][h] >= pos && now[m][h] < end;
                    s[m][n][2 * h + c] = seen ? s[m][n][2 * h + c] : -INFINITY;
                }
            }
        }
    }
}

// Renews the maxima, if one fell too far behind; `scale` turns scores into powers of two.
template <class S> __device__ inline void raise(Rows<S> &rows, const Scores<S> &s, float scale) {
    float best[S::BLOCKS][2];
    bool behind = false;
#pragma unroll
    for (int m = 0; m < S::BLOCKS; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float x = -INFINITY;
#pragma unroll
            for (int n = 0; n < S::KEYS / 8; n++) x = fmaxf(x, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
            best[m][h] = x * scale;
            behind |= best[m][h] > rows.top[m][h] + SLACK;
        }
    }
    if (!__any_sync(~0u, behind)) return;
#pragma unroll
    for (int m = 0; m < S::BLOCKS; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float x = fmaxf(best[m][h], rows.top[m][h]);
            x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
            x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
            float fade = x == -INFINITY ? 1.0f : exp2_fast(rows.top[m][h] - x);
            rows.top[m][h] = x;
            rows.sum[m][h] *= fade;
#pragma unroll
            for (int n = 0; n < S::DIM / 8; n++) rows.y[m][n][2 * h] *= fade, rows.y[m][n][2 * h + 1] *= fade;
        }
    }
}

// Weights of the tile, and with them the values; v is this lane's address.
template <class S> __device__ inline void gather(Rows<S> &rows, Scores<S> &s, uint32_t v, float scale) {
    float top[S::BLOCKS][2]; // of a row that has seen nothing, any number: its weights are 2^-infinity
#pragma unroll
    for (int i = 0; i < S::BLOCKS * 2; i++) top[i / 2][i % 2] = fmaxf(rows.top[i / 2][i % 2], -1e30f);
#pragma unroll
    for (int k = 0; k < S::KEYS / 16; k++) {
        uint32_t a[S::BLOCKS][4];
#pragma unroll
        for (int m = 0; m < S::BLOCKS; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int n = 2 * k + i / 2, h = i % 2;
                float x = exp2_fast(fmaf(s[m][n][2 * h], scale, -top[m][h]));
                float y = exp2_fast(fmaf(s[m][n][2 * h + 1], scale, -top[m][h]));
                rows.sum[m][h] += x + y;
                a[m][i] = pack<typename S::T>(x, y);
            }
        }
#pragma unroll
        for (int n = 0; n < S::DIM / 16; n++) {
            uint32_t b[4];
            load_matrices_transposed(b, S::L::step(v, 2 * n) + k * 16 * S::L::BYTES);
#pragma unroll
            for (int m = 0; m < S::BLOCKS; m++) {
                mma<typename S::T>(rows.y[m][2 * n], a[m], b[0], b[1]);
                mma<typename S::T>(rows.y[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Divides by the sums and leaves the warp's rows in shared memory, where its queries were.
template <class S>
__device__ inline void finish(const PrefillParams &p, const Work &work, Rows<S> &rows, const uint8_t *tokens,
                              unsigned char *q, uint32_t warp_row) {
    uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < S::BLOCKS * 2; i++) {
        int m = i / 2, h = i % 2;
        uint32_t r = warp_row + lane / 4 + i * 8;
        float sum = rows.sum[m][h];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        float divide = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
        for (int n = 0; n < S::DIM / 8; n++) {
            uint32_t pair = pack<typename S::T>(rows.y[m][n][2 * h] * divide, rows.y[m][n][2 * h + 1] * divide);
            *(uint32_t *)(q + S::L::at(r, n) + lane % 4 * 4) = pair;
        }
        if (p.lse && lane % 4 == 0 && r < work.rows) {
            uint32_t group = p.q_heads / p.store.heads, token = tokens[r];
            float lse = sum > 0.0f ? (rows.top[m][h] + log2f(sum)) / LOG2E : INFINITY;
            p.lse[(size_t)(work.token + token) * p.q_heads + work.head * group + r - token * group] = lse;
        }
    }
}

template <class S>
__device__ inline void write(const PrefillParams &p, const Work &work, const uint8_t *tokens, const unsigned char *q,
                             uint32_t warp_row) {
    constexpr uint32_t ROWS = S::BLOCKS * 16;
    for (uint32_t j = threadIdx.x % 32; j < ROWS * S::CHUNKS; j += 32) {
        uint32_t r = warp_row + j / S::CHUNKS, chunk = j % S::CHUNKS;
        if (r >= work.rows) break;
        size_t at = place(p, work, tokens, r, p.q_heads * S::DIM) + chunk * 8;
        *(uint4 *)((typename S::T *)p.y + at) = *(const uint4 *)(q + S::L::at(r, chunk));
    }
}

template <class S> __device__ inline void prefill(const PrefillParams &p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    uint32_t *tags = (uint32_t *)(memory + S::TAGS), *ids = (uint32_t *)(memory + S::IDS);
    uint8_t *tokens = memory + S::TOKENS;
    const uint32_t shared = shared_address(memory), lane = threadIdx.x % 32;
    const uint32_t warp_row = threadIdx.x / 32 * S::BLOCKS * 16;
    const Work work(p, S::ROWS);

    Walk walk{p.sights + (size_t)(work.span * p.store.heads + work.head) * p.max_tiles,
              (work.len + S::KEYS - 1) / S::KEYS, work.first, work.last};
    auto copy = [&](uint32_t tile, uint32_t stage) {
        uint32_t k = S::SCALED ? shared + S::CODES : shared + S::K + stage * S::STAGE;
        uint32_t v = S::SCALED ? k + S::PLANE : shared + S::V + stage * S::STAGE;
        copy_entries<S>(p, work.len, tile, ids + stage * S::PAGES, k, v, shared + S::FACTORS,
                        shared + S::TAGS + stage * S::KEYS * 4);
    };
    uint32_t tile = walk.next(), next = tile == NONE ? NONE : walk.next();
    if (tile != NONE) copy_ids<S>(p, work, tile >> 1, ids);
    if (next != NONE) copy_ids<S>(p, work, next >> 1, ids + S::PAGES);
    for (uint32_t r = threadIdx.x; r < S::ROWS; r += S::THREADS) {
        tokens[r] = min(r, work.rows - 1) / (p.q_heads / p.store.heads);
    }
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    copy_queries<S>(p, work, tokens, shared);
    if (tile != NONE) copy(tile >> 1, 0);
    copy_commit();

    // This lane's part of the addresses that matrices are loaded from.
    Queries<S> q{shared + S::L::at(warp_row + lane % 16, lane / 16)};
    const uint32_t k = shared + S::K + S::L::at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const uint32_t v = shared + S::V + S::L::at(lane % 16, lane / 16);
    const float scale = p.scale * LOG2E;
    Rows<S> rows;
    rows.clear();
    if (S::HOLD) {
        copy_wait<0>();
        __syncthreads();
        q.hold();
    }
    for (uint32_t stage = 0; tile != NONE; stage ^= 1) {
        copy_wait<0>();
        __syncthreads(); // the tile and the next one's page ids are there, and nobody reads the other stage any more
        if constexpr (S::SCALED) {
            widen_tile<S>(memory);
            __syncthreads(); // the codes make room for those of the next tile
        }
        const uint32_t lines = S::SCALED ? 0 : stage * S::STAGE;
        uint32_t after = next == NONE ? NONE : walk.next();
        if (next != NONE) copy(next >> 1, stage ^ 1);
        if (after != NONE) copy_ids<S>(p, work, after >> 1, ids + stage * S::PAGES);
        copy_commit();
        Scores<S> s;
        score<S>(s, q, k + lines);
        if (!(tile & 1)) {
            hide<S>(s, tags + stage * S::KEYS, work.len - (tile >> 1) * S::KEYS, tokens + warp_row, work.first, p.protect);
        }
        raise<S>(rows, s, scale);
        gather<S>(rows, s, v + lines, scale);
        tile = next, next = after;
    }
    copy_wait<0>();
    __syncthreads(); // the queries are there even if no tile was
    finish<S>(p, work, rows, tokens, memory, warp_row);
    __syncwarp();
    write<S>(p, work, tokens, memory, warp_row);
}

// A warp for each tile of KEYS entries of each row.
template <int KEYS> __device__ inline void sights(const PrefillParams &p) {
    const Span span = p.spans[blockIdx.z];
    uint32_t tile = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    uint32_t row = p.store.row(p.layer, span.seat, blockIdx.y), len = p.store.len[row];
    if (span.len < 2 || tile * KEYS >= len) return;
    Sight all{NONE, 0, 0, NONE};
    for (uint32_t i = 0; i < KEYS; i += 32) {
        uint32_t slot = tile * KEYS + i + threadIdx.x % 32;
        bool exists = slot < len;
        Sight s = sight_of(exists ? p.store.tag[p.store.entry(row, slot)] : 0, exists, p.protect);
        all = Sight{min(all.begin, s.begin), max(all.end, s.end), max(all.whole, s.whole), min(all.partial, s.partial)};
    }
    if (threadIdx.x % 32 != 0) return;
    p.sights[(size_t)(blockIdx.z * p.store.heads + blockIdx.y) * p.max_tiles + tile] = all;
}

} // namespace

extern "C" __global__ void __launch_bounds__(128) prefill_sights_64(const PrefillParams p) { sights<64>(p); }
extern "C" __global__ void __launch_bounds__(128) prefill_sights_32(const PrefillParams p) { sights<32>(p); }

// RESIDENT thread blocks share a multiprocessor; the launcher gives each SHARED bytes.
#define PREFILL(name, E, DIM, WARPS, BLOCKS, KEYS, HOLD, RESIDENT, SHARED)                                              \
    static_assert(Shape<E, DIM, WARPS, BLOCKS, KEYS, HOLD>::BYTES == SHARED, "as the launcher has it");                 \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) name##_##DIM(const PrefillParams p) {            \
        prefill<Shape<E, DIM, WARPS, BLOCKS, KEYS, HOLD>>(p);                                                           \
    }
#define PREFILLS(...) PREFILL(prefill_f16, __half, __VA_ARGS__) PREFILL(prefill_bf16, __nv_bfloat16, __VA_ARGS__)

#define PREFILL_CODES(...) PREFILL(prefill_fp8, Fp8, __VA_ARGS__) PREFILL(prefill_int8, Int8, __VA_ARGS__)

PREFILLS(64, 4, 2, 64, false, 3, 49824)
PREFILLS(80, 4, 2, 64, false, 2, 68256)
PREFILLS(96, 4, 2, 64, false, 2, 80544)
PREFILLS(128, 4, 2, 64, false, 2, 98976)
PREFILLS(256, 4, 1, 32, false, 2, 98640)
PREFILL_CODES(64, 4, 2, 64, false, 3, 41760)
PREFILL_CODES(80, 4, 2, 64, false, 2, 56096)
PREFILL_CODES(96, 4, 2, 64, false, 2, 66336)
PREFILL_CODES(128, 4, 2, 64, false, 2, 82720)
PREFILL_CODES(256, 4, 1, 32, false, 2, 82320)
