// As many numbers at a time as a register of the machine holds, in the compiler's own vector types: of wider ones GCC 12
// makes memory traffic.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace smollm {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;  // NEON, SSE
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));  // two in each lane
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

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

// a * b + c, rounded once where the machine can: left to the compiler, it might differ between two copies of one loop.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

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
inline Floats from_bf16(Halves halves) {
#if defined(__aarch64__)
    return (Floats)vshll_n_u16(halves, 16);
#else
    return as_floats(__builtin_convertvector(halves, Words) << 16);
#endif
}

// Round to nearest, ties to even. A NaN stays one, as its payload's rounding cannot carry into the sign in practice.
inline Halves to_bf16(Floats numbers) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)numbers);
#else
    Words bits = (Words)numbers;
    bits += 0x7fff + ((bits >> 16) & 1);
#if defined(__aarch64__)
    return vshrn_n_u32(bits, 16);
#else
    return __builtin_convertvector(bits >> 16, Halves);
#endif
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
inline Ints set_lanes(int bits) {
    Ints bit = {};
    for (int lane = 0; lane < LANES; lane++) bit[lane] = 1 << lane;
    return (bit & bits) != 0;
}

// The first `count` lanes set, 0 <= count <= LANES.
inline Ints first_lanes(int count) {
    Ints lane = {};
    for (int number = 0; number < LANES; number++) lane[number] = number;
    return lane < count;
}

}  // namespace smollm
