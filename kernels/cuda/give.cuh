// Giving back a sequence whole.
#pragma once
#include "block.cuh"
#include "shared.cuh"

// Gives back every page of a sequence, all layers; its rows are empty then. `top`: the free stack's height, shared. One block.
__device__ inline void give_back(const Store &store, const Sharing &sharing, uint32_t seat, uint32_t *top) {
    uint32_t rows = store.layers * store.heads, lost = 0;
    for (uint32_t i = threadIdx.x; i < rows; i += blockDim.x) {
        uint32_t row = store.row(i / store.heads, seat, i % store.heads), owned = store.owned[row];
        const uint32_t *page = store.table + (size_t)row * store.max_pages;
        for (uint32_t j = 0; j < owned; j++) let_go(store, sharing, page[j], top);
        lost += store.len[row];
        store.len[row] = store.owned[row] = 0;
        store.newest[row] = store.target[row] = NONE;
    }
    lost = __reduce_add_sync(WARP, lost);
    if (lane() == 0) atomicAdd((unsigned long long *)&store.counters->live, (unsigned long long)-(long long)lost);
}
