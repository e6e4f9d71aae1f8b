// Vectors of float32 as the compiler's own extension (GCC 12 or Clang), for whatever processor it compiles for.

#pragma once

#include "task.h"

namespace {

#ifdef __AVX512F__
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

INLINE Floats load(const float* from) {
    Floats vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

INLINE void store(Floats vector, float* to) { std::memcpy(to, &vector, sizeof vector); }

// e^x for x of at most 0, within 2^-22 of it; 0 below -87. NaN stays.
INLINE Floats exponential(Floats x) {
    const Floats least = Floats{} - 87.0f, shift = Floats{} + 0x1.8p23f;
    const Ints is_tiny = x < least;
    x = is_tiny ? least : x;
    const Floats rounded = x * 0x1.715476p0f + shift;  // x / ln 2 to the nearest integer, in the lowest bits
    const Floats n = rounded - shift;
    const Floats r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    Floats e = Floats{} + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    const Floats power = (Floats)(((Ints)rounded - 0x4B400000 + 127) << 23);
    return is_tiny ? Floats{} : e * power;
}

}  // namespace
