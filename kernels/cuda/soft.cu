// Attention of a training step whose gates are soft, forward and backward, on tensor cores.
//
// Forward is flash attention. Backward are two kernels of one shape, so that no sum needs atomics: one by keys, whose
// thread blocks own keys and walk over the queries of every head of the group (dk, dv, dkeep), and one by queries,
// whose thread blocks own queries and walk over keys (dq). What a block owns are the *rows* of its products, what it
// walks over the *columns*: then weights and their gradients leave the first two products as accumulators laid out like
// the left operand of the next, and never pass through shared memory.
//
// The gate and the causal mask are what the accumulators of the scores start from. A query always sees its own key with
// no gate, so none is without a weight.
#include "mma.cuh"
#include "soft.cuh"

namespace {

// As in prefill.cu: how far, in powers of two, a maximum may fall behind before it is renewed.
constexpr float SLACK = 8.0f;
// What a hidden score starts from: finite, so that plain arithmetic is all that is asked of tensor cores.
constexpr float HIDDEN = -1e30f;

// What is compiled in. Each warp has BLOCKS times 16 rows and takes CHUNK columns of a tile of COLUMNS at a time; it
// keeps the first HOLD of its operands in registers.
template <typename T_, int DIM_, int WARPS_, int BLOCKS_, int COLUMNS_, int CHUNK_, int HOLD_, bool BACKWARD_>
struct Shape {
    using T = T_;
    using L = Lines<DIM_>;
    static constexpr int DIM = DIM_, WARPS = WARPS_, BLOCKS = BLOCKS_, COLUMNS = COLUMNS_, CHUNK = CHUNK_, HOLD = HOLD_;
    static constexpr int THREADS = WARPS * 32, WARP_ROWS = BLOCKS * 16, ROWS = WARPS * WARP_ROWS, CHUNKS = DIM / 8;
    static_assert(COLUMNS % CHUNK == 0 && CHUNK % 16 == 0 && COLUMNS <= THREADS, "");
    // Shared memory: one or two operands of the rows, then two stages of two operands of the columns and 8 bytes for
    // each column.
    static constexpr uint32_t OPERAND = ROWS * L::BYTES, PART = COLUMNS * L::BYTES, NUMBERS = 2 * PART;
    static constexpr uint32_t STAGE = NUMBERS + COLUMNS * 8, STAGES = (BACKWARD_ ? 2 : 1) * OPERAND;
    static constexpr uint32_t BYTES = STAGES + 2 * STAGE;
};

// How a warp's rows see a range of columns.
enum Kind { NONE_SEEN, WITHIN, BEYOND, EDGE };

// `ahead`: position of the first query less that of the first key.
__device__ inline Kind kind_of(int ahead, int queries, int keys, int window) {
    int nearest = ahead - (keys - 1), farthest = ahead + queries - 1;
    if (farthest < 0) return NONE_SEEN;
    if (nearest > window) return BEYOND;
    return nearest >= 0 && farthest <= window ? WITHIN : EDGE;
}

// Rows first.. of a head to shared memory, zeros from `length` on: asynchronous.
template <class S, int ROWS>
__device__ inline void copy_rows(uint32_t to, const HeadView<const typename S::T> &head, uint32_t first,
                                 uint32_t length) {
    static_assert(ROWS * S::CHUNKS % S::THREADS == 0, "");
#pragma unroll
    for (int j = 0; j < ROWS * S::CHUNKS / S::THREADS; j++) {
        uint32_t i = j * S::THREADS + threadIdx.x, row = i / S::CHUNKS, chunk = i % S::CHUNKS;
        bool exists = first + row < length;
        copy_async(to + S::L::at(row, chunk), head.token(exists ? first + row : 0) + chunk * 8, exists);
    }
}

// N bytes, 4 or 8, to shared memory; zeros where `valid` is false.
template <int N> __device__ inline void copy_few(uint32_t to, const void *from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(N), "r"(valid ? N : 0)
                 : "memory");
}

// Gates of the keys first..: asynchronous.
template <class S>
__device__ inline void copy_gates(uint32_t to, const Soft &soft, uint32_t sequence, uint32_t head, uint32_t first) {
    uint32_t key = first + threadIdx.x;
    if (threadIdx.x >= S::COLUMNS) return;
    bool exists = soft.keep && key < soft.length;
    const void *from = exists ? soft.keep + ((size_t)sequence * soft.length + key) * soft.kv_heads + head : soft.qkv;
    copy_few<4>(to + threadIdx.x * 4, from, exists);
}

