// Dropping entries: which ones go, packing what stays, giving pages back.
//
// Every entry has a rank: DEAD if it is marked and no longer protected, SAFE if it is protected, in between by score
// and then by position. What ranks below its row's cut goes. Each pass over a row ranks its entries anew from tag and
// score: they lie in L1 for a row of the usual length, in L2 for a long one.
//
// Dropped entries below the new length are holes, kept ones above it are movers; the k-th hole takes the k-th mover. So
// few entries move, and where they go depends on no timing.
#include "block.cuh"
#include "shared.cuh"

// A budget that the heads of a sequence share.
struct PooledBudget {
    uint32_t total; // entries over all heads; NONE if this span's budget is not pooled
    uint32_t floor; // entries each head is sure of
};

struct TrimParams {
    Store store;
    Ring ring; // of the layer
    Protect protect;
    const Span *spans;
    const uint32_t *list;       // [listed]: the spans to work on
    const uint32_t *keep;       // [listed, heads]: entries a row may hold, NONE for any number; null to expire only
    const PooledBudget *pooled; // [listed]
    uint64_t *cuts;             // [listed, heads]: what `share` decided for `settle`; null if no budget is pooled
    const float *scores;        // [listed, heads, max_len], in slot order; null for the carried ones
    uint32_t layer;
    uint32_t max_len;      // no row is longer
    uint32_t vector_bytes; // of a key
};

namespace {

constexpr uint64_t DEAD = 0;
constexpr uint64_t ALIVE = 1; // as a cut: only the dead go
constexpr uint64_t SAFE = ~0ull;
constexpr uint64_t UNDECIDED = 0; // as a cut: not a matter for `share`
constexpr uint32_t FEW = 8;       // up to this many of the lowest are found one by one
constexpr uint32_t BATCH = 4;     // entries a thread has in flight
constexpr uint32_t CHUNK = 32 * BATCH;
constexpr uint32_t DIGIT = 11, BINS = 1u << DIGIT;

__device__ uint32_t block_sum(uint32_t x) {
    uint32_t total;
    block_prefix(x, total);
    return total;
}

__device__ uint64_t warp_min(uint64_t x) {
    uint32_t high = __reduce_min_sync(WARP, (uint32_t)(x >> 32));
    uint32_t low = __reduce_min_sync(WARP, (uint32_t)(x >> 32) == high ? (uint32_t)x : 0xffffffffu);
    return (uint64_t)high << 32 | low;
}

__device__ uint64_t block_min(uint64_t x) {
    __shared__ uint64_t least[32];
    x = warp_min(x);
    __syncthreads(); // those of the call before have been read
    if (lane() == 0) least[warp()] = x;
    __syncthreads();
    return warp_min(lane() < warps() ? least[lane()] : SAFE);
}

// A row as a trim sees it.
struct Row {
    uint32_t index;  // in the store
    uint32_t listed; // among the listed rows
    uint32_t len;
    uint32_t end;   // chunks of this row and of those before it
    uint32_t count; // what `count` found
    // Of a row that shares a budget:
    uint32_t spare; // live entries beyond its floor
    uint32_t taken; // how many rank below its cut
    uint32_t open;  // whether its cut may still change
    uint64_t cut;
};
static_assert(sizeof(Row) == 40, "the launcher of `share` says how much memory its rows take");

// Numbers the chunks of the open rows, so that a block walks them as one.
__device__ void number_chunks(Row *row, uint32_t rows) {
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t end = 0;
        for (uint32_t i = 0; i < rows; i++) {
            if (row[i].open) end += (row[i].len + CHUNK - 1) / CHUNK;
            row[i].end = end;
        }
    }
    __syncthreads();
}

// Rows first..last of a sequence in the layer.
struct Rows {
    const TrimParams &p;
    Row *row; // shared
    uint32_t first, last;
    uint32_t now;
    uint32_t head; // of row 0
    uint32_t seat;
    bool scored; // without, every entry that is not dead is safe

