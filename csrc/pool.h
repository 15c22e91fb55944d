// Pooling of tokens, [batch, tokens, dim] -> [batch, dim], for several jobs in one read.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rows.h"

namespace geofast {

enum class PoolOp : uint8_t { first, last, mean, max, min };

struct PoolJob {
    PoolOp op;
    uint8_t role;  // one bit set
    float* out;    // sample b's result starts at out + b * stride
    std::ptrdiff_t stride;
};

// What one role needs, as a set.
constexpr unsigned kPoolMean = 1, kPoolMax = 2, kPoolMin = 4;

struct PoolArgs {
    const void* x;
    RowType type;
    std::ptrdiff_t batch, tokens, dim;
    std::ptrdiff_t stride_batch, stride_token;  // of x, in elements
    const uint8_t* roles;                       // [batch, tokens]
    const PoolJob* jobs;
    std::ptrdiff_t job_count;
    unsigned reductions[8];     // per bit of the role byte: a set of kPoolMean, kPoolMax, kPoolMin
    float* scratch;             // threads * 2 * scratch_size, aligned to 64 bytes
    std::ptrdiff_t dim_padded;  // dim, rounded up to 16
    std::ptrdiff_t
        scratch_size;  // floats for one set of accumulators: 16 + 5 * dim_padded for each role with reductions
    int threads;
};

namespace baseline {
void pool(const PoolArgs&);
}
namespace avx2 {
void pool(const PoolArgs&);
}

}  // namespace geofast
