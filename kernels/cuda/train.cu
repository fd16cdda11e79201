// Backward passes of what a decoder does between its matrix products. Arithmetic is f32; results are rounded once.
//
// `_narrow` kernels take rows of any length; the others rows that are a multiple of 16 bytes, at addresses that are.
#include "vector.cuh"

#define EACH_DTYPE(EACH) EACH(float, f32) EACH(__half, f16) EACH(__nv_bfloat16, bf16)
#define EACH_WIDTH(NAME, PARAMS, T, SUFFIX, ...)                                                                       \
    extern "C" __global__ void __VA_ARGS__ NAME##_##SUFFIX(const __grid_constant__ PARAMS p) { NAME<T, WIDE<T>>(p); }  \
    extern "C" __global__ void __VA_ARGS__ NAME##_narrow_##SUFFIX(const __grid_constant__ PARAMS p) { NAME<T, 1>(p); }

// Sums of both over a block of whole warps, as often as a kernel likes.
__device__ inline float2 block_sums(float2 x) {
    __shared__ float2 parts[32];
    uint32_t lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = make_float2(warp_sum(x.x), warp_sum(x.y));
    if (warps == 1) return x;
    __syncthreads(); // the last sums have been read
    if (lane == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float2 part = lane < warps ? parts[lane] : make_float2(0.0f, 0.0f);
    return make_float2(warp_sum(part.x), warp_sum(part.y));
}

struct RmsNormBackward {
    const void *x;      // rows as below
    const void *weight; // [hidden]
    const void *dy;     // rows as below
    const void *add;    // rows as below: added to the result; may be null
    void *dx;           // rows as below; may be dy or add
    // Row r is `hidden` elements from element (r / group) * pitch + (r % group) * hidden on.
    uint64_t pitch; // a multiple of hidden
    uint32_t rows, group, hidden;
    float eps;
};

// A block per row. With y_i = w_i x_i s and s = (mean x^2 + eps)^-1/2:
// dx_i = s w_i dy_i - x_i s^3 / hidden * sum_j w_j dy_j x_j.
template <typename T, int N> __device__ void rms_norm_backward(const RmsNormBackward &p) {
    extern __shared__ uint4 staged[]; // [2, hidden] of T: x and dy, each thread's own
    T *row = reinterpret_cast<T *>(staged), *slopes = row + p.hidden;
    size_t at = (size_t)(blockIdx.x / p.group) * p.pitch + (size_t)(blockIdx.x % p.group) * p.hidden;
    const T *x = (const T *)p.x + at, *dy = (const T *)p.dy + at, *weight = (const T *)p.weight;
    uint32_t first = threadIdx.x * N, step = blockDim.x * N;

    float2 sums = {0.0f, 0.0f}; // of squares; of w dy x
    for (uint32_t i = first; i < p.hidden; i += step) {
        Vector<T, N> a = load<N>(x + i), d = load<N>(dy + i), w = load<N>(weight + i);
        store(row + i, a), store(slopes + i, d);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float e = to_float(a.at[j]);
            sums.x += e * e;
            sums.y += e * (to_float(w.at[j]) * to_float(d.at[j]));
        }
    }
    sums = block_sums(sums);
    float scale = rsqrtf(sums.x / p.hidden + p.eps), back = scale * scale * (sums.y / p.hidden);
    for (uint32_t i = first; i < p.hidden; i += step) {
        Vector<T, N> a = load<N>(row + i), d = load<N>(slopes + i), w = load<N>(weight + i), more;
        if (p.add) more = load<N>((const T *)p.add + at + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float e = scale * (to_float(w.at[j]) * to_float(d.at[j]) - back * to_float(a.at[j]));
            a.at[j] = from_float<T>(p.add ? e + to_float(more.at[j]) : e);
        }
        store((T *)p.dx + at + i, a);
    }
}
#define RMS_NORM_BACKWARD(T, SUFFIX)                                                                                   \
    EACH_WIDTH(rms_norm_backward, RmsNormBackward, T, SUFFIX, __launch_bounds__(1024))
EACH_DTYPE(RMS_NORM_BACKWARD)

struct RmsNormWeight {
    const void *x;  // [rows, hidden]
    const void *dy; // [rows, hidden]
    float *parts;   // [blocks, hidden]: sums over a block's rows
    float *dweight; // [hidden]: sums of parts
    uint32_t rows, hidden, blocks;
    float eps;
};

