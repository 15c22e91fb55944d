#include <cstring>

#include "bind_rows.h"
#include "gram.h"

namespace py = pybind11;

namespace geofast {
namespace {

bool wants_float(const char* products) {
    if (std::strcmp(products, "float64") == 0) return false;
    if (std::strcmp(products, "float32") == 0) return true;
    throw std::invalid_argument(std::string("products must be 'float64' or 'float32', got '") + products + "'");
}

void check_offsets(const int64_t* offsets, int64_t cells, int64_t entries) {
    for (int64_t c = 0; c <= cells; ++c)
        if (offsets[c] < (c ? offsets[c - 1] : 0) || offsets[c] > entries)
            throw std::invalid_argument("offsets[" + std::to_string(c) + "] is " + std::to_string(offsets[c]) +
                                        "; offsets must ascend from 0 to at most the " + std::to_string(entries) +
                                        " entries of order");
}

void gram(py::handle x_, py::handle shift_, py::handle z_, py::handle order_, py::handle offsets_, py::handle out_,
          const char* products, const char* isa_) {
    const Isa isa = isa_from_name(isa_);
    const TensorView x("x", x_), shift("shift", shift_), z("z", z_), order("order", order_),
        offsets("offsets", offsets_), out("out", out_);
    GramJob job{};
    job.float_products = wants_float(products);
    job.x = checked_rows(x, -1);
    const int64_t n = x.size(0), d = x.size(1);
    if (d < 1) x.fail("has no columns");
    job.shift = checked<double>(shift, kFloat64, {d});
    job.z = checked<double>(z, kFloat64, {n, -1});
    job.q = z.size(1);
    job.offsets = checked<int64_t>(offsets, kInt64, {-1});
    job.cells = offsets.size(0) - 1;
    if (job.cells < 0) offsets.fail("must hold one entry more than there are cells");
    job.out = checked<double>(out, kFloat64, {job.cells, d + job.q, d + job.q});
    job.order = checked_indices("order", order, n);
    check_offsets(job.offsets, job.cells, order.size(0));
    py::gil_scoped_release release;
    GEOFAST_SELECT(isa, gram)(job);
}

void training_matrix(py::handle total_, py::handle held_, py::handle sets_, py::handle alpha_, py::handle out_,
                     const char* isa_) {
    const Isa isa = isa_from_name(isa_);
    const TensorView total("total", total_), held("held", held_), sets("sets", sets_), alpha("alpha", alpha_),
        out("out", out_);
    TrainingJob job{};
    job.total = checked<double>(total, kFloat64, {-1, -1});
    job.p = total.size(0);
    if (total.size(1) != job.p) total.fail("must be square");
    job.held = checked<double>(held, kFloat64, {-1, job.p, job.p});
    job.sets = checked_indices("sets", sets, held.size(0));
    job.m = sets.size(0);
    job.alpha = checked<double>(alpha, kFloat64, {job.m});
    job.out_is_float = checked_is_float(out);
    job.out = checked<void>(out, out.dtype(), {job.m, -1, -1});
    job.d = out.size(1);
    if (out.size(2) != job.d) out.fail("must hold square matrices");
    if (job.d < 1 || job.d >= job.p)
        out.fail("has matrices of width " + std::to_string(job.d) + "; total is " + std::to_string(job.p) +
                 " wide and must also hold the column of ones");
    for (int64_t m = 0; m < job.m; ++m) {
        const int64_t ones = job.d * job.p + job.d;
        const double rows = job.total[ones] - job.held[job.sets[m] * job.p * job.p + ones];
        if (!(rows > 0))
            throw std::invalid_argument("held[" + std::to_string(job.sets[m]) + "] leaves " + std::to_string(rows) +
                                        " rows to train on; held must be a part of total");
    }
    py::gil_scoped_release release;
    GEOFAST_SELECT(isa, training_matrix)(job);
}

}  // namespace

void bind_gram(py::module_& m) {
    m.def("gram", gram, py::arg("x"), py::arg("shift"), py::arg("z"), py::arg("order"), py::arg("offsets"),
          py::arg("out"), py::kw_only(), py::arg("products") = "float64", py::arg("isa") = py::none());
    m.def("training_matrix", training_matrix, py::arg("total"), py::arg("held"), py::arg("sets"), py::arg("alpha"),
          py::arg("out"), py::kw_only(), py::arg("isa") = py::none());
}

}  // namespace geofast
