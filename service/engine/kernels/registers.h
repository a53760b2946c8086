// How many sums stay in registers, and code made for each number of them.
#pragma once
#include <type_traits>
#include "vectors.h"

namespace smollm {

// Registers for sums; the others hold what is multiplied.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MOST_SUMS = 16;
#elif defined(__AVX2__)
constexpr int MOST_SUMS = 12;
#else
constexpr int MOST_SUMS = 8;
#endif

// Calls use(integral constant `count`), 1 <= count <= MOST: what a loop over a constant number of sums needs to leave
// them in registers.
template <int MOST, class Use>
inline void with_constant(int count, Use use) {
    if constexpr (MOST > 1)
        if (count < MOST) return with_constant<MOST - 1>(count, use);
    use(std::integral_constant<int, MOST>{});
}

// Calls use(first, number as a constant) for `count` things in as few and as equal parts as have at most MOST.
template <int MOST, class Use>
inline void in_equal_parts(int count, Use use) {
    int first = 0;
    for (int parts = (count + MOST - 1) / MOST; parts; parts--) {
        const int some = (count - first + parts - 1) / parts;
        with_constant<MOST>(some, [&](auto number) { use(first, number); });
        first += some;
    }
}

}  // namespace smollm
