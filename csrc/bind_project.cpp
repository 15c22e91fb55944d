#include <pybind11/pybind11.h>

namespace geofast {
void bind_project(pybind11::module_&) {}
}  // namespace geofast
