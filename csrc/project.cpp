// Both read x once: some rows by some columns are widened and shifted into a buffer in L1 or L2, and
// every vector is taken from there. Products and sums are float64.
#include "project.h"

#include <omp.h>

#include "simd.h"

namespace geofast::GEOFAST_ISA {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class E>
const E* row_at(const ProjectJob& job, int64_t i) {
    return static_cast<const E*>(job.x.data) + (job.rows ? job.rows[i] : i) * job.x.stride;
}

// ------ widening

template <class E>
void widen(const E* x, const double* shift, double* to, int64_t n) {
    int64_t c = 0;
    for (; c + kFloats <= n; c += kFloats) {
        const Floats v = load(x + c);
        store(to + c, half_of<0>(v) - load(shift + c));
        store(to + c + kDoubles, half_of<1>(v) - load(shift + c + kDoubles));
    }
    if (c < n) {
        const Floats v = load_part(x + c, n - c);
        for (int64_t i = c; i < n; ++i) to[i] = static_cast<double>(v[i - c]) - shift[i];
    }
}
inline void widen(const double* x, const double* shift, double* to, int64_t n) {
    for (int64_t c = 0; c < n; ++c) to[c] = x[c] - shift[c];
}

// Columns [column, column + n) of row i, shifted. Prefetches the same columns of row i + ahead, which
// DRAM delivers while this one is multiplied.
template <class E>
void take(const ProjectJob& job, int64_t i, int64_t ahead, int64_t column, int64_t n, double* to) {
    const char* next = reinterpret_cast<const char*>(row_at<E>(job, smaller(i + ahead, job.n - 1)) + column);
    for (int64_t b = 0; b < n * static_cast<int64_t>(sizeof(E)); b += 64) __builtin_prefetch(next + b);
    widen(row_at<E>(job, i) + column, job.shift + column, to, n);
}

// ------ project

constexpr int64_t kDotColumns = 512;
constexpr int64_t kDotStride = kDotColumns + 8;  // lines 4 KB apart would share one set of L1
constexpr int kDotRows = 4, kDotVectors = 3;     // 12 sums, 3 loads of w and one of x: the 16 registers of AVX2

inline double sum(Doubles v) {
    double total = 0;
    for (int i = 0; i < kDoubles; ++i) total += v[i];
    return total;
}

// out[r, j] (+)= sum over c < n of x[r, c] * w[j, c], for kDotRows rows of which `rows` are written.
template <int kVectors>
void dot(const double* x, const double* w, int64_t w_stride, int64_t n, double* out, int64_t out_stride, int rows,
         bool add) {
    Doubles acc[kDotRows][kVectors] = {};
    int64_t c = 0;
    for (; c + kDoubles <= n; c += kDoubles) {
        Doubles right[kVectors];
        for (int j = 0; j < kVectors; ++j) right[j] = load(w + j * w_stride + c);
        for (int r = 0; r < kDotRows; ++r) {
            const Doubles left = load(x + r * kDotStride + c);
            for (int j = 0; j < kVectors; ++j) acc[r][j] += left * right[j];
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int j = 0; j < kVectors; ++j) {
            double total = sum(acc[r][j]);
            for (int64_t t = c; t < n; ++t) total += x[r * kDotStride + t] * w[j * w_stride + t];
            double& to = out[r * out_stride + j];
            to = add ? to + total : total;
        }
}

template <class E>
void project_all(const ProjectJob& job) {
    const int64_t groups = (job.n + kDotRows - 1) / kDotRows, d = job.x.width, m = job.m;
#pragma omp parallel for schedule(static) num_threads(job.threads)
    for (int64_t group = 0; group < groups; ++group) {
        double x[kDotRows * kDotStride] = {};
        const int64_t first = group * kDotRows;
        const int rows = static_cast<int>(smaller(kDotRows, job.n - first));
        for (int64_t column = 0; column < d; column += kDotColumns) {
            const int64_t n = smaller(kDotColumns, d - column);
            for (int r = 0; r < rows; ++r) take<E>(job, first + r, kDotRows, column, n, x + r * kDotStride);
            for (int64_t j = 0; j < m;) {
                const double* w = job.vectors + j * d + column;
                double* out = job.out + first * m + j;
                const int64_t left = m - j;
                if (left >= kDotVectors && left != 4) {
                    dot<3>(x, w, d, n, out, m, rows, column > 0);
                    j += 3;
                } else if (left >= 2) {  // 4 as 2 + 2: a single vector leaves the multipliers waiting
                    dot<2>(x, w, d, n, out, m, rows, column > 0);
                    j += 2;
                } else {
                    dot<1>(x, w, d, n, out, m, rows, column > 0);
                    j += 1;
                }
            }
        }
    }
}

// ------ project_t

constexpr int kDepth = 16;  // rows taken together
constexpr int64_t kTakenStride = kProjectPanel + 16;
constexpr int kStrip = 4, kStripVectors = 3;  // 12 sums; a step loads 4 vectors of x and broadcasts 3 of r
constexpr int kStripColumns = kStrip * kDoubles;

// to[j, c] += sum over k < depth of r[k, j] * x[k, c], for one strip of columns.
template <int kVectors>
void outer(const double* x, const double* r, int64_t r_stride, int depth, double* to) {
    Doubles acc[kVectors][kStrip];
    for (int j = 0; j < kVectors; ++j)
        for (int v = 0; v < kStrip; ++v) acc[j][v] = load(to + j * kProjectPanel + v * kDoubles);
    for (int k = 0; k < depth; ++k) {
        Doubles right[kStrip];
        for (int v = 0; v < kStrip; ++v) right[v] = load(x + k * kTakenStride + v * kDoubles);
        for (int j = 0; j < kVectors; ++j)
            for (int v = 0; v < kStrip; ++v) acc[j][v] += r[k * r_stride + j] * right[v];
    }
    for (int j = 0; j < kVectors; ++j)
        for (int v = 0; v < kStrip; ++v) store(to + j * kProjectPanel + v * kDoubles, acc[j][v]);
}

// Rows [begin, end) by columns [column, column + n), into to[m, kProjectPanel].
template <class E>
void project_task(const ProjectJob& job, int64_t begin, int64_t end, int64_t column, int64_t n, double* to) {
    double x[kDepth * kTakenStride] = {};  // columns past n stay zero
    const int64_t m = job.m;
    std::memset(to, 0, static_cast<size_t>(m * kProjectPanel) * sizeof(double));
    for (int64_t i = begin; i < end; i += kDepth) {
        const int depth = static_cast<int>(smaller(kDepth, end - i));
        for (int k = 0; k < depth; ++k) take<E>(job, i + k, kDepth, column, n, x + k * kTakenStride);
        for (int64_t c = 0; c < n; c += kStripColumns) {
            const double* r = job.vectors + i * m;
            int64_t j = 0;
            for (; j + kStripVectors <= m; j += kStripVectors)
                outer<kStripVectors>(x + c, r + j, m, depth, to + j * kProjectPanel + c);
            if (m - j == 2) outer<2>(x + c, r + j, m, depth, to + j * kProjectPanel + c);
            if (m - j == 1) outer<1>(x + c, r + j, m, depth, to + j * kProjectPanel + c);
        }
    }
}

template <class E>
void project_t_all(const ProjectJob& job, const ProjectPlan& plan) {
    const int64_t d = job.x.width, m = job.m, size = m * kProjectPanel;
#pragma omp parallel num_threads(job.threads)
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < plan.chunks * plan.panels; ++task) {
            const int64_t chunk = task / plan.panels, column = task % plan.panels * kProjectPanel;
            project_task<E>(job, job.n * chunk / plan.chunks, job.n * (chunk + 1) / plan.chunks, column,
                            smaller(kProjectPanel, d - column), plan.scratch + task * size);
        }
#pragma omp for schedule(static)
        for (int64_t j = 0; j < m; ++j)
            for (int64_t c = 0; c < d; ++c) {
                const double* from = plan.scratch + c / kProjectPanel * size + j * kProjectPanel + c % kProjectPanel;
                double total = 0;
                for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) total += from[chunk * plan.panels * size];
                job.out[j * d + c] = total;
            }
    }
}

}  // namespace

void project(const ProjectJob& job) {
    switch (job.x.type) {
        case RowType::float32:
            return project_all<float>(job);
        case RowType::float16:
            return project_all<Float16>(job);
        case RowType::bfloat16:
            return project_all<BFloat16>(job);
        case RowType::float64:
            return project_all<double>(job);
    }
}

void project_t(const ProjectJob& job, const ProjectPlan& plan) {
    switch (job.x.type) {
        case RowType::float32:
            return project_t_all<float>(job, plan);
        case RowType::float16:
            return project_t_all<Float16>(job, plan);
        case RowType::bfloat16:
            return project_t_all<BFloat16>(job, plan);
        case RowType::float64:
            return project_t_all<double>(job, plan);
    }
}

}  // namespace geofast::GEOFAST_ISA
