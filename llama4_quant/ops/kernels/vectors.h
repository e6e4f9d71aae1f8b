// Few rows of activations (decoding): a weight is read once, a cache line at a time, and multiplied where it is.
//
// int4 and int8 codes are multiplied as integers (VNNI: unsigned code times signed byte). The activations that meet one
// line become fixed point with 16 bits and a scale of their own; each of their two bytes is multiplied by itself, and the
// products are summed exactly. The error of an activation is 2^-17 of the line's largest, of which bf16 alone is off by
// up to 2^-9 (docs/kernels-cpu.md). FP8 codes become bf16 by table, and are multiplied by the bf16 unit
// (which takes subnormal numbers for 0: no e4m3 number is one, and no product with a code of activations).

#pragma once

#include <type_traits>

#include "codes.h"
#include "portable.h"

namespace vectors {

constexpr int64_t kMost = 4;          // rows of activations that are multiplied at once
constexpr int64_t kAhead = 4096;      // bytes: how far memory is read ahead into the second cache
constexpr float kFixedMost = 32600;  // a little less than 127 * 257, which two signed bytes hold

INLINE __m512 dot_bf16(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// ---- Activations ----

// How a line of 64 bytes of a row of weights meets activations.
template <Format kFormat>
struct Line;
template <>
struct Line<kInt4> {  // two bytes of 64 even inputs and of 64 odd ones; what makes codes 0..15 into -8..7; a scale
    static constexpr Format kStored = kInt4;
    static constexpr int64_t kInputs = 128, kBytes = 6 * 64;
};
template <>
struct Line<kInt8> {  // the same of 64 inputs; 0..255 into -128..127
    static constexpr Format kStored = kInt8;
    static constexpr int64_t kInputs = 64, kBytes = 4 * 64;
};
template <>
struct Line<kFp8> {  // bf16, in the order of `decode_fp8`
    static constexpr Format kStored = kFp8;
    static constexpr int64_t kInputs = 64, kBytes = 2 * 64;
};
template <>
struct Line<kBf16> {
    static constexpr Format kStored = kBf16;
    static constexpr int64_t kInputs = 32, kBytes = 64;
};

template <Format kFormat>
INLINE int64_t lines(const Task& task) {
    return (task.inputs + Line<kFormat>::kInputs - 1) / Line<kFormat>::kInputs;
}

// Step of the fixed point of some inputs; NaN if one of them is NaN or infinite.
INLINE float fixed_step(const uint16_t* x, int64_t size) {
    uint16_t most = 0;
    for (int64_t k = 0; k < size; k++) most = (x[k] & 0x7FFF) > most ? (uint16_t)(x[k] & 0x7FFF) : most;
    if (most >= 0x7F80) return __builtin_nanf("");
    return most ? from_bf16(most) / kFixedMost : 1.0f;
}

// 64 inputs as two signed bytes each: value = byte 0 * 256 + byte 1.
INLINE void to_fixed(const uint16_t* x, int64_t size, __m512 inverse, __m512i bytes[2]) {
    alignas(64) uint8_t stored[2][64];
    for (int part = 0; part < 4; part++) {
        const int64_t left = size - 16 * part;
        const __mmask16 there = left >= 16 ? 0xFFFF : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
        const __m256i words = _mm256_maskz_loadu_epi16(there, x + 16 * part);
        const __m512 values = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
        const __m512i fixed = _mm512_cvtps_epi32(_mm512_mul_ps(values, inverse));
        const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(fixed, _mm512_set1_epi32(128)), 8);  // less byte 1
        _mm_store_si128((__m128i*)(stored[0] + 16 * part), _mm512_cvtepi32_epi8(upper));
        _mm_store_si128((__m128i*)(stored[1] + 16 * part), _mm512_cvtepi32_epi8(fixed));
    }
    bytes[0] = _mm512_load_si512(stored[0]);
    bytes[1] = _mm512_load_si512(stored[1]);
}

INLINE __m512i sums_of_four(__m512i bytes) {
    return _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), bytes);
}

// Byte 0 and byte 1, each summed.
INLINE __m512i combined(__m512i upper, __m512i lower) {
    return _mm512_add_epi32(_mm512_slli_epi32(upper, 8), lower);
}