// A block takes a run of rows, one after the other: which rows a sum is of, and in which order, never changes.
template <typename T, int N> __device__ void rms_norm_weight_parts(const RmsNormWeight &p) {
    // Sums so far and a row's products, each thread's own: its element j of a step is j blocks on, for the banks' sake.
    extern __shared__ float sums[]; // [2, steps, N, threads]
    uint32_t first = threadIdx.x * N, threads = blockDim.x, step = threads * N;
    float *products = sums + (p.hidden + step - 1) / step * step;
    for (uint32_t i = first, at = threadIdx.x; i < p.hidden; i += step, at += step) {
#pragma unroll
        for (int j = 0; j < N; j++) sums[at + j * threads] = 0.0f;
    }
    uint32_t row = (uint64_t)p.rows * blockIdx.x / p.blocks, end = (uint64_t)p.rows * (blockIdx.x + 1) / p.blocks;
    for (; row < end; row++) {
        const T *x = (const T *)p.x + (size_t)row * p.hidden, *dy = (const T *)p.dy + (size_t)row * p.hidden;
        float squares = 0.0f;
        for (uint32_t i = first, at = threadIdx.x; i < p.hidden; i += step, at += step) {
            Vector<T, N> a = load<N>(x + i), d = load<N>(dy + i);
#pragma unroll
            for (int j = 0; j < N; j++) {
                float e = to_float(a.at[j]);
                squares += e * e;
                products[at + j * threads] = e * to_float(d.at[j]);
            }
        }
        float scale = rsqrtf(block_sums(make_float2(squares, 0.0f)).x / p.hidden + p.eps);
        for (uint32_t i = first, at = threadIdx.x; i < p.hidden; i += step, at += step) {
#pragma unroll
            for (int j = 0; j < N; j++) sums[at + j * threads] += scale * products[at + j * threads];
        }
    }
    float *part = p.parts + (size_t)blockIdx.x * p.hidden;
    for (uint32_t i = first, at = threadIdx.x; i < p.hidden; i += step, at += step) {
#pragma unroll
        for (int j = 0; j < N; j++) part[i + j] = sums[at + j * threads];
    }
}
#define RMS_NORM_WEIGHT_PARTS(T, SUFFIX)                                                                               \
    EACH_WIDTH(rms_norm_weight_parts, RmsNormWeight, T, SUFFIX, __launch_bounds__(1024))
EACH_DTYPE(RMS_NORM_WEIGHT_PARTS)

// A block of 1024 per 32 columns, a lane each: warps take every 32nd part, and the first adds what they have.
extern "C" __global__ void __launch_bounds__(1024) rms_norm_weight_sum(const __grid_constant__ RmsNormWeight p) {
    __shared__ float sums[32][32];
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (column < p.hidden) {
#pragma unroll 8
        for (uint32_t part = warp; part < p.blocks; part += 32) sum += p.parts[(size_t)part * p.hidden + column];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || column >= p.hidden) return;
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; i++) sum += sums[i][lane];
    p.dweight[column] = sum;
}

struct SiluMulBackward {
    const void *gate_up; // [tokens, 2, columns]
    const void *dy;      // [tokens, columns]
    void *dgate_up;      // [tokens, 2, columns]; may be gate_up
    uint32_t tokens, columns;
};

// With s the sigmoid of the gate g: d(g s)/dg = s (1 + g (1 - s)).
template <typename T, int N> __device__ void silu_mul_backward(const SiluMulBackward &p) {
    uint64_t i = ((uint64_t)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (i >= (uint64_t)p.tokens * p.columns) return;
    uint64_t at = i + i / p.columns * p.columns;
    const T *x = (const T *)p.gate_up + at;
    Vector<T, N> gate = load<N>(x), up = load<N>(x + p.columns), dy = load<N>((const T *)p.dy + i);
#pragma unroll
    for (int j = 0; j < N; j++) {
        float g = to_float(gate.at[j]), d = to_float(dy.at[j]), s = 1.0f / (1.0f + expf(-g));
        gate.at[j] = from_float<T>(d * to_float(up.at[j]) * (s * (1.0f + g * (1.0f - s))));
        up.at[j] = from_float<T>(d * (g * s));
    }
    T *out = (T *)p.dgate_up + at;
    store(out, gate), store(out + p.columns, up);
}
#define SILU_MUL_BACKWARD(T, SUFFIX) EACH_WIDTH(silu_mul_backward, SiluMulBackward, T, SUFFIX)
EACH_DTYPE(SILU_MUL_BACKWARD)
