// Attention of one query a sequence over its ragged rows (split-KV flash decoding).
//
// All rows of the step lie end to end as tiles of 16 entries a warp; `schedule` cut them into equal runs, one a block, so work
// is balanced whatever the lengths and the grid never depends on them. Each of a block's warps streams 16 entries
// of every tile through its own shared-memory stages, without a barrier, for all query heads of the group at once on
// tensor cores. Where a row ends, the warps' softmax parts are merged; a row that spans blocks is finished by the block
// that comes last.
//
// A store of 8 bits is multiplied in f16: a lane's four codes of a key are its elements of both halves of a step, since the
// contraction index may be permuted if on both sides alike; of the values, even and odd components make two products.
// What an entry's key is scaled by goes to its score, what its value is scaled by into the power of two that is its weight.
#include "codes.cuh"
#include "mma.cuh"
#include "work.cuh"

struct DecodeParams {
    Store store;
    const void *q;           // element (token, head, i) at token * q_stride + head * head_dim + i
    void *y;                 // [tokens, q_heads, head_dim]
    float *lse;              // [tokens, q_heads]; may be null
    const RowWork *rows;     // of this layer
    const BlockWork *blocks; // of this layer
    float *parts;            // [group tiles, blocks, 2, PartLayout::FLOATS]
    uint32_t *arrived;       // [group tiles, rows], zero between launches
    const uint32_t *positions; // [tokens]
    uint32_t q_heads, q_stride, group, row_count;
    float scale;             // of the scores, log2(e) included
    Protect protect;
    uint32_t check_marks;    // rows may hold dead entries
};

