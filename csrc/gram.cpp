// G += [x - shift, z]^T [x - shift, z] for every cell, lower triangle only.
//
// The triangle of a cell is cut into square tiles of a few panels; a task is one tile of one cell, and
// it packs the rows it needs by itself: gather, widen and shift happen while packing, once per tile
// and 192 multiply-adds per number. So threads share nothing but the list of tasks, cells need no
// barrier between them, and a tile of G is read and written once, however many rows there are.
#include "gram.h"

#include <omp.h>

#include "gemm.h"

namespace geofast::GEOFAST_ISA {
namespace {

constexpr int64_t kDepth = 128;       // rows multiplied before the sum goes to float64; see PERF in the notes of gemm.h
constexpr int64_t kTilePanels = 8;    // of floats: 192 columns, a 288 KB tile of float64 in the second-level cache
constexpr int64_t kDirectRows = 256;  // fewer rows go straight to G: zeroing a tile and adding it would cost as much
constexpr int64_t kPrefetchRows = 4;

template <class T>
constexpr int64_t kPanel = kDepth * kWide<T> + 64 / static_cast<int64_t>(sizeof(T));  // not a multiple of 4 KB

using PackStripe = void (*)(const Rows&, const int64_t* order, int64_t rows, int64_t first, int64_t columns, Shift,
                            void* to);

// Columns [first, first + columns) of the listed rows as panels; columns past the last are zero.
template <class S, class T>
void pack_stripe(const Rows& x, const int64_t* order, int64_t rows, int64_t first, int64_t columns, Shift shift,
                 void* to) {
    constexpr int64_t wide = kWide<T>;
    const S* base = static_cast<const S*>(x.data) + first;
    const int64_t bytes = columns * static_cast<int64_t>(sizeof(S));
    for (int64_t r = 0; r < rows; ++r) {
        const char* ahead =
            reinterpret_cast<const char*>(base + order[smaller(r + kPrefetchRows, rows - 1)] * x.stride);
        for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(ahead + b);
        const S* row = base + order[r] * x.stride;
        T* line = static_cast<T*>(to) + r * wide;
        int64_t c = 0;
        for (; c + wide <= columns; c += wide, line += kPanel<T>) pack_line(row + c, shift.from(first + c), line);
        if (c < columns) {
            S tail[kWide<T>] = {};
            std::memcpy(tail, row + c, static_cast<size_t>(columns - c) * sizeof(S));
            pack_line(tail, shift.from(first + c), line);
        }
    }
}

template <class T>
PackStripe pack_for(RowType type) {
    switch (type) {
        case RowType::float32:
            return pack_stripe<float, T>;
        case RowType::float16:
            return pack_stripe<Float16, T>;
        case RowType::bfloat16:
            return pack_stripe<BFloat16, T>;
        default:
            return pack_stripe<double, T>;
    }
}

// Where the sums of a tile go: `to` is element (row, column) of G; rows from `end` on are not there.
struct Target {
    double* to;
    int64_t stride, row, column, end;
    double* at(int64_t r, int64_t c) const { return to + (r - row) * stride + c - column; }
};

// The sums of left panels times right panels, over `depth` lines, onto the target. The panels begin
// at these columns of x.
template <class T>
void multiply_tile(const T* left, int64_t left_first, int64_t left_panels, const T* right, int64_t right_first,
                   int64_t right_panels, int64_t depth, Target target) {
    constexpr int64_t wide = kWide<T>;
    for (int64_t a = 0; a < left_panels; ++a)
        for (int64_t b = 0; b < right_panels; ++b) {
            const int64_t column = right_first + b * wide;
            if (column > left_first + a * wide) break;
            for (int64_t row = left_first + a * wide; row < left_first + (a + 1) * wide; row += kHigh) {
                double* to = target.at(row, column);
                GEOFAST_UNROLL for (int64_t i = 0; i < kHigh; ++i) for (int64_t j = 0; j < wide; j += 8)
                    __builtin_prefetch(to + i * target.stride + j, 1);
                Vector<T> acc[kHigh][kVectors] = {};
                multiply(depth, left + a * kPanel<T> + row - left_first - a * wide, 1, wide, right + b * kPanel<T>,
                         wide, acc);
                alignas(64) T sums[kHigh][kWide<T>];
                for (int i = 0; i < kHigh; ++i)
                    for (int j = 0; j < kVectors; ++j) store(&sums[i][j * kLanes<T>], acc[i][j]);
                if (row >= column + wide && row + kHigh <= target.end) {
                    for (int i = 0; i < kHigh; ++i)
                        for (int j = 0; j < wide; ++j) to[i * target.stride + j] += static_cast<double>(sums[i][j]);
                } else {
                    for (int64_t i = 0; i < kHigh && row + i < target.end; ++i)
                        for (int64_t j = 0; j < smaller(wide, row + i - column + 1); ++j)
                            to[i * target.stride + j] += static_cast<double>(sums[i][j]);
                }
            }
        }
}

GEOFAST_INLINE Vector<double> widen(const double* from) { return load(from); }
GEOFAST_INLINE Vector<double> widen(const float* from) {
    typedef float Halves __attribute__((vector_size(kVectorBytes / 2)));
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return __builtin_convertvector(halves, Doubles);
}

// to[j, :] += z_j^T panels in float64; z has `z_wide` columns, a multiple of kHigh.
template <class T>
void multiply_targets(const double* z, int64_t z_wide, const T* panels, int64_t count, int64_t depth, double* to,
                      int64_t stride) {
    for (int64_t panel = 0; panel < count; ++panel)
        for (int64_t part = 0; part < kWide<T>; part += kWide<double>)
            for (int64_t j = 0; j < z_wide; j += kHigh) {
                Vector<double> acc[kHigh][kVectors] = {};
                const T* line = panels + panel * kPanel<T> + part;
                for (int64_t k = 0; k < depth; ++k, line += kWide<T>) {
                    Vector<double> right[kVectors];
                    GEOFAST_UNROLL for (int v = 0; v < kVectors; ++v) right[v] = widen(line + v * kLanes<double>);
                    GEOFAST_UNROLL for (int i = 0; i < kHigh; ++i) {
                        const double left = z[k * z_wide + j + i];
                        GEOFAST_UNROLL for (int v = 0; v < kVectors; ++v) acc[i][v] += left * right[v];
                    }
                }
                for (int i = 0; i < kHigh; ++i)
                    for (int v = 0; v < kVectors; ++v) {
                        double* at = to + (j + i) * stride + panel * kWide<T> + part + v * kLanes<double>;
                        store(at, load(at) + acc[i][v]);
                    }
            }
}

// One thread's memory.
template <class T>
struct Workspace {
    T *left, *right;  // packed panels of a chunk of rows
    double *z, *z_sums, *zz, *tile;

