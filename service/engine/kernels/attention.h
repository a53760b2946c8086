// How new tokens look at the keys and values of their sequence. As in products.h, a row's result depends on the row
// alone: scores, weights and sums are made in one order of positions, however prompts are cut into pieces.
#pragma once
#include "attention_sums.h"
#if defined(__AMX_TILE__)
#include "attention_amx.h"
#endif

namespace smollm {

// What one thread needs.
struct Scratch {
    RegisterScratch registers;
#if defined(__AMX_TILE__)
    TileScratch tiles;
#endif
};

// out[i] is where query i's weighted values go.
inline void attend(const LayerCache& cache, const Queries& queries, Scratch& scratch, float* const* out) {
#if defined(__AMX_TILE__)
    if (is_tiled(cache.head_dim)) return attend_tiled(cache, queries, scratch.tiles, out);
#endif
    attend_in_registers(cache, queries, scratch.registers, out);
}

}  // namespace smollm
