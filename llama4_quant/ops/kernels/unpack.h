// What tiles of the matrix unit are made of: activations once per call, weights a few at a time.
//
// Weights become bf16 in the order in which they come out of a cache line (tile columns may be any permutation of the
// inputs, as long as activations have the same): int4 codes through a table of the group's 16 values, code times scale
// rounded to bf16, as reference.py has it; FP8 and int8 codes exactly, their scale follows at the end.

#pragma once

#include "matrix_unit.h"
#include "vectors.h"

namespace tiles {

constexpr int64_t kInputs = 32;  // inputs of a tile
constexpr int64_t kTile = 1024;  // bytes of a tile
constexpr int64_t kSlice = 8;    // tiles of inputs of activations that lie together
constexpr int64_t kPair = 2 * kTile;  // of a panel of weights: 32 outputs by the inputs of a tile

INLINE int64_t num_tiles(const Task& task) {  // of inputs
    switch (task.format) {
        case kInt4: return (task.inputs + 127) / 128 * 4;
        case kBf16: return (task.inputs + kInputs - 1) / kInputs;
        default: return (task.inputs + 63) / 64 * 2;
    }
}

// 16 x 16 numbers of 32 bits, in place: rows become columns.
INLINE void transpose(__m512i rows[16]) {
    __m512i pairs[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // rows[i + j]: column 4q + j of rows i to i + 3, in 128 bits q
        rows[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i even = _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(rows[j], rows[j + 4], 0xDD);
        const __m512i even_after = _mm512_shuffle_i32x4(rows[j + 8], rows[j + 12], 0x88);
        const __m512i odd_after = _mm512_shuffle_i32x4(rows[j + 8], rows[j + 12], 0xDD);
        pairs[j] = _mm512_shuffle_i32x4(even, even_after, 0x88);
        pairs[j + 4] = _mm512_shuffle_i32x4(odd, odd_after, 0x88);
        pairs[j + 8] = _mm512_shuffle_i32x4(even, even_after, 0xDD);
        pairs[j + 12] = _mm512_shuffle_i32x4(odd, odd_after, 0xDD);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) rows[i] = pairs[i];
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
    if (task.format == kFp8) return vectors::order_fp8(x, 0, size, to);
    alignas(64) uint16_t fours[32];
    for (int word = 0; word < 32; word++) fours[word] = (uint16_t)(4 * word % 64);
    const __m512i every_fourth = _mm512_load_si512(fours);
    int64_t k = 0;
    for (; k + 128 <= size; k += 128) {
        const __m512i a = _mm512_loadu_si512(x + k), b = _mm512_loadu_si512(x + k + 32);
        const __m512i c = _mm512_loadu_si512(x + k + 64), d = _mm512_loadu_si512(x + k + 96);
        for (int part = 0; part < 4; part++) {
            const __m512i index = _mm512_add_epi16(every_fourth, _mm512_set1_epi16((short)part));
            const __m512i low = _mm512_permutex2var_epi16(a, index, b);  // its first half is what is wanted
            const __m512i high = _mm512_permutex2var_epi16(c, index, d);
            _mm512_storeu_si512(to + k + 32 * part, _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
        }
    }
    for (; k < size; k++) to[(k / 128 * 4 + k % 4) * kInputs + k % 128 / 4] = x[k];
}

// Tiles of activations lie as they are used: eight of inputs of the first 16 rows, the same of the next, and so on.
INLINE int64_t packed_bytes(const Task& task) { return round_up(num_tiles(task), kSlice) * kTile; }  // of 16 rows
INLINE int64_t packed_at(int64_t unit, int64_t units, int64_t tile) {
    return ((tile / kSlice * units + unit) * kSlice + tile % kSlice) * kTile;
}

// Unit `unit`: `rows` <= 16 rows of bf16 as tiles, the others zero; `ordered` is room for 16 rows.
INLINE void pack_rows(const Task& task, const uint16_t* x, int64_t rows, int64_t unit, int64_t units, uint16_t* ordered,
                      uint8_t* to) {
    const int64_t count = num_tiles(task), width = count * kInputs;
    for (int64_t r = 0; r < rows; r++) order_row(task, x + r * task.inputs, ordered + r * width);
    for (int64_t tile = 0; tile < count; tile++) {
        __m512i lines[kSide];
        for (int64_t r = 0; r < kSide; r++)
            lines[r] = r < rows ? _mm512_loadu_si512(ordered + r * width + tile * kInputs) : _mm512_setzero_si512();
        transpose(lines);
        uint8_t* at = to + packed_at(unit, units, tile);
        for (int64_t r = 0; r < kSide; r++) _mm512_store_si512(at + kLine * r, lines[r]);
    }
}

// ---- Weights: some tiles of inputs of one output as bf16, each into its line of a tile ----

struct Source {
    const uint8_t* row;
    int64_t bytes, ahead;    // of a row; from here to what is fetched meanwhile
    const uint16_t* scales;  // of the row's groups

    template <bool kIsFull>
    INLINE_MEMBER __m512i line(int64_t index) const {  // 64 bytes, or what there is and zeros
        const int64_t at = kLine * index;
        _mm_prefetch((const char*)row + at + ahead, _MM_HINT_T1);
        return kIsFull ? _mm512_loadu_si512(row + at) : vectors::load_bytes(row + at, bytes - at);
    }
};

INLINE __m512i bf16_of(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

template <int kGroups>  // of the 128 weights of a line; 0: one scale for the row, which follows at the end
struct Int4Weights {
    static constexpr int64_t kTiles = 4;  // of a line
    __m512 values;
    __m512i nibble, pick;  // the half of a table that has a word's group
    int64_t groups, lines_per_group;

    explicit Int4Weights(const Task& task)
        : values(_mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7)),
          nibble(_mm512_set1_epi16(15)),
          groups(task.groups),
          lines_per_group(kGroups == 1 ? task.inputs / task.groups / 128 : 1) {
        alignas(64) uint16_t picks[32];
        for (int word = 0; word < 32; word++) picks[word] = (uint16_t)(word * (kGroups > 1 ? kGroups : 1) / 32 * 16);
        pick = _mm512_load_si512(picks);
    }

    INLINE_MEMBER int64_t group_of(int64_t line) const {
        return kGroups != 1 ? line * kGroups : lines_per_group == 1 ? line : line / lines_per_group;
    }

    // Of `group`, or if there are not so many, of the last.
    template <bool kIsFull>
    INLINE_MEMBER __m512 scaled(const Source& from, int64_t group) const {
        const int64_t index = kIsFull ? group : at_most(group, groups - 1);
        const __m512i scale = _mm512_slli_epi32(_mm512_set1_epi16((short)from.scales[index]), 16);
        return _mm512_mul_ps(values, _mm512_castsi512_ps(scale));
    }

    template <bool kIsFull>
    INLINE_MEMBER void unpack(const Source& from, int64_t line, int64_t group, uint8_t* to) const {
        const __m512 first = kGroups ? scaled<kIsFull>(from, group) : values;
        const __m512i table = bf16_of(first, kGroups > 1 ? scaled<kIsFull>(from, group + 1) : first);
        const __m512i after =
            kGroups == 4 ? bf16_of(scaled<kIsFull>(from, group + 2), scaled<kIsFull>(from, group + 3)) : table;
        const __m512i codes = from.line<kIsFull>(line);
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) {
            __m512i index = _mm512_srli_epi16(codes, 4 * part);
            if (kGroups > 1) index = _mm512_ternarylogic_epi32(index, nibble, pick, 0xEA);  // a & b | c
            const __m512i weights = kGroups == 4 ? _mm512_permutex2var_epi16(table, index, after)
                                                 : _mm512_permutexvar_epi16(index, table);
            _mm512_store_si512(to + part * kPair, weights);
        }
    }
};

// No groups: a scale, if any, follows at the end.
struct WholeRows {
    explicit WholeRows(const Task&) {}
    INLINE_MEMBER int64_t group_of(int64_t) const { return 0; }
};

struct Fp8Weights : WholeRows {
    static constexpr int64_t kTiles = 2;
    vectors::Table table;

    explicit Fp8Weights(const Task& task) : WholeRows(task), table(vectors::fp8_table()) {}

    template <bool kIsFull>
    INLINE_MEMBER void unpack(const Source& from, int64_t line, int64_t, uint8_t* to) const {
        __m512i first, second;
        vectors::decode_fp8(from.line<kIsFull>(line), table, first, second);
        _mm512_store_si512(to, first);
        _mm512_store_si512(to + kPair, second);
    }
};

INLINE __m512i int8_to_bf16(__m256i codes) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
    return bf16_of(low, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1))));
}

struct Int8Weights : WholeRows {
    static constexpr int64_t kTiles = 2;

    using WholeRows::WholeRows;

    template <bool kIsFull>
    INLINE_MEMBER void unpack(const Source& from, int64_t line, int64_t, uint8_t* to) const {
        const __m512i codes = from.line<kIsFull>(line);
        _mm512_store_si512(to, int8_to_bf16(_mm512_castsi512_si256(codes)));
        _mm512_store_si512(to + kPair, int8_to_bf16(_mm512_extracti64x4_epi64(codes, 1)));
    }
};

struct Bf16Weights : WholeRows {
    static constexpr int64_t kTiles = 1;

    using WholeRows::WholeRows;

    template <bool kIsFull>
    INLINE_MEMBER void unpack(const Source& from, int64_t line, int64_t, uint8_t* to) const {
        _mm512_store_si512(to, from.line<kIsFull>(line));
    }
};

}  // namespace tiles
