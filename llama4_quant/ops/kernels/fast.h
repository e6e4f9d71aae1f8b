// The kernels for processors with AVX-512 (VNNI, BF16, VBMI) and perhaps AMX: which rows go which way, and by whom.

#pragma once

#include "matrix_unit.h"

#ifdef LLAMA4_QUANT_FAST
#ifdef LLAMA4_QUANT_TILES
#include "tiles.h"
#else
#include "vectors.h"
#endif

namespace fast {

using vectors::Rows;

constexpr int64_t kTileRows = 3;  // from so many rows on the matrix unit is quicker

INLINE const char* instructions() {
    return tiles::allowed() ? "AVX-512 (VNNI, BF16) and AMX" : "AVX-512 (VNNI, BF16)";
}

// FP8 in blocks has a scale for 128 inputs of a row of activations, which tiles cannot take in.
INLINE bool use_tiles(const Task& task, int64_t rows) { return rows >= kTileRows && !task.is_block && tiles::allowed(); }

INLINE int64_t prepared_bytes(const Task& task, bool in_tiles) {  // of a row, or of a tile of rows
    int64_t bytes = 0;
#ifdef LLAMA4_QUANT_TILES
    if (in_tiles) return tiles::packed_bytes(task);
#endif
    vectors::by_format(task, [&](auto line) {
        using Of = decltype(line);
        bytes = vectors::lines<Of::kStored>(task) * Of::kBytes;
    });
    return bytes;
}

// Rows of all experts, and memory for them: the first pass counts, the second one points.
INLINE int64_t lay_out(const Task& task, Rows* parts, uint8_t* memory) {
    uint8_t* at = memory;
    const int64_t x_scales = task.is_block ? task.groups : 1;
    for (int64_t expert = 0, first = 0; expert < task.experts; first += task.counts[expert++]) {
        const int64_t count = task.counts[expert];
        const bool in_tiles = use_tiles(task, count);
        const int64_t bytes = prepared_bytes(task, in_tiles), units = in_tiles ? (count + 15) / 16 : count;
        Rows& rows = parts[expert];
        rows = {first, count, at, (float*)(at + units * bytes), bytes, x_scales};
        at += round_up(units * bytes + count * x_scales * (int64_t)sizeof(float), kLine);
    }
    return at - memory;
}

// One row (or of tiles, 16 rows) of activations.
INLINE void prepare(const Task& task, const Rows& rows, int64_t unit, uint16_t* codes) {
    if (!use_tiles(task, rows.count)) {
        uint8_t* to = rows.x + unit * rows.x_bytes;
        std::memset(to, 0, rows.x_bytes);
        vectors::by_format(task, [&](auto line) {
            vectors::prepare_row<decltype(line)::kStored>(task, task.x + (rows.first + unit) * task.inputs, to,
                                                          rows.scale + unit * rows.x_scales, codes);
        });
        return;
    }
#ifdef LLAMA4_QUANT_TILES
    const int64_t row = 16 * unit, count = at_most(rows.count - row, 16);
    const uint16_t* x = task.x + (rows.first + row) * task.inputs;
    for (int64_t r = 0; r < count; r++) {
        float& scale = rows.scale[row + r];
        scale = task.format == kFp8 ? round_activations(x + r * task.inputs, task.inputs, codes + r * task.inputs) : 1.0f;
    }
    uint16_t* ordered = codes + 16 * round_up(task.inputs, 128);
    tiles::pack_rows(task, task.format == kFp8 ? codes : x, count, unit, (rows.count + 15) / 16, ordered, rows.x);
#endif
}

INLINE void multiply(const Task& task, const Rows* parts, int64_t thread, uint8_t* scratch) {
    const vectors::Table table = vectors::fp8_table();
    const Range outputs = share(task.outputs, 32, thread, task.threads);
#ifdef LLAMA4_QUANT_TILES
    const bool with_tiles = tiles::allowed();
    if (with_tiles) {
        const tiles::Shapes shapes;
        _tile_loadconfig(&shapes);
    }
#endif
    for (int64_t expert = 0; expert < task.experts; expert++) {
        const Rows& rows = parts[expert];
        if (!rows.count) continue;
#ifdef LLAMA4_QUANT_TILES
        if (use_tiles(task, rows.count)) {
            tiles::run_rows(task, rows, expert, outputs, scratch);
            continue;
        }
#endif
        vectors::by_format(task, [&](auto line) {
            vectors::run_rows<decltype(line)::kStored>(task, rows, table, expert, outputs);
        });
    }
#ifdef LLAMA4_QUANT_TILES
    if (with_tiles) _tile_release();
#endif
}

// The expert that has rows, where no other has.
INLINE int64_t the_only(const Task& task) {
    int64_t expert = 0;
    while (!task.counts[expert]) expert++;
    return expert;
}

// 0: done; 1: out of memory.
int32_t run(const Task& task) {
    int64_t scratch = 0, units = 0;
    bool any_tiles = false;
    for (int64_t expert = 0; expert < task.experts; expert++) {
        const bool in_tiles = use_tiles(task, task.counts[expert]);
        any_tiles |= in_tiles;
        units += in_tiles ? (task.counts[expert] + 15) / 16 : task.counts[expert];
    }
#ifdef LLAMA4_QUANT_TILES
    if (any_tiles) scratch = tiles::scratch_bytes(portable::most_rows(task));
#endif
    // FP8: codes of activations; tiles: 16 rows in their order.
    const int64_t padded = round_up(task.inputs, 128) * (int64_t)sizeof(uint16_t), in_hand = any_tiles ? 16 : 1;
    const int64_t codes = padded * in_hand, ordered = any_tiles ? padded * in_hand : 0;
    const int64_t of_thread = round_up(scratch + codes + ordered, kLine);
    Rows* parts = allocate<Rows>(task.experts);
    if (!parts) return 1;
    const int64_t prepared = lay_out(task, parts, nullptr);
    uint8_t* memory = allocate<uint8_t>(prepared + task.threads * of_thread);
    if (!memory) return std::free(parts), 1;
    lay_out(task, parts, memory);
    uint8_t* own = memory + prepared;
    const auto prepare_units = [&](int64_t thread) {
        const Range mine = share(units, 1, thread, task.threads);
        int64_t first = 0;
        for (int64_t expert = 0; expert < task.experts; expert++) {
            const bool in_tiles = use_tiles(task, parts[expert].count);
            const int64_t count = in_tiles ? (parts[expert].count + 15) / 16 : parts[expert].count;
            for (int64_t unit = 0; unit < count; unit++)
                if (first + unit >= mine.first && first + unit < mine.last)
                    prepare(task, parts[expert], unit, (uint16_t*)(own + thread * of_thread + scratch));
            first += count;
        }
    };
    if (units == 1) prepare(task, parts[the_only(task)], 0, (uint16_t*)(own + scratch));
#pragma omp parallel num_threads(task.threads)
    {
        if (units > 1) {
#pragma omp for schedule(static, 1)
            for (int64_t thread = 0; thread < task.threads; thread++) prepare_units(thread);
        }
#pragma omp for schedule(static, 1)
        for (int64_t thread = 0; thread < task.threads; thread++)
            multiply(task, parts, thread, own + thread * of_thread);
    }
    std::free(memory);
    std::free(parts);
    return 0;
}

}  // namespace fast

#endif
