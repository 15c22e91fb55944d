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

#include <new>

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

// ------ scratch memory

// Uninitialised memory on a cache line, freed with its owner. Throws std::bad_alloc.
class Scratch {
public:
    explicit Scratch(int64_t bytes)
        : data_(static_cast<char*>(::operator new(static_cast<std::size_t>(bytes), std::align_val_t(64)))) {}
    ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    char* data() const { return data_; }

private:
    char* data_;
};
inline int64_t cache_lines(int64_t bytes) { return blocks(bytes, 64) * 64; }

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
        float wide[kFloats];
        store(wide, load(from + j));
        for (int i = 0; i < kFloats; ++i) to[j + i] = static_cast<double>(wide[i]) - shift.exact[j + i];
    }
}
GEOFAST_INLINE void pack_line(const double* from, Shift shift, double* to) {
    for (int j = 0; j < kWide<double>; ++j) to[j] = from[j] - shift.exact[j];
}

}  // namespace geofast::GEOFAST_ISA
