#include "cpu.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace geofast {

Isa detected_isa() {
#if defined(__x86_64__)
    // GCC and clang look at CPUID and at XGETBV here, so "supported" means the OS saves the registers too.
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return Isa::avx2;
#endif
    return Isa::baseline;
}

const char* isa_name(Isa isa) { return isa == Isa::avx2 ? "avx2" : "baseline"; }

Isa isa_from_name(const char* name) {
    if (!name) return detected_isa();
    for (Isa isa : {Isa::baseline, Isa::avx2}) {
        if (std::strcmp(name, isa_name(isa)) != 0) continue;
        if (isa > detected_isa())
            throw std::invalid_argument(std::string("isa '") + name + "' is not supported here; the best is '" +
                                        isa_name(detected_isa()) + "'");
        return isa;
    }
    throw std::invalid_argument(std::string("unknown isa '") + name + "'; expected 'baseline' or 'avx2'");
}

}  // namespace geofast
