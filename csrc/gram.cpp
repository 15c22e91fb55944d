// G += [x - shift, z]^T [x - shift, z] for every cell, lower triangle only.
//
// Rows are taken in blocks of one cell, a block in chunks of at most kDepth rows. A chunk is packed
// once: gather, widen and shift happen there, so their cost is that of a read. Then the lower
// triangle of G is cut into square tiles, and a tile adds up the products of all chunks of the block.
//
// Packing and tiles are tasks of one list, and blocks overlap: while the tiles of one are made, the
// next is packed. Nothing waits at a barrier, neither between cells nor between blocks.
#include "gram.h"

#include <omp.h>

#include "gemm.h"

namespace geofast::GEOFAST_ISA {
namespace {

// Rows in one float32 sum before float64 takes over, which costs about 6 %: with 2048 features, 2.4
// times as many rows and alpha 0.1, R2 is off by 4e-5, and by 8e-5 with 1000 rows in a sum. Two panels
// of 12 KB fit in L1.
constexpr int64_t kDepth = 128;
constexpr int64_t kTileColumns = 192;     // small enough to share evenly, large enough to reuse what is read
constexpr int64_t kBlockBytes = 6 << 20;  // packed rows of a block; three are alive, in the third-level cache
constexpr int64_t kBlockRows = 1024;      // at least, so that reading and writing G stays below a few per cent
constexpr int64_t kSlots = 3;
constexpr int64_t kPrefetchRows = 4;

// A panel of a chunk. The extra line keeps panels from falling into the same sets of the cache.
template <class T>
constexpr int64_t kPanel = kDepth * kWide<T> + 64 / static_cast<int64_t>(sizeof(T));

using PackStripe = void (*)(const Rows&, const int64_t* order, int64_t rows, int64_t first, int64_t columns, Shift,
                            void* to);

// Columns [first, first + columns) of the listed rows as panels; columns past the last are zero.
template <class E, class T>
void pack_stripe(const Rows& x, const int64_t* order, int64_t rows, int64_t first, int64_t columns, Shift shift,
                 void* to) {
    constexpr int64_t wide = kWide<T>;
    const E* base = static_cast<const E*>(x.data) + first;
    const int64_t bytes = columns * static_cast<int64_t>(sizeof(E));
    for (int64_t r = 0; r < rows; ++r) {
        const E* ahead = base + order[smaller(r + kPrefetchRows, rows - 1)] * x.stride;
        for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(reinterpret_cast<const char*>(ahead) + b);
        const E* row = base + order[r] * x.stride;
        T* line = static_cast<T*>(to) + r * wide;
        int64_t c = 0;
        for (; c + wide <= columns; c += wide, line += kPanel<T>) pack_line(row + c, shift.from(first + c), line);
        if (c < columns) {
            E tail[kWide<T>] = {};
            std::memcpy(tail, row + c, static_cast<std::size_t>(columns - c) * sizeof(E));
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

GEOFAST_INLINE void add(double* to, Doubles sum) { store(to, load(to) + sum); }
GEOFAST_INLINE void add(double* to, Floats sum) {
    add(to, half_of<0>(sum));
    add(to + kDoubles, half_of<1>(sum));
}

// G[row + i, column + j] += the product of kHigh columns of `left` and the panel `right`; rows from
// `end` on are not there, and nothing above the diagonal is touched. `next` is read next.
template <class T>
GEOFAST_INLINE void multiply_step(const T* left, const T* right, const T* next, int64_t depth, int64_t row,
                                  int64_t column, int64_t end, double* g, int64_t stride) {
    constexpr int64_t wide = kWide<T>;
    double* to = g + row * stride + column;
    GEOFAST_UNROLL for (int64_t i = 0; i < kHigh; ++i) for (int64_t j = 0; j < wide; j += 8)
        __builtin_prefetch(to + i * stride + j, 1);
    Vector<T> acc[kHigh][kVectors] = {};
    multiply_panels(depth, left, right, next, acc);
    if (row >= column + wide && row + kHigh <= end) {
        GEOFAST_UNROLL for (int i = 0; i < kHigh; ++i) GEOFAST_UNROLL for (int v = 0; v < kVectors; ++v)
            add(to + i * stride + v * kLanes<T>, acc[i][v]);
        return;
    }
    alignas(64) T sums[kHigh][kWide<T>];
    for (int i = 0; i < kHigh; ++i)
        for (int v = 0; v < kVectors; ++v) store(&sums[i][v * kLanes<T>], acc[i][v]);
    for (int64_t i = 0; i < kHigh && row + i < end; ++i)
        for (int64_t j = 0; j < smaller(wide, row + i - column + 1); ++j)
            to[i * stride + j] += static_cast<double>(sums[i][j]);
}

GEOFAST_INLINE Doubles widen(const double* from) { return load(from); }
GEOFAST_INLINE Doubles widen(const float* from) {
    typedef float Halves __attribute__((vector_size(kVectorBytes / 2)));
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return __builtin_convertvector(halves, Doubles);
}

// G[row + j, column + c] += z_j^T panel in float64 for Count of the columns of z, which are `z_wide`
// apart from line to line, and for the columns of the panel before `end`.
template <int Count, class T>
void multiply_targets(const double* z, int64_t z_wide, const T* panel, int64_t depth, int64_t row, int64_t column,
                      int64_t end, double* g, int64_t stride) {
    for (int64_t part = 0; part < kWide<T>; part += kWide<double>) {
        Doubles acc[Count][kVectors] = {};
        const T* line = panel + part;
        for (int64_t k = 0; k < depth; ++k, line += kWide<T>) {
            Doubles right[kVectors];
            GEOFAST_UNROLL for (int v = 0; v < kVectors; ++v) right[v] = widen(line + v * kDoubles);
            GEOFAST_UNROLL for (int i = 0; i < Count; ++i) {
                const double left = z[k * z_wide + i];
                GEOFAST_UNROLL for (int v = 0; v < kVectors; ++v) acc[i][v] += left * right[v];
            }
        }
        alignas(64) double sums[Count][kWide<double>];
        for (int i = 0; i < Count; ++i)
            for (int v = 0; v < kVectors; ++v) store(&sums[i][v * kDoubles], acc[i][v]);
        for (int64_t i = 0; i < Count; ++i)
            for (int64_t c = 0; c < smaller(kWide<double>, end - column - part); ++c)
                g[(row + i) * stride + column + part + c] += sums[i][c];
    }
}

// Rows of one cell that are packed together.
struct RowBlock {
    int64_t cell, first, rows;  // first: where in order
    int64_t chunks() const { return blocks(rows, kDepth); }
    int64_t chunk_rows() const { return blocks(rows, chunks()); }
};

template <class T>
class Update {
public:
    Update(const GramJob& job, int64_t threads)
        : job_(job),
          pack_(pack_for<T>(job.x.type)),
          panels_(blocks(job.x.width, kWide<T>)),
          stripes_(count_stripes(panels_, threads)),
          tiles_(stripes_ * (stripes_ + 1) / 2),
          shape_(shape(job, panels_)),
          chunk_bytes_(cache_lines(panels_ * kPanel<T> * kSize + kDepth * job.q * 8)),
          slots_(smaller(kSlots, shape_.count) * shape_.chunks * chunk_bytes_, true),
          table_(shape_.count * static_cast<int64_t>(sizeof(RowBlock))),
          counters_(shape_.count * (tiles_ + 2) * static_cast<int64_t>(sizeof(int32_t))),
          shift_(panels_ * kWide<T> * 16) {
        std::memset(counters_.data(), 0, static_cast<std::size_t>(shape_.count * (tiles_ + 2)) * sizeof(int32_t));
        about_ = make_shift(job.shift, job.x.width, panels_ * kWide<T>, shift_.data());
        RowBlock* to = reinterpret_cast<RowBlock*>(table_.data());
        for (int64_t cell = 0; cell < job.cells; ++cell) {
            const int64_t rows = job.offsets[cell + 1] - job.offsets[cell], parts = blocks(rows, row_limit(panels_));
            for (int64_t part = 0; part < parts; ++part, ++to) {
                const int64_t first = part * rows / parts;
                *to = {cell, job.offsets[cell] + first, (part + 1) * rows / parts - first};
            }
        }
    }

    // Takes tasks until none is left. The list: pack block 0; then for every block, pack the next one
    // and make the tiles of this one.
    void work() {
        const int64_t last = shape_.count ? 2 * shape_.count : -1;
        int64_t segment = 0, begin = 0;
        for (;;) {
            const int64_t task = take_task(&next_);
            while (segment <= last && task >= begin + length(segment)) begin += length(segment++);
            if (segment > last) return;
            if (segment == 0 || segment % 2 == 1)
                pack((segment + 1) / 2, task - begin);
            else
                tile(segment / 2 - 1, task - begin);
        }
    }
    int64_t first_tasks() const { return shape_.count ? larger(packs(0), tiles_) : 0; }

private:
    static constexpr int64_t kSize = static_cast<int64_t>(sizeof(T));
    struct Shape {
        int64_t count, chunks;  // of blocks; of the largest
    };

    static int64_t row_limit(int64_t panels) { return larger(kBlockRows, kBlockBytes / (panels * kWide<T> * kSize)); }
    static Shape shape(const GramJob& job, int64_t panels) {
        Shape s{0, 0};
        for (int64_t c = 0; c < job.cells; ++c) {
            const int64_t rows = job.offsets[c + 1] - job.offsets[c], parts = blocks(rows, row_limit(panels));
            s.count += parts;
            if (parts) s.chunks = larger(s.chunks, blocks(blocks(rows, parts), kDepth));
        }
        return s;
    }
    // Enough tiles for all threads, however narrow the rows.
    static int64_t count_stripes(int64_t panels, int64_t threads) {
        int64_t stripes = blocks(panels, kTileColumns / kWide<T>);
        while (stripes < panels && stripes * (stripes + 1) < 6 * threads) ++stripes;
        return stripes;
    }

    const RowBlock& block(int64_t b) const { return reinterpret_cast<const RowBlock*>(table_.data())[b]; }
    int64_t packs(int64_t b) const { return block(b).chunks() * stripes_; }
    // Segments 0 and 2 b - 1 pack, 2 b + 2 makes the tiles of block b. There is nothing to pack in the last but one.
    int64_t length(int64_t segment) const {
        if (segment == 0) return packs(0);
        if (segment % 2 == 0) return tiles_;
        return (segment + 1) / 2 < shape_.count ? packs((segment + 1) / 2) : 0;
    }
    int64_t first_panel(int64_t stripe) const { return stripe * panels_ / stripes_; }
    char* chunk_at(int64_t b, int64_t chunk) const {
        return slots_.data() + (b % kSlots * shape_.chunks + chunk) * chunk_bytes_;
    }
    T* panel_at(int64_t b, int64_t chunk, int64_t panel) const {
        return reinterpret_cast<T*>(chunk_at(b, chunk)) + panel * kPanel<T>;
    }
    double* z_at(int64_t b, int64_t chunk) const {
        return reinterpret_cast<double*>(chunk_at(b, chunk) + panels_ * kPanel<T> * kSize);
    }
    int32_t* packed(int64_t b) const { return reinterpret_cast<int32_t*>(counters_.data()) + b * (tiles_ + 2); }
    int32_t* finished(int64_t b) const { return packed(b) + 1; }
    int32_t* made(int64_t b, int64_t tile) const { return packed(b) + 2 + tile; }

    void pack(int64_t b, int64_t task) {
        if (b >= kSlots) wait_until(finished(b - kSlots), static_cast<int32_t>(tiles_));
        const RowBlock& rows = block(b);
        const int64_t chunk = task / stripes_, stripe = task % stripes_;
        const int64_t from = chunk * rows.chunk_rows(), depth = smaller(rows.chunk_rows(), rows.rows - from);
        const int64_t *order = job_.order + rows.first + from, first = first_panel(stripe) * kWide<T>;
        const int64_t end = smaller(first_panel(stripe + 1) * kWide<T>, job_.x.width);
        pack_(job_.x, order, depth, first, end - first, about_, panel_at(b, chunk, first_panel(stripe)));
        if (stripe == 0) {
            double* z = z_at(b, chunk);
            for (int64_t r = 0; r < depth; ++r)
                for (int64_t k = 0; k < job_.q; ++k) *z++ = job_.z[order[r] * job_.q + k];
        }
        count_up(packed(b));
    }

    void tile(int64_t b, int64_t task) {
        wait_until(packed(b), static_cast<int32_t>(packs(b)));
        if (b && block(b - 1).cell == block(b).cell) wait_until(made(b - 1, task), 1);
        const RowBlock& rows = block(b);
        // Tiles off the diagonal come first: they are the larger ones, and the small ones fill the end.
        const int64_t full = stripes_ * (stripes_ - 1) / 2;
        int64_t i = task - full, j = task - full;
        if (task < full) {
            i = 1;
            for (j = task; j >= i; ++i) j -= i;
        }
        for (int64_t chunk = 0; chunk < rows.chunks(); ++chunk) {
            const int64_t depth = smaller(rows.chunk_rows(), rows.rows - chunk * rows.chunk_rows());
            multiply_chunk(b, chunk, depth, i, j);
        }
        count_up(made(b, task));
        count_up(finished(b));
    }

    void multiply_chunk(int64_t b, int64_t chunk, int64_t depth, int64_t i, int64_t j) {
        constexpr int64_t wide = kWide<T>;
        const int64_t d = job_.x.width, p = d + job_.q;
        double* g = job_.out + block(b).cell * p * p;
        for (int64_t l = first_panel(i); l < first_panel(i + 1); ++l) {
            const T* left = panel_at(b, chunk, l);
            const int64_t end = smaller(first_panel(j + 1), l + 1);
            for (int64_t r = first_panel(j); r < end; ++r) {
                const T* next = panel_at(b, chunk, r + 1 < end ? r + 1 : l + 1);
                for (int64_t t = 0; t < wide; t += kHigh, next += kPanel<T> * kHigh / wide)
                    multiply_step(left + t, panel_at(b, chunk, r), next, depth, l * wide + t, r * wide, d, g, p);
            }
            if (i == j) add_targets(b, chunk, left, depth, l * wide);
        }
        if (i == 0) {
            const double* z = z_at(b, chunk);
            for (int64_t r = 0; r < depth; ++r, z += job_.q)
                for (int64_t k = 0; k < job_.q; ++k)
                    for (int64_t l = 0; l <= k; ++l) g[(d + k) * p + d + l] += z[k] * z[l];
        }
    }

    void add_targets(int64_t b, int64_t chunk, const T* panel, int64_t depth, int64_t column) {
        const int64_t d = job_.x.width, p = d + job_.q, q = job_.q;
        const double* z = z_at(b, chunk);
        double* g = job_.out + block(b).cell * p * p;
        int64_t k = 0;
        for (; k + 3 <= q; k += 3) multiply_targets<3>(z + k, q, panel, depth, d + k, column, d, g, p);
        if (q - k == 2) multiply_targets<2>(z + k, q, panel, depth, d + k, column, d, g, p);
        if (q - k == 1) multiply_targets<1>(z + k, q, panel, depth, d + k, column, d, g, p);
    }

    const GramJob& job_;
    PackStripe pack_;
    int64_t panels_, stripes_, tiles_;
    Shape shape_;
    int64_t chunk_bytes_;
    Scratch slots_, table_, counters_, shift_;
    Shift about_{};
    int64_t next_ = 0;
};

template <class T>
void gram_as(const GramJob& job) {
    const double rows = static_cast<double>(job.offsets[job.cells] - job.offsets[0]),
                 d = static_cast<double>(job.x.width);
    const int64_t threads = rows * d * d < 5e5 ? 1 : omp_get_max_threads();  // 10 us of work
    Update<T> update(job, threads);
#pragma omp parallel num_threads(static_cast<int>(larger(1, smaller(threads, update.first_tasks()))))
    update.work();
}

}  // namespace

void gram(const GramJob& job) { job.float_products ? gram_as<float>(job) : gram_as<double>(job); }

namespace {

// out[i, :i+1] = G - s s_i / n (+ alpha), where G, s and n are differences of total and held.
template <class T>
void training_row(const TrainingJob& job, int64_t m, int64_t i, T* out) {
    const int64_t d = job.d, p = job.p;
    const double *total = job.total, *held = job.held + job.sets[m] * p * p, *total_sums = total + d * p,
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