INLINE __m512 inverse_of(float step) { return _mm512_set1_ps(step == step ? 1.0f / step : 0.0f); }

INLINE __m512i even_bytes(__m512i first, __m512i second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(first)), _mm512_cvtepi16_epi8(second), 1);
}

INLINE void prepare_int4(const uint16_t* x, int64_t size, uint8_t* to) {
    for (int64_t k = 0; k < size; k += 128, to += Line<kInt4>::kBytes) {
        const float step = fixed_step(x + k, at_most(size - k, 128));
        __m512i first[2], second[2], sums[2];
        to_fixed(x + k, size - k, inverse_of(step), first);
        to_fixed(x + k + 64, size - k - 64, inverse_of(step), second);
        for (int i = 0; i < 2; i++) {
            const __m512i even = even_bytes(first[i], second[i]);
            const __m512i odd = even_bytes(_mm512_srli_epi16(first[i], 8), _mm512_srli_epi16(second[i], 8));
            _mm512_store_si512(to + 128 * i, even);
            _mm512_store_si512(to + 128 * i + 64, odd);
            sums[i] = _mm512_add_epi32(sums_of_four(even), sums_of_four(odd));
        }
        const __m512i sum = combined(sums[0], sums[1]);
        _mm512_store_si512(to + 256, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, 3)));
        std::memcpy(to + 320, &step, sizeof step);
    }
}

INLINE void prepare_int8(const uint16_t* x, int64_t size, uint8_t* to) {
    for (int64_t k = 0; k < size; k += 64, to += Line<kInt8>::kBytes) {
        const float step = fixed_step(x + k, at_most(size - k, 64));
        __m512i bytes[2];
        to_fixed(x + k, size - k, inverse_of(step), bytes);
        _mm512_store_si512(to, bytes[0]);
        _mm512_store_si512(to + 64, bytes[1]);
        const __m512i sum = combined(sums_of_four(bytes[0]), sums_of_four(bytes[1]));
        _mm512_store_si512(to + 128, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, 7)));
        std::memcpy(to + 192, &step, sizeof step);
    }
}

// Inputs from `first` on, a multiple of 64.
INLINE void order_fp8(const uint16_t* codes, int64_t first, int64_t size, uint16_t* to) {
    alignas(64) static constexpr auto kInput = [] {
        struct { uint16_t of[64]; } input{};
        for (int64_t k = 0; k < 64; k++) input.of[fp8_place(k)] = (uint16_t)k;
        return input;
    }();
    int64_t k = first;
    for (; k + 64 <= first + size; k += 64) {
        const __m512i low = _mm512_loadu_si512(codes + k - first), high = _mm512_loadu_si512(codes + k - first + 32);
        for (int64_t half = 0; half < 64; half += 32)
            _mm512_storeu_si512(to + k + half, _mm512_permutex2var_epi16(low, _mm512_load_si512(kInput.of + half), high));
    }
    for (; k < first + size; k++) to[k / 64 * 64 + fp8_place(k)] = codes[k - first];
}

// One row of activations, in zeroed memory; scales are one, or of FP8 in blocks one for 128 inputs.
template <Format kFormat>
INLINE void prepare_row(const Task& task, const uint16_t* x, uint8_t* to, float* scale, uint16_t* codes) {
    if (kFormat == kInt4 || kFormat == kInt8) {
        scale[0] = 1.0f;  // every line has its own
        kFormat == kInt4 ? prepare_int4(x, task.inputs, to) : prepare_int8(x, task.inputs, to);
    } else if (kFormat == kFp8) {
        const int64_t size = task.is_block ? kBlock : task.inputs;
        for (int64_t k = 0; k < task.inputs; k += size) {
            scale[k / size] = round_activations(x + k, size, codes);
            order_fp8(codes, k, size, (uint16_t*)to);
        }
    } else {
        scale[0] = 1.0f;
        std::memcpy(to, x, 2 * task.inputs);
    }
}

// ---- Weights ----

