// Random numbers: Philox4x32-10 (Salmon et al. 2011), from the same counters as on the CPU.

__device__ inline void philox(u32 c[4], u32 k0, u32 k1) {
    for (int round = 0; round < 10; ++round) {
        u64 p0 = (u64)c[0] * 0xD2511F53u, p1 = (u64)c[2] * 0xCD9E8D57u;
        u32 c1 = c[1], c3 = c[3];
        c[0] = (u32)(p1 >> 32) ^ c1 ^ k0;
        c[1] = (u32)p1;
        c[2] = (u32)(p0 >> 32) ^ c3 ^ k1;
        c[3] = (u32)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

// The upper half of a counter: purpose, index and step. The step is read from the device, so that a captured launch
// draws new numbers each time.
__device__ inline u64 placed(u64 place, const u64 *step) { return place | (*step & 0xffffffffffull); }

__device__ inline double uniform(u32 word) { return (word + 0.5) / 4294967296.0; }

// Draws four integers from each of `count` counters of a stream.
extern "C" __global__ void integers(u32 *y, u64 seed, u64 place, const u64 *step, u32 sample, u32 count) {
    u32 i = global_index();
    if (i >= count) return;
    place = placed(place, step);
    u32 c[4] = {i, sample, (u32)place, (u32)(place >> 32)};
    philox(c, (u32)seed, (u32)(seed >> 32));
    for (int k = 0; k < 4; ++k) y[4 * (u64)i + k] = c[k];
}

// Draws standard normals (batch, size), four from each counter (Box and Muller 1958). Each sample from `first` on has
// its own stream. Threads correspond to counters, blocks in x to samples, and blocks in y to further counters of a
// sample.
extern "C" __global__ void normals(float *y, u64 seed, u64 place, const u64 *step, u32 first, u32 size) {
    u32 i = blockIdx.y * blockDim.x + threadIdx.x;
    if (4 * (u64)i >= size) return;
    place = placed(place, step);
    u32 c[4] = {i, first + blockIdx.x, (u32)place, (u32)(place >> 32)};
    philox(c, (u32)seed, (u32)(seed >> 32));
    y += (u64)blockIdx.x * size + 4 * (u64)i;
    for (int pair = 0; pair < 4; pair += 2) {
        if (4 * (u64)i + pair >= size) return;
        double radius = sqrt(-2.0 * log(uniform(c[pair])));
        double angle = 6.283185307179586 * uniform(c[pair + 1]);
        y[pair] = (float)(radius * cos(angle));
        if (4 * (u64)i + pair + 1 < size) y[pair + 1] = (float)(radius * sin(angle));
    }
}

// Draws a dropout mask (batch, channels): 0 with probability p, and `keep` otherwise.
extern "C" __global__ void dropout_mask(
    T *y, u64 seed, u64 place, const u64 *step, u32 first_sample, double p, float keep, u32 channels, u32 count
) {
    u32 i = global_index();
    if (i >= count) return;
    place = placed(place, step);
    u32 channel = i % channels;
    u32 c[4] = {channel / 4, first_sample + (u32)(i / channels), (u32)place, (u32)(place >> 32)};
    philox(c, (u32)seed, (u32)(seed >> 32));
    y[i] = put(uniform(c[channel % 4]) < p ? 0.0f : keep);
}
