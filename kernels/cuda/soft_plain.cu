// What soft.cu computes, without tensor cores: any element type and any head size.
//
// A warp has one row, a query or (by keys) a key, and takes 32 columns at a time: a lane a column for the scores, a
// lane an element for the sums, which lie in shared memory.
#include "soft.cuh"

namespace {

constexpr int WARPS = 4;

template <typename T> __device__ inline float dot(const T *a, const T *b, uint32_t dim) {
    float sum = 0.0f;
    for (uint32_t i = 0; i < dim; i++) sum = fmaf(to_float(a[i]), to_float(b[i]), sum);
    return sum;
}

// sums += the lanes' weights times the `count` columns from `first` on.
template <typename T>
__device__ inline void gather(float *sums, float weight, const HeadView<const T> &columns, uint32_t first,
                              uint32_t count, uint32_t dim) {
    for (uint32_t j = 0; j < count; j++) {
        const float w = __shfl_sync(~0u, weight, j);
        const T *column = columns.token(first + j);
        for (uint32_t i = threadIdx.x % 32; i < dim; i += 32) sums[i] = fmaf(w, to_float(column[i]), sums[i]);
    }
}

template <typename T> __device__ inline void write(T *to, const float *sums, float scale, uint32_t dim) {
    for (uint32_t i = threadIdx.x % 32; i < dim; i += 32) to[i] = from_float<T>(sums[i] * scale);
}

// A warp's row.
struct Row {
    uint32_t sequence, head, at;
    size_t token; // the sequence's first
    bool exists;

