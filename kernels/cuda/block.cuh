// Sums over the threads of a block: whole warps, up to 32.
#pragma once
#include <stdint.h>

constexpr uint32_t WARP = 0xffffffffu; // every lane

__device__ inline uint32_t lane() { return threadIdx.x % 32; }
__device__ inline uint32_t warp() { return threadIdx.x / 32; }
__device__ inline uint32_t warps() { return blockDim.x / 32; }

// The sum of x over the threads before this one, and over all.
__device__ inline uint32_t block_prefix(uint32_t x, uint32_t &total) {
    __shared__ uint32_t sums[32];
    uint32_t sum = x;
    for (uint32_t d = 1; d < 32; d *= 2) {
        uint32_t other = __shfl_up_sync(WARP, sum, d);
        if (lane() >= d) sum += other;
    }
    __syncthreads(); // the sums of the call before have been read
    if (lane() == 31) sums[warp()] = sum;
    __syncthreads();
    uint32_t of_warp = lane() < warps() ? sums[lane()] : 0;
    total = __reduce_add_sync(WARP, of_warp);
    return sum - x + __reduce_add_sync(WARP, lane() < warp() ? of_warp : 0);
}

// before[w]: bits set in the words before the w-th. Returns how many there are in all.
__device__ inline uint32_t count_bits(const uint64_t *word, uint32_t *before, uint32_t words) {
    uint32_t all = 0;
    for (uint32_t from = 0; from < words; from += blockDim.x) {
        uint32_t w = from + threadIdx.x, total;
        uint32_t earlier = block_prefix(w < words ? __popcll(word[w]) : 0, total);
        if (w < words) before[w] = all + earlier;
        all += total;
    }
    return all;
}
