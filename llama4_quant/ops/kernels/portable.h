// Matrix product for any processor: weights become float32 a segment at a time, and are multiplied with float32
// activations by vectors of the compiler's own extension (GCC and Clang).
//
// A segment is the weights of a row that share a scale, at most 128: their partial sum is scaled, not each of them.

#pragma once

#include "activations.h"
#include "floats.h"

namespace portable {

constexpr const char* kInstructions = kLanes == 16 ? "portable, vectors of 16 floats" : "portable, vectors of 8 floats";
constexpr int64_t kPad = 16;   // activations are followed by zeros up to a multiple of this
constexpr int64_t kRows = 16;  // outputs at a time

typedef float Eight __attribute__((vector_size(32)));
typedef uint32_t EightWords __attribute__((vector_size(32)));

INLINE void decode_int4(const uint8_t* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += 8) {
        uint32_t word;
        std::memcpy(&word, from + i / 2, 4);
        const EightWords nibbles = (EightWords{} + word) >> EightWords{0, 4, 8, 12, 16, 20, 24, 28} & 15;
        // A nibble under the mantissa of 2^23 is 2^23 + nibble.
        const Eight values = bits<Eight>(nibbles | 0x4B000000u) - (0x1p23f + 8.0f);
        std::memcpy(to + i, &values, sizeof values);
    }
}

template <Format kFormat>
INLINE void decode(const uint8_t* row, int64_t k, int64_t count, float* to) {
    if (kFormat == kInt4) decode_int4(row + k / 2, count, to);
    for (int64_t i = 0; i < count; i++) {
        if (kFormat == kBf16) to[i] = from_bf16(((const uint16_t*)row)[k + i]);
        if (kFormat == kFp8) to[i] = from_e4m3(row[k + i]);
        if (kFormat == kInt8) to[i] = (float)(int8_t)row[k + i];
    }
    for (int64_t i = count; i < round_up(count, kPad); i++) to[i] = 0.0f;
}

INLINE Floats dot(const float* a, const float* b, int64_t count) {
    Floats even = {}, odd = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
        even += load(a + i) * load(b + i);
        odd += load(a + i + kLanes) * load(b + i + kLanes);
    }
    for (; i < count; i += kLanes) even += load(a + i) * load(b + i);
    return even + odd;
}

INLINE float total(Floats values) {
    float lanes[kLanes];
    std::memcpy(lanes, &values, sizeof lanes);
    for (int64_t size = kLanes / 2; size; size /= 2) {
        for (int64_t i = 0; i < size; i++) lanes[i] += lanes[i + size];
    }
    return lanes[0];
}

// Activations in float32 and, for FP8 weights, their scales.
struct Inputs {
    float* x;        // [rows, width]
    float* scale;    // [rows, scales]
    int64_t width, scales;
};

INLINE void prepare_row(const Task& task, const Inputs& inputs, int64_t row) {
    const uint16_t* from = task.x + row * task.inputs;
    float *x = inputs.x + row * inputs.width, *scale = inputs.scale + row * inputs.scales;
    const int64_t size = task.is_block ? kBlock : task.inputs;
    uint16_t codes[kBlock];
    if (task.format == kFp8 && task.is_block) {
        for (int64_t k = 0; k < task.inputs; k += size) {
            scale[k / size] = round_activations(from + k, size, codes);
            for (int64_t i = 0; i < size; i++) x[k + i] = from_bf16(codes[i]);
        }
    } else if (task.format == kFp8) {
        uint16_t* words = (uint16_t*)x + inputs.width;  // the second half, which is overwritten last
        scale[0] = round_activations(from, size, words);
        for (int64_t k = 0; k < size; k++) x[k] = from_bf16(words[k]);
    } else {
        scale[0] = 1.0f;
        for (int64_t k = 0; k < task.inputs; k++) x[k] = from_bf16(from[k]);
    }
    for (int64_t k = task.inputs; k < inputs.width; k++) x[k] = 0.0f;
}

struct Scratch {
    float* weights;  // [kRows, kBlock]
    Floats* sums;    // [rows of an expert, kRows]
};

