// Attention in AMX's tiles, for heads of 64 numbers.
#pragma once
#include <vector>
#include "cache_and_queries.h"
#include "products.h"

namespace smollm {

// What one thread needs; grows with the longest sequence seen.
struct TileScratch {
    std::vector<float> scores;
    std::vector<uint16_t> weights;
    alignas(64) float totals[Queries::MOST];
    alignas(64) float mixed[Queries::MOST][TILED_HEAD_DIM];
    alignas(64) uint8_t query_tiles[Queries::MOST / BLOCK][2][TILE];
    alignas(64) uint8_t value_tiles[8][4][TILE];
    alignas(64) uint8_t tail[32 * TILED_HEAD_DIM * 2];
    alignas(64) float block[BLOCK][BLOCK];
};

// Row i of `to` becomes column i of `from`, as 16 x 16 words of 4 bytes.
inline void transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512((const char*)from + i * from_stride);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512((char*)to + i * to_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_si512((char*)to + (i + 8) * to_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
        _mm512_storeu_si512((char*)to + (i + 4) * to_stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
        _mm512_storeu_si512((char*)to + (i + 12) * to_stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
    }
}

// `count` positions from `first` on, which stand at `numbers`; those at and behind `end` as zeros, never as what else the
// memory holds.
inline const uint8_t* positions(const uint16_t* numbers, int first, int count, int end, int head_dim, uint8_t* tail) {
    const uint8_t* from = (const uint8_t*)numbers;
    if (first + count <= end) return from;
    const int bytes = head_dim * 2, kept = end > first ? end - first : 0;
    memcpy(tail, from, kept * bytes);
    memset(tail + kept * bytes, 0, (count - kept) * bytes);
    return tail;
}

// Asks for positions to be needed soon; `numbers` holds those from `first` on. Only as far as the second cache: on the
// way into the first, few lines can be under way at once, and the memory would wait for them (8 sequences of 1,000
// tokens: 21.9 ms a step instead of 19.8).
inline void fetch_positions(const uint16_t* numbers, int first, int count, int end, int head_dim) {
    const int some = first + count < end ? count : end - first;
    for (int number = 0; number < some * head_dim; number += 32) __builtin_prefetch(numbers + number, 0, 2);
}

// 32 positions' values as four tiles. Interleaving within 128-bit lanes leaves the columns of two tiles mixed:
// 4 of one, 4 of the other. `unmix_columns` undoes it.
inline void interleave_values(const uint8_t* values, uint8_t (*tiles)[TILE]) {
    for (int p = 0; p < 32; p += 2)
        for (int half = 0; half < 2; half++) {
            __m512i even = _mm512_loadu_si512(values + p * 128 + half * 64);
            __m512i odd = _mm512_loadu_si512(values + (p + 1) * 128 + half * 64);
            _mm512_store_si512(tiles[2 * half] + p / 2 * 64, _mm512_unpacklo_epi16(even, odd));
            _mm512_store_si512(tiles[2 * half + 1] + p / 2 * 64, _mm512_unpackhi_epi16(even, odd));
        }
}

inline void unmix_columns(const float* mixed, float factor, float* out) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    const __m512 scale = _mm512_set1_ps(factor);
    for (int half = 0; half < 64; half += 32) {
        __m512 a = _mm512_loadu_ps(mixed + half), b = _mm512_loadu_ps(mixed + half + 16);
        _mm512_storeu_ps(out + half, _mm512_mul_ps(_mm512_permutex2var_ps(a, low, b), scale));
        _mm512_storeu_ps(out + half + 16, _mm512_mul_ps(_mm512_permutex2var_ps(a, high, b), scale));
    }
}

// out[i] is where query i's weighted values go. head_dim is TILED_HEAD_DIM.
inline void attend_tiled(const LayerCache& cache, const Queries& queries, TileScratch& scratch, float* const* out) {
    constexpr int E = TILED_HEAD_DIM;
    const int last = queries.last(), padded = (last + 31) / 32 * 32;
    const int num_tiles = (queries.count + BLOCK - 1) / BLOCK;
    auto place = [&](int p) { return cache.place(queries.slot, queries.head, p); };
    const int64_t row = padded + 32;  // not a power of two: rows would share cache lines' places
    if ((int64_t)scratch.scores.size() < Queries::MOST * row) {
        scratch.scores.resize(Queries::MOST * row);
        scratch.weights.resize(Queries::MOST * row);
    }
    float* scores = scratch.scores.data();
    uint16_t* weights = scratch.weights.data();
    shape_tiles(BLOCK, BLOCK);

    for (int tile = 0; tile < num_tiles; tile++)
        for (int half = 0; half < 2; half++) {
            const uint8_t* from = (const uint8_t*)(queries.numbers + tile * BLOCK * E) + half * 64;
            transpose(from, E * 2, scratch.query_tiles[tile][half], 64);
        }
    for (int p = 0; p < last; p += BLOCK) {
        const int ahead = p + BLOCK_LENGTH;
        if (ahead < last) fetch_positions(cache.keys + place(ahead), ahead, BLOCK, last, E);
        fetch_positions(cache.values + place(p), p, BLOCK, last, E);
        const uint8_t* keys = positions(cache.keys + place(p), p, BLOCK, last, E, scratch.tail);
        TILE_LOAD(4, keys, E * 2);
        TILE_LOAD(5, keys + 64, E * 2);
        for (int tile = 0; tile < num_tiles; tile++) {
            _tile_zero(0);
            TILE_LOAD(6, scratch.query_tiles[tile][0], 64);
            _tile_dpbf16ps(0, 4, 6);
            TILE_LOAD(7, scratch.query_tiles[tile][1], 64);
            _tile_dpbf16ps(0, 5, 7);
            _tile_stored(0, scratch.block, 64);
            transpose(scratch.block, 64, scores + tile * BLOCK * row + p, row * 4);
        }
    }
    for (int i = 0; i < queries.count; i++)
        scratch.totals[i] = soften(scores + i * row, weights + i * row, queries.end(i), padded);

    memset(scratch.mixed, 0, num_tiles * BLOCK * sizeof scratch.mixed[0]);
    for (int from = 0; from < padded; from += 8 * 32) {
        const int to = from + 8 * 32 < padded ? from + 8 * 32 : padded;
        for (int p = from; p < to; p += 32) {
            const uint8_t* values = positions(cache.values + place(p), p, 32, last, E, scratch.tail);
            interleave_values(values, scratch.value_tiles[(p - from) / 32]);
        }
        for (int tile = 0; tile < num_tiles; tile++) {
            float* mixed = scratch.mixed[tile * BLOCK];
            TILE_LOAD(0, mixed, E * 4);
            TILE_LOAD(1, mixed + 16, E * 4);
            TILE_LOAD(2, mixed + 32, E * 4);
            TILE_LOAD(3, mixed + 48, E * 4);
            for (int p = from; p < to; p += 32) {
                auto& values = scratch.value_tiles[(p - from) / 32];
                TILE_LOAD(4, weights + tile * BLOCK * row + p, row * 2);
                TILE_LOAD(6, values[0], 64);
                _tile_dpbf16ps(0, 4, 6);
                TILE_LOAD(7, values[1], 64);
                _tile_dpbf16ps(1, 4, 7);
                TILE_LOAD(6, values[2], 64);
                _tile_dpbf16ps(2, 4, 6);
                TILE_LOAD(7, values[3], 64);
                _tile_dpbf16ps(3, 4, 7);
            }
            _tile_stored(0, mixed, E * 4);
            _tile_stored(1, mixed + 16, E * 4);
            _tile_stored(2, mixed + 32, E * 4);
            _tile_stored(3, mixed + 48, E * 4);
        }
    }
    for (int i = 0; i < queries.count; i++) unmix_columns(scratch.mixed[i], 1.0f / scratch.totals[i], out[i]);
}

}  // namespace smollm