namespace {

constexpr int KEYS = 16; // entries of a warp's part of a tile
constexpr float LN2 = 0.69314718055994531f;

template <typename E, int D> struct Shape {
    static constexpr bool SCALED = Beside<E>::SCALED;
    static constexpr int BYTES = D * sizeof(E), CHUNKS = BYTES / 16; // of a key; 16-byte pieces
    static constexpr int STAGES = (D <= 64 ? 4 : D <= 96 ? 3 : 2) * (SCALED ? 2 : 1);
    static constexpr int VALUES = KEYS * BYTES, FACTORS = 2 * VALUES; // where they begin in a stage
    static constexpr int STAGE_BYTES = FACTORS + (SCALED ? 2 * KEYS : 0);
    // Where piece c of key r lies, so that 8 keys' pieces of one column fall into different banks.
    static __device__ int place(int r, int c) {
        int swizzled = BYTES % 128 == 0 ? c ^ (r & 7) : BYTES % 128 == 64 ? c ^ ((r >> 1) & 3)
                       : BYTES % 32 == 0 ? c ^ ((r >> 2) & 1) : c;
        return (r * CHUNKS + swizzled) * 16;
    }
};

// The softmax of a part of a row: running maximum (in log2 units), sum, and unnormalised output.
// A lane holds query rows lane/4 and lane/4 + 8 and two columns of each group of eight.
template <int D> struct Part {
    float max[2], sum[2];
    float y[D / 8][4];

    __device__ void clear() {
        max[0] = max[1] = -INFINITY;
        sum[0] = sum[1] = 0.0f;
        for (int n = 0; n < D / 8; n++) y[n][0] = y[n][1] = y[n][2] = y[n][3] = 0.0f;
    }
};

// Walks the tiles of a block's run, row after row.
template <int WARPS> struct Walk {
    static constexpr int TILE = WARPS * KEYS;
    const RowWork *rows;
    RowWork work;
    uint32_t row, tile, left; // tiles left in the run, this one included

    __device__ Walk(const DecodeParams &p, const BlockWork &block)
        : rows(p.rows), work(block.work), row(block.row), tile(block.tile), left(block.tiles) {}
    __device__ uint32_t tiles() const { return (max(work.len, 1u) + TILE - 1) / TILE; }
    __device__ bool ends_row() const { return left == 1 || tile + 1 == tiles(); }
    // True if the next tile is of another row.
    __device__ bool next() {
        left--;
        if (++tile < tiles() || left == 0) return false;
        tile = 0;
        work = rows[++row];
        return true;
    }
};

// Copies a warp's entries to shared memory, several tiles ahead. Lane i knows the page of the warp's part i tiles on.
template <typename E, int D, int WARPS> struct Loader {
    using S = Shape<E, D>;
    static constexpr int TILE = WARPS * KEYS;
    const DecodeParams &p;
    Walk<WARPS> walk;
    uint32_t pages, known; // known: tile that lane 0's page is of
    uint32_t stages;       // address of the warp's stages
    int stage;

    __device__ Loader(const DecodeParams &p, const BlockWork &block, uint32_t stages)
        : p(p), walk(p, block), stages(stages), stage(0) {
        if (walk.left > 0) look_up();
    }
    __device__ uint32_t first_key() const { return walk.tile * TILE + threadIdx.x / 32 * KEYS; }
    __device__ void look_up() {
        uint32_t key = (walk.tile + threadIdx.x % 32) * TILE + threadIdx.x / 32 * KEYS;
        known = walk.tile;
        pages = key < walk.work.len
                    ? p.store.table[(size_t)walk.work.row * p.store.max_pages + (key >> p.store.page_shift)]
                    : 0;
    }
    // Enqueues the next part, or an empty group once the run is over.
    __device__ void issue() {
        if (walk.left > 0) {
            copy_part();
            bool other_row = walk.next();
            if (walk.left > 0 && (other_row || walk.tile - known == 32)) look_up();
        }
        copy_commit();
        stage = stage + 1 == S::STAGES ? 0 : stage + 1;
    }
    __device__ void copy_part() {
        uint32_t page = __shfl_sync(0xffffffffu, pages, walk.tile - known);
        uint32_t key = first_key();
        size_t entry = ((size_t)page << p.store.page_shift) + (key & ((1u << p.store.page_shift) - 1));
        const unsigned char *k = (const unsigned char *)p.store.k + entry * S::BYTES;
        const unsigned char *v = (const unsigned char *)p.store.v + entry * S::BYTES;
        uint32_t to = stages + stage * S::STAGE_BYTES;
        constexpr int PIECES = KEYS * S::CHUNKS;
#pragma unroll
        for (int i = 0; i < (PIECES + 31) / 32; i++) {
            int piece = i * 32 + threadIdx.x % 32, r = piece / S::CHUNKS, c = piece % S::CHUNKS;
            if (PIECES % 32 != 0 && piece >= PIECES) break;
            bool valid = key + r < walk.work.len;
            uint32_t at = to + S::place(r, c);
            copy_async(at, k + r * S::BYTES + c * 16, valid);
            copy_async(at + S::VALUES, v + r * S::BYTES + c * 16, valid);
        }
        if constexpr (S::SCALED) { // a page has 16 entries at least, so all of these are there
            uint32_t half = threadIdx.x % 32;
            if (half < 2) copy_async(to + S::FACTORS + half * 16, p.store.factor + entry + half * 8, key < walk.work.len);
        }
    }
};

// A pair of bf16 as f16.
__device__ inline uint32_t as_half(uint32_t pair) {
    float2 wide = __bfloat1622float2(*(__nv_bfloat162 *)&pair);
    return pack<__half>(wide.x, wide.y);
}

// The group's queries as the left operand: rows lane/4 and lane/4 + 8 of the tile.
template <typename E, int D, bool HALF>
__device__ void load_queries(const DecodeParams &p, const RowWork &work, uint32_t (&q)[D / 16][4]) {
    using T = typename Beside<E>::T;
    constexpr bool SCALED = Beside<E>::SCALED;
    constexpr int NEXT = SCALED ? 2 : 8; // a lane's second pair of a step
    int lane = threadIdx.x % 32;
    uint32_t head = work.row % p.store.heads * p.group;
    uint32_t first = blockIdx.y * 16 + lane / 4;
    const T *base = (const T *)p.q + (size_t)work.token * p.q_stride + lane % 4 * (SCALED ? 4 : 2);
    auto load = [&](uint32_t g, int i) -> uint32_t {
        uint32_t pair = g < p.group ? *(const uint32_t *)(base + (size_t)(head + g) * D + i) : 0;
        return SCALED ? as_half(pair) : pair;
    };
#pragma unroll
    for (int s = 0; s < D / 16; s++) {
        q[s][0] = load(first, s * 16);
        q[s][2] = load(first, s * 16 + NEXT);
        q[s][1] = HALF ? 0 : load(first + 8, s * 16);
        q[s][3] = HALF ? 0 : load(first + 8, s * 16 + NEXT);
    }
}

// Scores of a warp's 16 entries: of entries 8 n + 2 (lane % 4) + i % 2 for query row lane / 4 + i / 2 * 8, not scaled.
template <typename E, int D>
__device__ void score(float (&s)[2][4], uint32_t stage, const uint32_t (&q)[D / 16][4]) {
    using S = Shape<E, D>;
    int lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    if constexpr (!S::SCALED) {
#pragma unroll
        for (int step = 0; step < D / 16; step++) {
            uint32_t k[4];
            load_matrices(k, stage + S::place((matrix >> 1) * 8 + r, step * 2 + (matrix & 1)));
            mma<E>(s[0], q[step], k[0], k[1]);
            mma<E>(s[1], q[step], k[2], k[3]);
        }
    } else {
#pragma unroll
        for (int step = 0; step < D / 16; step += 2) { // two steps of 16 codes, of both groups of eight keys
            uint32_t k[4];
            load_matrices(k, stage + S::place((matrix & 1) * 8 + r, min(step + (matrix >> 1), S::CHUNKS - 1)));
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (step + i / 2 < D / 16) {
                    mma<__half>(s[i & 1], q[step + i / 2], half_pair<E>(k[i] & 0xffff), half_pair<E>(k[i] >> 16));
                }
            }
        }
#pragma unroll
        for (int n = 0; n < 2; n++) {
            uint32_t pair = load_shared(stage + S::FACTORS + (n * 8 + lane % 4 * 2) * 2);
            for (int i = 0; i < 4; i++) s[n][i] *= power(pair >> (i % 2 * 16) & 0xff);
        }
    }
}

