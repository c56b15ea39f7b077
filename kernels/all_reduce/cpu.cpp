// A sum over the ranks of one host by memory that all of them map. Each puts its part of the numbers into a slot of its own, says so, waits for
// the others, and adds up all slots in the order of the ranks: every rank gets the same bits, whoever came first.
//
// A slot has two halves, used by turns. A rank writes to a half again two turns later; by then it has seen each of the others begin the turn
// between, before which that one had read this half.
#include "cpu.h"
#include <atomic>
#include <ctime>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#define API extern "C" __attribute__((visibility("default")))

constexpr int kMostRanks = 64;
constexpr int kSpins = 2000; // some tens of microseconds; a rank that has a core of its own comes within them

struct alignas(64) Turn {
    std::atomic<uint32_t> begun;    // the last turn that a rank has filled its slot for
    std::atomic<uint32_t> sleepers; // that wait for the next
};

struct Board { // at the beginning of the memory; the slots follow
    Turn turns[kMostRanks];
};

static bool reached(uint32_t begun, uint32_t turn) { return static_cast<int32_t>(begun - turn) >= 0; }

static void pause_() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// False: it has not come in so many seconds.
static bool wait_for(Turn &other, uint32_t turn, double patience_s) {
    for (int i = 0; i < kSpins; i++) {
        if (reached(other.begun.load(std::memory_order_acquire), turn))
            return true;
        pause_();
    }
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    const double until = now.tv_sec + 1e-9 * now.tv_nsec + patience_s;
    other.sleepers.fetch_add(1);
    bool there = false;
    while (true) {
        const uint32_t seen = other.begun.load();
        if ((there = reached(seen, turn)))
            break;
        clock_gettime(CLOCK_MONOTONIC, &now);
        const double left = until - (now.tv_sec + 1e-9 * now.tv_nsec);
        if (left <= 0)
            break;
        timespec most{static_cast<time_t>(left), static_cast<long>(1e9 * (left - static_cast<time_t>(left)))};
        syscall(SYS_futex, &other.begun, FUTEX_WAIT, seen, &most, nullptr, 0);
    }
    other.sleepers.fetch_sub(1);
    return there;
}

template <class T> static void add_up(T *x, const char *slots, int64_t slot_bytes, int ranks, int64_t n) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++) {
        float sum = to_float(reinterpret_cast<const T *>(slots)[i]);
        for (int r = 1; r < ranks; r++)
            sum += to_float(reinterpret_cast<const T *>(slots + r * slot_bytes)[i]);
        put(x + i, sum);
    }
}

API int64_t pdlab_all_reduce_board_bytes() { return sizeof(Board); }

// `n` numbers, not more than a half of a slot takes, as this rank's part of `turn`.
API void pdlab_all_reduce_put(char *memory, int rank, int64_t slot_bytes, uint32_t turn, const void *x, int64_t bytes) {
    Turn &own = reinterpret_cast<Board *>(memory)->turns[rank];
    memcpy(memory + sizeof(Board) + rank * slot_bytes + (turn & 1) * (slot_bytes / 2), x, bytes);
    own.begun.store(turn);
    if (own.sleepers.load())
        syscall(SYS_futex, &own.begun, FUTEX_WAKE, kMostRanks, nullptr, nullptr, 0);
}

// The sum of all parts of `turn` into `x`. -1: done; else a rank that has not come in `patience_s` seconds: ask again, or give up.
API int pdlab_all_reduce_take(char *memory, int rank, int ranks, int64_t slot_bytes, uint32_t turn, void *x, int64_t n, int is_bf16,
                              double patience_s) {
    Board *board = reinterpret_cast<Board *>(memory);
    for (int r = 0; r < ranks; r++)
        if (r != rank && !wait_for(board->turns[r], turn, patience_s))
            return r;
    const char *slots = memory + sizeof(Board) + (turn & 1) * (slot_bytes / 2);
    if (is_bf16)
        add_up(static_cast<bf16 *>(x), slots, slot_bytes, ranks, n);
    else
        add_up(static_cast<float *>(x), slots, slot_bytes, ranks, n);
    return -1;
}
