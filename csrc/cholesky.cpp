// Blocked triangular algorithms on the micro-kernel of gemm.h.
//
// Inside, a lower triangular matrix is a pile of row panels: panel s holds rows [s * wide, (s+1) * wide)
// transposed, one line of `wide` numbers per column, columns 0 .. (s+1) * wide. A step of the
// micro-kernel then makes kHigh columns of a row panel at once: the same few lines update a tile, solve
// against a triangle and, with one panel in both roles, factor it. Right-hand sides are row panels too.
// Matrices are padded to whole panels with the identity.
#include "cholesky.h"

#include <omp.h>

#include "gemm.h"

namespace geofast::GEOFAST_ISA {
namespace {

constexpr int64_t kDepth = 192;  // columns in one pass over a tile: two panels of them fill the first-level cache

// ------ row panels

template <class T>
GEOFAST_INLINE int64_t panel_at(int64_t s) {
    return kWide<T> * kWide<T> * (s * (s + 1) / 2);
}
template <class T>
int64_t packed_size(int64_t panels) {
    return panel_at<T>(panels);
}

// to[j * to_stride + i] = from[i * from_stride + j], kWide x kWide.
template <class T>
GEOFAST_INLINE void transpose(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
    for (int i = 0; i < kWide<T>; ++i)
        for (int j = 0; j < kWide<T>; ++j) to[j * to_stride + i] = from[i * from_stride + j];
}

// Block (s, c) of a [d, d] matrix to or from its place in row panel s. Nothing above the diagonal is
// touched; outside the matrix the packed block is the identity.
template <class T>
void pack_block(const T* a, int64_t d, int64_t s, int64_t c, T* panel) {
    constexpr int64_t wide = kWide<T>;
    T* to = panel + c * wide * wide;
    if (s != c && (s + 1) * wide <= d) return transpose(a + s * wide * d + c * wide, d, to, wide);
    for (int64_t i = 0; i < wide; ++i)
        for (int64_t j = 0; j < wide; ++j) {
            const int64_t row = s * wide + i, column = c * wide + j;
            const bool inside = row < d && column <= row;
            to[j * wide + i] = inside ? a[row * d + column] : static_cast<T>(row == column);
        }
}
template <class T>
void unpack_block(const T* panel, int64_t d, int64_t s, int64_t c, T* a) {
    constexpr int64_t wide = kWide<T>;
    const T* from = panel + c * wide * wide;
    if (s != c && (s + 1) * wide <= d) return transpose(from, wide, a + s * wide * d + c * wide, d);
    for (int64_t i = 0; i < wide && s * wide + i < d; ++i) {
        const int64_t row = s * wide + i;
        for (int64_t j = 0; j < wide && c * wide + j <= row; ++j) a[row * d + c * wide + j] = from[j * wide + i];
    }
}

// 1 / value as an unevaluated sum. A rounded reciprocal is the same relative error in a whole column,
// and with huge collinear columns the products of that column then cancel to less than nothing.
template <class T>
struct Reciprocal {
    T high, low;
};
inline Reciprocal<float> reciprocal(float value) {
    const double exact = 1 / static_cast<double>(value);
    const float high = static_cast<float>(exact);
    return {high, static_cast<float>(exact - static_cast<double>(high))};
}
inline Reciprocal<double> reciprocal(double value) {
    const double high = 1 / value;
    return {high, high * __builtin_fma(-value, high, 1.0)};
}
// Of the square root.
inline Reciprocal<float> reciprocal_root(float value) {
    const double exact = 1 / __builtin_sqrt(static_cast<double>(value));
    const float high = static_cast<float>(exact);
    return {high, static_cast<float>(exact - static_cast<double>(high))};
}
inline Reciprocal<double> reciprocal_root(double value) {
    const double root = __builtin_sqrt(value), high = 1 / root;
    const double of_division = __builtin_fma(-root, high, 1.0), of_root = __builtin_fma(-root, root, value);
    return {high, high * (of_division - 0.5 * of_root * high * high)};
}

// Columns of panel s in x: x(c) -= sum over k in [k0, k1) of l(c, k) x(k), where x(k) is line k.
//
// There are two orders of rounding. A product taken off by itself rounds to the size of x(c), so a long
// run of them costs most (d = 2048: 30 units of float32 rounding in the residual against 3). A sum that
// is taken off at the end rounds to its largest term, so one huge column drowns what comes after it
// (the factorisation of nearly collinear columns failed at ten times LAPACK's penalty). Hence sums over
// long stretches of columns, and single products within a tile, where columns follow each other.
template <class T>
void update(const T* l, int64_t s, int64_t k0, int64_t k1, T* x) {
    constexpr int64_t wide = kWide<T>;
    for (int64_t t = 0; t < wide; t += kHigh) {
        T* to = x + (s * wide + t) * wide;
        for (int64_t b = 0; b < kHigh * wide * static_cast<int64_t>(sizeof(T)); b += 64)
            __builtin_prefetch(reinterpret_cast<char*>(to) + b, 1);
        Vector<T> acc[kHigh][kVectors] = {};
        multiply(k1 - k0, l + k0 * wide + t, 1, wide, x + k0 * wide, wide, acc);
        GEOFAST_UNROLL for (int i = 0; i < kHigh; ++i) GEOFAST_UNROLL for (int v = 0; v < kVectors; ++v) {
            T* at = to + i * wide + v * kLanes<T>;
            store(at, load(at) - acc[i][v]);
        }
    }
}

// acc = to less the products, one by one.
template <class T>
GEOFAST_INLINE void subtract_lines(int64_t depth, const T* l, const T* x, T* to, Vector<T> (&acc)[kHigh][kVectors]) {
    constexpr int64_t wide = kWide<T>;
    GEOFAST_UNROLL for (int i = 0; i < kHigh; ++i) GEOFAST_UNROLL for (int v = 0; v < kVectors; ++v) acc[i][v] =
        load(to + i * wide + v * kLanes<T>);
    multiply<true>(depth, l, 1, wide, x, wide, acc);
}
template <class T>
void update_singly(const T* l, int64_t s, int64_t k0, int64_t k1, T* x) {
    constexpr int64_t wide = kWide<T>;
    for (int64_t t = 0; t < wide; t += kHigh) {
        Vector<T> acc[kHigh][kVectors];
        T* to = x + (s * wide + t) * wide;
        subtract_lines(k1 - k0, l + k0 * wide + t, x + k0 * wide, to, acc);
        GEOFAST_UNROLL for (int i = 0; i < kHigh; ++i) GEOFAST_UNROLL for (int v = 0; v < kVectors; ++v)
            store(to + i * wide + v * kLanes<T>, acc[i][v]);
    }
}

// The same from line k0 up to the column itself, then divided by the diagonal: solves L x = b for the
// columns of panel s when everything before k0 has been subtracted.
template <class T>
void solve(const T* l, const Reciprocal<T>* inverse, int64_t s, int64_t k0, T* x) {
    constexpr int64_t wide = kWide<T>;
    for (int64_t t = 0; t < wide; t += kHigh) {
        const int64_t c = s * wide + t;
        Vector<T> acc[kHigh][kVectors];
        subtract_lines(c - k0, l + k0 * wide + t, x + k0 * wide, x + c * wide, acc);
        GEOFAST_UNROLL for (int i = 0; i < kHigh; ++i) GEOFAST_UNROLL for (int v = 0; v < kVectors; ++v) {
            GEOFAST_UNROLL for (int j = 0; j < i; ++j) acc[i][v] -= l[(c + j) * wide + t + i] * acc[j][v];
            acc[i][v] = acc[i][v] * inverse[c + i].high + acc[i][v] * inverse[c + i].low;
            store(x + (c + i) * wide + v * kLanes<T>, acc[i][v]);
        }
    }
}

// Factors the diagonal block of panel s. Returns the column of the first pivot that is not a positive
// finite number, or -1.
template <class T>
int64_t factor(T* panel, int64_t s, Reciprocal<T>* inverse) {
    constexpr int64_t wide = kWide<T>;
    T* block = panel + s * wide * wide;
    for (int64_t c = 0; c < wide; ++c) {
        T* line = block + c * wide;
        const T pivot = line[c];
        if (!(pivot > 0 && pivot < static_cast<T>(__builtin_inf()))) return s * wide + c;
        const Reciprocal<T> scale = inverse[s * wide + c] = reciprocal_root(pivot);
        Vector<T> column[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            column[v] = load(line + v * kLanes<T>);
            column[v] = column[v] * scale.high + column[v] * scale.low;
            store(line + v * kLanes<T>, column[v]);
        }
        line[c] = static_cast<T>(__builtin_sqrt(pivot));
        for (int64_t next = c + 1; next < wide; ++next)
            for (int v = 0; v < kVectors; ++v) {
                T* at = block + next * wide + v * kLanes<T>;
                store(at, load(at) - line[next] * column[v]);
            }
    }
    return -1;
}

// ------ factorisation
//
// The tiles of a matrix are tasks, left-looking: a task gathers all products of its tile, then solves
// against the diagonal tile of its column (or factors). Threads take tasks from one list, column after
// column, and wait at a tile that another thread is still making. As many matrices as there are
// threads go through the columns side by side, so that there is other work while a diagonal tile,
// which everything below waits for, is made.

template <class T>
class Factorisation {
public:
    Factorisation(Batch<T> a, int32_t* info, int64_t threads)
        : a_(a),
          info_(info),
          panels_(blocks(a.d, kWide<T>)),
          stripe_((a.d > 1000 ? 192 : 96) / kWide<T>),
          stripes_(blocks(panels_, stripe_)),
          tiles_(stripes_ * (stripes_ + 1) / 2),
          groups_(larger(1, a.count / threads)),
          slots_(smaller(a.count, 2 * threads)),
          slot_bytes_(cache_lines((packed_size<T>(panels_) + 2 * panels_ * kWide<T>)*static_cast<int64_t>(sizeof(T)))),
          flags_bytes_(a.count * (tiles_ + 2) * static_cast<int64_t>(sizeof(int32_t))),
          packed_(slots_ * slot_bytes_),
          flags_(flags_bytes_) {
        std::memset(flags_.data(), 0, static_cast<size_t>(flags_bytes_));
    }

