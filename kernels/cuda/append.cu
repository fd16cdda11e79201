// Writes a step's new keys and values where the plan said.
#include "codes.cuh"

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
    const float *key_factors; // [heads, head_dim]: keys are stored divided by these powers of two; null for none
    const Span *spans;
    const uint32_t *span_of; // [tokens]
    uint32_t k_stride, v_stride;
    uint32_t tokens, layer, marks;
};

struct MultiplyParams {
    const __nv_bfloat16 *q;   // element (token, head, i) at token * q_stride + head * head_dim + i
    __nv_bfloat16 *out;       // [tokens, q_heads, head_dim]
    const float *key_factors; // [heads, head_dim]
    uint32_t q_stride, width, head_dim, group;
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

// A warp stores one head of one token in 8 bits, divided by `factors` if there are any; returns the biased exponent.
template <typename E> __device__ uint32_t encode(E *to, const __nv_bfloat16 *from, uint32_t n, const float *factors) {
    auto component = [&](uint32_t i) { return factors ? to_float(from[i]) / factors[i] : to_float(from[i]); };
    float largest = 0.0f;
    for (uint32_t i = threadIdx.x % 32; i < n; i += 32) largest = fmaxf(largest, fabsf(component(i)));
    // Floats that are not negative are in the order of their bits.
    uint32_t exponent = exponent_of<E>(__uint_as_float(__reduce_max_sync(~0u, __float_as_uint(largest))));
    float divide = power(254 - exponent);
    for (uint32_t i = threadIdx.x % 32; i < n; i += 32) {
        narrow(to[i], component(i) * divide);
    }
    return exponent;
}

// Stores key and value.
template <typename E>
__device__ void put(const Store &store, size_t entry, const typename Beside<E>::T *k, const typename Beside<E>::T *v,
                    const float *key_factors) {
    E *to_k = (E *)store.k + entry * store.head_dim, *to_v = (E *)store.v + entry * store.head_dim;
    if constexpr (Beside<E>::SCALED) {
        uint32_t of_key = encode(to_k, k, store.head_dim, key_factors);
        uint32_t of_value = encode(to_v, v, store.head_dim, nullptr);
        if (threadIdx.x % 32 == 0) store.factor[entry] = of_key | of_value << 8;
    } else {
        copy(to_k, k, store.head_dim);
        copy(to_v, v, store.head_dim);
    }
}

template <typename E> __device__ void append(const AppendParams &p) {
    using T = typename Beside<E>::T;
    const Store &store = p.store;
    uint32_t i = blockIdx.x * WARPS + threadIdx.x / 32;
    if (i >= p.tokens * store.heads) return;
    uint32_t token = i / store.heads, head = i % store.heads;
    const Span span = p.spans[p.span_of[token]];
    uint32_t j = token - span.first, row = store.row(p.layer, span.seat, head), target = store.target[row];
    if (target == NONE) return; // dropped
    uint32_t slot = target + j, pos = span.start + j;
    size_t entry = store.entry(row, slot);
    put<E>(store, entry, (const T *)p.k + (size_t)token * p.k_stride + head * store.head_dim,
           (const T *)p.v + (size_t)token * p.v_stride + head * store.head_dim,
           p.key_factors ? p.key_factors + head * store.head_dim : nullptr);
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
extern "C" __global__ void __launch_bounds__(WARPS * 32) append_fp8(const AppendParams p) { append<Fp8>(p); }
extern "C" __global__ void __launch_bounds__(WARPS * 32) append_int8(const AppendParams p) { append<Int8>(p); }

// Queries for keys that were stored divided: the same products. A thread a component, exact but for overflow.
extern "C" __global__ void __launch_bounds__(256) multiply_queries(const MultiplyParams p) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
    if (i >= p.width) return;
    const float factor = p.key_factors[i / (p.head_dim * p.group) * p.head_dim + i % p.head_dim];
    const float q = to_float(p.q[(size_t)token * p.q_stride + i]);
    p.out[(size_t)token * p.width + i] = from_float<__nv_bfloat16>(q * factor);
}
