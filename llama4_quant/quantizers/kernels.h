// The arithmetic of the compiled quantizers: source dtypes, code grids and the scale search, twins of int4.py, fp8.py
// and search.py. 8-wide vectors are those of the compiler's own extension (GCC and Clang).

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef double f64x4 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint8_t u8x8 __attribute__((vector_size(8)));

#define INLINE static inline __attribute__((always_inline))

constexpr int32_t kExponent = 0x7F800000;
constexpr float kSmallestScale = 0x1p-126f;

template <typename To, typename From>
INLINE To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <typename Vector, typename Element>
INLINE Vector load(const Element* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

template <typename Vector, typename Element>
INLINE void store(Element* to, Vector vector) {
    std::memcpy(to, &vector, sizeof vector);
}

// One instruction each where GCC would make two of the comparison. Arguments are not NaN where the result is used.
INLINE f32x8 at_least(f32x8 values, float low) {
#ifdef __AVX__
    return _mm256_max_ps(values, f32x8{} + low);
#else
    return values < low ? f32x8{} + low : values;
#endif
}

INLINE f32x8 at_most(f32x8 values, float high) {
#ifdef __AVX__
    return _mm256_min_ps(values, f32x8{} + high);
#else
    return values > high ? f32x8{} + high : values;
#endif
}

// a * b + c, rounded once or twice: only for uses where both give the same, or are as good.
INLINE f32x8 multiply_add(f32x8 a, f32x8 b, f32x8 c) {
#ifdef __FMA__
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

INLINE float round_to_bf16(float value) {
    const uint32_t word = bits<uint32_t>(value);
    return bits<float>((word + 0x7FFF + ((word >> 16) & 1)) & 0xFFFF0000u);
}

// ---- Source dtypes: `Word` holds one weight; the order of magnitudes is that of the integers in kMagnitude. ----

struct Bf16 {
    typedef uint16_t Word;
    static constexpr Word kMagnitude = 0x7FFF, kInfinity = 0x7F80;
    static constexpr bool kShort = true;  // at most 11 significant bits, see `squared_error`
    INLINE f32x8 load8(const Word* from) {
        return bits<f32x8>(__builtin_convertvector(load<u16x8>(from), i32x8) << 16);
    }
};

struct Fp16 {
    typedef uint16_t Word;
    static constexpr Word kMagnitude = 0x7FFF, kInfinity = 0x7C00;
    static constexpr bool kShort = true;
    INLINE f32x8 load8(const Word* from) {  // moving the exponent's bias from 15 to 127 is a multiplication
        const i32x8 word = __builtin_convertvector(load<u16x8>(from), i32x8);
        const f32x8 magnitude = bits<f32x8>((word & 0x7FFF) << 13) * 0x1p112f;
        return bits<f32x8>(bits<i32x8>(magnitude) | ((word & 0x8000) << 16));
    }
};

struct Fp32 {
    typedef uint32_t Word;
    static constexpr Word kMagnitude = 0x7FFFFFFF, kInfinity = 0x7F800000;
    static constexpr bool kShort = false;
    INLINE f32x8 load8(const Word* from) { return load<f32x8>(from); }
};

// ---- Code grids, as int4.py and fp8.py. Adding 1.5 * 2^23 units and subtracting them rounds to even. ----

struct Int4 {
    typedef uint16_t Scale;  // bf16
    static constexpr float kAbsmaxCode = 7.5f;
    INLINE Scale stored(float scale) { return (Scale)(bits<uint32_t>(scale) >> 16); }
    static constexpr float kRound = 0x1.8p23f;
    INLINE f32x8 nearest(f32x8 ratio) { return (at_most(at_least(ratio, -8.0f), 7.0f) + kRound) - kRound; }
    INLINE f32x8 nearest_product(f32x8 weight, f32x8 reciprocal) {  // magnitude under 2^22
        const f32x8 rounded = multiply_add(weight, reciprocal, f32x8{} + kRound);
        return at_most(at_least(rounded, kRound - 8.0f), kRound + 7.0f) - kRound;
    }
    INLINE i32x8 code(f32x8, f32x8 value) {  // the nibble, code + 8, in the low bits of the sum
        return bits<i32x8>(value + (kRound + 8.0f)) & 15;
    }
};

struct Fp8 {
    typedef float Scale;
    static constexpr float kAbsmaxCode = 448.0f;
    INLINE Scale stored(float scale) { return scale; }
    INLINE f32x8 nearest(f32x8 ratio) { return nearest_inside(at_most(at_least(ratio, -448.0f), 448.0f)); }
    // Factors are at least 1, so ratios reach 448 (1 + 2^-8), by the rounding of the scale: under the midpoint 464.
    INLINE f32x8 nearest_product(f32x8 weight, f32x8 reciprocal) { return nearest_inside(weight * reciprocal); }
    INLINE f32x8 nearest_inside(f32x8 ratio) {
        const f32x8 power = at_least(bits<f32x8>(bits<i32x8>(ratio) & kExponent), 0x1p-6f);
        const f32x8 shift = power * 0x1.8p20f;
        return (ratio + shift) - shift;
    }
    INLINE i32x8 code(f32x8 ratio, f32x8 value) {  // the sign is that of the ratio: -0 is kept
        const i32x8 magnitude = bits<i32x8>(value) & 0x7FFFFFFF;
        const i32x8 normal = (magnitude >> 20) - ((127 - 7) << 3);
        const i32x8 subnormal = bits<i32x8>(bits<f32x8>(magnitude) + 0x1p14f) - bits<int32_t>(0x1p14f);
        const i32x8 code = magnitude < bits<int32_t>(0x1p-6f) ? subnormal : normal;
        return code | ((bits<i32x8>(ratio) >> 24) & 0x80);
    }
};

// ---- Scale search, as search.py; a lane is the weights of one scale, contiguous and zero up to a multiple of 8. ----

struct Search {
    const float* factors;
    int64_t num_factors;
    float* lane;     // float32 weights of a lane
    float* partial;  // partial sums of a lane
};

// Ratios of weights with few significant bits are exact midpoints between codes or far from them (quantize.py). So a
// product with the reciprocal picks the same code, or at a midpoint the other of two that are equally far: the squared
// error, exact before squaring, is the same. Only float32 weights need the division.
template <typename Grid, bool kShort>
INLINE f32x8 squared_error(const float* lane, f32x8 scale, f32x8 reciprocal) {
    const f32x8 weight = load<f32x8>(lane);
    const f32x8 value = kShort ? Grid::nearest_product(weight, reciprocal) : Grid::nearest(weight / scale);
    const f32x8 error = multiply_add(-value, scale, weight);  // the product is exact
    return error * error;
}

INLINE float tree_sum(float* values, int64_t count) {
    while (count > 8) {
        const int64_t half = (count + 1) / 2;
        for (int64_t i = 0; i < count - half; i++) values[i] += values[half + i];
        count = half;
    }
    if (count == 8) {
        const f32x4 four = load<f32x4>(values) + load<f32x4>(values + 4);
        return (four[0] + four[2]) + (four[1] + four[3]);
    }
    while (count > 1) {
        const int64_t half = (count + 1) / 2;
        for (int64_t i = 0; i < count - half; i++) values[i] += values[half + i];
        count = half;
    }
    return values[0];
}

// The first two or three levels of the tree are summed in registers where the size allows.
template <typename Grid, bool kShort>
INLINE float lane_error(const Search& search, int64_t size, float one_scale) {
    const float* lane = search.lane;
    float* partial = search.partial;
    const f32x8 scale = f32x8{} + one_scale, reciprocal = f32x8{} + 1.0f / one_scale;
    const auto at = [&](int64_t i) __attribute__((always_inline)) {
        return squared_error<Grid, kShort>(lane + i, scale, reciprocal);
    };
    if (size % 64 == 0) {
        const int64_t m = size / 8;
        for (int64_t i = 0; i < m; i += 8) {
            const f32x8 even = (at(i) + at(i + 4 * m)) + (at(i + 2 * m) + at(i + 6 * m));
            const f32x8 odd = (at(i + m) + at(i + 5 * m)) + (at(i + 3 * m) + at(i + 7 * m));
            store(partial + i, even + odd);
        }
        return tree_sum(partial, m);
    }
    if (size % 32 == 0) {
        const int64_t m = size / 4;
        for (int64_t i = 0; i < m; i += 8) {
            store(partial + i, (at(i) + at(i + 2 * m)) + (at(i + m) + at(i + 3 * m)));
        }
        return tree_sum(partial, m);
    }
    for (int64_t i = 0; i < size; i += 8) store(partial + i, at(i));
    return tree_sum(partial, size);
}

template <typename Grid>
INLINE float base_scale(float absmax) {
    if (absmax == 0.0f) return 1.0f;
    const float base = absmax / Grid::kAbsmaxCode;
    return base < kSmallestScale ? kSmallestScale : base;
}

INLINE float power_of_two(float value) { return bits<float>(bits<int32_t>(value) & kExponent); }

// `search.lane` holds the weights divided by `power_of_two(base)`.
template <typename Grid, bool kShort, int64_t kSize>
__attribute__((noinline)) float best_scale(const Search& search, int64_t any_size, float base) {
    const int64_t size = kSize ? kSize : any_size;
    const float power = power_of_two(base), smallest = kSmallestScale / power;
    base /= power;
    float best = round_to_bf16(base);
    float least = lane_error<Grid, kShort>(search, size, best);
    for (int64_t i = 0; i < search.num_factors; i++) {
        float scale = round_to_bf16(base * search.factors[i]);
        scale = scale < smallest ? smallest : scale;
        const float error = lane_error<Grid, kShort>(search, size, scale);
        if (error < least) {
            least = error;
            best = scale;
        }
    }
    return best * power;
}

}  // namespace
