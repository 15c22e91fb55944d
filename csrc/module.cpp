// geofast._core: a table of contents. Bindings check their arguments and hold no algorithm;
// kernels include no pybind11.
#include <pybind11/pybind11.h>

#include "cpu.h"
#include "pages.h"
#include "tensor.h"

namespace py = pybind11;

namespace geofast {
void bind_pool(py::module_& m);
void bind_project(py::module_& m);
void bind_gram(py::module_& m);
void bind_cholesky(py::module_& m);
}  // namespace geofast

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
    m.attr("__version__") = GEOFAST_VERSION;
    m.def("detected_isa", [] { return geofast::isa_name(geofast::detected_isa()); });
    m.def("large_pages", [](py::handle x) {
        const geofast::TensorView view("x", x);
        view.require_contiguous();
        geofast::ask_for_large_pages(view.data<void>(), view.bytes());
    });
    geofast::bind_pool(m);
    geofast::bind_project(m);
    geofast::bind_gram(m);
    geofast::bind_cholesky(m);
}
