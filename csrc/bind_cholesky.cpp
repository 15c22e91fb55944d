#include "bind_rows.h"
#include "cholesky.h"

namespace py = pybind11;

namespace geofast {
namespace {

// Calls work(float) or work(double) as the dtype of t says; only the type of the argument matters.
template <class Work>
void for_dtype(const TensorView& t, Work work) {
    if (checked_is_float(t))
        work(0.0F);
    else
        work(0.0);
}

// count square matrices.
template <class T>
Batch<T> checked_batch(const TensorView& t) {
    T* data = checked<T>(t, t.dtype(), {-1, -1, -1});
    if (t.size(1) != t.size(2) || t.size(1) < 1) t.fail("must hold square matrices, at least 1 x 1");
    return {data, t.size(0), t.size(1)};
}

void cholesky(py::handle a_, py::handle info_, const char* isa_) {
    const Isa isa = isa_from_name(isa_);
    const TensorView a("a", a_), info("info", info_);
    for_dtype(a, [&](auto zero) {
        using T = decltype(zero);
        const auto batch = checked_batch<T>(a);
        int32_t* first_bad = checked<int32_t>(info, kInt32, {batch.count});
        py::gil_scoped_release release;
        GEOFAST_SELECT(isa, cholesky<T>)(batch, first_bad);
    });
}

void solve_lower(py::handle l_, py::handle b_, bool transpose, const char* isa_) {
    const Isa isa = isa_from_name(isa_);
    const TensorView l("l", l_), b("b", b_);
    for_dtype(l, [&](auto zero) {
        using T = decltype(zero);
        const auto batch = checked_batch<const T>(l);
        T* sides = checked<T>(b, l.dtype(), {batch.count, -1, batch.d});
        py::gil_scoped_release release;
        GEOFAST_SELECT(isa, solve_lower<T>)(batch, sides, b.size(1), transpose);
    });
}

void inverse_trace(py::handle l_, py::handle out_, const char* isa_) {
    const Isa isa = isa_from_name(isa_);
    const TensorView l("l", l_), out("out", out_);
    for_dtype(l, [&](auto zero) {
        using T = decltype(zero);
        const auto batch = checked_batch<const T>(l);
        double* traces = checked<double>(out, kFloat64, {batch.count});
        py::gil_scoped_release release;
        GEOFAST_SELECT(isa, inverse_trace<T>)(batch, traces);
    });
}

void leverage(py::handle l_, py::handle x_, py::handle center_, py::handle rows_, py::handle out_, const char* isa_) {
    const Isa isa = isa_from_name(isa_);
    const TensorView l("l", l_), x("x", x_), center("center", center_), rows("rows", rows_), out("out", out_);
    for_dtype(l, [&](auto zero) {
        using T = decltype(zero);
        LeverageJob<T> job{};
        job.l = checked<const T>(l, l.dtype(), {-1, -1});
        if (l.size(0) != l.size(1) || l.size(0) < 1) l.fail("must be square, at least 1 x 1");
        job.x = checked_rows(x, l.size(0));
        job.center = checked<const double>(center, kFloat64, {l.size(0)});
        job.rows = checked_indices("rows", rows, x.size(0));
        job.n = rows.size(0);
        job.out = checked<double>(out, kFloat64, {job.n});
        py::gil_scoped_release release;
        GEOFAST_SELECT(isa, leverage<T>)(job);
    });
}

}  // namespace

void bind_cholesky(py::module_& m) {
    m.def("cholesky", cholesky, py::arg("a"), py::arg("info"), py::kw_only(), py::arg("isa") = py::none());
    m.def("solve_lower", solve_lower, py::arg("l"), py::arg("b"), py::arg("transpose"), py::kw_only(),
          py::arg("isa") = py::none());
    m.def("inverse_trace", inverse_trace, py::arg("l"), py::arg("out"), py::kw_only(), py::arg("isa") = py::none());
    m.def("leverage", leverage, py::arg("l"), py::arg("x"), py::arg("center"), py::arg("rows"), py::arg("out"),
          py::kw_only(), py::arg("isa") = py::none());
}

}  // namespace geofast
