// One step of the whole network: embedding, layers, last norm, head; for the new tokens of any number of sequences. The
// residual stream is fp32; weights are bf16 or int8; keys and values are bf16; inputs of products: see rows.h.
//
// D hidden_size, F intermediate_size, H query heads, K key-value heads, E head_dim, V vocab_size, N rows of a step.
#pragma once
#include <deque>
#include "looks.h"
#include "threads.h"

namespace smollm {

// For a few rows every thread prepares all of them for itself, which is quicker than meeting at a barrier.
constexpr int FEW_ROWS = 4;

struct Decoder {
    Weights weights;
    const Shape& shape = weights.shape;

    explicit Decoder(const Shape& given) : weights(given) {}

    void run(const Step& given, Team& members) {
        step = &given;
        team = &members;
        reserve(given.num_rows);
        first_row_of.clear();
        int row = 0;
        for (int i = 0; i < given.num_spans; i++) {
            const Span& span = given.spans[i];
            first_row_of.push_back(row);
            for (int t = 0; t < span.count; t++, row++) {
                slot_of[row] = span.slot;
                position_of[row] = span.start + t;
            }
        }
        const int group = shape.num_heads / shape.num_kv_heads;
        table = {queries.data(), given.num_rows, group, shape.head_dim};
        looks.plan(given, first_row_of, shape.num_kv_heads, group, members.size());
        for (Pool& pool : pools) pool.refill();
        team->run(
            [](void* self, int thread) {
                static_cast<Decoder*>(self)->work(thread);
                release_tiles();
            },
            this);
    }

   private:
    struct Worker {
        Scratch scratch;
        std::vector<uint8_t> rows;
        std::vector<float> scales;
    };

    Team* team = nullptr;
    const Step* step = nullptr;

    // One step's intermediate numbers, for `capacity` rows.
    int capacity = 0;
    std::vector<float> x, qkv, mixed, gated;
    std::vector<uint16_t> queries;
    std::vector<uint8_t> shared_rows;
    std::vector<float> shared_scales;
    std::vector<int> slot_of, position_of, first_row_of;
    std::vector<Worker> workers;
    std::deque<Pool> pools;  // pairs of blocks of each layer's matrices, and of the head's; a pool cannot move
    QueryTable table;
    Looks looks;

    void reserve(int num_rows) {
        if ((int)workers.size() != team->size()) {
            workers = std::vector<Worker>(team->size());
            pools.clear();
            for (const Layer& layer : weights.layers)
                for (const Matrix& matrix : layer.parts) pools.emplace_back(matrix.num_pairs, team->size());
            pools.emplace_back(weights.head.num_pairs, team->size());
        }
        if (num_rows <= capacity) return;
        capacity = (num_rows + ROWS - 1) / ROWS * ROWS;
        x.resize((int64_t)capacity * weights.x_size());
        qkv.resize((int64_t)capacity * weights.qkv_size());
        mixed.resize((int64_t)capacity * weights.mixed_size());
        gated.resize((int64_t)capacity * weights.gated_size());
        queries.resize((int64_t)(capacity + 64) * weights.mixed_size());
        shared_rows.resize(capacity * weights.widest_row() + 64);
        shared_scales.resize(capacity);
        slot_of.resize(capacity);
        position_of.resize(capacity);
    }

    static Rows rows_in(std::vector<uint8_t>& data, std::vector<float>& scales, const Matrix& matrix) {
        Rows rows;
        rows.data = (uint8_t*)(((uintptr_t)data.data() + 63) / 64 * 64);
        rows.scales = scales.data();
        rows.stride = Rows::stride_of(matrix);
        return rows;
    }

    // Returns `num_rows` rows of `numbers` ready for a product with `matrix`; with `norm` they are RMS-normed first.
    // `which` says where each row stands; null: one after another.
    Rows prepare(int thread, const Matrix& matrix, const std::vector<float>& numbers, int size, int num_rows,
                 const float* norm, const int* which = nullptr) {
        auto one = [&](const Rows& rows, int row) {
            const float* from = numbers.data() + (int64_t)(which ? which[row] : row) * size;
            float factor = norm ? inverse_rms(from, matrix.num_inputs, shape.rms_norm_eps) : 1.0f;
            prepare_row(matrix, rows, row, from, factor, norm);
        };
        Worker& own = workers[thread];
        if (num_rows <= FEW_ROWS) {
            if (own.scales.empty()) {
                own.rows.resize(FEW_ROWS * weights.widest_row() + 64);
                own.scales.resize(FEW_ROWS);
            }
            Rows rows = rows_in(own.rows, own.scales, matrix);
            for (int row = 0; row < num_rows; row++) one(rows, row);
            return rows;
        }
        Rows rows = rows_in(shared_rows, shared_scales, matrix);
        Share share(num_rows, thread, team->size());
        for (int row = share.begin; row < share.end; row++) one(rows, row);
        team->barrier();
        return rows;
    }

    // Asks for the first weights that this thread will read of the next matrix, while others finish this one.
    void announce(int matrix, int thread) const {
        const uint8_t* first = matrix_at(matrix).pair(pools[matrix].own(thread).begin);
        for (int line = 0; line < AHEAD; line += 64) fetch(first + line);
    }