// Adds the values of a warp's 16 entries, by weight: `weights` is the left operand.
template <typename E, int D>
__device__ void gather(float (&y)[D / 8][4], uint32_t stage, const uint32_t (&weights)[4]) {
    using S = Shape<E, D>;
    int lane = threadIdx.x % 32, matrix = lane / 8, r = lane % 8;
    uint32_t values = stage + S::VALUES;
    if constexpr (!S::SCALED) {
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            uint32_t v[4];
            load_matrices_transposed(v, values + S::place((matrix & 1) * 8 + r, n * 2 + (matrix >> 1)));
            mma<E>(y[2 * n], weights, v[0], v[1]);
            mma<E>(y[2 * n + 1], weights, v[2], v[3]);
        }
    } else {
#pragma unroll
        for (int n = 0; n < D / 16; n += 2) {
            uint32_t v[4]; // of two keys the same pair of components each
            load_matrices_transposed(v, values + S::place((matrix & 1) * 8 + r, min(n + (matrix >> 1), S::CHUNKS - 1)));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (n + i >= D / 16) break;
                uint32_t low = v[2 * i], high = v[2 * i + 1]; // keys 0 to 7, and 8 to 15
                mma<__half>(y[2 * (n + i)], weights, half_pair<E>(__byte_perm(low, 0, 0x4420)),
                            half_pair<E>(__byte_perm(high, 0, 0x4420)));
                mma<__half>(y[2 * (n + i) + 1], weights, half_pair<E>(__byte_perm(low, 0, 0x4431)),
                            half_pair<E>(__byte_perm(high, 0, 0x4431)));
            }
        }
    }
}

// Which of a lane's four entries the query sees: bit 2 n + i for entry 8 n + 2 (lane % 4) + i.
__device__ uint32_t visible_entries(const DecodeParams &p, const RowWork &work, uint32_t first_key) {
    uint32_t bits = 0;
    for (int n = 0; n < 2; n++) {
        for (int i = 0; i < 2; i++) {
            uint32_t key = first_key + n * 8 + threadIdx.x % 4 * 2 + i;
            bool seen = key < work.len;
            if (seen && p.check_marks) {
                uint32_t tag = p.store.tag[p.store.entry(work.row, key)];
                seen = p.protect.visible(tag, p.positions[work.token]);
            }
            bits |= (uint32_t)seen << (2 * n + i);
        }
    }
    return bits;
}