    int64_t tasks() const { return a_.count * tiles_; }

    // Task number -> group of matrices, column, then the diagonal tiles of the group before the others.
    void run(int64_t task) {
        int64_t group = 0;
        while (task >= first_matrix(group + 1) * tiles_) ++group;
        task -= first_matrix(group) * tiles_;
        const int64_t matrices = first_matrix(group + 1) - first_matrix(group);
        int64_t j = 0;
        for (; task >= matrices * (stripes_ - j); ++j) task -= matrices * (stripes_ - j);
        const int64_t below = stripes_ - j - 1;
        const bool diagonal = task < matrices;
        if (!diagonal) task -= matrices;
        const int64_t m = first_matrix(group) + (diagonal ? task : task / below);
        make_tile(m, diagonal ? j : j + 1 + task % below, j);
    }

private:
    int64_t first_matrix(int64_t group) const { return group * a_.count / groups_; }
    int32_t* flags(int64_t m) const { return reinterpret_cast<int32_t*>(flags_.data()) + m * (tiles_ + 2); }
    int32_t* done(int64_t m, int64_t i, int64_t j) const { return flags(m) + 2 + i * (i + 1) / 2 + j; }
    int32_t* finished(int64_t m) const { return flags(m); }
    int32_t* failed(int64_t m) const { return flags(m) + 1; }
    T* panel(int64_t m, int64_t s) const { return packed(m) + panel_at<T>(s); }
    Reciprocal<T>* inverse(int64_t m) const {
        return reinterpret_cast<Reciprocal<T>*>(packed(m) + packed_size<T>(panels_));
    }
    T* packed(int64_t m) const { return reinterpret_cast<T*>(packed_.data() + m % slots_ * slot_bytes_); }
    int64_t first(int64_t stripe) const { return smaller(stripe * stripe_, panels_); }

