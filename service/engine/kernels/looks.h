// A step's attention in pieces that threads take one by one: up to 64 queries of one sequence and key-value head each.
#pragma once
#include <algorithm>
#include <atomic>
#include <vector>
#include "rope.h"

namespace smollm {

class Looks {
   public:
    // Prompts stand last in a step; they come first here, as threads that begin with the longest pieces end together.
    void plan(const Step& step, const std::vector<int>& first_row_of, int num_kv_heads, int group, int num_threads) {
        looks_.clear();
        for (int span = step.num_spans - 1; span >= 0; span--) {
            const int queries = step.spans[span].count * group;
            const int most = size_of_pieces(queries, num_kv_heads, group, num_threads);
            for (int first = 0; first < queries; first += most)
                for (int head = 0; head < num_kv_heads; head++)
                    looks_.push_back({step.spans[span], first_row_of[span], head, first, std::min(most, queries - first)});
        }
    }

    // Before every layer, by one thread.
    void begin() { next_.store(0, std::memory_order_relaxed); }

    // Works on pieces until all are taken.
    // `mixed`: [row][query head][E], where the weighted values go.
    void take(const QueryTable& table, const LayerCache& cache, Scratch& scratch, float* mixed, int mixed_size) {
        const int count = (int)looks_.size();
        for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;)
            look(looks_[i], table, cache, scratch, mixed, mixed_size);
    }

   private:
    struct Look {
        Span span;
        int first_row, head, first, count;  // queries [first, first + count) of the span's, [row][query head]
    };

    // Large pieces read the keys less often; but three of them, one of each head, would leave one of two threads idle.
    static int size_of_pieces(int queries, int num_kv_heads, int group, int num_threads) {
        int pieces = (queries + Queries::MOST - 1) / Queries::MOST;
        while (pieces * num_kv_heads < 2 * num_threads && queries > pieces * BLOCK) pieces++;
        const int tokens = (queries / group + pieces - 1) / pieces;
        return std::min(tokens, Queries::MOST / group) * group;
    }

    static void look(const Look& look, const QueryTable& table, const LayerCache& cache, Scratch& scratch, float* mixed,
                     int mixed_size) {
        const int E = cache.head_dim, group = table.group;
        const uint16_t* numbers = table.at(look.head, look.first_row, look.first);
        Queries q{numbers, look.first, look.count, group, look.span.slot, look.head, look.span.start};
        float* out[Queries::MOST];
        for (int i = 0; i < look.count; i++) {
            int row = look.first_row + (look.first + i) / group, head = look.head * group + (look.first + i) % group;
            out[i] = mixed + (int64_t)row * mixed_size + head * E;
        }
        attend(cache, q, scratch, out);
    }

    std::vector<Look> looks_;
    std::atomic<int> next_{0};
};

}  // namespace smollm
