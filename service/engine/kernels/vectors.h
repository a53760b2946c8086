// Sixteen numbers at a time, in the compiler's own vector types: one AVX-512 register, two of AVX2, four of NEON.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace smollm {

constexpr int LANES = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

template <class Vector>
inline Vector load(const void* from) {
    Vector vector;
    memcpy(&vector, from, sizeof(Vector));
    return vector;
}

template <class Vector>
inline void store(void* to, const Vector& vector) {
    memcpy(to, &vector, sizeof(Vector));
}

inline Floats splat(float value) { return value - Floats{}; }
inline Floats as_floats(Words bits) { return (Floats)bits; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

// The floats of `count` numbers from `from` on, at most LANES, and `beyond` behind them.
inline Floats load_some(const float* from, int count, float beyond = 0) {
    if (count >= LANES) return load<Floats>(from);
    Floats vector = splat(beyond);
    memcpy(&vector, from, count * sizeof(float));
    return vector;
}

// As many of the numbers as `count` says, at most LANES.
inline void store_some(float* to, Floats numbers, int count) {
    if (count >= LANES) return store(to, numbers);
    memcpy(to, &numbers, count * sizeof(float));
}

// bfloat16 is the upper half of a float.
inline Floats from_bf16(Halves halves) { return as_floats(__builtin_convertvector(halves, Words) << 16); }

// Round to nearest, ties to even. A NaN stays one, as its payload's rounding cannot carry into the sign in practice.
inline Halves to_bf16(Floats numbers) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)numbers);
#else
    Words bits = (Words)numbers;
    return __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
#endif
}

inline float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

// fp16's exponent and mantissa stand in fp32's places as a number 2^112 too small; infinities and NaNs stay such.
inline Floats from_fp16(Halves halves) {
    const Words bits = __builtin_convertvector(halves, Words);
    const Words size = (Words)(as_floats((bits & 0x7fff) << 13) * 0x1p112f);
    const Words is_special = (Words)((bits & 0x7c00) == 0x7c00);
    return as_floats(size | (is_special & 0x7f800000) | (bits & 0x8000) << 16);
}

// In a fixed order: halves, quarters, and so on.
inline float sum(Floats v) {
    float lanes[LANES];
    store(lanes, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

inline float maximum(Floats v) {
    float lanes[LANES];
    store(lanes, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}

// 1.5 * 2^23: added to a number below 2^22, it leaves the nearest whole number in the low bits.
constexpr float SHIFT = 12582912.0f;

inline Ints rounded(Floats x) { return (Ints)(x + SHIFT) - (Ints)splat(SHIFT); }

// 2^x to about 2e-7, for x in [-126, 126] and clamped to it.
inline Floats exp2(Floats x) {
    x = smaller(larger(x, splat(-126.0f)), splat(126.0f));
    Floats shifted = x + SHIFT;
    Ints n = (Ints)shifted - (Ints)splat(SHIFT);
    Floats f = x - (shifted - SHIFT);  // in [-0.5, 0.5]; coefficients are ln(2)^k / k!
    Floats p = splat(1.5403530e-4f);
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return (Floats)((Ints)p + (n << 23));
}

inline Floats silu(Floats x) { return x / (1.0f + exp2(x * -1.44269504f)); }

// The lanes set whose bits are.
inline Ints set_lanes(uint16_t bits) {
    const Ints bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    return (bit & (int)bits) != 0;
}

// The first `count` lanes set, 0 <= count <= 16.
inline Ints first_lanes(int count) {
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return lane < count;
}

}  // namespace smollm