// A gate as the accumulator of a score takes it; `natural` turns natural logarithms into scores.
__device__ inline float as_start(float keep, float natural) { return fmaxf(keep, LEAST_KEEP) * natural; }

// A warp's rows of one operand; `address` is this lane's.
template <class S, bool HELD> struct Operand {
    uint32_t address, held[HELD ? S::DIM / 16 : 1][S::BLOCKS][4];

    __device__ void load(uint32_t (&to)[S::BLOCKS][4], int step) const {
#pragma unroll
        for (int m = 0; m < S::BLOCKS; m++) {
            load_matrices(to[m], S::L::step(address, 2 * step) + m * 16 * S::L::BYTES);
        }
    }
    __device__ void hold() {
#pragma unroll
        for (int i = 0; i < (HELD ? S::DIM / 16 : 0); i++) load(held[i], i);
    }
};

// Of rows times a chunk of columns; a lane has rows lane / 4 + {0, 8} and columns 2 (lane % 4) + {0, 1} of each 16 x 8.
template <class S> using Scores = float[S::BLOCKS][S::CHUNK / 8][4];
// Of rows times DIM.
template <class S> using Sums = float[S::BLOCKS][S::DIM / 8][4];

template <class S, typename F> __device__ inline void each(F f) {
#pragma unroll
    for (int m = 0; m < S::BLOCKS; m++) {
#pragma unroll
        for (int n = 0; n < S::CHUNK / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) f(m, n, i / 2, i % 2);
        }
    }
}

template <class S> __device__ inline void clear(Sums<S> &sums) {
#pragma unroll
    for (int m = 0; m < S::BLOCKS; m++) {
#pragma unroll
        for (int n = 0; n < S::DIM / 8; n++) sums[m][n][0] = sums[m][n][1] = sums[m][n][2] = sums[m][n][3] = 0.0f;
    }
}

// s += rows . columns; b is this lane's address in the columns.
template <class S, bool HELD> __device__ inline void multiply(Scores<S> &s, const Operand<S, HELD> &rows, uint32_t b) {
#pragma unroll
    for (int i = 0; i < S::DIM / 16; i++) {
        uint32_t loaded[S::BLOCKS][4];
        if (!HELD) rows.load(loaded, i);
        const auto &a = HELD ? rows.held[HELD ? i : 0] : loaded;
#pragma unroll
        for (int n = 0; n < S::CHUNK / 16; n++) {
            uint32_t r[4];
            load_matrices(r, S::L::step(b, 2 * i) + n * 16 * S::L::BYTES);
#pragma unroll
            for (int m = 0; m < S::BLOCKS; m++) {
                mma<typename S::T>(s[m][2 * n], a[m], r[0], r[1]);
                mma<typename S::T>(s[m][2 * n + 1], a[m], r[2], r[3]);
            }
        }
    }
}

// sums += weights of 16 columns . those columns; b is this lane's address at them.
template <class S> __device__ inline void gather16(Sums<S> &sums, const uint32_t (&a)[S::BLOCKS][4], uint32_t b) {
#pragma unroll
    for (int n = 0; n < S::DIM / 16; n++) {
        uint32_t r[4];
        load_matrices_transposed(r, S::L::step(b, 2 * n));
#pragma unroll
        for (int m = 0; m < S::BLOCKS; m++) {
            mma<typename S::T>(sums[m][2 * n], a[m], r[0], r[1]);
            mma<typename S::T>(sums[m][2 * n + 1], a[m], r[2], r[3]);
        }
    }
}

// sums += weights . columns.
template <class S> __device__ inline void gather(Sums<S> &sums, const Scores<S> &weights, uint32_t b) {
#pragma unroll
    for (int k = 0; k < S::CHUNK / 16; k++) {
        uint32_t a[S::BLOCKS][4];
#pragma unroll
        for (int m = 0; m < S::BLOCKS; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *pair = &weights[m][2 * k + i / 2][i % 2 * 2];
                a[m][i] = pack<typename S::T>(pair[0], pair[1]);
            }
        }
        gather16<S>(sums, a, b + k * 16 * S::L::BYTES);
    }
}