    // `heads` heads of the listed span `item`, from `head` on.
    __device__ Rows(const TrimParams &p, Row *row, uint32_t item, uint32_t head, uint32_t heads)
        : p(p), row(row), first(0), last(heads), head(head), scored(true) {
        const Span span = p.spans[p.list[item]];
        now = span.start + span.len - 1;
        seat = span.seat;
        for (uint32_t i = threadIdx.x; i < heads; i += blockDim.x) {
            uint32_t index = p.store.row(p.layer, seat, head + i), listed = item * p.store.heads + head + i;
            row[i] = Row{index, listed, p.store.len[index], 0, 0, 0, 0, 1, ALIVE};
        }
        number_chunks(row, heads);
    }

    __device__ Rows only(uint32_t i) const {
        Rows one = *this;
        one.first = i;
        one.last = i + 1;
        return one;
    }

    __device__ uint32_t begin(uint32_t i) const { return i ? row[i - 1].end : 0; }

    __device__ uint64_t rank(uint32_t tag, float score) const {
        uint32_t pos = tag & ~MARK;
        if (p.protect.covers(pos, now)) return SAFE;
        if (tag & MARK) return DEAD;
        if (!scored) return SAFE;
        // Bits that order as the scores do, NaN by its sign beyond the infinities; -0 ties with 0.
        uint32_t bits = __float_as_uint(score);
        if (bits == 0x80000000u) bits = 0;
        bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
        return ((uint64_t)bits << 31 | pos) + ALIVE;
    }

    // Ranks of slots slot, slot + 32 and so on; SAFE beyond the end.
    __device__ void ranks(const Row &r, uint32_t slot, uint64_t (&out)[BATCH]) const {
        size_t at[BATCH];
        uint32_t tag[BATCH];
        float score[BATCH] = {};
        const float *dense = p.scores ? p.scores + (size_t)r.listed * p.max_len : nullptr;
#pragma unroll
        for (uint32_t i = 0; i < BATCH; i++) at[i] = p.store.entry(r.index, min(slot + 32 * i, r.len - 1));
#pragma unroll
        for (uint32_t i = 0; i < BATCH; i++) {
            tag[i] = p.store.tag[at[i]];
            if (scored) score[i] = dense ? dense[min(slot + 32 * i, r.len - 1)] : p.store.score[at[i]];
        }
#pragma unroll
        for (uint32_t i = 0; i < BATCH; i++) out[i] = slot + 32 * i < r.len ? rank(tag[i], score[i]) : SAFE;
    }

    // f(row, slot, rank) for every entry and for some slots past the end of each row, which are SAFE. The lanes of a
    // warp have consecutive slots of one row.
    template <typename F> __device__ void each(F f) const {
        uint32_t i = first;
        for (uint32_t chunk = begin(first) + warp(); chunk < row[last - 1].end; chunk += warps()) {
            while (chunk >= row[i].end) i++;
            uint32_t slot = (chunk - begin(i)) * CHUNK + lane();
            uint64_t rank[BATCH];
            ranks(row[i], slot, rank);
#pragma unroll
            for (uint32_t j = 0; j < BATCH; j++) f(i, slot + 32 * j, rank[j]);
        }
    }

    // Counts in each row the entries whose rank satisfies `which`.
    template <typename F> __device__ void count(F which) const {
        __syncthreads();
        for (uint32_t i = first + threadIdx.x; i < last; i += blockDim.x) row[i].count = 0;
        __syncthreads();
        each([&](uint32_t i, uint32_t, uint64_t rank) {
            uint32_t n = __popc(__ballot_sync(WARP, which(rank)));
            if (lane() == 0 && n) atomicAdd(&row[i].count, n);
        });
        __syncthreads();
    }
};

// Candidates that rank below `below` go, and `ties` of those that rank as it does: rows of one sequence may tie.
struct Cut {
    uint64_t below;
    uint32_t ties;
};

