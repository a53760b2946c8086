// One token of a row of scores: temperature, top-k, top-p, min-p, and the token at a quantile of what they leave. The
// meaning is that of shared/sampling.py, which says where each comes from; tests hold this to it. One pass in vectors
// does nearly all of it, so a row of 49,152 takes 50 to 100 us where NumPy's dozen passes take 75 to 145.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>
#include "interface.h"
#include "vectors.h"

namespace smollm {

struct Kept {
    int token;
    float weight;
};

class Draw {
   public:
    // Returns -1 if the scores are no numbers.
    int from(const Drawing& given, int size) {
        double top_p = given.top_p, u = given.quantile;
        int top_k = given.top_k;
        float min_p = given.min_p;
        scores = given.scores;
        allowed = given.allowed;
        count = size;
        if (!weigh(given.temperature)) return -1;
        if (top_k <= 0 || top_k >= size) top_k = size;
        if (top_k == size && top_p >= 1.0 && min_p <= 0.0f) return quantile_of_all(u);
        // Where top-k comes before top-p, the sum that counts is that of tokens which min-p may drop.
        float floor = top_k < size && top_p < 1.0 ? 0.0f : min_p;
        // All tokens below (1 - p) * sum / count together weigh less than 1 - p: the nucleus lies above.
        if (top_k == size && top_p < 1.0) floor = std::max(floor, (float)((1.0 - top_p) * total() / size));
        if (top_k < size) floor = std::max(floor, floor_of_top(top_k));
        keep_from(floor);
        if (top_k < (int)kept.size()) leave_top(top_k);
        if (top_p < 1.0) leave_nucleus(top_p, top_k == size ? total() : sum_of_kept());
        if (floor < min_p) drop([&](Kept one) { return one.weight < min_p; });  // the heaviest weighs 1 and stays
        put_lightest_last();
        return quantile_of_kept(u);
    }

   private:
    static constexpr int PIECE = 256;  // numbers summed together; only the piece with the quantile is walked
    static constexpr uint32_t BITS_OF_ONE = 0x3f800000, BUCKET_SHIFT = 19;  // 16 buckets for each halving of the weight

    const float* scores = nullptr;
    const uint16_t* allowed = nullptr;
    int count = 0;
    std::vector<float> weights;  // probabilities over the likeliest token's, which is 1
    std::vector<double> sums;    // of each piece
    std::vector<float> largest;  // of each piece
    std::vector<Kept> kept;
    std::vector<double> buckets;

    Floats scores_from(int i) const {
        Floats some = load_some(scores + i, count - i, -INFINITY);
        return allowed ? set_lanes(allowed[i / 16] >> i % 16) ? some : splat(-INFINITY) : some;
    }

    bool weigh(float temperature) {
        Floats most = splat(-INFINITY);
        Ints are_numbers = splat(0) == splat(0);
        for (int i = 0; i < count; i += LANES) {
            Floats score = scores_from(i);
            are_numbers &= score == score;
            most = larger(most, score);
        }
        const float best = maximum(most);
        for (int lane = 0; lane < LANES; lane++)
            if (!are_numbers[lane]) return false;
        if (!std::isfinite(best)) return false;
        const float scale = 1.44269504f / temperature;
        weights.resize(count);
        sums.clear();
        largest.clear();
        for (int start = 0; start < count; start += PIECE) {
            const int end = std::min(start + PIECE, count);
            typedef double Doubles __attribute__((vector_size(8 * LANES)));
            Doubles sum_of = {};
            Floats most_of = {};
            for (int i = start; i < end; i += LANES) {
                Floats power = larger((scores_from(i) - best) * scale, splat(-200.0f));
                Floats weight = power < splat(-125.0f) ? splat(0.0f) : exp2(power);
                store_some(weights.data() + i, weight, end - i);
                sum_of += __builtin_convertvector(weight, Doubles);
                most_of = larger(most_of, weight);
            }
            double sum_here = 0;
            for (int lane = 0; lane < LANES; lane++) sum_here += sum_of[lane];
            sums.push_back(sum_here);
            largest.push_back(maximum(most_of));
        }
        return true;
    }

    double total() const {
        double sum_of = 0;
        for (double one : sums) sum_of += one;
        return sum_of;
    }

    double sum_of_kept() const {
        double sum_of = 0;
        for (const Kept& one : kept) sum_of += one.weight;
        return sum_of;
    }

