// Checks that the bindings of gram and cholesky share.
#pragma once

#include <string>

#include "rows.h"
#include "tensor.h"

namespace geofast {

constexpr dlpack::DataType kFloat32{dlpack::kFloat, 32, 1}, kFloat64{dlpack::kFloat, 64, 1},
    kInt32{dlpack::kInt, 32, 1}, kInt64{dlpack::kInt, 64, 1};

// A contiguous CPU tensor of one dtype and shape (-1: any size).
template <class T>
T* checked(const TensorView& t, dlpack::DataType dtype, std::initializer_list<int64_t> shape) {
    t.require(dtype, shape, dlpack::kCPU);
    t.require_contiguous();
    return t.data<T>();
}

// True for float32, false for float64; nothing else passes.
inline bool checked_is_float(const TensorView& t) {
    return t.require_any({RowType::float32, RowType::float64}) == RowType::float32;
}

// Rows [n, width] of any floating-point dtype; -1: any width.
inline Rows checked_rows(const TensorView& x, int64_t width) {
    const RowType type = x.require_any({RowType::float32, RowType::float16, RowType::bfloat16, RowType::float64});
    x.require(x.dtype(), {-1, width}, dlpack::kCPU);
    x.require_contiguous(1);
    return {x.data<void>(), type, x.stride(0), x.size(1)};
}

// int64 [n], every entry a row of x. Throws IndexError with the value otherwise.
inline const int64_t* checked_indices(const char* name, const TensorView& t, int64_t rows) {
    const int64_t* index = checked<int64_t>(t, kInt64, {-1});
    for (int64_t i = 0; i < t.size(0); ++i)
        if (index[i] < 0 || index[i] >= rows)
            throw std::out_of_range(std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(index[i]) +
                                    ", but x has " + std::to_string(rows) + " rows");
    return index;
}

}  // namespace geofast
