// Many rows of activations (prefill, batches): the matrix unit (AMX) multiplies tiles of 16 outputs x 32 inputs with
// tiles of 32 inputs x 16 rows, bf16 with sums in float32.
//
// A panel of weights, 32 outputs by a few tiles of inputs, is unpacked into the first cache and used at once for all
// rows. Meanwhile, a few outputs after each product of tiles, the next panel is unpacked and a later one is fetched, so
// that the matrix unit, the vector units and memory work at the same time. Sums of 32 rows stay in the matrix unit as
// long as they can; those of more rows lie in a cache, and are taken in turn there and back. Where activations do not stay in the second cache, the same of their inputs
// are used for as many panels of outputs as have sums of 512 KiB.

#pragma once

#include "unpack.h"

namespace tiles {

constexpr int64_t kOutputs = 2 * kSide;         // of a panel
constexpr int64_t kRows = 2 * kSide;            // at a time
constexpr int64_t kFewRows = 2 * kRows;
constexpr int64_t kFewDepth = 4;                // tiles of inputs of a panel; this with few rows
constexpr int64_t kManyDepth = kSlice;
constexpr int64_t kPanel = kManyDepth * kPair;  // bytes
constexpr int64_t kSums = 4 * kTile;            // bytes of sums of 32 outputs with 32 rows
constexpr int64_t kSumsAtOnce = 128;            // of these, 512 KiB
constexpr int64_t kKept = 1200 << 10;           // bytes of activations that stay in the second cache

// ---- Panels ----

namespace {

struct Panel {
    Range outputs, inputs;  // inputs in tiles; behind the last panel there are no outputs
};

// Of `width` outputs all panels with the same inputs come one after another, then those with the next inputs.
struct Sequence {
    Range all;
    int64_t width, depth, count;  // of inputs: tiles of a panel, of a row

    Panel at(int64_t output, int64_t tile) const {
        return {{output, at_most(output + kOutputs, all.last)}, {tile, at_most(tile + depth, count)}};
    }

    Panel next(const Panel& panel) const {
        const int64_t first = all.first + (panel.outputs.first - all.first) / width * width;
        const int64_t last = at_most(first + width, all.last);
        if (panel.outputs.last < last) return at(panel.outputs.last, panel.inputs.first);
        return panel.inputs.last < count ? at(first, panel.inputs.last) : at(last, 0);
    }
};

}  // namespace

// Unpacks a panel: all of it, or a few outputs after each product of tiles. The latter has no branches, since one that
// is predicted wrongly leaves the matrix unit without work; so it is for panels of which nothing is missing.
template <class Weights, int64_t kDepth>
struct Filler {
    static constexpr int64_t kLines = kDepth / Weights::kTiles, kBytes = Weights::kTiles * kPair;
    const Weights weights;
    const uint8_t *weight, *scale;  // of the expert
    const int64_t groups;
    // One line of an output at a time is too little for memory: then lines are fetched in the order in which they lie.
    static constexpr bool kInOrder = kLines == 1;
    Source from;  // of the output that comes next
    uint8_t* to;  // its line of the first tile
    int64_t outputs, first, lines;  // that the panel has
    int64_t group[kLines];

    INLINE_MEMBER Filler(const Task& task, int64_t expert)
        : weights(task), weight(task.weight + expert * task.weight_stride),
          scale(task.scale + expert * task.scale_stride), groups(task.groups), from{} {
        from.bytes = row_bytes(task);
    }

    // `next` is the panel that is fetched meanwhile.
    INLINE_MEMBER void start(const Panel& panel, const Panel& next, uint8_t* panel_to) {
        const int64_t output = panel.outputs.first;
        to = panel_to;
        outputs = panel.outputs.last - output;
        first = panel.inputs.first / Weights::kTiles;
        lines = panel.inputs.last / Weights::kTiles - first;
        from.ahead = (next.outputs.first - output) * from.bytes +
                     (next.inputs.first - panel.inputs.first) / Weights::kTiles * kLine;
        if (kInOrder) from.ahead += (kOutputs - 1) * first * kLine;
        from.row = weight + output * from.bytes;
        from.scales = (const uint16_t*)scale + output * groups;
        for (int64_t i = 0; i < kLines; i++) group[i] = weights.group_of(first + i);
    }

    INLINE_MEMBER bool is_full() const {
        return outputs == kOutputs && lines == kLines && (first + kLines) * kLine <= from.bytes;
    }

