// How weights and inputs are multiplied and summed, by what the machine has. Each of these takes one group of inputs of
// one row, 2 in bf16 and 4 in int8, times the same group's weights for LANES outputs.
#pragma once
#include "matrix.h"

namespace smollm {

// The 32 bits of a row that stand at a place, for all lanes.
inline Words words_at(const uint8_t* row, int place) {
    uint32_t words;
    memcpy(&words, row + place, 4);
    return words - Words{};
}

#if HAS_BF16_PRODUCTS

struct Arithmetic16 {
    using Sums = Floats;
    using Weights = Words;
    static constexpr int PLANES = 1, STEPS = 1, MOST_TILES = 1 << 20;

    static Weights take_apart(Words weights, int) { return weights; }

    static Words input(const Rows& rows, int row, int, int k, int group, int) {
        return words_at(rows.row(row), k * 64 + group * 4);
    }

    static void add(Sums& total, Weights weights, Words input) {
#if defined(__AVX512BF16__)
        total = (Floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)weights, (__m512bh)input);
#else
        total = vbfdotq_f32(total, (bfloat16x8_t)weights, (bfloat16x8_t)input);
#endif
    }

    static Floats total(const Sums* totals, const Matrix&, int, const Rows&, int) { return totals[0]; }
};

#else

// Weights become floats, one after the other of a group; inputs are floats already.
struct Arithmetic16 {
    using Sums = Floats;
    using Weights = Floats;
    static constexpr int PLANES = 1, STEPS = 2, MOST_TILES = 1 << 20;

    static Weights take_apart(Words weights, int step) {
        return (Floats)(step == 0 ? weights << 16 : weights & 0xffff0000u);
    }

    static float input(const Rows& rows, int row, int, int k, int group, int step) {
        return ((const float*)rows.row(row))[(k * GROUPS + group) * 2 + step];
    }

    static void add(Sums& total, Weights weights, float input) { total += weights * input; }

    static Floats total(const Sums* totals, const Matrix&, int, const Rows&, int) { return totals[0]; }
};

#endif

#if HAS_INT8_PRODUCTS

// A group at once, in each of the two planes.
struct Arithmetic8 {
    using Sums = Ints;
    using Weights = Words;
    static constexpr int PLANES = 2, STEPS = 1, MOST_TILES = 1 << 20;

    static Weights take_apart(Words weights, int) { return weights; }

    static Words input(const Rows& rows, int row, int plane, int k, int group, int) {
        return words_at(rows.row(row) + plane * (rows.stride / 2), k * 64 + group * 4);
    }

    static void add(Sums& total, Weights weights, Words input) {
#if defined(__AVX512VNNI__)
        // Takes unsigned inputs: 128 is added to each here, and 128 times the sum of the weights subtracted at the end.
        total = (Ints)_mm512_dpbusd_epi32((__m512i)total, (__m512i)(input ^ 0x80808080u), (__m512i)weights);
#else
        total = vdotq_s32(total, (int8x16_t)weights, (int8x16_t)input);
#endif
    }

    static Floats total(const Sums* totals, const Matrix& matrix, int output, const Rows& rows, int row) {
        auto whole = [&](Ints total) {
#if defined(__AVX512VNNI__)
            total -= load<Ints>(matrix.sums + output) * 128;
#endif
            return __builtin_convertvector(total, Floats);
        };
        const Floats scale = load<Floats>(matrix.scales + output) * rows.scales[row];
        return (whole(totals[0]) * 128.0f + whole(totals[1])) * scale;
    }
};

#else

// Of two pairs of 16-bit numbers in each lane, the sum of the products.
inline Ints products(Words a, Words b) {
#if defined(__AVX512BW__)
    return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
    return (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
    const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
    return vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
#else
    return (((Ints)a << 16) >> 16) * (((Ints)b << 16) >> 16) + ((Ints)a >> 16) * ((Ints)b >> 16);
#endif
}

// Weights become 16-bit numbers, the first and the third of a group, then the second and the fourth, which `Matrix::set`
// has put there in the inputs' order.
struct Arithmetic8 {
    using Sums = Ints;
    using Weights = Words;
    // What 1,024 inputs of at most 127 * 128 add up to with weights of at most 127 still fits 32 bits.
    static constexpr int PLANES = 1, STEPS = 2, MOST_TILES = 16;

    static Weights take_apart(Words weights, int step) {
        const Shorts pairs = (Shorts)weights;
        return (Words)((step == 0 ? pairs << 8 : pairs) >> 8);
    }

    static Words input(const Rows& rows, int row, int, int k, int group, int step) {
        return words_at(rows.row(row), (k * GROUPS + group) * 8 + step * 4);
    }

    static void add(Sums& total, Weights weights, Words input) { total += products(weights, input); }

    static Floats total(const Sums* totals, const Matrix& matrix, int output, const Rows& rows, int row) {
        const Floats scale = load<Floats>(matrix.scales + output) * rows.scales[row];
        return __builtin_convertvector(totals[0], Floats) * scale;
    }
};

#endif

}  // namespace smollm
