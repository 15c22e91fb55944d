// Symmetric rank-k update of many cells, and the training matrices made from the result.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "rows.h"

namespace geofast {

struct GramJob {
    Rows x;
    const double* shift;  // [d]
    const double* z;      // [N, q]
    int64_t q;
    const int64_t* order;    // checked: every entry names a row
    const int64_t* offsets;  // [cells + 1], checked: ascending, inside order
    int64_t cells;
    double* out;  // [cells, d + q, d + q], lower triangle
    bool float_products;
};

struct TrainingJob {
    const double* total;  // [p, p]
    const double* held;   // [folds, p, p]
    const int64_t* sets;  // [m], which of held each matrix leaves out
    const double* alpha;  // [m]
    int64_t m, d, p;
    void* out;  // [m, d, d], lower triangle
    bool out_is_float;
};

namespace baseline {
void gram(const GramJob&);
void training_matrix(const TrainingJob&);
}  // namespace baseline
namespace avx2 {
void gram(const GramJob&);
void training_matrix(const TrainingJob&);
}  // namespace avx2

}  // namespace geofast