// The cut that takes the n lowest candidates: one after the other.
__device__ Cut cut_by_minima(const Rows &rows, uint32_t n) {
    uint64_t last = DEAD;
    for (;;) {
        uint64_t least = SAFE;
        uint32_t times = 0;
        rows.each([&](uint32_t, uint32_t, uint64_t rank) {
            if (rank <= last || rank > least) return;
            times = rank == least ? times + 1 : 1;
            least = rank;
        });
        last = block_min(least);
        if (last == SAFE) return {SAFE, 0}; // there are no more
        times = block_sum(least == last ? times : 0);
        if (n == times) return {last + 1, 0};
        if (n < times) return {last, n};
        n -= times;
    }
}

// bins[digit] += 1 for the lanes that take part. Most of a warp often shares a digit: it is added at once.
__device__ void tally(uint32_t *bins, uint32_t digit, bool takes_part) {
    uint32_t active = __ballot_sync(WARP, takes_part);
    if (active == 0) return;
    uint32_t leader = __ffs(active) - 1, common = __shfl_sync(WARP, digit, leader);
    uint32_t same = __ballot_sync(WARP, takes_part && digit == common);
    if (lane() == leader) {
        atomicAdd(&bins[common], __popc(same));
    } else if (takes_part && digit != common) {
        atomicAdd(&bins[digit], 1u);
    }
}

struct Bin {
    uint32_t digit;
    uint32_t count; // what is in it
    uint32_t place; // of the sought one in it, from 1
};

// The bin of the n-th lowest; its count is 0 if there are fewer than n.
__device__ Bin find_bin(const uint32_t *bins, uint32_t n) {
    __shared__ Bin found;
    uint32_t per = BINS / blockDim.x, first = threadIdx.x * per, sum = 0, total;
    for (uint32_t i = 0; i < per; i++) sum += bins[first + i];
    uint32_t before = block_prefix(sum, total);
    if (n > total) return {0, 0, 0};
    if (before < n && n <= before + sum) {
        uint32_t place = n - before, digit = first;
        for (; place > bins[digit]; digit++) place -= bins[digit];
        found = {digit, bins[digit], place};
    }
    __syncthreads();
    return found;
}

// The same by digits of the rank, from the top: the n-th lowest is in the bin where the counts pass n.
__device__ Cut cut_by_digits(const Rows &rows, uint32_t n) {
    __shared__ uint32_t bins[BINS];
    uint64_t low = 0; // the sought rank's digits so far
    for (uint32_t top = 64;;) {
        uint32_t shift = top > DIGIT ? top - DIGIT : 0;
        for (uint32_t i = threadIdx.x; i < BINS; i += blockDim.x) bins[i] = 0;
        __syncthreads();
        rows.each([&](uint32_t, uint32_t, uint64_t rank) {
            uint64_t digit = (rank ^ low) >> shift; // too large if a digit above differs
            tally(bins, (uint32_t)digit, rank != DEAD && rank != SAFE && digit >> (top - shift) == 0);
        });
        __syncthreads();
        Bin bin = find_bin(bins, n);
        if (bin.count == 0) return {SAFE, 0};
        low |= (uint64_t)bin.digit << shift;
        n = bin.place;
        if (n == bin.count) return {low + (1ull << shift), 0}; // the whole bin goes
        if (shift == 0) return {low, n};
        top = shift;
    }
}

__device__ Cut cut_of_lowest(const Rows &rows, uint32_t n) {
    return n <= FEW ? cut_by_minima(rows, n) : cut_by_digits(rows, n);
}

// Dead entries of each row, in Row::count.
__device__ void count_dead(Rows rows) {
    if (!rows.p.ring.slots) return; // nothing is marked; the counts are 0
    rows.scored = false;
    rows.count([](uint64_t rank) { return rank == DEAD; });
}

__device__ uint64_t cut_of_row(const Rows &rows) {
    const TrimParams &p = rows.p;
    const uint32_t listed = rows.row->listed, len = rows.row->len;
    uint64_t shared = p.cuts ? p.cuts[listed] : UNDECIDED;
    if (shared != UNDECIDED) return shared;
    uint32_t keep = p.keep ? p.keep[listed] : NONE;
    if (len <= keep) return ALIVE;
    count_dead(rows);
    uint32_t live = len - rows.row->count;
    return live <= keep ? ALIVE : cut_of_lowest(rows, live - keep).below;
}

