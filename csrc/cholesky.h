// Cholesky factors of batches of symmetric matrices, and what is computed from a factor L.
//
// Matrices are row-major; only the lower triangle is read or written.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "rows.h"

namespace geofast {

// count matrices [d, d], one after the other.
template <class T>
struct Batch {
    T* data;
    int64_t count, d;
};

template <class T>
struct LeverageJob {
    const T* l;  // [d, d]
    Rows x;
    const double* center;  // [d]
    const int64_t* rows;   // [n], checked: every entry names a row of x
    int64_t n;
    double* out;  // [n]
};

// Made for float and double.
namespace baseline {
template <class T>
void cholesky(Batch<T> a, int32_t* info);
template <class T>
void solve_lower(Batch<const T> l, T* b, int64_t count, bool transpose);
template <class T>
void inverse_trace(Batch<const T> l, double* out);
template <class T>
void leverage(const LeverageJob<T>& job);
}  // namespace baseline
namespace avx2 {
template <class T>
void cholesky(Batch<T> a, int32_t* info);
template <class T>
void solve_lower(Batch<const T> l, T* b, int64_t count, bool transpose);
template <class T>
void inverse_trace(Batch<const T> l, double* out);
template <class T>
void leverage(const LeverageJob<T>& job);
}  // namespace avx2

}  // namespace geofast