// What scores start from. `gate(m, n, h, c)`: that of an element's key; `distance`: its query's position less its
// key's.
template <class S, typename Gate, typename Distance>
__device__ inline void start(Scores<S> &s, Kind kind, int window, Gate gate, Distance distance) {
    if (kind == WITHIN) {
        each<S>([&](int m, int n, int h, int c) { s[m][n][2 * h + c] = 0.0f; });
    } else if (kind == BEYOND) {
        each<S>([&](int m, int n, int h, int c) { s[m][n][2 * h + c] = gate(m, n, h, c); });
    } else {
        each<S>([&](int m, int n, int h, int c) {
            int apart = distance(m, n, h, c);
            s[m][n][2 * h + c] = apart < 0 ? HIDDEN : apart > window ? gate(m, n, h, c) : 0.0f;
        });
    }
}

// Leaves a warp's rows, times `scale` of each, in shared memory, where one of its operands was.
template <class S, typename F>
__device__ inline void leave(const Sums<S> &sums, unsigned char *to, uint32_t warp_row, F scale) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < S::BLOCKS * 2; i++) {
        int m = i / 2, h = i % 2;
        const float by = scale(m, h);
#pragma unroll
        for (int n = 0; n < S::DIM / 8; n++) {
            uint32_t pair = pack<typename S::T>(sums[m][n][2 * h] * by, sums[m][n][2 * h + 1] * by);
            *(uint32_t *)(to + S::L::at(warp_row + lane / 4 + i * 8, n) + lane % 4 * 4) = pair;
        }
    }
}

// Rows that `leave` left, to tokens first + warp_row.. of a head.
template <class S>
__device__ inline void write(const HeadView<typename S::T> &head, const unsigned char *from, uint32_t first,
                             uint32_t warp_row, uint32_t length) {
    for (uint32_t j = threadIdx.x % 32; j < S::WARP_ROWS * S::CHUNKS; j += 32) {
        uint32_t row = warp_row + j / S::CHUNKS, chunk = j % S::CHUNKS;
        if (first + row >= length) break;
        *(uint4 *)(head.token(first + row) + chunk * 8) = *(const uint4 *)(from + S::L::at(row, chunk));
    }
}

