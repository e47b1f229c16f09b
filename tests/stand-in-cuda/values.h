// Values in memory, by CUDA's numbers of their types: 0 for f32, 2 for f16, 14 for bf16.
#pragma once
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

// In the stand-in for the driver: runs it now, or when the graph that is captured is launched.
extern "C" void stand_in_submit(const std::function<void()> *);

static float load(const void *memory, int type, int64_t i) {
    if (type == 0) return ((const float *)memory)[i];
    uint16_t bits = ((const uint16_t *)memory)[i];
    if (type == 14) {
        uint32_t wide = (uint32_t)bits << 16;
        float value;
        memcpy(&value, &wide, 4);
        return value;
    }
    _Float16 half;
    memcpy(&half, &bits, 2);
    return (float)half;
}
static void store(void *memory, int type, int64_t i, float value) {
    if (type == 0) {
        ((float *)memory)[i] = value;
    } else if (type == 14) {
        uint32_t bits;
        memcpy(&bits, &value, 4);
        bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
        ((uint16_t *)memory)[i] = nan ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    } else {
        _Float16 half = (_Float16)value;
        memcpy((uint16_t *)memory + i, &half, 2);
    }
}