    static int64_t bytes(int64_t panels, int64_t z_wide) {
        const int64_t columns = panels * kWide<T>;
        return 2 * cache_lines(panels * kPanel<T> * static_cast<int64_t>(sizeof(T))) +
               cache_lines((kDepth * z_wide + z_wide * columns + z_wide * z_wide + columns * columns) * 8);
    }
    Workspace(char* at, int64_t panels, int64_t z_wide) {
        const int64_t columns = panels * kWide<T>,
                      packed = cache_lines(panels * kPanel<T> * static_cast<int64_t>(sizeof(T)));
        left = reinterpret_cast<T*>(at);
        right = reinterpret_cast<T*>(at + packed);
        tile = reinterpret_cast<double*>(at + 2 * packed);
        z = tile + columns * columns;
        z_sums = z + kDepth * z_wide;
        zz = z_sums + z_wide * columns;
    }
};

template <class T>
struct Plan {
    const GramJob& job;
    PackStripe pack;
    Shift shift;
    int64_t panels, stripes, z_wide;

    int64_t first_panel(int64_t stripe) const { return stripe * panels / stripes; }
    // No stripe is more than one panel wider than another.
    int64_t widest() const { return blocks(panels, stripes); }
    int64_t first(int64_t stripe) const { return first_panel(stripe) * kWide<T>; }
    int64_t end(int64_t stripe) const { return smaller(first(stripe + 1), job.x.width); }
    int64_t tasks() const { return job.cells * stripes * (stripes + 1) / 2; }

    // Tiles off the diagonal come first: they are the larger ones, and the small ones fill the end.
    void run(int64_t task, Workspace<T>& work) const {
        const int64_t full = stripes * (stripes - 1) / 2;
        if (task >= job.cells * full) {
            task -= job.cells * full;
            return tile(task / stripes, task % stripes, task % stripes, work);
        }
        int64_t i = 1, rest = task % full;
        for (; rest >= i; ++i) rest -= i;
        tile(task / full, i, rest, work);
    }

    void tile(int64_t cell, int64_t i, int64_t j, Workspace<T>& work) const {
        const int64_t begin = job.offsets[cell], rows = job.offsets[cell + 1] - begin, p = job.x.width + job.q;
        if (rows == 0) return;
        const int64_t *order = job.order + begin, left_panels = first_panel(i + 1) - first_panel(i),
                      right_panels = first_panel(j + 1) - first_panel(j), wide = widest() * kWide<T>;
        const bool diagonal = i == j, direct = rows <= kDirectRows;
        double* out = job.out + cell * p * p;
        Target target{out, p, 0, 0, job.x.width};
        if (!direct) {
            std::memset(work.tile, 0, static_cast<size_t>(wide * wide) * sizeof(double));
            target = {work.tile, wide, first(i), first(j), first(i + 1)};
        }
        if (diagonal) std::memset(work.z_sums, 0, static_cast<size_t>(z_wide * (wide + z_wide)) * sizeof(double));
        const int64_t chunk = blocks(rows, blocks(rows, kDepth));
        for (int64_t r = 0; r < rows; r += chunk) {
            const int64_t depth = smaller(chunk, rows - r);
            pack(job.x, order + r, depth, first(i), end(i) - first(i), shift, work.left);
            if (!diagonal) pack(job.x, order + r, depth, first(j), end(j) - first(j), shift, work.right);
            multiply_tile<T>(work.left, first(i), left_panels, diagonal ? work.left : work.right, first(j),
                             right_panels, depth, target);
            if (diagonal && job.q) targets(order + r, depth, left_panels, i == 0, work);
        }
        if (!direct)
            for (int64_t row = first(i); row < end(i); ++row)
                for (int64_t c = first(j); c < smaller(end(j), row + 1); ++c) out[row * p + c] += *target.at(row, c);
        if (diagonal) {
            for (int64_t k = 0; k < job.q; ++k)
                for (int64_t c = first(i); c < end(i); ++c)
                    out[(job.x.width + k) * p + c] += work.z_sums[k * wide + c - first(i)];
            if (i == 0)
                for (int64_t k = 0; k < job.q; ++k)
                    for (int64_t l = 0; l <= k; ++l)
                        out[(job.x.width + k) * p + job.x.width + l] += work.zz[k * z_wide + l];
        }
    }

