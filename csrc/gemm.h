// The micro-kernel that gram.cpp and cholesky.cpp are built on, and what feeds it.
// For kernel files only: everything is in the namespace of the instruction set.
//
// A panel holds kWide<T> columns of a matrix side by side, one line per row: [depth][kWide]. The same
// panel serves both operands: the right one as whole vectors, the left one as kHigh scalars of a
// line, broadcast. So each number is packed once, in one format. With AVX2 the product of a step is
// 4 x 24 floats or 4 x 12 doubles: 12 accumulators, 3 vectors and 1 broadcast fill the 16 registers,
// and 12 independent chains hide the latency of the multiply-add. Panels of 128 lines are 12 KB: two
// of them stay in the 32 KB of the first-level cache.
#pragma once

#include <sched.h>

#include <new>

#include "pages.h"
#include "rows.h"
#include "simd.h"

#if defined(__clang__)
#define GEOFAST_UNROLL _Pragma("unroll")
#else
#define GEOFAST_UNROLL _Pragma("GCC unroll 8")
#endif
#define GEOFAST_INLINE inline __attribute__((always_inline))

namespace geofast::GEOFAST_ISA {

// ------ vectors

#if defined(__AVX2__)
constexpr int kVectors = 3;
#elif defined(__aarch64__)
constexpr int kVectors = 4;  // 32 registers
#else
constexpr int kVectors = 2;
#endif
constexpr int kHigh = 4;  // left columns in a step of the micro-kernel
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kWide = kVectors * kLanes<T>;  // right columns: the width of a panel
static_assert(kWide<float> % kHigh == 0 && kWide<double> % kHigh == 0, "a panel is cut into whole steps");

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
    using type = Floats;
};
template <>
struct VectorOf<double> {
    using type = Doubles;
};
template <class T>
using Vector = typename VectorOf<T>::type;

