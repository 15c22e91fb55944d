#include <pybind11/pybind11.h>

namespace geofast {
void bind_cholesky(pybind11::module_&) {}
}  // namespace geofast