    void make_tile(int64_t m, int64_t i, int64_t j) {
        if (m >= slots_) wait_until(finished(m - slots_), static_cast<int32_t>(tiles_));
        if (!__atomic_load_n(failed(m), __ATOMIC_ACQUIRE)) compute_tile(m, i, j);
        count_up(done(m, i, j));
        count_up(finished(m));
    }

    void compute_tile(int64_t m, int64_t i, int64_t j) {
        const int64_t d = a_.d, i0 = first(i), i1 = first(i + 1), j0 = first(j), j1 = first(j + 1);
        T* a = a_.data + m * d * d;
        for (int64_t r = i0; r < i1; ++r)
            for (int64_t s = j0; s < smaller(j1, r + 1); ++s) pack_block(a, d, r, s, panel(m, r));
        // Chunks of whole stripes.
        const int64_t step = larger(1, kDepth / (stripe_ * kWide<T>));
        for (int64_t k = 0; k < j; k += step) {
            const int64_t end = smaller(k + step, j);
            for (int64_t c = k; c < end; ++c) {
                wait_until(done(m, i, c), 1);
                wait_until(done(m, j, c), 1);
            }
            for (int64_t r = i0; r < i1; ++r)
                for (int64_t s = j0; s < smaller(j1, r + 1); ++s)
                    update(panel(m, s), s, first(k) * kWide<T>, first(end) * kWide<T>, panel(m, r));
        }
        if (i == j) {
            for (int64_t s = j0; s < j1; ++s) {
                update_singly(panel(m, s), s, j0 * kWide<T>, s * kWide<T>, panel(m, s));
                const int64_t bad = factor(panel(m, s), s, inverse(m));
                if (bad >= 0) {
                    info_[m] = static_cast<int32_t>(bad + 1);
                    count_up(failed(m));
                    return;
                }
                for (int64_t r = s + 1; r < j1; ++r) solve(panel(m, s), inverse(m), s, j0 * kWide<T>, panel(m, r));
            }
        } else {
            wait_until(done(m, j, j), 1);
            if (__atomic_load_n(failed(m), __ATOMIC_ACQUIRE)) return;
            for (int64_t r = i0; r < i1; ++r)
                for (int64_t s = j0; s < j1; ++s) solve(panel(m, s), inverse(m), s, j0 * kWide<T>, panel(m, r));
        }
        for (int64_t r = i0; r < i1; ++r)
            for (int64_t s = j0; s < smaller(j1, r + 1); ++s) unpack_block(panel(m, r), d, r, s, a);
    }