    // No more than the k-th largest weight: the k-th largest of the pieces' largest.
    float floor_of_top(int k) const {
        if (k > (int)largest.size()) return 0.0f;
        std::vector<float> ordered = largest;
        std::nth_element(ordered.begin(), ordered.begin() + k - 1, ordered.end(), std::greater<float>());
        return ordered[k - 1];
    }

    template <class Test>
    void drop(Test is_out) {
        kept.erase(std::remove_if(kept.begin(), kept.end(), is_out), kept.end());
    }

    // Keeps the tokens that weigh at least `floor`, in the order of their ids. Each is written, and counted if it stays:
    // a branch that the CPU cannot foresee costs more.
    void keep_from(float floor) {
        kept.resize(count);
        size_t length = 0;
        for (int piece = 0; piece < (int)largest.size(); piece++) {
            if (largest[piece] < floor) continue;
            const int end = std::min((piece + 1) * PIECE, count);
            for (int i = piece * PIECE; i < end; i++) {
                kept[length] = {i, weights[i]};
                length += weights[i] >= floor;
            }
        }
        kept.resize(length);
    }

    // Leaves the k heaviest and those that weigh as much as the last of them.
    void leave_top(int k) {
        std::vector<Kept> ordered = kept;
        auto is_heavier = [](const Kept& a, const Kept& b) { return a.weight > b.weight; };
        std::nth_element(ordered.begin(), ordered.begin() + k - 1, ordered.end(), is_heavier);
        const float smallest = ordered[k - 1].weight;
        drop([&](Kept one) { return one.weight < smallest; });
    }

    // Leaves the fewest whose weights reach `top_p` of `whole`, the heaviest first, of equals the first. Tokens are counted
    // into buckets by weight, and only the bucket in which the sum is reached is sorted.
    void leave_nucleus(double top_p, double whole) {
        auto bucket_of = [](Kept one) {
            uint32_t bits;
            memcpy(&bits, &one.weight, 4);
            return (BITS_OF_ONE >> BUCKET_SHIFT) - (bits >> BUCKET_SHIFT);
        };
        const double needed = top_p * whole;
        buckets.assign((BITS_OF_ONE >> BUCKET_SHIFT) + 1, 0.0);
        for (Kept one : kept) buckets[bucket_of(one)] += one.weight;
        uint32_t border = 0;
        double reached = 0;
        while (border + 1 < buckets.size() && reached + buckets[border] < needed) reached += buckets[border++];
        std::vector<Kept> candidates;
        for (Kept one : kept)
            if (bucket_of(one) == border) candidates.push_back(one);
        if (candidates.empty()) return;  // rounding: all together hardly reach it
        std::stable_sort(candidates.begin(), candidates.end(), [](Kept a, Kept b) { return a.weight > b.weight; });
        size_t length = 0;
        while (length < candidates.size() && (length == 0 || reached < needed)) reached += candidates[length++].weight;
        const Kept lightest = candidates[length - 1];
        drop([&](Kept one) {
            return one.weight < lightest.weight || (one.weight == lightest.weight && one.token > lightest.token);
        });
    }

    int quantile_of_all(double u) const {
        const double target = u * total();
        double before = 0;
        size_t piece = 0;
        while (piece + 1 < sums.size() && before + sums[piece] <= target) before += sums[piece++];
        const int start = (int)piece * PIECE, end = std::min(start + PIECE, count);
        int last = start;
        for (int i = start; i < end; i++) {
            if (weights[i] <= 0) continue;
            last = i;
            before += weights[i];
            if (before > target) return i;
        }
        return last;
    }

    // Which of two tokens comes last into what is kept, another rounding decides differently: the others stay in place.
    void put_lightest_last() {
        auto lightest = kept.end();
        for (auto one = kept.begin(); one != kept.end(); ++one)
            if (one->weight > 0 && (lightest == kept.end() || one->weight <= lightest->weight)) lightest = one;
        if (lightest != kept.end()) std::rotate(lightest, lightest + 1, kept.end());
    }

    int quantile_of_kept(double u) const {
        const double target = u * sum_of_kept();
        double before = 0;
        for (const Kept& one : kept) {
            before += one.weight;
            if (before > target) return one.token;
        }
        return kept.back().token;
    }
};

}  // namespace smollm
