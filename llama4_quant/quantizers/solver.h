// The loops of calibration that go column by column: twins of gptq.py's `_fix_block` and `_descend`, and of scales.py.
//
// Blocks are [S columns of the weight, N outputs], so that the outputs of a column are contiguous. Every output goes its
// own way: a vector of outputs passes through all columns of the block while they are in the first cache. Products and
// sums are rounded one by one and in the order of the plain path, so both give the same bytes.

#pragma once

#include "kernels.h"

// Fields as in solver.py. All matrices have rows of `stride` elements; outputs [first, last) are done.
struct Block {
    const float* weight;     // GPTQ: what is to be approximated
    float* target;           // GPTQ: with what earlier blocks left to make up for; descent: H times the error, changed
    const float* scale;
    float* codes;            // out; descent: in and out
    float* error;            // GPTQ: out, weight - code * scale; descent: in and out
    float* cost;             // GPTQ: [N] sum over columns of curvature * (target - code * scale)^2, in and out
    const float* feed;       // [S, S] what the error of a column (row) means for a later one
    const float* curvature;  // [S]
    int64_t columns, stride, first, last;
    int32_t grid;  // 0 int4, 1 fp8
};

namespace {

constexpr int64_t kTile = 4 * kLanes;  // outputs at a time
constexpr int64_t kMaxColumns = 128;

// `count` numbers; behind them, for lanes without an output, what does no harm.
INLINE void read(const float* from, int64_t count, float otherwise, float (&to)[kTile]) {
    for (int64_t i = 0; i < kTile; i++) to[i] = otherwise;
    std::memcpy(to, from, count * sizeof(float));
}

template <typename Grid>
void fix_tile(const Block& block, int64_t n, int64_t count) {
    float errors[kMaxColumns][kTile], cost[kTile];
    read(block.cost + n, count, 0.0f, cost);
    for (int64_t j = 0; j < block.columns; j++) {
        const int64_t at = j * block.stride + n;
        float target[kTile], scale[kTile], weight[kTile], codes[kTile];
        read(block.target + at, count, 0.0f, target);
        read(block.scale + at, count, 1.0f, scale);
        read(block.weight + at, count, 0.0f, weight);
        for (int64_t v = 0; v < kTile; v += kLanes) {
            Floats value = load<Floats>(target + v);
            for (int64_t i = 0; i < j; i++) {
                value = value + load<Floats>(errors[i] + v) * block.feed[i * block.columns + j];
            }
            const Floats one = load<Floats>(scale + v), code = Grid::nearest(value / one), stored = code * one;
            const Floats left = value - stored;
            store(errors[j] + v, load<Floats>(weight + v) - stored);
            store(cost + v, load<Floats>(cost + v) + left * left * block.curvature[j]);
            store(codes + v, code);
        }
        std::memcpy(block.codes + at, codes, count * sizeof(float));
        std::memcpy(block.error + at, errors[j], count * sizeof(float));
    }
    std::memcpy(block.cost + n, cost, count * sizeof(float));
}

template <typename Grid>
void descend_tile(const Block& block, int64_t n, int64_t count) {
    float changes[kMaxColumns][kTile];
    for (int64_t j = 0; j < block.columns; j++) {
        const int64_t at = j * block.stride + n;
        const float inverse = 1.0f / block.curvature[j];
        float pull[kTile], scale[kTile], codes[kTile], error[kTile];
        read(block.target + at, count, 0.0f, pull);
        read(block.scale + at, count, 1.0f, scale);
        read(block.codes + at, count, 0.0f, codes);
        read(block.error + at, count, 0.0f, error);
        for (int64_t v = 0; v < kTile; v += kLanes) {
            Floats value = load<Floats>(pull + v);
            for (int64_t i = 0; i < j; i++) {
                value = value - load<Floats>(changes[i] + v) * block.feed[i * block.columns + j];
            }
            const Floats one = load<Floats>(scale + v), old = load<Floats>(codes + v);
            const Floats code = Grid::nearest(value * inverse / one + old), change = (code - old) * one;
            store(changes[j] + v, change);
            store(codes + v, code);
            store(error + v, load<Floats>(error + v) - change);
        }
        std::memcpy(block.codes + at, codes, count * sizeof(float));
        std::memcpy(block.error + at, error, count * sizeof(float));
    }
}

template <typename Tile>
void for_tiles(const Block& block, Tile tile) {
    for (int64_t n = block.first; n < block.last; n += kTile) {
        tile(block, n, block.last - n < kTile ? block.last - n : kTile);
    }
}

// Scales [rows, columns / size] of float32 weights [rows, columns], each by the search.
template <typename Grid, int64_t kSize>
void search_rows(
    const float* weight, float* scales, int64_t rows, int64_t columns, int64_t any_size, const Search& given) {
    const int64_t size = kSize ? kSize : any_size;
    const float* importance = given.importance;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < columns; c += size) {
            const uint32_t* row = (const uint32_t*)weight + r * columns + c;
            uint32_t most = 0;
            for (int64_t i = 0; i < size; i++) {
                const uint32_t magnitude = row[i] & Fp32::kMagnitude;
                most = magnitude > most ? magnitude : most;
            }
            const float base = base_scale<Grid>(Fp32::load1(most)), inverse = 1.0f / power_of_two(base);
            for (int64_t i = 0; i < size; i++) given.lane[i] = Fp32::load1(row[i]) * inverse;
            Search search = given;
            search.importance = importance + c;
            scales[r * (columns / size) + c / size] = best_scale<Grid, false, kSize, true>(search, size, base);
        }
    }
}

template <typename Grid>
void search_rows(
    const float* weight, float* scales, int64_t rows, int64_t columns, int64_t size, const Search& search) {
    switch (size) {
        case 32: return search_rows<Grid, 32>(weight, scales, rows, columns, size, search);
        case 64: return search_rows<Grid, 64>(weight, scales, rows, columns, size, search);
        case 128: return search_rows<Grid, 128>(weight, scales, rows, columns, size, search);
        default: return search_rows<Grid, 0>(weight, scales, rows, columns, size, search);
    }
}

}  // namespace

extern "C" void llama4_quant_fix_block(const Block* block) {
    for_tiles(*block, block->grid == 0 ? fix_tile<Int4> : fix_tile<Fp8>);
}

extern "C" void llama4_quant_descend_block(const Block* block) {
    for_tiles(*block, block->grid == 0 ? descend_tile<Int4> : descend_tile<Fp8>);
}

// `importance` has kLanes more elements than columns; `scratch` is zeros, twice `size` and kLanes more each.
extern "C" void llama4_quant_search(
    const float* weight, const float* importance, const float* factors, int64_t num_factors, float* scratch,
    float* scales, int64_t rows, int64_t columns, int64_t size, int32_t grid) {
    const Search search = {factors, num_factors, scratch, scratch + size + 16, importance};
    if (grid == 0) search_rows<Int4>(weight, scales, rows, columns, size, search);
    if (grid == 1) search_rows<Fp8>(weight, scales, rows, columns, size, search);
}
