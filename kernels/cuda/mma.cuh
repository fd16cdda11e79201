// Tensor core and asynchronous copy instructions that sm_80 and later share.
#pragma once
#include "store.cuh"

__device__ inline uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// 16 bytes to shared memory; zeros where `valid` is false.
__device__ inline void copy_async(uint32_t to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ inline void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

__device__ inline uint32_t load_shared(uint32_t address) {
    uint32_t x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
}

// Four 8x8 matrices of 16-bit elements; lane i names the row i % 8 of matrix i / 8.
__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// Rows of DIM 16-bit elements in shared memory, in chunks of 16 bytes, placed so that eight rows of one chunk fall in
// different banks: by a swizzle, or by a chunk of padding where the swizzle would leave the row.
template <int DIM> struct Lines {
    static constexpr bool SWIZZLED = DIM % 64 == 0;
    static constexpr uint32_t BYTES = DIM * 2 + (SWIZZLED ? 0 : 16);

    static __device__ uint32_t at(uint32_t row, uint32_t chunk) {
        return row * BYTES + (SWIZZLED ? chunk ^ (row & 7) : chunk) * 16;
    }
    // From the address of chunk 0 or 1 of a line to the one `chunks` further, which is even.
    static __device__ uint32_t step(uint32_t address, int chunks) {
        return SWIZZLED ? (address ^ (chunks % 8 * 16)) + chunks / 8 * 128 : address + chunks * 16;
    }
};

// d += a b for a 16x16 (row), b 16x8 (column), d 16x8 f32. Lane l holds of d: rows l/4 and l/4+8, columns 2(l%4)+{0,1}.
template <typename T> __device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ inline void mma<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats as one register of 16-bit elements, the first in the low half.
template <typename T> __device__ inline uint32_t pack(float low, float high);
template <> __device__ inline uint32_t pack<__nv_bfloat16>(float low, float high) {
    __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&x);
}
template <> __device__ inline uint32_t pack<__half>(float low, float high) {
    __half2 x = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&x);
}

// 2^x, within 2 ulp; 0 for minus infinity.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