template <Format kFormat>
void multiply_rows(const Task& task, const Inputs& inputs, const Scratch& scratch, int64_t expert, Range rows,
                   Range outputs) {
    const int64_t count = outputs.last - outputs.first, size = segment_size(task), bytes = row_bytes(task);
    const uint8_t* weight = task.weight + expert * task.weight_stride;
    std::memset((void*)scratch.sums, 0, (rows.last - rows.first) * kRows * sizeof(Floats));
    for (int64_t k = 0; k < task.inputs; k += size) {
        const int64_t columns = at_most(task.inputs - k, size), padded = round_up(columns, kLanes);
        float scales[kRows];
        for (int64_t n = 0; n < count; n++) {
            const int64_t row = outputs.first + n;
            decode<kFormat>(weight + row * bytes, k, columns, scratch.weights + n * kBlock);
            scales[n] = group_scale(task, expert, row, k);
        }
        for (int64_t r = rows.first; r < rows.last; r++) {
            const float* x = inputs.x + r * inputs.width + k;
            const float scale = task.is_block ? inputs.scale[r * inputs.scales + k / kBlock] : 1.0f;
            Floats* sums = scratch.sums + (r - rows.first) * kRows;
            for (int64_t n = 0; n < count; n++) {
                sums[n] += dot(x, scratch.weights + n * kBlock, padded) * (scales[n] * scale);
            }
        }
    }
    for (int64_t r = rows.first; r < rows.last; r++) {
        const float scale = task.is_block ? 1.0f : inputs.scale[r * inputs.scales];
        for (int64_t n = 0; n < count; n++) {
            const int64_t row = outputs.first + n;
            const float sum = total(scratch.sums[(r - rows.first) * kRows + n]);
            const float bias = task.bias ? from_bf16(task.bias[row]) : 0.0f;
            task.y[r * task.outputs + row] = to_bf16(sum * (scale * row_scale(task, expert, row)) + bias);
        }
    }
}

INLINE void multiply(const Task& task, const Inputs& inputs, const Scratch& scratch, int64_t expert, Range rows,
                     Range outputs) {
    switch (task.format) {
        case kBf16: return multiply_rows<kBf16>(task, inputs, scratch, expert, rows, outputs);
        case kInt4: return multiply_rows<kInt4>(task, inputs, scratch, expert, rows, outputs);
        case kFp8: return multiply_rows<kFp8>(task, inputs, scratch, expert, rows, outputs);
        default: return multiply_rows<kInt8>(task, inputs, scratch, expert, rows, outputs);
    }
}

INLINE int64_t most_rows(const Task& task) {
    int64_t most = 0;
    for (int64_t expert = 0; expert < task.experts; expert++) {
        most = task.counts[expert] > most ? task.counts[expert] : most;
    }
    return most;
}

// 0: done; 1: out of memory.
int32_t run(const Task& task) {
    const int64_t width = round_up(task.inputs, kPad), scales = task.is_block ? task.groups : 1;
    const int64_t of_thread = kRows * kBlock + most_rows(task) * kRows * kLanes;
    float* memory = allocate<float>(task.rows * (width + round_up(scales, kPad)) + task.threads * of_thread);
    if (!memory) return 1;
    float* scratch = memory + task.rows * width;
    const Inputs inputs = {memory, scratch + task.threads * of_thread, width, scales};
#pragma omp parallel for num_threads(task.threads) schedule(static)
    for (int64_t r = 0; r < task.rows; r++) prepare_row(task, inputs, r);
#pragma omp parallel for num_threads(task.threads) schedule(static)
    for (int64_t thread = 0; thread < task.threads; thread++) {
        float* mine = scratch + thread * of_thread;
        const Range outputs = share(task.outputs, kRows, thread, task.threads);
        for (int64_t expert = 0, first = 0; expert < task.experts; first += task.counts[expert++]) {
            if (!task.counts[expert]) continue;
            const Range rows = {first, first + task.counts[expert]};
            for (int64_t n = outputs.first; n < outputs.last; n += kRows) {
                const Range some = {n, at_most(n + kRows, outputs.last)};
                multiply(task, inputs, {mine, (Floats*)(mine + kRows * kBlock)}, expert, rows, some);
            }
        }
    }
    std::free(memory);
    return 0;
}

}  // namespace portable
