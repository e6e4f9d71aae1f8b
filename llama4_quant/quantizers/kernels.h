// The arithmetic of the compiled quantizers: source dtypes, code grids and the scale search, twins of int4.py, fp8.py
// and search.py. Vectors are those of the compiler's own extension (GCC and Clang): 16 floats with AVX-512, else 8.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int64_t kLanes = 16;
#else
constexpr int64_t kLanes = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef double f64x4 __attribute__((vector_size(32)));

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

// One instruction each where GCC would make two of the comparison, or many of the conversion. Arguments are not NaN
// where the result is used.
#ifdef __AVX512F__
INLINE Floats at_least(Floats values, float low) { return _mm512_max_ps(values, Floats{} + low); }
INLINE Floats at_most(Floats values, float high) { return _mm512_min_ps(values, Floats{} + high); }
INLINE Ints widen(Halves words) { return (Ints)_mm512_cvtepu16_epi32((__m256i)words); }
#elif defined(__AVX2__)
INLINE Floats at_least(Floats values, float low) { return _mm256_max_ps(values, Floats{} + low); }
INLINE Floats at_most(Floats values, float high) { return _mm256_min_ps(values, Floats{} + high); }
INLINE Ints widen(Halves words) { return (Ints)_mm256_cvtepu16_epi32((__m128i)words); }
#else
INLINE Floats at_least(Floats values, float low) { return values < low ? Floats{} + low : values; }
INLINE Floats at_most(Floats values, float high) { return values > high ? Floats{} + high : values; }
INLINE Ints widen(Halves words) { return __builtin_convertvector(words, Ints); }
#endif

#ifdef __AVX__
INLINE f64x4 widen(f32x4 values) { return _mm256_cvtps_pd(values); }
#else
INLINE f64x4 widen(f32x4 values) { return __builtin_convertvector(values, f64x4); }
#endif

// a * b + c, rounded once or, where kFused is false, twice.
#if defined(__FMA__) && defined(__AVX512F__)
constexpr bool kFused = true;
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__FMA__)
constexpr bool kFused = true;
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
#else
constexpr bool kFused = false;
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
#endif

INLINE float round_to_bf16(float value) {
    const uint32_t word = bits<uint32_t>(value);
    return bits<float>((word + 0x7FFF + ((word >> 16) & 1)) & 0xFFFF0000u);
}

// ---- Source dtypes: `Word` holds one weight; the order of magnitudes is that of the integers in kMagnitude. ----

struct Bf16 {
    typedef uint16_t Word;
    static constexpr Word kMagnitude = 0x7FFF, kInfinity = 0x7F80;
    static constexpr bool kShort = true;  // at most 11 significant bits, see `squared_error`
    INLINE float load1(Word word) { return bits<float>((uint32_t)word << 16); }
    INLINE Floats load_lanes(const Word* from) {
        return bits<Floats>(widen(load<Halves>(from)) << 16);
    }
};

struct Fp16 {
    typedef uint16_t Word;
    static constexpr Word kMagnitude = 0x7FFF, kInfinity = 0x7C00;
    static constexpr bool kShort = true;
    INLINE float load1(Word word) {
        const float magnitude = bits<float>((word & 0x7FFFu) << 13) * 0x1p112f;
        return bits<float>(bits<uint32_t>(magnitude) | ((word & 0x8000u) << 16));
    }
    INLINE Floats load_lanes(const Word* from) {  // moving the exponent's bias from 15 to 127 is a multiplication
        const Ints word = widen(load<Halves>(from));
        const Floats magnitude = bits<Floats>((word & 0x7FFF) << 13) * 0x1p112f;
        return bits<Floats>(bits<Ints>(magnitude) | ((word & 0x8000) << 16));
    }
};

struct Fp32 {
    typedef uint32_t Word;
    static constexpr Word kMagnitude = 0x7FFFFFFF, kInfinity = 0x7F800000;
    static constexpr bool kShort = false;
    INLINE float load1(Word word) { return bits<float>(word); }
    INLINE Floats load_lanes(const Word* from) { return load<Floats>(from); }
};

// ---- Code grids, as int4.py and fp8.py. Adding 1.5 * 2^23 units and subtracting them rounds to even. ----

struct Int4 {
    typedef uint16_t Scale;  // bf16
    static constexpr float kAbsmaxCode = 7.5f;
    INLINE Scale stored(float scale) { return (Scale)(bits<uint32_t>(scale) >> 16); }
    static constexpr float kRound = 0x1.8p23f;
    INLINE Floats nearest(Floats ratio) { return (at_most(at_least(ratio, -8.0f), 7.0f) + kRound) - kRound; }
    INLINE Floats nearest_product(Floats weight, Floats reciprocal) {  // magnitude under 2^22
        const Floats rounded = multiply_add(weight, reciprocal, Floats{} + kRound);
        return at_most(at_least(rounded, kRound - 8.0f), kRound + 7.0f) - kRound;
    }
    INLINE Ints code(Floats, Floats value) {  // the nibble, code + 8, in the low bits of the sum
        return bits<Ints>(value + (kRound + 8.0f)) & 15;
    }
};

