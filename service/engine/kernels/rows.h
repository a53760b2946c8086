// Rows of inputs, ready to be multiplied with a matrix.
#pragma once
#include <cmath>
#include "matrix.h"

namespace smollm {

// Rows of inputs as a product takes them. With bf16 weights: the numbers, in bf16 where the machine multiplies that. With
// int8 weights each row's numbers are 15-bit whole numbers, so that only the weights are coarse: one after the other in
// 16 bits, or, where the machine multiplies int8, as 128 * high + low: first all `high`, then all `low`.
struct Rows {
    uint8_t* data = nullptr;
    float* scales = nullptr;  // of whole numbers
    int64_t stride = 0;       // bytes from row to row

    // Not a power of two, which would give all rows the same few places in the cache.
    static int64_t stride_of(const Matrix& matrix) {
        const bool takes_twice = matrix.is_int8 || !HAS_BF16_PRODUCTS;
        return (matrix.num_k_tiles * 64 + 64) * (takes_twice ? 2 : 1);
    }
    const uint8_t* row(int number) const { return data + number * stride; }
};

// Writes one row's inputs, times `factor` and, where given, `weights`: RMSNorm's last step.
inline void prepare_row(const Matrix& matrix, const Rows& rows, int row, const float* x, float factor,
                        const float* weights) {
    int size = matrix.num_inputs, padded = matrix.num_k_tiles * matrix.inputs_of_tile();
    auto number = [&](int k) {
        Floats value = load_some(x + k, size - k) * factor;
        return weights ? value * load_some(weights + k, size - k) : value;
    };
    uint8_t* to = rows.data + row * rows.stride;
    if (!matrix.is_int8) {
        for (int k = 0; k < padded; k += LANES)
            if constexpr (HAS_BF16_PRODUCTS) store(to + 2 * k, k < size ? to_bf16(number(k)) : Halves{});
            else store(to + 4 * k, k < size ? number(k) : Floats{});
        return;
    }
    Floats most = {};
    for (int k = 0; k < size; k += LANES) {
        Floats value = number(k);
        most = larger(most, larger(value, -value));
    }
    constexpr float RANGE = 127 * 128;
    float largest = maximum(most);
    float per_unit = largest > 0 ? RANGE / largest : 0;
    rows.scales[row] = largest / RANGE;
    for (int k = 0; k < padded; k += LANES) {
        const Ints whole = k < size ? rounded(number(k) * per_unit) : Ints{};
        if constexpr (HAS_INT8_PRODUCTS) {
            const Ints upper = (whole + 64) >> 7;
            store(to + k, __builtin_convertvector(upper, Bytes));
            store(to + rows.stride / 2 + k, __builtin_convertvector(whole - (upper << 7), Bytes));
        } else {
            store(to + 2 * k, __builtin_convertvector(whole, Halves));
        }
    }
}

// 1 / rms(x). Zhang and Sennrich 2019, arXiv 1910.07467.
inline float inverse_rms(const float* x, int size, float eps) {
    Floats squares = {};
    for (int k = 0; k < size; k += LANES) {
        Floats value = load_some(x + k, size - k);
        squares += value * value;
    }
    return 1.0f / std::sqrt(sum(squares) / (float)size + eps);
}

}  // namespace smollm
