// A few threads that work on one step together and meet at barriers: 150 times a step, so waiting first spins.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <vector>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

namespace smollm {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits until `word` is no longer `old`. A thread that found nothing to do for a while lets others have the core.
inline void wait_for_change(std::atomic<int>& word, int old, int num_spins) {
    for (int i = 0; i < num_spins; i++) {
        if (word.load(std::memory_order_acquire) != old) return;
        relax();
    }
    while (word.load(std::memory_order_acquire) == old) {
#if defined(__linux__)
        syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
#else
        sched_yield();
#endif
    }
}

inline void wake_all(std::atomic<int>& word) {
#if defined(__linux__)
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
#else
    (void)word;
#endif
}

class Team {
   public:
    explicit Team(int size) : size_(size) {
        for (int number = 1; number < size; number++) {
            pthread_t thread;
            auto* start = new Start{this, number};
            if (pthread_create(&thread, nullptr, enter, start)) {
                delete start;
                size_ = number;
                break;
            }
            threads_.push_back(thread);
        }
    }

    ~Team() {
        task_ = nullptr;
        next_task();
        for (pthread_t thread : threads_) pthread_join(thread, nullptr);
    }

    int size() const { return size_; }

    // Runs task(context, thread) on every thread, 0 being the caller; returns when all are done. One caller at a time.
    void run(void (*task)(void*, int), void* context) {
        task_ = task;
        context_ = context;
        next_task();
        task(context, 0);
        barrier();
    }

    void barrier() {
        if (size_ == 1) return;
        int generation = generation_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            generation_.store(generation + 1);  // in one order with `sleepers_`: one of the two sees the other
            if (sleepers_.load()) wake_all(generation_);
            return;
        }
        for (int i = 0; i < BARRIER_SPINS; i++) {
            if (generation_.load(std::memory_order_acquire) != generation) return;
            relax();
        }
        sleepers_.fetch_add(1);
        wait_for_change(generation_, generation, 0);
        sleepers_.fetch_sub(1);
    }

   private:
    struct Start {
        Team* team;
        int number;
    };
    static constexpr int BARRIER_SPINS = 2000;  // some 50 to 100 us: longer than parts of a step differ
    static constexpr int TASK_SPINS = 500;

    static void* enter(void* argument) {
        Start start = *static_cast<Start*>(argument);
        delete static_cast<Start*>(argument);
        start.team->work(start.number);
        return nullptr;
    }

    void work(int number) {
        for (int seen = 0;; seen++) {
            wait_for_change(tasks_, seen, TASK_SPINS);
            if (!task_) return;
            task_(context_, number);
            barrier();
        }
    }

    void next_task() {
        tasks_.fetch_add(1, std::memory_order_release);
        wake_all(tasks_);
    }

    int size_;
    std::vector<pthread_t> threads_;
    void (*task_)(void*, int) = nullptr;
    void* context_ = nullptr;
    alignas(64) std::atomic<int> tasks_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> generation_{0};
    alignas(64) std::atomic<int> sleepers_{0};
};

// The part of `count` items that belongs to one of `num_threads` threads.
struct Share {
    int begin, end;
    Share(int count, int thread, int num_threads)
        : begin((int)((int64_t)count * thread / num_threads)),
          end((int)((int64_t)count * (thread + 1) / num_threads)) {}
};

// Items for threads that need not be equally fast: cores of two kinds, or one with a neighbour. Half of its share is
// every thread's own, in one piece; the rest is taken in small ones by whoever is free. Who computes an item changes
// nothing of it.
class Pool {
   public:
    Pool(int count, int num_threads) : count_(count), num_threads_(num_threads) {}

    // Anew, by one thread, while no other takes.
    void refill() { next_.store(0, std::memory_order_relaxed); }

    Share own(int thread) const { return Share(num_threads_ == 1 ? count_ : count_ / 2, thread, num_threads_); }

    // Calls use(begin, end) until all items are taken.
    template <class Use>
    void take(int thread, Use use) {
        const Share mine = own(thread);
        use(mine.begin, mine.end);
        const int first = own(num_threads_ - 1).end, some = std::max(1, count_ / (16 * num_threads_));
        for (int begin; (begin = first + next_.fetch_add(some, std::memory_order_relaxed)) < count_;)
            use(begin, std::min(begin + some, count_));
    }

   private:
    const int count_, num_threads_;
    alignas(64) std::atomic<int> next_{0};
};

}  // namespace smollm
