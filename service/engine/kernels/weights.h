// The whole network's weights, packed once into one arena in the order in which a step reads them.
#pragma once
#include <algorithm>
#include <vector>
#include "arena.h"
#include "interface.h"
#include "matrix.h"

namespace smollm {

enum Part { QKV, OUT, GATE_UP, DOWN, NUM_PARTS };

struct Layer {
    Matrix parts[NUM_PARTS];
    float *input_norm, *post_norm;
};

struct Weights {
    Shape shape;
    Arena arena;
    std::vector<Layer> layers;
    Matrix head;
    float* last_norm;
    float *cosines, *sines;         // [position][E / 2]
    uint16_t* embedding = nullptr;  // the caller's, [V][D]

    explicit Weights(const Shape& s) : shape(s), arena(memory_of(s)), layers(s.num_layers) {
        auto floats = [&](int count) { return (float*)arena.take((int64_t)count * sizeof(float)); };
        auto matrix = [&](Matrix& m, int inputs, int outputs) {
            m.shape(inputs, outputs, s.is_int8);
            m.tiles = arena.take(m.bytes());
            m.scales = floats(s.is_int8 ? m.num_outputs() : 0);
            m.sums = (int*)floats(s.is_int8 ? m.num_outputs() : 0);
        };
        for (Layer& layer : layers) {
            matrix(layer.parts[QKV], s.hidden_size, (s.num_heads + 2 * s.num_kv_heads) * s.head_dim);
            matrix(layer.parts[OUT], s.num_heads * s.head_dim, s.hidden_size);
            matrix(layer.parts[GATE_UP], s.hidden_size, gate_up_outputs(s));
            matrix(layer.parts[DOWN], s.intermediate_size, s.hidden_size);
        }
        matrix(head, s.hidden_size, s.vocab_size);
        for (Layer& layer : layers) {
            layer.input_norm = floats(s.hidden_size);
            layer.post_norm = floats(s.hidden_size);
        }
        last_norm = floats(s.hidden_size);
        cosines = floats(s.num_positions * s.head_dim / 2);
        sines = floats(s.num_positions * s.head_dim / 2);
    }

    // Gate and up alternate in blocks of 16, so that one thread has both numbers that belong together.
    static int gate_up_outputs(const Shape& s) { return (s.intermediate_size + BLOCK - 1) / BLOCK * PAIR; }

    static int64_t memory_of(const Shape& s) {
        auto bytes = [&](int64_t inputs, int64_t outputs) {
            Matrix m;
            m.shape((int)inputs, (int)outputs, s.is_int8);
            return m.bytes() + m.num_outputs() * 8 + 192;
        };
        int64_t layer = bytes(s.hidden_size, (s.num_heads + 2 * s.num_kv_heads) * s.head_dim) +
                        bytes(s.num_heads * s.head_dim, s.hidden_size) + bytes(s.hidden_size, gate_up_outputs(s)) +
                        bytes(s.intermediate_size, s.hidden_size) + 2 * (s.hidden_size * 4 + 64);
        int64_t rope = ((int64_t)s.num_positions * s.head_dim / 2 * 4 + 64) * 2;
        return s.num_layers * layer + bytes(s.hidden_size, s.vocab_size) + s.hidden_size * 4 + 64 + rope;
    }

    // Numbers in a row of each kind, padding included.
    int x_size() const { return layers[0].parts[OUT].num_outputs(); }
    int qkv_size() const { return layers[0].parts[QKV].num_outputs(); }
    int gated_size() const { return gate_up_outputs(shape) / 2; }
    int mixed_size() const { return shape.num_heads * shape.head_dim; }

    // Bytes of the longest row of inputs that any product of a layer takes.
    int64_t widest_row() const {
        int64_t widest = 0;
        for (const Matrix& matrix : layers[0].parts) widest = std::max(widest, Rows::stride_of(matrix));
        return widest;
    }
};

}  // namespace smollm
