// Memory in huge pages where the system has them: on the machine this was measured on, two threads read weights from
// them at 41 GB/s instead of 27.
#pragma once
#include <sys/mman.h>
#include <cstdint>
#include <new>

namespace smollm {

// Zeroed; handed out piece by piece, given back as a whole.
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

}  // namespace smollm