// One warp's 16 entries.
template <typename E, int D, bool HALF>
__device__ void attend_part(const DecodeParams &p, const RowWork &work, uint32_t first_key, uint32_t stage,
                            const uint32_t (&q)[D / 16][4], Part<D> &part) {
    using S = Shape<E, D>;
    float s[2][4] = {};
    score<E, D>(s, stage, q);
    float exponent[2][2] = {}; // of the values' factors; an entry's weight is taken times its factor
    if constexpr (S::SCALED) {
        for (int n = 0; n < 2; n++) {
            uint32_t pair = load_shared(stage + S::FACTORS + (n * 8 + threadIdx.x % 4 * 2) * 2);
            for (int i = 0; i < 2; i++) exponent[n][i] = (float)(int)(pair >> (i * 16 + 8) & 0xff) - 127.0f;
        }
    }
    if (first_key + KEYS > work.len || p.check_marks) {
        uint32_t seen = visible_entries(p, work, first_key);
        for (int n = 0; n < 2; n++)
            for (int i = 0; i < 4; i++)
                if (!(seen >> (2 * n + i % 2) & 1)) s[n][i] = -INFINITY;
    }
    uint32_t weights[4] = {0, 0, 0, 0};
#pragma unroll
    for (int half = 0; half < (HALF ? 1 : 2); half++) {
        int i = half * 2;
        float x[4], top;
        if constexpr (S::SCALED) {
            for (int j = 0; j < 4; j++) x[j] = fmaf(s[j / 2][i + j % 2], p.scale, exponent[j / 2][j % 2]);
            top = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
        } else {
            top = fmaxf(fmaxf(s[0][i], s[0][i + 1]), fmaxf(s[1][i], s[1][i + 1]));
        }
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        top = fmaxf(part.max[half], S::SCALED ? top : top * p.scale);
        float base = top == -INFINITY ? 0.0f : top; // nothing seen yet: no maximum to subtract
        float fade = exp2_fast(part.max[half] - base);
        float w[4], sum = 0.0f;
        for (int j = 0; j < 4; j++) {
            w[j] = exp2_fast(S::SCALED ? x[j] - base : s[j / 2][i + j % 2] * p.scale - base);
            sum += S::SCALED ? w[j] * exp2_fast(-exponent[j / 2][j % 2]) : w[j];
        }
        part.max[half] = top;
        part.sum[half] = part.sum[half] * fade + sum;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            part.y[n][i] *= fade;
            part.y[n][i + 1] *= fade;
        }
        using M = std::conditional_t<S::SCALED, __half, E>;
        weights[half] = pack<M>(w[0], w[1]);
        weights[half + 2] = pack<M>(w[2], w[3]);
    }
    gather<E, D>(part.y, stage, weights);
}

// A part in memory: outputs [rows][D + 8] (the padding keeps a warp's writes in different banks), then each row's maximum,
// then each row's sum.
template <int D, bool HALF> struct PartLayout {
    static constexpr int ROWS = HALF ? 8 : 16;
    static constexpr int STRIDE = D + 8;
    static constexpr int MAX = ROWS * STRIDE;
    static constexpr int SUM = MAX + ROWS;
    static constexpr int FLOATS = SUM + ROWS;
};

// Writes a warp's part to shared memory.
template <typename E, int D, bool HALF> __device__ void store_part(float *to, const Part<D> &part) {
    using Layout = PartLayout<D, HALF>;
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < (HALF ? 1 : 2); half++) {
        float sum = part.sum[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        int g = half * 8 + lane / 4;
        if (lane % 4 == 0) {
            to[Layout::MAX + g] = part.max[half];
            to[Layout::SUM + g] = sum;
        }
        float *row = to + g * Layout::STRIDE;
        if constexpr (!Beside<E>::SCALED) {
#pragma unroll
            for (int n = 0; n < D / 8; n++) {
                *(float2 *)(row + n * 8 + lane % 4 * 2) = make_float2(part.y[n][half * 2], part.y[n][half * 2 + 1]);
            }
        } else { // even and odd components were two products
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                const float *even = part.y[n] + half * 2, *odd = part.y[n + 1] + half * 2;
                *(float4 *)(row + n * 8 + lane % 4 * 4) = make_float4(even[0], odd[0], even[1], odd[1]);
            }
        }
    }
}

// Four components of a merged row.
struct Merged {
    float max = -INFINITY, sum = 0.0f;
    float4 y = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

    __device__ float base() const { return max == -INFINITY ? 0.0f : max; }
    __device__ void add(float weight, float part_sum, float4 part_y) {
        sum += weight * part_sum;
        y.x += weight * part_y.x;
        y.y += weight * part_y.y;
        y.z += weight * part_y.z;
        y.w += weight * part_y.w;
    }
};