    template <bool kIsFull>
    INLINE_MEMBER void fill_one() {
#pragma GCC unroll 8
        for (int64_t i = 0; i < (kIsFull ? kLines : lines); i++)
            weights.template unpack<kIsFull>(from, first + i, group[i], to + i * kBytes);
        if (kInOrder) from.ahead += kLine - from.bytes;
        from.row += from.bytes;
        from.scales += groups;
        to += kLine;
    }

    template <int64_t kCount>
    INLINE_MEMBER void fill_some() {
#pragma GCC unroll 8
        for (int64_t i = 0; i < kCount; i++) fill_one<true>();
    }

    void fill_all() {
        for (int64_t n = 0; n < at_most(outputs, kOutputs); n++) fill_one<false>();
        for (int64_t n = outputs > 0 ? outputs : 0; n < kOutputs; n++, to += kLine)
            for (int64_t i = 0; i < lines * Weights::kTiles; i++)
                _mm512_store_si512(to + i * kPair, _mm512_setzero_si512());
    }
};

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

// Adds products of a panel with one or two tiles of rows; after each, fills kShare outputs of the next.
// Before that come the loads for the next product, which would wait for the stores.
template <bool kTwo, int64_t kShare, class Filler>
INLINE void multiply(const uint8_t* panel, const uint8_t* x, int64_t count, Filler& next) {
    const auto load = [&](int64_t tile) __attribute__((always_inline)) {
        _tile_loadd(4, panel + tile * kPair, 64);
        _tile_loadd(6, x + tile * kTile, 64);
        _tile_loadd(5, panel + tile * kPair + kTile, 64);
        if (kTwo) _tile_loadd(7, x + (kSlice + tile) * kTile, 64);
    };
    load(0);
    for (int64_t tile = 1;; tile++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if (kTwo) {
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        if (tile < count) load(tile);
        next.template fill_some<kShare>();
        if (tile == count) return;
    }
}

using vectors::Rows;  // x_bytes: of 16 rows

// Results from the sums of 32 outputs x 32 rows.
INLINE void finish(const Task& task, const Rows& rows, int64_t expert, Range outputs, int64_t first_row,
                   const uint8_t* sums) {
    alignas(64) float scales[kOutputs] = {}, biases[kOutputs] = {};
    const int64_t count = outputs.last - outputs.first;
    for (int64_t n = 0; n < count; n++) {
        scales[n] = row_scale(task, expert, outputs.first + n);
        biases[n] = task.bias ? from_bf16(task.bias[outputs.first + n]) : 0.0f;
    }
    for (int64_t part = 0; part < 4; part++, sums += kTile) {
        const int64_t n = part / 2 * kSide, row = first_row + part % 2 * kSide;
        if (n >= count || row >= rows.count) continue;
        const __mmask16 there = count - n >= kSide ? 0xFFFF : (__mmask16)((1u << (count - n)) - 1);
        const __m512 scale = _mm512_load_ps(scales + n), bias = _mm512_load_ps(biases + n);
        __m512i lines[kSide];
        for (int64_t i = 0; i < kSide; i++) lines[i] = _mm512_load_si512(sums + kLine * i);
        transpose(lines);
        for (int64_t r = 0; r < at_most(rows.count - row, kSide); r++) {
            const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(rows.scale[(row + r) * rows.x_scales]), scale);
            const __m512 y = _mm512_add_ps(_mm512_mul_ps(_mm512_castsi512_ps(lines[r]), factor), bias);
            uint16_t* to = task.y + (rows.first + row + r) * task.outputs + outputs.first + n;
            _mm256_mask_storeu_epi16(to, there, (__m256i)_mm512_cvtneps_pbh(y));
        }
    }
}

// Adds products of a panel to the sums of all rows, and fills the next panel; with the last inputs come results. Where the
// same outputs come next, in the other direction, sums of the rows at the turn stay in the unit.
template <int64_t kDepth, bool kOneGroup, class Filler>
INLINE void run_panel(const Task& task, const Rows& rows, int64_t expert, const Panel& panel, const uint8_t* weights,
                      uint8_t* sums, Filler& next, bool is_backward, bool turns) {
    // Of the next panel, after each product with the rows of the first group, or of the first two.
    constexpr int64_t kShare = kOutputs / kDepth / (kOneGroup ? 1 : 2);
    const int64_t count = panel.inputs.last - panel.inputs.first, groups = (rows.count + kRows - 1) / kRows;
    const bool is_last = panel.inputs.last == num_tiles(task), fills = count == kDepth && next.is_full();
    asm volatile("" ::: "memory");  // GCC does not know that loading a tile reads memory
    for (int64_t i = 0; i < groups; i++) {
        const int64_t group = is_backward ? groups - 1 - i : i, row = group * kRows;
        const uint8_t* x = rows.x + packed_at(row / kSide, (rows.count + kSide - 1) / kSide, panel.inputs.first);
        const bool two = row + kSide < rows.count, some = fills && i < (kOneGroup ? 1 : 2);
        if (panel.inputs.first == 0) zero_sums();
        else if (i > 0 || !turns) load_sums(sums + group * kSums);
        if (two && some) multiply<true, kShare>(weights, x, count, next);
        else if (two) multiply<true, 0>(weights, x, count, next);
        else if (some) multiply<false, kShare>(weights, x, count, next);
        else multiply<false, 0>(weights, x, count, next);
        if (is_last || i < groups - 1 || !turns) store_sums(sums + group * kSums);
        if (is_last) finish(task, rows, expert, panel.outputs, row, sums + group * kSums);
    }
    if (!fills && next.outputs > 0) next.fill_all();
}

// One expert's rows with some outputs.
template <class Weights, int64_t kDepth, bool kOneGroup>
void run_panels(const Task& task, const Rows& rows, int64_t expert, Range all, uint8_t* memory) {
    const int64_t groups = (rows.count + kRows - 1) / kRows;
    const bool is_kept = kOneGroup || groups * 2 * rows.x_bytes <= kKept;
    const int64_t width = is_kept ? kOutputs : (groups < kSumsAtOnce ? kSumsAtOnce / groups : 1) * kOutputs;
    const bool turns = width == kOutputs;
    const Sequence sequence = {all, width, kDepth, num_tiles(task)};
    uint8_t* sums = memory + 2 * kPanel;
    Filler<Weights, kDepth> filler(task, expert);
    int64_t turn = 0;
    const auto start = [&](const Panel& panel) __attribute__((always_inline)) {
        // With one panel of outputs at a time what comes next would be too near.
        const Panel next = turns ? sequence.at(panel.outputs.last, panel.inputs.first) : sequence.next(panel);
        filler.start(panel, next, memory + turn * kDepth * kPair);
        turn ^= 1;
    };
    Panel panel = sequence.at(all.first, 0);
    start(panel);
    filler.fill_all();
    while (panel.outputs.first < panel.outputs.last) {
        const Panel next = sequence.next(panel);
        const int64_t place = (panel.outputs.first - all.first) % width / kOutputs * groups;
        start(next);
        run_panel<kDepth, kOneGroup>(task, rows, expert, panel, memory + turn * kDepth * kPair, sums + place * kSums,
                                     filler, turn && turns, turns);
        panel = next;
    }
}

template <class Weights>
INLINE void run_rows_of(const Task& task, const Rows& rows, int64_t expert, Range outputs, uint8_t* memory) {
    if (rows.count <= kRows) return run_panels<Weights, kFewDepth, true>(task, rows, expert, outputs, memory);
    if (rows.count <= kFewRows) return run_panels<Weights, kFewDepth, false>(task, rows, expert, outputs, memory);
    run_panels<Weights, kManyDepth, false>(task, rows, expert, outputs, memory);
}

INLINE void run_rows(const Task& task, const Rows& rows, int64_t expert, Range outputs, uint8_t* memory) {
    if (task.format == kBf16) return run_rows_of<Bf16Weights>(task, rows, expert, outputs, memory);
    if (task.format == kFp8) return run_rows_of<Fp8Weights>(task, rows, expert, outputs, memory);
    if (task.format == kInt8) return run_rows_of<Int8Weights>(task, rows, expert, outputs, memory);
    switch (has_groups(task) ? task.inputs / task.groups : 0) {
        case 0: return run_rows_of<Int4Weights<0>>(task, rows, expert, outputs, memory);
        case 32: return run_rows_of<Int4Weights<4>>(task, rows, expert, outputs, memory);
        case 64: return run_rows_of<Int4Weights<2>>(task, rows, expert, outputs, memory);
        default: return run_rows_of<Int4Weights<1>>(task, rows, expert, outputs, memory);
    }
}

INLINE int64_t scratch_bytes(int64_t most_rows) {
    const int64_t groups = (most_rows + kRows - 1) / kRows;
    return 2 * kPanel + (groups < kSumsAtOnce ? kSumsAtOnce : groups) * kSums;
}

}  // namespace tiles