inline int64_t smaller(int64_t a, int64_t b) { return b < a ? b : a; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// acc[i][:] += sum over k of left(k, i) * right(k, :), where left(k, i) = a[i * row + k * step] and
// the line right(k, :) is at b + k * line; -= with Minus.
template <bool Minus = false, class T, int Rows, int Cols>
GEOFAST_INLINE void multiply(int64_t depth, const T* a, int64_t row, int64_t step, const T* b, int64_t line,
                             Vector<T> (&acc)[Rows][Cols]) {
    for (int64_t k = 0; k < depth; ++k) {
        Vector<T> right[Cols];
        GEOFAST_UNROLL for (int j = 0; j < Cols; ++j) right[j] = load(b + j * kLanes<T>);
        GEOFAST_UNROLL for (int i = 0; i < Rows; ++i) {
            const T left = Minus ? -a[i * row] : a[i * row];
            GEOFAST_UNROLL for (int j = 0; j < Cols; ++j) acc[i][j] += left * right[j];
        }
        a += step;
        b += line;
    }
}

// The same for two panels, while what is needed next comes nearer: kHigh numbers for every line, so
// that the kWide / kHigh steps of a panel bring the next panel whole. Without it panels come from the
// third-level cache too late, which costs 5 to 15 %.
template <class T>
GEOFAST_INLINE void multiply_panels(int64_t depth, const T* left, const T* right, const T* next,
                                    Vector<T> (&acc)[kHigh][kVectors]) {
    for (int64_t k = 0; k < depth; ++k) {
        // Naming a cache line several times is cheaper than unrolling: GCC then runs out of registers.
        __builtin_prefetch(next, 0, 2);
        next += kHigh;
        multiply(1, left, 1, kWide<T>, right, kWide<T>, acc);
        left += kWide<T>;
        right += kWide<T>;
    }
}

// ------ scratch memory

// Uninitialised memory on a cache line, freed with its owner. Throws std::bad_alloc.
//
// Large blocks ask for large pages: the walk over small ones cost a tenth of the Gram's speed. With
// `keep`, a thread keeps its largest block up to kKeptBytes for the next call, because fresh pages
// cost a fault and their zeros, 2 to 4 ms for the panels of one Gram call of 20 ms.
constexpr int64_t kKeptBytes = int64_t{64} << 20;

struct Block {
    char* data = nullptr;
    int64_t bytes = 0;

    Block() = default;
    explicit Block(int64_t n) : bytes(blocks(n, align(n)) * align(n)) {
        data = static_cast<char*>(::operator new(static_cast<std::size_t>(bytes), std::align_val_t(align(n))));
        ask_for_large_pages(data, bytes);
    }
    ~Block() {
        if (data) ::operator delete(data, std::align_val_t(align(bytes)));
    }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    static std::size_t align(int64_t n) { return static_cast<std::size_t>(n >= 2 * kLargePage ? kLargePage : 64); }
    void swap(Block& other) {
        char* const other_data = other.data;
        const int64_t other_bytes = other.bytes;
        other.data = data;
        other.bytes = bytes;
        data = other_data;
        bytes = other_bytes;
    }
};
inline Block& kept_block() {
    static thread_local Block kept;
    return kept;
}

class Scratch {
public:
    explicit Scratch(int64_t bytes, bool keep = false)
        : keep_(keep), block_(keep && kept_block().bytes >= bytes ? 0 : bytes) {
        if (block_.bytes < bytes) block_.swap(kept_block());
    }
    ~Scratch() {
        if (keep_ && block_.bytes <= kKeptBytes && block_.bytes > kept_block().bytes) block_.swap(kept_block());
    }
    char* data() const { return block_.data; }

private:
    bool keep_;
    Block block_;
};
inline int64_t cache_lines(int64_t bytes) { return blocks(bytes, 64) * 64; }

// ------ tasks that wait for each other
//
// Threads take tasks from one list in order, so a task may wait for any that comes before it.

inline void wait_until(const int32_t* counter, int32_t value) {
    for (int spins = 0; __atomic_load_n(counter, __ATOMIC_ACQUIRE) < value; ++spins) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        if (spins > 4000) sched_yield();  // more threads than cores
    }
}
inline void count_up(int32_t* counter) { __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL); }
inline int64_t take_task(int64_t* next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

// ------ rows of any dtype, less a shift

// What is taken from a row before it is rounded. With float panels the shift is high + low, so that
// the difference from a large mean is as good as one from the exact shift.
struct Shift {
    const float *high, *low;
    const double* exact;
    Shift from(int64_t column) const { return {high + column, low + column, exact + column}; }
};

// `memory` holds 16 bytes for each of the `padded` columns; those past n get no shift.
inline Shift make_shift(const double* values, int64_t n, int64_t padded, char* memory) {
    double* exact = reinterpret_cast<double*>(memory);
    float *high = reinterpret_cast<float*>(exact + padded), *low = high + padded;
    for (int64_t c = 0; c < padded; ++c) {
        exact[c] = c < n ? values[c] : 0.0;
        high[c] = static_cast<float>(exact[c]);
        low[c] = static_cast<float>(exact[c] - static_cast<double>(high[c]));
    }
    return {high, low, exact};
}

// One line of a panel: to[j] = from[j] - shift[j].
template <class E>
GEOFAST_INLINE void pack_line(const E* from, Shift shift, float* to) {
    GEOFAST_UNROLL for (int j = 0; j < kWide<float>; j += kFloats)
        store(to + j, (load(from + j) - load(shift.high + j)) - load(shift.low + j));
}
GEOFAST_INLINE void pack_line(const double* from, Shift shift, float* to) {
    for (int j = 0; j < kWide<float>; ++j) to[j] = static_cast<float>(from[j] - shift.exact[j]);
}
template <class E>
GEOFAST_INLINE void pack_line(const E* from, Shift shift, double* to) {
    // A panel of doubles need not be a multiple of the floats in a vector: the last load overlaps.
    GEOFAST_UNROLL for (int first = 0; first < kWide<double>; first += kFloats) {
        const int j = first + kFloats <= kWide<double> ? first : kWide<double> - kFloats;
        const Floats wide = load(from + j);
        store(to + j, half_of<0>(wide) - load(shift.exact + j));
        store(to + j + kDoubles, half_of<1>(wide) - load(shift.exact + j + kDoubles));
    }
}
GEOFAST_INLINE void pack_line(const double* from, Shift shift, double* to) {
    for (int j = 0; j < kWide<double>; ++j) to[j] = from[j] - shift.exact[j];
}

}  // namespace geofast::GEOFAST_ISA