    __device__ Row(const Soft &soft, uint32_t heads) {
        size_t row = (size_t)blockIdx.x * WARPS + threadIdx.x / 32;
        head = row % heads, row /= heads;
        at = row % soft.length, sequence = row / soft.length;
        token = (size_t)sequence * soft.length, exists = sequence < soft.sequences;
    }
};

// A head of qkv and of a tensor of the queries' shape.
template <typename T> __device__ inline HeadView<const T> part(const Soft &soft, const Row &row, uint32_t head) {
    return head_view((const T *)soft.qkv, soft, row.sequence, soft.heads(), head);
}
template <typename T>
__device__ inline HeadView<const T> part(const void *base, const Soft &soft, const Row &row, uint32_t head) {
    return head_view((const T *)base, soft, row.sequence, soft.q_heads, head);
}

__device__ inline float gate(const Soft &soft, const Row &row, uint32_t query, uint32_t key, uint32_t kv_head) {
    bool beyond = soft.keep && (int)(query - key) > soft.window;
    return beyond ? fmaxf(soft.keep[(row.token + key) * soft.kv_heads + kv_head], LEAST_KEEP) : 0.0f;
}

template <typename T> __device__ inline void forward(const SoftForward &p) {
    extern __shared__ float memory[];
    const Soft &soft = p.soft;
    const Row row(soft, soft.q_heads);
    if (!row.exists) return;
    const uint32_t dim = soft.head_dim, kv_head = row.head / soft.group(), lane = threadIdx.x % 32;
    float *y = memory + threadIdx.x / 32 * dim;
    for (uint32_t i = lane; i < dim; i += 32) y[i] = 0.0f;
    const T *q = part<T>(soft, row, row.head).token(row.at);
    const auto k = part<T>(soft, row, soft.q_heads + kv_head);
    const auto v = part<T>(soft, row, soft.q_heads + soft.kv_heads + kv_head);
    float max = -INFINITY, sum = 0.0f;
    for (uint32_t first = 0; first <= row.at; first += 32) {
        const uint32_t key = first + lane, count = min(32u, row.at + 1 - first);
        float s = -INFINITY;
        if (lane < count) s = dot(q, k.token(key), dim) * soft.scale + gate(soft, row, row.at, key, kv_head);
        float top = s;
        for (int i = 16; i > 0; i /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
        top = fmaxf(top, max);
        const float weight = expf(s - top), fade = expf(max - top);
        sum = sum * fade + weight, max = top;
        for (uint32_t i = lane; i < dim; i += 32) y[i] *= fade;
        gather(y, weight, v, first, count, dim);
    }
    sum = warp_sum(sum);
    const size_t index = (row.token + row.at) * soft.q_heads + row.head;
    write((T *)p.y + index * dim, y, 1.0f / sum, dim);
    if (lane == 0) p.lse[index] = max + logf(sum);
}

// The weight of a pair, and the gradient of its score; `row` says which sequence.
template <typename T>
__device__ inline float2 pair(const SoftBackward &p, const Row &row, uint32_t query, uint32_t key, uint32_t head,
                              uint32_t kv_head) {
    const Soft &soft = p.soft;
    const uint32_t dim = soft.head_dim;
    const T *q = part<T>(soft, row, head).token(query), *k = part<T>(soft, row, soft.q_heads + kv_head).token(key);
    const T *v = part<T>(soft, row, soft.q_heads + soft.kv_heads + kv_head).token(key);
    const T *dy = part<T>(p.dy, soft, row, head).token(query);
    const float2 known = p.rows[(size_t)head * soft.sequences * soft.length + row.token + query];
    const float s = dot(q, k, dim) * soft.scale + gate(soft, row, query, key, kv_head);
    const float weight = exp2f(s * LOG2E - known.x);
    return {weight, weight * (dot(dy, v, dim) - known.y)};
}

template <typename T> __device__ inline void by_queries(const SoftBackward &p) {
    extern __shared__ float memory[];
    const Soft &soft = p.soft;
    const Row row(soft, soft.q_heads);
    if (!row.exists) return;
    const uint32_t dim = soft.head_dim, kv_head = row.head / soft.group(), lane = threadIdx.x % 32;
    float *dq = memory + threadIdx.x / 32 * dim;
    for (uint32_t i = lane; i < dim; i += 32) dq[i] = 0.0f;
    for (uint32_t first = 0; first <= row.at; first += 32) {
        const uint32_t count = min(32u, row.at + 1 - first);
        const float ds = lane < count ? pair<T>(p, row, row.at, first + lane, row.head, kv_head).y : 0.0f;
        gather(dq, ds, part<T>(soft, row, soft.q_heads + kv_head), first, count, dim);
    }
    T *to = (T *)p.dqkv + ((row.token + row.at) * soft.heads() + row.head) * dim;
    write(to, dq, soft.scale, dim);
}

template <typename T> __device__ inline void by_keys(const SoftBackward &p) {
    extern __shared__ float memory[];
    const Soft &soft = p.soft;
    const Row row(soft, soft.kv_heads);
    if (!row.exists) return;
    const uint32_t dim = soft.head_dim, group = soft.group(), lane = threadIdx.x % 32;
    float *dk = memory + threadIdx.x / 32 * 2 * dim, *dv = dk + dim, dkeep = 0.0f;
    for (uint32_t i = lane; i < dim; i += 32) dk[i] = dv[i] = 0.0f;
    for (uint32_t head = row.head * group; head < (row.head + 1) * group; head++) {
        for (uint32_t first = row.at; first < soft.length; first += 32) {
            const uint32_t query = first + lane, count = min(32u, soft.length - first);
            float2 x{0.0f, 0.0f};
            if (lane < count) x = pair<T>(p, row, query, row.at, head, row.head);
            if ((int)(query - row.at) > soft.window) dkeep += x.y;
            gather(dv, x.x, part<T>(p.dy, soft, row, head), first, count, dim);
            gather(dk, x.y, part<T>(soft, row, head), first, count, dim);
        }
    }
    T *to = (T *)p.dqkv + ((row.token + row.at) * soft.heads() + soft.q_heads + row.head) * dim;
    write(to, dk, soft.scale, dim);
    write(to + soft.kv_heads * dim, dv, 1.0f, dim);
    dkeep = warp_sum(dkeep);
    if (lane == 0) p.dkeep[(row.token + row.at) * soft.kv_heads + row.head] = dkeep;
}

} // namespace

#define PLAIN(suffix, T)                                                                                                \
    extern "C" __global__ void soft_plain_##suffix(const SoftForward p) { forward<T>(p); }                              \
    extern "C" __global__ void soft_plain_rows_##suffix(const SoftBackward p) { soft_rows<T, 1>(p); }                   \
    extern "C" __global__ void soft_plain_queries_##suffix(const SoftBackward p) { by_queries<T>(p); }                  \
    extern "C" __global__ void soft_plain_keys_##suffix(const SoftBackward p) { by_keys<T>(p); }

PLAIN(f32, float)
PLAIN(f16, __half)
PLAIN(bf16, __nv_bfloat16)
