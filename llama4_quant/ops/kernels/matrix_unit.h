// The matrix unit (AMX): whether a process may use it, and the shape of its tiles.

#pragma once

#include "instructions.h"
#include "task.h"

#ifdef LLAMA4_QUANT_TILES
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tiles {

constexpr int64_t kSide = 16;  // rows of a tile, and its columns of 32 bits

// Linux keeps the matrix unit for processes that ask.
INLINE bool allowed() {
#ifdef LLAMA4_QUANT_TILES
    static const bool is_allowed = [] {
        constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
        return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
    }();
    return is_allowed;
#else
    return false;
#endif
}

struct alignas(64) Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

}  // namespace tiles
