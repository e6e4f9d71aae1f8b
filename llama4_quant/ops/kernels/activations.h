// Activations of an FP8 weight, rounded to FP8 with a dynamic scale: as round_activations_fp8 in reference.py, where
// scale and quotient are bf16.

#pragma once

#include "task.h"

namespace {

constexpr float kFp8Max = 448.0f, kBf16Epsilon = 0x1p-7f;

INLINE float round_bf16(float value) {  // NaN and infinity stay what they are
    const uint32_t word = bits<uint32_t>(value);
    const uint32_t rounded = (word + 0x7FFF + ((word >> 16) & 1)) & 0xFFFF0000u;
    return bits<float>((word & 0x7F800000) == 0x7F800000 ? word : rounded);
}

INLINE float nearest_e4m3(float value) {  // magnitude at most 448; adding and subtracting 1.5 * 2^23 units rounds
    const float power = bits<float>(bits<uint32_t>(value) & 0x7F800000);
    const float shift = (power < 0x1p-6f ? 0x1p-6f : power) * 0x1.8p20f;
    return (value + shift) - shift;
}

// Writes `size` codes as bf16, which holds every e4m3 number; returns their scale.
INLINE float round_activations(const uint16_t* x, int64_t size, uint16_t* codes) {
    uint16_t most = 0;  // magnitudes order like integers, NaN above all
    for (int64_t k = 0; k < size; k++) {
        const uint16_t magnitude = x[k] & 0x7FFF;
        most = magnitude > most ? magnitude : most;
    }
    float scale = round_bf16(from_bf16(most) / kFp8Max);
    scale = scale == 0.0f ? kBf16Epsilon : scale;
    for (int64_t k = 0; k < size; k++) {
        float ratio = round_bf16(from_bf16(x[k]) / scale);
        ratio = ratio > kFp8Max ? kFp8Max : ratio;
        ratio = ratio < -kFp8Max ? -kFp8Max : ratio;
        codes[k] = (uint16_t)(bits<uint32_t>(nearest_e4m3(ratio)) >> 16);
    }
    return scale;
}

}  // namespace
