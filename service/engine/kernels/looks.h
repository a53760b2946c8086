// A step's attention in pieces that threads take one by one: up to 64 queries of one sequence and key-value head each.
#pragma once
#include <atomic>
#include <vector>
#include "rope.h"

namespace smollm {

class Looks {
   public:
    void plan(const Step& step, const std::vector<int>& first_row_of, int num_kv_heads, int group) {
        const int most = Queries::MOST / group * group;
        looks_.clear();
        for (int span = 0; span < step.num_spans; span++)
            for (int first = 0; first < step.spans[span].count * group; first += most)
                for (int head = 0; head < num_kv_heads; head++) {
                    int left = step.spans[span].count * group - first;
                    looks_.push_back({step.spans[span], first_row_of[span], head, first, left < most ? left : most});
                }
    }

    // Before every layer, by one thread.
    void begin() { next_.store(0, std::memory_order_relaxed); }

    // Works on pieces until all are taken, each one known ahead, to fetch its keys beside the work on the one before.
    // `mixed`: [row][query head][E], where the weighted values go.
    void take(const QueryTable& table, const LayerCache& cache, Scratch& scratch, float* mixed, int mixed_size) {
        auto next_number = [&] { return next_.fetch_add(1, std::memory_order_relaxed); };
        const int count = (int)looks_.size();
        for (int i = next_number(), next; i < count; i = next) {
            next = next_number();
            look(looks_[i], next < count ? &looks_[next] : nullptr, table, cache, scratch, mixed, mixed_size);
        }
    }

   private:
    struct Look {
        Span span;
        int first_row, head, first, count;  // queries [first, first + count) of the span's, [row][query head]
    };

    static void look(const Look& look, const Look* next, const QueryTable& table, const LayerCache& cache,
                     Scratch& scratch, float* mixed, int mixed_size) {
        const int E = cache.head_dim, group = table.group;
        const uint16_t* numbers = table.at(look.head, look.first_row, look.first);
        Queries q{numbers, look.first, look.count, group, look.span.slot, look.head, look.span.start};
        if (next) {
            q.next_slot = next->span.slot;
            q.next_head = next->head;
            q.next_last = next->span.start + next->span.count;
        }
        float* out[Queries::MOST];
        for (int i = 0; i < look.count; i++) {
            int row = look.first_row + (look.first + i) / group, head = look.head * group + (look.first + i) % group;
            out[i] = mixed + (int64_t)row * mixed_size + head * E;
        }
        if (HAS_TILED_ATTENTION && E == 64)
            attend_tiled(cache, q, scratch, out);
        else
            attend(cache, q, scratch, out);
    }

    std::vector<Look> looks_;
    std::atomic<int> next_{0};
};

}  // namespace smollm