    Batch<T> a_;
    int32_t* info_;
    int64_t panels_, stripe_, stripes_, tiles_, groups_, slots_, slot_bytes_, flags_bytes_;
    Scratch packed_, flags_;
};

template <class T>
void factor_all(Batch<T> a, int32_t* info) {
    for (int64_t m = 0; m < a.count; ++m) info[m] = 0;
    const int64_t threads = omp_get_max_threads();
    Factorisation<T> all(a, info, threads);
    const bool small = a.count * a.d * a.d * a.d < 1000000;
    int64_t next = 0;
#pragma omp parallel num_threads(static_cast<int>(small ? 1 : smaller(threads, all.tasks())))
    for (int64_t task; (task = take_task(&next)) < all.tasks();) all.run(task);
}

// ------ many right-hand sides: inverse_trace and leverage

// A factor in row panels, shared by the threads.
template <class T>
struct Triangle {
    int64_t d, panels;
    T* packed;
    Reciprocal<T>* inverse;

    static int64_t bytes(int64_t d) {
        const int64_t panels = blocks(d, kWide<T>);
        return cache_lines((packed_size<T>(panels) + 2 * panels * kWide<T>)*static_cast<int64_t>(sizeof(T)));
    }
    Triangle(int64_t d_, char* at)
        : d(d_),
          panels(blocks(d_, kWide<T>)),
          packed(reinterpret_cast<T*>(at)),
          inverse(reinterpret_cast<Reciprocal<T>*>(packed + packed_size<T>(panels))) {}
    const T* panel(int64_t s) const { return packed + panel_at<T>(s); }
    void pack(const T* l, int64_t s) {
        for (int64_t c = 0; c <= s; ++c) pack_block(l, d, s, c, packed + panel_at<T>(s));
        for (int64_t c = s * kWide<T>; c < (s + 1) * kWide<T>; ++c)
            inverse[c] = reciprocal(c < d ? l[c * d + c] : T(1));
    }

