// Remembers the newest queries of each sequence.
#include "store.cuh"

struct ObserveParams {
    const void *q;         // element (token, i) at token * q_stride + i
    float *ring;           // [seats, size, width]: the query of position p is at p % size
    const Span *spans;
    const uint32_t *span_of; // [tokens]
    uint32_t q_stride, width, size;
};

namespace {

template <typename T> __device__ void observe(const ObserveParams &p) {
    uint32_t token = blockIdx.x;
    const Span span = p.spans[p.span_of[token]];
    uint32_t j = token - span.first;
    if (span.len - j > p.size) return; // a newer one takes its place
    float *to = p.ring + ((size_t)span.seat * p.size + (span.start + j) % p.size) * p.width;
    const T *from = (const T *)p.q + (size_t)token * p.q_stride;
    for (uint32_t i = threadIdx.x; i < p.width; i += blockDim.x) to[i] = to_float(from[i]);
}

} // namespace

extern "C" __global__ void observe_f32(const ObserveParams p) { observe<float>(p); }
extern "C" __global__ void observe_f16(const ObserveParams p) { observe<__half>(p); }
extern "C" __global__ void observe_bf16(const ObserveParams p) { observe<__nv_bfloat16>(p); }
