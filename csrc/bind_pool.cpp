#include <omp.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "bind_rows.h"
#include "cpu.h"
#include "pool.h"

namespace py = pybind11;

namespace geofast {
namespace {

constexpr dlpack::DataType kUInt8{dlpack::kUInt, 8, 1};

// Waking a second thread costs 5 us; with this much to read for each it is won back (256 KB of
// float32: 10 us against 13 us from the cache, 22 us against 19 us from DRAM).
constexpr int64_t kBytesPerThread = 128 * 1024;

PoolOp op_from_name(const std::string& job, const std::string& name) {
    constexpr const char* names[] = {"first", "last", "mean", "max", "min"};
    for (int i = 0; i < 5; ++i)
        if (name == names[i]) return static_cast<PoolOp>(i);
    throw std::invalid_argument(job + " has op '" + name + "'; expected first, last, mean, max or min");
}

unsigned reduction(PoolOp op) {
    switch (op) {
        case PoolOp::mean:
            return kPoolMean;
        case PoolOp::max:
            return kPoolMax;
        case PoolOp::min:
            return kPoolMin;
        default:
            return 0;
    }
}

PoolJob checked_job(const std::string& name, py::handle item, int64_t batch, int64_t dim) {
    if (!py::isinstance<py::tuple>(item) || py::len(item) != 3)
        throw py::type_error(name + " must be a tuple (op, bit, out)");
    const auto job = py::reinterpret_borrow<py::tuple>(item);
    if (!py::isinstance<py::str>(job[0])) throw py::type_error(name + " must begin with the op as a str");
    if (!py::isinstance<py::int_>(job[1])) throw py::type_error(name + " must have the bit of its role as an int");
    const PoolOp op = op_from_name(name, job[0].cast<std::string>());
    const auto bit = job[1].cast<int64_t>();
    if (bit < 0 || bit > 7)
        throw std::invalid_argument(name + " has bit " + std::to_string(bit) + "; a role byte has bits 0 to 7");
    const std::string out_name = name + " out";
    const TensorView out(out_name.c_str(), job[2]);
    out.require(kFloat32, {batch, dim}, dlpack::kCPU);
    out.require_contiguous(1);
    if (batch > 1 && out.stride(0) < dim) out.fail("has rows that overlap");
    return {op, static_cast<uint8_t>(1u << bit), out.data<float>(), out.stride(0)};
}

struct Aligned {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
};

bool all_finite(const PoolArgs& args, const std::vector<PoolJob>& jobs) {
    constexpr uint32_t exponent = 0x7f800000;  // all of it in infinity and NaN; integers vectorise
    uint32_t bad = 0;
    for (const PoolJob& job : jobs)
        for (int64_t b = 0; b < args.batch; ++b)
            for (int64_t c = 0; c < args.dim; ++c) {
                uint32_t bits;
                std::memcpy(&bits, job.out + b * job.stride + c, sizeof bits);
                bad |= (bits & exponent) == exponent;
            }
    return bad == 0;
}

// Returns whether all that was written is finite, which is cheap to see while it is in the cache.
bool pool(py::handle x_, py::handle roles_, const py::list& jobs_, const char* isa_) {
    const Isa isa = isa_from_name(isa_);
    const TensorView x("x", x_), roles("roles", roles_);
    PoolArgs args{};
    args.type = x.require_any({RowType::float32, RowType::float16, RowType::bfloat16});
    x.require(x.dtype(), {-1, -1, -1}, dlpack::kCPU);
    x.require_contiguous(2);
    args.batch = x.size(0), args.tokens = x.size(1), args.dim = x.size(2);
    args.x = x.data<void>();
    args.stride_batch = x.stride(0), args.stride_token = x.stride(1);
    args.roles = checked<uint8_t>(roles, kUInt8, {args.batch, args.tokens});

    std::vector<PoolJob> jobs;
    int roles_used = 0;
    for (size_t j = 0; j < jobs_.size(); ++j) {
        jobs.push_back(checked_job("jobs[" + std::to_string(j) + "]", jobs_[j], args.batch, args.dim));
        unsigned& reductions = args.reductions[__builtin_ctz(jobs[j].role)];
        if (reductions == 0 && reduction(jobs[j].op) != 0) ++roles_used;
        reductions |= reduction(jobs[j].op);
    }
    args.jobs = jobs.data();
    args.job_count = static_cast<std::ptrdiff_t>(jobs.size());

    const int64_t rows_read = roles_used ? args.tokens : args.job_count;
    const int64_t bytes = args.batch * rows_read * args.dim * (args.type == RowType::float32 ? 4 : 2);
    args.threads = static_cast<int>(std::clamp<int64_t>(bytes / kBytesPerThread, 1, omp_get_max_threads()));
    args.dim_padded = (args.dim + 15) / 16 * 16;
    args.scratch_size = 16 + 5 * args.dim_padded * roles_used;
    const size_t scratch_bytes = sizeof(float) * 2 * static_cast<size_t>(args.threads * args.scratch_size);
    const std::unique_ptr<float, Aligned> scratch(
        static_cast<float*>(::operator new(scratch_bytes, std::align_val_t(64))));
    args.scratch = scratch.get();
    py::gil_scoped_release release;
    GEOFAST_SELECT(isa, pool)(args);
    return all_finite(args, jobs);
}

}  // namespace

void bind_pool(py::module_& m) {
    m.def("pool", pool, py::arg("x"), py::arg("roles"), py::arg("jobs"), py::kw_only(), py::arg("isa") = py::none());
}

}  // namespace geofast
