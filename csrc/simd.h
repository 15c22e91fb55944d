// Vectors as wide as the instruction set's registers, and loads that widen to float32.
// For kernel files only: everything is in the namespace of the instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace geofast::GEOFAST_ISA {

struct Float16 {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

#if defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kFloats = kVectorBytes / 4, kDoubles = kVectorBytes / 8;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

// GCC 12 turns __builtin_convertvector into five instructions where x86 has one.
inline Words load_halves(const void* p) {
#if defined(__AVX2__)
    __m128i h;
    std::memcpy(&h, p, sizeof h);
    return (Words)_mm256_cvtepu16_epi32(h);
#elif defined(__SSE2__)
    return (Words)_mm_unpacklo_epi16(_mm_loadl_epi64(static_cast<const __m128i*>(p)), _mm_setzero_si128());
#else
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    Halves h;
    std::memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, Words);
#endif
}

inline Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline Floats load(const BFloat16* p) { return (Floats)(load_halves(p) << 16); }

inline Floats load(const Float16* p) {
#if defined(__F16C__)
    __m128i h;
    std::memcpy(&h, p, sizeof h);
    return _mm256_cvtph_ps(h);
#else
    // The exponent is moved from bias 15 to 127; Inf and NaN get the rest of the way to 255.
    // A subnormal is exact as 2^-14 (1 + fraction) - 2^-14, which needs no float32 subnormal and so
    // also holds with denormals flushed to zero.
    const Words h = load_halves(p);
    const Words magnitude = (h & 0x7fff) << 13, exponent = magnitude & (0x7c00u << 13);
    Words bits = magnitude + (112u << 23);
    bits += (Words)(exponent == (0x7c00u << 13)) & (112u << 23);
    const Words two_to_minus_14 = (Words){} + (113u << 23);
    const Words subnormal = (Words)((Floats)(bits + (1u << 23)) - (Floats)two_to_minus_14);
    const Words is_subnormal = (Words)(exponent == 0);
    bits = (is_subnormal & subnormal) | (~is_subnormal & bits);
    return (Floats)(bits | ((h & 0x8000) << 16));
#endif
}

inline Doubles load(const double* p) {
    Doubles v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// Half of a vector of floats as a vector of doubles.
template <int kHalf>
Doubles half_of(Floats v) {
#if defined(__AVX2__)
    return _mm256_cvtps_pd(_mm256_extractf128_ps(v, kHalf));
#else
    Doubles wide;
    for (int i = 0; i < kDoubles; ++i) wide[i] = static_cast<double>(v[kHalf * kDoubles + i]);
    return wide;
#endif
}

// The first n < kFloats elements at p, and zeros.
template <class E>
Floats load_part(const E* p, std::ptrdiff_t n) {
    E padded[kFloats] = {};
    std::memcpy(padded, p, static_cast<std::size_t>(n) * sizeof(E));
    return load(padded);
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline void store(double* p, Doubles v) { std::memcpy(p, &v, sizeof v); }

inline void store_part(float* p, Floats v, std::ptrdiff_t n) { std::memcpy(p, &v, static_cast<std::size_t>(n) * 4); }

template <class E>
void widen_row(const E* x, float* out, std::ptrdiff_t n) {
    std::ptrdiff_t c = 0;
    for (; c + kFloats <= n; c += kFloats) store(out + c, load(x + c));
    if (c < n) store_part(out + c, load_part(x + c, n - c), n - c);
}

// All ones where a or b is NaN.
inline Ints unordered(Floats a, Floats b) {
#if defined(__AVX2__)
    return (Ints)_mm256_cmp_ps(a, b, _CMP_UNORD_Q);
#else
    return (a != a) | (b != b);
#endif
}

// As the instruction: where a or b is NaN, the result is b.
inline Floats max_or_second(Floats a, Floats b) { return a > b ? a : b; }
inline Floats min_or_second(Floats a, Floats b) { return a < b ? a : b; }

}  // namespace geofast::GEOFAST_ISA