// This lane's part of an address that matrices of an operand are loaded from: for rows, for columns of the first two
// products, and for columns that are gathered.
template <class S> __device__ inline uint32_t row_part(uint32_t row) {
    uint32_t lane = threadIdx.x % 32;
    return S::L::at(row + lane % 16, lane / 16);
}
template <class S> __device__ inline uint32_t column_part() {
    uint32_t lane = threadIdx.x % 32;
    return S::L::at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// Where a thread block works: the tiles with most columns come first.
struct Tile {
    uint32_t first; // its first row's token in the sequence
    uint32_t sequence, head;

    // `late`: the last tokens see most.
    __device__ Tile(const Soft &soft, uint32_t heads, uint32_t rows, bool late) {
        uint32_t parts = heads * soft.sequences, tile = blockIdx.x / parts, tiles = (soft.length + rows - 1) / rows;
        first = (late ? tiles - 1 - tile : tile) * rows;
        sequence = blockIdx.x % parts / heads, head = blockIdx.x % heads;
    }
};

// The heads of qkv and of a tensor of the queries' shape in one sequence.
template <typename T> struct Heads {
    const Soft &soft;
    uint32_t sequence;

    __device__ HeadView<T> q(T *base, uint32_t head) const { return of(base, head); }
    __device__ HeadView<T> k(T *base, uint32_t head) const { return of(base, soft.q_heads + head); }
    __device__ HeadView<T> v(T *base, uint32_t head) const { return of(base, soft.q_heads + soft.kv_heads + head); }
    __device__ HeadView<T> y(T *base, uint32_t head) const {
        return head_view(base, soft, sequence, soft.q_heads, head);
    }
    __device__ HeadView<T> of(T *base, uint32_t head) const {
        return head_view(base, soft, sequence, soft.heads(), head);
    }
};

// The online softmax of a warp's rows. Of each block of 16 a lane has rows lane / 4 + {0, 8}.
template <class S> struct Online {
    Sums<S> y;
    float top[S::BLOCKS][2]; // maximum that weights are taken against, in powers of two
    float sum[S::BLOCKS][2]; // this lane's part

    // Renews the maxima, if one fell too far behind; `scale` turns scores into powers of two.
    __device__ void raise(const Scores<S> &s, float scale) {
        float best[S::BLOCKS][2];
        bool behind = false;
#pragma unroll
        for (int i = 0; i < S::BLOCKS * 2; i++) {
            int m = i / 2, h = i % 2;
            float x = -INFINITY;
#pragma unroll
            for (int n = 0; n < S::CHUNK / 8; n++) x = fmaxf(x, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
            best[m][h] = x * scale;
            behind |= best[m][h] > top[m][h] + SLACK;
        }
        if (!__any_sync(~0u, behind)) return;
#pragma unroll
        for (int i = 0; i < S::BLOCKS * 2; i++) {
            int m = i / 2, h = i % 2;
            float x = fmaxf(best[m][h], top[m][h]);
            x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
            x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
            float fade = exp2_fast(top[m][h] - x);
            top[m][h] = x;
            sum[m][h] *= fade;
#pragma unroll
            for (int n = 0; n < S::DIM / 8; n++) y[m][n][2 * h] *= fade, y[m][n][2 * h + 1] *= fade;
        }
    }

    // Weights of the tile, and with them the values; v is this lane's address.
    __device__ void add(const Scores<S> &s, uint32_t v, float scale) {
#pragma unroll
        for (int k = 0; k < S::CHUNK / 16; k++) {
            uint32_t a[S::BLOCKS][4];
#pragma unroll
            for (int m = 0; m < S::BLOCKS; m++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int n = 2 * k + i / 2, h = i % 2;
                    float x = exp2_fast(fmaf(s[m][n][2 * h], scale, -top[m][h]));
                    float z = exp2_fast(fmaf(s[m][n][2 * h + 1], scale, -top[m][h]));
                    sum[m][h] += x + z;
                    a[m][i] = pack<typename S::T>(x, z);
                }
            }
            gather16<S>(y, a, v + k * 16 * S::L::BYTES);
        }
    }
};

template <class S>
__device__ inline void finish(const SoftForward &p, const Tile &tile, const Online<S> &online, unsigned char *memory,
                              uint32_t warp_row) {
    using T = typename S::T;
    const Soft &soft = p.soft;
    const uint32_t lane = threadIdx.x % 32;
    float sum[S::BLOCKS][2];
#pragma unroll
    for (int i = 0; i < S::BLOCKS * 2; i++) {
        float x = online.sum[i / 2][i % 2];
        x += __shfl_xor_sync(~0u, x, 1);
        x += __shfl_xor_sync(~0u, x, 2);
        sum[i / 2][i % 2] = x;
        uint32_t query = tile.first + warp_row + lane / 4 + i * 8;
        size_t at = ((size_t)tile.sequence * soft.length + query) * soft.q_heads + tile.head;
        if (lane % 4 == 0 && query < soft.length) p.lse[at] = (online.top[i / 2][i % 2] + log2f(x)) / LOG2E;
    }
    __syncwarp(); // the queries there are this warp's alone
    leave<S>(online.y, memory, warp_row, [&](int m, int h) { return 1.0f / sum[m][h]; });
    __syncwarp();
    const auto y = Heads<T>{soft, tile.sequence}.y((T *)p.y, tile.head);
    write<S>(y, memory, tile.first, warp_row, soft.length);
}

template <class S> __device__ inline void forward(const SoftForward &p) {
    using T = typename S::T;
    extern __shared__ __align__(1024) unsigned char memory[];
    const Soft &soft = p.soft;
    const uint32_t shared = shared_address(memory), lane = threadIdx.x % 32;
    const Tile tile(soft, soft.q_heads, S::ROWS, true);
    const uint32_t first = tile.first, warp_row = threadIdx.x / 32 * S::WARP_ROWS;
    const uint32_t kv_head = tile.head / soft.group(), end = min(first + S::ROWS, soft.length);
    const T *qkv = (const T *)soft.qkv;
    const Heads<const T> heads{soft, tile.sequence};
    const auto k = heads.k(qkv, kv_head), v = heads.v(qkv, kv_head);
    auto copy = [&](uint32_t key, uint32_t stage) {
        uint32_t to = shared + S::STAGES + stage * S::STAGE;
        copy_rows<S, S::COLUMNS>(to, k, key, soft.length);
        copy_rows<S, S::COLUMNS>(to + S::PART, v, key, soft.length);
        copy_gates<S>(to + S::NUMBERS, soft, tile.sequence, kv_head, key);
    };
    copy_rows<S, S::ROWS>(shared, heads.q(qkv, tile.head), first, soft.length);
    copy(0, 0);
    copy_commit();

    Operand<S, (S::HOLD > 0)> rows{shared + row_part<S>(warp_row)};
    const uint32_t k_lane = shared + S::STAGES + column_part<S>();
    const uint32_t v_lane = shared + S::STAGES + S::PART + row_part<S>(0);
    const float scale = soft.scale * LOG2E, natural = 1.0f / soft.scale;
    const int window = soft.keep ? soft.window : INT32_MAX;
    Online<S> online;
    clear<S>(online.y);
    for (int i = 0; i < S::BLOCKS * 2; i++) online.top[i / 2][i % 2] = -INFINITY, online.sum[i / 2][i % 2] = 0.0f;
    if (S::HOLD) {
        copy_wait<0>();
        __syncthreads();
        rows.hold();
    }
    for (uint32_t key = 0, stage = 0; key < end; key += S::COLUMNS, stage ^= 1) {
        copy_wait<0>();
        __syncthreads(); // the tile is there, and nobody reads the other stage any more
        if (key + S::COLUMNS < end) copy(key + S::COLUMNS, stage ^ 1);
        copy_commit();
        const int ahead = (int)(first + warp_row) - (int)key;
        const Kind kind = kind_of(ahead, S::WARP_ROWS, S::COLUMNS, window);
        if (kind == NONE_SEEN) continue;
        const float *gates = (const float *)(memory + S::STAGES + stage * S::STAGE + S::NUMBERS) + lane % 4 * 2;
        const int lane_ahead = ahead + (int)(lane / 4) - (int)(lane % 4 * 2);
        Scores<S> s;
        start<S>(
            s, kind, window, [&](int, int n, int, int c) { return as_start(gates[n * 8 + c], natural); },
            [&](int m, int n, int h, int c) { return lane_ahead + m * 16 + h * 8 - n * 8 - c; });
        multiply<S>(s, rows, k_lane + stage * S::STAGE);
        online.raise(s, scale);
        online.add(s, v_lane + stage * S::STAGE, scale);
    }
    finish<S>(p, tile, online, memory, warp_row);
}

// A warp's rows in the backward pass, and what is known of each. By keys: dk, dv and dkeep of keys; else dq of queries.
template <class S, bool BY_KEYS> struct Back {
    Operand<S, (S::HOLD > 0)> first;  // keys; queries
    Operand<S, (S::HOLD > 1)> second; // values; gradients of y
    Sums<S> d_first;
    Sums<S> d_second;          // by keys alone
    float gate[S::BLOCKS][2];  // by keys: what scores start from; else lse in powers of two
    float other[S::BLOCKS][2]; // by keys: this lane's part of dkeep; else the sum of dy * y

    // Takes a chunk of columns: `a` and `b` are this lane's addresses in their two operands for the first products,
    // `at` and `bt` for the sums, `numbers` its columns' pairs (by keys) or gates. `ahead`: of this lane's elements.
    __device__ void add(Kind kind, int window, int ahead, uint32_t a, uint32_t b, uint32_t at, uint32_t bt,
                        const float *numbers, float natural, float scale) {
        Scores<S> s, d;
        auto distance = [&](int m, int n, int h, int c) {
            int row = m * 16 + h * 8, column = n * 8 + c;
            return BY_KEYS ? ahead + column - row : ahead + row - column;
        };
        float4 known[BY_KEYS ? S::CHUNK / 8 : 1]; // of two columns: lse, and the sum of dy * y
#pragma unroll
        for (int n = 0; n < (BY_KEYS ? S::CHUNK / 8 : 0); n++) known[n] = ((const float4 *)numbers)[n * 4];
        auto lse = [&](int m, int n, int h, int c) {
            const float4 &of = known[BY_KEYS ? n : 0];
            return !BY_KEYS ? gate[m][h] : c == 0 ? of.x : of.z;
        };
        auto delta = [&](int m, int n, int h, int c) {
            const float4 &of = known[BY_KEYS ? n : 0];
            return !BY_KEYS ? other[m][h] : c == 0 ? of.y : of.w;
        };
        auto start_of = [&](int m, int n, int h, int c) {
            return BY_KEYS ? gate[m][h] : as_start(numbers[n * 8 + c], natural);
        };
        start<S>(s, kind, window, start_of, distance);
        each<S>([&](int m, int n, int h, int c) { d[m][n][2 * h + c] = -delta(m, n, h, c); });
        multiply<S>(s, first, a);
        multiply<S>(d, second, b);
        each<S>([&](int m, int n, int h, int c) {
            float &x = s[m][n][2 * h + c];
            x = exp2_fast(fmaf(x, scale, -lse(m, n, h, c)));
            d[m][n][2 * h + c] *= x;
        });
        if (BY_KEYS) {
            gather<S>(d_second, s, bt);
            count(d, kind, window, distance);
        }
        gather<S>(d_first, d, at);
    }

    // Gradients of scores beyond the window, to dkeep.
    template <typename F> __device__ void count(const Scores<S> &d, Kind kind, int window, F distance) {
        if (kind == BEYOND) {
            each<S>([&](int m, int n, int h, int c) { other[m][h] += d[m][n][2 * h + c]; });
        } else if (kind == EDGE) {
            each<S>([&](int m, int n, int h, int c) {
                other[m][h] += distance(m, n, h, c) > window ? d[m][n][2 * h + c] : 0.0f;
            });
        }
    }
};

// The columns that a thread block walks over: tiles of one head after another.
template <int COLUMNS> struct Columns {
    uint32_t from, end; // of each head
    uint32_t head, last_head;
    uint32_t column; // the tile's first

    __device__ bool more() const { return head <= last_head; }
    __device__ Columns next() const {
        bool over = column + COLUMNS >= end;
        return {from, end, head + over, last_head, over ? from : column + COLUMNS};
    }
};

// What is known of a warp's rows before they meet a column.
template <class S, bool BY_KEYS>
__device__ inline void begin(const SoftBackward &p, const Tile &tile, Back<S, BY_KEYS> &rows, uint32_t warp_row) {
    const Soft &soft = p.soft;
    const size_t token = (size_t)tile.sequence * soft.length, tokens = (size_t)soft.sequences * soft.length;
    clear<S>(rows.d_first);
    clear<S>(rows.d_second);
#pragma unroll
    for (int i = 0; i < S::BLOCKS * 2; i++) {
        uint32_t row = tile.first + warp_row + threadIdx.x % 32 / 4 + i * 8;
        float &gate = rows.gate[i / 2][i % 2], &other = rows.other[i / 2][i % 2];
        bool exists = row < soft.length;
        if (BY_KEYS) {
            float keep = exists && soft.keep ? soft.keep[(token + row) * soft.kv_heads + tile.head] : 0.0f;
            gate = as_start(keep, 1.0f / soft.scale), other = 0.0f;
        } else {
            float2 known = exists ? p.rows[tile.head * tokens + token + row] : float2{0.0f, 0.0f};
            gate = known.x, other = known.y;
        }
    }
}

// Writes a warp's gradients, by way of where its operands were.
template <class S, bool BY_KEYS>
__device__ inline void finish(const SoftBackward &p, const Tile &tile, const Back<S, BY_KEYS> &rows,
                              unsigned char *memory, uint32_t warp_row) {
    using T = typename S::T;
    const Soft &soft = p.soft;
    const Heads<T> heads{soft, tile.sequence};
    T *dqkv = (T *)p.dqkv;
    __syncwarp();
    leave<S>(rows.d_first, memory, warp_row, [&](int, int) { return soft.scale; });
    if (BY_KEYS) leave<S>(rows.d_second, memory + S::OPERAND, warp_row, [](int, int) { return 1.0f; });
    __syncwarp();
    const auto d_first = BY_KEYS ? heads.k(dqkv, tile.head) : heads.q(dqkv, tile.head);
    write<S>(d_first, memory, tile.first, warp_row, soft.length);
    if (!BY_KEYS) return;
    write<S>(heads.v(dqkv, tile.head), memory + S::OPERAND, tile.first, warp_row, soft.length);
#pragma unroll
    for (int i = 0; i < S::BLOCKS * 2; i++) {
        float x = rows.other[i / 2][i % 2];
        x += __shfl_xor_sync(~0u, x, 1);
        x += __shfl_xor_sync(~0u, x, 2);
        uint32_t lane = threadIdx.x % 32, key = tile.first + warp_row + lane / 4 + i * 8;
        size_t at = ((size_t)tile.sequence * soft.length + key) * soft.kv_heads + tile.head;
        if (lane % 4 == 0 && key < soft.length) p.dkeep[at] = x;
    }
}

// A tile of columns to shared memory: asynchronous.
template <class S, bool BY_KEYS>
__device__ inline void copy_columns(const SoftBackward &p, const Tile &tile, const Columns<S::COLUMNS> &at,
                                    uint32_t to) {
    using T = typename S::T;
    const Soft &soft = p.soft;
    const Heads<const T> heads{soft, tile.sequence};
    const T *qkv = (const T *)soft.qkv, *dy = (const T *)p.dy;
    const uint32_t kv_head = tile.head / soft.group(); // of a query head
    copy_rows<S, S::COLUMNS>(to, BY_KEYS ? heads.q(qkv, at.head) : heads.k(qkv, kv_head), at.column, soft.length);
    to += S::PART;
    copy_rows<S, S::COLUMNS>(to, BY_KEYS ? heads.y(dy, at.head) : heads.v(qkv, kv_head), at.column, soft.length);
    to += S::PART;
    if (BY_KEYS) {
        uint32_t query = at.column + threadIdx.x;
        bool exists = query < soft.length;
        const float2 *rows = p.rows + ((size_t)at.head * soft.sequences + tile.sequence) * soft.length;
        if (threadIdx.x < S::COLUMNS) copy_few<8>(to + threadIdx.x * 8, rows + (exists ? query : 0), exists);
    } else {
        copy_gates<S>(to, soft, tile.sequence, kv_head, at.column);
    }
}

template <class S, bool BY_KEYS> __device__ inline void backward(const SoftBackward &p) {
    using T = typename S::T;
    using Walk = Columns<S::COLUMNS>;
    extern __shared__ __align__(1024) unsigned char memory[];
    const Soft &soft = p.soft;
    const uint32_t shared = shared_address(memory), stages = shared + S::STAGES, lane = threadIdx.x % 32;
    const Tile tile(soft, BY_KEYS ? soft.kv_heads : soft.q_heads, S::ROWS, !BY_KEYS);
    const uint32_t warp_row = threadIdx.x / 32 * S::WARP_ROWS, head = tile.head, group = soft.group();
    Walk now = BY_KEYS ? Walk{tile.first / S::COLUMNS * S::COLUMNS, soft.length, head * group, head * group + group - 1}
                       : Walk{0, min(tile.first + S::ROWS, soft.length), head, head};
    now.column = now.from;

    const Heads<const T> heads{soft, tile.sequence};
    const T *qkv = (const T *)soft.qkv, *dy = (const T *)p.dy;
    copy_rows<S, S::ROWS>(shared, BY_KEYS ? heads.k(qkv, head) : heads.q(qkv, head), tile.first, soft.length);
    const auto second = BY_KEYS ? heads.v(qkv, head) : heads.y(dy, head);
    copy_rows<S, S::ROWS>(shared + S::OPERAND, second, tile.first, soft.length);
    copy_columns<S, BY_KEYS>(p, tile, now, stages);
    copy_commit();

    Back<S, BY_KEYS> rows;
    rows.first.address = shared + row_part<S>(warp_row), rows.second.address = rows.first.address + S::OPERAND;
    begin<S, BY_KEYS>(p, tile, rows, warp_row);
    copy_wait<0>();
    __syncthreads();
    rows.first.hold();
    rows.second.hold();
    const uint32_t a = stages + column_part<S>(), at = stages + row_part<S>(0);
    const int row = tile.first + warp_row, lane_row = lane / 4, lane_column = lane % 4 * 2;
    const float scale = soft.scale * LOG2E, natural = 1.0f / soft.scale;
    for (uint32_t stage = 0; now.more(); stage ^= 1) {
        copy_wait<0>();
        __syncthreads(); // the tile is there, and nobody reads the other stage any more
        const Walk next = now.next();
        if (next.more()) copy_columns<S, BY_KEYS>(p, tile, next, stages + (stage ^ 1) * S::STAGE);
        copy_commit();
        const float *numbers = (const float *)(memory + S::STAGES + stage * S::STAGE + S::NUMBERS);
#pragma unroll 1
        for (uint32_t i = 0; i < S::COLUMNS; i += S::CHUNK) {
            const int column = now.column + i, ahead = BY_KEYS ? column - row : row - column;
            const int lane_ahead = ahead + (BY_KEYS ? lane_column - lane_row : lane_row - lane_column);
            constexpr int queries = BY_KEYS ? S::CHUNK : S::WARP_ROWS, keys = BY_KEYS ? S::WARP_ROWS : S::CHUNK;
            const Kind kind = kind_of(ahead, queries, keys, soft.window);
            if (kind == NONE_SEEN) continue;
            const uint32_t skip = stage * S::STAGE + i * S::L::BYTES;
            rows.add(kind, soft.window, lane_ahead, a + skip, a + S::PART + skip, at + skip, at + S::PART + skip,
                     numbers + (i + lane_column) * (BY_KEYS ? 2 : 1), natural, scale);
        }
        now = next;
    }
    finish<S, BY_KEYS>(p, tile, rows, memory, warp_row);
}

} // namespace

