// kernels/cuda/gram.cu on the host, for ctypes.
#include "../../kernels/cuda/gram.cu"

namespace geofast::cuda {
alignas(16) double2 shared[emulator::kSharedBytes / sizeof(double2)];
}

using namespace geofast;

// `tensors`: begin and end of each that may be read. Returns "" or what went wrong.
extern "C" const char* gram(const cuda::GramProblem* problems, int64_t count, const cuda::GramShape* shape, int type,
                            const char* const (*tensors)[2], int64_t tensor_count) {
    emulator::shared = &cuda::shared[0].x;
    emulator::error.clear();
    emulator::readable.clear();
    for (int64_t i = 0; i < tensor_count; ++i) emulator::readable.emplace_back(tensors[i][0], tensors[i][1]);
    cuda::gram(problems, count, *shape, static_cast<RowType>(type), nullptr);
    return emulator::error.c_str();
}