__device__ uint32_t nth_bit(uint64_t bits, uint32_t n) {
    uint32_t at = 0;
    for (uint32_t width = 32; width > 0; width /= 2) {
        uint32_t low = __popcll(bits & ((1ull << width) - 1));
        if (n >= low) {
            n -= low;
            bits >>= width;
            at += width;
        }
    }
    return at;
}

// Which slots of a row go.
struct Gone {
    uint64_t *word;   // a bit each
    uint32_t *before; // how many go before each word
    uint32_t words;

    __device__ bool has(uint32_t slot) const { return word[slot / 64] >> slot % 64 & 1; }
    // How many go before a slot.
    __device__ uint32_t below(uint32_t slot) const {
        return before[slot / 64] + __popcll(word[slot / 64] & ((1ull << slot % 64) - 1));
    }
    // How many go, or stay, before a word.
    __device__ uint32_t rank(uint32_t w, bool go) const { return go ? before[w] : w * 64 - before[w]; }
    // The n-th slot, from 0, that goes or stays.
    __device__ uint32_t nth(uint32_t n, bool go) const {
        uint32_t low = 0, high = words;
        while (high - low > 1) {
            uint32_t middle = (low + high) / 2;
            if (rank(middle, go) <= n) low = middle;
            else high = middle;
        }
        return low * 64 + nth_bit(go ? word[low] : ~word[low], n - rank(low, go));
    }
};

// Fills `gone`; returns how many go.
__device__ uint32_t find_gone(Rows rows, uint64_t cut, const Gone &gone) {
    rows.scored = cut > ALIVE;
    uint32_t *half = (uint32_t *)gone.word;
    rows.each([&](uint32_t, uint32_t slot, uint64_t rank) {
        uint32_t go = __ballot_sync(WARP, rank < cut);
        if (lane() == 0) half[slot / 32] = go;
    });
    __syncthreads();
    uint32_t all = count_bits(gone.word, gone.before, gone.words);
    __syncthreads();
    return all;
}

// A warp copies the keys and values of `moves` entries; lane i knows where the i-th goes from and to.
template <typename V>
__device__ void copy_vectors(const TrimParams &p, size_t from, size_t to, uint32_t moves) {
    V *k = (V *)p.store.k, *v = (V *)p.store.v;
    const uint32_t pieces = p.vector_bytes / sizeof(V), all = moves * 2 * pieces;
    for (uint32_t first = 0; first < all; first += 32 * BATCH) {
        V held[BATCH], *target[BATCH];
#pragma unroll
        for (uint32_t j = 0; j < BATCH; j++) {
            uint32_t i = first + 32 * j + lane(), move = i / (2 * pieces), piece = i - move * 2 * pieces;
            V *plane = piece < pieces ? k + piece : v + (piece - pieces);
            size_t source = __shfl_sync(WARP, from, move), sink = __shfl_sync(WARP, to, move);
            target[j] = i < all ? plane + sink * pieces : nullptr;
            if (i < all) held[j] = plane[source * pieces];
        }
#pragma unroll
        for (uint32_t j = 0; j < BATCH; j++) {
            if (target[j]) *target[j] = held[j];
        }
    }
}

// One lane copies the rest of an entry and tells those who know its place.
__device__ void move_lanes(const Rows &rows, size_t from, size_t to, uint32_t old_slot, uint32_t slot) {
    const TrimParams &p = rows.p;
    uint32_t tag = p.store.tag[from];
    p.store.tag[to] = tag;
    p.store.score[to] = p.store.score[from];
    if (p.store.factor) p.store.factor[to] = p.store.factor[from];
    if (!p.ring.slots) return;
    uint32_t *place = p.ring.of(p.store, rows.seat, rows.head) + (tag & ~MARK) % p.ring.size;
    if (*place == old_slot) *place = slot;
}

