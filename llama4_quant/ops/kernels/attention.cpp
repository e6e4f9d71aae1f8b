// Attention of one query per head to keys and values that lie in a cache as they are stored: bf16, FP8 or int8.
//
// Heads that share keys are computed together, so every byte of the cache is read and decoded once. Columns are taken in
// tiles: keys become float32, in the first cache, and are multiplied with all queries; then values. A softmax that does
// not know all its scores yet keeps the largest so far and rescales (Milakov and Gimelshein 2018, arXiv 1805.02867).
// Columns are also split into parts of a fixed size, which threads share, and which are put together in order: results do
// not depend on the number of threads.

#include <cmath>
#include <utility>

#include <omp.h>

#include "floats.h"

// Fields as in native_attention.py. Strides of codes are in bytes, others in elements.
struct AttentionTask {
    const uint16_t* queries;       // bf16 [rows, groups, heads, dim]
    const uint8_t* keys;           // [rows, groups, columns, dim]
    const uint8_t* values;         // likewise
    const uint16_t* key_scales;    // bf16 [rows, groups, columns], or null
    const uint16_t* value_scales;  // likewise
    const float* bias;             // [rows, columns], or null
    float* outputs;                // [rows, groups, heads, dim]
    float* log_sums;               // [rows, groups, heads]
    float* parts;                  // [rows * groups, parts, heads * (dim + 2)]
    float* scratch;                // [threads, scratch_size]
    int64_t rows, groups, heads, dim, columns;
    int64_t key_row_stride, key_group_stride;      // of values too
    int64_t scale_row_stride, scale_group_stride;  // of value_scales too
    int64_t bias_stride;
    int32_t format, threads;
    float key_scale, value_scale;  // of all; key_scale has the softmax's 1 / sqrt(dim) in it
};

