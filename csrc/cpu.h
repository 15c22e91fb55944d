// Which instruction set a kernel runs with, asked of the processor once.
//
// A kernel file csrc/<name>.cpp is compiled once per instruction set with GEOFAST_ISA set to its
// name, and puts everything it defines into namespace geofast::GEOFAST_ISA. Two rules keep the
// copies apart for the linker: nothing outside that namespace is defined in a kernel file, and no
// standard container or algorithm is used there (its out-of-line copies would be one weak symbol
// for all instruction sets, and the linker may keep the AVX2 one for everybody).
#pragma once

namespace geofast {

enum class Isa { baseline, avx2 };

Isa detected_isa();              // the best that the machine and this build run
const char* isa_name(Isa isa);   // "baseline", "avx2"
Isa isa_from_name(const char*);  // nullptr: the best; throws std::invalid_argument for an unknown or unsupported name

}  // namespace geofast

// GEOFAST_SELECT(isa, pool) is the pointer to that instruction set's `pool`.
#if defined(__x86_64__)
#define GEOFAST_SELECT(isa, function) \
    ((isa) == ::geofast::Isa::avx2 ? ::geofast::avx2::function : ::geofast::baseline::function)
#else
#define GEOFAST_SELECT(isa, function) ((void)(isa), ::geofast::baseline::function)
#endif
