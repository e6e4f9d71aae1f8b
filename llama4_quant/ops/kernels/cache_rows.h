// Rows of a cache, keys or values, as bf16 for the matrix unit: a line of 64 bytes at a time, and fetched before.

#pragma once

#include "codes.h"

namespace attention_tiles {

// A line of 64 bytes of a row of codes is kLines of bf16.
template <Format kFormat>
struct Codes {
    static constexpr int64_t kBytes = kFormat == kBf16 ? 2 : 1, kLines = 2 / kBytes, kCount = kLine / kBytes;
    const vectors::Table table = table_of_all();

    static const vectors::Table& table_of_all() {  // made once
        static const vectors::Table all = kFormat == kFp8 ? vectors::fp8_table() : vectors::int8_table();
        return all;
    }

    static int64_t width(int64_t dim) { return round_up(dim, kCount); }
    static int64_t place(int64_t d) { return kFormat == kBf16 ? d : d / kCount * kCount + vectors::fp8_place(d); }

    INLINE_MEMBER void decode(__m512i codes, __m512i* words) const {
        if (kFormat == kBf16) words[0] = codes;
        else if (kFormat == kFp8) vectors::decode_fp8(codes, table, words[0], words[1]);
        else vectors::decode_int8(codes, table, words[0], words[1]);
    }

    // Of two rows, as 2 * kLines lines of pairs. Line i has of each 128 bits of a row the i-th four codes.
    INLINE_MEMBER void decode_pairs(__m512i a, __m512i b, __m512i* words) const {
        if (kFormat == kBf16) {
            words[0] = _mm512_unpacklo_epi16(a, b), words[1] = _mm512_unpackhi_epi16(a, b);
        } else {
            decode(_mm512_unpacklo_epi8(a, b), words);
            decode(_mm512_unpackhi_epi8(a, b), words + 2);
        }
    }
};

// Lines of rows, where some are missing at the end; zeros there.
struct Rows {
    const uint8_t* first;
    int64_t bytes, count;

    template <bool kIsFull>
    INLINE_MEMBER __m512i line(int64_t row, int64_t at) const {
        if (kIsFull) return _mm512_loadu_si512(first + row * bytes + at);
        return row < count ? vectors::load_bytes(first + row * bytes + at, bytes - at) : _mm512_setzero_si512();
    }
};

// Memory that is fetched a line at a time, each some time before it is read: after `stop` comes `then`.
struct Ahead {
    const uint8_t *at, *stop, *then;

    INLINE_MEMBER void fetch(int64_t lines) {
        for (int64_t i = 0; i < lines; i++, at += kLine) _mm_prefetch((const char*)at, _MM_HINT_T1);
        if (at >= stop) at = then + (at - stop), stop = (const uint8_t*)UINTPTR_MAX;
    }
};

}  // namespace attention_tiles
