// Writes a step's new keys and values where the plan said.
#include "store.cuh"

enum Marks : uint32_t {
    NEVER = 0,
    ALWAYS = 1,
    OWN = 2,      // a bit judges its own token
    PREVIOUS = 3, // a bit judges the token before
};

struct AppendParams {
    Store store;
    Ring ring;
    const void *k, *v;       // element (token, head, i) at token * stride + head * head_dim + i
    const uint8_t *bits;     // [tokens, heads]; null unless OWN or PREVIOUS
    const float *scores;     // [tokens, heads]; null for zero
    const Span *spans;
    const uint32_t *span_of; // [tokens]
    uint32_t k_stride, v_stride;
    uint32_t tokens, layer, marks;
};

namespace {

constexpr int WARPS = 8;

// The mark of token j of a span, as its own entry carries it.
__device__ bool marked(const AppendParams &p, const Span &span, uint32_t j, uint32_t head) {
    switch (p.marks) {
    case ALWAYS: return true;
    case OWN: return p.bits[(size_t)(span.first + j) * p.store.heads + head] != 0;
    case PREVIOUS: return j + 1 < span.len && p.bits[(size_t)(span.first + j + 1) * p.store.heads + head] != 0;
    default: return false;
    }
}

// A warp copies one head of one token.
template <typename T> __device__ void copy(T *to, const T *from, uint32_t n) {
    constexpr uint32_t PER = 16 / sizeof(T);
    bool aligned = n % PER == 0 && ((uintptr_t)from | (uintptr_t)to) % 16 == 0;
    if (aligned) {
        for (uint32_t i = threadIdx.x % 32; i < n / PER; i += 32) ((uint4 *)to)[i] = ((const uint4 *)from)[i];
    } else {
        for (uint32_t i = threadIdx.x % 32; i < n; i += 32) to[i] = from[i];
    }
}

template <typename T> __device__ void append(const AppendParams &p) {
    const Store &store = p.store;
    uint32_t i = blockIdx.x * WARPS + threadIdx.x / 32;
    if (i >= p.tokens * store.heads) return;
    uint32_t token = i / store.heads, head = i % store.heads;
    const Span span = p.spans[p.span_of[token]];
    uint32_t j = token - span.first, row = store.row(p.layer, span.seat, head), target = store.target[row];
    if (target == NONE) return; // dropped
    uint32_t slot = target + j, pos = span.start + j;
    size_t entry = store.entry(row, slot);
    copy((T *)store.k + entry * store.head_dim, (const T *)p.k + (size_t)token * p.k_stride + head * store.head_dim,
         store.head_dim);
    copy((T *)store.v + entry * store.head_dim, (const T *)p.v + (size_t)token * p.v_stride + head * store.head_dim,
         store.head_dim);
    if (threadIdx.x % 32 != 0) return;
    store.tag[entry] = pos | (marked(p, span, j, head) ? MARK : 0);
    store.score[entry] = p.scores ? p.scores[(size_t)token * store.heads + head] : 0.0f;
    if (p.ring.slots && span.len - j <= p.ring.size) p.ring.of(store, span.seat, head)[pos % p.ring.size] = slot;
    if (j == 0) {
        uint32_t before = store.newest[row];
        if (p.marks == PREVIOUS && before != NONE && p.bits[(size_t)token * store.heads + head] != 0) {
            store.tag[store.entry(row, before)] |= MARK;
        }
        store.newest[row] = target + span.len - 1;
    }
}

} // namespace

extern "C" __global__ void __launch_bounds__(WARPS * 32) append_f32(const AppendParams p) { append<float>(p); }
extern "C" __global__ void __launch_bounds__(WARPS * 32) append_f16(const AppendParams p) { append<__half>(p); }
extern "C" __global__ void __launch_bounds__(WARPS * 32) append_bf16(const AppendParams p) {
    append<__nv_bfloat16>(p);
}
