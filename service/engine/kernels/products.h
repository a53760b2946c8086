// Matrix products: up to 32 rows by 32 outputs at a time, in whatever instructions this file is compiled for.
//
// A row's result depends on nothing but the row: each output is summed over the inputs in one fixed order, whichever
// rows are computed beside it. On AMX even 1 row is a tile of 1 row; the multiplying costs less than the reading.
#pragma once
#include "matrix.h"

namespace smollm {

constexpr int AHEAD = 2048;  // bytes by which weights are asked for before they are needed

inline void fetch(const uint8_t* address) { __builtin_prefetch(address, 0, 3); }

inline void fetch_ahead(const uint8_t* tile) {
    for (int line = 0; line < TILE; line += 64) fetch(tile + AHEAD + line);
}

// out[row][0..31] for `count` rows from `first` on and one pair of blocks.
typedef float Results[ROWS][PAIR];

#if defined(__AMX_TILE__)

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// The compiler's own intrinsics do not say that they read memory (GCC 12): stores before them could come too late.
#define TILE_LOAD(tile, from, stride) \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"((int64_t)(stride)) : "memory")

inline thread_local int tiles_are_shaped = -1;

// Gives the tiles up, so that switching threads need not save them. Others in this thread may use them as well.
inline void release_tiles() {
    tiles_are_shaped = -1;
    _tile_release();
}

// Tiles 0 to 3 hold results, 4 and 5 rows of inputs, 6 and 7 weights; of rows 0 to 15 and 16 to 31 of the rows given.
inline void shape_tiles(int upper_rows, int lower_rows) {
    if (tiles_are_shaped == upper_rows * 32 + lower_rows) return;
    tiles_are_shaped = upper_rows * 32 + lower_rows;
    TileShapes shapes;
    const int rows[8] = {upper_rows, upper_rows, lower_rows, lower_rows, upper_rows, lower_rows, GROUPS, GROUPS};
    for (int tile = 0; tile < 8; tile++) {
        shapes.rows[tile] = (uint8_t)(rows[tile] ? rows[tile] : 1);
        shapes.bytes[tile] = 64;
    }
    asm volatile("ldtilecfg %0" ::"m"(shapes));
}

#define MULTIPLY_TILES(to, inputs, weights)                          \
    do {                                                             \
        if constexpr (IS_INT8) _tile_dpbssd(to, inputs, weights);    \
        else _tile_dpbf16ps(to, inputs, weights);                    \
    } while (0)

// `count` rows of `stride` bytes from `inputs` on, by one pair of blocks; the results are floats, or whole numbers.
template <bool IS_INT8>
inline void multiply_tiles(const Matrix& matrix, const uint8_t* inputs, int64_t stride, int count, int pair,
                           void* out) {
    const uint8_t* weights = matrix.pair(pair);
    const uint8_t* lower = inputs + BLOCK * stride;
    uint8_t* results = (uint8_t*)out;
    constexpr int WIDTH = PAIR * 4, LOWER = BLOCK * WIDTH, RIGHT = BLOCK * 4;
    shape_tiles(count < BLOCK ? count : BLOCK, count < BLOCK ? 0 : count - BLOCK);
    _tile_zero(0);
    _tile_zero(1);
    if (count <= BLOCK) {
        for (int k = 0; k < matrix.num_k_tiles; k++, weights += 2 * TILE, inputs += 64) {
            fetch_ahead(weights);
            fetch_ahead(weights + TILE);
            TILE_LOAD(4, inputs, stride);
            TILE_LOAD(6, weights, 64);
            MULTIPLY_TILES(0, 4, 6);
            TILE_LOAD(7, weights + TILE, 64);
            MULTIPLY_TILES(1, 4, 7);
        }
    } else {
        _tile_zero(2);
        _tile_zero(3);
        for (int k = 0; k < matrix.num_k_tiles; k++, weights += 2 * TILE, inputs += 64, lower += 64) {
            fetch_ahead(weights);
            fetch_ahead(weights + TILE);
            TILE_LOAD(4, inputs, stride);
            TILE_LOAD(6, weights, 64);
            MULTIPLY_TILES(0, 4, 6);
            TILE_LOAD(7, weights + TILE, 64);
            MULTIPLY_TILES(1, 4, 7);
            TILE_LOAD(5, lower, stride);
            MULTIPLY_TILES(2, 5, 6);
            MULTIPLY_TILES(3, 5, 7);
        }
        _tile_stored(2, results + LOWER, WIDTH);
        _tile_stored(3, results + LOWER + RIGHT, WIDTH);
    }
    _tile_stored(0, results, WIDTH);
    _tile_stored(1, results + RIGHT, WIDTH);
}

inline void multiply_pair_bf16(const Matrix& matrix, const Rows& rows, int first, int count, int pair, Results& out) {
    multiply_tiles<false>(matrix, rows.row(first), rows.stride, count, pair, out);
}

// High and low parts are rows of their own. count <= 16.
inline void multiply_pair_int8(const Matrix& matrix, const Rows& rows, int first, int count, int pair, Results& out) {
    alignas(64) int32_t sums[ROWS][PAIR];
    multiply_tiles<true>(matrix, rows.row(first), rows.stride / 2, 2 * count, pair, sums);
    for (int row = 0; row < count; row++)
        for (int block = 0; block < PAIR; block += BLOCK) {
            Floats high = __builtin_convertvector(load<Ints>(&sums[2 * row][block]), Floats);
            Floats low = __builtin_convertvector(load<Ints>(&sums[2 * row + 1][block]), Floats);
            Floats scale = load<Floats>(matrix.scales + pair * PAIR + block) * rows.scales[first + row];
            store(&out[row][block], (high * 128.0f + low) * scale);
        }
}

#else

inline void release_tiles() {}

// As many rows as leave their sums in registers.
#if defined(__AVX512F__)
constexpr int ROWS_BF16 = 4, ROWS_INT8 = 2;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int ROWS_BF16 = 2, ROWS_INT8 = 1;
#else
constexpr int ROWS_BF16 = 1, ROWS_INT8 = 1;
#endif
constexpr int PARTS = PAIR / LANES;  // registers for one row's sums

// One group's weights for part `part` of the pair's outputs; `weights` are the two tiles of a step along the inputs.
inline Words weights_of(const uint8_t* weights, int group, int part) {
    const int output = part * LANES;
    return load<Words>(weights + output / BLOCK * TILE + group * 64 + output % BLOCK * 4);
}

inline uint32_t inputs_of(const uint8_t* row, int k, int group) {
    uint32_t inputs;
    memcpy(&inputs, row + k * 64 + group * 4, 4);
    return inputs;
}

// Adds the products of one group of two inputs: weights of some outputs with the same inputs for all.
inline void add_group_bf16(Floats& total, Words weights, uint32_t inputs) {
#if defined(__AVX512BF16__)
    total = (Floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)weights, (__m512bh)_mm512_set1_epi32((int)inputs));
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    total = vbfdotq_f32(total, (bfloat16x8_t)weights, (bfloat16x8_t)vdupq_n_u32(inputs));
#else
    Words two = inputs - Words{};
    total += (Floats)(weights << 16) * (Floats)(two << 16);
    total += (Floats)(weights & 0xffff0000u) * (Floats)(two & 0xffff0000u);
#endif
}

