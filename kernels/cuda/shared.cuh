// Pages that rows of several sequences hold, in the same place of each row. Who writes to one copies it first.
#pragma once
#include "store.cuh"

struct PageCopy {
    uint32_t from, to;
};

// All null while no two sequences share a page.
struct Sharing {
    uint32_t *more;      // [pages]: the rows that hold a page beyond the first
    uint32_t *own;       // [rows, 2]: pages that the step's plan replaces, of the first new token and of the newest entry
    PageCopy *copies;    // [pages]: what `copy_pages` is to copy
    uint32_t *copy_count;

    __device__ void copy(uint32_t from, uint32_t to) const { copies[atomicAdd(copy_count, 1u)] = PageCopy{from, to}; }
};

// One row less holds a page; puts it on the free stack of height `top` if it was the last.
__device__ inline void let_go(const Store &store, const Sharing &sharing, uint32_t page, uint32_t *top) {
    if (sharing.more && atomicSub(&sharing.more[page], 1u) > 0) return;
    if (sharing.more) sharing.more[page] = 0; // it was 0: nobody else holds the page
    store.free_pages[atomicAdd(top, 1u)] = page;
}
