// Many rows of activations (prefill, batches): the matrix unit (AMX) multiplies tiles of 16 outputs x 32 inputs with
// tiles of 32 inputs x 16 rows, bf16 with sums in float32.
//
// Weights become bf16 in the order in which they come out of a cache line (tile columns may be any permutation of the
// inputs, as long as activations have the same): int4 codes through a table of the group's 16 values, code times scale
// rounded to bf16, as reference.py has it; FP8 and int8 codes exactly, their scale follows at the end.
//
// 256 inputs of 32 outputs are unpacked at a time, into the first cache, and used at once for all rows. Sums of up to 32
// rows stay in the unit; those of more rows lie in the second cache, for as many outputs as there is room for.

#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "vectors.h"

namespace tiles {

using vectors::Table;

constexpr int64_t kSide = 16;                // rows and outputs of a tile
constexpr int64_t kInputs = 32;              // inputs of a tile
constexpr int64_t kTile = 1024;              // bytes of a tile
constexpr int64_t kOutputs = 2 * kSide;      // at a time
constexpr int64_t kRows = 2 * kSide;
constexpr int64_t kAtOnce = 8;              // tiles of inputs that are unpacked at a time: 16 KiB
constexpr int64_t kSums = 4 * kTile;         // bytes of sums of 32 outputs with 32 rows
constexpr int64_t kSumsAtOnce = 128;         // of these, 512 KiB

// Linux keeps the matrix unit for processes that ask.
INLINE bool allowed() {
    static const bool is_allowed = [] {
        constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
        return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
    }();
    return is_allowed;
}

struct alignas(64) Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

INLINE int64_t num_tiles(const Task& task) {  // of inputs
    switch (task.format) {
        case kInt4: return (task.inputs + 127) / 128 * 4;
        case kFp8: return (task.inputs + 63) / 64 * 2;
        default: return (task.inputs + kInputs - 1) / kInputs;
    }
}

// ---- Activations: 16 rows as tiles of pairs of inputs x rows ----

// A row of bf16 in the order of the columns of tiles; behind it zeros.
INLINE void order_row(const Task& task, const uint16_t* x, uint16_t* to) {
    const int64_t size = task.inputs, width = num_tiles(task) * kInputs;
    std::memset(to + size / 128 * 128, 0, (width - size / 128 * 128) * sizeof *to);
    if (task.format == kBf16 || task.format == kInt8) {
        std::memcpy(to, x, size * sizeof *to);
        return;
    }
    int64_t k = 0;
    if (task.format == kInt4) {
        alignas(64) uint16_t fours[32];
        for (int word = 0; word < 32; word++) fours[word] = (uint16_t)(4 * word % 64);
        const __m512i every_fourth = _mm512_load_si512(fours);
        for (; k + 128 <= size; k += 128) {
            const __m512i a = _mm512_loadu_si512(x + k), b = _mm512_loadu_si512(x + k + 32);
            const __m512i c = _mm512_loadu_si512(x + k + 64), d = _mm512_loadu_si512(x + k + 96);
            for (int part = 0; part < 4; part++) {
                const __m512i index = _mm512_add_epi16(every_fourth, _mm512_set1_epi16((short)part));
                const __m512i low = _mm512_permutex2var_epi16(a, index, b);  // its first half is what is wanted
                const __m512i high = _mm512_permutex2var_epi16(c, index, d);
                _mm512_storeu_si512(to + k + 32 * part,
                                    _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
            }
        }
    }
    for (; k < size; k++) {
        const int64_t tile = task.format == kInt4 ? k / 128 * 4 + k % 4 : k / 64 * 2 + k % 16 / 8;
        const int64_t column = task.format == kInt4 ? k % 128 / 4 : k % 64 / 16 * 8 + k % 8;
        to[tile * kInputs + column] = x[k];
    }
}

// `rows` <= 16 rows of bf16 as tiles, the others zero; `ordered` is room for 16 rows.
INLINE void pack_rows(const Task& task, const uint16_t* x, int64_t rows, uint16_t* ordered, uint8_t* to) {
    const int64_t width = num_tiles(task) * kInputs;
    for (int64_t r = 0; r < rows; r++) order_row(task, x + r * task.inputs, ordered + r * width);
    const __mmask16 there = (__mmask16)((1u << rows) - 1);
    const __m512i places = _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32((int)(width / 2)));
    for (int64_t pair = 0; pair < width / 2; pair++, to += 64) {
        const void* first = ordered + 2 * pair;
        _mm512_store_si512(to, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, places, first, 4));
    }
}