// Scales of the 128 weights of an int4 line, one for every eight: kGroups of them lie at `from`, or less: `bytes`.
template <int kGroups>
INLINE __m512 group_scales(const uint16_t* from, int64_t bytes) {
    if (kGroups == 1) return _mm512_castsi512_ps(_mm512_set1_epi32((uint32_t)*from << 16));
    uint64_t words = 0;
    if (bytes == 2 * kGroups) std::memcpy(&words, from, 2 * kGroups);
    else for (int64_t i = 0; i < bytes; i += 2) words |= (uint64_t)from[i / 2] << (8 * i);
    // Lane i is words[i * kGroups / 16], moved to the upper half.
    alignas(64) static constexpr auto kPlaces = [] {
        struct { uint8_t bytes[64]; } places{};
        for (int i = 0; i < 64; i++) places.bytes[i] = (uint8_t)(2 * (i / 4 * kGroups / 16) + (i & 1));
        return places;
    }();
    const __m512i all = _mm512_set1_epi64((int64_t)words);
    return _mm512_castsi512_ps(
        _mm512_maskz_shuffle_epi8(0xCCCCCCCCCCCCCCCCull, all, _mm512_load_si512(&kPlaces)));
}

// ---- Products: kOutputs rows of weights with kRows rows of activations ----

struct Operands {
    const uint8_t* weight;  // of the first output
    int64_t bytes;          // of a row of weights
    const Task* task;
    int64_t expert, output;
    const uint8_t* x;  // prepared; of the first row
    int64_t x_bytes;   // of a prepared row
    const float* x_scale;
    int64_t x_scales;
};

template <int kOutputs, int kRows, int kGroups>
INLINE void multiply_int4(const Operands& of, float (*sums)[kRows]) {
    const Task& task = *of.task;
    const __m512i mask = _mm512_set1_epi8(15);
    const int64_t count = lines<kInt4>(task), ahead = kOutputs * of.bytes > kAhead ? kOutputs * of.bytes : kAhead;
    const int64_t lines_per_group = kGroups == 1 ? task.inputs / task.groups / 128 : 1;
    const uint16_t* scales = (const uint16_t*)(task.scale + of.expert * task.scale_stride) + of.output * task.groups;
    __m512 sum[kOutputs][kRows] = {};
    int64_t group = 0, left = lines_per_group;
    // All of a line, or `size` bytes of the last one and as many of its scales as there are.
    const auto add_line = [&](int64_t line, auto is_full, int64_t size) __attribute__((always_inline)) {
        constexpr bool kIsFull = decltype(is_full)::value;
#pragma GCC unroll 4
        for (int n = 0; n < kOutputs; n++) {
            const uint8_t* from = of.weight + n * of.bytes + 64 * line;
            _mm_prefetch((const char*)from + ahead, _MM_HINT_T1);
            const __m512i codes = kIsFull ? _mm512_loadu_si512(from) : load_bytes(from, size);
            const __m512i even = _mm512_and_si512(codes, mask);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask);
            __m512 scale = _mm512_set1_ps(1.0f);
            if (kGroups) {
                const int64_t there = kIsFull ? kGroups : at_most(task.groups - group, kGroups);
                scale = group_scales<kGroups ? kGroups : 1>(scales + n * task.groups + group, 2 * there);
            }
#pragma GCC unroll 4
            for (int r = 0; r < kRows; r++) {
                const uint8_t* x = of.x + r * of.x_bytes + line * Line<kInt4>::kBytes;
                const auto part = [&](__m512i start, int i) __attribute__((always_inline)) {
                    start = _mm512_dpbusd_epi32(start, even, _mm512_load_si512(x + 128 * i));
                    return _mm512_dpbusd_epi32(start, odd, _mm512_load_si512(x + 128 * i + 64));
                };
                const __m512i all = combined(part(_mm512_setzero_si512(), 0), part(_mm512_load_si512(x + 256), 1));
                const __m512 step = _mm512_set1_ps(*(const float*)(x + 320));
                sum[n][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), _mm512_mul_ps(scale, step), sum[n][r]);
            }
        }
        if (kGroups > 1) group += kGroups;
        if (kGroups == 1 && !--left) group++, left = lines_per_group;
    };
    const int64_t full = of.bytes / kLine;
    for (int64_t line = 0; line < full; line++) add_line(line, std::true_type{}, kLine);
    if (full < count) add_line(full, std::false_type{}, of.bytes - full * kLine);
    for (int n = 0; n < kOutputs; n++)
        for (int r = 0; r < kRows; r++) sums[n][r] = _mm512_reduce_add_ps(sum[n][r]);
}