// The warps' parts of a block.
template <int D, bool HALF, int WARPS> __device__ Merged merge_warps(const float *parts, int g, int component) {
    using Layout = PartLayout<D, HALF>;
    Merged merged;
#pragma unroll
    for (int w = 0; w < WARPS; w++) merged.max = fmaxf(merged.max, parts[w * Layout::FLOATS + Layout::MAX + g]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        const float *part = parts + w * Layout::FLOATS;
        float weight = exp2_fast(part[Layout::MAX + g] - merged.base());
        merged.add(weight, part[Layout::SUM + g], *(const float4 *)(part + g * Layout::STRIDE + component));
    }
    return merged;
}

// The blocks' parts of a row. They were written by other multiprocessors: they are read past the first-level cache,
// several at a time.
template <int D, bool HALF, typename F> __device__ Merged merge_blocks(int count, int g, int component, F part) {
    using Layout = PartLayout<D, HALF>;
    constexpr int BATCH = 8;
    Merged merged;
    for (int from = 0; from < count; from += BATCH) {
        float max[BATCH], sum[BATCH];
        float4 y[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const float *of = part(min(from + i, count - 1));
            max[i] = from + i < count ? __ldcg(of + Layout::MAX + g) : -INFINITY;
            sum[i] = __ldcg(of + Layout::SUM + g);
            y[i] = __ldcg((const float4 *)(of + g * Layout::STRIDE + component));
        }
        Merged next;
        next.max = merged.max;
#pragma unroll
        for (int i = 0; i < BATCH; i++) next.max = fmaxf(next.max, max[i]);
        next.add(exp2_fast(merged.max - next.base()), merged.sum, merged.y);
#pragma unroll
        for (int i = 0; i < BATCH; i++) next.add(exp2_fast(max[i] - next.base()), sum[i], y[i]);
        merged = next;
    }
    return merged;
}

// Tells that this block's part is written. True for the block that comes last, which then sees all the others'.
__device__ inline bool arrive(uint32_t *counter, uint32_t count, uint32_t *last) {
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t before;
        asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
        *last = before + 1 == count;
    }
    __syncthreads();
    return *last;
}

template <typename T, int D>
__device__ void write_result(const DecodeParams &p, const RowWork &work, int g, int component, const Merged &merged) {
    uint32_t head = work.row % p.store.heads * p.group + blockIdx.y * 16 + g;
    size_t at = (size_t)work.token * p.q_heads + head;
    float scale = merged.sum > 0.0f ? 1.0f / merged.sum : 0.0f;
    uint2 y = make_uint2(pack<T>(merged.y.x * scale, merged.y.y * scale), pack<T>(merged.y.z * scale, merged.y.w * scale));
    *(uint2 *)((T *)p.y + at * D + component) = y;
    if (component == 0 && p.lse) p.lse[at] = merged.sum > 0.0f ? (merged.max + log2f(merged.sum)) * LN2 : INFINITY;
}

