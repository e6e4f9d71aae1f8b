// Quantize and pack one weight in one pass over memory: the compiled twin of quantize.py, search.py and packing.py.
//
// Same bytes as the plain path: every operation that reaches a stored byte is the same IEEE float32 operation, in the
// order that search.py fixes, or provably gives the same value. Compiled with -ffp-contract=off and without any
// fast-math option. Single-threaded, no globals: callers run it from as many threads as they like.
//
// A weight [rows N, columns K] is walked in panels of a few rows that stay in cache. A transposed weight (an expert of
// a fused Llama 4 tensor is stored [in, out]) is turned over panel by panel; after that every row is contiguous.

#include "kernels.h"
#include "solver.h"

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
INLINE Floats load_part(const typename Source::Word* from, int64_t count) {  // fewer than kLanes weights, then zeros
    typename Source::Word words[kLanes] = {};
    std::memcpy(words, from, count * sizeof *from);
    return Source::load_lanes(words);
}

template <typename Source>
INLINE void fill_lane(float* lane, const typename Source::Word* row, int64_t size, float power) {
    const float inverse = 1.0f / power;  // of a power of two, so the product is the quotient
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(lane + i, Source::load_lanes(row + i) * inverse);
    if (i < size) store(lane + i, load_part<Source>(row + i, size - i) * inverse);
}

// Squares are summed in float32 over at most kRun weights, in units of a power of two near the scale so that they stay
// in range, then in float64. Always the same sums, one for each lane of a vector, in the same order.
constexpr int64_t kRun = 128;

struct Sums {
    f64x4 error = {}, weight = {};
};

INLINE f64x4 fold_and_widen(Floats values) {
    f32x4 quarters[kLanes / 4];
    std::memcpy(quarters, &values, sizeof quarters);
    for (int64_t i = kLanes / 4; i > 1; i /= 2)
        for (int64_t j = 0; j < i / 2; j++) quarters[j] += quarters[j + i / 2];
    return widen(quarters[0]);
}

INLINE double total(f64x4 four) { return (four[0] + four[2]) + (four[1] + four[3]); }

// weight / scale, both in units of a power of two, to the nearest code as if divided. The product with the reciprocal
// errs by less than 2^-22, which matters only at a midpoint between codes (see quantize.py). Such a quotient is a
// float32, and one step of correction with the remainder, which a fused operation gives exactly, makes it exact.
template <typename Source>
INLINE Floats quotient(Floats weight, Floats scale, Floats reciprocal) {
    if (!kFused || !Source::kShort) return weight / scale;
    const Floats near = weight * reciprocal, remainder = multiply_add(-near, scale, weight);
    return multiply_add(remainder, reciprocal, near);  // a zero may have lost its sign
}

template <typename Source, typename Grid>
INLINE void encode_run(const typename Source::Word* row, int64_t size, float scale, uint8_t* codes, Sums& sums) {
    const float unit = power_of_two(scale), inverse = 1.0f / unit;
    const Floats scale_in_units = Floats{} + scale * inverse, reciprocal = 1.0f / scale_in_units;
    Floats error_squares = {}, weight_squares = {};
    const auto encode_lanes = [&](Floats weight) __attribute__((always_inline)) {
        const Floats exact = weight * inverse;
        const Floats value = Grid::nearest(quotient<Source>(exact, scale_in_units, reciprocal));
        const Floats error = multiply_add(-value, scale_in_units, exact);
        error_squares = multiply_add(error, error, error_squares);
        weight_squares = multiply_add(exact, exact, weight_squares);
        return __builtin_convertvector(Grid::code(exact, value), Bytes);
    };
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(codes + i, encode_lanes(Source::load_lanes(row + i)));
    if (i < size) {
        const Bytes last = encode_lanes(load_part<Source>(row + i, size - i));
        std::memcpy(codes + i, &last, size - i);
    }
    const double square = (double)unit * unit;
    sums.error += fold_and_widen(error_squares) * square;
    sums.weight += fold_and_widen(weight_squares) * square;
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

// 8 x 8 words from `from[r + c * stride]` to `to[r * width + c]`.
#ifdef __SSE2__
INLINE void turn8(const uint16_t* from, int64_t stride, uint16_t* to, int64_t width) {
    __m128i words[8], mixed[8];
    for (int64_t c = 0; c < 8; c++) words[c] = load<__m128i>(from + c * stride);
    for (int64_t step = 0; step < 3; step++) {  // each interleaves a line with the one four further on
        for (int64_t i = 0; i < 4; i++) {
            mixed[2 * i] = _mm_unpacklo_epi16(words[i], words[i + 4]);
            mixed[2 * i + 1] = _mm_unpackhi_epi16(words[i], words[i + 4]);
        }
        std::memcpy(words, mixed, sizeof words);
    }
    for (int64_t r = 0; r < 8; r++) store(to + r * width, words[r]);
}
#else
INLINE void turn8(const uint16_t* from, int64_t stride, uint16_t* to, int64_t width) {
    for (int64_t r = 0; r < 8; r++) {
        for (int64_t c = 0; c < 8; c++) to[r * width + c] = from[r + c * stride];
    }
}
#endif

// Word [r, c] of a panel from `source[r + c * stride]`.
INLINE void turn(
    const uint16_t* source, int64_t stride, int64_t rows, int64_t columns, uint16_t* panel, int64_t width) {
    constexpr int64_t kAhead = 32;  // hardware prefetch does not follow strides of a page or more
    const int64_t rows8 = rows / 8 * 8, columns8 = columns / 8 * 8;
    for (int64_t c = 0; c < columns8; c += 8) {
        const uint16_t* from = source + c * stride;
        for (int64_t i = 0; i < 8; i++) {
            for (int64_t r = 0; r < rows; r += kLine / 2) __builtin_prefetch(from + (kAhead + i) * stride + r, 0, 2);
        }
        for (int64_t r = 0; r < rows8; r += 8) turn8(from + r, stride, panel + r * width + c, width);
        for (int64_t r = rows8; r < rows; r++) {
            for (int64_t i = 0; i < 8; i++) panel[r * width + c + i] = from[r + i * stride];
        }
    }
    for (int64_t c = columns8; c < columns; c++) {
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
            const float base = base_scale<Grid>(Source::load1(most));
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
        const float base = base_scale<Grid>(Source::load1(most));
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

constexpr int64_t kPanelRows = 128, kPanelColumns = 1024;  // 256 KiB in bf16: a part of the second cache

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
