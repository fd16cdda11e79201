// The paged per-head store as every kernel sees it.
//
// A row is one (layer, sequence, KV head): an unordered bag of `len` entries in slots 0..len. Slot s lives in page
// table[row][s / page_size] at offset s % page_size. Pages hold entries of one row only. A sequence has a seat: its
// index into everything that is kept per sequence.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

constexpr uint32_t NONE = 0xffffffffu;
constexpr uint32_t MARK = 0x80000000u;

struct Counters {
    uint64_t live;     // entries held
    uint64_t written;  // entries written since the store was made
    uint64_t evicted;  // entries dropped by the policy since the store was made
    uint32_t free;     // pages on the free stack
    uint32_t least_free; // the fewest there ever were
};

struct Store {
    void *k;             // [pages, page_size, head_dim]
    void *v;             // [pages, page_size, head_dim]
    uint32_t *tag;       // [pages, page_size]: position, the mark in the top bit
    float *score;        // [pages, page_size]
    uint16_t *factor;    // [pages, page_size]: see codes.cuh; null for other types
    uint32_t *len;       // [rows]: entries; rows are [layers, seats, heads]
    uint32_t *owned;     // [rows]: pages that belong to the row, at least ceil(len / page_size)
    uint32_t *newest;    // [rows]: slot of the newest entry
    uint32_t *target;    // [rows]: slot of the step's first new token; NONE for a sequence that was dropped
    uint32_t *table;     // [rows, max_pages]
    uint32_t *free_pages; // [pages]: a stack
    uint64_t *failed;    // [seats]: 0, or 1 << 63 | layer << 32 | position that found no page
    Counters *counters;
    uint32_t layers, seats, heads, head_dim;
    uint32_t page_shift; // log2 of page_size, at least 4
    uint32_t max_pages;  // of one row
    uint32_t pages;

    __device__ uint32_t row(uint32_t layer, uint32_t seat, uint32_t head) const {
        return (layer * seats + seat) * heads + head;
    }
    // Pages that so many entries of a row take.
    __device__ uint32_t pages_for(uint32_t entries) const { return (entries + (1u << page_shift) - 1) >> page_shift; }
    // Index of an entry in the planes.
    __device__ size_t entry(uint32_t row, uint32_t slot) const {
        uint32_t page = table[(size_t)row * max_pages + (slot >> page_shift)];
        return ((size_t)page << page_shift) + (slot & ((1u << page_shift) - 1));
    }
};

// Where the newest positions of each row are, for a layer whose policy marks: ring[row of the layer][pos % size].
struct Ring {
    uint32_t *slots; // [seats, heads, size]; null where nothing was ever marked
    uint32_t size;

    __device__ uint32_t *of(const Store &store, uint32_t seat, uint32_t head) const {
        return slots + (size_t)(seat * store.heads + head) * size;
    }
};

// The new tokens of one sequence in a step.
struct Span {
    uint32_t seat;
    uint32_t start; // position of the first
    uint32_t len;
    uint32_t first; // index of the first in the step's tokens
};

// Entries no rule may evict.
struct Protect {
    uint32_t sinks;
    uint32_t recent;

    __device__ bool covers(uint32_t pos, uint32_t now) const {
        return pos < sinks || pos > now || now - pos < recent;
    }
    __device__ bool dead(uint32_t tag, uint32_t now) const { return (tag & MARK) && !covers(tag & ~MARK, now); }
    __device__ bool visible(uint32_t tag, uint32_t now) const {
        return (tag & ~MARK) <= now && !dead(tag, now);
    }
};

template <typename T> __device__ inline float to_float(T x);
template <> __device__ inline float to_float(float x) { return x; }
template <> __device__ inline float to_float(__half x) { return __half2float(x); }
template <> __device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float(float x) { return x; }
template <> __device__ inline __half from_float(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }
