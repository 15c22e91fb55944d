// Enough of CUDA C++ to run a kernel on the host, with the C++ compiler alone.
//
// The threads of a block are fibers on one host thread: each runs to its next barrier before the
// next one runs, in an order that changes from barrier to barrier and is the same in every run. So a
// missing barrier gives wrong numbers, and so does shared memory that is read before it is written:
// it begins as NaN. Other mistakes end the launch with a message: a barrier or a matrix product that
// part of the threads miss, a read through __ldg outside of `readable` or not aligned, and a write
// behind the shared memory that the launch asked for.
//
// A matrix product is noted, and done when the whole warp is at its next barrier. A kernel that uses
// the sum earlier therefore gets a wrong one.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};
struct __half {
    uint16_t bits;
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
struct cudaFuncAttributes {};

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSharedBytes = 64 * 1024;

inline dim3 thread, block, block_size, grid_size;
inline double* shared;  // of kSharedBytes; the one array that kernels declare
inline std::vector<std::pair<const char*, const char*>> readable;
inline std::string error;  // the first one

inline void fail(const std::string& why) {
    if (error.empty())
        error = why + " (block " + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " +
                std::to_string(block.z) + ", thread " + std::to_string(thread.x) + ")";
}

// One product, as one thread takes part in it: m is 16 or 8, k is 8 or 4.
struct Product {
    int m, k;
    double* c[4];
    double a[4], b[2];
};

enum class At { running, warp_barrier, block_barrier, end };
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
    At at;
    std::vector<Product> products;
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline void (*kernel_call)();

inline Fiber& current() { return fibers[thread.x]; }

inline void wait(At where) {
    current().at = where;
    swapcontext(&current().context, &scheduler);
}

// PTX ISA, "Matrix Fragments for mma.m8n8k4 / mma.m16n8k4, m16n8k8 and m16n8k16 with .f64 floating
// point type": with g = lane / 4 and t = lane % 4,
//   a[i]: row g + 8 (i odd, only m = 16), column t + 4 (i / 2);  m = 8: row g, column t
//   b[i]: row t + 4 i, column g
//   c[i]: row g + 8 (i >= 2), column 2 t + i % 2
inline void multiply(Fiber* lanes, size_t index) {
    const int m = lanes[0].products[index].m, k = lanes[0].products[index].k;
    double a[16][8], b[8][8];
    for (int lane = 0; lane < kWarp; ++lane) {
        const Product& product = lanes[lane].products[index];
        if (product.m != m) return fail("a warp's lanes are in different products");
        for (int i = 0; i < m * k / kWarp; ++i)
            a[lane / 4 + (m == 16 ? i % 2 * 8 : 0)][lane % 4 + (m == 16 ? i / 2 * 4 : 0)] = product.a[i];
        for (int i = 0; i < k * 8 / kWarp; ++i) b[lane % 4 + 4 * i][lane / 4] = product.b[i];
    }
    for (int lane = 0; lane < kWarp; ++lane)
        for (int i = 0; i < m * 8 / kWarp; ++i)
            for (int l = 0; l < k; ++l)
                *lanes[lane].products[index].c[i] += a[lane / 4 + i / 2 * 8][l] * b[l][lane % 4 * 2 + i % 2];
}

inline void finish_products(Fiber* lanes) {
    const size_t count = lanes[0].products.size();
    for (int lane = 1; lane < kWarp; ++lane)
        if (lanes[lane].products.size() != count) return fail("a product that part of a warp misses");
    for (size_t i = 0; i < count; ++i) multiply(lanes, i);
    for (int lane = 0; lane < kWarp; ++lane) lanes[lane].products.clear();
}

// Lets every thread run to its next barrier. The step through the threads is odd, and their number a
// power of two, so each has its turn.
inline void run_once(unsigned turn) {
    const unsigned count = static_cast<unsigned>(fibers.size());
    for (unsigned i = 0; i < count; ++i) {
        thread.x = (turn * 37 + i * (2 * turn + 1)) % count;
        if (current().at == At::running) swapcontext(&scheduler, &current().context);
    }
}

// True when the threads of [first, last) stand at one and the same barrier, or at the end.
inline bool together(const Fiber* first, const Fiber* last, At where) {
    return std::all_of(first, last, [where](const Fiber& fiber) { return fiber.at == where; });
}

inline void run_block() {
    for (Fiber& fiber : fibers) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, kernel_call, 0);
        fiber.at = At::running;
        fiber.products.clear();
    }
    Fiber *const first = fibers.data(), *const last = first + fibers.size();
    for (unsigned turn = block.x; error.empty(); ++turn) {
        run_once(turn);
        bool released = false;
        for (Fiber* warp = first; warp != last; warp += kWarp) {
            const At at = warp->at;
            if (!together(warp, warp + kWarp, at)) continue;
            finish_products(warp);
            if (at != At::warp_barrier) continue;
            for (Fiber* lane = warp; lane != warp + kWarp; ++lane) lane->at = At::running;
            released = true;
        }
        if (together(first, last, At::end)) return;
        if (together(first, last, At::block_barrier)) {
            for (Fiber* fiber = first; fiber != last; ++fiber) fiber->at = At::running;
            released = true;
        }
        if (!released) fail("a barrier that not all threads reach");
    }
}

