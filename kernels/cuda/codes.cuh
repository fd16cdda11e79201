// Keys and values of 8 bits: OCP's E4M3, up to 448, or whole numbers from -127 to 127; each vector times a power of two of
// its own. `Store::factor` has the exponents of an entry: the key's in the low byte, the value's in the high one, each with
// 127 added.
//
// Queries and outputs beside such a store are bf16. In bf16 and, within its range, in f16 every number of the store is exact.
#pragma once
#include "store.cuh"
#include <cuda_fp8.h>
#include <type_traits>

struct Fp8 {
    uint8_t code;
};
struct Int8 {
    int8_t code;
};

// The type of queries and outputs beside a store of E.
template <typename E> struct Beside {
    using T = E;
    static constexpr bool SCALED = false;
};
template <> struct Beside<Fp8> {
    using T = __nv_bfloat16;
    static constexpr bool SCALED = true;
};
template <> struct Beside<Int8> {
    using T = __nv_bfloat16;
    static constexpr bool SCALED = true;
};

// 2^(biased - 127)
__device__ inline float power(uint32_t biased) { return __uint_as_float(biased << 23); }

// The biased exponent of a vector whose largest component this is: what is left of it falls in the upper half of E's range.
template <typename E> __device__ inline uint32_t exponent_of(float largest) {
    // The largest number is 448 = 1.75 * 2^8, or 127 = 1.984375 * 2^6.
    constexpr bool FLOAT = std::is_same_v<E, Fp8>;
    constexpr uint32_t MANTISSA = FLOAT ? 0x600000 : 0x7e0000;
    constexpr int EXPONENT = FLOAT ? 8 : 6;
    if (largest == 0.0f) return 127;
    uint32_t bits = __float_as_uint(largest), above = (bits & 0x7fffff) > MANTISSA;
    return min(max((int)(bits >> 23) - EXPONENT + (int)above, 127 - 40), 127 + 60);
}

template <typename E> __device__ inline float key_factor(const Store &store, size_t entry) {
    if constexpr (Beside<E>::SCALED) return power(store.factor[entry] & 0xff);
    return 1.0f;
}
template <typename E> __device__ inline float value_factor(const Store &store, size_t entry) {
    if constexpr (Beside<E>::SCALED) return power(store.factor[entry] >> 8);
    return 1.0f;
}

template <> __device__ inline float to_float(Fp8 x) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(x.code, __NV_E4M3)));
}
template <> __device__ inline float to_float(Int8 x) { return x.code; }

// The nearest code.
__device__ inline void narrow(Fp8 &to, float x) { to.code = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }
__device__ inline void narrow(Int8 &to, float x) { to.code = min(max(__float2int_rn(x), -127), 127); }

// Two codes, in the low and the next byte, as a pair of f16.
template <typename E> __device__ inline uint32_t half_pair(uint32_t codes);
template <> __device__ inline uint32_t half_pair<Fp8>(uint32_t codes) {
    __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2((__nv_fp8x2_storage_t)codes, __NV_E4M3);
    return (uint32_t)pair.x | (uint32_t)pair.y << 16;
}
template <> __device__ inline uint32_t half_pair<Int8>(uint32_t codes) {
    // x + 128 as the low bits of 1024, then 1152 taken off.
    uint32_t bits = __byte_perm(codes ^ 0x8080, 0x64, 0x4140);
    constexpr uint32_t LESS = 0x64806480;
    __half2 pair = __hsub2(*(__half2 *)&bits, *(const __half2 *)&LESS);
    return *(uint32_t *)&pair;
}

// Two codes, in the high byte of each half, as a pair of bf16: sign, exponent and mantissa moved to their places, and
// the bias of the exponent made up for.
__device__ inline uint32_t bf16_pair(uint32_t codes) {
    uint32_t bits = (codes & 0x80008000u) | (codes & 0x7f007f00u) >> 4;
    constexpr uint32_t SCALE = 0x7b807b80u; // 2^120, twice
    __nv_bfloat162 pair = __hmul2(*(__nv_bfloat162 *)&bits, *(const __nv_bfloat162 *)&SCALE);
    return *(uint32_t *)&pair;
}

// A pair of f16 as bf16.
__device__ inline uint32_t as_bf16(uint32_t pair) {
    float2 wide = __half22float2(*(__half2 *)&pair);
    __nv_bfloat162 x = __floats2bfloat162_rn(wide.x, wide.y);
    return *(uint32_t *)&x;
}

// Four codes as bf16, in order.
template <typename E> __device__ inline uint2 bf16_four(uint32_t codes) {
    if constexpr (std::is_same_v<E, Fp8>) {
        return make_uint2(bf16_pair(__byte_perm(codes, 0, 0x1404)), bf16_pair(__byte_perm(codes, 0, 0x3424)));
    } else {
        return make_uint2(as_bf16(half_pair<E>(codes & 0xffff)), as_bf16(half_pair<E>(codes >> 16)));
    }
}