    // x := L^-1 x for `count` panels of right-hand sides, `stride` apart; panel r is zero before the
    // lines of block first + r * step (step 0 or 1).
    void solve_panels(T* x, int64_t stride, int64_t count, int64_t first, int64_t step) const {
        constexpr int64_t wide = kWide<T>;
        const int64_t stripe = 96 / wide;
        for (int64_t j0 = first; j0 < panels; j0 += stripe) {
            const int64_t j1 = smaller(j0 + stripe, panels);
            for (int64_t k0 = first * wide; k0 < j0 * wide; k0 += kDepth) {
                const int64_t k1 = smaller(k0 + kDepth, j0 * wide);
                for (int64_t r = 0; r < count; ++r) {
                    const int64_t from = larger(k0, (first + r * step) * wide);
                    if (from < k1)
                        for (int64_t s = j0; s < j1; ++s) update(panel(s), s, from, k1, x + r * stride);
                }
            }
            for (int64_t r = 0; r < count; ++r)
                for (int64_t s = larger(j0, first + r * step); s < j1; ++s)
                    solve(panel(s), inverse, s, larger(j0, first + r * step) * wide, x + r * stride);
        }
    }
};

// sums[j] = sum over lines [k0, k1) of x(k)[j]^2.
template <class T>
void column_squares(const T* x, int64_t k0, int64_t k1, double* sums) {
    for (int j = 0; j < kWide<T>; ++j) sums[j] = 0;
    for (int64_t k = k0; k < k1; ++k)
        for (int j = 0; j < kWide<T>; ++j) {
            const double value = static_cast<double>(x[k * kWide<T> + j]);
            sums[j] += value * value;
        }
}

template <class T>
void inverse_trace_all(Batch<const T> l, double* out) {
    constexpr int64_t wide = kWide<T>, group = 96 / wide;
    const int64_t panels = blocks(l.d, wide), groups = blocks(panels, group), lines = panels * wide;
    const int64_t threads = omp_get_max_threads(),
                  each = cache_lines(group * lines * wide * static_cast<int64_t>(sizeof(T)));
    const int64_t triangle = Triangle<T>::bytes(l.d);
    const int team = l.count * l.d * l.d * l.d < 1000000 ? 1 : static_cast<int>(threads);
    Scratch packed(l.count * triangle), columns(team * each), partial(l.count * groups * 8);
    double* sums = reinterpret_cast<double*>(partial.data());
#pragma omp parallel num_threads(team)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < l.count * panels; ++task)
            Triangle<T>(l.d, packed.data() + task / panels * triangle)
                .pack(l.data + task / panels * l.d * l.d, task % panels);
        T* x = reinterpret_cast<T*>(columns.data() + omp_get_thread_num() * each);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < l.count * groups; ++task) {
            const Triangle<T> factor(l.d, packed.data() + task / groups * triangle);
            const int64_t first = task % groups * group, count = smaller(group, panels - first);
            for (int64_t r = 0; r < count; ++r) {
                T* panel = x + r * lines * wide;
                std::memset(panel + first * wide * wide, 0,
                            static_cast<size_t>((panels - first) * wide * wide) * sizeof(T));
                for (int64_t c = 0; c < wide && (first + r) * wide + c < l.d; ++c)
                    panel[((first + r) * wide + c) * wide + c] = 1;
            }
            factor.solve_panels(x, lines * wide, count, first, 1);
            double total = 0, squares[kWide<T>];
            for (int64_t r = 0; r < count; ++r) {
                column_squares(x + r * lines * wide, (first + r) * wide, lines, squares);
                for (double value : squares) total += value;
            }
            sums[task] = total;
        }
    }
    for (int64_t m = 0; m < l.count; ++m) {
        out[m] = 0;
        for (int64_t g = 0; g < groups; ++g) out[m] += sums[m * groups + g];
    }
}

using PackRows = void (*)(const Rows&, const int64_t* rows, int64_t count, Shift, int64_t lines, void* to);

// Rows of x, less the center, as one panel of right-hand sides.
template <class S, class T>
void pack_rows(const Rows& x, const int64_t* rows, int64_t count, Shift center, int64_t lines, void* to) {
    constexpr int64_t wide = kWide<T>;
    alignas(64) T block[kWide<T> * kWide<T>] = {};
    for (int64_t c = 0; c < lines; c += wide) {
        for (int64_t i = 0; i < count; ++i) {
            const S* from = static_cast<const S*>(x.data) + rows[i] * x.stride + c;
            S tail[kWide<T>] = {};
            if (c + wide > x.width) {
                std::memcpy(tail, from, static_cast<size_t>(x.width - c) * sizeof(S));
                from = tail;
            }
            pack_line(from, center.from(c), block + i * wide);
        }
        transpose(block, wide, static_cast<T*>(to) + c * wide, wide);
    }
}