// The end of a block's piece of a row.
template <typename E, int D, bool HALF, int WARPS>
__device__ void finish(const DecodeParams &p, const BlockWork &block, const Walk<WARPS> &walk, uint32_t first_tile,
                       const Part<D> &part, float *shared, uint32_t *last) {
    using T = typename Beside<E>::T;
    using Layout = PartLayout<D, HALF>;
    store_part<E, D, HALF>(shared + threadIdx.x / 32 * Layout::FLOATS, part);
    __syncthreads();
    const RowWork &work = walk.work;
    int rows = min(p.group - blockIdx.y * 16, (uint32_t)Layout::ROWS);
    uint32_t begin = work.first_tile, end = begin + walk.tiles();
    bool whole = first_tile == 0 && walk.tile + 1 == walk.tiles();
    // The blocks that hold a piece of this row, and where each put it: 0 for the row it began with, 1 for its last.
    uint32_t first = run_of(begin, block.all, block.busy), until = run_of(end - 1, block.all, block.busy) + 1;
    auto piece = [&](uint32_t b) {
        bool began_with_it = run_start(b, block.all, block.busy) >= begin;
        return p.parts + (((size_t)blockIdx.y * gridDim.x + b) * 2 + (began_with_it ? 0 : 1)) * Layout::FLOATS;
    };
    float *mine = piece(blockIdx.x);
    for (int i = threadIdx.x; i < rows * (D / 4); i += WARPS * 32) {
        int g = i / (D / 4), component = i % (D / 4) * 4;
        Merged merged = merge_warps<D, HALF, WARPS>(shared, g, component);
        if (whole) {
            write_result<T, D>(p, work, g, component, merged);
        } else {
            *(float4 *)(mine + g * Layout::STRIDE + component) = merged.y;
            if (component == 0) {
                mine[Layout::MAX + g] = merged.max;
                mine[Layout::SUM + g] = merged.sum;
            }
        }
    }
    if (!whole) {
        uint32_t *arrived = p.arrived + (size_t)blockIdx.y * p.row_count + walk.row;
        if (arrive(arrived, until - first, last)) {
            for (int i = threadIdx.x; i < rows * (D / 4); i += WARPS * 32) {
                int g = i / (D / 4), component = i % (D / 4) * 4;
                auto part_of = [&](int i) { return piece(first + i); };
                write_result<T, D>(p, work, g, component,
                                   merge_blocks<D, HALF>(until - first, g, component, part_of));
            }
            if (threadIdx.x == 0) *arrived = 0;
        }
    }
    __syncthreads(); // before the next row's parts overwrite these
}

template <typename E, int D, bool HALF, int WARPS> __device__ void decode(const DecodeParams &p) {
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ uint32_t last;
    using S = Shape<E, D>;
    constexpr int STAGES = S::STAGES;
    float *shared = (float *)(memory + WARPS * STAGES * S::STAGE_BYTES);
    uint32_t stages = shared_address(memory) + threadIdx.x / 32 * STAGES * S::STAGE_BYTES;
    const BlockWork block = p.blocks[blockIdx.x];
    if (block.tiles == 0) return;
    Loader<E, D, WARPS> loader(p, block, stages);
    Walk<WARPS> walk = loader.walk;
    for (int i = 0; i < STAGES - 1; i++) loader.issue();
    uint32_t q[D / 16][4];
    load_queries<E, D, HALF>(p, walk.work, q);
    Part<D> part;
    part.clear();
    uint32_t first_tile = walk.tile;
    for (int stage = 0; walk.left > 0; stage = stage + 1 == STAGES ? 0 : stage + 1) {
        copy_wait<STAGES - 2>();
        __syncwarp(); // every lane has its copies, and has read the stage that the loader fills next
        loader.issue();
        uint32_t key = walk.tile * WARPS * KEYS + threadIdx.x / 32 * KEYS;
        if (key < walk.work.len) {
            attend_part<E, D, HALF>(p, walk.work, key, stages + stage * S::STAGE_BYTES, q, part);
        }
        if (walk.ends_row()) {
            finish<E, D, HALF, WARPS>(p, block, walk, first_tile, part, shared, &last);
            part.clear();
            first_tile = 0;
        }
        if (walk.next()) load_queries<E, D, HALF>(p, walk.work, q);
    }
}

} // namespace

#define DECODE(NAME, E, D, ROWS, WARPS)                                                                                \
    extern "C" __global__ void __launch_bounds__(WARPS * 32)                                                           \
        decode_##NAME##_##D##_##ROWS##_##WARPS(const DecodeParams p) {                                                 \
        decode<E, D, ROWS == 8, WARPS>(p);                                                                             \
    }
#define DECODE_ROWS(NAME, E, D, WARPS) DECODE(NAME, E, D, 8, WARPS) DECODE(NAME, E, D, 16, WARPS)
#define DECODE_TYPES(D, WARPS)                                                                                         \
    DECODE_ROWS(bf16, __nv_bfloat16, D, WARPS) DECODE_ROWS(f16, __half, D, WARPS) DECODE_ROWS(fp8, Fp8, D, WARPS) \
    DECODE_ROWS(int8, Int8, D, WARPS)
DECODE_TYPES(64, 4)
DECODE_TYPES(80, 4)
DECODE_TYPES(96, 4)
DECODE_TYPES(128, 4)
DECODE_TYPES(256, 4)
DECODE_TYPES(64, 8)
DECODE_TYPES(80, 8)
DECODE_TYPES(96, 8)
DECODE_TYPES(128, 8)