// Moves kept entries at or above `len`, the new length, into the holes below it.
__device__ void fill_holes(const Rows &rows, const Gone &gone, uint32_t len, uint32_t newest) {
    const Store &store = rows.p.store;
    const uint32_t row = rows.row->index, holes = gone.below(len);
    for (uint32_t first = warp(); first < holes; first += blockDim.x) {
        uint32_t k = first + lane() * warps(); // so that few moves are spread over all warps
        uint32_t moves = __popc(__ballot_sync(WARP, k < holes));
        size_t from = 0, to = 0;
        if (k < holes) {
            uint32_t hole = gone.nth(k, true), mover = gone.nth(len - holes + k, false);
            from = store.entry(row, mover);
            to = store.entry(row, hole);
            move_lanes(rows, from, to, mover, hole);
            if (mover == newest) store.newest[row] = hole;
        }
        if (rows.p.vector_bytes % 16 == 0) copy_vectors<uint4>(rows.p, from, to, moves);
        else copy_vectors<uint32_t>(rows.p, from, to, moves);
    }
}

// Drops what ranks below the cut; returns the new length.
__device__ uint32_t pack(const Rows &rows, uint64_t cut, uint64_t *memory) {
    const TrimParams &p = rows.p;
    const uint32_t row = rows.row->index, len = rows.row->len, newest = p.store.newest[row];
    const uint32_t most_words = (p.max_len + CHUNK - 1) / CHUNK * (CHUNK / 64);
    Gone gone{memory, (uint32_t *)(memory + most_words), (len + 63) / 64};
    uint32_t dropped = find_gone(rows, cut, gone);
    if (dropped == 0) return len;
    if (dropped < len) fill_holes(rows, gone, len - dropped, newest);
    if (threadIdx.x == 0) {
        if (newest < len && gone.has(newest)) p.store.newest[row] = NONE;
        p.store.len[row] = len - dropped;
        atomicAdd((unsigned long long *)&p.store.counters->live, (unsigned long long)-(long long)dropped);
        atomicAdd((unsigned long long *)&p.store.counters->evicted, (unsigned long long)dropped);
    }
    return len - dropped;
}

// Puts the pages that a row of `len` entries does not need on the free stack.
__device__ void give_pages(const Store &store, uint32_t row, uint32_t len) {
    __shared__ uint32_t base;
    const uint32_t owned = store.owned[row], kept = store.pages_for(len);
    if (owned <= kept) return;
    if (threadIdx.x == 0) base = atomicAdd(&store.counters->free, owned - kept);
    __syncthreads();
    const uint32_t *page = store.table + (size_t)row * store.max_pages + kept;
    for (uint32_t i = threadIdx.x; i < owned - kept; i += blockDim.x) store.free_pages[base + i] = page[i];
    if (threadIdx.x == 0) store.owned[row] = kept; // everyone read it before the barrier
}

// The same of a row that may share its pages, all of them.
__device__ void let_go_of_row(const Store &store, const Sharing &sharing, uint32_t row) {
    const uint32_t owned = store.owned[row], *page = store.table + (size_t)row * store.max_pages;
    for (uint32_t i = threadIdx.x; i < owned; i += blockDim.x) let_go(store, sharing, page[i], &store.counters->free);
    __syncthreads();
    if (threadIdx.x == 0) store.owned[row] = 0;
}

// Sets the cut of open rows and counts what it takes from each.
__device__ void take(const Rows &rows, const Cut &cut) {
    rows.count([&](uint64_t rank) { return rank != DEAD && rank < cut.below; });
    for (uint32_t i = threadIdx.x; i < rows.last; i += blockDim.x) {
        Row &row = rows.row[i];
        if (row.open) row.cut = cut.below;
        row.taken = row.count;
    }
    if (cut.ties > 0) {
        rows.count([&](uint64_t rank) { return rank == cut.below; });
        if (threadIdx.x == 0) {
            for (uint32_t i = 0, ties = cut.ties; ties > 0; i++) { // the first heads lose theirs
                if (rows.row[i].count == 0) continue;
                rows.row[i].cut = cut.below + 1;
                rows.row[i].taken++;
                ties--;
            }
        }
    }
    __syncthreads();
}

