// The Gram matrix of [x - shift, z] for every cell of many problems, in float64 on tensor cores.
//
// One block owns a tile of 128 x 64 entries of the lower triangle of one cell of one problem, and
// runs over all rows of the cell. Each of its four warps has 64 x 32 of them in registers: the
// larger the part of a warp, the less it reads from shared memory for a product. Here it is 3 bytes
// for 8 multiply-adds, three eighths of what an SM of Hopper can read while it does them.
//
// Eight rows are a step. While the warps multiply one step, the numbers of the next are on their
// way to registers, and the row numbers of the one after; then they are widened, shifted and
// written to the other half of shared memory. Two blocks share an SM, so that one multiplies while
// the other stores.
//
// The few columns z cost no tile of their own: in the last tile of each tile row the two upper warps
// lie above the diagonal. They multiply the 128 columns that the tile holds anyway with z.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "gram_cuda.h"

namespace geofast::cuda {

constexpr int kThreads = 128;
constexpr int kRows = 128;    // columns of x that give the rows of a tile
constexpr int kColumns = 64;  // columns of x that give its columns
constexpr int kZ = 16;        // columns of z that a tile takes
constexpr int kStep = 8;      // rows that are multiplied at a time

// A step in shared memory. The columns that give the tile's rows: eight rows. Those that give its
// columns, and z: four rows of pairs, row t beside row t + 4, which one load then fetches. Each row
// is padded to 32 bytes more than a multiple of 128, so that the four rows of which a quarter of a
// warp reads 32 bytes each lie in different banks.
constexpr int kRowPitch = kRows + 4;
constexpr int kPairPitch = 2 * kColumns + 4;
constexpr int kZPitch = 2 * kZ + 4;
constexpr int kColumnsAt = kStep * kRowPitch;
constexpr int kZAt = kColumnsAt + kStep / 2 * kPairPitch;
constexpr int kStepSize = kZAt + kStep / 2 * kZPitch;

constexpr int kPadded = 34;  // pitch of the 16 x 32 entries that a warp writes out at a time

// 4 KB is what every driver takes as a kernel's parameters. By value: no copy to the device to wait
// for, and a captured graph keeps its own.
constexpr int kMaxProblems = 120;
struct GramArgs {
    GramProblem problems[kMaxProblems];
    GramShape shape;
};
static_assert(sizeof(GramArgs) <= 4096);

// Rows that begin at multiples of four numbers, up to 16 bytes, are loaded in words.
template <class T>
constexpr int kAlignment = 4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16;

struct Half {
    uint16_t bits;
};
struct Bfloat {
    uint16_t bits;
};

__device__ inline double widen(double v) { return v; }
__device__ inline double widen(float v) { return v; }
__device__ inline double widen(Half v) { return __half2float(__ushort_as_half(v.bits)); }
__device__ inline double widen(Bfloat v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }

__device__ inline void load(const double* from, double& to) { to = __ldg(from); }
__device__ inline void load(const float* from, float& to) { to = __ldg(from); }
__device__ inline void load(const Half* from, Half& to) { to.bits = __ldg(&from->bits); }
__device__ inline void load(const Bfloat* from, Bfloat& to) { to.bits = __ldg(&from->bits); }

// Neighbours in a row: what a thread loads at a time.
template <class T, int kCount>
struct Some {
    T v[kCount];
};

template <class Word, class T, int kCount>
__device__ inline void load_words(const T* from, Some<T, kCount>& to) {
    Word words[sizeof(to) / sizeof(Word)];
#pragma unroll
    for (size_t i = 0; i < sizeof(to) / sizeof(Word); ++i) words[i] = __ldg(reinterpret_cast<const Word*>(from) + i);
    memcpy(&to, words, sizeof(to));
}

// The first `count`; the others, if any, are 0. `aligned`: all of them in words.
template <int kCount, class T>
__device__ inline Some<T, kCount> load_some(const T* from, int count, bool aligned) {
    Some<T, kCount> some{};
    if (aligned && count >= kCount) {
        if constexpr (sizeof(some) == 4)
            load_words<uint32_t>(from, some);
        else if constexpr (sizeof(some) == 8)
            load_words<uint2>(from, some);
        else
            load_words<uint4>(from, some);
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            if (i < count) load(from + i, some.v[i]);
    }
    return some;
}

// Where the columns that give the tile's rows lie in shared memory. The two pairs of four are 16
// apart: eight threads then write 128 bytes in one piece, and a thread finds both rows of its
// fragment of 16, places 2 g and 2 g + 1, in one load.
__device__ inline int place(int column) {
    return (column & ~31) + ((column & 2) << 3) + ((column >> 1) & 14) + (column & 1);
}
// The same for the columns of the tile, where a thread holds two: odd ones are 8 behind even ones.
__device__ inline int place_pair(int column) { return (column & ~15) + ((column & 1) << 3) + ((column >> 1) & 7); }

#ifdef __CUDACC__  // tests/cuda_emulator has its own
// PTX ISA, "Matrix Fragments for mma.m8n8k4 / mma.m16n8k8 with .f64 floating point type".
__device__ inline void mma_16x8x8(double (&c)[4], const double (&a)[4], const double (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
        : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
}
__device__ inline void mma_8x8x4(double& c0, double& c1, double a, double b) {
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(c0), "+d"(c1)
        : "d"(a), "d"(b));
}
#endif

// c += a b of 16 x 8 entries over 8 rows. With g = lane / 4 and t = lane % 4 a thread holds
// c: (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1);  a: row t of g, of g + 8, row t + 4 of g,
// of g + 8;  b: rows t and t + 4 of g.
__device__ inline void mma(double (&c)[4], const double (&a)[4], const double (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    mma_16x8x8(c, a, b);
#else
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        mma_8x8x4(c[0], c[1], a[2 * s], b[s]);
        mma_8x8x4(c[2], c[3], a[2 * s + 1], b[s]);
    }
#endif
}

// A thread's part of the 64 x 32 entries of a warp: [16 rows][8 columns][fragment].
using Accumulator = double[4][4][4];

// One step for the first `kTiles` fragments of columns; `left` and `right` are the thread's first places.
template <int kTiles>
__device__ inline void multiply(Accumulator& acc, const double* left, const double* right) {
    double b[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        const double2 pair = *reinterpret_cast<const double2*>(right + 16 * tile);
        b[tile][0] = pair.x;
        b[tile][1] = pair.y;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        double a[4];
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const double2 pair = *reinterpret_cast<const double2*>(left + 4 * s * kRowPitch + 16 * i);
            a[2 * s] = pair.x;
            a[2 * s + 1] = pair.y;
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) mma(acc[i][tile], a, b[tile]);
    }
}