    // As a step computes them: those of the first layer, of the second, and so on, then the head.
    const Matrix& matrix_at(int number) const {
        const int layer = number / NUM_PARTS;
        return layer == shape.num_layers ? weights.head : weights.layers[layer].parts[number % NUM_PARTS];
    }

    // Hands each result to use(pair, first row, number of rows, results).
    template <class Use>
    void multiply_all(int thread, int matrix, const Rows& rows, int num_rows, Use use) {
        pools[matrix].take(thread, [&](int begin, int end) {
            multiply(matrix_at(matrix), rows, num_rows, begin, end, use);
        });
    }

    void product(int thread, int matrix, const Rows& rows, int num_rows, std::vector<float>& out, int size, bool adds) {
        multiply_all(thread, matrix, rows, num_rows, [&](int pair, int first, int count, Results& results) {
            for (int row = 0; row < count; row++) {
                float* to = out.data() + (int64_t)(first + row) * size + pair * PAIR;
                for (int output = 0; output < PAIR; output += LANES) {
                    Floats result = load<Floats>(&results[row][output]);
                    store(to + output, adds ? load<Floats>(to + output) + result : result);
                }
            }
        });
        announce(matrix + 1, thread);
    }

    void gate_and_up(int thread, int matrix, const Rows& rows, int num_rows) {
        multiply_all(thread, matrix, rows, num_rows, [&](int pair, int first, int count, Results& results) {
            for (int row = 0; row < count; row++) {
                float* to = gated.data() + (int64_t)(first + row) * weights.gated_size() + pair * BLOCK;
                for (int output = 0; output < BLOCK; output += LANES) {
                    Floats gate = load<Floats>(&results[row][output]);
                    Floats up = load<Floats>(&results[row][BLOCK + output]);
                    store(to + output, silu(gate) * up);
                }
            }
        });
        announce(matrix + 1, thread);
    }

    LayerCache cache_of(int layer) const {
        const int64_t part = (int64_t)shape.num_kv_heads * BLOCK_LENGTH * shape.head_dim;
        uint16_t* keys = step->cache + 2 * layer * part;
        return {keys, keys + part, shape.num_kv_heads, shape.head_dim, step->blocks_per_slot, shape.num_layers * 2 * part};
    }

    void work(int thread) {
        const int D = shape.hidden_size, N = step->num_rows;
        Share own_rows(N, thread, team->size());
        announce(0, thread);
        for (int row = own_rows.begin; row < own_rows.end; row++) {
            float* to = x.data() + (int64_t)row * weights.x_size();
            const uint16_t* from = weights.embedding + (int64_t)step->token_ids[row] * D;
            for (int d = 0; d < D; d++) to[d] = from_bf16(from[d]);
        }
        team->barrier();
        for (int layer = 0; layer < shape.num_layers; layer++) compute(layer, thread, own_rows);
        if (step->num_wanted) score(thread);
    }

    void compute(int number, int thread, Share own_rows) {
        const int N = step->num_rows, first = number * NUM_PARTS;
        const Layer& layer = weights.layers[number];
        const Matrix* parts = layer.parts;
        const int x_size = weights.x_size(), mixed_size = weights.mixed_size();
        Rows rows = prepare(thread, parts[QKV], x, x_size, N, layer.input_norm);
        product(thread, first + QKV, rows, N, qkv, weights.qkv_size(), false);
        team->barrier();

        LayerCache cache = cache_of(number);
        for (int row = own_rows.begin; row < own_rows.end; row++) {
            if (row + 1 < own_rows.end) fetch_places(cache, slot_of[row + 1], position_of[row + 1]);
            const float* numbers = qkv.data() + (int64_t)row * weights.qkv_size();
            rotate(weights, numbers, row, slot_of[row], position_of[row], table, cache);
        }
        if (thread == 0) looks.begin();
        team->barrier();
        looks.take(table, cache, workers[thread].scratch, mixed.data(), mixed_size);
        team->barrier();

        rows = prepare(thread, parts[OUT], mixed, mixed_size, N, nullptr);
        product(thread, first + OUT, rows, N, x, x_size, true);
        team->barrier();
        rows = prepare(thread, parts[GATE_UP], x, x_size, N, layer.post_norm);
        gate_and_up(thread, first + GATE_UP, rows, N);
        team->barrier();
        rows = prepare(thread, parts[DOWN], gated, weights.gated_size(), N, nullptr);
        product(thread, first + DOWN, rows, N, x, x_size, true);
        team->barrier();
    }

    void score(int thread) {
        const int B = step->num_wanted;
        const Matrix& head = weights.head;
        Rows rows = prepare(thread, head, x, weights.x_size(), B, weights.last_norm, step->wanted);
        multiply_all(thread, shape.num_layers * NUM_PARTS, rows, B, [&](int pair, int first, int count, Results& results) {
            for (int row = 0; row < count; row++) {
                float* to = step->logits + (int64_t)(first + row) * head.num_outputs() + pair * PAIR;
                memcpy(to, results[row], sizeof(results[row]));
            }
        });
    }
};

}  // namespace smollm
