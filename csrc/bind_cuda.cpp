// geofast._cuda: checks arguments and starts kernels/cuda.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "gram_cuda.h"
#include "tensor.h"

namespace py = pybind11;

namespace geofast {
namespace {

constexpr dlpack::DataType kFloat64{dlpack::kFloat, 64, 1}, kInt64{dlpack::kInt, 64, 1};
constexpr int64_t kMaxInt = std::numeric_limits<int>::max();
constexpr int64_t kMaxCells = 65535;  // what CUDA allows in the second dimension of a grid

std::string name_of(dlpack::Device device) {
    return device.type == dlpack::kCUDA ? "cuda:" + std::to_string(device.id) : "the CPU";
}

std::string cuda_version(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// What CUDA says, and for what a build for other GPUs brings about, that.
void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // it is reported here, not by whoever asks next
    std::string why = std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
        error == cudaErrorUnsupportedPtxVersion) {
        int device = 0, major = 0, minor = 0;
        cudaGetDevice(&device);
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
        why = "cuda:" + std::to_string(device) + " has compute capability " + std::to_string(major) + "." +
              std::to_string(minor) + ", and geofast._cuda was built for " GEOFAST_CUDA_ARCHITECTURES ": " + why;
    }
    throw std::runtime_error(why);
}

// Makes a device the current one of this thread, for as long as it lives.
class OnDevice {
public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_));
        check(cudaSetDevice(device));
    }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    int before_ = 0;
};

// A tensor on the device of xs[0], of one dtype and shape (-1: any size), contiguous from a
// dimension inwards. That this device is a GPU is checked last, after all that is cheaper to mend.
class Argument : public TensorView {
public:
    Argument(const char* name, py::handle tensor, dlpack::Device device, dlpack::DataType dtype,
             std::initializer_list<int64_t> shape, int contiguous_from = 0)
        : TensorView(name, tensor) {
        require(dtype, shape, static_cast<dlpack::DeviceType>(this->device().type));
        require_contiguous(contiguous_from);
        if (this->device().type != device.type || this->device().id != device.id)
            fail("is on " + name_of(this->device()) + ", and xs[0] on " + name_of(device));
    }
};

// Elements from row to row of [rows, columns].
int row_stride(const TensorView& t) {
    if (t.size(0) <= 1) return 0;
    if (t.stride(0) > kMaxInt) t.fail("has rows that are more than 2^31 numbers apart");
    return static_cast<int>(t.stride(0));
}

int small(const TensorView& t, int dimension, int64_t most = kMaxInt) {
    if (t.size(dimension) > most)
        t.fail("has size " + std::to_string(t.size(dimension)) + " in dimension " + std::to_string(dimension) +
               "; at most " + std::to_string(most) + " work");
    return static_cast<int>(t.size(dimension));
}

void gram(const py::sequence& xs, const py::sequence& shifts, py::handle z_, py::handle order_, py::handle offsets_,
          const py::sequence& outs) {
    const size_t count = xs.size();
    if (shifts.size() != count || outs.size() != count)
        throw std::invalid_argument("xs, shifts and outs must be of one length; got " + std::to_string(count) + ", " +
                                    std::to_string(shifts.size()) + " and " + std::to_string(outs.size()));
    if (count == 0) return;

    const TensorView first("xs[0]", xs[0]);
    const RowType type = first.require_any({RowType::float32, RowType::float16, RowType::bfloat16, RowType::float64});
    const dlpack::Device device = first.device();
    first.require(first.dtype(), {-1, -1}, static_cast<dlpack::DeviceType>(device.type));
    const int64_t n = small(first, 0), d = small(first, 1);
    if (d < 1) first.fail("has no columns");

    const Argument z("z", z_, device, kFloat64, {n, -1}, 1), order("order", order_, device, kInt64, {-1}),
        offsets("offsets", offsets_, device, kInt64, {-1});
    if (offsets.size(0) < 1) offsets.fail("must hold one entry more than there are cells");
    small(order, 0);
    cuda::GramShape shape{};
    shape.z = z.data<const double>();
    shape.order = order.data<const int64_t>();
    shape.offsets = offsets.data<const int64_t>();
    shape.z_stride = row_stride(z);
    shape.dim = static_cast<int>(d);
    shape.q = small(z, 1);
    shape.cells = small(offsets, 0, kMaxCells + 1) - 1;

    const int64_t p = d + shape.q;
    std::vector<cuda::GramProblem> problems(count);
    for (size_t i = 0; i < count; ++i) {
        const std::string at = "[" + std::to_string(i) + "]";
        const std::string x_name = "xs" + at, shift_name = "shifts" + at, out_name = "outs" + at;
        const Argument x(x_name.c_str(), xs[i], device, first.dtype(), {n, d}, 1);
        const Argument shift(shift_name.c_str(), shifts[i], device, kFloat64, {d});
        const Argument out(out_name.c_str(), outs[i], device, kFloat64, {shape.cells, p, p});
        problems[i] = {x.data<const void>(), shift.data<const double>(), out.data<double>(), row_stride(x)};
    }
    if (device.type != dlpack::kCUDA) first.fail("is on " + name_of(device) + "; this kernel needs all on one GPU");
    if (order.size(0) == 0 || shape.cells == 0) return;

    auto* const stream = static_cast<cudaStream_t>(first.stream());
    py::gil_scoped_release release;
    const OnDevice on(device.id);
    check(cuda::gram(problems.data(), static_cast<int64_t>(count), shape, type, stream));
}

// Why kernels cannot run, or None. With a device also whether this build has code for it, which
// starts CUDA on that device.
py::object unavailable(const py::object& device) {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaErrorInsufficientDriver) {
        int driver = 0;
        cudaDriverGetVersion(&driver);
        if (driver == 0) return py::str("no NVIDIA driver");
        return py::str("the NVIDIA driver is for CUDA " + cuda_version(driver) + ", and geofast was built with CUDA " +
                       cuda_version(CUDART_VERSION) + ": update the driver");
    }
    if (error != cudaSuccess) return py::str(cudaGetErrorString(error));
    if (count == 0) return py::str("no CUDA device");
    if (device.is_none()) return py::none();
    try {
        const OnDevice on(device.cast<int>());
        check(cuda::gram_loads());
    } catch (const std::runtime_error& reason) {
        return py::str(reason.what());
    }
    return py::none();
}

}  // namespace
}  // namespace geofast

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
    m.attr("architectures") = GEOFAST_CUDA_ARCHITECTURES;
    m.def("unavailable", geofast::unavailable, py::arg("device") = py::none());
    m.def("gram", geofast::gram, py::arg("xs"), py::arg("shifts"), py::arg("z"), py::arg("order"), py::arg("offsets"),
          py::arg("outs"));
}