// NaN with a mark of its own.
inline double untouched() {
    const uint64_t bits = 0x7ff8'0000'dead'beef;
    double nan;
    std::memcpy(&nan, &bits, 8);
    return nan;
}

template <class Args>
void (*kernel)(Args);
template <class Args>
const Args* arguments;

}  // namespace emulator

#define threadIdx emulator::thread
#define blockIdx emulator::block
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

inline void __syncthreads() { emulator::wait(emulator::At::block_barrier); }
inline void __syncwarp() { emulator::wait(emulator::At::warp_barrier); }

template <class T>
T __ldg(const T* from) {
    const char* at = reinterpret_cast<const char*>(from);
    const auto holds = [at](const auto& range) { return range.first <= at && at + sizeof(T) <= range.second; };
    if (std::none_of(emulator::readable.begin(), emulator::readable.end(), holds)) {
        emulator::fail("a read outside of every tensor");
        return T{};
    }
    if (reinterpret_cast<uintptr_t>(at) % sizeof(T) != 0) emulator::fail("a read that is not aligned");
    return *from;
}

inline void mma_16x8x8(double (&c)[4], const double (&a)[4], const double (&b)[2]) {
    emulator::current().products.push_back(
        {16, 8, {&c[0], &c[1], &c[2], &c[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
}
inline void mma_8x8x4(double& c0, double& c1, double a, double b) {
    emulator::current().products.push_back({8, 4, {&c0, &c1}, {a}, {b}});
}

using std::min;
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __half2float(__half half) {
    const int exponent = half.bits >> 10 & 31, fraction = half.bits & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent     ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                                      : std::ldexp(static_cast<float>(fraction), -24);
    return half.bits >> 15 ? -size : size;
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void*) { return cudaSuccess; }
template <class Args>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Args)) {
    return cudaSuccess;
}

template <class Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 size, void** parameters, size_t shared_bytes,
                             cudaStream_t) {
    using namespace emulator;
    emulator::kernel<Args> = kernel;
    arguments<Args> = static_cast<const Args*>(parameters[0]);
    kernel_call = [] {
        emulator::kernel<Args>(*arguments<Args>);
        current().at = At::end;
    };
    grid_size = grid, block_size = size, thread = {};
    fibers.resize(size.x);
    for (block.z = 0; block.z < grid.z; ++block.z)
        for (block.y = 0; block.y < grid.y; ++block.y)
            for (block.x = 0; block.x < grid.x && error.empty(); ++block.x) {
                std::fill_n(shared, kSharedBytes / 8, untouched());
                run_block();
                const double mark = untouched();
                for (size_t i = shared_bytes / 8; i < kSharedBytes / 8; ++i)
                    if (std::memcmp(shared + i, &mark, 8) != 0) fail("a write behind the shared memory of the launch");
            }
    return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
