// Reads memory and nothing else: the ceiling of what decode attention can reach.
#include <stdint.h>

struct ReadParams {
    const uint4 *from;
    uint32_t *out; // one word; written only if the sum is an improbable number, so that no load is left out
    uint64_t vectors;
};

extern "C" __global__ void __launch_bounds__(512) read_memory(const ReadParams p) {
    uint64_t step = (uint64_t)gridDim.x * blockDim.x, i = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t sum = 0;
    for (; i + 3 * step < p.vectors; i += 4 * step) {
        uint4 a = __ldcs(p.from + i), b = __ldcs(p.from + i + step), c = __ldcs(p.from + i + 2 * step),
              d = __ldcs(p.from + i + 3 * step);
        sum += a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    for (; i < p.vectors; i += step) sum += p.from[i].x;
    if (sum == 0x9E3779B9u) *p.out = sum;
}
