// Attention of a training step whose gates are soft: what its kernels take.
//
// `sequences` sequences of `length` tokens lie end to end. Query i of a sequence scores key j <= i as
//     scale * q_i . k_j + (i - j > window ? keep_j : 0)
// The backward pass computes the weights again from `lse`; nothing of size length x length is ever in memory.
#pragma once
#include "prefill.cuh"
#include "vector.cuh"

// Gates below this are taken for it; their weight is zero either way. A score much lower would round so coarsely that
// its difference to a maximum overflows.
constexpr float LEAST_KEEP = -65536.0f;

struct Soft {
    const void *qkv;   // [tokens, q_heads + 2 kv_heads, head_dim]: queries, keys, values
    const float *keep; // [tokens, kv_heads]: log-probability that a key is kept; null for zeros
    uint32_t sequences, length, q_heads, kv_heads, head_dim;
    int32_t window;
    float scale; // positive

    __device__ uint32_t heads() const { return q_heads + 2 * kv_heads; }
    __device__ uint32_t group() const { return q_heads / kv_heads; }
};

struct SoftForward {
    Soft soft;
    void *y;    // [tokens, q_heads, head_dim]
    float *lse; // [tokens, q_heads]: natural log of the softmax sum
};

struct SoftBackward {
    Soft soft;
    const void *y, *dy; // [tokens, q_heads, head_dim]
    const float *lse;   // [tokens, q_heads]
    float2 *rows;       // [q_heads, tokens]: scratch; lse in powers of two, and the sum of dy * y
    void *dqkv;         // as qkv
    float *dkeep;       // [tokens, kv_heads]
};

// A head of one sequence: element i of token t at t * stride + i.
template <typename T> struct HeadView {
    T *at;
    uint32_t stride;

    __device__ T *token(uint32_t t) const { return at + (size_t)t * stride; }
};

template <typename T>
__device__ inline HeadView<T> head_view(T *base, const Soft &soft, uint32_t sequence, uint32_t heads, uint32_t head) {
    uint32_t stride = heads * soft.head_dim;
    return {base + (size_t)sequence * soft.length * stride + head * soft.head_dim, stride};
}

// What the backward pass knows of a query beside its vectors: 8 threads for each, which read N elements at a time.
template <typename T, int N> __device__ inline void soft_rows(const SoftBackward &p) {
    const Soft &soft = p.soft;
    const size_t tokens = (size_t)soft.sequences * soft.length;
    const size_t row = (size_t)blockIdx.x * (blockDim.x / 8) + threadIdx.x / 8;
    const bool exists = row < tokens * soft.q_heads;
    const size_t from = exists ? row * soft.head_dim : 0;
    float sum = 0.0f;
    for (uint32_t i = threadIdx.x % 8 * N; i < soft.head_dim; i += 8 * N) {
        const auto y = load<N>((const T *)p.y + from + i), dy = load<N>((const T *)p.dy + from + i);
#pragma unroll
        for (int j = 0; j < N; j++) sum = fmaf(to_float(y.at[j]), to_float(dy.at[j]), sum);
    }
    for (int lane = 4; lane > 0; lane /= 2) sum += __shfl_xor_sync(~0u, sum, lane);
    if (!exists || threadIdx.x % 8 != 0) return;
    const size_t token = row / soft.q_heads, head = row % soft.q_heads;
    p.rows[head * tokens + token] = float2{p.lse[row] * LOG2E, sum};
}
