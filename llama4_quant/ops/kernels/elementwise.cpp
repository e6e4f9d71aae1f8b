// What happens to activations between matrix products: norms, rotations, gates, sums. bf16 in and out, float32 between,
// and one pass over memory where torch makes one for every addition and conversion.
//
// Every intermediate result that torch would round to bf16 is rounded here too, and sums are not contracted into fused
// multiplications, so results are those of torch but for the order of a sum and the last bits of an exponential. Rows are
// shared among threads; each is computed by one.

#include <cmath>

#include "floats.h"

// Fields as in native_elementwise.py.
struct ElementwiseTask {
    const uint16_t* x;      // [rows, size]
    const uint16_t* other;  // rms_norm: weight [size], or null; silu_mul, add: [rows, size]
    const float* cosines;   // rotate: [positions, size / 2]; multiply: one factor
    const float* sines;
    uint16_t* y;  // [rows, size]; add: may be x or other
    int64_t rows, size;
    int64_t heads, positions;  // rotate: row r has position (r / heads) % positions
    double eps;                // rotate: negative for no norm
    int32_t threads;
};

namespace {

constexpr int64_t kPiece = 1024;  // elements that are taken through the first cache at a time

INLINE void decode(const uint16_t* __restrict from, int64_t count, float* __restrict to) {
    for (int64_t i = 0; i < count; i++) to[i] = from_bf16(from[i]);
}

INLINE void encode(const float* __restrict from, int64_t count, uint16_t* __restrict to) {
    for (int64_t i = 0; i < count; i++) to[i] = to_bf16(from[i]);
}

INLINE float sum_of_squares(const float* values, int64_t count) {
    Floats sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
        for (int64_t v = 0; v < 4; v++) {
            const Floats x = load(values + i + v * kLanes);
            sums[v] += x * x;
        }
    }
    const Floats sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float total = 0.0f;
    for (int64_t lane = 0; lane < kLanes; lane++) total += sum[lane];
    for (; i < count; i++) total += values[i] * values[i];
    return total;
}

INLINE float norm_factor(const uint16_t* x, int64_t size, float eps, float* piece) {
    float sum = 0.0f;
    for (int64_t start = 0; start < size; start += kPiece) {
        const int64_t count = at_most(kPiece, size - start);
        decode(x + start, count, piece);
        sum += sum_of_squares(piece, count);
    }
    return 1.0f / std::sqrt(sum / (float)size + eps);
}

// What is rounded to bf16, times numbers in bf16.
INLINE void multiply(const uint16_t* __restrict by, int64_t count, float* __restrict piece) {
    for (int64_t i = 0; i < count; i++) piece[i] = from_bf16(to_bf16(piece[i])) * from_bf16(by[i]);
}

// y[i] = x[i] * factor, rounded, and times weight[i] if there is a weight; y may be x.
INLINE void scale(const uint16_t* x, const uint16_t* weight, int64_t size, float factor, float* piece, uint16_t* y) {
    for (int64_t start = 0; start < size; start += kPiece) {
        const int64_t count = at_most(kPiece, size - start);
        decode(x + start, count, piece);
        for (int64_t i = 0; i < count; i++) piece[i] *= factor;
        if (weight) multiply(weight + start, count, piece);
        encode(piece, count, y + start);
    }
}

INLINE void rms_norm_row(const ElementwiseTask& task, int64_t row, float* piece) {
    const uint16_t* x = task.x + row * task.size;
    const float factor = norm_factor(x, task.size, (float)task.eps, piece);
    scale(x, task.other, task.size, factor, piece, task.y + row * task.size);
}

INLINE void rotate_pairs(
    const uint16_t* __restrict x, const float* __restrict cosines, const float* __restrict sines, int64_t pairs,
    uint16_t* __restrict y
) {
    for (int64_t i = 0; i < pairs; i++) {
        const float even = from_bf16(x[2 * i]), odd = from_bf16(x[2 * i + 1]);
        y[2 * i] = to_bf16(even * cosines[i] - odd * sines[i]);
        y[2 * i + 1] = to_bf16(even * sines[i] + odd * cosines[i]);
    }
}

INLINE void rotate_row(const ElementwiseTask& task, int64_t row, float* piece) {
    const int64_t size = task.size, pairs = size / 2, position = row / task.heads % task.positions;
    uint16_t* y = task.y + row * size;
    rotate_pairs(task.x + row * size, task.cosines + position * pairs, task.sines + position * pairs, pairs, y);
    if (task.eps >= 0) scale(y, nullptr, size, norm_factor(y, size, (float)task.eps, piece), piece, y);
}

INLINE void silu_mul_row(const ElementwiseTask& task, int64_t row, float* piece) {
    for (int64_t start = row * task.size, end = start + task.size; start < end; start += kPiece) {
        const int64_t count = at_most(kPiece, end - start);
        decode(task.x + start, count, piece);
        for (int64_t i = count; i < round_up(count, kLanes); i++) piece[i] = 0.0f;
        for (int64_t i = 0; i < round_up(count, kLanes); i += kLanes) {
            const Floats x = load(piece + i), minus = x < 0.0f ? x : -x, e = exponential(minus);
            store((x < 0.0f ? x * e : x) / (1.0f + e), piece + i);
        }
        multiply(task.other + start, count, piece);
        encode(piece, count, task.y + start);
    }
}

INLINE void add_row(const ElementwiseTask& task, int64_t row, float*) {
    for (int64_t i = row * task.size; i < (row + 1) * task.size; i++)
        task.y[i] = to_bf16(from_bf16(task.x[i]) + from_bf16(task.other[i]));
}

INLINE void multiply_row(const ElementwiseTask& task, int64_t row, float*) {
    for (int64_t i = row * task.size; i < (row + 1) * task.size; i++)
        task.y[i] = to_bf16(from_bf16(task.x[i]) * task.cosines[0]);
}

// Always 0: done.
template <void (*kRow)(const ElementwiseTask&, int64_t, float*)>
INLINE int32_t for_rows(const ElementwiseTask& task) {
    if (task.threads == 1) {
        float piece[kPiece];
        for (int64_t row = 0; row < task.rows; row++) kRow(task, row, piece);
        return 0;
    }
#pragma omp parallel num_threads(task.threads)
    {
        float piece[kPiece];
#pragma omp for schedule(static)
        for (int64_t row = 0; row < task.rows; row++) kRow(task, row, piece);
    }
    return 0;
}

}  // namespace

extern "C" int32_t llama4_quant_rms_norm(const ElementwiseTask* task) { return for_rows<rms_norm_row>(*task); }
extern "C" int32_t llama4_quant_rotate(const ElementwiseTask* task) { return for_rows<rotate_row>(*task); }
extern "C" int32_t llama4_quant_silu_mul(const ElementwiseTask* task) { return for_rows<silu_mul_row>(*task); }
extern "C" int32_t llama4_quant_add(const ElementwiseTask* task) { return for_rows<add_row>(*task); }
extern "C" int32_t llama4_quant_multiply(const ElementwiseTask* task) { return for_rows<multiply_row>(*task); }
