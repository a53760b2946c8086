// Weights laid out once, in the order in which they are read.
//
// A tile is 1 KiB: 16 outputs by 16 groups of 4 bytes along the inputs, which is what AMX loads, what AVX512-BF16 and
// VNNI multiply at once, and what everything else can take apart. A group holds 2 numbers in bf16, 4 in int8. Tiles of
// two blocks of 16 outputs alternate, so that a thread reads one long stream: matrix[pair][k tile][block of the pair].
#pragma once
#include <utility>
#include "vectors.h"

namespace smollm {

constexpr int BLOCK = 16;        // outputs of a tile
constexpr int PAIR = 2 * BLOCK;  // outputs that are computed together
constexpr int GROUPS = 16;       // 4-byte groups of inputs in a tile
constexpr int TILE = 1024;       // bytes
constexpr int ROWS = 32;         // rows that are computed together, at most

constexpr int AHEAD = 2048;      // bytes by which weights are asked for before they are needed

// Whether the machine multiplies bf16, and int8, as such; else inputs are floats, and whole numbers of 16 bits.
#if defined(__AMX_TILE__) || defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define HAS_BF16_PRODUCTS 1
#else
#define HAS_BF16_PRODUCTS 0
#endif
#if defined(__AMX_TILE__) || defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
#define HAS_INT8_PRODUCTS 1
#else
#define HAS_INT8_PRODUCTS 0
#endif

// out[row][0..31] for some rows and one pair of blocks.
typedef float Results[ROWS][PAIR];

inline void fetch(const uint8_t* address) { __builtin_prefetch(address, 0, 3); }

inline void fetch_ahead(const uint8_t* tile) {
    for (int line = 0; line < TILE; line += 64) fetch(tile + AHEAD + line);
}

enum Kind { FP32, BF16, FP16 };

// Writes numbers [from, from + count) of an array of any kind as floats.
inline void widen(Kind kind, const void* numbers, int64_t from, int count, float* to) {
    if (kind == FP32) {
        memcpy(to, (const float*)numbers + from, count * sizeof(float));
        return;
    }
    const uint16_t* halves = (const uint16_t*)numbers + from;
    for (int k = 0; k < count; k += LANES) {
        const int some = count - k < LANES ? count - k : LANES;
        Halves given = {};
        memcpy(&given, halves + k, some * sizeof(uint16_t));
        const Floats wide = kind == BF16 ? from_bf16(given) : from_fp16(given);
        store_some(to + k, wide, some);
    }
}

struct Matrix {
    uint8_t* tiles = nullptr;
    float* scales = nullptr;  // int8: one per output
    int* sums = nullptr;      // int8: the sum of each output's weights
    int num_inputs = 0, num_pairs = 0, num_k_tiles = 0;
    bool is_int8 = false;

    int inputs_of_tile() const { return is_int8 ? 64 : 32; }
    int num_outputs() const { return num_pairs * PAIR; }
    int64_t pair_bytes() const { return (int64_t)num_k_tiles * 2 * TILE; }
    int64_t bytes() const { return num_pairs * pair_bytes(); }
    const uint8_t* pair(int number) const { return tiles + number * pair_bytes(); }

    void shape(int inputs, int outputs, bool int8) {
        is_int8 = int8;
        num_inputs = inputs;
        num_pairs = (outputs + PAIR - 1) / PAIR;
        num_k_tiles = (inputs + inputs_of_tile() - 1) / inputs_of_tile();
    }

    // Writes one output's weights, `num_inputs` floats, to where they belong. What is not written stays zero.
    void set(int output, const float* weights) {
        uint8_t* block = tiles + output / PAIR * pair_bytes() + output / BLOCK % 2 * TILE + output % BLOCK * 4;
        if (!is_int8) {
            for (int k = 0; k < num_inputs; k += LANES)
                set_groups(block, k, to_bf16(load_some(weights + k, num_inputs - k)));
            return;
        }
        Floats most = {};
        for (int k = 0; k < num_inputs; k += LANES) {
            Floats some = load_some(weights + k, num_inputs - k);
            most = larger(most, larger(some, -some));
        }
        const float scale = maximum(most) / 127;
        Ints total = {};
        for (int k = 0; k < num_inputs; k += LANES) {
            Floats some = load_some(weights + k, num_inputs - k);
            Ints whole = scale > 0 ? rounded(some / scale) : Ints{};
            set_groups(block, k, __builtin_convertvector(whole, Bytes));
            total += whole;
        }
        scales[output] = scale;
        sums[output] = 0;
        for (int lane = 0; lane < LANES; lane++) sums[output] += total[lane];
    }

   private:
    // Puts LANES inputs of one output from input k on into their groups of 4 bytes, which lie 64 bytes apart.
    template <class Numbers>
    void set_groups(uint8_t* block, int k, Numbers numbers) const {
        uint8_t* group = block + k / inputs_of_tile() * 2 * TILE + k % inputs_of_tile() * 64 / (is_int8 ? 4 : 2);
        for (size_t i = 0; i < sizeof numbers / 4; i++) {
            uint8_t four[4];
            memcpy(four, (const uint8_t*)&numbers + i * 4, 4);
            if (is_int8 && !HAS_INT8_PRODUCTS) std::swap(four[1], four[2]);  // taken apart, bytes 0 and 2 come first
            memcpy(group + i * 64, four, 4);
        }
    }
};

}  // namespace smollm