    void targets(const int64_t* order, int64_t depth, int64_t left_panels, bool with_zz, Workspace<T>& work) const {
        for (int64_t r = 0; r < depth; ++r)
            for (int64_t k = 0; k < z_wide; ++k) work.z[r * z_wide + k] = k < job.q ? job.z[order[r] * job.q + k] : 0;
        multiply_targets<T>(work.z, z_wide, work.left, left_panels, depth, work.z_sums, widest() * kWide<T>);
        if (!with_zz) return;
        for (int64_t r = 0; r < depth; ++r)
            for (int64_t k = 0; k < job.q; ++k)
                for (int64_t l = 0; l <= k; ++l)
                    work.zz[k * z_wide + l] += work.z[r * z_wide + k] * work.z[r * z_wide + l];
    }
};

template <class T>
void gram_as(const GramJob& job) {
    const int64_t d = job.x.width, panels = blocks(d, kWide<T>), padded = panels * kWide<T>,
                  threads = omp_get_max_threads();
    // Enough tiles for all threads, even when one small cell is all there is.
    int64_t stripes = blocks(panels, kTilePanels * kWide<float> / kWide<T>);
    while (stripes < panels && job.cells * stripes * stripes < 4 * threads) ++stripes;
    const int64_t z_wide = blocks(job.q, kHigh) * kHigh;

    Scratch shifts(padded * 16);
    const Shift shift = make_shift(job.shift, d, padded, shifts.data());
    const Plan<T> plan{job, pack_for<T>(job.x.type), shift, panels, stripes, z_wide};

    const int64_t rows = job.offsets[job.cells] - job.offsets[0], tasks = plan.tasks();
    const bool small = static_cast<double>(rows) * static_cast<double>(d) * static_cast<double>(d) < 5e5;  // 10 us
    const int64_t team = small ? 1 : smaller(threads, tasks), each = Workspace<T>::bytes(plan.widest(), z_wide);
    Scratch memory(team * each);
    int64_t next = 0;
#pragma omp parallel num_threads(static_cast<int>(team))
    {
        Workspace<T> work(memory.data() + omp_get_thread_num() * each, plan.widest(), z_wide);
        for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) plan.run(task, work);
    }
}

}  // namespace

void gram(const GramJob& job) { job.float_products ? gram_as<float>(job) : gram_as<double>(job); }

namespace {

// out[i, :i+1] = G - s s_i / n (+ alpha), where G, s and n are differences of total and held.
template <class T>
void training_row(const TrainingJob& job, int64_t m, int64_t i, T* out) {
    const int64_t d = job.d, p = job.p;
    const double *total = job.total, *held = job.held + m * p * p, *total_sums = total + d * p,
                 *held_sums = held + d * p;
    const double n = total_sums[d] - held_sums[d], mean = (total_sums[i] - held_sums[i]) / n;
    const double *all = total + i * p, *out_of = held + i * p;
    for (int64_t j = 0; j <= i; ++j)
        out[j] = static_cast<T>((all[j] - out_of[j]) - mean * (total_sums[j] - held_sums[j]));
    out[i] = static_cast<T>((all[i] - out_of[i]) - mean * (total_sums[i] - held_sums[i]) + job.alpha[m]);
}

}  // namespace

void training_matrix(const TrainingJob& job) {
    constexpr int64_t kRows = 16;
    const int64_t parts = blocks(job.d, kRows), tasks = job.m * parts;
    const int threads = job.m * job.d * job.d < 20000 ? 1 : omp_get_max_threads();
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) {
        // The same rows of all m follow each other: those of `total` are read from memory once.
        const int64_t m = task % job.m, first = task / job.m * kRows;
        for (int64_t i = first; i < smaller(first + kRows, job.d); ++i) {
            const int64_t at = (m * job.d + i) * job.d;
            if (job.out_is_float)
                training_row(job, m, i, static_cast<float*>(job.out) + at);
            else
                training_row(job, m, i, static_cast<double*>(job.out) + at);
        }
    }
}

}  // namespace geofast::GEOFAST_ISA