namespace {

constexpr int64_t kTile = 32;    // columns decoded at a time
constexpr int64_t kPart = 1024;  // columns of a part

// Of each kWidth lanes of two vectors the first (or second) half.
template <int kWidth, bool kSecond, int... kIndex>
INLINE Floats halves(Floats a, Floats b, std::integer_sequence<int, kIndex...>) {
    return __builtin_shufflevector(
        a, b, (kIndex / (kWidth / 2) * kWidth + kIndex % (kWidth / 2) + (kSecond ? kWidth / 2 : 0))...);
}

// Sums in kWidth lanes become sums in half as many; those of `a` come first.
template <int kWidth>
INLINE Floats folded(Floats a, Floats b) {
    using Lanes = std::make_integer_sequence<int, (int)kLanes>;
    return halves<kWidth, false>(a, b, Lanes()) + halves<kWidth, true>(a, b, Lanes());
}

// The sum of the lanes of each of kLanes vectors.
template <int kWidth, int kCount>
INLINE Floats totals(const Floats* vectors) {
    Floats half[kCount / 2];
    for (int i = 0; i < kCount / 2; i++) half[i] = folded<kWidth>(vectors[2 * i], vectors[2 * i + 1]);
    if constexpr (kCount == 2) return half[0];
    else return totals<kWidth / 2, kCount / 2>(half);
}

// `count` codes as float32. bf16 is the upper half of a float32. FP8: sign, exponent and mantissa move to where float32 has
// them, 2^120 times too small. Plain loops: compilers make vectors of these, and poor ones of conversions of vectors.
template <Format kFormat>
INLINE void decode(const uint8_t* __restrict from, int64_t count, float* __restrict to) {
    uint32_t* words = (uint32_t*)to;  // sources are compiled with -fno-strict-aliasing
    if constexpr (kFormat == kBf16) {
        for (int64_t i = 0; i < count; i++) words[i] = (uint32_t)((const uint16_t*)from)[i] << 16;
    } else if constexpr (kFormat == kFp8) {
        for (int64_t i = 0; i < count; i++) {
            const uint32_t code = from[i];
            words[i] = (code & 0x80) << 24 | (code & 0x7F) << 20;
        }
        for (int64_t i = 0; i < count; i++) to[i] *= 0x1p120f;
    } else {
        for (int64_t i = 0; i < count; i++) to[i] = (float)((const int8_t*)from)[i];
    }
}

template <Format kFormat>
INLINE void decode_tile(const uint8_t* from, int64_t columns, int64_t dim, float* to) {
    decode<kFormat>(from, columns * dim, to);
    for (int64_t i = columns * dim; i < kTile * dim; i++) to[i] = 0.0f;
}

// scores[h, j] = query h times key j, for all columns of a tile.
INLINE void multiply_keys(const float* queries, const float* keys, int64_t heads, int64_t dim, float* scores) {
    for (int64_t j = 0; j < kTile; j += kLanes) {
        for (int64_t h = 0; h < heads; h++) {
            Floats sums[kLanes] = {};
            for (int64_t d = 0; d < dim; d += kLanes) {
                const Floats query = load(queries + h * dim + d);
                for (int64_t c = 0; c < kLanes; c++) sums[c] += query * load(keys + (j + c) * dim + d);
            }
            store(totals<kLanes, kLanes>(sums), scores + h * kTile + j);
        }
    }
}

// output[d] += sum over j of weights[j] * values[j, d], from d = start, for kVectors vectors at a time; where it ended.
template <int kVectors>
INLINE int64_t add_values(const float* weights, const float* values, int64_t dim, int64_t start, float* output) {
    int64_t d = start;
    for (; d + kVectors * kLanes <= dim; d += kVectors * kLanes) {
        Floats sums[kVectors];
        for (int v = 0; v < kVectors; v++) sums[v] = load(output + d + v * kLanes);
        for (int64_t j = 0; j < kTile; j++) {
            const Floats weight = Floats{} + weights[j];
            for (int v = 0; v < kVectors; v++) sums[v] += weight * load(values + j * dim + d + v * kLanes);
        }
        for (int v = 0; v < kVectors; v++) store(sums[v], output + d + v * kLanes);
    }
    return d;
}

// Scores of a head's tile become weights e^(score - largest); what was summed before is rescaled.
INLINE void weigh(float* scores, int64_t dim, float* output, float* largest, float* sum) {
    float most = *largest;
    for (int64_t j = 0; j < kTile; j++) most = scores[j] > most ? scores[j] : most;
    Floats added = {};
    for (int64_t j = 0; j < kTile; j += kLanes) {
        const Floats weight = exponential(load(scores + j) - most);
        added += weight;
        store(weight, scores + j);
    }
    if (most != *largest) {
        const float factor = std::exp(*largest - most);
        for (int64_t d = 0; d < dim; d++) output[d] *= factor;
        *sum *= factor;
        *largest = most;
    }
    for (int64_t lane = 0; lane < kLanes; lane++) *sum += added[lane];
}

INLINE int64_t scratch_size(const AttentionTask& task) {
    return kTile * task.dim + task.heads * (task.dim + kTile);
}

// One part of the columns of one group: for each head its output, not yet divided by its sum; then largest scores, sums.
template <Format kFormat>
void attend_part(const AttentionTask& task, int64_t row, int64_t group, int64_t part, float* result, float* scratch) {
    const int64_t heads = task.heads, dim = task.dim, code_bytes = kFormat == kBf16 ? 2 : 1;
    float *tile = scratch, *queries = tile + kTile * dim, *scores = queries + heads * dim;
    float *largest = result + heads * dim, *sums = largest + heads;
    decode<kBf16>((const uint8_t*)(task.queries + (row * task.groups + group) * heads * dim), heads * dim, queries);
    for (int64_t i = 0; i < heads * dim; i++) queries[i] *= task.key_scale;
    for (int64_t i = 0; i < heads * dim; i++) result[i] = 0.0f;
    for (int64_t h = 0; h < heads; h++) largest[h] = -INFINITY, sums[h] = 0.0f;
    const int64_t codes = row * task.key_row_stride + group * task.key_group_stride;
    const int64_t scales = row * task.scale_row_stride + group * task.scale_group_stride;
    const int64_t stop = at_most((part + 1) * kPart, task.columns);
    for (int64_t column = part * kPart; column < stop; column += kTile) {
        const int64_t count = at_most(kTile, stop - column);
        decode_tile<kFormat>(task.keys + codes + column * dim * code_bytes, count, dim, tile);
        multiply_keys(queries, tile, heads, dim, scores);
        for (int64_t h = 0; h < heads; h++) {
            float* own = scores + h * kTile;
            if (task.key_scales) {
                for (int64_t j = 0; j < count; j++) own[j] *= from_bf16(task.key_scales[scales + column + j]);
            }
            if (task.bias) {
                for (int64_t j = 0; j < count; j++) own[j] += task.bias[row * task.bias_stride + column + j];
            }
            for (int64_t j = count; j < kTile; j++) own[j] = -INFINITY;
            weigh(own, dim, result + h * dim, largest + h, sums + h);
            if (task.value_scales) {
                for (int64_t j = 0; j < count; j++) own[j] *= from_bf16(task.value_scales[scales + column + j]);
            }
        }
        decode_tile<kFormat>(task.values + codes + column * dim * code_bytes, count, dim, tile);
        for (int64_t h = 0; h < heads; h++) {
            const float* weights = scores + h * kTile;
            int64_t d = add_values<8>(weights, tile, dim, 0, result + h * dim);
            d = add_values<4>(weights, tile, dim, d, result + h * dim);
            add_values<1>(weights, tile, dim, d, result + h * dim);
        }
    }
}

// The parts of one head, put together in order.
INLINE void merge(const AttentionTask& task, int64_t pair, int64_t num_parts, int64_t head) {
    const int64_t heads = task.heads, dim = task.dim, size = heads * (dim + 2);
    const float* parts = task.parts + pair * num_parts * size;
    float* output = task.outputs + (pair * heads + head) * dim;
    float most = -INFINITY, sum = 0.0f;
    for (int64_t p = 0; p < num_parts; p++) {
        const float largest = parts[p * size + heads * dim + head];
        most = largest > most ? largest : most;
    }
    for (int64_t d = 0; d < dim; d++) output[d] = 0.0f;
    for (int64_t p = 0; p < num_parts; p++) {
        const float* part = parts + p * size;
        const float factor = std::exp(part[heads * dim + head] - most);
        sum += factor * part[heads * (dim + 1) + head];
        for (int64_t d = 0; d < dim; d++) output[d] += factor * part[head * dim + d];
    }
    for (int64_t d = 0; d < dim; d++) output[d] *= task.value_scale / sum;
    task.log_sums[pair * heads + head] = most + std::log(sum);
}

template <Format kFormat>
void attend(const AttentionTask& task) {
    const int64_t num_parts = (task.columns + kPart - 1) / kPart, pairs = task.rows * task.groups;
    const int64_t part_size = task.heads * (task.dim + 2);
#pragma omp parallel num_threads(task.threads)
    {
        float* scratch = task.scratch + omp_get_thread_num() * scratch_size(task);
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < pairs * num_parts; unit++) {
            const int64_t pair = unit / num_parts;
            float* result = task.parts + unit * part_size;
            attend_part<kFormat>(task, pair / task.groups, pair % task.groups, unit % num_parts, result, scratch);
        }
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < pairs * task.heads; unit++) {
            merge(task, unit / task.heads, num_parts, unit % task.heads);
        }
    }
}

}  // namespace

extern "C" void llama4_quant_attention(const AttentionTask* task) {
    switch (task->format) {
        case kBf16: return attend<kBf16>(*task);
        case kFp8: return attend<kFp8>(*task);
        default: return attend<kInt8>(*task);
    }
}

// What the caller allocates: floats of `parts` for one pair of row and group, and of `scratch` for one thread.
extern "C" int64_t llama4_quant_attention_part_floats(const AttentionTask* task) {
    return (task->columns + kPart - 1) / kPart * task->heads * (task->dim + 2);
}

extern "C" int64_t llama4_quant_attention_scratch_floats(const AttentionTask* task) { return scratch_size(*task); }
