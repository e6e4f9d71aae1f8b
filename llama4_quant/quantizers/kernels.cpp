// Quantize and pack one weight in one pass over memory: the compiled twin of quantize.py, search.py and packing.py.
//
// Same bytes as the plain path: every operation that reaches a stored byte is the same IEEE float32 operation, in the
// order that search.py fixes, or provably gives the same value. Compiled with -ffp-contract=off and without any
// fast-math option. Single-threaded, no globals: callers run it from as many threads as they like.
//
// A weight [rows N, columns K] is walked in panels of a few rows that stay in cache. A transposed weight (an expert of
// a fused Llama 4 tensor is stored [in, out]) is turned over panel by panel; after that every row is contiguous.

#include "kernels.h"

#include <cstdlib>

namespace {

constexpr int64_t kLine = 64;    // bytes of a cache line
constexpr int64_t kBlock = 128;  // rows and columns of an FP8 block

// ---- Rows ----

template <typename Source>
INLINE typename Source::Word max_magnitude(const typename Source::Word* row, int64_t size) {
    typename Source::Word most = 0;
    for (int64_t i = 0; i < size; i++) {
        const typename Source::Word magnitude = row[i] & Source::kMagnitude;
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

template <typename Source>
INLINE float to_float(typename Source::Word word) {
    const typename Source::Word words[8] = {word};
    return Source::load8(words)[0];
}

template <typename Source>
INLINE f32x8 load_part(const typename Source::Word* from, int64_t count) {  // fewer than 8 weights, then zeros
    typename Source::Word words[8] = {};
    std::memcpy(words, from, count * sizeof *from);
    return Source::load8(words);
}

template <typename Source>
INLINE void fill_lane(float* lane, const typename Source::Word* row, int64_t size, float power) {
    const float inverse = 1.0f / power;  // of a power of two, so the product is the quotient
    int64_t i = 0;
    for (; i + 8 <= size; i += 8) store(lane + i, Source::load8(row + i) * inverse);
    if (i < size) store(lane + i, load_part<Source>(row + i, size - i) * inverse);
}

// Squares are summed in float32 over at most kRun weights, in units of a power of two near the scale so that they stay
// in range, then in float64. Always the same eight sums in the same order.
constexpr int64_t kRun = 128;

struct Sums {
    f64x4 error = {}, weight = {};
};

INLINE f64x4 widen_and_fold(f32x8 values) {
    f32x4 halves[2];
    std::memcpy(halves, &values, sizeof halves);
    return __builtin_convertvector(halves[0], f64x4) + __builtin_convertvector(halves[1], f64x4);
}

INLINE double total(f64x4 four) { return (four[0] + four[2]) + (four[1] + four[3]); }

template <typename Source, typename Grid>
INLINE void encode_run(const typename Source::Word* row, int64_t size, float scale, uint8_t* codes, Sums& sums) {
    const float unit = power_of_two(scale), inverse = 1.0f / unit, scale_in_units = scale * inverse;
    f32x8 error_squares = {}, weight_squares = {};
    const auto encode8 = [&](f32x8 weight) __attribute__((always_inline)) {
        const f32x8 ratio = weight / scale;
        const f32x8 value = Grid::nearest(ratio);
        const f32x8 exact = weight * inverse, error = multiply_add(-value, f32x8{} + scale_in_units, exact);
        error_squares = multiply_add(error, error, error_squares);
        weight_squares = multiply_add(exact, exact, weight_squares);
        return __builtin_convertvector(Grid::code(ratio, value), u8x8);
    };
    int64_t i = 0;
    for (; i + 8 <= size; i += 8) store(codes + i, encode8(Source::load8(row + i)));
    if (i < size) {
        const u8x8 last = encode8(load_part<Source>(row + i, size - i));
        std::memcpy(codes + i, &last, size - i);
    }
    const double square = (double)unit * unit;
    sums.error += widen_and_fold(error_squares) * square;
    sums.weight += widen_and_fold(weight_squares) * square;
}

template <typename Source, typename Grid>
INLINE void encode(const typename Source::Word* row, int64_t size, float scale, uint8_t* codes, Sums& sums) {
    int64_t i = 0;
    for (; i + kRun <= size; i += kRun) encode_run<Source, Grid>(row + i, kRun, scale, codes + i, sums);
    if (i < size) encode_run<Source, Grid>(row + i, size - i, scale, codes + i, sums);
}

// Two bytes 0x0l 0x0h become the byte 0xhl. `nibbles` is zero from `size` up to a multiple of 8.
INLINE void pack(const uint8_t* nibbles, int64_t size, uint8_t* packed) {
    const int64_t num_bytes = (size + 7) / 8 * 4;
    for (int64_t i = 0; i < num_bytes; i++) {
        uint16_t pair;
        std::memcpy(&pair, nibbles + 2 * i, 2);
        packed[i] = (uint8_t)(pair | (pair >> 4));
    }
}

// ---- Panels ----

// Word [r, c] of a panel from `source[r + c * stride]`: 4 x 4 words at a time for 16-bit words, in 64-bit registers.
INLINE void turn(
    const uint16_t* source, int64_t stride, int64_t rows, int64_t columns, uint16_t* panel, int64_t width) {
    constexpr int64_t kAhead = 8;  // hardware prefetch does not follow strides of a page or more
    constexpr uint64_t kEven16 = 0x0000FFFF0000FFFFu, kLow32 = 0xFFFFFFFFu;
    const int64_t rows4 = rows / 4 * 4, columns4 = columns / 4 * 4;
    for (int64_t c = 0; c < columns4; c += 4) {
        const uint16_t* from = source + c * stride;
        for (int64_t i = 0; i < 4; i++)
            for (int64_t r = 0; r < rows; r += 32) __builtin_prefetch(from + (kAhead + i) * stride + r);
        for (int64_t r = 0; r < rows4; r += 4) {
            const uint64_t w0 = load<uint64_t>(from + r), w1 = load<uint64_t>(from + r + stride);
            const uint64_t w2 = load<uint64_t>(from + r + 2 * stride), w3 = load<uint64_t>(from + r + 3 * stride);
            const uint64_t even01 = (w0 & kEven16) | ((w1 & kEven16) << 16);
            const uint64_t odd01 = ((w0 >> 16) & kEven16) | (w1 & ~kEven16);
            const uint64_t even23 = (w2 & kEven16) | ((w3 & kEven16) << 16);
            const uint64_t odd23 = ((w2 >> 16) & kEven16) | (w3 & ~kEven16);
            uint16_t* to = panel + r * width + c;
            store(to, (even01 & kLow32) | (even23 << 32));
            store(to + width, (odd01 & kLow32) | (odd23 << 32));
            store(to + 2 * width, (even01 >> 32) | (even23 & ~kLow32));
            store(to + 3 * width, (odd01 >> 32) | (odd23 & ~kLow32));
        }
        for (int64_t r = rows4; r < rows; r++) {
            for (int64_t i = 0; i < 4; i++) panel[r * width + c + i] = from[r + i * stride];
        }
    }
    for (int64_t c = columns4; c < columns; c++) {
        for (int64_t r = 0; r < rows; r++) panel[r * width + c] = source[r + c * stride];
    }
}

INLINE void turn(
    const uint32_t* source, int64_t stride, int64_t rows, int64_t columns, uint32_t* panel, int64_t width) {
    for (int64_t c = 0; c < columns; c++) {
        for (int64_t r = 0; r < rows; r++) panel[r * width + c] = source[r + c * stride];
    }
}

}  // namespace

// Fields as in compiled.py. Strides count elements.
struct Job {
    const void* weight;
    void* codes;         // int4: bytes [rows, ceil(columns / 8) * 4]; fp8: bytes [rows, columns]
    void* scale;         // bf16 (int4) or float32 (fp8), row-major
    double* row_error;   // [rows] sum of (weight - code * scale)^2
    double* row_weight;  // [rows] sum of weight^2
    const float* factors;
    int64_t num_factors;
    int64_t rows, columns, row_stride, column_stride;
    int64_t group_size;    // columns that share a scale: group size, columns (channel), or 128 (block)
    int32_t source, grid;  // 0 bf16, 1 fp16, 2 float32; 0 int4, 1 fp8
    int32_t is_block;
};

namespace {

template <typename Source, typename Grid>
struct Walk {
    typedef typename Source::Word Word;
    const Job& job;
    Search search;
    uint8_t* nibbles;
    Word* panel;
    int64_t panel_rows, panel_columns, width;
    bool finite = true;

    // Group and channel: one scale for each `size` weights of a row.
    template <int64_t kSize>
    INLINE void row_scales(
        Walk& walk, const Word* row, int64_t first, int64_t columns, int64_t r, uint8_t* codes, Sums& sums) {
        const Job& job = walk.job;
        const int64_t size = kSize ? kSize : job.group_size;
        typename Grid::Scale* scales = (typename Grid::Scale*)job.scale + r * (job.columns / size) + first / size;
        for (int64_t c = 0; c < columns; c += size) {
            const Word most = max_magnitude<Source>(row + c, size);
            walk.finite = walk.finite && most < Source::kInfinity;
            const float base = base_scale<Grid>(to_float<Source>(most));
            float scale = round_to_bf16(base);
            if (walk.search.num_factors) {
                fill_lane<Source>(walk.search.lane, row + c, size, power_of_two(base));
                scale = best_scale<Grid, Source::kShort, kSize>(walk.search, size, base);
            }
            scales[c / size] = Grid::stored(scale);
            encode<Source, Grid>(row + c, size, scale, codes + c, sums);
        }
    }

    void segment(const Word* row, int64_t first, int64_t columns, int64_t r) {
        Sums sums;
        const bool packed = sizeof(typename Grid::Scale) == 2;
        const int64_t start = packed ? r * ((job.columns + 7) / 8 * 4) + first / 2 : r * job.columns + first;
        uint8_t* out = (uint8_t*)job.codes + start;
        uint8_t* codes = packed ? nibbles : out;
        switch (job.group_size) {
            case 32: row_scales<32>(*this, row, first, columns, r, codes, sums); break;
            case 64: row_scales<64>(*this, row, first, columns, r, codes, sums); break;
            case 128: row_scales<128>(*this, row, first, columns, r, codes, sums); break;
            default: row_scales<0>(*this, row, first, columns, r, codes, sums);
        }
        if (packed) pack(codes, columns, out);
        job.row_error[r] += total(sums.error);
        job.row_weight[r] += total(sums.weight);
    }

    void block(const Word* rows, int64_t stride, int64_t first_row, int64_t num_rows, int64_t first) {
        Word most = 0;
        for (int64_t r = 0; r < num_rows; r++) {
            const Word magnitude = max_magnitude<Source>(rows + r * stride, kBlock);
            most = magnitude > most ? magnitude : most;
        }
        finite = finite && most < Source::kInfinity;
        const float base = base_scale<Grid>(to_float<Source>(most));
        float scale = round_to_bf16(base);
        if (search.num_factors) {
            std::memset(search.lane, 0, kBlock * kBlock * sizeof(float));
            for (int64_t r = 0; r < num_rows; r++) {
                fill_lane<Source>(search.lane + r * kBlock, rows + r * stride, kBlock, power_of_two(base));
            }
            scale = best_scale<Grid, Source::kShort, kBlock * kBlock>(search, kBlock * kBlock, base);
        }
        const int64_t index = first_row / kBlock * (job.columns / kBlock) + first / kBlock;
        ((typename Grid::Scale*)job.scale)[index] = Grid::stored(scale);
        for (int64_t r = first_row; r < first_row + num_rows; r++) {
            Sums sums;
            uint8_t* codes = (uint8_t*)job.codes + r * job.columns + first;
            encode<Source, Grid>(rows + (r - first_row) * stride, kBlock, scale, codes, sums);
            job.row_error[r] += total(sums.error);
            job.row_weight[r] += total(sums.weight);
        }
    }

    void fill_panel(const Word* from, int64_t rows, int64_t columns) {
        if (job.row_stride == 1) {
            turn(from, job.column_stride, rows, columns, panel, width);
            return;
        }
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t c = 0; c < columns; c++) {
                panel[r * width + c] = from[r * job.row_stride + c * job.column_stride];
            }
        }
    }

    void run() {
        for (int64_t r = 0; r < job.rows && finite; r += panel_rows) {
            const int64_t rows = job.rows - r < panel_rows ? job.rows - r : panel_rows;
            for (int64_t c = 0; c < job.columns; c += panel_columns) {
                const int64_t columns = job.columns - c < panel_columns ? job.columns - c : panel_columns;
                const Word* from = (const Word*)job.weight + r * job.row_stride + c * job.column_stride;
                int64_t stride = job.row_stride;
                if (job.column_stride != 1) {
                    fill_panel(from, rows, columns);
                    from = panel;
                    stride = width;
                }
                if (job.is_block) {
                    for (int64_t b = 0; b < columns; b += kBlock) block(from + b, stride, r, rows, c + b);
                } else {
                    for (int64_t i = 0; i < rows; i++) segment(from + i * stride, c, columns, r + i);
                }
            }
        }
    }
};

INLINE int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

constexpr int64_t kPanelRows = 64, kPanelColumns = 1024;  // 128 KiB in bf16: a part of the second cache

template <typename Source, typename Grid>
int32_t run(const Job& job) {
    typedef typename Source::Word Word;
    const bool channel = !job.is_block && job.group_size == job.columns;
    const int64_t panel_rows = job.is_block ? kBlock : channel ? kPanelRows / 2 : kPanelRows;
    const int64_t panel_columns = channel ? job.columns : kPanelColumns;
    const int64_t lane = round_up(job.is_block ? kBlock * kBlock : job.group_size, kLine / 4) * 4;
    // A row of the panel starts one line after a multiple of a page at worst, so that its rows do not share cache sets.
    const int64_t width = (round_up(panel_columns * sizeof(Word), kLine) + kLine) / sizeof(Word);
    const int64_t nibbles = round_up(panel_columns, kLine);
    const int64_t panel = job.column_stride == 1 ? 0 : panel_rows * width * sizeof(Word);
    char* scratch = (char*)std::aligned_alloc(kLine, 2 * lane + nibbles + panel);
    if (!scratch) return 2;
    std::memset(scratch + 2 * lane, 0, nibbles);
    const Search search = {job.factors, job.num_factors, (float*)scratch, (float*)(scratch + lane)};
    Walk<Source, Grid> walk = {job, search, (uint8_t*)scratch + 2 * lane, (Word*)(scratch + 2 * lane + nibbles),
                               panel_rows, panel_columns, width};
    walk.run();
    std::free(scratch);
    return walk.finite ? 0 : 1;
}

template <typename Source>
int32_t run(const Job& job) {
    return job.grid == 0 ? run<Source, Int4>(job) : run<Source, Fp8>(job);
}

}  // namespace

// 0: done; 1: NaN or Inf in the weight (outputs are unfinished); 2: out of memory. Row sums must come in as zeros.
extern "C" int32_t llama4_quant_quantize(const Job* job) {
    switch (job->source) {
        case 0: return run<Bf16>(*job);
        case 1: return run<Fp16>(*job);
        default: return run<Fp32>(*job);
    }
}
