// Attention of single queries by the matrix unit (AMX): the heads that share keys, up to 16 at a time, and a part of the
// columns of a cache.
//
// First keys: tiles of 16 columns x 32 dims, in bf16 the cache's own memory, times tiles of 32 dims x 16 heads make
// scores; with all scores of the part known, weights are e^(score - largest), rounded to bf16. Then values: tiles of heads
// x 32 columns times tiles of 32 columns x 16 dims, for which two columns at a time are interleaved. Codes of one byte
// become bf16 on the way. While one step is decoded the matrix unit works on the step before.
//
// Memory is never idle: lines are fetched into the second cache all the time, a few after every few instructions, since a
// processor that waits for room to fetch does nothing else. Behind the keys come the values, behind these what the caller
// reads next.

#pragma once

#include "cache_rows.h"
#include "floats.h"
#include "matrix_unit.h"

namespace attention_tiles {

using tiles::kSide;

constexpr int64_t kStep = 32;      // columns
constexpr int64_t kTile = 1024;    // bytes
constexpr int64_t kAhead = 16384;  // bytes from what is read to what is fetched

// Some columns of one group of one row.
struct Part {
    const uint8_t *keys, *values;               // [columns, dim]
    const uint16_t *key_scales, *value_scales;  // bf16 [columns], or null
    const float* bias;                          // [columns], or null
    const uint8_t* next;                        // what is read afterwards
    int64_t columns, dim;
    float scale;  // of all scores
};

struct Result {
    float *output, *largest, *sums;  // [heads, dim], not yet divided by the sums; [heads]
};

// Tiles 0 to 2 have a row for each head: weights, and sums of results. 3 to 5 have a column for each of kWide heads:
// queries, and scores. 6 and 7 are whole: keys or values.
template <Format kFormat, int kWide>  // 8 or 16
class Heads {
   public:
    Heads(const Part& part, const uint16_t* queries, int64_t heads, uint8_t* scratch)
        : part_(part), heads_(heads), width_(Codes<kFormat>::width(part.dim)), bytes_(part.dim * Codes<kFormat>::kBytes) {
        queries_ = scratch;
        decoded_ = queries_ + width_ / 32 * kTile;
        products_ = decoded_ + 4 * kStep * width_;
        sums_ = products_ + 4 * kTile;
        weights_ = sums_ + width_ * heads * 4;
        std::memset(queries_, 0, width_ / 32 * kTile);
        for (int64_t d = 0; d < part.dim; d += 2) {  // pairs of dims x heads
            uint8_t* line = queries_ + codes_.place(d) / 2 * kLine;
            for (int64_t h = 0; h < heads; h++) std::memcpy(line + 4 * h, queries + h * part.dim + d, 4);
        }
    }

    void run(const Result& result) {
        tiles::Shapes shapes;
        for (int i = 0; i < 3; i++) shapes.rows[i] = (uint8_t)heads_;
        for (int i = 3; i < 6; i++) shapes.bytes[i] = 4 * kWide;
        asm volatile("" ::: "memory");
        _tile_loadconfig(&shapes);
        score();
        weigh(result.largest, result.sums);
        add_values(result.output);
        _tile_release();
    }

   private:
    const Part& part_;
    const int64_t heads_, width_, bytes_;  // width: dims as tiles have them, padded; bytes: of a row of codes
    const Codes<kFormat> codes_;
    uint8_t* queries_;   // tiles of 16 pairs of dims x 16 heads
    uint8_t* decoded_;   // two steps of keys [32, width] or of values, tiles of 16 pairs of columns x 16 dims
    uint8_t* products_;  // two steps of two tiles of 16 columns x kWide heads
    uint8_t* sums_;      // tiles of heads x 16 dims
    uint8_t* weights_;   // [steps, heads, 32] scores; in the first half of each line weights take their place
    Floats most_[kWide];
    Ahead ahead_;