extern "C" __global__ void soft_rows_f16(const SoftBackward p) { soft_rows<__half, 8>(p); }
extern "C" __global__ void soft_rows_bf16(const SoftBackward p) { soft_rows<__nv_bfloat16, 8>(p); }

// RESIDENT thread blocks share a multiprocessor; the launcher gives each SHARED bytes.
#define SOFT_FORWARD(name, T, DIM, WARPS, BLOCKS, COLUMNS, HOLD, RESIDENT, SHARED)                                      \
    static_assert(Shape<T, DIM, WARPS, BLOCKS, COLUMNS, COLUMNS, HOLD, false>::BYTES == SHARED, "as the launcher has it"); \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) name##_##DIM(const SoftForward p) {              \
        forward<Shape<T, DIM, WARPS, BLOCKS, COLUMNS, COLUMNS, HOLD, false>>(p);                                        \
    }
#define SOFT_BACKWARD(name, BY_KEYS, T, DIM, WARPS, BLOCKS, COLUMNS, CHUNK, HOLD, RESIDENT, SHARED)                     \
    static_assert(Shape<T, DIM, WARPS, BLOCKS, COLUMNS, CHUNK, HOLD, true>::BYTES == SHARED, "as the launcher has it"); \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, RESIDENT) name##_##DIM(const SoftBackward p) {             \
        backward<Shape<T, DIM, WARPS, BLOCKS, COLUMNS, CHUNK, HOLD, true>, BY_KEYS>(p);                                 \
    }
