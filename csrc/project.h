// Rows times few vectors, and the transpose, in float64 from rows of any dtype.
#pragma once

#include <cstdint>

#include "rows.h"

namespace geofast {

struct ProjectJob {
    Rows x;
    const double* shift;  // [width]
    const int64_t* rows;  // [n], checked: every entry names a row; nullptr: the first n rows
    int64_t n, m;
    const double* vectors;  // project: [m, width]; project_t: [n, m]
    double* out;            // project: [n, m]; project_t: [m, width]
    int threads;
};

// How project_t is cut into tasks: one for each chunk of rows and panel of columns. A task has
// panel * m doubles of scratch. The cut does not depend on the threads, so neither does the result.
constexpr int64_t kProjectPanel = 512;

struct ProjectPlan {
    int64_t panels, chunks;
    double* scratch;
};

namespace baseline {
void project(const ProjectJob&);
void project_t(const ProjectJob&, const ProjectPlan&);
}  // namespace baseline
namespace avx2 {
void project(const ProjectJob&);
void project_t(const ProjectJob&, const ProjectPlan&);
}  // namespace avx2

}  // namespace geofast
