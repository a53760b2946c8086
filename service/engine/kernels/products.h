// Matrix products: up to 32 rows by 32 outputs at a time, in whatever instructions this file is compiled for.
//
// A row's result depends on nothing but the row: each output is summed over the inputs in one fixed order, whichever
// rows are computed beside it. On AMX even 1 row is a tile of 1 row; the multiplying costs less than the reading.
#pragma once
#if defined(__AMX_TILE__)
#include "products_amx.h"
#else
#include "products_sums.h"
#endif

namespace smollm {

// Multiplies rows [0, num_rows) with the pairs [begin, end) of a matrix and hands each result to
// use(pair, first row, number of rows, results).
template <class Use>
inline void multiply(const Matrix& matrix, const Rows& rows, int num_rows, int begin, int end, Use use) {
    const int step = most_rows_of_product(matrix);
    // With many rows weights are read again for every `step`: from the cache, if no more than this is taken at a time.
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
