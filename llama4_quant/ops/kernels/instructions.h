// Which instructions the compiler may use, beyond those of `Floats`.

#pragma once

#if defined(__AVX512BW__) && defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define LLAMA4_QUANT_FAST 1
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define LLAMA4_QUANT_TILES 1
#endif
#endif