struct Fp8 {
    typedef float Scale;
    static constexpr float kAbsmaxCode = 448.0f;
    INLINE Scale stored(float scale) { return scale; }
    INLINE Floats nearest(Floats ratio) { return nearest_inside(at_most(at_least(ratio, -448.0f), 448.0f)); }
    // Factors are at least 1, so ratios reach 448 (1 + 2^-8), by the rounding of the scale: under the midpoint 464.
    INLINE Floats nearest_product(Floats weight, Floats reciprocal) { return nearest_inside(weight * reciprocal); }
    INLINE Floats nearest_inside(Floats ratio) {
        const Floats power = at_least(bits<Floats>(bits<Ints>(ratio) & kExponent), 0x1p-6f);
        const Floats shift = power * 0x1.8p20f;
        return (ratio + shift) - shift;
    }
    INLINE Ints code(Floats weight, Floats value) {  // the sign is that of the weight: -0 is kept
        const Ints magnitude = bits<Ints>(value) & 0x7FFFFFFF;
        const Ints normal = (magnitude >> 20) - ((127 - 7) << 3);
        const Ints subnormal = bits<Ints>(bits<Floats>(magnitude) + 0x1p14f) - bits<int32_t>(0x1p14f);
        const Ints code = magnitude < bits<int32_t>(0x1p-6f) ? subnormal : normal;
        return code | ((bits<Ints>(weight) >> 24) & 0x80);
    }
};

// ---- Scale search, as search.py; a lane is the weights of one scale, contiguous and zero up to a multiple of kLanes. ----

struct Search {
    const float* factors;
    int64_t num_factors;
    float* lane;     // float32 weights of a lane
    float* partial;  // partial sums of a lane
    const float* importance = nullptr;  // what the squared error of each weight of a lane counts; null: all the same
};

// Ratios of weights with few significant bits are exact midpoints between codes or far from them (quantize.py). So a
// product with the reciprocal picks the same code, or at a midpoint the other of two that are equally far: the squared
// error, exact before squaring, is the same. Only float32 weights need the division.
template <typename Grid, bool kShort, bool kImportance>
INLINE Floats squared_error(const float* lane, const float* importance, Floats scale, Floats reciprocal) {
    const Floats weight = load<Floats>(lane);
    const Floats value = kShort ? Grid::nearest_product(weight, reciprocal) : Grid::nearest(weight / scale);
    const Floats error = multiply_add(-value, scale, weight);  // the product is exact
    return kImportance ? error * error * load<Floats>(importance) : error * error;
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

// The first levels of the tree, up to three, are summed in registers where the size allows.
template <typename Grid, bool kShort, bool kImportance>
INLINE float lane_error(const Search& search, int64_t size, float one_scale) {
    const float *lane = search.lane, *importance = search.importance;
    float* partial = search.partial;
    const Floats scale = Floats{} + one_scale, reciprocal = Floats{} + 1.0f / one_scale;
    const auto at = [&](int64_t i) __attribute__((always_inline)) {
        return squared_error<Grid, kShort, kImportance>(lane + i, importance + i, scale, reciprocal);
    };
    const auto halves = [&](int64_t i, int64_t m) __attribute__((always_inline)) { return at(i) + at(i + m); };
    const auto quarters = [&](int64_t i, int64_t m) __attribute__((always_inline)) {
        return halves(i, 2 * m) + halves(i + m, 2 * m);
    };
    int64_t m = size;
    if (size % (8 * kLanes) == 0) {
        m = size / 8;
        for (int64_t i = 0; i < m; i += kLanes) {
            const Floats even = halves(i, 4 * m) + halves(i + 2 * m, 4 * m);
            const Floats odd = halves(i + m, 4 * m) + halves(i + 3 * m, 4 * m);
            store(partial + i, even + odd);
        }
    } else if (size % (4 * kLanes) == 0) {
        m = size / 4;
        for (int64_t i = 0; i < m; i += kLanes) store(partial + i, quarters(i, m));
    } else if (size % (2 * kLanes) == 0) {
        m = size / 2;
        for (int64_t i = 0; i < m; i += kLanes) store(partial + i, halves(i, m));
    } else {
        for (int64_t i = 0; i < size; i += kLanes) store(partial + i, at(i));
    }
    return tree_sum(partial, m);
}

template <typename Grid>
INLINE float base_scale(float absmax) {
    if (absmax == 0.0f) return 1.0f;
    const float base = absmax / Grid::kAbsmaxCode;
    return base < kSmallestScale ? kSmallestScale : base;
}

INLINE float power_of_two(float value) { return bits<float>(bits<int32_t>(value) & kExponent); }

// `search.lane` holds the weights divided by `power_of_two(base)`.
template <typename Grid, bool kShort, int64_t kSize, bool kImportance = false>
__attribute__((noinline)) float best_scale(const Search& search, int64_t any_size, float base) {
    const int64_t size = kSize ? kSize : any_size;
    const float power = power_of_two(base), smallest = kSmallestScale / power;
    base /= power;
    float best = round_to_bf16(base);
    float least = lane_error<Grid, kShort, kImportance>(search, size, best);
    for (int64_t i = 0; i < search.num_factors; i++) {
        float scale = round_to_bf16(base * search.factors[i]);
        scale = scale < smallest ? smallest : scale;
        const float error = lane_error<Grid, kShort, kImportance>(search, size, scale);
        if (error < least) {
            least = error;
            best = scale;
        }
    }
    return best * power;
}

}  // namespace
