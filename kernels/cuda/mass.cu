// The softmax mass that a span's queries put on each entry, added to the entries' scores.
//
// A warp has 32 entries of a row, their keys in registers as the rows of a matrix product, and walks the queries that
// see any of them: consecutive tokens times the query heads of the KV head, eight at a time as its columns. Warps share
// nothing, and every sum has one order.
//
// The contraction index of a matrix product may be permuted, if on both sides alike: a lane reads 16 bytes of a key or
// a query at once and feeds them as its elements of two consecutive steps, so neither goes through shared memory.
#include "codes.cuh"
#include "mma.cuh"
#include "prefill.cuh"

struct MassParams {
    Store store;
    const void *q;    // element (token, head, i) at token * q_stride + head * head_dim + i; heads 16-byte aligned
    const float *lse; // [tokens, q_heads]: natural log of the softmax sum, infinity for a query that sees nothing
    const Span *spans;
    uint32_t layer, q_heads, q_stride, span_count;
    uint32_t max_tiles; // of 128 entries in a row
    float scale, decay;
    Protect protect;
};

namespace {

constexpr int WARPS = 4, ENTRIES = 32; // of a thread block, of a warp

// A row, and the span whose queries weigh its entries.
struct Target {
    Span span;
    uint32_t head, row, len, group;
    float rate;     // log2 of decay
    uint32_t first; // token of a weight that is not zero

    __device__ Target(const MassParams &p) : span(p.spans[blockIdx.y]) {
        head = blockIdx.x % p.store.heads, row = p.store.row(p.layer, span.seat, head), len = p.store.len[row];
        group = p.q_heads / p.store.heads, rate = log2f(p.decay);
        float oldest = rate < 0.0f ? -149.0f / rate : INFINITY; // the least float is 2^-149
        first = oldest < span.len ? span.len - 1 - (uint32_t)oldest : 0;
    }
    // Of the tokens at positions begin..end those that have weight.
    __device__ uint2 tokens(uint32_t begin, uint32_t end) const {
        auto token = [&](uint32_t pos) { return min(max(pos, span.start) - span.start, span.len); };
        return make_uint2(max(token(begin), first), token(end));
    }
    // What to add to a score in powers of two: weight of the token, over the query's softmax sum.
    __device__ float bias(const MassParams &p, uint32_t token, uint32_t g) const {
        uint32_t age = span.len - 1 - token;
        float lse = p.lse[(size_t)(span.first + token) * p.q_heads + head * group + g];
        return (age == 0 ? 0.0f : age * rate) - lse * LOG2E;
    }
    __device__ size_t query(const MassParams &p, uint32_t token, uint32_t g) const {
        return (size_t)(span.first + token) * p.q_stride + (size_t)(head * group + g) * p.store.head_dim;
    }
    __device__ void update(const MassParams &p, size_t entry, float mass) const {
        p.store.score[entry] = fmaf(powf(p.decay, span.len), p.store.score[entry], mass);
    }
};

// A lane's chunks of a line of DIM 16-bit elements: every fourth one; zeros where there is none.
template <int DIM> struct Chunks {
    static constexpr int COUNT = (DIM / 8 + 3) / 4;
    uint4 at[COUNT];

    __device__ void read(const void *line, bool exists) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            uint32_t chunk = i * 4 + threadIdx.x % 4;
            bool real = exists && (DIM % 32 == 0 || chunk < DIM / 8);
            at[i] = real ? ((const uint4 *)line)[chunk] : make_uint4(0, 0, 0, 0);
        }
    }
    // Codes as bf16.
    template <typename E> __device__ void widen(const void *line, bool exists) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            uint32_t chunk = i * 4 + threadIdx.x % 4;
            bool real = exists && (DIM % 32 == 0 || chunk < DIM / 8);
            uint2 codes = real ? ((const uint2 *)line)[chunk] : make_uint2(0, 0);
            uint2 low = bf16_four<E>(codes.x), high = bf16_four<E>(codes.y);
            at[i] = make_uint4(low.x, low.y, high.x, high.y);
        }
    }
};

// One of eight queries.
template <int DIM> struct Query {
    Chunks<DIM> q;
    float bias; // minus infinity for one that has no weight
    uint32_t now;
};

// Goes through the group's queries of consecutive tokens. Of each eight, a lane reads that of index lane / 4.
struct Cursor {
    uint32_t token, g, end, group;

