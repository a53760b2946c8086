// Queries, keys and values of one row on their way from the product to attention: turned by the row's position, in bf16.
// Su et al. 2021, arXiv 2104.09864, eq. 34: the halves of a head turn together.
#pragma once
#include "attention.h"
#include "products.h"
#include "weights.h"

namespace smollm {

// A position's cosines and sines, [E / 2] each.
struct Turn {
    const float *cosine, *sine;
    int half;

    Turn(const Weights& weights, int position)
        : cosine(weights.cosines + (int64_t)position * weights.shape.head_dim / 2),
          sine(weights.sines + (int64_t)position * weights.shape.head_dim / 2),
          half(weights.shape.head_dim / 2) {}

    void operator()(const float* from, float factor, uint16_t* to) const {
        for (int e = 0; e < half; e += LANES) {
            const int count = std::min(half - e, LANES);
            Floats first = load_some(from + e, count), second = load_some(from + half + e, count);
            Floats c = load_some(cosine + e, count), s = load_some(sine + e, count);
            Halves turned_first = to_bf16((first * c - second * s) * factor);
            Halves turned_second = to_bf16((second * c + first * s) * factor);
            memcpy(to + e, &turned_first, count * 2);
            memcpy(to + half + e, &turned_second, count * 2);
        }
    }
};

// Queries of a step, [key-value head][row][query head of it][E]: those that look at the same keys stand together.
struct QueryTable {
    uint16_t* numbers;
    int num_rows, group, head_dim;

    uint16_t* at(int kv_head, int row, int query_head) const {
        return numbers + (((int64_t)kv_head * num_rows + row) * group + query_head) * head_dim;
    }
};

// Turns one row's queries into the table, its keys into the cache, and puts its values beside them. `numbers` are the
// row's queries, keys and values as the product gave them.
inline void rotate(const Weights& weights, const float* numbers, int row, int slot, int position,
                   const QueryTable& queries, const LayerCache& cache) {
    const Shape& shape = weights.shape;
    const int E = shape.head_dim, group = queries.group;
    const Turn turn(weights, position);
    const float scale = 1.44269504f / std::sqrt((float)E);  // weights are powers of 2 then
    for (int head = 0; head < shape.num_heads; head++)
        turn(numbers + head * E, scale, queries.at(head / group, row, head % group));
    numbers += weights.mixed_size();
    for (int head = 0; head < shape.num_kv_heads; head++) {
        if (is_tiled(E)) {
            turn(numbers + head * E, 1.0f, cache.keys + cache.place(slot, head, position));
            continue;
        }
        uint16_t key[LONGEST_HEAD_DIM];
        turn(numbers + head * E, 1.0f, key);
        uint16_t* to = cache.keys + cache.place_aside(slot, head, position);
        for (int e = 0; e < E; e++) to[e * LayerCache::SIDE_BY_SIDE] = key[e];
    }
    numbers += shape.num_kv_heads * E;
    for (int head = 0; head < shape.num_kv_heads; head++) {
        uint16_t* to = cache.values + cache.place(slot, head, position);
        for (int e = 0; e < E; e += LANES) {
            const int count = std::min(E - e, LANES);
            Halves value = to_bf16(load_some(numbers + head * E + e, count));
            memcpy(to + e, &value, count * 2);
        }
    }
}

// Asks for the memory into which a row's keys and values will be written.
inline void fetch_places(const LayerCache& cache, int slot, int position) {
    for (int head = 0; head < cache.num_heads; head++) {
        const int64_t place = cache.place(slot, head, position);
        for (int e = 0; e < cache.head_dim; e += 32) __builtin_prefetch(cache.values + place + e, 1);
        if (is_tiled(cache.head_dim)) {
            for (int e = 0; e < cache.head_dim; e += 32) __builtin_prefetch(cache.keys + place + e, 1);
        } else {
            const uint16_t* key = cache.keys + cache.place_aside(slot, head, position);
            for (int e = 0; e < cache.head_dim; e += 2) __builtin_prefetch(key + e * LayerCache::SIDE_BY_SIDE, 1);
        }
    }
}

}  // namespace smollm
