// Code that all kernels share. It is compiled at run time, once for each type T of a map's values, which
// DDPM_F32, DDPM_BF16 or DDPM_F16 selects. T is only the storage type: all arithmetic is in f32 or f64.
//
// Feature maps are (batch, height, width, channels), contiguous. Sums have a fixed order: no kernel adds
// floating-point numbers with atomics.

typedef unsigned int u32;
typedef unsigned long long u64;

#if defined(DDPM_F32)

typedef float T;
__device__ inline float get(T value) { return value; }
__device__ inline T put(float value) { return value; }
__device__ inline u32 bits_of(T value) { return __float_as_uint(value); }
__device__ inline T of_bits(u32 bits) { return __uint_as_float(bits); }

#else

struct T {
    unsigned short bits;
};
__device__ inline u32 bits_of(T value) { return value.bits; }
__device__ inline T of_bits(u32 bits) { return {(unsigned short)bits}; }

#endif

#if defined(DDPM_BF16)

__device__ inline float get(T value) { return __uint_as_float((u32)value.bits << 16); }
__device__ inline T put(float value) {
    T result;
    u32 bits = __float_as_uint(value);
    // Rounds to nearest, ties to even. NaN stays NaN.
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    result.bits = nan ? (unsigned short)0x7fff
                      : (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    return result;
}

#elif defined(DDPM_F16)

#ifndef DDPM_HALF_CONVERSIONS
__device__ inline float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ inline unsigned short float_to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif
__device__ inline float get(T value) { return half_to_float(value.bits); }
__device__ inline T put(float value) {
    T result;
    result.bits = float_to_half(value);
    return result;
}

#endif

// The standard names for these need headers, which are not available here.
__device__ inline float infinite() { return __uint_as_float(0x7f800000u); }
__device__ inline float not_a_number() { return __uint_as_float(0x7fffffffu); }
__device__ inline bool is_finite(double x) { return x - x == 0.0; }

// Threads of a block that computes a sum.
#define THREADS 256

__device__ inline u64 global_index() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }

// A map has less than 2^32 values, so divided indices have 32 bits. A thread handles `width` adjacent
// values, beginning at `width` times its global index. `width` is a parameter of the launch: 16 or 8 bytes
// of values if it divides the number of channels, or else one value.
#define WIDTH (16 / (u32)sizeof(T))

// The values of a thread. Entries from `width` on are zero.
struct Values {
    float at[WIDTH];
};

#define EACH(k) _Pragma("unroll") for (u32 k = 0; k < WIDTH; ++k)

template <u32 N> struct alignas(N * sizeof(T)) Pack {
    T at[N];
};

template <u32 N> __device__ inline void load_pack(const T *x, Values &values) {
    Pack<N> pack = *(const Pack<N> *)x;
    EACH(k) if (k < N) values.at[k] = get(pack.at[k % N]);
}

template <u32 N> __device__ inline void store_pack(T *x, const Values &values) {
    Pack<N> pack;
    EACH(k) if (k < N) pack.at[k % N] = put(values.at[k]);
    *(Pack<N> *)x = pack;
}

__device__ inline Values zeros() {
    Values values;
    EACH(k) values.at[k] = 0.0f;
    return values;
}

__device__ inline Values load(const T *x, u32 width) {
    Values values = zeros();
    if (width == WIDTH) {
        load_pack<WIDTH>(x, values);
    } else if (width == WIDTH / 2) {
        load_pack<WIDTH / 2>(x, values);
    } else {
        values.at[0] = get(*x);
    }
    return values;
}

__device__ inline void store(T *x, const Values &values, u32 width) {
    if (width == WIDTH) {
        store_pack<WIDTH>(x, values);
    } else if (width == WIDTH / 2) {
        store_pack<WIDTH / 2>(x, values);
    } else {
        *x = put(values.at[0]);
    }
}

// The same values as they are in memory, in whole registers. Entries from `width` on are zero.
struct alignas(16) Packed {
    u32 at[4];
};

__device__ inline Packed packed(const Values &values) {
    const u32 bits = 8 * (u32)sizeof(T);
    Packed pack = {{0, 0, 0, 0}};
    EACH(k) pack.at[k * bits / 32] |= bits_of(put(values.at[k])) << k * bits % 32;
    return pack;
}

