// The interface between the binding (csrc/bind_cuda.cpp) and the kernel (gram.cu).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "rows.h"

namespace geofast::cuda {

// One matrix of rows and the Grams of its cells.
struct GramProblem {
    const void* x;        // [n, dim]
    const double* shift;  // [dim]
    double* out;          // [cells, dim + q, dim + q], lower triangle
    int stride;           // of x, in elements
};

// What all problems of a call share.
struct GramShape {
    const double* z;         // [n, q]
    const int64_t* order;    // rows of x and z
    const int64_t* offsets;  // [cells + 1]; cell c has the rows order[offsets[c]:offsets[c + 1]]
    int z_stride, dim, q, cells;
};

// Adds [x - shift, z]' [x - shift, z] over the rows of every cell to the lower triangle of out, for
// every problem, on `stream`. Allocates nothing and waits for nothing.
cudaError_t gram(const GramProblem* problems, int64_t count, const GramShape& shape, RowType type, cudaStream_t stream);

// Whether the current device can run the kernel: cudaSuccess, or why not.
cudaError_t gram_loads();

}  // namespace geofast::cuda