template <int COUNT>
inline void multiply_some_bf16(const Matrix& matrix, const Rows& rows, int first, int pair, float (*out)[PAIR]) {
    const uint8_t* weights = matrix.pair(pair);
    Floats totals[COUNT][PARTS] = {};
    for (int k = 0; k < matrix.num_k_tiles; k++, weights += 2 * TILE) {
        fetch_ahead(weights);
        fetch_ahead(weights + TILE);
        for (int group = 0; group < GROUPS; group++)
#pragma GCC unroll 8
            for (int part = 0; part < PARTS; part++) {
                const Words some = weights_of(weights, group, part);
#pragma GCC unroll 4
                for (int row = 0; row < COUNT; row++)
                    add_group_bf16(totals[row][part], some, inputs_of(rows.row(first + row), k, group));
            }
    }
    for (int row = 0; row < COUNT; row++)
        for (int part = 0; part < PARTS; part++) store(&out[row][part * LANES], totals[row][part]);
}

inline void multiply_pair_bf16(const Matrix& matrix, const Rows& rows, int first, int count, int pair, Results& out) {
    int row = 0;
    for (; row + ROWS_BF16 <= count; row += ROWS_BF16)
        multiply_some_bf16<ROWS_BF16>(matrix, rows, first + row, pair, &out[row]);
    for (; row < count; row++) multiply_some_bf16<1>(matrix, rows, first + row, pair, &out[row]);
}