    __device__ Cursor(uint2 tokens, uint32_t group) : end(tokens.y), group(group) {
        uint32_t i = threadIdx.x % 32 / 4;
        token = tokens.x + i / group, g = i % group;
    }
    __device__ void step(uint32_t by_tokens, uint32_t by_heads) {
        token += by_tokens, g += by_heads;
        if (g >= group) g -= group, token++;
    }
    template <typename T, int DIM> __device__ void read(const MassParams &p, const Target &t, Query<DIM> &to) const {
        bool exists = token < end;
        to.q.read((const T *)p.q + (exists ? t.query(p, token, g) : 0), exists);
        to.bias = exists ? t.bias(p, token, g) : -INFINITY;
        to.now = t.span.start + token;
    }
};

// The entries of a warp. Of both blocks of 16 a lane has entries lane / 4 + {0, 8}: index block * 2 + {0, 1}.
template <typename E, int DIM> struct Entries {
    using T = typename Beside<E>::T;
    Chunks<DIM> k[4];
    float factor[Beside<E>::SCALED ? 4 : 1]; // of the keys
    uint32_t pos[4], end[4]; // seen by the queries at pos..end
    float mass[4];

    // Scores of eight queries. A lane has those of queries lane % 4 * 2 + {0, 1}.
    __device__ void score(const Chunks<DIM> &q, float (&s)[2][4]) const {
#pragma unroll
        for (int m = 0; m < 2; m++) {
            s[m][0] = s[m][1] = s[m][2] = s[m][3] = 0.0f;
#pragma unroll
            for (int i = 0; i < Chunks<DIM>::COUNT; i++) {
                const uint4 &x = k[2 * m].at[i], &y = k[2 * m + 1].at[i];
                mma<T>(s[m], {x.x, y.x, x.y, y.y}, q.at[i].x, q.at[i].y);
                mma<T>(s[m], {x.z, y.z, x.w, y.w}, q.at[i].z, q.at[i].w);
            }
        }
    }
    // Adds the mass of eight queries; WHOLE if each of them sees all entries.
    template <bool WHOLE> __device__ void add(const float (&s)[2][4], float bias, uint32_t now, float scale) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            int lane = (threadIdx.x % 4 * 2 + c) * 4;
            float b = __shfl_sync(~0u, bias, lane);
            uint32_t n = WHOLE ? 0 : __shfl_sync(~0u, now, lane);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float of_entry = Beside<E>::SCALED ? scale * factor[Beside<E>::SCALED ? i : 0] : scale;
                float x = exp2_fast(fmaf(s[i / 2][i % 2 * 2 + c], of_entry, b));
                mass[i] += WHOLE || (n >= pos[i] && n < end[i]) ? x : 0.0f;
            }
        }
    }
    // The mass of entry `lane`.
    __device__ float own() {
        uint32_t lane = threadIdx.x % 32;
        float own = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float x = mass[i];
            x += __shfl_xor_sync(~0u, x, 1);
            x += __shfl_xor_sync(~0u, x, 2);
            x = __shfl_sync(~0u, x, lane % 8 * 4);
            own = lane / 8 == i ? x : own;
        }
        return own;
    }
};

template <typename E, int DIM> __device__ inline void mass(const MassParams &p) {
    using T = typename Beside<E>::T;
    const Target target(p);
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t from = (blockIdx.x / p.store.heads * WARPS + threadIdx.x / 32) * ENTRIES, slot = from + lane;
    if (from >= target.len) return;
    const bool exists = slot < target.len;
    const uint32_t entry = exists ? p.store.entry(target.row, slot) : 0; // fits: 2^32 are more than any memory holds
    const uint32_t tag = p.store.tag[entry];

    Entries<E, DIM> entries;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        size_t at = __shfl_sync(~0u, entry, lane / 4 + i * 8);
        bool real = from + lane / 4 + i * 8 < target.len;
        const void *line = (const E *)p.store.k + at * DIM;
        if constexpr (Beside<E>::SCALED) {
            entries.k[i].template widen<E>(line, real);
            entries.factor[i] = real ? key_factor<E>(p.store, at) : 1.0f;
        } else {
            entries.k[i].read(line, real);
        }
        entries.mass[i] = 0.0f;
    }
    const Sight sight = sight_of(tag, exists, p.protect);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        entries.pos[i] = __shfl_sync(~0u, tag & ~MARK, lane / 4 + i * 8);
        entries.end[i] = __shfl_sync(~0u, exists ? end_of(tag, p.protect) : 0, lane / 4 + i * 8);
    }

    const uint2 tokens = target.tokens(sight.begin, sight.end);
    const uint32_t by_tokens = 8 / target.group, by_heads = 8 % target.group;
    const float scale = p.scale * LOG2E;
    Cursor cursor(tokens, target.group);
    Query<DIM> next;
    cursor.read<T>(p, target, next);
