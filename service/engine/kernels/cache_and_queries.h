// What attention works on: a layer's keys and values, queries that look through one head of them, a thread's scratch.
#pragma once
#include "matrix.h"

namespace smollm {

constexpr int BLOCK_LENGTH = 64;  // positions of a block, `layouts.BLOCK_LENGTH`; pieces of 32 never leave theirs

constexpr int LONGEST_HEAD_DIM = 256;  // as `decoder.py` says

// Tiles take keys one position after the other, and only of this size.
constexpr int TILED_HEAD_DIM = 64;
#if defined(__AMX_TILE__)
inline bool is_tiled(int head_dim) { return head_dim == TILED_HEAD_DIM; }
#else
inline bool is_tiled(int) { return false; }
#endif

// Keys and values of one layer, bf16. In each block values stand as [key-value head][position of the block][head_dim],
// and so do keys for tiles. Else keys stand as [key-value head][16 positions][head_dim][position of the 16]: a register
// then holds one number of several keys, which a query's same number multiplies.
struct LayerCache {
    uint16_t *keys, *values;  // in the first block of the first slot
    int num_heads, head_dim, blocks_per_slot;
    int64_t block_size;       // numbers from block to block: those of all layers

    static constexpr int SIDE_BY_SIDE = 16;

    // Of a value, or of a key for tiles.
    int64_t place(int slot, int head, int position) const {
        const int64_t block = (int64_t)slot * blocks_per_slot + position / BLOCK_LENGTH;
        return block * block_size + ((int64_t)head * BLOCK_LENGTH + position % BLOCK_LENGTH) * head_dim;
    }

    // Of a key's first number; the next one is `SIDE_BY_SIDE` further.
    int64_t place_aside(int slot, int head, int position) const {
        const int aside = position % SIDE_BY_SIDE;
        return place(slot, head, position - aside) + aside;
    }
};

// Queries of one sequence that look through one key-value head: `count` of them, at most MOST. Query i belongs to the
// token (first + i) / group and so sees positions up to that token's own.
struct Queries {
    static constexpr int MOST = 64;
    const uint16_t* numbers;  // [count][head_dim], scaled by log2(e) / sqrt(head_dim)
    int first, count, group;
    int slot, head, start;    // `start`: position of token 0

    int end(int i) const { return start + (first + i) / group + 1; }
    int last() const { return end(count - 1); }
};

inline void store_weight(float* to, Floats weight) { store(to, weight); }
inline void store_weight(uint16_t* to, Floats weight) { store(to, to_bf16(weight)); }

// Turns scores into weights 2^(score - largest) with their sum; `padded` is the row's length, a multiple of 32. Both may
// stand in the same place.
template <class Weight>
inline float soften(const float* scores, Weight* weights, int end, int padded) {
    Floats most = splat(-3e38f);
    for (int p = 0; p < end; p += LANES) {
        Floats s = load<Floats>(scores + p);
        most = larger(most, end - p < LANES ? (first_lanes(end - p) ? s : splat(-3e38f)) : s);
    }
    const float largest = maximum(most);
    Floats total = {};
    for (int p = 0; p < padded; p += LANES) {
        Floats weight = {};
        if (p < end) {
            weight = exp2(load<Floats>(scores + p) - largest);
            if (end - p < LANES) weight = first_lanes(end - p) ? weight : Floats{};
        }
        total += weight;
        store_weight(weights + p, weight);
    }
    return sum(total);
}

}  // namespace smollm