// Adds the products of one group of four inputs in one plane.
inline void add_group_int8(Ints& total, Words weights, uint32_t inputs) {
#if defined(__AVX512VNNI__)
    // Takes unsigned inputs: 128 is added to each here, and 128 times the sum of the weights subtracted at the end.
    const __m512i all = _mm512_set1_epi32((int)(inputs ^ 0x80808080u));
    total = (Ints)_mm512_dpbusd_epi32((__m512i)total, all, (__m512i)weights);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    // Unsigned by signed as well: |input| times the weight with the input's sign. Two products are at most
    // 2 * 127 * 127 = 32,258, so that their sum in 16 bits is exact.
    const __m256i all = _mm256_set1_epi32((int)inputs);
    const __m256i twos = _mm256_maddubs_epi16(_mm256_abs_epi8(all), _mm256_sign_epi8((__m256i)weights, all));
    total += (Ints)_mm256_madd_epi16(twos, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
    total = vdotq_s32(total, (int8x16_t)weights, (int8x16_t)vdupq_n_u32(inputs));
#elif defined(__aarch64__)
    // Two products in 16 bits are exact here as well.
    const int8x16_t w = (int8x16_t)weights, all = (int8x16_t)vdupq_n_u32(inputs);
    const int16x8_t twos = vpaddq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(all)), vmull_high_s8(w, all));
    total = vpadalq_s16(total, twos);
#else
    Ints w = (Ints)weights;
    for (int place = 24; place >= 0; place -= 8) total += ((w << place) >> 24) * ((int32_t)(inputs << place) >> 24);
#endif
}

inline Ints whole_total(Ints total, const int* weight_sums) {
#if defined(__AVX512VNNI__)
    return total - load<Ints>(weight_sums) * 128;
#else
    (void)weight_sums;
    return total;
#endif
}

template <int COUNT>
inline void multiply_some_int8(const Matrix& matrix, const Rows& rows, int first, int pair, float (*out)[PAIR]) {
    const uint8_t* weights = matrix.pair(pair);
    Ints totals[COUNT][2][PARTS] = {};
    for (int k = 0; k < matrix.num_k_tiles; k++, weights += 2 * TILE) {
        fetch_ahead(weights);
        fetch_ahead(weights + TILE);
        for (int group = 0; group < GROUPS; group++)
#pragma GCC unroll 8
            for (int part = 0; part < PARTS; part++) {
                const Words some = weights_of(weights, group, part);
#pragma GCC unroll 2
                for (int row = 0; row < COUNT; row++)
#pragma GCC unroll 2
                    for (int plane = 0; plane < 2; plane++) {
                        const uint8_t* inputs = rows.row(first + row) + plane * (rows.stride / 2);
                        add_group_int8(totals[row][plane][part], some, inputs_of(inputs, k, group));
                    }
            }
    }
    for (int row = 0; row < COUNT; row++)
        for (int part = 0; part < PARTS; part++) {
            const int output = pair * PAIR + part * LANES;
            auto whole = [&](int plane) {
                return __builtin_convertvector(whole_total(totals[row][plane][part], matrix.sums + output), Floats);
            };
            Floats scale = load<Floats>(matrix.scales + output) * rows.scales[first + row];
            store(&out[row][part * LANES], (whole(0) * 128.0f + whole(1)) * scale);
        }
}

inline void multiply_pair_int8(const Matrix& matrix, const Rows& rows, int first, int count, int pair, Results& out) {
    int row = 0;
    for (; row + ROWS_INT8 <= count; row += ROWS_INT8)
        multiply_some_int8<ROWS_INT8>(matrix, rows, first + row, pair, &out[row]);
    for (; row < count; row++) multiply_some_int8<1>(matrix, rows, first + row, pair, &out[row]);
}

#endif

// Multiplies rows [0, num_rows) with the pairs [begin, end) of a matrix and hands each result to
// use(pair, first row, number of rows, results).
template <class Use>
inline void multiply(const Matrix& matrix, const Rows& rows, int num_rows, int begin, int end, Use use) {
    const int step = matrix.is_int8 ? BLOCK : ROWS;
    // With many rows weights are read again for every 32: from the cache, if no more than this is taken at a time.
    constexpr int64_t CACHED = 384 * 1024;
    const int group = num_rows <= step ? end - begin : (int)(CACHED / matrix.pair_bytes() + 1);
    alignas(64) Results results;
    for (int from = begin; from < end; from += group)
        for (int first = 0; first < num_rows; first += step) {
            const int count = num_rows - first < step ? num_rows - first : step;
            for (int pair = from; pair < end && pair < from + group; pair++) {
                (matrix.is_int8 ? multiply_pair_int8 : multiply_pair_bf16)(matrix, rows, first, count, pair, results);
                use(pair, first, count, results);
            }
        }
}

}  // namespace smollm
