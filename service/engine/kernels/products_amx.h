// Products in AMX's tiles: 16 rows by 16 outputs in one instruction.
#pragma once
#include "rows.h"

namespace smollm {

// In int8 every row is two of a tile's.
inline int most_rows_of_product(const Matrix& matrix) { return matrix.is_int8 ? BLOCK : ROWS; }

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

}  // namespace smollm
