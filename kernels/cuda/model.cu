// What a decoder does between its matrix products. Arithmetic is f32; results are rounded where a sequence of separate
// operations would have written them and what follows depends on it (the residual stream, RoPE's sines).
//
// `_narrow` kernels take rows of any length; the others rows that are a multiple of 16 bytes, at addresses that are.
#include "vector.cuh"

#define EACH_DTYPE(EACH) EACH(float, f32) EACH(__half, f16) EACH(__nv_bfloat16, bf16)
#define EACH_WIDTH(NAME, PARAMS, T, SUFFIX, ...)                                                                       \
    extern "C" __global__ void __VA_ARGS__ NAME##_##SUFFIX(const __grid_constant__ PARAMS p) { NAME<T, WIDE<T>>(p); }  \
    extern "C" __global__ void __VA_ARGS__ NAME##_narrow_##SUFFIX(const __grid_constant__ PARAMS p) { NAME<T, 1>(p); }

struct RmsNorm {
    const void *x;       // [tokens, hidden]; with ids [rows, hidden], of which row ids[t] is token t
    const void *y;       // [tokens, hidden]: added to x; may be null
    const uint32_t *ids; // [tokens]; may be null
    const void *weight;  // [hidden]
    void *sum;           // [tokens, hidden]: x + y; may be null, may be x
    void *normed;        // [tokens, hidden]
    uint32_t tokens, hidden, rows;
    float eps;
};

// A block per token. A row that is not there reads as NaN: an error that shows.
template <typename T, int N> __device__ void rms_norm(const RmsNorm &p) {
    extern __shared__ uint4 staged[]; // [hidden] of T
    T *row = reinterpret_cast<T *>(staged);
    const T *weight = (const T *)p.weight, *y = (const T *)p.y;
    uint32_t from = p.ids ? p.ids[blockIdx.x] : blockIdx.x;
    const T *x = (const T *)p.x + (size_t)from * p.hidden;
    size_t at = (size_t)blockIdx.x * p.hidden;
    uint32_t first = threadIdx.x * N, step = blockDim.x * N;

    Vector<T, N> scale_by; // on its way while the sum of squares is made
    if (first < p.hidden) scale_by = load<N>(weight + first);
    float squares = 0.0f;
    for (uint32_t i = first; i < p.hidden; i += step) {
        Vector<T, N> a;
        if (from < p.rows) {
            a = load<N>(x + i);
        } else {
            for (T &e : a.at) e = from_float<T>(__int_as_float(0x7fffffff));
        }
        if (y) {
            Vector<T, N> b = load<N>(y + at + i);
#pragma unroll
            for (int j = 0; j < N; j++) a.at[j] = from_float<T>(to_float(a.at[j]) + to_float(b.at[j]));
        }
        if (p.sum) store((T *)p.sum + at + i, a);
        store(row + i, a);
#pragma unroll
        for (int j = 0; j < N; j++) squares += to_float(a.at[j]) * to_float(a.at[j]);
    }
    float scale = rsqrtf(block_sum(squares) / p.hidden + p.eps);
    for (uint32_t i = first; i < p.hidden; i += step) {
        if (i != first) scale_by = load<N>(weight + i);
        Vector<T, N> a = load<N>(row + i); // the thread's own
#pragma unroll
        for (int j = 0; j < N; j++) a.at[j] = from_float<T>(scale * to_float(a.at[j]) * to_float(scale_by.at[j]));
        store((T *)p.normed + at + i, a);
    }
}
#define RMS_NORM(T, SUFFIX) EACH_WIDTH(rms_norm, RmsNorm, T, SUFFIX, __launch_bounds__(1024))
EACH_DTYPE(RMS_NORM)

struct Heads {
    void *qkv;                 // [tokens, q_heads + 2 kv_heads, head_dim]: q, k, v; in place
    const void *bias;          // [q_heads + 2 kv_heads, head_dim]; may be null
    const void *q_norm;        // [head_dim]; may be null
    const void *k_norm;        // [head_dim]; may be null
    const uint32_t *positions; // [tokens]
    const float *inv_freq;     // [head_dim / 2]
    uint32_t tokens, q_heads, kv_heads, head_dim;
    uint32_t interleaved; // pair i is (2i, 2i + 1), else (i, i + head_dim / 2)
    float eps;
};