template <int kOutputs, int kRows>
INLINE void multiply_int8(const Operands& of, float (*sums)[kRows]) {
    const int64_t count = lines<kInt8>(*of.task), ahead = kOutputs * of.bytes > kAhead ? kOutputs * of.bytes : kAhead;
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    __m512 sum[kOutputs][kRows] = {};
    for (int64_t line = 0; line < count; line++) {
#pragma GCC unroll 4
        for (int n = 0; n < kOutputs; n++) {
            const uint8_t* from = of.weight + n * of.bytes + 64 * line;
            _mm_prefetch((const char*)from + ahead, _MM_HINT_T1);
            const __m512i codes = _mm512_xor_si512(load_bytes(from, of.bytes - 64 * line), sign);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; r++) {
                const uint8_t* x = of.x + r * of.x_bytes + line * Line<kInt8>::kBytes;
                const __m512i upper = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, _mm512_load_si512(x));
                const __m512i lower = _mm512_dpbusd_epi32(_mm512_load_si512(x + 128), codes, _mm512_load_si512(x + 64));
                const __m512 step = _mm512_set1_ps(*(const float*)(x + 192));
                sum[n][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(combined(upper, lower)), step, sum[n][r]);
            }
        }
    }
    for (int n = 0; n < kOutputs; n++)
        for (int r = 0; r < kRows; r++) sums[n][r] = _mm512_reduce_add_ps(sum[n][r]);
}

template <int kOutputs, int kRows, bool kIsBlock>
INLINE void multiply_fp8(const Operands& of, const Table& table, float (*sums)[kRows]) {
    const Task& task = *of.task;
    const int64_t count = lines<kFp8>(task), ahead = kOutputs * of.bytes > kAhead ? kOutputs * of.bytes : kAhead;
    __m512 sum[kOutputs][kRows] = {}, part[kOutputs][kRows] = {};
    for (int64_t line = 0; line < count; line++) {
#pragma GCC unroll 4
        for (int n = 0; n < kOutputs; n++) {
            const uint8_t* from = of.weight + n * of.bytes + 64 * line;
            _mm_prefetch((const char*)from + ahead, _MM_HINT_T1);
            __m512i first, second;
            decode_fp8(load_bytes(from, of.bytes - 64 * line), table, first, second);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; r++) {
                const uint8_t* x = of.x + r * of.x_bytes + line * Line<kFp8>::kBytes;
                __m512& other = kIsBlock ? part[n][r] : sum[n][r];  // two sums: one does not wait for the other
                part[n][r] = dot_bf16(part[n][r], first, _mm512_load_si512(x));
                other = dot_bf16(other, second, _mm512_load_si512(x + 64));
                if (kIsBlock && line % 2) {
                    const int64_t k = line / 2 * kBlock;
                    const float scale = group_scale(task, of.expert, of.output + n, k) * of.x_scale[r * of.x_scales + line / 2];
                    sum[n][r] = _mm512_fmadd_ps(part[n][r], _mm512_set1_ps(scale), sum[n][r]);
                    part[n][r] = _mm512_setzero_ps();
                }
            }
        }
    }
    for (int n = 0; n < kOutputs; n++)
        for (int r = 0; r < kRows; r++) sums[n][r] = _mm512_reduce_add_ps(_mm512_add_ps(sum[n][r], part[n][r]));
}

template <int kOutputs, int kRows>
INLINE void multiply_bf16(const Operands& of, float (*sums)[kRows]) {
    const int64_t count = lines<kBf16>(*of.task), ahead = kOutputs * of.bytes > kAhead ? kOutputs * of.bytes : kAhead;
    __m512 sum[kOutputs][kRows] = {};
    for (int64_t line = 0; line < count; line++) {
#pragma GCC unroll 4
        for (int n = 0; n < kOutputs; n++) {
            const uint8_t* from = of.weight + n * of.bytes + 64 * line;
            _mm_prefetch((const char*)from + ahead, _MM_HINT_T1);
            const __m512i weights = load_bytes(from, of.bytes - 64 * line);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; r++) {
                const __m512i x = _mm512_load_si512(of.x + r * of.x_bytes + line * Line<kBf16>::kBytes);
                sum[n][r] = dot_bf16(sum[n][r], weights, x);
            }
        }
    }
    for (int n = 0; n < kOutputs; n++)
        for (int r = 0; r < kRows; r++) sums[n][r] = _mm512_reduce_add_ps(sum[n][r]);
}