// Adds a warp's entries to out, from `row` and `column` on, up to the diagonal and above row `end`.
// Through shared memory, so that a warp reads and writes 256 bytes in a row.
__device__ inline void write(const Accumulator& acc, double* staged, double* out, int64_t p, int row, int column,
                             int end, int lane) {
    const int g = lane / 4, t = lane % 4;
    column += lane;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        __syncwarp();  // the last sixteen rows are read
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                double* to = staged + (2 * g + half) * kPadded + 16 * (k / 2) + 4 * t + 2 * (k % 2);
                const int fragment = 2 * half + k % 2, tile = k / 2 * 2;
                *reinterpret_cast<double2*>(to) = {acc[i][tile][fragment], acc[i][tile + 1][fragment]};
            }
        __syncwarp();
        // Eight loads before the first store: the compiler cannot know that rows do not overlap.
#pragma unroll
        for (int first = 0; first < 16; first += 8) {
            double sum[8];
#pragma unroll
            for (int r = 0; r < 8; ++r) {
                const int at = row + 32 * (i / 2) + 2 * (i % 2) + 2 * first + 4 * (r / 2) + r % 2;
                if (at < end && column <= at) sum[r] = out[at * p + column];
            }
#pragma unroll
            for (int r = 0; r < 8; ++r) {
                const int at = row + 32 * (i / 2) + 2 * (i % 2) + 2 * first + 4 * (r / 2) + r % 2;
                if (at < end && column <= at) out[at * p + column] = sum[r] + staged[(first + r) * kPadded + lane];
            }
        }
    }
}

// The same for rows of z: they are the columns of the warp, and few.
__device__ inline void write_z(const Accumulator& acc, double* out, int64_t p, int row, int column, int end, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        double sum[kZ / 2];
#pragma unroll
        for (int k = 0; k < kZ / 2; ++k) {
            const int r = row + 8 * (k / 4) + 2 * t + k % 2;
            const int c = column + 32 * (i / 2) + 4 * g + 2 * (i % 2) + k / 2 % 2;
            if (r < p && c < end && c <= r) sum[k] = out[r * p + c];
        }
#pragma unroll
        for (int k = 0; k < kZ / 2; ++k) {
            const int r = row + 8 * (k / 4) + 2 * t + k % 2;
            const int c = column + 32 * (i / 2) + 4 * g + 2 * (i % 2) + k / 2 % 2;
            if (r < p && c < end && c <= r) out[r * p + c] = sum[k] + acc[i][k / 4][k % 4];
        }
    }
}

