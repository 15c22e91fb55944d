// A table of feature rows as the kernels see it.
#pragma once

#include <cstdint>

namespace geofast {

enum class RowType { float32, float16, bfloat16, float64 };

// The last dimension is contiguous; `stride` counts elements from row to row.
struct Rows {
    const void* data;
    RowType type;
    int64_t stride, width;
};

}  // namespace geofast
