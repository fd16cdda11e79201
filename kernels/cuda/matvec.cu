// y = x W^T for a few tokens, where reading W is all the time it takes. W streams from memory once, past the L1, into
// the registers of the tensor cores; tokens are the columns of an m16n8k16 product, so eight cost what one costs.
//
// The order in which k is summed is free as long as W and x agree on it: a lane takes 16 bytes of a row at once and feeds
// them to two products, the first four elements to one, the last four to the other.
#include "mma.cuh"
#include "vector.cuh"

struct Matvec {
    const void *x; // [tokens, in]
    const void *w; // [out, in]; gated [2 out, in]: the gate's rows, then those of up
    void *y;       // [tokens, out]; gated: silu(gate) * up
    uint32_t tokens;
    uint32_t in; // a multiple of 8
    uint32_t out;
};

// Read once: no line of the L1 is worth it.
__device__ inline uint4 stream(const void *from) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return x;
}

// A block makes a tile of 16 rows of W for up to 8 NT tokens; its warps share k in pieces of 64 UNROLL elements.
template <typename T, int NT, bool GATED, int WARPS, int UNROLL> __device__ void matvec(const Matvec &p) {
    constexpr int TOKENS = 8 * NT, ROWS = GATED ? 8 : 16; // of y
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    uint32_t tile = blockIdx.x * ROWS;
    // Rows past the end repeat the last one; nobody writes them.
    uint32_t low_row = min(tile + g, p.out - 1), high_row = GATED ? low_row + p.out : min(tile + g + 8, p.out - 1);
    const T *low = (const T *)p.w + (size_t)low_row * p.in, *high = (const T *)p.w + (size_t)high_row * p.in;

    // Columns past the last token repeat it; nobody writes them.
    const T *x[NT];
#pragma unroll
    for (int n = 0; n < NT; n++) x[n] = (const T *)p.x + (size_t)min(n * 8 + g, p.tokens - 1) * p.in;

    float acc[NT][4] = {};
    auto multiply = [&](uint4 a, uint4 b, uint32_t k) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            uint4 e = __ldg(reinterpret_cast<const uint4 *>(x[n] + k));
            mma<T>(acc[n], {a.x, b.x, a.y, b.y}, e.x, e.y);
            mma<T>(acc[n], {a.z, b.z, a.w, b.w}, e.z, e.w);
        }
    };
    constexpr uint32_t PIECE = 64 * UNROLL;
    uint32_t pieces = p.in / PIECE;
    for (uint32_t piece = warp; piece < pieces; piece += WARPS) {
        uint32_t k = piece * PIECE + q * 8;
        uint4 a[2 * UNROLL], b[2 * UNROLL];
#pragma unroll
        for (int u = 0; u < 2 * UNROLL; u++) a[u] = stream(low + k + u * 32), b[u] = stream(high + k + u * 32);
#pragma unroll
        for (int u = 0; u < 2 * UNROLL; u++) multiply(a[u], b[u], k + u * 32);
    }
    for (uint32_t at = pieces * PIECE + warp * 32; at < p.in; at += WARPS * 32) {
        uint32_t k = at + q * 8;
        uint4 none = make_uint4(0, 0, 0, 0);
        bool valid = k < p.in;
        multiply(valid ? stream(low + k) : none, valid ? stream(high + k) : none, valid ? k : 0);
    }

    __shared__ float parts[WARPS][TOKENS][17]; // [.., 16 rows], one more against bank conflicts
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) parts[warp][n * 8 + 2 * q + e % 2][g + e / 2 * 8] = acc[n][e];
    __syncthreads();
    auto total = [&](uint32_t token, uint32_t row) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += parts[w][token][row];
        return sum;
    };
    for (uint32_t i = threadIdx.x; i < TOKENS * ROWS; i += WARPS * 32) {
        uint32_t token = i / ROWS, row = i % ROWS;
        if (token >= p.tokens || tile + row >= p.out) continue;
        float y = GATED ? silu(total(token, row)) * total(token, row + 8) : total(token, row);
        ((T *)p.y)[(size_t)token * p.out + tile + row] = from_float<T>(y);
    }
}

#define MATVEC(T, SUFFIX, NT)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256, 2) matvec_##NT##_##SUFFIX(const __grid_constant__ Matvec p) {       \
        matvec<T, NT, false, 8, 4>(p);                                                                                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 2) matvec_silu_##NT##_##SUFFIX(const __grid_constant__ Matvec p) {  \
        matvec<T, NT, true, 8, 4>(p);                                                                                  \
    }
MATVEC(__half, f16, 1)
MATVEC(__half, f16, 2)
MATVEC(__half, f16, 4)
MATVEC(__nv_bfloat16, bf16, 1)
MATVEC(__nv_bfloat16, bf16, 2)
MATVEC(__nv_bfloat16, bf16, 4)
