// The library's functions as C sees them: make a network, give it its weights, compute steps. `library.py` calls them.
#include "decoder.h"
#include "draw.h"

#include <mutex>

#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace smollm;

namespace {

// One team for the whole process: models take turns, and a second team's threads would only get in the first one's way.
std::mutex team_lock;
Team* the_team = nullptr;
int team_owner = 0;

Team& team_of(int num_threads) {
    if (the_team && team_owner != getpid()) the_team = nullptr;  // threads do not survive a fork
    if (the_team && the_team->size() != num_threads) {
        delete the_team;
        the_team = nullptr;
    }
    if (!the_team) {
        the_team = new Team(num_threads);
        team_owner = getpid();
    }
    return *the_team;
}

constexpr int WORTH_WAKING = 4;  // draws: one takes 50 to 100 us, to wake a thread about as long

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

int smollm_logits_width(const Decoder* decoder) { return decoder->weights.head.num_outputs(); }

// The caller keeps the embedding, bf16 [V][D], alive.
void smollm_set_tables(Decoder* decoder, uint16_t* embedding, const float* cosines, const float* sines) {
    Weights& weights = decoder->weights;
    const int64_t bytes = (int64_t)weights.shape.num_positions * weights.shape.head_dim / 2 * sizeof(float);
    weights.embedding = embedding;
    memcpy(weights.cosines, cosines, bytes);
    memcpy(weights.sines, sines, bytes);
}

// `which`: 0 and 1 are the layer's input norm and the one after attention, 2 is the last norm.
void smollm_set_norm(Decoder* decoder, int layer, int which, const float* numbers) {
    Layer& of = decoder->weights.layers[layer];
    float* to = which == 2 ? decoder->weights.last_norm : which ? of.post_norm : of.input_norm;
    memcpy(to, numbers, decoder->shape.hidden_size * sizeof(float));
}

// Packs weights [num_outputs][inputs]. `part`: see enum Part, 4 is the head; `kind`: see enum Kind. Output i of
// `numbers` becomes output first + i, or for gate and up, given as two matrices, with `first` 0 and 1, its place in
// alternating blocks.
void smollm_set_matrix(Decoder* decoder, int layer, int part, int first, int num_outputs, int kind,
                       const void* numbers) {
    Weights& weights = decoder->weights;
    Matrix& matrix = part == NUM_PARTS ? weights.head : weights.layers[layer].parts[part];
    std::vector<float> row(matrix.num_inputs);
    for (int i = 0; i < num_outputs; i++) {
        int output = part == GATE_UP ? i / BLOCK * PAIR + first * BLOCK + i % BLOCK : first + i;
        widen((Kind)kind, numbers, (int64_t)i * matrix.num_inputs, matrix.num_inputs, row.data());
        matrix.set(output, row.data());
    }
}

// Draws tokens from scores of `size` each; see draw.h.
void smollm_draw(Drawing* drawings, int count, int size, int num_threads) {
    struct Task {
        Drawing* drawings;
        int count, size;
        std::atomic<int> next{0};

        void take(int) {
            static thread_local Draw draw;
            for (int i = next++; i < count; i = next++) drawings[i].token = draw.from(drawings[i], size);
        }
    } task{drawings, count, size};
    if (count < WORTH_WAKING) return task.take(0);
    std::lock_guard<std::mutex> turn(team_lock);
    team_of(num_threads).run([](void* self, int thread) { static_cast<Task*>(self)->take(thread); }, &task);
}

void smollm_step(Decoder* decoder, const Step* step, int num_threads) {
    std::lock_guard<std::mutex> turn(team_lock);
    decoder->run(*step, team_of(num_threads));
}
}