// ---- Weights: a row of 16 as bf16, into its line of each tile ----

// 64 bytes of a row of weights, then zeros; the same of the outputs that come next are fetched meanwhile.
INLINE __m512i load_line(const uint8_t* row, int64_t at, int64_t bytes) {
    _mm_prefetch((const char*)row + at + kOutputs * bytes, _MM_HINT_T1);
    return vectors::load_bytes(row + at, bytes - at);
}

INLINE __m512i bf16_of(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

template <int kGroups>
INLINE void unpack_int4(const uint8_t* row, int64_t bytes, const uint16_t* scales, int64_t groups, int64_t size,
                        Range tiles, uint8_t* to) {
    const __m512 values = _mm512_sub_ps(
        _mm512_cvtepi32_ps(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)), _mm512_set1_ps(8));
    const __m512i nibble = _mm512_set1_epi16(15);
    alignas(64) uint16_t picks[32];
    for (int word = 0; word < 32; word++) picks[word] = (uint16_t)(word * (kGroups > 1 ? kGroups : 1) / 32 * 16);
    const __m512i pick = _mm512_load_si512(picks);
    __m512i table = bf16_of(values, values), upper = table;
    for (int64_t tile = tiles.first; tile < tiles.last; tile += 4, to += 4 * kTile) {
        const int64_t line = tile / 4, first = kGroups == 1 ? line * 128 / size : line * kGroups;
        const auto scaled = [&](int64_t group) __attribute__((always_inline)) {
            const float scale = from_bf16(scales[first + group < groups ? first + group : groups - 1]);
            return _mm512_mul_ps(values, _mm512_set1_ps(scale));
        };
        if (kGroups == 1) {
            const __m512 all = scaled(0);
            table = bf16_of(all, all);
        } else if (kGroups > 1) {
            table = bf16_of(scaled(0), scaled(1));
            if (kGroups == 4) upper = bf16_of(scaled(2), scaled(3));
        }
        const __m512i codes = load_line(row, 64 * line, bytes);
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) {
            __m512i index = _mm512_srli_epi16(codes, 4 * part);
            if (kGroups > 1) index = _mm512_ternarylogic_epi32(index, nibble, pick, 0xEA);  // a & b | c
            const __m512i weights = kGroups == 4 ? _mm512_permutex2var_epi16(table, index, upper)
                                                 : _mm512_permutexvar_epi16(index, table);
            _mm512_store_si512(to + part * kTile, weights);
        }
    }
}

INLINE void unpack_fp8(const uint8_t* row, int64_t bytes, const Table& table, Range tiles, uint8_t* to) {
    for (int64_t tile = tiles.first; tile < tiles.last; tile += 2, to += 2 * kTile) {
        __m512i first, second;
        vectors::decode_fp8(load_line(row, 32 * tile, bytes), table, first, second);
        _mm512_store_si512(to, first);
        _mm512_store_si512(to + kTile, second);
    }
}

INLINE void unpack_int8(const uint8_t* row, int64_t bytes, Range tiles, uint8_t* to) {
    for (int64_t tile = tiles.first; tile < tiles.last; tile++, to += kTile) {
        const __m512i codes = load_line(row, 32 * tile, bytes);  // of which the first half is used
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_castsi512_si128(codes)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(codes, 1)));
        _mm512_store_si512(to, bf16_of(low, high));
    }
}

