// Losses of rows of logits, and their gradients in place of the logits. Arithmetic is f32.
//
// A block per row, two passes over it: one makes the softmaxes' sums and the loss, the other writes the gradient. A row
// of weight 0 gets a gradient of 0 whatever its logits are.
//
// `_narrow` kernels take rows of any length; the others rows that are a multiple of 16 bytes, at addresses that are.
#include "vector.cuh"
#include <float.h>

#define EACH_DTYPE(EACH) EACH(float, f32) EACH(__half, f16) EACH(__nv_bfloat16, bf16)

// A softmax on the way, and the mean of something under it.
struct Softmax {
    float max = -FLT_MAX; // finite, so that the difference of two is a number
    float sum = 0.0f;     // of exp(x - max)
    float product = 0.0f; // of exp(x - max) * what

    __device__ void rescale(float larger) {
        float by = expf(max - larger);
        max = larger, sum *= by, product *= by;
    }

    // N logits. What has no probability counts for nothing, even where `what` is infinite.
    template <int N> __device__ void add(const float (&x)[N], const float (&what)[N]) {
        float larger = max;
#pragma unroll
        for (int j = 0; j < N; j++) larger = fmaxf(larger, x[j]);
        if (larger > max) rescale(larger);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float e = expf(x[j] - max);
            sum += e;
            if (e != 0.0f) product += e * what[j];
        }
    }

    // The same to the bit in both of two lanes that exchange theirs: no fused operation, which prefers one of them.
    __device__ void meet(const Softmax &other) {
        float larger = fmaxf(max, other.max), mine = expf(max - larger), theirs = expf(other.max - larger);
        sum = __fadd_rn(__fmul_rn(sum, mine), __fmul_rn(other.sum, theirs));
        product = __fadd_rn(__fmul_rn(product, mine), __fmul_rn(other.product, theirs));
        max = larger;
    }

    __device__ void meet_warp() {
#pragma unroll
        for (int lane = 16; lane > 0; lane /= 2) {
            Softmax other;
            other.max = __shfl_xor_sync(0xffffffff, max, lane);
            other.sum = __shfl_xor_sync(0xffffffff, sum, lane);
            other.product = __shfl_xor_sync(0xffffffff, product, lane);
            meet(other);
        }
    }
};

// Those of all threads of a block of whole warps; once in a kernel.
template <int K> __device__ void meet_block(Softmax (&softmax)[K]) {
    __shared__ float3 parts[K][32];
    uint32_t lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll
    for (int k = 0; k < K; k++) {
        softmax[k].meet_warp();
        if (lane == 0) parts[k][threadIdx.x / 32] = {softmax[k].max, softmax[k].sum, softmax[k].product};
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; k++) {
        softmax[k] = Softmax();
        if (lane < warps) softmax[k].max = parts[k][lane].x, softmax[k].sum = parts[k][lane].y;
        if (lane < warps) softmax[k].product = parts[k][lane].z;
        softmax[k].meet_warp();
    }
}

template <int N, typename T> __device__ inline void load_floats(const T *from, float (&to)[N]) {
    Vector<T, N> x = load<N>(from);
#pragma unroll
    for (int j = 0; j < N; j++) to[j] = to_float(x.at[j]);
}
template <int N, typename T> __device__ inline void store_floats(T *to, const float (&from)[N]) {
    Vector<T, N> x;
#pragma unroll
    for (int j = 0; j < N; j++) x.at[j] = from_float<T>(from[j]);
    store(to, x);
}

struct Distil {
    void *student;        // [rows, vocab]; the gradient in place
    const void *teacher;  // [rows, vocab]
    const float *weights; // [rows]: of the gradient
    float *kl;            // [rows]
    uint32_t rows, vocab;
};