// A warp per token and head: bias, RMS norm of q and k, RoPE of q and k.
template <typename T> __device__ void heads(const Heads &p) {
    uint32_t rotated = p.q_heads + p.kv_heads, all = rotated + p.kv_heads, touched = p.bias ? all : rotated;
    uint64_t index = ((uint64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    uint32_t lane = threadIdx.x % 32, token = index / touched, head = index % touched, d = p.head_dim;
    if (token >= p.tokens) return;
    T *x = (T *)p.qkv + ((size_t)token * all + head) * d;
    const T *bias = p.bias ? (const T *)p.bias + head * d : nullptr;
    auto biased = [&](uint32_t i) {
        float a = to_float(x[i]);
        return bias ? rounded<T>(a + to_float(bias[i])) : a;
    };
    if (head >= rotated) {
        for (uint32_t i = lane; i < d; i += 32) x[i] = from_float<T>(biased(i));
        return;
    }
    const T *norm = (const T *)(head < p.q_heads ? p.q_norm : p.k_norm);
    float scale = 1.0f;
    if (norm) {
        float squares = 0.0f;
        for (uint32_t i = lane; i < d; i += 32) squares += biased(i) * biased(i);
        scale = rsqrtf(warp_sum(squares) / d + p.eps);
    }
    auto entry = [&](uint32_t i) { return norm ? rounded<T>(scale * biased(i) * to_float(norm[i])) : biased(i); };
    float position = (float)p.positions[token];
    for (uint32_t pair = lane; pair < d / 2; pair += 32) {
        uint32_t i = p.interleaved ? 2 * pair : pair, j = p.interleaved ? i + 1 : i + d / 2;
        float a = entry(i), b = entry(j), sine, cosine;
        sincosf(position * p.inv_freq[pair], &sine, &cosine);
        sine = rounded<T>(sine), cosine = rounded<T>(cosine);
        x[i] = from_float<T>(a * cosine - b * sine);
        x[j] = from_float<T>(a * sine + b * cosine);
    }
}
#define HEADS(T, SUFFIX)                                                                                               \
    extern "C" __global__ void heads_##SUFFIX(const __grid_constant__ Heads p) { heads<T>(p); }
EACH_DTYPE(HEADS)

struct SiluMul {
    const void *gate_up; // [tokens, 2, columns]
    void *out;           // [tokens, columns]
    uint32_t tokens, columns;
};

template <typename T, int N> __device__ void silu_mul(const SiluMul &p) {
    uint64_t i = ((uint64_t)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (i >= (uint64_t)p.tokens * p.columns) return;
    const T *x = (const T *)p.gate_up + i + i / p.columns * p.columns;
    Vector<T, N> gate = load<N>(x), up = load<N>(x + p.columns);
#pragma unroll
    for (int j = 0; j < N; j++) gate.at[j] = from_float<T>(silu(to_float(gate.at[j])) * to_float(up.at[j]));
    store((T *)p.out + i, gate);
}
#define SILU_MUL(T, SUFFIX) EACH_WIDTH(silu_mul, SiluMul, T, SUFFIX)
EACH_DTYPE(SILU_MUL)

struct AddBias {
    void *y;          // [tokens, columns], in place
    const void *bias; // [columns]
    uint32_t tokens, columns;
};

template <typename T, int N> __device__ void add_bias(const AddBias &p) {
    uint64_t i = ((uint64_t)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (i >= (uint64_t)p.tokens * p.columns) return;
    T *y = (T *)p.y + i;
    Vector<T, N> a = load<N>(y), b = load<N>((const T *)p.bias + i % p.columns);
#pragma unroll
    for (int j = 0; j < N; j++) a.at[j] = from_float<T>(to_float(a.at[j]) + to_float(b.at[j]));
    store(y, a);
}
#define ADD_BIAS(T, SUFFIX) EACH_WIDTH(add_bias, AddBias, T, SUFFIX)
EACH_DTYPE(ADD_BIAS)

struct Gate {
    const void *x;      // [tokens, hidden]
    const void *norm;   // [hidden]
    const void *weight; // [heads, hidden]
    const void *bias;   // [heads]; may be null
    float *logits;      // [tokens, heads]: (rms_norm(x) . weight + bias) * scale - offset
    uint32_t tokens, hidden, heads;
    float eps, scale, offset;
};

// A warp per logit: the norm is one factor of the whole product, so one pass makes both.
template <typename T, int N> __device__ void gate(const Gate &p) {
    uint64_t index = ((uint64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    uint32_t lane = threadIdx.x % 32, head = index % p.heads;
    if (index >= (uint64_t)p.tokens * p.heads) return;
    const T *x = (const T *)p.x + index / p.heads * p.hidden, *norm = (const T *)p.norm;
    const T *weight = (const T *)p.weight + (size_t)head * p.hidden;
    float squares = 0.0f, product = 0.0f;
#pragma unroll 4
    for (uint32_t i = lane * N; i < p.hidden; i += 32 * N) {
        Vector<T, N> a = load<N>(x + i), n = load<N>(norm + i), w = load<N>(weight + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float e = to_float(a.at[j]);
            squares += e * e;
            product += e * to_float(n.at[j]) * to_float(w.at[j]);
        }
    }
    squares = warp_sum(squares), product = warp_sum(product);
    if (lane != 0) return;
    float logit = product * rsqrtf(squares / p.hidden + p.eps);
    if (p.bias) logit += to_float(((const T *)p.bias)[head]);
    p.logits[index] = logit * p.scale - p.offset;
}
#define GATE(T, SUFFIX) EACH_WIDTH(gate, Gate, T, SUFFIX)
EACH_DTYPE(GATE)

struct Argmax {
    const void *x;  // [rows, columns]
    uint32_t *best; // [rows]: the lowest index of the largest; NaN is never the largest
    uint32_t rows, columns;
};

struct Best {
    float value;
    uint32_t at;
    __device__ void meet(float other, uint32_t other_at) {
        if (other > value || (other == value && other_at < at)) value = other, at = other_at;
    }
};

__device__ inline Best warp_best(Best best) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        float value = __shfl_xor_sync(0xffffffff, best.value, lane);
        best.meet(value, __shfl_xor_sync(0xffffffff, best.at, lane));
    }
    return best;
}

// A block of 1024 per row: a row of a vocabulary takes it some 3 us, no more than a second launch would.
template <typename T, int N> __device__ void argmax(const Argmax &p) {
    __shared__ Best parts[32];
    const T *x = (const T *)p.x + (size_t)blockIdx.x * p.columns;
    Best best = {-INFINITY, NONE};
#pragma unroll 4
    for (uint32_t i = threadIdx.x * N; i < p.columns; i += blockDim.x * N) {
        Vector<T, N> a = load<N>(x + i);
#pragma unroll
        for (int j = 0; j < N; j++) best.meet(to_float(a.at[j]), i + j);
    }
    best = warp_best(best);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    best = warp_best(threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : Best{-INFINITY, NONE});
    if (threadIdx.x == 0) p.best[blockIdx.x] = best.at == NONE ? 0 : best.at;
}
#define ARGMAX(T, SUFFIX) EACH_WIDTH(argmax, Argmax, T, SUFFIX, __launch_bounds__(1024))
EACH_DTYPE(ARGMAX)

struct Threshold {
    const float *x; // [rows, columns]
    uint8_t *bits;  // [rows, columns]: 1 where x > above
    float above;
    uint32_t rows, columns;
    uint32_t shared; // column 0 speaks for its row
};

extern "C" __global__ void threshold(const __grid_constant__ Threshold p) {
    uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (uint64_t)p.rows * p.columns) return;
    p.bits[i] = p.x[p.shared ? i - i % p.columns : i] > p.above;
}

// SplitMix64: number n, from 0, of the stream that starts at `state`.
__device__ inline uint64_t splitmix(uint64_t state, uint64_t n) {
    uint64_t z = state + (n + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

struct Draw {
    const uint32_t *positions; // [tokens]
    void *out;                 // [tokens, heads]: u8, whether the number is below rate, or f32, the number
    uint64_t state;            // where the stream of the heads' coefficients starts
    double rate;
    uint32_t tokens, heads;
};

// The fraction of a p^2 + b p + c in f64, rounded after every operation as the CPU rounds it. `heads` numbers of the
// stream are the heads' a, as many b, as many c.
__device__ inline double uniform(const Draw &p, uint64_t i) {
    uint32_t head = i % p.heads;
    auto coefficient = [&](uint64_t n) { return __ull2double_rn(splitmix(p.state, n) >> 11) * 0x1p-53; };
    double a = coefficient(head), b = coefficient(p.heads + head), c = coefficient(2ull * p.heads + head);
    double position = p.positions[i / p.heads];
    double x = __dadd_rn(__dmul_rn(__dadd_rn(__dmul_rn(position, a), b), position), c);
    return __dsub_rn(x, floor(x));
}

extern "C" __global__ void draw_bits(const __grid_constant__ Draw p) {
    uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (uint64_t)p.tokens * p.heads) ((uint8_t *)p.out)[i] = uniform(p, i) < p.rate;
}
extern "C" __global__ void draw_scores(const __grid_constant__ Draw p) {
    uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (uint64_t)p.tokens * p.heads) ((float *)p.out)[i] = __double2float_rn(uniform(p, i));
}

struct Fill {
    void *out;
    uint64_t state, count;
    float width; // numbers are uniform in [-width / 2, width / 2)
};

template <typename T> __device__ void fill(const Fill &p) {
    uint64_t stride = (uint64_t)gridDim.x * blockDim.x;
    for (uint64_t i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x; i < p.count; i += stride) {
        float unit = (float)(uint32_t)(splitmix(p.state, i) >> 40) * 0x1p-24f;
        ((T *)p.out)[i] = from_float<T>((unit - 0.5f) * p.width);
    }
}
#define FILL(T, SUFFIX) extern "C" __global__ void fill_##SUFFIX(const __grid_constant__ Fill p) { fill<T>(p); }
EACH_DTYPE(FILL)