template <Format kFormat, int kOutputs, int kRows>
INLINE void multiply(const Operands& of, const Table& table, float (*sums)[kRows]) {
    const Task& task = *of.task;
    if (kFormat == kBf16) return multiply_bf16<kOutputs, kRows>(of, sums);
    if (kFormat == kInt8) return multiply_int8<kOutputs, kRows>(of, sums);
    if (kFormat == kFp8 && task.is_block) return multiply_fp8<kOutputs, kRows, true>(of, table, sums);
    if (kFormat == kFp8) return multiply_fp8<kOutputs, kRows, false>(of, table, sums);
    switch (has_groups(task) ? task.inputs / task.groups : 0) {
        case 0: return multiply_int4<kOutputs, kRows, 0>(of, sums);
        case 32: return multiply_int4<kOutputs, kRows, 4>(of, sums);
        case 64: return multiply_int4<kOutputs, kRows, 2>(of, sums);
        default: return multiply_int4<kOutputs, kRows, 1>(of, sums);
    }
}

// ---- One expert's rows with some outputs ----

struct Rows {
    int64_t first, count;  // of the task's rows
    uint8_t* x;            // prepared
    float* scale;          // x_scales for each row
    int64_t x_bytes, x_scales;
};

template <Format kFormat, int kOutputs, int kRows>
INLINE void some_rows(const Task& task, const Rows& rows, const Table& table, int64_t expert, int64_t output, int64_t row) {
    const int64_t bytes = row_bytes(task);
    const Operands of = {task.weight + expert * task.weight_stride + output * bytes, bytes, &task, expert, output,
                         rows.x + row * rows.x_bytes, rows.x_bytes, rows.scale + row * rows.x_scales, rows.x_scales};
    float sums[kOutputs][kRows];
    multiply<kFormat, kOutputs, kRows>(of, table, sums);
    for (int n = 0; n < kOutputs; n++) {
        const float scale = row_scale(task, expert, output + n);
        const float bias = task.bias ? from_bf16(task.bias[output + n]) : 0.0f;
        for (int r = 0; r < kRows; r++) {
            const float x_scale = task.is_block ? 1.0f : rows.scale[(row + r) * rows.x_scales];
            uint16_t* y = task.y + (rows.first + row + r) * task.outputs + output + n;
            *y = to_bf16(sums[n][r] * (x_scale * scale) + bias);
        }
    }
}

template <Format kFormat, int kOutputs>
INLINE void all_rows(const Task& task, const Rows& rows, const Table& table, int64_t expert, int64_t output) {
    int64_t row = 0;
    for (; row + 4 <= rows.count; row += 4) some_rows<kFormat, kOutputs, 4>(task, rows, table, expert, output, row);
    for (; row + 2 <= rows.count; row += 2) some_rows<kFormat, kOutputs, 2>(task, rows, table, expert, output, row);
    if (row < rows.count) some_rows<kFormat, kOutputs, 1>(task, rows, table, expert, output, row);
}

template <Format kFormat>
void run_rows(const Task& task, const Rows& rows, const Table& table, int64_t expert, Range outputs) {
    int64_t output = outputs.first;
    if (rows.count == 1) {  // one stream of memory is quicker than several
        for (; output < outputs.last; output++) some_rows<kFormat, 1, 1>(task, rows, table, expert, output, 0);
        return;
    }
    for (; output + 4 <= outputs.last; output += 4) all_rows<kFormat, 4>(task, rows, table, expert, output);
    for (; output < outputs.last; output++) all_rows<kFormat, 1>(task, rows, table, expert, output);
}

template <typename Function>
INLINE void by_format(const Task& task, Function&& function) {
    switch (task.format) {
        case kBf16: return function(Line<kBf16>{});
        case kInt4: return function(Line<kInt4>{});
        case kFp8: return function(Line<kFp8>{});
        default: return function(Line<kInt8>{});
    }
}

}  // namespace vectors