// Rows that would lose more than they can spare lose exactly that. Returns how many entries they contribute together;
// NONE if there is no such row.
__device__ uint32_t close_overdrawn(const Rows &rows) {
    uint32_t fixed = 0;
    bool any = false;
    for (uint32_t i = 0; i < rows.last; i++) {
        Row &row = rows.row[i];
        if (!row.open || row.taken <= row.spare) continue;
        any = true;
        fixed += row.spare;
        uint64_t cut = row.spare > 0 ? cut_of_lowest(rows.only(i), row.spare).below : ALIVE;
        __syncthreads(); // everyone has judged the row
        if (threadIdx.x == 0) {
            row.cut = cut;
            row.open = 0;
        }
    }
    return any ? fixed : NONE;
}

// Takes the `over` lowest of all rows together, from none more than it can spare. A row that the common cut overdraws
// gives up all it can, since what the others then give up in its place only raises the cut.
__device__ void take_together(const Rows &rows, uint32_t over) {
    for (;;) {
        take(rows, cut_of_lowest(rows, over));
        uint32_t fixed = close_overdrawn(rows);
        if (fixed == NONE) return;
        over -= fixed;
        number_chunks(rows.row, rows.last);
    }
}

} // namespace

// One block a listed span: decides which entries of a pooled budget go.
extern "C" __global__ void __launch_bounds__(1024) share(const __grid_constant__ TrimParams p) {
    extern __shared__ Row shared_rows[];
    const PooledBudget budget = p.pooled[blockIdx.x];
    uint64_t *cuts = p.cuts + (size_t)blockIdx.x * p.store.heads;
    if (budget.total == NONE) {
        for (uint32_t i = threadIdx.x; i < p.store.heads; i += blockDim.x) cuts[i] = UNDECIDED;
        return;
    }
    const Rows rows(p, shared_rows, blockIdx.x, 0, p.store.heads);
    count_dead(rows);
    uint32_t all = 0;
    for (uint32_t i = 0; i < rows.last; i++) {
        uint32_t live = shared_rows[i].len - shared_rows[i].count;
        if (threadIdx.x == 0) shared_rows[i].spare = live > budget.floor ? live - budget.floor : 0;
        all += live;
    }
    if (all > budget.total) take_together(rows, all - budget.total);
    for (uint32_t i = threadIdx.x; i < p.store.heads; i += blockDim.x) cuts[i] = shared_rows[i].cut;
}

// One block a row: drops the dead and what its budget does not cover.
extern "C" __global__ void __launch_bounds__(1024) settle(const __grid_constant__ TrimParams p) {
    extern __shared__ uint64_t memory[]; // bits of the slots, then counts before each word
    __shared__ Row row;
    const Rows rows(p, &row, blockIdx.y, blockIdx.x, 1);
    uint32_t len = row.len;
    uint64_t cut = cut_of_row(rows);
    if (cut > ALIVE || p.ring.slots) len = pack(rows, cut, memory); // else nothing is marked
    give_pages(p.store, row.index, len);
}

struct VacateParams {
    Store store;
    Sharing sharing;
    uint32_t seat;
};

// One block a row of every layer: ends a sequence.
extern "C" __global__ void vacate(const __grid_constant__ VacateParams p) {
    const Store &store = p.store;
    const uint32_t row = store.row(blockIdx.y, p.seat, blockIdx.x);
    if (p.sharing.more) let_go_of_row(store, p.sharing, row);
    else give_pages(store, row, 0);
    if (threadIdx.x != 0) return;
    uint32_t len = store.len[row];
    if (len > 0) atomicAdd((unsigned long long *)&store.counters->live, (unsigned long long)-(long long)len);
    store.len[row] = 0;
    store.newest[row] = store.target[row] = NONE;
    if (blockIdx.x == 0 && blockIdx.y == 0) store.failed[p.seat] = 0;
}
