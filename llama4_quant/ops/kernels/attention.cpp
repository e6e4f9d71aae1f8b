// Attention of one query per head to keys and values that lie in a cache as they are stored: bf16, FP8 or int8.
//
// Heads that share keys are computed together, so every byte of the cache is read and decoded once. Columns are split into
// parts of a fixed size, which threads share, and which are put together in order: results do not depend on the number of
// threads. The matrix unit computes a part in attention_tiles.h. Other processors take columns in tiles: keys become
// float32, in the first cache, and are multiplied with all queries; then values. A softmax that does not know all its
// scores yet keeps the largest so far and rescales (Milakov and Gimelshein 2018, arXiv 1805.02867).

#include <omp.h>

#include <cmath>
#include <utility>

#include "activations.h"
#include "floats.h"
#include "matrix_unit.h"

#ifdef LLAMA4_QUANT_TILES
#include "attention_tiles.h"
#endif

// Fields as in native_attention.py. Consecutive columns that lie together; strides of codes are in bytes, others in elements.
struct Piece {
    const uint8_t* keys;           // [rows, groups, columns, dim]
    const uint8_t* values;         // likewise
    const uint16_t* key_scales;    // bf16 [rows, groups, columns], or null
    const uint16_t* value_scales;  // likewise
    int64_t columns, first;        // first: of the bias
    int64_t row_stride, group_stride;              // of keys and of values
    int64_t scale_row_stride, scale_group_stride;  // of both scales
};

// One token's keys and values, into a cache: as `CacheFormat.encode` of runtime/cache_formats.py has it, bit for bit.
struct StoreTask {
    const uint16_t* keys;    // bf16 [groups, dim]
    const uint16_t* values;  // likewise
    uint8_t* key_codes;      // of the first group
    uint8_t* value_codes;
    uint16_t* key_scales;  // bf16, or null
    uint16_t* value_scales;
    int64_t groups, dim;
    int64_t group_stride;        // bytes from one group's codes to the next's
    int64_t scale_group_stride;  // elements
    int32_t format;
    float key_scale, value_scale;  // where tokens have none of their own
};

struct AttentionTask {
    const uint16_t* queries;  // bf16 [rows, groups, heads, dim]
    const Piece* pieces;
    const float* bias;  // [rows, all columns], or null
    uint16_t* outputs;  // bf16 [rows, groups, heads, dim]
    int64_t rows, groups, heads, dim, num_pieces, bias_stride;
    int32_t format, threads;
    float key_scale, value_scale;  // of all; key_scale has the softmax's 1 / sqrt(dim) in it
};

