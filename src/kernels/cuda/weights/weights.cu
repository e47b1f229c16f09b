// Weights in the layout and type of products, and gradients back. Each launch handles all weights of a network.

// A weight (rows, channels, pixels) in f32, and its place beside the others, in bytes: (rows, pixels, channels) in the
// maps' type, or in f32 if `wide` is set. A block handles `chunk` channels of a row.
struct Weight {
    float *values;
    u64 offset;
    u32 channels, pixels, chunk, wide;
};

// The part of a weight that one block handles: row by row, and in each row the chunks.
struct Part {
    u32 weight;
    u32 index;
};

// Number of values that a block handles at most.
#define PACK 2304

struct Place {
    // The first value of the part: among the weight's values, and among the packed ones.
    u64 from, to;
    u32 channels, count;
};

__device__ inline Place place_of(const Weight &own, u32 index) {
    u32 chunks = (own.channels + own.chunk - 1) / own.chunk, first = index % chunks * own.chunk;
    u64 row = (u64)(index / chunks) * own.channels * own.pixels;
    u32 left = own.channels - first;
    Place place;
    place.channels = left < own.chunk ? left : own.chunk;
    place.count = place.channels * own.pixels;
    place.from = row + (u64)first * own.pixels;
    place.to = row + first;
    return place;
}

extern "C" __global__ void pack_weights(const Weight *weights, const Part *parts, T *packed) {
    __shared__ float values[PACK];
    Part part = parts[blockIdx.x];
    Weight own = weights[part.weight];
    Place place = place_of(own, part.index);
    for (u32 i = threadIdx.x; i < place.count; i += THREADS) values[i] = own.values[place.from + i];
    __syncthreads();
    T *to = packed + own.offset / sizeof(T) + place.to;
    for (u32 i = threadIdx.x; i < place.count; i += THREADS) {
        u32 channel = i % place.channels, pixel = i / place.channels;
        to[(u64)pixel * own.channels + channel] = put(values[channel * own.pixels + pixel]);
    }
}

// Unpacks gradients: the inverse of `pack_weights`.
extern "C" __global__ void unpack_weights(const Weight *weights, const Part *parts, const T *packed) {
    __shared__ float values[PACK];
    Part part = parts[blockIdx.x];
    Weight own = weights[part.weight];
    Place place = place_of(own, part.index);
    const char *from = (const char *)packed + own.offset;
    for (u32 i = threadIdx.x; i < place.count; i += THREADS) {
        u32 channel = i % place.channels, pixel = i / place.channels;
        u64 at = place.to + (u64)pixel * own.channels + channel;
        values[channel * own.pixels + pixel] = own.wide ? ((const float *)from)[at] : get(((const T *)from)[at]);
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < place.count; i += THREADS) own.values[place.from + i] = values[i];
}