#define FORWARD(...)                                                                                                    \
    SOFT_FORWARD(soft_f16, __half, __VA_ARGS__) SOFT_FORWARD(soft_bf16, __nv_bfloat16, __VA_ARGS__)
#define KEYS(...)                                                                                                       \
    SOFT_BACKWARD(soft_keys_f16, true, __half, __VA_ARGS__)                                                             \
    SOFT_BACKWARD(soft_keys_bf16, true, __nv_bfloat16, __VA_ARGS__)
#define QUERIES(...)                                                                                                    \
    SOFT_BACKWARD(soft_queries_f16, false, __half, __VA_ARGS__)                                                         \
    SOFT_BACKWARD(soft_queries_bf16, false, __nv_bfloat16, __VA_ARGS__)

FORWARD(32, 4, 2, 64, 0, 3, 31744)
FORWARD(64, 4, 2, 64, 0, 3, 50176)
FORWARD(128, 4, 2, 64, 0, 2, 99328)

KEYS(32, 4, 2, 64, 32, 2, 2, 41984)
KEYS(64, 4, 2, 64, 32, 0, 2, 66560)
KEYS(128, 4, 1, 64, 32, 0, 2, 99328)

QUERIES(32, 4, 2, 64, 32, 2, 2, 41984)
QUERIES(64, 4, 2, 64, 32, 2, 2, 66560)
QUERIES(128, 4, 1, 64, 32, 2, 2, 99328)