// KL(p || q) = sum_v p (log p - log q), p the student's probabilities and q the teacher's if `Student`, else the other way
// round. With m = sum_v p (x_p - x_q), the mean difference of the logits:
// KL = m - (log sum exp x_p - log sum exp x_q), and the student's gradient is p (x_p - x_q - m), or p_student - p_teacher.
template <typename T, int N, bool Student> __device__ void distil(const Distil &p) {
    T *student = (T *)p.student + (size_t)blockIdx.x * p.vocab;
    const T *teacher = (const T *)p.teacher + (size_t)blockIdx.x * p.vocab;
    uint32_t first = threadIdx.x * N, step = blockDim.x * N;
    Softmax both[2]; // the student's, the teacher's
#pragma unroll 2
    for (uint32_t i = first; i < p.vocab; i += step) {
        float s[N], t[N], difference[N];
        load_floats(student + i, s), load_floats(teacher + i, t);
#pragma unroll
        for (int j = 0; j < N; j++) difference[j] = Student ? s[j] - t[j] : t[j] - s[j];
        both[0].add(s, difference), both[1].add(t, difference); // the product of one of them is dropped
    }
    meet_block(both);
    const Softmax &lead = both[Student ? 0 : 1], &other = both[Student ? 1 : 0];
    float mean = lead.product / lead.sum, weight = p.weights[blockIdx.x];
    if (threadIdx.x == 0) p.kl[blockIdx.x] = mean - (lead.max - other.max) - logf(lead.sum / other.sum);

    float by_student = 1.0f / both[0].sum, by_teacher = 1.0f / both[1].sum;
#pragma unroll 2
    for (uint32_t i = first; i < p.vocab; i += step) {
        float s[N], t[N];
        load_floats(student + i, s), load_floats(teacher + i, t);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float ps = expf(s[j] - both[0].max) * by_student, slope;
            if (Student) {
                slope = ps != 0.0f ? ps * (s[j] - t[j] - mean) : 0.0f;
            } else {
                slope = ps - expf(t[j] - both[1].max) * by_teacher;
            }
            s[j] = weight != 0.0f ? weight * slope : 0.0f;
        }
        store_floats(student + i, s);
    }
}
#define DISTIL(T, SUFFIX)                                                                                              \
    DISTIL_AS(distil_##SUFFIX, T, WIDE<T>, true) DISTIL_AS(distil_narrow_##SUFFIX, T, 1, true)                         \
    DISTIL_AS(distil_teacher_##SUFFIX, T, WIDE<T>, false) DISTIL_AS(distil_teacher_narrow_##SUFFIX, T, 1, false)
#define DISTIL_AS(NAME, T, N, STUDENT)                                                                                 \
    extern "C" __global__ void __launch_bounds__(512) NAME(const __grid_constant__ Distil p) {                         \
        distil<T, N, STUDENT>(p);                                                                                      \
    }
EACH_DTYPE(DISTIL)

struct CrossEntropy {
    void *logits;            // [rows, vocab]; the gradient in place
    const uint32_t *targets; // [rows]
    const float *weights;    // [rows]: of the gradient
    float *nll;              // [rows]
    uint32_t rows, vocab;
};

// -log p of the target, and p less 1 there. A target outside the vocabulary makes NaN: an error that shows; where the
// weight is 0, it makes a loss of 0.
template <typename T, int N> __device__ void cross_entropy(const CrossEntropy &p) {
    T *logits = (T *)p.logits + (size_t)blockIdx.x * p.vocab;
    uint32_t first = threadIdx.x * N, step = blockDim.x * N, target = p.targets[blockIdx.x];
    float weight = p.weights[blockIdx.x], chosen = target < p.vocab ? to_float(logits[target]) : 0.0f;
    Softmax softmax[1];
#pragma unroll 2
    for (uint32_t i = first; i < p.vocab; i += step) {
        float x[N];
        load_floats(logits + i, x);
        softmax[0].add(x, x); // the product is dropped
    }
    meet_block(softmax); // all have read `chosen` before anyone writes there
    float max = softmax[0].max, by = 1.0f / softmax[0].sum, nll = max - chosen + logf(softmax[0].sum);
    if (target >= p.vocab) {
        nll = weight != 0.0f ? __int_as_float(0x7fffffff) : 0.0f;
        by = __int_as_float(0x7fffffff);
    }
    if (threadIdx.x == 0) p.nll[blockIdx.x] = nll;
#pragma unroll 2
    for (uint32_t i = first; i < p.vocab; i += step) {
        float x[N];
        load_floats(logits + i, x);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float slope = expf(x[j] - max) * by - (i + j == target ? 1.0f : 0.0f);
            x[j] = weight != 0.0f ? weight * slope : 0.0f;
        }
        store_floats(logits + i, x);
    }
}
#define CROSS_ENTROPY(T, SUFFIX)                                                                                       \
    CROSS_ENTROPY_AS(cross_entropy_##SUFFIX, T, WIDE<T>) CROSS_ENTROPY_AS(cross_entropy_narrow_##SUFFIX, T, 1)
#define CROSS_ENTROPY_AS(NAME, T, N)                                                                                   \
    extern "C" __global__ void __launch_bounds__(512) NAME(const __grid_constant__ CrossEntropy p) {                   \
        cross_entropy<T, N>(p);                                                                                        \
    }
EACH_DTYPE(CROSS_ENTROPY)