#pragma unroll 2
    for (int left = (int)(tokens.y - tokens.x) * (int)target.group; left > 0; left -= 8) {
        const Query<DIM> query = next;
        cursor.step(by_tokens, by_heads);
        cursor.read<T>(p, target, next); // while these are computed
        float s[2][4];
        entries.score(query.q, s);
        bool sees_all = query.bias == -INFINITY || (query.now >= sight.whole && query.now < sight.partial);
        if (__all_sync(~0u, sees_all)) {
            entries.template add<true>(s, query.bias, query.now, scale);
        } else {
            entries.template add<false>(s, query.bias, query.now, scale);
        }
    }
    const float sum = entries.own();
    if (exists) target.update(p, entry, sum);
}

// Any head_dim: a thread for each entry.
template <typename E> __device__ inline void mass_plain(const MassParams &p) {
    using T = typename Beside<E>::T;
    const Target target(p);
    const uint32_t slot = blockIdx.x / p.store.heads * (WARPS * ENTRIES) + threadIdx.x, dim = p.store.head_dim;
    if (slot >= target.len) return;
    const size_t entry = p.store.entry(target.row, slot);
    const uint32_t tag = p.store.tag[entry];
    const E *k = (const E *)p.store.k + entry * dim;
    const float scale = p.scale * LOG2E * key_factor<E>(p.store, entry);
    const uint2 tokens = target.tokens(tag & ~MARK, end_of(tag, p.protect));
    float sum = 0.0f;
    for (uint32_t token = tokens.x; token < tokens.y; token++) {
        for (uint32_t g = 0; g < target.group; g++) {
            const T *q = (const T *)p.q + target.query(p, token, g);
            float s = 0.0f;
            for (uint32_t i = 0; i < dim; i++) s = fmaf(to_float(q[i]), to_float(k[i]), s);
            sum += exp2f(fmaf(s, scale, target.bias(p, token, g)));
        }
    }
    target.update(p, entry, sum);
}

} // namespace

#define MASS(name, E, DIM, RESIDENT)                                                                                    \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) name##_##DIM(const MassParams p) {               \
        mass<E, DIM>(p);                                                                                                \
    }
#define MASSES(DIM, RESIDENT)                                                                                           \
    MASS(mass_f16, __half, DIM, RESIDENT)                                                                               \
    MASS(mass_bf16, __nv_bfloat16, DIM, RESIDENT)                                                                       \
    MASS(mass_fp8, Fp8, DIM, RESIDENT)                                                                                  \
    MASS(mass_int8, Int8, DIM, RESIDENT)

MASSES(64, 4)
MASSES(80, 4)
MASSES(96, 4)
MASSES(128, 3)
MASSES(256, 2)

extern "C" __global__ void __launch_bounds__(WARPS * 32) mass_f32(const MassParams p) { mass_plain<float>(p); }
extern "C" __global__ void __launch_bounds__(WARPS * 32) mass_f16(const MassParams p) { mass_plain<__half>(p); }
extern "C" __global__ void __launch_bounds__(WARPS * 32) mass_bf16(const MassParams p) { mass_plain<__nv_bfloat16>(p); }
extern "C" __global__ void __launch_bounds__(WARPS * 32) mass_fp8(const MassParams p) { mass_plain<Fp8>(p); }
extern "C" __global__ void __launch_bounds__(WARPS * 32) mass_int8(const MassParams p) { mass_plain<Int8>(p); }

struct LayerMassParams {
    Store store;
    const Span *spans;
    uint32_t layer, q_heads;
};

// The scores of a sequence's rows in one layer become their sum over the number of query heads. The rows hold the same
// positions in the same slots.
extern "C" __global__ void layer_mass(const LayerMassParams p) {
    const Store &store = p.store;
    uint32_t slot = blockIdx.x * blockDim.x + threadIdx.x, seat = p.spans[blockIdx.y].seat;
    uint32_t row = store.row(p.layer, seat, 0);
    if (slot >= store.len[row]) return;
    float sum = 0.0f;
    for (uint32_t head = 0; head < store.heads; head++) sum += store.score[store.entry(row + head, slot)];
    for (uint32_t head = 0; head < store.heads; head++) {
        store.score[store.entry(row + head, slot)] = sum / (float)p.q_heads;
    }
}