    INLINE_MEMBER int64_t row_lines() const { return width_ * Codes<kFormat>::kBytes / kLine; }
    INLINE_MEMBER int64_t steps() const { return (part_.columns + kStep - 1) / kStep; }
    INLINE_MEMBER float* weights_of(int64_t step, int64_t head) const {
        return (float*)(weights_ + (step * heads_ + head) * kStep * 4);
    }
    INLINE_MEMBER uint8_t* decoded(int64_t step) const { return decoded_ + (step & 1) * 2 * kStep * width_; }
    INLINE_MEMBER uint8_t* products_of(int64_t step) const { return products_ + (step & 1) * 2 * kTile; }
    INLINE_MEMBER Rows rows(const uint8_t* codes, int64_t step) const {
        return {codes + step * kStep * bytes_, bytes_, at_most(kStep, part_.columns - step * kStep)};
    }
    INLINE_MEMBER bool is_full(int64_t step) const {
        return (step + 1) * kStep <= part_.columns && part_.dim == width_;
    }

    // Lanes of the 16 columns from `column` on that there are.
    INLINE_MEMBER __mmask16 there(int64_t column) const {
        const int64_t left = part_.columns - column;
        return left >= kSide ? 0xFFFF : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
    }

    // ---- Keys: three of four lines are fetched during products, the last while scores are scaled ----

    // Rows [first, last) of a step as bf16.
    template <bool kIsFull>
    INLINE_MEMBER void decode_keys(const Rows& from, int64_t first, int64_t last, uint8_t* to) {
        const Codes<kFormat> codes = codes_;  // copies stay in registers
        const int64_t size = width_ * codes.kBytes;
        Ahead ahead = ahead_;
        to += first * 2 * width_;
        for (int64_t j = first; j < last; j++) {
            for (int64_t at = 0; at < size; at += kLine) {
                __m512i words[2];
                codes.decode(from.line<kIsFull>(j, at), words);
                ahead.fetch(j % 4 ? 1 : 0);
                for (int64_t i = 0; i < codes.kLines; i++, to += kLine) _mm512_store_si512(to, words[i]);
            }
        }
        ahead_ = ahead;
    }

    INLINE_MEMBER void decode_keys(int64_t step, int64_t first, int64_t last) {
        const Rows from = rows(part_.keys, step);
        if (is_stored(step)) ahead_.fetch(row_lines() * (last - first) / 2);
        else if (is_full(step)) decode_keys<true>(from, first, last, decoded(step));
        else decode_keys<false>(from, first, last, decoded(step));
    }

    // Whether tiles are the cache's own memory.
    INLINE_MEMBER bool is_stored(int64_t step) const { return kFormat == kBf16 && is_full(step); }

    // Products of one step; meanwhile keys of the next are decoded.
    INLINE_MEMBER void multiply_keys(int64_t step) {
        const int64_t stride = 2 * width_, count = width_ / 32;
        const uint8_t* keys = is_stored(step) ? rows(part_.keys, step).first : decoded(step);
        uint8_t* products = products_of(step);
        asm volatile("" ::: "memory");  // GCC does not know that loading a tile reads memory
        _tile_zero(4);
        _tile_zero(5);
        for (int64_t d = 0; d < count; d++) {
            _tile_loadd(3, queries_ + kTile * d, 64);
            _tile_loadd(6, keys + kLine * d, stride);
            _tile_dpbf16ps(4, 6, 3);
            _tile_loadd(7, keys + kLine * d + kSide * stride, stride);
            _tile_dpbf16ps(5, 7, 3);
            if (step + 1 < steps()) decode_keys(step + 1, kStep * d / count, kStep * (d + 1) / count);
        }
        _tile_stored(4, products, 4 * kWide);
        _tile_stored(5, products + kTile, 4 * kWide);
    }

