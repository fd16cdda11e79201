// What `schedule` says to decode attention.
#pragma once
#include <stdint.h>

// One row of a step's decode attention.
struct RowWork {
    uint32_t first_tile; // tiles of all rows before it
    uint32_t len;        // entries
    uint32_t row;        // in the store
    uint32_t token;      // the query's index in the step
};

// What one block walks: `tiles` tiles from tile `tile` of row `row` on. `all`: tiles of all rows; `busy`: blocks that
// have any.
struct BlockWork {
    uint32_t row, tile, tiles, all, busy;
    RowWork work; // of that row
};

// The first tile of a block's run, all rows laid end to end.
__device__ inline uint32_t run_start(uint32_t block, uint32_t all, uint32_t busy) {
    return (uint32_t)((uint64_t)block * all / busy);
}
// The block whose run holds a tile.
__device__ inline uint32_t run_of(uint32_t tile, uint32_t all, uint32_t busy) {
    return (uint32_t)(((uint64_t)(tile + 1) * busy - 1) / all);
}
