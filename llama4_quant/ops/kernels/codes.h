// Codes of one byte as bf16, exactly, 64 at a time: by tables of bytes (AVX-512 VBMI).

#pragma once

#include <immintrin.h>

#include "task.h"

namespace vectors {

INLINE __m512i load_bytes(const uint8_t* from, int64_t count) {  // then zeros
    return _mm512_maskz_loadu_epi8(count >= 64 ? ~0ull : (1ull << count) - 1, from);
}

struct Table {  // of magnitudes as bf16: lower and upper bytes
    __m512i low[2], high[2];
};

template <typename Function>
INLINE Table table_of(Function&& magnitude) {
    alignas(64) uint8_t low[128], high[128];
    for (int code = 0; code < 128; code++) {
        const uint16_t word = to_bf16(magnitude((uint8_t)code));
        low[code] = (uint8_t)word, high[code] = (uint8_t)(word >> 8);
    }
    return {{_mm512_load_si512(low), _mm512_load_si512(low + 64)},
            {_mm512_load_si512(high), _mm512_load_si512(high + 64)}};
}

INLINE Table fp8_table() { return table_of(from_e4m3); }
INLINE Table int8_table() {
    return table_of([](uint8_t code) { return (float)code; });
}

INLINE __m512i with_signs(__m512i magnitudes, __m512i codes) {
    return _mm512_ternarylogic_epi32(magnitudes, codes, _mm512_set1_epi8((char)0x80), 0xF8);  // a | b & c
}

// Place in a line of 64 words of the code that decoding gives there.
constexpr int64_t fp8_place(int64_t k) { return k % 64 / 16 * 8 + k % 8 + (k % 16 < 8 ? 0 : 32); }

// 64 codes as bf16: of each 16 of them the first eight, then the others.
INLINE void decode_fp8(__m512i codes, const Table& table, __m512i& first, __m512i& second) {
    const __m512i low = _mm512_permutex2var_epi8(table.low[0], codes, table.low[1]);
    const __m512i high = with_signs(_mm512_permutex2var_epi8(table.high[0], codes, table.high[1]), codes);
    first = _mm512_unpacklo_epi8(low, high);
    second = _mm512_unpackhi_epi8(low, high);
}

// Likewise, of int8.
INLINE void decode_int8(__m512i codes, const Table& table, __m512i& first, __m512i& second) {
    const __m512i magnitudes = _mm512_abs_epi8(codes);
    const __m512i low = _mm512_permutex2var_epi8(table.low[0], magnitudes, table.low[1]);
    const __m512i high = with_signs(_mm512_permutex2var_epi8(table.high[0], magnitudes, table.high[1]), codes);
    // -128 has a magnitude that tables lack, and they give that of 0: its lower byte is right, and the upper is 0xC3.
    const __m512i all = _mm512_mask_mov_epi8(high, _mm512_movepi8_mask(magnitudes), _mm512_set1_epi8((char)0xC3));
    first = _mm512_unpacklo_epi8(low, all);
    second = _mm512_unpackhi_epi8(low, all);
}

}  // namespace vectors