INLINE void unpack_bf16(const uint8_t* row, int64_t bytes, Range tiles, uint8_t* to) {
    for (int64_t tile = tiles.first; tile < tiles.last; tile++, to += kTile)
        _mm512_store_si512(to, load_line(row, 64 * tile, bytes));
}

// Outputs [first, last), at most 16, of some tiles of inputs: [tiles][16 outputs][32 inputs].
INLINE void unpack(const Task& task, int64_t expert, Range outputs, const Table& table, Range tiles, uint8_t* to) {
    const int64_t bytes = row_bytes(task), group = has_groups(task) ? task.inputs / task.groups : 0;
    for (int64_t n = 0; n < kSide; n++, to += 64) {
        const int64_t output = outputs.first + n;
        if (output >= outputs.last) {
            for (int64_t tile = tiles.first; tile < tiles.last; tile++)
                _mm512_store_si512(to + (tile - tiles.first) * kTile, _mm512_setzero_si512());
            continue;
        }
        const uint8_t* row = task.weight + expert * task.weight_stride + output * bytes;
        const uint16_t* scales =
            (const uint16_t*)(task.scale + expert * task.scale_stride) + (group ? output * task.groups : 0);
        if (task.format == kFp8) unpack_fp8(row, bytes, table, tiles, to);
        if (task.format == kInt8) unpack_int8(row, bytes, tiles, to);
        if (task.format == kBf16) unpack_bf16(row, bytes, tiles, to);
        if (task.format != kInt4) continue;
        if (group == 0) unpack_int4<0>(row, bytes, nullptr, 1, 1, tiles, to);
        else if (group == 32) unpack_int4<4>(row, bytes, scales, task.groups, group, tiles, to);
        else if (group == 64) unpack_int4<2>(row, bytes, scales, task.groups, group, tiles, to);
        else unpack_int4<1>(row, bytes, scales, task.groups, group, tiles, to);
    }
}

// ---- Products ----

INLINE void load_sums(const uint8_t* from) {
    _tile_loadd(0, from, 64);
    _tile_loadd(1, from + kTile, 64);
    _tile_loadd(2, from + 2 * kTile, 64);
    _tile_loadd(3, from + 3 * kTile, 64);
}

INLINE void store_sums(uint8_t* to) {
    _tile_stored(0, to, 64);
    _tile_stored(1, to + kTile, 64);
    _tile_stored(2, to + 2 * kTile, 64);
    _tile_stored(3, to + 3 * kTile, 64);
}

