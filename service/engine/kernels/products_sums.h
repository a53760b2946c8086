// Products without tiles: sums in registers, for as many rows at a time as there are registers, so that weights are read
// and taken apart once for all of them.
#pragma once
#include <algorithm>
#include "arithmetic.h"
#include "registers.h"

namespace smollm {

inline void release_tiles() {}

inline int most_rows_of_product(const Matrix&) { return ROWS; }

constexpr int PARTS = PAIR / LANES;  // registers for one row's sums
constexpr int FEWEST_PARTS = 2;      // that are summed together: an input is fetched once for all of them

// One group's weights for part `part` of the pair's outputs; `weights` are the two tiles of a step along the inputs.
inline Words weights_of(const uint8_t* weights, int group, int part) {
    const int output = part * LANES;
    return load<Words>(weights + output / BLOCK * TILE + group * 64 + output % BLOCK * 4);
}

template <class Arithmetic, int COUNT>
inline void multiply_some(const Matrix& matrix, const Rows& rows, int first, int pair, float (*out)[PAIR]) {
    constexpr int PLANES = Arithmetic::PLANES;
    constexpr int TOGETHER = COUNT * PLANES * PARTS <= MOST_SUMS ? PARTS : FEWEST_PARTS;
    using Sums = typename Arithmetic::Sums;
    for (int left = 0; left < PARTS; left += TOGETHER)
        for (int begin = 0; begin < matrix.num_k_tiles; begin += Arithmetic::MOST_TILES) {
            const int end = std::min(begin + Arithmetic::MOST_TILES, matrix.num_k_tiles);
            const uint8_t* weights = matrix.pair(pair) + begin * 2 * TILE;
            Sums totals[COUNT][PLANES][TOGETHER] = {};
            for (int k = begin; k < end; k++, weights += 2 * TILE) {
                fetch_ahead(weights);
                fetch_ahead(weights + TILE);
                for (int group = 0; group < GROUPS; group++)
#pragma GCC unroll 2
                    for (int step = 0; step < Arithmetic::STEPS; step++) {
                        typename Arithmetic::Weights apart[TOGETHER];
#pragma GCC unroll 8
                        for (int part = 0; part < TOGETHER; part++)
                            apart[part] = Arithmetic::take_apart(weights_of(weights, group, left + part), step);
#pragma GCC unroll 8
                        for (int row = 0; row < COUNT; row++)
#pragma GCC unroll 2
                            for (int plane = 0; plane < PLANES; plane++) {
                                const auto input = Arithmetic::input(rows, first + row, plane, k, group, step);
#pragma GCC unroll 8
                                for (int part = 0; part < TOGETHER; part++)
                                    Arithmetic::add(totals[row][plane][part], apart[part], input);
                            }
                    }
            }
            for (int row = 0; row < COUNT; row++)
                for (int part = 0; part < TOGETHER; part++) {
                    const int output = (left + part) * LANES;
                    Sums planes[PLANES];
                    for (int plane = 0; plane < PLANES; plane++) planes[plane] = totals[row][plane][part];
                    Floats result = Arithmetic::floats(planes, matrix, pair * PAIR + output);
                    if (begin) result += load<Floats>(&out[row][output]);
                    if (end == matrix.num_k_tiles)
                        result = Arithmetic::scaled(result, matrix, pair * PAIR + output, rows, first + row);
                    store(&out[row][output], result);
                }
        }
}

template <class Arithmetic>
inline void multiply_pair(const Matrix& matrix, const Rows& rows, int first, int count, int pair, Results& out) {
    constexpr int MOST_ROWS = MOST_SUMS / FEWEST_PARTS / Arithmetic::PLANES;
    in_equal_parts<MOST_ROWS>(count, [&](int row, auto number) {
        multiply_some<Arithmetic, decltype(number)::value>(matrix, rows, first + row, pair, &out[row]);
    });
}

inline void multiply_pair_bf16(const Matrix& matrix, const Rows& rows, int first, int count, int pair, Results& out) {
    multiply_pair<Arithmetic16>(matrix, rows, first, count, pair, out);
}

inline void multiply_pair_int8(const Matrix& matrix, const Rows& rows, int first, int count, int pair, Results& out) {
    multiply_pair<Arithmetic8>(matrix, rows, first, count, pair, out);
}

}  // namespace smollm
