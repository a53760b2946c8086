// How weights and inputs are multiplied and summed, by what the machine has: a group of one row's inputs, 2 in bf16 and 4
// in int8, times the same group's weights for LANES outputs. Of each arithmetic:
//   STEPS        how many steps a group takes, each with some of its inputs
//   PLANES       sums of a row side by side
//   MOST_TILES   tiles along the inputs after which sums become floats, as they would no longer fit
//   take_apart   one step's weights, from a group's
//   input        one step's inputs of a row and plane, for all lanes
//   add          adds their products to a sum
//   floats       the sums of all planes, as one vector of floats
//   scaled       a row's results, from its floats
#pragma once
#include "rows.h"

namespace smollm {

constexpr int NO_LIMIT = 1 << 20;

// The 32 bits of a row that stand at a place, for all lanes.
inline Words words_at(const uint8_t* row, int place) {
    uint32_t words;
    memcpy(&words, row + place, 4);
    return words - Words{};
}

// What is the same of all that sum floats, and of all that sum whole numbers.
struct SumsOfFloats {
    using Sums = Floats;
    static constexpr int PLANES = 1, MOST_TILES = NO_LIMIT;

    static Floats floats(const Sums* planes, const Matrix&, int) { return planes[0]; }
    static Floats scaled(Floats result, const Matrix&, int, const Rows&, int) { return result; }
};

struct SumsOfWholeNumbers {
    using Sums = Ints;
    using Weights = Words;

    static Floats scaled(Floats result, const Matrix& matrix, int output, const Rows& rows, int row) {
        return result * (load<Floats>(matrix.scales + output) * rows.scales[row]);
    }
};

#if HAS_BF16_PRODUCTS

struct Arithmetic16 : SumsOfFloats {
    using Weights = Words;
    static constexpr int STEPS = 1;

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
};

#else

// Weights become floats, one after the other of a group; inputs are floats already.
struct Arithmetic16 : SumsOfFloats {
    using Weights = Floats;
    static constexpr int STEPS = 2;

    static Weights take_apart(Words weights, int step) {
        return (Floats)(step == 0 ? weights << 16 : weights & 0xffff0000u);
    }

    static Floats input(const Rows& rows, int row, int, int k, int group, int step) {
        return splat(((const float*)rows.row(row))[(k * GROUPS + group) * 2 + step]);
    }

    static void add(Sums& total, Weights weights, Floats input) { total = multiply_add(weights, input, total); }
};

#endif

#if HAS_INT8_PRODUCTS

// A group at once, in each of the two planes.
struct Arithmetic8 : SumsOfWholeNumbers {
    static constexpr int PLANES = 2, STEPS = 1, MOST_TILES = NO_LIMIT;

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

    static Floats floats(const Sums* planes, const Matrix& matrix, int output) {
        auto whole = [&](Ints total) {
#if defined(__AVX512VNNI__)
            total -= load<Ints>(matrix.sums + output) * 128;
#else
            (void)matrix, (void)output;
#endif
            return __builtin_convertvector(total, Floats);
        };
        return whole(planes[0]) * 128.0f + whole(planes[1]);  // times a power of 2: exact, fused or not
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
struct Arithmetic8 : SumsOfWholeNumbers {
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

    static Floats floats(const Sums* planes, const Matrix&, int) { return __builtin_convertvector(planes[0], Floats); }
};

#endif

}  // namespace smollm
