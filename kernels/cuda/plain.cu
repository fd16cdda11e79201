// Attention without tensor cores: any element type, any head size, any span. What the fast kernels do not cover, and
// what they are compared with.
#include "codes.cuh"

struct PlainParams {
    Store store;
    const void *q;             // element (token, head, i) at token * q_stride + head * head_dim + i
    void *y;                   // [tokens, q_heads, head_dim]
    float *lse;                // [tokens, q_heads]; may be null
    const Span *spans;
    const uint32_t *span_of;   // [tokens]
    const uint32_t *positions; // [tokens]
    uint32_t layer, q_heads, q_stride, group;
    float scale;
    Protect protect;
};

namespace {

constexpr int THREADS = 128;

template <bool MAX> __device__ float reduce(float x, float *shared) {
    for (int d = 16; d > 0; d /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, x, d);
        x = MAX ? fmaxf(x, other) : x + other;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    float all = shared[0];
    for (int w = 1; w < THREADS / 32; w++) all = MAX ? fmaxf(all, shared[w]) : all + shared[w];
    return all;
}

// One block a query: a thread an entry for the scores, a thread a component for the output.
template <typename E> __device__ void plain(const PlainParams &p) {
    using T = typename Beside<E>::T;
    extern __shared__ float y[]; // [head_dim]
    __shared__ float weights[THREADS], shared[THREADS / 32];
    __shared__ size_t entries[THREADS];
    const Store &store = p.store;
    uint32_t token = blockIdx.x, head = blockIdx.y, d = store.head_dim;
    const Span span = p.spans[p.span_of[token]];
    uint32_t row = store.row(p.layer, span.seat, head / p.group), len = store.len[row], now = p.positions[token];
    const T *q = (const T *)p.q + (size_t)token * p.q_stride + head * d;
    float max = -INFINITY, sum = 0.0f;
    for (uint32_t i = threadIdx.x; i < d; i += THREADS) y[i] = 0.0f;
    for (uint32_t from = 0; from < len; from += THREADS) {
        uint32_t slot = from + threadIdx.x;
        float s = -INFINITY;
        if (slot < len) {
            size_t entry = store.entry(row, slot);
            entries[threadIdx.x] = entry;
            if (p.protect.visible(store.tag[entry], now)) {
                s = 0.0f;
                for (uint32_t i = 0; i < d; i++) {
                    s += to_float(q[i]) * to_float(((const E *)store.k)[entry * d + i]);
                }
                s *= p.scale * key_factor<E>(store, entry);
            }
        }
        float top = fmaxf(max, reduce<true>(s, shared));
        if (top == -INFINITY) continue; // the whole tile is invisible; the same for every thread
        float weight = expf(s - top), fade = expf(max - top);
        weights[threadIdx.x] = weight > 0.0f ? weight * value_factor<E>(store, entries[threadIdx.x]) : 0.0f;
        sum = sum * fade + reduce<false>(weight, shared);
        max = top;
        uint32_t n = min(len - from, (uint32_t)THREADS);
        for (uint32_t i = threadIdx.x; i < d; i += THREADS) {
            float component = y[i] * fade;
            for (uint32_t j = 0; j < n; j++) {
                if (weights[j] > 0.0f) component += weights[j] * to_float(((const E *)store.v)[entries[j] * d + i]);
            }
            y[i] = component;
        }
        __syncthreads();
    }
    size_t at = (size_t)token * p.q_heads + head;
    for (uint32_t i = threadIdx.x; i < d; i += THREADS) {
        ((T *)p.y)[at * d + i] = from_float<T>(sum > 0.0f ? y[i] / sum : 0.0f);
    }
    if (threadIdx.x == 0 && p.lse) p.lse[at] = sum > 0.0f ? max + logf(sum) : INFINITY;
}

} // namespace

extern "C" __global__ void __launch_bounds__(THREADS) plain_f32(const PlainParams p) { plain<float>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) plain_f16(const PlainParams p) { plain<__half>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) plain_bf16(const PlainParams p) { plain<__nv_bfloat16>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) plain_fp8(const PlainParams p) { plain<Fp8>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) plain_int8(const PlainParams p) { plain<Int8>(p); }