template <class T>
PackRows pack_for(RowType type) {
    switch (type) {
        case RowType::float32:
            return pack_rows<float, T>;
        case RowType::float16:
            return pack_rows<Float16, T>;
        case RowType::bfloat16:
            return pack_rows<BFloat16, T>;
        default:
            return pack_rows<double, T>;
    }
}

template <class T>
void leverage_all(const LeverageJob<T>& job) {
    constexpr int64_t wide = kWide<T>;
    const int64_t d = job.x.width, lines = blocks(d, wide) * wide, columns = blocks(job.n, wide);
    const int64_t threads = omp_get_max_threads();
    const int64_t group = larger(1, smaller(96 / wide, blocks(columns, 2 * threads))), groups = blocks(columns, group);
    const int64_t each = cache_lines(group * lines * wide * static_cast<int64_t>(sizeof(T)));
    const int team = job.n * d * d < 1000000 ? 1 : static_cast<int>(threads);
    Scratch packed(Triangle<T>::bytes(d)), work(team * each), shifts(lines * 16);
    const Shift center = make_shift(job.center, d, lines, shifts.data());
    Triangle<T> factor(d, packed.data());
    const PackRows pack = pack_for<T>(job.x.type);
#pragma omp parallel num_threads(team)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t s = 0; s < factor.panels; ++s) factor.pack(job.l, s);
        T* x = reinterpret_cast<T*>(work.data() + omp_get_thread_num() * each);
#pragma omp for schedule(dynamic, 1)
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t first = g * group, count = smaller(group, columns - first);
            for (int64_t r = 0; r < count; ++r)
                pack(job.x, job.rows + (first + r) * wide, smaller(wide, job.n - (first + r) * wide), center, lines,
                     x + r * lines * wide);
            factor.solve_panels(x, lines * wide, count, 0, 0);
            double squares[kWide<T>];
            for (int64_t r = 0; r < count; ++r) {
                column_squares(x + r * lines * wide, 0, d, squares);
                for (int64_t i = 0; i < wide && (first + r) * wide + i < job.n; ++i)
                    job.out[(first + r) * wide + i] = squares[i];
            }
        }
    }
}

// ------ few right-hand sides
//
// Here L is read once and is not packed. The right-hand sides are the lines x(k) of up to kWide
// numbers; L x = b reads L along its rows, L^T x = b along its rows too, from the last block up, taking
// each solved block out of everything before it.

constexpr int64_t kRowsOfL = 32;

template <class T, int Cols>
struct FewSides {
    static constexpr int64_t line = Cols * kLanes<T>;
    static constexpr int kTall = Cols == 1 ? 8 : 4;  // enough chains to hide the latency
    const T* l;
    int64_t d;
    T* x;

    // x(c + i) -= sum over k in [k0, k1) of l(c + i, k) x(k); transposed: l(k, c + i).
    template <int Rows>
    GEOFAST_INLINE void subtract(int64_t c, int64_t k0, int64_t k1, bool transposed) const {
        Vector<T> acc[Rows][Cols] = {};
        if (transposed)
            multiply(k1 - k0, l + k0 * d + c, 1, d, x + k0 * line, line, acc);
        else
            multiply(k1 - k0, l + c * d + k0, d, 1, x + k0 * line, line, acc);
        for (int i = 0; i < Rows; ++i)
            for (int v = 0; v < Cols; ++v) {
                T* at = x + (c + i) * line + v * kLanes<T>;
                store(at, load(at) - acc[i][v]);
            }
    }
    void subtract_range(int64_t c0, int64_t c1, int64_t k0, int64_t k1, bool transposed) const {
        int64_t c = c0;
        for (; c + kTall <= c1; c += kTall) subtract<kTall>(c, k0, k1, transposed);
        for (; c < c1; ++c) subtract<1>(c, k0, k1, transposed);
    }
    void scale(int64_t c) const {
        for (int64_t j = 0; j < line; ++j) x[c * line + j] /= l[c * d + c];
    }
    void forward() const {
        for (int64_t c0 = 0; c0 < d; c0 += kRowsOfL) {
            const int64_t c1 = smaller(c0 + kRowsOfL, d);
            for (int64_t k0 = 0; k0 < c0; k0 += 256) subtract_range(c0, c1, k0, smaller(k0 + 256, c0), false);
            for (int64_t c = c0; c < c1; ++c) {
                if (c > c0) subtract<1>(c, c0, c, false);
                scale(c);
            }
        }
    }
    void backward() const {
        for (int64_t c0 = (d - 1) / kRowsOfL * kRowsOfL; c0 >= 0; c0 -= kRowsOfL) {
            const int64_t c1 = smaller(c0 + kRowsOfL, d);
            for (int64_t c = c1 - 1; c >= c0; --c) {
                if (c + 1 < c1) subtract<1>(c, c + 1, c1, true);
                scale(c);
            }
            subtract_range(0, c0, c0, c1, true);
        }
    }
};

