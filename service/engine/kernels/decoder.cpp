// One step of the whole network in one call: embedding, layers, last norm, head; for the new tokens of any number of
// sequences. The residual stream is fp32; weights are bf16 or int8; keys, values and the inputs of products are bf16.
//
// D hidden_size, F intermediate_size, H query heads, K key-value heads, E head_dim, V vocab_size, N rows of a step.
#include "attention.h"
#include "threads.h"

#include <sys/mman.h>
#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace smollm;

namespace {

// Memory in huge pages where the system has them: on the machine this was measured on, two threads read weights
// from them at 41 GB/s instead of 27. (Zeroed; never given back in parts.)
class Arena {
   public:
    explicit Arena(int64_t size) : size_((size + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE + HUGE_PAGE) {
        void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        memory_ = (uint8_t*)memory;
        next_ = (uint8_t*)(((uintptr_t)memory + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
#if defined(MADV_HUGEPAGE)
        madvise(next_, size_ - HUGE_PAGE, MADV_HUGEPAGE);
#endif
    }
    ~Arena() { munmap(memory_, size_); }
    Arena(const Arena&) = delete;

    uint8_t* take(int64_t bytes) {
        uint8_t* taken = next_;
        next_ += (bytes + 63) / 64 * 64;
        return taken;
    }

   private:
    static constexpr int64_t HUGE_PAGE = 2 << 20;
    int64_t size_;
    uint8_t *memory_, *next_;
};

enum Part { QKV, OUT, GATE_UP, DOWN, NUM_PARTS };

struct Layer {
    Matrix parts[NUM_PARTS];
    float *input_norm, *post_norm;
};

}  // namespace

extern "C" {

struct Shape {
    int vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim, num_positions;
    float rms_norm_eps;
    int is_int8;
};

struct Span {
    int slot, start, count;
};

struct Step {
    int num_rows, num_spans, num_wanted;
    const int* token_ids;      // [num_rows]
    const Span* spans;         // their counts sum to num_rows
    const int* wanted;         // [num_wanted] rows of which scores are asked
    uint16_t* cache;           // [layer][keys, values][slot][head][position][head_dim]
    int num_slots, slot_length;
    float* logits;             // [num_wanted][padded vocabulary]
    int* likeliest;            // [num_wanted], the first of equals
};
}

namespace {

// For a few rows every thread prepares all of them for itself, which is quicker than meeting at a barrier.
constexpr int FEW_ROWS = 4;

// The largest score so far in each of 16 lanes, and the block of 16 tokens it stands in.
struct Best {
    Floats scores;
    Ints blocks;

    void see(Floats given, int block) {
        Ints is_larger = given > scores;
        scores = is_larger ? given : scores;
        blocks = is_larger ? block - Ints{} : blocks;
    }
};

}  // namespace

struct Decoder {
    Shape shape;
    Arena arena;
    std::vector<Layer> layers;
    Matrix head;
    float* last_norm;
    float *cosines, *sines;  // [position][E / 2]
    uint16_t* embedding = nullptr;  // the caller's, [V][D]

    // One step's intermediate numbers, for `capacity` rows.
    int capacity = 0;
    std::vector<float> x, qkv, mixed, gated;
    std::vector<uint16_t> queries;
    std::vector<uint8_t> shared_rows;
    std::vector<float> shared_scales;
    std::vector<int> slot_of, position_of, span_of;
    struct Look {
        int span, head, first, count;
    };
    std::vector<Look> looks;
    std::atomic<int> next_look{0};

    struct Worker {
        Scratch scratch;
        std::vector<uint8_t> rows;
        std::vector<float> scales;
        std::vector<Best> best;
    };
    std::vector<Worker> workers;

    Team* team = nullptr;
    const Step* step = nullptr;

    explicit Decoder(const Shape& s) : shape(s), arena(memory_of(s)), layers(s.num_layers) {
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

    int64_t widest_row() const {
        int64_t widest = 0;
        for (const Matrix& matrix : layers[0].parts) widest = std::max(widest, Rows::stride_of(matrix));
        return widest;
    }
    int x_size() const { return layers[0].parts[OUT].num_outputs(); }
    int qkv_size() const { return layers[0].parts[QKV].num_outputs(); }
    int gated_size() const { return gate_up_outputs(shape) / 2; }
    int mixed_size() const { return shape.num_heads * shape.head_dim; }

    void reserve(int num_rows) {
        if ((int)workers.size() != team->size()) workers = std::vector<Worker>(team->size());
        if (num_rows <= capacity) return;
        capacity = (num_rows + ROWS - 1) / ROWS * ROWS;
        x.resize((int64_t)capacity * x_size());
        qkv.resize((int64_t)capacity * qkv_size());
        mixed.resize((int64_t)capacity * mixed_size());
        gated.resize((int64_t)capacity * gated_size());
        queries.resize((int64_t)(capacity + 64) * mixed_size());
        shared_rows.resize(capacity * widest_row() + 64);
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
                own.rows.resize(ROWS * widest_row() + 64);
                own.scales.resize(ROWS);
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

    Share pairs(const Matrix& matrix, int thread) const { return Share(matrix.num_pairs, thread, team->size()); }

    // Asks for the first weights that this thread will read of the next matrix, while others finish this one.
    void announce(const Matrix& matrix, int thread) const {
        const uint8_t* weights = matrix.pair(pairs(matrix, thread).begin);
        for (int line = 0; line < AHEAD; line += 64) fetch(weights + line);
    }

    void product(int thread, const Matrix& matrix, const Rows& rows, int num_rows, std::vector<float>& out, int size,
                 bool adds, const Matrix& next) {
        Share share = pairs(matrix, thread);
        multiply(matrix, rows, num_rows, share.begin, share.end, [&](int pair, int first, int count, Results& results) {
            for (int row = 0; row < count; row++) {
                float* to = out.data() + (int64_t)(first + row) * size + pair * PAIR;
                for (int block = 0; block < PAIR; block += BLOCK) {
                    Floats result = load<Floats>(&results[row][block]);
                    store(to + block, adds ? load<Floats>(to + block) + result : result);
                }
            }
        });
        announce(next, thread);
    }

    void gate_and_up(int thread, const Matrix& matrix, const Rows& rows, int num_rows, const Matrix& next) {
        Share share = pairs(matrix, thread);
        multiply(matrix, rows, num_rows, share.begin, share.end, [&](int pair, int first, int count, Results& results) {
            for (int row = 0; row < count; row++) {
                Floats gate = load<Floats>(&results[row][0]), up = load<Floats>(&results[row][BLOCK]);
                store(gated.data() + (int64_t)(first + row) * gated_size() + pair * BLOCK, silu(gate) * up);
            }
        });
        announce(next, thread);
    }

    LayerCache cache_of(int layer) const {
        const int64_t part = (int64_t)step->num_slots * shape.num_kv_heads * step->slot_length * shape.head_dim;
        uint16_t* keys = step->cache + 2 * layer * part;
        return {keys, keys + part, shape.num_kv_heads, step->slot_length, shape.head_dim};
    }

    // Turns queries and keys of one row by its position; keys and values go to the cache. Su et al. 2021,
    // arXiv 2104.09864, eq. 34: the halves of a head turn together.
    void rotate(int row, const LayerCache& cache) {
        const int E = shape.head_dim, half = E / 2, group = shape.num_heads / shape.num_kv_heads;
        const int position = position_of[row], slot = slot_of[row];
        const float *cosine = cosines + (int64_t)position * half, *sine = sines + (int64_t)position * half;
        const float* numbers = qkv.data() + (int64_t)row * qkv_size();
        const float scale = 1.44269504f / std::sqrt((float)E);  // weights are powers of 2 then
        auto turn = [&](const float* from, float factor, uint16_t* to) {
            for (int e = 0; e < half; e += LANES) {
                const int count = std::min(half - e, LANES);
                Floats first = load_some(from + e, count), second = load_some(from + half + e, count);
                Floats c = load_some(cosine + e, count), s = load_some(sine + e, count);
                Halves turned_first = to_bf16((first * c - second * s) * factor);
                Halves turned_second = to_bf16((second * c + first * s) * factor);
                memcpy(to + e, &turned_first, count * 2);
                memcpy(to + half + e, &turned_second, count * 2);
            }
        };
        // Queries lie [key-value head][row][query head of it][E]: those that look at the same keys stand together.
        for (int head = 0; head < shape.num_heads; head++)
            turn(numbers + head * E, scale,
                 queries.data() + (((int64_t)(head / group) * step->num_rows + row) * group + head % group) * E);
        numbers += mixed_size();
        for (int head = 0; head < shape.num_kv_heads; head++)
            turn(numbers + head * E, 1.0f, cache.keys + cache.place(slot, head, position));
        numbers += shape.num_kv_heads * E;
        for (int head = 0; head < shape.num_kv_heads; head++) {
            uint16_t* to = cache.values + cache.place(slot, head, position);
            for (int e = 0; e < E; e += LANES) {
                const int count = std::min(E - e, LANES);
                Halves value = to_bf16(load_some(numbers + head * E + e, count));
                memcpy(to + e, &value, count * 2);
            }
        }
    }

    // Asks for the memory into which a row's keys and values will be written.
    void fetch_places(int row, const LayerCache& cache) const {
        for (int head = 0; head < shape.num_kv_heads; head++) {
            const int64_t place = cache.place(slot_of[row], head, position_of[row]);
            for (int e = 0; e < shape.head_dim; e += 32) {
                __builtin_prefetch(cache.keys + place + e, 1);
                __builtin_prefetch(cache.values + place + e, 1);
            }
        }
    }

    // Cuts the attention of a step into pieces that threads take one by one, the longest sequences' first.
    void plan_looks() {
        const int group = shape.num_heads / shape.num_kv_heads;
        const int most = Queries::MOST / group * group;
        looks.clear();
        for (int span = 0; span < step->num_spans; span++)
            for (int first = 0; first < step->spans[span].count * group; first += most)
                for (int head = 0; head < shape.num_kv_heads; head++) {
                    int left = step->spans[span].count * group - first;
                    looks.push_back({span, head, first, left < most ? left : most});
                }
    }

    // Threads take pieces one by one, each one ahead, to fetch its keys beside the work on the one before.
    void take_looks(const LayerCache& cache, Scratch& scratch) {
        auto take = [&] { return next_look.fetch_add(1, std::memory_order_relaxed); };
        const int count = (int)looks.size();
        for (int i = take(), next; i < count; i = next) {
            next = take();
            look(looks[i], next < count ? &looks[next] : nullptr, cache, scratch);
        }
    }

    void look(const Look& look, const Look* next, const LayerCache& cache, Scratch& scratch) {
        const int E = shape.head_dim, group = shape.num_heads / shape.num_kv_heads;
        const Span& span = step->spans[look.span];
        const int first_row = span_of[look.span];
        const uint16_t* numbers =
            queries.data() + (((int64_t)look.head * step->num_rows + first_row) * group + look.first) * E;
        Queries q{numbers, look.first, look.count, group, span.slot, look.head, span.start};
        if (next) {
            const Span& after = step->spans[next->span];
            q.next_keys = cache.keys + cache.place(after.slot, next->head, 0);
            q.next_last = after.start + after.count;
        }
        float* out[Queries::MOST];
        for (int i = 0; i < look.count; i++) {
            int row = first_row + (look.first + i) / group, head = look.head * group + (look.first + i) % group;
            out[i] = mixed.data() + (int64_t)row * mixed_size() + head * E;
        }
        if (HAS_TILED_ATTENTION && E == 64)
            attend_tiled(cache, q, scratch, out);
        else
            attend(cache, q, scratch, out);
    }

    void work(int thread) {
        const int D = shape.hidden_size, N = step->num_rows, num_threads = team->size();
        Share rows_share(N, thread, num_threads);
        announce(layers[0].parts[QKV], thread);
        for (int row = rows_share.begin; row < rows_share.end; row++) {
            float* to = x.data() + (int64_t)row * x_size();
            const uint16_t* from = embedding + (int64_t)step->token_ids[row] * D;
            for (int d = 0; d < D; d++) to[d] = from_bf16(from[d]);
        }
        team->barrier();
        for (int number = 0; number < shape.num_layers; number++) {
            Layer& layer = layers[number];
            const Matrix* parts = layer.parts;
            const Matrix& after = number + 1 < shape.num_layers ? layers[number + 1].parts[QKV] : head;
            Rows rows = prepare(thread, parts[QKV], x, x_size(), N, layer.input_norm);
            product(thread, parts[QKV], rows, N, qkv, qkv_size(), false, parts[OUT]);
            team->barrier();

            LayerCache cache = cache_of(number);
            for (int row = rows_share.begin; row < rows_share.end; row++) {
                if (row + 1 < rows_share.end) fetch_places(row + 1, cache);
                rotate(row, cache);
            }
            if (thread == 0) next_look.store(0, std::memory_order_relaxed);
            team->barrier();
            take_looks(cache, workers[thread].scratch);
            team->barrier();

            rows = prepare(thread, parts[OUT], mixed, mixed_size(), N, nullptr);
            product(thread, parts[OUT], rows, N, x, x_size(), true, parts[GATE_UP]);
            team->barrier();
            rows = prepare(thread, parts[GATE_UP], x, x_size(), N, layer.post_norm);
            gate_and_up(thread, parts[GATE_UP], rows, N, parts[DOWN]);
            team->barrier();
            rows = prepare(thread, parts[DOWN], gated, gated_size(), N, nullptr);
            product(thread, parts[DOWN], rows, N, x, x_size(), true, after);
            team->barrier();
        }
        if (step->num_wanted) score(thread);
    }

    void score(int thread) {
        const int B = step->num_wanted;
        Rows rows = prepare(thread, head, x, x_size(), B, last_norm, step->wanted);
        Share share = pairs(head, thread);
        std::vector<Best>& best = workers[thread].best;
        best.assign(B, {splat(-INFINITY), Ints{}});
        multiply(head, rows, B, share.begin, share.end, [&](int pair, int first, int count, Results& results) {
            // Padding must not win: its scores are 0.
            const bool is_padded = (pair + 1) * PAIR > shape.vocab_size;
            for (int row = 0; row < count; row++) {
                for (int i = shape.vocab_size - pair * PAIR; is_padded && i < PAIR; i++) results[row][i] = -INFINITY;
                float* to = step->logits + (int64_t)(first + row) * head.num_outputs() + pair * PAIR;
                for (int block = 0; block < 2; block++) {
                    Floats scores = load<Floats>(&results[row][block * BLOCK]);
                    store(to + block * BLOCK, scores);
                    best[first + row].see(scores, 2 * pair + block);
                }
            }
        });
        team->barrier();
        for (int row = thread; row < B; row += team->size()) step->likeliest[row] = likeliest(row);
    }

    // The first of equals. Zero where no score is a number.
    int likeliest(int row) const {
        float most = -INFINITY;
        int token = 0;
        for (const Worker& worker : workers)
            for (int lane = 0; lane < LANES; lane++) {
                const float score = worker.best[row].scores[lane];
                const int here = worker.best[row].blocks[lane] * BLOCK + lane;
                if (score > most || (score == most && here < token)) {
                    most = score;
                    token = here;
                }
            }
        return token;
    }

    void run(const Step& given, Team& members) {
        step = &given;
        team = &members;
        reserve(given.num_rows);
        span_of.clear();
        int row = 0;
        for (int i = 0; i < given.num_spans; i++) {
            const Span& span = given.spans[i];
            span_of.push_back(row);
            for (int t = 0; t < span.count; t++, row++) {
                slot_of[row] = span.slot;
                position_of[row] = span.start + t;
            }
        }
        plan_looks();
        team->run(
            [](void* self, int thread) {
                static_cast<Decoder*>(self)->work(thread);
                release_tiles();
            },
            this);
    }
};

namespace {

// One team for the whole process: models take turns, and a second team's threads would only get in the first one's way.
std::mutex team_lock;
Team* the_team = nullptr;
int team_owner = 0;

}  // namespace

extern "C" {

// Must be called once before anything else; 0 where this machine or its kernel cannot run what was compiled.
int smollm_start() {
#if defined(__AMX_TILE__)
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 1;
#endif
}

Decoder* smollm_new(const Shape* shape) {
    try {
        return new Decoder(*shape);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void smollm_delete(Decoder* decoder) { delete decoder; }

int smollm_logits_width(const Decoder* decoder) { return decoder->head.num_outputs(); }

// The caller keeps the embedding, bf16 [V][D], alive.
void smollm_set_tables(Decoder* decoder, uint16_t* embedding, const float* cosines, const float* sines) {
    const Shape& s = decoder->shape;
    decoder->embedding = embedding;
    memcpy(decoder->cosines, cosines, (int64_t)s.num_positions * s.head_dim / 2 * sizeof(float));
    memcpy(decoder->sines, sines, (int64_t)s.num_positions * s.head_dim / 2 * sizeof(float));
}

// `which`: 0 and 1 are the layer's input norm and the one after attention, 2 is the last norm.
void smollm_set_norm(Decoder* decoder, int layer, int which, const float* weights) {
    Layer& of = decoder->layers[layer];
    float* to = which == 2 ? decoder->last_norm : which ? of.post_norm : of.input_norm;
    memcpy(to, weights, decoder->shape.hidden_size * sizeof(float));
}

// Packs fp32 weights [num_outputs][inputs]. `part`: see enum Part, 4 is the head. Output i of `weights` becomes output
// first + i, or for gate and up, given as two matrices, with `first` 0 and 1, its place in alternating blocks.
void smollm_set_matrix(Decoder* decoder, int layer, int part, int first, int num_outputs, const float* weights) {
    Matrix& matrix = part == NUM_PARTS ? decoder->head : decoder->layers[layer].parts[part];
    for (int i = 0; i < num_outputs; i++) {
        int output = part == GATE_UP ? i / BLOCK * PAIR + first * BLOCK + i % BLOCK : first + i;
        matrix.set(output, weights + (int64_t)i * matrix.num_inputs);
    }
}

void smollm_step(Decoder* decoder, const Step* step, int num_threads) {
    std::lock_guard<std::mutex> turn(team_lock);
    if (the_team && team_owner != getpid()) the_team = nullptr;  // threads do not survive a fork
    if (the_team && the_team->size() != num_threads) {
        delete the_team;
        the_team = nullptr;
    }
    if (!the_team) {
        the_team = new Team(num_threads);
        team_owner = getpid();
    }
    decoder->run(*step, *the_team);
}
}
