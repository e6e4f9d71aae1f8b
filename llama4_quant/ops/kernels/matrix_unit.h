// The matrix unit (AMX): whether there is one, the shape of its tiles, and a transposition of them.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "task.h"

namespace tiles {

constexpr int64_t kSide = 16;  // rows of a tile, and its columns of 32 bits

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

}  // namespace tiles
