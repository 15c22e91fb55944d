#include <omp.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>

#include "bind_rows.h"
#include "cpu.h"
#include "project.h"

namespace py = pybind11;

namespace geofast {
namespace {

// Multiply-adds for which a second thread is worth waking: about 15 us of work.
constexpr int64_t kWorkPerThread = 100'000;

int threads_for(const ProjectJob& job) {
    const int64_t work = job.n * job.x.width * (job.m + 4);  // widening a number costs about four
    return static_cast<int>(std::clamp<int64_t>(work / kWorkPerThread, 1, omp_get_max_threads()));
}

// What both directions take: x, shift and the rows to use.
ProjectJob checked_job(const TensorView& x, const TensorView& shift, py::handle rows) {
    ProjectJob job{};
    job.x = checked_rows(x, -1);
    job.n = x.size(0);
    job.shift = checked<double>(shift, kFloat64, {job.x.width});
    if (!rows.is_none()) {
        const TensorView index("rows", rows);
        job.rows = checked_indices("rows", index, x.size(0));
        job.n = index.size(0);
    }
    return job;
}

void project(py::handle x_, py::handle shift_, py::handle w_, py::handle out_, py::handle rows_, const char* isa_) {
    const Isa isa = isa_from_name(isa_);
    const TensorView x("x", x_), shift("shift", shift_), w("w", w_), out("out", out_);
    ProjectJob job = checked_job(x, shift, rows_);
    job.vectors = checked<double>(w, kFloat64, {-1, job.x.width});
    job.m = w.size(0);
    job.out = checked<double>(out, kFloat64, {job.n, job.m});
    job.threads = threads_for(job);
    py::gil_scoped_release release;
    if (job.x.width == 0)
        std::fill_n(job.out, job.n * job.m, 0.0);
    else
        GEOFAST_SELECT(isa, project)(job);
}

void project_t(py::handle x_, py::handle shift_, py::handle r_, py::handle out_, py::handle rows_, const char* isa_) {
    const Isa isa = isa_from_name(isa_);
    const TensorView x("x", x_), shift("shift", shift_), r("r", r_), out("out", out_);
    ProjectJob job = checked_job(x, shift, rows_);
    job.vectors = checked<double>(r, kFloat64, {job.n, -1});
    job.m = r.size(1);
    job.out = checked<double>(out, kFloat64, {job.m, job.x.width});
    job.threads = threads_for(job);
    ProjectPlan plan{};
    plan.panels = (job.x.width + kProjectPanel - 1) / kProjectPanel;
    // Some 64 tasks leave enough for every thread; fewer than 1000 rows are not worth a task.
    plan.chunks = plan.panels ? std::clamp<int64_t>(job.n / 1000, 1, (64 + plan.panels - 1) / plan.panels) : 0;
    const std::unique_ptr<double[]> scratch(
        new double[static_cast<size_t>(plan.chunks * plan.panels * job.m * kProjectPanel)]);
    plan.scratch = scratch.get();
    py::gil_scoped_release release;
    GEOFAST_SELECT(isa, project_t)(job, plan);
}

}  // namespace

void bind_project(py::module_& m) {
    m.def("project", project, py::arg("x"), py::arg("shift"), py::arg("w"), py::arg("out"), py::kw_only(),
          py::arg("rows") = py::none(), py::arg("isa") = py::none());
    m.def("project_t", project_t, py::arg("x"), py::arg("shift"), py::arg("r"), py::arg("out"), py::kw_only(),
          py::arg("rows") = py::none(), py::arg("isa") = py::none());
}

}  // namespace geofast
