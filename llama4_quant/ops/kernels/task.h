// What one call of the kernels does, and the parts of it that do not depend on the processor.
//
// y[r, n] = sum over k of x[r, k] * weight[e, n, k] + bias[n], where row r belongs to expert e: rows come sorted by
// expert. A plain linear layer is one expert. Weights are read where they lie, as they are stored.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER

namespace {

enum Format : int32_t { kBf16, kInt4, kFp8, kInt8 };
enum Scales : int32_t { kNone, kBf16Scale, kFloatScale };

constexpr int64_t kBlock = 128;  // rows and columns of an FP8 block
constexpr int64_t kLine = 64;    // bytes of a cache line

}  // namespace

// Fields as in native.py.
struct Task {
    const uint16_t* x;      // bf16 [rows, inputs]
    const int64_t* counts;  // [experts] rows of each expert
    const uint8_t* weight;  // [experts, outputs, bytes of a row]
    const uint8_t* scale;   // [experts, outputs or blocks of outputs, groups]
    const uint16_t* bias;   // bf16 [outputs], or null
    uint16_t* y;            // bf16 [rows, outputs]
    int64_t rows, experts, outputs, inputs;
    int64_t weight_stride, scale_stride;  // bytes from one expert to the next
    int64_t groups;                       // scales of a row
    int32_t format, scale_type;
    int32_t is_block;  // a scale covers 128 outputs too, and activations have one scale for 128 inputs
    int32_t threads;
};

namespace {

template <typename To, typename From>
INLINE To bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

INLINE int64_t at_most(int64_t value, int64_t limit) { return value < limit ? value : limit; }
INLINE int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

INLINE float from_bf16(uint16_t word) { return bits<float>((uint32_t)word << 16); }

INLINE uint16_t to_bf16(float value) {  // to nearest, ties to even; a NaN stays one
    const uint32_t word = bits<uint32_t>(value), nearest = (word + 0x7FFF + ((word >> 16) & 1)) >> 16;
    return (uint16_t)((word & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : nearest);  // no branch: loops become vectors
}

INLINE float from_e4m3(uint8_t code) {
    const uint32_t magnitude = code & 0x7Fu, sign = (uint32_t)(code & 0x80) << 24;
    const uint32_t normal = (magnitude << 20) + (120u << 23), subnormal = bits<uint32_t>((float)magnitude * 0x1p-9f);
    const uint32_t number = magnitude < 8 ? subnormal : normal;
    return bits<float>((magnitude == 0x7F ? 0x7FC00000u : number) | sign);
}

INLINE int64_t row_bytes(const Task& task) {
    switch (task.format) {
        case kBf16: return 2 * task.inputs;
        case kInt4: return (task.inputs + 7) / 8 * 4;
        default: return task.inputs;
    }
}

INLINE float scale_at(const Task& task, int64_t expert, int64_t index) {
    const uint8_t* scales = task.scale + expert * task.scale_stride;
    if (task.scale_type == kBf16Scale) return from_bf16(((const uint16_t*)scales)[index]);
    return ((const float*)scales)[index];
}

// The scale that covers all of a row; 1 if there are several, which are applied group by group.
INLINE float row_scale(const Task& task, int64_t expert, int64_t row) {
    return task.scale_type == kNone || task.groups != 1 || task.is_block ? 1.0f : scale_at(task, expert, row);
}

INLINE bool has_groups(const Task& task) { return task.is_block || (task.scale_type != kNone && task.groups > 1); }

// Weights that share a scale, or what is taken in one go where a scale covers all of a row.
INLINE int64_t segment_size(const Task& task) {
    const int64_t size = has_groups(task) ? task.inputs / task.groups : kBlock;
    return at_most(size, kBlock);
}

INLINE float group_scale(const Task& task, int64_t expert, int64_t row, int64_t k) {
    if (!has_groups(task)) return 1.0f;
    const int64_t line = task.is_block ? row / kBlock : row, size = task.is_block ? kBlock : task.inputs / task.groups;
    return scale_at(task, expert, line * task.groups + k / size);
}

template <typename Element>
INLINE Element* allocate(int64_t count) {
    return (Element*)std::aligned_alloc(kLine, round_up(count * sizeof(Element) + 1, kLine));
}

// The outputs of one thread, in whole units; every thread of a call gets its own.
struct Range {
    int64_t first, last;
};

INLINE Range share(int64_t size, int64_t unit, int64_t thread, int64_t threads) {
    const int64_t units = (size + unit - 1) / unit;
    return {at_most(units * thread / threads * unit, size), at_most(units * (thread + 1) / threads * unit, size)};
}

}  // namespace