// What a block computes. Tile row i has its 2 i + 2 tiles of x, the last with the first columns of
// z, and one more for every further kZ of them; behind all of these comes z with itself.
struct Tile {
    int row;     // first column of x, or of z, for the rows
    int column;  // first column of x for the columns; from dim on where there are none
    int z;       // first column of z; from q on where there are none
    bool of_z;   // the rows are z
};

__host__ __device__ inline int z_tiles(int q) { return (q + kZ - 1) / kZ; }

__host__ inline int64_t tile_count(int dim, int q) {
    const int64_t rows = (dim + kRows - 1) / kRows, z = z_tiles(q);
    return rows * (rows + (z > 1 ? z : 1)) + (q + kRows - 1) / kRows * z;
}

__device__ inline Tile find_tile(int index, int dim, int q) {
    const int rows = (dim + kRows - 1) / kRows, z = z_tiles(q), width = z > 1 ? z : 1;
    if (index >= rows * (rows + width)) {
        index -= rows * (rows + width);
        return {index / z * kRows, dim, index % z * kZ, true};
    }
    int i = static_cast<int>((sqrtf(static_cast<float>(width) * width + 4.0F * index) - width) / 2);
    while (i > 0 && i * (i + width) > index) --i;  // the root is rounded
    while ((i + 1) * (i + 1 + width) <= index) ++i;
    const int j = index - i * (i + width), last = 2 * i + 1;
    return {i * kRows, j <= last ? j * kColumns : dim, j >= last ? (j - last) * kZ : q, false};
}

extern __shared__ double2 shared[];