namespace {

constexpr int64_t kTile = 32;    // columns decoded at a time
constexpr int64_t kPart = 1024;  // columns of a part
constexpr int64_t kAlone = 1 << 17;  // elements of keys below which one thread is quicker than waking another

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

// Columns [start, stop) of a piece, of one group of one row.
struct Part {
    const Piece* piece;
    int64_t row, group, start, stop;
};

template <Format kFormat>
INLINE int64_t scratch_size(const AttentionTask& task) {
#ifdef LLAMA4_QUANT_TILES
    if (tiles::allowed()) return attention_tiles::scratch_bytes<kFormat>(kPart, task.heads, task.dim) / 4;
#endif
    return kTile * task.dim + task.heads * (task.dim + kTile);
}

#ifdef LLAMA4_QUANT_TILES
// The keys of the part after this one.
INLINE const uint8_t* keys_after(const AttentionTask& task, const Part& part, int64_t column_bytes) {
    const Piece& piece = *part.piece;
    const bool is_last = part.piece == task.pieces + task.num_pieces - 1;
    if (part.stop < piece.columns) {
        return piece.keys + part.row * piece.row_stride + part.group * piece.group_stride + part.stop * column_bytes;
    }
    const int64_t pair = part.row * task.groups + part.group + (is_last ? 1 : 0);
    const Piece& after = is_last ? *task.pieces : part.piece[1];
    return after.keys + pair / task.groups * after.row_stride + pair % task.groups * after.group_stride;
}

template <Format kFormat>
void attend_in_tiles(const AttentionTask& task, const Part& part, float* result, float* scratch) {
    const Piece& piece = *part.piece;
    const int64_t heads = task.heads, dim = task.dim, column_bytes = dim * (kFormat == kBf16 ? 2 : 1);
    const int64_t codes = part.row * piece.row_stride + part.group * piece.group_stride + part.start * column_bytes;
    const int64_t scales = part.row * piece.scale_row_stride + part.group * piece.scale_group_stride + part.start;
    const attention_tiles::Part own = {
        piece.keys + codes,
        piece.values + codes,
        piece.key_scales ? piece.key_scales + scales : nullptr,
        piece.value_scales ? piece.value_scales + scales : nullptr,
        task.bias ? task.bias + part.row * task.bias_stride + piece.first + part.start : nullptr,
        keys_after(task, part, column_bytes),
        part.stop - part.start,
        dim,
        task.key_scale,
    };
    const uint16_t* queries = task.queries + (part.row * task.groups + part.group) * heads * dim;
    float *largest = result + heads * dim, *sums = largest + heads;
    for (int64_t h = 0; h < heads; h += tiles::kSide) {
        const attention_tiles::Result of_some = {result + h * dim, largest + h, sums + h};
        const int64_t count = at_most(heads - h, tiles::kSide);
        attention_tiles::attend<kFormat>(own, queries + h * dim, count, (uint8_t*)scratch, of_some);
    }
}
#endif

// For each head of a part its output, not yet divided by its sum; then largest scores, then sums.
template <Format kFormat>
void attend_part(const AttentionTask& task, const Part& part, float* result, float* scratch) {
#ifdef LLAMA4_QUANT_TILES
    if (tiles::allowed()) return attend_in_tiles<kFormat>(task, part, result, scratch);
#endif
    const Piece& piece = *part.piece;
    const int64_t heads = task.heads, dim = task.dim, code_bytes = kFormat == kBf16 ? 2 : 1;
    float *tile = scratch, *queries = tile + kTile * dim, *scores = queries + heads * dim;
    float *largest = result + heads * dim, *sums = largest + heads;
    decode<kBf16>((const uint8_t*)(task.queries + (part.row * task.groups + part.group) * heads * dim), heads * dim, queries);
    for (int64_t i = 0; i < heads * dim; i++) queries[i] *= task.key_scale;
    for (int64_t i = 0; i < heads * dim; i++) result[i] = 0.0f;
    for (int64_t h = 0; h < heads; h++) largest[h] = -INFINITY, sums[h] = 0.0f;
    const int64_t codes = part.row * piece.row_stride + part.group * piece.group_stride;
    const int64_t scales = part.row * piece.scale_row_stride + part.group * piece.scale_group_stride;
    const float* bias = task.bias ? task.bias + part.row * task.bias_stride + piece.first : nullptr;
    for (int64_t column = part.start; column < part.stop; column += kTile) {
        const int64_t count = at_most(kTile, part.stop - column);
        decode_tile<kFormat>(piece.keys + codes + column * dim * code_bytes, count, dim, tile);
        multiply_keys(queries, tile, heads, dim, scores);
        for (int64_t h = 0; h < heads; h++) {
            float* own = scores + h * kTile;
            if (piece.key_scales) {
                for (int64_t j = 0; j < count; j++) own[j] *= from_bf16(piece.key_scales[scales + column + j]);
            }
            if (bias) {
                for (int64_t j = 0; j < count; j++) own[j] += bias[column + j];
            }
            for (int64_t j = count; j < kTile; j++) own[j] = -INFINITY;
            weigh(own, dim, result + h * dim, largest + h, sums + h);
            if (piece.value_scales) {
                for (int64_t j = 0; j < count; j++) own[j] *= from_bf16(piece.value_scales[scales + column + j]);
            }
        }
        decode_tile<kFormat>(piece.values + codes + column * dim * code_bytes, count, dim, tile);
        for (int64_t h = 0; h < heads; h++) {
            const float* weights = scores + h * kTile;
            int64_t d = add_values<8>(weights, tile, dim, 0, result + h * dim);
            d = add_values<4>(weights, tile, dim, d, result + h * dim);
            add_values<1>(weights, tile, dim, d, result + h * dim);
        }
    }
}

// The parts of one head, put together in order, in the place of the first of them.
INLINE void merge(const AttentionTask& task, float* parts, int64_t pair, int64_t num_parts, int64_t head) {
    const int64_t heads = task.heads, dim = task.dim, size = heads * (dim + 2);
    parts += pair * num_parts * size;
    float *output = parts + head * dim, most = -INFINITY, sum = 0.0f;
    for (int64_t p = 0; p < num_parts; p++) {
        const float largest = parts[p * size + heads * dim + head];
        most = largest > most ? largest : most;
    }
    for (int64_t p = 0; p < num_parts; p++) {
        const float* part = parts + p * size;
        const float factor = std::exp(part[heads * dim + head] - most);
        sum += factor * part[heads * (dim + 1) + head];
        for (int64_t d = 0; d < dim; d++) output[d] = (p ? output[d] : 0.0f) + factor * part[head * dim + d];
    }
    uint16_t* to = task.outputs + (pair * heads + head) * dim;
    for (int64_t d = 0; d < dim; d++) to[d] = to_bf16(output[d] * (task.value_scale / sum));
}

INLINE int64_t parts_of(const Piece& piece) { return (piece.columns + kPart - 1) / kPart; }

// Part `number` of all parts of all pieces.
INLINE Part find(const AttentionTask& task, int64_t pair, int64_t number) {
    const Piece* piece = task.pieces;
    while (number >= parts_of(*piece)) number -= parts_of(*piece++);
    const int64_t start = number * kPart;
    return {piece, pair / task.groups, pair % task.groups, start, at_most(start + kPart, piece->columns)};
}

// 0: done; 1: out of memory.
template <Format kFormat>
int32_t attend(const AttentionTask& task) {
    int64_t num_parts = 0, columns = 0;
    for (int64_t p = 0; p < task.num_pieces; p++) {
        num_parts += parts_of(task.pieces[p]);
        columns += task.pieces[p].columns;
    }
    const int64_t pairs = task.rows * task.groups, part_size = task.heads * (task.dim + 2);
    const int32_t threads = pairs * columns * task.dim < kAlone ? 1 : task.threads;
    const int64_t of_thread = round_up(scratch_size<kFormat>(task), kLine);
    float* parts = allocate<float>(pairs * num_parts * part_size + threads * of_thread + kLine);
    if (!parts) return 1;
    float* scratch = parts + round_up(pairs * num_parts * part_size, kLine);
#pragma omp parallel num_threads(threads)
    {
        float* own = scratch + omp_get_thread_num() * of_thread;
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < pairs * num_parts; unit++)
            attend_part<kFormat>(task, find(task, unit / num_parts, unit % num_parts), parts + unit * part_size, own);
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < pairs * task.heads; unit++)
            merge(task, parts, unit / task.heads, num_parts, unit % task.heads);
    }
    std::free(parts);
    return 0;
}