__device__ inline Values unpacked(const Packed &pack, u32 width) {
    const u32 bits = 8 * (u32)sizeof(T);
    Values values;
    EACH(k) values.at[k] = k < width ? get(of_bits(pack.at[k * bits / 32] >> k * bits % 32)) : 0.0f;
    return values;
}

__device__ inline Packed load_packed(const T *x, u32 width) {
    return width == WIDTH ? *(const Packed *)x : packed(load(x, width));
}

__device__ inline void store_packed(T *x, const Packed &pack, u32 width) {
    if (width == WIDTH) *(Packed *)x = pack;
    else store(x, unpacked(pack, width), width);
}

struct alignas(16) Four {
    float at[4];
};

// Loads values per channel, for example of a bias.
__device__ inline Values load_channels(const float *x, u32 width) {
    Values values = zeros();
    if (width >= 4) {
        EACH(k) if (k % 4 == 0 && k < width) {
            Four four = *(const Four *)(x + k);
            for (u32 j = 0; j < 4; ++j) values.at[k + j] = four.at[j];
        }
    } else {
        EACH(k) if (k < width) values.at[k] = x[k];
    }
    return values;
}

// Adds to values any of: a bias, a vector, and values of another map. Then multiplies them by the factors of a mask.
// Each pointer is null or that of the first channel.
__device__ inline Values with_addends(
    Values sum, const float *bias, const T *vector, const T *residual, const T *mask, u32 width
) {
    if (bias) {
        Values more = load_channels(bias, width);
        EACH(k) sum.at[k] += more.at[k];
    }
    if (vector) {
        Values more = load(vector, width);
        EACH(k) sum.at[k] += more.at[k];
    }
    if (residual) {
        Values more = load(residual, width);
        EACH(k) sum.at[k] += more.at[k];
    }
    if (mask) {
        Values factors = load(mask, width);
        // Never joined with an addition that follows: the sum has the same bits in each kernel.
        EACH(k) sum.at[k] = __fmul_rn(sum.at[k], factors.at[k]);
    }
    return sum;
}

// Returns the sum over a block of THREADS threads to each of them. `shared`: THREADS / 32 values.
__device__ inline float block_sum(float value, float *shared) {
    for (int other = 16; other > 0; other /= 2) value += __shfl_xor_sync(0xffffffffu, value, other);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0.0f;
    for (int warp = 0; warp < THREADS / 32; ++warp) value += shared[warp];
    return value;
}

// The same sum in f64. `shared`: THREADS values.
__device__ inline double block_sum(double value, double *shared) {
    shared[threadIdx.x] = value;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
        __syncthreads();
    }
    return shared[0];
}

__device__ inline float block_max(float value, float *shared) {
    for (int other = 16; other > 0; other /= 2) {
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, other));
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = shared[0];
    for (int warp = 1; warp < THREADS / 32; ++warp) value = fmaxf(value, shared[warp]);
    return value;
}

// Sums the values of a block's threads over rows of `packs` threads. Calls `take(channel, sum)` in one
// thread for each of `packs * width` channels. `shared`: THREADS elements.
template <class F>
__device__ inline void sum_rows(const Values &own, Values *shared, u32 packs, u32 width, F take) {
    u32 rows = THREADS / packs, channels = packs * width;
    __syncthreads();
    shared[threadIdx.x] = own;
    __syncthreads();
    if (channels > THREADS / 2) {
        for (u32 channel = threadIdx.x; channel < channels; channel += THREADS) {
            float sum = 0.0f;
            for (u32 row = 0; row < rows; ++row) sum += shared[row * packs + channel / width].at[channel % width];
            take(channel, sum);
        }
        return;
    }
    // All available threads add up parts of a channel, then one thread adds the parts.
    u32 parts = THREADS / channels, channel = threadIdx.x % channels, part = threadIdx.x / channels;
    float sum = 0.0f;
    for (u32 row = part; part < parts && row < rows; row += parts) {
        sum += shared[row * packs + channel / width].at[channel % width];
    }
    __syncthreads();
    shared[threadIdx.x].at[0] = sum;
    __syncthreads();
    if (part) return;
    for (part = 1; part < parts; ++part) sum += shared[part * channels + channel].at[0];
    take(channel, sum);
}
