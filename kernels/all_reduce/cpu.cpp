// A sum over the ranks of one host by memory that all of them map. Each puts its part of the numbers into a slot of its own, says so, waits for
// the others, and adds up all slots in the order of the ranks: every rank gets the same bits, whoever came first.
//
// A slot has two halves, used by turns. Before a rank writes to a half again, two turns later, it sees that each of the others has begun the
// turn between, before which that one had read this half.
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

// A rank's hold on the memory, which is its own: all ranks make the same calls in the same order.
struct Sum {
    char *memory;
    int64_t rank, ranks, slot_bytes;
    int (*missing)(int); // asked every `patience_s` seconds about a rank that is waited for: not 0 where it will not come
    double patience_s;
    uint32_t turn; // the last one

    char *slot(int r) const { return memory + sizeof(Board) + r * slot_bytes + (turn & 1) * (slot_bytes / 2); }
    int64_t most() const { return slot_bytes / 2; }

    // Until all others have begun that turn. -1: they have; else one that will not.
    int wait(uint32_t begun) const {
        Board *board = reinterpret_cast<Board *>(memory);
        for (int r = 0; r < ranks; r++)
            while (r != rank && !wait_for(board->turns[r], begun, patience_s))
                if (missing(r))
                    return r;
        return -1;
    }

    // The next turn, with these bytes, not more than `most()`, as this rank's part.
    int put_part(const void *x, int64_t bytes) {
        const int late = wait(turn);
        if (late >= 0)
            return late;
        turn++;
        Turn &own = reinterpret_cast<Board *>(memory)->turns[rank];
        memcpy(slot(rank), x, bytes);
        own.begun.store(turn);
        if (own.sleepers.load())
            syscall(SYS_futex, &own.begun, FUTEX_WAKE, kMostRanks, nullptr, nullptr, 0);
        return -1;
    }
};

template <class T> static int all_reduce(Sum &s, T *x, int64_t n) {
    const int64_t most = s.most() / static_cast<int64_t>(sizeof(T));
    for (int64_t start = 0; start < n; start += most) {
        const int64_t count = n - start < most ? n - start : most;
        int late = s.put_part(x + start, count * sizeof(T));
        if (late < 0)
            late = s.wait(s.turn);
        if (late >= 0)
            return late;
        add_up(x + start, s.slot(0), s.slot_bytes, static_cast<int>(s.ranks), count);
    }
    return -1;
}

// `n` numbers become the sum over the ranks. -1: done; else a rank that has not come, and will not.
API int pdlab_all_reduce(Sum *s, void *x, int64_t n, int is_bf16) {
    return is_bf16 ? all_reduce(*s, static_cast<bf16 *>(x), n) : all_reduce(*s, static_cast<float *>(x), n);
}

// Everybody's `bytes` bytes, by rank, into `all` at rank 0; elsewhere `all` is not used. As above.
API int pdlab_gather(Sum *s, const char *x, int64_t bytes, char *all) {
    for (int64_t start = 0; start < bytes; start += s->most()) {
        const int64_t count = bytes - start < s->most() ? bytes - start : s->most();
        int late = s->put_part(x + start, count);
        if (late < 0 && s->rank == 0)
            late = s->wait(s->turn);
        if (late >= 0)
            return late;
        for (int r = 0; s->rank == 0 && r < s->ranks; r++)
            memcpy(all + r * bytes + start, s->slot(r), count);
    }
    return -1;
}
