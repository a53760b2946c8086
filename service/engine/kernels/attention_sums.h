// Attention with sums in registers: several queries at a time, so that a key or value is fetched and widened once for all.
#pragma once
#include <algorithm>
#include "cache_and_queries.h"
#include "registers.h"

namespace smollm {

inline Floats load_bf16(const uint16_t* from, int count) {
    if (count >= LANES) return from_bf16(load<Halves>(from));
    Halves halves = {};
    memcpy(&halves, from, count * 2);
    return from_bf16(halves);
}

constexpr int WIDE = 4;                              // registers side by side
constexpr int QUERIES_TOGETHER = MOST_SUMS / WIDE;   // at most

// What one thread needs; grows with the longest sequence seen.
struct RegisterScratch {
    std::vector<float> scores, queries;
};

// Scores of COUNT queries, [COUNT][row], for VECTORS registers of positions from p on.
template <int COUNT, int VECTORS>
inline void score_some(const LayerCache& cache, const Queries& queries, const float* numbers, int p, float* scores,
                       int row) {
    constexpr int SIDE = LayerCache::SIDE_BY_SIDE;
    const int E = cache.head_dim;
    const uint16_t* keys[VECTORS];
    for (int v = 0; v < VECTORS; v++)
        keys[v] = cache.keys + cache.place_aside(queries.slot, queries.head, p + v * LANES);
    Floats sums[COUNT][VECTORS] = {};
    for (int e = 0; e < E; e++) {
        Floats some[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) some[v] = from_bf16(load<Halves>(keys[v] + e * SIDE));
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sums[i][v] = multiply_add(some[v], splat(numbers[i * E + e]), sums[i][v]);
    }
    for (int i = 0; i < COUNT; i++)
        for (int v = 0; v < VECTORS; v++) store(scores + i * row + p + v * LANES, sums[i][v]);
}

// Values weighted for COUNT queries, VECTORS registers of a head's numbers from e on; of a single one only `wanted`.
template <int COUNT, int VECTORS>
inline void mix_some(const LayerCache& cache, const Queries& queries, const float* weights, int row, int last, int e,
                     int wanted, const float* factors, float* const* out) {
    Floats sums[COUNT][VECTORS] = {};
    for (int block = 0; block < last; block += BLOCK_LENGTH) {
        const uint16_t* values = cache.values + cache.place(queries.slot, queries.head, block) + e;
        const int end = std::min(BLOCK_LENGTH, last - block);
        for (int p = 0; p < end; p++, values += cache.head_dim) {
            Floats some[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                some[v] = VECTORS > 1 ? from_bf16(load<Halves>(values + v * LANES)) : load_bf16(values, wanted);
#pragma GCC unroll 4
            for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++)
                    sums[i][v] = multiply_add(some[v], splat(weights[i * row + block + p]), sums[i][v]);
        }
    }
    for (int i = 0; i < COUNT; i++)
        for (int v = 0; v < VECTORS; v++) store_some(out[i] + e + v * LANES, sums[i][v] * factors[i], wanted);
}

template <int COUNT>
inline void attend_some(const LayerCache& cache, const Queries& queries, int first, RegisterScratch& scratch,
                        float* const* out) {
    const int E = cache.head_dim, last = queries.end(first + COUNT - 1);
    const int padded = (last + BLOCK_LENGTH - 1) / BLOCK_LENGTH * BLOCK_LENGTH;
    const int row = padded + 32;  // not a power of two: rows would share cache lines' places
    if ((int)scratch.scores.size() < QUERIES_TOGETHER * row) scratch.scores.resize(QUERIES_TOGETHER * row);
    if ((int)scratch.queries.size() < QUERIES_TOGETHER * E) scratch.queries.resize(QUERIES_TOGETHER * E);
    float *scores = scratch.scores.data(), *numbers = scratch.queries.data();
    for (int k = 0; k < COUNT * E; k++) numbers[k] = from_bf16(queries.numbers[first * E + k]);

    for (int p = 0; p < last;) {
        const bool is_wide = last - p > (WIDE - 1) * LANES;
        (is_wide ? score_some<COUNT, WIDE> : score_some<COUNT, 1>)(cache, queries, numbers, p, scores, row);
        p += (is_wide ? WIDE : 1) * LANES;
    }
    float factors[COUNT];
    for (int i = 0; i < COUNT; i++)
        factors[i] = 1.0f / soften(scores + i * row, scores + i * row, queries.end(first + i), padded);
    // What stands behind a query's own positions has the weight 0.
    for (int e = 0; e < E;) {
        const bool is_wide = E - e >= WIDE * LANES;
        (is_wide ? mix_some<COUNT, WIDE> : mix_some<COUNT, 1>)(cache, queries, scores, row, last, e, E - e, factors, out);
        e += (is_wide ? WIDE : 1) * LANES;
    }
}

// out[i] is where query i's weighted values go.
inline void attend_in_registers(const LayerCache& cache, const Queries& queries, RegisterScratch& scratch, float* const* out) {
    in_equal_parts<QUERIES_TOGETHER>(queries.count, [&](int first, auto number) {
        attend_some<decltype(number)::value>(cache, queries, first, scratch, out + first);
    });
}

}  // namespace smollm
