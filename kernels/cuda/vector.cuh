// 16-byte accesses, and sums over a warp or a block.
#pragma once
#include "store.cuh"

// Elements of 16 bytes.
template <typename T> constexpr int WIDE = 16 / sizeof(T);

template <typename T, int N> struct alignas(sizeof(T) * N) Vector {
    T at[N];
};

template <int N, typename T> __device__ inline Vector<T, N> load(const T *from) {
    return *reinterpret_cast<const Vector<T, N> *>(from);
}
template <int N, typename T> __device__ inline void store(T *to, const Vector<T, N> &x) {
    *reinterpret_cast<Vector<T, N> *>(to) = x;
}

// x as T holds it.
template <typename T> __device__ inline float rounded(float x) { return to_float(from_float<T>(x)); }

__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffff, x, lane);
    return x;
}

// For blocks of whole warps; once in a kernel.
__device__ inline float block_sum(float x) {
    __shared__ float parts[32];
    uint32_t lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    if (warps == 1) return x;
    if (lane == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(lane < warps ? parts[lane] : 0.0f);
}