// ---- Storing ----

INLINE uint8_t e4m3_code(float value) {  // to nearest, ties to even; magnitude at most 448, or NaN
    const float nearest = nearest_e4m3(value);
    const uint32_t sign = bits<uint32_t>(value) >> 24 & 0x80, magnitude = bits<uint32_t>(nearest) & 0x7FFFFFFF;
    if (magnitude > 0x7F800000) return (uint8_t)(sign | 0x7F);
    if (magnitude < 0x3C800000) return (uint8_t)(sign | (uint32_t)(bits<float>(magnitude) * 512.0f));  // below 2^-6
    return (uint8_t)(sign | ((magnitude >> 20) - (120 << 3)));
}

INLINE float clamped(float value, float limit) { return value > limit ? limit : value < -limit ? -limit : value; }

template <Format kFormat>
INLINE uint8_t code_of(float multiple) {
    if (kFormat == kFp8) return e4m3_code(clamped(multiple, kFp8Max));
    return (uint8_t)(int8_t)std::nearbyint(clamped(multiple, 127.0f));
}

// One head's numbers; a scale of its own is written where there is room for one.
template <Format kFormat>
INLINE void store_head(const uint16_t* x, int64_t dim, float scale, uint16_t* own_scale, uint8_t* codes) {
    if (kFormat == kBf16) {
        std::memcpy(codes, x, 2 * dim);
        return;
    }
    if (!own_scale) {  // torch divides in bf16
        for (int64_t d = 0; d < dim; d++) codes[d] = code_of<kFormat>(round_bf16(from_bf16(x[d]) / scale));
        return;
    }
    float most = 0.0f;
    for (int64_t d = 0; d < dim; d++) {
        const float magnitude = std::fabs(from_bf16(x[d]));
        most = magnitude > most || magnitude != magnitude ? magnitude : most;
    }
    *own_scale = to_bf16(most / (kFormat == kFp8 ? kFp8Max : 127.0f));
    const float divisor = *own_scale ? from_bf16(*own_scale) : 1.0f;
    for (int64_t d = 0; d < dim; d++) codes[d] = code_of<kFormat>(from_bf16(x[d]) / divisor);
}

template <Format kFormat>
int32_t store_token(const StoreTask& task) {
    for (int64_t group = 0; group < task.groups; group++) {
        const int64_t x = group * task.dim, codes = group * task.group_stride, scale = group * task.scale_group_stride;
        uint16_t* key_scale = task.key_scales ? task.key_scales + scale : nullptr;
        uint16_t* value_scale = task.value_scales ? task.value_scales + scale : nullptr;
        store_head<kFormat>(task.keys + x, task.dim, task.key_scale, key_scale, task.key_codes + codes);
        store_head<kFormat>(task.values + x, task.dim, task.value_scale, value_scale, task.value_codes + codes);
    }
    return 0;
}

}  // namespace

extern "C" int32_t llama4_quant_cache_store(const StoreTask* task) {
    switch (task->format) {
        case kBf16: return store_token<kBf16>(*task);
        case kFp8: return store_token<kFp8>(*task);
        default: return store_token<kInt8>(*task);
    }
}

extern "C" int32_t llama4_quant_attention(const AttentionTask* task) {
    switch (task->format) {
        case kBf16: return attend<kBf16>(*task);
        case kFp8: return attend<kFp8>(*task);
        default: return attend<kInt8>(*task);
    }
}