template <class T>
__global__ void __launch_bounds__(kThreads, 2) gram_kernel(const __grid_constant__ GramArgs args) {
    const GramShape& shape = args.shape;
    const GramProblem& problem = args.problems[blockIdx.z];
    const int64_t begin = __ldg(shape.offsets + blockIdx.y);
    const int64_t* const order = shape.order + begin;
    const int count = static_cast<int>(__ldg(shape.offsets + blockIdx.y + 1) - begin);
    if (count <= 0) return;
    const int dim = shape.dim, q = shape.q;
    const Tile tile = find_tile(static_cast<int>(blockIdx.x), dim, q);

    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    double* const memory = reinterpret_cast<double*>(shared);

    // The part of this warp: 64 of the tile's rows and 32 of its columns, or kZ of z.
    const int rows_from = tile.row + warp / 2 * 64, columns_from = tile.column + warp % 2 * 32;
    const bool with_x = !tile.of_z && rows_from < dim && columns_from < dim && columns_from < rows_from + 64;
    const int left_from = tile.row + warp % 2 * 64;
    const bool with_z = warp < 2 && tile.z < q && left_from < (tile.of_z ? min(q, tile.z + kZ) : dim);
    const int left_at = lane % 4 * kRowPitch + (with_z ? warp % 2 : warp / 2) * 64 + lane / 4 * 2;
    const int right_at =
        (with_z ? kZAt + lane % 4 * kZPitch : kColumnsAt + lane % 4 * kPairPitch + warp % 2 * 64) + lane / 4 * 2;

    // The part of this thread in a step, of two rows of x: 4 columns for the tile's rows and 2 for
    // its columns. And of one of these rows a column of z.
    const T* const x = static_cast<const T*>(problem.x);
    const int stride = problem.stride;
    const bool aligned = reinterpret_cast<uintptr_t>(x) % kAlignment<T> == 0 && stride % 4 == 0;
    const int a_from = tile.row + lane * 4, b_from = tile.column + lane * 2, z_from = tile.z + lane % 16;
    const bool with_columns = tile.column < dim;
    double a_shift[4] = {}, b_shift[2] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (!tile.of_z && a_from + i < dim) a_shift[i] = __ldg(problem.shift + a_from + i);
#pragma unroll
    for (int i = 0; i < 2; ++i)
        if (with_columns && b_from + i < dim) b_shift[i] = __ldg(problem.shift + b_from + i);

    // Row numbers, -1 where the cell has no more; what is loaded of them; and how it is written.
    int rows[2];
    Some<T, 4> a[2];
    Some<T, 2> b[2];
    double z;
    const auto number = [&](int at) { return at < count ? static_cast<int>(__ldg(order + at)) : -1; };
    const auto find_rows = [&](int at) {
        rows[0] = number(at + warp);
        rows[1] = number(at + warp + 4);
    };
    const auto fetch = [&] {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const T* const row = x + int64_t{rows[i]} * stride;
            if (!tile.of_z) a[i] = load_some<4>(row + a_from, rows[i] < 0 ? 0 : dim - a_from, aligned);
            if (with_columns) b[i] = load_some<2>(row + b_from, rows[i] < 0 ? 0 : dim - b_from, aligned);
        }
        const int row = lane < 16 ? rows[0] : rows[1];
        z = z_from < q && row >= 0 ? __ldg(shape.z + int64_t{row} * shape.z_stride + z_from) : 0.0;
    };
    const auto store = [&](double* to, int at) {
        if (tile.of_z) {  // rare and not worth registers: fetched here
#pragma unroll 4
            for (int r = 0; r < kStep; ++r) {
                const int row = tile.row + thread < q ? number(at + r) : -1;
                to[r * kRowPitch + place(thread)] =
                    row < 0 ? 0.0 : __ldg(shape.z + int64_t{row} * shape.z_stride + tile.row + thread);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                double v[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) v[k] = widen(a[i].v[k]) - a_shift[k];
                double* const places = to + (warp + 4 * i) * kRowPitch + place(lane * 4);
                *reinterpret_cast<double2*>(places) = {v[0], v[1]};
                *reinterpret_cast<double2*>(places + 16) = {v[2], v[3]};
            }
        }
        if (with_columns) {
            // A row that the cell does not have counts as 0 here and in z; its other side may be anything.
            const bool is_row[2] = {at + warp < count, at + warp + 4 < count};
            double* const places = to + kColumnsAt + warp * kPairPitch + 2 * place_pair(lane * 2);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                double v[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) v[i] = is_row[i] ? widen(b[i].v[k]) - b_shift[k] : 0.0;
                *reinterpret_cast<double2*>(places + 16 * k) = {v[0], v[1]};
            }
        }
        if (tile.z < q) to[kZAt + warp * kZPitch + 2 * (lane % 16) + lane / 16] = z;
    };

    Accumulator acc = {};
    double *now = memory, *next = memory + kStepSize;
    find_rows(0);
    fetch();
    find_rows(kStep);
    store(now, 0);
    for (int at = 0; at < count; at += kStep) {
        __syncthreads();  // `now` is written, and nobody reads `next` any more
        const bool more = at + kStep < count;
        if (more) {
            fetch();
            find_rows(at + 2 * kStep);
        }
        if (with_x)
            multiply<4>(acc, now + left_at, now + right_at);
        else if (with_z)
            multiply<2>(acc, now + left_at, now + right_at);
        if (more) store(next, at + kStep);
        double* const last = now;
        now = next;
        next = last;
    }
    __syncthreads();  // shared memory is free

    const int p = dim + q;
    double* const out = problem.out + int64_t{blockIdx.y} * p * p;
    if (with_x)
        write(acc, memory + warp * 16 * kPadded, out, p, rows_from, columns_from, dim, lane);
    else if (with_z)
        write_z(acc, out, p, dim + tile.z, (tile.of_z ? dim : 0) + left_from, tile.of_z ? p : dim, lane);
}

constexpr size_t kSharedBytes = 2 * kStepSize * sizeof(double);
static_assert(kSharedBytes <= 48 * 1024, "more must be asked for with cudaFuncSetAttribute");
static_assert(4 * 16 * kPadded <= 2 * kStepSize, "write() stages in the same memory");

using Kernel = void (*)(GramArgs);

Kernel kernel_for(RowType type) {
    switch (type) {
        case RowType::float32:
            return gram_kernel<float>;
        case RowType::float16:
            return gram_kernel<Half>;
        case RowType::bfloat16:
            return gram_kernel<Bfloat>;
        default:
            return gram_kernel<double>;
    }
}

cudaError_t gram(const GramProblem* problems, int64_t count, const GramShape& shape, RowType type,
                 cudaStream_t stream) {
    if (shape.cells == 0) return cudaSuccess;
    GramArgs args{};
    args.shape = shape;
    for (int64_t first = 0; first < count; first += kMaxProblems) {
        const int64_t now = count - first < kMaxProblems ? count - first : kMaxProblems;
        for (int64_t i = 0; i < now; ++i) args.problems[i] = problems[first + i];
        const dim3 grid(static_cast<unsigned>(tile_count(shape.dim, shape.q)), static_cast<unsigned>(shape.cells),
                        static_cast<unsigned>(now));
        void* parameters[] = {&args};
        const cudaError_t error =
            cudaLaunchKernel(kernel_for(type), grid, dim3(kThreads), parameters, kSharedBytes, stream);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

cudaError_t gram_loads() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, kernel_for(RowType::float32));
}

}  // namespace geofast::cuda
