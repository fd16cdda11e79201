// What attention over many queries and the softmax mass share.
#pragma once
#include "store.cuh"

constexpr float LOG2E = 1.4426950408889634f;

// The queries that see an entry are those at positions pos..end: `Protect::visible` as a range.
__device__ inline uint32_t end_of(uint32_t tag, const Protect &protect) {
    uint32_t pos = tag & ~MARK;
    if (!(tag & MARK) || pos < protect.sinks) return NONE;
    return pos + min(protect.recent, MARK); // no overflow: positions are below MARK
}

// Which queries see some of a few entries, and which see all.
struct alignas(16) Sight {
    uint32_t begin, end;     // no query outside begin..end sees any
    uint32_t whole, partial; // every query at whole..partial sees all
};

// Of the entries that a warp's lanes hold; one that does not exist has `exists` false.
__device__ inline Sight sight_of(uint32_t tag, bool exists, const Protect &protect) {
    uint32_t pos = tag & ~MARK, end = exists ? end_of(tag, protect) : 0;
    return Sight{__reduce_min_sync(~0u, exists ? pos : NONE), __reduce_max_sync(~0u, end),
                 __reduce_max_sync(~0u, exists ? pos : 0), __reduce_min_sync(~0u, end)};
}