    // Products become scores [heads, 32].
    INLINE_MEMBER void scale(int64_t step) {
        const uint8_t* products = products_of(step);
        for (int64_t half = 0; half < 2; half++) {
            const int64_t column = step * kStep + half * kSide;
            const __mmask16 lanes = there(column);
            __m512 lines[kWide];
            for (int64_t i = 0; i < kWide; i++) lines[i] = _mm512_load_ps(products + half * kTile + i * kLine);
            ahead_.fetch(row_lines() * (kFormat == kBf16 ? 8 : 4));  // bf16 has little to do otherwise
            by_head(lines);
            __m512 factor = _mm512_set1_ps(part_.scale), bias = _mm512_setzero_ps();
            if (part_.key_scales) factor = _mm512_mul_ps(factor, scales(part_.key_scales + column, lanes));
            if (part_.bias) bias = _mm512_maskz_loadu_ps(lanes, part_.bias + column);
            for (int64_t h = 0; h < heads_; h++) {
                const __m512 score = _mm512_fmadd_ps(lines[h], factor, bias);
                const __m512 all = _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), lanes, score);
                most_[h] = (Floats)_mm512_max_ps(all, (__m512)most_[h]);  // of a NaN, what there was
                _mm512_store_ps(weights_of(step, h) + half * kSide, all);
            }
        }
    }

    // 16 columns x kWide heads become kWide heads x 16 columns: each round moves one bit of the number of the head from
    // places in a vector to the number of the vector, and one of the column back.
    static INLINE_MEMBER void by_head(__m512* lines) {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
#pragma GCC unroll 4
        for (int bit = 1; bit < kWide; bit *= 2) {
#pragma GCC unroll 16
            for (int i = 0; i < kWide; i++) {
                if (i & bit) continue;
                const __m512 first = lines[i], second = lines[i + bit];
                lines[i] = _mm512_permutex2var_ps(first, even, second);
                lines[i + bit] = _mm512_permutex2var_ps(first, odd, second);
            }
        }
    }

    static INLINE_MEMBER __m512 scales(const uint16_t* from, __mmask16 there) {
        const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    }

    void score() {
        for (int64_t h = 0; h < heads_; h++) most_[h] = Floats{} - __builtin_inff();
        ahead_ = {part_.keys + kAhead, part_.keys + part_.columns * bytes_, part_.values};
        decode_keys(0, 0, kStep);
        for (int64_t step = 0; step <= steps(); step++) {
            if (step < steps()) multiply_keys(step);
            if (step) scale(step - 1);
        }
    }

    // ---- Weights and values: one of eight lines is fetched with weights, the others during products ----

    // The sum is that of the weights as they are rounded; where these have the scales of values in them, of the others.
    void weigh(float* largest, float* sums) {
        ahead_ = {part_.values + kAhead, part_.values + part_.columns * bytes_, part_.next};
        Floats sum[kWide] = {};
        for (int64_t h = 0; h < heads_; h++) largest[h] = _mm512_reduce_max_ps((__m512)most_[h]);
        for (int64_t step = 0; step < steps(); step++) {
            ahead_.fetch(row_lines() * 4);
            Floats scale[2] = {};
            for (int64_t half = 0; part_.value_scales && half < 2; half++) {
                const int64_t column = step * kStep + half * kSide;
                scale[half] = (Floats)scales(part_.value_scales + column, there(column));
            }
            for (int64_t h = 0; h < heads_; h++) {
                float* own = weights_of(step, h);
                Floats first = exponential(load(own) - largest[h]), second = exponential(load(own + kSide) - largest[h]);
                if (part_.value_scales) {
                    sum[h] += first + second;
                    first *= scale[0], second *= scale[1];
                }
                const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
                _mm512_store_si512(own, rounded);
                if (!part_.value_scales) {
                    sum[h] += (Floats)_mm512_slli_epi32(rounded, 16);
                    sum[h] += (Floats)_mm512_and_si512(rounded, _mm512_set1_epi32((int)0xFFFF0000));
                }
            }
        }
        for (int64_t h = 0; h < heads_; h++) sums[h] = _mm512_reduce_add_ps((__m512)sum[h]);
    }

    // Rows [first, last) of a step, two at a time.
    template <bool kIsFull>
    INLINE_MEMBER void pair_values(const Rows& from, int64_t first, int64_t last, uint8_t* to) {
        const Codes<kFormat> codes = codes_;
        const int64_t size = width_ * codes.kBytes;
        Ahead ahead = ahead_;
        for (int64_t j = first; j < last; j += 2) {
            uint8_t* line = to + j / 2 * kLine;
            for (int64_t at = 0; at < size; at += kLine) {
                __m512i words[4];
                codes.decode_pairs(from.line<kIsFull>(j, at), from.line<kIsFull>(j + 1, at), words);
                ahead.fetch(j % 16 ? 2 : 0);
                for (int64_t i = 0; i < 2 * codes.kLines; i++, line += kTile) _mm512_store_si512(line, words[i]);
            }
        }
        ahead_ = ahead;
    }

    INLINE_MEMBER void pair_values(int64_t step, int64_t first, int64_t last) {
        const Rows from = rows(part_.values, step);
        if (is_full(step)) pair_values<true>(from, first, last, decoded(step));
        else pair_values<false>(from, first, last, decoded(step));
    }

    // Products of one step; meanwhile values of the next are decoded.
    INLINE_MEMBER void multiply_values(int64_t step) {
        const int64_t count = width_ / 32;
        const uint8_t* values = decoded(step);
        asm volatile("" ::: "memory");
        _tile_loadd(0, weights_of(step, 0), kStep * 4);
        for (int64_t pair = 0; pair < count; pair++) {
            uint8_t *first = sums_ + 2 * pair * heads_ * kLine, *second = first + heads_ * kLine;
            _tile_loadd(6, values + 2 * pair * kTile, 64);
            _tile_loadd(1, first, 64);
            _tile_dpbf16ps(1, 0, 6);
            _tile_loadd(7, values + (2 * pair + 1) * kTile, 64);
            _tile_loadd(2, second, 64);
            _tile_dpbf16ps(2, 0, 7);
            if (step + 1 < steps())
                pair_values(step + 1, kStep / 2 * pair / count * 2, kStep / 2 * (pair + 1) / count * 2);
            _tile_stored(1, first, 64);
            _tile_stored(2, second, 64);
        }
    }

    void add_values(float* output) {
        std::memset(sums_, 0, width_ * heads_ * 4);
        pair_values(0, 0, kStep);
        for (int64_t step = 0; step < steps(); step++) multiply_values(step);
        for (int64_t d = 0; d < part_.dim; d += 4) {  // as `decode_pairs` orders them
            const int64_t lines = 2 * codes_.kLines, tile = d / codes_.kCount * lines + d / 4 % lines;
            const int64_t at = d % codes_.kCount / (4 * lines) * 16;
            for (int64_t h = 0; h < heads_; h++)
                std::memcpy(output + h * part_.dim + d, sums_ + (tile * heads_ + h) * kLine + at, 16);
        }
    }
};

template <Format kFormat>
INLINE int64_t scratch_bytes(int64_t columns, int64_t heads, int64_t dim) {
    const int64_t width = Codes<kFormat>::width(dim), count = at_most(heads, kSide);
    return width / 32 * kTile + 4 * kStep * width + 4 * kTile + round_up(columns, kStep) * count * 4 + width * count * 4;
}

// `heads` of at most 16, whose queries are bf16 [heads, dim].
template <Format kFormat>
INLINE void attend(const Part& part, const uint16_t* queries, int64_t heads, uint8_t* scratch, const Result& result) {
    if (heads <= kSide / 2) Heads<kFormat, kSide / 2>(part, queries, heads, scratch).run(result);
    else Heads<kFormat, kSide>(part, queries, heads, scratch).run(result);
}

}  // namespace attention_tiles