template <class T, int Cols>
void solve_few(const T* l, int64_t d, T* b, int64_t count, bool transpose, T* x) {
    constexpr int64_t line = Cols * kLanes<T>;
    for (int64_t k = 0; k < d; ++k)
        for (int64_t j = 0; j < line; ++j) x[k * line + j] = j < count ? b[j * d + k] : 0;
    const FewSides<T, Cols> sides{l, d, x};
    transpose ? sides.backward() : sides.forward();
    for (int64_t j = 0; j < count; ++j)
        for (int64_t k = 0; k < d; ++k) b[j * d + k] = x[k * line + j];
}

template <class T>
void solve_all(Batch<const T> l, T* b, int64_t count, bool transpose) {
    const int64_t d = l.d, threads = omp_get_max_threads(), least = blocks(count, kWide<T>);
    // The matrices that do not come out even are shared between the threads by right-hand side.
    const int64_t whole = l.count / threads * threads, split = smaller(count, larger(least, threads));
    const int64_t tasks = whole * least + (l.count - whole) * split;
    const int team = l.count * count * d * d < 200000 ? 1 : static_cast<int>(smaller(threads, tasks));
    const int64_t each = cache_lines(d * kWide<T> * static_cast<int64_t>(sizeof(T)));
    Scratch work(team * each);
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
    for (int64_t task = 0; task < tasks; ++task) {
        const bool even = task < whole * least;
        const int64_t parts = even ? least : split, at = even ? task : task - whole * least;
        const int64_t m = (even ? 0 : whole) + at / parts, part = at % parts;
        const int64_t first = part * count / parts, n = (part + 1) * count / parts - first;
        T *sides = b + (m * count + first) * d, *x = reinterpret_cast<T*>(work.data() + omp_get_thread_num() * each);
        const T* matrix = l.data + m * d * d;
        if (n <= kLanes<T>)
            solve_few<T, 1>(matrix, d, sides, n, transpose, x);
        else if (n <= 2 * kLanes<T>)
            solve_few<T, 2>(matrix, d, sides, n, transpose, x);
        else
            solve_few<T, kVectors>(matrix, d, sides, n, transpose, x);
    }
}

}  // namespace

template <class T>
void cholesky(Batch<T> a, int32_t* info) {
    factor_all(a, info);
}
template <class T>
void solve_lower(Batch<const T> l, T* b, int64_t count, bool transpose) {
    solve_all(l, b, count, transpose);
}
template <class T>
void inverse_trace(Batch<const T> l, double* out) {
    inverse_trace_all(l, out);
}
template <class T>
void leverage(const LeverageJob<T>& job) {
    leverage_all(job);
}

template void cholesky(Batch<float>, int32_t*);
template void cholesky(Batch<double>, int32_t*);
template void solve_lower(Batch<const float>, float*, int64_t, bool);
template void solve_lower(Batch<const double>, double*, int64_t, bool);
template void inverse_trace(Batch<const float>, double*);
template void inverse_trace(Batch<const double>, double*);
template void leverage(const LeverageJob<float>&);
template void leverage(const LeverageJob<double>&);

}  // namespace geofast::GEOFAST_ISA
