// What the caller and the library hand each other; `library.py` lists the same fields. Everything is the caller's.
#pragma once
#include <cstdint>

extern "C" {

struct Shape {
    int vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim, num_positions;
    float rms_norm_eps;
    int is_int8;
};

// Tokens [start, start + count) of the sequence in `slot`.
struct Span {
    int slot, start, count;
};

struct Step {
    int num_rows, num_spans, num_wanted;
    const int* token_ids;      // [num_rows]
    const Span* spans;         // their counts sum to num_rows
    const int* wanted;         // [num_wanted] rows of which scores are asked
    uint16_t* cache;           // [slot][block][layer][keys, values][head][64 positions of head_dim]: see looking.h
    int blocks_per_slot;
    float* logits;             // [num_wanted][padded vocabulary]
};

// One token to be drawn: `shared/sampling.py` says what the parameters mean.
struct Drawing {
    const float* scores;       // [size]
    const uint16_t* allowed;   // [size / 16, rounded up] a bit for each id that may be drawn; null: all
    double top_p, quantile;    // in [0, 1)
    float temperature, min_p;
    int top_k;
    int token;                 // the answer; -1 if the scores are no numbers
};
}
