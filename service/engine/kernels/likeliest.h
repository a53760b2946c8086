// The likeliest token, noted while the scores are at hand.
#pragma once
#include "matrix.h"

namespace smollm {

// The largest score so far in each of 16 lanes, and the block of 16 tokens it stands in.
struct Best {
    Floats scores = splat(-INFINITY);
    Ints blocks = {};

    void see(Floats given, int block) {
        Ints is_larger = given > scores;
        scores = is_larger ? given : scores;
        blocks = is_larger ? block - Ints{} : blocks;
    }
};

// Of all threads' bests: the first of equals, and 0 where no score is a number.
struct Likeliest {
    float score = -INFINITY;
    int token = 0;

    void see(const Best& best) {
        for (int lane = 0; lane < LANES; lane++) {
            const float given = best.scores[lane];
            const int here = best.blocks[lane] * BLOCK + lane;
            if (given > score || (given == score && here < token)) {
                score = given;
                token = here;
            }
        }
    }
};

}  // namespace smollm