INLINE void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Adds products of two tiles of outputs, `stride` apart, with one or two of rows, `x_stride` apart.
template <bool kTwo>
INLINE void multiply(const uint8_t* weights, int64_t stride, const uint8_t* x, int64_t x_stride, int64_t count) {
    for (int64_t tile = 0; tile < count; tile++, weights += kTile, x += kTile) {
        _tile_loadd(4, weights, 64);
        _tile_loadd(6, x, 64);
        _tile_loadd(5, weights + stride, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if (kTwo) {
            _tile_loadd(7, x + x_stride, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
}

INLINE void multiply(bool two, const uint8_t* weights, int64_t stride, const uint8_t* x, int64_t x_stride, int64_t count) {
    two ? multiply<true>(weights, stride, x, x_stride, count) : multiply<false>(weights, stride, x, x_stride, count);
}

using vectors::Rows;  // x: [tiles of rows][tiles of inputs], x_bytes of a tile of rows

// Results from the sums of 32 outputs x 32 rows.
INLINE void finish(const Task& task, const Rows& rows, int64_t expert, Range outputs, int64_t first_row,
                   const uint8_t* stored) {
    const auto* sums = (const float(*)[kSide][kSide])stored;
    alignas(64) float scales[kOutputs] = {}, bias[kOutputs] = {};
    const int64_t count = outputs.last - outputs.first;
    for (int64_t n = 0; n < count; n++) {
        scales[n] = row_scale(task, expert, outputs.first + n);
        bias[n] = task.bias ? from_bf16(task.bias[outputs.first + n]) : 0.0f;
    }
    const __m512i places = _mm512_slli_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);  // 16 rows of an output apart
    for (int64_t r = 0; r < kRows && first_row + r < rows.count; r++) {
        const __m512 x_scale = _mm512_set1_ps(rows.scale[(first_row + r) * rows.x_scales]);
        uint16_t* y = task.y + (rows.first + first_row + r) * task.outputs + outputs.first;
        for (int64_t half = 0; half < 2 && half * kSide < count; half++) {
            const float* column = &sums[half * 2 + r / kSide][0][r % kSide];
            const __m512 factor = _mm512_mul_ps(x_scale, _mm512_load_ps(scales + half * kSide));
            const __m512 sum = _mm512_i32gather_ps(places, column, 4);
            const __m256i words =
                (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(_mm512_mul_ps(sum, factor), _mm512_load_ps(bias + half * kSide)));
            const int64_t left = count - half * kSide;
            _mm256_mask_storeu_epi16(y + half * kSide, left >= 16 ? 0xFFFF : (__mmask16)((1u << left) - 1), words);
        }
    }
}

struct Scratch {
    uint8_t *weights, *sums;
};

// Adds products with some inputs of 32 outputs to the sums of all rows.
INLINE void add(const Task& task, const Rows& rows, const Table& table, int64_t expert, Range outputs, Range inputs,
                const Scratch& scratch, uint8_t* sums) {
    const Range first = {outputs.first, at_most(outputs.first + kSide, outputs.last)};
    constexpr int64_t kStride = kAtOnce * kTile;
    unpack(task, expert, first, table, inputs, scratch.weights);
    unpack(task, expert, {first.last, outputs.last}, table, inputs, scratch.weights + kStride);
    const bool stay = rows.count <= kRows;  // in the unit
    for (int64_t row = 0; row < rows.count; row += kRows, sums += kSums) {
        const uint8_t* x = rows.x + row / kSide * rows.x_bytes + inputs.first * kTile;
        if (inputs.first == 0) zero_sums();
        else if (!stay) load_sums(sums);
        multiply(row + kSide < rows.count, scratch.weights, kStride, x, rows.x_bytes, inputs.last - inputs.first);
        if (!stay || inputs.last == num_tiles(task)) store_sums(sums);
    }
}

// One expert's rows with some outputs.
INLINE void run_rows(const Task& task, const Rows& rows, const Table& table, int64_t expert, Range all, uint8_t* memory) {
    const Scratch scratch = {memory, memory + 2 * kAtOnce * kTile};
    const int64_t count = num_tiles(task), groups = (rows.count + kRows - 1) / kRows;
    const int64_t width = groups == 1 ? kOutputs : (groups < kSumsAtOnce ? kSumsAtOnce / groups : 1) * kOutputs;
    for (int64_t n = all.first; n < all.last; n += width) {
        const Range outputs = {n, at_most(n + width, all.last)};
        const auto each = [&](auto&& function) __attribute__((always_inline)) {
            uint8_t* sums = scratch.sums;
            for (int64_t m = outputs.first; m < outputs.last; m += kOutputs, sums += groups * kSums)
                function(Range{m, at_most(m + kOutputs, outputs.last)}, sums);
        };
        for (int64_t tile = 0; tile < count; tile += kAtOnce) {
            const Range inputs = {tile, at_most(tile + kAtOnce, count)};
            each([&](Range some, uint8_t* sums) { add(task, rows, table, expert, some, inputs, scratch, sums); });
        }
        each([&](Range some, uint8_t* sums) {
            for (int64_t group = 0; group < groups; group++)
                finish(task, rows, expert, some, group * kRows, sums + group * kSums);
        });
    }
}

INLINE int64_t scratch_bytes(int64_t most_rows) {
    const int64_t groups = (most_rows + kRows - 1) / kRows;
    return 2 * kAtOnce * kTile + (groups < kSumsAtOnce ? kSumsAtOnce : groups) * kSums;
}

}  // namespace tiles
